# SPDX-License-Identifier: Apache-2.0
"""The oracle: what every storage must hold after a copy, and a sentence on the first wrong byte. It
is numpy over bytes and takes nothing from the library: where a row lies comes from the layout
language's definition (``rows``), and a copy is one assignment by absolute address."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.origin import came_from, place_of
from portakv_conformance.judge.rows import Extents, Rows

__all__ = ["Expected", "Rows", "compare", "expand", "expected_copy"]


def expand(ids: object, step: int, offset: int, count: int) -> np.ndarray:
    """Return the slot of each position of one side, int64 ``[count]``; negative if it is skipped.

    With ``q = position + offset`` the slot is ``ids[q // step] * step + q % step``, without ids
    it is ``q``. ``ids`` is None or a tensor (any device) or sequence of integers.
    """
    q = np.arange(count, dtype=np.int64) + offset
    if ids is None:
        return q
    host = ids.detach().cpu().numpy() if hasattr(ids, "detach") else np.asarray(ids)
    chosen = host.astype(np.int64)[q // step]
    return np.where(chosen < 0, -1, chosen * step + q % step)


@dataclass
class Expected:
    """A copy as it must turn out."""

    src: Rows
    dst: Rows
    slots: np.ndarray  # pairs (source, destination) copied, int64 [pairs, 2]; of pages the first
    source: Memory  # as it was
    before: Memory  # the destination as it was
    after: Memory  # the destination as it must be


def expected_copy(
    src_tensors: object,
    src_layout: str,
    src_extents: Extents | None,
    dst_tensors: object,
    dst_layout: str,
    dst_extents: Extents | None,
    src_slots: object,
    dst_slots: object,
) -> Expected:
    """Snapshot both sides and work the copy out, without touching the tensors.

    Slots are integers, one for each position; a position with a negative slot is skipped.
    `ValueError`: the two sides cannot hold the same rows.
    """
    src = Rows(src_tensors, src_layout, src_extents)
    dst = Rows(dst_tensors, dst_layout, dst_extents)
    _check_same_rows(src, dst)
    pairs = np.stack([np.asarray(s, dtype=np.int64) for s in (src_slots, dst_slots)], axis=-1)
    if src.opaque:
        pairs = _whole_blocks(pairs, src.block_size or 1)
    pairs = pairs[(pairs >= 0).all(axis=-1)]
    source = Memory.snapshot(src_tensors)
    before = Memory.snapshot(dst_tensors)
    after = before.copy()
    for layer in range(src.layers):
        for kv in range(src.kv):
            rows = source.read(src.row_addresses(kv, layer, pairs[:, 0]))
            after.write(dst.row_addresses(kv, layer, pairs[:, 1]), rows)
    return Expected(src, dst, pairs, source, before, after)


def _check_same_rows(src: Rows, dst: Rows) -> None:
    for name in ("layers", "kv", "heads", "widths", "opaque"):
        ours = getattr(src, name)
        other = getattr(dst, name)
        if ours != other:
            raise ValueError(
                f"Expected equal {name}, got {ours} at src and {other} at dst. Pass sides that "
                f"agree."
            )
    if src.opaque and src.block_size != dst.block_size:
        sizes = f"{src.block_size} at src and {dst.block_size} at dst"
        raise ValueError(
            f"Expected equal block sizes for opaque pages, got {sizes}. Pass sides that agree."
        )


def _whole_blocks(pairs: np.ndarray, size: int) -> np.ndarray:
    """Return one pair for each block.

    `ValueError`: a block is not copied whole and in order.
    """
    if len(pairs) % size:
        raise ValueError(
            f"Expected whole blocks of {size} positions, got {len(pairs)}. Pass all slots of each "
            f"block."
        )
    blocks = pairs.reshape(-1, size, 2)
    in_order = blocks == blocks[:, :1] + np.arange(size, dtype=np.int64)[:, None]
    in_order &= blocks[:, :1] % size == 0
    if not (in_order.all(axis=1) | (blocks < 0).all(axis=1)).all():
        raise ValueError(
            "Expected whole blocks in order for opaque pages, got other positions. Pass the slots "
            "of each block in order."
        )
    return blocks[:, 0]


def compare(expected: Expected, dst_tensors: object, src_tensors: object = None) -> str | None:
    """Return None if every byte of the destination is right, else a sentence on the first fault.

    Rows, padding and canaries of its storages are compared. ``src_tensors``: the source must not be
    written.
    """
    actual = Memory.snapshot(dst_tensors)
    own, other = ([(r.base, r.end) for r in m.regions] for m in (actual, expected.after))
    if own != other:
        return "The destination's storages are not those that the expectation was made for."
    wrong = [changed for _, changed in expected.after.changes(actual)]
    if wrong:
        return _explain(expected, actual, int(wrong[0][0]), sum(map(len, wrong)))
    if src_tensors is None:
        return None
    # The source, apart from storages shared with the destination, is as it was.
    for number, changed in expected.source.changes(Memory.snapshot(src_tensors)):
        was = expected.source.regions[number]
        if not any(was.base < to.end and to.base < was.end for to in expected.after.regions):
            place = place_of(expected.src, int(changed[0]))
            name = place.text(expected.src) if place else f"storage {number}, outside its rows"
            return f"The copy wrote {changed.size} bytes of its source, first of {name}."
    return None


def _explain(expected: Expected, actual: Memory, address: int, wrong: int) -> str:
    here = np.array([address], dtype=np.int64)
    src = expected.src
    dst = expected.dst
    number, offset = actual.find(address) or (0, 0)
    place = place_of(dst, address)
    name = place.text(dst) if place else "padding or canary"
    origin = came_from(address, actual, dst, expected.before, src, expected.source)
    should = "what was there before: the copy must not write it"
    if place is not None and place.slot in expected.slots[:, 1]:
        pair = np.nonzero(expected.slots[:, 1] == place.slot)[0][-1]
        like = replace(place, slot=int(expected.slots[pair, 0]))
        should = f"source {like.text(src)}"
    return (
        f"Destination {name} (storage {number}, offset {offset}) holds "
        f"0x{int(actual.read(here)[0]):02x}, which is {origin or 'of unknown origin'}; expected "
        f"0x{int(expected.after.read(here)[0]):02x}, {should}. "
        f"In all {wrong} bytes are wrong."
    )
