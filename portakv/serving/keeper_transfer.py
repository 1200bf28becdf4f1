# SPDX-License-Identifier: Apache-2.0
"""`KeptTransfer`: a load or a save through a keeper, as its caller sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from portakv.errors import TransferTimeout
from portakv.graph import Mask
from portakv.runtime.transfer import Completion, Transfer

#: Seconds after its deadline for which a load waits for the keeper to end it.
GRACE = 0.5
#: Seconds between two looks of a caller that waits.
LOOK = 1.0


@dataclass(eq=False)
class Piece:
    """A request of a transfer, of at most `MOST_KEYS` keys. The client's lock guards it.

    Attributes:
        number: of the request.
        packs: a save of packed blocks: those that do not fit get rows once more, so that nothing is
            released before the keeper says that no rows follow.
        first: the number of its first block in the transfer.
        blocks: how many it has.
        asking: the first answer of the keeper has not come.
        more: further rows may follow.
        closed: no copy begins any more: the transfer was cancelled, is late, or lost its keeper.
        queued: leases whose copies have not begun.
        copying: leases whose copies are under way in workers.
        issued: leases whose copies were issued on the caller's stream.
        granted: how many blocks have rows, as whole blocks.
        landed: the blocks that were copied from rows of whole blocks, bool ``[blocks]``.
        covered: of other blocks the cells that were copied.
        stored: the blocks of a save that are stored; None: it has not ended.
    """

    number: int
    first: int
    blocks: int
    saves: bool
    packs: bool = False
    asking: bool = True
    more: bool = True
    closed: bool = False
    queued: int = 0
    copying: int = 0
    issued: int = 0
    granted: int = 0
    covered: dict[int, int] = field(default_factory=dict)
    stored: Mask | None = None

    def __post_init__(self) -> None:
        self.landed: Mask = np.zeros(self.blocks, np.bool_)

    @property
    def issued_all(self) -> bool:
        """Return whether nothing is under way, or follows, but what was issued."""
        left = self.asking or self.queued or (self.more and self.granted < self.blocks)
        return not self.copying and (self.closed or not left)

    @property
    def released(self) -> bool:
        """Return whether no copy is under way, and none follows."""
        return self.issued_all and not self.issued

    @property
    def ended(self) -> bool:
        """Return whether the request has ended."""
        return self.released and (self.closed or not self.saves or self.stored is not None)


class KeptTransfer:
    """A load or a save through a keeper. It never raises: what did not land is in `landed`.

    Attributes:
        released: of a save, ends when nothing reads the caller's blocks; None of a load.
        layers: of a load by layer, what to wait for before each layer; empty for others.
        cells: of a block, which a load has to copy.
        issued: the end of the copy on the caller's stream, if the call issued one.
        issued_blocks: the blocks of that copy, bool ``[blocks]``.
    """

    def __init__(
        self,
        changed: threading.Condition,
        pieces: Sequence[Piece],
        cells: int,
        until: float | None = None,
        give_up: Callable[[KeptTransfer], object] = lambda _: None,
    ) -> None:
        self.pieces = pieces
        self.cells = cells
        self.layers: Sequence[KeptTransfer | Transfer] = ()
        self.issued: Completion | None = None
        self.issued_blocks: Mask | None = None
        self._ordered = False  # a stream waits for what was issued
        saves = any(piece.saves for piece in pieces)
        self.released = Released(changed, pieces) if saves else None
        self._changed = changed
        self._until = until
        self._give_up = give_up
        self._call: Callable[[], object] | None = None

    def when_ended(self, call: Callable[[], object]) -> None:
        """Have a function called once when it has ended, or now if it has.

        It is called under the client's lock, in any thread: it must be quick, and wait for nothing.
        """
        self._call = call
        self.look()

    def look(self) -> bool:
        """Return whether it has ended, and call the function of `when_ended` then."""
        with self._changed:
            if not all(piece.ended for piece in self.pieces):
                return False
            call = self._call
            self._call = None
            if call is not None:
                call()
            return True

    def done(self) -> bool:
        """Return whether it has ended; never block, never raise."""
        ended = self._ended()
        if not ended and self._until is not None and time.monotonic() > self._until + GRACE:
            self.cancel()
            ended = self._ended()
        return ended

    def _ended(self) -> bool:
        with self._changed:
            return all(piece.ended for piece in self.pieces)

    @property
    def is_issued(self) -> bool:
        """Return whether all copies were issued: `wait` orders a stream, and blocks no host."""
        with self._changed:
            return self.issued is not None and all(piece.issued_all for piece in self.pieces)

    @property
    def landed(self) -> Mask:
        """Return the blocks that landed, or are stored, bool ``[blocks]``.

        After `wait`, the blocks of a copy that was issued count: the stream finds their bytes.
        """
        result = np.zeros(sum(piece.blocks for piece in self.pieces), np.bool_)
        if self._ordered and self.issued_blocks is not None:
            result |= self.issued_blocks
        with self._changed:
            for piece in self.pieces:
                some = result[piece.first : piece.first + piece.blocks]
                if piece.saves:
                    some |= False if piece.stored is None else piece.stored
                else:
                    some |= piece.landed
                    some[[at for at, cells in piece.covered.items() if cells == self.cells]] = True
        return result

    def cancel(self) -> bool:
        """Copy no further block; return whether some blocks will not be copied."""
        with self._changed:
            left = [piece for piece in self.pieces if not piece.closed and not piece.ended]
            for piece in left:
                piece.closed = True
            self._changed.notify_all()
        if left:
            self.look()
            self._give_up(self)
        return bool(left)

    def synchronize(self, timeout: float | None = None) -> None:
        """Block until it has ended. Raises `TransferTimeout` after so many seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            left = LOOK if until is None else min(LOOK, until - time.monotonic())
            if left <= 0:
                raise TransferTimeout(
                    f"The transfer timed out after {timeout:g} s, and goes on. Wait again, or call "
                    f"done()."
                )
            with self._changed:
                if not all(piece.ended for piece in self.pieces):
                    self._changed.wait(left)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Make the current stream (or ``stream``) wait; block the host for what others copy."""
        issued = self.issued
        if issued is not None:
            issued.wait(stream)
            self._ordered = True
        while not self.done():
            with self._changed:
                if all(piece.issued_all for piece in self.pieces):
                    return
                self._changed.wait(LOOK)


class Released:
    """The end of the copies of a save, after which nothing reads the caller's blocks."""

    def __init__(self, changed: threading.Condition, pieces: Sequence[Piece]) -> None:
        self._changed = changed
        self._pieces = pieces

    def done(self) -> bool:
        """Return whether nothing reads the caller's blocks; never block for long."""
        with self._changed:
            return all(piece.released for piece in self._pieces)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Block until nothing reads the caller's blocks."""
        with self._changed:
            while not all(piece.released for piece in self._pieces):
                self._changed.wait(LOOK)
