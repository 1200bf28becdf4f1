# SPDX-License-Identifier: Apache-2.0
"""The judge: carries a case out on the subject and compares every byte with the oracle's.

A backend may decline a plan (`Unsupported`, by its claims, its ``check`` or its ``prepare``); then
not one byte may have changed. Any other error, and any wrong byte, is a failure. A field of
`Capabilities` that is claimed is tested. One that is not ends as the status ``not-claimed``, after
the case has seen, if a plan can show it, that the backend refuses.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from math import gcd
from typing import Any

import torch

from portakv import CopyPlan, Index, KVView, PortaKVError, Transfer, Unsupported
from portakv.backends.base import Launch, Pending
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.by_hand import DIRECTIONS, Shape, Workshop
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import Expected, compare
from portakv_conformance.judge.subject import Subject

#: How the end of a transfer may be waited for.
ENDS = ("synchronize", "done", "wait")
_PATIENCE = 60.0  # seconds until a transfer that never reports its end is given up
_RULE = ". A backend raises Unsupported in prepare, or nothing."
_NO_REASON = "The backend's check and prepare take this plan, and the copy raised Unsupported:"
#: The oracle's text for a byte that was never written, which the simulated device filled in.
_EMULATED_POISON = "holds 0xdb, which is of unknown origin"

Arguments = tuple[KVView, KVView, Index, Index]
Why = Callable[[], str | None]


def view_of(side: Side) -> KVView:
    """Return the view of one side."""
    return KVView(side.tensors, side.layout, reinterpret=side.reinterpret, **side.extents)


def index_of(side: Side) -> Index:
    """Return the index of one side."""
    return Index(side.ids, step=side.step, offset=side.offset)


def arguments_of(case: Case) -> Arguments:
    """Return the arguments of a case's copy: views and indices of source and destination."""
    return view_of(case.src), view_of(case.dst), index_of(case.src), index_of(case.dst)


def plan_of(case: Case) -> CopyPlan:
    """Return the plan of a case, in the largest unit that both sides allow."""
    src, dst, own, other = arguments_of(case)
    return CopyPlan(src.form, dst.form, own.plan_step, other.plan_step)


class Judge:
    """Judges the copies of one test; ``seed`` is that of its patterns and choices."""

    def __init__(self, subject: Subject, facility: Facility, seed: int) -> None:
        self.subject = subject
        self.facility = facility
        self.seed = seed
        self.examples = 0  # copies that were carried out and judged
        self.declined: list[str] = []  # why copies were not carried out, a sentence each
        self.unclaimed = ""  # what the backend does not claim of this test, a sentence
        self.failing: Case | None = None  # that failed last; hypothesis ends with the smallest
        self.direct = False  # it failed by the launch alone, without the library around it
        self.end = ENDS[0]  # how its end was waited for, one of `ENDS`
        # What was wrong first, a sentence; what was wrong once may be right when repeated.
        self.fault = ""

    def not_claimed(self, field: str, reason: str) -> None:
        """Let this test end as ``not-claimed``, unless it fails: the backend does not claim
        ``field``. The test goes on, and returns by itself."""
        self.unclaimed = f"{field} is not claimed: {reason}"

    def claims(self, field: str, otherwise: str) -> bool:
        """Return True if ``field`` is claimed; otherwise the test ends as `not_claimed`."""
        if not getattr(self.subject.can, field):
            self.not_claimed(field, otherwise)
            return False
        return True

    def ids(self, ids: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return ids where the backend claims to read them, by default in a claimed dtype."""
        can = self.subject.can
        listed = torch.tensor(ids, dtype=dtype or next(iter(can.index_dtypes)))
        return listed.to(can.home_of_ids(self.subject.device))

    def start(self, case: Case, **how: object) -> Transfer:
        """Begin a case as a user gets it."""
        return self.subject.copy(*arguments_of(case), count=case.count, **how)

    def copy(self, case: Case, *, end: str = "synchronize") -> bool:
        """Judge a case as a user gets it; return False if the backend declines it, as it may."""
        return self.call(case, partial(self.start, case), end=end)

    def call(
        self,
        case: Case,
        start: Callable[[], Transfer],
        *,
        arguments: Arguments | None = None,
        end: str = "synchronize",
    ) -> bool:
        """Judge a call that starts a transfer as the copy that it must be; return False where
        declined.

        ``arguments`` are those of the backend's copy, if it moves more than the case.
        """
        self.direct = False
        self.end = end
        why = partial(self.why_declined, *arguments) if arguments else None
        return self.judge(case, lambda: self.finish(start(), end), why)

    def launch(self, case: Case) -> bool:
        """Judge a case by ``prepare`` and the launch alone; return False if it is declined."""
        self.direct = True
        return self.judge(case, lambda: self.launch_only(case))

    def launch_only(self, case: Case, status: torch.Tensor | None = None) -> None:
        """Prepare and launch a case in its largest unit, and wait for it."""
        arguments = arguments_of(case)
        unit = largest_unit(*arguments, case.count)
        self.land(self.subject.launch(*arguments, case.count, status=status, unit=unit))

    def launch_of(self, case: Case, launch: Launch | None = None) -> Callable[..., Pending | None]:
        """Return a launch, prepared for a case or passed, with all arguments except the stream and
        the status word; ids and tables of addresses are where it reads them."""
        src, dst, own, other = arguments_of(case)
        launch = launch or self.subject.prepare(plan_of(case))
        _ = [view.table for view in (src, dst)]  # a copy from the host, on the current stream
        place = self.subject.place
        return partial(launch, src, dst, place(own), place(other), case.count)

    def launch_to_the_end(self, case: Case, launch: Launch | None = None) -> Callable[[], None]:
        """Return a call of `launch_of` that waits for its end."""
        call = self.launch_of(case, launch)
        return lambda: self.land(call(None, None))

    def land(self, pending: Pending | None, stream: torch.Stream | None = None) -> None:
        """Wait for the work of a launch, on all of the device or on one of its streams."""
        if pending is not None:
            pending.wait()
        (stream or self.facility).synchronize()

    def judge(self, case: Case, carry: Callable[[], object], why: Why | None = None) -> bool:
        """Run ``carry``, which has finished when it returns, and judge every byte. If it raised
        `Unsupported`, ``why``, by default `why_declined`, is the reason that allows it, or None."""
        try:
            return self._judge(case, carry, why or (lambda: self.why_declined(*arguments_of(case))))
        except AssertionError as error:
            self.failing = case
            self.fault = self.fault or str(error)
            raise

    def _judge(self, case: Case, carry: Callable[[], object], why: Why) -> bool:
        expected = case.expected()
        lists = [side.ids for side in (case.src, case.dst) if side.ids is not None]
        ids = [listed.clone() for listed in lists]
        try:
            carry()
        except Unsupported as refusal:
            self.facility.synchronize()
            reason = f"{refusal} {_the(case)}"
            wrong = changed(expected.before, case.dst.tensors)
            assert wrong is None, f"The copy was refused as Unsupported, but {wrong}: {reason}"
            self._note(why(), reason)
            return False
        except Exception as error:  # any error of the backend, of the library or of a driver
            ours = isinstance(error, PortaKVError)
            rule = " The request was valid." if ours else _RULE
            fault = f"The copy raised {type(error).__name__}: {error}{rule}"
            raise AssertionError(f"{fault} {_the(case)}") from error
        self.check(expected, case)
        same = all(torch.equal(a, b) for a, b in zip(ids, lists, strict=True))
        assert same, f"The copy wrote into its ids. {_the(case)}"
        return True

    def _note(self, why: str | None, refusal: str) -> None:
        assert why is not None, f"{_NO_REASON} {refusal}"
        self.declined.append(why)

    def may_decline(self, refusal: Unsupported, *arguments: Any) -> None:
        """Note the reason of a declined copy; raise AssertionError if nothing allows it."""
        self._note(self.why_declined(*arguments), str(refusal))

    def carried(self, call: Callable[[], object], of: Case | Arguments) -> bool:
        """Return True if a call succeeded; False where the backend declines it, as it may."""
        try:
            call()
        except Unsupported as refusal:
            self.may_decline(refusal, *(arguments_of(of) if isinstance(of, Case) else of))
            return False
        return True

    def check(
        self, expected: Expected, case: Case, prefix: str = "", *, source: bool = True
    ) -> None:
        """Count a copy that was carried out.

        Raises AssertionError, which begins with ``prefix``, if a byte of the destination is wrong,
        or of the source if ``source``.
        """
        src = case.src.tensors if source else None
        verdict = self.compare(expected, case.dst.tensors, src)
        assert verdict is None, f"{prefix}{verdict} {_the(case)}"
        self.examples += 1

    def compare(self, expected: Expected, dst: object, src: object = None) -> str | None:
        """Compare as the oracle's `compare` does, and add what the judged device knows of a wrong
        byte."""
        verdict = compare(expected, dst, src)
        if verdict and self.subject.emulated and _EMULATED_POISON in verdict:
            verdict += (
                " 0xdb is what the simulated device fills memory with that was never written, or "
                "was freed: the copy came before its producer, or after the end of memory that it "
                "still needed."
            )
        return verdict

    def finish(self, transfer: Transfer, end: str = "synchronize") -> None:
        """Wait for a transfer in one of the ways of ``ENDS``; its bytes have landed then."""
        if end == "synchronize":
            transfer.synchronize()
            assert transfer.done(), "The transfer was synchronised and says that it is not done."
        elif end == "wait":
            transfer.wait()
            if self.facility.streams:
                self.facility.current().synchronize()
        else:
            until = time.monotonic() + _PATIENCE
            while not transfer.done():
                assert time.monotonic() < until, "The transfer never reported that it was done."
                time.sleep(0.001)

    def why_declined(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index
    ) -> str | None:
        """Return the first reason by which the backend declines a plan of this copy, or None."""
        backend = self.subject.backend
        for plan in plans(src, dst, src_index, dst_index):
            decision = backend.check(plan)
            if not decision.accepted:
                return decision.reason
            try:
                backend.prepare(plan)
            except Unsupported as error:
                return str(error)
        return None

    # -- claims ---------------------------------------------------------------------------------

    def claimed(self, case: Case, field: str, what: str) -> None:
        """Judge a case by the launch alone.

        The backend must take its plan, which is in the base layout and within all other claims.
        """
        assert self.launch(case), (
            f"It claims by {field!r} that it {what}, and refuses a plan of that: "
            f"{self.declined[-1]}."
        )

    def refused(self, case: Case, error: type[PortaKVError] = Unsupported) -> None:
        """Expect the forced backend to raise ``error`` for this case, with every output untouched.

        If the error is not `Unsupported`, the backend may decline the case instead.
        """
        before = Memory.snapshot(case.src.tensors, case.dst.tensors)
        rule = "What is not claimed must raise Unsupported"
        advice = "Claim it, or refuse it. "
        if error is not Unsupported:
            rule = f"This copy must raise {error.__name__}"
            advice = ""
        outcome = f"the copy returned as if it were carried out. {advice}"
        cause = None
        try:
            self.finish(self.start(case))
        except (error, Unsupported) as raised:
            self.facility.synchronize()
            wrong = changed(before, [case.src.tensors, case.dst.tensors])
            name = type(raised).__name__
            assert wrong is None, f"The copy was refused as {name}, but {wrong}. {_the(case)}"
            if error is not Unsupported and isinstance(raised, Unsupported):
                self.may_decline(raised, *arguments_of(case))
            else:
                self.examples += error is not Unsupported
            return
        except Exception as unexpected:  # any other error of the backend or of a driver
            outcome = f"{type(unexpected).__name__} was raised: {unexpected} "
            cause = unexpected
        raise AssertionError(f"{rule}; {outcome}{_the(case)}") from cause

    def guarded(self, case: Case, *, word: bool = True) -> None:
        """Launch a case with ids past the end: the bytes are as if those were padding, and the
        status word, if it is passed, holds the position + 1 of the first of them."""
        expected = without_bad(case).expected()
        status = torch.zeros(1, dtype=torch.int64)
        status = status.pin_memory() if self.facility.streams else status
        self.launch_only(case, status if word else None)
        self.check(expected, case)
        wanted = set()
        lists = []
        for side in (case.src, case.dst):
            if side.ids is not None:
                ids = side.ids.tolist()
                end = side.slots // side.step
                lists.append(f"{ids} of {side.step} tokens, of which those from {end} on are bad")
                at = range(case.count)
                wanted |= {p + 1 for p in at if ids[(p + side.offset) // side.step] >= end}
        status_word = int(status[0])
        first = min(wanted, default=0)
        assert not word or status_word == first, (
            f"The status word holds {status_word} for ids {' and '.join(lists)}; expected {first}, "
            f"the position + 1 of the first bad one, or 0 if there is none. {_the(case)}"
        )

    def at_once(self, cases: Sequence[Case], launch: Launch | None, times: int = 1) -> None:
        """Judge concurrent calls of one launch, or concurrent copies, each in its own thread."""
        expected = [case.expected() for case in cases]
        works = list[Callable[[], object]]()
        for case in cases:
            copy = partial(self.subject.copy, *arguments_of(case))
            user = partial(lambda copy: self.finish(copy()), copy)
            works.append(self.launch_to_the_end(case, launch) if launch else user)
        self.facility.synchronize()
        at_once(works, times)
        for case, wanted in zip(cases, expected, strict=True):
            self.check(wanted, case, f"Called from {len(cases)} threads together: ")


def _the(case: Case) -> str:
    return f"The case was {case!r}."


def without_bad(case: Case) -> Case:
    """Return a case in which ids past the end, of either side, are padding."""
    made = Case(replace(case.src), replace(case.dst), case.count)
    for side in (made.src, made.dst):
        if side.ids is not None:
            ids = side.ids.cpu().long()
            side.ids = torch.where(ids >= side.slots // side.step, -1, ids)
    return made


def at_once(works: Sequence[Callable[[], object]], times: int = 1) -> None:
    """Run each in a separate thread, ``times`` times, started together.

    Raises AssertionError if one of them raised.
    """
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


def find_base_layout(subject: Subject, layouts: Sequence[str]) -> str:
    """Return the first layout of a cache that the backend takes by tokens and by blocks.

    If it takes none, return the first layout.
    """
    wanted = list(product((1, Shape().block_size), DIRECTIONS))
    for layout in layouts:
        shop = Workshop(str(subject.device), 0, layout)
        if all(
            takes(subject, shop.move(direction, Shape(), [1], step=step))
            for step, direction in wanted
        ):
            return layout
    return layouts[0]


@lru_cache(maxsize=256)  # called by many cases, and preparing may compile
def across(subject: Subject, paged: str, other: str) -> str:
    """Return ``other`` if the backend copies from layout ``paged`` to it, else ``paged``."""
    shape = Shape()
    shop = Workshop(str(subject.device), 0, paged)
    source = shop.cache(shape, [1])
    target = shop.cache(shape, [1], layout=other, source=False)
    return other if takes(subject, Case(source, target, 1)) else paged


def takes(subject: Subject, case: Case) -> bool:
    """Return True if the backend's ``check`` and ``prepare`` take every plan of a case."""
    try:
        for plan in plans(*arguments_of(case)):
            subject.prepare(plan)
    except Exception:  # Unsupported; of anything else the cases will tell
        return False
    return True


def plans(src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> list[CopyPlan]:
    """Return the possible plans of one copy: whole units, single tokens, ids without holes."""
    first = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step)
    possible = [first]
    by_unit = [first.unit if index.ids is not None else 0 for index in (src_index, dst_index)]
    for steps in ((src_index.plan_step, dst_index.plan_step, 1), by_unit):
        with suppress(PortaKVError):  # opaque pages have no plan by tokens
            possible.append(CopyPlan(src.form, dst.form, *steps))
    return possible


def changed(before: Memory, tensors: object) -> str | None:
    """Return a clause on the first storage that changed, or None."""
    for number, addresses in before.changes(Memory.snapshot(tensors)):
        first = int(addresses[0]) - before.regions[number].base
        many = f"{addresses.size} bytes of storage {number} of the outputs"
        return f"{many} were changed, the first at offset {first}"
    return None


def largest_unit(src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int) -> int:
    """Return the largest unit, in tokens, that divides a count and the offsets."""
    steps = src_index.plan_step, dst_index.plan_step
    most = CopyPlan(src.form, dst.form, *steps).unit
    unit = gcd(most, count, src_index.offset, dst_index.offset)
    try:
        CopyPlan(src.form, dst.form, *steps, unit)
    except Unsupported:  # a block that is split: what divides the whole of it may fit no part
        return 1
    return unit
