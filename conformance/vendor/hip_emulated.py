# SPDX-License-Identifier: Apache-2.0
"""`hip` on a CPU: its own code and kernel text, over a fake driver that g++ builds. EMULATED.

``portakv conform portakv_conformance.vendor.hip_emulated:HipEmulated`` judges all of `hip` but the
device: the text that hipRTC is given, how arguments are packed, how launches are cut and errors
are read. Memory is the host's, work is done when a launch returns, and there are no streams.
"""

from __future__ import annotations

import ctypes
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from portakv.backends.base import Capabilities, Decision, places_on
from portakv.backends.hip import Hip
from portakv.runtime.devices import refuse_fork
from portakv.runtime.hip import Card, Driver, DriverMissing, bound
from portakv_conformance.vendor import cpp

EMULATED = True
ARCHITECTURE = "gfx906"
#: What makes a kernel's text a C++ program, and what one whose lanes exchange values also needs.
SHIM = Path(__file__).with_name("kernel_on_cpu.h")
WARPS = SHIM.with_name("warps_on_cpu.h")
_SOURCE = SHIM.with_name("hip_fake.cpp")
_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compiler() -> str | None:
    """Return the C++ compiler of the library and of the kernels; None if there is none."""
    return cpp.compiler("g++")


@cache
def built() -> bytes:
    """Return the fake runtime, which is also the fake hipRTC, as a file holds it.

    Raises:
        DriverMissing: there is no compiler, or it failed.
    """
    result = compiler()
    if result is None:
        raise DriverMissing("the fake HIP driver needs g++ (Debian: apt install g++), or set CXX")
    sources = [_SOURCE.read_text(), SHIM.read_text(), WARPS.read_text()]
    # The last part of its version: kernels are kept on disk by it, apart from those of any real HIP
    # and from those of other sources than these.
    patch = zlib.crc32("".join(sources).encode()) % 100_000
    shims = [f'-DPORTAKV_SHIM="{SHIM}"', f'-DPORTAKV_WARPS="{WARPS}"']
    named = [f"-DPORTAKV_FAKE_PATCH={patch}", *shims]
    command = [result, *_FLAGS, *named, f'-DPORTAKV_CXX="{result}"', str(_SOURCE), "-ldl"]
    try:
        return cpp.built(command, sources)
    except cpp.CompilerError as error:
        raise DriverMissing(f"the fake HIP driver does not compile: {error}") from error


@cache
def library() -> ctypes.CDLL:
    """Return the loaded fake runtime; `DriverMissing` as `built` raises."""
    return ctypes.CDLL(cpp.in_memory("portakv_hip_fake", built()))


@cache
def fake_driver() -> Driver:
    """Return the fake libraries as `hip` calls them; `DriverMissing` as `built` raises."""
    return bound(library(), library())


class HostCard(Card):
    """The CPU in place of a HIP device."""

    def _facts(self) -> tuple[str, str]:
        return "emulated on the CPU", ARCHITECTURE

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def number(self, stream: torch.Stream | None) -> int | None:
        if self._process.forked:
            raise refuse_fork(self.platform)
        assert stream is None, "the host has no streams"
        return 0


class HipEmulated(Hip):
    """`hip` over the fake driver, on host memory."""

    name = "hip-emulated"
    emulated = True  # no report on it is R6

    @staticmethod
    def open_driver() -> Driver:
        return fake_driver()

    @staticmethod
    def find_card(device: torch.device, driver: Driver) -> Card:
        return HostCard(device, driver)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cpu":
            return Decision(cls.name, False, f"it emulates hip on the CPU, not on {device.type}")
        return cls._probe_driver(device)

    def capabilities(self) -> Capabilities:
        own = super().capabilities()
        return replace(own, places=places_on(self.device), capturable=False)
