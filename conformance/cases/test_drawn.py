# SPDX-License-Identifier: Apache-2.0
"""Random structures, drawn by hypothesis by the run's seed, ``--fuzz N`` in each
case, and judged by the oracle. A failing one is shrunken and saved, see `draw.saved`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portakv_conformance.cases import Judge
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.draw.strategies import all_cases, cases, migrations, page_cases
from portakv_conformance.judge.judging import ENDS

pytestmark = pytest.mark.area("drawn")

#: A drawn case as two, which take even times and can be judged at the same time.
in_two = pytest.mark.parametrize("part", range(2))


def places(judge: Judge, data: st.DataObject) -> Keywords:
    """Return options of the strategies: tensors on the device, ids there or on the host."""
    device = str(judge.subject.device)
    ids_on = data.draw(st.sampled_from((device, "cpu"))) if device != "cpu" else device
    return {"device": device, "ids_on": ids_on}


@pytest.mark.parametrize("part", range(6))
@given(data=st.data())
def test_any_copy(judge: Judge, part: int, data: st.DataObject) -> None:
    """Whatever the layouts, strides, ids and steps: the addressed rows move, and nothing else."""
    judge.copy(data.draw(all_cases(**places(judge, data))))


@in_two
@given(data=st.data())
def test_copies_between_two_sides(judge: Judge, part: int, data: st.DataObject) -> None:
    """Token-exact copies between any two layouts, waited for in any way."""
    case = data.draw(cases(**places(judge, data)))
    judge.copy(case, end=data.draw(st.sampled_from(ENDS)))


@in_two
@given(data=st.data())
def test_migrations(judge: Judge, part: int, data: st.DataObject) -> None:
    """Copies within one cache, between rows that do not meet."""
    judge.copy(data.draw(migrations(**places(judge, data))))


@in_two
@given(data=st.data())
def test_pages(judge: Judge, part: int, data: st.DataObject) -> None:
    """Whole opaque blocks between any two page layouts."""
    judge.copy(data.draw(page_cases(**places(judge, data))))


@in_two
@given(data=st.data())
def test_launches(judge: Judge, part: int, data: st.DataObject) -> None:
    """The launch that `prepare` returns moves the rows alone, with ids where the backend claims
    them."""
    holes = judge.subject.can.skips_negative
    judge.launch(data.draw(cases(**places(judge, data), holes=holes)))
