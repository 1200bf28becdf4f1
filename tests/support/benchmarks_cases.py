# SPDX-License-Identifier: Apache-2.0
"""Small shapes, measured objects and rows of results for the tests of the benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from portakv.cli.sides import Shape, load_shapes
from portakv_benchmarks.device import suite
from portakv_benchmarks.shared.harness import DeviceTimer, HostTimer

CPU = torch.device("cpu")
#: For the fixture ``device``, without the simulated device, on which benchmarks rest the host
#: before each call.
ON_CPU_AND_CUDA = pytest.mark.parametrize(
    "device",
    [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)],
    ids=str,
    indirect=True,
)
FULL = dataclasses.replace(suite.PRESETS["full"], rounds=5, repeats=2)
MACHINE = {
    "device_type": "cuda",
    "device": "Some GPU",
    "torch": "2.11",
    "python": "3.12",
    "date": "2026-11-20",
    "portakv": "0",
    "driver_version": "1",
}


def tiny(name: str = "seed", **changes: Any) -> Shape:
    """Return a shape of the file with few layers and tokens."""
    shape = load_shapes()[name]
    tokens = shape.tokens if shape.tokens < 16 else 2 * shape.block_size
    small = {"layers": min(shape.layers, 3), "tokens": tokens, "pool": min(shape.pool, 32)}
    return dataclasses.replace(shape, **{**small, **changes})


def field(device: torch.device = CPU, peers: tuple[Any, ...] = ()) -> suite.Field:
    """Return the object to measure, without a peer unless the caller passes one."""
    timer = DeviceTimer(device) if device.type == "cuda" else HostTimer(device)
    return suite.Field(("reference",), peers, timer, device, [])


def copied(backend: str, time: float, **more: Any) -> dict[str, Any]:
    """Return a row of a result."""
    row = {
        "kind": "copy",
        "shape": "s",
        "layers": "apart",
        "op": "gather",
        "index": "random",
        "backend": backend,
        "p50_us": time,
        "verified": True,
    }
    return {**row, **more}


def linked(backend: str, time: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a row of a result of the host benchmark."""
    usual = {
        "kind": "host_copy",
        "shape": "s",
        "backend": backend,
        "engine": backend.split()[0],
        "op": "d2h",
        "p50_us": time,
        "verified": True,
    }
    return {**usual, **more}


def host_result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a result of the host benchmark."""
    return {
        "suite": "host",
        "name": "some-gpu-host",
        "machine": {**MACHINE},
        "left_out": [],
        "asked": {"parts": ["grid"], "peers": {}},
        "rows": rows,
        **more,
    }
