# SPDX-License-Identifier: Apache-2.0
"""`portakv demo --store`: a prefix is saved to a disk, the process is killed, another goes on.

Three processes: the command itself, which only tells; one that computes, saves and is killed with
SIGKILL; and one with another layout of its pages, which loads, goes on and is compared. Run as
``python -m portakv.cli.demo.store`` this module is each of the latter two.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps, loads
from typing import Any

from portakv.cli.console import installing, print_json
from portakv.errors import InvalidTerms, PortaKVError, StoreError
from portakv.runtime.devices import usual_device

EXAMPLE = "portakv_examples.prefix_store"
#: Bytes of the demo's slots in the folder: some hundred blocks of its model.
CAPACITY = 16 << 20


def run_store_demo(folder: str, *, device: str | None = None, json: bool = False) -> int:
    """Run the demo in a folder, which keeps the blocks; 0 if the tokens are the same.

    Raises:
        StoreError: transformers or what the store needs is not there, or a process failed.
        InvalidTerms: the folder is a URL.
    """
    if "://" in folder:
        raise InvalidTerms(
            f"The demo of a store was asked for {folder!r}, a URL: expected a folder of a local "
            f"disk; the example portakv_examples.prefix_store takes a bucket by --remote."
        )
    tell: Callable[[str], None] = _silent if json else _tell
    where = str(usual_device() if device is None else device)
    salt = secrets.token_hex(8)  # so that an earlier run's blocks are not found
    tell(f"A prefix in {folder}: computed, saved, its process killed, loaded by another one\n")
    with started(__name__, folder, where, 0, salt, "stay") as writer:
        wrote = heard(writer, StoreError)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    tell(f"computed  {wrote['computed']} tokens of a prompt, by a Llama in process {writer.pid}")
    tell(f"          pages {wrote['layout']!r}")
    tell(f"saved     through host memory to the disk; {len(wrote['tokens'])} tokens follow")
    tell(f"killed    with SIGKILL (exit {writer.returncode}), its store not closed")
    with started(__name__, folder, where, 1, salt, "end") as reader:
        read = heard(reader, StoreError)
    tell(f"loaded    {read['loaded']} tokens by process {reader.pid}; computed {read['computed']}")
    tell(f"          pages {read['layout']!r}")
    same = wrote["tokens"] == read["tokens"]
    differs = read["noise"] != read["tokens"]
    tell(f"goes on   {len(read['tokens'])} tokens, {'the same' if same else 'NOT THE SAME'}")
    tell(f"control   tokens after pages of noise {'differ' if differs else 'DO NOT DIFFER'}")
    good = is_good(wrote, read)
    if json:
        found = {"folder": folder, "killed": writer.returncode == -signal.SIGKILL}
        print_json({**found, "wrote": wrote, "read": read, "ok": good})
    else:
        tell(f"\n`portakv store check {folder}` verifies what is left there.")
    return 0 if good else 1


def is_good(wrote: Mapping[str, Any], read: Mapping[str, Any]) -> bool:
    """Whether the tokens are the same, and would not be without what was loaded."""
    same = wrote["tokens"] == read["tokens"] != read["noise"]
    return bool(same and read["loaded"])


def _tell(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


@contextmanager
def started(module: str, *words: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of a demo, which does not outlive the command; nor, if it reads standard input to
    the end, a command that is killed. Ctrl-C ends the command alone, which ends it."""
    command = [sys.executable, "-m", module, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str], error: type[PortaKVError]) -> dict[str, Any]:
    """What a process of a demo says, one line of JSON; or the error that it ended with."""
    assert process.stdout is not None
    said = next((line for line in process.stdout if line.startswith("{")), "")
    found: dict[str, Any] = loads(said or "{}")
    if not said or "error" in found:
        if "error" in found:
            raise error(found["error"])
        raise error(
            f"Expected process {process.pid} of the demo to answer, got nothing. Look at what it "
            f"wrote above."
        )
    return found


def take_part(folder: str, device: str, layout: int, salt: str) -> dict[str, Any]:
    """Answer the prompt out of a store in the folder, as either process does; what came of it."""
    from portakv.cli.store import with_bar
    from portakv.storage import BlockForm, BlockStore, Disk

    try:
        example = importlib.import_module(EXAMPLE)
    except (ImportError, PortaKVError) as error:  # a release that the plug does not serve, too
        return {"error": f"it needs transformers ({error}); {installing('demo')} adds it"}
    model = example.small_model().to(device)
    prompt = list(example.PROMPT.encode())
    pages = example.pages_for(model, example.LAYOUTS[layout])
    form = BlockForm.of(pages, model="portakv demo")
    try:
        disk = Disk(folder, capacity=CAPACITY, track=with_bar)
        store = BlockStore(form, staging=CAPACITY, host=CAPACITY, tiers=[disk])
        told = asdict(example.answer(model, prompt, pages, store, salt.encode()))
    except PortaKVError as error:
        return {"error": str(error).rstrip(".")}
    told |= {"layout": example.LAYOUTS[layout]}
    if layout:
        store.close()
        for tensor in pages.owners:
            tensor.normal_()
        noise = example.DynamicCache()
        done = told["loaded"]
        example.load_prefix(noise, pages, list(range(done // example.BLOCK_SIZE)), done)
        told["noise"] = example.go_on(model, noise, prompt[done:])
    return told


if __name__ == "__main__":
    _folder, _device, _layout, _salt, _end = sys.argv[1:]
    print(dumps(take_part(_folder, _device, int(_layout), _salt)), flush=True)
    if _end == "stay":
        sys.stdin.read()
