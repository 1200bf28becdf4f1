# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` saves blocks of a cache under keys and loads them into any view of that cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from portakv.arguments import flag, instance, invalid, nbytes, one_of, seconds
from portakv.copy.options import CopyOptions, options_from
from portakv.errors import InvalidTerms, StoreError, TransferTimeout
from portakv.graph import SLACK, Graph, Handle, Missing, Priority, Task
from portakv.runtime.interrupts import abandoned, uninterrupted
from portakv.storage.changes import Announced, Change, Listed, Snapshot
from portakv.storage.form import BlockForm
from portakv.storage.keys import check_keys
from portakv.storage.plan import (
    CACHED,
    LOOKUP_BATCH,
    SAVED,
    SLICE,
    Call,
    Ending,
    InFlight,
    Request,
    SharedState,
)
from portakv.storage.rows import Crossing, Loan, Rows
from portakv.storage.tier import Keys, Tier, TierStore, tiers_of
from portakv.view import IdList, KVView

#: The options that a save takes, and a load, which also takes ``by_layer``.
OPTIONS = ("backend", "overlap", "max_thread_blocks")
#: The most bytes of a copy on the host that a load makes itself: 0.1 - 0.3 ms.
SHORT_COPY = 1 << 20
#: Loads in callers' threads whose use is recorded together.
HITS = 64
#: Seconds between two looks at the loads that `BlockStore.close` waits for.
PAUSE = 0.001
#: What a save does that finds no staging.
Full: TypeAlias = Literal["drop", "wait"]
#: The steps of a plan, which returns a handle.
Steps: TypeAlias = Generator[None, None, Handle]


def _copy_options(what: str, options: CopyOptions | None) -> CopyOptions:
    """Return the options of a store's copies; workers make the copies and wait for each."""
    options = options_from(options, {})
    options.check_only(what, OPTIONS)
    return options


class BlockStore:
    """A store of the blocks of one cache, in host memory and in tiers, nearest first.

    Args:
        form: the form of the saved blocks; views contain its layers and heads.
        staging: bytes of pinned memory for transfers; host: bytes of it that cache blocks, the
            host tier.
        tiers: `Disk`, `Remote`, or an object with their ``forms`` and ``open``. Or a text
            ``NAME:PLACE``, such as ``remote:s3://bucket/kv``: a tier of that name, also of another
            package, made with the place alone.
        graph: shares workers with other code; by default the store's own graph.
        full: what a save does with blocks that find no free staging: ``drop`` them immediately, or
            ``wait`` for staging. A save may say otherwise.
        weak_keys: accept keys of less than 16 bytes, of which two may be equal.

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
        form: BlockForm,
        *,
        staging: int = 1 << 30,
        host: int = 0,
        tiers: Sequence[Tier | str] = (),
        graph: Graph | None = None,
        full: Full = "drop",
        weak_keys: bool = False,
    ) -> None:
        instance("form", form, BlockForm, "Make one by BlockForm.of(view, model).")
        staging = nbytes("staging", staging)
        host = nbytes("host", host)
        tiers = tiers_of(tiers)
        if graph is not None:
            instance("graph", graph, Graph, "Pass None for the store's own.")
        one_of("full", full, get_args(Full))
        flag("weak_keys", weak_keys)
        others = uninterrupted(lambda: [x for tier in tiers for x in tier.forms(form)])
        forms = [*dict.fromkeys([form, *others])]
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
        self.form = form
        self._weak = weak_keys
        self._full = full
        self._closed = False
        self.rows = Rows(size, staging // size, host // size)
        self._tier_stores = list[TierStore]()
        self.graph = graph or Graph()
        self._own_graph = graph is None
        self._up, self._down = (
            self.graph.queue(x, width=2) for x in ("host-device", "device-host")
        )
        self._shared = SharedState(self.graph, self.rows, self._tier_stores)
        self._generation = 0
        uninterrupted(partial(self._open, tiers, forms), undo=lambda _: self.close())

    def _open(self, tiers: Sequence[Tier], forms: list[BlockForm]) -> None:
        """Open the tiers, all or none."""
        try:
            for tier in tiers:
                self._tier_stores += tier.open(self.graph, self.rows, forms)
        except BaseException:  # also an interrupt: no tier stays open
            self.close()
            raise
        self._generation = max([x.generation for x in self._tier_stores], default=0)
        self._shared.open_forms(self.form, forms)
        self._own = self._shared.parts[0]

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, keys: Keys, timeout: float | None = 1.0) -> int:
        """Return the number of leading blocks that can be loaded, from the host or a tier.

        Blocks that a remote tier does not confirm within ``timeout`` seconds count as missing. Only
        this call asks a remote tier for blocks in other parts than this form's: a `load` or
        `prefetch` uses the answer.
        """
        keys = self._keys("lookup", keys, "normal", None)
        until = self.graph.clock() + seconds("timeout", timeout, optional=True)
        leading = 0
        many = LOOKUP_BATCH
        while leading < len(keys):
            batch = keys[leading : leading + many]
            there = self._shared.leading(batch, until)
            leading = leading + there
            if there < len(batch):
                break
            many = 2 * many
        uninterrupted(partial(self._shared.touch, keys[:leading]))
        return leading

    def has(self, key: bytes) -> bool:
        """Return whether the block of a key can be loaded, as far as is known here.

        Looks in the host tier and in the tiers' indices, of which a remote tier's knows the blocks
        of recent lookups, loads and saves. Sends no request, waits for nothing, and does not count
        as a use of the block.
        """
        self._refuse_closed("call of has()")
        if type(key) is not bytes or len(key) != 32:
            key = self._key("key to be one of a block", key, "Pass bytes, such as a prefix key.")
        cover = 0
        for part in self._shared.parts:
            if self.rows.has(part.name(key)) or any(x.known([key])[0] for x in part.tier_stores):
                cover |= part.cells
                if cover == self._own.cells:
                    return True
        return False

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        after: bytes | None = None,
        priority: Priority = "background",
        deadline: float | None = None,
        full: Full | None = None,
        options: CopyOptions | None = None,
    ) -> Handle:
        """Save blocks of a view under keys.

        Skips a key that every writable tier has, or does not admit yet, or whose save is in
        progress. ``blocks``: ids of the view's blocks, whose tokens the keys name in order. If
        their size is not the form's, the last key need not fill them. Each key follows the key
        before it, and the first key follows ``after``, or begins a prompt.

        Tiers evict no block before its successors. A tier without space for all blocks stores the
        first ones. The others do not land, and neither do blocks that are evicted before the save
        ends.

        The view's blocks are read until the end of `Handle.released`, which comes first: then their
        rows are in staging, or are not saved, and the caller may write the blocks again. ``full``:
        what happens to blocks that find no free staging; None: as the store does.

        ``options``: how blocks are copied from the view: backend, overlap, max_thread_blocks.
        """
        if full is not None:
            one_of("full", full, get_args(Full))
        previous = self._predecessor(after)
        call = self._call("save", keys, priority, deadline, previous)
        own = self._own
        size = own.form.block_size
        options = _copy_options("a save", options)
        crossing = Crossing(view, blocks, len(call.request.keys), size, store=True, options=options)
        crossing.prepare(own.rows)
        until = self.graph.clock() if (full or self._full) == "drop" else None
        return self._planned(call, partial(self._save, call, crossing, view, until))

    def _save(self, call: Call, crossing: Crossing, view: KVView, until: float | None) -> Steps:
        """Plan a save in steps, under the graph's lock."""
        own = self._own
        keys = call.request.keys
        follows = call.request.follows
        for number, part in enumerate(reversed(call.slices(range(len(keys))))):
            if number:
                yield
            self._shared.touch([keys[i] for i in part], [follows[i] for i in part])
        for tier_stores, some in self._lacking(call).items():
            queues = [tier_store.queue_for_write(0) for tier_store in tier_stores]
            chunks = call.chunks(some, SAVED, 1, *queues)
            self._generation += len(chunks)

            # After a gap no block evicts another one. The first blocks take the free slots only if
            # each chunk waits for the writes of the chunk before it.
            gaps = {
                tier_store
                for tier_store in tier_stores
                if not self._shared.continues(call.request.after, tier_store)
            }

            written = dict[TierStore, Ending]()
            generation = self._generation  # a prefix is the newer part
            together = max(1, SLICE // len(chunks[0]))
            for first in range(0, len(chunks), together):
                if first:
                    yield
                group = chunks[first : first + together]
                started = [InFlight(call, own, at, until) for at in group]
                self._issue(crossing, started)
                for in_flight in started:
                    in_flight.generation = generation
                    generation -= 1
                    gather = call.gather(in_flight, crossing, view, self._down)
                    self._write(call, in_flight, gather, tier_stores, gaps, written)
        handle = call.handle(view, eligible=partial(self._shared.stored, keys))
        handle.add_copies(crossing.ends)
        return handle

    def _issue(self, crossing: Crossing, started: Sequence[InFlight]) -> None:
        """Issue one copy for the chunks of a save from a device for which staging has room."""
        # A worker keeps the pace, and waits where the host has to.
        if not (crossing.waits_for_nothing and self.rows.pinned) or self._down.max_gbps:
            return
        granted = [in_flight for in_flight in started if self.graph.take(in_flight)]
        if granted:
            items = [item for in_flight in granted for item in in_flight.items]
            blocks = [block for in_flight in granted for block in in_flight.calls[0][1]]
            try:
                crossing.begin(self._own.rows, items, blocks)
            finally:  # a part may write the rows
                for in_flight in granted if crossing.ends else ():
                    in_flight.copied = partial(crossing.wait, crossing.ends[-1])

    def _write(
        self,
        call: Call,
        in_flight: InFlight,
        gather: Task,
        tier_stores: Sequence[TierStore],
        gaps: set[TierStore],
        written: dict[TierStore, Ending],
    ) -> None:
        """Plan the writes of a chunk of a save, and start its tasks."""
        at = in_flight.calls[0][1]
        for tier_store in tier_stores:
            queue = tier_store.queue_for_write(len(at) * self._own.form.image_bytes)
            write = partial(in_flight.write, tier_store, queue)
            order: list[Ending] = []
            if tier_store in gaps and tier_store in written:
                order.append(written[tier_store])
            task = call.task(at, write, queue, in_flight, [gather, *order])
            written[tier_store] = (task, [], [])
            in_flight.last.append(task)
        call.ends += [((end, at, range(len(at))), range(0)) for end in in_flight.last]
        call.submit()  # submits now, so that the queues count it

    def _lacking(self, call: Call) -> dict[tuple[TierStore, ...], list[int]]:
        """Return the blocks of a save by the tiers that lack them; join saves in progress."""
        own = self._own
        groups = dict[tuple[TierStore, ...], list[int]]()
        tier_stores = [tier_store for tier_store in own.tier_stores if tier_store.writable]
        keeps = [tier_store.where for tier_store in tier_stores if tier_store.tier != "remote"]
        call.explanation.saved_in = ", ".join(keeps if tier_stores else ["the host tier"])

        # A block that a tier does not admit yet need not land.
        keys = call.request.keys
        known = [tier_store.known(keys) for tier_store in tier_stores]
        wants = [tier_store.wants(keys) for tier_store in tier_stores]
        for stored, wanted in zip(known, wants, strict=True):
            call.excused |= ~(np.array(stored, np.bool_) | np.array(wanted, np.bool_))

        for i, key in enumerate(keys):
            in_flight, row = self._shared.in_transit.get(own.name(key), (None, 0))
            lacks = tuple(
                tier_store for tier_store, x in zip(tier_stores, wants, strict=True) if x[i]
            )
            if in_flight and in_flight.store and in_flight.wanted:
                call.ends += [((end, [i], [row]), range(0)) for end in in_flight.last]
                call.explanation.sources.append(in_flight.reasons)
                call.explanation.tasks += [(end, [i], [row]) for end in in_flight.last]
            elif lacks or not (tier_stores or self.rows.has(own.name(key))):
                groups.setdefault(lacks, []).append(i)
        return groups

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

        Blocks that no tier has, or not with correct bytes, do not land (`Handle.landed`), and no
        byte of them is written.

        This call issues the copy of blocks that the host tier has, ordered on the current stream of
        the view's device: immediately, whatever its priority and deadline. Workers copy the others,
        and all of them at a limited rate or in a longer copy between host views; also by layer if
        the host tier does not have all. `trace` and queues know what workers copy.

        ``by_layer``: read, verify and deliver layers one after the other, each with a separate end
        (`Handle.layers`). Some layers of a block that does not land may then be written, with
        correct bytes. Blocks of a form with one segment are read whole, and only the device's stage
        goes by layer.

        ``options``: how blocks are copied into the view, in place of ``by_layer``: also backend,
        overlap, max_thread_blocks.
        """
        one_of("missing", missing, get_args(Missing))
        options = options_from(options, {"by_layer": by_layer})
        by_layer = options.by_layer
        if by_layer:
            options = replace(options, by_layer=False)
        options = _copy_options("a load", options)
        keys = self._keys("load", keys, priority, deadline)
        own = self._own
        crossing = Crossing(view, blocks, len(keys), own.form.block_size, options=options)
        loan = self._loan(crossing, view, keys, by_layer)
        if loan is not None and None not in loan.rows:
            transfer, layers = crossing.issue(own.rows, loan, by_layer)
            self._count_hits(keys)
            handle = Handle.of_issued(self.graph, len(keys), transfer, layers)
            self._follow_issued(handle)
            return handle
        call = Call(self._shared, Request("load", keys, priority, deadline))
        crossing.prepare(own.rows)
        plan = partial(self._load, call, crossing, view, by_layer, missing, loan)
        handle = self._planned(call, plan)
        if loan is not None:
            try:
                hits = np.array([row is not None for row in loan.rows])
                handle.add_issued(crossing.issue(own.rows, loan)[0], hits)
                self._count_hits([key for key, hit in zip(keys, hits, strict=True) if hit])
                self._follow_issued(handle, call.barrier)
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
        for number, some in enumerate(call.slices(blocks, whole=by_layer)):
            if number:
                yield
            for (part, location), at in call.groups(some).items():
                stages = part.stages(view, by_layer)
                segments = [stage.segment for stage in stages]
                for arrival in call.bring(part, location, at, segments):
                    call.cross(arrival, stages, crossing, self._up)
            call.submit()
        for number, some in enumerate(reversed(call.slices(range(len(call.request.keys))))):
            if number:
                yield
            self._shared.touch([call.request.keys[i] for i in some])
        return call.handle(view, view.layers * by_layer, missing, follow=loan is None)

    def _loan(
        self, crossing: Crossing, view: KVView, keys: list[bytes], whole: bool
    ) -> Loan | None:
        """Return the rows of blocks that the caller's thread copies; None if workers copy all.

        The caller's thread issues a copy to a device, which it does not wait for, and makes a short
        one on the host. ``whole``: rows of all keys, or None.
        """
        if not self.rows.host or self._up.max_gbps is not None:
            return None
        if view.device.type == "cpu":
            here = len(keys) * self.form.payload_bytes <= SHORT_COPY
        else:
            here = self.rows.pinned
        if not here:
            return None
        loan = self.rows.borrow([*map(self._own.name, keys)], crossing)
        self._refuse_closed("load")  # `close` sees the loan, or this call sees that it is closed
        missed = loan.rows.count(None)
        if missed and (whole or missed == len(keys)):
            loan.cancel()
            return None
        return loan

    def _follow_issued(self, handle: Handle, barrier: Task | None = None) -> None:
        """Announce a handle of which a part was issued, if somebody asks for ended handles."""
        if self._announced.handles.started:
            self._announced.follow_issued(handle, barrier)

    def _count_hits(self, keys: list[bytes]) -> None:
        """Count blocks that the caller's thread loaded; their use is recorded later, together."""
        self.graph.count("host", "load", "hit", len(keys), len(keys) * self._own.form.image_bytes)
        self._shared.hits.append(keys)
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
        call = self._call("prefetch", keys, priority)
        return self._planned(call, partial(self._prefetch, call))

    def _prefetch(self, call: Call) -> Steps:
        """Plan a prefetch in steps, under the graph's lock."""
        most = max(1, self.rows.host // 2)
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

    def finished(self) -> list[Handle]:
        """Return the handles of saves, loads and prefetches that have ended since the last call.

        The first call returns none, and from then on handles are kept for the next one: at most
        65,536, of which the oldest go first. There is one consumer.
        """
        self._refuse_closed("call of finished()")
        handles = self._announced.handles
        return uninterrupted(handles.take, undo=lambda taken: [*map(handles.add, taken)])

    def finished_fd(self) -> int:
        """Return a descriptor that is readable while `finished` has handles, for ``select`` or an
        event loop. It is closed with the store."""
        self._refuse_closed("call of finished_fd()")
        return self._announced.handles.fileno()

    def keys(self) -> Snapshot:
        """Return the keys of the host tier and of each tier with an index, and the number of the
        last change.

        A process that keeps an index begins with this, and applies what `listen` returns. Blocks of
        other forms of the cache are left out.
        """
        self._refuse_closed("call of keys()")
        return uninterrupted(lambda: self._announced.snapshot(self._listed()))

    def listen(self) -> list[Change]:
        """Return the blocks that were stored or lost since the last call, in order.

        The first call of this or of `keys` returns none, and from then on changes are kept: at most
        65,536, of which the oldest go first. There is one consumer. If a number is missing in the
        numbers of changes, call `keys` again.
        """
        self._refuse_closed("call of listen()")
        return uninterrupted(lambda: self._announced.listen(self._listed()).take())

    def listen_fd(self) -> int:
        """Return a descriptor that is readable while `listen` has changes. It is closed with the
        store."""
        self._refuse_closed("call of listen_fd()")
        return uninterrupted(lambda: self._announced.listen(self._listed()).fileno())

    @property
    def _announced(self) -> Announced:
        return self._shared.announced

    def _listed(self) -> list[Listed]:
        """Return the indices of the store's own form: of the host tier, and of tiers with one."""
        host = [self.rows.listed(self.form.digest)] if self.rows.host else []
        tiers = [x for x in self._own.tier_stores if isinstance(x, Listed)]
        return [*host, *tiers]

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Return figures by their names in Prometheus, as `Graph.statistics`, and the figures of
        each tier."""
        reported = self.graph.statistics()
        rows = self.rows
        tier_stores = self._tier_stores
        staging = {x: n * rows.row_bytes for x, n in rows.counts().items()}
        reported["staging_bytes"] = [{"state": x, "value": n} for x, n in staging.items()]
        reported["host_evicted_total"] = [{"value": rows.evicted}]
        reported["tiers"] = [
            {"tier": x.tier, "form": x.form.name, **x.statistics()} for x in tier_stores
        ]
        return reported

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last tasks of the graph, for Perfetto or Chrome."""
        if not isinstance(path, str | os.PathLike) or not str(path):
            raise invalid("path", "a path of a file", path)
        try:
            self.graph.trace.write(path)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"Expected path to be a file that can be written, got {path}: {error}. "
                f"Pass another."
            ) from error

    def explain(self) -> str:
        """Return how blocks are stored and moved, a line each."""
        rows = self.rows
        many = len(self.form.segments)
        how = f"in {many} segments" if many > 1 else "as a whole, in one segment"
        lines = [f"Blocks of {self.form.payload_bytes} bytes, by layer read {how}."]
        kind = "pinned" if rows.pinned else "pageable"
        lines += [f"{rows.staging} {kind} rows of staging, {rows.host} of the host tier."]
        lines += [f"{x.tier} {x.form.name}: {note}" for x in self._tier_stores for note in x.notes]
        return "\n".join(lines)

    def close(self, timeout: float = 10.0) -> None:
        """End the transfers in flight within so many seconds, and close the tiers.

        Cancels prefetches immediately, and the other transfers after the timeout. Raises
        `TransferTimeout` if one hangs: tiers then stay open, because it uses the rows and the
        files.
        """
        timeout = seconds("timeout", timeout)
        if self.graph.process.forked:  # locks may be held for ever, and nothing here is its own
            return
        self._closed = True
        until = self.graph.clock() + timeout
        # Under the lock, so that no call that saw the store open is missed.
        barriers = self.graph.run(lambda: [*self._shared.barriers])
        for barrier in sorted(barriers, key=lambda barrier: barrier.name != "prefetch"):
            left = 0.0 if barrier.name == "prefetch" else max(0.0, until - self.graph.clock())
            barrier.wait(left)
            self.graph.cancel(barrier)
        ended = not self._own_graph or self.graph.close(max(0.0, until - self.graph.clock()))
        begun = self.graph.run(lambda: [*self._shared.begun])
        for in_flight in begun:
            for end in (*in_flight.ends.values(), *in_flight.last):
                end.wait(max(0.0, until - self.graph.clock()))
        while self.rows.loans() and self.graph.clock() < until:
            time.sleep(PAUSE)
        if busy := len(self._shared.begun) + self.rows.loans() or not ended:
            raise TransferTimeout(
                f"A block store was closed, and after {timeout:g} s {busy:d} transfers had not "
                f"ended, so that tiers stay open; close it again, or end the process."
            )
        uninterrupted(self._close_tiers)

    def _close_tiers(self) -> None:
        """Close the tier stores, the first one last."""
        self._announced.close()
        while self._tier_stores:
            self._tier_stores.pop().close()

    def _predecessor(self, after: bytes | None) -> bytes | None:
        """Return the key before the first one of a save, of 32 bytes."""
        do = "Pass that key, or None for the beginning of a prompt."
        return (
            None
            if after is None
            else self._key("the key before the first one in `after`", after, do)
        )

    def _key(self, what: str, key: bytes, do: str) -> bytes:
        """Return one key of 32 bytes; raise `InvalidTerms` for another object."""
        try:
            return check_keys([key], self._weak)[0]
        except InvalidTerms:
            kind = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise InvalidTerms(f"Expected {what}, 16 to 32 bytes, got {kind}. {do}") from None

    def _call(
        self,
        kind: str,
        keys: Keys,
        priority: Priority,
        deadline: float | None = None,
        after: bytes | None = None,
    ) -> Call:
        """Return a call; raise as `_keys` does."""
        keys = self._keys(kind, keys, priority, deadline)
        return Call(self._shared, Request(kind, keys, priority, deadline, after))

    def _keys(
        self, kind: str, keys: Keys, priority: Priority, deadline: float | None
    ) -> list[bytes]:
        """Return keys of 32 bytes; reject wrong keys and terms, and a closed store."""
        self._refuse_closed(kind)
        keys = check_keys(keys, self._weak)
        if len({*keys}) < len(keys):
            last = {key: number for number, key in enumerate(keys)}
            first = next(number for number, key in enumerate(keys) if last[key] > number)
            raise InvalidTerms(
                f"Expected keys that differ, got keys[{last[keys[first]]}] equal to "
                f"keys[{first}]. Pass each key once."
            )
        one_of("priority", priority, SLACK)
        if deadline is not None:
            seconds("deadline", deadline, optional=True)
        return keys

    def _refuse_closed(self, kind: str) -> None:
        if self._closed or self.graph.process.forked or self.graph.closed.is_set():
            why = "closed, or opened by a process that this one was forked from; open another one"
            raise StoreError(
                f"Expected an open store for a {kind}, got one that was {why}. Make another."
            )

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
