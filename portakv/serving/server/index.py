# SPDX-License-Identifier: Apache-2.0
"""`ServerIndex`: a copy of the index of a server, which the server's feed keeps current."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from portakv.arguments import instance, seconds, text, whole
from portakv.errors import InvalidTerms
from portakv.migrate.channel import Channel, Peer
from portakv.serving.bucket import BucketAnswers
from portakv.serving.local import StoreIndex
from portakv.serving.server.link import PATIENT, Link, Place, Session, Sides, this_client
from portakv.serving.server.messages import (
    MOST_LOOKED_UP,
    AskKeys,
    Changed,
    Changes,
    Follow,
    Followed,
    KeysPage,
    LookedUp,
    LookUp,
    tier_of,
)
from portakv.storage.calls import Change
from portakv.storage.tiers.base import Keys
from portakv.tasks import Work, runtime


class Known:
    """The blocks of one form that a server has, and in which tiers."""

    def __init__(self) -> None:
        #: By key a number with a bit for each tier.
        self.tiers = dict[bytes, int]()
        self._names = dict[str, int]()  # the bits of tiers, by their names

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

    Raises `InvalidTerms` for wrong arguments.
    """

    def __init__(self, place: Place, engine: str = "", groups: int = 1) -> None:
        super().__init__()
        instance("place", place, Place)
        text("engine", engine, least=0)
        self._groups = whole("groups", groups, 1, 64)
        self._known: list[Known] = []  # of each group
        self._followed = Followed(0, (), ())
        self._every = False  # of all of them, and the losses between two sessions
        self._left: list[Known] = []  # what was known in the session before
        self._waiting: list[Changed] | None = None  # changes, while a snapshot is read
        self._runtime = runtime()  # its lock guards all
        self._channel = Channel()
        self._channel.serve(Changes, self._take)
        self._channel.serve(LookedUp, self._looked_up)
        hello = Follow(engine, this_client(), self._channel.address, groups)
        sides = Sides(lambda _: hello, Followed, lambda: True, self._began, self._ended, self._look)
        self._link = Link(place, self._channel, sides)
        self._link.start()

    def __enter__(self) -> ServerIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leading(self, keys: Keys) -> int | None:
        """Return how many leading blocks can be loaded; None if a bucket has yet to answer."""
        groups = self._groups_here()
        if not groups:
            return 0
        bucket = self.bucket
        count = len(keys)
        for known in groups:
            lacks = (n for n in range(count) if keys[n] not in known.tiers)
            if bucket is not None:
                lacks = (n for n in lacks if not bucket.has(keys[n]))
            count = next(lacks, count)
        return count if bucket is None else bucket.leading(keys, count)

    def has(self, key: bytes) -> bool:
        """Return whether a block can be loaded."""
        groups = self._groups_here()
        if groups and all(key in known.tiers for known in groups):
            return True
        bucket = self.bucket
        return bool(groups) and bucket is not None and bucket.has(key)

    def holds(self, group: int, keys: Keys) -> list[bool]:
        """Return for each key whether the block of one group can be loaded, as far as is known.

        Raises `InvalidTerms` for a number that no group has.
        """
        whole("group", group, 0, self._groups - 1)
        groups = self._groups_here()
        if not groups:
            return [False] * len(keys)
        tiers = groups[group].tiers
        return [key in tiers for key in keys]

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

    def answered(self, timeout: float = 10.0) -> bool:
        """Wait as `wait` does; return whether the index is here, or a server has refused the ranks.

        The log has the sentence of a refusal. The server may take the ranks later. Raises as `wait`
        for another reason.
        """
        limit = seconds("timeout", timeout)
        try:
            return self._link.wait(limit)
        except InvalidTerms:
            if not self._link.refused:
                raise
            return True

    @property
    def is_refused(self) -> bool:
        """Return whether a server has refused the ranks of the engine."""
        return self._link.refused

    def close(self) -> None:
        """Leave the server."""
        if not self._runtime.forked:
            self._link.close()

    def _groups_here(self) -> list[Known]:
        """Return what is known of each group; nothing in a forked process, where it stands
        still."""
        return [] if self._runtime.forked else self._known

    # --- for the link

    async def _began(self, address: str, followed: Followed) -> None:
        """Read the index."""
        self._followed = followed
        self.block_bytes = sum(followed.nbytes)
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
        known = Known()
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

    def _look_up(self, keys: Keys) -> None:
        """Have the server look up blocks in the bucket."""
        session = self._link.session
        if session is not None:
            ask = LookUp(session.number, tuple(keys[:MOST_LOOKED_UP]))
            self._runtime.start(self._link.tell(session, ask))

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
