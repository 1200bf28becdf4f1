# SPDX-License-Identifier: Apache-2.0
"""The fake HIP driver for tests: made to fail, and asked what it was given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from portakv.backends.hip import Hip
from portakv_conformance.vendor.hip_emulated import HipEmulated, compiler, fake_driver, library

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="the fake HIP driver is compiled, and there is no g++"
)


@contextmanager
def failing(function: str, error: int) -> Iterator[None]:
    """Inside, a function of the fake driver returns an error."""
    library().hip_fake_fail(function.encode(), error)
    try:
        yield
    finally:
        library().hip_fake_fail(function.encode(), 0)


class Launched(NamedTuple):
    """The last launch that the driver saw."""

    grid: list[int]
    block: list[int]
    stream: int | None


def last_launch() -> Launched:
    seven, stream = (ctypes.c_uint * 7)(), ctypes.c_void_p()
    library().hip_fake_last(seven, ctypes.byref(stream))
    assert seven[6] == 0, "no shared memory is asked for"
    return Launched(list(seven[:3]), list(seven[3:6]), stream.value)


def launches() -> int:
    """How many launches the driver saw."""
    return int(library().hip_fake_launches())


def rocm(patched: pytest.MonkeyPatch, name: str = "", architecture: str = "gfx90a") -> None:
    """A torch for ROCm with one device, over the fake driver."""
    told = SimpleNamespace(name=name, gcnArchName=architecture)
    patched.setattr(torch.version, "hip", "6.3.42134")
    patched.setattr(torch.cuda, "get_device_properties", lambda _: told)
    patched.setattr(Hip, "open_driver", staticmethod(fake_driver))


def emulated() -> HipEmulated:
    """The emulated backend, with nothing loaded."""
    return HipEmulated(CPU)
