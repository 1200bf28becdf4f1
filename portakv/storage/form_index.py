# SPDX-License-Identifier: Apache-2.0
"""`FormIndex` looks up the blocks of one form of a block store, and checks keys of calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from operator import or_

import numpy as np

from portakv.arguments import one_of, seconds
from portakv.errors import InvalidTerms, StoreError
from portakv.graph import SLACK, Graph, Mask, Priority
from portakv.runtime.interrupts import uninterrupted
from portakv.storage.auto import PACKED, RAW, Chooser
from portakv.storage.changes import Listed, Snapshot
from portakv.storage.form import BlockForm
from portakv.storage.keys import check_key, check_keys, predecessors
from portakv.storage.pins import Pinning, Pins
from portakv.storage.plan import FormBlocks, SharedState
from portakv.storage.rows import Rows
from portakv.storage.tier import After, Keys

LOOKUP_BATCH = 8  # blocks of the first request of a lookup; each next request has twice as many


class FormIndex:
    """The index of the blocks of one form, of a `BlockStore`; the base of `FormStore`."""

    def __init__(
        self, shared: SharedState, weak_keys: bool, form: FormBlocks | None = None
    ) -> None:
        self._shared = shared
        self._weak = weak_keys
        self._form = form  # None: of a store with several forms
        self.chooser: Chooser | None = None  # of a store that packs where it pays
        # Then its raw form, whose saves do not look for packed blocks.
        self._raw_alone: FormBlocks | None = None

    @property
    def form(self) -> BlockForm:
        """Return the form of the blocks. Raises `InvalidTerms` for a store with several forms."""
        return self._only("look at `form`").own.form

    @property
    def graph(self) -> Graph:
        """Return the graph whose workers move the blocks."""
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
        until = self.graph.clock() + seconds("timeout", timeout, optional=True)
        leading = 0
        many = LOOKUP_BATCH
        while leading < len(keys):
            batch = keys[leading : leading + many]
            there = self._stored_leading(form, batch, until)
            leading = leading + there
            if there < len(batch):
                break
            many = 2 * many
        uninterrupted(partial(form.touch, keys[:leading]))
        return leading

    def _stored_leading(self, form: FormBlocks, keys: Keys, until: float) -> int:
        """Return the number of leading blocks that are stored, in one part or in several.

        Asks remote tiers.
        """
        whole = form.own.cells
        covers = [0] * len(keys)
        for number, part in enumerate(form.parts):
            some = [i for i, cover in enumerate(covers) if part.cells & ~cover]
            left = [i for i in some if not self.rows.has(part.name(keys[i]))]
            for tier_store in part.tier_stores:
                time = max(0.0, until - self.graph.clock())
                present = tier_store.has([keys[i] for i in left], time)
                left = [i for i, has in zip(left, present, strict=True) if not has]
            for i in {*some}.difference(left):
                covers[i] |= part.cells
            later = reduce(or_, (other.cells for other in form.parts[number + 1 :]), 0)
            end = next((i for i, cover in enumerate(covers) if cover | later != whole), len(covers))
            del covers[end:]  # no request follows for blocks after a missing one
        return len(covers)

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
        keys = check_keys(keys, self._weak)
        there = self._shared.rows.has_each(form.own.names(keys))
        for tier_store in form.own.tier_stores:
            known = tier_store.known(keys)
            there = [a or b for a, b in zip(there, known, strict=True)]
        if len(form.parts) > 1:  # other parts may cover a block together
            there = [a or self.has(key) for a, key in zip(there, keys, strict=True)]
        return there

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
        for part in form.spare.parts:
            for i, name in enumerate(part.names(keys)):
                row = None if pins.held[i] else rows.find(name)
                if row is not None:
                    pins.add(i, partial(rows.unpin, [row]))
        for tier_store in (store for part in form.spare.parts for store in part.tier_stores):
            left = np.flatnonzero(~pins.held).tolist()
            some = [keys[i] for i in left]
            if isinstance(tier_store, Pinning):
                pins.add_all(left, tier_store.pin(some))
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
        for part in form.spare.parts:
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
        leading = 0
        many = LOOKUP_BATCH
        while leading < len(keys):
            batch = keys[leading : leading + many]
            there = self._leading(form, batch)
            leading += there
            if there < len(batch):
                break
            many = 2 * many
        return leading

    def _leading(self, form: FormBlocks, keys: Keys) -> int:
        """Return the number of leading blocks of a batch that can be loaded."""
        own = form.own
        rows = self._shared.rows
        left = [at for at, key in enumerate(keys) if not rows.has(own.name(key))]
        for tier_store in own.tier_stores:
            known = tier_store.known([keys[at] for at in left])
            left = [at for at, there in zip(left, known, strict=True) if not there]
        if len(form.parts) > 1:  # other parts may cover a block together
            return next((at for at in left if not self.has(keys[at])), len(keys))
        return left[0] if left else len(keys)

    def keys(self) -> Snapshot:
        """Return the keys of the host tier and of each tier with an index, and the number of the
        last change.

        A process that keeps an index begins with this, and applies what `BlockStore.listen`
        returns. Blocks of other forms are left out.
        """
        form = self._own("call of keys()")
        announced = self._shared.announced
        return uninterrupted(lambda: announced.snapshot(self._indices(), form.name))

    def _indices(self) -> dict[str, list[Listed]]:
        """Return the indices of each form: of the host tier, and of the tiers with one."""
        shared = self._shared
        result = dict[str, list[Listed]]()
        for name, form in shared.forms.items():
            host = [shared.rows.listed(form.own.form.digest)] if shared.rows.host else []
            tiers = [x for x in form.own.tier_stores if isinstance(x, Listed)]
            result[name] = [*host, *tiers]
        return result

    def _predecessors(self, after: After, keys: Keys) -> Sequence[bytes | None]:
        """Return for each key of a save the key that it follows."""
        return predecessors(after, keys, self._weak)

    def _keys(self, keys: Keys, priority: Priority, deadline: float | None) -> list[bytes]:
        """Return keys of 32 bytes; reject wrong keys and terms."""
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
        form = self._shared.forms[PACKED if packs else RAW]
        other_size = block_size != form.own.form.block_size
        if self._raw_alone is not None and other_size and not packs:
            return self._raw_alone
        self._form = form
        return form

    def _for_view(
        self, form: FormBlocks, block_size: int | None, encoding: tuple[object, ...]
    ) -> FormBlocks:
        """Return the form to load into a view of a block size and an encoding.

        A store that chooses loads by its raw form, unless packed blocks serve the view.
        """
        if self.chooser is None or not form.own.form.encoding:
            return form
        rows = form.own.rows.form
        if block_size == rows.block_size and encoding in ((), rows.encoding):
            return form
        return self._shared.forms[RAW]

    def _refuse_closed(self, kind: str) -> None:
        shared = self._shared
        if not (shared.closed or shared.graph.process.forked or shared.graph.closed.is_set()):
            return
        got = "one whose graph was closed"
        if shared.closed:
            got = "one that was closed"
        if shared.graph.process.forked:
            got = "one of the process that this one was forked from"
        raise StoreError(f"Expected an open store for a {kind}, got {got}. Make another.")
