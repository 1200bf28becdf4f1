# SPDX-License-Identifier: Apache-2.0
"""`FormStore` saves and loads the blocks of one form of a block store."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import compress
from typing import Literal, TypeAlias, get_args

import numpy as np

from portakv.arguments import flag, invalid, one_of
from portakv.copy.options import USUAL, CopyOptions, options_from
from portakv.errors import StoreError, Unsupported
from portakv.graph import Handle, Missing, Priority, Task
from portakv.runtime.interrupts import abandoned
from portakv.storage.form_index import FormIndex
from portakv.storage.lent import Borrowed, Copier, Lending, LentQueue
from portakv.storage.plan import (
    CACHED,
    LONG,
    SAVED,
    SLICE,
    Call,
    Ending,
    FormBlocks,
    InFlight,
    SharedState,
)
from portakv.storage.rows import Crossing, Loan
from portakv.storage.sources import Source, ViewSource
from portakv.storage.tier import After, Keys, TierStore
from portakv.view import IdList, KVView

#: The options that a save takes, and a load, which also takes ``by_layer``.
OPTIONS = ("backend", "overlap", "max_thread_blocks")
#: The most bytes of a copy on the host that a load makes itself: 0.1 - 0.3 ms.
SHORT_COPY = 1 << 20
#: Loads in callers' threads whose use is recorded together.
HITS = 64
#: What a save does that finds no staging.
Full: TypeAlias = Literal["drop", "wait"]
# Their values, which take longer to list than a call has.
FULL = get_args(Full)
MISSING = get_args(Missing)
#: The steps of a plan, which returns a handle.
Steps: TypeAlias = Generator[None, None, Handle]


def _check_copier(copier: object) -> None:
    """Raise `InvalidTerms` for an object that is not a `Copier`."""
    if not callable(getattr(copier, "begin", None)):
        raise invalid("copier", "an object with begin(copy)", copier)


def _by_gaps(
    call: Call, tier_stores: Sequence[TierStore], blocks: list[int]
) -> Iterable[list[int]]:
    """Return blocks of a save apart, by which tiers can provide what their chains follow.

    So a prompt after a gap, for which no block goes, keeps no other prompt of the call from space.
    """
    if len({*map(call.request.roots.__getitem__, blocks)}) == 1:
        return [blocks]
    gaps = dict[bytes | None, tuple[bool, ...]]()
    alike = dict[tuple[bool, ...], list[int]]()
    for i in blocks:
        root = call.request.roots[i]
        if root not in gaps:
            before = [] if root is None else [root]
            gaps[root] = tuple(call.form.continues(before, x) for x in (None, *tier_stores))
        alike.setdefault(gaps[root], []).append(i)
    return alike.values()


class FormStore(FormIndex):
    """The blocks of one form of a `BlockStore`, which makes it by `BlockStore.of`.

    All forms of a store share its staging, host tier, tiers and workers. A key of one form names no
    block of another form, except where both are parts of one cache that overlap.

    Raises:
        StoreError: after the store was closed.
        InvalidTerms: wrong keys or terms, a key twice in a call, more keys than blocks.
        LayoutError, SlotError: a view of another cache; blocks that it lacks, or one twice.
        Unsupported: `save` or `load` inside graph capture.
    """

    def __init__(
        self, shared: SharedState, full: Full, weak_keys: bool, form: FormBlocks | None = None
    ) -> None:
        super().__init__(shared, weak_keys, form)
        self._full = full
        self._up, self._down = (
            shared.graph.queue(x, width=2) for x in ("host-device", "device-host")
        )
        self._lent = LentQueue(shared.graph, form.name if form else "")

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        after: After = None,
        priority: Priority = "background",
        deadline: float | None = None,
        full: Full | None = None,
        options: CopyOptions | None = None,
    ) -> Handle:
        """Save blocks of a view under keys.

        Skips a key that every writable tier has, or does not admit yet, or whose save is in
        progress. ``blocks``: ids of the view's blocks, whose tokens the keys name in order. If
        their size is not the form's, the last key need not fill them. Each key follows the key
        before it, and the first key follows ``after``, or begins a prompt. Keys of several prompts
        may come in one call, with a sequence as ``after``: for each key the one that it follows,
        or None.

        Tiers evict no block before its successors. A tier without space for all blocks stores the
        first ones. The others do not land, and neither do blocks that are evicted before the save
        ends. A full disk may keep a later block in place of an earlier one in four cases: a load
        reads the later block, another save writes at the same time, a write fails, or no write ends
        for two seconds. In a store that packs, packed blocks of a save do not go for its raw
        blocks, nor raw blocks for packed ones.

        The view's blocks are read until the end of `Handle.released`, which comes first: then their
        rows are in staging, or are not saved, and the caller may write the blocks again. ``full``:
        what happens to blocks that find no free staging; None: as the store does.

        ``options``: how blocks are copied from the view: backend, overlap, max_thread_blocks.
        """
        if full is not None:
            one_of("full", full, FULL)
        form = self._own("save")
        keys = self._keys(keys, priority, deadline)
        before = self._predecessors(after, keys)
        options = options_from(options, {})
        if options is not USUAL:
            options.check_only("a save", OPTIONS)
        size = form.own.form.block_size
        crossing = Crossing(view, blocks, len(keys), size, store=True, options=options)
        if self.chooser is not None:
            form = self._chosen(self.chooser.packs(view, crossing.ids), view.block_size)
        call = Call(form, "save", keys, priority, deadline, before)
        crossing.prepare(form.own.rows)
        packed = bool(form.own.form.encoding)
        source = ViewSource(view, crossing, self._down, self.rows.pinned, packed)
        return self._planned(call, partial(self._save, call, source, self._until(full)))

    def save_lent(
        self,
        copier: Copier,
        keys: Keys,
        *,
        after: After = None,
        priority: Priority = "background",
        deadline: float | None = None,
        full: Full | None = None,
        packs: bool = False,
    ) -> Handle:
        """Save blocks under keys, as `save` does, whose copies into the rows a copier makes.

        ``copier`` begins a `LentCopy` for each part of the blocks that has rows. Blocks that it
        ended and that landed are sealed and stored; the others do not land. `Handle.released` ends
        when the copier has ended all copies.

        A cancel or a deadline ends no copy that began: see `LentCopy.cancelled`. Its rows stay lent
        until the copier ends it, also after `BlockStore.close`.

        ``packs``: the copier copies by views of `LentCopy.form`, which packs if the form does, and
        copies blocks that do not fit once more, by `LentCopy.raw`. Packed blocks need it.
        """
        if full is not None:
            one_of("full", full, FULL)
        form = self._own("save")
        self._refuse_packed(form, "A lent save", packs)
        _check_copier(copier)
        keys = self._keys(keys, priority, deadline)
        before = self._predecessors(after, keys)
        call = Call(form, "save", keys, priority, deadline, before, lent=True)
        source = Lending(copier, self._lent, self._down)
        return self._planned(call, partial(self._save, call, source, self._until(full)))

    def _refuse_packed(self, form: FormBlocks, what: str, packs: bool) -> None:
        """Raise `Unsupported` for a store of blocks that are packed, or may be, unless the copier
        packs and unpacks; and for one that chooses."""
        flag("packs", packs)
        if self.chooser is not None:
            why = "the store chooses for each save; name the form, or save and load by views"
            raise Unsupported(f"{what} of packed blocks", why)
        if form.own.form.encoding and not packs:
            why = (
                "others would copy packed rows as they are; pass packs=True, or save and load by "
                "views"
            )
            raise Unsupported(f"{what} of packed blocks", why)

    def _until(self, full: Full | None) -> float | None:
        """Return the time at which blocks of a save are dropped that have no staging by then."""
        return self.graph.clock() if (full or self._full) == "drop" else None

    def _save(self, call: Call, source: Source, until: float | None) -> Steps:
        """Plan a save in steps, under the graph's lock."""
        keys = call.request.keys
        follows = call.request.follows
        slices = call.slices(range(len(keys)))
        for number, part in enumerate(reversed(slices)):
            if number:
                yield
            call.form.touch([keys[i] for i in part], [follows[i] for i in part])
        groups = dict[tuple[TierStore, ...], list[int]]()
        for number, part in enumerate(slices):
            if number:
                yield
            self._lacking(call, part, groups)
        for tier_stores, some in groups.items():
            for alike in _by_gaps(call, tier_stores, some):
                yield from self._save_in(call, source, until, tier_stores, alike)
        handle = call.handle(source.view, eligible=partial(call.form.stored, keys))
        handle.add_copies(source.ends)
        return handle

    def _save_in(
        self,
        call: Call,
        source: Source,
        until: float | None,
        tier_stores: tuple[TierStore, ...],
        some: list[int],
    ) -> Generator[None, None, None]:
        """Plan in steps the save of blocks that some tiers lack."""
        form = call.form
        queues = [tier_store.queue_for_write(0) for tier_store in tier_stores]
        # Without a write, a small task has no work that workers could share.
        nbytes = LONG if source.long_tasks and not tier_stores else SAVED
        chunks = call.chunks(form.own, some, nbytes, 1, *queues)

        # After a gap no block evicts another one. The first blocks take the free slots only if
        # each chunk waits for the writes of the chunk before it.
        before = call.request.before(some)
        gaps = {x for x in tier_stores if not form.continues(before, x)}

        written = dict[TierStore, Ending]()
        generation = self._shared.generation + len(chunks)  # a prefix is the newer part
        self._shared.generation = generation
        together = max(1, SLICE // len(chunks[0]))
        for first in range(0, len(chunks), together):
            if first:
                yield
            group = [self._left(call, at, tier_stores) for at in chunks[first : first + together]]
            started = [InFlight(call, form.own, at, until) for at in group if at]
            if until is not None:
                self._make_way(call, started)
            source.issue(call, started)
            for in_flight in started:
                if tier_stores:
                    in_flight.generation = generation
                    generation -= 1
                gather = source.gather(call, in_flight)
                self._write(call, in_flight, gather, tier_stores, gaps, written)
                if tier_stores:
                    call.submit()  # now, so that the queues count it for the next chunk
            call.submit()

    def _write(
        self,
        call: Call,
        in_flight: InFlight,
        gather: Task,
        tier_stores: Sequence[TierStore],
        gaps: set[TierStore],
        written: dict[TierStore, Ending],
    ) -> None:
        """Plan the writes of a chunk of a save."""
        at = in_flight.calls[0][1]
        for tier_store in tier_stores:
            queue = tier_store.queue_for_write(len(at) * call.form.own.form.image_bytes)
            write = partial(in_flight.write, tier_store, queue)
            order: list[Ending] = []
            if tier_store in gaps and tier_store in written:
                order.append(written[tier_store])
            task = call.task(at, write, queue, in_flight, [gather, *order])
            if tier_store.tier == "remote" and in_flight.until is not None:
                call.form.uploads.begin(task, len(at))
            written[tier_store] = (task, [], [])
            in_flight.last.append(task)
        call.ends += [((end, at, range(len(at))), range(0)) for end in in_flight.last]

    def _make_way(self, call: Call, started: Sequence[InFlight]) -> None:
        """Drop uploads whose rows a save to a nearer tier needs, under the graph's lock."""
        tier_stores = call.form.own.tier_stores
        if not any(x.writable and x.tier != "remote" for x in tier_stores):
            return
        every = [each.uploads for each in self._shared.forms.values()]
        count = sum(in_flight.count for in_flight in started)
        dropped = call.form.uploads.make_way(every, self.rows, self.graph, count)
        if dropped:
            text = (
                "A remote tier is slower than saves: %d blocks are not put there. Raise its "
                "`workers`, or leave these blocks to nearer tiers."
            )
            self._shared.log.warning("uploads", text, dropped, lines=1)

    def _lacking(
        self, call: Call, blocks: Sequence[int], groups: dict[tuple[TierStore, ...], list[int]]
    ) -> None:
        """Add blocks of a save to groups, by the tiers that lack them."""
        own = call.form.own
        tier_stores = [tier_store for tier_store in own.tier_stores if tier_store.writable]
        keeps = [tier_store.where for tier_store in tier_stores if tier_store.tier != "remote"]
        call.explanation.saved_in = ", ".join(keeps if tier_stores else ["the host tier"])

        # A block that a tier does not admit yet need not land.
        keys = [call.request.keys[i] for i in blocks]
        spare = call.form.spare
        known = [spare.known(tier_store, keys) for tier_store in tier_stores]
        wants = [spare.wants(tier_store, keys) for tier_store in tier_stores]
        for stored, wanted in zip(known, wants, strict=True):
            call.excused[blocks] |= ~(np.array(stored, np.bool_) | np.array(wanted, np.bool_))

        if not tier_stores:
            wants = [[not there for there in spare.cached(self.rows, keys)]]
        for i, each in zip(blocks, zip(*wants, strict=True), strict=True):
            if any(each):
                lacks = tuple(compress(tier_stores, each))
                groups.setdefault(lacks, []).append(i)

    def _left(
        self, call: Call, blocks: Sequence[int], tier_stores: Sequence[TierStore]
    ) -> list[int]:
        """Return the blocks that no other save brings to tiers; join the saves of the others.

        Since the look at the tiers another save may have begun, or ended, between two steps.
        """
        keys = [call.request.keys[i] for i in blocks]
        names = call.form.own.names(keys)
        stored = [False] * len(keys)
        if not tier_stores:
            stored = self.rows.has_each(names)
        elif len(call.request.keys) > SLICE:
            known = [tier_store.known(keys) for tier_store in tier_stores]
            stored = [*map(all, zip(*known, strict=True))]
        if not any(stored) and self._shared.in_transit.keys().isdisjoint(names):
            return [*blocks]
        left = list[int]()
        for i, name, there in zip(blocks, names, stored, strict=True):
            in_flight, row = self._shared.in_transit.get(name, (None, 0))
            if in_flight and in_flight.store and in_flight.wanted:
                call.ends += [((end, [i], [row]), range(0)) for end in in_flight.last]
                call.explanation.sources.append(in_flight.reasons)
                call.explanation.tasks += [(end, [i], [row]) for end in in_flight.last]
            elif not there:
                left.append(i)
        return left

    def load(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        by_layer: bool = False,
        missing: Missing = "raise",
        options: CopyOptions | None = None,
    ) -> Handle:
        """Load blocks into a view of any layout, device and block size.

        Blocks that no tier has, or not with correct bytes, do not land (`Handle.landed`). No byte
        of them, or of a negative id in ``blocks``, is written; a key without another id is refused.

        This call issues the copy of blocks that the host tier has, ordered on the current stream of
        the view's device, whatever its priority and deadline. Workers copy the others, and all of
        them at a limited rate or in a longer copy between host views; also by layer if the host
        tier does not have all. `trace` and queues know what workers copy.

        ``by_layer``: read, verify and deliver layers one after the other, each with a separate end
        (`Handle.layers`). Some layers of a block that does not land may then be written, with
        correct bytes. Blocks of a form with one segment are read whole, and only the device's stage
        goes by layer.

        ``options``: in place of ``by_layer``: also backend, overlap, max_thread_blocks.
        """
        one_of("missing", missing, MISSING)
        options = options_from(options, {"by_layer": by_layer})
        by_layer = options.by_layer
        if by_layer:
            options = replace(options, by_layer=False)
        if options is not USUAL:
            options.check_only("a load", OPTIONS)
        form = self._own("load")
        keys = self._keys(keys, priority, deadline)
        crossing = Crossing(view, blocks, len(keys), form.own.form.block_size, options=options)
        form = self._for_view(form, view.block_size, view.form.encoding)
        loan = self._loan(form, crossing, view, keys, by_layer)
        if loan is not None and None not in loan.rows:
            transfer, layers = crossing.issue(form.own.rows, loan, by_layer)
            self._count_hits(form, keys)
            handle = Handle.of_issued(self.graph, len(keys), transfer, layers)
            return self._follow_issued(handle, form)
        call = Call(form, "load", keys, priority, deadline)
        crossing.prepare(form.own.rows)
        steps = partial(self._load, call, crossing, view, by_layer, missing, loan)
        handle = self._planned(call, steps)
        if loan is not None:
            try:
                hits = np.array([row is not None for row in loan.rows])
                handle.add_issued(crossing.issue(form.own.rows, loan)[0], hits)
                self._count_hits(form, [key for key, hit in zip(keys, hits, strict=True) if hit])
                self._follow_issued(handle, form, call.barrier)
            except BaseException:  # also an interrupt: no caller has a handle
                handle.cancel()
                raise
        return handle

    def _load(
        self,
        call: Call,
        crossing: Crossing,
        view: KVView,
        by_layer: bool,
        missing: Missing,
        loan: Loan | None,
    ) -> Steps:
        """Plan the part of a load that workers move in steps, under the graph's lock."""
        hits = () if loan is None else loan.rows
        blocks = [i for i, _ in enumerate(call.request.keys) if not hits or hits[i] is None]
        stages_of = cache(lambda part: part.stages(view, by_layer))
        for number, some in enumerate(call.slices(blocks, whole=by_layer)):
            if number:
                yield
            for (part, location), at in call.groups(some).items():
                stages = stages_of(part)
                segments = [stage.segment for stage in stages]
                for arrival in call.bring(part, location, at, segments):
                    call.cross(arrival, stages, crossing, self._up)
            call.submit()
        yield from self._touch(call)
        return call.handle(view, view.layers * by_layer, missing, follow=loan is None)

    def _touch(self, call: Call) -> Generator[None, None, None]:
        """Record in steps the use of the blocks of a load."""
        for number, some in enumerate(reversed(call.slices(range(len(call.request.keys))))):
            if number:
                yield
            call.form.touch([call.request.keys[i] for i in some])

    def load_lent(
        self,
        copier: Copier,
        keys: Keys,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        missing: Missing = "skip",
        packs: bool = False,
    ) -> Handle:
        """Load blocks, as `load` does, whose copies out of the rows a copier makes.

        ``copier`` begins a `LentCopy` for each part of the blocks as soon as they are in rows and
        verified. Blocks that no tier has are in no copy. A block lands if the copier ends all of
        its copies so.

        A cancel or a deadline ends no copy that began: see `LentCopy.cancelled`. Its rows stay
        until the copier ends it, and so does the handle.

        ``packs``: the copier copies by views of `LentCopy.form`, which unpacks if the form packs.
        Without it, packed blocks of a tier count as missing.
        """
        one_of("missing", missing, MISSING)
        form = self._own("load")
        self._refuse_packed(form, "A lent load", packs)
        _check_copier(copier)
        keys = self._keys(keys, priority, deadline)
        call = Call(form, "load", keys, priority, deadline, lent=True)
        lending = Lending(copier, self._lent, self._down)
        return self._planned(call, partial(self._load_lent, call, lending, missing, packs))

    def _load_lent(self, call: Call, lending: Lending, missing: Missing, packs: bool) -> Steps:
        """Plan a load whose copies are lent in steps, under the graph's lock."""
        for number, some in enumerate(call.slices(range(len(call.request.keys)))):
            if number:
                call.submit()
                yield
            groups = call.groups(some)
            # Others would copy packed rows as they are, so these blocks count as missing.
            packed = set[int]()
            if not packs:
                packed = {i for (part, _), at in groups.items() if part.form.encoding for i in at}
                call.located[[*packed]] = False
            for (part, location), at in groups.items():
                left = [i for i in at if i not in packed] if packed else at
                for arrival in call.bring(part, location, left, [None]) if left else ():
                    lending.cross(call, part, arrival)
        yield from self._touch(call)
        return call.handle(None, missing=missing)

    def borrow(self, keys: Keys, packs: bool = False) -> Borrowed | None:
        """Return the rows of blocks of the host tier, which a copier copies out of, as those of
        `load_lent`; None unless the host tier has all blocks. ``packs``: as there.

        The call plans nothing and takes no lock. The rows stay until `Borrowed.end`; the store does
        not close before that.
        """
        form = self._own("call of borrow()")
        self._refuse_packed(form, "A call of borrow()", packs)
        keys = self._keys(keys, "urgent", None)
        if not self.rows.host:
            return None
        borrowed = Borrowed(form.own, len(keys))
        loan = self.rows.borrow(form.own.names(keys), borrowed)
        borrowed.loan = loan
        self._refuse_closed("call of borrow()")  # `close` sees the loan, or this call that
        if None in loan.rows:
            loan.cancel()
            return None
        borrowed.rows = [row for row in loan.rows if row is not None]
        self._count_hits(form, keys)
        return borrowed

    def _loan(
        self, form: FormBlocks, crossing: Crossing, view: KVView, keys: list[bytes], whole: bool
    ) -> Loan | None:
        """Return the rows of blocks that the caller's thread copies; None if workers copy all.

        The caller's thread issues a copy to a device, which it does not wait for, and makes a short
        one on the host. ``whole``: rows of all keys, or None.
        """
        if not self.rows.host or self._up.max_gbps is not None:
            return None
        if view.device.type == "cpu":
            here = len(keys) * form.own.form.payload_bytes <= SHORT_COPY
        else:
            here = self.rows.pinned
        if not here:
            return None
        loan = self.rows.borrow(form.own.names(keys), crossing)
        self._refuse_closed("load")  # `close` sees the loan, or this call sees that it is closed
        missed = loan.rows.count(None)
        if missed and (whole or missed == len(keys)):
            loan.cancel()
            return None
        return loan

    def _follow_issued(
        self, handle: Handle, form: FormBlocks, barrier: Task | None = None
    ) -> Handle:
        """Announce a handle of which a part was issued, if somebody asks for ended handles."""
        handle.form = form.name
        if self._shared.announced.handles.started:
            self._shared.announced.follow_issued(handle, barrier)
        return handle

    def _count_hits(self, form: FormBlocks, keys: list[bytes]) -> None:
        """Count blocks that the caller's thread loaded; their use is recorded later, together."""
        self.graph.count("host", "load", "hit", len(keys), len(keys) * form.own.form.image_bytes)
        form.count("host", "load", "hit", len(keys))
        self._shared.hits.append((form, keys))
        if len(self._shared.hits) >= HITS:
            self.graph.run(self._shared.record_hits)

    def prefetch(self, keys: Keys, priority: Priority = "background") -> Handle:
        """Read blocks into the host tier.

        Blocks that are prefetched and not loaded yet take at most half of the tier: blocks above
        that do not land. Raises `StoreError` without a host tier.
        """
        if not self.rows.host:
            raise StoreError(
                "Expected a store with a host tier for a prefetch, got one without. Pass host=."
            )
        form = self._own("prefetch")
        keys = self._keys(keys, priority, None)
        call = Call(form, "prefetch", keys, priority)
        return self._planned(call, partial(self._prefetch, call))

    def _prefetch(self, call: Call) -> Steps:
        """Plan a prefetch in steps, under the graph's lock."""
        most = max(1, self.rows.holds(call.form.own.form.image_bytes) // 2)
        call.located[most:] = False
        for number, blocks in enumerate(call.slices(range(len(call.request.keys))[:most])):
            if number:
                yield
            for (part, location), some in call.groups(blocks).items():
                if location == CACHED:
                    continue
                for arrival in call.bring(part, location, some, [None]):
                    ends = [(end, arrival.at, arrival.rows) for end in arrival.ends[0]]
                    call.ends += [(end, range(0)) for end in ends]
            call.submit()
        return call.handle(None, missing="skip")

    def _planned(self, call: Call, plan: Callable[[], Steps]) -> Handle:
        """Return the handle that ``plan()`` returns, whose steps run while the graph is locked and
        the store open. Cancel the call if the caller is interrupted meanwhile."""

        def planned() -> Steps:
            try:
                self._refuse_closed(call.request.kind)
                self._shared.record_hits()
                steps = plan()
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        handle: Handle = end.value
                        return handle
                    yield
                    if abandoned():
                        raise KeyboardInterrupt  # the caller has raised it, and has no handle
                    self._refuse_closed(call.request.kind)
            except BaseException:  # also an interrupt: no caller has a handle
                call.drop()
                raise

        return self.graph.run_steps(planned(), undo=Handle.cancel)

    def _hanging(self, all_tasks: bool) -> int:
        """Return the number of transfers of the store that have not ended, under the graph's lock.

        Lent copies do not count: they use no tier. ``all_tasks``: count all tasks of the graph.
        """
        live = [x for x in self.graph.live if x.queue and not isinstance(x.queue, LentQueue)]
        begun = self._shared.begun
        return len({task.lease for task in live if all_tasks or task.lease in begun})
