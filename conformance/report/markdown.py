# SPDX-License-Identifier: Apache-2.0
"""``report.md``: short enough for a comment on a pull request."""

from __future__ import annotations

import re

from portakv_conformance.evidence.verdict import totals_of
from portakv_conformance.record import STATUSES, CaseRecord, RunRecord
from portakv_conformance.report.first_byte import first_byte
from portakv_conformance.report.words import (
    STATUS_WORDS,
    broken,
    device,
    duration,
    emulated,
    emulation,
    left_out,
    moment,
    plural,
    printable,
    rung,
    sentence,
    verdict,
)

_SIGNS = {"conformant": "✅", "failed": "❌", "incomplete": "⚠️"}
_SHOWN = 20  # failures; a comment has a limit
_LONGEST = 600  # characters of one reason
# What Markdown or HTML would take for more than text; ``@`` and ``#`` would call people and issues.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~@#!&])")
_ZERO_WIDTH = "\u200b"


def text(words: str) -> str:
    """Any text on one line, with nothing in it that Markdown would act on."""
    line = " ".join(printable(words).split())
    return _SPECIAL.sub(r"\\\1", line).replace("\\@", f"@{_ZERO_WIDTH}")


def code(words: str) -> str:
    """Any text on one line as code, whatever backticks it holds."""
    line = " ".join(printable(words).split()).replace("|", "\u2502")
    fence = "`"
    while fence in line:
        fence += "`"
    edge = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{edge}{line}{edge}{fence}" if line else ""


def fenced(words: str) -> str:
    """Any text as a block of code."""
    fence = "```"
    while fence in words:
        fence += "`"
    return f"{fence}\n{printable(words)}\n{fence}"


def markdown(record: RunRecord) -> str:
    """The summary."""
    parts = [_head(record), _totals(record), _failures(record),
             _list("Waivers that do not hold", broken(record)),
             _list("Not run here", record.missing),
             _list("Not verified by this run", left_out(record)), _where(record)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(record: RunRecord) -> str:
    sign = _SIGNS.get(record.verdict, "❌")
    name = record.backend.get("name", "?")
    reached = f" · {rung(record)}" if record.rung else ""
    lines = [
        f"## {sign} {text(name)} on {text(device(record))}: {text(verdict(record))}{reached}",
        text(sentence(record)),
    ]
    if emulated(record):
        lines.insert(1, f"> **EMULATED.** {text(emulation(record))}")
    return "\n\n".join(lines)


def _totals(record: RunRecord) -> str:
    found = totals_of(record.cases)
    shown = [s for s in STATUSES[::-1] if found[s] or s in ("passed", "failed")]
    names = " | ".join(STATUS_WORDS[status] for status in shown)
    numbers = " | ".join(f"{found[status]:,}" for status in shown)
    rule = "---:|" * (len(shown) + 2)
    copies = sum(case.examples for case in record.cases)
    return (
        f"| {names} | copies judged | time |\n|{rule}\n"
        f"| {numbers} | {copies:,} | {duration(record.seconds)} |"
    )


def _failures(record: RunRecord) -> str:
    found = [case for case in record.cases if case.status in ("failed", "error")]
    if not found:
        return ""
    lines = [f"### {plural(len(found), 'failure')}", *map(_failure, found[:_SHOWN])]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more, in `report.html`.")
    return "\n\n".join(lines)


def _failure(case: CaseRecord) -> str:
    byte = first_byte(case.reason)
    reason, lines = case.reason, [f"- **{STATUS_WORDS[case.status]}** {code(case.id)}  "]
    if byte is not None:
        lines.append(f"  **{text(byte.headline())}**  ")
        reason = (
            f"{byte.before} First wrong byte: {byte.place}, storage {byte.storage}, offset "
            f"{byte.offset:,}: {byte.found} for {byte.expected}; "
            f"{plural(byte.wrong, 'wrong byte')} in all. {byte.after}"
        )
    if len(reason) > _LONGEST:
        reason = f"{reason[:_LONGEST]} ..."
    lines.append(f"  {text(reason)}  ")
    if case.replay:
        lines.append(f"  replay: {code(case.replay)}")
    return "\n".join(line for line in lines if line.strip())


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return "\n".join((f"### {title}", "", *(f"- {text(line)}" for line in lines)))


def _where(record: RunRecord) -> str:
    kept = ("device", "driver", "os", "python", "torch")
    rows = [
        ("backend", f"{record.backend.get('name', '')} {record.backend.get('version', '')}"),
        ("device", device(record) + (" (emulated)" if emulated(record) else "")),
        *((k, str(record.environment[k])) for k in kept[1:] if record.environment.get(k)),
        ("suite", f"{record.suite}, specification {record.spec}, {record.profile} profile"),
        ("seed", f"{record.seed}" + (f", fuzz {record.fuzz}" if record.fuzz else "")),
        ("date", moment(record.started)),
    ]
    table = "\n".join(f"| {name} | {text(value)} |" for name, value in rows)
    return f"### Environment\n\n| | |\n|---|---|\n{table}\n\nRepeat:\n\n{fenced(record.command)}"
