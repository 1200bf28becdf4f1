# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver and compiler: why they cannot be used, kernels, streams and 2-D copies.

Functions are called through ctypes, and through ``cuda.bindings``, which the extra ``cuda``
installs.
"""

from __future__ import annotations

import ctypes
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, NoReturn, SupportsInt

import torch

from portakv.core.library import address_in
from portakv.errors import TransferError
from portakv.runtime import kernel_cache
from portakv.runtime.devices import inside, refuse_fork, this_process

LIBRARY = "libcuda.so.1"
DRIVER = 13000  # CUDA 13: what NVRTC 13's machine code and cuda-bindings 13 need

# --- what serves a device -------------------------------------------------------------------------


def not_served(device: torch.device) -> str | None:
    """Return why the driver serves no devices of this type, as a phrase; None if it does."""
    if device.type != "cuda":
        return f"the CUDA driver does not serve {device.type} devices"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, not for CUDA"
    return None


def no_cuda(device: torch.device) -> str | None:
    """Return why the driver does not serve a device at all, as a phrase; None if it does."""
    if (why := not_served(device)) is not None:
        return why
    return None if torch.cuda.is_available() else "torch finds no usable CUDA device here"


@cache
def why_not(device: torch.device) -> str | None:
    """Return why the extra ``cuda`` cannot be used for a device, as a phrase; None if it can be."""
    return no_cuda(device) or no_nvrtc() or driver_too_old()


def driver_too_old() -> str | None:
    """Return why the driver may not support CUDA 13, as a phrase; None if it does."""
    error, supported = bindings().cuDriverGetVersion()
    if int(error):
        return f"the driver does not report its version ({error})"
    if supported >= DRIVER:
        return None
    return (
        f"the driver supports CUDA {supported // 1000}.{supported % 1000 // 10}, but 13.0 is "
        f"needed; update the driver"
    )


def driver_version() -> int:
    """Return the CUDA version that the driver supports (13000 is 13.0); 0 if it reports none."""
    error, supported = bindings().cuDriverGetVersion()
    return 0 if int(error) else int(supported)


def capability(device: torch.device) -> int:
    """Return the compute capability of a device; 90 is 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_too_old(device: torch.device) -> str | None:
    """Return why NVRTC cannot compile for a device, as a sentence; None if it can."""
    try:
        target_for(capability(device))
    except RuntimeError as error:
        return str(error)
    return None


# --- calling the driver ---------------------------------------------------------------------------


def bindings() -> ModuleType:
    """Return the module of the driver's functions from the extra ``cuda``."""
    from cuda.bindings import driver

    module: ModuleType = driver
    return module


@cache
def library() -> ctypes.CDLL:
    """Return the driver's library, loaded; raise `OSError` if there is none."""
    return ctypes.CDLL(LIBRARY)


def function(library: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., int]:
    """Return a function that returns an error's number; raise `AttributeError` if the library lacks
    it."""
    entry = library[name]  # a separate object, without the declarations of other modules
    entry.argtypes = arguments
    entry.restype = ctypes.c_int
    return entry


#: CUDA_ERROR_INVALID_CONTEXT, and HIP's error of that name: a thread that has no context yet.
NO_CONTEXT = 201

# Values of CUpointer_attribute and CUresult, which HIP shares.
_DEVICE_ORDINAL = 9
_INVALID_VALUE = 1


def owner_of(address: int, library: ctypes.CDLL, name: str) -> int | None:
    """Return the number of the device that memory was allocated on or registered for.

    Returns None if the driver does not know the memory. This thread must have a context.

    Args:
        address: of the memory.
        library: the driver's library.
        name: the library's function: cuPointerGetAttribute or hipPointerGetAttribute.

    Raises:
        TransferError: the function returned any other error.
        AttributeError: the library has no such function.
    """
    number = ctypes.POINTER(ctypes.c_int)
    get_attribute = function(library, name, number, ctypes.c_int, ctypes.c_uint64)
    ordinal = ctypes.c_int(-1)
    error = get_attribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, address)
    if error not in (0, _INVALID_VALUE):
        raise refused(error_name(error, library), f"The device of memory at {address:#x}")
    return None if error or ordinal.value < 0 else ordinal.value


# Values of CUpointer_attribute.
_RANGE_START = 11
_RANGE_SIZE = 12


def range_of(address: int) -> tuple[int, int] | None:
    """Return the first address of an allocation or registration, and the address past its last
    byte.

    The range contains ``address``. Returns None if CUDA's driver does not report one.
    """
    if torch.version.cuda is None or not torch.cuda.is_initialized():
        return None
    arguments = ctypes.POINTER(ctypes.c_uint64), ctypes.c_int, ctypes.c_uint64
    get_attribute = function(library(), "cuPointerGetAttribute", *arguments)
    values = []
    for attribute in (_RANGE_START, _RANGE_SIZE):
        value = ctypes.c_uint64()
        if get_attribute(ctypes.byref(value), attribute, address):
            return None
        values.append(value.value)
    first = values[0]
    past = sum(values)
    return (first, past) if first <= address < past else None


def error_name(error: int, library: ctypes.CDLL) -> str:
    """Return the driver's name of an error."""
    called = ctypes.c_char_p()
    with suppress(AttributeError):  # an old driver lacks the function
        name = function(library, "cuGetErrorName", ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
        if not name(error, ctypes.byref(called)) and called.value:
            return called.value.decode()
    return f"error {error}"


def check(error: SupportsInt, what: str) -> None:
    """Raise `TransferError` if the driver returned anything but success."""
    if int(error):
        raise refused(getattr(error, "name", str(error)), what)


def refused(name: str, what: str, driver: str = "the CUDA driver") -> TransferError:
    """Return the error for a driver call that returned an error of this name."""
    return TransferError(
        f"{what}: expected success of {driver}, got {name}; nothing was moved. Check that the "
        f"memory still exists, and earlier errors."
    )


# --- events ---------------------------------------------------------------------------------------


class EventFunctions(NamedTuple):
    """The functions of a driver on events, which return an error's number.

    Attributes:
        create: writes a new event; takes flags.
        record_address: where the function is that records an event on a stream.
        query_address: where the function is that asks whether an event was reached.
        synchronize: blocks the host until an event.
        follow: makes a stream wait for an event; takes flags.
    """

    create: Callable[..., int]
    record_address: int
    query_address: int
    synchronize: Callable[..., int]
    follow: Callable[..., int]

    @classmethod
    def of(cls, library: ctypes.CDLL, *names: str) -> EventFunctions:
        """Return the functions of these names, in the order of the attributes; raise
        `AttributeError` if the library lacks one."""
        create, record, query, synchronize, follow = names
        event = ctypes.c_void_p
        return cls(
            function(library, create, ctypes.POINTER(event), ctypes.c_uint),
            address_in(library, record),
            address_in(library, query),
            function(library, synchronize, event),
            function(library, follow, ctypes.c_void_p, event, ctypes.c_uint),
        )


# --- threads and streams --------------------------------------------------------------------------

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the legacy default stream


def adopt(device: torch.device) -> None:
    """Create a context for this thread, which the driver's calls require."""
    with inside(device):
        pass


def raw_stream(stream: torch.Stream) -> int:
    """Return the driver's handle of a torch stream, on devices that torch calls ``cuda``."""
    handle = getattr(stream, "cuda_stream", None)
    if handle is not None:
        return int(handle)
    same = torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
    return int(same.cuda_stream)


def raw(stream: torch.Stream | None, index: int) -> int:
    """Return the driver's handle of a stream; None: of the current stream of device ``index``."""
    if stream is None:
        return int(torch._C._cuda_getCurrentRawStream(index))
    return raw_stream(stream)


@cache
def stream_maker() -> Callable[..., int] | None:
    """Return the driver's function that creates a stream; None if it is not available."""
    arguments = ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_int
    try:
        return function(library(), "cuStreamCreateWithPriority", *arguments)
    except (OSError, AttributeError):
        return None


def make_stream(device: torch.device, priority: int) -> int:
    """Return the handle of a new stream by `stream_maker`; raise `TransferError` if it fails."""
    create = stream_maker()
    assert create is not None  # `own_stream` has checked it
    handle = ctypes.c_void_p()
    adopt(device)
    with torch.cuda.device(device):
        error = create(ctypes.byref(handle), _NON_BLOCKING, priority)
    if error:
        name = error_name(error, library())
        raise TransferError(
            f"Expected a new stream of {device} from the CUDA driver, got {name}. Check earlier "
            f"errors, and the memory that the device has left."
        )
    return handle.value or 0


# --- kernels --------------------------------------------------------------------------------------


class Caller:
    """The checks that every call for one device makes first, in any thread.

    Attributes:
        device: on which the calls are made.
        platform: the name of the driver, in errors.

    Raises:
        Unsupported: this process was forked from the one that created the object.
    """

    platform: ClassVar = "CUDA"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index
        self._alone = torch.cuda.device_count() == 1  # so this device is always the current one
        self._process = this_process()

    def number(self, stream: torch.Stream | None) -> int | None:
        """Return the driver's handle of ``stream``, or of the current stream of this device.

        Returns None if another device is current; the caller must then make this device current.
        """
        if self._process.forked:
            raise refuse_fork(self.platform)
        index = self._index
        if not self._alone and torch._C._cuda_getDevice() != index:
            return None
        if stream is not None:
            return raw_stream(stream)
        handle: int = torch._C._cuda_getCurrentRawStream(index)  # here, as each launch asks it
        return handle

    def current(self) -> AbstractContextManager[object]:
        """Make the device this thread's current one, with a context."""
        return inside(self.device)

    def order(self, stream: torch.Stream | None, call: Callable[[int], int]) -> int:
        """Make a call of the driver with the handle of a stream, while the device is current;
        return its error.

        ``stream`` is None for the current stream of this device.
        """
        handle = self.number(stream)
        if handle is None:
            with self.current():
                return self.order(stream, call)
        error = call(handle)
        if error == NO_CONTEXT:  # the first work of a thread
            with self.current():
                error = call(handle)
        return error


#: cuLaunchKernel, and hipModuleLaunchKernel: a function, the blocks along x, y and z, the threads
#: along x, y and z, the bytes of shared memory, a stream, and the list of parameters.
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
)


class KernelDriver(Caller, ABC):
    """Load and launch kernels on one device, by the driver of CUDA or of HIP.

    Attributes:
        named: the driver in errors of launches.
        on_launch: the name of the function that launches.
        on_events: the names of the functions on events, as `EventFunctions.of` takes them.
        on_streams: the names of the functions that name the current device, and that ask whether a
            graph captures a stream.
    """

    named: ClassVar = "the CUDA driver"
    on_launch: ClassVar = "cuLaunchKernel"
    on_events: ClassVar[tuple[str, ...]] = (
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuEventSynchronize",
        "cuStreamWaitEvent",
    )
    on_streams: ClassVar[tuple[str, ...]] = ("cuCtxGetDevice", "cuStreamIsCapturing")

    @property
    @abstractmethod
    def library(self) -> ctypes.CDLL:
        """The library that has the functions."""

    @cached_property
    def entry(self) -> int:
        """The address of the function that launches, for the core."""
        return address_in(self.library, self.on_launch)

    @property
    def events(self) -> EventFunctions:
        """The functions on events, for the core."""
        return EventFunctions.of(self.library, *self.on_events)

    @property
    def streams(self) -> list[int]:
        """The addresses of the functions on streams, for the core."""
        return [address_in(self.library, name) for name in self.on_streams]

    @abstractmethod
    def load(self, source: str, names: Iterable[str]) -> dict[str, object]:
        """Compile a source text, or read its binary from disk, and load its kernels.

        Raises:
            RuntimeError: the compilation failed, with the compiler's log.
            TransferError: the driver rejects the binary.
        """

    @abstractmethod
    def address(self, function: Any) -> int:
        """Return a kernel's handle as a number."""

    @abstractmethod
    def describe(self, error: int) -> str:
        """Return the name or the words of an error of these functions."""

    @abstractmethod
    def word(self, address: int) -> int:
        """Return the device's address of pinned memory."""

    @cached_property
    def _call(self) -> Callable[..., int]:
        return _LAUNCH(self.entry)

    def launch(
        self,
        function: object,
        blocks: int,
        threads: int,
        parameter: bytes,
        stream: torch.Stream | None = None,
        what: str = "The launch",
    ) -> None:
        """Launch a kernel that has one parameter; its bytes have been read when this returns.

        ``stream`` is None for the current stream of this device. ``what`` begins an error.

        Raises:
            TransferError: the driver rejects the launch.
        """
        buffer = ctypes.create_string_buffer(parameter, len(parameter))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        shape = self.address(function), blocks, 1, 1, threads, 1, 1, 0
        error = self.order(stream, lambda handle: self._call(*shape, handle, parameters, None))
        if error:
            self.refuse(error, what)

    def refuse(self, error: int, what: str) -> NoReturn:
        """Raise `TransferError` for an error of the function at `entry`."""
        raise refused(self.describe(error), what, self.named)


class CudaDriver(KernelDriver):
    """The kernels of an NVIDIA device."""

    def load(self, source: str, names: Iterable[str]) -> dict[str, object]:
        """Compile a source text, or read its binary from disk, and make its kernels resident.

        Raises as `KernelDriver.load`, with NVRTC's log.
        """
        driver = bindings()
        binary = compile_kernel(source, capability(self.device))
        adopt(self.device)
        with torch.cuda.device(self.device):
            error, loaded = driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0)
            check(error, "Loading the kernel")
            functions: dict[str, object] = {}
            for name in names:
                error, kernel = driver.cuLibraryGetKernel(loaded, name.encode())
                check(error, "Finding the kernel")
                # Modules load lazily; a first launch inside a capture must not load them.
                error, functions[name] = driver.cuKernelGetFunction(kernel)
                check(error, "Making the kernel resident")
        return functions

    @property
    def library(self) -> ctypes.CDLL:
        """The driver's library."""
        return library()

    def address(self, function: Any) -> int:
        """Return a kernel's handle as a number."""
        return int(function)

    def describe(self, error: int) -> str:
        """Return the name of an error."""
        return error_name(error, library())

    def word(self, address: int) -> int:
        """Return the device's address of pinned memory, which equals the host's."""
        return address


# --- 2-D copies -----------------------------------------------------------------------------------

# Values of CUmemorytype.
_AT_HOST = 1
_ON_DEVICE = 2
# CUDA_MEMCPY2D: for each side x, y, kind, host address, device address, array, pitch; then rows.
_pack_rows = struct.Struct("@QQQQQQQ QQQQQQQ QQ").pack


def copy_pitched(
    dst: int,
    src: int,
    to_device: bool,
    rows: tuple[int, int, int, int],
    device: torch.device,
    stream: torch.Stream | None,
) -> None:
    """Copy rows between addresses of pinned host memory and of a device, ordered on ``stream``.

    Args:
        rows: the bytes of a row, the number of rows, and the bytes from row to row in the source
            and in the destination.

    Raises:
        TransferError: the driver rejected the copy; nothing was moved.
    """
    width, height, src_pitch, dst_pitch = rows
    if to_device:
        sides = 0, 0, _AT_HOST, src, 0, 0, src_pitch, 0, 0, _ON_DEVICE, 0, dst, 0, dst_pitch
    else:
        sides = 0, 0, _ON_DEVICE, 0, src, 0, src_pitch, 0, 0, _AT_HOST, dst, 0, 0, dst_pitch
    copy = function(library(), "cuMemcpy2DAsync_v2", ctypes.c_char_p, ctypes.c_uint64)
    adopt(device)
    with torch.cuda.device(device):
        error = copy(_pack_rows(*sides, width, height), raw(stream, device.index))
    if error:
        name = error_name(error, library())
        raise refused(name, f"A copy of {height} rows of {width} bytes")


# ------------------------------------------------------------------------------------------------
# Compile for NVIDIA devices at run time: NVRTC through ``cuda.bindings``, without a GPU or a
# driver.

FLAGS = ("-std=c++17", "-default-device")
NEEDED = "pip install '.[cuda]' in a clone of PortaKV ('portakv[cuda]' once released)"


def no_nvrtc() -> str | None:
    """Return why NVRTC 13 cannot be used, as a sentence; None if it can be."""
    try:
        installed = version("cuda-bindings")
    except PackageNotFoundError:
        return f"cuda-bindings is not installed; {NEEDED}"
    if installed.split(".")[0] != "13":
        return f"cuda-bindings {installed} is installed, but 13.x is needed; {NEEDED}"
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library raises whatever the loader raises
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"NVRTC cannot be loaded ({why}); {NEEDED}"
    if int(status):
        return f"NVRTC does not report its version ({status}); {NEEDED}"
    if major != 13:
        return f"NVRTC {major}.{minor} is installed, but 13.x is needed; {NEEDED}"
    return None


def nvrtc_version() -> str:
    """Return the version of NVRTC, which decides the binary that it makes of a source text."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    try:
        return f"{major}.{minor} ({version('nvidia-cuda-nvrtc')})"
    except PackageNotFoundError:  # it came with a CUDA toolkit
        return f"{major}.{minor}"


def architectures() -> list[int]:
    """Return the architectures that NVRTC makes machine code for: 80 is compute capability 8.0."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, values = nvrtc.nvrtcGetSupportedArchs()
    return sorted(int(arch) for arch in values[:count])


def target_for(capability: int) -> str:
    """Return the target to compile for: machine code (``sm_90``), or PTX (``compute_90``).

    PTX is of the nearest older architecture, if NVRTC does not know the device's.

    Raises:
        RuntimeError: NVRTC knows no architecture that old.
    """
    known = architectures()
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        raise RuntimeError(
            f"Expected compute capability {known[0] / 10} or later, which NVRTC {nvrtc_version()} "
            f"supports, got {capability / 10}. Use a newer device or another backend."
        )
    return f"compute_{older[-1]}"


def compile_kernel(source: str, capability: int) -> bytes:
    """Return the binary of a source text for a compute capability, cached on disk.

    Raises:
        RuntimeError: the compilation failed, with NVRTC's log; or as `target_for` raises it.
    """
    target = target_for(capability)
    return kernel_cache.cached(_key(source, target), lambda: compile_text(source, target))


def compiled_before(source: str, capability: int) -> bool:
    """Return True if the cache on disk has the binary of a text for a compute capability."""
    return kernel_cache.holds(_key(source, target_for(capability)))


def _key(source: str, target: str) -> tuple[str, ...]:
    return source, " ".join(FLAGS), target, nvrtc_version()


def compile_text(source: str, target: str) -> bytes:
    """Return the binary of a source text for a target, without the cache."""
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"portakv_rows.cu", 0, [], [])
    _check(error, "Creating a program")
    try:
        options = [*FLAGS, f"--gpu-architecture={target}"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if int(error):
            log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            text = log.decode(errors="replace").strip("\0 \n")
            raise RuntimeError(f"NVRTC refused the kernel for {target}:\n{text}")
        if target.startswith("sm_"):
            return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        return _read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(
    program: object,
    get_size: Callable[[object], tuple[SupportsInt, int]],
    read: Callable[[object, bytes], tuple[SupportsInt]],
) -> bytes:
    """Return a result of NVRTC for a program; text ends in a zero byte, as the driver requires."""
    error, size = get_size(program)
    _check(error, "Reading the size of a result")
    result: bytes = b" " * size  # NVRTC writes into it
    (error,) = read(program, result)
    _check(error, "Reading a result")
    return result


def _check(error: SupportsInt, what: str) -> None:
    if int(error):
        raise RuntimeError(f"{what} of NVRTC failed: {error}")
