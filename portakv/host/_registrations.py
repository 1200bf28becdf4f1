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
import bisect
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
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host._pages import PAGE, to_pages, whole

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30
# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID, ALREADY, UNKNOWN = 1, 712, 713

_lock = threading.RLock()  # a finalizer may run wherever its own thread holds it
_live: list[Registration] = []  # by their pages; no two overlap
_seams: list[int] = []  # of all these, sorted
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
_told: set[str] = set()
_ONLY_TORCH = "torch registers no memory that exists for this device; take some of `allocate`"

# --- the runtime ----------------------------------------------------------------------------------


class CallRefused(Exception):
    """The runtime refused a call, in its own words; its error, of that number, has been cleared."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class Runtime:
    """Calls of one loaded runtime library, whose functions' names begin with ``cuda`` or ``hip``;
    each raises `CallRefused`."""

    def __init__(self, library: Any, prefix: str) -> None:
        self._library, self._prefix = library, prefix

    def last_error(self) -> int:
        """The error that the next kernel launch would find; it is forgotten."""
        return int(self.function("GetLastError")())

    def function(self, name: str) -> Any:
        """A function of the library by the rest of its name."""
        return getattr(self._library, f"{self._prefix}{name}")

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function."""
        if code := self.function(name)(*arguments):
            self.last_error()
            text = self.function("GetErrorString")(code)
            raise CallRefused(code, text.decode() if isinstance(text, bytes) else str(text))


class _ThroughTorch:
    """What torch itself offers of the runtime, for builds that have it linked in statically."""

    def __init__(self) -> None:
        self._cudart: Any = torch.cuda.cudart()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return int(self._cudart.cudaHostRegister(address, nbytes, flags).value)

    def cudaHostUnregister(self, address: int) -> int:
        return int(self._cudart.cudaHostUnregister(address).value)

    def cudaHostGetDevicePointer(self, found: Any, address: int, flags: int) -> int:
        found._obj.value = address  # one address space on every 64-bit CUDA system
        return 0

    def cudaGetLastError(self) -> int:
        # Not offered; but torch asks for it behind each launch, and forgets it.
        with suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"CUDA error {code}"


def find_runtime() -> Runtime | None:
    """The runtime of CUDA or ROCm devices; None if nothing can be registered: `why_not`."""
    return None if why_not() is not None else _loaded()


def why_not() -> str | None:
    """What keeps host memory from being registered in this process; None: nothing."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None
    return _ONLY_TORCH if torch.accelerator.is_available() else "there is no CUDA or ROCm device"


def through_torch() -> bool:
    """True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def _loaded() -> Runtime:
    # Until torch has begun with the device torch takes no memory for pinned, even if it is.
    torch.cuda.init()
    prefix = "cuda" if torch.version.hip is None else "hip"
    stem = "libcudart" if prefix == "cuda" else "libamdhip64"
    path = loaded_library(stem, (torch.version.cuda or "").split(".")[0])
    if path is None:
        return Runtime(_ThroughTorch(), "cuda")  # these names on ROCm as well
    runtime = Runtime(ctypes.CDLL(path), prefix)
    # Addresses are wider than C's int.
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    runtime.function("HostRegister").argtypes = (pointer, size, flags)
    runtime.function("HostUnregister").argtypes = (pointer,)
    runtime.function("HostGetDevicePointer").argtypes = (pointer, pointer, flags)
    runtime.function("GetErrorString").restype = ctypes.c_char_p
    return runtime


def loaded_library(stem: str, version: str, maps: str = "/proc/self/maps") -> str | None:
    """The file of a library that this process has loaded, of a major version if there are several
    and one is named; ``stem``: how its name begins, up to ``.so``."""
    found: list[str] = []
    with suppress(OSError):
        file = rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$"
        found = re.findall(file, Path(maps).read_text())
    preferred = re.compile(rf"\.so\.{version}(\.|$)" if version else "")
    return min(found, key=lambda path: preferred.search(path) is None, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory any more. One
    that has failed does neither: its error is left to its next user."""
    module: Any = torch.accelerator if through_torch() else torch.cuda
    if module is torch.cuda and not torch.cuda.is_initialized():
        return
    inside: Any = torch._C
    for index in range(module.device_count()):
        # Waiting must not make a context.
        if module is torch.accelerator or inside._cuda_hasPrimaryContext(index):
            with suppress(RuntimeError):
                module.synchronize(index)


def capturing() -> bool:
    """True while waiting for a device, or unregistering, would break a graph's capture."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# --- registrations --------------------------------------------------------------------------------


class Registration:
    """Memory, registered in pieces; or without a runtime merely claimed, so that it stays pageable.

    Raises `HostMemoryError` for pages that are registered already or pieces that cannot be
    (`piece_bytes`), `CallRefused` if the runtime refuses: then nothing is registered or claimed.

    Attributes:
        pages: where they begin and end; pieces: (address, bytes) of each, in order.
    """

    def __init__(
        self,
        runtime: Runtime | None,
        address: int,
        nbytes: int,
        flags: int,
        largest: int,
        unit: int,
    ) -> None:
        start, end, step = address // PAGE * PAGE, address + nbytes, piece_bytes(largest, unit)
        edges = [address, *range(start + step, end, step), end]  # between pages
        self.pages = start, to_pages(end)
        self.pieces: list[tuple[int, int]] = [(a, b - a) for a, b in itertools.pairwise(edges)]
        self._runtime, self._process, self.flags = runtime, os.getpid(), flags
        self._registered: list[int] | None = []  # None: undone
        settle()
        self._claim()
        try:
            if runtime is not None:
                for piece, length in self.pieces:
                    runtime.call("HostRegister", piece, length, flags)
                    self._registered.append(piece)
        except BaseException:
            self.undo()
            raise
        _watch_exit()

    def _claim(self) -> None:
        start, end = self.pages
        with _lock:
            at = bisect.bisect_left(_live, self.pages, key=attrgetter("pages"))
            for taken, until in (each.pages for each in _live[max(0, at - 1) : at + 1]):
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Pages {start:#x} - {end:#x} were asked to be registered, and {taken:#x} "
                        f"- {until:#x} are already; a page can be registered once. Register both "
                        f"as one range, unregister the first, or keep memory that shares a page "
                        f"apart."
                    )
            # Looked up again: a finalizer may have taken one out meanwhile.
            bisect.insort(_live, self, key=attrgetter("pages"))
            for piece, _ in self.pieces[1:]:
                bisect.insort(_seams, piece)

    @property
    def pinned(self) -> bool:
        """True while the runtime has it registered."""
        return bool(self._registered)

    def device_address(self, address: int) -> int:
        """Where the current device finds a byte of it: on HIP perhaps not where the host does.
        Raises `CallRefused`."""
        assert self._runtime is not None
        piece = max(start for start, _ in self.pieces if start <= address)
        found = ctypes.c_void_p()
        self._runtime.call("HostGetDevicePointer", ctypes.byref(found), piece, 0)
        return (found.value or 0) + address - piece

    def undo(self) -> None:
        """Unregister, once no device works any more. Again: nothing."""
        with _lock:
            registered, self._registered = self._registered, None
        if registered is None:
            return
        if registered and self._process == os.getpid() and self._runtime is not None:
            quiesce()
            for piece in registered:
                try:
                    self._runtime.call("HostUnregister", piece)
                except CallRefused as refused:
                    # After a reset of the device nothing is registered; a finalizer cannot raise.
                    if refused.code != UNKNOWN:
                        warn_once(f"unregistering it failed before, {refused}")
        with _lock:
            _live.remove(self)
            _seams[:] = [at for at in _seams if not self.pages[0] < at < self.pages[1]]

    def forget(self, owner: Any) -> None:
        """`undo`; if a graph's capture forbids that, later. The owner is held until then."""
        if self._registered and self._process == os.getpid() and capturing():
            _postponed.append((self, owner))
        else:
            self.undo()


def seams() -> tuple[int, ...]:
    """Addresses, in order, at which one registration ends and the next of the same memory begins:
    no copy may reach across."""
    return tuple(_seams)


def settle() -> None:
    """End what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, _owner = _postponed.pop()
            registration.undo()  # before the owner gives the memory back


def buffer_of(memory: Any) -> tuple[int, int, bool, Any]:
    """Which bytes a tensor, an array or another buffer covers: their address and number from the
    first to the last, whether they can only be read, and what holds them. Raises `HostMemoryError`
    if it is freed, empty or no memory at all, `DeviceMismatch` for a tensor on a device."""
    if isinstance(memory, torch.Tensor):
        if memory.device.type != "cpu":
            raise DeviceMismatch(
                f"A tensor on {memory.device} was asked to be registered; expected memory of the "
                f"host. Copy it there first."
            )
        if memory.layout != torch.strided:
            raise HostMemoryError(
                f"A tensor of layout {memory.layout} was asked to be registered; expected a "
                f"strided one. Register its parts."
            )
        size, fixed, address = memory.element_size(), False, memory.data_ptr()
        shape, steps = tuple(memory.shape), [size * step for step in memory.stride()]
    else:
        memory = memory if isinstance(memory, np.ndarray) else _held_buffer(memory)
        array = np.asarray(memory)
        size, fixed, address = array.itemsize, not array.flags.writeable, array.ctypes.data
        shape, steps = array.shape, list(array.strides)
    if math.prod(shape) * size == 0:
        raise HostMemoryError(
            "Memory of 0 bytes was asked to be registered; there is nothing to pin. Leave it out."
        )
    reach = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
    low, high = sum(min(step, 0) for step in reach), sum(max(step, 0) for step in reach) + size
    if isinstance(memory, torch.Tensor):
        needed, there = memory.storage_offset() * size + high, memory.untyped_storage().nbytes()
        if there < needed:
            raise HostMemoryError(
                f"A tensor of {needed} bytes was asked to be registered, and its storage holds "
                f"{there}: it was freed before. Register it earlier."
            )
    return address + low, high - low, fixed, memory


def _held_buffer(memory: Any) -> memoryview:
    """The buffer of an object, which cannot be closed while that is held."""
    buffer = memory.buf if isinstance(memory, SharedMemory) else memory
    try:
        if buffer is None:
            raise ValueError("it is closed")
        return memoryview(buffer)
    except ValueError as error:
        raise HostMemoryError(
            f"A {type(memory).__name__} was asked to be registered, and it was freed before "
            f"({error}); register memory before it is closed."
        ) from None
    except TypeError:
        raise HostMemoryError(
            f"A {type(memory).__name__} was asked to be registered; expected a tensor, an array, "
            f"an mmap, shared memory or anything else with a buffer."
        ) from None


def piece_bytes(largest: int, unit: int) -> int:
    """How many bytes one registration has if there are several; raises `HostMemoryError` for a
    ``largest`` under a page, or a ``unit`` under 1."""
    asked = f"Pieces of at most {largest!r} bytes were asked for, and a page has {PAGE}"
    most = whole(largest, PAGE, asked, "ask for whole pages")
    asked = f"Pieces cut at multiples of {unit!r} bytes were asked for"
    step = math.lcm(whole(unit, 1, asked, "pass 1 to have them cut at any page"), PAGE)
    return most // step * step or most // PAGE * PAGE


@cache
def _watch_exit() -> None:
    """Called when first needed, as an import has no effects: at exit unregister what is left.
    Nothing is unmapped: tensors may outlive the interpreter."""

    @atexit.register
    def unregister_all() -> None:
        settle()
        for registration in list(_live):
            registration.undo()


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    with _lock:
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
