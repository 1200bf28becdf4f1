# SPDX-License-Identifier: Apache-2.0
"""The other forms of a report: JUnit XML, Markdown, badge; and the words that all share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support import conform_reports

from portakv_conformance.judge.oracle import check_copy
from portakv_conformance.record import RunRecord
from portakv_conformance.report import write
from portakv_conformance.report.first_byte import first_byte
from portakv_conformance.report.junit import junit
from portakv_conformance.report.markdown import code, fenced, markdown, text
from portakv_conformance.report.page import badge, message, width
from portakv_conformance.report.words import duration, moment, plain

FILES = ["conformance.json", "report.html", "report.md", "junit.xml", "badge.svg"]


@pytest.fixture(params=list(conform_reports.RUNS))
def record(request: pytest.FixtureRequest) -> RunRecord:
    return conform_reports.RUNS[request.param]()


def test_every_form_is_written_and_the_report_reads_back(record: RunRecord, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    written = write(record, folder)
    assert [file.name for file in written] == FILES
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert RunRecord.read((folder / "conformance.json").read_text()) == record
    # Lone surrogates do not keep it from being written.
    odd = replace(record, cases=[replace(c, details="a\udc80b") for c in record.cases])
    for file in write(odd, folder):
        file.read_text(encoding="utf-8")
    assert RunRecord.read((folder / "conformance.json").read_text()) == odd


def test_junit_counts_what_it_holds(record: RunRecord) -> None:
    root = ElementTree.fromstring(junit(record))
    assert root.tag == "testsuites"
    kinds = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for suite in root:
        for attribute, tag in kinds.items():
            assert int(suite.get(attribute, "")) == len(list(suite.iter(tag)))
    for attribute, tag in kinds.items():
        assert int(root.get(attribute, "")) == len(list(root.iter(tag)))
    assert int(root.get("tests", "")) == len(record.cases) + len(record.missing)
    assert int(root.get("failures", "")) == record.totals["failed"]
    assert int(root.get("errors", "")) == record.totals["error"] + len(record.missing)
    assert int(root.get("skipped", "")) == record.totals["waived"] + record.totals["not-claimed"]


def test_junit_names_cases_as_pytest_does_and_gives_messages() -> None:
    record = conform_reports.failing()
    root = ElementTree.fromstring(junit(record))
    found = {f"{c.get('classname')}::{c.get('name')}": c for c in root.iter("testcase")}
    for case in record.cases:
        made = found[case.id.replace(".py::", "::").replace("/", ".", 1)]
        said = [child.get("message") for child in made]
        assert said == ([] if case.status == "passed" else [case.reason])
        if case.status == "failed":
            body = made[0].text or ""
            assert case.reason in body
            assert case.replay in body
            assert case.details in body


def test_junit_says_which_waivers_do_not_hold() -> None:
    gone = {"id": "cases/test_core.py::gone", "reason": "r", "expires": "2027.02"}
    record = replace(conform_reports.passing(), verdict="failed", waivers=[gone])
    root = ElementTree.fromstring(junit(record))
    assert [e.get("type") for e in root.iter("error")] == ["waivers"]


def test_markdown_says_verdict_totals_failures_and_place() -> None:
    said = markdown(conform_reports.failing())
    assert said.startswith("## ❌ acme on Acme XPU 900: Not conformant\n")
    assert "| 298 | 2 | 2 | 11 | 1 |" in said
    assert "### 12 failures" in said
    assert said.count("replay: `portakv conform") == 12
    assert "holds bytes of layer 3 key slot 17, not of" in said
    assert "| driver | 5.2.1 |" in said
    assert len(said) < 12_000
    assert len(markdown(conform_reports.passing())) < 1_500
    said = markdown(conform_reports.failing(200))
    assert "and 180 more, in `report.html`." in said
    assert len(said) < 60_000  # a comment on GitHub has 65,536


def test_markdown_names_emulation_rung_and_gaps() -> None:
    said = markdown(conform_reports.emulated())
    assert "Conformant in emulation · R3: semantics emulated" in said
    assert "> **EMULATED.**" in said
    assert "- The simulated device was not built" in markdown(conform_reports.incomplete())


def test_markdown_acts_on_nothing_that_a_record_says() -> None:
    said = markdown(conform_reports.hostile())
    # What is left without code, whether within a line or in a block.
    outside = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", said, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    assert "@all" not in outside
    assert text("a|b\n# c `d` @me") == "a\\|b \\# c \\`d\\` @\u200bme"
    assert code("a``b") == "```a``b```"
    assert code("`a") == "`` `a ``"
    assert fenced("```\nx").startswith("````\n")


def test_the_badge_is_one_line_of_svg(record: RunRecord) -> None:
    drawn = badge(record)
    root = ElementTree.fromstring(drawn)
    assert root.get("height") == "20"
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["PortaKV conformance", message(record)]
    assert int(root.get("width", "")) == width("PortaKV conformance") + width(message(record)) + 28
    assert "<script" not in drawn
    assert len(drawn) < 2_500


def test_the_badge_says_the_verdict() -> None:
    told = {
        "passing": "R6 full 2026.12", "emulated": "R3 emulated full 2026.12",
        "failing": "failed 12 of 314", "incomplete": "incomplete 2026.12",
    }  # fmt: skip
    assert {name: message(conform_reports.RUNS[name]()) for name in told} == told
    assert message(replace(conform_reports.passing(), rung="")) == "full 2026.12"


def test_the_oracle_s_own_sentence_is_taken_apart() -> None:
    """Keys and values swapped by a copy: found, expected and origin as the oracle names them."""
    src = torch.arange(2 * 4 * 8, dtype=torch.int16).view(2, 4, 1, 8)
    dst = torch.zeros_like(src)

    def swapped() -> None:
        dst.copy_(src.flip(0))

    layout, none = "kv token head dim", None
    with pytest.raises(AssertionError) as wrong:
        check_copy(src, layout, none, dst, layout, none, range(4), range(4), swapped)
    byte = first_byte(f"Case 3. {wrong.value} More.")
    assert byte is not None
    assert byte.place == "layer 0 key slot 0 head 0 byte 0"
    assert (byte.found, byte.expected) == ("0x20", "0x00")
    assert byte.origin == "source layer 0 value slot 0 head 0 byte 0"
    assert byte.should == "source layer 0 key slot 0 head 0 byte 0"
    assert byte.headline() == (
        "Destination layer 0 key slot 0 holds bytes of layer 0 value slot 0, "
        "not of layer 0 key slot 0."
    )
    assert (byte.before, byte.after) == ("Case 3.", "More.")
    assert byte.wrong == 64


SLOT_4 = "source layer 0 key slot 4 head 0 byte 0"
ROW = "Destination layer 0 key slot 1"


@pytest.mark.parametrize(("origin", "should", "told"), [
    ("what stood there before the copy: it was not written", SLOT_4, f"{ROW} was not written."),
    ("source layer 0 key slot 4 head 0 byte 2", SLOT_4,
     f"{ROW} holds other bytes of source layer 0 key slot 4."),
    ("destination layer 1 key slot 4 head 0 byte 0", SLOT_4,
     f"{ROW} holds bytes of destination layer 1 key slot 4, not of layer 0 key slot 4."),
    ("of unknown origin", SLOT_4, f"{ROW} holds a byte of unknown origin."),
    ("a piece of a canary", SLOT_4, f"{ROW} holds a byte that is a piece of a canary."),
    (SLOT_4, "what was there before: the copy must not write it",
     "The copy wrote to layer 0 key slot 1, where it must not write."),
])  # fmt: skip
def test_the_fault_is_told_in_a_few_words(origin: str, should: str, told: str) -> None:
    byte = first_byte(
        f"Destination layer 0 key slot 1 head 0 byte 0 (storage 0, offset 64) holds 0x01, which is "
        f"{origin}; expected 0x02, {should}. In all 1 bytes are wrong."
    )
    assert byte is not None
    assert byte.headline() == told
    assert first_byte("The worker process died.") is None


def test_times_and_values_in_words() -> None:
    assert [duration(s) for s in (0.42, 41.6, 187.4, 3725)] == [
        "0.4 s", "42 s", "3 min 7 s", "1 h 2 min"]  # fmt: skip
    assert moment("2026-11-20T23:30:00-02:00") == "21 Nov 2026, 01:30 UTC"
    assert moment("yesterday") == "yesterday"
    assert plain([["device", "pinned"], ["pinned", "host"]]) == "device → pinned, pinned → host"
    values: tuple[object, ...] = (None, True, [], 4)
    assert [plain(value) for value in values] == ["any", "yes", "none", "4"]
