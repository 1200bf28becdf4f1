# SPDX-License-Identifier: Apache-2.0
"""Tables: what stays whole, what is folded, and that nothing is ever cropped."""

from __future__ import annotations

import io
import re

import pytest

from portakv.cli.console import PIPED_WIDTH, output_width, print_prose, print_rows

TITLES = ["name", "what it says", "bytes"]
ROWS = [
    ["a-name-that-is-twenty-six", "words that [bold]can[/bold] give way, :smile: " * 3, "1"],
    ["b", "anincrediblylongwordthatfitsnowhereatallinanarrowtable", "1024"],
    ["c", "", "16"],
]


def print_table(title: str = "") -> None:
    print_rows(TITLES, ROWS, prose=TITLES[1:], right=["bytes"], title=title)


def letters(text: str) -> list[str]:
    return sorted(c for c in text if not c.isspace() and c != "-")


@pytest.mark.parametrize("width", [20, 34, 48, 80, 120, 300])
def test_nothing_is_cropped(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("T")
    out = capsys.readouterr().out
    expected = "T" + "".join(TITLES) + "".join(map("".join, ROWS))
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
    print_table()
    lines = capsys.readouterr().out.splitlines()
    ends = {len(x) for x in lines if x.split()[-1:] in (["1"], ["1024"], ["16"])}
    assert ends == {80}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("control", ["", "NO_COLOR", "TERM", "a pipe"])
def test_a_terminal_has_colours(control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if control in ("NO_COLOR", "TERM"):
        monkeypatch.setenv(control, "dumb")
    out = io.StringIO() if control == "a pipe" else Terminal()
    monkeypatch.setattr("sys.stdout", out)
    rows = [["a", "chosen"], ["b", "rejected"]]
    print_rows(["name", "answer"], rows, prose=["answer"])
    plain = "name  answer\n----  --------\na     chosen\nb     rejected\n"
    text = out.getvalue()
    assert re.sub(r"\033\[[0-9;]*m", "", text) == plain
    assert (text == plain) == bool(control)
    if not control:
        assert "\033[1mname\033[0m  \033[1manswer\033[0m\n----" in text
        assert "\033[36ma\033[0m     \033[1;32mchosen\033[0m\n" in text
        assert "\033[31mrejected\033[0m\n" in text


def test_a_pipe_has_a_width_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.__stdout__", None)
    assert output_width() == PIPED_WIDTH


def test_prose_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_prose("four " * 20)
    assert capsys.readouterr().out == "four " * 15 + "four\n" + "four " * 3 + "four\n"
