# SPDX-License-Identifier: Apache-2.0
"""Naming bytes: which row a wrong byte lies in, and which row its content came from. Only failures
come this way, so everything here searches instead of keeping tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.pattern import CANARY, canary_bytes
from portakv_conformance.judge.rows import Rows

_CHUNK = 1 << 22  # addresses in memory at a time while searching
_LENGTHS = (8, 5, 4)  # bytes compared; fewer than four name a place by accident


@dataclass(frozen=True)
class Place:
    """One byte of one row of a view."""

    layer: int
    kv: int
    slot: int
    head: int
    byte: int

    def text(self, rows: Rows) -> str:
        """Return a phrase such as ``layer 3 value slot 17 head 2 byte 5``."""
        kv = f"kv {self.kv}" if rows.kv != 2 else ("key", "value")[self.kv]
        size = rows.block_size or 1
        unit = f"block {self.slot // size}" if rows.opaque else f"slot {self.slot}"
        return f"layer {self.layer} {kv} {unit} head {self.head} byte {self.byte}"


def _planes(rows: Rows) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield all rows of a view in pieces: layer, kv, slots, addresses [slots, heads, width]."""
    step = rows.block_size or 1 if rows.opaque else 1
    slots = np.arange(0, rows.slots, step, dtype=np.int64)
    for layer, kv in product(range(rows.layers), range(rows.kv)):
        each = max(_CHUNK // max(rows.heads * rows.widths[kv], 1), 1)
        for first in range(0, slots.size, each):
            some = slots[first : first + each]
            yield layer, kv, some, rows.row_addresses(kv, layer, some)


def place_of(rows: Rows, address: int) -> Place | None:
    """Return the byte of a row that lies at an address; None for padding and canaries."""
    for layer, kv, slots, addresses in _planes(rows):
        hits = np.argwhere(addresses == address)
        if hits.size:
            slot, head, byte = (int(n) for n in hits[0])
            return Place(layer, kv, int(slots[slot]), head, byte)
    return None


def _find_in_rows(window: bytes, rows: Rows, memory: Memory) -> Place | None:
    """Find the row bytes that equal a window.

    The bytes of a row are in the order of heads and dim, wherever they lie.
    """
    for layer, kv, slots, addresses in _planes(rows):
        at = memory.read(addresses).tobytes().find(window)
        if at >= 0:
            slot, head, byte = (int(n) for n in np.unravel_index(at, addresses.shape))
            return Place(layer, kv, int(slots[slot]), head, byte)
    return None


def _windows(actual: Memory, rows: Rows, address: int) -> Iterator[tuple[bytes, int]]:
    """Yield neighbours of a byte, longest first, with the place of the byte among them.

    They lie in the byte's row, or in its storage if the byte lies outside of rows.
    """
    place = place_of(rows, address)
    if place is not None:
        near = rows.row_addresses(place.kv, place.layer, [place.slot])
        line = actual.read(near).tobytes()
        at = place.head * rows.widths[place.kv] + place.byte
    else:
        located = actual.find(address)
        assert located is not None
        region, offset = located
        content = actual.regions[region].content
        low = max(offset - 8, 0)
        line = content[low : offset + 8].tobytes()
        at = offset - low
    for length in _LENGTHS:
        for first in (at, at - length + 1, at - length // 2):
            if first >= 0 and first + length <= len(line):
                yield line[first : first + length], at - first


def came_from(
    address: int, actual: Memory, dst: Rows, before: Memory, src: Rows, src_memory: Memory
) -> str | None:
    """Describe the byte at an address of the destination in words; None if it cannot be determined.

    ``before`` is the destination before the copy, ``src_memory`` the source then.
    """
    here = np.array([address], dtype=np.int64)
    if bool(before.read(here) == actual.read(here)):
        return "what stood there before the copy: it was not written"
    endless = canary_bytes(2 * CANARY.size).tobytes()
    for window, at in _windows(actual, dst, address):
        if window in endless:
            return "a piece of a canary"
        for side, rows, memory in (("source", src, src_memory), ("destination", dst, before)):
            origin = _found_in(window, at, side, rows, memory)
            if origin is not None:
                return origin
    return None


def _found_in(window: bytes, at: int, side: str, rows: Rows, memory: Memory) -> str | None:
    """Describe byte ``at`` of a window in words, if a side holds the window; else return None."""
    place = _find_in_rows(window, rows, memory)
    if place is not None:
        row = rows.row_addresses(place.kv, place.layer, [place.slot]).ravel()
        byte = place.head * rows.widths[place.kv] + place.byte + at
        if byte < row.size:  # a window may end in the next row of the plane
            exact = place_of(rows, int(row[byte]))
            return f"{side} {(exact or place).text(rows)}"
    for number, region in enumerate(memory.regions):
        offset = region.content.tobytes().find(window)
        if offset >= 0:
            return f"byte {offset + at} of {side} storage {number}, outside its rows"
    return None
