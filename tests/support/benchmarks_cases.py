# SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks share: small shapes, what is measured, rows of results."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from portakv_benchmarks.device import suite
from portakv_benchmarks.shared.shapes import Shape, load
from portakv_benchmarks.shared.timers import HostTimer

CPU = torch.device("cpu")
FULL = dataclasses.replace(suite.PRESETS["full"], rounds=5, repeats=2)


def tiny(name: str = "seed", **changes: Any) -> Shape:
    """A shape of the file with few layers and tokens."""
    shape = load()[name]
    tokens = shape.tokens if shape.tokens < 16 else 2 * shape.block_size
    small = {"layers": min(shape.layers, 3), "tokens": tokens, "pool": min(shape.pool, 32)}
    return dataclasses.replace(shape, **{**small, **changes})


def field(*backends: str, peers: tuple[Any, ...] = ()) -> suite.Field:
    """What is measured, without a peer unless one is given."""
    return suite.Field(backends or ("reference",), peers, HostTimer(CPU), CPU)


def copied(backend: str, time: float, **more: Any) -> dict[str, Any]:
    """A row of a result."""
    row = {"kind": "copy", "shape": "s", "layers": "apart", "op": "gather", "index": "random",
           "backend": backend, "p50_us": time, "verified": True}  # fmt: skip
    return {**row, **more}
