# SPDX-License-Identifier: Apache-2.0
"""Claims: marks that say what a case judges, and what happens where a backend does not claim it.

A field of `Capabilities` that is claimed is tested. One that is not claimed ends as the status
``not-claimed``, after the case has seen, where a plan can show it, that the backend refuses.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from portakv import CopyPlan, PortaKVError, Unsupported
from portakv.backends.base import Launch
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.judge.judging import Judge, asked_of, changed
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.subject import Subject

AREAS = (
    "core", "corners", "safety", "claims", "metamorphic", "ordering", "capture", "stateful",
    "drawn",
)  # fmt: skip
#: A case of the profile ``full`` only.
full = pytest.mark.profile("full")


def claimed(judge: Judge, case: Case, field: str, what: str) -> None:
    """Judge a case by the launch alone; a plan within the claims may not be refused.

    The case is in the layout that the backend is judged in, and within all of its other claims.
    """
    assert judge.launch(case), (
        f"It claims by {field!r} that it {what}, and refuses a plan of that: {judge.declined[-1]}."
    )


def plan_of(case: Case) -> CopyPlan:
    """The plan of a case, in the largest unit that both sides allow."""
    src, dst, mine, theirs = asked_of(case)
    return CopyPlan(src.form, dst.form, mine.plan_step, theirs.plan_step)


def launch_of(subject: Subject, case: Case, launch: Any = None) -> Callable[..., Any]:
    """A launch, prepared for a case or given, with all that it is called for but the stream and
    the status word; ids and tables of addresses are where it reads them."""
    src, dst, mine, theirs = asked_of(case)
    launch = launch or subject.prepare(plan_of(case))
    _ = [view.table for view in (src, dst)]  # a copy from the host, on the current stream
    return partial(launch, src, dst, subject.place(mine), subject.place(theirs), case.count)


def landing(judge: Judge, launch: Callable[..., Any]) -> Callable[[], None]:
    """A call of `launch_of`, carried out to its end."""
    return lambda: judge.land(launch(None, None))


def check_refused(judge: Judge, case: Case, error: type[PortaKVError] = Unsupported) -> None:
    """The forced backend must raise ``error`` for this case, with every output untouched.

    Where that is another than `Unsupported`, the backend may decline the case instead.
    """
    asked = asked_of(case)
    before = Memory.snapshot(case.src.tensors, case.dst.tensors)
    rule, advice = "What is not claimed must raise Unsupported", "Claim it, or refuse it. "
    if error is not Unsupported:
        rule, advice = f"This copy must raise {error.__name__}", ""
    try:
        judge.finish(judge.subject.copy(*asked, count=case.count))
    except (error, Unsupported) as found:
        judge.facility.synchronize()
        wrong = changed(before, [case.src.tensors, case.dst.tensors])
        name = type(found).__name__
        assert wrong is None, f"The copy was refused as {name}, but {wrong}. The case was {case!r}."
        if error is not Unsupported and isinstance(found, Unsupported):
            judge.may_decline(found, *asked)
        else:
            judge.examples += error is not Unsupported
        return
    except Exception as other:
        raise AssertionError(
            f"{rule}; {type(other).__name__} was raised: {other} The case was {case!r}."
        ) from other
    raise AssertionError(
        f"{rule}; the copy returned as if it were carried out. {advice}The case was {case!r}."
    )


def without_bad(case: Case) -> Case:
    """The copy that is left of a case: ids past the end, of either side, are padding."""
    made = Case(replace(case.src), replace(case.dst), case.count)
    for side in (made.src, made.dst):
        if side.ids is not None:
            ids = side.ids.cpu().long()
            side.ids = torch.where(ids >= side.slots // side.step, -1, ids)
    return made


def check_guarded(judge: Judge, case: Case, *, word: bool = True) -> None:
    """Launch a case with ids past the end: the bytes are as if those were padding, and the status
    word, if it is given one, tells the position + 1 of one of them."""
    expected = without_bad(case).expected()
    status = torch.zeros(1, dtype=torch.int64)
    status = status.pin_memory() if judge.facility.streams else status
    judge.launch_only(case, status if word else None)
    judge.check(expected, case)
    wanted, lists = set(), []
    for side in (case.src, case.dst):
        if side.ids is not None:
            ids, end = side.ids.tolist(), side.slots // side.step
            lists.append(f"{ids} of {side.step} tokens, of which those from {end} on are bad")
            at = range(case.count)
            wanted |= {p + 1 for p in at if ids[(p + side.offset) // side.step] >= end}
    told = int(status[0])
    assert not word or told in (wanted or {0}), (
        f"The status word holds {told} for ids {' and '.join(lists)}; expected the position + 1 of "
        f"a bad one, or 0 where none is. The case was {case!r}."
    )


def check_at_once(
    judge: Judge, cases: Sequence[Case], launch: Launch | None, times: int = 1
) -> None:
    """Judge calls of one launch, or copies as a user gets them, each from a thread of its own."""
    expected = [case.expected() for case in cases]
    works: list[Callable[[], object]] = []
    for case in cases:
        copy = partial(judge.subject.copy, *asked_of(case))
        user = partial(lambda copy: judge.finish(copy()), copy)
        works.append(landing(judge, launch_of(judge.subject, case, launch)) if launch else user)
    judge.facility.synchronize()
    at_once(works, times)
    for case, wanted in zip(cases, expected, strict=True):
        judge.check(wanted, case, f"Called from {len(cases)} threads at once: ")


def at_once(works: Sequence[Callable[[], object]], times: int = 1) -> None:
    """Run each in a thread of its own, again and again, from one moment on; AssertionError where
    one of them raised."""
    gate = threading.Barrier(len(works))

    def again(work: Callable[[], object]) -> None:
        gate.wait()
        for _ in range(times):
            work()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads interleave within a launch
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            faults = [ended.exception() for ended in [pool.submit(again, work) for work in works]]
    finally:
        sys.setswitchinterval(interval)
    for fault in filter(None, faults):
        raise AssertionError(
            f"Called from {len(works)} threads, {type(fault).__name__} was raised: {fault}"
        ) from fault
