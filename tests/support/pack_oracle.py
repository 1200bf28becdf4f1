# SPDX-License-Identifier: Apache-2.0
"""Slots of the encoding `pack`, written in numpy from the text of its format alone, and planes of
values that try it.

It shares no code with the library: neither the geometry nor the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.uint16]
Bytes = NDArray[np.uint8]


def head_place(values: int, bits: int) -> tuple[int, int]:
    """Return the place of the head in a slot, and its bytes."""
    return values + values * bits // 8, 64 if values >= 8192 else 32


def usual_slot(values: int, bits: int) -> int:
    """Return the bytes of a slot of the usual size."""
    at, head = head_place(values, bits)
    if values >= 8192:
        cap = -(-values * 27 // 1000)
    else:
        cap = 32 if values < 4096 else -(-values * 16 // 1000)
    return -(-(at + head + cap) // 32) * 32


def exponents(values: Values) -> NDArray[np.int64]:
    """Return the exponent of each value."""
    return (values.astype(np.int64) >> 7) & 255


def table_of(values: Values, bits: int) -> list[int]:
    """Return the exponents that have codes, in the order of their codes."""
    counted = exponents(values)
    if values.size >= 8192:
        vector = np.arange(values.size // 8)
        counted = counted.reshape(-1, 8)[vector, (vector + vector // 16) % 8]
    number = np.bincount(counted, minlength=256)
    present = [e for e in range(256) if number[e]]
    present.sort(key=lambda e: (-number[e], -e))
    return present[: 2**bits - 1]


def pack_plane(values: Values, bits: int, slot: int) -> Bytes:
    """Return the slot of a plane; only its flag is set if the escapes do not fit."""
    m = 2**bits - 1
    count = values.size
    at, head = head_place(count, bits)
    result = np.zeros(slot, np.uint8)
    table = table_of(values, bits)
    code_of = np.full(256, m, np.uint8)
    code_of[table] = np.arange(len(table))
    every = exponents(values)
    codes = code_of[every]
    escaped = codes == m
    if escaped.sum() > slot - at - head:
        result[at + 15] = 1
        return result
    result[:count] = (values >> 8 & 0x80) | (values & 0x7F)
    flat = (codes[:, None] >> np.arange(bits) & 1).astype(np.uint8)
    result[count:at] = np.packbits(flat.reshape(-1), bitorder="little")
    result[at : at + len(table)] = table
    before = [int(escaped.sum()), *(int(escaped[:end].sum()) for end in range(2048, count, 2048))]
    numbers = np.array(before, "<u2").view(np.uint8)
    result[at + 16 : at + 16 + numbers.size] = numbers
    result[at + head : at + head + before[0]] = every[escaped]
    return result


def cases(count: int, bits: int, slot: int, seed: int = 0) -> Iterator[tuple[str, Values]]:
    """Yield planes of ``count`` values with a name: usual data, and data that tries the format."""
    random = np.random.default_rng(seed)
    m = 2**bits - 1
    at, head = head_place(count, bits)
    cap = slot - at - head

    def of(floats: NDArray[np.float64]) -> Values:
        return (floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    normal = random.standard_normal(count)
    channels = np.exp(random.standard_normal(64))[np.arange(count) % 64]
    yield "normal", of(normal)
    yield "channels", of(normal * channels)
    yield "outliers", of(normal * np.where(np.arange(count) % 128 < 4, 100, 1))
    yield "heavy tail", of(random.standard_t(1.5, count))
    half = of(normal)
    half[count // 2 :] = 0
    yield "half zero", half
    one = of(normal)
    one[3] = 0x7F80
    one[count - 1] = 0xFFC1
    yield "infinity and NaN", one
    for name, pattern in (("zero", 0), ("minus zero", 0x8000), ("NaN", 0x7FC5), ("denormal", 0x11)):
        yield name, np.full(count, pattern, np.uint16)
    yield "random bits", random.integers(0, 65536, count).astype(np.uint16)
    yield "all exponents in turn", (np.arange(count) % 256 << 7 | 5).astype(np.uint16)
    # As many exponents as the table has, one more, and alternating pairs far apart.
    for number in (m, m + 1):
        steps = np.arange(count) % number * 13 + 7
        yield f"{number} exponents", (steps << 7 | 0x8001).astype(np.uint16)
    yield "two exponents", (np.where(np.arange(count) % 2, 255, 0) << 7).astype(np.uint16)
    # Exactly so many escapes: exponents that no other exponent is rarer than.
    usual = np.arange(count) % m + 100
    for name, escapes in (("cap - 1", cap - 1), ("cap", cap), ("cap + 1", cap + 1)):
        if not 0 < escapes < count // (8 * m):
            continue
        plane = usual.copy()
        places = np.arange(count)
        if count >= 8192:  # where a value is not sampled
            vector = places // 8
            places = places[places % 8 != (vector + vector // 16) % 8]
        plane[random.choice(places, escapes, replace=False)] = 30
        yield name, (plane << 7 | random.integers(0, 128, count)).astype(np.uint16)
    last = usual.copy()
    last[-1] = 3
    last[0] = 3
    yield "first and last", (last << 7).astype(np.uint16)
    # Escapes of one round only, by many lanes.
    crowd = usual.copy()
    crowd[8 : 8 + min(cap, count // 32) // 8 * 8] = 31
    yield "crowd", (crowd << 7).astype(np.uint16)


def every_pattern(count: int, bits: int) -> Values:
    """Return planes ``[planes, count]`` that together hold all 65,536 patterns, each plane with no
    more exponents than a table has."""
    m = 2**bits - 1
    planes = []
    for first in range(0, 256, m):
        some = np.arange(first, min(first + m, 256))
        patterns = (some[:, None] << 7 | np.arange(128)).reshape(-1)
        patterns = np.concatenate([patterns, patterns | 0x8000])
        for start in range(0, patterns.size, count):
            planes.append(np.resize(np.roll(patterns, -start), count))
    return np.stack(planes).astype(np.uint16)
