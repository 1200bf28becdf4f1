# SPDX-License-Identifier: Apache-2.0
"""`SizedRows`: rows of host memory for a store whose forms have images of several sizes.

Each image in the host tier takes its own bytes, not those of the largest one. Rows are numbered by
their first page of 4,096 bytes, so that a view of a form begins a row at each page.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from portakv.storage.extents import Extents
from portakv.storage.form import BlockForm
from portakv.storage.host_cache import ANY, BEFORE, UNUSED, USED, Claim, New, Want
from portakv.storage.image import Row
from portakv.storage.row_memory import PAGE
from portakv.storage.rows import Rows

#: Bytes between two boundaries of registrations of pinned memory, which no row may cross.
PIECE = 511 << 30
#: Rows that one row may evict. If memory has no run of its size after that, it is not cached.
MOST_EVICTED = 8
#: Bytes of images in rows of staging that the end of a transfer copies: a millisecond under a lock.
MOST_MOVED = 8 << 20


class SizedRows(Rows):
    """Rows of host memory of several sizes: staging buffers, and the host tier.

    Two zones of one tensor have one purpose each. Rows of staging have the size of the largest
    image; they are never cached, so that no transfer waits for the host tier. Rows of the host tier
    have the size of their image. A transfer takes rows of the host tier first, in place of the next
    rows to evict, since its blocks would evict them at its end. Blocks that find no row there, as
    all rows are read or may not go, take rows of staging, and are not cached.

    Attributes:
        tensor: uint8 ``[pages, 4096]``; row i begins at page i. `BlockForm.view` takes it.
        row_bytes: bytes of the largest image.
        staging, host: rows of that size which staging has, and for which the host tier has bytes.
    """

    sized = True

    def __init__(
        self,
        sizes: Collection[int],
        staging: int,
        host: int,
        pin: bool = True,
        shared: bool = False,
    ) -> None:
        """Make rows for images of some sizes, with so many bytes of staging and of the host
        tier."""
        largest = max(sizes)
        pages = largest // PAGE
        first = staging // largest * pages  # of the host tier
        super().__init__(PAGE, first, host // PAGE, pin=pin, shared=shared)
        self.row_bytes = largest
        self.host = max(1, host // largest) if host >= min(sizes) else 0
        past = first + host // PAGE
        piece = PIECE // PAGE
        uncut = [x for x in range(0, first, pages) if x // piece == (x + pages - 1) // piece]
        self.staging = len(uncut)
        self._free = deque(uncut)
        cuts = [first, *range((first // piece + 1) * piece, past, piece), past]
        self._space = Extents([*pairwise(cuts)])
        self._first = first
        self._past = past
        self._pages = dict[int, int]()  # of the rows of the host tier that are lent or cached
        self._staged = 0  # rows of staging that are lent
        self._given = set[int]()  # rows that `keep` freed, and that their transfer gives next
        self._flat = self.array.reshape(-1)

    def image(self, item: int, nbytes: int) -> Row:
        """Return the bytes of a row, uint8 ``[nbytes]``."""
        return self._flat[item * PAGE : item * PAGE + nbytes]

    def holds(self, nbytes: int) -> int:
        """Return the number of images of so many bytes for which the host tier has bytes."""
        return (self._past - self._first) * PAGE // nbytes if self.host else 0

    def take(
        self, count: int, store: bool, claim: Claim | None = None, place: int = BEFORE
    ) -> list[int] | None:
        """Return rows for a transfer of the largest images, as `take_sized` does."""
        return self.take_sized(count, Want(self.row_bytes, store, claim or ANY, place))

    def take_sized(self, count: int, want: Want) -> list[int] | None:
        """Return rows for a transfer, all or none.

        The first rows are those of the host tier. Saves have at most `most` rows of staging
        together.
        """
        with self._lock:
            items = list[int]()
            if self.host and not want.passing:
                items = self._host_rows(count, want)
            rest = self._staging_rows(count - len(items), want.store)
            if rest is None and want.passing and self.host:
                items = self._host_rows(count, want)
                rest = [] if len(items) == count else None
            if rest is None:
                self._release(items)
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
            old = items[number]
            if old < self._first or self._pages[old] * PAGE >= want.nbytes:
                return True
            before = self._pages[old] * PAGE
            self._give([old])  # first, as the pages next to it may be free
            made = self._host_rows(1, want) or self._staging_rows(1, want.store) or []
            # The pages of the row are free if there is no other one.
            items[number] = made[0] if made else self._host_rows(1, Want(before, want.store))[0]
            self._lent[items[number]] = want.store
            return bool(made)

    def settle(self, items: list[int], number: int, want: Want) -> None:
        """Move an image of a lent row into a row of the host tier of its size, if there is one.

        ``items[number]`` becomes the new row. Only the transfer of the rows may use them meanwhile.
        """
        old = items[number]
        with self._lock:
            if not self.host or self._pages.get(old, 0) * PAGE == want.nbytes:
                return
            made = self._host_rows(1, want)
            self._lent.update(dict.fromkeys(made, want.store))
        for new in made:
            self.image(new, want.nbytes)[:] = self.image(old, want.nbytes)
            items[number] = new
            self.give([old])

    def give(self, items: Sequence[int]) -> None:
        """End a transfer: its rows that it did not `keep` become free."""
        with self._lock:
            self._give(items)

    def keep(
        self,
        items: Sequence[int],
        keys: Sequence[bytes],
        follows: Sequence[int],
        prefetched: bool = False,
        claim: Claim = ANY,
        sizes: Sequence[int] | None = None,
    ) -> list[bool]:
        """Cache lent rows under keys that follow marks.

        ``sizes``: the bytes of each image; pages of a row after it become free. None: those of the
        largest. At most half of the host tier is ``prefetched`` and not used yet.

        Images in rows of staging are copied into rows of the host tier, `MOST_MOVED` bytes of them,
        or one. They evict others, or take the place of the last ones of ``items``, so that the
        first blocks are cached. So the raw rows of a block that did not fit end no prompt whose
        other blocks fill the tier.

        Returns which rows are cached: not one whose key has a row, or for which there is no row of
        the host tier.
        """
        cache = self._cache
        new = New(UNUSED if prefetched else USED)
        cached = [False] * len(items)
        sizes = [self.row_bytes] * len(items) if sizes is None else sizes
        left = [*items]  # the last ones may become free
        apart = self._too_many(items, sizes)
        with self._lock:
            for number, key in enumerate(keys):
                if number == len(left):
                    break
                if key in cache.rows or number in apart:
                    continue
                place = claim.own.get(key[-32:], BEFORE)
                want = Want(sizes[number], False, claim, place, prefetched)
                row = self._row_to_keep(left, number, want, new)
                if row is None:
                    continue
                cache.rows[key] = row
                if prefetched:
                    cache.unused.add(key)
                new.add(key, follows[number])
                cached[number] = True
            cache.let_go(new)
        return cached

    def _too_many(self, items: Sequence[int], sizes: Sequence[int]) -> set[int]:
        """Return the numbers of rows of staging after `MOST_MOVED` bytes of them, or one."""
        result = set[int]()
        moved = 0
        for number, item in enumerate(items):
            if item < self._first:
                moved += sizes[number]
                if moved > max(MOST_MOVED, sizes[number]):
                    result.add(number)
        return result

    def _row_to_keep(self, left: list[int], number: int, want: Want, new: New) -> int | None:
        """Return a row of the host tier with the image of a lent row, which is no longer lent; None
        if there is none for it. ``new``: keys that got a row before."""
        crowded = want.prefetched and self._crowded(want.nbytes)
        if crowded and not self._evict(want.claim, want.place, UNUSED, new):
            return None
        item = left[number]
        if item < self._first:
            self._cache.let_go(new)
            return self._moved(left, number, want)
        del self._lent[item]
        self._trim(item, want.nbytes // PAGE)
        return item

    def _moved(self, left: list[int], number: int, want: Want) -> int | None:
        """Return a row of the host tier with the image of a row of staging; None if there is none
        for it.

        The last rows of ``left`` become free if that makes room, at most as many as one row may
        evict.
        """
        made = self._host_rows(1, want)
        most = max(number + 1, len(left) - MOST_EVICTED)
        while not made and len(left) > most:
            last = left.pop()
            self._give([last])
            self._given.add(last)
            made = self._host_rows(1, want)
        if not made:
            return None
        self.image(made[0], want.nbytes)[:] = self.image(left[number], want.nbytes)
        return made[0]

    def lacks(self, count: int) -> bool:
        """Return True if saves may not have so many rows more, whatever is evicted."""
        return sum(self._lent.values()) + count > self.most + self.host

    def nbytes_by_form(self) -> dict[bytes, int]:
        """Return the bytes of the cached rows of each form, by its checksum."""
        result = Counter[bytes]()
        with self._lock:
            for key, item in self._cache.rows.items():
                result[key[:-32]] += self._pages[item] * PAGE
        return result

    def nbytes_by_state(self) -> dict[str, int]:
        """Return the bytes of rows by their state."""
        with self._lock:
            kept = sum(self._pages[item] for item in self._cache.rows.values()) * PAGE
            free = len(self._free) * self.row_bytes + self._space.free * PAGE
            lent = sum(self._pages.values()) * PAGE - kept + self._staged * self.row_bytes
        return {"free": free, "lent": lent, "kept": kept}

    def sentence(self) -> str:
        """Return how many rows there are, for `BlockStore.explain`."""
        kind = "pinned" if self.pinned else "pageable"
        nbytes = (self._past - self._first) * PAGE
        return (
            f"{self.staging} {kind} rows of staging, and {nbytes} bytes of the host tier, in which "
            f"each block takes the size of its form."
        )

    def _host_rows(self, count: int, want: Want) -> list[int]:
        """Return rows of the host tier, as many as may be had, in the order of their addresses.

        All are taken in one pass. They are those that rows taken one after the other would be, and
        the same keys are evicted. Their order leaves a copy fewer runs.
        """
        pages = want.nbytes // PAGE
        items = self._space.take(pages, count)
        if len(items) < count and want.claim.evict:
            self._evict_for(items, count, want)
        self._pages.update(dict.fromkeys(items, pages))
        items.sort()
        return items

    def _evict_for(self, items: list[int], count: int, want: Want) -> None:
        """Add rows of the host tier to rows that were taken, up to ``count``, in place of the next
        rows to evict. No extent has a run of their size.

        A row evicts at most `MOST_EVICTED` others.
        """
        pages = want.nbytes // PAGE
        space = self._space
        place = want.place
        place_of = want.claim.place_of
        left = MOST_EVICTED

        def goes(key: bytes) -> bool:
            return place_of(key) > place

        def evicted(item: int) -> bool:
            """Take runs once a row is free; return True if another row may go."""
            nonlocal left
            self.evicted += 1
            past = self._pages.pop(item)
            if past == pages and space.pass_on(item, pages):
                items.append(item)
                left = MOST_EVICTED
            else:
                space.give(item, past, evicted=True)
                runs = space.take(pages, count - len(items))
                items.extend(runs)
                left = MOST_EVICTED if runs else left - 1
            return len(items) < count and left > 0 and not want.prefetched

        before = -1
        while len(items) < count and left > 0 and self.evicted != before:
            before = self.evicted
            crowded = want.prefetched and self._crowded(want.nbytes)
            self._cache.evict_next(goes, UNUSED if crowded else None, evicted)

    def _staging_rows(self, count: int, store: bool) -> list[int] | None:
        """Return rows of staging, all or none."""
        saved = self._saved + count * store
        staged = self._staged + count
        if count and (staged > self.staging or (store and saved > self.most)):
            return None
        self._saved = saved
        self._staged = staged
        return [self._free.popleft() for _ in range(count)]

    def _crowded(self, nbytes: int) -> bool:
        """Return True if half of the host tier, counted in images of so many bytes, is prefetched
        and not used."""
        return len(self._cache.unused) >= max(1, self.holds(nbytes) // 2)

    def _trim(self, item: int, pages: int) -> None:
        """Free the pages of a row after those of its image."""
        past = self._pages[item]
        if past > pages:
            self._space.give(item + pages, past - pages)
            self._pages[item] = pages

    def _give(self, items: Iterable[int]) -> None:
        """Free lent rows."""
        for item in items:
            if item in self._given:  # by `keep`; the number may be that of another row now
                self._given.remove(item)
                continue
            store = self._lent.pop(item, None)
            if store is None:
                continue
            if item < self._first:
                self._staged -= 1
                self._saved -= store
                self._free.append(item)
            else:
                self._release([item])

    def _release(self, items: Iterable[int]) -> None:
        """Free the pages of rows of the host tier."""
        for item in items:
            self._space.give(item, self._pages.pop(item))

    def _take_from(self, keys: Sequence[bytes]) -> bool:
        """Free the rows of keys; return False, and free none, if a load reads one of them."""
        items = self._cache.evict(keys)
        for item in items:
            self._space.give(item, self._pages.pop(item), evicted=True)
        self.evicted += len(items)
        return bool(items)


def rows_for(
    own: Sequence[BlockForm],
    forms: Sequence[BlockForm],
    staging: int,
    host: int,
    pin: bool = True,
    shared: bool = False,
) -> Rows:
    """Return rows for a store of its own forms, with so many bytes of staging and of host tier.

    They have several sizes if the store packs blocks and has their raw form too. ``forms``: all
    forms whose images they hold, the own ones among them.
    """
    sizes = {form.image_bytes for form in forms}
    if host and any(form.encoding and form.raw in own for form in own):
        return SizedRows(sizes, staging, host, pin=pin, shared=shared)
    size = max(sizes)
    return Rows(size, staging // size, host // size, pin=pin, shared=shared)
