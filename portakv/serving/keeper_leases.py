# SPDX-License-Identifier: Apache-2.0
"""What a keeper's state knows of: processes, sessions, loads and saves, and rows that are lent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from portakv.graph import Handle
from portakv.serving.keeper_messages import UNFIT
from portakv.storage.form_store import FormStore
from portakv.storage.lent import Borrowed, LentCopy
from portakv.storage.pins import Pins

#: A copy that a store has lent.
Copy: TypeAlias = LentCopy | Borrowed
#: What the saves of all ranks of an engine have in common: engine, form, checksum of the keys.
SaveKey: TypeAlias = tuple[str, bytes, bytes]


@dataclass(eq=False)
class ClientProcess:
    """A process with clients.

    Attributes:
        key: its namespace, its number and its start.
        leases: all rows that were lent to it and that it may still use.
    """

    key: tuple[int, int, int]
    leases: set[Lease] = field(default_factory=set)


class Part(NamedTuple):
    """The part of a rank of the blocks of one group of layers.

    ``cells`` has a bit for each head of each layer; see `cells_of`.
    """

    store: FormStore
    cells: int


@dataclass(eq=False)
class Client:
    """A session of a rank.

    Attributes:
        parts: of each group of layers.
        address: of its channel.
        requests: the loads and saves that have not ended, by the client's numbers.
        leases: the rows that it copies, by the numbers of leases.
        locks: the blocks that it keeps from eviction, by its numbers.
        gone: the session has ended.
    """

    session: int
    engine: str
    process: ClientProcess
    parts: list[Part]
    address: str
    requests: dict[int, LoadWork | SaveWork] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    locks: dict[int, Pins] = field(default_factory=dict)
    gone: bool = False


@dataclass(eq=False)
class Lease:
    """Rows of a copy that a client makes.

    ``cells``: the part of each block that it writes. ``places``: of the rows in the copy, in
    order.
    ``since``: when it began.
    """

    number: int
    client: Client
    lent: Lent
    cells: int
    places: Sequence[int]
    since: float = 0.0


@dataclass(eq=False)
class Lent:
    """A copy that the store has lent, and the clients that make it.

    Attributes:
        leases: those that have not been reported.
        assigned: the cells that clients write, or have written.
        covered: the cells of each block that clients have written.
        unfit: by place the cells of blocks that do not fit into packed slots.
        raw: the places of blocks that clients write once more, raw; None: not yet.
        ended: the store has its rows back.
    """

    work: LoadWork | SaveWork
    copy: Copy
    leases: set[Lease] = field(default_factory=set)
    assigned: int = 0
    covered: list[int] = field(default_factory=list)
    unfit: dict[int, int] = field(default_factory=dict)
    raw: Sequence[int] | None = None
    ended: bool = False

    def note(self, place: int, cells: int, landed: int) -> None:
        """Note what a client reports of a block: see `Report.landed`."""
        if landed == UNFIT:
            self.unfit[place] = self.unfit.get(place, 0) | cells
        elif landed:
            self.covered[place] |= cells

    def tried(self, place: int) -> int:
        """Return the cells of a block that clients have written, or could not pack."""
        return self.covered[place] | self.unfit.get(place, 0)

    def begin_raw(self, cells: int) -> bool:
        """Begin anew with the blocks that do not fit; return whether there are some.

        They begin once clients have tried all of ``cells``, as packed and raw bytes of a block
        have the same row.
        """
        if self.raw is not None or self.copy.raw is None:
            return False
        self.raw = [place for place in self.unfit if self.tried(place) == cells]
        for place in self.raw:
            self.covered[place] = 0
        self.assigned = 0
        return bool(self.raw)

    def end(self, cells: int) -> None:
        """Give the rows back; blocks that lack a cell of ``cells`` have not landed."""
        self.ended = True
        self.work.lents.pop(self, None)
        landed = np.array([not cells & ~each for each in self.covered], np.bool_)
        if not self.raw:
            self.copy.end(landed)
            return
        raw = np.zeros(len(landed), np.bool_)
        raw[[*self.raw]] = True
        self.copy.end(landed, raw)


@dataclass(eq=False)
class LoadWork:
    """A load of one client.

    Attributes:
        granted: blocks whose rows were lent, as whole blocks.
        abandoned: nothing waits for further rows.
    """

    client: Client
    number: int
    part: Part
    blocks: int
    handle: Handle | None = None
    lents: dict[Lent, None] = field(default_factory=dict)
    granted: int = 0
    abandoned: bool = False


@dataclass(eq=False)
class SaveWork:
    """A save that all ranks of an engine ask for.

    Attributes:
        began: the time.
        expected: the clients that will ask for it.
        requesters: the clients that have requested it, with their numbers.
        abandoned: no rank copies any further block.
        complete: no further rows follow.
        stored: which blocks are stored; None: it has not ended.
    """

    key: SaveKey
    part: Part
    blocks: int
    began: float
    expected: set[Client]
    handle: Handle | None = None
    lents: dict[Lent, None] = field(default_factory=dict)
    requesters: dict[Client, int] = field(default_factory=dict)
    abandoned: bool = False
    complete: bool = False
    stored: bytes | None = None

    def awaits(self, client: Client) -> bool:
        """Return whether a client has yet to ask for it."""
        return client not in self.requesters and (self.stored is None or client in self.expected)

    @property
    def awaited(self) -> bool:
        """Return True if another rank may ask for it."""
        return any(not (each.gone or each in self.requesters) for each in self.expected)
