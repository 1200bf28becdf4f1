# SPDX-License-Identifier: Apache-2.0
"""`Moving`: a load or a save through a keeper: what it asks for, and its copies."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from portakv.errors import PortaKVError, TransferError
from portakv.graph import Mask, Priority
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.keeper_link import ASKING, PATIENT, Link, Session
from portakv.serving.keeper_messages import (
    UNFIT,
    Grant,
    Load,
    Progress,
    Report,
    Save,
    Stop,
    ids_in,
    joined_after,
    joined_keys,
)
from portakv.serving.keeper_requests import Requests
from portakv.serving.keeper_rows import MappedRows, RankForm
from portakv.serving.keeper_transfer import KeptTransfer, Piece
from portakv.storage.form_store import SHORT_COPY
from portakv.storage.rows import Crossing, Loan
from portakv.view import KVView

_log = RateLimitedLog(logging.getLogger(__name__))
#: Seconds between two looks at a copy that was issued.
LOOK = 5e-4


class Hit(NamedTuple):
    """Rows that the caller's thread copies for a request."""

    piece: Piece
    grant: Grant


class Moving:
    """A load or a save of one group of layers.

    Args:
        requests, link: of the rank.
        group: the number of the group.
        part: of the rank.
        crossing: between rows and blocks of the view.
    """

    def __init__(
        self,
        requests: Requests,
        link: Link,
        group: int,
        part: RankForm,
        view: KVView,
        crossing: Crossing,
    ) -> None:
        self._requests = requests
        self._link = link
        self._session = link.session
        self._group = group
        self._part = part
        self._view = view
        self._crossing = crossing
        self._priority: Priority = "urgent"
        self._saves = False
        self._transfer: KeptTransfer | None = None

    def save(
        self, keys: list[bytes], after: Sequence[bytes | None], priority: Priority
    ) -> KeptTransfer:
        """Begin a save. A worker requests rows and copies into them.

        ``after``: for each key the one that it follows.
        """
        self._priority = priority
        self._saves = True
        transfer = self._begin(len(keys), None)
        session = self._session
        if session is None:
            return transfer
        try:
            for piece in transfer.pieces:
                some = slice(piece.first, piece.first + piece.blocks)
                before = joined_after(after[some], keys[some])
                words = session.number, piece.number, self._group, joined_keys(keys[some])
                request = Save(*words, before, priority)
                self._run(partial(self._ask_later, session, piece, request))
        except BaseException:  # also an interrupt: no caller has a handle
            self._withdraw(transfer)
            raise
        return transfer

    def load(
        self, keys: list[bytes], deadline: float | None, priority: Priority, by_layer: bool = False
    ) -> KeptTransfer:
        """Begin a load: request rows, and copy those that are there."""
        self._priority = priority
        transfer = self._begin(len(keys), deadline)
        if by_layer:
            transfer.layers = [transfer] * self._view.layers
        session = self._session
        if session is None:
            return transfer
        here = self._copies_here(session, len(keys))
        hits = list[Hit]()
        try:
            for piece in transfer.pieces:
                some = joined_keys(keys[piece.first : piece.first + piece.blocks])
                words = session.number, piece.number, self._group, some
                grants = self._ask(session, piece, Load(*words, deadline or 0.0, priority))
                later = list[Grant]()
                for grant in grants:
                    if here and not grant.form:
                        hits.append(Hit(piece, grant))
                    else:
                        later.append(grant)
                self.copy_later(session, piece, later)
            if hits:
                self._issue(session, transfer, len(keys), hits)
        except BaseException as error:  # also an interrupt: no caller has a handle
            self._withdraw(transfer)
            if not isinstance(error, Exception):  # no one knows the rows of an answer that is lost
                self._link.lose(session, "A load was interrupted.")
            raise
        return transfer

    def _withdraw(self, transfer: KeptTransfer) -> None:
        """Copy no further block of a transfer that no caller has, and forget it."""
        transfer.cancel()
        for piece in transfer.pieces:
            self._requests.drop(piece)

    def _begin(self, keys: int, deadline: float | None) -> KeptTransfer:
        """Return the transfer, which has ended if there is no keeper.

        Raises the errors of copies that are impossible.
        """
        session = self._session
        if session is not None:
            rows: MappedRows = session.data
            inner = rows.sides(self._part, "").inner
            assert inner is not None  # a rank has a part of whole blocks
            self._crossing.prepare(inner)
        until = None if deadline is None else time.monotonic() + deadline
        packs = self._saves and bool(self._part.form.encoding)
        pieces = self._requests.begin(self, keys, self._saves, packs)
        changed = self._requests.changed
        transfer = KeptTransfer(changed, pieces, self._part.cells, until, self._give_up)
        self._transfer = transfer
        # A session that ended before they began has ended none of them.
        if session is None or self._link.session is not session:
            self._session = None
            for piece in pieces:
                self._requests.drop(piece)
        return transfer

    def _copies_here(self, session: Session, keys: int) -> bool:
        """Return whether the caller's thread copies the rows that are there.

        It issues a copy to a device, which it does not wait for, and makes a short one on the host.
        """
        if self._view.device.type == "cpu":
            return keys * self._part.form.payload_bytes <= SHORT_COPY
        rows: MappedRows = session.data
        return rows.pinned

    def _give_up(self, transfer: KeptTransfer) -> None:
        """Tell the keeper that nothing waits for a transfer any longer."""
        session = self._session
        if session is not None and self._link.session is session:
            for piece in transfer.pieces:
                stop = Stop(session.number, piece.number)
                with suppress(TransferError):  # the client was closed meanwhile
                    self._run(partial(self._link.tell, session, stop))

    def _ask_later(self, session: Session, piece: Piece, request: Save) -> None:
        """Request rows in a worker, and have them copied."""
        self.copy_later(session, piece, self._ask(session, piece, request))

    def _ask(self, session: Session, piece: Piece, request: Load | Save) -> Sequence[Grant]:
        """Request rows, and return those that are there; without an answer the request ends."""
        if not piece.closed:
            try:
                timeout = PATIENT if self._saves else ASKING
                answer = self._link.ask(session, request, Progress, timeout)
                self._requests.take(piece, answer, answer=True)
                return answer.grants
            except PortaKVError as error:
                kind = "save" if self._saves else "load"
                _log.warning(kind, "A %s of %d blocks ends: %s", kind, piece.blocks, error)
        self._requests.drop(piece)
        return ()

    def piece_ended(self) -> None:
        """See whether the transfer has ended, of which a request has."""
        if self._transfer is not None and self._transfer.look():
            self._transfer = None

    # --- copies

    def copy_later(self, session: Session, piece: Piece, grants: Sequence[Grant]) -> None:
        """Have workers copy rows."""
        for grant in grants:
            self._run(partial(self._copy, session, piece, grant))

    def _run(self, work: partial[None]) -> None:
        self._requests.run("save" if self._saves else "load", work, self._priority)

    def _copy(self, session: Session, piece: Piece, grant: Grant) -> None:
        """Copy rows in a worker, and report that."""
        if not self._requests.start_copy(piece):
            self._report(session, grant, False)
            return
        rows: MappedRows = session.data
        cells = 0
        landed = False
        unfit: Mask | None = None
        try:
            at = [piece.first + place for place in ids_in(grant.places)]
            items = ids_in(grant.rows)
            terms = (self._part, grant.form, self._crossing, self._view)
            cells, unfit = rows.copy(*terms, items, at, piece.saves)
            landed = True
        except PortaKVError as error:
            _log.warning("copy", "A copy failed: %s", error)
        finally:
            self._requests.end_copy(piece, grant, cells)
            self._report(session, grant, landed, unfit)

    def _report(
        self, session: Session, grant: Grant, landed: bool, unfit: Mask | None = None
    ) -> None:
        """Report the end of a copy to the keeper. ``unfit``: the blocks that were not packed."""
        mask = np.full(len(grant.places) // 4, landed, np.uint8)
        if unfit is not None:
            mask[unfit] = UNFIT
        self._link.tell(session, Report(session.number, grant.lease, mask.tobytes()))

    def _issue(
        self, session: Session, transfer: KeptTransfer, blocks: int, hits: Sequence[Hit]
    ) -> None:
        """Copy rows on the caller's current stream."""
        mapped: MappedRows = session.data
        inner = mapped.sides(self._part, "").inner
        assert inner is not None  # a rank has a part of whole blocks
        loan = Loan((), self._crossing)
        loan.rows = [None] * blocks
        begun = list[Hit]()
        landed = False
        note = partial(self._note_issued, session, transfer, loan, hits, begun)
        try:
            undo = partial(self._undo_issued, begun)
            uninterrupted(partial(self._start_issued, loan, hits, begun), undo)
            if begun:
                by_layer = bool(transfer.layers) and None not in loan.rows
                _, layers = self._crossing.issue(inner, loan, by_layer)
                transfer.layers = layers or transfer.layers
            landed = True
        finally:
            uninterrupted(partial(note, landed))

    def _start_issued(self, loan: Loan, hits: Sequence[Hit], begun: list[Hit]) -> None:
        """Note that copies begin, whose rows become those of a loan; add those that may."""
        begun += [hit for hit in hits if self._requests.start_copy(hit.piece, issued=True)]
        rows = [*loan.rows]
        for piece, grant in begun:
            for place, row in zip(ids_in(grant.places), ids_in(grant.rows), strict=True):
                rows[piece.first + place] = row
        loan.rows = rows

    def _undo_issued(self, begun: list[Hit], _: object) -> None:
        """Note that copies have ended that were not issued."""
        some = [*begun]
        begun.clear()
        self._end_issued(some, False)

    def _note_issued(
        self,
        session: Session,
        transfer: KeptTransfer,
        loan: Loan,
        hits: Sequence[Hit],
        begun: Sequence[Hit],
        landed: bool,
    ) -> None:
        """Note the copy that was issued, if one was, and have its end followed."""
        if loan.end is None:
            loan.cancel()
        transfer.issued = loan.end
        transfer.issued_blocks = np.array([row is not None for row in loan.rows])
        if loan.ended():
            self._end_issued(begun, landed)
            begun = ()
        self._requests.run("end", partial(self._follow, session, loan, hits, begun, landed))

    def _follow(
        self,
        session: Session,
        loan: Loan,
        hits: Sequence[Hit],
        begun: Sequence[Hit],
        landed: bool,
    ) -> None:
        """Wait in a worker for a copy that was issued, and report its end."""
        while not loan.ended():
            time.sleep(LOOK)
        self._end_issued(begun, landed)
        for _, grant in hits:
            self._report(session, grant, landed)

    def _end_issued(self, begun: Sequence[Hit], landed: bool) -> None:
        """Note the end of a copy that was issued."""
        cells = self._part.cells if landed else 0
        for piece, grant in begun:
            self._requests.end_copy(piece, grant, cells, issued=True)
