# SPDX-License-Identifier: Apache-2.0
"""The core's plans of drawn forms, judged by positions that numpy works out from the forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import accumulate
from math import gcd
from operator import mul
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.drawn_forms import draw_form, draw_rows, draw_step

from portakv import CopyPlan, KVView, LayoutError, SlotError, Unsupported
from portakv.core.plan import plan_words
from portakv.core.runs import list_runs, pointer_to
from portakv.plan.packing import PackPlan
from portakv.plan.plan import Loop, Nest, Side
from portakv.view.form import Form, KVRows, Step, Steps

Numbers = npt.NDArray[np.int64]
#: Forms, steps and units with their plan, word for word, or their refusal. The first lines were
#: written down from the planner in Python that the core replaced. Each draw that differs from what
#: the forms say becomes a line, once it is mended: its error prints the line without the plan.
CORPUS = Path(__file__).with_name("plans.jsonl")
#: The most bytes that a drawn copy moves.
MOST_BYTES = 1 << 13
#: A million draws were judged: benchmarks/results/house/drawn-plans-2026-12-01.json.
FEW = 1_500
MANY = 80_000


def walk(steps: Steps, numbers: Numbers) -> tuple[Numbers, Numbers]:
    """Return the table entry and the bytes of each of the positions that steps lead to."""
    left = numbers
    entries = np.zeros_like(left)
    places = np.zeros_like(left)
    for step in reversed(steps):
        digit = left % step.extent if step.extent else left
        left = left // step.extent if step.extent else left * 0
        entries += digit * step.table
        places += digit * step.stride
    return entries, places


def combine(*walks: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
    """Return the sums of every combination, the last walk innermost."""
    entries = places = np.zeros(1, dtype=np.int64)
    for more_entries, more_places in walks:
        entries = np.add.outer(entries, more_entries).reshape(-1)
        places = np.add.outer(places, more_places).reshape(-1)
    return entries, places


def counted(number: int) -> Numbers:
    return np.arange(number, dtype=np.int64)


class End(NamedTuple):
    """One side of a drawn copy.

    Attributes:
        step: tokens of an id; 0: the side has no ids.
        slots: the slot of each position, negative where an id skips it.
        room: tokens of the view.
    """

    form: Form
    step: int
    ids: Numbers
    offset: int
    slots: Numbers
    room: int


def places_of(form: Form, part: KVRows, width: int, slots: Numbers) -> tuple[Numbers, Numbers]:
    """Return the place of each byte of the tokens at these slots, in one part."""
    if form.opaque:
        tokens = walk(part.block, slots[:: form.block_size] // form.block_size)
    else:
        tokens = walk((*part.block, *part.token), slots)
    layers = walk(part.layer, counted(form.layers))
    heads = walk(part.head, counted(form.heads))
    entries, places = combine(tokens, layers, heads, walk(part.dim, counted(width)))
    return entries + part.table, places + part.offset


Moves = tuple[Numbers, Numbers, Numbers, Numbers]


def joined(moves: Sequence[Moves]) -> Moves:
    src_entries, src_places, dst_entries, dst_places = map(np.concatenate, zip(*moves, strict=True))
    return src_entries, src_places, dst_entries, dst_places


def expected(src: End, dst: End, moved: npt.NDArray[np.bool_]) -> Moves:
    """Return the moves of a copy by its forms: for each byte an entry and a place on each side."""
    parts = []
    for k, width in enumerate(src.form.widths):
        sides = [
            places_of(end.form, end.form.parts[k], width, end.slots[moved]) for end in (src, dst)
        ]
        parts.append((*sides[0], *sides[1]))
    return joined(parts)


def planned(nests: Sequence[Nest], src_units: Numbers, dst_units: Numbers) -> Moves:
    """Return the moves of units by the nests of a plan."""
    parts = []
    for nest in nests:
        bytes_of_run = np.zeros(nest.run, dtype=np.int64), counted(nest.run)
        sides = []
        for name, side, units in (("src", nest.src, src_units), ("dst", nest.dst, dst_units)):
            loops = [walk((step_of(loop, name),), counted(loop.extent)) for loop in nest.loops]
            entries, places = combine(walk(side.units, units), *loops, bytes_of_run)
            sides += [entries + side.table, places + side.offset]
        parts.append((sides[0], sides[1], sides[2], sides[3]))
    return joined(parts)


def step_of(loop: Loop, name: str) -> Step:
    return Step(loop.extent, getattr(loop, f"{name}_table"), getattr(loop, f"{name}_stride"))


def in_order(src: Numbers, dst: Numbers) -> Numbers:
    """Return a number for each pair of addresses, sorted.

    Equal moves have equal numbers, and two others only by a chance of 1 in 2^64.
    """
    mixed = src.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed += dst.astype(np.uint64)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.sort(mixed ^ mixed >> np.uint64(32)).view(np.int64)


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


# --- Units ---------------------------------------------------------------------------------------


def cuts(steps: Sequence[Step]) -> list[int]:
    """Return the positions after which the steps of an axis turn to a longer one."""
    return list(accumulate((step.extent for step in reversed(steps)), mul))


def divide(numbers: Sequence[int], others: Sequence[int]) -> bool:
    """Return True if of each number and each other one divides the other."""
    return all(a % b == 0 or b % a == 0 for a in numbers for b in others)


def token_cuts(form: Form, part: KVRows) -> list[int]:
    """Return the tokens after which a slot's place turns to a longer step."""
    if form.opaque:
        return [form.block_size]
    found = []
    below = 1
    inner: Step | None = None
    for step in reversed((*part.block, *part.token)):
        if step.extent == 1:
            continue
        if inner is not None:
            goes_on = inner.extent * inner.table, inner.extent * inner.stride
            if goes_on != (step.table, step.stride):
                found.append(below)
        below *= step.extent
        inner = step if step.extent else None
    return found


def most_together(src: Form, dst: Form, steps: tuple[int, int]) -> int:
    """Return the tokens that steps and blocks allow to move together; 0: any number."""
    blocks = [max(token_cuts(form, part), default=0) for form in (src, dst) for part in form.parts]
    return gcd(*steps, *blocks)


def possible(src: Form, dst: Form, unit: int) -> bool:
    """Return True if a plan can move so many tokens together."""
    if src.opaque and unit % src.block_size:
        return False
    for part, other in zip(src.parts, dst.parts, strict=True):
        pairs = [
            (cuts(getattr(part, x)), cuts(getattr(other, x))) for x in ("layer", "head", "dim")
        ]
        tokens = token_cuts(src, part), token_cuts(dst, other)
        if not all(divide(each, [unit]) for each in tokens):
            return False
        if not src.opaque:
            # The tokens inside of a unit lie in loops that both sides share.
            inside = [[cut for cut in each if cut < unit] for each in tokens]
            pairs.append((inside[0], inside[1]))
        if not all(divide(*pair) for pair in pairs):
            return False
    return True


def unit_of(src: Form, dst: Form, steps: tuple[int, int], unit: int | None) -> int | None:
    """Return the unit of the plan; None: there is no plan."""
    most = most_together(src, dst, steps)
    if unit is not None:
        return unit if unit > 0 and most % unit == 0 and possible(src, dst, unit) else None
    divisors = [n for n in range(1, max(most, 1) + 1) if max(most, 1) % n == 0]
    return max((n for n in divisors if possible(src, dst, n)), default=None)


# --- Draws ---------------------------------------------------------------------------------------


def draw_unit(random: Random, most: int) -> int | None:
    """Draw a unit: None, or one that usually divides the most tokens together."""
    if random.random() < 0.5:
        return None
    if random.random() < 0.15 or most == 0:
        return random.choice((1, 2, 3, 4, 5, 7, 8))
    return random.choice([n for n in range(1, most + 1) if most % n == 0])


def draw_end(random: Random, form: Form, step: int, count: int, unit: int, flat: bool) -> End:
    """Draw the ids of one side of a copy: negative and repeated ones, and now and then one that is
    past the end. ``flat``: positions may begin anywhere."""
    none = np.empty(0, dtype=np.int64)
    if not step:
        offset = random.choice((0, 0, unit, 3 * unit))
        if flat:
            offset += random.randrange(unit)
        room = -(-(offset + count) // unit) * unit + random.choice((0, unit))
        return End(form, 0, none, offset, counted(count) + offset, room)
    offset = random.choice((0, 0, unit, 3 * unit))
    number = -(-(offset + count) // step)
    last = number + random.choice((0, 1, 5))
    ids = [random.randrange(last) for _ in range(number)]
    if random.random() < 0.3:
        ids = random.sample(range(last), number)
    if random.random() < 0.4:
        ids = [-random.choice((1, 2, 1 << 40)) if random.random() < 0.3 else each for each in ids]
    if random.random() < 0.04:
        ids[random.randrange(number)] = last + random.choice((0, 1, 1 << 40, (1 << 63) - 1 - last))
    listed = np.array(ids, dtype=np.int64)
    positions = counted(count) + offset
    of_each = listed[positions // step]
    # An id of so many tokens that no slot has a number is past the end as well.
    within = np.minimum(of_each, last + 1) * step + positions % step
    return End(form, step, listed, offset, np.where(of_each < 0, -1, within), last * step)


def side_words(end: End, entries: int, base: int) -> tuple[tuple[int, ...], Numbers]:
    """Return a side as `list_runs` reads it, and the addresses of its table."""
    table = base + (counted(entries) * 7 % (entries if entries % 7 else 1 << 40) << 36)
    address = int(table[0]) if entries == 1 else pointer_to(table)
    ids = pointer_to(end.ids), 8 * (end.step > 0), len(end.ids), end.step or 1, end.offset
    return (address, entries, *ids, end.room), table


def check_runs(plan: CopyPlan, src: End, dst: End, moves: Moves | None, count: int) -> None:
    """Check that the runs of a copy are these moves; None: an id is past the end."""
    sides = []
    for end, at, base in ((src, 0, 1 << 24), (dst, 2, 1 << 62)):
        entries = 1 if moves is None else int(moves[at].max()) + 1
        sides.append(side_words(end, entries, base))
    (src_words, src_table), (dst_words, dst_table) = sides
    room = count // plan.unit * plan.runs_per_unit
    runs = list_runs(plan.words.buffer_info()[0], (*src_words, *dst_words, count), room)
    if moves is None:
        assert runs is None
        return
    assert runs is not None
    begins, targets, nbytes = runs
    within = counted(int(nbytes.sum())) - np.repeat(np.cumsum(nbytes) - nbytes, nbytes)
    read = np.repeat(begins, nbytes) + within
    written = np.repeat(targets, nbytes) + within
    src_at = src_table[moves[0]] + moves[1]
    dst_at = dst_table[moves[2]] + moves[3]
    assert np.array_equal(in_order(read, written), in_order(src_at, dst_at))


def check_plan(
    random: Random,
    src: Form,
    dst: Form,
    steps: tuple[int, int],
    unit: int | None,
    make: Callable[..., CopyPlan] = CopyPlan,
) -> bool:
    """Judge the plan of a copy, by drawn ids, or its refusal. Return True if it was made."""
    right = unit_of(src, dst, steps, unit)
    try:
        plan = make(src, dst, *steps, unit)
    except (Unsupported, SlotError):
        if right is not None:
            raise
        return False
    assert plan.unit == right
    assert plan.run == min(nest.run for nest in plan.nests)
    assert plan.vector == min(nest.vector for nest in plan.nests)
    assert plan.token_bytes == sum(nest.unit_bytes for nest in plan.nests) // plan.unit
    assert plan.runs_per_unit == sum(nest.unit_bytes // nest.run for nest in plan.nests)
    for nest in plan.nests:
        check_nest(nest, min(src.alignment, dst.alignment))

    unit_bytes = sum(nest.unit_bytes for nest in plan.nests)
    most = min(6, MOST_BYTES // unit_bytes)
    if most == 0:
        return True
    count = plan.unit * random.randint(1, most)
    ends = []
    for form, step, side in ((src, steps[0], "src"), (dst, steps[1], "dst")):
        ends.append(draw_end(random, form, step, count, plan.unit, not plan.aligned(side)))
    read, written = ends
    if any((end.slots >= end.room).any() for end in ends):
        check_runs(plan, read, written, None, count)
        return True
    moved = (read.slots >= 0) & (written.slots >= 0)
    if not moved.any():
        return True
    moves = expected(read, written, moved)
    check_runs(plan, read, written, moves, count)
    if all((end.offset % plan.unit == 0) for end in ends):
        first = moved[:: plan.unit]
        units = [end.slots[:: plan.unit][first] // plan.unit for end in ends]
        by_nests = planned(plan.nests, units[0], units[1])
        pairs = [(a << 36 | b, c << 36 | d) for a, b, c, d in (by_nests, moves)]
        assert np.array_equal(in_order(*pairs[0]), in_order(*pairs[1]))
    return True


def check_drawn(seed: int, cases: int, make: Callable[..., CopyPlan] = CopyPlan) -> None:
    """Judge drawn plans and refusals, which ``make`` returns and raises."""
    random = Random(seed)
    made = 0
    for _ in range(cases):
        rows = draw_rows(random)
        src = draw_form(random, rows)
        dst = draw_form(random, rows)
        steps = draw_step(random, src), draw_step(random, dst)
        unit = draw_unit(random, most_together(src, dst, steps))
        try:
            made += check_plan(random, src, dst, steps, unit, make)
        except Exception as error:
            case = {"src": form_words(src), "dst": form_words(dst), "steps": steps, "unit": unit}
            raise AssertionError(f"seed {seed}, for {CORPUS.name}: {json.dumps(case)}") from error
    assert made > cases // 2


def test_drawn_plans_move_every_byte_once() -> None:
    check_drawn(1, FEW)


def test_a_wrong_plan_or_refusal_is_found() -> None:
    """The control of the drawn plans: each of these faults ends a few hundred draws."""

    def misplaced(src: Form, dst: Form, own: int, other: int, unit: int | None) -> CopyPlan:
        plan = CopyPlan(src, dst, own, other, unit)
        plan.words[3] += 1 << 20  # the offset of the source's origin in the first nest
        return plan

    def finer(src: Form, dst: Form, own: int, other: int, unit: int | None) -> CopyPlan:
        return CopyPlan(src, dst, own, other, unit or 1)

    def refused(src: Form, dst: Form, own: int, other: int, unit: int | None) -> CopyPlan:
        plan = CopyPlan(src, dst, own, other, unit)
        if plan.unit == 1:
            raise Unsupported("Moving single tokens", "this is a control")
        return plan

    for fault in (misplaced, finer, refused):
        with pytest.raises(AssertionError, match=r"seed 1, for plans\.jsonl"):
            check_drawn(1, 300, fault)


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


def form_words(form: Form) -> list[int]:
    """Return the words of `form_of`."""
    words = [len(form.parts), form.layers, form.heads, form.block_size, form.opaque]
    words += [form.alignment, *form.widths]
    for part in form.parts:
        words += [part.table, part.offset]
        for axis in (part.layer, part.block, part.token, part.head, part.dim):
            words += [len(axis), *(number for step in axis for number in astuple(step))]
    return [int(word) for word in words]


def words_of(plan: CopyPlan) -> list[int]:
    return [int(word) for word in plan.words]


CASES = [json.loads(line) for line in CORPUS.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_the_corpus(case: dict[str, Any]) -> None:
    """Plans are equal word for word, refusals by their whole sentence, and both are right."""
    src = form_of(case["src"])
    dst = form_of(case["dst"])
    own, other = case["steps"]
    for seed in range(4):
        assert check_plan(Random(seed), src, dst, (own, other), case["unit"]) == ("plan" in case)
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
