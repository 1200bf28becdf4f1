# SPDX-License-Identifier: Apache-2.0
"""`portakv demo --store`: save a prefix to a disk, kill the process, go on in another process.

The demo has three processes. The command itself prints. The writer computes and saves, and is
killed with SIGKILL. The reader has another layout of its pages; it loads, goes on and is compared.
``python -m portakv.cli.demo.store`` runs this module as the writer or the reader.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps, loads
from typing import TYPE_CHECKING

import torch

from portakv.cli.console import Report, installing, print_json
from portakv.errors import InvalidTerms, PortaKVError, StoreError
from portakv.layout.packing import Pack
from portakv.runtime.devices import usual_device
from portakv.runtime.linux import require_linux
from portakv.view.packed import as_pack

if TYPE_CHECKING:
    from portakv.storage import BlockStore

EXAMPLE = "portakv.cli.demo.prefix_store"
#: Bytes of the demo's slots in the folder: some hundred blocks of its model.
CAPACITY = 16 << 20


def run_store_demo(
    folder: str, *, device: str | None = None, json: bool = False, encoding: str = ""
) -> int:
    """Run the demo in a folder, where the blocks stay. Return 0 if the tokens are the same.

    ``encoding``: ``pack`` stores the blocks of a bf16 model packed, and those that do not fit raw.

    Raises:
        StoreError: transformers or a package of the store is missing, or a process failed.
        InvalidTerms: the folder is a URL, or another encoding.
        Unsupported: the system is not Linux.
    """
    require_linux("`portakv demo --store`")
    pack = as_pack(encoding or None)
    if "://" in folder:
        raise InvalidTerms(
            f"Expected a folder of a local disk, got the URL {folder!r}. For a bucket run the "
            f"example with `python -m portakv.cli.demo.prefix_store --remote URL`."
        )
    show: Callable[[str], None] = _silent if json else _show
    where = str(usual_device() if device is None else device)
    salt = secrets.token_hex(8)  # hides the blocks of an earlier run
    show(f"A prefix in {folder}: computed, saved, its process killed, loaded by another one\n")
    how = "" if pack is None else pack.text
    with started(__name__, folder, where, 0, salt, "stay", how) as writer:
        wrote = read_answer(writer, StoreError)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    show(f"computed  {wrote['computed']} tokens of a prompt, by a Llama in process {writer.pid}")
    show(f"          pages {wrote['layout']!r}")
    show(f"saved     through host memory to the disk; {len(wrote['tokens'])} tokens follow")
    show(f"killed    with SIGKILL (exit {writer.returncode}), its store not closed")
    if "stored" in wrote:
        show(f"on disk   {_on_disk(wrote['stored'])}")
    with started(__name__, folder, where, 1, salt, "end", how) as reader:
        read = read_answer(reader, StoreError)
    show(f"loaded    {read['loaded']} tokens by process {reader.pid}; computed {read['computed']}")
    show(f"          pages {read['layout']!r}")
    same = wrote["tokens"] == read["tokens"]
    differs = read["noise"] != read["tokens"]
    show(f"goes on   {len(read['tokens'])} tokens, {'the same' if same else 'NOT THE SAME'}")
    show(f"control   tokens after pages of noise {'differ' if differs else 'DO NOT DIFFER'}")
    good = is_good(wrote, read)
    if json:
        print_json(
            {
                "folder": folder,
                "killed": writer.returncode == -signal.SIGKILL,
                "wrote": wrote,
                "read": read,
                "ok": good,
            }
        )
    else:
        show(f"\n`portakv store check {folder}` verifies the blocks that stay there.")
    return 0 if good else 1


def _on_disk(stored: Report) -> str:
    """Return how many blocks are packed and raw, and their bytes next to those of raw ones."""
    packed = stored["packed_blocks"]
    raw = stored["raw_blocks"]
    size = stored["packed_bytes"]
    plain = stored["raw_bytes"]
    nbytes = packed * size + raw * plain
    return (
        f"{packed} blocks packed in {size} B each and {raw} raw in {plain} B each: {nbytes} B, raw "
        f"{(packed + raw) * plain} B"
    )


def is_good(wrote: Report, read: Report) -> bool:
    """Return whether the tokens are the same, and differ without the loaded pages."""
    same = wrote["tokens"] == read["tokens"] != read["noise"]
    return bool(same and read["loaded"])


def _show(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


@contextmanager
def started(module: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Start a process of a demo, and kill it at the end of the context.

    A process that reads standard input to the end also ends if the command is killed. Ctrl-C ends
    the command only, and the command ends the process.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_answer(process: subprocess.Popen[str], error: type[PortaKVError]) -> Report:
    """Return the answer of a demo's process, one line of JSON, or raise the error in it."""
    assert process.stdout is not None
    answer = next((line for line in process.stdout if line.startswith("{")), "")
    report: Report = loads(answer or "{}")
    if "error" in report:
        raise error(report["error"])
    if not answer:
        raise error(
            f"Expected process {process.pid} of the demo to answer, got nothing. Look at its "
            f"output above."
        )
    return report


def take_part(folder: str, device: str, layout: int, salt: str, encoding: str = "") -> Report:
    """Answer the prompt with a store in the folder, as the writer or the reader.

    ``encoding``: the text of a `Pack`; empty: the blocks are stored as they are.
    """
    from portakv.cli.store import with_bar
    from portakv.storage import BlockForm, BlockStore, Disk

    try:
        example = importlib.import_module(EXAMPLE)
    except (
        ImportError,
        PortaKVError,
    ) as error:  # also an unsupported release
        return {"error": f"it needs transformers ({error}); {installing('demo')} adds it"}
    model = example.small_model().to(device)
    if encoding:
        model = model.to(torch.bfloat16)
    prompt = list(example.PROMPT.encode())
    pages = example.pages_for(model, example.LAYOUTS[layout])
    forms = {"": BlockForm.of(pages, model="portakv demo")}
    if encoding:
        pack = Pack.of_text(encoding)
        forms = {
            "packed": BlockForm.of(pages, model="portakv demo", encoding=pack),
            "raw": forms[""],
        }
    try:
        disk = Disk(folder, capacity=CAPACITY, track=with_bar)
        form = forms if encoding else forms[""]
        store = BlockStore(form, staging=CAPACITY, host=CAPACITY, tiers=[disk])
        own = store.of("packed") if encoding else store
        report = asdict(example.answer(model, prompt, pages, own, salt.encode()))
    except PortaKVError as error:
        return {"error": str(error).rstrip(".")}
    report |= {"layout": example.LAYOUTS[layout]}
    if encoding:
        report["stored"] = _stored(store)
    if layout:
        store.close()
        for tensor in pages.owners:
            tensor.normal_()
        noise = example.DynamicCache()
        done = report["loaded"]
        example.load_prefix(noise, pages, list(range(done // example.BLOCK_SIZE)), done)
        report["noise"] = example.go_on(model, noise, prompt[done:])
    return report


def _stored(store: BlockStore) -> Report:
    """Return the blocks of each form on the disk, and the bytes of one."""
    stored: Report = {}
    tiers = {tier["form"]: tier for tier in store.statistics()["tiers"]}
    for name, form in store.forms.items():
        folders = [each for each in tiers[name].values() if isinstance(each, dict)]
        stored[f"{name}_blocks"] = sum(folder["used"] for folder in folders)
        stored[f"{name}_bytes"] = form.payload_bytes
    return stored


if __name__ == "__main__":
    _folder, _device, _layout, _salt, _end, *_encoding = sys.argv[1:]
    print(dumps(take_part(_folder, _device, int(_layout), _salt, *_encoding)), flush=True)
    if _end == "stay":
        sys.stdin.read()
