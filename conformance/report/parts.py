# SPDX-License-Identifier: Apache-2.0
"""Small pieces that the sections of the page share: marks, commands, lists of facts."""

from __future__ import annotations

from collections.abc import Iterable

from portakv_conformance.report.markup import Content, Html, element, join, prose
from portakv_conformance.report.words import STATUS_WORDS
from portakv_conformance.run.record import Status

# Strokes in a box of 16 x 16. A status is never told by its colour alone.
_STROKES: dict[str, str] = {
    "passed": "M3.5 8.6 6.7 11.8 12.5 4.6",
    "failed": "M4.2 4.2 11.8 11.8M11.8 4.2 4.2 11.8",
    "error": "M8 3.2V9M8 12.4V12.6",
    "waived": "M2.8 9.2C4.5 6.4 6.3 6.4 8 8.2S11.5 10 13.2 7.2",
    "not-claimed": "M4 8H12",
    "link": "M6 3.5 10.5 8 6 12.5",
}


def sprite() -> Html:
    """The marks, once; `mark` refers to them."""
    symbols = [
        element("symbol", element("path", d=stroke), id=f"mark-{name}", viewBox="0 0 16 16")
        for name, stroke in _STROKES.items()
    ]
    return element("svg", symbols, class_="sprite", aria_hidden="true")


def glyph(name: str) -> Html:
    """The strokes of a mark, for eyes only."""
    return element("svg", element("use", href=f"#mark-{name}"), class_="glyph", aria_hidden="true")


def mark(status: Status) -> Html:
    """The mark of a status, with its word for who cannot see it."""
    return element(
        "span", glyph(status), hidden_text(STATUS_WORDS[status]), class_=f"mark {status}"
    )


def pill(status: Status, none: bool = False) -> Html:
    """The mark of a status and its word; muted where there is none of it."""
    tone = "none" if none else status
    return element("span", glyph(status), STATUS_WORDS[status], class_=f"pill {tone}")


def hidden_text(*content: Content) -> Html:
    """Text for readers that speak."""
    return element("span", *content, class_="spoken")


def command(text: str) -> Html:
    """A command with a button that copies it; the button shows where the script runs."""
    return element(
        "div",
        element("pre", element("code", text), tabindex="0", aria_label="Command"),
        element("button", "Copy", class_="copy", type="button", hidden=True),
        class_="command",
    )


def facts(pairs: Iterable[tuple[str, Content]], kind: str = "facts") -> Html:
    """A list of names and values; pairs without a value are left out."""
    rows = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs if value
    ]
    return element("dl", rows, class_=kind)


def section(name: str, title: str, lead: Content, *content: Content) -> Html:
    """A section of the page with its heading and a sentence on what it shows."""
    return element(
        "section",
        element("h2", title, id=f"{name}-title"),
        element("p", lead, class_="lead") if lead else None,
        *content,
        id=name,
        aria_labelledby=f"{name}-title",
    )


def folded(summary: Content, *content: Content, open_: bool = False) -> Html:
    """Details that a reader opens."""
    return element("details", element("summary", summary), *content, class_="fold", open=open_)


def trouble(reason: str) -> Html:
    """A reason as paragraphs: each line of it one."""
    return join(element("p", prose(line)) for line in reason.splitlines() if line.strip())
