# SPDX-License-Identifier: Apache-2.0
"""Which host memory of this process the CUDA or HIP runtime has registered, for `pinned`: each page
once, and never let go under a copy.

What is registered is exact to the byte, though a page is pinned as a whole and only once. With
whole pages registered, a neighbour's copy that begins behind ours in our last page, and reaches
beyond it, would fail: CUDA refuses a copy that begins in registered memory and ends outside.

A call that fails leaves its error in the runtime, where the next kernel launch finds it
(vLLM #51081), so each failure here is cleared at once. The library is the one that torch has
loaded: each copy of the runtime, as the one inside ``cuda.bindings``, has an error of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import math
import os
import re
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host._pages import PAGE, bytes_at, to_pages, whole

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30
# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID, ALREADY, UNKNOWN = 1, 712, 713

_lock = threading.RLock()  # a finalizer may run wherever its own thread holds it
_live: list[Registration] = []  # no two overlap
_seams: set[int] = set()  # of all these
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
_told: set[str] = set()
_ONLY_TORCH = "torch registers no memory that exists for this device; take some of `allocate`"

# --- the runtime ----------------------------------------------------------------------------------


class Runtime:
    """A loaded runtime library, whose functions' names begin with ``cuda`` or ``hip``."""

    def __init__(self, library: Any, prefix: str) -> None:
        self._library, self._prefix = library, prefix

    def function(self, name: str) -> Any:
        """A function of the library by the rest of its name."""
        return getattr(self._library, f"{self._prefix}{name}")

    def last_error(self) -> int:
        """The error that the next kernel launch would find; it is forgotten."""
        return int(self.function("GetLastError")())

    def call(self, name: str, *arguments: Any) -> tuple[int, str]:
        """Call a function: its error, cleared, and the runtime's words for that; 0 and none."""
        code = int(self.function(name)(*arguments))
        if code == 0:
            return 0, ""
        self.last_error()
        return code, f"{self.function('GetErrorString')(code).decode()} ({code})"


def why_not() -> str | None:
    """What keeps host memory from being registered in this process; None: nothing."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None if _library() else "this torch loads no runtime library; take an official wheel"
    return _ONLY_TORCH if torch.accelerator.is_available() else "there is no CUDA or ROCm device"


def through_torch() -> bool:
    """True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def find_runtime() -> Runtime:
    """The runtime of CUDA or ROCm devices, if `why_not` is None."""
    # Until torch has begun with the device torch takes no memory for pinned, even if it is.
    torch.cuda.init()
    runtime = Runtime(ctypes.CDLL(_library()), "cuda" if torch.version.hip is None else "hip")
    # Addresses are wider than C's int.
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    runtime.function("HostRegister").argtypes = (pointer, size, flags)
    runtime.function("HostUnregister").argtypes = (pointer,)
    runtime.function("HostGetDevicePointer").argtypes = (pointer, pointer, flags)
    runtime.function("GetErrorString").restype = ctypes.c_char_p
    return runtime


@cache
def _library() -> str | None:
    stem = "libcudart" if torch.version.hip is None else "libamdhip64"
    maps = Path("/proc/self/maps").read_text()
    return loaded_library(maps, stem, (torch.version.cuda or "").split(".")[0])


def loaded_library(maps: str, stem: str, version: str) -> str | None:
    """The file of a library that a process has loaded, from its map, of a major version if there
    are several and one is named; ``stem``: how its name begins, up to ``.so``."""
    found = re.findall(rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$", maps)
    preferred = re.compile(rf"\.so\.{version}(\.|$)" if version else "")
    return min(found, key=lambda path: preferred.search(path) is None, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory any more. One
    that has failed does neither: its error is left to its next user."""
    others = through_torch()
    if not others and not torch.cuda.is_initialized():
        return
    inside: Any = torch._C
    for index in range(torch.accelerator.device_count()):
        if others or inside._cuda_hasPrimaryContext(index):  # waiting must not make a context
            with suppress(RuntimeError):
                torch.accelerator.synchronize(index)


def capturing() -> bool:
    """True while waiting for a device, or unregistering, would break a graph's capture."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# --- registrations --------------------------------------------------------------------------------


def piece_bytes(largest: int, unit: int) -> int:
    """How many bytes one registration has if there are several; raises `HostMemoryError` for a
    ``largest`` under a page, or a ``unit`` under 1."""
    asked = f"Pieces of at most {largest!r} bytes were asked for, and a page has {PAGE}"
    most = whole(largest, PAGE, asked, "ask for whole pages")
    asked = f"Pieces cut at multiples of {unit!r} bytes were asked for"
    step = math.lcm(whole(unit, 1, asked, "pass 1 to have them cut at any page"), PAGE)
    return most // step * step or most // PAGE * PAGE


class Registration:
    """Memory that is registered in pieces of ``step`` bytes; or with ``fallback``, if it cannot be,
    merely claimed, so that it stays pageable. Raises `HostMemoryError` otherwise.

    Attributes:
        pages: where they begin and end; pieces: (address, bytes) of each, in order.
        registered: addresses of the pieces that the runtime has; none if it is pageable.
    """

    _runtime: Runtime  # of what is registered

    def __init__(self, address: int, nbytes: int, flags: int, step: int, fallback: bool) -> None:
        start, end = address // PAGE * PAGE, address + nbytes
        edges = [address, *range(start + step, end, step), end]  # between pages
        self.pages = start, to_pages(end)
        self.pieces: list[tuple[int, int]] = [(a, b - a) for a, b in itertools.pairwise(edges)]
        self.flags, self._process = flags, os.getpid()
        self.registered: list[int] = []
        settle()
        self._claim()
        # At exit nothing is unmapped: tensors may outlive the interpreter.
        atexit.register(self.undo)
        try:
            self._register(fallback)
        except BaseException:
            self.undo()
            raise

    def _claim(self) -> None:
        start, end = self.pages
        with _lock:
            for taken, until in (each.pages for each in [*_live]):  # a finalizer may take one out
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Pages {start:#x} - {end:#x} were asked to be registered, and {taken:#x} "
                        f"- {until:#x} are already; a page can be registered once. Register both "
                        f"as one range, unregister the first, or keep memory that shares a page "
                        f"apart."
                    )
            _live.append(self)
            _seams.update(at for at, _ in self.pieces[1:])

    def _register(self, fallback: bool) -> None:
        why = why_not()
        if why is None:
            self._runtime = find_runtime()
            for piece, nbytes in self.pieces:
                code, words = self._runtime.call("HostRegister", piece, nbytes, self.flags)
                if code:
                    break
                self.registered.append(piece)
            else:
                return
            self._unregister()
            if code in (ALREADY, INVALID):
                raise HostMemoryError(
                    f"{nbytes} bytes at {piece:#x} were asked to be registered, and the runtime "
                    f"says {words}: other code registered some of their pages, or they are memory "
                    f"that it cannot pin. Unregister them there, or copy them to memory of "
                    f"`allocate`."
                )
            why = f"the runtime refused to register it, {words}"
        if not fallback:
            raise HostMemoryError(
                f"Pinned host memory was asked for, and {why}. Pass fallback=True to go on with "
                f"pageable memory."
            )
        warn_once(why)

    def _unregister(self) -> None:
        with _lock:
            pieces, self.registered = self.registered, []
        if not pieces or self._process != os.getpid():
            return
        quiesce()
        for piece in pieces:
            code, words = self._runtime.call("HostUnregister", piece)
            # After a reset of the device nothing is registered; a finalizer cannot raise.
            if code not in (0, UNKNOWN):
                warn_once(f"unregistering it failed before, {words}")

    def device_address(self, address: int) -> tuple[int, str]:
        """Where the current device finds a byte of it, on HIP perhaps elsewhere than the host; and
        why it does not."""
        if not self.registered:
            return 0, "it is not registered with a CUDA or HIP runtime; copy instead"
        if not self.flags & MAPPED:
            return 0, "it was registered with mapped=False; register it mapped"
        found, piece = ctypes.c_void_p(), max(at for at in self.registered if at <= address)
        _, words = self._runtime.call("HostGetDevicePointer", ctypes.byref(found), piece, 0)
        return (found.value or 0) + address - piece, words and f"the runtime refused it, {words}"

    def undo(self, owner: Any = None) -> None:
        """Unregister, once no device works any more, and give up the claim; later, if a graph's
        capture forbids it: the owner is held until then. Again: nothing."""
        if self.registered and capturing():
            _postponed.append((self, owner))
            return
        self._unregister()
        atexit.unregister(self.undo)
        with _lock, suppress(ValueError):
            _live.remove(self)
            _seams.difference_update(at for at, _ in self.pieces[1:])


def seams() -> tuple[int, ...]:
    """Addresses, in order, at which one registration ends and the next of the same memory begins:
    no copy may reach across."""
    return tuple(sorted(_seams))


def settle() -> None:
    """End what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, _owner = _postponed.pop()
            registration.undo()  # before the owner gives the memory back


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    if why in _told:
        return
    _told.add(why)
    frame, level = sys._getframe(), 1
    # The first line up the stack that is not PortaKV's own is the one to point to.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"Host memory was asked to be pinned and stays pageable: {why}. Results are the same; "
        f"copies are slower, and block the host.",
        RuntimeWarning,
        stacklevel=level,
    )


# --- the memory of callers ------------------------------------------------------------------------


def buffer_of(memory: Any) -> tuple[int, int, bool, Any]:
    """Which bytes a tensor, an array or another buffer covers: their address and number from the
    first to the last, whether they can only be read, and what holds them. Raises `HostMemoryError`
    if it is freed, empty or no memory at all, `DeviceMismatch` for a tensor on a device."""
    asked = f"A {type(memory).__name__} was asked to be registered"
    if isinstance(memory, torch.Tensor) and memory.device.type != "cpu":
        raise DeviceMismatch(
            f"{asked}, on {memory.device}; expected memory of the host. Copy it there first."
        )
    try:
        if isinstance(memory, torch.Tensor) and memory.layout == torch.strided:
            array = _over_storage(memory)
        elif isinstance(memory, np.ndarray):
            array = memory
        else:
            buffer = memory.buf if isinstance(memory, SharedMemory) else memory
            if buffer is None:
                raise ValueError("it is closed")
            memory = memoryview(buffer)  # which cannot be closed while the view is held
            array = np.asarray(memory)
    except ValueError as error:
        raise HostMemoryError(
            f"{asked}, and it was freed before ({error}); register memory before it is closed."
        ) from None
    except TypeError:
        raise HostMemoryError(
            f"{asked}; expected a strided tensor, an array, an mmap, shared memory or other buffer."
        ) from None
    if array.nbytes == 0:
        raise HostMemoryError(f"{asked}, of 0 bytes; there is nothing to pin. Leave it out.")
    reach = [(count - 1) * step for count, step in zip(array.shape, array.strides, strict=True)]
    low, high = (sum(part(step, 0) for step in reach) for part in (min, max))
    fixed, nbytes = not array.flags.writeable, high - low + array.itemsize
    return array.ctypes.data + low, nbytes, fixed, memory


def _over_storage(tensor: torch.Tensor) -> Any:
    """An array with the strides of a tensor; raises `ValueError` if its storage is too small."""
    storage, size = tensor.untyped_storage(), tensor.element_size()
    # Of an empty buffer numpy checks nothing.
    buffer = bytes_at(storage.data_ptr(), storage.nbytes()) or bytes(1)
    start, *steps = (size * step for step in (tensor.storage_offset(), *tensor.stride()))
    return np.ndarray(tensor.shape, f"V{size}", buffer, start, steps)
