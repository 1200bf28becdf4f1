# SPDX-License-Identifier: Apache-2.0
"""Measure L2 adapters of LMCache in turns: its own file system adapters, and PortaKV's.

    python -m portakv_benchmarks.plugs.lmcache_l2 FOLDER [--object 4] [--objects 32] [--rounds 9]
        [--json FILE]

Each round stores new objects, and loads them twice: once after their files have left the page
cache, and once more. PortaKV verifies each object that it loads. Prints medians: MB/s, milliseconds
of processor time a MiB, the best of both, and the ratio of a round's times: ours by the other's.
Files in the page cache occupy memory: `HOST` has as much, for a comparison with equal memory.

With ``--faults`` it lets so many faults of each kind happen to the files, the disk and the process,
and counts how objects came that a load reports as loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from portakv.integrations.lmcache.check import CLASS, MODULE
from portakv_benchmarks.plugs import faults
from portakv_benchmarks.plugs.tier_result import result_of

PAGE = 4096
#: Bytes and number of the objects of faults.
SMALL = 64 << 10
FAULTED = 64
#: Bytes of its staging: a process begins sooner with less.
STAGING = 16 << 20
LIMIT = 120
OURS = "portakv"
#: The part of results.
PART = "l2"
IMPORTS = ("lmcache.v1.distributed.l2_adapters", "lmcache.v1.storage_backend", MODULE)
SHARED = "portakv, shared"
HOST = "portakv, host"
#: PortaKV's other configurations, with their terms: a host tier of as many bytes as the page cache
#: has for the files of the others, and a folder that several servers may have.
VARIANTS: dict[str, dict[str, Any]] = {
    HOST: {"host": 512 << 20},
    SHARED: {"shared": True},
}
#: The other adapters, with their configuration.
OTHERS: dict[str, dict[str, Any]] = {
    "fs": {"type": "fs"},
    "fs, direct": {"type": "fs", "use_odirect": True},
    "fs_native": {"type": "fs_native"},
}


class Cost(NamedTuple):
    """What an operation took: seconds, and seconds of processor time of all threads."""

    wall: float
    processor: float


class Side:
    """An adapter, and the objects that it is measured with."""

    def __init__(self, name: str, folder: Path, nbytes: int, count: int, **more: Any) -> None:
        self.name = name
        self.folder = folder
        self.nbytes = nbytes
        self.count = count
        self.adapter = self._adapter(**more)

    def _adapter(self, **more: Any) -> Any:
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

        config: dict[str, Any] = {**OTHERS.get(self.name, {}), "base_path": str(self.folder)}
        if self.name == OURS or self.name in VARIANTS:
            capacity = 4 * self.count * (self.nbytes + 2 * PAGE)
            params = {"folder": str(self.folder), "capacity": capacity, "staging": 512 << 20}
            params |= {**VARIANTS.get(self.name, {}), **more}
            if params.get("shared"):
                params["object_bytes"] = self.nbytes
            config = {"type": "plugin", "module_path": MODULE, "class_name": CLASS}
            config["adapter_params"] = params
        made = get_l2_adapter_config_class(str(config["type"]))
        return create_l2_adapter(made.from_dict(config))

    def store(self, keys: list[Any], objects: list[Any]) -> Cost:
        """Store objects; raise RuntimeError if the adapter fails."""
        began = Cost(time.perf_counter(), time.process_time())
        task = self.adapter.submit_store_task(keys, objects)
        done = self._answer(
            self.adapter.get_store_event_fd(),
            lambda: self.adapter.pop_completed_store_tasks().get(task),
        )
        cost = _since(began)
        if not done.is_successful():
            raise RuntimeError(f"{self.name} stored nothing")
        return cost

    def load(self, keys: list[Any], objects: list[Any]) -> Cost:
        """Load objects; raise RuntimeError if one is missing."""
        began = Cost(time.perf_counter(), time.process_time())
        task = self.adapter.submit_load_task(keys, objects)
        loaded = self._answer(
            self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task)
        )
        cost = _since(began)
        if loaded.popcount() != len(keys):
            raise RuntimeError(f"{self.name} loaded {loaded.popcount()} of {len(keys)}")
        return cost

    def lookup(self, keys: list[Any]) -> Cost:
        """Look up and lock objects, and unlock them."""
        began = Cost(time.perf_counter(), time.process_time())
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        self._answer(
            self.adapter.get_lookup_and_lock_event_fd(),
            lambda: self.adapter.query_lookup_and_lock_result(task),
        )
        self.adapter.submit_unlock(keys)
        return _since(began)

    def forget(self) -> None:
        """Write the files out, and take them from the page cache."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    @staticmethod
    def _answer(fd: int, query: Callable[[], Any]) -> Any:
        """Wait for the answer of a task."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while (answer := query()) is None:
            if not poller.poll(1000 * LIMIT):
                raise TimeoutError(f"no answer in {LIMIT} s")
            os.eventfd_read(fd)
        return answer


def _since(began: Cost) -> Cost:
    return Cost(time.perf_counter() - began.wall, time.process_time() - began.processor)


def _objects(nbytes: int, count: int, seed: int | None) -> list[Any]:
    """Return objects of host memory, at multiples of a page; without a seed of zeros."""
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    stride = -(-nbytes // PAGE) * PAGE
    memory = torch.zeros(count * stride + PAGE, dtype=torch.uint8, device="cpu")
    first = -memory.data_ptr() % PAGE
    if seed is not None:
        memory.random_(0, 256, generator=torch.Generator("cpu").manual_seed(seed))
    made = []
    for number in range(count):
        start = first + number * stride
        about = MemoryObjMetadata(
            shape=torch.Size([nbytes]),
            dtype=torch.uint8,
            address=start,
            phy_size=nbytes,
            fmt=MemoryFormat.KV_2LTD,
            ref_count=1,
        )
        made.append(TensorMemoryObj(memory[start : start + nbytes], about, parent_allocator=None))
    return made


def _keys(count: int, turn: int) -> list[Any]:
    from lmcache.v1.distributed.api import ObjectKey

    hashes = [(turn * count + number).to_bytes(32, "big") for number in range(count)]
    return [ObjectKey(chunk_hash=each, model_name="model", kv_rank=0) for each in hashes]


def _round(
    side: Side, turn: int, source: list[Any], target: list[Any]
) -> Iterator[tuple[str, Cost]]:
    """Yield what each operation of a round took."""
    keys = _keys(side.count, turn)
    yield "store", side.store(keys, source)
    side.forget()
    for name in ("load", "load again"):
        for each in target:
            each.tensor.zero_()
        yield name, side.load(keys, target)
        if not all(torch.equal(a.tensor, b.tensor) for a, b in zip(source, target, strict=True)):
            raise RuntimeError(f"{side.name} loaded wrong bytes")
    yield "lookup", side.lookup(keys)
    side.adapter.delete(keys)


class FaultyStore:
    """An adapter over a folder with small objects, whose loads end soon, for `faults`."""

    files = "*.data"
    image = SMALL

    def __init__(self, name: str, folder: Path) -> None:
        more: dict[str, Any] = {}
        if name not in OTHERS:
            self.files = "slots"
            self.image = SMALL + PAGE
            more["deadline"] = faults.DEADLINE
            more["capacity"] = FAULTED * (SMALL + PAGE) * 5 // 4
            more["staging"] = STAGING
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._side = Side(name, folder, SMALL, FAULTED, **more)
        self._source = _objects(SMALL, FAULTED, 0)
        self._target = _objects(SMALL, FAULTED, None)
        self._keys = _keys(FAULTED, 0)
        self._task = 0
        self._loaded: Any = None
        self._before = self._all()

    def _all(self) -> torch.Tensor:
        """Return the bytes of the memory that loads have."""
        return torch.stack([each.tensor for each in self._target]).clone()

    def renew(self, seed: int) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for each in self._source:
            each.tensor.random_(0, 256, generator=generator)
        self._keys = _keys(FAULTED, seed)

    def save(self) -> None:
        if self.files == "*.data":  # the files of earlier objects are not loaded again
            for path in self._folder.rglob(self.files):
                path.unlink()
        with suppress(RuntimeError):  # not all were stored
            self._side.store(self._keys, self._source)

    def begin_load(self) -> None:
        for each in self._target:
            each.tensor.zero_()
        self._loaded = None
        self._task = self._side.adapter.submit_load_task(self._keys, self._target)

    def ended(self) -> bool:
        if self._loaded is None:
            self._loaded = self._side.adapter.query_load_result(self._task)
        return self._loaded is not None

    def landed(self) -> list[bool]:
        return [bool(self._loaded.test(number)) for number in range(FAULTED)]

    def right(self) -> list[bool]:
        pairs = zip(self._source, self._target, strict=True)
        return [torch.equal(a.tensor, b.tensor) for a, b in pairs]

    def answers(self) -> Mapping[str, int]:
        return {}

    def touched(self) -> bool:
        now = self._all()
        changed = not torch.equal(now, self._before)
        self._before = now
        return changed

    def close(self) -> None:
        self._side.adapter.close()


def measure(folder: Path, nbytes: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each operation and adapter."""
    sides = []
    for name in (OURS, *VARIANTS, *OTHERS):
        try:
            sides.append(Side(name, folder / name.replace(", ", "-"), nbytes, count))
        except (ImportError, ValueError) as error:
            print(f"{name} is left out: {error}")
    source = _objects(nbytes, count, 1)
    target = _objects(nbytes, count, None)
    costs = defaultdict[tuple[str, str], list[Cost]](list)
    for turn in range(rounds + 1):
        for side in (*sides[turn % len(sides) :], *sides[: turn % len(sides)]):
            for operation, cost in _round(side, turn, source, target):
                if turn:  # the first round prepares
                    costs[operation, side.name].append(cost)
    for side in sides:
        side.adapter.close()
    return [*rows_of(costs, nbytes * count, count)]


def rows_of(
    costs: dict[tuple[str, str], list[Cost]], nbytes: int, count: int
) -> Iterator[dict[str, Any]]:
    for (operation, name), some in costs.items():
        ours = costs[operation, OURS]
        wall = statistics.median(cost.wall for cost in some)
        processor = statistics.median(cost.processor for cost in some)
        row: dict[str, Any] = {"op": operation, "backend": name}
        if operation == "lookup":
            row["us_per_key"] = round(1e6 * wall / count, 1)
        else:
            row["MB_per_s"] = round(nbytes / wall / 1e6)
            row["processor_ms_per_MiB"] = round(1e3 * processor / (nbytes / 2**20), 3)
            row["best_MB_per_s"] = round(nbytes / min(cost.wall for cost in some) / 1e6)
            least = min(cost.processor for cost in some)
            row["least_processor"] = round(1e3 * least / (nbytes / 2**20), 3)
        row["time_of_portakv"] = _ratio(ours, some, 0)
        row["processor_of_portakv"] = _ratio(ours, some, 1)
        with_host = costs.get((operation, HOST))
        if with_host:
            row["time_of_portakv_host"] = _ratio(with_host, some, 0)
            row["processor_of_portakv_host"] = _ratio(with_host, some, 1)
        yield row


def _ratio(ours: Sequence[Cost], others: Sequence[Cost], which: int) -> float:
    """Return the median of the ratios of rounds, PortaKV's cost by another's."""
    pairs = zip(ours, others, strict=True)
    return round(statistics.median(a[which] / max(b[which], 1e-9) for a, b in pairs), 2)


def main() -> None:
    """Measure as the command line says, and print a row a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder on the disk to measure")
    parser.add_argument("--object", type=float, default=4.0, help="MiB of an object")
    parser.add_argument("--objects", type=int, default=32, help="objects of a task")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    faults.add_options(parser, [OURS, SHARED, "fs", "fs_native"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=bool(args.faults))
    if args.faults:
        faults.preload(args.folder, __spec__.name)
        terms = args.stores, args.folder, args.faults, args.kinds
        made = faults.damaged(FaultyStore, *terms, imports=IMPORTS)
        counts = {"load": os.getloadavg()[0], "faults": made}
        print(json.dumps(counts))
        if args.json is not None:
            args.json.write_text(f"{json.dumps(counts, indent=1)}\n")
        return
    nbytes = int(args.object * 2**20)
    try:
        rows = measure(args.folder, nbytes, args.objects, args.rounds)
    finally:
        shutil.rmtree(args.folder)
    for row in rows:
        print(json.dumps(row))
    if args.json is not None:
        terms_of_run = {"object_bytes": nbytes, "objects": args.objects, "rounds": args.rounds}
        releases = {"lmcache": version("lmcache")}
        result = result_of("cpu-lmcache-l2", PART, rows, releases, **terms_of_run)
        args.json.write_text(f"{json.dumps(result, indent=1)}\n")


if __name__ == "__main__":
    main()
