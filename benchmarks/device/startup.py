# SPDX-License-Identifier: Apache-2.0
"""A fresh process: from torch imported and a device context made to the first finished transfer.

Counted are PortaKV's own imports, its self-check, registration and the transfer; *cold* with an
empty cache of compiled kernels, *warm* with the one that the process before left behind. The
process itself is ``cold_start.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from portakv_benchmarks.shared.harness import quantile

_LIMIT = 180.0  # seconds for one process
# Where the compilers below a backend keep what they made: a cold start must not find it.
_CACHES = ("PORTAKV_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_SCRIPT = Path(__file__).with_name("cold_start.py")


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
    # Not the folder of the script, where `startup` and others could stand in for other modules.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["PYTHONSAFEPATH"] = "1"
    told = subprocess.run(
        [sys.executable, str(_SCRIPT), backend, device],
        env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False,
    )  # fmt: skip
    if told.returncode:
        raise RuntimeError(f"A fresh process with {backend!r} failed: {told.stderr[-400:]}")
    read: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return read
