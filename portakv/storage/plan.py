# SPDX-License-Identifier: Apache-2.0
"""Plan a call of a block store.

The plan locates each part of a block in a tier or in rows, and makes the tasks of the transfer
graph that bring it into rows and into a view. It joins transfers that other calls have started.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import pairwise
from operator import itemgetter, or_
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakSet

import numpy as np
import torch

from portakv.graph.graph import Graph, Priority, Queue
from portakv.graph.handle import Handle, Missing
from portakv.graph.task import Lease, Mask, Task
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage import image
from portakv.storage.chains import FIRST, mark_of
from portakv.storage.form import BlockForm, Slices
from portakv.storage.reasons import Explanation, Reasons
from portakv.storage.rows import Crossing, Loan, Rows
from portakv.storage.tier import Keys, TierStore
from portakv.view import KVView

#: Bytes of a task of a save, and of a load, unless a block is larger. A load in 16 MiB pieces left
#: a disk's queue too short on an H200 machine: 1.6 GB/s, by 32 MiB 2.1. An urgent load waits for
#: one piece of a save.
SAVED = 16 << 20
LOADED = 32 << 20
CACHED = "kept"  # a location: the host tier
LOOKUP_BATCH = 8  # blocks of the first request of a lookup; each next request has twice as many
PARTS = 8  # of the device's stage by layer, if blocks are read as a whole


#: Tier stores with the queues that read a block, nearest first.
Queues: TypeAlias = tuple[tuple[TierStore, Queue], ...]
#: The place of a part of a block: `CACHED`, a transfer that brings it, or tier stores.
Location: TypeAlias = "str | InFlight | Queues"
#: A task at which blocks of a call end: their numbers in the call and in the task.
Ending: TypeAlias = tuple[Task, Sequence[int], Sequence[int]]


class Stage(NamedTuple):
    """The rows that cross together between rows and a view.

    ``layers`` of the view, their segment (None: the image), and both sides of the copy.
    """

    layers: range
    segment: int | None
    inner: KVView
    outer: KVView


@dataclass(eq=False)
class Part:
    """Blocks of one form, and the rectangle that they share with the store's form.

    ``cells`` has a bit for each head of each layer of the rectangle. ``part_slices`` and
    ``own_slices`` are the rectangle in a view of this form and in a view of the store's form.
    """

    form: BlockForm
    tier_stores: list[TierStore]
    part_slices: Slices
    own_slices: Slices
    rows: KVView  # that rectangle of all rows of the store
    cells: int

    def name(self, key: bytes) -> bytes:
        """Return the name of this part of a block among the rows."""
        return self.form.digest + key

    def stages(self, view: KVView, by_layer: bool) -> list[Stage]:
        """Return the stages between rows and a view, in order of their layers."""
        first = self.part_slices["layers"].start
        past = self.part_slices["layers"].stop
        segmented = by_layer and len(self.form.segments) > 1
        outer = view.slice(**self.own_slices)
        if segmented:
            ends = [0, *(segment.past_layer for segment in self.form.segments)]
        else:
            many = min(PARTS, past - first) if by_layer else 1
            ends = np.linspace(first, past, 1 + many, dtype=int).tolist()
        result = list[Stage]()
        to = self.own_slices["layers"].start
        for number, (a, b) in enumerate(pairwise(min(max(x, first), past) - first for x in ends)):
            if a < b:
                sides = self.rows.slice(layers=slice(a, b)), outer.slice(layers=slice(a, b))
                result.append(Stage(range(to + a, to + b), number if segmented else None, *sides))
        return result


def parts_of(
    form: BlockForm,
    forms: Iterable[BlockForm],
    tier_stores: Sequence[TierStore],
    rows: torch.Tensor,
) -> list[Part]:
    """Return the parts of blocks of a form that lie in tiers and in rows of a tensor.

    The form itself comes first, then the others by their first cell, the largest first among
    equals.
    """
    parts = list[Part]()
    across = form.heads[1] - form.heads[0]
    for other in forms:
        if slices := form.part_of(other):
            stores = [tier_store for tier_store in tier_stores if tier_store.form == other]
            layers = slices[1]["layers"]
            heads = slices[1]["heads"]
            cells = sum(1 << n for n in range(heads.start, heads.stop))
            cells = sum(cells << across * n for n in range(layers.start, layers.stop))
            parts.append(Part(other, stores, *slices, other.view(rows).slice(**slices[0]), cells))
    return parts[:1] + sorted(parts[1:], key=lambda x: (x.cells & -x.cells, -x.cells.bit_count()))


class SharedState:
    """The state that the calls of a store share, under the graph's lock.

    ``begun``: reads and saves that have not ended. ``in_transit``: the last of them by part and
    key, with the row of the block. ``barriers``: the last task of each call. ``hits``: the keys of
    loads that callers' threads made, whose use is not recorded yet.
    """

    def __init__(self, graph: Graph, rows: Rows, tier_stores: list[TierStore]) -> None:
        self.graph = graph
        self.rows = rows
        self.tier_stores = tier_stores
        self.parts = list[Part]()  # once tiers are open
        self.in_transit = dict[bytes, tuple[InFlight, int]]()
        self.barriers = WeakSet[Task]()
        self.begun = set[InFlight]()
        self.hits = deque[list[bytes]]()
        self.log = RateLimitedLog(logging.getLogger(__name__))

    def touch(self, keys: Keys, follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessors of the blocks of the store's form, from a save.
        """
        own = self.parts[0]
        for tier_store in self.tier_stores:
            known = [follows] if follows and tier_store.form == own.form else []
            tier_store.touch(keys, *known)
        for part in self.parts:
            self.rows.touch([part.name(key) for key in keys], follows if part is own else ())

    def record_hits(self) -> None:
        """Record the use of blocks that callers' threads loaded, and forget loads that ended."""
        while self.hits:
            keys = self.hits.popleft()
            self.rows.use([self.parts[0].name(key) for key in keys])
            self.touch(keys)
        self.rows.forget_loans()

    def leading(self, keys: Keys, until: float) -> int:
        """Return the number of leading blocks that are stored, in one part or in several.

        Asks remote tiers.
        """
        whole = self.parts[0].cells
        covers = [0] * len(keys)
        for number, part in enumerate(self.parts):
            some = [i for i, cover in enumerate(covers) if part.cells & ~cover]
            left = [i for i in some if not self.rows.has(part.name(keys[i]))]
            for tier_store in part.tier_stores:
                time = max(0.0, until - self.graph.clock())
                present = tier_store.has([keys[i] for i in left], time)
                left = [i for i, has in zip(left, present, strict=True) if not has]
            for i in {*some}.difference(left):
                covers[i] |= part.cells
            later = reduce(or_, (other.cells for other in self.parts[number + 1 :]), 0)
            end = next((i for i, cover in enumerate(covers) if cover | later != whole), len(covers))
            del covers[end:]  # no request follows for blocks after a missing one
        return len(covers)

    def locations(self, key: bytes) -> list[tuple[Part, Location]]:
        """Return parts that cover a block, once if possible, with their locations.

        If a cell is nowhere, the whole block may be in a remote tier; else the list is empty.
        """
        result = list[tuple[Part, Location]]()
        cover = 0
        while cover != self.parts[0].cells:
            cell = ~cover & (cover + 1)  # the first cell that is not covered
            parts = sorted(self.parts, key=lambda part: bool(part.cells & cover))
            locations = (
                (x, location)
                for x in parts
                if x.cells & cell and (location := self.location(x, key))
            )
            if not (one := next(locations, None)):
                location = self.location(self.parts[0], key, far=True)
                return [(self.parts[0], location)] if location else []
            result.append(one)
            cover |= one[0].cells
        return result

    def location(self, part: Part, key: bytes, far: bool = False) -> Location:
        """Return the location of a part of a block.

        That is `CACHED`, an `InFlight`, or tier stores with their queues, the nearest first. A
        remote tier is assumed to have the blocks of a nearer tier, besides those that it is known
        to have; with ``far``, any block.
        """
        if self.rows.has(part.name(key)):
            return CACHED
        queues = list[tuple[TierStore, Queue]]()
        stored = False
        for tier_store in part.tier_stores:
            known = tier_store.known([key])[0]
            if known or (tier_store.tier == "remote" and (far or queues)):
                queues.append((tier_store, tier_store.queue(key)))
            stored |= known
        in_flight, _ = self.in_transit.get(part.name(key), (None, 0))
        return (
            in_flight
            if in_flight and in_flight.wanted and not (in_flight.store and stored)
            else (*queues,)
        )

    def stored(self, keys: Keys) -> Mask:
        """Return which blocks of the store's form are where saves put them.

        That is in every writable tier that evicts blocks, or in the host tier if there is no other.
        """
        own = self.parts[0]
        writable = [tier_store for tier_store in own.tier_stores if tier_store.writable]
        there = np.ones(len(keys), np.bool_)
        for tier_store in writable:
            if tier_store.tier != "remote":
                there &= tier_store.known(keys)
        if not writable:
            names = [own.name(key) for key in keys]
            there[:] = [self.rows.has(name) or name in self.in_transit for name in names]
        return there

    def continues(self, after: bytes | None, tier_store: TierStore | None) -> bool:
        """Return True if a tier store (None: the host tier) can provide the block of a key.

        Blocks after such a key may evict others. The block is stored, is being saved, or may be in
        a remote tier.
        """
        if after is None:
            return True
        own = self.parts[0]
        in_flight, _ = self.in_transit.get(own.name(after), (None, 0))
        if (in_flight and in_flight.store) or any(
            other.tier == "remote" for other in own.tier_stores
        ):
            return True
        if tier_store is None:
            return bool(self.location(own, after))
        return tier_store.known([after])[0]


class Arrival(NamedTuple):
    """Blocks ``at`` of a call that arrive in ``rows`` of a lease.

    They are complete for stage n after the tasks ``ends[n]`` have ended.
    """

    lease: Lease
    ends: dict[int, list[Task]]
    at: Sequence[int]
    rows: Sequence[int]

    def cross(self, crossing: Crossing, stage: Stage, _: Task, mask: Mask) -> None:
        """Copy the blocks of a mask from their rows into the view, as the task of a stage."""
        left = np.flatnonzero(mask)
        items = np.array(self.lease.items)[np.array(self.rows)[left]]
        crossing.copy(stage.inner, stage.outer, items, np.array(self.at)[left])


class Call:
    """One call of a user, and its plan.

    Attributes:
        located: the blocks that have a location, bool ``[blocks]``.
        order: the position of each key: no block of the call evicts an earlier one.
        after: the key before the first one, of a save.
        ends: the tasks at which blocks of the call end, each with the numbers of these blocks in
            the call and in the task, and with the layers that it completes.
        gathers: the tasks of a save that read the caller's blocks.
    """

    def __init__(
        self,
        shared: SharedState,
        kind: str,
        keys: list[bytes],
        priority: Priority,
        deadline: float | None,
        after: bytes | None = None,
    ) -> None:
        self.shared = shared
        self.kind = kind
        self.keys = keys
        self.priority = priority
        self.deadline = deadline
        self.after = after
        self.order = dict[bytes, int]()
        if after is not None:
            self.order[after] = -1
        self.order.update((key, place) for place, key in enumerate(keys))
        self.barrier = Task(None, len(keys), name=kind)
        self.located: Mask = np.ones(len(keys), np.bool_)
        self.excused: Mask = np.zeros(len(keys), np.bool_)  # need not land: no tier admits them yet
        self.ends = list[tuple[Ending, range]]()
        self.gathers = list[Ending]()
        self.in_transit = 0  # in-flight blocks of the call that have not ended
        self.explanation = Explanation(keys)
        self._tasks = list[tuple[int, Task]]()  # tasks with the numbers of their stages
        self._leases = list[Lease]()  # leases of pinned rows

    @cached_property
    def follows(self) -> list[int]:
        """Return the marks of the predecessors of a save's blocks."""
        first = FIRST if self.after is None else mark_of(self.after)
        return [first, *(mark_of(key) for key in self.keys[:-1])]

    def groups(self, loan: Loan | None = None) -> dict[tuple[Part, Location], list[int]]:
        """Return the call's blocks by part and location, and mark the located blocks.

        Leaves out the blocks that have a row of a loan.
        """
        groups = dict[tuple[Part, Location], list[int]]()
        for i, key in enumerate(self.keys):
            if loan is not None and loan.rows[i] is not None:
                continue
            locations = self.shared.locations(key)
            self.located[i] = bool(locations)
            for location in locations:
                groups.setdefault(location, []).append(i)
        return groups

    def bring(
        self, part: Part, location: Location, some: list[int], segments: list[int | None]
    ) -> Iterator[Arrival]:
        """Bring blocks from a location into rows, for stages of these segments."""
        graph = self.shared.graph
        rows = self.shared.rows
        names = {i: part.name(self.keys[i]) for i in some}
        if isinstance(location, InFlight):  # another call brings them
            location.calls.append((self, some))
            self.explanation.sources.append(location.reasons)
            every = [*location.ends.values()]
            ends = [[location.ends[x]] if x in location.ends else every for x in segments]
            items = [self.shared.in_transit[names[i]][1] for i in some]
            self.explanation.tasks += [(end, some, items) for end in every]
            yield Arrival(location, dict(enumerate(ends)), some, items)
        elif isinstance(location, str):  # its rows stay until the tasks that use them have ended
            for at in self.chunks(some, LOADED, len({*segments})):
                lease = Lease(rows, 0, ended=lambda lease: rows.unpin(lease.items))
                self._leases.append(lease)
                lease.items = list[int]()
                for i in at:
                    lease.items.append(rows.find(names[i]))
                graph.count("host", "load", "hit", len(at), len(at) * part.form.image_bytes)
                yield Arrival(lease, {n: [] for n, _ in enumerate(segments)}, at, range(len(at)))
        else:
            yield from self._read(part, location, some, segments)

    def _read(
        self, part: Part, tier_stores: Queues, some: list[int], segments: list[int | None]
    ) -> Iterator[Arrival]:
        """Read blocks from the first tier store, and blocks that do not land from the next one.

        If the segments need more than staging holds together, each segment has a separate lease, so
        that the first layers do not wait for the last.
        """
        pieces = [*dict.fromkeys(segments)]
        apart = len(pieces) > 1 and len(some) > self.shared.rows.staging
        # A disk reads 8 MiB sooner in two pieces than in four, which leave saves no worker.
        queues = [queue for tier_store, queue in tier_stores[:1] if tier_store.tier != "disk"]
        for at in self.chunks(some, LOADED, len(pieces), *queues):
            for group in [[x] for x in pieces] if apart else [pieces]:
                in_flight = InFlight(self, part, at, apart=str(group).encode() if apart else b"")
                for segment in group:
                    before = list[Task]()
                    order = (pieces.index(segment), len(pieces))
                    for tier_store, queue in tier_stores:
                        work = partial(in_flight.read, tier_store, segment)
                        rescue = bool(before)
                        before = [self.task(at, work, queue, in_flight, before, order, rescue)]
                    in_flight.ends[segment] = before[0]
                ends = {
                    n: [in_flight.ends[x]] for n, x in enumerate(segments) if x in in_flight.ends
                }
                yield Arrival(in_flight, ends, at, range(len(at)))

    def cross(
        self, arrival: Arrival, stages: Sequence[Stage], crossing: Crossing, queue: Queue
    ) -> None:
        """Plan the copies of blocks from their rows into a view."""
        many = range(len(arrival.at))
        for number, ends in arrival.ends.items():
            after = [(end, many, arrival.rows) for end in ends]
            work = partial(arrival.cross, crossing, stages[number])
            order = (number, len(stages))
            task = self.task(arrival.at, work, queue, arrival.lease, after, order)
            self.ends.append(((task, arrival.at, many), stages[number].layers))

    def chunks(
        self, blocks: list[int], nbytes: int, pieces: int, *queues: Queue
    ) -> list[list[int]]:
        """Return the blocks of each task: two tasks share them, or all workers."""
        rows = self.shared.rows
        share = -(-len(blocks) // max([2, *(queue.width for queue in queues)]))
        most = rows.most // (4 if pieces > 1 else 1)
        most = max(1, min(most, pieces * nbytes // rows.row_bytes, share))
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]

    def task(
        self,
        at: Sequence[int],
        work: Callable[[Task, Mask], Any],
        queue: Queue,
        lease: Lease,
        after: Sequence[Task | Ending],
        order: tuple[int, int] = (0, 1),
        rescue: bool = False,
    ) -> Task:
        """Plan ``work(task, mask)`` on rows of a lease, for stage ``order[0]`` of ``order[1]``."""
        nbytes = len(at) * self.shared.rows.row_bytes // order[1]
        task = Task(
            work,
            len(at),
            queue=queue,
            nbytes=nbytes,
            after=after,
            rescue=rescue,
            lease=lease,
            name=self.kind,
        )
        self._tasks.append((order[0], task))
        self.explanation.tasks.append((task, at, range(len(at))))
        return task

    def submit(self, *barriers: Task) -> None:
        """Start the planned tasks, those of the first stages first."""
        tasks = [task for _, task in sorted(self._tasks, key=itemgetter(0))]
        self._tasks.clear()
        # A call that joins a task may have a later deadline.
        late = self.deadline if barriers else None
        self.shared.graph.submit([*tasks, *barriers], priority=self.priority, deadline=late)

    def drop(self) -> None:
        """Drop a plan that failed: no other call may wait for tasks that never start."""
        shared = self.shared
        shared.begun = {in_flight for in_flight in shared.begun if in_flight.users}
        shared.in_transit = {name: x for name, x in shared.in_transit.items() if x[0].users}
        for lease in self._leases:
            if not lease.users and lease.items:
                shared.rows.unpin(lease.items)

    def handle(
        self,
        view: KVView | None,
        layers: int = 0,
        missing: Missing = "raise",
        eligible: Callable[[], Mask] | None = None,
    ) -> Handle:
        """Start a call with one barrier at its end and, by layer, one barrier for each layer."""
        blocks = self.located if eligible is None else eligible
        barriers = [Task(None, len(self.keys), eligible=blocks) for _ in range(layers)]
        for layer, barrier in enumerate(barriers):
            barrier.after = [end for end, has in self.ends if layer in has]
        self.barrier.eligible = blocks
        self.barrier.after = [end for end, _ in self.ends]
        released = None
        if self.kind == "save":
            released = Task(None, len(self.keys), after=self.gathers, name="release")
        else:
            self.explanation.located = self.located
        self.submit(*barriers, *([released] if released else []), self.barrier)
        self.shared.barriers.add(self.barrier)
        why = self.explanation.sentence
        graph = self.shared.graph
        handle = Handle(graph, self.barrier, barriers, missing, view, self.excused, why)
        if released:
            handle.add_release(released)
        return handle


class InFlight(Lease):
    """Rows that a transfer fills.

    Row i has block ``keys[i]`` of the part after all of ``ends`` landed it: one task for each
    segment, or the task of None. Later calls use the rows as well, unless their name has a suffix
    ``apart``. ``calls`` are all calls with their blocks, the maker first. A save ends with the
    tasks ``last``, and has a generation, and checksums by row; it is dropped if it has no rows at
    ``until``.
    """

    def __init__(
        self, call: Call, part: Part, at: list[int], until: float | None = None, apart: bytes = b""
    ) -> None:
        shared = call.shared
        super().__init__(shared.rows, len(at), call.kind == "save", until, InFlight.over)
        self.part = part
        self.calls = [(call, at)]
        self.keys = [call.keys[i] for i in at]
        self.ends = dict[int | None, Task]()
        self.last = list[Task]()
        self.generation = 0
        self.sums = dict[int, Sequence[int]]()
        self.reasons = Reasons()  # reasons of blocks that were not read, or not written
        call.explanation.sources.append(self.reasons)
        self.names = [part.name(key) + apart for key in self.keys]
        shared.begun.add(self)
        shared.in_transit.update((name, (self, row)) for row, name in enumerate(self.names))
        call.in_transit += 1

    @property
    def wanted(self) -> bool:
        """Return True if a call that is neither cancelled nor late waits for the rows; under the
        lock."""
        return any(not call.barrier.cut for call, _ in self.calls)

    def over(self) -> None:
        """Return the rows, under the graph's lock, and cache rows whose blocks landed whole.

        After the last rows of a call its blocks count as used, the last first, so that a prefix
        outlives its suffix. This happens before the rows are cached if the call has more blocks
        than the host tier.
        """
        landed = np.zeros(self.count, np.bool_)
        call = self.calls[0][0]
        shared = call.shared
        rows = call.shared.rows
        if self.items and (None in self.ends or len(self.ends) == len(self.part.form.segments)):
            landed = np.logical_and.reduce([end.landed for end in self.ends.values()])
        prefetched = all(call.kind == "prefetch" for call, _ in self.calls)
        shared.record_hits()
        evict = shared.continues(call.after, None)
        if rows.crowded(call.order):
            shared.touch(call.keys)
        shared.begun.discard(self)
        self._warn_dropped()
        for row, name in enumerate(self.names):
            if shared.in_transit.get(name, (None,))[0] is self:
                del shared.in_transit[name]
            if landed[row]:
                item = self.items[row]
                mark = image.predecessor(rows.array[item])
                rows.keep(item, name, prefetched, call.order, mark, evict)
        call.in_transit -= 1
        if not call.in_transit:
            shared.touch(call.keys)

    def _warn_dropped(self) -> None:
        """Log that tasks were dropped, because staging was full or a queue was slow."""
        tasks = dict.fromkeys([*self.ends.values(), *self.last])
        dropped = [task for task in tasks if task.state == "dropped"]
        if dropped:
            queues = ", ".join(dict.fromkeys(task.queue.name for task in dropped if task.queue))
            text = "A %s dropped %d blocks on %s, the first one is %s: no free staging, or a slow queue"
            values = self.calls[0][0].kind, self.count, queues, self.keys[0].hex()
            self.calls[0][0].shared.log.warning("dropped", text, *values)

    # --- the work of tasks, in workers, for the blocks of a mask ---

    def read(self, tier_store: TierStore, segment: int | None, _: Task, mask: Mask) -> Mask:
        """Read blocks, or a segment of them, into the rows."""
        rows, keys, data = self._of(mask)
        segments = None if segment is None else [segment]
        mask[rows] = tier_store.read(keys, data, segments, self._is_cancelled, self.reasons.report)
        return mask

    def gather(self, crossing: Crossing, view: KVView, _: Task, mask: Mask) -> None:
        """Copy blocks of a view into the rows, and make images of them."""
        rows, keys, data = self._of(mask)
        call, blocks = self.calls[0]
        items = np.array(self.items)[rows]
        at = np.array(blocks)[rows]
        crossing.copy(self.part.rows, view, items, at)
        follows = call.follows
        for row, key, image_ in zip(rows, keys, data, strict=True):
            mark = follows[blocks[row]]
            self.sums[row] = image.seal(image_, self.part.form, key, self.generation, mark)

    def write(self, tier_store: TierStore, queue: Queue, _: Task, mask: Mask) -> Mask:
        """Write images to a tier."""
        rows, keys, data = self._of(mask)
        call = self.calls[0][0]
        generations = [self.generation] * len(rows)
        sums = [self.sums[row] for row in rows]
        with call.shared.graph.lock:
            evict = call.shared.continues(call.after, tier_store)
        known = generations, sums, call.order, evict
        mask[rows] = tier_store.write(queue, keys, data, *known, report=self.reasons.report)
        return mask

    def _of(self, mask: Mask) -> tuple[list[int], list[bytes], list[Any]]:
        """Return the numbers, keys and bytes of rows."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        return (
            rows,
            [self.keys[i] for i in rows],
            [self.calls[0][0].shared.rows.array[self.items[i]] for i in rows],
        )

    def _is_cancelled(self) -> bool:
        """Return True if a read may stop."""
        graph = self.calls[0][0].shared.graph
        with graph.lock:
            graph.sweep()
            return not self.wanted
