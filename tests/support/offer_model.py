# SPDX-License-Identifier: Apache-2.0
"""Owners, readers and offers of a model-based test of pulls, and what the model knows of each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from portakv import CopyPlan, KVView
from portakv.errors import PeerError, PortaKVError
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Answer, Check, Message, Renew
from portakv.migrate.owner import Offer, Owner
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.tasks import Wait, runtime
from support.migrate_pulls import LAYOUT, MODEL, SMALL, Copies, Rows
from support.waits import LIMIT, until

PATIENCE = LIMIT  # seconds after which a pull counts as hanging
SIZE = 16  # tokens of an owner's block
TOKENS = 20  # of each offer: two blocks of an owner, less than one of a reader
ENDED = ("expired", "revoked", "taken", "lost")
#: The reason that a reader gets for an offer that has ended.
REASONS = {
    "expired": "its lease expired",
    "revoked": "its owner revoked it",
    "taken": "have taken it",
    "lost": "a reader that started to read it is gone",
}


Bytes: TypeAlias = npt.NDArray[np.int16]
T = TypeVar("T")


def rows_of(layer: Bytes, blocks: list[int]) -> Bytes:
    """Return the offered tokens of blocks, ``[kv, token, head, dim]``, copied."""
    rows: Bytes = np.concatenate([layer[:, block] for block in blocks], 1)
    return rows[:, :TOKENS]


class Clock:
    """The time of owners, which stands still between calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class PacedCopies(Copies):
    """The host's backend; no copy of the main thread ends while ``go`` is not set, though its
    bytes have been read."""

    name = "paced"
    go: ClassVar = threading.Event()

    def observe(self, plan: CopyPlan) -> Any:
        if self.go.is_set() or threading.current_thread() is not threading.main_thread():
            return None
        return SimpleNamespace(done=self.go.is_set, wait=partial(self.go.wait, PATIENCE))


class PacedOwner(Owner):
    """An owner that is asked to confirm no offer while ``go`` is not set (`PacedChannel`)."""

    #: How the two owners of a test are exposed; none: either way.
    exposed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *shards: Any, clock: Clock, **options: Any) -> None:
        self.go = threading.Event()
        self.go.set()
        self.requested = 0  # confirmations that readers requested
        self.confirmed = 0  # confirmations that were answered
        self.renewals = list[tuple[bytes, float]]()
        super().__init__(*shards, model=MODEL, **options)
        self.now = clock

    def _check(self, peer: Peer, check: Check) -> Answer:
        answer = super()._check(peer, check)
        self.confirmed += 1
        return answer

    def _renew(self, peer: Peer, renew: Renew) -> Answer:
        self.renewals.append((renew.offer, renew.seconds))
        return super()._renew(peer, renew)


@dataclass(eq=False)
class Known:
    """An offer, and what the model knows of it."""

    offer: Offer
    side: Side
    epoch: bytes
    blocks: list[int]
    rows: Bytes  # the offered bytes, when they were offered
    until: float
    latest: float
    readers: int
    state: str = "held"
    begun: set[bytes] = field(default_factory=set)  # readers that started to read it
    through: set[bytes] = field(default_factory=set)  # readers that have the rows, or are gone
    compared: bool = False  # after its end

    def end(self, state: str) -> None:
        """End the offer: its owner may use the blocks again, and does so immediately."""
        assert self.state == "held"
        self.state = state
        self.side.counts[state] += 1
        self.side.release(self.blocks)

    def pass_by(self, reader: bytes, state: str) -> None:
        """Count a reader that has the rows or is gone."""
        self.begun.discard(reader)
        self.through.add(reader)
        if len(self.through) >= self.readers:
            self.end(state)


class Side:
    """An owner of one layer of two, its memory and its offers."""

    def __init__(self, kind: type[PacedOwner], layer: int, expose: str, clock: Clock) -> None:
        self.kind = kind
        self.clock = clock
        self.terms: Any = {"expose": "staging", "staging": SMALL} if expose == "staging" else {}
        self.rows = Rows()
        self.bytes = self.rows.whole.numpy()
        view = KVView([self.rows.whole[0]], LAYOUT)
        self.shard = Shard(view, layers=(layer, layer + 1, 2))
        self.free = list(range(16))
        self.fill = layer
        self.offers = list[Known]()
        self.channel = Channel(timeout=PATIENCE)
        self.make()

    def make(self) -> None:
        """Make an owner; a channel has one at a time."""
        self.counts = dict.fromkeys(ENDED, 0)
        self.owner = self.kind(self.channel, self.shard, clock=self.clock, **self.terms)

    def replace(self) -> None:
        """Close the owner, which offers nothing from then on, and make another."""
        self.owner.close()
        self.revoke_all()
        self.check()
        with pytest.raises(PeerError, match="got one that is closed"):
            self.owner.offer([0, 1], tokens=TOKENS)
        self.make()

    def release(self, blocks: list[int]) -> None:
        """Take blocks back, and overwrite them."""
        assert not {*blocks} & {*self.free}, "blocks were released twice"
        self.free += blocks
        self.fill = (self.fill + 7) % 30_000
        self.bytes[:, :, blocks] = self.fill

    def offer(self, lease: float, max_lease: float, readers: int) -> Known:
        """Offer two free blocks."""
        blocks = [self.free.pop(0) for _ in range(2)]
        self.fill = (self.fill + 7) % 30_000
        self.bytes[0, :, blocks] = np.arange(self.fill, self.fill + 2 * SIZE).reshape(
            2, 1, SIZE, 1, 1
        )
        terms = {"lease": lease, "max_lease": max_lease, "readers": readers}
        offer = self.owner.offer(blocks, tokens=TOKENS, **terms)  # type: ignore[arg-type]
        now = self.clock()
        rows = rows_of(self.bytes[0], blocks)
        made = Known(
            offer, self, self.owner.epoch, blocks, rows, now + lease, now + max_lease, readers
        )
        self.offers.append(made)
        return made

    @property
    def current(self) -> list[Known]:
        """Return the offers that hold."""
        return [each for each in self.offers if each.state == "held"]

    def revoke_all(self) -> None:
        """Note that every offer was revoked."""
        for known in self.current:
            known.end("revoked")

    def expire(self) -> None:
        """Note which leases have expired."""
        for known in self.current:
            if self.clock() > known.until:
                known.end("expired")

    def renew(self) -> None:
        """Note the renewals that readers requested."""
        for number, seconds in self.owner.renewals:
            for known in self.current:
                if known.offer.number == number and known.epoch == self.owner.epoch:
                    wanted = min(self.clock() + seconds, known.latest)
                    known.until = max(known.until, wanted)
        self.owner.renewals.clear()

    def check(self) -> None:
        """Compare all offers and the figures of the owner with the model."""
        for known in self.offers:
            if known.compared:
                continue
            assert known.offer.state == known.state, f"{known.offer.state} for {known.state}"
            known.compared = known.state != "held"
            assert known.offer.taken(0) == known.compared
        statistics = self.owner.statistics()
        ends = {state: statistics.get(state, 0) for state in ENDED}
        assert ends == self.counts, f"the owner counted {ends}, the model {self.counts}"
        assert statistics["held"] == len(self.current)
        assert len(self.free) + 2 * len(self.current) == 16

    def close(self) -> None:
        """Close the owner and its channel."""
        self.owner.go.set()
        self.owner.close()
        self.channel.close()


class PacedChannel(Channel):
    """A reader's channel. It keeps a question for confirmation until the owner's ``go`` is set.

    The owner cannot keep it: one loop answers for all channels of this process.
    """

    def __init__(self, sides: list[Side]) -> None:
        super().__init__(timeout=PATIENCE)
        self.sides = sides

    async def answers(
        self, requests: Sequence[tuple[str, Message]], kind: type[T], timeout: float | None = None
    ) -> list[T | PortaKVError]:
        async def answer_of(address: str, message: Message) -> T | PortaKVError:
            if isinstance(message, Check):
                (side,) = (side for side in self.sides if side.channel.address == address)
                side.owner.requested += 1
                while not side.owner.go.is_set():
                    await Wait(until=runtime().time() + 1e-3)
            (answer,) = await super(PacedChannel, self).answers([(address, message)], kind, timeout)
            return answer

        return await runtime().together([answer_of(*request) for request in requests])


class Puller:
    """A reader of both layers, and what the model knows of its blocks."""

    def __init__(self, sides: list[Side]) -> None:
        self.sides = sides
        self.rows = Rows(8, 32, fill=-1)
        self.bytes = self.rows.whole.numpy()
        self.known: list[Bytes | None] = [self.bytes[:, :, n].copy() for n in range(8)]
        self.open()

    def open(self) -> None:
        """Open a channel and a reader."""
        self.channel = PacedChannel(self.sides)
        self.reader = Reader(self.channel, self.rows.shard, model=MODEL)

    def connect(self, pair: list[Known]) -> None:
        """Connect to the owners of two offers.

        One may have replaced another at its address, which `Reader.prepare` takes for connected.
        """
        self.reader.explain([known.offer.ticket for known in pair])

    def reported(self) -> bool:
        """Return True once the owners have been sent the ends of all pulls."""
        return until(lambda: self.reader.statistics()["pulls"] == 0, PATIENCE)

    def learn(self, block: int, pair: list[Known], published: bool) -> None:
        """Note what a block has after a pull; nothing is known after one that failed."""
        self.known[block] = None
        if published:
            for known, layer in zip(pair, self.bytes, strict=True):
                assert (rows_of(layer, [block]) == known.rows).all(), "published rows are wrong"
            self.known[block] = self.bytes[:, :, block].copy()

    def check(self) -> None:
        """Check that no other row was modified."""
        for block, expected in enumerate(self.known):
            if expected is not None:
                assert (self.bytes[:, :, block] == expected).all(), "a row was modified"
        assert (self.bytes[:, :, :, TOKENS:] == -1).all(), "rows past the tokens were modified"

    def close(self) -> None:
        """Close the reader and its channel."""
        self.reader.close()
        self.channel.close()
