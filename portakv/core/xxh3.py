# SPDX-License-Identifier: Apache-2.0
"""Call the core for checksums: XXH3 with 64 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from portakv.core.library import function

#: Bytes whose checksum takes longer than another thread waits for the interpreter to change hands.
LONG = 64 << 10
_PIECES = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


@cache
def _functions() -> SimpleNamespace:
    """Return the functions that keep the interpreter."""
    number = ctypes.c_uint64
    return SimpleNamespace(
        buffer=function("xxh3_buffer", number, ctypes.py_object, number),
        pieces=function("xxh3_pieces", None, *_PIECES),
    )


@cache
def _long_pieces() -> Any:
    """Return the function that releases it. It opens the library a second time, which a first
    save need not wait for."""
    return function("xxh3_pieces", None, *_PIECES, waits=True)


def checksum(data: Any, seed: int = 0) -> int:
    """Return the checksum of a contiguous buffer, which is not copied.

    ``seed``: the lowest 64 bits count.
    """
    return int(_functions().buffer(data, seed))


def checksums(parts: Sequence[bytes]) -> list[int]:
    """Return the checksum of each of many texts, in one call."""
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    pieces = np.empty((len(parts), 2), np.int64)
    pieces[:, 1] = lengths
    pieces[:, 0] = lengths.cumsum() - lengths
    whole = b"".join(parts)
    return piece_checksums(whole, pieces.tobytes(), int(lengths.sum()))


def piece_checksums(base: Any, pieces: bytes, nbytes: int, seed: int = 0) -> list[int]:
    """Return the checksums of pieces of memory.

    Args:
        base: the address of the memory, or the bytes themselves.
        pieces: two int64 for each piece, its offset and its length.
        nbytes: of all pieces.
    """
    count = len(pieces) // 16
    results = (ctypes.c_uint64 * count)()
    write = _long_pieces() if nbytes > LONG else _functions().pieces
    write(base, pieces, count, seed, results)
    return [*results]
