# SPDX-License-Identifier: Apache-2.0
"""ENCODINGS, `fp8`: rows in `fp8` have every byte as the format says. The backend moves the rows
and the slots, and operations of torch on its device convert them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from portakv import PortaKVError, copy_blocks
from portakv_conformance.cases import PAGED, Bench, Shape, full
from portakv_conformance.draw.arrangement import Keywords, side_of
from portakv_conformance.draw.by_hand import arranged, on_host
from portakv_conformance.draw.rows_fp8 import at_edges, usual
from portakv_conformance.judge.fp8 import Fp8Case, Fp8Shape
from portakv_conformance.judge.judging import view_of
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.packed import judge_packed

pytestmark = [pytest.mark.area("encodings")]

IMAGE = "block layer kv head page"
SIZE = 4
#: Two heads of 16 bf16 values.
SMALL = Shape(widths=(32, 32), block_size=SIZE, blocks=4)
PACKS = pytest.mark.parametrize("packs", [True, False], ids=["encode", "decode"])
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = pytest.mark.parametrize(
    "name", ["bfloat16", *(pytest.param(name, marks=full) for name in ("float16", "float32"))]
)


def case_of(
    bench: Bench,
    packs: bool,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    *,
    raw_blocks: Any = (2, 0, 3),
    packed_blocks: Any = (1, 3, 0),
    layout: str = "",
    image: str = IMAGE,
) -> Fp8Case:
    """Return a case whose raw side has rows of a type, and whose source is not filled."""
    slots = tuple(Fp8Shape(shape.block_size, width // dtype.itemsize) for width in shape.widths)
    raw = bench.cache(shape, None, source=packs, layout=layout or bench.paged, dtype=dtype)
    stored = bench.cache(
        replace(shape, widths=tuple(x.slot_bytes for x in slots), block_size=1),
        None,
        layout=image.replace("page", "token dim"),
        dtype=torch.uint8,
        source=not packs,
    )
    return Fp8Case(
        raw,
        stored,
        image,
        slots,
        shape.block_size,
        bench.ids(list(raw_blocks)),
        bench.ids(list(packed_blocks)),
        packs,
        len(packed_blocks),
    )


def check(bench: Bench, case: Fp8Case, values: Any = None) -> bool:
    """Fill the source of a case and judge the copy; return False if the backend declines it."""
    case.fill(values or partial(usual, case.dtype, bench.seed))
    return judge_packed(bench.judge, case)


@PACKS
@TYPES
def test_rows_of_a_type(bench: Bench, packs: bool, name: str) -> None:
    """Rows of each number type have the nearest numbers of e4m3 and a scale for each token."""
    dtype = DTYPES[name]
    check(bench, case_of(bench, packs, replace(SMALL, widths=(16 * dtype.itemsize,) * 2), dtype))


@PACKS
@TYPES
def test_tokens_at_the_edges(bench: Bench, packs: bool, name: str) -> None:
    """Zeros, ties, NaN, infinities, subnormal and huge values: each token has the bytes of the
    format, whatever the other tokens hold."""
    dtype = DTYPES[name]
    shape = replace(SMALL, widths=(32 * dtype.itemsize,) * 2)
    case = case_of(bench, packs, shape, dtype)
    check(bench, case, partial(at_edges, dtype, 32))


@full
def test_every_pattern(bench: Bench) -> None:
    """All 65,536 patterns of bf16 are encoded, 64 neighbours in a token."""
    shape = Shape(layers=1, heads=1, widths=(128, 128), block_size=64, blocks=8)
    every = range(8)
    case = case_of(bench, True, shape, raw_blocks=every, packed_blocks=every)

    def planes(number: int, values: int) -> np.ndarray:
        return (np.arange(values, dtype=np.int64) + number * values).astype(np.uint16)

    check(bench, case, planes)


@TYPES
def test_every_slot_byte(bench: Bench, name: str) -> None:
    """Slots with any codes and any scales up to the largest are decoded as the format says."""
    dtype = DTYPES[name]
    case = case_of(bench, False, replace(SMALL, widths=(64 * dtype.itemsize,) * 2), dtype)
    case.fill(partial(usual, dtype, bench.seed))
    for number, tensor in enumerate(_tensors(case.packed.tensors)):
        slots = tensor.view(-1, case.slots[0].slot_bytes)
        for at, slot in enumerate(slots):
            slot.copy_(torch.from_numpy(_any_slot(at + number, case.slots[0])))
    judge_packed(bench.judge, case)


def _tensors(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _any_slot(number: int, shape: Fp8Shape) -> np.ndarray:
    """Return a slot with all codes in turn, and with scales of bf16 from 2 ** -117 on."""
    slot = np.zeros(shape.slot_bytes, dtype=np.uint8)
    slot[: shape.values] = np.arange(shape.values) + 3 * number
    scales = 0x0500 + (np.arange(shape.tokens) + 7 * number) * 977 % (0x7F80 - 0x0500)
    scales = scales.astype("<u2").view(np.uint8)
    slot[shape.values : shape.values + len(scales)] = scales
    return slot


@full
@PACKS
@pytest.mark.parametrize(
    ("layout", "image"),
    [
        ("layer | block token head dim", "layer | block head page"),
        ("layer kv | block head token dim", "kv layer block head page"),
        ("block token layer kv head dim", "layer | block kv head page"),
        ("layer | block head token (kv dim)", "block head layer (kv page)"),
    ],
)
def test_layouts(bench: Bench, packs: bool, layout: str, image: str) -> None:
    """Rows of any layout go to slots in any order of the axes, with unequal widths too."""
    kv = 1 if "kv" not in layout else 2
    widths = (64, 32) if "(kv" in layout else (32,) * kv
    check(bench, case_of(bench, packs, replace(SMALL, widths=widths), layout=layout, image=image))


@PACKS
def test_blocks_that_are_skipped(bench: Bench, packs: bool) -> None:
    """A negative block of either side is skipped, and the others are in their places."""
    blocks: Keywords = {"raw_blocks": [2, -1, 3, 0], "packed_blocks": [1, 3, -7, 0]}
    check(bench, case_of(bench, packs, SMALL, **blocks))


@pytest.mark.needs("accelerator")
@PACKS
@pytest.mark.parametrize("far", ["raw", "packed"])
def test_to_the_host_and_back(bench: Bench, packs: bool, far: str) -> None:
    """Rows are converted on the device, whichever side is on the host."""
    case = case_of(bench, packs, SMALL)
    case.fill(partial(usual, case.dtype, bench.seed))
    setattr(case, far, on_host(getattr(case, far), True))
    judge_packed(bench.judge, case)


def test_bytes_are_refused(bench: Bench) -> None:
    """Rows without a number type are refused by name, with every byte unchanged."""
    case = case_of(bench, True, SMALL)
    to = arranged(PAGED, SMALL, device=str(bench.subject.device), dtype=torch.uint8)
    before = Memory.snapshot(case.packed.tensors)
    with pytest.raises(PortaKVError, match="encode rows of uint8"):
        copy_blocks(view_of(side_of(to)), case.views()[1], [0], [1], backend=bench.subject.name)
    assert not list(before.changes(Memory.snapshot(case.packed.tensors)))
