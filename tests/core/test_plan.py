# SPDX-License-Identifier: Apache-2.0
"""The core's plans of drawn forms, judged by positions that numpy works out from the forms."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.drawn_forms import draw_form, draw_rows, draw_step

from portakv import CopyPlan, KVView, LayoutError, Unsupported
from portakv.core.plan import plan_words
from portakv.plan.packing import PackPlan
from portakv.plan.plan import Loop, Nest, Side
from portakv.view.form import Form, KVRows, Step, Steps

Positions = npt.NDArray[np.int64]
#: Plans that were written down before the core made them, with drawn forms and refusals.
CORPUS = Path(__file__).with_name("plans.jsonl")
FEW = 1_500
MANY = 80_000


def walk(steps: Steps, count: int) -> tuple[Positions, Positions]:
    """Return the table entry and the bytes of each of the first ``count`` positions of steps."""
    left = np.arange(count, dtype=np.int64)
    entries = np.zeros_like(left)
    places = np.zeros_like(left)
    for step in reversed(steps):
        digit = left % step.extent if step.extent else left
        left = left // step.extent if step.extent else left * 0
        entries += digit * step.table
        places += digit * step.stride
    return entries, places


def combine(*walks: tuple[Positions, Positions]) -> tuple[Positions, Positions]:
    """Return the sums of every combination, the last walk innermost."""
    entries = places = np.zeros(1, dtype=np.int64)
    for more_entries, more_places in walks:
        entries = np.add.outer(entries, more_entries).reshape(-1)
        places = np.add.outer(places, more_places).reshape(-1)
    return entries, places


def positions_of(form: Form, part: KVRows, width: int, tokens: int) -> tuple[Positions, Positions]:
    """Return the place of each byte of the first tokens of a part."""
    if form.opaque:
        slots = walk(part.block, tokens // form.block_size)
    else:
        slots = walk((*part.block, *part.token), tokens)
    layers = walk(part.layer, form.layers)
    heads = walk(part.head, form.heads)
    entries, places = combine(slots, layers, heads, walk(part.dim, width))
    return entries + part.table, places + part.offset


def expected(src: Form, dst: Form, tokens: int) -> Positions:
    """Return the moves of a copy of the first tokens, a row for each byte, in any order."""
    rows = []
    for k, width in enumerate(src.widths):
        ends = (src, src.parts[k]), (dst, dst.parts[k])
        sides = [positions_of(form, part, width, tokens) for form, part in ends]
        rows.append(np.stack([*sides[0], *sides[1]], axis=1))
    return np.concatenate(rows)


def planned(plan: CopyPlan, tokens: int) -> Positions:
    """Return the moves of the nests of a plan."""
    units = tokens // plan.unit
    rows = []
    for nest in plan.nests:
        bytes_of_run = np.zeros(nest.run, dtype=np.int64), np.arange(nest.run, dtype=np.int64)
        sides = []
        for name, side in zip(("src", "dst"), nest.sides, strict=True):
            loops = [walk((step_of(loop, name),), loop.extent) for loop in nest.loops]
            entries, places = combine(walk(side.units, units), *loops, bytes_of_run)
            sides += [entries + side.table, places + side.offset]
        rows.append(np.stack(sides, axis=1))
    return np.concatenate(rows)


def step_of(loop: Loop, name: str) -> Step:
    return Step(loop.extent, getattr(loop, f"{name}_table"), getattr(loop, f"{name}_stride"))


def in_order(moves: Positions) -> Positions:
    return moves[np.lexsort(moves.T)]


def check_nest(nest: Nest, alignment: int) -> None:
    """Check that a vector divides every place of a nest, and that no two loops form one."""
    for number in (alignment, nest.run, nest.src.offset, nest.dst.offset):
        assert number % nest.vector == 0
    for side in nest.sides:
        assert all(step.stride % nest.vector == 0 for step in side.units)
    steps = [(x.src_table, x.src_stride, x.dst_table, x.dst_stride) for x in nest.loops]
    for loop, each in zip(nest.loops, steps, strict=True):
        assert loop.extent > 1
        assert loop.src_stride % nest.vector == loop.dst_stride % nest.vector == 0
        if any(each) and not loop.tabled:
            assert tuple(loop.extent * step for step in each) not in steps


def check_drawn(seed: int, cases: int) -> None:
    random = Random(seed)
    made = 0
    for _ in range(cases):
        rows = draw_rows(random)
        src = draw_form(random, rows)
        dst = draw_form(random, rows)
        steps = draw_step(random, src), draw_step(random, dst)
        try:
            plan = CopyPlan(src, dst, *steps)
        except Unsupported:
            continue
        tokens = plan.unit * random.choice((1, 2, 3))
        if tokens * rows.layers * rows.heads * sum(rows.widths) > 1 << 14:
            continue
        made += 1
        context = f"seed {seed}: {src} -> {dst}, steps {steps}\n{plan}"
        moves = planned(plan, tokens)
        assert np.array_equal(in_order(moves), in_order(expected(src, dst, tokens))), context
        assert plan.run == min(nest.run for nest in plan.nests)
        assert plan.vector == min(nest.vector for nest in plan.nests)
        assert plan.token_bytes == sum(nest.unit_bytes for nest in plan.nests) // plan.unit
        assert plan.runs_per_unit == sum(nest.unit_bytes // nest.run for nest in plan.nests)
        for nest in plan.nests:
            check_nest(nest, min(src.alignment, dst.alignment))
    assert made > cases // 2


def test_drawn_plans_move_every_byte_once() -> None:
    check_drawn(1, FEW)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_drawn_plans_move_every_byte_once(seed: int) -> None:
    check_drawn(seed, MANY // 4)


def form_of(words: list[int]) -> Form:
    """Return the form with these words, of which place and number types do not matter here."""
    left = iter(words)

    def steps() -> Steps:
        return tuple(Step(next(left), next(left), next(left)) for _ in range(next(left)))

    kv, layers, heads, block_size, opaque, alignment = (next(left) for _ in range(6))
    widths = tuple(next(left) for _ in range(kv))
    parts = tuple(
        KVRows(next(left), next(left), steps(), steps(), steps(), steps(), steps())
        for _ in range(kv)
    )
    return Form(parts, layers, heads, widths, block_size, bool(opaque), alignment, "device")


def words_of(plan: CopyPlan) -> list[int]:
    return [int(word) for word in plan.words]


CASES = [json.loads(line) for line in CORPUS.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_the_corpus(case: dict[str, Any]) -> None:
    """Plans are equal word for word, refusals by their whole sentence."""
    src = form_of(case["src"])
    dst = form_of(case["dst"])
    own, other = case["steps"]
    if "error" in case:
        with pytest.raises(Unsupported) as caught:
            CopyPlan(src, dst, own, other, case["unit"])
        assert str(caught.value) == case["error"]
    else:
        assert words_of(CopyPlan(src, dst, own, other, case["unit"])) == case["plan"]


def flat(width: int, *token: Step) -> Form:
    return Form(
        (KVRows(0, 0, token=token or (Step(0, 0, width),), dim=(Step(width, 0, 1),)),),
        1, 1, (width,), 0, False, 16, "device",
    )  # fmt: skip


def test_a_step_of_1_is_no_step() -> None:
    """The outermost step of an axis may be one of extent 1, which no position takes."""
    plain = flat(64)
    part = plain.parts[0]
    longer = KVRows(0, 0, layer=(Step(1, 5, 7),), token=part.token, dim=part.dim)
    form = Form((longer,), 1, 1, (64,), 0, False, 16, "device")
    assert CopyPlan(form, plain).words == CopyPlan(plain, plain).words


def test_pages_of_one_token_move_one_by_one() -> None:
    """A unit of 8 such pages would move the first of them alone."""
    part = KVRows(0, 0, block=(Step(0, 0, 64),), dim=(Step(64, 0, 1),))
    pages = Form((part,), 1, 1, (64,), 1, True, 16, "device")
    assert CopyPlan(pages, pages, 8, 8).unit == 1
    with pytest.raises(Unsupported, match="allow divisors of 1"):
        CopyPlan(pages, pages, 8, 8, 8)


def test_more_words_than_the_first_room() -> None:
    """A plan of 40 kv without a common distance has a nest for each."""
    parts = tuple(
        KVRows(k, k * k, token=(Step(0, 0, 64),), dim=(Step(64, 0, 1),)) for k in range(40)
    )
    form = Form(parts, 1, 1, (64,) * 40, 0, False, 16, "device")
    plan = CopyPlan(form, form)
    units = (Step(0, 0, 64),)
    assert plan.nests == tuple(
        Nest(Side(k, k * k, units), Side(k, k * k, units), (), 64, min(16, k * k & -(k * k) or 16))
        for k in range(40)
    )
    assert len(plan.words) > 256


@pytest.mark.parametrize(
    "form",
    [
        flat(64, *[Step(0, 0, 1 << 60), *[Step(2, 0, 1 << 50)] * 15], Step(1 << 40, 0, 1 << 40)),
        flat(64, *[Step(0, 0, 64)] * 17),
        flat(64, Step(-3, 0, 64)),
        Form((KVRows(0, 0, dim=(Step(64, 0, 1),)),), 1, 1, (64,), 0, False, 16, "device"),
        Form((KVRows(0, 0, token=(Step(0, 0, 64),), dim=()),), 1, 1, (64,), 0, True, 16, "device"),
    ],
)
def test_forms_of_no_view_are_refused(form: Form) -> None:
    with pytest.raises(LayoutError, match="Expected forms whose steps reach every position"):
        CopyPlan(form, form, 1 << 30, 1 << 30, 1 << 30)


def test_extents_that_differ_inside_a_part_are_refused() -> None:
    wide = flat(64)
    narrow = Form(
        (KVRows(0, 0, token=(Step(0, 0, 64),), dim=()),), 1, 1, (64,), 0, False, 16, "device"
    )
    with pytest.raises(LayoutError, match="Expected forms whose steps reach every position"):
        CopyPlan(wide, narrow)


def test_a_form_keeps_its_words() -> None:
    form = flat(64)
    assert form.address == form.address
    words = plan_words(form.address, form.address, 0, 0, 0)
    assert words == CopyPlan(form, form).words


@pytest.mark.parametrize(("shift", "vector"), [(0, 16), (8, 16), (4, 8), (1, 2)])
def test_planes_that_are_packed_together_have_the_narrower_vector(shift: int, vector: int) -> None:
    """Keys begin at a multiple of 16 bytes, values so many elements of 2 bytes after one."""
    blocks = 4
    size = 16
    heads = 2
    dim = 16
    values = blocks * size * heads * dim + shift
    strides = (values, size * heads * dim, heads * dim, dim, 1)
    memory = torch.zeros(2 * values, dtype=torch.bfloat16)
    rows = memory.as_strided((2, blocks, size, heads, dim), strides)
    raw = KVView([rows], "layer | kv block token head dim")
    slots = torch.zeros(blocks, 1, 2, heads, 448, dtype=torch.uint8)
    packed = KVView(slots, "block layer kv head page", block_size=size, dim=dim, encoding="pack")
    for pair in ((raw, packed), (packed, raw)):
        src, dst = pair
        (nest,) = PackPlan(src.form, dst.form, size, size).nests
        assert (nest.raw_vector, nest.packed_vector) == (vector, 16)
