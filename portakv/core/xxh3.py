# SPDX-License-Identifier: Apache-2.0
"""Call the core for checksums: XXH3 with 64 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from portakv.core.library import library, pylibrary

#: Bytes whose checksum takes longer than another thread waits for the interpreter to change hands.
LONG = 64 << 10


class _Functions(NamedTuple):
    """Functions of the core; ``long_pieces`` alone releases the interpreter in any case."""

    buffer: Callable[[Any, int], int]
    pieces: Callable[[Any, bytes, int, int, Any], None]
    long_pieces: Callable[[Any, bytes, int, int, Any], None]


@cache
def _functions() -> _Functions:
    buffer = pylibrary().portakv_xxh3_buffer
    buffer.restype = ctypes.c_uint64
    buffer.argtypes = [ctypes.py_object, ctypes.c_uint64]
    pieces = [pylibrary().portakv_xxh3_pieces, library().portakv_xxh3_pieces]
    pointer = ctypes.c_void_p
    for function in pieces:
        function.restype = None
        function.argtypes = [pointer, ctypes.c_char_p, ctypes.c_int64, ctypes.c_uint64, pointer]
    return _Functions(buffer, *pieces)


def checksum(data: Any, seed: int = 0) -> int:
    """Return the checksum of a contiguous buffer, which is not copied.

    ``seed``: the lowest 64 bits count.
    """
    return _functions().buffer(data, seed)


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
    functions = _functions()
    function = functions.long_pieces if nbytes > LONG else functions.pieces
    function(base, pieces, count, seed, results)
    return [*results]
