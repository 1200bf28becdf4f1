# SPDX-License-Identifier: Apache-2.0
"""PortaKV's tier below vLLM's host memory next to vLLM's tier of files, in one process, in turns.

    python -m portakv_benchmarks.plugs.vllm_tier FOLDER [--json FILE] [--turns 9] [--faults 200]

It needs vLLM 0.32 or newer, and no device. The result has the parts of a load too, as `tier_parts`
measures them, and `python -m benchmarks.check` judges it. With ``--faults`` it measures no speed:
it lets so many faults of each kind happen to the files, the disk and the process, and counts how
chunks came that a load reports as loaded.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import vllm
from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from portakv.integrations.vllm.tier import PortaKVTier
from portakv_benchmarks.plugs import faults, tier_parts
from portakv_benchmarks.plugs.tier_result import result_of

CHUNKS = 64
CHUNK = 2 << 20
#: Of the faults: many small chunks, so that a fault meets some of them.
SMALL = 64 << 10
SHARED = "portakv, shared"
FAULTED = ["portakv", SHARED, "fs"]
#: Bytes of its staging: a process begins sooner with less.
STAGING = 16 << 20
HEADER = 4096
#: Seconds between two looks for the end of a job, as between two steps of a scheduler. Looks cost
#: processor time.
PAUSE = 1e-3
SPEC = SimpleNamespace(
    blocks_per_chunk=1,
    kv_events_config=SimpleNamespace(enable_kv_cache_events=False),
    config=SimpleNamespace(
        groups=(),
        model=SimpleNamespace(name="model", dtype="float16"),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=SimpleNamespace(
            rank=0, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, is_parallelism_agnostic=False
        ),
        canonical_layout=False,
        replicated_layout=False,
        kv_cache_layout=None,
    ),
)


class Moved(NamedTuple):
    """What a job took, in seconds: until its end, of the processor, and in the call."""

    end: float
    processor: float
    call: float


class Side:
    """A tier over host memory of chunks, and the keys of its chunks."""

    def __init__(self, make: Callable[[memoryview], Any], nbytes: int) -> None:
        self.memory = np.frombuffer(mmap(-1, CHUNKS * nbytes), np.uint8).reshape(CHUNKS, nbytes)
        self.expected = np.zeros_like(self.memory)
        self.keys = list[Any]()
        self.renew(0)
        self.tier = make(self.memory.data)
        self.number = 0

    def renew(self, seed: int) -> None:
        """Take other keys and other bytes."""
        draw = np.random.default_rng(seed)
        self.expected = draw.integers(0, 256, self.expected.shape, np.uint8)
        self.keys = [make_offload_key(draw.bytes(32), 0) for _ in range(CHUNKS)]

    def begin(self, load: bool) -> tuple[float, float, float]:
        """Begin a job; return the time, the processor time, and the seconds of the call."""
        self.number += 1
        self.memory[:] = 0 if load else self.expected
        context = ReqContext(req_id=f"job {self.number}")
        job = TransferJob(self.number, self.keys, np.arange(CHUNKS), load, context)
        processor = _processor()
        begin = time.perf_counter()
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        return begin, processor, time.perf_counter() - begin

    def move(self, load: bool) -> tuple[Moved, Any]:
        """Load or store all chunks; return what it took, and the result."""
        begin, processor, call = self.begin(load)
        while not (results := [*self.tier.get_finished_jobs()]):
            time.sleep(PAUSE)
        end = time.perf_counter() - begin
        return Moved(end, _processor() - processor, call), results[0]

    def lookup(self) -> float:
        """Return the seconds of a lookup, once the tier knows the answer."""
        self.number += 1
        context = ReqContext(req_id=f"lookup {self.number}")
        self.tier.on_new_request(context)
        for key in self.keys:
            self.tier.lookup(key, context)
        self.tier.on_schedule_end(ScheduleEndContext([], []))
        time.sleep(0.05)  # a thread looks for files
        begin = time.perf_counter()
        for key in self.keys:
            self.tier.lookup(key, context)
        took = time.perf_counter() - begin
        self.tier.on_request_finished(context)
        return took / len(self.keys)


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def sides(folder: Path, nbytes: int) -> dict[str, Side]:
    """Return both tiers, over separate folders."""
    theirs: dict[str, Any] = {"root_dir": str(folder / "fs")}
    return {
        "portakv": _ours(folder / "portakv", nbytes),
        "fs": Side(lambda view: FileSystemTierManager(SPEC, view, "fs", **theirs), nbytes),
    }


def _ours(folder: Path, nbytes: int, **more: Any) -> Side:
    """Return PortaKV's tier over a folder."""
    terms: dict[str, Any] = {"folder": str(folder), "capacity": 1 << 30, "staging": 512 << 20}
    terms |= more
    return Side(lambda view: PortaKVTier(SPEC, view, "portakv", **terms), nbytes)


def measured(folder: Path, turns: int) -> list[dict[str, Any]]:
    """Return a row for each tier and operation: what loads, stores and lookups take, in turns."""
    both = sides(folder, CHUNK)
    moves: dict[tuple[str, str], list[Moved]] = defaultdict(list)
    lookups: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns):
        for name in [*both][:: 1 if turn % 2 else -1]:
            side = both[name]
            side.renew(turn)
            for path in folder.rglob("*.bin"):  # `fs` removes no file itself
                path.unlink()
            for operation in ("store", "load"):
                took, result = side.move(operation == "load")
                assert result.success
                assert np.array_equal(side.memory, side.expected), name
                moves[name, operation].append(took)
            lookups[name].append(side.lookup())
    for side in both.values():
        side.tier.shutdown()
    rows = []
    for (name, operation), some in moves.items():
        row = _row(some, moves["fs", operation])
        rows.append({"kind": "plug_tier", "part": "tiers", "backend": name, "op": operation, **row})
        if operation == "load":
            rows[-1]["lookup_us"] = round(1e6 * median(lookups[name]), 2)
    return rows


def _row(some: Sequence[Moved], of_fs: Sequence[Moved]) -> dict[str, Any]:
    """Return the figures of moves; ratios are medians of those in the same turn."""
    total = CHUNKS * CHUNK
    pairs = [*zip(some, of_fs, strict=True)]
    least = min(x.processor for x in some)
    return {
        "mb_s": round(total / 1e6 / median(x.end for x in some), 1),
        "best_mb_s": round(total / 1e6 / min(x.end for x in some), 1),
        "processor_ms_per_mib": round(1e3 * median(x.processor for x in some) / (total >> 20), 4),
        "least_processor": round(1e3 * least / (total >> 20), 4),
        "call_ms": round(1e3 * median(x.call for x in some), 4),
        "rate_of_fs": round(median(other.end / own.end for own, other in pairs), 3),
        "processor_of_fs": round(least / min(x.processor for x in of_fs), 3),
        "verified": True,
    }


def speed(folder: Path, turns: int) -> dict[str, Any]:
    """Return a result of tiers and of the parts of a load, as `benchmarks.check` reads it."""
    rows = measured(folder, turns)
    least = tier_parts.measured(folder, turns)
    for name, value in least.items():
        row: dict[str, Any] = {"kind": "plug_tier_part", "part": "tiers", "method": name}
        row["processor_ms_per_mib"] = round(value, 4)
        row["of_fs"] = round(value / least[tier_parts.READ], 3)
        rows.append(row | {"verified": True})
    return result_of("cpu-vllm-tier", "tiers", rows, {"vllm": vllm.__version__}, turns=turns)


class FaultyStore:
    """A tier over a folder with small chunks, whose loads end soon, for `faults`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.files = "*.bin" if name == "fs" else "slots"
        self.image = SMALL if name == "fs" else SMALL + HEADER
        self._is_fs = name == "fs"
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if name == "fs":
            made = Side(lambda view: FileSystemTierManager(SPEC, view, "fs", str(folder)), SMALL)
        else:
            more: dict[str, Any] = {
                "capacity": CHUNKS * (SMALL + HEADER) * 5 // 4,
                "staging": STAGING,
            }
            more |= {"deadline": faults.DEADLINE, "shared": name == SHARED}
            made = _ours(folder, SMALL, **more)
        self._side = made
        self._results = list[Any]()
        self._before = made.memory.copy()

    def renew(self, seed: int) -> None:
        self._side.renew(seed)

    def save(self) -> None:
        if self._is_fs:  # it removes no file itself
            for path in self._folder.rglob("*.bin"):
                path.unlink()
        self._side.move(False)

    def begin_load(self) -> None:
        self._results.clear()
        self._side.begin(True)

    def ended(self) -> bool:
        self._results += self._side.tier.get_finished_jobs()
        return bool(self._results)

    def landed(self) -> list[bool]:
        result = self._results[0]
        keys = self._side.keys
        there = {*keys} if result.success else {*(result.successful_keys or ())}
        return [key in there for key in keys]

    def right(self) -> list[bool]:
        side = self._side
        return [bool(each) for each in (side.memory == side.expected).all(axis=1)]

    def answers(self) -> Mapping[str, int]:
        return {}

    def touched(self) -> bool:
        changed = not np.array_equal(self._before, self._side.memory)
        self._before = self._side.memory.copy()
        return changed

    def close(self) -> None:
        self._side.tier.shutdown()


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    faults.add_options(parser, FAULTED)
    terms = parser.parse_args()
    if terms.faults:
        terms.folder.mkdir(parents=True, exist_ok=True)
        faults.preload(terms.folder, __spec__.name)
    at = terms.folder / "vllm_tier"
    at.mkdir(parents=True)
    results: dict[str, Any] = {"load": os.getloadavg()[0], "chunks": CHUNKS}
    if terms.faults:
        results["chunk_bytes"] = SMALL
        results["faults"] = faults.damaged(FaultyStore, terms.stores, at, terms.faults, terms.kinds)
    else:
        results["chunk_bytes"] = CHUNK
        results |= speed(at, terms.turns)
    shutil.rmtree(at)
    faults.show(results, terms.json)


if __name__ == "__main__":
    main()
