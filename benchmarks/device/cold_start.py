# SPDX-License-Identifier: Apache-2.0
"""A fresh process: from torch imported and a device context made to the first finished transfer.

Counted are PortaKV's own imports, its self-check, registration and the transfer; *cold* with an
empty cache of compiled kernels, *warm* with the one that the process before left. The
process is this file, run by its path: ``python cold_start.py BACKEND DEVICE``. It prints seconds,
and whether the bytes were right, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

# Nothing of PortaKV may be imported here: the process that this file is must import it itself.

Row = dict[str, Any]
_LIMIT = 180.0  # seconds for one process
# Where the compilers below a backend keep what they made: a cold start must not find it.
_CACHES = ("PORTAKV_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def measure_startup(backend: str, device: str, rounds: int) -> list[Row]:
    """Return a row for cold and one for warm starts, each the median of ``rounds`` processes."""
    results: dict[str, list[Row]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for times in results.values():  # the second uses the cache of the first
                times.append(_start(backend, device, Path(folder)))
    return [
        {
            "kind": "startup",
            "backend": backend,
            "cache": cache,
            "seconds": round(median(one["seconds"] for one in times), 4),
            "worst": round(max(one["seconds"] for one in times), 4),
            "import_seconds": round(median(one["imported"] for one in times), 4),
            "rounds": rounds,
            "verified": all(one["right"] for one in times),
        }
        for cache, times in results.items()
    ]


def _start(backend: str, device: str, folder: Path) -> Row:
    """Start one process and read what it prints."""
    caches = {name: str(folder / name.lower()) for name in _CACHES}
    for own in caches.values():
        os.makedirs(own, mode=0o700, exist_ok=True)
    # Not the script's folder, whose modules could stand in for others.
    modules = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, **caches, "PYTHONPATH": modules, "PYTHONSAFEPATH": "1"}
    process = subprocess.run(
        [sys.executable, __file__, backend, device],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"A fresh process with {backend!r} failed: {process.stderr[-400:]}")
    read: Row = json.loads(process.stdout.splitlines()[-1])
    return read


def _first_transfer(backend: str, device: str) -> Row:
    """Time the first transfer of this process, everything of PortaKV included."""
    size = (2, 4, 16, 8, 64)
    slots = [5, 33, 18]
    numbers = torch.arange(prod(size), dtype=torch.int32, device=device)
    caches = [numbers.to(torch.int16).view(size) for _ in range(4)]
    chunk = torch.empty((2, 4, len(slots), 512), dtype=torch.int16, device=device)
    ids = torch.tensor(slots, device=device)
    if not device.startswith("cpu"):
        torch.get_device_module(device.partition(":")[0]).synchronize()
    early = [name for name in sys.modules if name.partition("_")[0].partition(".")[0] == "portakv"]
    assert not early, f"imported before the clock runs: {early}"
    began = perf_counter()
    from portakv import AdaptiveConnector

    imported = perf_counter()
    connector = AdaptiveConnector(device, backend)
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, slot_mapping=ids).synchronize()
    ended = perf_counter()
    rows = torch.stack([cache.flatten(1, 2)[:, ids].flatten(2) for cache in caches], 1)
    right = bool(torch.equal(rows, chunk))
    return {"seconds": ended - began, "imported": imported - began, "right": right}


if __name__ == "__main__":
    print(json.dumps(_first_transfer(sys.argv[1], sys.argv[2])))
