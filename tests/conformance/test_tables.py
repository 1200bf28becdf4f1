# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages say what ladder.toml says, each pitfall names tests that exist."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.conform_runs import ROOT, python

from portakv_conformance.evidence import ladder as ladders
from portakv_conformance.evidence.ladder import Ladder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = ROOT / "docs" / "hardware.md"
VENDORS = {"cuda", "ascend", "ascendc-emulated", "mlu", "hip", "hip-emulated"}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    return importlib.import_module("readme_tables")


def rows(text: str) -> list[str]:
    start, end = text.index("<!-- table: hardware -->"), text.index("<!-- end -->")
    return [line for line in text[start:end].splitlines() if line.startswith("|")][2:]


def row_of(backend: str, shown: list[str]) -> str:
    (row,) = (line for line in shown if line.split("|")[3].strip() == f"`{backend}`")
    return row


def test_the_page_has_every_rung_of_every_vendor_s_backend(tables: Any) -> None:
    found, shown = ladders.read(), rows(PAGE.read_text(encoding="utf-8"))
    for rung in found.rungs:
        if rung.backend in VENDORS:
            row = row_of(rung.backend, shown)
            assert f"{rung.rung}: {rung.told} ({rung.device})" in row
    named = {row[2] for row in tables.HARDWARE} | {"reference", "compiled"}
    assert named >= {rung.backend for rung in found.rungs}


def test_the_table_follows_the_ladder(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine,) = (r for r in ladders.read().rungs if (r.backend, r.rung) == ("mlu", "R3"))
    real = replace(mine, device="MLU590", rung="R6", emulated=False, told="9 cases", note="")
    gone = replace(mine, source_sha256="0" * 64)
    monkeypatch.setattr(tables, "borne_out", lambda: Ladder((gone, real)))
    made = rows(f"<!-- table: hardware -->\n{tables.hardware()}\n<!-- end -->")
    row = row_of("mlu", made)
    assert re.search(r"\| (expired: )?R6: 9 cases \(MLU590\)", row)
    assert f"expired: R3: {mine.told} (mlu, emulated), source changed since" in row
    assert row_of("hip", made).endswith("| R0: described |")


@pytest.mark.parametrize("change", ["another rung", "a row less", "no mark"])
def test_a_stale_page_is_found(
    tables: Any, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "hardware.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", {page: {"hardware": lambda: "| mlu | R3 |"}})
    page.write_text("a <!-- table: hardware -->\n<!-- end --> z\n")
    tables.write()
    text = page.read_text()
    assert text == "a <!-- table: hardware -->\n| mlu | R3 |\n<!-- end --> z\n"
    tables.check()
    new = {"another rung": ("R3", "R6"), "a row less": ("| mlu | R3 |\n", ""),
           "no mark": ("<!-- end -->", "")}[change]  # fmt: skip
    page.write_text(text.replace(*new))
    with pytest.raises(SystemExit, match=r"hardware\.md"):
        tables.check()


# -- pitfalls -----------------------------------------------------------------------------------

SOURCE = ROOT / "conformance" / "pitfalls.toml"
TABLE: dict[str, Any] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
PITFALLS: list[dict[str, Any]] = TABLE["pitfall"]
#: How many are known in each area; a pitfall may be split in two, none may be lost.
KNOWN = {
    "addressing": 22, "indices": 14, "ordering": 10, "host memory": 7, "copy engine": 11,
    "honesty": 3,
}  # fmt: skip
NAMED = sorted({test for pitfall in PITFALLS for test in pitfall.get("tests", ())})


@cache
def functions(path: Path) -> frozenset[str]:
    """The tests that a file defines: ``test_y``, or ``TestX::test_y`` in a class."""
    owners: list[tuple[str, Any]] = [("", ast.parse(path.read_text(encoding="utf-8")))]
    owners += [(f"{n.name}::", n) for n in owners[0][1].body if isinstance(n, ast.ClassDef)]
    return frozenset(
        owner + node.name
        for owner, tree in owners
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    )


@pytest.mark.parametrize("test", NAMED)
def test_a_named_test_exists(test: str) -> None:
    assert test.startswith(("cases/test_", "tests/"))
    file, _, function = test.partition("::")
    path = (ROOT / "conformance" if file.startswith("cases/") else ROOT) / file
    assert path.is_file(), f"{test} is named in {SOURCE.name}, but there is no {path}."
    assert function in functions(path), f"{test} is named in {SOURCE.name} and does not exist."


def test_each_pitfall_has_tests_or_says_what_is_not_built() -> None:
    for pitfall in PITFALLS:
        what = pitfall["what"]
        assert set(pitfall) <= {"area", "what", "tests", "later"}, what
        assert pitfall.get("tests") or pitfall.get("later"), f"Nothing tests: {what}"
        assert len(set(pitfall.get("tests", ()))) == len(pitfall.get("tests", ())), what
        for sentence in (what, pitfall.get("later", "A sentence.")):
            assert re.fullmatch(r"[A-Z][^|\n]+\.", sentence), sentence
    assert len({pitfall["what"] for pitfall in PITFALLS}) == len(PITFALLS)
    assert set(TABLE) == {"pitfall"}


def test_no_pitfall_was_lost() -> None:
    found = Counter(pitfall["area"] for pitfall in PITFALLS)
    assert set(found) == set(KNOWN)
    for area, least in KNOWN.items():
        assert found[area] >= least, f"{area}: {found[area]} of {least} known pitfalls are left."
    # Only engines and movers that do not exist can be left for later.
    late = {pitfall["area"] for pitfall in PITFALLS if "later" in pitfall}
    assert late <= {"host memory", "copy engine", "honesty"}


def test_the_page_is_what_the_table_says() -> None:
    done = python(".ci/pitfalls_table.py", "--check")
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    for pitfall in PITFALLS:
        assert pitfall["what"] in page


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    for name in ("conformance/pitfalls.toml", ".ci/pitfalls_table.py", "docs/pitfalls.md"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    source = tmp_path / "conformance" / "pitfalls.toml"
    source.write_text(source.read_text(encoding="utf-8").replace("list is empty", "list is void"))
    command = str(tmp_path / ".ci" / "pitfalls_table.py")
    stale = python(command, "--check")
    assert stale.returncode == 1
    assert "python .ci/pitfalls_table.py" in stale.stderr
    assert python(command).returncode == python(command, "--check").returncode == 0
    assert "list is void" in (tmp_path / "docs" / "pitfalls.md").read_text(encoding="utf-8")
