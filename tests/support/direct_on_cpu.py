# SPDX-License-Identifier: Apache-2.0
"""The strategy `zero_copy` on the host: its kernel compiled by g++, its launches through a fake
driver.

Inside `installed` the strategy does everything as on a device, up to the driver's call; one side of
a copy counts as the device's.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from portakv import CopyPlan, KVView
from portakv.backends.base import Capabilities, Decision, Launch
from portakv.interconnect import zero_copy
from portakv.interconnect.zero_copy import NAME, Cut, ZeroCopy
from portakv.runtime import cuda, streams
from support import cuda_on_cpu
from support.cuda_on_cpu import HOST_PLACES, LAUNCH, why_not

__all__ = ["CPU", "SMALL", "Driver", "Loads", "Stores", "installed", "why_not"]
CPU = torch.device("cpu")
#: So little in a turn that the smallest copy takes several.
SMALL = Cut(threads=8, each=3)
_ENTRIES = f"""
extern "C" void run_direct(const void* argument, unsigned blocks, unsigned threads) {{
    run_grid<Argument>({NAME}, argument, blocks, 1, threads);
}}
extern "C" unsigned argument_bytes() {{ return sizeof(Argument); }}
extern "C" unsigned src_table_at() {{ return offsetof(Argument, from.table); }}
extern "C" unsigned dst_table_at() {{ return offsetof(Argument, to.table); }}
"""


def compiled(source: str) -> ctypes.CDLL:
    """Return the loaded kernel."""
    return cuda_on_cpu.compiled(source, _ENTRIES)


class Library:
    """The driver's library, with the one function that launches."""

    def __init__(self, driver: Driver) -> None:
        self._launch = LAUNCH(driver.launch)

    def __getitem__(self, name: str) -> Any:
        if name != "cuLaunchKernel":
            raise AttributeError(name)
        return self._launch


@dataclass
class Driver:
    """The strategy's requests to the driver: the blocks, threads and stream of each launch, and the
    retained host memory; ``error``: the driver's answer."""

    retained: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    launches: list[tuple[int, int, int]] = field(default_factory=list)
    libraries: list[Any] = field(default_factory=list)
    error: int = 0

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        self.libraries.append(compiled(source))
        return dict.fromkeys(names, len(self.libraries))

    def hold(self, device: torch.device, stream: torch.Stream | None, *host: torch.Tensor) -> None:
        self.retained.append(host)

    def launch(self, handle: int, x: int, y: int, z: int, *rest: Any) -> int:
        threads, of_y, of_z, shared, stream, parameters, extra = rest
        assert (y, z, of_y, of_z, shared, extra) == (1, 1, 1, 1, 0, None)
        assert x >= 1, "a launch of no blocks is an error of the driver's"
        self.launches.append((x, threads, stream))
        if not self.error:
            library = self.libraries[handle - 1]
            library.run_direct(ctypes.c_void_p(parameters[0]), x, threads)
        return self.error


class Stores(ZeroCopy):
    """`ZeroCopy` for the CPU, to the host: the source counts as the device's."""

    name = "direct-on-cpu-stores"
    sides = ("device", "pinned")

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, why_not() is None, why_not() or "g++ compiles the kernel")

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), places=HOST_PLACES)

    def prepare(self, plan: CopyPlan) -> Launch:
        placed = copy.copy(plan)
        (src, dst) = self.sides
        placed.src = replace(plan.src, place=src)
        placed.dst = replace(plan.dst, place=dst)
        return super().prepare(placed)


class Loads(Stores):
    """`ZeroCopy` for the CPU, from the host: the destination counts as the device's."""

    name = "direct-on-cpu-loads"
    sides = ("pinned", "device")


def _bring_table(
    view: KVView, target: torch.device, stream: torch.Stream | None, captured: bool
) -> None:
    """Stand for a copy that waits for a stream: there is none."""
    assert view.table.device == target


@contextmanager
def installed(cut: Cut = SMALL) -> Iterator[Driver]:
    """Launch `Loads` and `Stores` on the host."""
    driver = Driver()
    library = Library(driver)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda, "library", lambda: library)
        patched.setattr(cuda.CudaDriver, "load", driver.load)
        patched.setattr(cuda.CudaDriver, "current", lambda self: nullcontext())
        patched.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
        patched.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
        patched.setattr(zero_copy, "device_address", lambda address, device: address)
        patched.setattr(zero_copy, "bring_table", _bring_table)
        patched.setattr(streams, "completion", driver.hold)
        patched.setattr(zero_copy, "CUT", cut)
        yield driver
