# SPDX-License-Identifier: Apache-2.0
"""Staging: memory on the device that transfers of one stream pass through, and the streams beside
it on which their slices do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from portakv.engines.dense import DenseRows
from portakv.engines.slices import RING
from portakv.runtime.streams import own_stream

if TYPE_CHECKING:
    from portakv.view.view import KVView

_APART = 256  # bytes: mirrors begin at multiples, so that vectors are as wide as they can be
_STREAMS = 8  # whose staging is kept; of the one that was used longest ago it is given back


class Staging:
    """The mirrors of one stream. One transfer at a time issues its work, under ``lock``; on the
    device the stream orders them, or where they are detached the mirrors do, one by one.

    Attributes:
        half: the stream of the device's half.
        link: the stream on which slices cross.
        detached: transfers do not wait for the ends of those before them.
        free: for each mirror, an event behind its last use by these; None where it has had none.
    """

    def __init__(self, device: torch.device, detached: bool = False) -> None:
        self.detached = detached
        self.lock = threading.Lock()
        self.half: torch.Stream = own_stream(device, priority=-1)
        self.link: torch.Stream = own_stream(device)
        self._mirrors = RING
        self.free: list[torch.Event | None] = [None] * RING
        self._turn = 0
        self._device = device
        self._each = 0
        self._room: torch.Tensor | None = None
        self._views: dict[tuple[int, DenseRows, int], KVView] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the device that are held."""
        return 0 if self._room is None else self._room.numel()

    def reserve(self, nbytes: int, mirrors: int) -> None:
        """Have room for so many mirrors, of so many bytes each; on the current stream.

        Smaller memory is given back: to what the allocator serves later on this stream, which by
        then waits for every use. Where transfers are detached this stream is ``half``.
        """
        each = max(self._each, -(-nbytes // _APART) * _APART)
        if each > self._each or mirrors > self._mirrors:
            mirrors = max(self._mirrors, mirrors)
            self._views.clear()
            self._room, self._each = None, 0  # nothing is held if there is no more
            self.free = [None] * mirrors
            self._room = torch.empty(mirrors * each, dtype=torch.uint8, device=self._device)
            self._mirrors, self._each = mirrors, each
            if self.detached:
                # The link waits for no stream that the allocator knows this memory by.
                self._room.record_stream(self.link)
                self.link.wait_stream(self.half)

    def turns(self, slices: int, mirrors: int) -> list[int]:
        """Which mirror each of so many slices takes, the one behind the last slice's first."""
        first, self._turn = self._turn, (self._turn + slices) % mirrors
        return [(first + nth) % mirrors for nth in range(slices)]

    def mirror(self, at: int, mirror: DenseRows, held: int) -> KVView:
        """One of the mirrors, for rows of ``held`` slots."""
        key = at, mirror, held
        known = self._views.get(key)
        if known is None:
            assert self._room is not None
            room = self._room[at * self._each : (at + 1) * self._each]
            known = self._views[key] = mirror.view(room, held)
        return known


_known: OrderedDict[tuple[torch.device, int, bool], Staging] = OrderedDict()
_lock = threading.Lock()


def staging(device: torch.device, work: torch.Stream, detached: bool = False) -> Staging:
    """The staging of a stream; ``detached``: of transfers on it whose next does not wait for it."""
    key = device, work.stream_id, detached
    with _lock:
        found = _known.get(key)
        if found is None:
            found = _known[key] = Staging(device, detached)
            while len(_known) > _STREAMS:
                _known.popitem(last=False)
        _known.move_to_end(key)
    return found


def mark(stream: torch.Stream, beside: bool) -> torch.Event | None:
    """An event behind what is on a stream; None where nothing runs beside it."""
    if not beside:
        return None
    event = torch.Event(stream.device)
    event.record(stream)
    return event


def wait(stream: torch.Stream, event: torch.Event | None) -> None:
    """Make a stream wait for an event, if there is one."""
    if event is not None:
        stream.wait_event(event)
