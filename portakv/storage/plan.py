# SPDX-License-Identifier: Apache-2.0
"""Plan a call of a block store.

The plan locates each part of a block in a tier or in rows, and makes the tasks of the transfer
graph that bring it into rows and into a view. It joins transfers that other calls have started.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, repeat
from operator import itemgetter
from typing import Any, TypeAlias
from weakref import WeakSet

import numpy as np

from portakv.graph import Graph, Guard, Handle, Lease, Mask, Missing, Priority, Queue, Task, Workers
from portakv.graph.trace import COUNTED, Counts
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.changes import Announced
from portakv.storage.late_end import end_later
from portakv.storage.parts import LOADED, SMALL, Arrival, Part, Stage, TierStore, task_blocks
from portakv.storage.parts import LONG as LONG
from portakv.storage.parts import SAVED as SAVED
from portakv.storage.parts import SLICE as SLICE
from portakv.storage.parts import parts_of as parts_of
from portakv.storage.reasons import Explanation, Reasons
from portakv.storage.request import Request
from portakv.storage.rows import Claim, Crossing, Rows, Want
from portakv.storage.spare import Spare, SpareRows
from portakv.storage.uploads import Uploads
from portakv.view import KVView

CACHED = "kept"  # a location: the host tier
NOT_COMING = (None, 0)
RELEASE = "release"  # the name of the barrier of `Handle.released`


#: Tier stores with the queues that read a block, nearest first.
Queues: TypeAlias = tuple[tuple[TierStore, Queue], ...]
#: The place of a part of a block: `CACHED`, a transfer that brings it, or tier stores.
Location: TypeAlias = "str | InFlight | Queues"
#: A task at which blocks of a call end: their numbers in the call and in the task.
Ending: TypeAlias = tuple[Task, Sequence[int], Sequence[int]]


class SharedState:
    """The state that the calls of a store share, under the graph's lock.

    ``begun``: reads and saves that have not ended. ``in_transit``: the last of them by part and
    key, with the row of the block. ``barriers``: the last task of each call. ``hits``: the keys of
    loads that callers' threads made, whose use is not recorded yet, with their forms.
    ``announced``: what the store announces. ``generation``: of the newest block of a save.
    """

    def __init__(self, graph: Graph, rows: Rows) -> None:
        self.graph = graph
        self.rows = rows
        self.tier_stores = list[TierStore]()
        self.in_transit = dict[bytes, tuple[InFlight, int]]()
        self.barriers = WeakSet[Task]()
        self.begun = set[InFlight]()
        self.hits = deque[tuple[FormBlocks, list[bytes]]]()
        self.announced = Announced(graph)
        self.log = RateLimitedLog(logging.getLogger(__name__))
        self.generation = 0
        self.forms = dict[str, FormBlocks]()  # by their names, once tiers are open
        self.closed = False

    def record_hits(self) -> None:
        """Record the use of blocks that callers' threads loaded, and forget loads that ended."""
        while self.hits:
            form, keys = self.hits.popleft()
            self.rows.use([form.own.name(key) for key in keys])
            form.touch(keys)
        self.rows.forget_loans()


class FormBlocks:
    """The blocks of one form of a store: where they are, and how often they were read and written.

    Attributes:
        name: the form's name; empty if the store was made for one form without a name.
        parts: the parts that make up a block, ``own`` first: the part of the form itself.
        apart: the checksums of the store's other forms that have no part of a block.
        tier_stores: the tier stores that learn of a use of the blocks.
        most_bytes: of the largest part of a block.
        counts: of a form with a name, what its calls moved, for figures.
        uploads: its rows that wait for remote tiers.
        spare: the raw form of a packed one.
    """

    def __init__(
        self, shared: SharedState, name: str, parts: list[Part], apart: Iterable[bytes]
    ) -> None:
        self.shared = shared
        self.name = name
        self.parts = parts
        self.own = parts[0]
        self.spare = Spare(parts, shared.rows)
        self.most_bytes = max(part.form.image_bytes for part in parts)
        self.apart = frozenset(apart)
        self.tier_stores = [x for x in shared.tier_stores if x.form.digest not in self.apart]
        self.counts = Counts()
        self.uploads = Uploads()

    def count(self, tier: str, op: str, result: str, blocks: int) -> None:
        """Count blocks of a form with a name, in any thread."""
        if self.name and blocks:
            nbytes = blocks * self.own.form.image_bytes if result == "hit" else 0
            self.counts.new.append((tier, op, result, blocks, nbytes))
            if len(self.counts.new) >= COUNTED:
                self.shared.graph.run(self.counts.sum_up)

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessors of the blocks of the form itself, from a save.
        """
        own = self.own
        for tier_store in self.tier_stores:
            known = [follows] if follows and tier_store.form == own.form else []
            tier_store.touch(keys, *known)
        rows = self.shared.rows
        for part in self.parts if rows.host else ():
            rows.touch(part.names(keys), follows if part is own else ())

    def locations(self, keys: Sequence[bytes]) -> list[list[tuple[Part, Location]]]:
        """Return for each block the parts that cover it, with their locations.

        The list of a block that is nowhere is empty. Most blocks are in the form itself.
        """
        own = self.own
        located = self.locate(own, keys)
        same = {location: [(own, location)] for location in {*located} if location}
        return [
            same[location] if location else self._covering(key)
            for key, location in zip(keys, located, strict=True)
        ]

    def _covering(self, key: bytes) -> list[tuple[Part, Location]]:
        """Return other parts that cover a block, once if possible, with their locations.

        If a cell is nowhere, the whole block may be in a remote tier; else the list is empty.
        """
        own = self.own
        result = list[tuple[Part, Location]]()
        cover = 0
        while cover != own.cells:
            cell = ~cover & (cover + 1)  # the first cell that is not covered
            parts = sorted(self.parts[1:], key=lambda part: bool(part.cells & cover))
            locations = (
                (x, location)
                for x in parts
                if x.cells & cell and (location := self.locate(x, [key])[0])
            )
            if not (one := next(locations, None)):
                (location,) = self.locate(own, [key], far=True)
                return [(own, location)] if location else []
            result.append(one)
            cover |= one[0].cells
        return result

    def locate(self, part: Part, keys: Sequence[bytes], far: bool = False) -> list[Location]:
        """Return the location of a part of each block.

        That is `CACHED`, an `InFlight`, or tier stores with their queues, the nearest first; none
        for a block that is nowhere. A remote tier is assumed to have the blocks of a nearer tier,
        besides those that it is known to have; with ``far``, any block.
        """
        result: list[Location] = [CACHED] * len(keys)
        names = part.names(keys)
        cached = self.shared.rows.has_each(names)
        left = [i for i, there in enumerate(cached) if not there]
        some = [keys[i] for i in left]
        known = [tier_store.known(some) for tier_store in part.tier_stores]
        coming = self.shared.in_transit
        for number, i in enumerate(left):
            queues: Queues = ()
            stored = False
            for tier_store, has in zip(part.tier_stores, known, strict=True):
                if has[number] or (tier_store.tier == "remote" and (far or queues)):
                    queues = (*queues, (tier_store, tier_store.queue(keys[i])))
                stored |= has[number]
            in_flight, _ = coming.get(names[i], NOT_COMING)
            joins = in_flight and in_flight.joins(stored)
            result[i] = in_flight if in_flight and joins else queues
        return result

    def stored(self, keys: Sequence[bytes]) -> Mask:
        """Return which blocks of the form itself are where saves put them.

        That is in every writable tier that evicts blocks, or in the host tier if there is no other.
        """
        return self.spare.stored(keys, self.shared.rows, self.shared.in_transit)

    def continues(self, before: Sequence[bytes], tier_store: TierStore | None) -> bool:
        """Return True if a tier store (None: the host tier) can provide the blocks of keys.

        Blocks after such keys may evict others. A block is stored, is being saved, or may be in a
        remote tier.
        """
        return all(self._has(key, tier_store) for key in before)

    def _has(self, key: bytes, tier_store: TierStore | None) -> bool:
        parts = self.spare.parts
        coming = [self.shared.in_transit.get(part.name(key), NOT_COMING)[0] for part in parts]
        if any(in_flight and in_flight.store for in_flight in coming):
            return True
        if any(other.tier == "remote" for other in self.own.tier_stores):
            return True
        if tier_store is None:
            return any(self.locate(part, [key])[0] for part in parts)
        return self.spare.known(tier_store, [key])[0]


class Call:
    """One call of a user, and its plan.

    Attributes:
        located: the blocks that have a location, bool ``[blocks]``.
        ends: the tasks at which blocks of the call end, each with the numbers of these blocks in
            the call and in the task, and with the layers that it completes.
        gathers: the tasks of a save that read the caller's blocks.
        in_transit: its transfers that have not ended, and 1 for its plan.
    """

    def __init__(
        self,
        form: FormBlocks,
        kind: str,
        keys: list[bytes],
        priority: Priority,
        deadline: float | None = None,
        after: Sequence[bytes | None] = (),
        lent: bool = False,
    ) -> None:
        """Begin the plan of a `Request` for blocks of a form."""
        request = Request(kind, keys, priority, deadline, after, lent)
        self.form = form
        self.request = request
        many = len(request.keys)
        self.barrier = Task(None, many, name=request.kind)
        self.located: Mask = np.ones(many, np.bool_)
        self.excused: Mask = np.zeros(many, np.bool_)  # need not land: no tier admits them yet
        self.ends = list[tuple[Ending, range]]()
        self.gathers = list[Ending]()
        self.in_transit = 1
        self.explanation = Explanation(request.keys)
        self._guard = Guard()  # of `ends`, until the barrier follows them
        self._tasks = list[tuple[int, Task]]()  # tasks with the numbers of their stages
        self._leases = list[Lease]()  # leases of pinned rows

    @property
    def shared(self) -> SharedState:
        """Return the state that it shares with the other calls of the store."""
        return self.form.shared

    def slices(self, blocks: Sequence[int], whole: bool = False) -> list[Sequence[int]]:
        """Return the blocks that are planned together, before others may take the graph's lock.

        ``whole``: all of them, as tasks of one submission run in the order of their stages.
        """
        most = max(1, len(blocks)) if whole else SLICE
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]

    def groups(self, blocks: Sequence[int]) -> dict[tuple[Part, Location], list[int]]:
        """Return blocks by part and location, and mark the located ones."""
        groups = dict[tuple[Part, Location], list[int]]()
        located = self.form.locations([self.request.keys[i] for i in blocks])
        self.located[blocks] = [*map(bool, located)]
        last: list[tuple[Part, Location]] | None = None
        for i, locations in zip(blocks, located, strict=True):
            if locations is not last:  # most blocks lie where the block before lies
                last = locations
                some = [groups.setdefault(location, []) for location in locations]
            for each in some:
                each.append(i)
        return groups

    def bring(
        self, part: Part, location: Location, some: list[int], segments: list[int | None]
    ) -> Iterator[Arrival]:
        """Bring blocks from a location into rows, for stages of these segments."""
        graph = self.shared.graph
        rows = self.shared.rows
        names = {i: part.name(self.request.keys[i]) for i in some}
        if isinstance(location, InFlight):  # another call brings them
            location.calls.append((self, some))
            self.explanation.sources.append(location.reasons)
            every = [*location.ends.values()]
            ends = [[location.ends[x]] if x in location.ends else every for x in segments]
            items = [self.shared.in_transit[names[i]][1] for i in some]
            self.explanation.tasks += [(end, some, items) for end in every]
            yield Arrival(location, dict(enumerate(ends)), some, items)
        elif isinstance(location, str):  # its rows stay until the tasks that use them have ended
            least = 1 if self.request.lent else 2  # the copier has no workers to share them
            for at in self.chunks(part, some, LOADED, len({*segments}), least=least):
                lease = Lease(rows, 0, ended=self._unpin)
                self._leases.append(lease)
                lease.items = [rows.find(names[i]) for i in at]
                graph.count("host", "load", "hit", len(at), len(at) * part.form.image_bytes)
                self.form.count("host", "load", "hit", len(at))
                yield Arrival(lease, {n: [] for n, _ in enumerate(segments)}, at, range(len(at)))
        else:
            yield from self._read(part, location, some, segments)

    def _unpin(self, lease: Lease) -> None:
        """Release the rows of the host tier that a lease has, once."""
        items = lease.items
        lease.items = None
        self.shared.rows.unpin(items)

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
        for at in self.chunks(part, some, LOADED, len(pieces), *queues):
            for group in [[x] for x in pieces] if apart else [pieces]:
                in_flight = InFlight(self, part, at, apart=str(group).encode() if apart else b"")
                for segment in group:
                    before = list[Task]()
                    order = (pieces.index(segment), len(pieces))
                    for tier_store, queue in tier_stores:
                        work = partial(in_flight.read, tier_store, segment)
                        rescue = bool(before)
                        task = self.task(at, work, queue, in_flight, before, order, rescue)
                        task.alone = tier_store.tier == "disk" and task.nbytes < SMALL * len(at)
                        before = [task]
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
        self,
        part: Part,
        blocks: list[int],
        nbytes: int,
        pieces: int,
        *queues: Queue,
        least: int = 2,
    ) -> list[list[int]]:
        """Return the blocks of each task: at least ``least`` tasks share them, or all workers."""
        most = self.shared.rows.most // (4 if pieces > 1 else 1)
        size = part.form.image_bytes
        return task_blocks(blocks, size, pieces * nbytes, most, least, [x.width for x in queues])

    def task(
        self,
        at: Sequence[int],
        work: Callable[[Task, Mask], Any],
        queue: Workers,
        lease: Lease,
        after: Sequence[Task | Ending],
        order: tuple[int, int] = (0, 1),
        rescue: bool = False,
    ) -> Task:
        """Plan ``work(task, mask)`` on rows of a lease, for stage ``order[0]`` of ``order[1]``."""
        nbytes = len(at) * self.form.most_bytes // order[1]
        task = Task(
            work,
            len(at),
            queue=queue,
            nbytes=nbytes,
            after=after,
            rescue=rescue,
            lease=lease,
            name=self.request.kind,
        )
        self._tasks.append((order[0], task))
        self.explanation.tasks.append((task, at, range(len(at))))
        return task

    def gather(self, in_flight: InFlight, crossing: Crossing, view: KVView, queue: Queue) -> Task:
        """Plan the task of a save that brings blocks of the view into rows, and seals them."""
        at = in_flight.calls[0][1]
        task = self.task(at, partial(in_flight.gather, crossing, view), queue, in_flight, ())
        task.schedule.soon = in_flight.until is not None  # it waits for no staging either
        in_flight.ends[None] = task
        in_flight.last = [task]
        if in_flight.copied is None:
            self.gathers.append((task, at, range(len(at))))
        return task

    def submit(self, *barriers: Task) -> None:
        """Start the planned tasks, those of the first stages first."""
        tasks = [*(task for _, task in sorted(self._tasks, key=itemgetter(0))), *barriers]
        self._tasks.clear()
        # A call that joins a task may have a later deadline.
        late = self.request.deadline if barriers else None
        if tasks:
            self.shared.graph.submit(tasks, priority=self.request.priority, deadline=late)
        self._guard.follow([end for (end, *_), _ in self.ends[self._guard.followed :]])
        if barriers:
            self._guard.release()

    def drop(self) -> None:
        """Drop a plan that failed: no other call may wait for tasks that never start."""
        shared = self.shared
        for in_flight in shared.begun:
            if not in_flight.users:
                in_flight.end_copy()
                shared.graph.give(in_flight)
        shared.begun = {in_flight for in_flight in shared.begun if in_flight.users}
        shared.in_transit = {name: x for name, x in shared.in_transit.items() if x[0].users}
        for lease in self._leases:
            if not lease.users and lease.items:
                shared.rows.unpin(lease.items)
        started = [end for end, _ in self.ends if end[0].schedule.graph]
        if started and not shared.graph.closed.is_set():  # its earlier slices
            self.barrier.after = started
            self._tasks.clear()
            self.submit(self.barrier)
            shared.graph.cancel(self.barrier)

    def transfer_ended(self) -> None:
        """Note the end of a transfer, or of the plan.

        After the last one the call's blocks count as used, the last first, so that a prefix
        outlives its suffix: transfers store them in any order.
        """
        self.in_transit -= 1
        stores = self.request.kind == "save" or self.shared.rows.host
        if not self.in_transit and stores:
            self.form.touch(self.request.keys)

    def handle(
        self,
        view: KVView | None,
        layers: int = 0,
        missing: Missing = "raise",
        eligible: Callable[[], Mask] | None = None,
        follow: bool = True,
    ) -> Handle:
        """Start a call with one barrier at its end and, by layer, one barrier for each layer.

        ``follow``: announce the handle at its end.
        """
        blocks = self.located if eligible is None else eligible
        self.transfer_ended()
        many = len(self.request.keys)
        barriers = [Task(None, many, eligible=blocks) for _ in range(layers)]
        for layer, barrier in enumerate(barriers):
            barrier.after = [end for end, has in self.ends if layer in has]
        self.barrier.eligible = blocks
        self.barrier.after = [end for end, _ in self.ends]
        released = None
        if self.request.kind == "save":
            released = Task(None, many, after=self.gathers, name=RELEASE)
        else:
            self.explanation.located = self.located
        self.submit(*barriers, *([released] if released else []), self.barrier)
        self.shared.barriers.add(self.barrier)
        why = self.explanation.sentence
        graph = self.shared.graph
        handle = Handle(graph, self.barrier, barriers, missing, view, self.excused, why)
        handle.form = self.form.name
        if released:
            handle.add_release(released)
        if follow and self.shared.announced.handles.started:
            self.shared.announced.follow(handle, self.barrier)
        return handle


class InFlight(Lease):
    """Rows that a transfer fills.

    Row i has block ``keys[i]`` of the part after all of ``ends`` landed it: one task for each
    segment, or the task of None. Later calls use the rows as well, unless their name has a suffix
    ``apart``. ``calls`` are all calls with their blocks, the maker first. A save ends with the
    tasks ``last``; it is dropped if it has no rows at ``until``. If it writes a tier, it has a
    generation, and checksums by row. ``copied`` waits for its copy, if that was issued.
    """

    def __init__(
        self, call: Call, part: Part, at: list[int], until: float | None = None, apart: bytes = b""
    ) -> None:
        shared = call.shared
        super().__init__(shared.rows, len(at), call.request.kind == "save", until, InFlight.over)
        self.part = part
        self.calls = [(call, at)]
        self.keys = [call.request.keys[i] for i in at]
        self.ends = dict[int | None, Task]()
        self.last = list[Task]()
        self.generation = 0
        self.sums = dict[int, Sequence[int]]()
        self.copied: Callable[[], object] | None = None
        self.reasons = Reasons()  # reasons of blocks that were not read, or not written
        self.spare = SpareRows(call.form.spare, part)
        # Rows that are not cached as they are: of a segment, or of a copier that may pack.
        self.passing = bool(apart) or (call.request.lent and self.store and self.spare.packs)
        call.explanation.sources.append(self.reasons)
        self.names = part.names(self.keys)
        if apart:
            self.names = [name + apart for name in self.names]
        shared.begun.add(self)
        shared.in_transit.update(zip(self.names, zip(repeat(self), count()), strict=False))
        call.in_transit += 1

    def take(self) -> list[int] | None:
        """Return rows, under the graph's lock; a save also takes rows of the host tier."""
        rows = self.calls[0][0].shared.rows
        if rows.sized:
            return self.spare.take(self.count, self.passing, self._want)
        if not (self.store and rows.host):
            return rows.take(self.count, self.store)
        return rows.take(self.count, True, self._claim(), self.calls[0][1][-1])

    def joins(self, stored: bool) -> bool:
        """Return True if a load may use the rows: not those of a save of packed blocks, whose rows
        may become raw. ``stored``: a tier has the block."""
        return self.wanted and not (self.store and (stored or bool(self.part.form.encoding)))

    @property
    def wanted(self) -> bool:
        """Return True if a call that is neither cancelled nor late waits for the rows."""
        return any(not call.barrier.outcome.cut for call, _ in self.calls)

    def over(self) -> None:
        """Return the rows, under the graph's lock, and cache rows whose blocks landed whole.

        The call's blocks count as used before that if it has more blocks than the host tier.
        """
        if self._is_copied_still():
            return
        landed = np.zeros(self.count, np.bool_)
        call = self.calls[0][0]
        shared = call.shared
        if self.items and (None in self.ends or len(self.ends) == len(self.part.form.segments)):
            landed = np.logical_and.reduce([end.landed for end in self.ends.values()])
        prefetched = all(call.request.kind == "prefetch" for call, _ in self.calls)
        shared.record_hits()
        claim = self._claim()
        if shared.rows.crowded(claim):
            call.form.touch(call.request.keys)
        shared.begun.discard(self)
        self._warn_dropped()
        for name in self.names:
            if shared.in_transit.get(name, (None,))[0] is self:
                del shared.in_transit[name]
        whole: list[int] = np.flatnonzero(landed).tolist()
        if whole and shared.rows.host:
            items = [self.items[row] for row in whole]
            names = self.spare.names(self.keys, whole, self.names)
            sizes = [self.spare.image_bytes(row) for row in whole]
            shared.rows.keep(items, names, self._follows(whole), prefetched, claim, sizes)
        call.transfer_ended()

    def _claim(self) -> Claim:
        """Return the cached rows that the blocks may evict, under the graph's lock."""
        call = self.calls[0][0]
        evict = call.form.continues(call.request.before(self.calls[0][1]), None)
        return Claim(call.request.order, call.form.apart, evict)

    def _want(self, nbytes: int) -> Want:
        """Return what rows of a size are needed for, in any thread."""
        call, at = self.calls[0]
        with call.shared.graph.lock:
            claim = self._claim()
        prefetched = call.request.kind == "prefetch"
        return Want(nbytes, self.store, claim, at[-1], prefetched, self.passing)

    def _follows(self, rows: Sequence[int]) -> list[int]:
        """Return the marks of the predecessors of blocks in rows."""
        call, blocks = self.calls[0]
        if self.store:
            return [call.request.follows[blocks[row]] for row in rows]
        return [self.spare.predecessor(self.items, row) for row in rows]

    def _is_copied_still(self) -> bool:
        """Return True if the copy of a save that was cancelled still writes the rows.

        A worker then waits for its end, and calls `over` once more.
        """
        if self.copied is None:
            return False
        return end_later(self.calls[0][0].shared.graph, self, self.end_copy)

    def _warn_dropped(self) -> None:
        """Log that tasks were dropped, because staging was full or a queue was slow."""
        tasks = dict.fromkeys([*self.ends.values(), *self.last])
        dropped = [task for task in tasks if task.state == "dropped"]
        if dropped:
            queues = ", ".join(dict.fromkeys(task.queue.name for task in dropped if task.queue))
            text = "A %s dropped %d blocks on %s, the first is %s: no free staging, or a slow queue"
            values = self.calls[0][0].request.kind, self.count, queues, self.keys[0].hex()
            self.calls[0][0].shared.log.warning("dropped", text, *values)

    # --- the work of tasks, in workers, for the blocks of a mask ---

    def read(self, tier_store: TierStore, segment: int | None, _: Task, mask: Mask) -> Mask:
        """Read blocks, or a segment of them, into the rows."""
        rows, keys, data = self._of(mask)
        segments = None if segment is None else [segment]
        mask[rows] = tier_store.read(keys, data, segments, self._is_cancelled, self.reasons.report)
        self._count(tier_store, mask, len(rows))
        return mask

    def end_copy(self) -> None:
        """Wait for the copy of a save, if it was issued: it writes the rows until then."""
        copied = self.copied
        if copied:
            try:
                copied()
            finally:
                self.copied = None  # it retains the view

    def gather(self, crossing: Crossing, view: KVView, _: Task, mask: Mask) -> Mask:
        """Copy blocks of a view into the rows, and `seal` them."""
        if self.copied is None:
            lines = (self.items, self.calls[0][1])
            report = self.reasons.report
            mask = self.spare.copy(crossing, view, mask, lines, self.keys, report, self._want)
        else:
            self.end_copy()
        self.seal(_, mask)
        return mask

    def seal(self, _: Task, mask: Mask) -> None:
        """Make images of the payloads in the rows, if a tier stores them: only tiers read
        headers."""
        if self.passing:
            self.spare.settle(self.items, mask, self._want)
        if not self.generation:
            return
        call, blocks = self.calls[0]
        for row in np.flatnonzero(mask).tolist():
            name = self.keys[row], self.generation, call.request.follows[blocks[row]]
            self.sums[row] = self.spare.seal(self.items, row, *name)

    def write(self, tier_store: TierStore, queue: Queue, _: Task, mask: Mask) -> Mask:
        """Write images to a tier."""
        rows, keys, data = self._of(mask)
        call = self.calls[0][0]
        generations = [self.generation] * len(rows)
        sums = [self.sums[row] for row in rows]
        with call.shared.graph.lock:
            before = call.request.before(self.calls[0][1])
            evict = call.form.continues(before, tier_store)
        terms = queue, data, generations, sums, call.request.order, evict
        report = self.reasons.report
        mask[rows] = self.spare.write(call.shared.graph, tier_store, rows, keys, terms, report)
        self._count(tier_store, mask, len(rows))
        return mask

    def _count(self, tier_store: TierStore, mask: Mask, blocks: int) -> None:
        """Count so many blocks, of which those of the mask landed, for the figures of the form."""
        call = self.calls[0][0]
        landed = int(np.count_nonzero(mask))
        op = "save" if call.request.kind == "save" else "load"
        call.form.count(tier_store.tier, op, "hit", landed)
        call.form.count(tier_store.tier, op, "miss", blocks - landed)

    def _of(self, mask: Mask) -> tuple[list[int], list[bytes], list[Any]]:
        """Return the numbers, keys and bytes of rows."""
        rows: list[int] = np.flatnonzero(mask).tolist()
        return (
            rows,
            [self.keys[i] for i in rows],
            [self.spare.image_in(self.items, i) for i in rows],
        )

    def _is_cancelled(self) -> bool:
        """Return True if a read may stop; needs no lock, as no call is wanted again."""
        self.calls[0][0].shared.graph.sweep()
        return not self.wanted
