# SPDX-License-Identifier: Apache-2.0
"""Judge a result file: ``python -m benchmarks.check FILE``.

Prints each bar of ``bars.toml`` that concerns the file's device, with its figure and *met*,
*accepted* or *missed*. Exit code 1 where one is missed, 2 where a file cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portakv.console import Column, print_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("bars.toml")

#: How much worse than its accepted figure a bar may come out: the noise between two runs.
TOLERANCE = 0.03
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Accepted:
    """A bar that resisted: what was reached, why no more, and what was tried."""

    figure: float
    reason: str
    tries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """What some figure of some rows has to reach."""

    name: str
    where: Mapping[str, Any]
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None
    accepted: Accepted | None = None

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def reached(self, found: float) -> bool:
        """True where the figure is as good as the bar asks."""
        if self.at_least is not None:
            return found >= self.at_least
        assert self.at_most is not None
        return found <= self.at_most

    def worst(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The figure that decides."""
        figures = [float(row[self.figure]) for row in rows]
        return min(figures) if self.at_least is not None else max(figures)

    def as_accepted(self, found: float) -> bool:
        """True where the figure is no worse than the one that was accepted."""
        if self.accepted is None:
            return False
        known = self.accepted.figure
        if self.at_least is not None:
            return found >= known * (1 - TOLERANCE)
        return found <= known * (1 + TOLERANCE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one bar: ``met``, ``accepted`` or ``missed``."""

    bar: Bar
    figure: float | None
    word: str
    reason: str = ""


def load_bars(path: Path = FILE) -> list[Bar]:
    """The bars of a file.

    Raises:
        ValueError: a bar without exactly one limit, or accepted without three tries and a reason.
    """
    bars = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["bar"]:
        accepted = entry.pop("accepted", None)
        if accepted is not None:
            accepted = Accepted(**{**accepted, "tries": tuple(accepted["tries"])})
        bar = Bar(**entry, accepted=accepted)
        if (bar.at_least is None) == (bar.at_most is None):
            raise ValueError(f"Bar {bar.name!r} has {entry}; expected at_least or at_most.")
        if accepted is not None and (len(accepted.tries) < _TRIES or not accepted.reason.strip()):
            raise ValueError(
                f"Bar {bar.name!r} is accepted with {len(accepted.tries)} tries and the reason "
                f"{accepted.reason!r}; expected at least {_TRIES} different tries and a reason."
            )
        bars.append(bar)
    return bars


def judge(results: Mapping[str, Any], bars: Sequence[Bar]) -> list[Verdict]:
    """A verdict for each bar that concerns the device of the results."""
    device = results["machine"]["device_type"]
    return [_judge(bar, results["rows"]) for bar in bars if bar.device in (None, device)]


def _judge(bar: Bar, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    picked = [row for row in rows if all(row.get(k) == v for k, v in bar.where.items())]
    if not picked:
        return Verdict(bar, None, "missed", "no such row was measured")
    worst = bar.worst(picked)
    if not all(row["verified"] for row in picked):
        return Verdict(bar, worst, "missed", "some bytes were wrong")
    noisy = "a row is flagged as noisy" if any(row.get("noisy") for row in picked) else ""
    if bar.reached(worst):
        return Verdict(bar, worst, "met", noisy)
    if bar.as_accepted(worst):
        assert bar.accepted is not None
        return Verdict(bar, worst, "accepted", bar.accepted.reason)
    worse = "worse than the figure that was accepted" if bar.accepted else noisy
    return Verdict(bar, worst, "missed", worse)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print figure, bar and verdict of each."""
    columns = [
        Column("bar"), Column("figure", right=True), Column("asked", right=True),
        Column("verdict", whole=True), Column("remark"),
    ]  # fmt: skip
    print_table(
        columns,
        [
            [v.bar.name, "-" if v.figure is None else f"{v.figure:.3g}", str(v.bar), v.word,
             v.reason]
            for v in verdicts
        ],
        title="bars",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Judge one file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("file", type=Path, help="a result of `portakv bench`")
    parser.add_argument("--bars", type=Path, default=FILE, help="default: benchmarks/bars.toml")
    asked = parser.parse_args(argv)
    try:
        results = json.loads(asked.file.read_text(encoding="utf-8"))
        verdicts = judge(results, load_bars(asked.bars))
    except (OSError, ValueError, KeyError) as error:
        print(f"check: {asked.file} cannot be judged: {error}", file=sys.stderr)
        return 2
    print_verdicts(verdicts)
    counts = {word: sum(v.word == word for v in verdicts) for word in ("met", "accepted", "missed")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["missed"] or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
