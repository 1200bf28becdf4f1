# SPDX-License-Identifier: Apache-2.0
"""`Requests`: the requests of a rank to its keeper, and how far their copies are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Literal, Protocol, TypeAlias

import numpy as np

from portakv.graph import Graph, Mask, Priority, Task
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import Condition
from portakv.serving.keeper_link import Session
from portakv.serving.keeper_messages import MOST_KEYS, Grant, Progress, ids_in
from portakv.serving.keeper_transfer import Piece

#: What workers do: copies of loads and of saves, and waits for copies that were issued.
Kind: TypeAlias = Literal["load", "save", "end"]
#: The name and the width of the queue of each kind.
_QUEUES = {"load": ("host-device", 2), "save": ("device-host", 2), "end": ("ends", 1)}


class Copying(Protocol):
    """What has rows copied for a request."""

    def piece_ended(self) -> None:
        """Note that a request has ended, under the lock of all pieces."""

    def copy_later(self, session: Session, piece: Piece, grants: Sequence[Grant], /) -> None:
        """Have workers copy rows."""


class Requests:
    """The requests of a rank that have not ended. Any thread may call.

    Attributes:
        changed: the lock of all pieces, notified at each change.
        graph: its workers copy.
        process: whose requests they are.
    """

    def __init__(self) -> None:
        self.process = this_process()
        self.changed = Condition()
        self.graph = Graph()
        self._numbers = count(1)
        self._open = dict[int, tuple[Copying, Piece]]()  # by number
        self._copies = 0  # copies

    @property
    def idle(self) -> bool:
        """Return whether no copy is under way."""
        return not self._copies

    def begin(self, copying: Copying, keys: int, saves: bool, packs: bool = False) -> list[Piece]:
        """Return the requests of a load or save of so many keys; ``packs``: see `Piece`."""
        pieces = list[Piece]()
        with self.changed:
            for first in range(0, keys, MOST_KEYS):
                many = min(MOST_KEYS, keys - first)
                piece = Piece(next(self._numbers), first, many, saves, packs)
                pieces.append(piece)
                self._open[piece.number] = copying, piece
        return pieces

    def next_number(self) -> int:
        """Return a number that no request of this rank has."""
        return next(self._numbers)

    def find(self, number: int) -> tuple[Copying, Piece] | None:
        """Return a request that has not ended."""
        return self._open.get(number)

    def take(self, piece: Piece, progress: Progress, answer: bool = False) -> None:
        """Note what the keeper says about a request. ``answer``: for the first time."""
        with self.changed:
            piece.queued += len(progress.grants)
            for grant in progress.grants:
                if not (grant.form or piece.packs):
                    piece.granted += len(grant.places) // 4
            piece.asking = piece.asking and not answer
            piece.more = piece.more and progress.more
            if progress.stored is not None:
                piece.stored = np.frombuffer(progress.stored, np.bool_).copy()
            self._note(piece)

    def drop(self, piece: Piece) -> None:
        """End a request that the keeper does not answer."""
        with self.changed:
            piece.closed = True
            piece.asking = False
            self._note(piece)

    def close_all(self) -> None:
        """Begin no further copy, and wait for no further rows."""
        with self.changed:
            for _, piece in [*self._open.values()]:
                piece.closed = True
                self._note(piece)

    def start_copy(self, piece: Piece, issued: bool = False) -> bool:
        """Note that a copy begins; return False if it must not.

        ``issued``: on the stream of the caller, not by a worker.
        """
        with self.changed:
            piece.queued -= 1
            if piece.closed:
                self._note(piece)
                return False
            piece.copying += not issued
            piece.issued += issued
            self._copies += 1
            return True

    def end_copy(self, piece: Piece, grant: Grant, cells: int, issued: bool = False) -> None:
        """Note that a copy has ended, which brought cells of blocks."""
        places = ids_in(grant.places) if cells else []
        with self.changed:
            piece.copying -= not issued
            piece.issued -= issued
            self._copies -= 1
            if not grant.form:
                piece.landed[places] = True
            for place in places if grant.form else []:
                piece.covered[place] = piece.covered.get(place, 0) | cells
            self._note(piece)

    def run(self, kind: Kind, work: Callable[[], object], priority: Priority = "urgent") -> None:
        """Have a worker do something."""
        name, width = _QUEUES[kind]

        def call(task: Task, mask: Mask) -> None:
            work()

        task = Task(call, 1, queue=self.graph.queue(name, width=width), name=kind)
        self.graph.submit([task], priority=priority)

    def close(self, timeout: float) -> None:
        """End all requests, and wait for copies under way, at most so many seconds."""
        self.close_all()
        with self.changed:
            self.changed.wait_for(lambda: self.idle, timeout)

    def _note(self, piece: Piece) -> None:
        """Wake who waits for a request, and forget it if it has ended; under the lock."""
        if piece.ended:
            copying, _ = self._open.pop(piece.number, (None, piece))
            if copying is not None:
                copying.piece_ended()
        self.changed.notify_all()
