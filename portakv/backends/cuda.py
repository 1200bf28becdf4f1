# SPDX-License-Identifier: Apache-2.0
"""`cuda`: the hand-written row kernel, compiled by NVRTC, launched by the driver API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.backends.rows_kernel import RowsKernel
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.plan.plan import CopyPlan
from portakv.runtime import cuda as _cuda
from portakv.runtime import nvrtc as _nvrtc
from portakv.runtime.capture import capturing


class Cuda(Backend):
    """The CUDA kernel of ``native/cuda`` on NVIDIA devices."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._driver = CudaDriver(device)
        self._kernels = LoadedKernels(self._driver, lambda: capturing(device))

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cuda":
            return Decision(cls.name, False, f"it runs on cuda devices, not on {device.type}")
        if torch.version.hip is not None:
            return Decision(cls.name, False, "this torch is built for ROCm, not for CUDA")
        why = _nvrtc.missing() or _driver_too_old() or _device_too_old(device)
        if why is not None:
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, f"NVRTC {_nvrtc.nvrtc_version()} compiles its kernel")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=frozenset({("device", "device")}),
            skips_negative=True,
            guards=True,
            capturable=True,
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = [RowsKernel(nest, plan) for nest in plan.nests]
        return RowsLaunch(kernels, self._kernels.functions(kernels), self._driver)


class CudaDriver:
    """The CUDA driver for the rows kernel on one device; see `rows_launch.RowsDriver`."""

    success = (0,)

    def __init__(self, device: torch.device) -> None:
        driver = _cuda.bindings()
        self.device, self.launch = device, driver.cuLaunchKernel
        self._raw, self._wrap = _cuda.Caller(device).handle, driver.CUstream
        self._last: tuple[int | None, Any] = (None, None)

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        """Compile a text, or find it on disk, and make its kernels resident."""
        return _cuda.load(source, names, self.device)

    def handle(self, stream: torch.Stream | None) -> Any:
        """A stream's handle; None if another device is current."""
        raw = self._raw(stream)
        if raw is None:
            return None
        last = self._last
        if last[0] != raw:
            last = self._last = (raw, self._wrap(raw))
        return last[1]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside, the device is current, and this thread has its context."""
        with torch.cuda.device(self.device):
            _cuda.adopt(self.device)
            yield

    def check(self, answer: Any, what: str) -> None:
        """Raise `TransferError` for an answer that is not success."""
        _cuda.check(answer[0], what)

    def word(self, address: int) -> int:
        """Pinned memory has one address for all."""
        return address


def _driver_too_old() -> str | None:
    error, found = _cuda.bindings().cuDriverGetVersion()
    if int(error):
        return f"the driver does not tell its version ({error})"
    if found < _cuda.DRIVER:
        return (
            f"the driver supports CUDA {found // 1000}.{found % 1000 // 10}, but 13.0 is needed; "
            f"update the driver"
        )
    return None


def _device_too_old(device: torch.device) -> str | None:
    try:
        _cuda.compiler_target(device)
    except RuntimeError as error:
        return str(error)
    return None
