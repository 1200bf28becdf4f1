# SPDX-License-Identifier: Apache-2.0
"""The notes of the benchmarks name result files, devices, dates and pages that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.sentences import long_sentences

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "benchmarks" / "notes"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(NOTES.glob("*.md"))
FILE = re.compile(r"`([\w/.-]+\.json)`")
#: A file with its device and date, in a line of text or in one row of a table.
MEASURED = re.compile(r"`([\w/.-]+\.json)`[^|\n]*?[:|] ([\w ]+), (\d{4}-\d\d-\d\d)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [name for name in FILE.findall(text) if not (RESULTS / name).exists()] == []
    assert long_sentences(page) == []


def test_the_figures_are_those_of_the_recorded_runs() -> None:
    """A result that is measured anew has another date, and its figures here change with it."""
    text = (NOTES / "figures.md").read_text(encoding="utf-8")
    found = MEASURED.findall(text)
    assert {name for name, _, _ in found} == set(FILE.findall(text))
    for name, device, date in found:
        machine = json.loads((RESULTS / name).read_text(encoding="utf-8"))["machine"]
        assert (machine["date"], name) == (date, name)
        assert device.removeprefix("NVIDIA ").split()[0] in machine["device"], name


def test_targets_name_pages_that_exist() -> None:
    text = (ROOT / "benchmarks" / "bars.toml").read_text(encoding="utf-8")
    named = set(re.findall(r"benchmarks/notes/(\w+\.md)", text))
    assert len(named) > 3
    assert named <= {page.name for page in PAGES}
