# SPDX-License-Identifier: Apache-2.0
"""``junit.xml``: the form that CI servers read.

There is no standard behind it; this is the common core: failure, error and skipped with a message,
one suite for each area of cases.
"""

from __future__ import annotations

from xml.etree import ElementTree

from portakv_conformance.record import CaseRecord, RunRecord
from portakv_conformance.report.words import broken, device, plain, printable

_SKIPPED = ("waived", "not-claimed")


def junit(record: RunRecord) -> str:
    """The document.

    What could not be run, and waivers that do not hold, are errors in suites of their own: they
    keep a run from being conformant.
    """
    suites = [_suite(record, area) for area in dict.fromkeys(c.area for c in record.cases)]
    suites += [_errors(record, "missing", record.missing)] if record.missing else []
    unfit = broken(record)
    suites += [_errors(record, "waivers", unfit)] if unfit else []
    title = f"portakv conform {record.backend.get('name', '?')} on {device(record)}"
    root = ElementTree.Element("testsuites", name=_attribute(title))
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    root.set("time", f"{record.seconds:.3f}")
    root.extend(suites)
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def _suite(record: RunRecord, area: str) -> ElementTree.Element:
    cases = [case for case in record.cases if case.area == area]
    statuses = [case.status for case in cases]
    suite = _empty(record, area, len(cases), sum(case.seconds for case in cases))
    suite.set("failures", str(statuses.count("failed")))
    suite.set("errors", str(statuses.count("error")))
    suite.set("skipped", str(sum(status in _SKIPPED for status in statuses)))
    suite.append(_properties(record))
    suite.extend(_case(case) for case in cases)
    return suite


def _empty(record: RunRecord, area: str, tests: int, seconds: float) -> ElementTree.Element:
    return ElementTree.Element(
        "testsuite", name=_attribute(f"portakv_conformance.{area}"), tests=str(tests), failures="0",
        errors="0", skipped="0", time=f"{seconds:.3f}",
        timestamp=_attribute(record.started.partition("+")[0].removesuffix("Z")),
    )  # fmt: skip


def _properties(record: RunRecord) -> ElementTree.Element:
    values = {f"backend.{k}": v for k, v in record.backend.items()}
    values |= {f"environment.{k}": plain(v) for k, v in record.environment.items()}
    values |= {"suite": record.suite, "spec": record.spec, "profile": record.profile,
               "seed": str(record.seed), "rung": record.rung, "verdict": record.verdict,
               "case_list_sha256": record.case_list_sha256, "command": record.command}  # fmt: skip
    properties = ElementTree.Element("properties")
    for name, value in values.items():
        ElementTree.SubElement(
            properties, "property", name=_attribute(name), value=_attribute(value)
        )
    return properties


def _case(case: CaseRecord) -> ElementTree.Element:
    file, _, name = case.id.partition("::")
    made = ElementTree.Element(
        "testcase", classname=_attribute(file.removesuffix(".py").replace("/", ".")),
        name=_attribute(name or file), time=f"{case.seconds:.3f}",
    )  # fmt: skip
    message = _attribute(case.reason)
    if case.status in _SKIPPED:
        ElementTree.SubElement(made, "skipped", type=case.status, message=message)
    elif case.status != "passed":
        kind = "failure" if case.status == "failed" else "error"
        bad = ElementTree.SubElement(made, kind, type=case.status, message=message)
        replay = f"Replay: {case.replay}" if case.replay else ""
        bad.text = printable("\n\n".join(t for t in (case.reason, replay, case.details) if t))
    return made


def _errors(record: RunRecord, kind: str, reasons: list[str]) -> ElementTree.Element:
    suite = _empty(record, kind, len(reasons), 0.0)
    suite.set("errors", str(len(reasons)))
    for number, reason in enumerate(reasons, 1):
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"portakv_conformance.{kind}", name=f"{kind} {number}",
            time="0.000",
        )  # fmt: skip
        ElementTree.SubElement(case, "error", type=kind, message=_attribute(reason))
    return suite


def _attribute(text: str) -> str:
    """One line: readers differ in what they do with line ends in attributes."""
    return " ".join(printable(text).split())
