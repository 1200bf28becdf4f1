# SPDX-License-Identifier: Apache-2.0
"""Tables: what stays whole, what is folded, and that nothing is ever cropped."""

from __future__ import annotations

import pytest

from portakv.cli.console import PIPED_WIDTH, Column, output_width, print_prose, print_table

COLUMNS = [Column("name", whole=True), Column("what it says"), Column("bytes", right=True)]
ROWS = [
    ["a-name-that-is-twenty-six", "words that [bold]can[/bold] give way, :smile: " * 3, "1"],
    ["b", "anincrediblylongwordthatfitsnowhereatallinanarrowtable", "1024"],
    ["c", "", "16"],
]


pytestmark = pytest.mark.usefixtures("either")


def letters(text: str) -> list[str]:
    return sorted(c for c in text if not c.isspace() and c not in "-─━")


@pytest.mark.parametrize("width", [20, 34, 48, 80, 120, 300])
def test_nothing_is_cropped(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS, title="T")
    out = capsys.readouterr().out
    expected = "T" + "".join(column.title for column in COLUMNS) + "".join(map("".join, ROWS))
    assert letters(out) == letters(expected)
    assert max(map(len, out.splitlines())) <= width
    assert all(line == line.rstrip() for line in out.splitlines())
    if width >= 48:
        assert "\na-name-that-is-twenty-six " in out


def test_prose_is_folded_at_the_terminals_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_prose("one two three four five six seven")
    assert capsys.readouterr().out == "one two three four\nfive six seven\n"


def test_numbers_stand_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    ends = {len(x) for x in lines if x.split()[-1:] in (["1"], ["1024"], ["16"])}
    assert ends == {80}


def test_a_pipe_has_a_width_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", None)
    assert output_width() == PIPED_WIDTH


def test_prose_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_prose("four " * 20)
    assert capsys.readouterr().out == "four " * 15 + "four\n" + "four " * 3 + "four\n"
