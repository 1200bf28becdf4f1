# SPDX-License-Identifier: Apache-2.0
"""Cleaning indices for backends that neither skip negative ids nor guard against bad ones."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from portakv.errors import SlotError
from portakv.runtime.transfer import bad_slot
from portakv.view.index import Index
from portakv.view.view import KVView


class Cleaned(NamedTuple):
    """Indices without negative or bad ids; ``error`` names the first bad one."""

    src_index: Index
    dst_index: Index
    tokens: int
    error: SlotError | None


def clean(
    src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int, unit: int
) -> Cleaned:
    """Drop every unit whose id is negative or past the end, on either side.

    Synchronises once with the device where ids are there. Where nothing is dropped the indices
    come back as they are, and need not be cleaned again.
    """
    unit = gcd(unit, src_index.offset, dst_index.offset, count)
    device = next((x.ids.device for x in (src_index, dst_index) if x.ids is not None), None)
    device = device or src.device
    numbers = [x.units(count, unit, device) for x in (src_index, dst_index)]
    bad = [number >= view.slots // unit for number, view in zip(numbers, (src, dst), strict=True)]
    keep = (numbers[0] >= 0) & (numbers[1] >= 0) & ~bad[0] & ~bad[1]
    kept = keep.nonzero()[:, 0]
    if kept.numel() == keep.numel():
        src_index.mark_clean(count, src.slots)
        dst_index.mark_clean(count, dst.slots)
        return Cleaned(src_index, dst_index, count, None)
    error = _first_bad(src, dst, numbers, bad, unit)
    ids = [Index(number[kept], step=unit) for number in numbers]
    return Cleaned(ids[0], ids[1], kept.numel() * unit, error)


def _first_bad(
    src: KVView, dst: KVView, numbers: list[torch.Tensor], bad: list[torch.Tensor], unit: int
) -> SlotError | None:
    at = (bad[0] | bad[1]).nonzero()[:, 0]
    if not at.numel():
        return None
    first = int(at[0])
    side = 0 if bool(bad[0][first]) else 1
    return bad_slot(first * unit, int(numbers[side][first]) * unit, (src, dst)[side].slots)
