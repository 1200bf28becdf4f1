# SPDX-License-Identifier: Apache-2.0
"""The failures: for each the first wrong byte, what repeats it, and the folded details."""

from __future__ import annotations

from portakv_conformance.report.first_byte import FirstByte, first_byte
from portakv_conformance.report.markup import Html, breakable, element, join, prose
from portakv_conformance.report.parts import command, folded, pill, section, trouble
from portakv_conformance.report.words import plural
from portakv_conformance.run.record import CaseRecord, RunRecord

_OPEN = 25  # cards before the rest is folded
_HEADLINE = 240  # characters that can still be read in large letters


def failures(record: RunRecord) -> Html | None:
    """One card for each case that failed; None where none did."""
    found = [case for case in record.cases if case.status in ("failed", "error")]
    if not found:
        return None
    found.sort(key=lambda case: case.status != "failed")  # faults of the surroundings last
    cards = [card(case) for case in found]
    rest = None
    if len(cards) > _OPEN:
        rest = folded(f"{plural(len(cards) - _OPEN, 'more failure')}", cards[_OPEN:])
    lead = "The first wrong byte of each case, where it lies and where its content came from."
    return section("failures", plural(len(found), "failure"), lead, cards[:_OPEN], rest)


def card(case: CaseRecord) -> Html:
    """One failed case."""
    return element(
        "article",
        element(
            "header",
            pill(case.status),
            element("code", breakable(case.id), class_="id"),
        ),
        _told(case.reason),
        command(case.replay) if case.replay else None,
        _example(case),
        folded("Traceback and output", element("pre", case.details, tabindex="0"))
        if case.details
        else None,
        class_=f"failure {case.status}",
    )


def _told(reason: str) -> Html:
    """The reason, the fault in a few words first."""
    byte = first_byte(reason)
    if byte is not None:
        head = element("p", byte.headline(), class_="headline")
        return join((head, trouble(byte.before), explained(byte), trouble(byte.after)))
    first, _, rest = reason.strip().partition("\n")
    if len(first) > _HEADLINE:
        return trouble(reason)
    return join((element("p", prose(first), class_="headline"), trouble(rest)))


def explained(byte: FirstByte) -> Html:
    """Where the byte lies, what it is, what it should be."""
    rows = (
        ("where", byte.place, f"storage {byte.storage}, offset {byte.offset:,}"),
        ("holds", byte.found, byte.origin),
        ("expected", byte.expected, byte.should),
    )
    lines = [
        element(
            "div",
            element("dt", name),
            element("dd", element("code", value), " ", element("span", meaning)),
            class_=name,
        )
        for name, value, meaning in rows
    ]
    total = element("div", element("dt", "in all"), element("dd", plural(byte.wrong, "wrong byte")))
    return element("dl", lines, total, class_="byte")


def _example(case: CaseRecord) -> Html | None:
    if not case.example:
        return None
    return element(
        "p",
        "Shrunken example, beside this report: ",
        element("code", f"portakv conform replay {case.example}"),
        class_="note",
    )
