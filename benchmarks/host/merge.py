# SPDX-License-Identifier: Apache-2.0
"""One result out of several of `portakv bench --host --only ...`, or `--plugs`, with plots and
verdicts.

``python -m benchmarks.host.merge FILE... --out DIR``; a part that occurs twice counts as it is in
the last file. Exit code 1 where a bar is missed, 2 where the files are not of one machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from portakv_benchmarks.check import SUITES, judge, load_targets, print_verdicts
from portakv_benchmarks.cli import write
from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.harness import Row
from portakv_benchmarks.shared.tables import print_results

#: Fields that must be equal for figures to be comparable.
_SAME = ("device", "driver_version", "torch", "portakv", "python")


def merge(results: Sequence[Row]) -> Row:
    """Return all rows, of each part those of the last result that has it.

    Raises `ValueError` for a result without parts, of another suite, or of another machine.
    """
    last = results[-1]
    suite = last.get("suite")
    parts: dict[str, int] = {}
    for n, result in enumerate(results):
        if suite not in SUITES or result.get("suite") != suite:
            expected = suite if suite in SUITES else " or --".join(SUITES)
            got = result.get("suite")
            raise ValueError(
                f"Expected file {n + 1} to be a result of `portakv bench --{expected}`, got a "
                f"result of suite {got!r}. Pass results of one suite."
            )
        for name in _SAME:
            value = result["machine"].get(name)
            last_value = last["machine"].get(name)
            if value != last_value:
                raise ValueError(
                    f"Expected {name} of file {n + 1} to be {last_value!r}, as in the last file, "
                    f"got {value!r}. Pass results of one machine."
                )
        parts |= dict.fromkeys(result["asked"]["parts"], n)
    rows = []
    left_out = []
    for n, result in enumerate(results):
        rows += [row for row in result["rows"] if parts[row["part"]] == n]
        replaced = [part for part in result["asked"]["parts"] if parts[part] != n]
        lines = [line for line in result["left_out"] if line.partition(": ")[0] not in replaced]
        left_out += [line for line in lines if line not in left_out]
    if {row["part"] for row in rows} == set(parts):  # what broke off in one is in another
        left_out = [line for line in left_out if not line.startswith("interrupted:")]
    peers = {k: v for result in results for k, v in result["asked"]["peers"].items()}
    asked = {**last["asked"], "parts": list(parts), "peers": peers}
    name = last["name"].partition(f"-{suite}")[0] + f"-{suite}"
    return {**last, "name": name, "asked": asked, "left_out": left_out, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Merge files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host.merge", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        results = merge([recorded.read(file) for file in args.files])
    except (OSError, ValueError, KeyError) as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    for path in write(results, args.out, results["name"]):
        print(f"wrote {path}", file=sys.stderr)
    print_results(results)
    verdicts = judge(results, load_targets())
    print_verdicts(verdicts)
    return 1 if any(v.word == "missed" for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
