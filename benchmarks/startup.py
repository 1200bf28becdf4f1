# SPDX-License-Identifier: Apache-2.0
"""A fresh process: from torch imported and a device context made to the first finished transfer.

Counted are PortaKV's own imports, its self-check, registration and the transfer; *cold* with an
empty cache of compiled kernels, *warm* with the one that the process before left behind. Run as a
module it is such a process, and prints its times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from .harness import quantile

_LIMIT = 180.0  # seconds for one process
# Where the compilers below a backend keep what they made: a cold start must not find it.
_CACHES = ("PORTAKV_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_CODE = "import sys; from {package}.startup import child; child(sys.argv[1], sys.argv[2])"


def measure_startup(backend: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for cold and one for warm starts, each the median of ``rounds`` processes."""
    found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for times in found.values():  # the second finds what the first left behind
                times.append(_start(backend, device, Path(folder)))
    return [
        {
            "kind": "startup",
            "backend": backend,
            "cache": cache,
            "seconds": round(quantile([one["seconds"] for one in times], 0.5), 4),
            "worst": round(max(one["seconds"] for one in times), 4),
            "import_seconds": round(quantile([one["imported"] for one in times], 0.5), 4),
            "rounds": rounds,
            "verified": all(one["right"] for one in times),
        }
        for cache, times in found.items()
    ]


def _start(backend: str, device: str, folder: Path) -> dict[str, Any]:
    """Start one process and read what it prints.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = dict(os.environ)
    for name in _CACHES:
        own = folder / name.lower()
        own.mkdir(mode=0o700, exist_ok=True)
        environment[name] = str(own)
    paths = [path for path in sys.path if path]
    # The folder above the package, under whichever name this one was imported.
    above = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([*paths, above])
    code = _CODE.format(package=__package__)
    told = subprocess.run(
        [sys.executable, "-c", code, backend, device],
        env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False,
    )  # fmt: skip
    if told.returncode:
        raise RuntimeError(f"A fresh process with {backend!r} failed: {told.stderr[-400:]}")
    read: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return read


def child(backend: str, device: str) -> None:
    """Be the fresh process: print seconds, and whether the bytes were right, as JSON."""
    import torch

    size, slots = (2, 4, 16, 8, 64), [5, 33, 18]
    count = 2 * 4 * 16 * 8 * 64
    caches = [
        torch.arange(count, dtype=torch.int32, device=device).to(torch.int16).view(size)
        for _ in range(4)
    ]
    chunk = torch.empty((2, 4, len(slots), 512), dtype=torch.int16, device=device)
    ids = torch.tensor(slots, device=device)
    _synchronize(torch, device)
    began = perf_counter()
    from portakv import AdaptiveConnector

    imported = perf_counter()
    connector = AdaptiveConnector(device, backend)
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, slot_mapping=ids).synchronize()
    ended = perf_counter()
    rows = torch.stack([cache.flatten(1, 2)[:, ids].flatten(2) for cache in caches], 1)
    print(json.dumps({
        "seconds": ended - began,
        "imported": imported - began,
        "right": bool(torch.equal(rows, chunk)),
    }))  # fmt: skip


def _synchronize(torch: Any, device: str) -> None:
    if not device.startswith("cpu"):
        torch.get_device_module(device.partition(":")[0]).synchronize()
