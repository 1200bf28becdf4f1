# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver, by ctypes and by ``cuda.bindings`` (which the extra ``cuda`` brings): what keeps
either from being used; kernels, streams and 2-D copies."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

import torch

from portakv.errors import TransferError
from portakv.runtime import nvrtc
from portakv.runtime.devices import inside, refuse_fork, this_process

LIBRARY = "libcuda.so.1"
DRIVER = 13000  # CUDA 13: what NVRTC 13's machine code and cuda-bindings 13 need

# --- what serves a device -------------------------------------------------------------------------


def of_others(device: torch.device) -> str | None:
    """Why the driver serves no devices of that kind, as a phrase; None if it does."""
    if device.type != "cuda":
        return f"the CUDA driver does not serve {device.type} devices"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, not for CUDA"
    return None


def no_cuda(device: torch.device) -> str | None:
    """What keeps the driver from serving a device at all, as a phrase; None if it does."""
    if (why := of_others(device)) is not None:
        return why
    return None if torch.cuda.is_available() else "torch finds no usable CUDA device here"


@cache
def why_not(device: torch.device) -> str | None:
    """What keeps the driver from being asked for a device by the extra ``cuda``, as a phrase; None
    if it can be."""
    return no_cuda(device) or nvrtc.missing() or driver_too_old()


def driver_too_old() -> str | None:
    """Why the driver is not known to support CUDA 13, as a phrase; None if it does."""
    error, found = bindings().cuDriverGetVersion()
    if int(error):
        return f"the driver does not tell its version ({error})"
    if found >= DRIVER:
        return None
    return (
        f"the driver supports CUDA {found // 1000}.{found % 1000 // 10}, but 13.0 is needed; "
        f"update the driver"
    )


def driver_version() -> int:
    """CUDA's version that the driver supports (13000 is 13.0); 0 if it does not tell."""
    error, found = bindings().cuDriverGetVersion()
    return 0 if int(error) else int(found)


def capability(device: torch.device) -> int:
    """The compute capability of a device; 90 is 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_too_old(device: torch.device) -> str | None:
    """Why NVRTC compiles nothing for a device, as a sentence; None if it does."""
    try:
        nvrtc.target_for(capability(device))
    except RuntimeError as error:
        return str(error)
    return None


# --- the two ways to its functions ----------------------------------------------------------------


def bindings() -> Any:
    """The driver's functions, out of the extra ``cuda``."""
    from cuda.bindings import driver

    return driver


@cache
def library() -> Any:
    """The driver's library, loaded; raises `OSError` if there is none."""
    return ctypes.CDLL(LIBRARY)


def function(library: Any, name: str, *arguments: Any) -> Any:
    """A function that returns an error's number; raises `AttributeError` if it is not there."""
    found = library[name]  # an object of its own, without other modules' declarations
    found.argtypes = arguments
    found.restype = ctypes.c_int
    return found


# of CUpointer_attribute and CUresult; HIP likewise
_DEVICE_ORDINAL = 9
_INVALID_VALUE = 1


def owner_of(address: int, library: Any, name: str) -> int | None:
    """The number of the device that memory was allocated on or registered for, as the function
    ``name`` of a driver's ``library`` says (cuPointerGetAttribute, hipPointerGetAttribute); None:
    the driver does not know it. This thread has a context. Raises `TransferError` for another
    error, `AttributeError` if there is no such function."""
    number = ctypes.POINTER(ctypes.c_int)
    ask = function(library, name, number, ctypes.c_int, ctypes.c_uint64)
    found = ctypes.c_int(-1)
    error = ask(ctypes.byref(found), _DEVICE_ORDINAL, address)
    if error not in (0, _INVALID_VALUE):
        raise refused(error_name(error, library), f"The device of memory at {address:#x}")
    return None if error or found.value < 0 else found.value


# of CUpointer_attribute
_RANGE_START = 11
_RANGE_SIZE = 12


def range_of(address: int) -> tuple[int, int] | None:
    """The first byte and past the last of the allocation or registration that memory lies in, as
    CUDA's driver says; None if it does not."""
    if torch.version.cuda is None or not torch.cuda.is_initialized():
        return None
    number = ctypes.POINTER(ctypes.c_uint64)
    told = []
    ask = function(library(), "cuPointerGetAttribute", number, ctypes.c_int, ctypes.c_uint64)
    for attribute in (_RANGE_START, _RANGE_SIZE):
        found = ctypes.c_uint64()
        if ask(ctypes.byref(found), attribute, address):
            return None
        told.append(found.value)
    first = told[0]
    past = sum(told)
    return (first, past) if first <= address < past else None


def error_name(error: int, library: Any) -> str:
    """What the driver calls an error."""
    called = ctypes.c_char_p()
    with suppress(AttributeError):
        name = function(library, "cuGetErrorName", ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
        if not name(error, ctypes.byref(called)) and called.value:
            return called.value.decode()
    return f"error {error}"


def check(error: Any, what: str) -> None:
    """Raise `TransferError` if the driver returned anything but success."""
    if int(error):
        raise refused(getattr(error, "name", str(error)), what)


def refused(name: str, what: str, driver: str = "the CUDA driver") -> TransferError:
    """The error for what a driver answered with an error of that name."""
    return TransferError(
        f"{what} was asked of {driver}, which answered {name}; success was expected, and nothing "
        f"was moved. Check that the memory still exists, and earlier errors."
    )


# --- threads and streams --------------------------------------------------------------------------

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream


def adopt(device: torch.device) -> None:
    """Give this thread a context, which the driver's calls take for granted."""
    with inside(device):
        pass


def raw_stream(stream: torch.Stream) -> int:
    """The driver's handle of a torch stream, on devices that torch calls ``cuda``."""
    own = getattr(stream, "cuda_stream", None)
    if own is not None:
        return int(own)
    same = torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
    return int(same.cuda_stream)


def raw(stream: torch.Stream | None, index: int) -> int:
    """The driver's handle of a stream; None: the current one of the device of that index."""
    if stream is None:
        return int(torch._C._cuda_getCurrentRawStream(index))
    return raw_stream(stream)


@cache
def stream_maker() -> Any:
    """The driver's function that makes a stream; None if it cannot be had."""
    arguments = ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int
    try:
        return function(library(), "cuStreamCreateWithPriority", *arguments)
    except (OSError, AttributeError):
        return None


def make_stream(device: torch.device, priority: int) -> int:
    """The handle of a new stream by `stream_maker`; raises `TransferError` if it is refused."""
    handle = ctypes.c_void_p()
    adopt(device)
    with torch.cuda.device(device):
        error = stream_maker()(ctypes.byref(handle), _NON_BLOCKING, priority)
    if error:
        name = error_name(error, library())
        raise TransferError(
            f"A stream of {device} was asked of the CUDA driver, which answered {name}; one was "
            f"expected. Check earlier errors, and the memory that the device has left."
        )
    return handle.value or 0


# --- kernels --------------------------------------------------------------------------------------


def load(source: str, names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Compile a text, or find it on disk, and make its kernels resident. Raises `RuntimeError` with
    NVRTC's log, or `TransferError` if the driver refuses it."""
    driver = bindings()
    binary = nvrtc.compile_kernel(source, capability(device))
    adopt(device)
    with torch.cuda.device(device):
        error, loaded = driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0)
        check(error, "Loading the kernel")
        functions = {}
        for name in names:
            error, kernel = driver.cuLibraryGetKernel(loaded, name.encode())
            check(error, "Finding the kernel")
            # Modules load lazily; a first launch inside a capture must not have to.
            error, functions[name] = driver.cuKernelGetFunction(kernel)
            check(error, "Making the kernel resident")
    return functions


class ArgumentLists(threading.local):
    """For each kernel and thread the parameter's bytes, which begin as ``fixed`` says, and the
    address of the list of parameters (it holds one), so that several threads can share a launch;
    ``current`` gives a new thread a context."""

    def __init__(
        self, fixed: Iterable[bytes], current: Callable[[], AbstractContextManager[object]]
    ) -> None:
        with current():
            self.buffers = [bytearray(one) for one in fixed]
        self._owned = [(ctypes.c_char * len(one)).from_buffer(one) for one in self.buffers]
        self._lists = [(ctypes.c_void_p * 1)(ctypes.addressof(one)) for one in self._owned]
        self.addresses = [ctypes.addressof(one) for one in self._lists]


class Arguments(ArgumentLists):
    """One kernel's parameter of ``nbytes``, and the address of its list, on a CUDA device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        adopt(device)  # a new thread has no context yet
        super().__init__([bytes(nbytes)], nullcontext)
        self.buffer = self.buffers[0]
        self.address = self.addresses[0]


class Caller:
    """What every call for one device asks first, in any thread; ``wrap`` makes of a stream's handle
    what the call takes. Raises `Unsupported` in a process that was forked from its own."""

    def __init__(self, device: torch.device, wrap: Callable[[int], Any] = int) -> None:
        self._index = device.index
        self._raw: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
        self._current = torch._C._cuda_getDevice
        self._alone = torch.cuda.device_count() == 1  # so this device is always the current one
        self._process = this_process()
        self._wrap = wrap
        self._last: tuple[int | None, Any] = (None, None)  # a stream, as a number and wrapped

    def handle(self, stream: torch.Stream | None) -> Any:
        """The driver's handle of ``stream``, or of the current stream of this device; None: another
        device is current, and this one has to be made it first."""
        if self._process.forked:
            raise refuse_fork("CUDA")
        index = self._index
        if not self._alone and self._current() != index:
            return None
        raw = self._raw(index) if stream is None else raw_stream(stream)
        last = self._last
        if last[0] != raw:
            last = self._last = (raw, self._wrap(raw))
        return last[1]


class CudaDriver(Caller):
    """What launching kernels on one device takes; `hip.Card` has the same functions.

    ``launch`` takes a function, the blocks along x, y and z, the threads along x, y and z, the
    bytes of shared memory, a stream's handle, the address of the list of parameters, and 0; it
    returns ``success`` or an error.
    """

    success: Any = (0,)

    def __init__(self, device: torch.device) -> None:
        driver = bindings()
        super().__init__(device, driver.CUstream)
        self.device = device
        self.launch: Callable[..., Any] = driver.cuLaunchKernel

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        """See the function."""
        return load(source, names, self.device)

    def current(self) -> AbstractContextManager[object]:
        """Inside, the device is this thread's current one, and the thread has a context."""
        return inside(self.device)

    def check(self, answer: Any, what: str) -> None:
        """Raise `TransferError` for an answer that is not ``success``."""
        check(answer[0], what)

    def word(self, address: int) -> int:
        """The device's address of pinned memory: the host's."""
        return address


class Launcher:
    """Launches kernels with one parameter on a device, in any thread; raises as `Caller` does."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._driver = CudaDriver(device)
        self._threads = threads
        self._handle = self._driver.handle
        self._launch = self._driver.launch
        self._success = self._driver.success

    def __call__(
        self, function: Any, blocks: int, address: int, stream: torch.Stream | None
    ) -> None:
        """Launch on ``stream``; None: the current stream of this device."""
        handle = self._handle(stream)
        if handle is None:
            with torch.cuda.device(self._driver.device):
                self(function, blocks, address, stream)
            return
        answer = self._launch(function, blocks, 1, 1, self._threads, 1, 1, 0, handle, address, 0)
        if answer != self._success:
            self._driver.check(answer, "A launch")


# --- 2-D copies -----------------------------------------------------------------------------------

# CUmemorytype
_AT_HOST = 1
_ON_DEVICE = 2
# CUDA_MEMCPY2D; of each side x, y, kind, host address, device address, array, pitch; then the rows.
_pack_rows = struct.Struct("@QQQQQQQ QQQQQQQ QQ").pack


class Copy2D:
    """The driver's 2-D copy between pinned host memory and a device."""

    def __init__(self, library: Any) -> None:
        self._copy = function(library, "cuMemcpy2DAsync_v2", ctypes.c_char_p, ctypes.c_uint64)

    def __call__(
        self,
        dst: int,
        src: int,
        to_device: bool,
        width: int,
        height: int,
        dst_pitch: int,
        src_pitch: int,
        handle: int,
    ) -> int:
        """Copy ``height`` rows of ``width`` bytes, a pitch apart on each side, ordered on a stream;
        returns 0 or an error's number."""
        if to_device:
            sides = 0, 0, _AT_HOST, src, 0, 0, src_pitch, 0, 0, _ON_DEVICE, 0, dst, 0, dst_pitch
        else:
            sides = 0, 0, _ON_DEVICE, 0, src, 0, src_pitch, 0, 0, _AT_HOST, dst, 0, 0, dst_pitch
        return int(self._copy(_pack_rows(*sides, width, height), handle))


def copy_pitched(
    dst: int,
    src: int,
    to_device: bool,
    rows: tuple[int, int, int, int],
    device: torch.device,
    stream: torch.Stream | None,
) -> None:
    """Copy rows between two addresses, of pinned host memory and a device; ordered on ``stream``.
    ``rows``: bytes of a row, rows, and the bytes from row to row in the source and destination.
    Raises `TransferError` if the driver refuses it; nothing was moved."""
    width, height, src_pitch, dst_pitch = rows
    adopt(device)
    with torch.cuda.device(device):
        error = Copy2D(library())(
            dst, src, to_device, width, height, dst_pitch, src_pitch, raw(stream, device.index)
        )
    if error:
        name = error_name(error, library())
        raise refused(name, f"A copy of {height} rows of {width} bytes")
