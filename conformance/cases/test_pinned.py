# SPDX-License-Identifier: Apache-2.0
"""Pinned memory for backends of the host, which reach it as they reach any other. Torch pins only
if it knows an accelerator; so views say here that their memory is pinned."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from portakv import CopyPlan, Unsupported
from portakv_conformance.cases import BOTH, Bench, Case, Shape, arguments_of
from portakv_conformance.judge.judging import Arguments

pytestmark = [
    pytest.mark.area("claims"),
    pytest.mark.claim("places"),
    pytest.mark.needs("host"),
]

SHAPE = Shape()
PAIRS = [("pinned", "pinned"), ("pinned", "pageable"), ("pageable", "pinned")]


def made(bench: Bench, direction: str, pair: tuple[str, str]) -> tuple[Case, Arguments]:
    """Return a case, and its arguments with views that claim to lie in a pair of places."""
    case = bench.some(direction, SHAPE, 9)
    arguments = arguments_of(case)
    for view, place in zip(arguments[:2], pair, strict=True):
        view.form = replace(view.form, place=place)
    return case, arguments


@BOTH
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pinned_memory_on_the_host(bench: Bench, pair: tuple[str, str], direction: str) -> None:
    """A backend of the host copies pinned memory if it claims to, and refuses it if not."""
    case, arguments = made(bench, direction, pair)
    src, dst, own, other = arguments
    refusal = None
    route = f"from {pair[0]} to {pair[1]} memory"
    try:
        bench.subject.prepare(CopyPlan(src.form, dst.form, own.plan_step, other.plan_step))
    except Unsupported as error:
        refusal = error
    if pair in bench.subject.can.places:
        message = (
            f"It claims by 'places' that it copies {route}, and refuses a plan of that: {refusal}"
        )
        assert refusal is None, message
        launched = partial(bench.subject.launch, *arguments, case.count)
        bench.judge.judge(case, lambda: bench.judge.land(launched()), lambda: None)
    else:
        bench.judge.not_claimed("places", f"it does not copy {route}.")
        assert refusal is not None, f"It prepares a plan that it does not claim: {route}."
    fresh, again = made(bench, direction, pair)
    bench.judge.call(fresh, lambda: bench.subject.copy(*again, count=fresh.count), arguments=again)
