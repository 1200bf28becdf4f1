# SPDX-License-Identifier: Apache-2.0
"""Claims, both ways: what `Capabilities` claims is tested on ``prepare`` and the launch directly,
where nothing of the library helps; what it does not claim is refused, every output untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import Unsupported
from portakv.backends.base import refusal
from portakv.view.form import PLACES
from portakv_conformance.cases import BOTH, Bench, Case, Shape, Subject, plan_of
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.draw.by_hand import on_host
from portakv_conformance.judge.judging import takes

pytestmark = pytest.mark.area("claims")

SHAPE = Shape()


def test_claims_make_sense(subject: Subject) -> None:
    """Every field of the claims has a valid value, and the same value at each call."""
    can = subject.can
    for name in ("places", "index_dtypes", "encodings"):
        kind = type(getattr(can, name))
        assert kind is frozenset, f"{name} is a {kind.__name__}; expected a frozenset."
    assert can.places, "places is empty: it claims to copy from nowhere to nowhere."
    assert all(a in PLACES and b in PLACES for a, b in can.places), f"places is {can.places}."
    assert can.index_on in ("host", "device"), f"index_on is {can.index_on!r}."
    assert can.index_dtypes, "index_dtypes is empty: it claims to read no ids."
    assert can.index_dtypes <= {torch.int32, torch.int64}, f"index_dtypes is {can.index_dtypes}."
    assert can.encodings <= {"pack"}, f"encodings is {can.encodings}."
    vectors = type(can.alignment) is int and can.alignment in (1, 2, 4, 8, 16)
    assert vectors, f"alignment is {can.alignment!r}: no vector has it."
    loops = can.max_loops
    assert loops is None or (type(loops) is int and loops >= 0), f"max_loops is {loops!r}."
    for name in ("skips_negative", "guards", "tables", "capturable", "threads"):
        assert type(getattr(can, name)) is bool, f"{name} is {getattr(can, name)!r}."
    for _ in range(2):  # also if it alternates
        assert subject.backend.capabilities() == can, (
            "A second call of capabilities() returned other claims."
        )


_PAIRS = [
    pytest.param(pair, marks=pytest.mark.needs("accelerator" if "device" in pair else "host"))
    for pair in (
        ("pageable", "pageable"),
        ("device", "device"),
        ("device", "pinned"),
        ("pinned", "device"),
        ("device", "pageable"),
        ("pageable", "device"),
    )
]


@pytest.mark.claim("places")
@BOTH
@pytest.mark.parametrize("pair", _PAIRS, ids="-".join)
def test_places(bench: Bench, pair: tuple[str, str], direction: str) -> None:
    """It copies between the places that it claims, and refuses plans between others."""
    case = bench.some(direction, SHAPE, 9)
    route = f"from {pair[0]} to {pair[1]} memory"
    src, dst = (
        side if place == "device" else on_host(side, place == "pinned")
        for place, side in zip(pair, (case.src, case.dst), strict=True)
    )
    case = Case(src, dst, case.count)
    if pair in bench.subject.can.places:
        bench.judge.claimed(case, "places", f"copies {route}")
        return
    bench.judge.not_claimed("places", f"it does not copy {route}.")
    plan = plan_of(case)
    try:
        bench.subject.prepare(plan)
    except Unsupported:
        bench.copy(case)  # the library stages it, or the backend is refused
        return
    raise AssertionError(f"It prepares a plan that it does not claim:\n{plan}")


@pytest.mark.claim("index_on")
def test_ids_are_read_where_claimed(bench: Bench, direction: str) -> None:
    """The launch reads ids where it claims to, also on both sides."""
    for step in (1, SHAPE.block_size):
        ids = bench.judge.ids(bench.shuffled(SHAPE.slots // step, 5))
        case = bench.move(direction, SHAPE, ids, step=step)
        bench.judge.claimed(case, "index_on", f"reads ids on the {bench.subject.can.index_on}")
    _within_one_cache(bench, (None, None), "index_on", "reads ids of both sides")


def _within_one_cache(bench: Bench, dtypes: tuple[Any, Any], field: str, what: str) -> None:
    """Judge a copy within one cache, which a backend may decline whatever it claims of ids."""
    slots = bench.shuffled(SHAPE.slots, 12)
    src, dst = (bench.judge.ids(slots[n : n + 6], dtypes[n // 6]) for n in (0, 6))
    case = bench.within(SHAPE, src, dst)
    if takes(bench.subject, case):
        bench.judge.claimed(case, field, what)
    else:
        bench.copy(case)


@pytest.mark.claim("index_dtypes")
@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_ids_are_read_in_the_claimed_dtypes(bench: Bench, dtype: Any, direction: str) -> None:
    """The launch reads ids of each dtype that it claims, also where the sides' dtypes differ."""
    if dtype not in bench.subject.can.index_dtypes:
        bench.judge.not_claimed("index_dtypes", f"ids of {dtype} are converted before the launch.")
        bench.copy(bench.move(direction, SHAPE, torch.tensor([3, 0, 9], dtype=dtype)))
        return
    ids = bench.judge.ids(bench.shuffled(SHAPE.slots, 9), dtype)
    bench.judge.claimed(bench.move(direction, SHAPE, ids), "index_dtypes", f"reads ids of {dtype}")
    for other in bench.subject.can.index_dtypes:
        _within_one_cache(
            bench, (dtype, other), "index_dtypes", f"reads {dtype} together with {other}"
        )


@pytest.mark.claim("skips_negative")
@BOTH
@pytest.mark.parametrize("step", [1, 4])
def test_negative_ids_reach_the_launch(bench: Bench, step: int, direction: str) -> None:
    """A launch that claims to skip negative ids moves nothing for any negative number."""
    if not bench.judge.claims("skips_negative", "negative ids are removed before the launch."):
        bench.copy(bench.move(direction, SHAPE, [-1, 3, -1], step=step))
        return
    for dtype in bench.subject.can.index_dtypes:
        least = torch.iinfo(dtype).min
        for ids in ([-1, 3, 0], [3, 0, -1], [-1, -1], [-7, 2, least, 5], [least // 4, 1, -(2**20)]):
            case = bench.move(direction, SHAPE, bench.judge.ids(ids, dtype), step=step)
            bench.judge.claimed(case, "skips_negative", "skips negative ids")


@pytest.mark.claim("guards")
@BOTH
@pytest.mark.parametrize("step", [1, 4])
def test_bad_ids_are_guarded(bench: Bench, step: int, direction: str) -> None:
    """A launch that guards moves nothing for an id past the end, moves all others, and writes the
    position + 1 of a bad id to the status word, if it is given one."""
    if not bench.judge.claims("guards", "bad ids are found before the launch."):
        return
    past = SHAPE.slots // step
    lists = [[1, past, 3], [past, 2], [0, 4, past], [1, past, 3, past], [4, 2, 0]]
    for dtype in bench.subject.can.index_dtypes:
        wild = [past + 1, 2**31 - 1]
        wild += [2**31, 2**32 + 1, 2**40, 2**61, 2**62, 2**63 - 1] if dtype == torch.int64 else []
        for number, ids in enumerate([lists[0], *([1, bad, 3] for bad in wild), *lists]):
            case = bench.move(direction, SHAPE, bench.judge.ids(ids, dtype), step=step)
            bench.judge.guarded(case, word=number > 0)


@pytest.mark.claim("alignment")
@BOTH
@pytest.mark.parametrize("vector", [1, 2, 4, 8, 16])
def test_alignment(bench: Bench, vector: int, direction: str) -> None:
    """It takes rows that are aligned as it claims and no better, and refuses any less."""
    for how in ({"shift": vector}, {"pads": {4: vector}}, {"pads": {2: vector}}):
        as_bytes: Keywords = {"dtype": torch.uint8, **how}
        case = bench.some(direction, Shape(widths=(64, 64)), 9, **as_bytes)
        plan = plan_of(case)
        assert plan.vector >= min(vector, 16), f"The suite's plan has vector {plan.vector}."
        if plan.vector < bench.subject.can.alignment:
            bench.judge.refused(case)
        # Padding may need more loops than it claims; an offset in the storage never does.
        elif "shift" in how or refusal(bench.subject.can, plan) is None:
            bench.judge.claimed(case, "alignment", f"takes rows at multiples of {plan.vector} B")


#: For each number of strided loops in a plan, the extents (layers, kv, heads, tokens) that make it.
_LOOPS = {0: (1, 1, 1, 1), 1: (1, 1, 2, 1), 2: (1, 2, 2, 1), 3: (3, 2, 2, 1), 4: (3, 2, 2, 4)}


@pytest.mark.claim("max_loops")
@BOTH
@pytest.mark.parametrize("loops", _LOOPS)
def test_max_loops(bench: Bench, loops: int, direction: str) -> None:
    """It takes nests of as many strided loops as it claims, and refuses deeper ones."""
    layers, kv, heads, step = _LOOPS[loops]
    shape = Shape(layers=layers, heads=heads, widths=(32,) * kv)
    # No two loops can be merged: every place is padded, by multiples of the widest vector.
    places = len(bench.paged.rpartition("|")[2].split())
    pads = {place: 8 * place for place in range(1, places)}
    case = bench.some(direction, shape, 3, step=step, pads=pads)
    plan = plan_of(case)
    assert max(len(nest.loops) for nest in plan.nests) == loops, str(plan)
    most = bench.subject.can.max_loops
    if most is None or loops <= most:
        bench.judge.claimed(case, "max_loops", f"takes {loops} strided loops")
    else:
        bench.judge.refused(case)


@pytest.mark.claim("tables")
def test_tables(bench: Bench, direction: str) -> None:
    """It takes planes in separate allocations, at new addresses in each call; or refuses them."""
    shape = Shape(layers=5)
    retained = []
    # Blocks as a list need a table and no loop, where the base layout has no list.
    layout = bench.paged if "|" in bench.paged else bench.paged.replace("block", "block |", 1)
    grain = max(1, bench.subject.can.alignment // 2)
    for number in range(3):
        how: Keywords = {"layout": layout, "place": "scattered", "grain": grain}
        case = bench.other(number).some(direction, shape, 9, **how)
        retained.append(case)
        assert plan_of(case).tabled, "The suite's plan needs no table."
        if bench.subject.can.tables:
            bench.judge.claimed(case, "tables", "takes planes at the addresses of a table")
        else:
            bench.judge.refused(case)
    launches: dict[Any, Any] = {}
    for case in retained if bench.subject.can.tables else ():
        # One prepared launch serves views of one form at any addresses.
        plan = plan_of(case)
        key = (plan.src, plan.dst)
        launches[key] = launches.get(key) or bench.subject.prepare(plan)
        bench.judge.judge(case, bench.judge.launch_to_the_end(case, launches[key]), lambda: None)


@pytest.mark.claim("threads")
def test_threads(bench: Bench) -> None:
    """Several threads may call one launch concurrently; concurrent copies are always allowed."""
    shape = Shape(layers=3)
    able = bench.judge.claims("threads", "the library lets one thread at a time into a launch.")
    launch = None
    for turn in range(20 if able else 8):
        # Fresh destinations each time: a call that is lost is not made good by the next.
        cases = [bench.other(10 * turn + n).some("gather", shape, 9) for n in range(4)]
        plans = [plan_of(case) for case in cases]
        assert len({(plan.src, plan.dst) for plan in plans}) == 1
        if able and launch is None:
            launch = bench.subject.prepare(plans[0])
        bench.judge.at_once(cases, launch)
