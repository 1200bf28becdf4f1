# SPDX-License-Identifier: Apache-2.0
"""Rows of host memory for a block store, and the index of its host tier."""

from __future__ import annotations

import ctypes
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from itertools import pairwise
from math import gcd
from threading import get_ident
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import invalid, naming, shown
from portakv.copy.inside import copy_checked as copy_checked
from portakv.copy.options import USUAL, CopyOptions
from portakv.errors import InvalidTerms, LayoutError, SlotError
from portakv.host import pinned
from portakv.host.pool import Extents
from portakv.host.shared import unnamed
from portakv.plan.plan import CopyPlan
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.resources import one_thread, require_linux
from portakv.runtime.streams import (
    StreamFence,
    completion,
    ignoring_captures,
    on_one_core,
    side_stream,
)
from portakv.runtime.transfer import Completion, Transfer
from portakv.storage.eviction import FIRST, UNKNOWN, Chains, Changed, marks_of
from portakv.storage.form import BlockForm
from portakv.storage.image import Row
from portakv.storage.work import BaseQueue, Graph, Task
from portakv.view import IdList, Index, KVView
from portakv.view.view import note_written

# ------------------------------------------------------------------------------------------------
# The memory of a block store's rows: pinned where a device is there, private or shared.

PAGE = 4096  # bytes; O_DIRECT reads to multiples of it


def row_memory(count: int, row_bytes: int, pin: bool, shared: bool) -> tuple[torch.Tensor, bool]:
    """Return rows, uint8 ``[count, row_bytes]``, at a multiple of `PAGE`, and True if they are
    pinned.

    ``shared``: other processes can map them, as `portakv.host.shared.unnamed` describes. Raises
    `HostMemoryError` if there is not enough memory, and `Unsupported` on another system than Linux.
    """
    require_linux("a block store")
    nbytes = count * row_bytes
    pin = pin and pinned.why_not() is None
    with torch.inference_mode(False):  # transfers write it in any mode
        if shared:
            space, pin = _shared(nbytes, row_bytes, pin)
        elif pin:
            buffer = pinned.allocate(nbytes + PAGE, unit=row_bytes)
            pin = buffer.pinned
            space = buffer.tensor
        else:  # numpy asks for large pages, which make the requests of a disk fewer
            space = torch.from_numpy(np.empty(nbytes + PAGE, np.uint8))
        first = -space.data_ptr() % PAGE
        return space[first : first + nbytes].view(-1, row_bytes), pin


def _shared(nbytes: int, unit: int, pin: bool) -> tuple[torch.Tensor, bool]:
    """Return shared memory, uint8 ``[nbytes]``, and True if it is registered with a device."""
    mapping = unnamed(nbytes)  # begins with a page
    if not pin:
        return torch.frombuffer(mapping, dtype=torch.uint8), False
    with pinned.register(mapping, unit=unit) as buffer:
        return buffer.tensor, buffer.pinned  # the tensor retains the registration


# ------------------------------------------------------------------------------------------------
# Copies of long runs on the host, by the C library: one pass, on one core, without the
# interpreter.

#: The shortest run that is copied so. A torch copy of runs reads and writes the bytes twice.
LONG = 64 << 10


def copy_long_runs(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, options: CopyOptions
) -> bool:
    """Copy rows between views of host memory; return False, and copy nothing, if another copy
    serves them better.

    Serves views whose rows are runs of `LONG` bytes, by options that ask for nothing else. The
    indices were checked; rows of negative ids are left out.
    """
    if src.device.type != "cpu" or dst.device.type != "cpu" or options != USUAL:
        return False
    if "PORTAKV_BACKEND" in os.environ or src.form.encoding or dst.form.encoding:
        return False
    if min(src.form.token_bytes, dst.form.token_bytes) < LONG:
        return False
    plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step)
    if plan.run < LONG:
        return False
    count = src_index.length
    assert count is not None  # it has ids
    runs = plan.runs(src, dst, src_index, dst_index, count)
    for begin, end, nbytes in zip(
        runs.src.tolist(), runs.dst.tolist(), runs.nbytes.tolist(), strict=True
    ):
        ctypes.memmove(end, begin, nbytes)
    note_written(dst)
    return True


# ------------------------------------------------------------------------------------------------
# Rows of the host tier that a load reads in the thread of its caller.


class Loan:
    """Keys of the host tier that keep their rows until the end of a copy, or until `cancel`.

    Attributes:
        keys: the keys.
        rows: the row of each key; None for a key without one.
        stream: the stream of the copy, once it may have begun; None on the host.
        end: the end of the copy, once it was issued.
        caller: a weak reference to the caller, with whose life a loan without a copy ends.
    """

    __slots__ = ("_thread", "caller", "end", "keys", "rows", "stream")

    def __init__(self, keys: Sequence[bytes], caller: object) -> None:
        self.keys = keys
        self.rows: Sequence[int | None] = ()
        self.stream: torch.Stream | None = None
        self.end: Completion | None = None
        self.caller = ref(caller)
        self._thread = get_ident()

    def cancel(self) -> None:
        """End a loan that nothing reads."""
        self.end = Completion()

    def was_left(self, thread: int) -> bool:
        """Return True if a thread was interrupted before a copy could begin.

        Only for a thread that is not inside the loan's call any more, but whose traceback retains
        it.
        """
        return self._thread == thread and self.end is None and self.stream is None

    def ended(self) -> bool:
        """Return True if no copy reads the rows; never block.

        A loan without an end, whose caller is gone, was interrupted. If its copy may have begun,
        the present work of the stream is its end.
        """
        gone = self.caller() is None  # read first: the end is set while the caller lives
        if self.end is None:
            if not gone:
                return False
            if self.stream is None:
                return True
            self.end = completion(self.stream.device, self.stream)
        event = self.end.event
        if event is None:
            return self.end.ended()
        with ignoring_captures(event.device):
            return self.end.ended()


# The groups of cached rows.
USED = "used"
UNUSED = "prefetched and not used"
#: A position before all keys of a call; those that its first blocks follow have -1.
BEFORE = -2


class Claim(NamedTuple):
    """The cached rows that the blocks of a call may evict.

    Attributes:
        own: positions of the call's keys, by the last 32 bytes. No block evicts an earlier one.
        apart: the forms (all bytes of a key before these) whose rows are not the call's.
        evict: False if the blocks may evict none.
    """

    own: Mapping[bytes, int] = MappingProxyType({})
    apart: Collection[bytes] = ()
    evict: bool = True

    def place_of(self, key: bytes) -> int:
        """Return the position of a cached key in the call, past all if it has none."""
        if key[:-32] in self.apart:
            return len(self.own)
        return self.own.get(key[-32:], len(self.own))


#: Of rows without a call: they may evict any.
ANY = Claim()


class Want(NamedTuple):
    """What a transfer needs rows for.

    Attributes:
        nbytes: bytes of an image, a multiple of 4,096.
        store: the transfer is a save.
        claim: the cached rows that its blocks may evict.
        place: the position of the last block in the call.
        prefetched: the transfer is a prefetch.
        passing: the rows serve the transfer alone, if staging has them: their blocks are not
            cached, or only after `Rows.settle` moved them.
    """

    nbytes: int
    store: bool
    claim: Claim = ANY
    place: int = BEFORE
    prefetched: bool = False
    passing: bool = False

    def may_evict(self, key: bytes) -> bool:
        """Return True if the block of a key may go: it is no earlier block of the call."""
        return self.claim.place_of(key) > self.place


class HostIndex:
    """The keys of the host tier of one form, by its checksum; see `calls.Listed`."""

    tier = "host"

    def __init__(self, rows: Rows, form: bytes) -> None:
        self._rows = rows
        self._form = form

    def keys(self) -> list[bytes]:
        """Return the keys that have a row."""
        past = len(self._form)
        with self._rows.chains.lock:  # a row that a load reads may leave for a moment
            names = self._rows.index.copy()
        return [name[past:] for name in names if name[:past] == self._form]

    def announce(self, changed: Changed) -> None:
        """Report from now on each key that gets a row, or loses it."""
        self._rows.listeners[self._form] = changed
        self._rows.chains.changed = self._rows.report


def mark_in_form(key: bytes, mark: int) -> Hashable:
    """Return the mark of a block among those of all forms.

    A block without a predecessor begins a prompt: rows exist only in releases that note
    predecessors.
    """
    return FIRST if mark in (FIRST, UNKNOWN) else (key[:-32], mark)


# ------------------------------------------------------------------------------------------------
# Rows of host memory, for staging and for the host tier of a block store.

FOREVER = 1e9  # seconds
_TRIED = "copies of a block store"  # the key of a view's copies that were tried before


#: Bytes between two boundaries of registrations of pinned memory, which no row may cross.
PIECE = 511 << 30
#: Rows that one row may evict. If memory has no run of its size after that, it is not cached.
MOST_EVICTED = 8
#: Bytes of images in whole rows that the end of a transfer copies: a millisecond under a lock.
MOST_MOVED = 8 << 20


class Rows:
    """Rows of host memory: staging buffers, and the host tier.

    A whole row has room for the largest image. Loads and saves have `staging` whole rows together,
    of which saves have at most half. No call blocks, and any thread may call. No load waits for
    rows of the host tier.

    If images have one size, all rows are whole, and the row of a transfer becomes one of the host
    tier as it is. At most `host` rows are cached, or lent to saves beyond the half of staging.

    If images have several sizes, the host tier is a separate zone of pages, in which a row has the
    size of its image. A transfer takes rows there first, in place of the next rows to evict, since
    its blocks would evict them at its end. Blocks that find no row there, as all rows are read or
    may not go, take whole rows. Of these few are cached, as their images are copied.

    Args:
        sizes: the bytes of the images, multiples of 4,096.
        staging, host: bytes.
        shared: the rows lie in memory without a name that other processes can map: row i of
            ``tensor`` is row i there.

    Attributes:
        tensor: uint8 ``[rows, row_bytes]``, at a multiple of 4,096 bytes; if images have several
            sizes ``[pages, 4096]``, and row i begins at page i. `BlockForm.view` takes both.
        array: the same, of numpy.
        row_bytes: bytes of the largest image.
        staging, host: whole rows that staging has, and for which the host tier has bytes.
        pinned: False if the memory is pageable.
        evicted: rows that lost their key to another key.
        index: the row of each key of the host tier.
        sized: images have several sizes.
        begun, counted: the loans. Rows of counted ones do not go.
    """

    def __init__(
        self,
        sizes: Collection[int],
        staging: int,
        host: int,
        pin: bool = True,
        shared: bool = False,
    ) -> None:
        self.row_bytes = max(sizes)
        self.sized = len({*sizes}) > 1
        self.evicted = 0
        if self.sized:
            unit = PAGE
            self.host = max(1, host // self.row_bytes) if host >= min(sizes) else 0
            self._first = staging // self.row_bytes * self.row_bytes // PAGE
            self._past = self._first + host // PAGE
        else:
            unit = self.row_bytes
            self.host = host // unit
            self._first = staging // unit + self.host
            self._past = self._first
        self.tensor, self.pinned = row_memory(self._past, unit, pin, shared)
        self.array: npt.NDArray[np.uint8] = self.tensor.numpy()
        self._bytes = self.array.reshape(-1)
        self._unit = unit

        # Whole rows come first, then the zone of the host tier, if it is separate. No row lies in
        # two registrations.
        step = self.row_bytes // unit
        piece = PIECE // unit if self.sized else self._first
        whole = range(0, self._first, step)
        self._free = deque(x for x in whole if x // piece == (x + step - 1) // piece)
        self.staging = len(self._free) - (0 if self.sized else self.host)
        cuts = range((self._first // piece + 1) * piece, self._past, piece) if self.sized else ()
        self._zone = Extents([*pairwise([self._first, *cuts, self._past])])
        self._pages = dict[int, int]()  # of the rows of the zone that are lent or cached
        self._lent: dict[int, bool] = {}  # True if it is lent to a save
        self._staged = 0  # whole rows that are lent
        self._saved = 0  # whole rows that are lent to saves
        self._given = set[int]()  # rows that `keep` freed, and that their transfer gives next

        self.chains = Chains[bytes]()  # the keys that have a row, in two groups
        self.index = dict[bytes, int]()
        self.unused = set[bytes]()  # keys of rows that were prefetched and not used since
        self.listeners = dict[bytes, Changed]()  # by the checksum of a form
        self._lock = self.chains.lock  # no call is made while it is locked
        self.begun = deque[Loan]()  # loans that no look at `_read` has counted; needs no lock
        self.counted = list[Loan]()  # the others
        self._read = Counter[bytes]()  # keys of `counted`, whether they have a row or not

    @property
    def most(self) -> int:
        """Return the rows that one lease may have, and that saves have of staging together."""
        return max(1, self.staging // 2)

    @property
    def memory(self) -> tuple[tuple[int, int], ...]:
        """Return the address and the bytes of the rows, for an I/O engine to register."""
        return ((self.tensor.data_ptr(), self.tensor.nbytes),)

    def image(self, item: int, nbytes: int) -> Row:
        """Return the bytes of an image in a row, uint8 ``[nbytes]``."""
        first = item * self._unit
        return self._bytes[first : first + nbytes]

    def holds(self, nbytes: int) -> int:
        """Return the number of images of so many bytes for which the host tier has rows."""
        if not self.sized:
            return self.host
        return (self._past - self._first) * PAGE // nbytes if self.host else 0

    # --- rows of transfers ---

    def take(self, count: int, want: Want) -> list[int] | None:
        """Return rows for a transfer, all or none.

        Rows of a separate zone of the host tier come first, unless the rows serve the transfer
        alone.
        """
        with self._lock:
            self._forget_counted()
            return self._take(count, want)

    def _take(self, count: int, want: Want) -> list[int] | None:
        """Return rows for a transfer, all or none."""
        items = list[int]()
        if not want.passing:
            items = self._zone_rows(count, want)
        rest = self._whole_rows(count - len(items), want)
        if rest is None and want.passing:
            items = self._zone_rows(count, want)
            rest = [] if len(items) == count else None
        if rest is None:
            self._free_rows(items)
            return None
        items += rest
        self._lent.update(dict.fromkeys(items, want.store))
        return items

    def replace(self, items: list[int], number: int, want: Want) -> bool:
        """Lend a larger row in place of a lent row, whose bytes are lost; return False if there is
        none, and the row has its size.

        ``items[number]`` becomes the new row.
        """
        with self._lock:
            self._forget_counted()
            old = items[number]
            before = self._nbytes(old)
            if before >= want.nbytes:
                return True
            self._give([old])  # first, as the pages next to it may be free
            made = self._take(1, want)
            row = made or self._take(1, Want(before, want.store))
            assert row is not None  # the pages of the old row are free
            items[number] = row[0]
            return made is not None

    def settle(self, items: list[int], number: int, want: Want) -> None:
        """Move an image of a lent row into a row of the host tier of its size, if there is one.

        ``items[number]`` becomes the new row. Only the transfer of the rows may use them meanwhile.
        """
        old = items[number]
        with self._lock:
            if old in self._pages and self._nbytes(old) == want.nbytes:
                return
            self._forget_counted()
            made = self._zone_rows(1, want)
            self._lent.update(dict.fromkeys(made, want.store))
        for new in made:
            self.image(new, want.nbytes)[:] = self.image(old, want.nbytes)
            items[number] = new
            self.give([old])

    def give(self, items: Sequence[int]) -> None:
        """End a transfer: its rows that it did not `keep` become free."""
        with self._lock:
            self._give(items)

    def lacks(self, count: int) -> bool:
        """Return True if saves may not have so many rows more, whatever is evicted."""
        return sum(self._lent.values()) + count > self.most + self.host

    def _give(self, items: Iterable[int]) -> None:
        """Free lent rows."""
        for item in items:
            if item in self._given:  # by `keep`; the number may be that of another row now
                self._given.remove(item)
            elif item in self._lent:
                self._end_lease(item)
                self._free_rows([item])

    def _end_lease(self, item: int) -> None:
        """Count a row as lent no more."""
        store = self._lent.pop(item)
        if item < self._first:
            self._staged -= 1
            self._saved -= store

    def _free_rows(self, items: Iterable[int], evicted: bool = False) -> None:
        """Free rows that are neither lent nor cached."""
        for item in items:
            if item < self._first:
                self._free.append(item)
            else:
                self._zone.give(item, self._pages.pop(item), evicted)

    def _whole_rows(self, count: int, want: Want) -> list[int] | None:
        """Return whole rows, all or none.

        Saves beyond their half of staging take rows of the host tier, in place of the next rows to
        evict: their blocks would evict them at their end.
        """
        if not count:
            return []
        saved = self._saved + count * want.store
        loaded = self._staged + count - saved
        if loaded + min(saved, self.most) > self.staging:
            return None
        beyond = saved - self.most
        if want.store and beyond > 0 and not self._evict_for_saves(beyond, want):
            return None
        self._saved = saved
        self._staged += count
        return [self._free.popleft() for _ in range(count)]

    def _evict_for_saves(self, beyond: int, want: Want) -> bool:
        """Evict rows until saves may have so many whole rows of the host tier; return False, and
        evict none, if some may not go."""
        if self.sized or beyond > self.host:
            return False
        count = len(self.index) + beyond - self.host
        if count <= 0:
            return True
        if not want.claim.evict:
            return False
        victims = self._choose(count, want.may_evict)
        return len(victims) == count and self._take_from(victims)

    def _zone_rows(self, count: int, want: Want) -> list[int]:
        """Return rows of a separate zone of the host tier, as many as may be had, in the order of
        their addresses.

        All are taken in one pass. They are those that rows taken one after the other would be, and
        the same keys are evicted. Their order leaves a copy fewer runs.
        """
        if not (self.sized and self.host):
            return []
        pages = want.nbytes // PAGE
        items = self._zone.take(pages, count)
        if len(items) < count and want.claim.evict:
            self._evict_for(items, count, want)
        self._pages.update(dict.fromkeys(items, pages))
        items.sort()
        return items

    def _evict_for(self, items: list[int], count: int, want: Want) -> None:
        """Add rows of the zone to rows that were taken, up to ``count``, in place of the next rows
        to evict. No extent has a run of their size.

        A row evicts at most `MOST_EVICTED` others.
        """
        pages = want.nbytes // PAGE
        left = MOST_EVICTED
        while len(items) < count and left:
            group = UNUSED if want.prefetched and self._crowded(want.nbytes) else None
            if not self._evict(want, group):
                return
            runs = self._zone.take(pages, count - len(items))
            items += runs
            left = MOST_EVICTED if runs else left - 1

    # --- rows of the host tier ---

    def keep(
        self,
        items: Sequence[int],
        keys: Sequence[bytes],
        follows: Sequence[int],
        want: Want | None = None,
        sizes: Sequence[int] | None = None,
    ) -> list[bool]:
        """Cache lent rows under keys that follow marks, in place of the next rows to evict.

        Returns which rows are cached: not one whose key has a row, or for which no row may be
        evicted. A row of a save beyond `most` evicts none. At most half of the host tier is
        prefetched and not used yet. ``want``: of the transfer; None: one that may evict any.
        ``sizes``: the bytes of each image; None: those of the largest, for which all rows have
        room.
        """
        want = want or Want(self.row_bytes, False)
        own = want.claim.own
        cached = [False] * len(items)
        if not self.host:
            return cached
        group = UNUSED if want.prefetched else USED
        marks = marks_of([key[-32:] for key in keys])
        left = [*items]  # the last ones may become free
        moved = 0  # bytes of images that were copied into other rows
        with self._lock:
            self._forget_counted()
            for number, key in enumerate(keys):
                if number == len(left):
                    break
                if key in self.index:
                    continue
                nbytes = self.row_bytes if sizes is None else sizes[number]
                want = want._replace(nbytes=nbytes, place=own.get(key[-32:], BEFORE))
                if self.sized and left[number] < self._first:
                    moved += nbytes
                    if moved > max(MOST_MOVED, nbytes):
                        continue
                row = self._row_to_keep(left, number, want)
                if row is None:
                    continue
                self.index[key] = row
                if want.prefetched:
                    self.unused.add(key)
                mark = mark_in_form(key, marks[number])
                self.chains.add(key, mark, mark_in_form(key, follows[number]), group)
                if key in self._read:
                    self.chains.pin(key)
                cached[number] = True
        return cached

    def _row_to_keep(self, left: list[int], number: int, want: Want) -> int | None:
        """Return a row with the image of a lent row, which is no longer lent; None if it cannot be
        cached.

        In a separate zone, pages of the row after the image become free.
        """
        item = left[number]
        saved = self._saved - self._lent[item]
        full = not self.sized and len(self.index) + max(0, saved - self.most) >= self.host
        crowded = want.prefetched and self._crowded(want.nbytes)
        group = UNUSED if crowded else None
        if (crowded or full) and not self._evict(want, group):
            return None
        if self.sized and item < self._first:
            return self._moved(left, number, want)
        self._end_lease(item)
        if self.sized:
            self._trim(item, want.nbytes // PAGE)
        return item

    def _moved(self, left: list[int], number: int, want: Want) -> int | None:
        """Return a row of the zone with the image of a whole row; None if there is none for it.

        It evicts others, or takes the place of the last rows of ``left``, at most as many as one
        row may evict, so that the first blocks are cached. So the raw rows of a block that did not
        fit end no prompt whose other blocks fill the tier.
        """
        made = self._zone_rows(1, want)
        most = max(number + 1, len(left) - MOST_EVICTED)
        while not made and len(left) > most:
            last = left.pop()
            self._give([last])
            self._given.add(last)
            made = self._zone_rows(1, want)
        if not made:
            return None
        self.image(made[0], want.nbytes)[:] = self.image(left[number], want.nbytes)
        return made[0]

    def _trim(self, item: int, pages: int) -> None:
        """Free the pages of a row after those of its image."""
        past = self._pages[item]
        if past > pages:
            self._zone.give(item + pages, past - pages)
            self._pages[item] = pages

    def _crowded(self, nbytes: int) -> bool:
        """Return True if half of the host tier, counted in images of so many bytes, is prefetched
        and not used."""
        return len(self.unused) >= max(1, self.holds(nbytes) // 2)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Free the rows of keys; return which are free: not a row that is read."""
        with self._lock:
            self._forget_counted()
            return [key in self.index and self._take_from([key]) for key in keys]

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of keys, the first key last, so that a prefix outlives its suffix.

        ``follows``: the predecessor of each key, for keys whose predecessor is not known yet.
        """
        with self._lock:
            if self.index.keys().isdisjoint(keys):
                return
            self.chains.touch(*[key for key in reversed(keys) if key in self.index])
            for key, mark in zip(keys, follows, strict=False):
                if key in self.index:
                    self.chains.learn(key, mark_in_form(key, mark))

    def use(self, keys: Sequence[bytes]) -> None:
        """Count prefetched keys as used."""
        with self._lock:
            for key in self.unused.intersection(keys):
                self.unused.remove(key)
                self.chains.move(key, USED)

    def has(self, key: bytes) -> bool:
        """Return True if a key has a row."""
        return key in self.index

    def has_each(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which keys have a row."""
        return [*map(self.index.__contains__, keys)]

    def crowded(self, claim: Claim) -> bool:
        """Return True if the next row to evict belongs to a call."""
        with self._lock:
            return claim.place_of(self.next() or b"") < len(claim.own)

    # --- loans: rows that copies read ---

    def borrow(self, keys: Sequence[bytes], caller: object) -> Loan:
        """Return the rows of keys, which stay until the end of the loan's copy.

        A loan without a copy ends with the life of ``caller``. Takes no lock, so that the main
        thread may call it (see `uninterrupted`).
        """
        loan = Loan(keys, caller)
        self.begun.append(loan)  # before the look for rows: see `_take_away`
        loan.rows = [*map(self.index.get, keys)]
        return loan

    def pin(self, keys: Sequence[bytes]) -> Loan:
        """Return the rows of keys, which stay until `Loan.cancel`, and count the keys as used."""
        self.use(keys)
        with self._lock:
            return self.borrow(keys, self)

    def loans(self) -> int:
        """Return the number of copies of borrowed rows that have not ended."""
        return uninterrupted(self._count_copies)

    def _count_copies(self) -> int:
        self.forget_loans()
        with self._lock:
            return sum(loan.caller() is not self for loan in [*self.counted, *self.begun])

    def end_left_loans(self) -> None:
        """End the loans of this thread whose calls were interrupted before their copies."""
        uninterrupted(partial(self._end_left_loans, get_ident()))

    def _end_left_loans(self, thread: int) -> None:
        with self._lock:
            for loan in [*self.counted, *self.begun]:
                if loan.was_left(thread):
                    loan.cancel()

    def forget_loans(self) -> None:
        """Forget the loans that have ended, also those of loads that found no row."""
        with self._lock:
            for _ in range(len(self.begun)):
                loan = self.begun.popleft()
                if not loan.ended():
                    self.begun.append(loan)
            self._forget_counted()

    def _forget_counted(self) -> None:
        """Let the rows of loans that have ended go in their turn."""
        for loan in [*self.counted]:
            if loan.ended():
                self.counted.remove(loan)
                self._read.subtract(loan.keys)
                for key in loan.keys:
                    if not self._read[key]:
                        del self._read[key]
                        if key in self.chains:
                            self.chains.unpin(key)

    def _count_loans(self) -> None:
        """Keep the rows that loans read."""
        while self.begun:
            loan = self.begun.popleft()
            if loan.ended():
                continue
            self.counted.append(loan)
            self._read.update(loan.keys)
            for key in loan.keys:
                if key in self.chains:
                    self.chains.pin(key)

    # --- eviction, under the lock ---

    def next(self, group: Hashable | None = None) -> bytes | None:
        """Return the key that goes next, of a group or of all; None if none can go."""
        self._count_loans()
        return self.chains.next(group)

    def _evict(self, want: Want, group: Hashable | None = None) -> bool:
        """Evict the next row, of a group or of all; return False if it may not go."""
        while want.claim.evict:
            victim = self.next(group)
            if victim is None or not want.may_evict(victim):
                return False
            if self._take_from([victim]):  # else a load reads it since `next`
                return True
        return False

    def _choose(self, count: int, may_go: Callable[[bytes], bool]) -> list[bytes]:
        """Return the keys that go next, so many, one after the other; fewer if one may not go."""
        chosen = list[bytes]()
        try:
            while len(chosen) < count:
                key = self.next()
                if key is None or not may_go(key):
                    break
                self.chains.set_aside(key)
                chosen.append(key)
        finally:
            for key in reversed(chosen):
                self.chains.put_back(key)
        return chosen

    def _take_from(self, keys: Sequence[bytes]) -> bool:
        """Free the rows of keys; return False, and free none, if a load reads one of them."""
        items = self._take_away(keys)
        self._free_rows(items, evicted=True)
        self.evicted += len(items)
        return bool(items)

    def _take_away(self, keys: Sequence[bytes]) -> list[int]:
        """Take keys from their rows, in the order in which they go, and return the rows; none if a
        load reads one of them."""
        items = [self.index.pop(key) for key in keys]  # no load finds them from here on
        self._count_loans()
        if any(key in self._read for key in keys):
            self.index.update(zip(keys, items, strict=True))
            return []
        for key in keys:
            self.chains.remove(key)
            self.unused.discard(key)
        return items

    # --- what others see ---

    def report(self, key: bytes, stored: bool, why: str) -> None:
        """Report a key that gets a row, or loses it, to the listener of its form."""
        changed = self.listeners.get(key[:-32])
        if changed is not None:
            changed(key[-32:], stored, why)

    def _nbytes(self, item: int) -> int:
        """Return the bytes of a lent or cached row."""
        return self._pages[item] * PAGE if item in self._pages else self.row_bytes

    def nbytes_by_form(self) -> dict[bytes, int]:
        """Return the bytes of the cached rows of each form, by its checksum."""
        result = Counter[bytes]()
        with self._lock:
            for key, item in self.index.items():
                result[key[:-32]] += self._nbytes(item)
        return result

    def nbytes_by_state(self) -> dict[str, int]:
        """Return the bytes of rows by their state."""
        with self._lock:
            kept = sum(map(self._nbytes, self.index.values()))
            free = len(self._free) * self.row_bytes + self._zone.free * PAGE
            lent = sum(map(self._nbytes, self._lent))
        return {"free": free, "lent": lent, "kept": kept}

    def sentence(self) -> str:
        """Return how many rows there are, for `BlockStore.explain`."""
        kind = "pinned" if self.pinned else "pageable"
        rows = f"{self.staging} {kind} rows of staging,"
        if not self.sized:
            return f"{rows} {self.host} of the host tier."
        nbytes = (self._past - self._first) * PAGE
        return (
            f"{rows} and {nbytes} bytes of the host tier, in which each block takes the size of "
            f"its form."
        )


# ------------------------------------------------------------------------------------------------
# Rows that transfers use, and transfers that wait for rows.


class Held:
    """Rows that coroutines of a graph use, until the last of them has ended.

    Args:
        loan: keeps rows of the host tier where they are.

    Attributes:
        items: the rows; None before they are granted.
        users: how many coroutines use them. Changed under the graph's lock.
        store: True for the rows of a save.
    """

    items: Any = None
    users = 0
    store = False

    def __init__(self, loan: Loan) -> None:
        self.items = loan.rows
        self._loan = loan

    def take(self) -> list[int] | None:
        """Return rows, all or none, under the graph's lock; None if there are not enough."""
        raise NotImplementedError

    def hold(self) -> None:
        """Note one more user."""
        self.users += 1

    def release(self) -> None:
        """Note the end of a user. The last one gives the rows back."""
        self.users -= 1
        if not self.users:
            self.over()

    def over(self) -> None:
        """Give the rows back: let them go in their turn."""
        self._loan.cancel()


class RowQueue(BaseQueue):
    """Gives rows to transfers, in the order in which these are due.

    A transfer waits by a task, whose end says that it has the rows. Loads pass a save that waits
    for other saves, but not a save that waits for loads. Callers hold the graph's lock.
    """

    def __init__(self, graph: Graph, memory: Rows) -> None:
        super().__init__(graph, "rows", "")
        self._memory = memory
        self._loads = list[tuple[float, int, Task]]()  # heaps, by due time
        self._saves = list[tuple[float, int, Task]]()
        self._granted_saves = 0

    def request(self, taker: Held) -> Task:
        """Return a task that ends once a transfer has its rows."""
        return Task(lambda *_: None, 0, queue=self, uses=taker)

    def push(self, task: Task, /) -> None:
        """Let a transfer wait for rows."""
        task.state = "queued"
        heap = self._saves if task.uses.store else self._loads
        heappush(heap, (task.due, task.number, task))
        self._grant()

    def _grant(self) -> None:
        """Give rows to the transfers that wait for them."""
        heaps = [self._loads, self._saves]
        while heaps := [heap for heap in heaps if heap]:
            heap = min(heaps)
            task = heap[0][2]
            if not task.ended:
                error: Exception | None = None
                try:
                    taken = self._take(task.uses)
                except Exception as caught:  # the transfer fails, and no other one
                    error = caught
                if error is None and not taken:
                    pass_it = self._granted_saves or not task.uses.store
                    heaps = [other for other in heaps if other is not heap and pass_it]
                    continue
                task.finish(None, "failed" if error else "landed", error)
            heappop(heap)

    def _take(self, taker: Held) -> bool:
        """Give a transfer rows, if there are enough."""
        taker.items = taker.take()
        if taker.items is None:
            return False
        self._granted_saves += taker.store
        return True

    def take(self, taker: Held) -> bool:
        """Give a transfer rows if there are enough, and if no other one waits for some."""
        return not (self._loads or self._saves) and self._take(taker)

    def give(self, taker: Held) -> None:
        """Take the rows of a transfer back, if it has some."""
        if taker.items is not None:
            self._memory.give(taker.items)
            taker.items = None
            self._granted_saves -= taker.store
        self._grant()


#: Streams, by device, of copies of helpers that have ended. A stream has staging and events, so
#: there are as many as copies run together, and not one for each helper.
_idle = deque[dict[str, torch.Stream]]()


@contextmanager
def _idle_streams() -> Iterator[dict[str, torch.Stream]]:
    """Lend the streams of a copy that has ended."""
    try:
        streams = _idle.pop()
    except IndexError:
        streams = {}
    try:
        yield streams
    finally:
        _idle.append(streams)


#: The most bytes of a copy on the host that a load makes itself: 0.1 - 0.3 ms.
SHORT_COPY = 1 << 20


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
        whole = view.form.block_size if isinstance(view, KVView) else 0
        if not whole:
            got = repr(view) if isinstance(view, KVView) else shown(view)
            raise LayoutError(
                f"Expected view to be a paged view, got {got}. Name a block axis in its layout."
            )
        self._view = view
        if self.on_device and capturing(view.device):
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
                wanted = "1 id" if needed == 1 else f"{needed} ids"
                given = "1 key" if many == 1 else f"{many} keys"
                raise InvalidTerms(
                    f"Expected blocks to be {wanted}, of the view's blocks of {whole} tokens for "
                    f"{given} of {size}, got {len(ids)}. Pass the blocks that the keys name."
                )
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
            nowhere = np.flatnonzero((self._fine < 0).all(1))
            if len(nowhere):  # the block would land nowhere
                raise SlotError(
                    f"Expected blocks to have a block of the view for each key, got negative ids "
                    f"alone for keys[{nowhere[0]}]. Leave the key out."
                )
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

    def is_for_caller(self, nbytes: int, pinned: bool) -> bool:
        """Return True if the caller's thread copies so many bytes of rows into the view.

        It issues a copy to a device, which it does not wait for, and makes a short one on the host.
        ``pinned``: the rows are.
        """
        return pinned if self.on_device else nbytes <= SHORT_COPY

    def prepare(self, inner: KVView) -> None:
        """Prepare copies by workers, after the present work of the current stream.

        Raises the errors of a copy that is impossible, by an empty one.
        """
        view = self._view
        if self.on_device:
            self._after = StreamFence(view.device)
            self._stream = torch.accelerator.current_stream(view.device.index)
        tried: set[object] = view.derived.setdefault(_TRIED, set())
        kind = inner.form, self._size, self._step, self._store, self._options
        if kind in tried:
            view.check_memory()
        else:
            apart = nullcontext() if self._after is None else self._after.inside()
            with torch.inference_mode(False), apart:
                copy_checked(*self._sides(inner, view, [], []), 0, self._options).synchronize()
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
        if self.on_device:
            loan.stream = torch.accelerator.current_stream(device.index)
        options = replace(self._options, by_layer=True) if by_layer else self._options
        try:
            if len(items) == len(self._fine):
                rows = Index.of(items, self._size)
                blocks = self._whole
            else:
                rows, blocks = self._indices(items, at)
            count = len(items) * self._size
            transfer = copy_checked(inner, self._view, rows, blocks, count, options)
        finally:  # a part of the copy may have been issued
            end = Completion()
            if loan.stream is not None:
                # The rows stay, also if the store and the handle are dropped.
                end = completion(device, loan.stream, inner)
            loan.end = end
        layers = transfer.layers if by_layer else ()
        if loan.stream is None:
            return transfer, layers
        return Transfer((*transfer.completions, end), transfer, transfer.carried), layers

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
                count = len(items) * self._size
                copy_checked(self._view, inner, blocks, rows, count, self._options)
            finally:  # a part of the copy may have been issued
                self.ends.append(completion(device, side, self._view))

    def copy(self, inner: KVView, outer: KVView, items: Any, at: Any) -> None:
        """Copy blocks between rows ``items`` and places ``at`` of the view, and wait for the end.

        Each side has its own view. On a device the copy has a stream alone, after the work that the
        maker's stream had. Only helpers call it.
        """
        sides = self._sides(inner, outer, items, at)
        if copy_long_runs(*sides, self._options):
            return
        count = len(items) * self._size
        if not self.on_device:
            with torch.inference_mode(False), one_thread():
                copy_checked(*sides, count, self._options).synchronize()
            return
        assert self._after is not None  # `prepare` was called
        with torch.inference_mode(False), _idle_streams() as streams, self._after.inside(streams):
            with on_one_core(self._view.device):
                transfer = copy_checked(*sides, count, self._options)
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


def rows_for(
    own: Sequence[BlockForm],
    forms: Sequence[BlockForm],
    staging: int,
    host: int,
    pin: bool,
    shared: bool,
) -> Rows:
    """Return rows for a store of its own forms, with so many bytes of staging and of host tier.

    They have several sizes if the store packs blocks and has their raw form too. ``forms``: all
    forms whose images they hold, the own ones among them.
    """
    sizes = {form.image_bytes for form in forms}
    if not (host and any(form.encoding and form.raw in own for form in own)):
        sizes = {max(sizes)}
    return Rows(sizes, staging, host, pin=pin, shared=shared)
