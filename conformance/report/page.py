# SPDX-License-Identifier: Apache-2.0
"""``report.html`` and ``badge.svg``: templates, and what they are filled with.

The page stands alone: its policy lets nothing else in, and no text of a record becomes markup.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from portakv_conformance.evidence.verdict import SEAL, totals_of, why_no_rung
from portakv_conformance.record import STATUSES, CaseRecord, RunRecord, Status
from portakv_conformance.report import words
from portakv_conformance.report.first_byte import first_byte
from portakv_conformance.report.matrix import SHORT, dtype_of, matrix
from portakv_conformance.report.words import printable

LABEL = "PortaKV conformance"
_COLOURS = {"conformant": "#137a4a", "failed": "#b3261e", "incomplete": "#8a5a00"}
_EMULATED = "#5b3fb8"  # white text on any of these has a contrast of more than 4.5
_PADDING = 7
# Widths of 11 px sans-serif letters, in px; `textLength` makes any font fit them.
_NARROW, _WIDE = frozenset("ijl.,:|!'()[] tfrI1-"), frozenset("mwMW@%")
# Strokes in a box of 16 x 16. A status is never told by its colour alone.
_STROKES = {
    "passed": "M3.5 8.6 6.7 11.8 12.5 4.6",
    "failed": "M4.2 4.2 11.8 11.8M11.8 4.2 4.2 11.8",
    "error": "M8 3.2V9M8 12.4V12.6",
    "waived": "M2.8 9.2C4.5 6.4 6.3 6.4 8 8.2S11.5 10 13.2 7.2",
    "not-claimed": "M4 8H12",
}
_ICON = "<svg xmlns='http://www.w3.org/2000/svg'><circle cx='8' cy='8' r='7' fill='{}'/></svg>"
_BAR, _LEAST = 1000, 8  # width of the bar in its own units; one case in a thousand is still seen
_HEADLINE = 240  # characters that can still be read in large letters
_NAMES = {
    "device": "Device, as asked", "device_name": "Device", "driver": "Driver", "os": "System",
    "python": "Python", "torch": "torch", "emulated": "Emulated",
}  # fmt: skip


def page(record: RunRecord) -> str:
    """The whole HTML document."""
    style, script = _own("page.css"), _own("page.js")
    failed = sorted(
        (case for case in record.cases if case.status in ("failed", "error")),
        key=lambda case: case.status != "failed",  # faults of the surroundings last
    )
    found, apart = matrix(record.cases), _apart(record)
    colour = _COLOURS.get(record.verdict, _COLOURS["failed"]).replace("#", "%23")
    titles = {
        "failures": failed and "Failures", "coverage": found.cells and "Coverage",
        "claims": "Capabilities", "apart": apart and "Not claimed, waived",
        "environment": "Environment", "cases": "All cases",
    }  # fmt: skip
    return _templates().get_template("page.html").render(
        _common(record), style=style, script=script, strokes=_STROKES, failed=failed,
        matrix=found, apart=apart, short=SHORT, words=words.STATUS_WORDS, rungs=words.RUNGS,
        meanings=words.CLAIMS, area_words=words.AREAS, statuses=STATUSES[::-1],
        counts=totals_of(record.cases), bar=_bar(record), sentence=words.sentence(record),
        no_rung=why_no_rung(record), emulation=words.emulation(record),
        broken=words.broken(record), left_out=words.left_out(record), about=_about(record),
        sections=[(name, title) for name, title in titles.items() if title],
        claims=_claims(record), environment=_environment(record), identity=_identity(record),
        areas=_areas(record), icon=f"data:image/svg+xml,{_ICON.format(colour)}",
    )  # fmt: skip


def badge(record: RunRecord) -> str:
    """The badge as an SVG document of 20 px height; no service is asked."""
    said, label = message(record), width(LABEL)
    conformant = record.verdict == "conformant"
    colour = _COLOURS.get(record.verdict, _COLOURS["failed"])
    return _templates().get_template("badge.svg").render(
        _common(record), label=LABEL, said=said, label_width=label, said_width=width(said),
        left=label + 2 * _PADDING, right=width(said) + 2 * _PADDING, padding=_PADDING,
        colour=_EMULATED if conformant and words.emulated(record) else colour,
    )  # fmt: skip


def message(record: RunRecord) -> str:
    """What stands on the right of the badge: ``R6 full 2026.11``, ``failed 12 of 412``, ..."""
    simulated = "emulated " if words.emulated(record) else ""
    if record.verdict == "conformant":
        reached = f"{record.rung} " if record.rung else ""
        return f"{reached}{simulated}{record.profile} {record.suite}"
    if record.verdict == "failed" and words.bad(record):
        return f"{simulated}failed {words.bad(record)} of {len(record.cases)}"
    return f"{simulated}{record.verdict} {record.suite}"


def width(text: str) -> int:
    """About how wide a text of the badge is, in px."""
    return round(sum(4.4 if c in _NARROW else 9.6 if c in _WIDE else 6.9 for c in text))


def prose(text: str) -> Markup:
    """A sentence; what stands between backticks is code."""
    pieces = [escape(printable(piece)) for piece in text.split("`")]
    if len(pieces) % 2 == 0:
        return Markup("`").join(pieces)
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(p) if n % 2 else p for n, p in enumerate(pieces))


def breakable(text: str, marks: str = "/:[,") -> Markup:
    """A long identifier that may be broken before any of the marks where a line ends."""
    broken = re.sub(f"(?<=[^{re.escape(marks)}])(?=[{re.escape(marks)}])", "\0", printable(text))
    return Markup("<wbr>").join(broken.split("\0"))


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_final,
    )
    made.filters |= {
        "prose": prose, "breakable": breakable, "first_byte": first_byte, "headline": _headline,
        "plural": words.plural, "duration": words.duration, "worst": words.worst,
        "dtype_of": dtype_of,
        "digest": lambda text: f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}",
        "tally": lambda cases: Counter(case.status for case in cases),
        "about": lambda tags: " · ".join(f"{name} {value}" for name, value in tags.items()),
    }  # fmt: skip
    return made


def _final(value: Any) -> Any:
    """Every text that a template prints, with no character that a document must not hold."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return "" if value is None else value


def _common(record: RunRecord) -> dict[str, Any]:
    seal = {"conformant": "passed", "incomplete": "incomplete"}.get(record.verdict, "failed")
    return {
        "record": record, "name": record.backend.get("name", "?"), "seal": seal,
        "device": words.device(record), "verdict": words.verdict(record),
        "emulated": words.emulated(record),
    }  # fmt: skip


def _own(name: str) -> Markup:
    """A file of this package as markup; it must not end the element that it stands in."""
    text = files(__package__ or "").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
    assert "</" not in text, f"{name} holds '</' and would end its element."
    return Markup(text)


def _headline(reason: str) -> tuple[str, str]:
    """The first line of a reason, where it is short enough for large letters, and the rest."""
    first, _, rest = reason.strip().partition("\n")
    return ("", reason) if len(first) > _HEADLINE else (first, rest)


def _bar(record: RunRecord) -> list[tuple[Status, str, str]]:
    """Shares of each status as one line: status, where it begins and how wide it is."""
    found = totals_of(record.cases)
    total = sum(found.values()) or 1
    widths = {s: max(_BAR * found[s] // total, _LEAST) for s in reversed(STATUSES) if found[s]}
    scale = _BAR / (sum(widths.values()) or 1)
    pieces, at = [], 0.0
    for status, share in widths.items():
        pieces.append((status, f"{at:.1f}", f"{share * scale:.1f}"))
        at += share * scale
    return pieces


def _about(record: RunRecord) -> list[tuple[str, str]]:
    drawn = f"{record.fuzz:,} for each drawn case, from seed {record.seed}" if record.fuzz else ""
    simulated = ", emulated" if words.emulated(record) else ""
    return [
        ("Backend", " ".join(record.backend.get(k, "") for k in ("name", "version")).strip()),
        ("Device", f"{record.environment.get('device', '?')}{simulated}"),
        ("Profile", record.profile),
        ("Suite", f"{record.suite} (spec {record.spec})"),
        ("Cases", f"{len(record.cases):,}"),
        ("Copies judged", f"{sum(case.examples for case in record.cases):,}"),
        ("Fuzz examples", drawn),
        ("Date", words.moment(record.started)),
        ("Time taken", words.duration(record.seconds)),
    ]


def _apart(record: RunRecord) -> list[tuple[tuple[Status, str, str], list[str]]]:
    """What is waived or not claimed: status, reason and expiry, and the cases of each."""
    until = {waiver.get("id"): waiver.get("expires", "") for waiver in record.waivers}
    entries: dict[tuple[Status, str, str], list[str]] = {}
    for case in sorted(record.cases, key=lambda case: case.status != "waived"):
        if case.status in ("waived", "not-claimed"):
            expires = until.get(case.id, "") if case.status == "waived" else ""
            entries.setdefault((case.status, case.reason, expires), []).append(case.id)
    return list(entries.items())


def _claims(record: RunRecord) -> list[tuple[str, str, Counter[Status]]]:
    """Every field of the capabilities, its value and the cases that judged it."""
    judged: dict[str, Counter[Status]] = {}
    for case in record.cases:
        if case.claim:
            judged.setdefault(case.claim, Counter())[case.status] += 1
    return [
        (name, words.plain(value), judged.get(name, Counter()))
        for name, value in record.capabilities.items()
    ]


def _environment(record: RunRecord) -> list[tuple[str, str]]:
    known = record.environment
    first = [
        (w, words.plain(known[k])) for k, w in _NAMES.items() if known.get(k) not in (None, "")
    ]
    return first + [(k, words.plain(v)) for k, v in known.items() if k not in {*_NAMES, SEAL}]


def _identity(record: RunRecord) -> list[tuple[str, str]]:
    return [
        ("Backend class", record.backend.get("target", "")),
        ("Source, SHA-256", record.backend.get("source_sha256", "")),
        ("Case list, SHA-256", record.case_list_sha256),
        ("Report's seal, SHA-256", str(record.environment.get(SEAL, ""))),
        ("Seed", str(record.seed)),
        ("Schema", record.schema),
    ]


def _areas(record: RunRecord) -> dict[str, list[CaseRecord]]:
    there = {case.area for case in record.cases}
    names = [area for area in words.AREAS if area in there]
    names += sorted(there - set(names))
    return {name: [case for case in record.cases if case.area == name] for name in names}
