# SPDX-License-Identifier: Apache-2.0
"""Texts of a report, the same in every form, and text that no form interprets."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone

from portakv_conformance.evidence.verdict import WRONG, totals_of
from portakv_conformance.judge.waivers import problems
from portakv_conformance.record import (
    ASSUMPTION,
    CARRIER,
    LIBRARY,
    STATUSES,
    JsonObject,
    RunRecord,
    Status,
)

#: The levels of verification that a run can reach.
LEVELS = {"R3": "semantics emulated", "R6": "run on the hardware"}
STATUS_WORDS: dict[Status, str] = {
    "passed": "passed",
    "failed": "failed",
    "error": "error",
    "waived": "waived",
    "not-claimed": "not claimed",
}
EMULATED = (
    "The device, or what runs code on it, was simulated in software. The run says that the "
    "semantics are right, not that any hardware works, and nothing about speed."
)
# What Markdown or HTML would take for more than text; ``@`` and ``#`` would call people and issues.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~@#!&])")
_ZERO_WIDTH = "\u200b"
# Characters that no HTML or XML document may hold, and lone surrogates, which UTF-8 has no bytes
# for. A vendor's traceback brings some along.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_SENTENCE = re.compile(
    r"Destination (?P<place>[^()]+) \(storage (?P<storage>\d+), offset (?P<offset>\d+)\) holds "
    r"(?P<value>0x[0-9a-f]{2}), which is (?P<origin>.+?); expected (?P<expected>0x[0-9a-f]{2}), "
    r"(?P<should>.+?)\. In all (?P<wrong>\d+) bytes are wrong\.",
    re.DOTALL,
)
_WITHIN_A_ROW = re.compile(r" head \d+ byte \d+$")


def printable(text: str) -> str:
    """Return the text with characters that a document must not hold written as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)


def line(text: str) -> str:
    """Return any text on one line: readers differ in how they treat line ends in attributes."""
    return " ".join(printable(text).split())


def text(words: str) -> str:
    """Return any text on one line, with nothing in it that Markdown would act on."""
    return _SPECIAL.sub(r"\\\1", line(words)).replace("\\@", f"@{_ZERO_WIDTH}")


def code(words: str) -> str:
    """Return any text on one line as Markdown's code, whatever backticks it holds."""
    content = line(words).replace("|", "\u2502")
    fence = _fence("`", content)
    edge = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{edge}{content}{edge}{fence}" if content else ""


def fenced(words: str) -> str:
    """Return any text as a block of Markdown's code."""
    fence = _fence("```", words)
    return f"{fence}\n{printable(words)}\n{fence}"


def _fence(least: str, words: str) -> str:
    while least in words:
        least += "`"
    return least


def emulated(record: RunRecord) -> bool:
    """Return whether the device reports that it is emulated."""
    return bool(record.environment.get("emulated"))


def emulation(record: RunRecord) -> str:
    """Explain what an emulated device proves, and what it does not."""
    assumed = record.environment.get(ASSUMPTION)
    return f"{EMULATED} It holds {assumed}." if assumed else EMULATED


def built(record: RunRecord) -> str:
    """Return ``by the AscendC kernel`` if a library was built to carry plans out."""
    known = record.environment
    return f"by {known.get(CARRIER) or ', '.join(known[LIBRARY])}" if known.get(LIBRARY) else ""


def device(record: RunRecord) -> str:
    """Return the name that the device reports, or else the requested name."""
    return str(record.environment.get("device_name") or record.environment.get("device", "?"))


def plural(number: int, noun: str) -> str:
    """Return a count with its noun: ``1 case``, ``2 cases``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def broken(record: RunRecord) -> list[str]:
    """Return the waivers that do not hold, a sentence each; they fail the run."""
    return problems(record.waivers, record.cases, record.suite, whole=not record.missing)


def verdict(record: RunRecord) -> str:
    """Return the verdict as a headline."""
    waived = totals_of(record.cases)["waived"]
    if record.verdict == "conformant":
        word = "Conformant in emulation" if emulated(record) else "Conformant"
        return f"{word}, with {plural(waived, 'waiver')}" if waived else word
    others = {"failed": "Not conformant", "incomplete": "Incomplete"}
    return others.get(record.verdict, record.verdict)


def sentence(record: RunRecord) -> str:
    """Return the verdict in a sentence or two, for a reader who reads nothing else."""
    totals = totals_of(record.cases)
    if record.verdict == "failed":
        if wrong := sum(totals[status] for status in WRONG):
            cases = plural(len(record.cases), "case")
            return f"{wrong} of {cases} failed; each is explained below."
        return "No case failed, but waivers do not hold, and a waiver that does not fails the run."
    if record.verdict == "incomplete":
        gaps = plural(len(record.missing), "part")
        return f"No certificate: {gaps} of the {record.profile} profile could not be run here."
    passed = f"{plural(totals['passed'], 'case')} passed, with every byte where it must be."
    if unclaimed := totals["not-claimed"]:
        about = "is" if unclaimed == 1 else "are"
        passed += f" {plural(unclaimed, 'case')} {about} about what the backend does not claim."
    return passed


def duration(seconds: float) -> str:
    """Return a duration such as ``0.4 s``, ``42 s``, ``3 min 7 s`` or ``1 h 2 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(started: str) -> str:
    """Return a time such as ``20 Nov 2026, 09:41 UTC``; a text that is not an ISO time stays."""
    try:
        when = datetime.fromisoformat(started.replace("Z", "+00:00"))
    except ValueError:
        return started
    if when.tzinfo is not None:
        when = when.astimezone(timezone.utc)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def plain(value: object) -> str:
    """Return a value of capabilities or environment for a reader."""
    if value is None or isinstance(value, bool):
        return {None: "any", True: "yes", False: "no"}[value]
    if isinstance(value, (list, tuple)):
        pair = all(isinstance(entry, (list, tuple)) for entry in value)
        return ", ".join(" → ".join(map(str, e)) if pair else plain(e) for e in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(entry)}" for name, entry in value.items()) or "none"
    return str(value)


def worst(statuses: Counter[Status]) -> Status:
    """Return the worst status that occurs; ``passed`` if there is none."""
    return next((status for status in STATUSES if statuses[status]), "passed")


@dataclass(frozen=True)
class FirstByte:
    """One wrong byte, as the oracle reports it."""

    place: str  # where it lies, in words
    storage: int
    offset: int  # bytes
    value: str  # ``0x9a``
    origin: str  # where that comes from
    expected: str
    should: str  # where that would come from
    wrong: int  # bytes in all
    before: str  # what else the text says, around the sentence
    after: str

    def short(self) -> str:
        """Return the reason with the sentence on one line, as Markdown shows it."""
        return (
            f"{self.before} First wrong byte: {self.place}, storage {self.storage}, offset "
            f"{self.offset:,}: {self.value} for {self.expected}; "
            f"{plural(self.wrong, 'wrong byte')} in all. {self.after}"
        )

    def headline(self) -> str:
        """Return the fault in a few words: whose bytes the row holds."""
        row = _WITHIN_A_ROW.sub("", self.place)
        if self.origin.startswith("what stood there before"):
            return f"Destination {row} was not written."
        if not self.should.startswith("source "):
            return f"The copy wrote to {row}, where it must not write."
        if self.origin.startswith(("source ", "destination ")):
            origin = _WITHIN_A_ROW.sub("", self.origin)
            should = _WITHIN_A_ROW.sub("", self.should)
            if origin == should:
                return f"Destination {row} holds other bytes of {origin}."
            # Both come from the source, unless the origin says something else.
            short = origin.removeprefix("source ")
            return f"Destination {row} holds bytes of {short}, not of {should[len('source ') :]}."
        which = "" if self.origin.startswith("of ") else "that is "
        return f"Destination {row} holds a byte {which}{self.origin}."


def first_byte(reason: str) -> FirstByte | None:
    """Return the wrong byte that a reason describes; None if it describes something else."""
    match = _SENTENCE.search(reason)
    if match is None:
        return None
    named: JsonObject = match.groupdict()
    numbers = {name: int(named[name]) for name in ("storage", "offset", "wrong")}
    before = reason[: match.start()].strip()
    after = reason[match.end() :].strip()
    return FirstByte(**{**named, **numbers}, before=before, after=after)
