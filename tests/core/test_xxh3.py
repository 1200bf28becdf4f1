# SPDX-License-Identifier: Apache-2.0
"""The core's checksum next to the package `xxhash`, whose results it has to repeat."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash

from portakv.core.library import library
from portakv.core.xxh3 import LONG, checksum, checksums, piece_checksums

#: Bytes at which the definition changes, and next to them; a block has 1,024 bytes.
EDGES = [0, 1, 3, 4, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 128, 129, 240, 241, 1024, 1025, 2048]
SEEDS = [0, 1, 41, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 3]


def loops() -> list[Callable[[int, int, int], int]]:
    """Return the versions of the core, called with an address, a length and a seed."""
    functions: list[Any] = [library().portakv_xxh3, library().portakv_xxh3_plain]
    for function in functions:
        function.restype = ctypes.c_uint64
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64]
    return functions


def check_drawn(chance: random.Random, most: int) -> None:
    """Compare the versions for one draw of bytes, at a drawn alignment; the memory is full."""
    nbytes = chance.choice([chance.randrange(most), chance.choice(EDGES)])
    start = chance.randrange(64)
    seed = chance.choice([*SEEDS, chance.getrandbits(64)])
    # The bytes end where the memory does, which a sanitizer watches.
    memory = np.frombuffer(chance.randbytes(start + nbytes), np.uint8).copy()
    expected = xxhash.xxh3_64_intdigest(memory[start:].tobytes(), seed=seed)
    for loop in loops():
        assert loop(memory.ctypes.data + start, nbytes, seed) == expected, (nbytes, start, seed)


def check_all_drawn(chance: random.Random, examples: int) -> None:
    """Compare the versions for so many draws."""
    for _ in range(examples):
        check_drawn(chance, 1 << 14)


def test_every_length_up_to_four_pages() -> None:
    chance = random.Random(0)
    data = chance.randbytes(4096)
    memory = np.frombuffer(data, np.uint8)
    for nbytes in range(4097):
        for seed in (*SEEDS[:1], chance.choice(SEEDS), chance.getrandbits(64)):
            expected = xxhash.xxh3_64_intdigest(data[:nbytes], seed=seed)
            assert [loop(memory.ctypes.data, nbytes, seed) for loop in loops()] == [expected] * 2


@pytest.mark.parametrize("nbytes", [65_535, 65_536, 65_537, 1 << 20, (2 << 20) + 4096, 10_000_019])
def test_long_inputs(nbytes: int) -> None:
    memory = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    for seed in SEEDS:
        expected = xxhash.xxh3_64_intdigest(memory.data, seed=seed)
        assert [loop(memory.ctypes.data, nbytes, seed) for loop in loops()] == [expected] * 2
        assert checksum(memory, seed) == expected


def test_drawn_inputs() -> None:
    check_all_drawn(random.Random(1), 300)


def test_buffers_of_every_kind() -> None:
    data = random.Random(2).randbytes(LONG + 8)
    expected = xxhash.xxh3_64_intdigest(data, seed=(1 << 64) - 3)
    words = np.frombuffer(data, "<u8")
    for buffer in (data, bytearray(data), memoryview(data), words, np.frombuffer(data, np.uint8)):
        assert checksum(buffer, -3) == expected
    assert checksum(words[:-1]) == xxhash.xxh3_64_intdigest(data[:-8])
    assert checksum(b"") == checksum(bytearray()) == xxhash.xxh3_64_intdigest(b"")
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        checksum(words[::2])
    with pytest.raises(TypeError, match="bytes-like"):
        checksum("text")


def test_many_in_one_call() -> None:
    chance = random.Random(3)
    parts = [chance.randbytes(n) for n in (32, 0, 32, 7, 5000, 32)]
    assert checksums(parts) == [xxhash.xxh3_64_intdigest(part) for part in parts]
    assert checksums([]) == []
    memory = np.frombuffer(chance.randbytes(1 << 20), np.uint8)
    numbers = [(4096, 1000), (0, 1 << 20), (100, 0)]
    pieces = np.array(numbers, np.int64).tobytes()
    expected = [xxhash.xxh3_64_intdigest(memory[a : a + n].data, seed=9) for a, n in numbers]
    for nbytes in (0, 1 << 20):  # with the interpreter and without it
        assert piece_checksums(memory.ctypes.data, pieces, nbytes, 9) == expected
