# SPDX-License-Identifier: Apache-2.0
"""What changed from one report to another: FIX, REGRESSION, NEW, MISSING."""

from __future__ import annotations

from dataclasses import dataclass

from portakv_conformance.evidence.verdict import WRONG, why_no_rung
from portakv_conformance.record import CaseRecord, RunRecord

# What is no longer claimed is a step back from what passed; what is waived fails, and somebody has
# said why.
_DEPTH = {"passed": 0, "not-claimed": 1, "waived": 2, "failed": 3, "error": 3}
_VERDICTS = ("conformant", "incomplete", "failed")  # best first
_RUNGS = ("R6", "R3", "")


@dataclass(frozen=True)
class Change:
    """One case that ended in another way, or is in one report only; or the run's ``verdict`` or
    ``rung``. Its status is empty for a report that it is not in; the reason is the worse one's."""

    kind: str
    id: str
    before: str
    after: str
    reason: str = ""

    @property
    def bad(self) -> bool:
        """Whether it makes a comparison fail: so does a new case that is wrong."""
        return self.kind in ("REGRESSION", "MISSING") or (
            self.kind == "NEW" and self.after in WRONG
        )

    def __str__(self) -> str:
        way = f"{self.before or 'not there'} -> {self.after or 'not there'}"
        return f"{self.kind:<10} {self.id}: {way}"


def compare_runs(old: RunRecord, new: RunRecord) -> list[Change]:
    """Every change: of verdict and rung, then of cases in the order of the new report; what is
    missing from it comes last."""
    before = {case.id: case for case in old.cases}
    after = {case.id: case for case in new.cases}
    found = [
        _step("verdict", old.verdict, new.verdict, _VERDICTS, "; ".join(new.missing)),
        _step("rung", old.rung, new.rung, _RUNGS, why_no_rung(new)),
    ]
    found += [_change(before.get(id), case) for id, case in after.items()]
    gone = [case for id, case in before.items() if id not in after]
    found += [Change("MISSING", case.id, case.status, "") for case in gone]
    return [change for change in found if change is not None]


def differences(old: RunRecord, new: RunRecord) -> list[str]:
    """What makes the two reports hard to compare: sentences on what they were made with."""
    pairs = [
        ("suite", old.suite, new.suite),
        ("backend", old.backend.get("name"), new.backend.get("name")),
        ("device", old.environment.get("device_name"), new.environment.get("device_name")),
        ("profile", old.profile, new.profile),
        ("seed", old.seed, new.seed),
        ("examples of --fuzz", old.fuzz, new.fuzz),
    ]
    return [f"The {what} differs: {a} and {b}." for what, a, b in pairs if a != b]


def _step(name: str, old: str, new: str, best: tuple[str, ...], why: str) -> Change | None:
    """A change of what a run amounts to; what nobody knows is the worst."""
    step = [best.index(value) if value in best else len(best) for value in (old, new)]
    if old == new:
        return None
    worse = step[1] > step[0]
    return Change("REGRESSION" if worse else "FIX", name, old or "none", new or "none", why)


def _change(old: CaseRecord | None, new: CaseRecord) -> Change | None:
    if old is None:
        return Change("NEW", new.id, "", new.status, new.reason)
    step = _DEPTH[new.status] - _DEPTH[old.status]
    if step == 0:
        return None
    kind, worse = ("REGRESSION", new) if step > 0 else ("FIX", old)
    return Change(kind, new.id, old.status, new.status, worse.reason)
