# SPDX-License-Identifier: Apache-2.0
"""Blocks of a save that do not fit into packed slots: they are stored raw, in the raw form of the
same store, under the same key.

A store that chooses between both forms for each save has blocks of both under one list of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import PackOverflow
from portakv.graph import Graph, Mask
from portakv.layout.encodings import FLAG_AT, PACKED, PackedPlane
from portakv.storage import image
from portakv.storage.encoded import EncodedFigures
from portakv.storage.form import BlockForm
from portakv.storage.parts import Part
from portakv.storage.reasons import OVERFLOWED, Reason, Report
from portakv.storage.rows import Crossing, Rows, Want
from portakv.storage.sized_rows import SizedRows
from portakv.storage.tier import Keys, TierStore
from portakv.view import KVView

#: Why a store does not keep a block of a packed view.
FLAGGED = (
    "Expected packed blocks, got one that did not fit into its slots when it was packed. Save this "
    "block from a raw view"
)
#: Why a store does not keep a block that does not fit, although it has the raw form.
NO_ROOM = (
    "Expected host memory for the raw rows of a block that does not fit into packed slots, got "
    "none, as other transfers have it. Give the store more staging"
)
#: Returns what rows of so many bytes are needed for.
Wanted: TypeAlias = Callable[[int], Want]


def flagged(part: Part, items: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which rows of a packed form have a slot with the flag of a plane that did not fit.

    Other encodings have no flags: every block fits them.
    """
    planes = [plane for plane in part.form.planes if isinstance(plane, PackedPlane)]
    if not planes:
        return np.zeros(len(items), np.bool_)
    slots = part.rows.tensors
    assert isinstance(slots, torch.Tensor)  # of the rows of a store
    if slots.shape[-1] == planes[0].slot_bytes:  # kv is an axis
        planes = planes[:1]
    chosen = torch.from_numpy(items)
    result = np.zeros(len(items), np.bool_)
    start = 0
    for plane in planes:
        flags = slots[..., start + plane.head_at + FLAG_AT][chosen]
        result |= (flags != PACKED).flatten(1).any(1).numpy()
        start += plane.slot_bytes
    return result


class Spare:
    """The raw form of a packed form, if the store has both.

    Attributes:
        own: the part of the form itself, whatever its encoding.
        raw: the part of the raw form; None if the form is raw itself, or the store lacks it.
        twin: the part of the other form whose blocks a save need not bring: ``raw``, or the packed
            form after `pair`.
        figures: counts the blocks of a packed form, and those that are raw instead.
        rows: the host memory that has the blocks.
    """

    def __init__(self, parts: Sequence[Part], rows: Rows) -> None:
        own = parts[0]
        form = own.form
        twins = [part for part in parts[1:] if form.encoding and part.form == form.raw]
        self.own = own
        self.raw = twins[0] if twins else None
        self.twin = self.raw
        self.figures = EncodedFigures()
        self.rows = rows
        self._stores = dict[TierStore, TierStore]()
        if self.raw is not None:
            self._stores = _pairs(own, self.raw)

    def pair(self, packed: Spare) -> None:
        """Take the packed form of a store that chooses between both as the other form of this raw
        one."""
        self.twin = packed.own
        self.figures = packed.figures
        self._stores = _pairs(self.own, packed.own)

    def alone(self, packed: Spare) -> Spare:
        """Return this raw form without the packed form of its store, whose figures it counts in."""
        result = Spare([self.own], self.rows)
        result.figures = packed.figures
        return result

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts that have blocks of the form: its own, and that of the other form."""
        return (self.own,) if self.twin is None else (self.own, self.twin)

    def store(self, tier_store: TierStore) -> TierStore | None:
        """Return the store of the other form in the tier of a store of the form itself."""
        return self._stores.get(tier_store)

    def known(self, tier_store: TierStore, keys: Keys) -> list[bool]:
        """Return which blocks a tier has in either form."""
        known = tier_store.known(keys)
        other = self.store(tier_store)
        if other is None:
            return known
        return [a or b for a, b in zip(known, other.known(keys), strict=True)]

    def wants(self, tier_store: TierStore, keys: Keys) -> list[bool]:
        """Return which blocks a save has to bring to a tier, which may have them in the other
        form."""
        wanted = tier_store.wants(keys)
        other = self.store(tier_store)
        if other is None:
            return wanted
        return [a and not b for a, b in zip(wanted, other.known(keys), strict=True)]

    def cached(self, rows: Rows, keys: Keys) -> list[bool]:
        """Return which blocks the host tier has in either form."""
        cached = rows.has_each(self.own.names(keys))
        if self.twin is None:
            return cached
        return [a or b for a, b in zip(cached, rows.has_each(self.twin.names(keys)), strict=True)]

    def stored(self, keys: Keys, rows: Rows, coming: Container[bytes]) -> Mask:
        """Return which blocks are where saves put them; see `FormBlocks.stored`.

        ``coming``: the names of blocks whose transfer has not ended.
        """
        writable = [tier_store for tier_store in self.own.tier_stores if tier_store.writable]
        there = np.ones(len(keys), np.bool_)
        for tier_store in writable:
            if tier_store.tier != "remote":
                there &= self.known(tier_store, keys)
        if not writable:
            names = self.own.names(keys)
            cached = self.cached(rows, keys)
            there[:] = [a or name in coming for a, name in zip(cached, names, strict=True)]
        return there


def _pairs(own: Part, twin: Part) -> dict[TierStore, TierStore]:
    """Return the store of another form in the tier of each writable store of a form.

    Each tier opens the own forms of a store, all of them writable.
    """
    ours, others = ([store for store in part.tier_stores if store.writable] for part in (own, twin))
    return dict(zip(ours, others, strict=False))


def copy_fitting(
    crossing: Crossing,
    inner: KVView,
    outer: KVView,
    items: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
) -> tuple[Mask, str]:
    """Copy blocks of a view into rows, packed if the rows are.

    Args:
        inner, outer: the views of the rows and of the caller's blocks.
        items, at: the number of each row, and the place of its block in the call.

    Returns which blocks do not fit into packed slots, bool ``[items]``, and the sentence that says
    so. The rows of these blocks hold slots that nothing can read.
    """
    try:
        crossing.copy(inner, outer, items, at)
    except PackOverflow as error:
        refused: Mask = np.isin(items, error.dst_blocks)
        if np.count_nonzero(refused) != len({*error.dst_blocks}):
            raise  # not rows of this copy
        return refused, str(error)
    return np.zeros(len(items), np.bool_), ""


class SpareRows:
    """The images in the rows of one transfer: blocks of a save that did not fit have raw ones.

    ``part``: of the images of all other rows.
    """

    def __init__(self, spare: Spare, part: Part) -> None:
        self._spare = spare
        self._part = part
        self._raw = set[int]()

    @property
    def packs(self) -> bool:
        """Return True if a save packs blocks, and keeps raw those that do not fit."""
        return self._spare.raw is not None

    @property
    def most_bytes(self) -> int:
        """Return the bytes of the largest image that a row may hold."""
        forms = self.raw_form, self._part.form
        return max(form.image_bytes for form in forms if form is not None)

    def part(self, row: int) -> Part:
        """Return the part whose image a row holds."""
        raw = self._spare.raw
        return raw if raw is not None and row in self._raw else self._part

    def image_bytes(self, row: int) -> int:
        """Return the bytes of the image of a row."""
        return self.part(row).form.image_bytes

    def take(self, count: int, passing: bool, want: Wanted) -> list[int] | None:
        """Return rows of a memory that has rows of several sizes; None if they are not free.

        ``passing``: see `Want`; the rows have room for any image of the transfer.
        """
        rows = self._spare.rows
        assert isinstance(rows, SizedRows)
        size = self.most_bytes if passing else self._part.form.image_bytes
        return rows.take_sized(count, want(size))

    def seal(
        self, items: Sequence[int], row: int, key: bytes, generation: int, follows: int
    ) -> tuple[int, ...]:
        """Make an image of the payload in a row, as `image.seal` does."""
        form = self.part(row).form
        return image.seal(self.image_in(items, row), form, key, generation, follows)

    def predecessor(self, items: Sequence[int], row: int) -> int:
        """Return the mark of the block that the image in a row follows."""
        return image.predecessor(self.image_in(items, row))

    def image_in(self, items: Sequence[int], row: int) -> image.Row:
        """Return the image of a row, whose number in the memory is ``items[row]``."""
        return self._spare.rows.image(items[row], self.image_bytes(row))

    def settle(self, items: list[int], mask: Mask, want: Wanted) -> None:
        """Move the images of a mask into rows of the host tier of their sizes, if there are any."""
        rows = self._spare.rows
        if isinstance(rows, SizedRows):
            for row in np.flatnonzero(mask).tolist():
                rows.settle(items, row, want(self.image_bytes(row)))

    def _make_room(self, items: list[int], refused: list[int], want: Wanted) -> list[int]:
        """Give rows of the raw size to blocks that do not fit; return those that get none."""
        rows = self._spare.rows
        if self.raw_form is None or not isinstance(rows, SizedRows):
            return []
        terms = want(self.raw_form.image_bytes)
        return [row for row in refused if not rows.replace(items, row, terms)]

    def copy(
        self,
        crossing: Crossing,
        view: KVView,
        mask: Mask,
        lines: tuple[list[int], Sequence[int]],
        keys: Keys,
        report: Report,
        want: Wanted,
    ) -> Mask:
        """Copy blocks of a view into rows, packed if the form is, and raw those that do not fit.

        Args:
            mask: the blocks to copy, by their place in the transfer.
            lines: for each place the number of its row, and the number of its block in the call.
            keys: the key of each place.
            report: gets the reason for each block that the store cannot keep raw.
            want: returns what rows of a size are needed for.

        Returns the blocks that are in rows.
        """
        items, blocks = (np.array(each) for each in lines)
        rows = np.flatnonzero(mask)
        own = self._spare.own
        unfit, why = copy_fitting(crossing, own.rows, view, items[rows], blocks[rows])
        refused = rows[unfit]
        if not len(refused):
            if view.form.encoding:
                self._leave_out_flagged(mask, items, keys, report)
            kept = np.flatnonzero(mask)
            self._count(view.device, items[kept], len(rows) - len(kept), 0)
            return mask
        fits = items[rows[~unfit]]
        misfits = len(refused)
        raw = self._spare.raw
        if raw is None:
            self._count(view.device, fits, misfits, 0)
            mask[refused] = False
            for row in refused.tolist():
                report(keys[row], Reason(OVERFLOWED, why))
            return mask
        for row in self._make_room(lines[0], refused.tolist(), want):
            mask[row] = False
            report(keys[row], Reason(OVERFLOWED, NO_ROOM))
        refused = refused[mask[refused]]
        self._count(view.device, fits, misfits, len(refused))
        items = np.array(lines[0])
        crossing.copy(raw.rows, view, items[refused], blocks[refused])
        self.hold_raw(refused.tolist())
        return mask

    @property
    def raw_form(self) -> BlockForm | None:
        """Return the form of raw images in rows; None if the store cannot keep them."""
        raw = self._spare.raw
        return None if raw is None else raw.form

    def hold_raw(self, rows: Iterable[int]) -> None:
        """Note that rows hold raw images, of blocks that do not fit."""
        self._raw.update(rows)

    def _count(self, device: torch.device, items: Any, misfits: int, followed: int) -> None:
        """Count blocks of the form itself that came from a device into rows ``items``, those that
        did not fit, and how many of these follow raw."""
        figures = self._spare.figures
        form = self._spare.own.form
        if form.encoding:
            rows = self._spare.rows
            one = rows.image(items[0], form.image_bytes) if len(items) else None
            figures.add_packed(device, form, len(items), misfits, followed, one)
        else:
            figures.add_raw(form, len(items))

    def _leave_out_flagged(
        self, mask: Mask, items: npt.NDArray[np.int64], keys: Keys, report: Report
    ) -> None:
        """Take blocks out of the mask whose slots were copied as they are and have no rows."""
        rows = np.flatnonzero(mask)
        for row in rows[flagged(self._spare.own, items[rows])].tolist():
            mask[row] = False
            report(keys[row], Reason(OVERFLOWED, FLAGGED))

    def names(self, keys: Keys, rows: Sequence[int], names: Sequence[bytes]) -> list[bytes]:
        """Return the names of blocks in rows, of which ``names`` has those of the form itself."""
        return [self.part(row).name(keys[row]) if row in self._raw else names[row] for row in rows]

    def write(
        self,
        graph: Graph,
        tier_store: TierStore,
        rows: Sequence[int],
        keys: Keys,
        terms: tuple[Any, ...],
        report: Report,
    ) -> list[bool]:
        """Write the images of rows to a tier, each to the store of its form.

        ``terms``: of `TierStore.write` the queue, the rows, generations and checksums, and the
        rest. Returns which are stored.
        """
        queue, data, generations, checksums, *rest = terms
        raw = [n for n, row in enumerate(rows) if row in self._raw]
        if not raw:
            return tier_store.write(queue, keys, data, generations, checksums, *rest, report=report)
        landed = [False] * len(rows)
        packed = [n for n in range(len(rows)) if n not in raw]
        for store, some in ((tier_store, packed), (self._spare.store(tier_store), raw)):
            if store is None or not some:
                continue
            if store is not tier_store:
                with graph.lock:
                    queue = store.queue_for_write(sum(data[n].nbytes for n in some))
            made = store.write(
                queue,
                [keys[n] for n in some],
                [data[n] for n in some],
                [generations[n] for n in some],
                [checksums[n] for n in some],
                *rest,
                report=report,
            )
            for n, stored in zip(some, made, strict=True):
                landed[n] = stored
        return landed
