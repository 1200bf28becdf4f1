# SPDX-License-Identifier: Apache-2.0
"""Planes of bf16 bits for cases that pack: usual values, every pattern, and planes at the edges of
the format. Equal numbers and seeds give equal values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from portakv_conformance.judge.slots import SlotShape

#: Exponents of the usual values of a plane at an edge, and the first of those that have no code.
_USUAL = 120
_RARE = 200


def usual(seed: int, number: int, values: int) -> np.ndarray:
    """Return normally distributed values, of which a few are any patterns."""
    rng = np.random.default_rng([seed, number])
    bits = _bits(rng.standard_normal(values))
    for at in rng.choice(values, values // 128, replace=False):
        bits[at] = rng.integers(0, 1 << 16)
    return bits


def every_pattern(number: int, values: int) -> np.ndarray:
    """Return a part of all 65,536 patterns, in order: few exponents in each plane."""
    return (np.arange(values, dtype=np.int64) + number * values).astype(np.uint16)


def at_edge(kind: str, shape: SlotShape) -> np.ndarray:
    """Return the values of a plane at an edge of the format, by the name of `EDGES`."""
    return EDGES[kind](shape)


def _bits(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _of(exponents: np.ndarray) -> np.ndarray:
    """Return values of given exponents, with signs and mantissas that differ."""
    at = np.arange(len(exponents), dtype=np.int64)
    bits = (at % 3 == 0) << 15 | exponents << 7 | at * 37 % 128
    return np.asarray(bits, dtype=np.uint16)


def _constant(bits: int, shape: SlotShape) -> np.ndarray:
    return np.full(shape.values, bits, dtype=np.uint16)


def _cycle(exponents: int, shape: SlotShape) -> np.ndarray:
    """Return values whose exponents take turns."""
    return _of(np.arange(shape.values) % exponents + _USUAL)


def _sampled(shape: SlotShape) -> np.ndarray:
    """Return the places of the values that the table counts."""
    if not shape.large:
        return np.arange(shape.values)
    q = np.arange(shape.values // 8)
    return 8 * q + (q + q // 16) % 8


def _escapes(number: int, shape: SlotShape, last: bool = False) -> np.ndarray:
    """Return a plane with so many escapes, in the last places or spread over the plane.

    Exponents without a code are rarer than each of those that have one, or are not counted.
    """
    exponents = np.arange(shape.values) % shape.codes + _USUAL
    free = np.ones(shape.values, dtype=bool)
    if shape.large:
        free[_sampled(shape)] = False
    places = np.flatnonzero(free)
    chosen = places[-number:] if last else places[np.arange(number) * len(places) // number]
    if number:
        exponents[chosen] = _RARE + np.arange(number) % 50
    return _of(exponents)


def _unseen(shape: SlotShape) -> np.ndarray:
    """Return a plane in which all values that are not counted have other exponents: escapes as far
    as they are not counted."""
    exponents = np.arange(shape.values) % 200 + 20
    exponents[_sampled(shape)[::2]] = 3
    return _of(exponents)


def _ties(shape: SlotShape) -> np.ndarray:
    """Return a plane whose exponents occur equally often, one more than there are codes."""
    exponents = np.full(shape.values, _USUAL)
    counted = _sampled(shape)
    exponents[counted] = _USUAL + 1 + np.arange(len(counted)) * (shape.codes + 1) // len(counted)
    return _of(exponents) if not shape.large else _few_escapes(exponents, shape)


def _few_escapes(exponents: np.ndarray, shape: SlotShape) -> np.ndarray:
    free = np.ones(shape.values, dtype=bool)
    free[_sampled(shape)] = False
    exponents[free] = _USUAL + 5
    return _of(exponents)


def _mixed_sign(shape: SlotShape) -> np.ndarray:
    """Return zeros of both signs."""
    return np.where(np.arange(shape.values) % 5 == 1, 0x8000, 0).astype(np.uint16)


def _special(shape: SlotShape) -> np.ndarray:
    """Return infinities, NaNs of every payload, denormals, and zeros of both signs."""
    at = np.arange(shape.values)
    exponents = np.where(at % 2, 0xFF, 0)
    bits = (at % 3 == 0) << 15 | exponents << 7 | at % 128
    return np.asarray(bits, dtype=np.uint16)


#: Planes at the edges, by name. Those whose escapes do not fit are flagged.
EDGES: dict[str, Callable[[SlotShape], np.ndarray]] = {
    "zeros": lambda shape: _constant(0, shape),
    "negative zeros": lambda shape: _constant(0x8000, shape),
    "zeros of both signs": _mixed_sign,
    "infinities": lambda shape: _constant(0xFF80, shape),
    "NaN with a payload": lambda shape: _constant(0x7FA5, shape),
    "NaNs, denormals, zeros": _special,
    "one exponent": lambda shape: _of(np.full(shape.values, 7)),
    "as many exponents as codes": lambda shape: _cycle(shape.codes, shape),
    "one exponent too many": lambda shape: _cycle(shape.codes + 1, shape),
    "alternating": lambda shape: _cycle(16, shape),
    "no repeats": lambda shape: _cycle(100, shape),
    "escapes where nothing counts": _unseen,
    "equal counts": _ties,
    "one escape": lambda shape: _escapes(1, shape),
    "one escape at the end": lambda shape: _escapes(1, shape, last=True),
    "one fewer than fit": lambda shape: _escapes(shape.most - 1, shape),
    "as many as fit": lambda shape: _escapes(shape.most, shape),
    "as many as fit, at the end": lambda shape: _escapes(shape.most, shape, last=True),
    "one more than fit": lambda shape: _escapes(shape.most + 1, shape),
}
