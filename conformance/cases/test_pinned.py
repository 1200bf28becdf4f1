# SPDX-License-Identifier: Apache-2.0
"""Pinned memory for backends of the host, which reach it as they reach any other. Torch pins only
if it knows an accelerator; so views say here that their memory is pinned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from portakv import CopyPlan, Unsupported
from portakv_conformance.cases import BOTH, Bench, Case, Shape, asked_of
from portakv_conformance.judge.judging import Asked

pytestmark = [
    pytest.mark.area("claims"),
    pytest.mark.claim("places"),
    pytest.mark.needs("host"),
]

SHAPE = Shape()
PAIRS = [("pinned", "pinned"), ("pinned", "pageable"), ("pageable", "pinned")]


def made(home: Bench, direction: str, pair: tuple[str, str]) -> tuple[Case, Asked]:
    """A case, and what it is asked for with views that are said to lie in a pair of places."""
    case = home.some(direction, SHAPE, 9)
    asked = asked_of(case)
    for view, place in zip(asked[:2], pair, strict=True):
        view.form = replace(view.form, place=place)
    return case, asked


@BOTH
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pinned_memory_on_the_host(home: Bench, pair: tuple[str, str], direction: str) -> None:
    """A backend of the host copies pinned memory if it claims to, and refuses it if not."""
    case, asked = made(home, direction, pair)
    src, dst, mine, theirs = asked
    refusal = None
    way = f"from {pair[0]} to {pair[1]} memory"
    try:
        home.subject.prepare(CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step))
    except Unsupported as error:
        refusal = error
    if pair in home.subject.can.places:
        told = f"It claims by 'places' that it copies {way}, and refuses a plan of that: {refusal}"
        assert refusal is None, told
        launched = partial(home.subject.launch, *asked, case.count)
        home.judge.judge(case, lambda: home.judge.land(launched()), lambda: None)
    else:
        home.judge.not_claimed("places", f"it does not copy {way}.")
        assert refusal is not None, f"It prepares a plan that it does not claim: {way}."
    fresh, again = made(home, direction, pair)
    home.judge.call(fresh, lambda: home.subject.copy(*again, count=fresh.count), asked=again)
