# SPDX-License-Identifier: Apache-2.0
"""Trace calls of the library on the CPU: files and functions that they enter, and their host times.

`house.py` runs this module as a program, since a trace needs a process that has made no call yet.
In the folder `tests`:

    python -m support.traced_calls trace    print the traces as JSON, of all calls or of those named
    python -m support.traced_calls times    print the host times as JSON
    python -m support.traced_calls owner    own the rows that pulls bring, until the input ends

A call ends when its result has been waited for. A trace has the frames of the library alone, of all
threads of the process, also those that go on after the end of the call.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import portakv
from portakv import AdaptiveConnector, Index, KVView, copy_blocks, copy_rows
from portakv.migrate import Channel, Owner, Reader, Shard, shared_empty
from portakv.storage import BlockForm, BlockStore, Disk
from support import vllm_stub

CACHE = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"
BLOCK_FIRST = "block layer kv token head dim"
MODEL = "a model"
#: A cache: layers, kv, blocks, tokens of a block, heads, dim.
COPIED = (4, 2, 16, 16, 8, 128)
STORED = (2, 2, 64, 16, 2, 8)
PULLED = (2, 2, 8, 16, 4, 16)
BLOCKS = 8  # that a call saves or loads
LIMIT = 30.0  # seconds; nothing here takes as long

#: Seconds without a new function after which other threads do no more for a call, and the longest
#: wait for that. Some threads poll, so that a wait for their last frame would not end.
QUIET = 0.05
PATIENCE = 2.0
#: How often a call is timed in one setting, with the most seconds for all, or in new settings.
TIMES = 300
SECONDS = 5.0
SETTINGS = 20
#: Seconds in which the store's threads end what a step of the connector has begun.
STORED_WITHIN = 0.2


_owners: list[subprocess.Popen[str]] = []  # whose input stays open


class Setting(NamedTuple):
    """What a call needs is there.

    Attributes:
        call: the call that counts.
        after: called after each call; does not count.
    """

    call: Callable[[], object]
    after: Callable[[], object] = lambda: None


Made = Generator[Setting, None, None]


class Call(NamedTuple):
    """A call to trace.

    Attributes:
        make: a generator function that makes a new setting, yields it, and closes it.
        before: calls in the same setting before the one that counts.
        renewed: each time needs a new setting, because a later call takes another path.
    """

    name: str
    make: Callable[[], Made]
    before: int
    renewed: bool = False


class Frame(NamedTuple):
    """A function of the library that a thread enters."""

    thread: int
    file: str  # relative to the package
    line: int  # where the function begins


class Recorder:
    """Records the functions of a folder that threads enter. Make it before these threads start."""

    def __init__(self, root: Path) -> None:
        self.frames: list[Frame] = []
        self._root = f"{root.resolve()}{os.sep}"
        self._files: dict[str, str | None] = {}  # by the name in the code; None outside the folder
        self._on = False

    @contextmanager
    def follow(self) -> Generator[None, None, None]:
        """Follow this thread, and all that start until the end of the context."""
        before = sys.getprofile()
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(before)
            threading.setprofile(None)

    def record(self, call: Callable[[], object]) -> list[Frame]:
        """Return the frames of a call, and of the threads that go on after it."""
        self.frames = []
        self._on = True
        try:
            call()
            until = time.monotonic() + PATIENCE
            seen = -1
            while seen != functions(self.frames) and time.monotonic() < until:
                seen = functions(self.frames)
                time.sleep(QUIET)
        finally:
            self._on = False
        return self.frames

    def _event(self, frame: Any, event: str, _argument: object) -> None:
        if not self._on or event != "call":
            return
        code = frame.f_code
        path = code.co_filename
        if path not in self._files:
            whole = os.path.realpath(path)
            inside = whole.startswith(self._root)
            self._files[path] = whole.removeprefix(self._root) if inside else None
        file = self._files[path]
        if file is not None:
            self.frames.append(Frame(threading.get_ident(), file, code.co_firstlineno))


def functions(frames: list[Frame]) -> int:
    """Return the number of functions of a trace."""
    return len({(frame.file, frame.line) for frame in [*frames]})


def counts(frames: list[Frame]) -> dict[str, Any]:
    """Return the files and functions of a trace, and how often a thread changes the file.

    The first frame of a thread counts as a change.
    """
    last: dict[int, str] = {}
    changes = 0
    for frame in frames:
        changes += last.get(frame.thread) != frame.file
        last[frame.thread] = frame.file
    return {
        "files": len({frame.file for frame in frames}),
        "functions": functions(frames),
        "changes": changes,
    }


def rows() -> Made:
    """Copy rows of a paged cache into a chunk, by a tensor of slots."""
    paged = KVView([*torch.zeros(COPIED, dtype=torch.float16)], CACHE)
    chunk = torch.empty((2, 4, 48, 8 * 128), dtype=torch.float16)
    dense = KVView(chunk, CHUNK, heads=8)
    slots = torch.arange(48) + 48
    yield Setting(lambda: copy_rows(paged, dense, src_index=slots).synchronize())


def blocks() -> Made:
    """Copy blocks into a pool of another layout, by lists of ids."""
    src = KVView([*torch.zeros(COPIED, dtype=torch.float16)], CACHE)
    pool = torch.empty((16, 4, 2, 16, 8, 128), dtype=torch.float16)
    dst = KVView(pool, BLOCK_FIRST)
    yield Setting(lambda: copy_blocks(src, dst, [3, 7, 12], [0, 1, 2]).synchronize())


def gathers() -> Made:
    """Copy rows of registered caches into chunks that no call has had before."""
    connector = AdaptiveConnector("cpu", None, CACHE, CHUNK)
    connector.register_kv_caches([*torch.zeros(COPIED, dtype=torch.float16)])
    slots = Index([block * 16 + token for block in (3, 7, 12) for token in range(16)])
    chunk = torch.empty((2, 4, 48, 8 * 128), dtype=torch.float16)
    yield Setting(lambda: connector.from_gpu(chunk.detach(), slot_mapping=slots).synchronize())


@contextmanager
def _store(host: int, folder: Path) -> Generator[tuple[BlockStore, KVView], None, None]:
    """Open a store of small blocks over a disk, and a cache."""
    view = KVView([*torch.ones(STORED, dtype=torch.int16)], CACHE)
    disk = Disk(folder, capacity=4 << 20)
    form = BlockForm.of(view, MODEL)
    with closing(BlockStore(form, staging=4 << 20, host=host, tiers=[disk])) as store:
        yield store, view


def _keys(number: int) -> list[bytes]:
    """Return keys of blocks, which differ for each number."""
    return [(number * BLOCKS + at).to_bytes(32, "big") for at in range(BLOCKS)]


def _loads(host: int) -> Made:
    """Load blocks that a save has stored; without room in the host tier the disk alone has them."""
    with tempfile.TemporaryDirectory() as folder, _store(host, Path(folder)) as (store, view):
        store.save(view, range(BLOCKS), _keys(0)).synchronize(LIMIT)
        into = range(20, 20 + BLOCKS)
        whole = view.tensors

        def load() -> None:
            store.load(view, into, _keys(0)).synchronize(LIMIT)

        for layer in whole:
            layer[:, into] = 0
        load()
        if not all(bool((layer[:, into] == 1).all()) for layer in whole):
            raise RuntimeError("Expected the blocks that were saved, got others.")
        yield Setting(load)


def host_loads() -> Made:
    """Load blocks of the host tier."""
    yield from _loads(1 << 20)


def disk_loads() -> Made:
    """Load blocks that a disk alone has."""
    yield from _loads(0)


def saves() -> Made:
    """Save blocks of new keys."""
    with tempfile.TemporaryDirectory() as folder, _store(1 << 20, Path(folder)) as (store, view):
        numbers = itertools.count()
        yield Setting(
            lambda: store.save(view, range(BLOCKS), _keys(next(numbers))).synchronize(LIMIT)
        )


def _shard(value: int) -> Shard:
    """Return rows that can be shared with another process."""
    return Shard(KVView([*shared_empty(PULLED, torch.int16).fill_(value)], CACHE))


def own() -> None:
    """Offer rows, print the ticket, and serve pulls until the input ends."""
    with (
        closing(Channel(timeout=LIMIT)) as channel,
        closing(Owner(channel, _shard(1), model=MODEL)) as owner,
    ):
        terms: dict[str, Any] = {"tokens": 64, "lease": 1000.0, "readers": 1 << 20}
        print(owner.offer([1, 3, 2, 0], **terms).ticket.hex(), flush=True)
        sys.stdin.read()


def pulls() -> Made:
    """Pull rows of another process, by a new reader."""
    with ExitStack() as stack:
        ticket = _ticket()
        channel = stack.enter_context(closing(Channel(timeout=LIMIT)))
        own = _shard(0)
        reader = stack.enter_context(closing(Reader(channel, own, model=MODEL)))
        yield Setting(lambda: reader.pull(ticket, [4, 5, 6, 7], overlap="idle").synchronize(LIMIT))
        if not all(bool((layer[:, 4:] == 1).all()) for layer in own.view.tensors):
            raise RuntimeError("Expected the rows of the owner, got others.")


@functools.cache
def _ticket() -> bytes:
    """Return the ticket of a process that offers rows. It ends when this process ends."""
    words = [sys.executable, "-m", "support.traced_calls", "owner"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    _owners.append(process)
    return bytes.fromhex(process.stdout.readline().strip())


def steps() -> Made:
    """Step through vLLM's hooks: one request is looked up and loaded, another one is saved.

    The hooks are those of the scheduler and of one worker, called with a stand-in of vLLM.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_stub.imported(Path(folder) / "modules") as (_, hooks),
    ):
        yield from _steps(hooks, f"{folder}/store")


def _steps(hooks: Any, folder: str) -> Made:
    size = 16
    tokens = 8 * size  # of a request
    many = 64
    names = map(str, itertools.count())
    vars(hooks.ranks)["PATIENCE"] = 0.0  # the worker comes after the scheduler
    store = SimpleNamespace(configurations=vllm_stub.configuration(folder, "e", many + 1, size))
    scheduler_side = hooks.HookSchedulerSide(size, [], 1, store, None, None)
    draw = SimpleNamespace(blocks=many, block_size=size)
    worker = hooks.HookWorker(SimpleNamespace(draw=draw, store=store), 0)
    loads = range(32, 40)  # blocks of the engine
    others = range(8)

    def prompt(number: int) -> list[int]:
        return [number + 1] * tokens + [0]  # a look-up leaves the last token to compute

    running: list[str] = []  # requests of the last step

    def step(looked_up: int | None, computed: int) -> None:
        """Look one prompt up and load it, compute another one, and end the requests before."""
        for name in running:
            scheduler_side.finished(name)
        running[:] = [next(names)]
        if looked_up is not None:
            name = next(names)
            scheduler_side.add(name, prompt(looked_up))
            stored = scheduler_side.leading(name, 0)
            if stored != tokens:
                raise RuntimeError(f"Expected {tokens} tokens of the store, got {stored}.")
            scheduler_side.allocated(name, 0, tokens, [loads])
            running.append(name)
        scheduler_side.add(running[0], prompt(computed))
        scheduler_side.leading(running[0], 0)
        scheduler_side.scheduled(running[0], 0, tokens, [others], replaced=True)
        plan = scheduler_side.plan()
        worker.before_step(plan)
        for block in others:
            for at in range(size):
                worker.write(block, at, block)
        worker.after_step(plan)
        scheduler_side.take(worker.report)
        worker.report = type(worker.report)()
        scheduler_side.freed(worker.freed)
        worker.freed = set()
        scheduler_side.end_step()

    try:
        step(None, 0)
        time.sleep(STORED_WITHIN)
        numbers = itertools.count()

        def call() -> None:
            number = next(numbers)
            step(number, number + 1)

        yield Setting(call, lambda: time.sleep(STORED_WITHIN))
    finally:
        worker.connector.shutdown()
        scheduler_side.connector.shutdown()


CALLS = [
    Call("copy_rows, second", rows, 1, renewed=True),
    Call("copy_rows, third", rows, 2),
    Call("copy_blocks, second", blocks, 1, renewed=True),
    Call("copy_blocks, third", blocks, 2),
    Call("from_gpu, second", gathers, 1, renewed=True),
    Call("from_gpu, third", gathers, 2),
    Call("BlockStore.load, host", host_loads, 2),
    Call("BlockStore.load, disk", disk_loads, 2),
    Call("BlockStore.save", saves, 2),
    Call("Reader.pull, first", pulls, 0, renewed=True),
    Call("Reader.pull, later", pulls, 2),
    Call("vLLM connector, step", steps, 2),
]


def trace(call: Call) -> dict[str, Any]:
    """Return the counts of a call in a new setting."""
    recorder = Recorder(Path(portakv.__file__).parent)
    with recorder.follow(), contextmanager(call.make)() as made:
        for _ in range(call.before):
            made.call()
            made.after()
        recorder.record(lambda: None)  # what the calls before have left to other threads
        return counts(recorder.record(made.call))


def times(call: Call) -> dict[str, Any]:
    """Return the median and the least host time of a call, in microseconds."""
    seconds: list[float] = []

    def measure(made: Setting, many: int) -> None:
        for _ in range(call.before):
            made.call()
            made.after()
        began = time.monotonic()
        for _ in range(many):
            before = time.perf_counter()
            made.call()
            seconds.append(time.perf_counter() - before)
            made.after()
            if time.monotonic() - began > SECONDS:
                return

    for _ in range(SETTINGS if call.renewed else 1):
        with contextmanager(call.make)() as made:
            measure(made, 1 if call.renewed else TIMES)
    return {
        "median": round(median(seconds) * 1e6, 1),
        "least": round(min(seconds) * 1e6, 1),
        "times": len(seconds),
    }


def measured(
    measure: Callable[[Call], dict[str, Any]], names: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return what is measured of each call by its name, or the reason why it cannot be.

    ``names``: of the calls; none: all of them.

    Each call has a process that has made no call before. It is a fork of this one, which has
    imported the library.
    """
    forks = multiprocessing.get_context("fork")
    results: dict[str, dict[str, Any]] = {}
    for call in CALLS:
        if names and call.name not in names:
            continue
        reader, writer = forks.Pipe(duplex=False)
        process = forks.Process(target=_measure, args=(measure, call, writer))
        process.start()
        writer.close()
        try:
            results[call.name] = reader.recv()
        except EOFError:
            results[call.name] = {"failed": "the process ended"}
        process.join()
    return results


def _measure(measure: Callable[[Call], dict[str, Any]], call: Call, writer: Connection) -> None:
    try:
        result = measure(call)
    except Exception as error:  # the other calls are measured all the same
        result = {"failed": f"{type(error).__name__}: {error}"}
    writer.send(result)


if __name__ == "__main__":
    if sys.argv[1] == "owner":
        own()
    else:
        torch.set_num_threads(1)
        verb, *names = sys.argv[1:]
        print(json.dumps(measured({"trace": trace, "times": times}[verb], names)))
