# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's side and the workers of an engine tell each other, once a step.

All are plain values, which an engine may pickle. Numbers of loads and saves are never used again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

#: For each group of layers, ids of the engine's blocks in the order of their tokens. -1: no block,
#: or one that must not be touched.
Blocks: TypeAlias = "tuple[tuple[int, ...], ...]"


@dataclass(frozen=True)
class Job:
    """Stored blocks, and the engine's blocks that hold their rows.

    Attributes:
        number: counts all loads and saves of a `SchedulerSide`.
        request: whose blocks they are.
        keys: of consecutive stored blocks.
        first: the number of the first one in the request.
        after: the key before the first one; None: they begin a prompt.
        blocks: of each group, from the token at which the first stored block begins. The last
            stored block may reach past them. Of a group with states one for each stored block, with
            those after its last token; -1: they are not moved. Of other groups, blocks that a save
            does not read are the first ones, and fill whole stored blocks.
    """

    number: int
    request: str
    keys: tuple[bytes, ...]
    first: int
    after: bytes | None
    blocks: Blocks


@dataclass(frozen=True)
class PullJob:
    """Rows of another engine, and this engine's blocks for them.

    Attributes:
        number: counts all loads, saves and pulls of a `SchedulerSide`.
        request: whose rows they are.
        tickets: of each worker of the other engine.
        first: the rows of the tokens before this one are here already.
        tokens: the rows of the tokens before this one come.
        blocks: of each group, from the first token of the request on; -1: not to be touched. Of a
            group with states the one for that after ``tokens``.
    """

    number: int
    request: str
    tickets: tuple[bytes, ...]
    first: int
    tokens: int
    blocks: Blocks


@dataclass(frozen=True)
class OfferJob:
    """Rows of a request that has ended, for another engine.

    Attributes:
        request: whose rows they are.
        name: by which each worker offers them.
        tokens: the first ones of the request, whose rows they are.
        blocks: of each group, from the first token of the request on; -1: given up. Of a group
            with states the one with that after ``tokens``.
        lease: seconds for which they are kept after each renewal.
    """

    request: str
    name: bytes
    tokens: int
    blocks: Blocks
    lease: float


class RemoteRows(NamedTuple):
    """The rows of a request in the workers of another engine.

    Attributes:
        tickets: of each worker of that engine, by the name of an offer.
        tokens: the first tokens of the request, whose rows they are.
        lease: seconds for which the engine keeps the rows after each renewal.
    """

    tickets: tuple[bytes, ...]
    tokens: int
    lease: float


@dataclass
class Handovers:
    """What the workers do in a step for hand-overs between engines.

    Attributes:
        pulls: begin them; the engine reads their blocks after the end of each.
        offers: make them. Earlier steps have computed their rows.
        renewals: rows that requests wait for, whose leases are to be renewed.
        released: tickets of rows that no request needs any longer.
        revoked: end all offers that were made before this step: their rows must not be used.
        withdrawn: names of offers that requests carry, and that no worker is to make any longer.
    """

    pulls: list[PullJob] = field(default_factory=list)
    offers: list[OfferJob] = field(default_factory=list)
    renewals: list[RemoteRows] = field(default_factory=list)
    released: list[bytes] = field(default_factory=list)
    revoked: bool = False
    withdrawn: list[bytes] = field(default_factory=list)


NO_HANDOVERS = Handovers()


@dataclass
class Plan:
    """What the workers do in a step.

    Attributes:
        loads: begin them; the engine reads their blocks after the end of each.
        saves: begin them after the step has computed their rows.
        stop: saves that must have released their blocks before the step writes anything: their
            blocks are no longer the request's.
        retained: requests that have ended, whose blocks the engine keeps until all workers have
            reported them. A worker reports one after its saves of it have released their blocks.
        idle: the step has loads or pulls, and computes nothing.
        handovers: between engines.
    """

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)
    retained: list[str] = field(default_factory=list)
    idle: bool = False
    handovers: Handovers = field(default_factory=lambda: NO_HANDOVERS)


NO_PLAN = Plan()


@dataclass
class Report:
    """What one worker, or several, have seen since the last report.

    Attributes:
        missing: by the number of a load or save that has ended, the positions of its keys that did
            not land, or were not stored; of a pull the position 0 stands for all of its rows.
        released: by the number of a save, in how many workers its blocks may be written again.
        ends: by number, in how many workers a load, save or pull has ended.
        offers: by the state in which they have ended, how many offers of one worker each.
    """

    missing: dict[int, frozenset[int]] = field(default_factory=dict)
    released: Counter[int] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    offers: Counter[str] = field(default_factory=Counter)

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was seen."""
        return not (self.released or self.ends or self.offers)

    def end(self, number: int, missing: frozenset[int] = frozenset()) -> None:
        """Note that a load, save or pull has ended in this worker."""
        self.missing[number] = self.missing.get(number, frozenset()) | missing
        self.ends[number] += 1

    def merged(self, other: Report) -> Report:
        """Return what both reports say."""
        made = Report(
            {**self.missing},
            self.released + other.released,
            self.ends + other.ends,
            self.offers + other.offers,
        )
        for number, missing in other.missing.items():
            made.missing[number] = made.missing.get(number, frozenset()) | missing
        return made
