# SPDX-License-Identifier: Apache-2.0
"""One mutant before the suite: which case catches it first, and after how long."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from portakv.registry.self_check import SelfCheck, self_check
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.mutants import Mutant
from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.runner import BadRequest, Options, SubjectUnavailable, SuiteBroken, run

#: Seconds that one case may take of a mutant, and a mutant in all.
CASE_LIMIT = 60.0
WALL_LIMIT = 300.0

Runner = Callable[..., RunRecord]


@dataclass(frozen=True)
class Trial:
    """How a mutant fared under one seed.

    Attributes:
        mutant, seed: who, and from which seed.
        caught_by: the id of the first case that failed; empty where none did.
        reason: what that case said, or why there is no verdict.
        seconds: until then, with everything that had to be loaded.
        judged: the suite got to judge it. Where it did not, the suite is not at fault.
    """

    mutant: Mutant
    seed: int
    caught_by: str
    reason: str
    seconds: float
    judged: bool = True

    @property
    def survives(self) -> bool:
        """True where it was judged, and no case failed."""
        return self.judged and not self.caught

    @property
    def ending(self) -> str:
        """How it fared, in a few words."""
        if self.caught:
            return f"caught by {self.caught_by}"
        return f"{'SURVIVES' if self.judged else 'NOT JUDGED'}: {self.reason}"

    @property
    def caught(self) -> bool:
        """True where a case failed."""
        return bool(self.caught_by)


class OutOfTime(Exception):
    """A mutant was not caught within its limit."""


class _Clock(Progress):
    """Ends a run when its time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def started(self, id: str) -> None:
        if time.monotonic() > self._until:
            raise OutOfTime(f"it was not caught within {self._seconds:g} s")


def try_mutant(
    mutant: Mutant, seed: int = 0, *, wall: float = WALL_LIMIT, runner: Runner = run
) -> Trial:
    """Run the suite on a mutant, up to its first failure.

    A case in error is none that catches: the suite itself is at fault then.
    """
    began = time.monotonic()
    asked = Options(
        mutant.target, mutant.device, mutant.profile, seed, limit=CASE_LIMIT, exit_first=True
    )
    caught, why, judged = "", "every case passed", True
    try:
        wrong = _wrong(runner(asked, _Clock(wall)))
        failed = next((case for case in wrong if case.status == "failed"), None)
        if failed is not None:
            caught, why = failed.id, failed.reason
        elif wrong:
            why = f"{wrong[0].id} is in error: {wrong[0].reason}"
    except (OutOfTime, BadRequest, SubjectUnavailable, SuiteBroken) as error:
        why, judged = _line(error), isinstance(error, OutOfTime)
    return Trial(mutant, seed, caught, why, time.monotonic() - began, judged)


def _wrong(record: RunRecord) -> list[CaseRecord]:
    return [case for case in record.cases if case.status in WRONG]


def try_control(control: Mutant, seed: int = 0, *, runner: Runner = run) -> str | None:
    """Run the full suite on an un-mutated base; None where it passes, else why not."""
    try:
        record = runner(Options(control.target, control.device, "full", seed))
    except (BadRequest, SubjectUnavailable, SuiteBroken) as error:
        return _line(error)
    if wrong := _wrong(record):
        return f"{len(wrong)} cases fail, the first is {wrong[0].id}: {wrong[0].reason}"
    return None if record.verdict == "conformant" else "; ".join(record.missing)


def fails_self_check(mutant: Mutant) -> bool:
    """Whether the registry would turn a mutant down when it is chosen, before any user's copy."""
    module, _, name = mutant.target.partition(":")
    if mutant.device != "cpu":
        from portakv_conformance import simdev

        if simdev.available() is not None:
            return False
        simdev.load(mutant.device)
    device = torch.device("cpu") if mutant.device == "cpu" else torch.device(mutant.device, 0)
    found = self_check(getattr(importlib.import_module(module), name)(device))
    return found.state is SelfCheck.FAILED


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
