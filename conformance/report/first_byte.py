# SPDX-License-Identifier: Apache-2.0
"""The oracle's sentence on the first wrong byte, taken apart so that a page can lay it out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from portakv_conformance.report.words import plural

_SENTENCE = re.compile(
    r"Destination (?P<place>[^()]+) \(storage (?P<storage>\d+), offset (?P<offset>\d+)\) holds "
    r"(?P<found>0x[0-9a-f]{2}), which is (?P<origin>.+?); expected (?P<expected>0x[0-9a-f]{2}), "
    r"(?P<should>.+?)\. In all (?P<wrong>\d+) bytes are wrong\.",
    re.DOTALL,
)
_WITHIN_A_ROW = re.compile(r" head \d+ byte \d+$")


@dataclass(frozen=True)
class FirstByte:
    """One wrong byte: where it lies (in words, the number of its storage, the offset in bytes),
    what was found and expected (``0x9a``), where either comes from, how many bytes are wrong in
    all, and what else the text says, around the sentence."""

    place: str
    storage: int
    offset: int
    found: str
    origin: str
    expected: str
    should: str
    wrong: int
    before: str
    after: str

    def short(self) -> str:
        """The reason with the sentence on one line, as Markdown shows it."""
        return (
            f"{self.before} First wrong byte: {self.place}, storage {self.storage}, offset "
            f"{self.offset:,}: {self.found} for {self.expected}; "
            f"{plural(self.wrong, 'wrong byte')} in all. {self.after}"
        )

    def headline(self) -> str:
        """The fault in a few words: whose bytes the row holds."""
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
    """The wrong byte that a reason tells of; None where it tells of something else."""
    found = _SENTENCE.search(reason)
    if found is None:
        return None
    named: dict[str, Any] = found.groupdict()
    numbers = {name: int(named[name]) for name in ("storage", "offset", "wrong")}
    before, after = reason[: found.start()].strip(), reason[found.end() :].strip()
    return FirstByte(**{**named, **numbers}, before=before, after=after)
