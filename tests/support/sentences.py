# SPDX-License-Identifier: Apache-2.0
"""List sentences of documentation pages that are too long for a reader in a hurry.

As a command this module prints the number of such sentences of each page, and with `--list` the
sentences themselves by file and line:

    python tests/support/sentences.py --list docs/storage.md

Code blocks, headings, comments and generated tables do not count. A paragraph, an item of a list
and a cell of a table end a sentence. Inline code and the text of a link are words like others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The most words of a sentence.
LIMIT = 25

_GENERATED = re.compile(r"<!-- table: \w+ -->.*?<!-- end -->", re.DOTALL)
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE = re.compile(r"(`+)(.+?)\1")
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
#: What begins a paragraph in the middle of lines: an item, a quotation, a heading, a directive.
_BEGINS = re.compile(r" *([-*+] |\d+\. |> |#|:::|!!! |\|)")
_ENDS = re.compile(r"[.!?](?:[)\"*_]*)(?=\s+(?:[^a-z\s]|vLLM)|\s*$)")
#: Points that end no sentence.
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|approx|No)\.$")


def _blank(match: re.Match[str]) -> str:
    """Keep the lines of what does not count."""
    return "\n" * match[0].count("\n")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each paragraph, item and cell of a page."""
    for pattern in (_GENERATED, _FENCE, _COMMENT):
        text = pattern.sub(_blank, text)
    lines = list[str]()
    began = 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if lines and (not line.strip() or _BEGINS.match(line)):
            yield began, " ".join(lines)
            lines = []
        if line.startswith("|"):
            yield from ((number, cell.strip()) for cell in _cells(line))
        elif line.strip() and not line.startswith(("#", ":::")) and line[:4] != "    ":
            began = began if lines else number
            item = _BEGINS.match(line)
            lines.append(line[item.end() if item else 0 :].strip())


def _cells(line: str) -> list[str]:
    return _CODE.sub(lambda code: code[0].replace("|", "/"), line).strip("|").split("|")


def sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentences of a paragraph."""
    plain = _LINK.sub(r"\1", _PICTURE.sub("", paragraph))
    plain = _CODE.sub(lambda code: "`" + code[2].replace(" ", "_").replace(".", "_") + "`", plain)
    began = 0
    for end in _ENDS.finditer(plain):
        if not _ABBREVIATION.search(plain[began : end.start() + 1]):
            yield plain[began : end.end()].strip()
            began = end.end()
    if plain[began:].strip():
        yield plain[began:].strip()


def words(sentence: str) -> int:
    """Return the number of words, without dashes and signs that stand alone."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def long_sentences(page: Path) -> list[tuple[int, int, str]]:
    """Return the line, the number of words and the text of each sentence above the limit."""
    found = []
    for line, paragraph in paragraphs(page.read_text(encoding="utf-8")):
        for sentence in sentences(paragraph):
            count = words(sentence)
            if count > LIMIT:
                found.append((line, count, sentence))
    return found


def main(names: list[str]) -> None:
    """Print the long sentences of the named pages, or of all."""
    listed = "--list" in names
    pages = [Path(name).resolve() for name in names if name != "--list"]
    total = 0
    for page in pages or [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        results = long_sentences(page)
        total += len(results)
        name = page.relative_to(ROOT)
        if listed:
            for line, count, sentence in results:
                print(f"{name}:{line}: {count} words: {sentence}")
        elif results:
            print(f"{len(results):4} {name}")
    print(f"{total:4} sentences of more than {LIMIT} words")


if __name__ == "__main__":
    main(sys.argv[1:])
