# SPDX-License-Identifier: Apache-2.0
"""report.html as a document: what it shows, and that nothing in a record can become markup."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from support import conform_reports

from portakv_conformance.record import RunRecord
from portakv_conformance.report.matrix import ANY, matrix
from portakv_conformance.report.page import breakable, page, prose
from portakv_conformance.report.words import printable

_VOID = {"meta", "link", "input", "wbr", "br", "img"}


class Reader(HTMLParser):
    """Elements and text of a document, and whether every element is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self.feed(text)
        self.close()

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

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@cache
def read(name: str) -> Reader:
    return Reader(page(conform_reports.RUNS[name]()))


@pytest.fixture(params=list(conform_reports.RUNS))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def record(name: str) -> RunRecord:
    return conform_reports.RUNS[name]()


def test_characters_that_no_document_takes_are_shown_as_their_number() -> None:
    assert printable("a\x00b\x1b[1m\ud800") == "a\\x00b\\x1b[1m\\ud800"
    assert breakable("a/b\x00::c") == "a<wbr>/b\\x00<wbr>::c"


def test_backticks_of_a_sentence_are_code_where_they_are_paired() -> None:
    assert prose("Field `a<b` is") == "Field <code>a&lt;b</code> is"
    assert prose("One ` alone") == "One ` alone"


def test_the_page_is_well_formed(name: str) -> None:
    assert read(name).open == []
    assert page(conform_reports.passing()).startswith('<!doctype html>\n<html lang="en">')


def test_the_page_loads_nothing(name: str) -> None:
    """No address but its own anchors, and a policy under which nothing else would load."""
    reader = read(name)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            address = attributes.get(name)
            own = address is None or address.startswith(("#", "data:image/svg+xml,"))
            assert own, (tag, address)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    loading = r"@import|url\(|https?:|fetch\(|XMLHttpRequest"
    assert not re.search(loading, "".join(reader.raw.values()))
    policy = next(a["content"] for _, a in reader.elements if "http-equiv" in a)
    assert policy is not None
    for name, content in reader.raw.items():
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_no_text_of_a_record_becomes_an_element() -> None:
    """A hostile record gives the very elements of a tame one, and one script: our own."""
    reader = read("hostile")
    names = [tag for tag, _ in reader.elements]
    assert names.count("script") == 1
    assert "img" not in names
    assert reader.text.count("window.hacked=1") > 20


def test_verdict_and_totals_are_said(name: str, record: RunRecord) -> None:
    text = read(name).text
    word = {"conformant": "Conformant", "failed": "Not conformant", "incomplete": "Incomplete"}
    assert word[record.verdict] in text
    if record.rung:
        assert f" {record.rung} " in text
    for status in ("passed", "failed", "waived"):
        if record.totals[status]:
            assert f" {record.totals[status]} {status} " in text


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
    text = Reader(page(conform_reports.failing(60))).text  # folded behind the first
    assert "60 failures" in text
    assert "35 more failures" in text


def test_every_case_stands_in_the_list_with_its_status() -> None:
    record = conform_reports.failing()
    shown = [a for tag, a in read("failing").elements if tag == "details" and a["class"] == "case"]
    assert len(shown) == len(record.cases)
    for status, number in record.totals.items():
        assert sum(a["data-status"] == status for a in shown) == number


def test_waivers_show_reason_and_expiry_and_those_that_do_not_hold_are_named() -> None:
    text = read("failing").text
    assert "Driver 5.2.1 reorders two streams; mended in 5.3." in text
    assert "Expires with suite 2027.02." in text
    gone = {"id": "cases/test_core.py::gone", "reason": "r", "expires": "2027.02"}
    text = Reader(page(replace(conform_reports.passing(), verdict="failed", waivers=[gone]))).text
    assert "Waivers that do not hold" in text
    assert "No case failed" in text


def test_what_is_missing_and_why_there_is_no_rung_are_said() -> None:
    text = read("incomplete").text
    assert "2 parts of the full profile could not be run here" in text
    assert "no C++ compiler was found" in text
    record = replace(conform_reports.passing(), profile="core", rung="")
    assert "No rung is reached: R6 needs --profile full." in Reader(page(record)).text


def test_the_matrix_holds_the_worst_of_each_place() -> None:
    record = conform_reports.failing()
    found = matrix(record.cases)
    assert found.layouts == list(conform_reports.LAYOUTS)
    assert list(found.columns) == list(conform_reports.OPERATIONS)
    assert found.columns["gather"][0] == "bfloat16"
    for case in record.cases:
        if case.tags and case.status == "failed":
            place = (case.tags["layout"], case.tags["operation"], case.tags["dtype"])
            assert found.cells[place].status == "failed"
            assert found.cells[place].text() == "1 failed"
    counted = sum(sum(cell.statuses.values()) for cell in found.cells.values())
    assert counted == sum(bool(case.tags) for case in record.cases)


def test_a_case_of_a_layout_alone_has_a_place_and_a_run_without_layouts_no_matrix() -> None:
    record = conform_reports.passing()
    alone = replace(record.cases[0], tags={"layout": "own"})
    assert matrix([alone]).columns == {ANY: [ANY]}
    assert "any operation" in Reader(page(replace(record, cases=[alone]))).text
    bare = [replace(case, tags={}) for case in record.cases]
    assert 'id="coverage"' not in page(replace(record, cases=bare))
    empty = replace(conform_reports.incomplete(), cases=[], capabilities={}, trace=[])
    assert "Incomplete" in Reader(page(empty)).text
