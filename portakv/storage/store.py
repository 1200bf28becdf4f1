# SPDX-License-Identifier: Apache-2.0
"""`BlockStore` saves blocks of caches under keys and loads them into any view of these caches."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from inspect import signature
from typing import Any, get_args

from portakv.arguments import flag, instance, invalid, nbytes, one_of, seconds, text
from portakv.errors import InvalidTerms, StoreError, TransferTimeout
from portakv.graph import Graph, Handle, watch
from portakv.runtime.finished import Finished
from portakv.runtime.interrupts import uninterrupted
from portakv.storage.auto import PACKED, RAW, AutoEncoding, Chooser, Encoding, forms_for, terms_of
from portakv.storage.changes import Change, Snapshot
from portakv.storage.form import BlockForm
from portakv.storage.form_store import FormStore, Full
from portakv.storage.plan import FormBlocks, SharedState, parts_of
from portakv.storage.sized_rows import rows_for
from portakv.storage.tier import Tier, tier_figures, tiers_of

#: Seconds between two looks at the loads that `BlockStore.close` waits for.
PAUSE = 0.001


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
        graph: shares workers with other code; by default the store's own graph.
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
        packed = forms.get(PACKED)
        if packed is not None:
            self._raw_alone = copy(raw)
            self._raw_alone.spare = raw.spare.alone(packed.spare)
            raw.spare.pair(packed.spare)
        self._form = raw
        self.chooser = Chooser(
            None if packed is None else packed.own.form,
            why,
            terms,
            bool(self._tier_stores),
            raw.spare.figures,
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

    def keys(self) -> Snapshot:
        """Return the keys as `FormStore.keys` does; of a store that packs where it pays those of
        both forms."""
        if self.chooser is None:
            return super().keys()
        snapshots = [each.keys() for each in self._stores.values()]
        keys = dict[str, dict[bytes, None]]()
        for snapshot in snapshots:
            for tier, some in snapshot.keys.items():
                keys.setdefault(tier, {}).update(dict.fromkeys(some))
        return Snapshot(snapshots[0].number, {tier: [*some] for tier, some in keys.items()})

    def listen(self) -> list[Change]:
        """Return the blocks that were stored or lost since the last call, in order.

        The first call of this or of `keys` returns none, and from then on changes are kept: at most
        65,536, of which the oldest go first. There is one consumer. If a number is missing in the
        numbers of changes, call `keys` again.
        """
        self._refuse_closed("call of listen()")
        if self._shared.announced.is_unchanged:
            return []  # without a helper thread: an engine calls this in each step
        return uninterrupted(lambda: self._listen().take())

    def listen_fd(self) -> int:
        """Return a descriptor that is readable while `listen` has changes. It is closed with the
        store.

        Raises `HostMemoryError` without a free descriptor.
        """
        self._refuse_closed("call of listen_fd()")
        return uninterrupted(lambda: self._listen().fileno())

    def _listen(self) -> Finished[Change]:
        return self._shared.announced.listen(self._indices())

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
            reported |= self.graph.run(self._form_statistics)
        for name, samples in self._encoding_figures().items():
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

    def _encoding_figures(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of packed forms, or of the raw one if the store cannot pack it."""
        forms = [*self._shared.forms.values()]
        packed = [form for form in forms if form.own.form.encoding]
        if self.chooser is not None and not packed:
            packed = forms
        figures: dict[str, list[dict[str, Any]]] = {}
        for form in packed:
            each = form.spare.figures.statistics(self._called(form.own.form))
            for name, samples in each.items():
                figures.setdefault(name, []).extend(samples)
        return figures

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
        barriers = self.graph.run(lambda: [*self._shared.barriers])
        for barrier in sorted(barriers, key=lambda barrier: barrier.name != "prefetch"):
            left = 0.0 if barrier.name == "prefetch" else max(0.0, until - self.graph.clock())
            barrier.wait(left)
            self.graph.cancel(barrier)
        if self._own_graph:
            self.graph.close(max(0.0, until - self.graph.clock()))
        begun = self.graph.run(lambda: [*self._shared.begun])
        for in_flight in begun:
            for end in (*in_flight.ends.values(), *in_flight.last):
                end.wait(max(0.0, until - self.graph.clock()))
        self.rows.end_left_loans()  # a traceback may retain the call that was interrupted
        while self.rows.loans() and self.graph.clock() < until:
            time.sleep(PAUSE)
        if busy := self.graph.run(partial(self._hanging, self._own_graph)) + self.rows.loans():
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
