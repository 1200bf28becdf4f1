# SPDX-License-Identifier: Apache-2.0
"""`StoreClient`: the blocks of a rank, in the store of the server of its host; and `ServerIndex`, a
copy of that server's index.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, islice, takewhile
from secrets import token_hex
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from portakv.arguments import flag, instance, items, one_of, seconds, text, whole
from portakv.errors import PortaKVError, StoreError
from portakv.host import pinned
from portakv.host.shared import process_here
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.shared_memory import open_shared
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.transfer import Transfer
from portakv.serving.bucket import BucketAnswers
from portakv.serving.local import StoreIndex, StoreTerms
from portakv.serving.server.link import ASKING, PATIENT, Link, Place, Session
from portakv.serving.server.messages import (
    MOST_KEYS,
    MOST_LOOKED_UP,
    UNFIT,
    AskKeys,
    Changed,
    Changes,
    Delete,
    Done,
    Follow,
    Followed,
    Grant,
    Join,
    Joined,
    KeysPage,
    Load,
    LookedUp,
    LookUp,
    Pin,
    Progress,
    Report,
    Save,
    Stop,
    after_of,
    tier_of,
)
from portakv.serving.server.server import StoreServer, place_of, rows_here
from portakv.serving.server.state import cells_of, whole_form
from portakv.storage import BlockForm
from portakv.storage.calls import Change, copy_fitting
from portakv.storage.eviction import Pins
from portakv.storage.form import Slices
from portakv.storage.keys import check_keys, different_keys, predecessors
from portakv.storage.memory import Crossing, Loan
from portakv.storage.tiers.base import After, Keys
from portakv.storage.work import End, Handle, Mask
from portakv.tasks import SLACK, Limit, Priority, Signal, Wait, Work, runtime
from portakv.view import IdList, KVView

# ------------------------------------------------------------------------------------------------
# `ServerIndex`: a copy of the index of a server, which the server keeps current.


class Known:
    """The blocks of one form that a server has, and in which tiers.

    ``bucket``: what is known of lookups in the server's bucket; None: it has none.
    """

    def __init__(self, bucket: BucketAnswers | None = None) -> None:
        #: By key a number with a bit for each tier.
        self.tiers = dict[bytes, int]()
        self._names = dict[str, int]()  # the bits of tiers, by their names
        self._bucket = bucket

    def has(self, key: bytes) -> bool:
        """Return whether a block can be loaded."""
        return key in self.tiers or (self._bucket is not None and self._bucket.has(key))

    def has_each(self, keys: Keys) -> list[bool]:
        """Return which blocks can be loaded."""
        return [*map(self.has, keys)]

    def leading(self, keys: Keys) -> int:
        """Return how many leading blocks can be loaded."""
        return sum(takewhile(bool, map(self.has, keys)))

    def add_page(self, page: KeysPage) -> None:
        """Note that a tier has blocks."""
        tiers = self.tiers
        bit = self._bit(page.tier)
        for key in page.keys:
            tiers[key] = tiers.get(key, 0) | bit

    def change(self, changed: Changed) -> None:
        """Note a block that a tier has stored, or lost."""
        bit = self._bit(tier_of(changed.form, changed.tier))
        left = self.tiers.get(changed.key, 0) & ~bit
        if changed.stored:
            left |= bit
        if left:
            self.tiers[changed.key] = left
        else:
            self.tiers.pop(changed.key, None)

    def _bit(self, tier: str) -> int:
        return 1 << self._names.setdefault(tier, len(self._names))


def missed(before: Sequence[Known], now: Sequence[Known]) -> list[Change]:
    """Return the losses of blocks that were known before a snapshot, and are not in it."""
    changes = list[Change]()
    for old, new in zip(before, now, strict=False):
        lost = old.tiers.keys() - new.tiers.keys()
        changes += [Change(0, key, "", False, "evicted") for key in lost]
    return changes


class ServerIndex(StoreIndex):
    """What a scheduler knows of the blocks of a server; an `Index` of a `SchedulerSide`.

    It holds a copy of the server's index, which the server keeps current. So an answer needs no
    message, except about blocks that only a bucket has, which the server looks up. It knows no
    blocks while there is no server, or no rank of the engine has joined.

    Args:
        place: where the processes of the host find the server.
        engine: the name with which the ranks of the engine join.
        groups: of layers, as the ranks have them. A block can be loaded if all groups have it.

    Attributes:
        parts: of each group of the scheduler's, how many of these are its parts.

    Raises `InvalidTerms` for wrong arguments.
    """

    def __init__(self, place: Place, engine: str = "", groups: int = 1) -> None:
        super().__init__()
        instance("place", place, Place)
        text("engine", engine, least=0)
        self._groups = whole("groups", groups, 1, 64)
        self.parts: Sequence[int] = (1,) * groups
        self._known: list[Known] = []  # of each group
        self._followed = Followed(0, (), ())
        self._every = False  # of all of them, and the losses between two sessions
        self._left: list[Known] = []  # what was known in the session before
        self._waiting: list[Changed] | None = None  # changes, while a snapshot is read
        self._runtime = runtime()  # its lock guards all
        self._channel = Channel()
        self._channel.serve(Changes, self._take)
        self._channel.serve(LookedUp, self._looked_up)
        hello = Follow(engine, process_here(), self._channel.address, groups)
        self._link = Link(
            place,
            self._channel,
            lambda _: hello,
            Followed,
            self._began,
            self._ended,
            refresh=self._look,
        )
        self._link.start()

    def __enter__(self) -> ServerIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def holds(self, group: int, keys: Keys) -> list[bool]:
        """Return for each key whether the block of one group can be loaded, as far as is known.

        Raises `InvalidTerms` for a number that no group has.
        """
        whole("group", group, 0, self._groups - 1)
        groups = self._groups_here()
        if not groups:
            return [False] * len(keys)
        return groups[group].has_each(keys)

    def counts(self) -> list[int]:
        """Return how many blocks of each group can be loaded; nothing without a server."""
        return [len(known.tiers) for known in self._groups_here()]

    def record(self, every: bool = False) -> None:
        """Keep changes from now on for `take_events`.

        ``every``: of the blocks of all groups, and the losses that were missed between two
        sessions, of tiers without a name.
        """
        with self._runtime.lock:
            self._every = every
            self._recorded = self._groups if every else 1

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait for a server, at most so many seconds; return whether its index is here.

        Raises `InvalidTerms` with the sentence of a server that has another number of groups, or
        that refuses the ranks of the engine.
        """
        return self._link.wait(seconds("timeout", timeout))

    def close(self) -> None:
        """Leave the server."""
        if not self._runtime.process.forked:
            self._link.close()

    def _groups_here(self) -> list[Known]:
        """Return what is known of each group; nothing in a forked process, where it stands
        still."""
        return [] if self._runtime.process.forked else self._known

    def _stored(self) -> list[list[Known]]:
        left = iter(self._groups_here())
        made = [[*islice(left, many)] for many in self.parts]
        return made if made[0] else []

    # --- for the link

    async def _began(self, address: str, followed: Followed) -> None:
        """Read the index."""
        self._followed = followed
        numbers = [n for n, many in enumerate(self.parts) for _ in range(many)]
        rows = self._rules(len(self.parts)).numbers(False)
        sizes = zip(numbers, followed.nbytes, strict=False)
        self.block_bytes = sum(nbytes for number, nbytes in sizes if number in rows)
        self.bucket = BucketAnswers(self._look_up) if followed.bucket else None
        await self._read(address, followed.session)

    def _ended(self, session: Session) -> None:
        self._followed = Followed(0, (), ())
        self._left = self._known or self._left
        self._known = []
        self._losses = self.losses + 1
        self.bucket = None

    async def _look(self, session: Session) -> None:
        """Read the index again if changes were missed."""
        if self._number < 0:
            await self._read(session.address, session.number)

    async def _read(self, address: str, session: int) -> None:
        """Read a snapshot of the index, and apply the changes that have come since."""
        self._waiting = []
        groups = range(self._groups)
        read = [await self._read_group(address, session, group) for group in groups]
        waiting = self._waiting
        self._waiting = None
        if self._followed.session != session:  # it has ended
            return
        self._losses += 1
        known = [each for each, _ in read]
        if self._every:
            self._events += missed(self._known or self._left, known)
        self._left = []
        self._known = known
        # Changes before a snapshot do no harm: those after them follow in order.
        self._number = min(number for _, number in read)
        self.apply(waiting)

    async def _read_group(self, address: str, session: int, group: int) -> tuple[Known, int]:
        """Return the blocks of a group, and the number of the last change before them."""
        known = Known(self.bucket)
        more = True
        page = 0
        while more:
            question = AskKeys(session, group, page)
            answer = await self._channel.answer(address, question, KeysPage, PATIENT)
            await Work(known.add_page, answer)  # of thousands of keys
            more = answer.more
            page += 1
        return known, answer.number

    def _take(self, peer: Peer, message: Changes) -> None:
        """Take changes."""
        with self._runtime.lock:
            if message.session != self._followed.session:
                return
            if self._waiting is not None:
                self._waiting += message.changes
            elif self._number >= 0:
                self.apply(message.changes)

    def _look_up(self, keys: Keys, first: int) -> None:
        """Have the server look up blocks in the bucket: those that all groups have."""
        session = self._link.session
        if session is not None:
            some = tuple(keys[:MOST_LOOKED_UP])
            self._link.post(session, LookUp(session.number, some))

    def _looked_up(self, peer: Peer, message: LookedUp) -> None:
        """Take the end of a lookup."""
        bucket = self.bucket
        if bucket is not None and message.session == self._followed.session:
            bucket.ended(message.keys, message.count, message.answers)

    def apply(self, changes: Iterable[Changed]) -> None:
        """Apply changes in order, in a step; after a gap have all read again."""
        for changed in changes:
            if changed.number <= self._number:
                continue
            if changed.number > self._number + 1:  # some are missing: read all again
                self._number = -1
                self._link.wake()
                return
            self._number = changed.number
            forms = self._followed.forms
            for known, some in zip(self._known, forms, strict=True):
                if changed.form in some:
                    known.change(changed)
            self._losses += not changed.stored
            if any(changed.form in some for some in forms[: self._recorded]):
                self._events.append(
                    Change(changed.number, changed.key, changed.tier, changed.stored, changed.why)
                )


# ------------------------------------------------------------------------------------------------
# `StoreClient`: the blocks of a rank, in the store of the server of its host.

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------
# The rows of a server's store, mapped by a rank.


class RowSides(NamedTuple):
    """How a rank copies between rows and its view.

    Attributes:
        inner: the rank's part of the rows; None: the rows have nothing of it.
        outer: arguments of `KVView.slice` for the rank's view.
        cells: what is copied of each block.
    """

    inner: KVView | None
    outer: Slices
    cells: int


class MappedRows:
    """The rows of a server's store in this process.

    Args:
        handle: as the server has shared them.
        device: that copies from and to them; None or the CPU: none, so they are not registered.

    Raises `PeerError` and `Unsupported` as `open_shared` does.

    Attributes:
        pinned: copies of a device run at the link, and the host does not wait for them.
    """

    def __init__(self, handle: bytes, device: torch.device | None) -> None:
        here = rows_here.get(handle)
        self.pinned = False
        self._memory: pinned.PinnedMemory | None = None
        self._tensor = open_shared(handle) if here is None else here
        self._sides: Bounded[tuple[int, str], RowSides] = Bounded("sides of mapped rows", 256)
        if device is None or device.type == "cpu":
            return
        self.pinned = self._tensor.is_pinned()
        if not self.pinned and pinned.why_not_register() is None:
            with inside(device):
                self._memory = pinned.register(self._tensor, unit=self._tensor.shape[1])
            self._tensor = self._memory.view(torch.uint8, self._tensor.shape)
            self.pinned = self._memory.pinned

    def sides(self, part: BlockForm, form: str) -> RowSides:
        """Return how a rank copies between its part and rows of a form, by its JSON; empty: of
        whole blocks."""
        return self._sides.get_or_make((id(part), form), lambda: self._made(part, form))

    def copy(
        self,
        part: BlockForm,
        form: str,
        crossing: Crossing,
        view: KVView,
        rows: Sequence[int],
        at: Sequence[int],
        saves: bool,
    ) -> tuple[int, Mask]:
        """Copy blocks between rows of a form and a rank's view.

        Args:
            part: the form of the rank's part of the blocks.
            form: its JSON; empty: of whole blocks.
            rows, at: the number of each row, and the place of its block among those of the
                crossing.
            saves: the copy goes into the rows.

        Returns:
            What is copied of each block, as `cells_of` has it; and the blocks that do not fit into
            packed slots, bool ``[rows]``.
        """
        sides = self.sides(part, form)
        unfit: Mask = np.zeros(len(rows), np.bool_)
        if sides.inner is None:
            return sides.cells, unfit
        outer = view.slice(**sides.outer) if form else view
        if saves:
            unfit, _ = copy_fitting(crossing, sides.inner, outer, np.array(rows), np.array(at))
        else:
            crossing.copy(sides.inner, outer, rows, at)
        return sides.cells, unfit

    def _made(self, part: BlockForm, form: str) -> RowSides:
        other = BlockForm.from_json(form) if form else whole_form(part)
        common = part.part_of(other)
        if common is None:
            return RowSides(None, {}, 0)
        of_rows, of_view = common
        with torch.inference_mode(False):  # copies write them in any mode
            inner = other.view(self._tensor).slice(**of_rows)
        cells = cells_of(other) & cells_of(part)
        return RowSides(inner, of_view, cells)

    def close(self) -> None:
        """Release the registration; views that are in use retain the memory."""
        if self._memory is not None:
            self._memory.close()


# ------------------------------------------------------------------------------------------------
# A load or a save through a server: its handle, what it asks for, and its copies.

#: Seconds after its deadline for which a load waits for the server to end it.
GRACE = 0.5
#: Helpers that copy for loads, and as many that copy for saves.
WIDTH = 2
#: Seconds between two looks at a copy that was issued.
POLL = 5e-4

_log = RateLimitedLog(logging.getLogger(__name__))


class Piece(NamedTuple):
    """A request of a transfer, of at most `MOST_KEYS` keys.

    Attributes:
        number: of the request.
        first: the number of its first block in the transfer.
        blocks: how many it has.
    """

    number: int
    first: int
    blocks: int


#: Rows that the caller's thread copies for a request.
Hit: TypeAlias = tuple[Piece, Grant]


class ServerTransfer(Handle):
    """A load or a save through a server. It never raises: what did not land is in `landed`.

    Attributes:
        saves: it is a save.
        pieces: its requests.
    """

    def __init__(
        self,
        blocks: ServerBlocks,
        view: KVView,
        crossing: Crossing,
        keys: int,
        priority: Priority,
        saves: bool,
    ) -> None:
        """Begin the requests, which have ended if there is no server.

        Raises the errors of copies that are impossible.
        """
        self._client = client = blocks.client
        self._runtime = client.runtime
        self._link = client.link
        self._session = session = client.link.session
        self._group = blocks.group
        self._form = blocks.form
        self._cells = blocks.cells
        self._view = view
        self._crossing = crossing
        self._priority = priority
        self.saves = saves
        # The runtime's lock guards what follows.
        self._end = End(client.runtime, keys)
        self._end.stop_work = self._stop
        size = blocks.form.raw.payload_bytes
        super().__init__(self._end, missing="skip", block_bytes=size)
        self._released = End(client.runtime, keys)
        if saves:
            self.add_release(self._released)
        self._closed = False  # no copy begins: it was cancelled, is late, or lost its server
        self._copying = 0  # leases whose copies are under way in helpers
        self._issuing = 0  # leases whose copies were issued on the caller's stream
        self._covered = dict[int, int]()  # the cells that have come of blocks in several rows
        if session is not None:
            crossing.prepare(self._rows_of(session))
        with self._runtime.lock:
            self.pieces = client.begin(self, keys)
            # First answers that have not come, and leases whose copies have not begun.
            self._queued = len(self.pieces)
            # The requests that may get more rows, and those of a save that have not ended.
            self._lacking = {piece.number for piece in self.pieces}
            self._unstored = {*self._lacking} if saves else set[int]()
            # A session that ended before they began has ended none of them.
            if session is None or self._link.session is not session:
                self._session = None
                self._closed = True
            self._note()

    def _stop(self, state: str, error: Exception) -> bool:
        """Copy no further block; return whether some blocks will not be copied. Runs in a step."""
        if self._closed:
            return False
        self.close()
        session = self._session
        if session is not None:
            for piece in self.pieces:  # nothing waits for them any longer
                self._link.post(session, Stop(session.number, piece.number))
        return True

    # --- how far it is

    def close(self) -> None:
        """Begin no further copy, and wait for no further rows. Runs in a step."""
        self._closed = True
        self._note()

    def take(self, piece: Piece, progress: Progress, answer: bool = False) -> None:
        """Note what the server says about a request. ``answer``: for the first time."""
        with self._runtime.lock:
            self._queued += len(progress.grants) - answer
            if not progress.more:
                self._lacking.discard(piece.number)
            if progress.stored is not None:
                stored = np.frombuffer(progress.stored, np.bool_)
                self._end.landed[piece.first : piece.first + piece.blocks] = stored
                self._unstored.discard(piece.number)
            self._note()

    def start_copy(self, issues: int = 0) -> bool:
        """Note that a copy by a helper begins; return False if it must not.

        ``issues``: so many copies begin on the stream of the caller instead.
        """
        with self._runtime.lock:
            self._queued -= issues or 1
            if self._closed:
                self._note()
                return False
            self._copying += not issues
            self._issuing += issues
            return True

    def end_copy(self, piece: Piece, grant: Grant, cells: int) -> None:
        """Note that a copy of a helper has ended, which brought cells of blocks."""
        loaded = cells and not self.saves
        blocks = [piece.first + place for place in grant.places] if loaded else []
        with self._runtime.lock:
            self._copying -= 1
            for block in blocks:
                came = self._covered.pop(block, 0) | cells
                if came == self._cells or not grant.form:
                    self._end.landed[block] = True
                else:
                    self._covered[block] = came
            self._note()

    def end_issued(self, copies: int) -> None:
        """Note that so many copies that were issued have ended."""
        with self._runtime.lock:
            self._issuing -= copies
            self._note()

    def is_released(self) -> bool:
        """Return whether no copy is under way but those that were issued, and none follows. Runs in
        a step."""
        left = self._queued or self._lacking
        return not self._copying and (self._closed or not left)

    def _note(self) -> None:
        """Note the ends that have come, and forget the requests after all. Runs in a step."""
        if not self.is_released():
            return
        ends = [self._released]
        if self._closed or not self._unstored:
            ends.append(self._end)
        for end in ends:
            if not end.ended:
                end.finish(None)
        if self._end.ended and not self._issuing:
            self._client.forget(self.pieces)

    # --- requests

    def _save(
        self, keys: list[bytes], after: Sequence[bytes | None], deadline: float | None
    ) -> None:
        """Request rows, and have helpers copy into them. `ServerBlocks` calls it.

        ``after``: for each key the one that it follows.
        """
        session = self._session
        if session is None:
            return
        try:
            self._be_due(deadline)
            for piece in self.pieces:
                some = slice(piece.first, piece.first + piece.blocks)
                before = after_of(after[some], keys[some])
                words = session.number, piece.number, self._group, tuple(keys[some])
                request = Save(*words, before, self._priority)
                self._runtime.start(self._ask_later(session, piece, request))
        except BaseException:  # also an interrupt: no caller has a handle
            self.cancel()
            raise

    def _load(self, keys: list[bytes], deadline: float | None, by_layer: bool) -> None:
        """Request rows, and copy those that are there. `ServerBlocks` calls it."""
        if by_layer:
            self.layers = [self] * self._view.layers
        session = self._session
        if session is None:
            return
        rows: MappedRows = session.data
        here = self._crossing.is_for_caller(len(keys) * self._form.payload_bytes, rows.pinned)
        hits = list[Hit]()
        try:
            for piece in self.pieces:
                some = tuple(keys[piece.first : piece.first + piece.blocks])
                words = session.number, piece.number, self._group, some
                request = Load(*words, deadline or 0.0, self._priority)
                later = list[Grant]()
                for grant in self._runtime.run(self._ask, session, piece, request):
                    if here and not grant.form:
                        hits.append((piece, grant))
                    else:
                        later.append(grant)
                self.copy_later(session, piece, later)
            if hits:
                self._issue(session, hits)
            self._be_due(deadline)
        except BaseException as error:  # also an interrupt: no caller has a handle
            self.cancel()
            if not isinstance(error, Exception):  # no one knows the rows of an answer that is lost
                self._link.lose(session, "A load was interrupted.")
            raise

    def _be_due(self, deadline: float | None) -> None:
        """Cancel what has not ended in so many seconds, and the server has not ended either."""
        if deadline is not None and not self._end.ended:
            until = self._runtime.time() + deadline + GRACE
            self._runtime.start(self._end.cancel_later(until))

    def _rows_of(self, session: Session) -> KVView:
        """Return the rank's part of rows of whole blocks."""
        rows: MappedRows = session.data
        inner = rows.sides(self._form, "").inner
        assert inner is not None  # a rank has a part of whole blocks
        return inner

    async def _ask_later(self, session: Session, piece: Piece, request: Save) -> None:
        """Request rows in turn, and have them copied."""
        grants = await self._in_turn(self._ask, session, piece, request)
        self.copy_later(session, piece, grants)

    async def _ask(self, session: Session, piece: Piece, request: Load | Save) -> Sequence[Grant]:
        """Request rows, and return those that are there; without an answer the request ends."""
        answer = Progress(session.number, piece.number, (), False, bytes(piece.blocks))
        if not self._closed:
            try:
                timeout = PATIENT if self.saves else ASKING
                answer = await self._link.ask(session, request, Progress, timeout)
            except PortaKVError as error:
                kind = "save" if self.saves else "load"
                _log.warning(kind, "A %s of %d blocks ends: %s", kind, piece.blocks, error)
        self.take(piece, answer, answer=True)
        return answer.grants

    async def _in_turn(self, steps: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Return the result of a coroutine once few others of loads, or of saves, run."""
        limit = self._client.saves if self.saves else self._client.loads
        await limit.acquire(priority=self._priority)
        try:
            return await steps(*arguments)
        finally:
            limit.release()

    # --- copies

    def copy_later(self, session: Session, piece: Piece, grants: Sequence[Grant]) -> None:
        """Have helpers copy rows."""
        for grant in grants:
            self._runtime.start(self._in_turn(self.copy, session, piece, grant))

    async def copy(self, session: Session, piece: Piece, grant: Grant) -> None:
        """Copy rows in a helper, and report that."""
        if not self.start_copy():
            await self._report(session, grant, False)
            return
        rows: MappedRows = session.data
        at = [piece.first + place for place in grant.places]
        terms = (self._form, grant.form, self._crossing, self._view, grant.rows, at)
        cells = 0
        landed = False
        unfit: Mask | None = None
        try:
            cells, unfit = await Work(rows.copy, *terms, self.saves)
            landed = True
        except PortaKVError as error:
            _log.warning("copy", "A copy failed: %s", error)
        finally:
            self.end_copy(piece, grant, cells)
            await self._report(session, grant, landed, unfit)

    async def _report(
        self, session: Session, grant: Grant, landed: bool, unfit: Mask | None = None
    ) -> None:
        """Report the end of a copy to the server. ``unfit``: the blocks that were not packed."""
        mask = np.full(len(grant.places), landed, np.uint8)
        if unfit is not None:
            mask[unfit] = UNFIT
        await self._link.tell(session, Report(session.number, grant.lease, mask.tobytes()))

    def _issue(self, session: Session, hits: Sequence[Hit]) -> None:
        """Copy rows on the caller's current stream."""
        rows: list[int | None] = [None] * self._end.blocks
        for piece, grant in hits:
            for place, row in zip(grant.places, grant.rows, strict=True):
                rows[piece.first + place] = row
        loan = Loan((), self._crossing)
        loan.rows = rows
        begun = False
        landed = False
        try:
            begun = uninterrupted(
                partial(self.start_copy, len(hits)),
                lambda begun: self.end_issued(len(hits) * begun),
            )
            if begun:
                by_layer = bool(self.layers) and None not in rows
                _, layers = self._crossing.issue(self._rows_of(session), loan, by_layer)
                if layers:
                    every = self._end.blocks
                    size = self._block_bytes // len(layers)
                    self.layers = [Handle.of_issued(every, each, (), size) for each in layers]
            landed = True
        finally:
            uninterrupted(partial(self._note_issued, session, loan, hits, begun, landed))

    def _note_issued(
        self, session: Session, loan: Loan, hits: Sequence[Hit], begun: bool, landed: bool
    ) -> None:
        """Note the copy that was issued, if one was, and have its end followed."""
        if loan.end is None:
            loan.cancel()
        if begun and loan.end is not None:
            blocks = np.array([row is not None for row in loan.rows])
            self.add_issued(Transfer((loan.end,)), blocks)
        with self._runtime.lock:
            self._note()
        self._runtime.start(self._follow(session, loan, hits, begun, landed))

    async def _follow(
        self, session: Session, loan: Loan, hits: Sequence[Hit], begun: bool, landed: bool
    ) -> None:
        """Wait for a copy that was issued, and report its end."""
        while not loan.ended():
            await Wait(until=self._runtime.time() + POLL)
        if begun:
            self.end_issued(len(hits))
        for _, grant in hits:
            await self._report(session, grant, landed)


# ------------------------------------------------------------------------------------------------
# The blocks of a group of layers of a rank, in the store of a server.


class ServerBlocks:
    """The blocks of one group of layers of a rank. `StoreClient` makes it.

    It saves and loads as a `FormStore` does, but never raises for a server that is gone, and waits
    for no tier. Such a server pins and deletes nothing. Blocks are known to be there by an index
    that follows the server; without one, none is.

    Attributes:
        form: of the rank's part of the blocks.
        index: of the server, with groups as the rank has them; None: this process follows none.
        client: of the rank.
        group: its number.
        cells: of the rank's part; see `cells_of`.
    """

    def __init__(self, client: StoreClient, group: int, form: BlockForm) -> None:
        self.form = form
        self.index: ServerIndex | None = None
        self.client = client
        self.group = group
        self.cells = cells_of(form)

    def has(self, key: bytes) -> bool:
        """Return whether a block can be loaded, as far as is known here."""
        return self.has_each((key,))[0]

    def has_each(self, keys: Keys) -> list[bool]:
        """Return which blocks can be loaded, as far as is known here."""
        return [False] * len(keys) if self.index is None else self.index.holds(self.group, keys)

    def lookup(self, keys: Keys, timeout: float | None = None) -> int:
        """Return the number of leading blocks that can be loaded; waits for nothing."""
        return [*self.has_each(keys), False].index(False)

    def touch(self, keys: Keys) -> None:
        """Do nothing: a server records no use but that of loads."""

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        after: After = None,
        priority: Priority = "background",
        deadline: float | None = None,
    ) -> ServerTransfer:
        """Save the rank's part of blocks of a view; see `FormStore.save`.

        A block is stored once all ranks of the engine have saved their parts of it, in calls with
        equal keys. Blocks that find no free staging are dropped, and those that are not stored
        within ``deadline`` seconds.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `FormStore.save` does.
        """
        checked = _checked(keys, priority)
        before = predecessors(after, checked)
        transfer = self._transfer(view, blocks, len(checked), priority, True, deadline)
        transfer._save(checked, before, deadline)
        return transfer

    def load(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        by_layer: bool = False,
        missing: Literal["skip"] = "skip",
    ) -> ServerTransfer:
        """Load the rank's part of blocks into a view; see `FormStore.load`.

        Blocks that do not come within ``deadline`` seconds are missing. The call sends one request
        for each 960 keys to the server. It copies blocks of the host tier itself, ordered on the
        current stream of the view's device, except for a large copy on the host. Workers copy the
        others. ``by_layer``: `Handle.layers` has an end for each layer, which is the end of all
        layers unless the call copies all blocks.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `FormStore.load` does.
        """
        checked = _checked(keys, priority)
        one_of("missing", missing, ("skip",))
        flag("by_layer", by_layer)
        transfer = self._transfer(view, blocks, len(checked), priority, False, deadline)
        transfer._load(checked, deadline, by_layer)
        return transfer

    def pin(self, keys: Keys) -> Pins:
        """Keep blocks from eviction until `Pins.release`, as far as the server has them.

        Waits for the server's answer, two seconds at most; not if an index knows none of the
        blocks. The end of the session, such as that of the server, ends the pins too.
        """
        checked = check_keys(keys)
        pins = Pins(len(checked))
        if self.index is not None and not any(self.has_each(checked)):
            return pins
        for session, first, some in self._batches(checked):
            number = next(self.client.numbers)
            done = self._done(session, Pin(session.number, number, self.group, some))
            places = (first + np.flatnonzero(done)).tolist()
            release = partial(self.client.link.post, session, Stop(session.number, number))
            if places:
                pins.add(places, release)
            else:
                release()
        return pins

    def delete(self, keys: Keys) -> Mask:
        """Forget blocks, for all processes; return which were there, bool ``[keys]``.

        Waits for the server's answer, two seconds at most.
        """
        checked = check_keys(keys)
        gone = np.zeros(len(checked), np.bool_)
        for session, first, some in self._batches(checked):
            done = self._done(session, Delete(session.number, self.group, some))
            gone[first : first + len(done)] = done
        return gone

    def _batches(self, keys: list[bytes]) -> Iterator[tuple[Session, int, tuple[bytes, ...]]]:
        """Yield the session, the number of the first key and the keys of each request."""
        session = None if self.client.runtime.process.forked else self.client.link.session
        if session is not None:
            for first in range(0, len(keys), MOST_KEYS):
                yield session, first, tuple(keys[first : first + MOST_KEYS])

    def _done(self, session: Session, message: Pin | Delete) -> Mask:
        """Return for which blocks the server has done a request; for none without an answer."""
        if self.client.link.session is session:
            with suppress(PortaKVError):  # the session has ended, or ends now
                ask = partial(self.client.link.ask, session, message, Done, ASKING)
                answer = self.client.runtime.run(ask)
                done: Mask = np.frombuffer(answer.done, np.bool_).copy()
                return done
        return np.zeros(len(message.keys), np.bool_)

    def _transfer(
        self,
        view: KVView,
        blocks: IdList,
        keys: int,
        priority: Priority,
        saves: bool,
        deadline: float | None,
    ) -> ServerTransfer:
        """Return a transfer of blocks of a view. Raises `StoreError` in a forked process."""
        if deadline is not None:
            seconds("deadline", deadline)
        if self.client.runtime.process.forked:
            raise StoreError(
                "Expected the client of a store server of this process, got one of the process "
                "that this one was forked from. Make another."
            )
        crossing = Crossing(view, blocks, keys, self.form.block_size, store=saves)
        return ServerTransfer(self, view, crossing, keys, priority, saves)


def _checked(keys: Keys, priority: Priority) -> list[bytes]:
    """Return keys of 32 bytes that differ; reject wrong terms."""
    checked = different_keys(keys)
    one_of("priority", priority, SLACK)
    return checked


class StoreClient:
    """The blocks of a rank of an engine, in the store of the server of its host.

    It finds the server whenever one serves. As long as none does, nothing is loaded, and what is
    saved is dropped; the log has a line about it.

    Args:
        place: where the processes of the host find the server.
        forms: of the rank's part of the blocks of each group of layers, with its layers and heads
            among those of the model.
        engine: its name. All ranks that save together have the same one.
        device: of the rank's caches, for which the rows of the store are registered.

    Raises `InvalidTerms` for wrong arguments.

    Attributes:
        blocks: of each group of layers.
        link: the connection to the server.
        runtime: of the handles of loads and saves.
        numbers: of requests and locks.
        loads, saves: let few of these be asked for, and copied, at a time.
    """

    def __init__(
        self,
        place: Place,
        forms: Sequence[BlockForm],
        engine: str = "",
        device: torch.device | None = None,
    ) -> None:
        instance("place", place, Place)
        parts = [instance("forms", x, BlockForm) for x in items("forms", forms, "forms")]
        texts = tuple(part.json() for part in parts)
        self._device = device
        self._mapped: MappedRows | None = None
        self.runtime = runtime()
        self.numbers = count(1)
        self.loads = Limit(self.runtime, WIDTH)
        self.saves = Limit(self.runtime, WIDTH)
        self._open = dict[int, tuple[ServerTransfer, Piece]]()  # by number of the request
        self._forgotten = Signal(self.runtime)  # tells of requests that have ended
        name = text("engine", engine, least=0)
        process = process_here()  # before the channel, which an error would leave open
        channel = Channel()
        hello = partial(Join, name, process, channel.address, texts)
        channel.serve(Progress, self._progress)
        self.link = Link(
            place, channel, hello, Joined, self._began, self._ended, ready=self._is_idle
        )
        self.blocks = [ServerBlocks(self, number, part) for number, part in enumerate(parts)]
        self.link.start()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait for a server, at most so many seconds; return whether one serves.

        Raises `InvalidTerms` with the sentence of a server that refuses the blocks of this rank.
        """
        return self.link.wait(seconds("timeout", timeout))

    def statistics(self) -> dict[str, list[dict[str, object]]]:
        """Return no figures: those of the store are the server's."""
        return {}

    def close(self, timeout: float = 10.0) -> None:
        """End the loads and saves, and leave the server."""
        timeout = seconds("timeout", timeout)
        if self.runtime.process.forked:
            return
        self.close_all()
        self._forgotten.block(self._is_idle, timeout)  # only copies under way are left
        self.link.close()
        if self._mapped is not None and self._is_idle():
            self._mapped.close()

    def begin(self, transfer: ServerTransfer, keys: int) -> list[Piece]:
        """Return the requests of a transfer of so many keys, under the runtime's lock."""
        pieces = [
            Piece(next(self.numbers), first, min(MOST_KEYS, keys - first))
            for first in range(0, keys, MOST_KEYS)
        ]
        for piece in pieces:
            self._open[piece.number] = transfer, piece
        return pieces

    def forget(self, pieces: Sequence[Piece]) -> None:
        """Forget the requests of a transfer that has ended, under the runtime's lock."""
        for piece in pieces:
            self._open.pop(piece.number, None)
        self._forgotten.notify()

    def close_all(self) -> None:
        """Begin no further copy, and wait for no further rows."""
        with self.runtime.lock:
            for transfer, _ in [*self._open.values()]:
                transfer.close()

    def _is_idle(self) -> bool:
        """Return whether no copy is under way, once there is no session."""
        return not self._open

    async def _began(self, address: str, joined: Joined) -> MappedRows:
        """Map the rows of a server, in place of those of the server before."""
        rows: MappedRows = await Work(self._map, joined.rows)
        return rows

    def _map(self, rows: bytes) -> MappedRows:
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        self._mapped = MappedRows(rows, self._device)
        return self._mapped

    def _ended(self, session: Session) -> None:
        self.close_all()

    def _progress(self, peer: Peer, progress: Progress) -> None:
        """Take rows of the server."""
        session = self.link.session
        if session is None or session.number != progress.session:
            return
        transfer, piece = self._open.get(progress.number, (None, None))
        if transfer is not None and piece is not None:
            transfer.take(piece, progress)
            transfer.copy_later(session, piece, progress.grants)
            return
        for grant in progress.grants:  # nothing waits for these rows
            report = Report(session.number, grant.lease, bytes(len(grant.places)))
            self.link.post(session, report)


class SharedStore:
    """The blocks of some forms in the store of a host, which this process serves if no other does.

    It has those calls of a `BlockStore` that pages need. A save waits for no other process.

    Args:
        forms: by their names.
        terms: where blocks are stored, equal in all processes.
        patience: seconds to wait for a server. Without one, blocks are missing until one serves.

    Raises `InvalidTerms` for forms that the server refuses, and as `StoreServer` does.
    """

    def __init__(self, forms: Mapping[str, BlockForm], terms: StoreTerms, patience: float) -> None:
        engine = token_hex(16)  # a separate one: the ranks of an engine save together
        place = place_of(terms, engine)
        self._server = StoreServer(terms, engine)
        self._client = StoreClient(place, [*forms.values()], engine)
        self._index = ServerIndex(place, engine, len(forms))
        self._blocks = dict(zip(forms, self._client.blocks, strict=True))
        for blocks in self._client.blocks:
            blocks.index = self._index
        try:
            if self._client.wait(patience):
                self._index.wait(patience)
        except BaseException:
            self.close()
            raise

    @property
    def serves(self) -> bool:
        """Return whether this process serves the store; others may."""
        return self._server.serves

    def of(self, name: str) -> ServerBlocks:
        """Return the blocks of a form, by its name."""
        return self._blocks[name]

    def listen(self) -> list[Change]:
        """Return the blocks that any process has stored or lost since the last call; the first one
        returns none."""
        self._index.record(every=True)
        return self._index.take_events()

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return how many blocks of each form the server has, as far as is known here."""
        counts = zip(self._blocks, self._index.counts(), strict=False)
        slots = [{"form": name, "state": "used", "value": count} for name, count in counts]
        return {"disk_slots": slots}

    def close(self, timeout: float = 10.0) -> None:
        """End the loads and saves within so many seconds, and leave the store to the others."""
        self._index.close()
        self._client.close(timeout)
        self._server.close(timeout)
