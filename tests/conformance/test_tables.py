# SPDX-License-Identifier: Apache-2.0
"""The generated tables: what docs/hardware.md says of rungs is what ladder.toml says."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from portakv_conformance.evidence import ladder as ladders
from portakv_conformance.evidence.ladder import Ladder

ROOT = Path(__file__).resolve().parents[2]
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
