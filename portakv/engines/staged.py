# SPDX-License-Identifier: Apache-2.0
"""`staged`: rows are made dense on the device, and cross the link in few large copies.

The device's half is a copy between the rows and a mirror of the host's rows, by whichever backend
serves the device; the link's half is one copy of each slice, on a stream of its own. They overlap:
while a slice crosses, the next one is gathered, or the last one scattered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.engines.engine import PINNED, Engine, finish, read_on
from portakv.engines.link import Link, link_of
from portakv.engines.pieces import Pieces
from portakv.engines.slices import (
    DETACHED_RING,
    RING,
    Cut,
    cuts,
    in_either_order,
    sliced,
    staged_sizes,
)
from portakv.engines.staging import Staging, mark, staging, wait
from portakv.host import pinned
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Route
from portakv.runtime import _flight
from portakv.view.index import Index

if TYPE_CHECKING:
    from portakv.view.view import KVView

_KEPT = 64  # lengths of which a view of rows remembers the slices


class Staged(Engine):
    """Gather on the device, then a memcpy of each slice; or a memcpy, then scatter."""

    name = "staged"

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_on="any")

    def prepare(self, plan: CopyPlan) -> Launch:
        return _StagedLaunch(plan, self)


class _StagedLaunch:
    """A prepared copy."""

    def __init__(self, plan: CopyPlan, engine: Engine) -> None:
        self.device, self.downward = engine.device, plan.src.place == "device"
        self._detached = engine.terms.detached
        self._host = plan.dst if self.downward else plan.src
        self.halves = in_either_order(plan, engine.half, engine.device)
        self._crossing = link_of(engine.device)
        self.fold_below = self._crossing.fold_below

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        if not count:
            return
        host, rows = (dst, src) if self.downward else (src, dst)
        theirs, mine = (dst_index, src_index) if self.downward else (src_index, dst_index)
        current = torch.accelerator.current_stream(self.device.index)
        work = stream or current
        room = staging(self.device, work, self._detached)
        idle = room.link.query()
        legs = self._legs(rows, host, theirs.to_host(), count, idle)
        try:
            with room.lock:
                passage = _Passage(self.downward, room, work, self._crossing)
                if self._detached:
                    passage.run_detached(legs, host, mine, current)
                else:
                    passage.run(legs, host, mine, RING)
        except BaseException:
            rows.kept.pop(self, None)  # slices that were not settled hold the host's memory
            raise
        finally:
            # No allocator knows of the link's copies: the host's memory is held until they ended,
            # also those that were under way when something failed.
            _flight.completion(self.device, work, *host.owners)

    def _legs(self, rows: KVView, host: KVView, theirs: Index, count: int, idle: bool) -> list[Leg]:
        """The slices of a transfer, kept for others of its kind; ``idle``: the link is."""
        outside: tuple[str, ...] = ()
        seams = pinned.seams()  # which memory of the host was pinned in parts
        key: tuple[object, ...] = count, theirs.offset, idle, seams
        if theirs.ids is not None:
            key += theirs.ids_token, host.origins
        elif len(host.origins) > 1 or seams:
            key += (host.origins,)
        else:  # in other memory of the host's form a slice lies as far behind its address
            outside = self.halves.whole.mirror.outside
        kept: dict[tuple[object, ...], list[Leg]] = rows.kept.setdefault(self, {})
        legs = kept.get(key)
        if legs is None:
            # Ids scatter the rows of a plane anyway, and several allocations the planes.
            quantum, sizes = self.halves.whole.quantum, staged_sizes(idle)
            slices = cuts(self._host, outside, count, quantum, self.downward, sizes)
            legs = [Leg(self, cut, bool(outside), rows, host, theirs) for cut in slices]
            if len(kept) >= _KEPT:
                kept.clear()
            kept[key] = legs
        return legs


class Leg:
    """A slice of a transfer, with everything settled that does not change with the host's memory.

    Args:
        launch: the prepared copy.
        cut: which planes and positions.
        exactly: nothing may lie between the planes of a mirror.
        rows: the device's.
        host: the host's.
        theirs: the index of the host's rows, with ids on the host.
    """

    def __init__(
        self,
        launch: _StagedLaunch,
        cut: Cut,
        exactly: bool,
        rows: KVView,
        host: KVView,
        theirs: Index,
    ) -> None:
        self.rows, part = sliced(rows, cut), sliced(host, cut)
        self.start, self.count = cut.start, cut.count
        self.halves = launch.halves.of(self.rows, part, cut)
        self.mirror, self.held = (
            self.halves.mirror,
            self.halves.held(cut.count, theirs.offset + cut.start, exactly),
        )
        self.nbytes = self.mirror.nbytes(self.held)
        self.behind = self.halves.behind(theirs.shifted(cut.start))
        self._theirs = theirs.shifted(cut.start)
        self._fold_below = launch.fold_below
        self._part: KVView | None = part
        self._origin = host.origins[0]
        self._settled: tuple[int, Pieces] | None = None  # for a mirror at that address
        self._way: Route | None = None

    def way(self, mirror: KVView) -> Route:
        """The device's half, for mirrors of this leg's."""
        if self._way is None:
            self._way = self.halves.ways(mirror, self.held)[0]
        return self._way

    def pieces(self, mirror: KVView, host: KVView) -> Pieces:
        """What has to cross between a mirror and the host's rows, where these lie; settled when it
        is first asked for, so that the slices before this one are under way by then."""
        part, settled = self._part, self._settled
        if settled is None:
            assert part is not None
            link = self.halves.ways(mirror, self.held)[1]
            made = self.halves.pieces(
                link, part, mirror, self._theirs, self.count, self._fold_below
            )
            settled = self._settled = mirror.origins[0], made  # at once: other threads may look
            self._part = None  # a leg that is kept must not hold the memory that it was made for
        origin, known = settled
        there, here = mirror.origins[0] - origin, host.origins[0] - self._origin
        dst, src = (here, there) if self.halves.downward else (there, here)
        if not dst and not src:
            return known
        return known._replace(dst=known.dst + dst, src=known.src + src)


class _Move(NamedTuple):
    """A slice, the mirror that it goes through and its number, and the device's half of it."""

    leg: Leg
    mirror: KVView
    at: int
    way: Route
    mine: Index


class _Passage:
    """One transfer under way: on which streams, and through which mirrors.

    The caller's stream stands before and behind it. In between the device's half has a stream with
    priority, since a slice that waits for a model's kernels would leave the link idle.
    """

    def __init__(self, downward: bool, room: Staging, work: torch.Stream, crossing: Link) -> None:
        self._downward, self._room, self._crossing, self._work = downward, room, crossing, work
        self._half, self._link = room.half, room.link

    def run(self, legs: list[Leg], host: KVView, mine: Index, mirrors: int) -> None:
        """Move every slice, through so many mirrors, between what the stream held before and what
        it gets next."""
        work = self._work
        if len(legs) == 1:  # it has nothing to overlap with
            self._half = self._link = work
        with _flight.inside(work):
            self._reserve(legs, mirrors)
            moves = self._moves(legs, mine, [nth % mirrors for nth in range(len(legs))])
        for stream in self._others():
            stream.wait_stream(work)
        self._run(moves, host, mirrors, [None] * mirrors)

    def run_detached(
        self, legs: list[Leg], host: KVView, mine: Index, current: torch.Stream
    ) -> None:
        """The same behind the current stream alone, and not behind the transfer before: its mirrors
        are free one by one."""
        room, mirrors = self._room, DETACHED_RING
        with _flight.inside(self._half):
            self._reserve(legs, mirrors)
        # Ids that are brought for one call are ordered on the current stream, whoever reads them.
        with _flight.inside(current):
            moves = self._moves(legs, mine, room.turns(len(legs), mirrors))
        for stream in self._others():
            stream.wait_stream(current)
        self._run(moves, host, 0, room.free)

    def _others(self) -> list[torch.Stream]:
        """The streams beside the one that transfers are ordered on."""
        return [stream for stream in (self._half, self._link) if stream is not self._work]

    def _reserve(self, legs: list[Leg], mirrors: int) -> None:
        """Have room for the slices in so many mirrors; on the current stream."""
        self._room.reserve(max(leg.nbytes for leg in legs), mirrors)

    def _moves(self, legs: list[Leg], mine: Index, turns: list[int]) -> list[_Move]:
        """Every slice with all that it takes; on the current stream."""
        moves, index, by = list[_Move](), mine, None
        for leg, at in zip(legs, turns, strict=True):
            mirror = self._room.mirror(at, leg.mirror, leg.held)
            way = leg.way(mirror)
            if way is not by:
                index, by = read_on(self._work, way.place(mine)), way
            moves.append(_Move(leg, mirror, at, way, index.shifted(leg.start)))
        return moves

    def _run(
        self, moves: list[_Move], host: KVView, last: int, free: list[torch.Event | None]
    ) -> None:
        """Issue the slices; of so many ``last`` ones nobody asks when their mirrors are free."""
        try:
            for nth, move in enumerate(moves, 1):
                again = nth + last <= len(moves)
                free[move.at] = self._move(move, host, free[move.at], again)
        finally:
            # What was enqueued, also before an interrupt, is part of the caller's stream.
            for stream in self._others():
                self._work.wait_stream(stream)
            for move in moves:
                move.leg.rows.record_table(self._work)  # made in a launch, for one stream's kernel
                move.mirror.record_table(self._work)

    def _move(
        self, move: _Move, host: KVView, free: torch.Event | None, again: bool
    ) -> torch.Event | None:
        """Move a slice through a mirror, which is free after an event; the next such where the
        mirror is used again."""
        leg, mirror, _, way, mine = move
        half, link = self._half, self._link
        beside = half is not link
        pieces = leg.pieces(mirror, host)
        if self._downward:
            wait(half, free)
            finish(way.launch(leg.rows, mirror, mine, leg.behind, leg.count, half, None))
            wait(link, mark(half, beside))
            self._crossing.copy(pieces, mirror, host, link)
            return mark(link, beside) if again else None
        wait(link, free)
        self._crossing.copy(pieces, host, mirror, link)
        wait(half, mark(link, beside))
        finish(way.launch(mirror, leg.rows, leg.behind, mine, leg.count, half, None))
        return mark(half, beside) if again else None
