# SPDX-License-Identifier: Apache-2.0
"""The words of parts of tensors, and the keys of their positions; `checksum` defines their sum."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch

MODULUS = 1 << 64
#: The integers that words are read as, by bytes.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Distance between the numbers of the positions of two axes.
AXIS = 1 << 48
# The step, the shifts and the factors of splitmix64, as signed numbers.
STEP = 0x9E3779B97F4A7C15 - MODULUS
MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))


class Part(NamedTuple):
    """A part of a tensor, whose checksum is added to the sum of a number."""

    number: int
    tensor: torch.Tensor
    start: tuple[int, ...]  # of its first element in the whole tensor
    unit: int = 4  # the most bytes of a word: sums of a larger part's pieces have one width


def signed(number: int) -> int:
    """Return a number modulo 2^64 as a signed integer of 64 bits."""
    number %= MODULUS
    return number - MODULUS if number >= MODULUS // 2 else number


def key_of(position: int) -> int:
    """Return the odd number of a position, as a signed integer of 64 bits."""
    x = signed(position * STEP)
    for shift, factor in MIXES:
        x = signed((x ^ x >> shift) * factor)
    return x | 1


def unit_of(itemsize: int, start: Sequence[int], extents: Sequence[int]) -> int:
    """Return the bytes of the widest words that a part of a tensor allows."""
    if not start:
        return gcd(4, itemsize)
    return gcd(4, itemsize * start[-1], itemsize * extents[-1])


def words_of(
    part: torch.Tensor, start: tuple[int, ...], most: int
) -> tuple[torch.Tensor, Sequence[int]]:
    """Return a part as words of at most so many bytes, and the position of its first word in the
    whole."""
    if not start:
        part = part[None]
        start = (0,)
    size = part.element_size()
    unit = gcd(most, unit_of(size, start, part.shape))

    # A view as wider words needs a contiguous last axis and aligned steps.
    if size != unit:
        *steps, last = part.stride()
        if last != 1 or any(x * size % unit for x in (*steps, part.storage_offset())):
            part = part.clone(memory_format=torch.contiguous_format)
    return part.view(WORDS[unit]), (*start[:-1], start[-1] * size // unit)


def words_of_all(
    parts: Sequence[torch.Tensor], start: tuple[int, ...], most: int
) -> list[torch.Tensor]:
    """Return several parts of one shape, dtype, strides and position as `words_of` does."""
    (one, _) = words_of(parts[0], start, most)
    size = parts[0].element_size()
    unit = one.element_size()
    shared = one.data_ptr() == parts[0].data_ptr()
    if start and shared and not any(x.storage_offset() * size % unit for x in parts):
        return [x.view(one.dtype) for x in parts]
    return [words_of(x, start, most)[0] for x in parts]
