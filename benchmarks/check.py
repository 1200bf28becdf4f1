# SPDX-License-Identifier: Apache-2.0
"""Judge result files: ``python -m benchmarks.check FILE...``.

Prints each bar of ``bars.toml`` that concerns a file's device, with its figure and *met*,
*accepted* or *missed*. Exit code 1 where one is missed, 2 where a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from portakv.cli.console import Column, print_prose, print_table
from portakv_benchmarks.shared import recorded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("bars.toml")
#: What results of `portakv bench --host`, `--plugs`, ... say of themselves, and how the kinds of
#: their rows begin; those of copies inside a device say nothing.
HOST_SUITE = "host"
PLUG_SUITE = "plugs"
STORAGE_SUITE = "storage"
MIGRATION_SUITE = "migration"
SUITES = {HOST_SUITE: "host_", PLUG_SUITE: "plug_", STORAGE_SUITE: "storage_"}
SUITES[MIGRATION_SUITE] = "migrate_"

#: How much worse than its accepted figure a bar may come out: the noise between two runs.
TOLERANCE = 0.03
_TRIES = 3

#: What `where` can ask of a number or a word beside equality.
CONDITIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "is": lambda found, asked: found == asked,  # what a plain value asks
    "at_least": lambda found, asked: found >= asked,
    "below": lambda found, asked: found < asked,
    "multiple_of": lambda found, asked: found % asked == 0,
    "no_multiple_of": lambda found, asked: found % asked != 0,
    "any_of": lambda found, asked: found in asked,
    "none_of": lambda found, asked: found not in asked,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """What some figure of the rows that have it has to reach."""

    name: str
    where: Mapping[str, Any]  # fields of a row: a value, or `CONDITIONS` that it fulfils
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None
    accepted: Mapping[str, Any] | None = None  # if it resisted: figure, reason, tries
    open: str = ""

    def __post_init__(self) -> None:
        conditions = [asked for asked in self.where.values() if isinstance(asked, Mapping)]
        if unknown := {name for asked in conditions for name in asked} - set(CONDITIONS):
            raise ValueError(
                f"Bar {self.name!r} asks for {sorted(unknown)}; known are {list(CONDITIONS)}."
            )
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self!r} has no limit or two; expected at_least or at_most.")
        if self.accepted is None:
            return
        tries = self.accepted["tries"]
        reason = self.accepted["reason"]
        if len(tries) < _TRIES or not reason.strip():
            raise ValueError(
                f"Bar {self.name!r} is accepted with {len(tries)} tries and the reason {reason!r}; "
                f"expected at least {_TRIES} different tries and a reason."
            )

    @property
    def suite(self) -> str | None:
        """What the results that it is about say of themselves."""
        kind = str(self.where.get("kind", ""))
        return next((name for name, begin in SUITES.items() if kind.startswith(begin)), None)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"

    def reached(self, found: float, accepted: float | None = None) -> bool:
        """True if a figure is as good as the limit, or no worse than an accepted one."""
        if self.at_most is not None:
            return found <= (self.at_most if accepted is None else accepted * (1 + TOLERANCE))
        assert self.at_least is not None
        return found >= (self.at_least if accepted is None else accepted * (1 - TOLERANCE))

    def picks(self, row: Mapping[str, Any]) -> bool:
        """True for rows that the bar is about."""
        return {self.figure, *self.where} <= row.keys() and all(
            CONDITIONS[name](row[field], limit)
            for field, asked in self.where.items()
            for name, limit in (asked if isinstance(asked, Mapping) else {"is": asked}).items()
        )

    def worst(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The row that decides."""
        pick = max if self.at_least is None else min
        return pick(rows, key=lambda row: float(row[self.figure]))


class Verdict(NamedTuple):
    """What became of one bar: ``met``, ``accepted`` or ``missed``."""

    bar: Bar
    figure: float | None
    word: str
    reason: str = ""
    row: str = ""  # the one that decided
    rows: int = 0  # how many were judged


def load_bars(path: Path = FILE) -> list[Bar]:
    """The bars of a file; raises `ValueError` for one that asks for what cannot be judged."""
    return [Bar(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["bar"]]


def judge(results: Mapping[str, Any], bars: Sequence[Bar]) -> list[Verdict]:
    """A verdict for each bar that concerns the device, and the suite, of the results."""
    device = results["machine"]["device_type"]
    suite = results.get("suite")
    return [
        _judge(bar, results["rows"])
        for bar in bars
        if bar.device in (None, device) and bar.suite == suite
    ]


def _judge(bar: Bar, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    picked = [row for row in rows if bar.picks(row)]
    if not picked:
        return Verdict(bar, None, "missed", bar.open or "no such row was measured")
    deciding = bar.worst(picked)
    worst = float(deciding[bar.figure])
    noisy = "the row is flagged as noisy" if deciding.get("noisy") else ""
    if not all(row["verified"] for row in picked):
        word = "missed"
        reason = "some bytes were wrong"
    elif bar.reached(worst):
        word = "met"
        reason = noisy
    elif bar.accepted is None:
        word = "missed"
        reason = bar.open or noisy
    elif bar.reached(worst, bar.accepted["figure"]):
        word = "accepted"
        reason = bar.accepted["reason"]
    else:
        word = "missed"
        reason = "worse than the figure that was accepted"
    return Verdict(bar, worst, word, reason, _named(deciding), len(picked))


def _named(row: Mapping[str, Any]) -> str:
    names = ["shape", "layers", "backend", "way", "op", "index", "ids", "loop", "stream", "other"]
    names.append("format")
    if row.get("kind") == "startup":
        names.append("cache")  # of compiled kernels; in other rows it is a layout
    return " ".join(str(row[name]) for name in names if name in row)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print figure, bar and verdict of each, and the row that decided; then what is to be said."""
    columns = [
        Column("bar"),
        Column("figure", right=True),
        Column("asked", right=True),
        Column("verdict", whole=True),
        Column("rows", right=True),
        Column("worst"),
    ]
    rows = [
        [
            v.bar.name,
            "-" if v.figure is None else f"{v.figure:.4g}",
            str(v.bar),
            v.word,
            str(v.rows),
            v.row,
        ]
        for v in verdicts
    ]
    print_table(columns, rows, title="bars")
    for v in verdicts:
        if v.reason:
            print_prose(f"{v.bar.name}: {v.reason}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Judge files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    result = "a result of `portakv bench`"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=result)
    parser.add_argument("--bars", type=Path, default=FILE, help="default: benchmarks/bars.toml")
    asked = parser.parse_args(argv)
    return max(_check(file, asked.bars, len(asked.files) > 1) for file in asked.files)


def _check(file: Path, bars: Path, named: bool) -> int:
    """Judge one file; its part of the exit code."""
    try:
        results = recorded.read(file)
        verdicts = judge(results, load_bars(bars))
    except (OSError, ValueError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        print(f"check: {file} cannot be judged: {why}", file=sys.stderr)
        return 2
    if named:
        print(file)
    print_verdicts(verdicts)
    counts = {word: sum(v.word == word for v in verdicts) for word in ("met", "accepted", "missed")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["missed"] or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
