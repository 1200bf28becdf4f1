# SPDX-License-Identifier: Apache-2.0
"""What the host side asks of CUDA's driver by itself: to launch, and to copy rows at a pitch."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from portakv.errors import TransferError
from portakv.runtime import nvrtc as _nvrtc
from portakv.runtime._launching import forked, raw_stream

DRIVER = 13000  # CUDA 13: what NVRTC 13's machine code and cuda-bindings 13 need


def of_others(device: torch.device) -> str | None:
    """That a device is of a kind that the driver does not serve, as a phrase; None: it is not."""
    if device.type != "cuda":
        return f"the CUDA driver does not serve {device.type} devices"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, not for CUDA"
    return None


def no_cuda(device: torch.device) -> str | None:
    """What keeps the driver from serving a device at all, as a phrase; None where it does."""
    if (why := of_others(device)) is not None:
        return why
    return None if torch.cuda.is_available() else "torch finds no usable CUDA device here"


@cache
def why_not(device: torch.device) -> str | None:
    """What keeps the driver from being asked for a device by the extra ``cuda``, as a phrase; None
    where it can be."""
    why = no_cuda(device) or _nvrtc.missing()
    if why is not None:
        return why
    found = driver_version()
    if found < DRIVER:
        return (
            f"the driver supports CUDA {found // 1000}.{found % 1000 // 10}, but 13.0 is needed; "
            f"update the driver"
        )
    return None


def driver_version() -> int:
    """CUDA's version that the driver supports (13000 is 13.0); 0 where it does not tell."""
    error, found = bindings().cuDriverGetVersion()
    return 0 if int(error) else int(found)


def bindings() -> Any:
    """The driver's functions, out of the extra ``cuda``."""
    from cuda.bindings import driver

    return driver


def capability(device: torch.device) -> int:
    """The compute capability of a device; 90 is 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compiler_target(device: torch.device) -> str:
    """What is compiled for a device; raises `RuntimeError` where it is too old for NVRTC."""
    return _nvrtc.target_for(capability(device))


def load(source: str, names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Compile a text, or find it on disk, and make its kernels resident.

    Raises:
        RuntimeError: the text does not compile, with NVRTC's log.
        TransferError: the driver refuses it.
    """
    driver = bindings()
    binary = _nvrtc.compile_kernel(source, capability(device))
    adopt(device)
    with torch.cuda.device(device):
        error, library = driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0)
        check(error, "Loading the kernel")
        functions = {}
        for name in names:
            error, kernel = driver.cuLibraryGetKernel(library, name.encode())
            check(error, "Finding the kernel")
            # Modules load lazily; a first launch inside a capture must not have to.
            error, functions[name] = driver.cuKernelGetFunction(kernel)
            check(error, "Making the kernel resident")
    return functions


def adopt(device: torch.device) -> None:
    """Give this thread a context, which the driver's calls take for granted."""
    with torch.cuda.device(device):
        torch.cuda.current_stream(device)
        torch._C._cuda_setDevice(device.index)


class Arguments(threading.local):
    """A kernel's one parameter, once for each thread, so that several can launch at once.

    Attributes:
        buffer: the parameter's bytes.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        adopt(device)  # a new thread has no context yet
        self.buffer = bytearray(nbytes)
        self.room = memoryview(self.buffer)
        self._owned = (ctypes.c_char * nbytes).from_buffer(self.buffer)
        self._pointer = (ctypes.c_void_p * 1)(ctypes.addressof(self._owned))
        self.address = ctypes.addressof(self._pointer)


# Another object in a forked process; to ask for the process at each launch is a system call.
_process = object()


@cache
def _watch_forks() -> None:
    def forget() -> None:
        global _process
        _process = object()

    os.register_at_fork(after_in_child=forget)


class Caller:
    """What every call for one device asks first, in any thread.

    Raises `Unsupported` in a process that was forked from the one that made it.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index
        self._raw: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
        self._current = torch._C._cuda_getDevice
        self._alone = torch.cuda.device_count() == 1  # so this device is always the current one
        _watch_forks()
        self._process = _process

    def handle(self, stream: torch.Stream | None) -> int | None:
        """The driver's handle of ``stream``, or of the current stream of this device; None: another
        device is current, and this one has to be made it first."""
        if _process is not self._process:
            raise forked("CUDA")
        index = self._index
        if not self._alone and self._current() != index:
            return None
        return self._raw(index) if stream is None else raw_stream(stream)


class Launcher:
    """Launches kernels with one parameter on a device, in any thread; raises as `Caller` does."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads, self._caller = device, threads, Caller(device)
        self._launch, self._make_stream = bindings().cuLaunchKernel, bindings().CUstream
        self._streams: dict[int, Any] = {}

    def __call__(
        self, function: Any, blocks: int, address: int, stream: torch.Stream | None
    ) -> None:
        """Launch on ``stream``; None: the current stream of this device."""
        handle = self._caller.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self(function, blocks, address, stream)
            return
        known = self._streams.get(handle)
        if known is None:
            known = self._streams[handle] = self._make_stream(handle)
        (error,) = self._launch(
            function, blocks, 1, 1, self._threads, 1, 1, 0, known, address, 0
        )  # fmt: skip
        if error:
            check(error, "A launch")


def copy_pitched(
    dst: int,
    src: int,
    to_device: bool,
    rows: tuple[int, int, int, int],
    device: torch.device,
    stream: torch.Stream | None,
) -> None:
    """Copy rows between pinned host memory and a device; ordered on ``stream``.

    Args:
        dst, src: addresses of the first rows.
        to_device: from the host to the device, else the other way round.
        rows: bytes of a row, rows, and the bytes from row to row in the source and destination.

    Raises:
        TransferError: the driver refuses the copy; nothing was moved.
    """
    driver = bindings()
    width, height, src_pitch, dst_pitch = rows
    host = driver.CUmemorytype.CU_MEMORYTYPE_HOST
    there = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    asked = driver.CUDA_MEMCPY2D()
    asked.WidthInBytes, asked.Height = width, height
    asked.srcPitch, asked.dstPitch = src_pitch, dst_pitch
    if to_device:
        asked.srcMemoryType, asked.srcHost = host, src
        asked.dstMemoryType, asked.dstDevice = there, driver.CUdeviceptr(dst)
    else:
        asked.srcMemoryType, asked.srcDevice = there, driver.CUdeviceptr(src)
        asked.dstMemoryType, asked.dstHost = host, dst
    adopt(device)
    with torch.cuda.device(device):
        handle = driver.CUstream(raw(stream, device.index))
        (error,) = driver.cuMemcpy2DAsync(asked, handle)
    check(error, f"A copy of {height} rows of {width} bytes")


def raw(stream: torch.Stream | None, index: int) -> int:
    """The driver's handle of a stream; None: the current one of the device of that index."""
    if stream is None:
        return int(torch._C._cuda_getCurrentRawStream(index))
    return raw_stream(stream)


def check(error: Any, what: str) -> None:
    """Raise `TransferError` where the driver returned anything but success."""
    if int(error):
        raise refused(getattr(error, "name", str(error)), what)


def refused(name: str, what: str) -> TransferError:
    """The error for what the driver answered with an error of that name."""
    return TransferError(
        f"{what} was asked of the CUDA driver, which answered {name}; success was expected, "
        f"and nothing was moved. Check that the memory still exists, and earlier errors."
    )
