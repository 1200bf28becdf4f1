# SPDX-License-Identifier: Apache-2.0
"""`staged`: rows are made dense on the device, and cross the link in few large copies.

The device's half is a copy between the rows and a mirror of the host's rows, by whichever backend
serves the device; the link's half is one copy of each slice, on a stream of its own. They overlap:
while a slice crosses, the next one is gathered, or the last one scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch

from portakv.backends.base import Capabilities, Launch
from portakv.engines.engine import PINNED, Engine, finish, read_on
from portakv.engines.link import link_of
from portakv.engines.pieces import Pieces
from portakv.engines.slices import (
    DETACHED_RING,
    RING,
    Cut,
    TwoStages,
    cuts,
    in_either_order,
    staged_sizes,
)
from portakv.engines.staging import Staging, mark, staging, wait
from portakv.host import pinned
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import Prepared
from portakv.runtime import streams
from portakv.runtime.devices import inside
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

        def cross(leg: Leg, mirror: KVView, _: int) -> None:
            src, dst = (mirror, host) if self.downward else (host, mirror)
            self._crossing.copy(leg.pieces(mirror, host), src, dst, passage.link)

        passage = Passage(self.downward, room, work, legs, cross)
        try:
            with room.lock:
                if self._detached:
                    # Behind the current stream alone, and not behind the transfer before: buffers
                    # are free one by one. Ids that are brought for one call are ordered on the
                    # current stream, whatever reads them.
                    passage.reserve(room.half, DETACHED_RING)
                    turns = room.turns(len(legs), DETACHED_RING)
                    passage.settle(mine, current, turns, room.free)
                else:
                    passage.alone()
                    passage.reserve(work, RING)
                    passage.settle(mine, work, [nth % RING for nth in range(len(legs))])
                with passage.behind(current if self._detached else work):
                    for nth in range(len(legs)):
                        passage.move(nth)
        except BaseException:
            rows.derived.pop(self, None)  # slices that were not settled hold the host's memory
            raise
        finally:
            # No allocator knows of the link's copies: the host's memory is held until they ended,
            # also those that were under way when something failed.
            streams.completion(self.device, work, *host.owners)

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
        kept: dict[tuple[object, ...], list[Leg]] = rows.derived.setdefault(self, {})
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


class Slice:
    """A slice of a transfer: its planes, where they lie in a dense buffer on the device, and the
    device's stage of it.

    Args:
        stages: both stages of the slice's planes.
        rows: the device's planes.
        cut: which planes and positions.
        theirs: the index of all of the host's rows, with ids on the host.
        exactly: nothing may lie between the planes of a buffer.
        largest: bytes of a buffer; None: those of `staged`.

    Attributes:
        mirror: how its rows lie while they are dense.
        held: positions that a buffer holds.
        behind: where its rows begin there.
        theirs: the index of its own rows on the host.
    """

    def __init__(
        self,
        stages: TwoStages,
        rows: KVView,
        cut: Cut,
        theirs: Index,
        exactly: bool,
        largest: int | None = None,
    ) -> None:
        self.stages, self.rows, self.start, self.count = stages, rows, cut.start, cut.count
        self.theirs = theirs.shifted(cut.start)
        self.mirror, self.behind = stages.mirror, stages.behind(self.theirs)
        self.held = stages.held(cut.count, self.theirs.offset, exactly, largest)
        self.nbytes = self.mirror.nbytes(self.held)
        self._way: Prepared | None = None

    def way(self, mirror: KVView) -> Prepared:
        """The device's stage, for buffers of this slice's."""
        if self._way is None:
            self._way = self.stages.ways(mirror, self.held)[0]
        return self._way


class Leg(Slice):
    """A slice with everything settled that does not change with the host's memory.

    Args:
        launch: the prepared copy.
        cut, exactly, theirs: as `Slice` has them.
        rows, host: views of all planes.
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
        mine, part = rows.planes(cut.layers, cut.kv), host.planes(cut.layers, cut.kv)
        super().__init__(launch.halves.of(mine, part, cut), mine, cut, theirs, exactly)
        self._fold_below = launch.fold_below
        self._part: KVView | None = part
        self._origin = host.origins[0]
        self._settled: tuple[int, Pieces] | None = None  # for a buffer at that address

    def pieces(self, mirror: KVView, host: KVView) -> Pieces:
        """What has to cross between a buffer and the host's rows, where these lie; settled when it
        is first asked for, so that the slices before this one are under way by then."""
        part, settled = self._part, self._settled
        if settled is None:
            assert part is not None
            link = self.stages.ways(mirror, self.held)[1]
            made = self.stages.pieces(link, part, mirror, self.theirs, self.count, self._fold_below)
            settled = self._settled = mirror.origins[0], made  # at once: other threads may look
            self._part = None  # a leg that is kept must not hold the memory that it was made for
        origin, known = settled
        there, here = mirror.origins[0] - origin, host.origins[0] - self._origin
        dst, src = (here, there) if self.stages.downward else (there, here)
        if not dst and not src:
            return known
        return known._replace(dst=known.dst + dst, src=known.src + src)


class _Move(NamedTuple):
    """A slice's buffer and its number, the device's stage, and its rows on the device."""

    mirror: KVView
    at: int
    way: Prepared
    mine: Index


_Some = TypeVar("_Some", bound=Slice)


class Passage(Generic[_Some]):
    """One transfer under way: on which streams, and through which buffers of the device.

    The caller's stream stands before and behind it. In between the device's stage has a stream with
    priority, since a slice that waits for a model's kernels would leave the link idle.

    Args:
        downward: from the device to the host.
        room: the buffers, whose lock the caller holds.
        work: the stream that the transfer is ordered on.
        slices: in their order.
        cross: enqueues what has to cross for a slice, with its buffer and its number, on ``link``.
    """

    def __init__(
        self,
        downward: bool,
        room: Staging,
        work: torch.Stream,
        slices: Sequence[_Some],
        cross: Callable[[_Some, KVView, int], None],
    ) -> None:
        self._downward, self._room, self._work = downward, room, work
        self._slices, self._cross = slices, cross
        self._half, self.link = room.half, room.link
        self._moves: list[_Move] = []
        self._free: list[torch.Event | None] = []
        self._last = 0  # so many last slices leave no mark that their buffers are free

    def alone(self) -> None:
        """Stay on the caller's stream if there is one slice, which has nothing to overlap with."""
        if len(self._slices) == 1:
            self._half = self.link = self._work

    def reserve(self, stream: torch.Stream, buffers: int) -> None:
        """Have room for the slices in so many buffers; on a stream."""
        with inside(stream):
            self._room.reserve(max(each.nbytes for each in self._slices), buffers)

    def settle(
        self,
        mine: Index,
        stream: torch.Stream,
        turns: Sequence[int],
        free: list[torch.Event | None] | None = None,
    ) -> None:
        """Settle which buffer each slice goes through, and bring the ids of the device's rows.

        Args:
            mine: the index of the device's rows.
            stream: the stream on which ids are brought.
            turns: for each slice the number of its buffer.
            free: for each buffer an event behind its last use; None: all are free behind ``work``,
                and nothing asks for them afterwards.
        """
        self._last, index, by = (max(turns) + 1 if free is None else 0), mine, None
        self._free = [None] * self._last if free is None else free
        with inside(stream):
            for each, at in zip(self._slices, turns, strict=True):
                mirror = self._room.mirror(at, each.mirror, each.held)
                way = each.way(mirror)
                if way is not by:
                    index, by = read_on(self._work, way.place(mine)), way
                self._moves.append(_Move(mirror, at, way, index.shifted(each.start)))

    @contextmanager
    def behind(self, stream: torch.Stream) -> Iterator[None]:
        """Inside, slices are moved behind what a stream holds; ``work`` then waits for them."""
        others = [each for each in (self._half, self.link) if each is not self._work]
        for each in others:
            each.wait_stream(stream)
        try:
            yield
        finally:
            # What was enqueued, also before an interrupt, is part of the caller's stream.
            for each in others:
                self._work.wait_stream(each)
            for piece, move in zip(self._slices, self._moves, strict=True):
                piece.rows.record_table(self._work)  # made in a launch, for one stream's kernel
                move.mirror.record_table(self._work)

    def move(self, nth: int) -> None:
        """Issue both stages of a slice, in order, behind its buffer's last use."""
        each, (mirror, at, way, mine) = self._slices[nth], self._moves[nth]
        half, link = self._half, self.link
        beside, free = half is not link, self._free[at]
        if self._downward:
            wait(half, free)
            finish(way.launch(each.rows, mirror, mine, each.behind, each.count, half, None))
            wait(link, mark(half, beside))
            self._cross(each, mirror, nth)
            last = link
        else:
            wait(link, free)
            self._cross(each, mirror, nth)
            wait(half, mark(link, beside))
            finish(way.launch(mirror, each.rows, each.behind, mine, each.count, half, None))
            last = half
        again = nth + 1 + self._last <= len(self._slices)
        self._free[at] = mark(last, beside) if again else None
