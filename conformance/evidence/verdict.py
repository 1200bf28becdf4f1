# SPDX-License-Identifier: Apache-2.0
"""What a run amounts to: totals, verdict, level, and the digests that hold a report together.

Every rule is a function of the record alone, so that a stranger's `portakv conform verify` applies
the same ones to a report as the runner did when it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict

from portakv_conformance.judge.waivers import problems
from portakv_conformance.record import STATUSES, CaseRecord, RunRecord

#: The key of ``environment`` that seals a report: a sha256 over everything else in it.
SEAL = "sealed_sha256"
#: The key of ``environment`` that says how many cases on two devices a real machine with one device
#: was judged without. They stand between it and nothing, and no reader has to guess.
LEFT_OUT = "two devices"
# Facts of an environment that name a package of a vendor, or the toolkit that torch was built for.
_VENDORS = re.compile(r"torch[-_]\w|cuda$|hip$|cann$|nvidia-")
#: Statuses that no conformant run has.
WRONG = ("failed", "error")
#: The seed of certification runs; another draws other structures.
CERTIFICATION_SEED = 0


def totals_of(cases: Iterable[CaseRecord]) -> dict[str, int]:
    """How many cases have each status; a status that nothing has counts 0."""
    counted: dict[str, int] = dict.fromkeys(STATUSES, 0)
    for case in cases:
        counted[case.status] += 1
    return counted


def case_list_sha256(ids: Iterable[str]) -> str:
    """The hash of a case list: of its sorted ids, a line each."""
    return hashlib.sha256("".join(f"{id}\n" for id in sorted(ids)).encode()).hexdigest()


def verdict_of(record: RunRecord) -> str:
    """``failed``, ``incomplete`` or ``conformant``. A waiver that does not hold is a failure.
    Waived cases leave a run conformant; its totals and its ``waivers`` show them."""
    unfit = problems(record.waivers, record.cases, record.suite, whole=not record.missing)
    if unfit or any(case.status in WRONG for case in record.cases):
        return "failed"
    return "incomplete" if record.missing or not record.cases else "conformant"


def level_of(record: RunRecord) -> str:
    """``R6``, ``R3`` or empty: how far this run proves the backend. R6 is a certification run (full
    profile, seed 0, no fuzzing) on the real device, R3 one on an emulated device in either profile.
    Both need every case passed or not claimed: what is waived does not pass. On an accelerator R6
    also says the driver and the vendor's package."""
    fixed = record.fuzz == 0 and record.seed == CERTIFICATION_SEED
    if verdict_of(record) != "conformant" or not fixed or totals_of(record.cases)["waived"]:
        return ""
    if record.environment.get("emulated") is not False:
        return "R3"
    return "R6" if record.profile == "full" and not unnamed(record) else ""


def unnamed(record: RunRecord) -> list[str]:
    """What R6 on an accelerator has to say and the record does not: under which driver, and with
    which package of the vendor. A CPU has neither."""
    known = record.environment
    if known.get("emulated") is not False or str(known.get("device", "")).startswith("cpu"):
        return []
    named = any(_VENDORS.match(name) and _said(value) for name, value in known.items())
    if not str(record.backend.get("target", "")).startswith("portakv."):
        named = named or _said(record.backend.get("version"))  # a third party's own package
    driver = [] if _said(known.get("driver")) else ["the driver's version"]
    return driver if named else [*driver, "a version of the vendor's package"]


def _said(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def why_no_level(record: RunRecord) -> str:
    """What stands between a conformant run and a level, as the end of a sentence; or nothing."""
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
    """sha256 over the whole record but its seal, as canonical JSON."""
    values = asdict(record)
    values["environment"] = {k: v for k, v in record.environment.items() if k != SEAL}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def judge(record: RunRecord) -> None:
    """Fill in totals, verdict, level and seal. Nothing may change in the record behind this."""
    record.totals = totals_of(record.cases)
    record.verdict = verdict_of(record)
    record.rung = level_of(record)
    record.environment[SEAL] = digest_of(record)
