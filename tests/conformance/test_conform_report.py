# SPDX-License-Identifier: Apache-2.0
"""report.html as a document, and the other forms of a report: JUnit XML, Markdown, badge; nothing
in a record can become markup."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support import conform_reports

from portakv_conformance.judge.oracle import compare, expected_copy
from portakv_conformance.record import RunRecord
from portakv_conformance.report import page as forms
from portakv_conformance.report import words
from portakv_conformance.report.page import ANY, matrix, write
from portakv_conformance.report.words import first_byte

_VOID = {"meta", "link", "input", "wbr", "br", "img"}


class Reader(HTMLParser):
    """Elements and text of a document, and whether every element is closed where it must be."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self.feed(forms.page(record))
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = data
        else:
            self.texts.append(data)


@cache
def read(name: str) -> Reader:
    return Reader(conform_reports.RUNS[name]())


@pytest.fixture(params=list(conform_reports.RUNS))
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def record(name: str) -> RunRecord:
    return conform_reports.RUNS[name]()


def test_the_page_is_well_formed_and_loads_nothing(name: str) -> None:
    """No address but its own anchors, and a policy under which nothing else would load. A hostile
    record gives the very elements of a tame one, and one script: our own."""
    reader = read(name)
    assert reader.open == []
    names = [tag for tag, _ in reader.elements]
    assert (names[0], names.count("script"), names.count("img")) == ("html", 1, 0)
    assert (reader.text.count("window.hacked=1") > 20) == (name == "hostile")
    for tag, attributes in reader.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:image/svg+xml,")), (tag, address)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    loading = r"@import|url\(|https?:|fetch\(|XMLHttpRequest"
    assert not re.search(loading, "".join(reader.raw.values()))
    policy = next(str(a["content"]) for _, a in reader.elements if "http-equiv" in a)
    for name, content in reader.raw.items():
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_verdict_and_totals_are_said(name: str, record: RunRecord) -> None:
    text = read(name).text
    word = {"conformant": "Conformant", "failed": "Not conformant", "incomplete": "Incomplete"}
    assert word[record.verdict] in text
    if record.rung:
        assert f" {record.rung} " in text
    shown = [a for tag, a in read(name).elements if tag == "details" and a["class"] == "case"]
    assert len(shown) == len(record.cases)
    for status, number in record.totals.items():
        assert sum(a["data-status"] == status for a in shown) == number
        if number and status in ("passed", "failed", "waived"):
            assert f" {number} {status} " in text


def test_an_emulated_device_is_called_so_where_nobody_can_miss_it() -> None:
    reader = read("emulated")
    assert reader.text.strip().startswith("Emulated: acme on simulated device")
    assert "Conformant in emulation" in reader.text
    assert any(a.get("class") == "emulated" for _, a in reader.elements)
    real = read("passing")
    assert not any(a.get("class") == "emulated" for _, a in real.elements)
    assert "in emulation" not in real.text


def test_each_failure_is_explained_and_can_be_replayed() -> None:
    record = conform_reports.failing()
    reader = read("failing")
    assert "12 failures" in reader.text
    swapped = "holds bytes of layer 3 key slot 17, not of layer 3 value slot 17."
    assert f"Destination layer 3 value slot 17 {swapped}" in reader.text
    assert "Destination layer 0 key slot 31 was not written." in reader.text
    assert "The worker process died with signal 11 (SIGSEGV) in this case." in reader.text
    assert "shrunken-3.json" in reader.text
    for case in record.cases:
        if case.status in ("failed", "error"):
            assert case.replay in reader.texts
            assert case.details in reader.texts
    text = Reader(conform_reports.failing(60)).text  # folded after the first
    assert "60 failures" in text
    assert "35 more failures" in text


def test_waivers_show_reason_and_expiry_and_those_that_do_not_hold_are_named() -> None:
    text = read("failing").text
    assert "Driver 5.2.1 reorders two streams; mended in 5.3." in text
    assert "Expires with suite 2027.02." in text
    gone = {"id": "cases/test_core.py::gone", "reason": "r", "expires": "2027.02"}
    record = replace(conform_reports.passing(), verdict="failed", waivers=[gone])
    text = Reader(record).text
    assert "Waivers that do not hold" in text
    assert "No case failed" in text
    errors = ElementTree.fromstring(forms.junit(record)).iter("error")
    assert [error.get("type") for error in errors] == ["waivers"]


def test_what_is_missing_and_why_there_is_no_rung_are_said() -> None:
    text = read("incomplete").text
    assert "2 parts of the full profile could not be run here" in text
    assert "no C++ compiler was found" in text
    record = replace(conform_reports.passing(), profile="core", rung="")
    assert "No level is reached: R6 needs --profile full." in Reader(record).text


def test_the_matrix_holds_the_worst_of_each_place() -> None:
    record = conform_reports.failing()
    result = matrix(record.cases)
    assert result.layouts == list(conform_reports.LAYOUTS)
    assert list(result.columns) == list(conform_reports.OPERATIONS)
    assert result.columns["gather"][0] == "bfloat16"
    for case in record.cases:
        if case.tags and case.status == "failed":
            place = (case.tags["layout"], case.tags["operation"], case.tags["dtype"])
            assert result.cells[place] == {"failed": 1}
    counted = sum(sum(cell.values()) for cell in result.cells.values())
    assert counted == sum(bool(case.tags) for case in record.cases)


def test_a_case_of_a_layout_alone_has_a_place_and_a_run_without_layouts_no_matrix() -> None:
    record = conform_reports.passing()
    alone = replace(record.cases[0], tags={"layout": "own"})
    assert matrix([alone]).columns == {ANY: [ANY]}
    assert "any operation" in Reader(replace(record, cases=[alone])).text
    bare = [replace(case, tags={}) for case in record.cases]
    assert 'id="coverage"' not in forms.page(replace(record, cases=bare))
    empty = replace(conform_reports.incomplete(), cases=[], capabilities={}, trace=[])
    assert "Incomplete" in Reader(empty).text


# -- other forms -----------------------------------------------------------------------------------

FILES = ["conformance.json", "report.html", "report.md", "junit.xml", "badge.svg"]


def test_every_form_is_written_and_the_report_reads_back(record: RunRecord, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    # Lone surrogates do not keep it from being written.
    odd = replace(record, cases=[replace(c, details="a\udc80b") for c in record.cases])
    for each in (record, odd):
        written = write(each, folder)
        assert [file.name for file in written] == FILES
        assert set(folder.iterdir()) == set(written)
        assert all(file.read_text(encoding="utf-8") for file in written)
        assert RunRecord.read((folder / "conformance.json").read_text()) == each


def test_the_report_itself_is_not_lost_with_another_form(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "templates", dict)
    with pytest.raises(AttributeError):
        write(record, tmp_path)
    assert RunRecord.read((tmp_path / "conformance.json").read_text()) == record


def test_junit_counts_what_it_holds_and_names_as_pytest_does(name: str, record: RunRecord) -> None:
    root = ElementTree.fromstring(forms.junit(record))
    assert root.tag == "testsuites"
    kinds = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for suite in root, *root:
        for attribute, tag in kinds.items():
            assert int(suite.get(attribute, "")) == len(list(suite.iter(tag)))
    totals = record.totals
    missing = len(record.missing)
    assert [int(root.get(attribute, "")) for attribute in kinds] == [
        len(record.cases) + missing,
        totals["failed"],
        totals["error"] + missing,
        totals["waived"] + totals["not-claimed"],
    ]
    result = {f"{c.get('classname')}::{c.get('name')}": c for c in root.iter("testcase")}
    for case in record.cases if name != "hostile" else ():
        made = result[case.id.replace(".py::", "::").replace("/", ".", 1)]
        messages = [child.get("message") for child in made]
        assert messages == ([] if case.status == "passed" else [case.reason])
        if case.status == "failed":
            body = made[0].text or ""
            assert all(text in body for text in (case.reason, case.replay, case.details))


def test_markdown_says_verdict_totals_failures_and_place() -> None:
    text = forms.markdown(conform_reports.failing())
    assert text.startswith("## ❌ acme on Acme XPU 900: Not conformant\n")
    assert "| 298 | 2 | 2 | 11 | 1 |" in text
    assert "### 12 failures" in text
    assert text.count("replay: `portakv conform") == 12
    assert "holds bytes of layer 3 key slot 17, not of" in text
    assert "| driver | 5.2.1 |" in text
    assert len(text) < 12_000
    assert len(forms.markdown(conform_reports.passing())) < 1_500
    text = forms.markdown(conform_reports.failing(200))
    assert "and 180 more, in `report.html`." in text
    assert len(text) < 60_000  # a comment on GitHub has 65,536
    text = forms.markdown(conform_reports.emulated())
    assert "Conformant in emulation · R3: semantics emulated" in text
    assert "> **EMULATED.**" in text
    assert "- The simulated device was not built" in forms.markdown(conform_reports.incomplete())


def test_markdown_acts_on_nothing_that_a_record_says() -> None:
    text = forms.markdown(conform_reports.hostile())
    # What is left without code, whether within a line or in a block.
    outside = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    assert "@all" not in outside
    assert words.text("a|b\n# c `d` @me") == "a\\|b \\# c \\`d\\` @\u200bme"
    assert words.code("a``b") == "```a``b```"
    assert words.code("`a") == "`` `a ``"
    assert words.fenced("```\nx").startswith("````\n")


BADGES = {
    "passing": "R6 full 2026.12",
    "emulated": "R3 emulated full 2026.12",
    "failing": "failed 12 of 314",
    "incomplete": "incomplete 2026.12",
}


def test_the_badge_is_one_line_of_svg_with_the_verdict(name: str, record: RunRecord) -> None:
    drawn = forms.badge(record)
    assert forms.message(record) == BADGES.get(name, forms.message(record))
    assert forms.message(replace(conform_reports.passing(), rung="")) == "full 2026.12"
    root = ElementTree.fromstring(drawn)
    assert root.get("height") == "20"
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["PortaKV conformance", forms.message(record)]
    assert int(root.get("width", "")) == sum(map(forms.width, texts)) + 28
    assert "<script" not in drawn
    assert len(drawn) < 2_500


def test_the_oracle_s_own_sentence_is_taken_apart() -> None:
    """Keys and values swapped by a copy: found, expected and origin as the oracle names them."""
    src = torch.arange(2 * 4 * 8, dtype=torch.int16).view(2, 4, 1, 8)
    dst = torch.zeros_like(src)
    side = ("kv token head dim", None)
    expected = expected_copy(src, *side, dst, *side, range(4), range(4))
    dst.copy_(src.flip(0))
    byte = first_byte(f"Case 3. {compare(expected, dst)} More.")
    assert byte is not None
    assert (byte.before, byte.after, byte.wrong) == ("Case 3.", "More.", 64)
    assert (byte.place, byte.value, byte.expected, byte.origin, byte.should) == (
        "layer 0 key slot 0 head 0 byte 0",
        "0x20",
        "0x00",
        "source layer 0 value slot 0 head 0 byte 0",
        "source layer 0 key slot 0 head 0 byte 0",
    )


SLOT_4 = "source layer 0 key slot 4 head 0 byte 0"
ROW = "Destination layer 0 key slot 1"


@pytest.mark.parametrize(("origin", "should", "expected"), [
    ("what stood there before the copy: it was not written", SLOT_4, f"{ROW} was not written."),
    ("source layer 0 key slot 4 head 0 byte 2", SLOT_4,
     f"{ROW} holds other bytes of source layer 0 key slot 4."),
    ("destination layer 1 key slot 4 head 0 byte 0", SLOT_4,
     f"{ROW} holds bytes of destination layer 1 key slot 4, not of layer 0 key slot 4."),
    ("source layer 1 value slot 4 head 0 byte 0", SLOT_4,
     f"{ROW} holds bytes of layer 1 value slot 4, not of layer 0 key slot 4."),
    ("of unknown origin", SLOT_4, f"{ROW} holds a byte of unknown origin."),
    ("a piece of a canary", SLOT_4, f"{ROW} holds a byte that is a piece of a canary."),
    (SLOT_4, "what was there before: the copy must not write it",
     "The copy wrote to layer 0 key slot 1, where it must not write."),
])  # fmt: skip
def test_the_fault_is_told_in_a_few_words(origin: str, should: str, expected: str) -> None:
    byte = first_byte(
        f"Destination layer 0 key slot 1 head 0 byte 0 (storage 0, offset 64) holds 0x01, which is "
        f"{origin}; expected 0x02, {should}. In all 1 bytes are wrong."
    )
    assert byte is not None
    assert byte.headline() == expected
    assert first_byte("The worker process died.") is None


def test_times_values_and_odd_characters_in_words() -> None:
    assert words.printable("a\x00b\x1b[1m\ud800") == "a\\x00b\\x1b[1m\\ud800"
    assert forms.breakable("a/b\x00::c") == "a<wbr>/b\\x00<wbr>::c"
    assert forms.prose("Field `a<b` is") == "Field <code>a&lt;b</code> is"
    assert forms.prose("One ` alone") == "One ` alone"
    assert [words.duration(s) for s in (0.42, 41.6, 187.4, 3725)] == [
        "0.4 s",
        "42 s",
        "3 min 7 s",
        "1 h 2 min",
    ]
    assert words.moment("2026-11-20T23:30:00-02:00") == "21 Nov 2026, 01:30 UTC"
    assert words.moment("yesterday") == "yesterday"
    places = [["device", "pinned"], ["pinned", "host"]]
    assert words.plain(places) == "device → pinned, pinned → host"
    values: tuple[object, ...] = (None, True, [], 4)
    assert [words.plain(value) for value in values] == ["any", "yes", "none", "4"]
