# SPDX-License-Identifier: Apache-2.0
"""Compress block images for object stores by zstd, segment by segment.

A compressed object begins with a page of 4,096 bytes: the image's header with another magic, and at
byte 512 the terms: u32 width, u32 0, and u64 bytes of each segment in the object (48 of them, 0
after the last). The last 8 bytes are the page's seal. The segments follow in order, each a zstd
frame, or as it is in the image if a frame would not be smaller. A width of 2 or 4 means that the
bytes of a segment were sorted before: the first bytes of all elements, then the second ones, and so
on. Signs and exponents are a few of all values, and mantissas are not.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from portakv.errors import InvalidTerms, StoreError
from portakv.extras import installing
from portakv.storage.form import HEADER, MOST_SEGMENTS, BlockForm
from portakv.storage.image import MAGIC, Row, is_sealed, pieces_of, write_seal
from portakv.tasks import runtime

ZSTD = "zstd"
#: zstd's level, the least length of a repetition, and the bits of its table. Rows of numbers repeat
#: nothing, so that a long search for repetitions takes time and makes the result larger; what
#: saves bytes is a code by how often they occur.
LEVEL = 1
LEAST_REPETITION = 7
TABLE_BITS = 6
COMPRESSED = b"PKVZST\x00\x01"
WIDTHS = (1, 2, 4)
#: Bytes from the middle of an image that decide the width, and whether it is compressed at all.
SAMPLE = 1 << 16
#: The least share of its bytes by which a sample must shrink.
LEAST_SAVED = 1 / 64
_TERMS = Struct(f"<II{MOST_SEGMENTS}Q")
_TERMS_AT = 512  # after the end of the image's header


class Terms(NamedTuple):
    """How an object was written: the width, and the bytes of each segment in the object."""

    width: int
    lengths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole object."""
        return HEADER + sum(self.lengths)

    def span(self, segment: int) -> tuple[int, int]:
        """Return the first byte of a segment in the object, and the first byte after it."""
        start = HEADER + sum(self.lengths[:segment])
        return start, start + self.lengths[segment]


class Compressor:
    """Makes objects of images, and counts the bytes of both. Threads may share it.

    Raises `StoreError` without the package for zstd.
    """

    def __init__(self) -> None:
        self._codec = zstd()
        self._counts = Counter[str]()
        self._lock = runtime().lock

    def object_of(self, row: Row, form: BlockForm) -> Row | bytes:
        """Return the object of a sealed image, which is the image if it does not become smaller."""
        image = row[: form.image_bytes]
        made = compress(image, form, self._codec)
        data: Row | bytes = image if made is None else made
        with self._lock:
            self._counts.update(image_bytes=len(image), object_bytes=len(data))
        return data

    def statistics(self) -> dict[str, int]:
        """Return the bytes of the images and of their objects."""
        with self._lock:
            return {name: self._counts[name] for name in ("image_bytes", "object_bytes")}


def check_compress(compress: object) -> None:
    """Raise `InvalidTerms` for a method that does not exist."""
    if compress not in (None, ZSTD):
        raise InvalidTerms(
            f"Expected compress= as None or {ZSTD!r}, got {compress!r}. Pass one of them."
        )


def zstd() -> Any:
    """Return the module for zstd, of Python 3.14 or of its backport. Raises `StoreError`."""
    error = None
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except (ImportError, OSError) as x:
            error = x
    raise StoreError(
        f"Expected backports.zstd for compressed blocks of a bucket, got: {error}. "
        f"{installing('zstd')} brings it."
    )


def compress(row: Row, form: BlockForm, codec: Any) -> bytes | None:
    """Return the object of a sealed image, or None if it would not be smaller.

    ``codec``: what `zstd` returned. Equal images have equal objects.
    """
    pieces = pieces_of(row, form)
    width = _best_width(row[HEADER : HEADER + form.payload_bytes], pieces, codec)
    if width is None:
        return None

    parts: list[Any] = []
    lengths = []
    for piece in pieces:
        frame = _frame(piece, width, codec)
        length = sum(map(len, frame))
        if length >= len(piece):
            frame = [piece.data]
            length = len(piece)
        parts += frame
        lengths.append(length)
    terms = Terms(width, tuple(lengths))
    if terms.nbytes >= form.image_bytes:
        return None

    page = row[:HEADER].copy()
    page[: len(MAGIC)] = np.frombuffer(COMPRESSED, np.uint8)
    rest = [0] * (MOST_SEGMENTS - len(lengths))
    _TERMS.pack_into(page.data, _TERMS_AT, width, 0, *terms.lengths, *rest)
    write_seal(page)
    return b"".join([page.data, *parts])


def terms_of(page: Row, form: BlockForm) -> Terms | None:
    """Return how an object was written, by its first 4,096 bytes; None if it is not compressed, or
    damaged there."""
    if page[: len(MAGIC)].tobytes() != COMPRESSED or not is_sealed(page):
        return None
    width, _, *lengths = _TERMS.unpack_from(page.data, _TERMS_AT)
    segments = form.segments
    terms = Terms(width, tuple(lengths[: len(segments)]))
    fits = all(0 < n <= x.nbytes for n, x in zip(terms.lengths, segments, strict=True))
    return terms if fits and width in WIDTHS else None


def restore_header(page: Row, row: Row, form: BlockForm) -> None:
    """Write the header of the image, and the zeros after its payload, into a row."""
    row[:HEADER] = page[:HEADER]
    row[: len(MAGIC)] = np.frombuffer(MAGIC, np.uint8)
    row[_TERMS_AT : _TERMS_AT + _TERMS.size] = 0
    write_seal(row)
    row[HEADER + form.payload_bytes : form.image_bytes] = 0


def restore(data: Row, row: Row, form: BlockForm, terms: Terms, segment: int, codec: Any) -> bool:
    """Write a segment of the image into a row; return False if its bytes are no such segment.

    ``data``: the segment's bytes in the object. The caller verifies what was written.
    """
    piece = pieces_of(row, form)[segment]
    if len(data) == len(piece):
        piece[:] = data
        return True
    if len(piece) % terms.width:
        return False
    decompressor = codec.ZstdDecompressor()
    try:
        # One byte more than the segment has: a frame that is damaged does not fill the memory.
        content = decompressor.decompress(data, len(piece) + 1)
    except codec.ZstdError:
        return False
    if len(content) != len(piece) or not decompressor.eof:
        return False
    by_byte = np.frombuffer(content, np.uint8).reshape(terms.width, -1)
    for number, bytes_of_one in enumerate(by_byte):
        piece[number :: terms.width] = bytes_of_one
    return True


def _best_width(payload: Row, pieces: list[Row], codec: Any) -> int | None:
    """Return the width by which a sample of a payload becomes smallest, or None if it stays as it
    is."""
    widths = [x for x in WIDTHS if all(len(piece) % x == 0 for piece in pieces)]
    size = min(SAMPLE, len(payload)) // WIDTHS[-1] * WIDTHS[-1] or len(payload)
    start = (len(payload) - size) // 2 // WIDTHS[-1] * WIDTHS[-1]
    sample = payload[start : start + size]
    widths = [x for x in widths if size % x == 0]
    sizes = {x: sum(map(len, _frame(sample, x, codec))) for x in widths}
    best = min(sizes, key=lambda width: sizes[width])
    return best if sizes[best] <= size * (1 - LEAST_SAVED) else None


def _frame(piece: Row, width: int, codec: Any) -> list[Any]:
    """Return the parts of a frame of a segment, with a block for the first bytes of all elements,
    a block for the second bytes, and so on."""
    options = codec.CompressionParameter
    compressor = codec.ZstdCompressor(
        options={
            options.compression_level: LEVEL,
            options.min_match: LEAST_REPETITION,
            options.hash_log: TABLE_BITS,
        }
    )
    parts = []
    for one in piece.reshape(-1, width).T:
        bytes_of_one = np.ascontiguousarray(one)
        parts.append(compressor.compress(bytes_of_one, codec.ZstdCompressor.FLUSH_BLOCK))
    parts.append(compressor.flush())
    return parts
