# SPDX-License-Identifier: Apache-2.0
"""The head of the page: who was judged, the verdict, how many cases, what repeats the run."""

from __future__ import annotations

from portakv_conformance.evidence.verdict import why_no_rung
from portakv_conformance.report.markup import Html, element, prose
from portakv_conformance.report.parts import command, facts, glyph, pill
from portakv_conformance.report.words import (
    RUNGS,
    broken,
    counts,
    device,
    duration,
    emulated,
    emulation,
    left_out,
    moment,
    sentence,
    verdict,
)
from portakv_conformance.run.record import STATUSES, RunRecord, Status

# The mark that the verdict's seal shows.
SEALS: dict[str, Status] = {"conformant": "passed", "failed": "failed", "incomplete": "error"}
_BAR = 1000  # width of the bar in its own units
_LEAST = 8  # so that one case in a thousand is still seen


def seal_of(record: RunRecord) -> str:
    """``passed``, ``failed`` or ``incomplete``: the colour of the verdict."""
    return {"conformant": "passed", "incomplete": "incomplete"}.get(record.verdict, "failed")


def hero(record: RunRecord) -> Html:
    """Everything above the first section."""
    return element(
        "header",
        element("p", "PortaKV", element("span", "conformance report"), class_="brand"),
        element(
            "h1",
            element("span", record.backend.get("name", "?"), class_="name"),
            " ",
            element("span", "on ", device(record), class_="on"),
        ),
        _banner(record) if emulated(record) else None,
        _verdict(record),
        _bar(record),
        _notes("Waivers that do not hold", broken(record)),
        _notes("Not run here", record.missing),
        _notes("Not verified by this run", left_out(record)),
        _facts(record),
        element("h2", "Repeat this run", class_="small"),
        command(record.command),
    )


def _banner(record: RunRecord) -> Html:
    return element(
        "aside", element("strong", "Emulated"), element("p", emulation(record)), class_="emulated",
        aria_label="Emulated device",
    )  # fmt: skip


def _verdict(record: RunRecord) -> Html:
    meaning = RUNGS.get(record.rung)
    rung = None
    if meaning:
        rung = element("p", element("b", record.rung), element("span", meaning), class_="rung")
    why = why_no_rung(record)
    return element(
        "div",
        element("span", glyph(SEALS.get(record.verdict, "failed")), class_="seal"),
        element(
            "div",
            element("p", verdict(record), class_="word"),
            element("p", sentence(record), class_="sentence"),
            element("p", f"No rung is reached: {why}.", class_="sentence") if why else None,
        ),
        rung,
        class_=f"verdict {seal_of(record)}",
        role="group",
        aria_label="Verdict",
    )


def _bar(record: RunRecord) -> Html:
    """Shares of each status as one line, with numbers below."""
    found = counts(record)
    shown = [status for status in reversed(STATUSES) if found[status]]
    total = sum(found.values()) or 1
    widths = {s: max(_BAR * found[s] // total, _LEAST) for s in shown}
    scale = _BAR / (sum(widths.values()) or 1)
    pieces, at = [], 0.0
    for status in shown:
        width = widths[status] * scale
        pieces.append(
            element("rect", x=f"{at:.1f}", y=0, width=f"{width:.1f}", height=8, class_=status)
        )
        at += width
    legend = [
        element("li", element("b", f"{found[status]:,}"), pill(status, none=not found[status]))
        for status in STATUSES[::-1]
        if found[status] or status in ("passed", "failed")
    ]
    bar = element("svg", pieces, class_="bar", viewBox=f"0 0 {_BAR} 8", aria_hidden="true",
                  preserveAspectRatio="none")  # fmt: skip
    return element("div", bar, element("ul", legend, aria_label="Cases by status"), class_="tally")


def _notes(title: str, lines: list[str]) -> Html | None:
    if not lines:
        return None
    return element(
        "aside",
        element("strong", title),
        element("ul", (element("li", prose(line)) for line in lines)),
        class_="missing",
        aria_label=title,
    )


def _facts(record: RunRecord) -> Html:
    drawn = f"{record.fuzz:,} for each drawn case, from seed {record.seed}" if record.fuzz else ""
    simulated = ", emulated" if emulated(record) else ""
    return facts(
        (
            ("Backend", " ".join(record.backend.get(k, "") for k in ("name", "version")).strip()),
            ("Device", f"{record.environment.get('device', '?')}{simulated}"),
            ("Profile", record.profile),
            ("Suite", f"{record.suite} (spec {record.spec})"),
            ("Cases", f"{len(record.cases):,}"),
            ("Copies judged", f"{sum(case.examples for case in record.cases):,}"),
            ("Fuzz examples", drawn),
            ("Date", moment(record.started)),
            ("Time taken", duration(record.seconds)),
        )
    )
