# SPDX-License-Identifier: Apache-2.0
"""What changed from one report to another: FIX, REGRESSION, NEW, MISSING."""

from __future__ import annotations

from dataclasses import dataclass

from portakv_conformance.evidence.verdict import WRONG, why_no_rung
from portakv_conformance.record import RunRecord

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
    found = []
    for name, best, was, now, why in (
        ("verdict", _VERDICTS, old.verdict, new.verdict, "; ".join(new.missing)),
        ("rung", _RUNGS, old.rung, new.rung, why_no_rung(new)),
    ):
        if was != now:  # what is not known is the worst
            step = [best.index(each) if each in best else len(best) for each in (was, now)]
            kind = "REGRESSION" if step[1] > step[0] else "FIX"
            found.append(Change(kind, name, was or "none", now or "none", why))
    for id, case in after.items():
        if (earlier := before.get(id)) is None:
            found.append(Change("NEW", id, "", case.status, case.reason))
        elif deeper := _DEPTH[case.status] - _DEPTH[earlier.status]:
            kind, worse = ("REGRESSION", case) if deeper > 0 else ("FIX", earlier)
            found.append(Change(kind, id, earlier.status, case.status, worse.reason))
    gone = [case for id, case in before.items() if id not in after]
    return found + [Change("MISSING", case.id, case.status, "") for case in gone]


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
