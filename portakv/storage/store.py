# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` saves blocks of a cache under keys and loads them into any view of that cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from portakv.arguments import flag, instance, invalid, items, nbytes, one_of, seconds
from portakv.errors import InvalidTerms, StoreError, TransferTimeout
from portakv.graph.graph import SLACK, Graph, Priority, Task
from portakv.graph.handle import Handle, Missing
from portakv.runtime.interrupts import uninterrupted
from portakv.storage.form import BlockForm
from portakv.storage.keys import check_keys
from portakv.storage.plan import ASKED, KEPT, SAVED, Call, InFlight, SharedState, parts_of
from portakv.storage.rows import Crossing, Rows
from portakv.storage.tier import Keys, Tier, TierStore
from portakv.view import KVView
from portakv.view.index import IdList

#: What a save does that finds no staging.
Full: TypeAlias = Literal["drop", "wait"]


def _check_tiers(tiers: object) -> list[Any]:
    """Return tiers as a list; raise `InvalidTerms` for anything else."""
    result = items("tiers", tiers, "tiers, such as Disk(...)")
    for number, tier in enumerate(result):
        if not callable(getattr(tier, "open", None)) or not callable(getattr(tier, "forms", None)):
            do = "Pass a Disk, a Remote, or an object with their forms() and open()."
            raise invalid(f"tiers[{number}]", "a tier", tier, do)
    return result


class BlockStore:
    """Blocks of one cache in host memory and in tiers, nearest first.

    Args:
        form: of the blocks that are saved; views hold its layers and heads.
        staging: bytes of pinned memory that transfers go through; host: bytes of it that keep
            blocks, the host tier.
        tiers: `Disk`, `Remote`, or anything with their ``forms`` and ``open``.
        graph: to share workers with others; by default the store's own.
        full: what a save does that finds no staging within its slack: ``drop`` or ``wait``.
        weak_keys: take keys of less than 16 bytes, of which two may meet.

    Blocks of a view belong to a load until its end: a model that writes them before `Handle.wait`
    mixes both. A save reads behind what the current stream holds at the call, and until its end.
    A store is its own context, and closed at the end of it.

    Raises:
        StoreError, StoreBusy: memory for no block; a tier that cannot be opened; after `close`.
        InvalidTerms: keys or terms that are none, a key twice in a call, more keys than blocks.
        LayoutError, SlotError: a view of another cache; blocks that it lacks, or one twice.
        Unsupported: `save` or `load` inside graph capture.
    """

    def __init__(
        self,
        form: BlockForm,
        *,
        staging: int = 1 << 30,
        host: int = 0,
        tiers: Sequence[Tier] = (),
        graph: Graph | None = None,
        full: Full = "drop",
        weak_keys: bool = False,
    ) -> None:
        instance("form", form, BlockForm, "Make one by BlockForm.of(view, model).")
        staging = nbytes("staging", staging)
        host = nbytes("host", host)
        tiers = _check_tiers(tiers)
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
        self._drop = full == "drop"
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
        except BaseException:
            self.close()
            raise
        self._generation = max([x.generation for x in self._tier_stores], default=0)
        self._shared.parts = parts_of(self.form, forms, self._tier_stores, self.rows.tensor)
        self._own = self._shared.parts[0]

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, keys: Keys, timeout: float | None = 1.0) -> int:
        """How many leading blocks can be loaded, from the host or some tier. What a far tier has
        not said within ``timeout`` seconds counts as not there. Only here a far tier is asked which
        blocks it has in other parts than this form's: a `load` or `prefetch` goes by that."""
        keys = self._call("lookup", keys, "normal").keys
        until = self.graph.clock() + seconds("timeout", timeout, optional=True)
        leading = 0
        many = ASKED
        while many and (some := keys[leading : leading + many]):
            there = self._shared.leading(some, until)
            leading = leading + there
            many = 2 * many if there == len(some) else 0
        uninterrupted(partial(self._shared.touch, keys[:leading]))
        return leading

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        after: bytes | None = None,
        priority: Priority = "background",
        deadline: float | None = None,
    ) -> Handle:
        """Save blocks of a view under keys; a key that every writable tier has, or does not
        admit yet, or whose save is under way, is nothing. ``blocks``: ids of the view's blocks,
        whose tokens the keys name in order; of another size than the form's, they need not be
        filled by the last key.

        Each key follows the one before it, and the first one follows ``after``, or begins a prompt.
        Tiers evict no block before those that follow it. A tier with no room for all keeps the
        first ones. The others do not land, and neither do blocks that are evicted before the
        save ends."""
        previous = self._predecessor(after)
        call = self._call("save", keys, priority, deadline, previous)
        own = self._own
        crossing = Crossing(own.rows, view, blocks, len(call.keys), own.form.block_size, store=True)
        until = self.graph.clock() + SLACK[priority] if self._drop else None
        return self._planned(call, partial(self._save, call, crossing, view, until))

    def _save(self, call: Call, crossing: Crossing, view: KVView, until: float | None) -> Handle:
        """Plan a save, under the graph's lock."""
        own = self._own
        self._shared.touch(call.keys, call.follows)
        call.given = partial(self._shared.stored, call.keys)
        for tier_stores, some in self._lacking(call).items():
            queues = [tier_store.queue_for_write(0) for tier_store in tier_stores]
            chunks = call.chunks(some, SAVED, 1, *queues)
            self._generation += len(chunks)
            # After a gap no block evicts another one. The first blocks take the free slots only if
            # each chunk waits for the writes of the chunk before it.
            gaps = {
                tier_store
                for tier_store in tier_stores
                if not self._shared.continues(call.after, tier_store)
            }
            written = dict[TierStore, Task]()
            for number, at in enumerate(chunks):
                in_flight = InFlight(call, own, at, until)
                in_flight.generation = self._generation - number  # a prefix is the newer part
                work = partial(in_flight.gather, crossing, view)
                in_flight.ends[None] = gather = call.task(at, work, self._down, in_flight, ())
                in_flight.last = [gather]
                for tier_store in tier_stores:
                    queue = tier_store.queue_for_write(len(at) * own.form.image_bytes)
                    work = partial(in_flight.write, tier_store, queue)
                    order: list[tuple[Task, list[int], list[int]]] = []
                    if tier_store in gaps and tier_store in written:
                        order.append((written[tier_store], [], []))
                    written[tier_store] = call.task(at, work, queue, in_flight, [gather, *order])
                    in_flight.last.append(written[tier_store])
                call.ends += [((end, at, range(len(at))), range(0)) for end in in_flight.last]
                call.submit()  # now, so that the queues' queues show it
        return call.handle(view)

    def _lacking(self, call: Call) -> dict[tuple[TierStore, ...], list[int]]:
        """The blocks of a save by the tiers that lack them; it joins what is under way."""
        own = self._own
        groups = dict[tuple[TierStore, ...], list[int]]()
        tier_stores = [tier_store for tier_store in own.tier_stores if tier_store.writable]
        keeps = [tier_store.where for tier_store in tier_stores if tier_store.tier != "remote"]
        call.explanation.kept_in = ", ".join(keeps if tier_stores else ["the host tier"])
        known = [tier_store.known(call.keys) for tier_store in tier_stores]
        wants = [tier_store.wants(call.keys) for tier_store in tier_stores]
        for stored, wanted in zip(known, wants, strict=True):
            call.excused |= ~(np.array(stored, np.bool_) | np.array(wanted, np.bool_))
        for i, key in enumerate(call.keys):
            in_flight, row = self._shared.in_flights.get(own.name(key), (None, 0))
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
    ) -> Handle:
        """Load blocks into a view, of whatever layout, device, and size of blocks.

        Blocks that no tier has, or not in right bytes, do not land (`Handle.landed`), and nothing
        is written for them. ``by_layer``: layers are read, verified and handed on one behind the
        other, each with an end of its own (`Handle.layers`), so that of a block that does not land
        some layers may be written, in right bytes; blocks of a form with one segment are read as a
        whole, and only the device's stage goes by layer.
        """
        one_of("missing", missing, get_args(Missing))
        flag("by_layer", by_layer)
        call = self._call("load", keys, priority, deadline)
        own = self._own
        crossing = Crossing(own.rows, view, blocks, len(call.keys), own.form.block_size)

        def plan() -> Handle:
            groups = call.groups()
            stages = {part: part.stages(view, by_layer) for part, _ in groups}
            for (part, location), some in groups.items():
                segments = [stage.segment for stage in stages[part]]
                for arrival in call.bring(part, location, some, segments):
                    call.cross(arrival, stages[part], crossing, self._up)
            self._shared.touch(call.keys)
            return call.handle(view, view.layers * by_layer, missing)

        return self._planned(call, plan)

    def prefetch(self, keys: Keys, priority: Priority = "background") -> Handle:
        """Read blocks into the host tier, of which what is prefetched and not yet loaded takes half
        at most: blocks above that do not land. Raises `StoreError` without a host tier."""
        if not self.rows.host:
            raise StoreError("A prefetch was asked of a store without a host tier; give it host=.")
        call = self._call("prefetch", keys, priority)
        most = max(1, self.rows.host // 2)

        def plan() -> Handle:
            groups = call.groups()
            call.given[most:] = False
            for (part, location), some in groups.items():
                some = [i for i in some if i < most]
                if some and location != KEPT:
                    for arrival in call.bring(part, location, some, [None]):
                        ends = [(end, arrival.at, arrival.rows) for end in arrival.ends[0]]
                        call.ends += [(end, range(0)) for end in ends]
            return call.handle(None, missing="skip")

        return self._planned(call, plan)

    def statistics(self) -> dict[str, list[dict[str, Any]]]:
        """Figures by the names that they have in Prometheus, as `Graph.statistics`; what each tier
        tells beside them."""
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
        """Write what the graph did last, for Perfetto or Chrome to show."""
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
        """How blocks are kept and moved, a line each."""
        rows = self.rows
        many = len(self.form.segments)
        how = f"in {many} segments" if many > 1 else "as a whole, in one segment"
        lines = [f"Blocks of {self.form.payload_bytes} bytes, by layer read {how}."]
        kind = "pinned" if rows.pinned else "pageable"
        lines += [f"{rows.staging} {kind} rows of staging, {rows.host} of the host tier."]
        lines += [f"{x.tier} {x.form.name}: {note}" for x in self._tier_stores for note in x.notes]
        return "\n".join(lines)

    def close(self, timeout: float = 10.0) -> None:
        """Let what is under way end, for so many seconds; cancel prefetches at once, and the rest
        then; close the tiers. Raises `TransferTimeout` if one hangs: tiers then stay open, as it
        uses the rows and the files."""
        timeout = seconds("timeout", timeout)
        if self.graph.process.forked:  # locks may be held for ever, and nothing here is its own
            return
        self._closed = True
        until = self.graph.clock() + timeout
        # Under the lock, so that no call that found the store open is missed.
        gates = self.graph.run(lambda: [*self._shared.gates])
        for gate in sorted(gates, key=lambda gate: gate.name != "prefetch"):
            gate.wait(0.0 if gate.name == "prefetch" else max(0.0, until - self.graph.clock()))
            self.graph.cancel(gate)
        ended = not self._own_graph or self.graph.close(max(0.0, until - self.graph.clock()))
        begun = self.graph.run(lambda: [*self._shared.begun])
        for in_flight in begun:
            for end in (*in_flight.ends.values(), *in_flight.last):
                end.wait(max(0.0, until - self.graph.clock()))
        if busy := len(self._shared.begun) or not ended:
            raise TransferTimeout(
                f"A block store was closed, and after {timeout:g} s {busy:d} transfers had not "
                f"ended, so that tiers stay open; close it again, or end the process."
            )
        uninterrupted(self._close_tiers)

    def _close_tiers(self) -> None:
        """Close what tiers have open, the first one last."""
        while self._tier_stores:
            self._tier_stores.pop().close()

    def _predecessor(self, after: Any) -> bytes | None:
        """Return the key before the first one of a save, of 32 bytes."""
        if after is None:
            return None
        try:
            return check_keys([after], self._weak)[0]
        except InvalidTerms:
            kind = f"{len(after)} bytes" if isinstance(after, bytes) else type(after).__name__
            raise InvalidTerms(
                f"Expected the key before the first one in `after`, 16 to 32 bytes, got {kind}. "
                f"Pass that key, or None for the beginning of a prompt."
            ) from None

    def _call(
        self,
        kind: str,
        keys: Keys,
        priority: Priority,
        deadline: float | None = None,
        after: bytes | None = None,
    ) -> Call:
        """A call with keys of 32 bytes; refuses what is wrong with them, and a closed store."""
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
            deadline = seconds("deadline", deadline, optional=True)
        return Call(self._shared, kind, keys, priority, deadline, after)

    def _refuse_closed(self, kind: str) -> None:
        if self._closed or self.graph.process.forked or self.graph.closed.is_set():
            why = "closed, or opened by a process that this one was forked from; open another one"
            raise StoreError(f"A {kind} was asked of a block store that was {why}.")

    def _planned(self, call: Call, plan: Callable[[], Handle]) -> Handle:
        """Return ``plan()``, run while the graph is locked and the store open. Cancel the call if
        the caller is interrupted meanwhile."""

        def planned() -> Handle:
            self._refuse_closed(call.kind)
            try:
                return plan()
            except BaseException:
                call.drop()
                raise

        return self.graph.run(planned, undo=Handle.cancel)
