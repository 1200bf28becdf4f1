# SPDX-License-Identifier: Apache-2.0
"""Which memory of this process is registered, and how that ends: once, and never under a copy.

What is registered is exact to the byte, though a page is pinned as a whole and only once. With
whole pages registered, a neighbour's copy that begins behind ours in our last page, and reaches
beyond it, would fail: CUDA refuses a copy that begins in registered memory and ends outside.
"""

from __future__ import annotations

import atexit
import bisect
import itertools
import math
import os
import sys
import threading
import warnings
import weakref
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, HostMemoryError
from portakv.host import _runtime
from portakv.host._pages import PAGE, to_pages, whole
from portakv.host._runtime import CallRefused, Runtime

#: One registration over 512 GiB fails (vLLM #51081); whole GiB, so that no huge page is cut.
LARGEST = 511 << 30

_lock = threading.RLock()  # a finalizer may run wherever its own thread holds it
_claimed: list[tuple[int, int]] = []  # page ranges, sorted; no two overlap
_live: weakref.WeakSet[Registration] = weakref.WeakSet()
_seams: list[int] = []  # addresses, sorted
_postponed: list[tuple[Registration, Any]] = []  # by finalizers during a graph's capture
_exit_asked = False
_told: set[str] = set()


class Registration:
    """Memory, registered in one piece or several; or merely claimed, if there is no runtime.

    Args:
        runtime: registers the memory; None: its pages are claimed and stay pageable.
        address: of the first byte, on a page or not.
        nbytes: how many; the pages that they touch cannot be registered again.
        flags: the runtime's.
        largest: bytes of one piece, at most.
        unit: pieces of memory that begins on a page are a multiple of it, if one fits at all.

    Raises:
        HostMemoryError: some of these pages are registered already, or pieces that cannot be.
        CallRefused: the runtime refused; nothing is registered or claimed then.

    Attributes:
        pieces: (address, bytes) of each, in order.
    """

    def __init__(
        self,
        runtime: Runtime | None,
        address: int,
        nbytes: int,
        flags: int = 0,
        largest: int = LARGEST,
        unit: int = 1,
    ) -> None:
        start, end = address // PAGE * PAGE, to_pages(address + nbytes)
        self._runtime, self._process = runtime, os.getpid()
        self.pieces = _cut(address, address + nbytes, piece_bytes(largest, unit))
        self._registered: list[int] = []
        settle()
        _claim(start, end)
        self._range: tuple[int, int] | None = (start, end)
        try:
            for piece, length in self.pieces:
                if runtime is not None:
                    runtime.register(piece, length, flags)
                    self._registered.append(piece)
        except BaseException:
            self.undo()
            raise
        with _lock:
            _seams.extend(piece for piece, _ in self.pieces[1:])
            _seams.sort()
        _live.add(self)
        _ask_for_exit()

    @property
    def pinned(self) -> bool:
        """True while the runtime has it registered."""
        return bool(self._registered)

    def device_address(self, address: int) -> int:
        """Where the current device finds a byte of it. Raises `CallRefused`."""
        assert self._runtime is not None
        at = bisect.bisect_right([piece for piece, _ in self.pieces], address) - 1
        piece = self.pieces[at][0]
        return self._runtime.device_address(piece) + address - piece

    def undo(self) -> None:
        """Unregister, once no device works any more. Again: nothing."""
        with _lock:
            registered, self._registered = self._registered, []
            claimed, self._range = self._range, None
        if registered and self._process == os.getpid() and self._runtime is not None:
            _runtime.quiesce()
            for piece in registered:
                _unregister(self._runtime, piece)
        if claimed is not None:
            with _lock:
                _claimed.remove(claimed)
                _seams[:] = [at for at in _seams if not claimed[0] < at < claimed[1]]

    def forget(self, owner: Any) -> None:
        """`undo`; where a graph's capture forbids that, later. The owner is held until then."""
        if self._registered and self._process == os.getpid() and _runtime.capturing():
            _postponed.append((self, owner))
        else:
            self.undo()


def seams() -> tuple[int, ...]:
    """Addresses, in order, at which one registration ends and the next of the same memory begins:
    no copy may reach across."""
    return tuple(_seams)


def settle() -> None:
    """End what had to wait for the end of a capture."""
    while _postponed and not _runtime.capturing():
        try:
            registration, owner = _postponed.pop()
        except IndexError:  # another thread was faster
            return
        registration.undo()
        del owner  # gives its memory back


class Buffer(NamedTuple):
    """The bytes of a buffer from the first to behind the last, and what holds them.

    ``fixed``: they can only be read.
    """

    address: int
    nbytes: int
    fixed: bool
    owner: Any


def buffer_of(memory: Any) -> Buffer:
    """Which bytes a tensor, an array or another buffer covers.

    Raises:
        HostMemoryError: freed, empty, pinned already, or no memory at all.
        DeviceMismatch: a tensor that is not on the host.
    """
    if isinstance(memory, torch.Tensor):
        return _of_tensor(memory)
    if isinstance(memory, np.ndarray):
        return _of_array(memory, memory)
    # Both ask the owner for a buffer, which it cannot close while that is held.
    buffer = memory.buf if isinstance(memory, SharedMemory) else memory
    try:
        if buffer is None:
            raise ValueError("it is closed")
        view = memoryview(buffer)
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
    return _of_array(np.asarray(view), view)


def _of_tensor(tensor: torch.Tensor) -> Buffer:
    if tensor.device.type != "cpu":
        raise DeviceMismatch(
            f"A tensor on {tensor.device} was asked to be registered; expected memory of the host. "
            f"Copy it there first."
        )
    if tensor.layout != torch.strided:
        raise HostMemoryError(
            f"A tensor of layout {tensor.layout} was asked to be registered; expected a strided "
            f"one. Register its parts."
        )
    _refuse_empty(tensor.numel())
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise HostMemoryError(
            f"A tensor of {needed} bytes was asked to be registered, and its storage holds "
            f"{tensor.untyped_storage().nbytes()}: it was freed before. Register it earlier."
        )
    if tensor.is_pinned():
        raise HostMemoryError(
            f"{needed} bytes at {tensor.data_ptr():#x} were asked to be registered, and they are "
            f"pinned already, here or by torch; use them as they are."
        )
    return Buffer(tensor.data_ptr(), (last + 1) * tensor.element_size(), False, tensor)


def _of_array(array: npt.NDArray[Any], owner: Any) -> Buffer:
    _refuse_empty(array.nbytes)
    reach = [(size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)]
    low = sum(step for step in reach if step < 0)
    high = sum(step for step in reach if step > 0) + array.itemsize
    return Buffer(array.ctypes.data + low, high - low, not array.flags.writeable, owner)


def _refuse_empty(size: int) -> None:
    if size == 0:
        raise HostMemoryError(
            "Memory of 0 bytes was asked to be registered; there is nothing to pin. Leave it out."
        )


def _claim(start: int, end: int) -> None:
    with _lock:
        at = bisect.bisect_left(_claimed, (start, end))
        for taken in _claimed[max(0, at - 1) : at + 1]:
            if taken[0] < end and start < taken[1]:
                raise HostMemoryError(
                    f"Pages {start:#x} - {end:#x} were asked to be registered, and "
                    f"{taken[0]:#x} - {taken[1]:#x} are already, in whole or in part; a page can "
                    f"be registered once. Register both as one range, unregister the first, or "
                    f"keep memory that shares a page apart."
                )
        bisect.insort(_claimed, (start, end))


def piece_bytes(largest: int, unit: int) -> int:
    """How many bytes one registration has where there are several.

    Raises:
        HostMemoryError: a ``largest`` under a page, or a ``unit`` under 1.
    """
    asked = f"Pieces of at most {largest!r} bytes were asked for, and a page has {PAGE}"
    most = whole(largest, PAGE, asked, "ask for whole pages")
    asked = f"Pieces cut at multiples of {unit!r} bytes were asked for"
    step = math.lcm(whole(unit, 1, asked, "pass 1 to have them cut at any page"), PAGE)
    return most // step * step or most // PAGE * PAGE


def _cut(start: int, end: int, length: int) -> list[tuple[int, int]]:
    """The range in pieces; one wherever that is allowed. They meet between pages."""
    first = start // PAGE * PAGE
    edges = [start, *range(first + length, end, length), end]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def _unregister(runtime: Runtime, piece: int) -> None:
    try:
        runtime.unregister(piece)
    except CallRefused as refused:
        # After a reset of the device nothing is registered; a finalizer cannot raise.
        if refused.code != _runtime.UNKNOWN:
            warn_once(f"unregistering it failed before, {refused}")


def _ask_for_exit() -> None:
    """Registered when first needed: an import has no effects."""
    global _exit_asked
    with _lock:
        if not _exit_asked:
            _exit_asked = True
            atexit.register(_at_exit)


def _at_exit() -> None:
    """Unregister what is left. Nothing is unmapped: tensors may outlive the interpreter."""
    settle()
    for registration in list(_live):
        registration.undo()


def warn_once(why: str) -> None:
    """Say for the first time in this process that host memory is pageable, and why."""
    with _lock:
        if why in _told:
            return
        _told.add(why)
    warnings.warn(
        f"Host memory was asked to be pinned and stays pageable: {why}. Results are the same; "
        f"copies are slower, and block the host.",
        RuntimeWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """How far up the stack, from the warning on, the first line is that is not PortaKV's own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("portakv."):
        frame, level = frame.f_back, level + 1
    return level
