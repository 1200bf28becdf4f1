# SPDX-License-Identifier: Apache-2.0
"""Which copy to blame where only a relation between several of them shows that one was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.saved import dump, load
from portakv_conformance.judge.judging import Judge


@contextmanager
def blaming(judge: Judge, *suspects: Case) -> Iterator[None]:
    """Where what is inside fails, keep the first of ``suspects`` that fails on its own as the
    judge's failing case; none where each passes on its own."""
    try:
        yield
    except Exception as fault:
        judge.fault = judge.fault or str(fault)
        judge.direct = False
        judge.failing = next((case for case in suspects if _fails_alone(judge, case)), None)
        raise


def _fails_alone(judge: Judge, case: Case) -> bool:
    """Whether a case fails with fresh tensors and nothing before it."""
    try:
        fresh, _ = load(dump(case))
    except ValueError:  # tensors that no arrangement describes
        return False
    try:
        Judge(judge.subject, judge.facility, judge.seed).copy(fresh)
    except AssertionError:
        return True
    return False
