# SPDX-License-Identifier: Apache-2.0
"""Every case, folded by area, with a filter; and the short lists of waived and not claimed."""

from __future__ import annotations

from collections import Counter

from portakv_conformance.report.markup import Html, breakable, element
from portakv_conformance.report.matrix import ANY, dtype_of
from portakv_conformance.report.parts import command, facts, folded, mark, pill, section, trouble
from portakv_conformance.report.words import AREAS, STATUS_WORDS, counts, duration, plural, worst
from portakv_conformance.run.record import STATUSES, CaseRecord, RunRecord, Status


def case_list(record: RunRecord) -> Html:
    """All cases of the run, by area in the order of the suite."""
    areas = [area for area in AREAS if any(case.area == area for case in record.cases)]
    areas += sorted({case.area for case in record.cases} - set(areas))
    lead = "Everything that was judged. Open an area, then a case, for the command that repeats it."
    return section(
        "cases", "All cases", lead, _filter(record, areas),
        [_area(area, [c for c in record.cases if c.area == area]) for area in areas],
        element("p", "No case matches.", id="nothing", class_="note", hidden=True),
    )  # fmt: skip


def _filter(record: RunRecord, areas: list[str]) -> Html:
    found = counts(record)
    buttons = [_button("", "All", len(record.cases), pressed=True)]
    buttons += [
        _button(status, STATUS_WORDS[status], found[status])
        for status in STATUSES[::-1]
        if found[status]
    ]
    choices = [element("option", "all areas", value="")]
    choices += [element("option", area, value=area) for area in areas]
    return element(
        "form",
        element("div", buttons, role="group", aria_label="Status", class_="statuses"),
        element("label", element("span", "Area"), element("select", choices, id="area")),
        element("label", element("span", "Search"),
                element("input", id="search", type="search", placeholder="id, layout, dtype",
                        autocomplete="off", spellcheck="false")),
        element("button", id="cell", type="button", hidden=True, class_="chosen"),
        element("output", id="shown", aria_live="polite"),
        id="filter", hidden=True,
    )  # fmt: skip


def _button(status: str, word: str, number: int, pressed: bool = False) -> Html:
    return element(
        "button", word, " ", element("b", f"{number:,}"), type="button", data_status=status,
        aria_pressed="true" if pressed else "false",
    )  # fmt: skip


def _area(area: str, cases: list[CaseRecord]) -> Html:
    statuses: Counter[Status] = Counter(case.status for case in cases)
    bad = ", ".join(
        f"{statuses[s]} {STATUS_WORDS[s]}" for s in STATUSES if s != "passed" and statuses[s]
    )
    spent = duration(sum(case.seconds for case in cases))
    summary = element(
        "summary",
        mark(worst(statuses) if statuses["failed"] + statuses["error"] else "passed"),
        element("span", element("b", area), element("span", AREAS.get(area, "")), class_="about"),
        element(
            "span",
            element("span", plural(len(cases), "case"), class_="number"),
            element("span", bad or "all passed", " · ", spent),
            class_="outcome",
        ),
    )
    return element("details", summary, [_case(case) for case in cases], class_="area",
                   data_area=area)  # fmt: skip


def _case(case: CaseRecord) -> Html:
    tags = " · ".join(f"{name} {value}" for name, value in case.tags.items())
    copies = "1 copy" if case.examples == 1 else f"{case.examples:,} copies"
    summary = element(
        "summary",
        mark(case.status),
        element("code", breakable(case.id), class_="id"),
        element("span", copies if case.examples else "", class_="copies"),
        element("span", duration_of(case), class_="time"),
    )
    return element(
        "details", summary,
        trouble(case.reason),
        facts((("Claim", case.claim), ("About", tags), ("Profile", case.profile),
               ("Example", case.example)), "inline"),
        command(case.replay) if case.replay else None,
        class_="case", data_status=case.status,
        data_layout=case.tags.get("layout"),
        data_operation=case.tags.get("operation", ANY), data_dtype=dtype_of(case),
    )  # fmt: skip


def duration_of(case: CaseRecord) -> str:
    """Time of one case: milliseconds below a second."""
    if case.seconds < 1:
        return f"{case.seconds * 1000:.0f} ms"
    return duration(case.seconds)


def set_apart(record: RunRecord) -> Html | None:
    """What is waived or not claimed, one entry for each reason; None where there is nothing."""
    until = {waiver.get("id"): waiver.get("expires", "") for waiver in record.waivers}
    entries: dict[tuple[Status, str, str], list[str]] = {}
    for status in ("waived", "not-claimed"):
        for case in record.cases:
            if case.status == status:
                expiry = until.get(case.id, "") if status == "waived" else ""
                entries.setdefault((case.status, case.reason, expiry), []).append(case.id)
    if not entries:
        return None
    lead = "What the backend does not promise, and known faults that its vendor asks to be excused."
    items = [_entry(*entry, ids) for entry, ids in entries.items()]
    return section("apart", "Not claimed and waived", lead, element("ul", items, class_="apart"))


def _entry(status: Status, reason: str, until: str, ids: list[str]) -> Html:
    each = (element("code", breakable(id), class_="id") for id in ids)
    names = element("ul", (element("li", name) for name in each))
    many = plural(len(ids), "case")
    return element(
        "li",
        element("header", pill(status), element("span", many, class_="note")),
        trouble(reason),
        element("p", f"Expires with suite {until}.", class_="note") if until else None,
        names if len(ids) <= 3 else folded(many, names),
    )
