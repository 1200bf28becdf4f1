# SPDX-License-Identifier: Apache-2.0
"""``badge.svg``: the verdict in one line, drawn here; no service is asked."""

from __future__ import annotations

from portakv_conformance.report.markup import Html, element
from portakv_conformance.report.words import bad, device, emulated
from portakv_conformance.run.record import RunRecord

LABEL = "PortaKV conformance"
_HEIGHT = 20
_PADDING = 7
# White text on any of these has a contrast of more than 4.5.
_COLOURS = {"conformant": "#137a4a", "failed": "#b3261e", "incomplete": "#8a5a00"}
_EMULATED = "#5b3fb8"
_LABEL_COLOUR = "#3b4552"
# Widths of 11 px sans-serif letters, in px; `textLength` makes any font fit them.
_NARROW, _WIDE = frozenset("ijl.,:|!'()[] tfrI1-"), frozenset("mwMW@%")


def badge(record: RunRecord) -> str:
    """The badge as an SVG document of 20 px height."""
    said = message(record)
    left, right = width(LABEL) + 2 * _PADDING, width(said) + 2 * _PADDING
    full = f"{LABEL}: {record.backend.get('name', '?')} on {device(record)}, {said}"
    clip = element("clipPath", element("rect", width=left + right, height=_HEIGHT, rx=4), id="r")
    boxes = element(
        "g",
        element("rect", width=left, height=_HEIGHT, fill=_LABEL_COLOUR),
        element("rect", x=left, width=right, height=_HEIGHT, fill=_colour(record)),
        clip_path="url(#r)",
    )
    words = element(
        "g", _words(LABEL, _PADDING), _words(said, left + _PADDING), fill="#fff", font_size=11,
        font_family="Verdana,DejaVu Sans,Geneva,sans-serif",
    )  # fmt: skip
    drawn = element(
        "svg", element("title", full), clip, boxes, words, xmlns="http://www.w3.org/2000/svg",
        width=left + right, height=_HEIGHT, viewBox=f"0 0 {left + right} {_HEIGHT}", role="img",
        aria_label=full,
    )  # fmt: skip
    return f"{drawn}\n"


def message(record: RunRecord) -> str:
    """What stands on the right: ``R6 full 2026.11``, ``failed 12 of 412``, ..."""
    simulated = "emulated " if emulated(record) else ""
    if record.verdict == "conformant":
        reached = f"{record.rung} " if record.rung else ""
        return f"{reached}{simulated}{record.profile} {record.suite}"
    if record.verdict == "failed" and bad(record):
        return f"{simulated}failed {bad(record)} of {len(record.cases)}"
    return f"{simulated}{record.verdict} {record.suite}"


def width(words: str) -> int:
    """About how wide the words are, in px."""
    units = sum(4.4 if c in _NARROW else 9.6 if c in _WIDE else 6.9 for c in words)
    return round(units)


def _colour(record: RunRecord) -> str:
    if record.verdict == "conformant" and emulated(record):
        return _EMULATED
    return _COLOURS.get(record.verdict, _COLOURS["failed"])


def _words(words: str, x: int) -> Html:
    return element("text", words, x=x, y=14, textLength=width(words),
                   lengthAdjust="spacingAndGlyphs")  # fmt: skip
