# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` saves blocks of caches under keys and loads them into any view of these caches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from itertools import compress
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from portakv.arguments import flag, instance, invalid, nbytes, one_of, seconds, text
from portakv.copy.options import USUAL, CopyOptions, options_from
from portakv.errors import InvalidTerms, StoreError, TransferTimeout, Unsupported
from portakv.graph import watch
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.transfer import Completion
from portakv.storage.calls import (
    APART,
    CACHED,
    LONG,
    PACKED_FORM,
    RAW,
    SAVED,
    SLICE,
    Arrival,
    AutoEncoding,
    Call,
    Change,
    Chooser,
    Encoding,
    FormBlocks,
    FormPart,
    InFlight,
    Listed,
    Request,
    SharedState,
    Snapshot,
    forms_for,
    named_indices,
    parts_of,
    terms_of,
)
from portakv.storage.eviction import Pinning, Pins
from portakv.storage.form import BlockForm
from portakv.storage.keys import check_key, check_keys, different_keys, predecessors
from portakv.storage.lent import Borrowed, Copier, Lending, LentQueue
from portakv.storage.memory import Crossing, HostIndex, Loan, Rows, rows_for
from portakv.storage.tiers.base import After, Keys, Tier, TierStore, tier_figures, tiers_of
from portakv.storage.work import Ending, Graph, Handle, Mask, Missing, Queue, Task
from portakv.tasks import SLACK, Priority
from portakv.tasks.runtime import Steps
from portakv.view import IdList, KVView
from portakv.view.form import Form

# ------------------------------------------------------------------------------------------------
# The sources of a save: how the blocks of its caller come into rows.


class ViewSource:
    """The view of a caller, which helpers read, or copies that `issue` issues.

    Attributes:
        view: of the caller.
        issues: True if `issue` makes the copies of chunks that have rows.
        long_tasks: True if a copy takes the host as long for few bytes as for many.
        ends: of the copies that were issued.
    """

    def __init__(
        self, view: KVView, crossing: Crossing, queue: Queue, pinned: bool, packed: bool
    ) -> None:
        self.view = view
        self._crossing = crossing
        self._queue = queue
        fast = pinned and not queue.max_gbps  # otherwise a helper keeps the pace, or waits
        # A helper sees which packed blocks do not fit. To other devices than CUDA's, ids go by a
        # copy for which the host waits; see `registry.prepared.ASYNCHRONOUS`.
        self.issues = fast and view.device.type == "cuda" and not packed
        self.ends: Sequence[Completion] = crossing.ends
        self.long_tasks = self.issues or (fast and crossing.on_device and packed)

    def issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Issue copies for the chunks of a save from a device for which staging has room.

        If all chunks but the last are long, each has a separate copy, so that the link is busy
        while rows for the next one are evicted. Otherwise all have one copy together.
        """
        if not self.issues:
            return
        payload = call.form.own.form.payload_bytes
        if all(in_flight.count * payload >= APART for in_flight in started[:-1]):
            for in_flight in started:
                self._issue(call, [in_flight])
        else:
            self._issue(call, started)

    def _issue(self, call: Call, started: Sequence[InFlight]) -> None:
        """Issue one copy for chunks for which staging has room."""
        crossing = self._crossing
        granted = [in_flight for in_flight in started if call.shared.row_queue.take(in_flight)]
        if granted:
            items = [item for in_flight in granted for item in in_flight.items]
            blocks = [block for in_flight in granted for block in in_flight.at]
            try:
                crossing.begin(call.form.own.rows, items, blocks)
                call.form.figures.add_raw(call.form.own.form, len(blocks))
            finally:  # a part may write the rows
                for in_flight in granted if crossing.ends else ():
                    in_flight.copied = partial(crossing.wait, crossing.ends[-1])

    def gather(self, call: Call, in_flight: InFlight) -> list[Task]:
        """Return the task that copies blocks of the view into rows, and seals them."""
        work = partial(in_flight.gather, self._crossing, self.view)
        task = call.task(in_flight.at, work, self._queue, in_flight)
        task.soon = in_flight.drops  # it waits for no staging either
        if in_flight.copied is None:
            call.gathers.append(task)
        return [task]


#: Brings the blocks of a save into rows.
Source: TypeAlias = ViewSource | Lending


# ------------------------------------------------------------------------------------------------
# `FormStore` looks up, saves and loads the blocks of one form of a block store.

#: Says which blocks a tier store has.
Has: TypeAlias = Callable[[TierStore, list[bytes]], list[bool]]
LOOKUP_BATCH = 8  # blocks of the first request of a lookup; each next request has twice as many
#: The options that a save takes, and a load, which also takes ``by_layer``.
OPTIONS = ("backend", "overlap", "max_thread_blocks")
#: Loads in callers' threads whose use is recorded together.
HITS = 64
#: What a save does that finds no staging.
Full: TypeAlias = Literal["drop", "wait"]
# Their values, which take longer to list than a call has.
FULL = get_args(Full)
MISSING = get_args(Missing)


def _known(tier_store: TierStore, keys: list[bytes]) -> list[bool]:
    """Return which blocks a tier store has, as far as is known here."""
    return tier_store.known(keys)


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
    roots = call.request.roots
    gaps = dict[bytes | None, tuple[bool, ...]]()
    for root in dict.fromkeys(roots[i] for i in blocks):
        before = [] if root is None else [root]
        gaps[root] = tuple(call.form.continues(before, x) for x in (None, *tier_stores))
    alike = dict[tuple[bool, ...], list[int]]()
    for i in blocks:
        alike.setdefault(gaps[roots[i]], []).append(i)
    return alike.values()


class FormStore:
    """The blocks of one form of a `BlockStore`, which makes it by `BlockStore.of`.

    All forms of a store share its staging, host tier, tiers and queues. A key of one form names no
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
        self._shared = shared
        self._full = full
        self._weak = weak_keys
        self._form = form  # None: of a store with several forms
        self.chooser: Chooser | None = None  # of a store that packs where it pays
        # Then its raw form, whose saves do not look for packed blocks.
        self._raw_alone: FormBlocks | None = None
        self._up, self._down = (
            shared.graph.queue(x, width=2) for x in ("host-device", "device-host")
        )
        self._lent = LentQueue(shared.graph, form.name if form else "")

    @property
    def form(self) -> BlockForm:
        """Return the form of the blocks. Raises `InvalidTerms` for a store with several forms."""
        return self._only("look at `form`").own.form

    @property
    def graph(self) -> Graph:
        """Return the graph, in the turns of whose queues helpers move the blocks."""
        return self._shared.graph

    @property
    def rows(self) -> Rows:
        """Return the host memory of the store, which all of its forms share."""
        return self._shared.rows

    def lookup(self, keys: Keys, timeout: float | None = 1.0) -> int:
        """Return the number of leading blocks that can be loaded, from the host or a tier.

        Blocks that a remote tier does not confirm within ``timeout`` seconds count as missing. Only
        this call asks a remote tier for blocks in other parts than this form's: a `load` or
        `prefetch` uses the answer.
        """
        form = self._own("lookup")
        keys = self._keys(keys, "normal", None)
        leading = self._leading(form, keys, self._asking(timeout))
        uninterrupted(partial(form.touch, keys[:leading]))
        return leading

    def lookup_each(self, keys: Keys, timeout: float | None = 1.0) -> list[bool]:
        """Return which blocks can be loaded, from the host or a tier; otherwise as `lookup`, but
        it does not count as a use of them."""
        form = self._own("lookup_each")
        keys = self._keys(keys, "normal", None)
        return self._there(form, keys, self._asking(timeout))

    def _asking(self, timeout: float | None) -> Has:
        """Return a function that asks tier stores for blocks, from now on for so many seconds."""
        clock = self.graph.clock
        until = clock() + seconds("timeout", timeout, optional=True)
        return lambda tier_store, keys: tier_store.has(keys, max(0.0, until - clock()))

    def has(self, key: bytes) -> bool:
        """Return whether the block of a key can be loaded, as far as is known here.

        Looks in the host tier and in the tiers' indices, of which a remote tier's knows the blocks
        of recent lookups, loads and saves. Sends no request, waits for nothing, and does not count
        as a use of the block.
        """
        form = self._own("call of has()")
        if type(key) is not bytes or len(key) != 32:
            key = check_key(
                "key to be one of a block", key, "Pass bytes, such as a prefix key.", self._weak
            )
        rows = self._shared.rows
        cover = 0
        for part in form.parts:
            there = rows.has(part.name(key))
            for tier_store in part.tier_stores:  # a generator takes a quarter of this call's time
                there = there or tier_store.known([key])[0]
            if there:
                cover |= part.cells
                if cover == form.own.cells:
                    return True
        return False

    def has_each(self, keys: Keys) -> list[bool]:
        """Return which blocks can be loaded, as far as is known here; answers as `has` does."""
        form = self._own("call of has_each()")
        return self._there(form, check_keys(keys, self._weak), _known)

    def pin(self, keys: Keys) -> Pins:
        """Keep blocks where they are, in the host tier or on a disk, until `Pins.release`.

        A block that is nowhere, or in parts of other forms, is not kept. A remote tier evicts
        nothing: a block that is known to be there counts as kept.
        """
        form = self._own("call of pin()")
        keys = check_keys(keys, self._weak)
        return uninterrupted(partial(self._pin, form, keys), undo=Pins.release)

    def _pin(self, form: FormBlocks, keys: Keys) -> Pins:
        """Pin blocks, in the nearest tier that has them."""
        pins = Pins(len(keys))
        rows = self._shared.rows
        for part in form.whole_parts:
            left = np.flatnonzero(~pins.held).tolist()
            loan = rows.pin(part.names([keys[i] for i in left]))
            there = [i for i, row in zip(left, loan.rows, strict=True) if row is not None]
            pins.add(there, loan.cancel)
        pins.here |= pins.held
        for tier_store in (store for part in form.whole_parts for store in part.tier_stores):
            left = np.flatnonzero(~pins.held).tolist()
            some = [keys[i] for i in left]
            if isinstance(tier_store, Pinning):
                for i, pin in zip(left, tier_store.pin(some), strict=True):
                    if pin is not None:
                        pins.add([i], pin.release)
            else:
                known = tier_store.known(some)
                pins.held[left] = known
        return pins

    def delete(self, keys: Keys) -> Mask:
        """Forget blocks in the host tier and on disks; return which were there, bool ``[keys]``.

        A row of the host tier that is pinned, or that a load reads, stays. Objects in a remote
        tier stay. A save of the block that is in progress stores it again.
        """
        form = self._own("call of delete()")
        keys = check_keys(keys, self._weak)
        return uninterrupted(partial(self._delete, form, keys))

    def _delete(self, form: FormBlocks, keys: Keys) -> Mask:
        """Forget blocks."""
        gone = np.zeros(len(keys), np.bool_)
        for part in form.whole_parts:
            gone |= np.array(self._shared.rows.delete(part.names(keys)), np.bool_)
            for tier_store in part.tier_stores:
                if isinstance(tier_store, Pinning):
                    gone |= np.array(tier_store.delete(keys), np.bool_)
        return gone

    def touch(self, keys: Keys) -> None:
        """Record the use of blocks, the first key last, so that a prefix outlives its suffix."""
        form = self._own("call of touch()")
        keys = check_keys(keys, self._weak)
        uninterrupted(partial(form.touch, keys))

    def leading(self, keys: Keys) -> int:
        """Return the number of leading blocks that can be loaded, as far as is known here.

        Answers as `has` does, for all keys in one pass.
        """
        form = self._own("call of leading()")
        keys = check_keys(keys, self._weak)
        return self._leading(form, keys, _known)

    def _leading(self, form: FormBlocks, keys: Keys, has: Has) -> int:
        """Return the number of leading blocks that tiers have, by what ``has`` says of each."""
        leading = 0
        many = LOOKUP_BATCH
        while leading < len(keys):
            batch = keys[leading : leading + many]
            there = [*self._there(form, batch, has), False].index(False)
            leading += there
            if there < len(batch):
                break
            many = 2 * many
        return leading

    def _there(self, form: FormBlocks, keys: Keys, has: Has) -> list[bool]:
        """Return which blocks are in one part, or in several together, by what ``has`` says of
        tiers."""
        whole = form.own.cells
        rows = self._shared.rows
        covers = [0] * len(keys)
        for part in form.parts:
            there = rows.has_each(part.names(keys))
            if all(there) and part.cells == whole:
                return there
            useful = [bool(part.cells & ~cover) for cover in covers]
            for tier_store in part.tier_stores:
                left = [i for i, present in enumerate(there) if useful[i] and not present]
                if left:
                    answers = has(tier_store, [keys[i] for i in left])
                    for i, present in zip(left, answers, strict=True):
                        there[i] = present
            for i in compress(range(len(keys)), there):
                covers[i] |= part.cells
        return [cover == whole for cover in covers]

    def keys(self) -> Snapshot:
        """Return the keys of the host tier and of each tier with an index, and the number of the
        last change.

        A process that keeps an index begins with this, and applies what `BlockStore.listen`
        returns. Blocks of other forms are left out, except in a store that packs where it pays,
        whose keys are those of both forms.
        """
        form = self._own("call of keys()")
        names = [form.name] if self.chooser is None else [*self._shared.forms]
        return uninterrupted(partial(self._shared.announced.snapshot, names))

    def _keys(self, keys: Keys, priority: Priority, deadline: float | None) -> list[bytes]:
        """Return keys of 32 bytes; reject wrong keys and terms."""
        keys = different_keys(keys, self._weak)
        one_of("priority", priority, SLACK)
        seconds("deadline", deadline, optional=True)
        return keys

    def _own(self, kind: str) -> FormBlocks:
        """Return the blocks of the form, of an open store. Raises as `_refuse_closed` and `_only`
        do."""
        self._refuse_closed(kind)
        return self._only(kind)

    def _only(self, kind: str) -> FormBlocks:
        """Return the blocks of the form. Raises `InvalidTerms` for a store with several forms."""
        if self._form is None:
            names = [*self._shared.forms]
            raise InvalidTerms(
                f"Expected one form for a {kind}, got a store with the forms {', '.join(names)}. "
                f"Take one by store.of({names[0]!r})."
            )
        return self._form

    def _chosen(self, packs: bool, block_size: int | None) -> FormBlocks:
        """Return the form that a save has chosen. Later calls look it up first.

        ``block_size``: that of the view. Packed blocks do not serve views of other block sizes,
        whose saves store raw blocks also next to packed ones.
        """
        form = self._shared.forms[PACKED_FORM if packs else RAW]
        other_size = block_size != form.own.form.block_size
        if self._raw_alone is not None and other_size and not packs:
            return self._raw_alone
        self._form = form
        return form

    def _for_view(self, form: FormBlocks, view: Form) -> FormBlocks:
        """Return the form to load into a view of a form.

        A store that chooses loads by its raw form, unless packed blocks serve the view.
        """
        if self.chooser is None or not form.own.form.encoding:
            return form
        rows = form.own.rows.form
        if view.block_size == rows.block_size and view.encoding in ((), rows.encoding):
            return form
        return self._shared.forms[RAW]

    def _refuse_closed(self, kind: str) -> None:
        shared = self._shared
        graph = shared.graph
        if not (shared.closed or graph.closed or graph.process.forked):
            return
        got = "one whose graph was closed"
        if shared.closed:
            got = "one that was closed"
        if graph.process.forked:
            got = "one of the process that this one was forked from"
        raise StoreError(f"Expected an open store for a {kind}, got {got}. Make another.")

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
        drops = self._drops(full)
        form = self._own("save")
        keys = self._keys(keys, priority, deadline)
        before = predecessors(after, keys, self._weak)
        options = options_from(options, {})
        if options is not USUAL:
            options.check_only("a save", OPTIONS)
        size = form.own.form.block_size
        crossing = Crossing(view, blocks, len(keys), size, store=True, options=options)
        if self.chooser is not None:
            form = self._chosen(self.chooser.packs(view, crossing.ids), view.block_size)
        call = Call(form, Request("save", keys, priority, deadline, before))
        crossing.prepare(form.own.rows)
        packed = bool(form.own.form.encoding)
        source = ViewSource(view, crossing, self._down, self.rows.pinned, packed)
        return self._planned(call, partial(self._save, call, source, drops))

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
        drops = self._drops(full)
        form = self._own("save")
        self._refuse_packed(form, "A lent save", packs)
        _check_copier(copier)
        keys = self._keys(keys, priority, deadline)
        before = predecessors(after, keys, self._weak)
        call = Call(form, Request("save", keys, priority, deadline, before, lent=True))
        source = Lending(copier, self._lent, self._down)
        return self._planned(call, partial(self._save, call, source, drops))

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

    def _drops(self, full: Full | None) -> bool:
        """Return True if blocks of a save are dropped that find no staging. Raises `InvalidTerms`
        for another value."""
        if full is not None:
            one_of("full", full, FULL)
        return (full or self._full) == "drop"

    async def _save(self, call: Call, source: Source, drops: bool) -> Handle:
        """Plan a save, under the graph's lock."""
        keys = call.request.keys
        await self._touch(call)
        groups = dict[tuple[TierStore, ...], list[int]]()
        for number, part in enumerate(call.slices(range(len(keys)))):
            if number:
                await self._breathe(call)
            self._lacking(call, part, groups)
        for tier_stores, some in groups.items():
            for alike in _by_gaps(call, tier_stores, some):
                await self._save_in(call, source, drops, tier_stores, alike)
        handle = call.handle(source.view, eligible=partial(call.form.stored, keys))
        handle.add_copies(source.ends)
        return handle

    async def _save_in(
        self,
        call: Call,
        source: Source,
        drops: bool,
        tier_stores: tuple[TierStore, ...],
        some: list[int],
    ) -> None:
        """Plan the save of blocks that some tiers lack."""
        form = call.form
        queues = [tier_store.queue_for_write(0) for tier_store in tier_stores]
        # Without a write, a small task has no work that helpers could share.
        nbytes = LONG if source.long_tasks and not tier_stores else SAVED
        chunks = call.chunks(form.own, some, nbytes, 1, *queues)

        # After a gap no block evicts another one. The first blocks take the free slots only if
        # each chunk waits for the writes of the chunk before it.
        before = call.request.before(some)
        gaps = {x for x in tier_stores if not form.continues(before, x)}

        written = dict[TierStore, Task]()
        generation = self._shared.generation + len(chunks)  # a prefix is the newer part
        self._shared.generation = generation
        together = max(1, SLICE // len(chunks[0]))
        for first in range(0, len(chunks), together):
            if first:
                await self._breathe(call)
            group = [self._left(call, at, tier_stores) for at in chunks[first : first + together]]
            started = [InFlight(call, form.own, at, drops) for at in group if at]
            if drops:
                self._make_way(call, started)
            source.issue(call, started)
            for in_flight in started:
                if tier_stores:
                    in_flight.generation = generation
                    generation -= 1
                tasks = source.gather(call, in_flight)
                in_flight.ends[None] = tasks[-1]
                in_flight.tasks[None] = tasks
                self._write(call, in_flight, tier_stores, gaps, written)
                if tier_stores:
                    call.submit()  # now, so that the queues count it for the next chunk
            call.submit()

    def _write(
        self,
        call: Call,
        in_flight: InFlight,
        tier_stores: Sequence[TierStore],
        gaps: set[TierStore],
        written: dict[TierStore, Task],
    ) -> None:
        """Plan the copies and the writes of a chunk of a save."""
        at = in_flight.at
        writes = list[tuple[Task, Task | None]]()
        for tier_store in tier_stores:
            queue = tier_store.queue_for_write(len(at) * call.form.own.form.image_bytes)
            write = partial(in_flight.write, tier_store, queue)
            task = call.task(at, write, queue, in_flight)
            if tier_store.tier == "remote" and in_flight.drops:
                in_flight.uploads.append(task)
            writes.append((task, written.get(tier_store) if tier_store in gaps else None))
            written[tier_store] = task
            in_flight.writes.append(task)
        tasks = [*in_flight.tasks[None], *in_flight.writes]
        call.plan(0, tasks, in_flight, partial(in_flight.save, writes))
        call.ends += [Ending(task, at, range(len(at))) for task in tasks]

    def _make_way(self, call: Call, started: Sequence[InFlight]) -> None:
        """Drop uploads whose rows a save to a nearer tier needs, under the graph's lock."""
        tier_stores = call.form.own.tier_stores
        if not any(x.writable and x.tier != "remote" for x in tier_stores):
            return
        count = sum(in_flight.count for in_flight in started)
        dropped = self._shared.drop_uploads(count)
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
        known = [call.form.known(tier_store, keys) for tier_store in tier_stores]
        wants = [call.form.wants(tier_store, keys) for tier_store in tier_stores]
        for stored, wanted in zip(known, wants, strict=True):
            call.excused[blocks] |= ~(np.array(stored, np.bool_) | np.array(wanted, np.bool_))

        if not tier_stores:
            wants = [[not there for there in call.form.cached(keys)]]
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
            if in_flight and in_flight.is_saved:
                in_flight.join(call, [i])
                tasks = [*in_flight.tasks[None], *in_flight.writes]
                call.ends += [Ending(task, [i], [row]) for task in tasks]
                call.explanation.tasks += [(task, [i], [row]) for task in tasks]
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
        tier does not have all. `trace` and queues know what helpers copy.

        ``by_layer``: read, verify and deliver layers one after the other, each with a separate end
        (`Handle.layers`). Some layers of a block that does not land may then be written, with
        correct bytes. Blocks of a form with one segment are read whole, and only the device's stage
        goes by layer.

        ``options``: in place of ``by_layer``: also backend, overlap, max_thread_blocks.
        """
        one_of("missing", missing, MISSING)
        if options is None and by_layer is False:
            options = USUAL
        else:
            options = options_from(options, {"by_layer": by_layer})
            by_layer = options.by_layer
            options = replace(options, by_layer=False)
            options.check_only("a load", OPTIONS)
        form = self._own("load")
        keys = self._keys(keys, priority, deadline)
        crossing = Crossing(view, blocks, len(keys), form.own.form.block_size, options=options)
        form = self._for_view(form, view.form)
        loan = self._loan(form, crossing, form.own.names(keys), by_layer)
        if loan is not None and None not in loan.rows:
            return self._issue_all(crossing, loan, [(form, keys)], by_layer)
        call = Call(form, Request("load", keys, priority, deadline))
        crossing.prepare(form.own.rows)
        steps = partial(self._load, call, crossing, view, by_layer, missing, loan)
        handle = self._planned(call, steps)
        if loan is not None:
            try:
                hits = np.array([row is not None for row in loan.rows])
                handle.add_issued(crossing.issue(form.own.rows, loan)[0], hits)
                self._count_hits(form, [key for key, hit in zip(keys, hits, strict=True) if hit])
                self._follow_issued(handle, form.name)
            except BaseException:  # also an interrupt: no caller has a handle
                handle.cancel()
                raise
        return handle

    def _issue_all(
        self,
        crossing: Crossing,
        loan: Loan,
        moved: Sequence[tuple[FormBlocks, list[bytes]]],
        by_layer: bool = False,
    ) -> Handle:
        """Copy the rows of a loan, which has those of all keys, in the caller's thread."""
        transfer, layers = crossing.issue(moved[0][0].own.rows, loan, by_layer)
        for form, keys in moved:
            self._count_hits(form, keys)
        size = moved[0][0].own.form.raw.payload_bytes
        handle = Handle.of_issued(len(loan.rows), transfer, layers, size)
        return self._follow_issued(handle, moved[0][0].name if len(moved) == 1 else "")

    async def _load(
        self,
        call: Call,
        crossing: Crossing,
        view: KVView,
        by_layer: bool,
        missing: Missing,
        loan: Loan | None,
    ) -> Handle:
        """Plan the part of a load that helpers move, under the graph's lock."""
        hits = () if loan is None else loan.rows
        blocks = [i for i, _ in enumerate(call.request.keys) if not hits or hits[i] is None]
        stages_of = cache(lambda part: part.stages(view, by_layer))

        def cross(part: FormPart, arrival: Arrival) -> None:
            call.copy(arrival, stages_of(part), crossing, self._up)

        def segments_of(part: FormPart) -> list[int | None]:
            return [stage.segment for stage in stages_of(part)]

        await self._bring(call, blocks, cross, segments_of, whole=by_layer)
        await self._touch(call)
        return call.handle(view, view.layers * by_layer, missing, follow=loan is None)

    async def _bring(
        self,
        call: Call,
        blocks: Sequence[int],
        arrives: Callable[[FormPart, Arrival], object],
        segments_of: Callable[[FormPart], list[int | None]] = lambda _: [None],
        whole: bool = False,
        packs: bool = True,
    ) -> None:
        """Plan the reads of blocks into rows, and what follows their arrivals.

        ``whole``: blocks of several layers. Without ``packs`` packed blocks count as missing, since
        others would copy their rows as they are.
        """
        prefetch = call.request.kind == "prefetch"
        for number, some in enumerate(call.slices(blocks, whole=whole)):
            if number:
                await self._breathe(call)
            groups = call.groups(some)
            packed = set[int]()
            if not packs:
                packed = {i for (part, _), at in groups.items() if part.form.encoding for i in at}
                call.located[[*packed]] = False
            for (part, location), at in groups.items():
                left = [i for i in at if i not in packed]
                if left and not (prefetch and location == CACHED):
                    for arrival in call.bring(part, location, left, segments_of(part)):
                        arrives(part, arrival)
            call.submit()

    async def _touch(self, call: Call) -> None:
        """Record the use of the blocks of a call, and what those of a save follow."""
        keys = call.request.keys
        follows = call.request.follows
        for number, some in enumerate(reversed(call.slices(range(len(keys))))):
            if number:
                await self._breathe(call)
            call.form.touch([keys[i] for i in some], [follows[i] for i in some if follows])

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
        call = Call(form, Request("load", keys, priority, deadline, lent=True))
        lending = Lending(copier, self._lent, self._down)
        return self._planned(call, partial(self._load_lent, call, lending, missing, packs))

    async def _load_lent(
        self, call: Call, lending: Lending, missing: Missing, packs: bool
    ) -> Handle:
        """Plan a load whose copies are lent, under the graph's lock."""
        blocks = range(len(call.request.keys))
        await self._bring(call, blocks, partial(lending.cross, call), packs=packs)
        await self._touch(call)
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
        loan = self._borrow(form.own.names(keys), borrowed, "call of borrow()", whole=True)
        if loan is None:
            return None
        borrowed.loan = loan
        borrowed.rows = [row for row in loan.rows if row is not None]
        self._count_hits(form, keys)
        return borrowed

    def _borrow(self, names: list[bytes], caller: object, kind: str, whole: bool) -> Loan | None:
        """Return the rows of blocks of the host tier, which stay for a ``caller``; None if it has
        no block, or with ``whole`` not all."""
        loan = self.rows.borrow(names, caller)
        self._refuse_closed(kind)  # `close` sees the loan, or this call sees that it is closed
        missed = loan.rows.count(None)
        if missed and (whole or missed == len(names)):
            loan.cancel()
            return None
        return loan

    def _loan(
        self, form: FormBlocks, crossing: Crossing, names: list[bytes], whole: bool = True
    ) -> Loan | None:
        """Return the rows of blocks that the caller's thread copies; None if helpers copy all.

        Args:
            form: of the size of the blocks.
            names: of the blocks among the rows.
            whole: rows of all blocks, or None.
        """
        if not self.rows.host or self._up.max_gbps is not None:
            return None
        nbytes = len(names) * form.own.form.payload_bytes
        here = crossing.is_for_caller(nbytes, self.rows.pinned)
        return self._borrow(names, crossing, "load", whole) if here else None

    def _follow_issued(self, handle: Handle, form: str) -> Handle:
        """Announce a handle of which a part was issued, if somebody asks for ended handles."""
        handle.form = form
        if self._shared.announced.handles.started:
            self._shared.announced.follow_issued(handle)
        return handle

    def _count_hits(self, form: FormBlocks, keys: list[bytes]) -> None:
        """Count blocks that the caller's thread loaded; their use is recorded later, together."""
        self.graph.count("host", "load", "hit", len(keys), len(keys) * form.own.form.image_bytes)
        form.count("host", "load", "hit", len(keys))
        self._shared.hits.append((form, keys))
        if len(self._shared.hits) >= HITS:
            self.graph.runtime.change(self._shared.record_hits)

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
        call = Call(form, Request("prefetch", keys, priority))
        return self._planned(call, partial(self._prefetch, call))

    async def _prefetch(self, call: Call) -> Handle:
        """Plan a prefetch, under the graph's lock."""
        most = max(1, self.rows.holds(call.form.own.form.image_bytes) // 2)
        call.located[most:] = False
        blocks = range(len(call.request.keys))[:most]
        await self._bring(call, blocks, lambda _, arrival: call.arrives(arrival))
        return call.handle(None, missing="skip")

    def _planned(self, call: Call, plan: Callable[[], Steps[Handle]]) -> Handle:
        """Return the handle of a call, whose plan runs while the graph is locked and the store
        open. Cancel the call if the caller is interrupted meanwhile."""
        return self.graph.runtime.run(self._run, call, plan, undo=Handle.cancel)

    async def _run(self, call: Call, plan: Callable[[], Steps[Handle]]) -> Handle:
        """Run the plan of a call."""
        try:
            self._refuse_closed(call.request.kind)
            self._shared.record_hits()
            return await plan()
        except BaseException:  # also an interrupt: no caller has a handle
            call.drop()
            raise

    async def _breathe(self, call: Call) -> None:
        """Let others take the graph's lock if the plan of a call has had it for a while."""
        call.since = await self.graph.runtime.breathe(call.since)
        self._refuse_closed(call.request.kind)

    def _hanging(self, all_tasks: bool) -> int:
        """Return the number of transfers of the store that have not ended, under the graph's lock.

        Lent copies do not count: they use no tier. ``all_tasks``: count all tasks of the graph.
        """
        live = [x for x in self.graph.live if not isinstance(x.queue, LentQueue)]
        begun = self._shared.begun
        copies = {in_flight for in_flight in begun if in_flight.copied is not None}
        return len(copies | {task.uses for task in live if all_tasks or task.uses in begun})


#: Seconds between two looks at the loads that `BlockStore.close` waits for.
PAUSE = 0.001


def lie_alike(one: FormStore, other: FormStore) -> bool:
    """Return whether blocks of two forms lie in equal rows of one store, as `load_together` takes
    them."""
    own = one._only("look at its rows").own
    its = other._only("look at its rows").own
    if one._shared is not other._shared or own.form.encoding or one.chooser is not None:
        return False
    return own.rows.form == its.rows.form and own.form.block_size == its.form.block_size


def load_together(
    view: KVView, loads: Sequence[tuple[FormStore, Sequence[int], Keys]]
) -> Handle | None:
    """Load blocks of several forms into one view, by one copy, as `FormStore.load` does.

    The forms are groups of layers whose caches share their memory, and whose rows lie alike
    (`lie_alike`). One copy takes the host about as long as the copy of one form.

    Args:
        loads: of each form its store, blocks of the view, and keys that fill these.

    Returns:
        The handle, with the blocks in the order of the loads. None unless the host tier has all
        blocks, and the caller's thread copies them: then no byte is written.
    """
    store = loads[0][0]
    moved = [(part._own("load"), part._keys(keys, "urgent", None)) for part, _, keys in loads]
    blocks = [block for _, ids, _ in loads for block in ids]
    names = [name for form, keys in moved for name in form.own.names(keys)]
    (form, _) = moved[0]
    crossing = Crossing(view, blocks, len(names), form.own.form.block_size)
    loan = store._loan(form, crossing, names)
    return None if loan is None else store._issue_all(crossing, loan, moved)


def _forms_by_name(form: BlockForm | Mapping[str, BlockForm]) -> dict[str, BlockForm]:
    """Return forms by their names; that of a single form is empty."""
    do = "Make one by BlockForm.of(view, model)."
    if not isinstance(form, Mapping):
        return {"": instance("form", form, BlockForm, do)}
    named = dict[BlockForm, str]()
    for name, each in form.items():
        text("a name in form", name)
        instance(f"form[{name!r}]", each, BlockForm, do)
        if each in named:
            raise InvalidTerms(
                f"Expected forms that differ, got form[{name!r}] equal to form[{named[each]!r}]. "
                f"Give them layers, heads, or notes of BlockForm.of that tell them apart."
            )
        named[each] = name
    if not named:
        raise invalid("form", "a form, or forms by their names", form, do)
    return {name: each for each, name in named.items()}


def _check_tiers(tiers: Sequence[Tier], own: int) -> None:
    """Raise `InvalidTerms` for a tier that opens for one own form alone, if there are several."""
    for number, tier in enumerate(tiers if own > 1 else ()):
        try:
            signature(tier.open).bind(None, None, (), own)
        except TypeError:
            expected = "a tier that opens several forms of a store"
            do = "Its open() has no `own`; make a store for each form."
            raise invalid(f"tiers[{number}]", expected, tier, do) from None


class BlockStore(FormStore):
    """A store of the blocks of one or several forms, in host memory and in tiers, nearest first.

    Args:
        form: the form of the saved blocks; views contain its layers and heads. Or several forms by
            their names (of ranks, attention groups, block sizes): `of` returns the store of one.
        staging: bytes of pinned memory for transfers; host: bytes of it that cache blocks, the
            host tier.
        tiers: `Disk`, `Remote`, or an object with their ``forms`` and ``open``. Or a text
            ``NAME:PLACE``, such as ``remote:s3://bucket/kv``: a tier of that name, also of another
            package, made with the place alone.
        graph: shares queues with other code; by default the store's own graph.
        full: what a save does with blocks that find no free staging: ``drop`` them immediately, or
            ``wait`` for staging. A save may say otherwise.
        weak_keys: accept keys of less than 16 bytes, of which two may be equal.
        shared: put the rows into shared memory without a name, in which other processes make the
            copies of `save_lent` and `load_lent`. They map ``store.rows.tensor``, which
            `portakv.migrate.share` accepts.
        pin: pin the rows for a device of this process. False: for a process that copies to none,
            which needs no context of a device then.
        encoding: ``auto``, or an `AutoEncoding` with its terms: each save packs its blocks where
            that pays, else stores them raw. The store has both forms of its one form, ``packed``
            and ``raw``, and finds the blocks of both. None: blocks are stored as their forms say.

    Blocks of a view belong to a load until its end: a model that writes them before `Handle.wait`
    mixes both. A save reads after the current stream's work at the call, and until its end. A store
    is a context manager, which closes it at the end.

    Raises:
        StoreError, StoreBusy: memory for no block; a tier that cannot be opened; after `close`.
        InvalidTerms: wrong keys or terms, a key twice in a call, more keys than blocks.
        LayoutError, SlotError: a view of another cache; blocks that it lacks, or one twice.
        Unsupported: `save` or `load` inside graph capture.
    """

    def __init__(
        self,
        form: BlockForm | Mapping[str, BlockForm],
        *,
        staging: int = 1 << 30,
        host: int = 0,
        tiers: Sequence[Tier | str] = (),
        graph: Graph | None = None,
        full: Full = "drop",
        weak_keys: bool = False,
        shared: bool = False,
        pin: bool = True,
        encoding: Encoding = None,
    ) -> None:
        named = _forms_by_name(form)
        terms = terms_of(encoding)
        why = ""
        if terms is not None:
            if isinstance(form, Mapping):
                raise invalid("form", "one form with encoding='auto'", form, "Pass one.")
            named, why = forms_for(form, terms)
        staging = nbytes("staging", staging)
        host = nbytes("host", host)
        tiers = tiers_of(tiers)
        if graph is not None:
            instance("graph", graph, Graph, "Pass None for the store's own.")
        one_of("full", full, get_args(Full))
        flag("weak_keys", weak_keys)
        flag("shared", shared)
        flag("pin", pin)
        own = [*named.values()]
        _check_tiers(tiers, len(own))
        others = uninterrupted(lambda: [x for tier in tiers for f in own for x in tier.forms(f)])
        forms = [*dict.fromkeys([*own, *others])]
        size = max(each.image_bytes for each in forms)
        if staging < size:
            raise StoreError(
                f"Expected staging to have room for a block of {size} bytes, got {staging}. Give "
                f"it more."
            )
        if not tiers and host < size:
            raise StoreError(
                f"Expected host to have room for a block of {size} bytes, as there are no tiers, "
                f"got {host}. Give it more, or pass tiers."
            )
        rows = rows_for(own, forms, staging, host, pin=pin, shared=shared)
        self._own_graph = graph is None
        super().__init__(SharedState(graph or Graph(), rows), full, weak_keys)
        self._tier_stores = self._shared.tier_stores
        self._stores = dict[str, FormStore]()
        self._terms = terms
        self._stays_raw = why
        uninterrupted(partial(self._open, tiers, named, forms), undo=lambda _: self.close())

    def _open(
        self, tiers: Sequence[Tier], named: Mapping[str, BlockForm], forms: list[BlockForm]
    ) -> None:
        """Open the tiers, all or none."""
        several = [len(named)] if len(named) > 1 else []
        shared = self._shared
        try:
            for tier in tiers:
                self._tier_stores += tier.open(self.graph, self.rows, forms, *several)
        except BaseException:  # also an interrupt: no tier stays open
            self.close()
            raise
        shared.generation = max([x.generation for x in self._tier_stores], default=0)
        own = [*named.values()]
        for name, form in named.items():
            first = [form, *(other for other in forms if other != form)]
            parts = parts_of(form, first, self._tier_stores, self.rows.tensor)
            read = [part.form for part in parts]
            apart = [other.digest for other in own if other not in read]
            blocks = FormBlocks(shared, name, parts, apart)
            shared.forms[name] = blocks
            host = [HostIndex(self.rows, form.digest)] if self.rows.host else []
            listed = [x for x in blocks.own.tier_stores if isinstance(x, Listed)]
            shared.announced.indices[name] = named_indices([*host, *listed])
            self._stores[name] = FormStore(shared, self._full, self._weak, blocks)
        if self._terms is not None:
            self._choose(self._terms, self._stays_raw)
        elif not several:
            self._form = blocks
        watch(self)

    def _choose(self, terms: AutoEncoding, why: str) -> None:
        """Choose for each save between the forms, which have one list of keys together."""
        forms = self._shared.forms
        raw = forms[RAW]
        packed = forms.get(PACKED_FORM)
        if packed is not None:
            raw.pair(packed)
            self._raw_alone = raw.alone()
        self._form = raw
        self.chooser = Chooser(
            None if packed is None else packed.own.form,
            why,
            terms,
            bool(self._tier_stores),
            raw.figures,
            self.graph,
        )

    @property
    def forms(self) -> dict[str, BlockForm]:
        """Return the forms by their names; that of a single form without a name is empty."""
        return {name: each.own.form for name, each in self._shared.forms.items()}

    def of(self, name: str) -> FormStore:
        """Return the store of one of several forms, by its name.

        It saves and loads as this store does, which closes it.

        Raises `InvalidTerms` for another name.
        """
        if [*self._stores] == [""] and name != "":
            do = "Save and load by the store itself, or make it with forms by their names."
            raise invalid("name", "'' for a store of one form without a name", name, do)
        one_of("name", name, self._stores)
        return self._stores[name]

    def __enter__(self) -> BlockStore:
        self._refuse_closed("with block")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self) -> list[Handle]:
        """Return the handles of saves, loads and prefetches that have ended since the last call.

        The first call returns none, and from then on handles are kept for the next one: at most
        65,536, of which the oldest go first. There is one consumer.
        """
        self._refuse_closed("call of finished()")
        handles = self._shared.announced.handles
        return uninterrupted(handles.take, undo=lambda taken: [*map(handles.add, taken)])

    def finished_fd(self) -> int:
        """Return a descriptor that is readable while `finished` has handles, for ``select`` or an
        event loop. It is closed with the store.

        Raises `HostMemoryError` without a free descriptor.
        """
        self._refuse_closed("call of finished_fd()")
        return self._shared.announced.handles.fileno()

    def listen(self) -> list[Change]:
        """Return the blocks that were stored or lost since the last call, in order.

        The first call of this or of `keys` returns none, and from then on changes are kept: at most
        65,536, of which the oldest go first. There is one consumer. If a number is missing in the
        numbers of changes, call `keys` again.
        """
        self._refuse_closed("call of listen()")
        if self._shared.announced.is_unchanged:
            return []  # without a helper thread: an engine calls this in each step
        return uninterrupted(lambda: self._shared.announced.listen().take())

    def listen_fd(self) -> int:
        """Return a descriptor that is readable while `listen` has changes. It is closed with the
        store.

        Raises `HostMemoryError` without a free descriptor.
        """
        self._refuse_closed("call of listen_fd()")
        return uninterrupted(lambda: self._shared.announced.listen().fileno())

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return figures by their names in Prometheus, as `Graph.statistics`, and the figures of
        each tier."""
        reported = self.graph.statistics()
        rows = self.rows
        tier_stores = self._tier_stores
        staging = rows.nbytes_by_state()
        reported["staging_bytes"] = [{"state": x, "value": n} for x, n in staging.items()]
        reported["host_evicted_total"] = [{"value": rows.evicted}]
        reported["tiers"] = [
            {"tier": x.tier, "form": self._called(x.form), **x.statistics()} for x in tier_stores
        ]
        reported |= tier_figures(reported["tiers"])
        if "" not in self._stores:
            reported |= self.graph.runtime.change(self._form_statistics)
        forms = [*self._shared.forms.values()]
        packed = [form for form in forms if form.own.form.encoding]
        if self.chooser is not None:
            packed = packed or forms
        for form in packed:  # or the raw one if the store cannot pack it
            each = form.figures.statistics(self._called(form.own.form))
            for name, samples in each.items():
                reported.setdefault(name, []).extend(samples)
        return reported

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        """Return `statistics` after a look at the tiers, such as at the free space of disks.

        A medium that hangs holds this up: operators' pages and alarms call it, and engines do not.
        """
        for tier_store in [*self._tier_stores]:
            look = getattr(tier_store, "look", None)
            if look is not None:
                look()
        return self.statistics()

    def _called(self, form: BlockForm) -> str:
        """Return the name of a form here, or its checksum if it has none."""
        names = [name for name, own in self.forms.items() if own == form and name]
        return names[0] if names else form.name

    def _form_statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of each of several forms, under the graph's lock."""
        figures: dict[str, list[dict[str, Any]]] = {"host_form_bytes": []}
        cached = self.rows.nbytes_by_form()
        for name, form in self._shared.forms.items():
            for figure, samples in form.counts.statistics().items():
                each = figures.setdefault(figure.replace("tier", "form", 1), [])
                each += [{"form": name, **sample} for sample in samples]
            nbytes = cached.get(form.own.form.digest, 0)
            figures["host_form_bytes"].append({"form": name, "value": nbytes})
        return figures

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last tasks of the graph, for Perfetto or Chrome.

        Raises:
            InvalidTerms: not a path.
            StoreError: the file cannot be written.
        """
        self.graph.trace.write(path, StoreError)

    def explain(self) -> str:
        """Return how blocks are stored and moved, a line each."""
        rows = self.rows
        lines = list[str]()
        for name, each in self.forms.items():
            many = len(each.segments)
            how = f"in {many} segments" if many > 1 else "as a whole, in one segment"
            which = f" of {name}" if name else ""
            lines.append(f"Blocks{which} of {each.payload_bytes} bytes, by layer read {how}.")
            if name and not rows.sized and each.image_bytes <= rows.row_bytes // 2:
                share = f"{each.image_bytes} of the {rows.row_bytes} bytes of a row"
                lines.append(f"A block of {name} takes {share}. A larger block size wastes less.")
        if self.chooser is not None:
            lines += self.chooser.lines()
        lines.append(rows.sentence())
        lines += [
            f"{x.tier} {self._called(x.form)}: {note}"
            for x in self._tier_stores
            for note in x.notes
        ]
        return "\n".join(lines)

    def close(self, timeout: float = 10.0) -> None:
        """End the transfers in flight within so many seconds, and close the tiers.

        Cancels prefetches immediately, and the other transfers after the timeout. Raises
        `TransferTimeout` if one hangs: tiers then stay open, because it uses the rows and the
        files.

        A lent copy that has not ended by then keeps no tier open. It retains the rows, and its
        handle ends with it; what it copies from there on is stored nowhere.
        """
        timeout = seconds("timeout", timeout)
        if self.graph.process.forked:  # locks may be held for ever, and nothing here is its own
            return
        self._shared.closed = True
        until = self.graph.clock() + timeout
        # Under the lock, so that no call that saw the store open is missed.
        ends = self.graph.runtime.change(lambda: [*self._shared.ends])
        for end in sorted(ends, key=lambda end: end.name != "prefetch"):
            end.wait(0.0 if end.name == "prefetch" else max(0.0, until - self.graph.clock()))
            end.cancel()
        if self._own_graph:
            self.graph.close(max(0.0, until - self.graph.clock()))
        begun = self.graph.runtime.change(lambda: [*self._shared.begun])
        for in_flight in begun:
            for task in in_flight.every_task():
                task.wait(max(0.0, until - self.graph.clock()))
        left = max(0.0, until - self.graph.clock())
        self.graph.idle.block(lambda: all(x.copied is None for x in self._shared.begun), left)
        self.rows.end_left_loans()  # a traceback may retain the call that was interrupted
        while self.rows.loans() and self.graph.clock() < until:
            time.sleep(PAUSE)
        if (
            busy := self.graph.runtime.change(partial(self._hanging, self._own_graph))
            + self.rows.loans()
        ):
            raise TransferTimeout(
                f"A block store was closed, and after {timeout:g} s {busy:d} transfers had not "
                f"ended, so that tiers stay open; close it again, or end the process."
            )
        uninterrupted(self._close_tiers)

    def _close_tiers(self) -> None:
        """Close the tier stores, the first one last."""
        self._shared.announced.close()
        while self._tier_stores:
            self._tier_stores.pop().close()
