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
import threading
import weakref
from typing import Any

from portakv.errors import HostMemoryError
from portakv.host import _runtime
from portakv.host._pageable import warn_once
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


class Registration:
    """Memory, registered in one piece or several; or merely claimed, where there is nobody to
    register it with.

    Args:
        runtime: whom to register with; None: nobody.
        address: of the first byte, on a page or not.
        nbytes: how many; nobody else can register the pages that they touch.
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

    @property
    def ended(self) -> bool:
        """True once it was undone."""
        return self._range is None

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
        # After a reset of the device nothing is registered; finalizers have nobody to raise to.
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
