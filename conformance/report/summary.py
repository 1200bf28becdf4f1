# SPDX-License-Identifier: Apache-2.0
"""Print the end of a run: the verdict, each failure with a line to repeat it, missing and unclaimed
cases; and the differences of two runs: FIX, REGRESSION, NEW, MISSING."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from portakv.cli.console import print_prose
from portakv_conformance.evidence.verdict import LEFT_OUT, WRONG, why_no_level
from portakv_conformance.record import ASSUMPTION, STATUSES, CaseRecord, RunRecord
from portakv_conformance.report.words import broken, plural
from portakv_conformance.run.journal import MOST_EXAMPLES
from portakv_conformance.run.request import Options

_LONGEST = 600  # characters of a reason; the report has all of it
_MOST_GROUPS = 8  # tests whose failures are shown
# A case that is no longer claimed is a step back from one that passed. A waived case fails, for a
# reason that the waiver gives.
_DEPTH = {"passed": 0, "not-claimed": 1, "waived": 2, "failed": 3, "error": 3}
_VERDICTS = ("conformant", "incomplete", "failed")  # best first
_LEVELS = ("R6", "R3", "")


def print_summary(record: RunRecord, options: Options) -> None:
    """Print to standard output."""
    _print_failures(record, options)
    for case in record.cases:
        if case.status == "waived":
            print_prose(f"waived: {case.id}: {_short(case.reason)}")
    unclaimed = Counter(
        case.claim or case.area for case in record.cases if case.status == "not-claimed"
    )
    if unclaimed:
        claims = ", ".join(f"{claim} ({count})" for claim, count in sorted(unclaimed.items()))
        print_prose(f"not claimed (cases): {claims}")
    partly = [case.declined for case in record.cases if case.status == "passed" and case.declined]
    if partly:
        print_prose(f"declined: {sum(partly)} copies in {len(partly)} cases that passed")
    for sentence in record.missing:
        print_prose(f"missing: {sentence}")
    if ASSUMPTION in record.environment:
        print_prose(f"It holds {record.environment[ASSUMPTION]}.")
    if LEFT_OUT in record.environment:
        print_prose(f"two devices: {record.environment[LEFT_OUT]}")
    for sentence in broken(record):
        print_prose(f"waivers: {sentence}")
    if sum(bool(case.example) for case in record.cases) >= MOST_EXAMPLES:
        print_prose(
            f"Of the failing examples at most {MOST_EXAMPLES} of drawn cases and {MOST_EXAMPLES} "
            f"of others are kept; a case that is run alone saves its own."
        )
    if record.fuzz:
        print_prose(f"seed {record.seed}, {record.fuzz} examples in each drawn case")
        print(f"again: {record.command}")
    print_prose(verdict_line(record))


def verdict_line(record: RunRecord) -> str:
    """Return one line with backend, device, verdict, level and totals."""
    facts = record.environment
    place = f"{facts['device']} ({facts['device_name']}{', emulated' if facts['emulated'] else ''})"
    counts = ", ".join(f"{record.totals[s]} {s}" for s in STATUSES[::-1] if record.totals[s])
    why_not = why_no_level(record)
    level = f", {record.rung}" if record.rung else f" (no level: {why_not})" if why_not else ""
    return (
        f"{record.backend['name']} on {place}: {record.verdict}{level}. Suite {record.suite}, "
        f"profile {record.profile}, seed {record.seed}: {counts or 'no case'} in "
        f"{record.seconds:.1f} s."
    )


def _print_failures(record: RunRecord, options: Options) -> None:
    """Print the simplest failure of each test, of the first tests only."""
    groups: dict[str, list[CaseRecord]] = {}
    for case in record.cases:  # CORE comes first in the list of cases
        if case.status in WRONG:
            groups.setdefault(case.id.partition("[")[0], []).append(case)
    for cases in list(groups.values())[:_MOST_GROUPS]:
        case = min(cases, key=_size)
        print(f"{case.status.upper()} {case.id}")
        print_prose(f"  {_short(case.reason)}")
        print(f"  again: {case.replay}")
        if case.example and options.examples is not None:
            file = options.examples / Path(case.example).name
            words = ["portakv", "conform", "replay", str(file), options.backend]
            words += ["--device", options.device, *["--emulated"] * options.emulated]
            print(f"  its example: {shlex.join(words)}")
        if len(cases) > 1:
            print_prose(f"  and {plural(len(cases) - 1, 'more case')} of this test")
        print()
    if rest := list(groups.values())[_MOST_GROUPS:]:
        more = f"{plural(sum(map(len, rest)), 'case')} of {plural(len(rest), 'other test')}"
        print_prose(f"{more} failed too; --report lists all of them.")
        print()


def _size(case: CaseRecord) -> tuple[bool, bool, int]:
    """Return a sort key: examples to replay come first, errors of the surroundings last."""
    return case.status != "failed", not case.example, len(case.reason) + len(case.id)


def _short(reason: str) -> str:
    """Return the sentence on the first wrong byte, without the structure that holds the byte."""
    sentence = reason.partition(" The case was ")[0].partition("\n")[0]
    return sentence if len(sentence) <= _LONGEST else sentence[:_LONGEST] + " ..."


@dataclass(frozen=True)
class Change:
    """One case that ended in another way, or is in one report only; or the run's ``verdict`` or
    ``level``. Its status is empty for a report that it is not in; the reason is the worse one's."""

    kind: str
    id: str
    before: str
    after: str
    reason: str = ""

    @property
    def bad(self) -> bool:
        """Return True if a difference makes a comparison fail: so does a new case that is wrong."""
        worse = self.kind in ("REGRESSION", "MISSING")
        return worse or (self.kind == "NEW" and self.after in WRONG)

    def __str__(self) -> str:
        change = f"{self.before or 'not there'} -> {self.after or 'not there'}"
        return f"{self.kind:<10} {self.id}: {change}"


def compare_runs(old: RunRecord, new: RunRecord) -> list[Change]:
    """Return every change: of verdict and level, then of cases in the order of the new report.

    Cases that are missing from the new report come last.
    """
    before = {case.id: case for case in old.cases}
    after = {case.id: case for case in new.cases}
    changes = []
    for name, best, was, now, why in (
        ("verdict", _VERDICTS, old.verdict, new.verdict, "; ".join(new.missing)),
        ("level", _LEVELS, old.rung, new.rung, why_no_level(new)),
    ):
        if was != now:  # what is not known is the worst
            step = [best.index(each) if each in best else len(best) for each in (was, now)]
            kind = "REGRESSION" if step[1] > step[0] else "FIX"
            changes.append(Change(kind, name, was or "none", now or "none", why))
    for id, case in after.items():
        if (earlier := before.get(id)) is None:
            changes.append(Change("NEW", id, "", case.status, case.reason))
        elif deeper := _DEPTH[case.status] - _DEPTH[earlier.status]:
            kind, worse = ("REGRESSION", case) if deeper > 0 else ("FIX", earlier)
            changes.append(Change(kind, id, earlier.status, case.status, worse.reason))
    gone = [case for id, case in before.items() if id not in after]
    return changes + [Change("MISSING", case.id, case.status, "") for case in gone]


def differences(old: RunRecord, new: RunRecord) -> list[str]:
    """Return sentences on what makes the two reports hard to compare."""
    pairs = [
        ("suite", old.suite, new.suite),
        ("backend", old.backend.get("name"), new.backend.get("name")),
        ("device", old.environment.get("device_name"), new.environment.get("device_name")),
        ("profile", old.profile, new.profile),
        ("seed", old.seed, new.seed),
        ("examples of --fuzz", old.fuzz, new.fuzz),
    ]
    return [f"The {what} differs: {a} and {b}." for what, a, b in pairs if a != b]
