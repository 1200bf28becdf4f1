# SPDX-License-Identifier: Apache-2.0
"""What was claimed, where the run took place, and how the registry answered."""

from __future__ import annotations

from collections import Counter

from portakv_conformance.evidence.verdict import SEAL
from portakv_conformance.report.markup import Html, breakable, element
from portakv_conformance.report.parts import facts, folded, mark, section
from portakv_conformance.report.words import CLAIMS, STATUS_WORDS, plain, worst
from portakv_conformance.run.record import RunRecord, Status

_KNOWN = {
    "device": "Device, as asked", "device_name": "Device", "driver": "Driver", "os": "System",
    "python": "Python", "torch": "torch", "emulated": "Emulated",
}  # fmt: skip


def claims(record: RunRecord) -> Html:
    """Every field of the capabilities with the cases that judged it."""
    judged: dict[str, Counter[Status]] = {}
    for case in record.cases:
        if case.claim:
            judged.setdefault(case.claim, Counter())[case.status] += 1
    rows = [
        element(
            "tr",
            element("th", element("code", breakable(name)), element("span", CLAIMS.get(name, "")),
                    scope="row"),
            element("td", plain(value), class_="value"),
            element("td", _judged(judged.get(name))),
        )
        for name, value in record.capabilities.items()
    ]  # fmt: skip
    head = element("tr", [element("th", t, scope="col") for t in ("claim", "value", "judged by")])
    table = element("table", element("thead", head), element("tbody", rows), class_="claims")
    lead = "What the backend says of itself. A claim is tested; its absence is tested too."
    return section("claims", "Capabilities", lead, table)


def _judged(statuses: Counter[Status] | None) -> Html:
    if not statuses:
        return element("span", "no case of its own", class_="note")
    words = ", ".join(f"{number} {STATUS_WORDS[s]}" for s, number in statuses.items())
    return element("span", mark(worst(statuses)), words, class_="judged")


def environment(record: RunRecord) -> Html:
    """Versions, driver, device; then the trace and what identifies the run."""
    known = [(word, plain(record.environment[key])) for key, word in _KNOWN.items()
             if record.environment.get(key) not in (None, "")]  # fmt: skip
    hidden = {*_KNOWN, SEAL}
    known += [(k, plain(v)) for k, v in record.environment.items() if k not in hidden]
    seal = str(record.environment.get(SEAL, ""))
    digest = record.backend.get("source_sha256", "")
    identity = (
        ("Backend class", element("code", breakable(record.backend.get("target", ""), ".:"))),
        ("Source, SHA-256", digest and element("code", digest)),
        ("Case list, SHA-256", element("code", record.case_list_sha256)),
        ("Report's seal, SHA-256", seal and element("code", seal)),
        ("Seed", str(record.seed)),
        ("Schema", record.schema),
    )
    trace = element("ol", (element("li", line) for line in record.trace), class_="trace")
    return section(
        "environment", "Environment", None,
        facts(known, "pairs"),
        folded("What the registry answered", trace) if record.trace else None,
        folded("What identifies this run", facts(identity, "pairs")),
    )  # fmt: skip
