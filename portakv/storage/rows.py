# SPDX-License-Identifier: Apache-2.0
"""Rows of host memory, for staging and for the host tier of a block store.

`Rows` lends rows, which hold the image of a block each, as staging, or caches them under a key as
the host tier. No bytes are copied between the two. `Crossing` copies blocks between rows and a
view.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import invalid, naming, shown
from portakv.copy.options import USUAL, CopyOptions
from portakv.errors import InvalidTerms, LayoutError, SlotError
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import (
    StreamFence,
    completion,
    ignoring_captures,
    on_one_core,
    side_stream,
)
from portakv.runtime.transfer import Completion, Transfer
from portakv.storage.host_cache import (
    ANY,
    BEFORE,
    UNUSED,
    USED,
    Cache,
    HostIndex,
    New,
    mark_in_form,
)
from portakv.storage.host_cache import Claim as Claim
from portakv.storage.host_cache import Want as Want
from portakv.storage.host_runs import copy_long_runs, copy_rows
from portakv.storage.loans import Loan as Loan
from portakv.storage.loans import copy_parts
from portakv.storage.row_memory import row_memory
from portakv.view import IdList, Index, KVView

FOREVER = 1e9  # seconds
_TRIED = "copies of a block store"  # the key of a view's copies that were tried before


class Rows:
    """Rows of host memory: staging buffers, and the host tier.

    Loads and saves have ``staging`` rows together, of which saves have at most half. At most
    ``host`` rows are cached, or lent to saves beyond that half. So no load waits for rows of the
    host tier. No call blocks, and any thread may call. ``shared``: the rows lie in memory without a
    name that other processes can map: row i of ``tensor`` is row i there.

    Attributes:
        tensor: uint8 ``[staging + host, row_bytes]``, at a multiple of 4,096 bytes.
        array: the same, of numpy.
        pinned: False if the memory is pageable.
        evicted: rows that lost their key to another key.
        sized: rows have the sizes of their images; see `SizedRows`.
    """

    sized = False

    def __init__(
        self, row_bytes: int, staging: int, host: int, pin: bool = True, shared: bool = False
    ) -> None:
        self.row_bytes = row_bytes
        self.staging = int(staging)
        self.host = int(host)
        self.evicted = 0
        count = self.staging + self.host
        self.tensor, self.pinned = row_memory(count, row_bytes, pin, shared)
        self.array: npt.NDArray[np.uint8] = self.tensor.numpy()
        self._cache = Cache()
        self._lock = self._cache.chains.lock  # no call is made while it is locked
        self._free = deque(range(count))
        self._lent: dict[int, bool] = {}  # True if it is lent to a save
        self._saved = 0  # rows that are lent to saves

    @property
    def most(self) -> int:
        """Return the rows that one lease may have, and that saves have of staging together."""
        return max(1, self.staging // 2)

    @property
    def memory(self) -> tuple[tuple[int, int], ...]:
        """Return the address and the bytes of the rows, for an I/O engine to register."""
        return ((self.tensor.data_ptr(), self.tensor.nbytes),)

    def image(self, item: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of a row, uint8 ``[nbytes or more]``."""
        row: npt.NDArray[np.uint8] = self.array[item]
        return row

    def holds(self, nbytes: int) -> int:
        """Return the number of images of so many bytes for which the host tier has rows."""
        return self.host

    def take(
        self, count: int, store: bool, claim: Claim | None = None, place: int = BEFORE
    ) -> list[int] | None:
        """Return rows for a transfer, all or none.

        Saves have at most `most` rows of staging together. With a claim, a save also takes rows of
        the host tier, in place of the next rows to evict: its blocks would evict them at its end.
        ``place``: the position of its last block in the call.
        """
        with self._lock:
            saved = self._saved + count * store
            loaded = len(self._lent) + count - saved
            if loaded + min(saved, self.most) > self.staging:
                return None
            beyond = saved - self.most
            if store and beyond > 0 and not (claim and self._evict_for_saves(beyond, claim, place)):
                return None
            items = [self._free.popleft() for _ in range(count)]
            self._lent.update(dict.fromkeys(items, store))
            self._saved = saved
            return items

    def lacks(self, count: int) -> bool:
        """Return True if saves may not have so many rows more, whatever is evicted."""
        return self._saved + count > self.most + self.host

    def _evict_for_saves(self, beyond: int, claim: Claim, place: int) -> bool:
        """Evict rows until saves may have so many rows of the host tier; return False, and evict
        none, if some may not go."""
        if beyond > self.host:
            return False
        count = len(self._cache.rows) + beyond - self.host
        if count <= 0:
            return True
        if not claim.evict:
            return False
        victims = self._cache.choose(count, lambda key: claim.place_of(key) > place)
        return len(victims) == count and self._take_from(victims)

    def _evict(
        self, claim: Claim, place: int, group: Hashable | None = None, new: New | None = None
    ) -> bool:
        """Evict the next row, of a group or of all, for a block at a position of a call; return
        False if it may not go.

        ``new``: keys that go in their turn if no other row may go, or if they follow it.
        """
        if not claim.evict:
            return False
        cache = self._cache
        victim = cache.next(group)
        if new is not None and new.keys:
            goes = victim is not None and claim.place_of(victim) > place
            if victim is None or not goes or cache.chains.mark(victim) in new.leading:
                cache.let_go(new)
                victim = cache.next(group)
        if victim is None or claim.place_of(victim) <= place:
            return False
        return self._take_from([victim])

    def _take_from(self, keys: Sequence[bytes]) -> bool:
        """Free the rows of keys; return False, and free none, if a load reads one of them."""
        items = self._cache.evict(keys)
        self._free += items
        self.evicted += len(items)
        return bool(items)

    def give(self, items: Sequence[int]) -> None:
        """End a transfer: its rows that it did not `keep` become free."""
        with self._lock:
            for item in items:
                store = self._lent.pop(item, None)
                if store is not None:
                    self._saved -= store
                    self._free.append(item)

    def keep(
        self,
        items: Sequence[int],
        keys: Sequence[bytes],
        follows: Sequence[int],
        prefetched: bool = False,
        claim: Claim = ANY,
        sizes: Sequence[int] | None = None,
    ) -> list[bool]:
        """Cache lent rows under keys that follow marks, in place of the next rows to evict.

        Returns which rows are cached: not one whose key has a row, or for which no row may be
        evicted. A row of a save beyond `most` evicts none. At most half of the rows of the host
        tier are ``prefetched`` and not used yet. ``sizes``: the bytes of each image; all rows have
        room for the largest.
        """
        with self._lock:
            if not self.host:
                return [False] * len(items)
            return self._keep(items, keys, follows, prefetched, claim)

    def _keep(
        self,
        items: Sequence[int],
        keys: Sequence[bytes],
        follows: Sequence[int],
        prefetched: bool,
        claim: Claim,
    ) -> list[bool]:
        """Cache lent rows under keys that follow marks; return which are cached."""
        cache = self._cache
        most = self.most
        most_unused = max(1, self.host // 2)
        new = New(UNUSED if prefetched else USED)
        cached = [False] * len(items)
        for number, (item, key) in enumerate(zip(items, keys, strict=True)):
            if key in cache.rows:
                continue
            saved = self._saved - self._lent[item]
            full = len(cache.rows) + max(0, saved - most) >= self.host
            crowded = prefetched and len(cache.unused) >= most_unused
            if crowded or full:
                place = claim.own.get(key[-32:], BEFORE)
                if not self._evict(claim, place, UNUSED if crowded else None, new):
                    continue
            del self._lent[item]
            self._saved = saved
            cache.rows[key] = item
            if prefetched:
                cache.unused.add(key)
            new.add(key, follows[number])
            cached[number] = True
        cache.let_go(new)
        return cached

    def find(self, key: bytes) -> int | None:
        """Return the row of a key, which stays until `unpin`; None if it has none."""
        with self._lock:
            item = self._cache.rows.get(key)
            if item is not None:
                self._cache.pin(key, item)
            return item

    def borrow(self, keys: Sequence[bytes], caller: object) -> Loan:
        """Return the rows of keys, which stay until the end of the loan's copy.

        A loan without a copy ends with the life of ``caller``. Takes no lock, so that the main
        thread may call it (see `uninterrupted`).
        """
        loan = self._cache.loans.begin(keys, caller)
        loan.rows = [*map(self._cache.rows.get, keys)]
        return loan

    def in_use(self) -> int:
        """Return the number of cached rows that transfers read."""
        return uninterrupted(self._in_use)

    def _in_use(self) -> int:
        with self._lock:
            self._cache.loans.forget_ended()
            return len({*self._cache.pins} | self._cache.loans.rows())

    def loans(self) -> int:
        """Return the number of loans that have not ended."""
        return uninterrupted(self._loans)

    def _loans(self) -> int:
        with self._lock:
            self._cache.loans.forget_ended()
            return len(self._cache.loans)

    def unpin(self, items: Sequence[int]) -> None:
        """Release the pin of `find`."""
        with self._lock:
            for item in items:
                self._cache.unpin(item)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Free the rows of keys; return which are free: not a row that is pinned or read."""
        cache = self._cache
        with self._lock:
            there = [key in cache.rows and cache.rows[key] not in cache.pins for key in keys]
            for number, key in enumerate(keys):
                if there[number]:
                    there[number] = self._take_from([key])
            return there

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessor of each key, for keys whose predecessor is not known yet.
        """
        cache = self._cache
        with self._lock:
            if cache.rows.keys().isdisjoint(keys):
                return
            cache.chains.touch(*[key for key in reversed(keys) if key in cache.rows])
            for key, mark in zip(keys, follows, strict=False):
                if key in cache.rows:
                    cache.chains.learn(key, mark_in_form(key, mark))

    def use(self, keys: Sequence[bytes]) -> None:
        """Count prefetched keys as used."""
        with self._lock:
            for key in keys:
                self._cache.use(key)

    def end_left_loans(self) -> None:
        """End the loans of this thread whose calls were interrupted before their copies."""
        self._cache.loans.end_left()

    def forget_loans(self) -> None:
        """Forget the loans that have ended, also those of loads that found no row."""
        with self._lock:
            self._cache.loans.forget_ended()

    def by_use(self) -> list[bytes]:
        """Return the keys that have a row, the least recently used first."""
        with self._lock:
            return self._cache.chains.by_use()

    def nbytes_by_form(self) -> dict[bytes, int]:
        """Return the bytes of the cached rows of each form, by its checksum."""
        with self._lock:
            rows = Counter(key[:-32] for key in self._cache.rows)
        return {form: count * self.row_bytes for form, count in rows.items()}

    def listed(self, form: bytes) -> HostIndex:
        """Return the index of the blocks of a form, by its checksum."""
        return HostIndex(self._cache, form)

    def crowded(self, claim: Claim) -> bool:
        """Return True if the next row to evict belongs to a call."""
        with self._lock:
            return claim.place_of(self._cache.next() or b"") < len(claim.own)

    def has(self, key: bytes) -> bool:
        """Return True if a key has a row."""
        return key in self._cache.rows

    def has_each(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which keys have a row."""
        return [*map(self._cache.rows.__contains__, keys)]

    def counts(self) -> dict[str, int]:
        """Return the number of rows by their state."""
        cached = len(self._cache.rows)
        return {"free": len(self._free), "lent": len(self._lent), "kept": cached}

    def nbytes_by_state(self) -> dict[str, int]:
        """Return the bytes of rows by their state."""
        return {state: rows * self.row_bytes for state, rows in self.counts().items()}

    def sentence(self) -> str:
        """Return how many rows there are, for `BlockStore.explain`."""
        kind = "pinned" if self.pinned else "pageable"
        return f"{self.staging} {kind} rows of staging, {self.host} of the host tier."


def _wrong_count(got: int, needed: int, whole: int, many: int, size: int) -> InvalidTerms:
    """Return the error for another number of a view's blocks than keys name."""
    wanted = "1 id" if needed == 1 else f"{needed} ids"
    given = "1 key" if many == 1 else f"{many} keys"
    return InvalidTerms(
        f"Expected blocks to be {wanted}, of the view's blocks of {whole} tokens for {given} of "
        f"{size}, got {got}. Pass the blocks that the keys name."
    )


def _check_places(fine: npt.NDArray[np.int64]) -> None:
    """Raise `SlotError` for a key whose rows have no place in the view: its block would land
    nowhere. ``fine``: ids ``[keys, parts]``."""
    nowhere = np.flatnonzero((fine < 0).all(1))
    if len(nowhere):
        raise SlotError(
            f"Expected blocks to have a block of the view for each key, got negative ids alone for "
            f"keys[{nowhere[0]}]. Leave the key out."
        )


class Crossing:
    """Copies between rows, seen as ``inner``, and ``blocks`` of a view.

    ``many`` stored blocks of ``size`` tokens name the view's tokens. A load writes no row of a
    block with a negative id. ``ends``: of the copies of a save that were issued.
    """

    def __init__(
        self,
        view: KVView,
        blocks: IdList,
        many: int,
        size: int,
        store: bool = False,
        options: CopyOptions = USUAL,
    ) -> None:
        whole = view.block_size if isinstance(view, KVView) else None
        if not whole:
            got = repr(view) if isinstance(view, KVView) else shown(view)
            raise LayoutError(
                f"Expected view to be a paged view, got {got}. Name a block axis in its layout."
            )
        if capturing(view.device):
            why = "workers on the host move blocks; save and load outside of it"
            raise refuse_capture("A transfer of a block store", why)
        try:
            if blocks is None:  # an index of all blocks in a copy
                raise invalid("blocks", "ids of the view's blocks", blocks, "Name them in a list.")
            ids = Index(blocks, whole).host_ids()
            if not isinstance(blocks, list | tuple | range):
                # A copy: workers read it later, when the caller may have changed the ids.
                ids = ids.copy()
            # For this call: the ids of an index that is kept are sent by a copy that may wait for
            # the stream.
            index = Index.of(ids, whole)
            needed = -(-many * size // whole)
            if len(ids) != needed:
                raise _wrong_count(len(ids), needed, whole, many, size)
            held = len(ids) * whole
            skips = index.check_named("blocks", held, view.slots, distinct=not store)
            if skips and store:
                at = int(np.flatnonzero(ids < 0)[0])
                raise SlotError(
                    f"Expected blocks to be ids from 0 to {view.slots // whole - 1} in a save, the "
                    f"blocks of the view, got {ids[at]} at position {at}. Leave it and its key out."
                )
        except (SlotError, LayoutError):
            # Only now: a list without an error does not pay for it.
            with naming("blocks", "whole numbers in a list, an array or a tensor"):
                raise
        self._size = size
        self._store = store
        self._options = options
        self._step = gcd(whole, size)
        self._whole = index  # of all blocks
        if whole > self._step:
            parts = whole // self._step
            ids = (ids[:, None] * parts + np.arange(parts)).reshape(-1)[: many * size // self._step]
            self._whole = Index.of(ids, self._step)
        self._fine = ids.reshape(many, size // self._step)
        if skips:
            _check_places(self._fine)
        self._view = view
        self._after: StreamFence | None = None
        self._stream: torch.Stream | None = None  # of the maker
        self.ends = list[Completion]()

    @property
    def on_device(self) -> bool:
        """Return True if the view lies on a device."""
        return self._view.device.type != "cpu"

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the view's blocks, or of their parts."""
        ids: npt.NDArray[np.int64] = self._fine.reshape(-1)
        return ids

    @property
    def waits_for_nothing(self) -> bool:
        """Return True if the host issues copies from the view without a wait for its device.

        On others ids go to the device by a copy that waits; see `registry.prepared.ASYNCHRONOUS`.
        """
        return self._view.device.type == "cuda"

    def prepare(self, inner: KVView) -> None:
        """Prepare copies by workers, after the present work of the current stream.

        Raises the errors of a copy that is impossible, by an empty one.
        """
        view = self._view
        self._after = StreamFence(view.device)
        if self.on_device:
            self._stream = torch.accelerator.current_stream(view.device.index)
        tried: set[object] = view.derived.setdefault(_TRIED, set())
        kind = inner.form, self._size, self._step, self._store, self._options
        if kind in tried:
            view.check_memory()
        else:
            with torch.inference_mode(False), self._after.inside():
                copy_rows(*self._sides(inner, view, [], []), options=self._options).synchronize()
            tried.add(kind)

    def issue(
        self, inner: KVView, loan: Loan, by_layer: bool = False
    ) -> tuple[Transfer, Sequence[Transfer]]:
        """Copy the rows of a loan into the view, ordered on the current stream of the view's
        device; the host does not wait for a device.

        Returns the transfer, and ``by_layer`` the transfers of its layers.
        """
        items = [row for row in loan.rows if row is not None]
        at: Sequence[int] = range(len(items))
        if len(items) < len(loan.rows):
            at = [i for i, row in enumerate(loan.rows) if row is not None]
        device = self._view.device
        if device.type == "cpu":
            try:
                return self._issue(inner, items, at, by_layer)
            finally:
                loan.cancel()
        loan.stream = torch.accelerator.current_stream(device.index)
        try:
            transfer, layers = self._issue(inner, items, at, by_layer)
        finally:  # a part of the copy may have been issued
            # The rows stay, also if the store and the handle are dropped.
            loan.end = completion(device, loan.stream, inner)
        whole = Transfer((*transfer.completions, loan.end), transfer, transfer.carried)
        return whole, layers

    def _issue(
        self, inner: KVView, items: Sequence[int], at: Sequence[int], by_layer: bool
    ) -> tuple[Transfer, Sequence[Transfer]]:
        """Copy rows to places of the view; return the transfer, and those of its layers."""
        form = inner.form
        nbytes = self._size * form.token_bytes // (form.block_size if form.opaque else 1)
        parts = copy_parts(len(items), nbytes) if self.on_device and not by_layer else []
        if len(parts) > 1:  # the device copies a part while the host describes the next one
            transfers = list[Transfer]()
            for some in parts:
                rows, blocks = self._indices(items[some], at[some])
                transfers.append(copy_rows(inner, self._view, rows, blocks, options=self._options))
            return Transfer.join(transfers), ()
        options = replace(self._options, by_layer=True) if by_layer else self._options
        if len(items) == len(self._fine):
            rows = Index.of(items, self._size)
            blocks = self._whole
        else:
            rows, blocks = self._indices(items, at)
        transfer = copy_rows(inner, self._view, rows, blocks, options=options)
        return transfer, transfer.layers if by_layer else ()

    def wait(self, end: Completion) -> None:
        """Wait for the end of a copy in any thread, also while another one captures a graph.

        Polls with a limit: without one, torch keeps a core busy.
        """
        with ignoring_captures(self._view.device):
            Transfer((end,)).synchronize(FOREVER)

    def begin(self, inner: KVView, items: Sequence[int], at: Sequence[int]) -> None:
        """Copy blocks from the view on a device into rows, and note the end of the copy.

        The copy is ordered after the work that the maker's stream had, which does not wait for it.
        """
        rows, blocks = self._indices(items, at)
        device = self._view.device
        assert self._after is not None  # `prepare` was called
        assert self._stream is not None
        side = side_stream(self._stream, "device", "host")
        with ignoring_captures(device), torch.inference_mode(False), self._after.on(side):
            try:
                copy_rows(self._view, inner, blocks, rows, options=self._options)
            finally:  # a part of the copy may have been issued
                self.ends.append(completion(device, side, self._view))

    def copy(self, inner: KVView, outer: KVView, items: Any, at: Any) -> None:
        """Copy blocks between rows ``items`` and places ``at`` of the view, and wait for the end.

        Each side has its own view. On a device the copy uses a private stream of this thread, after
        the work that the maker's stream had. Only workers call it.
        """
        assert self._after is not None  # `prepare` was called
        sides = self._sides(inner, outer, items, at)
        if copy_long_runs(*sides, self._options):
            return
        with torch.inference_mode(False), self._after.inside():
            with on_one_core(self._view.device):
                transfer = copy_rows(*sides, options=self._options)
            transfer.synchronize()

    def _sides(
        self, inner: KVView, outer: KVView, items: Any, at: Any
    ) -> tuple[KVView, KVView, Index, Index]:
        """Return source, destination and their indices, for rows and places of the view."""
        rows, blocks = self._indices(items, at)
        return (outer, inner, blocks, rows) if self._store else (inner, outer, rows, blocks)

    def _indices(self, items: Any, at: Any) -> tuple[Index, Index]:
        """Return the index of rows, and that of the view's blocks at places."""
        rows = Index.of(np.array(items, np.int64), self._size)
        blocks = self._fine[np.array(at, np.int64)].reshape(-1)
        return rows, Index.of(blocks, self._step)
