# SPDX-License-Identifier: Apache-2.0
"""Rows for cases in `fp8`: usual values, every pattern, and tokens at the edges of e4m3. Equal
numbers and seeds give equal values."""

from __future__ import annotations

import numpy as np
import torch

from portakv_conformance.judge.fp8 import BITS, E4M3

#: What a token has at an edge; each kind is one token of a plane.
EDGES = (
    "zeros",
    "halfway",
    "nothing finite",
    "one infinity",
    "a NaN",
    "subnormal",
    "the smallest",
    "the largest",
    "one huge value",
    "close to one code",
)


def bits_of(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the bits of numbers in a type; those of bf16 are cut off."""
    if dtype is torch.bfloat16:
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        kind = np.float16 if dtype is torch.float16 else np.float32
        return numbers.astype(kind).view(BITS[dtype])


def usual(dtype: torch.dtype, seed: int, number: int, values: int) -> np.ndarray:
    """Return normally distributed values, of which a few are any patterns."""
    rng = np.random.default_rng([seed, number])
    bits = bits_of(rng.standard_normal(values), dtype)
    for at in rng.choice(values, values // 64, replace=False):
        bits[at] = rng.integers(0, 1 << 8 * bits.itemsize)
    return bits


def at_edges(dtype: torch.dtype, dim: int, number: int, values: int) -> np.ndarray:
    """Return a plane whose tokens are `EDGES` in turn, with ``dim`` values each."""
    tokens = [
        _token(EDGES[(number + token) % len(EDGES)], dim, dtype) for token in range(values // dim)
    ]
    return np.concatenate(tokens)


def _token(kind: str, dim: int, dtype: torch.dtype) -> np.ndarray:
    at = np.arange(dim)
    sign = np.where(at % 3, 1.0, -1.0)
    numbers = np.full(dim, 0.0) * sign  # of both signs
    info = torch.finfo(dtype)
    if kind == "halfway":  # between two numbers of e4m3, from the smallest on; the scale is 1
        pairs = (E4M3[:-1] + E4M3[1:]) / 2
        numbers = pairs[at * 7 % len(pairs)] * sign
        numbers[0] = 448
    elif kind == "close to one code":
        numbers = np.where(at % 2, 1.0, 1.0 + info.eps) * 3 * sign
        numbers[0] = 448
    elif kind in ("nothing finite", "one infinity", "a NaN"):
        numbers = (at + 1) * 0.01 * sign
        bad = np.nan if kind == "a NaN" else np.inf
        numbers[at >= (0 if kind == "nothing finite" else dim - 1)] = bad
        numbers *= sign
    elif kind == "subnormal":
        numbers = info.smallest_normal * (at % 16) / 16 * sign
    elif kind == "the smallest":
        numbers = info.smallest_normal * (1 + at % 4) * sign
    elif kind == "the largest":
        numbers = info.max * (1 - at % 4 * info.eps) * sign
    elif kind == "one huge value":
        numbers = (at + 1) * 1e-3 * sign
        numbers[dim // 2] = info.max / 2
    return bits_of(numbers, dtype)
