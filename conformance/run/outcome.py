# SPDX-License-Identifier: Apache-2.0
"""Find the result of a case from the reports of its phases: a status, a sentence and the
details."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from portakv_conformance.judge.judging import Judge
from portakv_conformance.record import Status

# What hypothesis writes below a message, by its version.
_NOTES = ("\nFalsifying ", "\nFailing test case", "\nFailing explicit example")
# What hypothesis raises where the same calls end in another way when it repeats them.
_FLAKY = "hypothesis.errors.Flaky"
_ONCE = (
    "The same calls end in another way when they are repeated: something is kept of earlier calls, "
    "or is not waited for."
)
_MOST_DETAILS = 20_000  # characters


def outcome(
    reports: Mapping[str, pytest.TestReport], judge: Judge | None, flaw: str
) -> tuple[Status, str, str]:
    """Return status, a sentence and the details of a case, by the reports of all of its phases.

    A ``flaw`` says why nothing at all can be judged of the backend.
    """
    if flaw:
        return "failed", flaw, ""
    for when in ("setup", "call", "teardown"):
        report = reports.get(when)
        if report is not None and not report.passed:
            return _of_failure(when, report, judge)
    if "call" not in reports:
        return "error", "The case did not come to its end.", ""
    if judge is not None and judge.unclaimed:
        return "not-claimed", judge.unclaimed, ""
    if judge is None or not judge.declined:
        return "passed", "", ""
    if not judge.examples:
        return "not-claimed", f"The backend declines the plan: {judge.declined[0]}", ""
    declined = len(judge.declined)
    total = len(judge.declined) + judge.examples
    why = f"It declines {declined} of {total} copies: {judge.declined[0]}"
    # What was judged stands for the case only if it is the greater part of it.
    return ("passed" if 2 * declined < total else "not-claimed"), why, ""


def _of_failure(
    when: str, report: pytest.TestReport, judge: Judge | None
) -> tuple[Status, str, str]:
    """Return the outcome of a case by the first phase that did not pass."""
    if report.skipped:
        return "error", "The case skipped itself; a case of the suite never does.", ""
    status: Status = "failed" if when == "call" else "error"
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = sentence(str(getattr(crash, "message", report.longrepr)))
    if _FLAKY in report.longreprtext and judge is not None and judge.fault:
        reason = f"{sentence(judge.fault)} {_ONCE}"
    parts = [report.longreprtext, *(f"--- {name}\n{text}" for name, text in report.sections)]
    return status, reason, "\n".join(parts)[-_MOST_DETAILS:]


def sentence(message: str) -> str:
    """Return an exception's message, without its type if it is an assertion's, without the lines
    that pytest and hypothesis add, and without the structure of the case."""
    reason = message.strip().removeprefix("AssertionError: ").partition("\nassert ")[0]
    for note in _NOTES:
        reason = reason.partition(note)[0]
    return reason.partition(" The case was ")[0].strip()
