# SPDX-License-Identifier: Apache-2.0
"""ENCODINGS, `rope`: keys are moved to other positions, and every other byte is copied as it is.
The backend moves the rows, and operations of torch on its device rotate them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from portakv import PortaKVError, rotate_blocks
from portakv_conformance.cases import PAGED, Bench, Shape, full
from portakv_conformance.cases.test_encodings import case_of as packed_case
from portakv_conformance.cases.test_encodings import claimed
from portakv_conformance.draw.arrangement import side_of
from portakv_conformance.draw.by_hand import arranged, on_host
from portakv_conformance.draw.rows_fp8 import bits_of
from portakv_conformance.judge.judging import view_of
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rope import RopeCase, Turn, judge_rotated

pytestmark = [pytest.mark.area("encodings")]

SIZE = 4
DIM = 16
SMALL = Shape(widths=(2 * DIM, 2 * DIM), block_size=SIZE, blocks=4)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = pytest.mark.parametrize(
    "name", ["bfloat16", *(pytest.param(name, marks=full) for name in ("float16", "float32"))]
)
#: Rotations: pairs of both styles, a part of a head, frequencies that no base makes, far shifts.
TURNS = {
    "halves": Turn.of_base(-480, 10_000.0, DIM),
    "neighbours": Turn.of_base(7, 500_000.0, DIM, True),
    "a part of a head": Turn.of_base(33, 10_000.0, 8),
    "neighbours in a part": Turn.of_base(33, 10_000.0, 8, True),
    "scaled": Turn(-5, tuple(0.7 / (n * n + 1) for n in range(DIM // 2))),
    "far": Turn.of_base(100_003, 10_000.0, DIM),
    "nowhere": Turn.of_base(0, 10_000.0, DIM),
}


def case_of(
    bench: Bench,
    turn: Turn,
    dtype: torch.dtype = torch.bfloat16,
    shape: Shape = SMALL,
    *,
    src_blocks: Any = (2, 0, 3),
    dst_blocks: Any = (1, 3, 0),
    layouts: tuple[str, str] = ("", ""),
) -> RopeCase:
    """Return a case between two raw sides, whose source is not filled."""
    wide = replace(shape, widths=tuple(x * dtype.itemsize // 2 for x in shape.widths))
    src, dst = (
        bench.cache(wide, None, source=source, layout=layout or bench.paged, dtype=dtype)
        for source, layout in zip((True, False), layouts, strict=True)
    )
    blocks = bench.ids(list(src_blocks)), bench.ids(list(dst_blocks))
    assert blocks[0] is not None
    assert blocks[1] is not None
    return RopeCase(src, dst, (blocks[0], blocks[1]), turn, shape.block_size, dtype)


def usual(dtype: torch.dtype, seed: int, number: int, values: int) -> np.ndarray:
    """Return the bits of normally distributed values, with both zeros and small values."""
    drawn = np.random.default_rng([seed, number]).standard_normal(values)
    drawn[::17] *= 0.0
    drawn[3::19] *= 2.0**-12
    return bits_of(drawn, dtype)


def at_edges(dtype: torch.dtype, number: int, values: int) -> np.ndarray:
    """Return the bits of values of which a few are NaN, infinite, subnormal or large."""
    drawn = np.random.default_rng([5, number]).standard_normal(values)
    info = torch.finfo(dtype)
    for at, value in enumerate(
        (np.nan, np.inf, -np.inf, info.smallest_normal / 4, -info.max / 4, info.tiny)
    ):
        drawn[at * 7 + number % 5 :: 64] = value
    return bits_of(drawn, dtype)


def check(bench: Bench, case: RopeCase, values: Any = None) -> bool:
    """Fill the source of a case and judge the copy; return False if the backend declines it."""
    case.fill(values or partial(usual, case.dtype, bench.seed))
    return judge_rotated(bench.judge, case)


@pytest.mark.parametrize(
    "turn",
    [
        "halves",
        "neighbours in a part",
        *(
            pytest.param(name, marks=full)
            for name in TURNS
            if name not in ("halves", "neighbours in a part")
        ),
    ],
)
@TYPES
def test_keys_of_a_type(bench: Bench, name: str, turn: str) -> None:
    """Keys of each number type are rotated; values, and the rest of each head, keep their bits."""
    check(bench, case_of(bench, TURNS[turn], DTYPES[name]))


@TYPES
def test_far_positions(bench: Bench, name: str) -> None:
    """The angles of far positions are as exact as those of near ones."""
    check(bench, case_of(bench, TURNS["far"], DTYPES[name]))


@TYPES
def test_keys_at_the_edges(bench: Bench, name: str) -> None:
    """NaN, infinities, subnormal and large values change their own pair and no other value."""
    dtype = DTYPES[name]
    check(bench, case_of(bench, TURNS["halves"], dtype), partial(at_edges, dtype))


@full
def test_keys_that_come_second(bench: Bench) -> None:
    """The rows of number 1 are the keys, with another width than the rows of number 0."""
    shape = replace(SMALL, widths=(64, 32))
    turn = replace(TURNS["neighbours"], kv=1)
    layout = "layer | block head token (kv dim)"
    check(bench, case_of(bench, turn, shape=shape, layouts=(layout, layout)))


@full
@pytest.mark.parametrize(
    "layouts",
    [
        ("layer | kv block token head dim", "layer kv | block head token dim"),
        ("block token layer kv head dim", "layer | block kv token head dim"),
        ("layer | block head token (kv dim)", "kv layer | block token head dim"),
    ],
)
def test_layouts(bench: Bench, layouts: tuple[str, str]) -> None:
    """Rows of any layout go to rows of any layout."""
    check(bench, case_of(bench, TURNS["halves"], layouts=layouts))


def test_blocks_that_are_skipped(bench: Bench) -> None:
    """A negative block of either side is skipped, and the others are in their places."""
    blocks = {"src_blocks": [2, -1, 3, 0], "dst_blocks": [1, 3, -7, 0]}
    check(bench, case_of(bench, TURNS["neighbours"], **blocks))  # type: ignore[arg-type]


@pytest.mark.claim("encodings")
@pytest.mark.parametrize("packs", [True, False], ids=["pack", "unpack"])
def test_packed_keys(bench: Bench, packs: bool) -> None:
    """Rotated keys are packed bit by bit, and packed keys are rotated after they were unpacked."""
    if not claimed(bench):
        return
    shape = replace(SMALL, block_size=16)
    packed = packed_case(bench, packs, shape, raw_blocks=(2, 0, 3), packed_blocks=(1, 3, 0))
    own, other = packed.blocks()
    assert own is not None
    assert other is not None
    case = RopeCase(*packed.sides, (own, other), TURNS["halves"], 16, torch.bfloat16, packed)
    taken = check(bench, case)
    assert taken, f"It claims 'pack' and declines it: {bench.judge.declined[-1]}"


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("far", ["src", "dst"])
def test_to_the_host_and_back(bench: Bench, far: str) -> None:
    """Keys are rotated on the device, whichever side is on the host."""
    case = case_of(bench, TURNS["halves"])
    case.fill(partial(usual, case.dtype, bench.seed))
    setattr(case, far, on_host(getattr(case, far), True))
    judge_rotated(bench.judge, case)


def test_bytes_are_refused(bench: Bench) -> None:
    """Keys without a number type are refused by name, with every byte unchanged."""
    to = arranged(PAGED, SMALL, device=str(bench.subject.device), dtype=torch.uint8)
    side = side_of(to)
    before = Memory.snapshot(side.tensors)
    view = view_of(side)
    rope = TURNS["halves"].rope
    with pytest.raises(PortaKVError, match="rotation of keys of uint8"):
        rotate_blocks(view, view, [0], [1], rope, backend=bench.subject.name)
    assert not list(before.changes(Memory.snapshot(side.tensors)))
