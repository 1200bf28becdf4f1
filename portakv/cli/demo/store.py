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

from portakv.cli.console import Report, installing, print_json
from portakv.errors import InvalidTerms, PortaKVError, StoreError
from portakv.runtime.devices import usual_device

EXAMPLE = "portakv.cli.demo.prefix_store"
#: Bytes of the demo's slots in the folder: some hundred blocks of its model.
CAPACITY = 16 << 20


def run_store_demo(folder: str, *, device: str | None = None, json: bool = False) -> int:
    """Run the demo in a folder, where the blocks stay. Return 0 if the tokens are the same.

    Raises:
        StoreError: transformers or a package of the store is missing, or a process failed.
        InvalidTerms: the folder is a URL.
    """
    if "://" in folder:
        raise InvalidTerms(
            f"Expected a folder of a local disk, got the URL {folder!r}. For a bucket run the "
            f"example with `python -m portakv.cli.demo.prefix_store --remote URL`."
        )
    show: Callable[[str], None] = _silent if json else _show
    where = str(usual_device() if device is None else device)
    salt = secrets.token_hex(8)  # hides the blocks of an earlier run
    show(f"A prefix in {folder}: computed, saved, its process killed, loaded by another one\n")
    with started(__name__, folder, where, 0, salt, "stay") as writer:
        wrote = read_answer(writer, StoreError)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    show(f"computed  {wrote['computed']} tokens of a prompt, by a Llama in process {writer.pid}")
    show(f"          pages {wrote['layout']!r}")
    show(f"saved     through host memory to the disk; {len(wrote['tokens'])} tokens follow")
    show(f"killed    with SIGKILL (exit {writer.returncode}), its store not closed")
    with started(__name__, folder, where, 1, salt, "end") as reader:
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


def take_part(folder: str, device: str, layout: int, salt: str) -> Report:
    """Answer the prompt with a store in the folder, as the writer or the reader."""
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
    prompt = list(example.PROMPT.encode())
    pages = example.pages_for(model, example.LAYOUTS[layout])
    form = BlockForm.of(pages, model="portakv demo")
    try:
        disk = Disk(folder, capacity=CAPACITY, track=with_bar)
        store = BlockStore(form, staging=CAPACITY, host=CAPACITY, tiers=[disk])
        report = asdict(example.answer(model, prompt, pages, store, salt.encode()))
    except PortaKVError as error:
        return {"error": str(error).rstrip(".")}
    report |= {"layout": example.LAYOUTS[layout]}
    if layout:
        store.close()
        for tensor in pages.owners:
            tensor.normal_()
        noise = example.DynamicCache()
        done = report["loaded"]
        example.load_prefix(noise, pages, list(range(done // example.BLOCK_SIZE)), done)
        report["noise"] = example.go_on(model, noise, prompt[done:])
    return report


if __name__ == "__main__":
    _folder, _device, _layout, _salt, _end = sys.argv[1:]
    print(dumps(take_part(_folder, _device, int(_layout), _salt)), flush=True)
    if _end == "stay":
        sys.stdin.read()
