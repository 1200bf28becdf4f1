# SPDX-License-Identifier: Apache-2.0
"""PortaKV's tier below vLLM's host memory next to vLLM's tier of files, in one process, in turns.

    python -m portakv_benchmarks.plugs.vllm_tier FOLDER [--json FILE] [--turns 9] [--faults 60]

It needs vLLM 0.32 or newer, and no device. Then it damages the files of both, and counts chunks
with wrong bytes that a load reports as loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from portakv.integrations.vllm_tier import PortaKVTier

CHUNKS = 64
CHUNK = 2 << 20
#: Of the damage: many small chunks, so that a fault meets some of them.
SMALL = 64 << 10
HEADER = 4096
PAUSE = 2e-4
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
        draw = np.random.default_rng(0)
        self.expected = draw.integers(0, 256, (CHUNKS, nbytes), np.uint8)
        self.keys = [make_offload_key(draw.bytes(32), 0) for _ in range(CHUNKS)]
        self.tier = make(self.memory.data)
        self.number = 0

    def move(self, load: bool) -> tuple[Moved, Any]:
        """Load or store all chunks; return what it took, and the result."""
        self.number += 1
        self.memory[:] = 0 if load else self.expected
        context = ReqContext(req_id=f"job {self.number}")
        job = TransferJob(self.number, self.keys, np.arange(CHUNKS), load, context)
        processor = _processor()
        begin = time.perf_counter()
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        call = time.perf_counter() - begin
        while not (results := [*self.tier.get_finished_jobs()]):
            time.sleep(PAUSE)
        end = time.perf_counter() - begin
        return Moved(end, _processor() - processor, call), results[0]

    def loaded(self) -> Counter[str]:
        """Load all chunks; return how many came right, how many wrong, and how many did not."""
        _, result = self.move(True)
        there = {*self.keys} if result.success else {*(result.successful_keys or ())}
        counts = Counter[str]()
        for key, got, expected in zip(self.keys, self.memory, self.expected, strict=True):
            right = "right" if np.array_equal(got, expected) else "wrong"
            counts[right if key in there else "missed"] += 1
        return counts

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
    ours: dict[str, Any] = {
        "folder": str(folder / "portakv"),
        "capacity": 4 << 30,
        "staging": 512 << 20,
    }
    theirs: dict[str, Any] = {"root_dir": str(folder / "fs")}
    return {
        "portakv": Side(lambda view: PortaKVTier(SPEC, view, "portakv", **ours), nbytes),
        "fs": Side(lambda view: FileSystemTierManager(SPEC, view, "fs", **theirs), nbytes),
    }


def measured(folder: Path, turns: int) -> dict[str, dict[str, float]]:
    """Return what loads and lookups of both take, in turns."""
    both = sides(folder, CHUNK)
    loads: dict[str, list[Moved]] = {name: [] for name in both}
    lookups: dict[str, list[float]] = {name: [] for name in both}
    for side in both.values():
        side.move(False)
    for turn in range(turns):
        for name in [*both][:: 1 if turn % 2 else -1]:
            took, result = both[name].move(True)
            assert result.success
            assert np.array_equal(both[name].memory, both[name].expected), name
            loads[name].append(took)
            lookups[name].append(both[name].lookup())
    for side in both.values():
        side.tier.shutdown()
    total = CHUNKS * CHUNK
    return {
        name: {
            "load_mb_s": total / 1e6 / median(x.end for x in loads[name]),
            "processor_ms_per_mib": 1e3 * median(x.processor for x in loads[name]) / (total >> 20),
            "call_ms": 1e3 * median(x.call for x in loads[name]),
            "lookup_us": 1e6 * median(lookups[name]),
        }
        for name in both
    }


def damaged(folder: Path, faults: int) -> dict[str, Counter[str]]:
    """Return how chunks of both came after each kind of damage to their files."""
    counts: dict[str, Counter[str]] = {}
    draw = random.Random(0)
    kinds = {"flipped bits": _flip, "swapped chunks": _swap, "cut files": _cut}
    both = sides(folder, SMALL)
    for turn in range(faults):
        kind = [*kinds][turn % len(kinds)]
        for name, side in both.items():
            # Its own tier does not replace a damaged file.
            shutil.rmtree(folder / "fs", ignore_errors=True) if name == "fs" else None
            side.move(False)
            files = [path for path in (folder / name).rglob("*") if _has_chunks(path)]
            image = SMALL if name == "fs" else SMALL + HEADER
            kinds[kind](files, image, draw)
            counts.setdefault(f"{name}, {kind}", Counter()).update(side.loaded())
    for side in both.values():
        side.tier.shutdown()
    return counts


def _has_chunks(path: Path) -> bool:
    return path.name == "slots" or path.suffix == ".bin"


def _images(files: list[Path], image: int) -> list[tuple[Path, int]]:
    return [(path, at) for path in files for at in range(path.stat().st_size // image)]


def _flip(files: list[Path], image: int, draw: random.Random) -> None:
    """Flip a bit of the bytes of each of four chunks."""
    for path, at in draw.sample(_images(files, image), 4):
        with path.open("r+b") as file:
            place = (at + 1) * image - 1 - draw.randrange(SMALL)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _swap(files: list[Path], image: int, draw: random.Random) -> None:
    """Swap two chunks, with whatever says what they are."""
    pair = draw.sample(_images(files, image), 2)
    data = []
    for path, at in pair:
        with path.open("rb") as file:
            file.seek(at * image)
            data.append(file.read(image))
    for (path, at), other in zip(pair, reversed(data), strict=True):
        with path.open("r+b") as file:
            file.seek(at * image)
            file.write(other)


def _cut(files: list[Path], image: int, draw: random.Random) -> None:
    """Cut a file in the middle of a chunk."""
    path = draw.choice(files)
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--faults", type=int, default=60)
    terms = parser.parse_args()
    at = terms.folder / "vllm_tier"
    for each in ("speed", "faults"):
        (at / each).mkdir(parents=True)
    results = {
        "load": os.getloadavg()[0],
        "chunks": CHUNKS,
        "chunk_bytes": CHUNK,
        "speed": measured(at / "speed", terms.turns),
        "faults": damaged(at / "faults", terms.faults),
    }
    shutil.rmtree(at)
    text = json.dumps(results, indent=1)
    print(text)
    if terms.json is not None:
        terms.json.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
