# SPDX-License-Identifier: Apache-2.0
"""Pulls of a reader from an owner, each a simulated process of a schedule, and their judge.

The owner offers rows, by ticket or by name, complete or part by part. Each offer ends at a drawn
time: by its readers, by its lease, by `Offer.revoke`, or with its owner. Its blocks then have other
bytes immediately.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from portakv.errors import (
    OfferGone,
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferTimeout,
)
from portakv.migrate.channel import Channel
from portakv.migrate.owner import Offer, Owner, Ticket
from portakv.migrate.reader import Reader
from support.migrate_pulls import MODEL, Rows
from support.schedules import Schedule

TOKENS = 8  # of each offer: two blocks
BLOCKS = 16
NOTHING = -1
#: Seconds in which each pull ends, whatever happens to its owner.
PATIENCE = 120.0


@dataclass
class Drawn:
    """An offer as it is drawn, and what happens to it.

    Attributes:
        value: of its bytes.
        blocks: of the owner; ``into``: of the reader.
        fate: how it ends: "taken", "expires", "revoked", or "pulled": revoked when a pull begins.
        after: seconds after which it ends.
        delay: seconds after which it is made.
    """

    value: int
    blocks: list[int]
    into: list[int]
    fate: str
    after: float
    delay: float
    progress: str | None
    name: bytes
    offer: Offer | None = None
    pulls: list[Outcome] = field(default_factory=list)


@dataclass
class Outcome:
    """A pull of an offer, and why it may fail."""

    drawn: Drawn
    timeout: float | None
    cancel: float | None
    pull: Any = None
    error: PortaKVError | None = None


class Pulls:
    """Owner and reader of one schedule.

    The memory of both is the same for all schedules.
    """

    src = Rows(BLOCKS, 4, fill=NOTHING)
    dst = Rows(BLOCKS, 4, fill=NOTHING)

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.random = schedule.random
        self.owner_process = schedule.process("owner")
        self.reader_process = schedule.process("reader")
        self.src.whole.fill_(NOTHING)
        self.dst.whole.fill_(NOTHING)
        self.offers = [self.draw(number) for number in range(self.random.randint(1, 3))]
        self.killed = ""
        self.closed = False
        self.threads = list[Any]()

    def moment(self) -> float:
        """Draw some seconds: mostly less than a pull takes, by its waits."""
        return self.random.choice((0.0, 0.0, 1e-4, 2e-3, 0.02, 0.3))

    def draw(self, number: int) -> Drawn:
        """Draw an offer."""
        random = self.random
        blocks = [2 * number, 2 * number + 1]
        name = Random(number).randbytes(16) if random.random() < 0.4 else b""
        return Drawn(
            value=100 * (number + 1),
            blocks=blocks,
            into=[block + 6 for block in blocks],
            fate=random.choice(("taken", "taken", "expires", "revoked", "pulled")),
            after=self.moment(),
            delay=self.moment() if name else 0.0,
            progress=random.choice((None, None, "layers", "tokens")),
            name=name,
        )

    # --- the owner

    def write(self, drawn: Drawn, layers: range, tokens: range) -> None:
        """Write rows of an offer: each layer and each token has other bytes."""
        for layer in layers:
            for token in tokens:
                block = drawn.blocks[token // 4]
                self.src.whole[layer, :, block, token % 4] = drawn.value + 10 * layer + token

    def spoil(self, drawn: Drawn) -> None:
        """Use the blocks of an offer that has ended for other rows."""
        self.src.whole[:, :, drawn.blocks] = -drawn.value

    def begin_owner(self) -> None:
        """Make the owner."""
        self.owner_channel = Channel(timeout=5.0)
        self.owner = Owner(self.owner_channel, self.src.shard, model=MODEL)

    def live(self, drawn: Drawn) -> None:
        """Make an offer, have it end, and use its blocks again."""
        self.schedule.sleep(drawn.delay)
        if drawn.progress is None:
            self.write(drawn, range(2), range(TOKENS))
        lease = drawn.after + 1e-3 if drawn.fate == "expires" else 2000.0
        terms: Any = {"lease": lease, "progress": drawn.progress, "name": drawn.name or None}
        try:
            offer = drawn.offer = self.owner.offer(drawn.blocks, tokens=TOKENS, **terms)
        except PeerError:
            assert self.closed
            return
        if drawn.fate in ("revoked", "pulled"):
            self.schedule.begin(self.owner_process, self.revoke, drawn)
        try:
            if drawn.progress is not None:
                self.raise_mark(drawn, offer)
        except OfferGone:
            pass
        offer.taken(0.0 if drawn.fate == "taken" else None)

    def revoke(self, drawn: Drawn) -> None:
        """Revoke an offer at its time."""
        assert drawn.offer is not None
        if drawn.fate == "pulled":
            self.schedule.wait(lambda: drawn.pulls, 1.0)
        else:
            self.schedule.sleep(drawn.after)
        drawn.offer.revoke()

    def raise_mark(self, drawn: Drawn, offer: Offer) -> None:
        """Write the rows of an offer part by part."""
        for layer in range(2) if drawn.progress == "layers" else ():
            self.schedule.sleep(self.moment())
            self.write(drawn, range(layer, layer + 1), range(TOKENS))
            offer.raise_to(layer + 1)
        for token in range(0, TOKENS, 4) if drawn.progress == "tokens" else ():
            self.schedule.sleep(self.moment())
            self.write(drawn, range(2), range(token, token + 4))
            offer.raise_to(token + 4)

    def watch(self, drawn: Drawn) -> None:
        """Use the blocks of an offer again as soon as it has ended."""
        self.schedule.wait(lambda: drawn.offer is not None or self.closed)
        if drawn.offer is None:
            return
        while drawn.offer.state == "held":
            drawn.offer.taken(0.05)
        self.spoil(drawn)

    # --- the reader

    def begin_reader(self) -> None:
        """Make the reader."""
        self.reader_channel = Channel(timeout=5.0)
        self.reader = Reader(self.reader_channel, self.dst.shard, model=MODEL)

    def read(self, drawn: Drawn) -> None:
        """Pull an offer, cancel it perhaps, and wait for its end."""
        random = self.random
        timeout = random.choice((None, None, None, 1e-3, 0.05))
        cancel = random.choice((None, None, None, 0.0, 1e-3, 0.05))
        outcome = Outcome(drawn, timeout, cancel)
        if drawn.name:
            ticket = Ticket.of(self.owner_channel.address, self.owner.epoch, drawn.name)
        else:
            self.schedule.wait(lambda: drawn.offer is not None, 1.0)
            if drawn.offer is None:
                return  # the owner is gone
            ticket = drawn.offer.ticket
        by_layer = random.random() < 0.3
        drawn.pulls.append(outcome)
        try:
            pull = outcome.pull = self.reader.pull(
                ticket, drawn.into, by_layer=by_layer, timeout=timeout
            )
            if cancel is not None:
                self.schedule.sleep(cancel)
                pull.cancel()
            pull.synchronize(PATIENCE)
        except PortaKVError as error:
            outcome.error = error.with_traceback(None)
        self.judge(outcome)

    def judge(self, outcome: Outcome) -> None:
        """Judge how a pull has ended."""
        drawn = outcome.drawn
        error = outcome.error
        pull = outcome.pull
        if pull is not None:
            assert pull.ended, "a pull has not ended"
        if error is None:
            rows = self.dst.rows(drawn.into, TOKENS)
            expected = torch.arange(TOKENS) + drawn.value
            for layer in range(2):
                right = rows[layer] == (expected + 10 * layer)[:, None, None]
                assert right.all(), "committed rows are wrong"
            return
        gone = self.killed == "owner" or self.closed
        ends = drawn.offer is not None and drawn.offer.state != "held"
        allowed = {
            OfferGone: ends or gone,
            PeerError: gone,
            TransferTimeout: outcome.timeout is not None or gone,
            TransferCancelled: outcome.cancel is not None,
        }
        kinds = [kind for kind, may in allowed.items() if may]
        assert isinstance(error, tuple(kinds)), f"a pull ended by {error!r}"

    # --- the whole

    def fail(self) -> None:
        """End one of the processes, or close the owner, at a time that is drawn."""
        self.schedule.sleep(self.moment() + self.moment())
        name = self.random.choice(("owner", "reader", "close"))
        if name == "close":
            self.closed = True
            self.schedule.call(self.owner_process, self.owner.close)
            return
        self.killed = name
        self.schedule.kill(self.owner_process if name == "owner" else self.reader_process)

    def run(self) -> None:
        """Let all offers and pulls end, and judge what is left."""
        schedule = self.schedule
        schedule.call(self.owner_process, self.begin_owner)
        schedule.call(self.reader_process, self.begin_reader)
        owning = list[Any]()
        reading = list[Any]()
        for drawn in self.offers:
            owning.append(schedule.begin(self.owner_process, self.live, drawn))
            owning.append(schedule.begin(self.owner_process, self.watch, drawn))
            reading.append(schedule.begin(self.reader_process, self.read, drawn))
        if self.random.random() < 0.4:
            self.fail()
        if self.killed != "reader":
            for thread in reading:
                thread.join(2 * PATIENCE)
                assert thread.over, "a pull hangs"
            schedule.call(self.reader_process, self.close_reader)
        if self.killed != "owner":
            schedule.call(self.owner_process, self.close_owner)
            for thread in owning:
                thread.join(PATIENCE)
                assert thread.over, "an offer hangs"

    def close_reader(self) -> None:
        """Close the reader, which has nothing left."""
        self.reader.close()
        self.reader_channel.close()
        assert self.reader.statistics()["pulls"] == 0, "a pull was not reported"

    def close_owner(self) -> None:
        """Close the owner, which has nothing left."""
        self.closed = True
        self.owner.close()
        self.owner_channel.close()
        statistics = self.owner.statistics()
        held = statistics["held"]
        assert held == statistics["slots"] == 0, f"an owner that is closed has {statistics}"


def pulls(schedule: Schedule) -> None:
    """Run the pulls of one schedule."""
    Pulls(schedule).run()
