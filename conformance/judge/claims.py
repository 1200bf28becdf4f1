# SPDX-License-Identifier: Apache-2.0
"""Claims: marks that say what a case judges, and what happens where a backend does not claim it.

A field of `Capabilities` that is claimed is tested. One that is not claimed ends as the status
``not-claimed``, after the case has seen, where a plan can show it, that the backend refuses.
"""

from __future__ import annotations

import pytest

from portakv import CopyPlan, Unsupported
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.judge.judging import Judge, changed, index_of, view_of
from portakv_conformance.judge.memory import Memory

AREAS = (
    "core", "corners", "safety", "claims", "metamorphic", "ordering", "capture", "stateful",
    "drawn",
)  # fmt: skip
NOT_CLAIMED = pytest.StashKey[str]()

#: A case of the profile ``full`` only.
full = pytest.mark.profile("full")


def not_claimed(request: pytest.FixtureRequest, field: str, reason: str) -> None:
    """Let this case end as ``not-claimed``, unless it fails: the backend does not claim ``field``.

    The case goes on, and returns by itself.
    """
    request.node.stash[NOT_CLAIMED] = f"{field} is not claimed: {reason}"


def claimed(judge: Judge, case: Case, field: str, what: str) -> None:
    """Judge a case by the launch alone; a plan within the claims may not be refused.

    The case is in the layout that the backend is judged in, and within all of its other claims.
    """
    assert judge.launch(case), (
        f"It claims by {field!r} that it {what}, and refuses a plan of that: {judge.declined[-1]}."
    )


def plan_of(case: Case) -> CopyPlan:
    """The plan of a case, in the largest unit that both sides allow."""
    src, dst = view_of(case.src), view_of(case.dst)
    return CopyPlan(src.form, dst.form, index_of(case.src).plan_step, index_of(case.dst).plan_step)


def check_refused(judge: Judge, case: Case) -> None:
    """The forced backend must raise `Unsupported` for this case, with every output untouched."""
    src, dst = view_of(case.src), view_of(case.dst)
    before = Memory.snapshot(case.src.tensors, case.dst.tensors)
    try:
        judge.finish(
            judge.subject.copy(src, dst, index_of(case.src), index_of(case.dst), count=case.count)
        )
    except Unsupported:
        judge.facility.synchronize()
        wrong = changed(before, [case.src.tensors, case.dst.tensors])
        assert wrong is None, f"The copy was refused as Unsupported, but {wrong}."
        return
    except Exception as error:
        raise AssertionError(
            f"What is not claimed must raise Unsupported; {type(error).__name__} was raised: "
            f"{error} The case was {case!r}."
        ) from error
    raise AssertionError(
        f"What is not claimed must raise Unsupported; the copy returned as if it were carried "
        f"out. Claim it, or refuse it. The case was {case!r}."
    )
