# SPDX-License-Identifier: Apache-2.0
"""`hip`: the row kernel of ``native/cuda``, compiled by hipRTC, launched through HIP's modules.

For AMD devices and Hygon's DCUs, which torch calls ``cuda`` as well; ``torch.version.hip`` tells
them apart. The kernel knows no warps, so that waves of 64 lanes are as good as any. Compiled for
gfx906, gfx908 and gfx90a and run on a CPU (docs/hardware.md); never yet on such a device.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from portakv.backends._rows_kernel import NAMES, RowsKernel
from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.plan.plan import CopyPlan
from portakv.runtime import _hiprtc
from portakv.runtime import hip as _hip_driver
from portakv.runtime._hip_card import Card
from portakv.runtime._launching import Arguments, captured, forked
from portakv.runtime.hip import Driver, DriverMissing

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

_THREADS = 256  # four waves of 64
# Vectors of a thread and the distance of prefetches were measured on NVIDIA devices only: here
# each thread moves one vector, and these architectures have no prefetch into L2.
_EACH, _AHEAD = 1, 0

_OTHER_TORCH = (
    "this torch is not built for ROCm; for a device of AMD install torch's build for ROCm, for a "
    "DCU the torch of Hygon's DTK"
)


class Hip(Backend):
    """The kernel of ``native/cuda`` on devices of AMD and Hygon."""

    name = "hip"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._driver, self._card = self.open_driver(), self.find_card(device)
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

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
        kernels = [RowsKernel(nest, plan) for nest in plan.nests]
        sources = [kernel.source for kernel in kernels]
        if not self._loaded.keys() >= set(sources) and self._card.capturing():
            raise captured()
        loaded = [self._load(source) for source in sources]
        return _HipLaunch(plan.unit, kernels, loaded, self._driver, self._card)

    def _load(self, source: str) -> _Loaded:
        """The loaded kernel of a text; compiled, or read from the cache on disk, at most once."""
        with self._lock:
            found = self._loaded.get(source)
            if found is None:
                card, driver = self._card, self._driver
                binary = _hiprtc.compile_kernel(driver, source, card.architecture)
                with card.current():
                    found = self._loaded[source] = _load(driver, binary)
            return found


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


class _Loaded(NamedTuple):
    """A kernel in its module, whose code stays where it is: a runtime need not copy it."""

    function: ctypes.c_void_p
    module: ctypes.c_void_p
    binary: bytes


def _load(driver: Driver, binary: bytes) -> _Loaded:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    error = driver.runtime.hipModuleLoadData(ctypes.byref(module), binary)
    driver.check(error, "Loading the kernel")
    name = NAMES[_EACH].encode()
    error = driver.runtime.hipModuleGetFunction(ctypes.byref(function), module, name)
    driver.check(error, "Finding the kernel")
    return _Loaded(function, module, binary)


class _HipLaunch:
    def __init__(
        self,
        unit: int,
        kernels: list[RowsKernel],
        loaded: list[_Loaded],
        driver: Driver,
        card: Card,
    ) -> None:
        self._unit, self._driver, self._card = unit, driver, card
        self._parts = list(zip(kernels, loaded, strict=True))
        self._arguments = Arguments([kernel.fixed for kernel in kernels])
        self._process = os.getpid()

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        if os.getpid() != self._process:
            raise forked("HIP")
        sides = (src, dst, src_index, dst_index)
        if self._card.is_current():
            self._run(sides, count, stream, status)
            return
        with self._card.current():
            self._run(sides, count, stream, status)

    def _run(
        self,
        sides: tuple[KVView, KVView, Index, Index],
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        launch, handle = self._driver.runtime.hipModuleLaunchKernel, self._card.stream(stream)
        units = count // self._unit
        word = 0 if status is None else self._address_on_device(status.data_ptr())
        buffers, addresses = self._arguments.buffers, self._arguments.addresses
        for (kernel, loaded), buffer, address in zip(self._parts, buffers, addresses, strict=True):
            kernel.pack(buffer, *sides, word, _AHEAD)
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                blocks = -(-span * kernel.row // (_THREADS * _EACH))
                error = launch(
                    loaded.function, blocks, kernel.planes, 1, _THREADS, 1, 1, 0, handle,
                    address, None,
                )  # fmt: skip
                self._driver.check(error, "The launch")

    def _address_on_device(self, host: int) -> int:
        """Where the device finds pinned memory: not where the host does, if it was registered."""
        found: Any = ctypes.c_void_p()
        error = self._driver.runtime.hipHostGetDevicePointer(ctypes.byref(found), host, 0)
        self._driver.check(error, "Finding the status word")
        return int(found.value or 0)
