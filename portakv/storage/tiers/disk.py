# SPDX-License-Identifier: Apache-2.0
"""`Disk` is a tier of folders, one for each device. A folder may be added or lost."""

from __future__ import annotations

import errno
import logging
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeAlias

from portakv.arguments import invalid, number, one_of, whole
from portakv.core.io import WRONG, Check
from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage import reasons
from portakv.storage.eviction import Chains, Changed, mark_of
from portakv.storage.form import HEADER, BlockForm, size_notes
from portakv.storage.image import Header, Row, header, predecessor, verify
from portakv.storage.io.base import DEPTH, LOST, Engine, Request
from portakv.storage.io.choose import ENGINES, choose, verifies
from portakv.storage.reasons import Reason, Report
from portakv.storage.tiers.folder import (
    PAGE,
    Place,
    Slots,
    Space,
    Track,
    cause_of,
    forms_in,
    open_to_others,
)
from portakv.storage.work import Graph, Queue

# ------------------------------------------------------------------------------------------------
# `DiskStore` reads and writes the blocks of one form in all folders of a disk tier.

_warnings = RateLimitedLog(logging.getLogger(__name__))


@dataclass
class _Left:
    """The blocks of a write that have no slot yet.

    Attributes:
        numbers: the numbers of these blocks among the keys of the write, in their order.
        tries: the folders to try for a slot, and which may evict a block.
        own: positions of the call's keys.
        gaps: marks of blocks of the write that are not stored, and of blocks after them.
    """

    numbers: deque[int]
    tries: Sequence[tuple[Slots, bool]]
    own: Mapping[bytes, int] | None
    gaps: set[int] = field(default_factory=set)

    def known_reasons(self) -> set[str]:
        """Return why folders take no blocks for now, which is logged where it begins."""
        return set[str]().union(*[slots.health.reasons() for slots, _ in self.tries])


@dataclass(eq=False)
class Pin:
    """A block that stays in its slot until `release`, and how its read ended."""

    slots: Slots
    place: Place
    right: bool = False
    lost: bool = False  # its bytes are wrong, or the device has lost them: it is forgotten
    failure: Reason | None = None

    def release(self) -> None:
        """Let the block go in its turn."""
        self.slots.unpin(self.place, good=not self.lost)

    @property
    def outcome(self) -> str:
        """Return how the read ended, for figures."""
        if self.right:
            return "hit"
        return "fault" if self.lost else "late"

    def fail(self, result: int) -> None:
        """Note a span that did not come (a negative errno), or bytes that are not right."""
        self.lost = self.lost or result >= 0 or -result in LOST
        kind = reasons.DAMAGED if self.lost else reasons.UNREACHABLE
        where = str(self.slots.folder.parent)
        if result < 0:
            where = f"{where}: {os.strerror(-result)}"
        self.failure = Reason(kind, where)

    def log(self, key: bytes, report: Report) -> None:
        """Report why the block did not land, and warn of a failure."""
        folder = self.slots.folder
        report(key, self.failure or Reason(reasons.LATE, str(folder.parent)))
        if self.failure is None:
            return
        what = f"is {self.failure.kind} ({self.failure.where})"
        if self.lost:
            what += ", and its slot is freed"
        text = "Block %s in %s %s"
        _warnings.warning(f"{self.failure.kind} {folder}", text, key.hex(), folder, what)


class _Span(NamedTuple):
    """A part of an image that one request reads, and its segments: their numbers, and where they
    lie in an image (see `Check.pieces`)."""

    start: int
    end: int
    numbers: slice
    pieces: bytes


#: A slot that was taken for a block, after the number of the block among the keys of the write.
_Taken: TypeAlias = tuple[int, Slots, int]


@dataclass(eq=False, repr=False)
class DiskStore:
    """The blocks of one form in all folders of a disk tier.

    The store that ``owns_engine`` closes the I/O engine of all stores: it is closed last.
    """

    graph: Graph
    form: BlockForm
    parts: list[Slots]
    engine: Engine
    writable: bool
    found: list[str]  # sentences for `explain` from the opening
    offered: Bounded[bytes, None] | None = None  # once, if the second time is to be waited for
    owns_engine: bool = False
    tier = "disk"

    @property
    def notes(self) -> list[str]:
        """Return sentences for `explain`: of the opening, and of the folders as they are now."""
        self.look()
        notes = [*self.found]
        known = " ".join(notes)
        notes += [f"{self.engine.name}: {x}" for x in self.engine.notes if x not in known]
        for slots in self.parts:
            notes += slots.health.sentences()
        return notes

    @property
    def generation(self) -> int:
        """Return the highest generation at the start."""
        return max(slots.generation for slots in self.parts)

    @property
    def where(self) -> str:
        """Return the folders, for messages."""
        return ", ".join(str(slots.folder.parent) for slots in self.parts)

    def has(self, keys: Sequence[bytes], _: float | None = None) -> list[bool]:
        """Return which blocks are stored."""
        chains = self.parts[0].chains  # of all folders
        return [key in chains for key in keys]

    known = has  # no request is needed

    def wants(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks are missing and admitted."""
        lacks = [not there for there in self.has(keys)]
        once = self.offered
        if once is not None:
            for i, key in enumerate(keys):
                if lacks[i] and once.pop(key, self) is self:
                    once[key] = None
                    lacks[i] = False
        return lacks

    def queue(self, key: bytes) -> Queue:
        """Return the queue that reads a block."""
        return next((x for x in self.parts if key in x.index), self.parts[0]).queue

    def queue_for_write(self, nbytes: int) -> Queue:
        """Return the queue of the folder with the fewest bytes queued.

        Among equal folders, the one with the fewest blocks written.
        """
        written = min(self.parts, key=lambda x: (x.queue.queued_bytes, len(x.index) + x.evicted))
        return written.queue

    def keys(self) -> list[bytes]:
        """Return the keys of all blocks."""
        return [key for slots in self.parts for key in slots.index.copy()]

    def announce(self, changed: Changed) -> None:
        """Report from now on each block that is stored or lost."""
        for slots in self.parts:
            slots.chains.changed = changed

    def pin(self, keys: Sequence[bytes]) -> list[Pin | None]:
        """Return the pin of each block, which stays until its end; None if it is gone."""
        pins: list[Pin | None] = [None] * len(keys)
        for slots in self.parts:
            left = [i for i, pin in enumerate(pins) if pin is None]
            for i, place in zip(left, slots.pin([keys[i] for i in left]), strict=True):
                if place is not None:
                    pins[i] = Pin(slots, place)
        return pins

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Forget blocks, also for a later start; return which were there.

        Reads of them that are under way end as if they were there.
        """
        pins = self.pin(keys)
        for pin in pins:
            if pin is not None:
                pin.slots.unpin(pin.place, good=False, why=reasons.DELETED)
        return [pin is not None for pin in pins]

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of a prefix; ``follows``: the predecessor of each of its blocks."""
        for slots in self.parts:
            slots.touch(keys, follows)

    def read(
        self,
        keys: Sequence[bytes],
        rows: Sequence[Row],
        segments: Sequence[int] | None = None,
        stop: Callable[[], bool] | None = None,
        report: Report = reasons.ignore,
    ) -> list[bool]:
        """Read images, or only some segments of them, into rows; return which blocks arrived
        correctly.

        A block that was not read, because the I/O engine failed or nothing waits for it, is a miss
        this time.
        """
        spans = self._spans(segments)
        pins = self.pin(keys)
        pinned = [(pin, row) for pin, row in zip(pins, rows, strict=True) if pin is not None]
        try:
            if stop is None or not stop():
                requests, checks = self._reads(pinned, spans)
                if verifies(self.engine):
                    results = self.engine.run_checked(requests, checks)
                else:
                    results = self.engine.run(requests)
                for at, (pin, row) in enumerate(pinned):
                    for number, span in enumerate(spans, at * len(spans)):
                        result = results[number]
                        if result != span.end - span.start:
                            pin.fail(0 if result == WRONG else result)
                    if pin.failure is None:
                        pin.right = self.is_right(row, pin.place.header, segments)
                        if not pin.right:
                            pin.fail(0)
        finally:
            for pin, _ in pinned:
                pin.release()

        for key, each in zip(keys, pins, strict=True):
            if each is None:  # it was evicted after the load was planned
                report(key, Reason(reasons.EVICTED, self.where))
            elif not each.right:
                each.log(key, report)
        outcomes = Counter("miss" if each is None else each.outcome for each in pins)
        nbytes = sum(span.end - span.start for span in spans)
        for outcome in ("hit", "fault", "late", "miss"):
            many = outcomes[outcome]
            moved = many * nbytes if outcome == "hit" else 0
            self.graph.count(self.tier, "load", outcome, many, moved)
        return [each is not None and each.right for each in pins]

    def _reads(
        self, pinned: Sequence[tuple[Pin, Row]], spans: list[_Span]
    ) -> tuple[list[Request], list[Check]]:
        """Return the reads of all spans of pinned blocks into their rows, and their checksums."""
        size = self.form.image_bytes
        requests = []
        checks = []
        for pin, row in pinned:
            fd = pin.slots.fd
            offset = pin.place.slot * size
            known = pin.place.header
            address = row.__array_interface__["data"][0]  # `ctypes` takes longer
            for start, end, numbers, pieces in spans:
                requests.append(Request(fd, offset + start, address + start, end - start, False))
                expected = array("Q", known.checksums[numbers]).tobytes()
                checks.append(Check(address, pieces, known.generation, expected))
        return requests, checks

    def _spans(self, segments: Sequence[int] | None) -> list[_Span]:
        """Return the parts of an image for a read of segments.

        The parts are whole pages, and the header comes with the first segment.
        """
        pieces = self.form.pieces
        if segments is None:
            return [_Span(0, self.form.image_bytes, slice(None), pieces)]
        spans = []
        for i in segments:
            part = self.form.segments[i]
            start = HEADER + part.offset if part.offset else 0
            end = HEADER + -(-(part.offset + part.nbytes) // PAGE) * PAGE
            spans.append(_Span(start, end, slice(i, i + 1), pieces[16 * i : 16 * (i + 1)]))
        return spans

    def write(
        self,
        queue: Queue,
        keys: Sequence[bytes],
        rows: Sequence[Row],
        generations: Sequence[int],
        checksums: Sequence[Sequence[int]],
        own: Mapping[bytes, int] | None = None,
        evict: bool = True,
        report: Report = reasons.ignore,
    ) -> list[bool]:
        """Write sealed images in the queue's folder; return which blocks are stored now.

        Drops a block that would evict an earlier block of the call, whose keys ``own`` lists.
        Without ``evict``, drops a block that would evict any. A folder that cannot evict, because
        all of its blocks have successors, leaves the block to the other folders.
        """
        self.touch([*own] if own else ())  # the call's stored blocks go after other blocks
        landed = self.has(keys)
        new = [i for i, there in enumerate(landed) if not there]
        size = self.form.image_bytes

        left = _Left(deque(new), self._tries(queue, evict), own)
        taken = 0
        while left.numbers:
            taken_now = list[_Taken]()
            results = list[int]()
            try:
                self._take_some(taken_now, left, keys, rows, report)
                requests = [
                    Request(slots.fd, slot * size, rows[i].ctypes.data, size, True)
                    for i, slots, slot in taken_now
                ]
                results = self.engine.run(requests)
            finally:  # the first block first, so a kill leaves no block without its predecessor
                results = results or [0] * len(taken_now)
                for (i, slots, slot), result in zip(taken_now, results, strict=True):
                    known = keys[i], generations[i], checksums[i]
                    landed[i] = self._seal(slots, slot, result, *known, report)
                    if not landed[i] or (left.gaps and predecessor(rows[i]) in left.gaps):
                        left.gaps.add(mark_of(keys[i]))
            taken += len(taken_now)
        self.touch([keys[i] for i in new])  # a prefix outlives its suffix
        hits = sum(landed[i] for i in new)
        self.graph.count(self.tier, "save", "hit", hits, hits * size)
        self.graph.count(self.tier, "save", "fault", taken - hits)
        self.graph.count(self.tier, "save", "dropped", len(new) - taken)
        return landed

    def _tries(self, queue: Queue, evict: bool) -> list[tuple[Slots, bool]]:
        """Return the folders to try for a slot in order, the queue's first, and which may evict a
        block.

        A folder with free slots comes before a folder that has to evict. Of several folders each
        has two turns to evict: a block of the same call goes only in the folder that has the last
        one, which may change between the turns.
        """
        first = next(slots for slots in self.parts if slots.queue is queue)
        folders = [first, *(slots for slots in self.parts if slots is not first)]
        free = [(slots, False) for slots in folders] if len(folders) > 1 else []
        evicting = [(slots, evict) for slots in folders]
        return [*free, *evicting, *(evicting if len(folders) > 1 else [])]

    def _take_some(
        self,
        taken: list[_Taken],
        left: _Left,
        keys: Sequence[bytes],
        rows: Sequence[Row],
        report: Report,
    ) -> None:
        """Take slots for the first blocks that are left; leave out blocks for which no folder has
        one.

        In one folder, ends before a block that has to wait for other writes while slots are taken:
        writes that wait for each other would not end. In several, sealed blocks would go before
        their successors have slots. A block after a gap evicts none.
        """
        several = len(self.parts) > 1
        while left.numbers:
            number = left.numbers[0]
            key = keys[number]
            follows = predecessor(rows[number])
            waits = several or not taken
            place = self._take(left, key, follows, waits)
            if isinstance(place, Reason):
                if not waits:
                    return
                left.gaps.add(mark_of(key))
                report(key, place)
                if place.where not in left.known_reasons():
                    topic = f"dropped {place.where}"
                    _warnings.warning(topic, "Block %s: %s", key.hex(), place.where, lines=1)
            else:
                if follows in left.gaps:
                    left.gaps.add(mark_of(key))
                taken.append((number, *place))
            left.numbers.popleft()

    def _take(
        self, left: _Left, key: bytes, follows: int, waits: bool
    ) -> tuple[Slots, int] | Reason:
        """Take a slot for a block in the first folder with space; return the reason if none has.
        ``waits``: for other writes, after which a folder may have."""
        tries = left.tries
        reason = Reason(
            reasons.DROPPED, f"{tries[0][0].folder.parent}: no slot is free or may be evicted"
        )
        for slots, evicts in tries:
            try:
                slot = slots.take(
                    key, left.own, follows, evicts and follows not in left.gaps, waits
                )
            except OSError as error:  # the folder cannot be listed, as without a free descriptor
                where = f"{slots.folder.parent}: {cause_of(error)}"
                reason = Reason(reasons.UNREACHABLE, where)
                continue
            if slot is not None:
                return slots, slot
            health = slots.health
            if health.lost or health.table_fault:
                reason = Reason(reasons.UNREACHABLE, health.lost or health.table_fault)
            elif health.shortage is not None:
                reason = Reason(reasons.DROPPED, health.shortage.why)
        return reason

    def _seal(
        self,
        slots: Slots,
        slot: int,
        result: int,
        key: bytes,
        generation: int,
        checksums: Sequence[int],
        report: Report,
    ) -> bool:
        """Record a block whose write ended with a result; return True if it is stored.

        After a failure, give the slot back and report the reason.
        """
        size = self.form.image_bytes
        stored = False
        if result == size:
            stored = slots.seal(slot, key, generation, checksums)
            why = slots.health.table_fault
        else:
            slots.give(slot, broken=result == -errno.EIO)
            why = os.strerror(-result) if result < 0 else "the write was cut short"
        if not stored:
            where = f"{slots.folder.parent}: {why}"
            report(key, Reason(reasons.UNREACHABLE, where))
            text = "Block %s could not be written: %s"
            _warnings.warning(f"not written {where}", text, key.hex(), where)
        return stored

    def look(self) -> None:
        """Look whether the folders are still there, and how much space they have.

        A file system that hangs holds this up.
        """
        for slots in self.parts:
            slots.look()
            slots.health.measure()

    def statistics(self) -> dict[str, Any]:
        """Return the figures of the slots by folder, as `look` left them."""
        figures = dict[str, Any]()
        for slots in self.parts:
            figures[str(slots.folder)] = {
                "io": self.engine.name,
                "used": len(slots.index),
                "count": slots.count,
                "limit": slots.limit,
                "configured": slots.health.configured,
                "broken": slots.broken,
                "missing": slots.health.missing,
                "free_bytes": slots.health.free_bytes,
                "lost": bool(slots.health.lost),
                "writable": self.writable,
                "evicted": slots.evicted,
                "direct": slots.direct,
            }
        return figures

    def close(self) -> None:
        """Put all on the devices, and close the folders."""
        for slots in self.parts:
            slots.close()
        if self.owns_engine:
            self.engine.close()

    def is_right(self, row: Row, expected: Header, segments: Sequence[int] | None) -> bool:
        """Return True if the segments in a row, header first, have their sealed checksums, which
        the engine may have verified."""
        if (segments is None or 0 in segments) and header(row, self.form) != expected:
            return False
        sealed = expected.checksums, expected.generation
        return verifies(self.engine) or verify(row, self.form, *sealed, segments)


class Disk:
    """A tier of blocks in ``folders``.

    Args:
        capacity: bytes of all forms and folders together, which may be a float such as 64e9; a
            fraction of a byte is cut. Each folder has an equal part. Saves allocate the space.
        admit: "second" stores a block when it is offered the second time.
        workers: the number of tasks that read or write in a folder at a time.
        io: "ring", "threads" or an I/O engine; None: the first that runs.
        depth: the most requests under way at a time for each worker of a folder, 1 to 32,768.
            Thousands of small blocks may gain by 1,024 or 2,048. "threads" has as many threads for
            all workers, at most 8; an engine that is passed as an object has its own depth.
        track: shows the progress of a recovery, as `rich.progress.track` does: it passes items on.
    """

    def __init__(
        self,
        *folders: str | Path,
        capacity: int,
        admit: Literal["always", "second"] = "always",
        workers: int = 4,
        io: str | Engine | None = None,
        depth: int = DEPTH,
        track: Track = lambda items, _: items,
    ) -> None:
        if not folders:
            raise invalid("folders", "one folder or more", folders, "Pass a folder.")
        for folder in folders:
            if not isinstance(folder, str | Path) or not str(folder):
                raise invalid("folders", "texts or Paths", folder, "Pass a path.")
            if "\0" in str(folder) or not _can_encode(str(folder)):
                raise invalid("folders", "paths that the system can hold", folder, "Pass a path.")
            if "://" in str(folder):
                raise InvalidTerms("Expected folders, got a URL. Pass the URL to `Remote`.")
        if len({os.path.realpath(folder) for folder in folders}) < len(folders):
            raise invalid("folders", "different folders", folders, "Pass each once.")
        if io is not None and (isinstance(io, str) or not hasattr(io, "run")):
            ENGINES.check("io", io)
        if not callable(track):
            raise invalid("track", "a function", track, "Leave it out, or pass one.")
        number("capacity", capacity, 1, (1 << 63) - 1024, "a number of bytes, 1 or more")

        self.folders = [Path(folder) for folder in folders]
        self.capacity = int(capacity)
        self.admit = one_of("admit", admit, ("always", "second"))
        self.workers = whole("workers", workers, 1, 1 << 16)
        self.io = io
        self.depth = whole("depth", depth, 1, 1 << 15)  # the most entries of a ring
        self.track = track
        self._present: list[BlockForm] = []  # at the last look

    def forms(self, form: BlockForm) -> list[BlockForm]:
        """Return the other forms of the same cache that lie in the folders."""
        every = (each for folder in self.folders for each in forms_in(folder))
        self._present = [*dict.fromkeys(every)]
        return [other for other in self._present if other != form and form.same_cache(other)]

    def open(
        self, graph: Graph, rows: Any, forms: Sequence[BlockForm], own: int = 1
    ) -> list[DiskStore]:
        """Return a tier store of each of the first ``own`` forms, which are created, and a tier
        store to read each other form.

        Leaves out, with a note: another form that cannot be opened, and a folder after the first
        one that another block store has. Requests go to ``rows.memory``.

        Raises `StoreBusy` for the first folder, and `StoreError` for any folder of an own form.
        """
        engine = self.io
        found = list[str]()
        if engine is None or isinstance(engine, str):
            engine, answers = choose(rows.memory, engine, self.depth)
            found = [str(each) for each in answers]

        capacity = self.capacity // len(self.folders)
        spaces = {folder: Space(folder, capacity) for folder in self.folders}
        lock: Lock | None = None  # of all own forms, since each may take slots of another one
        tier_stores = list[DiskStore]()
        with ExitStack() as undo:
            undo.callback(engine.close)
            for number, form in enumerate(forms):
                writable = number < own
                # Of all folders, as a prefix may lie in several.
                chains = Chains[bytes](lock if writable else None)
                lock = lock or chains.lock
                parts = self._open_form(form, writable, engine, chains, spaces, found, undo)
                for slots in parts:
                    slots.queue = graph.queue(f"disk:{slots.folder.parent}", width=self.workers)
                if parts:
                    notes = list[str]() if tier_stores else found
                    tier_stores.append(DiskStore(graph, form, parts, engine, writable, notes))
            tier_stores[0].owns_engine = True
            for tier_store in tier_stores if self.admit == "second" else ():
                if tier_store.writable:
                    count = sum(slots.limit for slots in tier_store.parts)
                    tier_store.offered = Bounded("keys offered once", count)
            for note in filter(None, map(open_to_others, self.folders)):
                found.append(note)
                _warnings.warning(note, "%s", note, lines=1)
            for note in size_notes(forms[:own], self._present):
                folders = ", ".join(map(str, self.folders))
                found.append(note)
                _warnings.warning(f"{note} {folders}", "%s: %s", folders, note)
            undo.pop_all()
        return tier_stores

    def _open_form(
        self,
        form: BlockForm,
        own: bool,
        engine: Engine,
        chains: Chains[bytes],
        spaces: dict[Path, Space],
        found: list[str],
        undo: ExitStack,
    ) -> list[Slots]:
        """Open a form in every folder that has it, or make it there if it is an ``own`` one.

        If the store works without a folder, it gets a note in ``found``: the others serve without
        one that another store has, which leaves ``spaces``, and a form need not be readable.
        """
        opened = list[Slots]()
        for folder, space in [*spaces.items()]:
            place = folder / form.name
            if not own and not (place / "form.json").exists():
                continue
            capacity = space.capacity if own else None
            try:
                slots = Slots(place, form, capacity, engine, self.track, chains, space)
            except StoreError as error:
                busy = isinstance(error, StoreBusy) and bool(opened)
                if own and not busy:
                    raise
                if own:
                    del spaces[folder]
                found.append(f"It does without {folder}. {error}" if own else str(error))
                continue
            undo.callback(slots.close)
            (space.writers if own else space.readers).add(slots)
            opened.append(slots)
        for slots in opened:
            slots.fit(opened)
            if own:
                folders = [other.folder.parent for other in opened if other is not slots]
                spaces[slots.folder.parent].others = folders
        return opened


def _can_encode(path: str) -> bool:
    """Return whether a path can be handed to the system; a lone surrogate cannot."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
