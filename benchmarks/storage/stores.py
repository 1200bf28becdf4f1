# SPDX-License-Identifier: Apache-2.0
"""A block store over one disk: lookups, urgent loads while saves keep the disk busy, and loads to
the device as a whole and layer by layer, alongside the disk's engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import count

import torch

from portakv import KVView
from portakv.storage.form import BlockForm
from portakv.storage.io.choose import choose
from portakv.storage.store import BlockStore
from portakv.storage.tiers.disk import Disk
from portakv.storage.work import Handle
from portakv_benchmarks.host.suite import KB, MB
from portakv_benchmarks.shared.files import Slab, close
from portakv_benchmarks.shared.harness import Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import Method, Sample, cpu_seconds, timed
from portakv_benchmarks.storage.costs import CPU, cost_row
from portakv_benchmarks.storage.suite import StorageBench
from portakv_benchmarks.storage.tiers import caches, words

LOOKED_UP = 1000
#: Blocks of 1 MB: that are loaded, in one load, in one store; stores in flight; seconds between the
#: beginnings of two loads (80 MB/s, some hundreds of loads in nine rounds); how much is stored in a
#: phase, in trials of the other parts.
LOADED = 64
LOAD = 2
STORE = 32
FLIGHT = 4
PACE = 0.025
PHASE = 4
PHASES = ("loads", "stores", "both")


def store_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield steps for a lookup, for loads and saves alone and together, and for loads to a device.

    Loads to a device have blocks of 4 MB.
    """
    yield "lookup", partial(_lookup, bench)
    yield "loads alongside stores", partial(alongside, bench)
    yield "disk to device", partial(_layered, bench)


def _lookup(bench: StorageBench) -> Rows:
    view = caches(LOOKED_UP, 4 * KB, CPU, 1)
    form = BlockForm.of(view, "bench")
    keys = [n.to_bytes(32, "big") for n in range(LOOKED_UP)]
    disk = Disk(bench.folder / "lookup", capacity=LOOKED_UP * form.image_bytes)
    store = BlockStore(form, staging=1 << 26, tiers=[disk], full="wait")
    store.save(view, range(LOOKED_UP), keys).synchronize(60)
    results: list[int] = []
    samples = [timed(lambda: results.append(store.lookup(keys))) for _ in range(50)]
    rows = cost_row("lookup of 1,000 keys", samples, 1, {*results} == {LOOKED_UP})
    rows += _asked(store, keys, "on a disk")
    store.close()
    with BlockStore(form, host=2 * LOOKED_UP * form.image_bytes, staging=1 << 26) as store:
        store.save(view, range(LOOKED_UP), keys).synchronize(60)
        rows += _asked(store, keys, "in host memory")
    return rows


def _asked(store: BlockStore, keys: list[bytes], where: str) -> Rows:
    """Return the cost of `BlockStore.has`."""
    there = list[bool]()
    samples = [timed(lambda: there.extend([store.has(key) for key in keys])) for _ in range(50)]
    return cost_row(f"has(key), {where}", samples, len(keys), all(there))


class Meeting:
    """A store over one folder, and the blocks that it loads and stores."""

    def __init__(self, bench: StorageBench) -> None:
        self.bench = bench
        self.stored = max(STORE, PHASE * bench.sizes.nbytes // MB)
        self.sources = caches(LOADED, MB, CPU)
        self.view = caches(LOADED, MB, CPU)
        form = BlockForm.of(self.view, "bench")
        # No phase reaches the blocks that are loaded: they were used after those that it evicts.
        capacity = (LOADED + 2 * self.stored) * form.image_bytes
        disk = Disk(bench.folder / "beside", capacity=capacity)
        self.store = BlockStore(form, staging=256 * MB, tiers=[disk], full="wait")
        self.numbers = count(1 << 32)
        self.keys = [n.to_bytes(32, "big") for n in range(LOADED)]
        self.store.save(self.sources, range(LOADED), self.keys).synchronize(60)
        self.right = True
        self.loads = bench.sizes.loads
        self.loaded = set[int]()
        self.times = {name: list[float]() for name in PHASES}  # of all rounds
        self.rates = {name: list[float]() for name in PHASES}

    def saturate(self, name: str) -> None:
        """Store as many new blocks as a phase has, as fast as they go."""
        began = time.perf_counter()
        flying = deque[Handle]()
        for _ in range(0, self.stored, STORE):
            keys = [next(self.numbers).to_bytes(32, "big") for _ in range(STORE)]
            flying.append(self.store.save(self.sources, range(STORE), keys))
            if len(flying) == FLIGHT:
                flying.popleft().synchronize(60)
        for handle in flying:
            handle.synchronize(60)
        self.rates[name].append(self.stored * MB / (time.perf_counter() - began) / 1e9)

    def load(self, name: str) -> None:
        """Load some blocks, and rest for what is left of the pace."""
        first = self.bench.trials.random.randrange(LOADED - LOAD + 1)
        part = slice(first, first + LOAD)
        began = time.perf_counter()
        self.store.load(self.view, range(LOADED)[part], self.keys[part]).synchronize(60)
        self.times[name].append(time.perf_counter() - began)
        self.loaded.update(range(LOADED)[part])
        time.sleep(max(0.0, began + PACE - time.perf_counter()))

    def phase(self, name: str) -> None:
        """Load, store, or load until the stores have ended."""
        self.store.load(self.view, range(LOADED), self.keys).synchronize(60)
        torch._foreach_zero_(words(self.view.tensors))
        self.loaded.clear()
        time.sleep(self.bench.sizes.pause)
        thread = threading.Thread(target=self.saturate, args=(name,))
        before = len(self.times[name])
        if name != "loads":
            thread.start()
        least = self.loads if name == "loads" else 1
        while name != "stores" and (thread.is_alive() or len(self.times[name]) - before < least):
            self.load(name)
        if name != "loads":
            thread.join()
        at = sorted(self.loaded)
        for local, remote in zip(
            words(self.view.tensors), words(self.sources.tensors), strict=True
        ):
            self.right &= torch.equal(local[:, at], remote[:, at])


def alongside(bench: StorageBench) -> Rows:
    """Run loads and stores, alone and together, in rounds."""
    meeting = Meeting(bench)
    for _ in range(bench.sizes.rounds):
        for name in bench.trials.random.sample(PHASES, len(PHASES)):
            meeting.phase(name)
    meeting.store.close()
    times = meeting.times
    rates = meeting.rates
    fields = {
        "kind": "storage_beside",
        "shape": f"{LOAD} blocks of 1 MB",
        "verified": meeting.right,
    }
    row = {**fields, "op": "load", "backend": "urgent", "loads": len(times["both"])}
    row["loads_alone"] = len(times["loads"])
    seconds = sum(meeting.stored * MB / rate / 1e9 for rate in rates["both"])
    row["gb_per_s"] = short(len(times["both"]) * LOAD * MB / seconds / 1e9)
    for q in (50, 99):  # of all loads: a round has too few for its own
        alone, both = (quantile(times[name], q / 100) * 1e6 for name in ("loads", "both"))
        row |= {f"p{q}_alone_us": short(alone), f"p{q}_us": short(both)}
        row[f"p{q}_ratio"] = short(both / alone)
    alone, both = (quantile(rates[name], 0.5) for name in ("stores", "both"))
    stored = {**fields, "op": "store", "backend": "background", "gb_per_s": short(both)}
    return [row, {**stored, "alone_gb_per_s": short(alone), "rate_ratio": short(both / alone)}]


#: Bytes of a block (Llama-3 8B, 32 tokens), and how often the slab goes into the bytes of a load.
BLOCK = 4 * MB
TIMES = 4


def _layered(bench: StorageBench) -> Rows:
    sizes = bench.sizes
    device = bench.device
    nbytes = sizes.layered // (16 if device.type == "cpu" else 1)
    amount = nbytes // BLOCK
    source, view = (caches(amount, BLOCK, device, sizes.layers) for _ in range(2))
    form = BlockForm.of(view, "bench")
    disk = Disk(bench.folder / "layered", capacity=amount * form.image_bytes)
    store = BlockStore(form, staging=2 * nbytes, tiers=[disk], full="wait")
    keys = [n.to_bytes(32, "big") for n in range(amount)]
    store.save(source, range(amount), keys).synchronize(120)
    slab = Slab(bench.trials, bench.folder, form.image_bytes, amount // TIMES)
    engine, _ = choose(slab.places)

    def load(by_layer: bool) -> Sample:
        began = time.perf_counter()
        cpu = cpu_seconds()
        first = 0.0
        order = torch.randperm(amount).tolist()
        handle = store.load(view, order, [keys[n] for n in order], by_layer=by_layer)
        if by_layer:
            handle.layers[0].synchronize(120)
            first = time.perf_counter() - began
        handle.synchronize(120)
        return Sample(time.perf_counter() - began, cpu_seconds() - cpu, first)

    methods = [slab.method(engine, "read", "engine", TIMES)]
    for name in ("whole", "by layer"):
        right = partial(_taken, view, source)
        methods.append(Method(name, partial(load, name == "by layer"), right=right))
    fields = {"kind": "storage_layered", "shape": in_words(nbytes), "op": "load"}
    alongside = {"of_engine": "engine", "of_whole": "whole"}
    rows = bench.trials.rows(fields, amount * BLOCK, methods, alongside)
    close(store, slab, engine)
    return rows


def _taken(view: KVView, source: KVView) -> bool:
    """Return whether both hold the same bits; overwrite the first."""
    same = all(map(torch.equal, words(view.tensors), words(source.tensors)))
    torch._foreach_zero_(words(view.tensors))
    return same
