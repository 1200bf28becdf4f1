# SPDX-License-Identifier: Apache-2.0
"""Host memory registered with the CUDA or HIP runtime: each page once, never let go under a copy.

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
import re
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host._pages import PAGE, to_pages, whole
from portakv.runtime.devices import capture_question, this_process

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30
# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE = 1
MAPPED = 2
READ_ONLY = 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID = 1
ALREADY = 712
UNKNOWN = 713

_lock = threading.RLock()  # a finalizer may run wherever its own thread holds it
live: list[Registration] = []  # no two share a page
_seams: Counter[int] = Counter()  # of all these
# of pieces that others registered
_begins = Counter[int]()
_ends = Counter[int]()
#: What forgets seams and pieces that are gone. A finalizer runs at any place, also inside `_tell`,
#: so that it changes no counts itself: `seams` does.
dropped: deque[Callable[[], None]] = deque()
_told: tuple[int, ...] = ()  # what `seams` says
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
warned: set[str] = set()
_NO_DEVICE = "there is no CUDA or ROCm device"
_ONLY_TORCH = "torch registers no memory that exists for this device; take some of `allocate`"


def call(name: str, *arguments: Any) -> tuple[int, str]:
    """Call a function of the runtime, by its name without ``cuda`` or ``hip``, if `why_not` is
    None: its error, which is cleared, and the runtime's words for that; 0 and none."""
    library, prefix = device_runtime()
    code = int(getattr(library, f"{prefix}{name}")(*arguments))
    if code == 0:
        return 0, ""
    getattr(library, f"{prefix}GetLastError")()
    return code, f"{getattr(library, f'{prefix}GetErrorString')(code).decode()} ({code})"


def why_not() -> str | None:
    """What keeps host memory from being registered in this process; None: nothing."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None if _library() else "this torch loads no runtime library; take an official wheel"
    return _ONLY_TORCH if torch.accelerator.is_available() else _NO_DEVICE


def through_torch() -> bool:
    """True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def device_runtime() -> tuple[Any, str]:
    # Until torch has begun with the device torch takes no memory for pinned, even if it is.
    torch.cuda.init()
    library = ctypes.CDLL(_library())
    prefix = "cuda" if torch.version.hip is None else "hip"
    # Addresses are wider than C's int.
    pointer = ctypes.c_void_p
    size = ctypes.c_size_t
    flags = ctypes.c_uint
    getattr(library, f"{prefix}HostRegister").argtypes = (pointer, size, flags)
    getattr(library, f"{prefix}HostUnregister").argtypes = (pointer,)
    getattr(library, f"{prefix}HostGetDevicePointer").argtypes = (pointer, pointer, flags)
    getattr(library, f"{prefix}GetErrorString").restype = ctypes.c_char_p
    return library, prefix


@cache
def _library() -> str | None:
    stem = "libcudart" if torch.version.hip is None else "libamdhip64"
    version = (torch.version.cuda or "").split(".")[0]
    return loaded_library(Path("/proc/self/maps").read_text(), stem, version)


def loaded_library(maps: str, stem: str, version: str) -> str | None:
    """The file of a library that a process has loaded, from its map, of a major version if there
    are several and one is named; ``stem``: how its name begins, up to ``.so``."""
    found = re.findall(rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$", maps)
    return max(found, key=lambda path: bool(version) and f".so.{version}" in path, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory any more. One
    that has failed does neither: its error is left to its next user."""
    others = through_torch()
    inside = cast(Any, torch._C)
    if not others and not torch.cuda.is_initialized():
        return
    module: Any = torch.accelerator if others else torch.cuda
    for index in range(module.device_count()):
        if others or inside._cuda_hasPrimaryContext(index):  # waiting must not make a context
            with suppress(RuntimeError):
                module.synchronize(index)


def capturing() -> bool:
    """True while a CUDA device captures a graph, which waiting or unregistering would break."""
    return torch.cuda.is_initialized() and capture_question(torch.device("cuda"))()


@dataclass(frozen=True)
class Options:
    """How memory is registered, as `pinned.allocate` says; raises `HostMemoryError` as it does."""

    portable: bool = True
    mapped: bool = True
    largest: int = LARGEST
    unit: int = 1
    fallback: bool = True

    def __post_init__(self) -> None:
        whole("largest", self.largest, PAGE, "ask for pieces of whole pages")
        whole("unit", self.unit, 1, "pass 1 to have pieces cut at any page")


def options_of(given: dict[str, Any]) -> Options:
    """Return options by their names; raise `HostMemoryError` for a name that is none of theirs."""
    known = [each.name for each in fields(Options)]
    for name in given:
        if name not in known:
            raise HostMemoryError(
                f"Expected options among {', '.join(known)}, got {name}. Leave {name} out."
            )
    return Options(**given)


class Registration:
    """Memory that is registered as asked; or if it cannot be, and may stay pageable, merely
    claimed. Raises `HostMemoryError` otherwise. ``pieces``: (address, bytes) of each, in order;
    ``registered``: addresses of those that the runtime has, none if the memory is pageable."""

    def __init__(self, address: int, nbytes: int, asked: Options, read_only: bool = False) -> None:
        self.flags = READ_ONLY * bool(read_only)
        self.flags |= PORTABLE * bool(asked.portable) | MAPPED * bool(asked.mapped)
        step = math.lcm(asked.unit, PAGE)
        step = asked.largest // step * step or asked.largest // PAGE * PAGE
        self._pageable = asked.fallback
        start = address // PAGE * PAGE
        end = address + nbytes
        edges = [address, *range(start + step, end, step), end]  # between pages
        self._pages = start, to_pages(end)
        self.pieces: list[tuple[int, int]] = [(a, b - a) for a, b in itertools.pairwise(edges)]
        self._process = this_process()
        self.registered: list[int] = []
        settle()
        self._claim(*self._pages)
        _watch_exit()
        try:
            self._register()
        except BaseException:
            self.undo()
            raise

    def _claim(self, start: int, end: int) -> None:
        with _lock:
            for taken, until in (one._pages for one in live.copy()):  # finalizers take some out
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Pages {start:#x} - {end:#x} were asked to be registered, and {taken:#x} "
                        f"- {until:#x} are already; a page can be registered once. Register both "
                        f"as one range, unregister the first, or keep memory that shares a page "
                        f"apart."
                    )
            live.append(self)
            add_seams(at for at, _ in self.pieces[1:])

    def _register(self) -> None:
        code = 0
        why = why_not()
        for piece, nbytes in [] if why else self.pieces:
            code, words = call("HostRegister", piece, nbytes, self.flags)
            if code:
                self._unregister()
                why = f"the runtime refused to register it, {words}"
                break
            self.registered.append(piece)
        if code in (ALREADY, INVALID):
            raise HostMemoryError(
                f"Memory at {piece:#x} was asked to be registered, and {why}: other code "
                f"registered some of its pages, or it is memory that cannot be pinned. Unregister "
                f"it there, or copy it to memory of `allocate`."
            )
        if why and not self._pageable:
            raise HostMemoryError(
                f"Pinned host memory was asked for, and {why}. Pass fallback=True to go on with "
                f"pageable memory."
            )
        # Without a device there is nothing to copy to, and nothing that the user could mend.
        if why and why != _NO_DEVICE:
            warn_once(why)

    def _unregister(self) -> None:
        pieces = self.registered
        self.registered = []
        if not pieces or self._process.forked:
            return
        quiesce()
        for piece in pieces:
            code, words = call("HostUnregister", piece)
            # After a reset of the device nothing is registered; a finalizer cannot raise.
            if code not in (0, UNKNOWN):
                warn_once(f"unregistering it failed before, {words}")

    def device_address(self, address: int) -> tuple[int, str]:
        """Where the current device finds a byte, on HIP perhaps elsewhere, and why it does not."""
        if not self.flags & MAPPED:
            return 0, "it was registered with mapped=False; register it mapped"
        found = ctypes.c_void_p()
        piece = max(at for at in self.registered if at <= address)
        _, words = call("HostGetDevicePointer", ctypes.byref(found), piece, 0)
        return (found.value or 0) + address - piece, words and f"the runtime refused it, {words}"

    def undo(self, owner: Any = None) -> None:
        """Unregister, once no device works any more, and give up the claim; later, if a graph's
        capture forbids it: the owner is held until then. Again: nothing."""
        if self.registered and capturing():
            _postponed.append((self, owner))
            return
        self._unregister()
        with suppress(ValueError):
            live.remove(self)
            if between := [at for at, _ in self.pieces[1:]]:
                dropped.append(partial(drop_seams, between))


def add_seams(addresses: Iterable[int]) -> None:
    """Let no copy reach over these addresses."""
    with _lock:
        _seams.update(addresses)
        _tell()


def drop_seams(addresses: Iterable[int]) -> None:
    """Undo `add_seams` of the same addresses; those that others added too stay."""
    with _lock:
        _seams.subtract(addresses)
        _tell()


def adopt(pieces: Iterable[tuple[int, int]]) -> None:
    """Let no copy reach from one of the pieces that others registered into another."""
    with _lock:
        for address, nbytes in pieces:
            _begins[address] += 1
            _ends[address + nbytes] += 1
        _tell()


def disown(pieces: Iterable[tuple[int, int]]) -> None:
    """Undo `adopt` of the same pieces."""
    with _lock:
        for address, nbytes in pieces:
            _begins[address] -= 1
            _ends[address + nbytes] -= 1
        _tell()


def _tell() -> None:
    """Work out what `seams` says: every copy asks."""
    global _told
    for counted in (_seams, _begins, _ends):
        for at in [at for at, number in counted.items() if number < 1]:
            del counted[at]
    _told = tuple(sorted(_seams.keys() | (_begins.keys() & _ends.keys())))


def seams() -> tuple[int, ...]:
    """Addresses, in order, between two registrations of one memory: no copy may reach across."""
    while dropped:
        with suppress(IndexError):  # another thread was faster
            dropped.pop()()
    return _told


def settle() -> None:
    """End what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, _owner = _postponed.pop()
            registration.undo()  # before the owner gives the memory back


@cache
def _watch_exit() -> None:
    """At exit unregister what is left; called when first needed, as an import has no effects.
    Nothing is unmapped: tensors may outlive the interpreter."""

    @atexit.register
    def undo_all() -> None:
        settle()
        for registration in [*live]:
            registration.undo()


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    if why in warned:
        return
    warned.add(why)
    frame = sys._getframe()
    level = 1
    # The first line up the stack that is not PortaKV's own is the one to point to.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame = frame.f_back
        level = level + 1
    told = f"Host memory was asked to be pinned and stays pageable: {why}. Results are the same; "
    warnings.warn(f"{told}copies are slower, and block the host.", RuntimeWarning, level)


def buffer_of(memory: Any) -> tuple[int, int, bool, Any]:
    """Which bytes a tensor, an array or another buffer covers: their address and number from the
    first to the last, whether they can only be read, and what holds them. Raises `HostMemoryError`
    if it is freed, empty or no memory at all, `DeviceMismatch` for a tensor on a device."""
    kind = type(memory).__name__
    tensor = isinstance(memory, torch.Tensor)
    if tensor and memory.device.type != "cpu":
        raise DeviceMismatch(
            f"A {kind} on {memory.device} was asked to be registered; expected memory of the host. "
            f"Copy it there first."
        )
    freed = why = "was freed before ({}); register memory before it is closed"
    try:
        if tensor and memory.layout == torch.strided and not memory.is_nested:
            size = memory.element_size()
            fixed = False
            address = memory.data_ptr()
            shape = memory.shape
            steps = [size * step for step in memory.stride()]
        else:
            if not isinstance(memory, np.ndarray):
                buffer = memory.buf if isinstance(memory, SharedMemory) else memory
                if buffer is None:
                    raise ValueError("it is closed")
                memory = memoryview(buffer)  # which cannot be closed while the view is held
                why = "has elements that numpy does not know ({}); pass np.frombuffer(it, np.uint8)"
            array = np.asarray(memory)
            size = array.itemsize
            fixed = not array.flags.writeable
            address = array.ctypes.data
            shape = array.shape
            steps = list(array.strides)
    except ValueError as error:
        why = why.format(error)
    except TypeError:
        why = "is no strided tensor, array, mmap, shared memory or other buffer; pass one of these"
    else:
        reach = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
        low = sum(min(step, 0) for step in reach)
        high = sum(max(step, 0) for step in reach) + size
        if math.prod(shape) * size == 0:
            why = "has 0 bytes, of which nothing can be pinned; leave it out"
        elif tensor and memory.untyped_storage().nbytes() < memory.storage_offset() * size + high:
            why = freed.format("its storage is smaller")
        else:
            return address + low, high - low, fixed, memory
    raise HostMemoryError(f"A {kind} was asked to be registered, which {why}.")
