# SPDX-License-Identifier: Apache-2.0
"""Judge result files: ``python -m benchmarks.check FILE...``.

Prints each performance target of ``bars.toml`` that concerns a file's device, with its figure and
*met*, *accepted* or *missed*. Exit code 1 if a target is missed, 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from portakv.cli.console import print_prose, print_rows
from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.harness import Row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("bars.toml")
#: The suite that a result of `portakv bench --host`, `--plugs`, ... names, and the prefix of the
#: kinds of its rows. A result of copies inside a device names no suite.
HOST_SUITE = "host"
WALL_SUITE = "wall"
INTEGRATION_SUITE = "plugs"
STORAGE_SUITE = "storage"
MIGRATION_SUITE = "migration"
ENGINE_SUITE = "engines"
ENCODING_SUITE = "encodings"
SUITES = {
    HOST_SUITE: "host_",
    WALL_SUITE: "wall_",
    INTEGRATION_SUITE: "plug_",
    STORAGE_SUITE: "storage_",
}
SUITES[MIGRATION_SUITE] = "migrate_"
SUITES[ENGINE_SUITE] = "engine_"
SUITES[ENCODING_SUITE] = "encoding_"

#: The share by which a target may be worse than its accepted figure: the noise between two runs.
TOLERANCE = 0.03
_TRIES = 3

#: Conditions that `where` can require of a number or a word besides equality.
CONDITIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "is": lambda value, expected: value == expected,  # a plain value means this
    "at_least": lambda value, expected: value >= expected,
    "below": lambda value, expected: value < expected,
    "multiple_of": lambda value, expected: value % expected == 0,
    "no_multiple_of": lambda value, expected: value % expected != 0,
    "any_of": lambda value, expected: value in expected,
    "none_of": lambda value, expected: value not in expected,
}


def _conditions(expected: object) -> Row:
    """Return the conditions of a field: those of a table, or equality with a plain value."""
    return {**expected} if isinstance(expected, Mapping) else {"is": expected}


@dataclass(frozen=True, slots=True)
class Bar:
    """A performance target: the limit that a figure of matching rows must reach."""

    name: str
    where: Mapping[str, Any]  # fields of a row: a value, or `CONDITIONS` that the field meets
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None
    accepted: Row | None = None  # for a missed limit: figure, reason, tries
    open: str = ""

    def __post_init__(self) -> None:
        conditions = [expected for expected in self.where.values() if isinstance(expected, Mapping)]
        if unknown := {name for expected in conditions for name in expected} - set(CONDITIONS):
            raise ValueError(
                f"Expected conditions of target {self.name!r} to be some of {list(CONDITIONS)}, "
                f"got {sorted(unknown)}. Correct `where`."
            )
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"Expected either at_least or at_most, got {self!r}. Write one.")
        if self.accepted is None:
            return
        tries = self.accepted["tries"]
        reason = self.accepted["reason"]
        if len(tries) < _TRIES or not reason.strip():
            raise ValueError(
                f"Expected at least {_TRIES} different tries and a reason for target "
                f"{self.name!r}, got {len(tries)} tries and the reason {reason!r}. Add them."
            )

    @property
    def suite(self) -> str | None:
        """Return the suite of the results that the target is about."""
        kind = str(self.where.get("kind", ""))
        return next((name for name, begin in SUITES.items() if kind.startswith(begin)), None)

    def concerns(self, parts: Sequence[str]) -> bool:
        """Return True if the target is about one of the parts of a suite, or about all of them."""
        if "part" not in self.where:
            return True
        conditions = _conditions(self.where["part"])
        return any(
            all(CONDITIONS[name](part, limit) for name, limit in conditions.items())
            for part in parts
        )

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_most is None else f"<= {self.at_most:g}"

    def reached(self, value: float, accepted: float | None = None) -> bool:
        """Return True if a figure reaches the limit, or is no worse than an accepted figure."""
        if self.at_most is not None:
            return value <= (self.at_most if accepted is None else accepted * (1 + TOLERANCE))
        assert self.at_least is not None
        return value >= (self.at_least if accepted is None else accepted * (1 - TOLERANCE))

    def picks(self, row: Row) -> bool:
        """Return True for rows that the target is about."""
        return {self.figure, *self.where} <= row.keys() and all(
            CONDITIONS[name](row[field], limit)
            for field, expected in self.where.items()
            for name, limit in _conditions(expected).items()
        )

    def worst(self, rows: Sequence[Row]) -> Row:
        """Return the row that decides."""
        pick = max if self.at_least is None else min
        return pick(rows, key=lambda row: float(row[self.figure]))


class Verdict(NamedTuple):
    """The verdict on one target: ``met``, ``accepted`` or ``missed``."""

    bar: Bar
    figure: float | None
    word: str
    reason: str = ""
    row: str = ""  # the row that decided
    rows: int = 0  # the number of judged rows


def load_targets(path: Path = FILE) -> list[Bar]:
    """Return the targets of a file; raise `ValueError` for a target that cannot be judged."""
    return [Bar(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["bar"]]


def judge(results: Row, targets: Sequence[Bar]) -> list[Verdict]:
    """Return a verdict for each target that concerns the device, the suite and the parts of the
    results."""
    device = results["machine"]["device_type"]
    suite = results.get("suite")
    parts = results.get("asked", {}).get("parts")
    return [
        _judge(bar, results["rows"])
        for bar in targets
        if bar.device in (None, device)
        and bar.suite == suite
        and (parts is None or bar.concerns(parts))
    ]


def _judge(bar: Bar, rows: Sequence[Row]) -> Verdict:
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


def _named(row: Row) -> str:
    names = ["shape", "layers", "backend", "way", "op", "index", "ids", "loop", "stream", "other"]
    names.append("format")
    if row.get("kind") == "startup":
        names.append("cache")  # of compiled kernels; in other rows it is a layout
    return " ".join(str(row[name]) for name in names if name in row)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print the figure, limit, verdict and deciding row of each target; then the reasons."""
    titles = ["target", "figure", "limit", "verdict", "rows", "worst"]
    prose = [title for title in titles if title != "verdict"]
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
    print_rows(titles, rows, prose, ["figure", "limit", "rows"], "performance targets")
    for v in verdicts:
        if v.reason:
            print_prose(f"{v.bar.name}: {v.reason}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Judge files; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    described = "a result of `portakv bench`"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=described)
    parser.add_argument(
        "--bars", dest="targets", type=Path, default=FILE, help="default: benchmarks/bars.toml"
    )
    expected = parser.parse_args(argv)
    return max(_check(file, expected.targets, len(expected.files) > 1) for file in expected.files)


def _check(file: Path, targets: Path, named: bool) -> int:
    """Judge one file; return its exit code."""
    try:
        results = recorded.read(file)
        verdicts = judge(results, load_targets(targets))
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
