# SPDX-License-Identifier: Apache-2.0
"""How long a caller of a store waits by the wall clock: for blocks that the host tier has, for its
own blocks after a save, and for an urgent load alongside loads in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from portakv import CopyOptions, KVView
from portakv.host import pinned
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore
from portakv.storage.tiers.disk import Disk
from portakv_benchmarks.host.suite import KB
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import Method, Sample, cpu_seconds
from portakv_benchmarks.storage.costs import CPU
from portakv_benchmarks.storage.suite import StorageBench
from portakv_benchmarks.storage.tiers import caches, words

LIMIT = 120.0  # seconds of a call, which hangs then
#: (blocks, bytes of a block) of a call on the host.
ON_HOST = (8, 2 * KB)
#: Calls of a trial, of which the median counts: of few blocks, and of many.
CALLS = 20
FEW_CALLS = 3
#: Blocks of 2 KB of a background load, and of an urgent one; seconds between two urgent ones.
BACKGROUND = 4096
URGENT = 8
PACE = 0.02


def wait_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield steps for loads from the host tier, for saves, and for urgent loads."""
    waits = bench.sizes.waits if bench.device.type != "cpu" else bench.sizes.waits[:1]
    cases = [(*ON_HOST, CPU), *((*case, bench.device) for case in waits)]
    for blocks, nbytes, device in cases:
        name = f"{blocks:,} x {in_words(nbytes)}"
        yield f"host tier: {name} to {device.type}", partial(_hits, bench, blocks, nbytes, device)
    yield "urgent loads alongside loads", partial(_urgent, bench)


class Hits:
    """A store whose host tier has all blocks of a cache, and a second cache to load them into."""

    def __init__(self, blocks: int, nbytes: int, device: torch.device) -> None:
        layers = 32 if nbytes >= 64 * KB else 1
        self.device = device
        self.blocks = blocks
        self.source = caches(blocks, nbytes, device, layers)
        self.target = caches(blocks, nbytes, device, layers)
        self.form = BlockForm.of(self.source, "bench")
        self.nbytes = blocks * self.form.payload_bytes
        size = self.form.image_bytes
        staging = 2 * (blocks + 2) * size
        self.store = BlockStore(self.form, staging=staging, host=blocks * size, full="wait")
        self.keys = [number.to_bytes(32, "big") for number in range(blocks)]
        self.store.save(self.source, range(blocks), self.keys).synchronize(LIMIT)
        self.numbers = iter(range(1 << 32, 1 << 62))

    def load(self, options: CopyOptions | None) -> None:
        """Load all blocks in a random order."""
        order = torch.randperm(self.blocks).tolist()
        keys = [self.keys[number] for number in order]
        self.store.load(self.target, order, keys, options=options).synchronize(LIMIT)

    def save(self) -> None:
        """Save all blocks under new keys, and wait until the caller may write them again.

        The host tier caches none of them, as each call brings as many as the tier has.
        """
        keys = [next(self.numbers).to_bytes(32, "big") for _ in range(self.blocks)]
        saved = self.store.save(self.source, range(self.blocks), keys)
        assert saved.released is not None
        saved.released.synchronize(LIMIT)

    def right(self) -> bool:
        """Return whether the loaded blocks are right; overwrite them."""
        sides = words(self.target.tensors), words(self.source.tensors)
        same = all(map(torch.equal, *sides))
        torch._foreach_zero_(sides[0])
        return same


def _repeated(call: Callable[[], object], device: torch.device, calls: int) -> Sample:
    """Return the median time of calls, each on an idle device."""
    times = []
    cpu = cpu_seconds()
    for _ in range(calls):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return Sample(median(times), (cpu_seconds() - cpu) / calls)


def _hits(bench: StorageBench, blocks: int, nbytes: int, device: torch.device) -> Rows:
    hits = Hits(blocks, nbytes, device)
    dense = torch.empty(hits.nbytes, dtype=torch.uint8, device=device)
    host = pinned.empty((hits.nbytes,), torch.uint8)

    def memcpy(down: bool) -> None:
        (host if down else dense).copy_(dense if down else host, non_blocking=True)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    run = partial(_repeated, device=device, calls=CALLS if blocks < 100 else FEW_CALLS)
    idle = CopyOptions(overlap="idle")
    loads = [
        Method("memcpy", partial(run, partial(memcpy, False))),
        Method("load", partial(run, partial(hits.load, None)), right=hits.right),
        Method("load, idle", partial(run, partial(hits.load, idle)), right=hits.right),
    ]
    fields: Row = {"kind": "storage_hits", "shape": f"{blocks:,} x {in_words(nbytes)}"}
    fields["on"] = device.type
    rows = bench.trials.rows({**fields, "op": "load"}, hits.nbytes, loads, {"of_memcpy": "memcpy"})
    saves = [
        Method("memcpy", partial(run, partial(memcpy, True))),
        Method("save until released", partial(run, hits.save)),
    ]
    rows += bench.trials.rows({**fields, "op": "save"}, hits.nbytes, saves, {"of_memcpy": "memcpy"})
    hits.store.close(LIMIT)
    return rows


def _urgent(bench: StorageBench) -> Rows:
    """Measure urgent loads of few small blocks, alone and alongside background loads of many."""
    many = BACKGROUND if bench.sizes.loads >= 20 else 16 * URGENT
    source = caches(many, 2 * KB, CPU, 1)
    form = BlockForm.of(source, "bench")
    keys = [number.to_bytes(32, "big") for number in range(2 * many)]
    disk = Disk(bench.folder / "urgent", capacity=3 * many * form.image_bytes)
    staging = 2 * many * form.image_bytes
    stop = threading.Event()
    right = True
    with BlockStore(form, staging=staging, tiers=[disk], full="wait") as store:
        for first in (0, many):
            part = keys[first : first + many]
            store.save(source, range(many), part, priority="urgent").synchronize(LIMIT)

        def load_all() -> None:
            view = caches(many, 2 * KB, CPU, 1)
            while not stop.is_set():
                handle = store.load(view, range(many), keys[many:], priority="background")
                handle.synchronize(LIMIT)

        target = caches(many, 2 * KB, CPU, 1)
        count = bench.sizes.loads * bench.sizes.rounds
        times = dict[str, list[float]]()
        thread = threading.Thread(target=load_all)
        for name in ("alone", "alongside"):
            if name == "alongside":
                thread.start()
                time.sleep(0.2)
            times[name] = [
                _load_few(store, target, keys, n % (many - URGENT)) for n in range(count)
            ]
        stop.set()
        thread.join()
        right = _same_few(source, target, count, many)
    row: Row = {"kind": "storage_urgent", "shape": f"{URGENT} of 2 KB alongside {many:,}"}
    row |= {"op": "load", "backend": "urgent", "loads": count, "verified": right}
    for q in (50, 95):
        alone, both = (quantile(times[name], q / 100) * 1e6 for name in ("alone", "alongside"))
        row |= {f"p{q}_alone_us": short(alone), f"p{q}_us": short(both)}
    return [row]


def _load_few(store: BlockStore, view: KVView, keys: list[bytes], first: int) -> float:
    """Load a few blocks urgently, rest, and return the seconds of the load."""
    began = time.perf_counter()
    blocks = range(first, first + URGENT)
    store.load(view, blocks, keys[first : first + URGENT]).synchronize(LIMIT)
    seconds = time.perf_counter() - began
    time.sleep(PACE)
    return seconds


def _same_few(source: KVView, target: KVView, count: int, many: int) -> bool:
    """Return whether the blocks that were loaded are right."""
    past = min(count, many - URGENT) + URGENT - 1
    sides = zip(words(source.tensors), words(target.tensors), strict=True)
    return all(torch.equal(one[:, :past], other[:, :past]) for one, other in sides)
