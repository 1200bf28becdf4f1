# SPDX-License-Identifier: Apache-2.0
"""`hip`: the row kernel of ``native/cuda``, compiled by hipRTC, launched through HIP's modules.

For AMD devices and Hygon's DCUs, which torch calls ``cuda`` as well; ``torch.version.hip`` tells
them apart. The kernel knows no warps, so that waves of 64 lanes are as good as any. Compiled for
gfx906, gfx908 and gfx90a and run on a CPU (docs/hardware.md); never yet on such a device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.backends.rows_kernel import RowsKernel, Tuning
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.plan.plan import CopyPlan
from portakv.runtime import _hiprtc
from portakv.runtime import hip as _hip_driver
from portakv.runtime._hip_card import Card
from portakv.runtime._launching import forked
from portakv.runtime.hip import Driver, DriverMissing

_THREADS = 256  # four waves of 64
# Vectors of a thread and the distance of prefetches were measured on NVIDIA devices only: here
# each thread moves one vector, and these architectures have no prefetch into L2.
_TUNINGS = (Tuning(0, 1, 0),)

_OTHER_TORCH = (
    "this torch is not built for ROCm; for a device of AMD install torch's build for ROCm, for a "
    "DCU the torch of Hygon's DTK"
)


class Hip(Backend):
    """The kernel of ``native/cuda`` on devices of AMD and Hygon."""

    name = "hip"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        card = self.find_card(device)
        self._driver = HipDriver(self.open_driver(), card)
        self._kernels = LoadedKernels(self._driver, card.capturing)

    @staticmethod
    def open_driver() -> Driver:
        """The libraries of HIP; `DriverMissing` where they cannot be had."""
        return _hip_driver.driver()

    @staticmethod
    def find_card(device: torch.device) -> Card:
        """The device as it is spoken to."""
        return Card(device)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cuda":
            return Decision(cls.name, False, f"it runs on cuda devices, not on {device.type}")
        if torch.version.hip is None:
            return Decision(cls.name, False, _OTHER_TORCH)
        return cls._probe_driver(device)

    @classmethod
    def _probe_driver(cls, device: torch.device) -> Decision:
        try:
            driver = cls.open_driver()
            why = _no_device(driver, device)
            if why is not None:
                return Decision(cls.name, False, why)
            version, card = _hiprtc.hiprtc_version(driver), cls.find_card(device)
        except (DriverMissing, RuntimeError) as error:
            return Decision(cls.name, False, str(error))
        return Decision(cls.name, True, f"hipRTC {version} compiles its kernel for {card}")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=frozenset({("device", "device")}),
            skips_negative=True,
            guards=True,
            capturable=True,
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = [RowsKernel(nest, plan, _THREADS, _TUNINGS) for nest in plan.nests]
        return RowsLaunch(kernels, self._kernels.functions(kernels), self._driver)


def _no_device(driver: Driver, device: torch.device) -> str | None:
    """Why HIP has no such device, or None."""
    count = ctypes.c_int()
    error = driver.runtime.hipGetDeviceCount(ctypes.byref(count))
    if error:
        return (
            f"HIP finds no device: hipGetDeviceCount returned {driver.error(error)}; check that "
            f"/dev/kfd can be opened and that HIP_VISIBLE_DEVICES leaves a device"
        )
    if (device.index or 0) >= count.value:
        return f"HIP finds {count.value} devices, so that there is no {device}"
    return None


class HipDriver:
    """HIP for the rows kernel on one device; see `rows_launch.RowsDriver`."""

    success = 0

    def __init__(self, driver: Driver, card: Card) -> None:
        self._driver, self._card = driver, card
        self.launch = driver.runtime.hipModuleLaunchKernel
        # A runtime need not copy a module's code, so that it stays where it is.
        self._loaded: list[tuple[ctypes.c_void_p, bytes]] = []
        self._process = os.getpid()

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        """Compile a text, or find it on disk, and load its kernels."""
        binary = _hiprtc.compile_kernel(self._driver, source, self._card.architecture)
        module, functions = ctypes.c_void_p(), {}
        with self._card.current():
            error = self._driver.runtime.hipModuleLoadData(ctypes.byref(module), binary)
            self.check(error, "Loading the kernel")
            for name in names:
                found = functions[name] = ctypes.c_void_p()
                error = self._driver.runtime.hipModuleGetFunction(
                    ctypes.byref(found), module, name.encode()
                )
                self.check(error, "Finding the kernel")
        self._loaded.append((module, binary))
        return functions

    def handle(self, stream: torch.Stream | None) -> int | None:
        """A stream's handle; None if another device is current."""
        if os.getpid() != self._process:
            raise forked("HIP")
        return self._card.stream(stream) if self._card.is_current() else None

    def current(self) -> AbstractContextManager[object]:
        """Inside, the device is this thread's current one."""
        return self._card.current()

    def check(self, answer: int, what: str) -> None:
        """Raise `RuntimeError` for an error."""
        self._driver.check(answer, what)

    def word(self, address: int) -> int:
        """Where the device finds pinned memory: not where the host does, if it was registered."""
        found: Any = ctypes.c_void_p()
        error = self._driver.runtime.hipHostGetDevicePointer(ctypes.byref(found), address, 0)
        self.check(error, "Finding the status word")
        return int(found.value or 0)
