# SPDX-License-Identifier: Apache-2.0
"""Pinned memory for backends of the host, which reach it as they reach any other.

Torch pins only where it knows an accelerator, and a backend of the host is judged anywhere; so
views say here that their memory is pinned. To the host it is memory like any other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from portakv import CopyPlan, KVView, Unsupported
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.by_hand import Shape, Workshop
from portakv_conformance.judge.claims import not_claimed
from portakv_conformance.judge.judging import Judge, index_of, view_of
from portakv_conformance.judge.subject import Subject

pytestmark = [
    pytest.mark.area("claims"), pytest.mark.claim("places"), pytest.mark.needs("host"),
]  # fmt: skip

DIRECTIONS = ("gather", "scatter")
SHAPE = Shape()
PAIRS = [("pinned", "pinned"), ("pinned", "pageable"), ("pageable", "pinned")]


def lying(side: Side, place: str) -> KVView:
    """The view of a side, said to lie in a place of the host."""
    view = view_of(side)
    view.form = replace(view.form, place=place)
    return view


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pinned_memory_on_the_host(
    request: pytest.FixtureRequest, subject: Subject, judge: Judge, home: Workshop,
    pair: tuple[str, str], direction: str,
) -> None:  # fmt: skip
    """A backend of the host copies to and from pinned memory where it claims to, and refuses a
    plan of it where it does not."""
    case = home.move(direction, SHAPE, home.shuffled(SHAPE.slots, 9))
    src, dst = lying(case.src, pair[0]), lying(case.dst, pair[1])
    refusal = refused(subject, case, src, dst)
    way = f"from {pair[0]} to {pair[1]} memory"
    if pair in subject.can.places:
        assert refusal is None, (
            f"It claims by 'places' that it copies {way}, and refuses a plan of that: {refusal}"
        )
        launch_only(judge, case, src, dst)
    else:
        not_claimed(request, "places", f"it does not copy {way}.")
        assert refusal is not None, f"It prepares a plan that it does not claim: {way}."
    fresh = home.move(direction, SHAPE, home.shuffled(SHAPE.slots, 9))
    views = lying(fresh.src, pair[0]), lying(fresh.dst, pair[1])
    asked = (*views, index_of(fresh.src), index_of(fresh.dst))
    judge.judge(
        fresh,
        lambda: judge.finish(subject.copy(*asked, count=fresh.count)),
        lambda: judge.why_declined(*asked),
    )


def refused(subject: Subject, case: Case, src: KVView, dst: KVView) -> Unsupported | None:
    """Why ``check`` or ``prepare`` refuses the plan between two views, or None."""
    steps = index_of(case.src).plan_step, index_of(case.dst).plan_step
    try:
        subject.prepare(CopyPlan(src.form, dst.form, *steps))
    except Unsupported as refusal:
        return refusal
    return None


def launch_only(judge: Judge, case: Case, src: KVView, dst: KVView) -> None:
    """Judge the launch of a case alone; what is claimed may not be refused."""

    def carry() -> None:
        given = index_of(case.src), index_of(case.dst)
        pending = judge.subject.launch(src, dst, *given, case.count)
        if pending is not None:
            pending.wait()

    judge.judge(case, carry, lambda: None)
