# SPDX-License-Identifier: Apache-2.0
"""Host memory registered with the CUDA or HIP runtime: each page once, never unregistered during a
copy.

A registration is exact to the byte, though a page is pinned as a whole and only once. With whole
pages registered, a neighbour's copy that begins after ours in our last page, and reaches beyond it,
would fail: CUDA rejects a copy that begins in registered memory and ends outside.

A call that fails leaves its error in the runtime, where the next kernel launch would report it
(vLLM #51081), so each failure is cleared here. The library is the one that torch has loaded: each
copy of the runtime, such as the one inside ``cuda.bindings``, has a separate error.
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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import flag, kind_of
from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host._pages import PAGE, to_pages, whole
from portakv.runtime import late_release
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

_lock = threading.RLock()  # a finalizer may run while its own thread has the lock
live: list[Registration] = []  # no two share a page
# The begins and ends of pieces: of the registrations in `live` that have several, and of memory
# that other code registered.
_begins = Counter[int]()
_ends = Counter[int]()
#: Drop pieces that are gone. A finalizer runs anywhere, also inside `count_pieces`, so it changes
#: no counts itself: `boundaries` does.
dropped: deque[Callable[[], None]] = deque()
_current: tuple[int, ...] = ()  # the result of `boundaries`
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
warned: set[str] = set()
_NO_DEVICE = "there is no CUDA or ROCm device"
_ONLY_TORCH = "torch cannot register existing memory for this device; use memory of `allocate`"


def call(name: str, *arguments: object) -> tuple[int, str]:
    """Call a function of the runtime, by its name without ``cuda`` or ``hip``, if `why_not` is
    None.

    Returns its error, which is cleared, and the runtime's description; or 0 and an empty text.
    """
    library, prefix = device_runtime()
    code = int(getattr(library, f"{prefix}{name}")(*arguments))
    if code == 0:
        return 0, ""
    getattr(library, f"{prefix}GetLastError")()
    return code, f"{getattr(library, f'{prefix}GetErrorString')(code).decode()} ({code})"


def why_not() -> str | None:
    """Return why host memory cannot be registered in this process; None: it can."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    if torch.cuda.is_available():
        return None if _library() else "this torch loads no runtime library; take an official wheel"
    return _ONLY_TORCH if torch.accelerator.is_available() else _NO_DEVICE


def through_torch() -> bool:
    """Return True if there is a device of another kind, for which torch's own allocator pins."""
    return why_not() == _ONLY_TORCH


@cache
def device_runtime() -> tuple[Any, str]:
    """Return the runtime's library and the prefix of its functions."""
    # Torch reports no memory as pinned before it has initialised the device.
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
    """Return the file of a library that a process has loaded, from its map.

    ``version``: the preferred major version, if there are several. ``stem``: the beginning of its
    name, up to ``.so``.
    """
    files = re.findall(rf"(?m)/(?:.*/)?{stem}(?:-[0-9a-f]+)?\.so[^/\n]*$", maps)
    return max(files, key=lambda path: bool(version) and f".so.{version}" in path, default=None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory.

    A failed device does neither: its error is left to its next user.
    """
    others = through_torch()
    inside = cast(Any, torch._C)
    if not others and not torch.cuda.is_initialized():
        return
    module: Any = torch.accelerator if others else torch.cuda
    for index in range(module.device_count()):
        if others or inside._cuda_hasPrimaryContext(index):  # waiting must not create a context
            with suppress(RuntimeError):  # of a device that failed before
                module.synchronize(index)


def capturing() -> bool:
    """Return True while a CUDA device captures a graph, which waiting or unregistering would
    break."""
    return torch.cuda.is_initialized() and capture_question(torch.device("cuda"))()


@dataclass(frozen=True)
class Options:
    """The options of a registration, as `pinned.allocate` describes; raises `HostMemoryError` as it
    does."""

    portable: bool = True
    mapped: bool = True
    largest: int = LARGEST
    unit: int = 1
    fallback: bool = True

    def __post_init__(self) -> None:
        flag("portable", self.portable)
        flag("mapped", self.mapped)
        flag("fallback", self.fallback)
        whole("largest", self.largest, PAGE, "ask for pieces of whole pages")
        whole("unit", self.unit, 1, "pass 1 to have pieces cut at any page")


def options_of(options: dict[str, Any]) -> Options:
    """Return options by their names; raise `HostMemoryError` for an unknown name."""
    known = [each.name for each in fields(Options)]
    for name in options:
        if name not in known:
            raise HostMemoryError(
                f"Expected options among {', '.join(known)}, got {name}. Leave {name} out."
            )
    return Options(**options)


class Registration:
    """Registered memory; or memory that is only claimed, if it cannot be registered and may stay
    pageable.

    Attributes:
        pieces: (address, bytes) of each piece, in order.
        registered: addresses of the pieces that the runtime has; none if the memory is pageable.

    Raises:
        HostMemoryError: the memory cannot be registered and may not stay pageable.
    """

    def __init__(
        self, address: int, nbytes: int, options: Options, read_only: bool = False
    ) -> None:
        self.flags = READ_ONLY * bool(read_only)
        self.flags |= PORTABLE * bool(options.portable) | MAPPED * bool(options.mapped)
        step = math.lcm(options.unit, PAGE)
        step = options.largest // step * step or options.largest // PAGE * PAGE
        self._pageable = options.fallback
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
        except BaseException:  # also an interrupt: nothing may stay registered
            self.undo()
            raise

    def _claim(self, start: int, end: int) -> None:
        with _lock:
            for taken, until in (one._pages for one in live.copy()):  # finalizers remove some
                if taken < end and start < until:
                    raise HostMemoryError(
                        f"Expected pages {start:#x} - {end:#x} to be unregistered, got "
                        f"{taken:#x} - {until:#x} registered already; a page can be registered "
                        "once. Register both as one range, unregister the first, or put the "
                        "memory on separate pages."
                    )
            live.append(self)
            if len(self.pieces) > 1:
                count_pieces(self.pieces, 1)

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
                f"Expected to register memory at {piece:#x}, but {why}: other code registered some "
                "of its pages, or it is memory that cannot be pinned. Unregister it there, or "
                "copy it to memory of `allocate`."
            )
        if why and not self._pageable:
            raise HostMemoryError(
                f"Expected pinned host memory, but {why}. Pass fallback=True to continue with "
                f"pageable memory."
            )
        # Without a device there is nothing to copy to, and nothing that the user could fix.
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
        """Return the address of a byte for the current device, on HIP perhaps a different one; or
        why it has none."""
        if not self.flags & MAPPED:
            return 0, "it was registered with mapped=False; register it mapped"
        pointer = ctypes.c_void_p()
        piece = max(at for at in self.registered if at <= address)
        _, words = call("HostGetDevicePointer", ctypes.byref(pointer), piece, 0)
        return (pointer.value or 0) + address - piece, words and f"the runtime refused it, {words}"

    def undo(self, owner: object = None) -> None:
        """Unregister, after all devices stop, and drop the claim. Calling it again does nothing.

        If a device may wait for this process, or a graph's capture forbids it now, it is postponed,
        and the owner is retained until then.
        """
        if self.registered and not self._process.forked and late_release.is_held():
            late_release.release(partial(self.undo, owner))
            return
        if self.registered and capturing():
            _postponed.append((self, owner))
            return
        self._unregister()
        with suppress(ValueError):  # another call has removed it
            live.remove(self)
            if len(self.pieces) > 1:
                dropped.append(partial(count_pieces, self.pieces, -1))


def count_pieces(pieces: Iterable[tuple[int, int]], by: int) -> None:
    """Let no copy cross from one of several registered pieces into another; ``by`` 1 adds the
    pieces, -1 removes them."""
    global _current
    with _lock:
        for address, nbytes in pieces:
            _begins[address] += by
            _ends[address + nbytes] += by
        for counted in (_begins, _ends):
            for at in [at for at, number in counted.items() if number < 1]:
                del counted[at]
        _current = tuple(sorted(_begins.keys() & _ends.keys()))  # every copy reads it


def boundaries() -> tuple[int, ...]:
    """Return the addresses, in order, between two registrations of one memory: no copy may cross
    them."""
    while dropped:
        with suppress(IndexError):  # another thread was faster
            dropped.pop()()
    return _current


def settle() -> None:
    """Unregister what had to wait for the end of a capture."""
    while _postponed and not capturing():
        with suppress(IndexError):  # another thread was faster
            registration, owner = _postponed.pop()
            registration.undo(owner)  # before the owner gives the memory back


@cache
def _watch_exit() -> None:
    """Unregister at exit what is left; the first registration calls it, as an import has no
    effects.

    Nothing is unmapped: tensors may outlive the interpreter.
    """

    @atexit.register
    def undo_all() -> None:
        settle()
        for registration in [*live]:
            registration.undo()


def warn_once(why: str) -> None:
    """Warn once in this process that host memory is pageable, and why."""
    if why in warned:
        return
    warned.add(why)
    frame = sys._getframe()
    depth = 1
    # Point to the first line up the stack that is not PortaKV's own.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame = frame.f_back
        depth = depth + 1
    text = f"Expected pinned host memory, got pageable memory: {why}. Results are the same; "
    warnings.warn(f"{text}copies are slower, and block the host.", RuntimeWarning, depth)


class Buffer(NamedTuple):
    """The bytes of a tensor, an array or another buffer.

    Attributes:
        address, nbytes: from the first byte to the last.
        read_only: the bytes can only be read.
        owner: the object that owns them.
    """

    address: int
    nbytes: int
    read_only: bool
    owner: object


_FREED = "was freed before ({}); register memory before it is closed"
_NO_MEMORY = (
    "is not a strided tensor, array, mmap, shared memory or other buffer; pass one of these"
)


def buffer_of(memory: object) -> Buffer:
    """Return the bytes that a tensor, an array or another buffer covers.

    Raises:
        HostMemoryError: it is freed, empty or not memory.
        DeviceMismatch: a tensor on a device.
    """
    kind = kind_of(memory)
    if not isinstance(memory, torch.Tensor):
        array = _array_of(memory)
        low, past = _reach(kind, array.itemsize, array.shape, array.strides)
        read_only = not array.flags.writeable
        return Buffer(array.ctypes.data + low, past - low, read_only, array)
    if memory.device.type != "cpu":
        raise DeviceMismatch(
            f"Expected memory of the host to register, got {kind} on {memory.device}. Copy it to "
            f"the host first."
        )
    if memory.layout != torch.strided or memory.is_nested:
        raise _not_registered(kind, _NO_MEMORY)
    size = memory.element_size()
    low, past = _reach(kind, size, memory.shape, [size * step for step in memory.stride()])
    if memory.untyped_storage().nbytes() < memory.storage_offset() * size + past:
        raise _not_registered(kind, _FREED.format("its storage is smaller"))
    return Buffer(memory.data_ptr() + low, past - low, False, memory)


def _array_of(memory: Any) -> npt.NDArray[np.generic]:
    """Return a buffer of Python as an array, which retains it; raise `HostMemoryError`."""
    if isinstance(memory, np.ndarray):
        return memory
    kind = kind_of(memory)
    buffer = memory.buf if isinstance(memory, SharedMemory) else memory
    if buffer is None:
        raise _not_registered(kind, _FREED.format("it is closed"))
    try:
        view = memoryview(buffer)  # the buffer cannot be closed while the view exists
    except TypeError:
        raise _not_registered(kind, _NO_MEMORY) from None
    except ValueError as error:
        raise _not_registered(kind, _FREED.format(error)) from error
    try:
        return np.asarray(view)
    except ValueError as error:
        why = f"has elements that numpy does not know ({error}); pass np.frombuffer(it, np.uint8)"
        raise _not_registered(kind, why) from error


def _reach(
    kind: str, itemsize: int, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, int]:
    """Return where elements begin and end, in bytes from the first one; strides are bytes."""
    if math.prod(shape) * itemsize == 0:
        raise _not_registered(kind, "has 0 bytes, so nothing can be pinned; leave it out")
    reach = [(count - 1) * step for count, step in zip(shape, strides, strict=True)]
    low = sum(min(step, 0) for step in reach)
    return low, sum(reach) - low + itemsize


def _not_registered(kind: str, why: str) -> HostMemoryError:
    return HostMemoryError(f"Expected memory to register, got {kind} that {why}.")
