# SPDX-License-Identifier: Apache-2.0
"""Compute a run's totals, verdict and support level, and the checksums that protect a report.

Every rule depends on the record alone. `portakv conform verify` on another machine applies the same
rules to a report as the runner that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable

from portakv_conformance.judge.waivers import problems
from portakv_conformance.record import STATUSES, CaseRecord, RunRecord

#: The key of ``environment`` that seals a report: a sha256 over all its other content.
SEAL = "sealed_sha256"
#: The key of ``environment`` with the number of two-device cases that a real machine with one
#: device left out. They do not lower its support level.
LEFT_OUT = "two devices"
# Keys of an environment that name a vendor's package, or the toolkit that torch was built for.
_VENDORS = re.compile(r"torch[-_]\w|cuda$|hip$|cann$|nvidia-")
#: Statuses that no conformant run has.
WRONG = ("failed", "error")
#: The seed of certification runs; other seeds draw other structures.
CERTIFICATION_SEED = 0


def totals_of(cases: Iterable[CaseRecord]) -> dict[str, int]:
    """Return the number of cases with each status, 0 included."""
    counted: dict[str, int] = dict.fromkeys(STATUSES, 0)
    for case in cases:
        counted[case.status] += 1
    return counted


def case_list_sha256(ids: Iterable[str]) -> str:
    """Return the hash of a case list: of its sorted ids, a line each."""
    return hashlib.sha256("".join(f"{id}\n" for id in sorted(ids)).encode()).hexdigest()


def verdict_of(record: RunRecord) -> str:
    """Return ``failed``, ``incomplete`` or ``conformant``.

    An invalid waiver is a failure. Waived cases leave a run conformant; its totals and its
    ``waivers`` show them.
    """
    unfit = problems(record.waivers, record.cases, record.suite, whole=not record.missing)
    if unfit or any(case.status in WRONG for case in record.cases):
        return "failed"
    return "incomplete" if record.missing or not record.cases else "conformant"


def level_of(record: RunRecord) -> str:
    """Return the support level that a run proves: ``R6``, ``R3`` or empty.

    R6 is a certification run (full profile, seed 0, no fuzzing) on the real device. R3 is one on an
    emulated device in either profile. Both need each case passed or not claimed; a waived case is
    neither. On an accelerator R6 also needs the driver's version and the vendor's package.
    """
    fixed = record.fuzz == 0 and record.seed == CERTIFICATION_SEED
    if verdict_of(record) != "conformant" or not fixed or totals_of(record.cases)["waived"]:
        return ""
    if record.environment.get("emulated") is not False:
        return "R3"
    return "R6" if record.profile == "full" and not unnamed(record) else ""


def unnamed(record: RunRecord) -> list[str]:
    """Return the versions that R6 on an accelerator needs and the record lacks.

    These are the driver's and that of the vendor's package. A CPU needs neither.
    """
    known = record.environment
    if known.get("emulated") is not False or str(known.get("device", "")).startswith("cpu"):
        return []
    named = any(_VENDORS.match(name) and _is_text(value) for name, value in known.items())
    if not str(record.backend.get("target", "")).startswith("portakv."):
        named = named or _is_text(record.backend.get("version"))  # a third party's own package
    driver = [] if _is_text(known.get("driver")) else ["the driver's version"]
    return driver if named else [*driver, "a version of the vendor's package"]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def why_no_level(record: RunRecord) -> str:
    """Return why a conformant run proves no support level, as the end of a sentence; or empty."""
    if record.rung or record.verdict != "conformant":
        return ""
    reasons = []
    if record.fuzz or record.seed != CERTIFICATION_SEED:
        reasons.append(f"certification has seed {CERTIFICATION_SEED} and no --fuzz")
    if record.totals["waived"]:
        reasons.append("cases are waived")
    if record.profile != "full":
        reasons.append("R6 needs --profile full")
    reasons += [f"R6 needs {lacking}" for lacking in unnamed(record)]
    return " and ".join(reasons)


def digest_of(record: RunRecord) -> str:
    """Return the sha256 over the record without its seal, as canonical JSON."""
    values = {**vars(record), "cases": [vars(each) for each in record.cases]}
    values["environment"] = {k: v for k, v in record.environment.items() if k != SEAL}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def judge(record: RunRecord) -> None:
    """Fill in totals, verdict, support level and seal. Do not change the record afterwards."""
    record.totals = totals_of(record.cases)
    record.verdict = verdict_of(record)
    record.rung = level_of(record)
    record.environment[SEAL] = digest_of(record)
