# SPDX-License-Identifier: Apache-2.0
"""What a store server costs its clients: lookups and loads through `portakv store serve`, in turns
with those of a store of this process that has the same blocks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from portakv.serving.local import GroupView, LocalIndex, StoreTerms, forms_of
from portakv.serving.server.client import ServerBlocks, ServerIndex, StoreClient
from portakv.serving.server.link import Place
from portakv.storage.store import FormStore
from portakv_benchmarks.host.suite import KB
from portakv_benchmarks.shared.harness import Row, Rows, Step, quantile, short
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.trials import NOISY, Method, Sample, cpu_seconds
from portakv_benchmarks.storage.costs import CPU
from portakv_benchmarks.storage.suite import StorageBench
from portakv_benchmarks.storage.tiers import caches, words

LIMIT = 120.0  # seconds of a call, which hangs then
ENGINE = "bench"
LOOKED_UP = 1000  # keys of a lookup
#: Lookups and loads of a trial, of which the median counts. Few loads of many blocks.
LOOKUPS = 50
CALLS = 20
FEW_CALLS = 3
#: Saves after which a client waits for its copy of the index.
SAVES = 20
LOCAL = "in process"
SERVED = "through the server"
HOST = "host"
DISK = "disk"


class Index(Protocol):
    """What a scheduler asks about blocks."""

    def leading(self, keys: Sequence[bytes], first: int = 0, /) -> int | None:
        """Return how many leading blocks can be loaded."""


def served_steps(bench: StorageBench) -> Iterator[Step]:
    """Yield steps for lookups, and for loads from host memory and from the disk."""
    yield "lookup", partial(_lookup, bench)
    for blocks, nbytes in bench.sizes.served:
        for tier in (HOST, DISK):
            name = f"loads from {tier}: {blocks:,} x {in_words(nbytes)}"
            yield name, partial(_loads, bench, blocks, nbytes, tier)


class Both:
    """Equal blocks in a store of this process and in that of a server process.

    Args:
        folder: of both stores.
        blocks: how many, each of so many bytes.
        device: of the caches.
        tier: that has the blocks, `HOST` or `DISK`.
        more: blocks for which both stores have space besides.

    A context manager, which ends the server. Raises `RuntimeError` if the server does not serve.
    """

    def __init__(
        self,
        folder: Path,
        blocks: int,
        nbytes: int,
        device: torch.device,
        tier: str,
        more: int = 0,
    ) -> None:
        layers = 32 if nbytes >= 64 * KB else 1
        self.blocks = blocks
        self.source = caches(blocks, nbytes, device, layers)
        self.target = caches(blocks, nbytes, device, layers)
        self.keys = [number.to_bytes(32, "big") for number in range(blocks)]
        (form,) = forms_of([GroupView(self.source)], ENGINE, None)
        self.nbytes = blocks * form.payload_bytes
        space = (blocks + more) * form.image_bytes
        host = space if tier == HOST else 0
        local = str(folder / "local")
        terms = StoreTerms(folder=local, host=host, staging=2 * space, capacity=2 * space)
        with ExitStack() as ends:  # until all has begun
            self.index = LocalIndex()
            (self.store,) = self.index.open([GroupView(self.source)], terms, ENGINE, None)
            ends.callback(self.index.close)
            ends.enter_context(_server_of(folder / "served", terms))
            place = Place.of_folder(folder / "served")
            client = ends.enter_context(StoreClient(place, [form], ENGINE, device))
            self.copy = ends.enter_context(ServerIndex(place, ENGINE))
            if not (client.wait(LIMIT) and self.copy.wait(LIMIT)):
                raise RuntimeError("the server does not serve")
            self.kept = client.blocks[0]
            for blocks_of in (self.store, self.kept):
                self.save(blocks_of, self.keys)
            self.await_copy(self.keys)
            self._ends = ends.pop_all()

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def save(self, blocks: FormStore | ServerBlocks, keys: Sequence[bytes]) -> None:
        """Save the first blocks of the caches under keys, one after the other."""
        saved = blocks.save(self.source, range(len(keys)), keys)
        saved.synchronize(LIMIT)
        if not saved.landed.all():
            raise RuntimeError(f"{int((~saved.landed).sum())} blocks were not saved")

    def await_copy(self, keys: Sequence[bytes]) -> None:
        """Wait until the client's copy of the index lists blocks."""
        until = time.monotonic() + LIMIT
        while self.copy.leading(keys) != len(keys):
            if time.monotonic() > until:
                raise RuntimeError("the client's copy of the index does not follow")

    def load(self, blocks: FormStore | ServerBlocks, calls: int) -> Sample:
        """Load all blocks in random orders; return the median time of a load."""
        times = []
        cpu = cpu_seconds()
        for _ in range(calls):
            order = torch.randperm(self.blocks).tolist()
            keys = [self.keys[number] for number in order]
            if self.target.device.type != "cpu":
                torch.accelerator.synchronize(self.target.device)
            began = time.perf_counter()
            loaded = blocks.load(self.target, order, keys)
            loaded.synchronize(LIMIT)
            times.append(time.perf_counter() - began)
            if not loaded.landed.all():
                raise RuntimeError(f"{int((~loaded.landed).sum())} blocks were not loaded")
        return Sample(median(times), (cpu_seconds() - cpu) / calls)

    def right(self) -> bool:
        """Return whether the loaded blocks are right; overwrite them."""
        sides = words(self.target.tensors), words(self.source.tensors)
        same = all(map(torch.equal, *sides))
        torch._foreach_zero_(sides[0])
        return same


@contextmanager
def _server_of(folder: Path, terms: StoreTerms) -> Iterator[None]:
    """Run `portakv store serve` for a folder, in a process that ends with the block."""
    sizes = {"host": terms.host, "staging": terms.staging, "capacity": terms.capacity}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "portakv", "store", "serve", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(LIMIT)


def _look_up(index: Index, keys: Sequence[bytes]) -> float:
    """Return the seconds of a lookup of keys that are new objects, as those of a request are."""
    fresh = [bytes(bytearray(key)) for key in keys]
    began = time.perf_counter()
    index.leading(fresh)
    return time.perf_counter() - began


def _lookup(bench: StorageBench) -> Rows:
    """Look many keys up in one call, and follow saves in the client's copy of the index."""
    sides: dict[str, list[float]] = {LOCAL: [], SERVED: []}
    followed = []
    with Both(bench.folder / "lookup", LOOKED_UP, 4 * KB, CPU, HOST, SAVES) as both:
        indices: dict[str, Index] = {LOCAL: both.index, SERVED: both.copy}
        for _ in range(bench.sizes.rounds):
            for name in bench.trials.random.sample([*indices], len(indices)):
                times = [_look_up(indices[name], both.keys) for _ in range(LOOKUPS)]
                sides[name].append(median(times))
        right = all(each.leading(both.keys) == LOOKED_UP for each in indices.values())
        for number in range(SAVES):
            key = (LOOKED_UP + number).to_bytes(32, "big")
            right &= both.copy.leading([key]) == 0
            both.save(both.kept, [key])
            began = time.perf_counter()
            both.await_copy([key])
            followed.append(time.perf_counter() - began)
    fields: Row = {"kind": "storage_served", "shape": f"{LOOKED_UP:,} keys", "verified": right}
    rows = [{**fields, "op": "lookup", "backend": name, **_times(sides[name])} for name in sides]
    for row in rows:
        row["us_per_key"] = short(row["p50_us"] / LOOKED_UP)
    pairs = zip(sides[SERVED], sides[LOCAL], strict=True)
    rows[1]["time_of_local"] = short(median(served / local for served, local in pairs))
    follow = {"shape": "a save, until the copy lists it", "op": "follow", "backend": SERVED}
    return [*rows, {**fields, **follow, **_times(followed)}]


def _times(seconds: Sequence[float]) -> Row:
    p10, p50, p90 = (quantile(seconds, q) * 1e6 for q in (0.1, 0.5, 0.9))
    row: Row = {"p10_us": short(p10), "p50_us": short(p50), "p90_us": short(p90)}
    return {**row, "rounds": len(seconds), "noisy": p90 > NOISY * p50}


def _loads(bench: StorageBench, blocks: int, nbytes: int, tier: str) -> Rows:
    device = bench.device
    folder = bench.folder / f"{tier} {blocks} {nbytes}"
    calls = CALLS if blocks < 100 else FEW_CALLS
    with Both(folder, blocks, nbytes, device, tier) as both:
        methods = [
            Method(LOCAL, partial(both.load, both.store, calls), right=both.right),
            Method(SERVED, partial(both.load, both.kept, calls), right=both.right),
        ]
        fields: Row = {"kind": "storage_served", "shape": f"{blocks:,} x {in_words(nbytes)}"}
        fields |= {"op": "load", "tier": tier, "on": device.type}
        compared = {"of_local": LOCAL}
        rows = bench.trials.rows(fields, both.nbytes, methods, compared)
    shutil.rmtree(folder)  # the next case may need the space
    return rows
