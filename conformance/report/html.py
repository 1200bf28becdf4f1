# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one page that stands alone, with a policy that lets nothing else in."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from portakv_conformance.report.appendix import claims, environment
from portakv_conformance.report.case_list import case_list, set_apart
from portakv_conformance.report.coverage import coverage
from portakv_conformance.report.failures import failures
from portakv_conformance.report.hero import hero, seal_of
from portakv_conformance.report.markup import Content, Html, element
from portakv_conformance.report.parts import sprite
from portakv_conformance.report.words import RUNGS, device, emulated, verdict
from portakv_conformance.run.record import RunRecord

_NAMES = {
    "failures": "Failures", "coverage": "Coverage", "claims": "Capabilities",
    "apart": "Not claimed, waived", "environment": "Environment", "cases": "All cases",
}  # fmt: skip
_COLOURS = {"passed": "137547", "failed": "b3261e", "incomplete": "8a5a00"}


def page(record: RunRecord) -> str:
    """The whole document."""
    style, script = _own("page.css"), _own("page.js")
    sections = {
        "failures": failures(record), "coverage": coverage(record), "claims": claims(record),
        "apart": set_apart(record), "environment": environment(record), "cases": case_list(record),
    }  # fmt: skip
    shown = {name: content for name, content in sections.items() if content}
    links = [element("a", _NAMES[name], href=f"#{name}") for name in shown]
    body = element(
        "body",
        sprite(),
        element("a", "Skip to the cases", href="#cases", class_="skip"),
        element("main", hero(record), element("nav", links, aria_label="Sections"), shown.values()),
        _foot(record),
        element("script", script),
    )
    head = element("head", _head(record, style, script), element("style", style))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _head(record: RunRecord, style: Html, script: Html) -> list[Html]:
    name = f"{record.backend.get('name', '?')} on {device(record)}: {verdict(record)}"
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    dot = f"<circle cx='8' cy='8' r='7' fill='%23{_COLOURS[seal_of(record)]}'/>"
    icon = f"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'>{dot}</svg>"
    return [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", "Emulated: " if emulated(record) else None, name),
        element("link", rel="icon", href=icon),
    ]


def _foot(record: RunRecord) -> Html:
    rungs: Content = [
        element("p", element("b", name), f" {meaning}.") for name, meaning in RUNGS.items()
    ]
    scale = element("p", "A rung says how far a backend is verified on a device:")
    origin = (
        f"PortaKV conformance suite {record.suite}, specification {record.spec}. This page is "
        "complete in itself and loads nothing. Check the report beside it with "
    )
    check = element("code", "portakv conform verify conformance.json")
    return element(
        "footer", element("div", scale, rungs, class_="rungs"), element("p", origin, check, ".")
    )


def _own(name: str) -> Html:
    """A file of this package as markup; it must not end the element that it stands in."""
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    assert "</" not in text, f"{name} holds '</' and would end its element."
    return Html(text)


def _digest(content: Html) -> str:
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"
