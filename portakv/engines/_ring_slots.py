# SPDX-License-Identifier: Apache-2.0
"""Slots: pinned memory of one device that slices pass through in turns."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

import torch

from portakv.engines.dense import Mirror
from portakv.host import pinned

if TYPE_CHECKING:
    from portakv.view.view import KVView

#: Slots of each device: while the host copies one, others cross. Of 2, 3 and 4 slots of 4 and 16
#: MiB, plain copies did best through 3 of 16 on an H200.
TURNS = 3
_KEPT = 64  # views of slots that are remembered


class Slots:
    """The slots of one device. One transfer at a time has them, under ``lock``.

    What crosses is remembered with its slot, not with the transfer: a transfer may end before its
    last slices have crossed, or be interrupted, and the next one waits for the slot it takes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._memory: list[torch.Tensor] = []
        self._views: dict[tuple[int, Mirror, int], KVView] = {}
        self._crossing: list[torch.Stream | torch.Event | None] = [None] * TURNS

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory that are held."""
        return sum(memory.numel() for memory in self._memory)

    def reserve(self, nbytes: int) -> None:
        """Have slots of at least so many bytes each."""
        if self._memory and self._memory[0].numel() >= nbytes:
            return
        for at in range(TURNS):
            self.wait(at)
        self._views.clear()
        self._memory = []
        self._memory = [pinned.empty(nbytes, torch.uint8) for _ in range(TURNS)]

    def view(self, at: int, mirror: Mirror, held: int) -> KVView:
        """One of the slots, as rows of ``held`` slots of a mirror."""
        key = at, mirror, held
        known = self._views.get(key)
        if known is None:
            if len(self._views) >= _KEPT:
                self._views.clear()
            known = self._views[key] = mirror.view(self._memory[at], held)
        return known

    def begin(self, at: int, stream: torch.Stream) -> None:
        """Something is about to cross on a stream: until `end`, the slot waits for all of it."""
        self._crossing[at] = stream

    def end(self, at: int, stream: torch.Stream) -> None:
        """It has been enqueued."""
        event = torch.Event(stream.device)
        event.record(stream)
        self._crossing[at] = event

    def wait(self, at: int) -> None:
        """Block the host until nothing crosses from or to a slot."""
        crossing = self._crossing[at]
        if crossing is not None:
            crossing.synchronize()
            self._crossing[at] = None


@cache
def slots(device: torch.device) -> Slots:
    """The slots of a device."""
    return Slots()
