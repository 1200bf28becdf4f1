# SPDX-License-Identifier: Apache-2.0
"""`cuda`: the hand-written row kernel, compiled by NVRTC, launched by the driver API."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import torch

from portakv.backends._rows_kernel import NAMES, RowsKernel
from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.plan.plan import CopyPlan
from portakv.runtime import nvrtc as _nvrtc
from portakv.runtime._launching import Arguments, captured, forked, raw_stream

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

_THREADS = 128
_DRIVER = 13000  # CUDA 13: what NVRTC 13's machine code and cuda-bindings 13 need


class Cuda(Backend):
    """The CUDA kernel of ``native/cuda`` on NVIDIA devices."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._capability = _capability(device)
        self._functions: dict[str, dict[int, Any]] = {}
        self._lock = threading.Lock()

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
        sources = [kernel.source for kernel in kernels]
        if _capturing() and not self._functions.keys() >= set(sources):
            raise captured()
        functions = [self._function(source) for source in sources]
        return _CudaLaunch(plan.unit, kernels, functions, self.device)

    def _function(self, source: str) -> dict[int, Any]:
        """The loaded kernels of a text; compiled, or read from the cache on disk, at most once."""
        with self._lock:
            found = self._functions.get(source)
            if found is None:
                binary = _nvrtc.compile_kernel(source, self._capability)
                found = self._functions[source] = _load(binary, self.device)
            return found


def _driver_too_old() -> str | None:
    from cuda.bindings import driver

    error, found = driver.cuDriverGetVersion()
    if int(error):
        return f"the driver does not tell its version ({error})"
    if found < _DRIVER:
        return (
            f"the driver supports CUDA {found // 1000}.{found % 1000 // 10}, but 13.0 is needed; "
            f"update the driver"
        )
    return None


def _device_too_old(device: torch.device) -> str | None:
    try:
        _nvrtc.target_for(_capability(device))
    except RuntimeError as error:
        return str(error)
    return None


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _load(binary: bytes, device: torch.device) -> dict[int, Any]:
    """The loaded entries, by the vectors that one thread moves."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream(device)  # a context, before anything is loaded into it
        torch._C._cuda_setDevice(device.index)
        error, library = driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0)
        _check(error, "Loading the kernel")
        functions = {}
        for each, name in NAMES.items():
            error, kernel = driver.cuLibraryGetKernel(library, name.encode())
            _check(error, "Finding the kernel")
            # Modules load lazily; a first launch inside a capture must not have to.
            error, functions[each] = driver.cuKernelGetFunction(kernel)
            _check(error, "Making the kernel resident")
    return functions


def _check(error: Any, what: str) -> None:
    if int(error):
        raise RuntimeError(f"{what} failed: {error!s}; the copy was not made.")


class _Arguments(Arguments):
    def __init__(self, fixed: list[bytes], device: torch.device) -> None:
        with torch.cuda.device(device):
            torch._C._cuda_setDevice(device.index)  # a new thread has no context yet
        super().__init__(fixed)


class _CudaLaunch:
    def __init__(
        self,
        unit: int,
        kernels: list[RowsKernel],
        functions: list[dict[int, Any]],
        device: torch.device,
    ) -> None:
        from cuda.bindings import driver

        self._launch = driver.cuLaunchKernel
        self._streams: dict[int, Any] = {}
        self._make_stream = driver.CUstream
        self._unit, self._kernels, self._functions = unit, kernels, functions
        self._device, self._index = device, device.index
        self._arguments = _Arguments([kernel.fixed for kernel in kernels], device)
        self._process = os.getpid()

    def again(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index
    ) -> _CudaAgain | None:
        """See `base.Repeatable`."""
        packers, fixed = [], []
        for kernel in self._kernels:
            packer = kernel.packer(src, dst, src_index, dst_index)
            if packer is None:
                return None
            filled = bytearray(kernel.fixed)
            kernel.pack(filled, src, dst, src_index, dst_index, 0, 0)
            packers.append(packer)
            fixed.append(bytes(filled))
        parts = [
            (packer, functions, kernel.row, kernel.planes, kernel.small, kernel.tuned)
            for packer, functions, kernel in zip(
                packers, self._functions, self._kernels, strict=True
            )
        ]
        most = min(kernel.most_units for kernel in self._kernels)
        return _CudaAgain(parts, _Arguments(fixed, self._device), self._device, most)

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
            raise forked("CUDA")
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                self._run(src, dst, src_index, dst_index, count, stream, status)
            return
        self._run(src, dst, src_index, dst_index, count, stream, status)

    def _run(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        raw = (
            torch._C._cuda_getCurrentRawStream(self._index)
            if stream is None
            else raw_stream(stream)
        )
        handle = self._streams.get(raw)
        if handle is None:
            handle = self._streams[raw] = self._make_stream(raw)
        units = count // self._unit
        word = 0 if status is None else status.data_ptr()
        arguments = self._arguments
        for at, kernel in enumerate(self._kernels):
            buffer = arguments.buffers[at]
            each, ahead = kernel.tuned(units)
            kernel.pack(buffer, src, dst, src_index, dst_index, word, ahead)
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                (error,) = self._launch(
                    self._functions[at][each], -(-span * kernel.row // (_THREADS * each)),
                    kernel.planes, 1,
                    _THREADS, 1, 1, 0, handle, arguments.addresses[at], 0,
                )  # fmt: skip
                if error:
                    _check(error, "The launch")


class _CudaAgain:
    """See `base.Again`."""

    def __init__(
        self, parts: list[Any], arguments: _Arguments, device: torch.device, most: int
    ) -> None:
        from cuda.bindings import driver

        self._launch, self._make_stream = driver.cuLaunchKernel, driver.CUstream
        self._parts, self._arguments, self.most = parts, arguments, most
        self._device, self._index = device, device.index
        self._streams: dict[int, Any] = {}
        self._process = os.getpid()

    def __call__(self, dense: int, ids: int, first: int, count: int, status: int) -> None:
        if os.getpid() != self._process:
            raise forked("CUDA")
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                self(dense, ids, first, count, status)
            return
        raw = torch._C._cuda_getCurrentRawStream(self._index)
        stream = self._streams.get(raw)
        if stream is None:
            stream = self._streams[raw] = self._make_stream(raw)
        arguments = self._arguments
        for part, buffer, address in zip(
            self._parts, arguments.buffers, arguments.addresses, strict=True
        ):
            pack, functions, row, planes, small, tuned = part
            each, ahead = (1, 0) if count < small else tuned(count)
            pack(buffer, dense, ids, first, count, ahead, status)
            (error,) = self._launch(
                functions[each], -(-count * row // (_THREADS * each)), planes, 1,
                _THREADS, 1, 1, 0, stream, address, 0,
            )  # fmt: skip
            if error:
                _check(error, "The launch")
