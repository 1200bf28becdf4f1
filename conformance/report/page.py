# SPDX-License-Identifier: Apache-2.0
"""The forms of a report that people and CI servers read, each a template: ``report.html``,
``report.md``, ``junit.xml``, ``badge.svg``.

The page stands alone: its policy lets nothing else in, and no text of a record becomes markup.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from portakv_conformance.evidence.verdict import LEFT_OUT, SEAL, WRONG, totals_of, why_no_level
from portakv_conformance.record import STATUSES, CaseRecord, RunRecord, Status
from portakv_conformance.report import words
from portakv_conformance.report.words import first_byte, printable

LABEL = "PortaKV conformance"
_COLOURS = {"conformant": "#137a4a", "failed": "#b3261e", "incomplete": "#8a5a00"}
_EMULATED = "#5b3fb8"  # white text on any of these has a contrast of more than 4.5
_PADDING = 7
# Widths of 11 px sans-serif letters, in px; `textLength` makes any font fit them.
_NARROW = frozenset("ijl.,:|!'()[] tfrI1-")
_WIDE = frozenset("mwMW@%")
_ICON = "<svg xmlns='http://www.w3.org/2000/svg'><circle cx='8' cy='8' r='7' fill='{}'/></svg>"
# width of the bar in its own units; one case in a thousand is still seen
_BAR = 1000
_LEAST = 8
_HEADLINE = 240  # characters that can still be read in large letters
ANY = "any"  # where a case has a layout but is about no dtype or operation in particular
# Narrow columns need short names; others stand as they are.
_SHORT = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "float8_e4m3fn": "f8e4",
    "float8_e5m2": "f8e5",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "bool": "b8",
}


def write(record: RunRecord, folder: Path) -> list[Path]:
    """Write every form of a report into a folder, and return the files.

    A missing folder is made. ``conformance.json`` is the report itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The report itself first: it is not lost if another form cannot be made.
    forms: dict[str, Callable[[RunRecord], str]] = {
        "conformance.json": RunRecord.document,
        "report.html": page,
        "report.md": markdown,
        "junit.xml": junit,
        "badge.svg": badge,
    }
    for name, form in forms.items():
        text = form(record)
        file = folder / name
        file.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return [folder / name for name in forms]


def page(record: RunRecord) -> str:
    """Return the whole HTML document."""
    colour = _COLOURS.get(record.verdict, _COLOURS["failed"]).replace("#", "%23")
    return _filled(
        "page.html",
        record,
        style=_own("page.css"),
        script=_own("page.js"),
        short=_SHORT,
        matrix=matrix(record.cases),
        apart=_apart(record),
        bar=_bar(record),
        seal=SEAL,
        levels=words.LEVELS,
        no_level=why_no_level(record),
        icon=f"data:image/svg+xml,{_ICON.format(colour)}",
    )


def markdown(record: RunRecord) -> str:
    """Return the summary: short enough for a comment on a pull request."""
    return _filled("report.md", record)


def junit(record: RunRecord) -> str:
    """Return the common core of the formats that CI servers read.

    Missing requirements, and waivers that do not hold, are errors in separate suites. Either keeps
    a run from being conformant.
    """
    return _filled("junit.xml", record)


def badge(record: RunRecord) -> str:
    """Return the badge as an SVG document of 20 px height, drawn without a service."""
    shown = message(record)
    label = width(LABEL)
    emulated = record.verdict == "conformant" and words.emulated(record)
    colour = _EMULATED if emulated else _COLOURS.get(record.verdict, _COLOURS["failed"])
    return _filled(
        "badge.svg",
        record,
        label=LABEL,
        message=shown,
        label_width=label,
        message_width=width(shown),
        left=label + 2 * _PADDING,
        right=width(shown) + 2 * _PADDING,
        padding=_PADDING,
        colour=colour,
    )


def message(record: RunRecord) -> str:
    """Return the text on the right of the badge: ``R6 full 2026.11``, ``failed 12 of 412``, ..."""
    simulated = "emulated " if words.emulated(record) else ""
    if record.verdict == "conformant":
        reached = f"{record.rung} " if record.rung else ""
        return f"{reached}{simulated}{record.profile} {record.suite}"
    wrong = sum(case.status in WRONG for case in record.cases)
    if record.verdict == "failed" and wrong:
        return f"{simulated}failed {wrong} of {len(record.cases)}"
    return f"{simulated}{record.verdict} {record.suite}"


def width(text: str) -> int:
    """Return the approximate width of a text of the badge, in px."""
    return round(sum(4.4 if c in _NARROW else 9.6 if c in _WIDE else 6.9 for c in text))


def prose(text: str) -> Markup:
    """Return a sentence as markup; text between backticks is code."""
    pieces = [escape(printable(piece)) for piece in text.split("`")]
    if len(pieces) % 2 == 0:
        return Markup("`").join(pieces)
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(p) if n % 2 else p for n, p in enumerate(pieces))


def breakable(text: str, marks: str = "/:[,") -> Markup:
    """Return a long identifier that may be broken before any of the marks at the end of a line."""
    broken = re.sub(f"(?<=[^{re.escape(marks)}])(?=[{re.escape(marks)}])", "\0", printable(text))
    return Markup("<wbr>").join(broken.split("\0"))


@dataclass
class Matrix:
    """Layout x dtype x operation, from the tags of cases."""

    layouts: list[str]  # the rows, in the order of the cases
    columns: dict[str, list[str]]  # the dtypes of each operation
    cells: dict[tuple[str, str, str], Counter[Status]]  # by layout, operation and dtype


def matrix(cases: Iterable[CaseRecord]) -> Matrix:
    """Return the matrix of all cases that are about a layout; empty if none is."""
    made = Matrix([], {}, {})
    for case in cases:
        if layout := case.tags.get("layout"):
            place = layout, case.tags.get("operation", ANY), _dtype_of(case)
            made.cells.setdefault(place, Counter())[case.status] += 1
    made.layouts.extend(dict.fromkeys(layout for layout, _, _ in made.cells))
    known = [*_SHORT]
    for operation, dtype in dict.fromkeys((operation, dtype) for _, operation, dtype in made.cells):
        made.columns.setdefault(operation, []).append(dtype)
    for dtypes in made.columns.values():
        dtypes.sort(key=lambda dtype: known.index(dtype) if dtype in known else len(known))
    return made


def _dtype_of(case: CaseRecord) -> str:
    """Return the dtype that a case is about, without torch's name, or `ANY`."""
    return case.tags.get("dtype", ANY).removeprefix("torch.")


def _filled(name: str, record: RunRecord, **more: object) -> str:
    """Return a template filled with a record and with the texts that every form has of it."""
    level = record.rung
    left_out = record.environment.get(LEFT_OUT)
    return (
        templates()
        .get_template(name)
        .render(
            more,
            record=record,
            name=record.backend.get("name", "?"),
            device=words.device(record),
            verdict=words.verdict(record),
            sentence=words.sentence(record),
            level=f"{level}: {words.LEVELS[level]}" if level in words.LEVELS else level,
            emulated=words.emulated(record),
            emulation=words.emulation(record),
            broken=words.broken(record),
            left_out=[f"Two devices: {left_out}."] if left_out else [],
            date=words.moment(record.started),
            words=words.STATUS_WORDS,
            statuses=STATUSES[::-1],
            counts=totals_of(record.cases),
            copies=sum(case.examples for case in record.cases),
        )
    )


@cache
def templates() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        finalize=_final,
        trim_blocks=True,
        autoescape=lambda name: name != "report.md",
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "prose": prose,
        "breakable": breakable,
        "first_byte": first_byte,
        "headline": _headline,
        "plural": words.plural,
        "duration": words.duration,
        "worst": words.worst,
        "plain": words.plain,
        "dtype_of": _dtype_of,
        "line": words.line,
        "text": words.text,
        "code": words.code,
        "fenced": words.fenced,
        "digest": lambda text: f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}",
        "tally": lambda cases: Counter(case.status for case in cases),
        "about": lambda tags: " · ".join(f"{name} {value}" for name, value in tags.items()),
    }
    return made


def _final(value: object) -> object:
    """Return a text that a template prints, without characters that a document must not hold."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return "" if value is None else value


def _own(name: str) -> Markup:
    """Return a file of this package as markup; it must not end the element that it stands in."""
    text = files(__package__ or "").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
    assert "</" not in text, f"{name} holds '</' and would end its element."
    return Markup(text)


def _headline(reason: str) -> tuple[str, str]:
    """Return the first line of a reason, if it is short enough for large letters, and the rest."""
    first, _, rest = reason.strip().partition("\n")
    return ("", reason) if len(first) > _HEADLINE else (first, rest)


def _bar(record: RunRecord) -> list[tuple[Status, str, str]]:
    """Return the shares of each status as one line: status, where it begins and how wide it is."""
    totals = totals_of(record.cases)
    total = sum(totals.values()) or 1
    widths = {s: max(_BAR * totals[s] // total, _LEAST) for s in reversed(STATUSES) if totals[s]}
    scale = _BAR / (sum(widths.values()) or 1)
    pieces = []
    at = 0.0
    for status, share in widths.items():
        pieces.append((status, f"{at:.1f}", f"{share * scale:.1f}"))
        at += share * scale
    return pieces


def _apart(record: RunRecord) -> list[tuple[tuple[Status, str, str], list[str]]]:
    """Return the cases that are waived or not claimed: status, reason and expiry, and the ids of
    each."""
    until = {waiver.get("id"): waiver.get("expires", "") for waiver in record.waivers}
    entries: dict[tuple[Status, str, str], list[str]] = {}
    for case in sorted(record.cases, key=lambda case: case.status != "waived"):
        if case.status in ("waived", "not-claimed"):
            expires = until.get(case.id, "") if case.status == "waived" else ""
            entries.setdefault((case.status, case.reason, expires), []).append(case.id)
    return list(entries.items())
