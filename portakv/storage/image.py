# SPDX-License-Identifier: Apache-2.0
"""The block image of disks, object stores and peers.

An image is a header of 4,096 bytes, the payload, and zeros up to a multiple of 4,096. Each reader
verifies it.

Header, little endian: magic 8 bytes, form checksum 16, key 32, generation u64, payload bytes u64,
segments u32, flags u32, 48 checksums u64, one for each segment; u64 the mark of the predecessor
(`eviction`), 0 in images of older releases; zeros; in the last 8 bytes the seal, a checksum of all
bytes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portakv.core.xxh3 import checksum, piece_checksums
from portakv.storage.form import HEADER as HEADER
from portakv.storage.form import MOST_SEGMENTS, BlockForm

MAGIC = b"PKVBLK\x00\x01"
_BODY = Struct(f"<8s16s32sQQII{MOST_SEGMENTS}Q")
_SEAL = Struct("<Q")
_MARK = Struct("<Q")  # after the body
_END = HEADER - _SEAL.size
Ints = Sequence[int]
Row = npt.NDArray[np.uint8]  # one image: contiguous, at least ``form.image_bytes``


class Header(NamedTuple):
    """The content of an image's header; ``checksums`` has one for each segment."""

    key: bytes
    generation: int
    checksums: tuple[int, ...]


def seal(
    row: Row, form: BlockForm, key: bytes, generation: int, follows: int = 0
) -> tuple[int, ...]:
    """Write the header (of a key of 32 bytes, which follows a mark) before a payload that is in
    place, and zeros after it; return the checksums of its segments."""
    past = HEADER + form.payload_bytes
    sums = tuple(_checksums(row, form.pieces, form.payload_bytes, generation))
    rest = [0] * (MOST_SEGMENTS - len(sums))
    numbers = (form.payload_bytes, len(sums), 0)

    row[:HEADER] = 0
    row[past : form.image_bytes] = 0
    _BODY.pack_into(row.data, 0, MAGIC, form.digest, key, generation, *numbers, *sums, *rest)
    _MARK.pack_into(row.data, _BODY.size, follows)
    write_seal(row)
    return sums


def write_seal(row: Row) -> None:
    """Write the seal of a header, whose other bytes are in place."""
    _SEAL.pack_into(row.data, _END, checksum(row[:_END]))


def is_sealed(row: Row) -> bool:
    """Return True if a header has the seal of its bytes."""
    seal: int = _SEAL.unpack_from(row.data, _END)[0]
    return seal == checksum(row[:_END])


def predecessor(row: Row) -> int:
    """Return the mark of the block that an image follows; `header` has verified it."""
    mark: int = _MARK.unpack_from(row.data, _BODY.size)[0]
    return mark


def header(row: Row, form: BlockForm) -> Header | str:
    """Return the content of an image's header, or why the image is not of this form.

    The caller compares the key and the generation with the expected ones. The payload is not read.
    """
    if not is_sealed(row):
        return "its header has a broken seal"
    magic, digest, key, generation, *numbers = _BODY.unpack_from(row.data)
    count = len(form.segments)
    if (magic, digest, *numbers[:3]) != (MAGIC, form.digest, form.payload_bytes, count, 0):
        return f"its header is of another format or form ({magic!r}, {digest.hex()})"
    return Header(key, generation, tuple(numbers[3 : 3 + count]))


def verify(
    row: Row, form: BlockForm, checksums: Ints, generation: int, segments: Ints | None = None
) -> bool:
    """Return True if segments of a payload have the checksums that were sealed under this
    generation.

    ``segments``: numbers in ``form.segments``; None: all. ``checksums`` has one for each segment of
    the form.
    """
    if segments is None:
        return _checksums(row, form.pieces, form.payload_bytes, generation) == [*checksums]
    pieces = b"".join([form.pieces[16 * i : 16 * (i + 1)] for i in segments])
    nbytes = sum(form.segments[i].nbytes for i in segments)
    return _checksums(row, pieces, nbytes, generation) == [checksums[i] for i in segments]


def _checksums(row: Row, pieces: bytes, nbytes: int, seed: int) -> list[int]:
    """Return the checksums of pieces of an image, whose offsets are those in the image."""
    address = row.__array_interface__["data"][0]  # `ctypes` takes longer
    return piece_checksums(address, pieces, nbytes, seed)


def pieces_of(row: Row, form: BlockForm) -> list[Row]:
    """Return the segments of an image in a row."""
    return [row[HEADER + x.offset : HEADER + x.offset + x.nbytes] for x in form.segments]
