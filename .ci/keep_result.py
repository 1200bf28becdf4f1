# SPDX-License-Identifier: Apache-2.0
"""Put result files among the committed ones, with their rows in the matrix, then write the README.

portakv conform reference --profile full --report out
python .ci/keep_result.py out/conformance.json

Other jobs leave records (see `portakv_conformance.evidence`), and may need words of
their own:

python .ci/keep_result.py hip.json --device "AMD gfx906, gfx908, gfx90a" --note "no DCU was at hand"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import readme_tables

from portakv_conformance.evidence import evidence, support_matrix
from portakv_conformance.report.results import keep

RESULTS = readme_tables.ROOT / support_matrix.RESULTS


def main() -> None:
    """Keep each file named on the command line."""
    parser = argparse.ArgumentParser(prog=".ci/keep_result.py", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--device", default="", help="the device of a record that names none")
    parser.add_argument("--note", help="words after the level (default: as before)")
    requested = parser.parse_args()
    for file in requested.files:
        try:
            row = place(file, requested.device, requested.note)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        print(f"{file} is kept as {row.evidence}: {row.backend} on {row.device}, {row.level}.")
    readme_tables.write()
    if wrong := separated():
        sys.exit("\n".join(wrong))


def separated() -> list[str]:
    """Return what is wrong with kept records that name a suite's file: it is of another run."""
    result = []
    for record in sorted(RESULTS.glob("*.json")):
        suite = json.loads(record.read_text("utf-8")).get("conformance")
        if suite is None:
            continue
        file = RESULTS / suite["file"]
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != suite["sha256"]:
            result.append(
                f"Expected {suite['file']} from the same run as {record.name}, got another's. "
                "Keep both files of one run."
            )
    return result


def place(file: Path, device: str, note: str | None) -> support_matrix.SupportLevel:
    """Copy one file to its place, write its row, and return the row."""
    matrix = support_matrix.read(readme_tables.MATRIX)
    result = evidence.read(file)
    made = evidence.level_of(result, str(file), device=device)
    if since := support_matrix.why_expired(made, matrix.with_level(made)):
        raise ValueError(f"{file} is expired: {since}. Make it again.")
    row = replace(made, evidence=f"{support_matrix.RESULTS}{file.name}")
    if wrong := [*support_matrix.broken_rules(support_matrix.SupportMatrix((row,)))]:
        raise ValueError(f"{file} is not kept: {' '.join(wrong)}")
    old = next((level for level in matrix.levels if level.place == made.place), None)
    note = (old.note if old else "") if note is None else note
    if result.suite:
        target = keep(file, RESULTS)
    else:
        words = (made.backend, made.device, made.level)
        slug = (re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words)
        target = RESULTS / f"{'-'.join(slug)}.json"
        shutil.copyfile(file, target)
    made = evidence.level_of(result, support_matrix.RESULTS + target.name, device=device, note=note)
    if old is not None and old.evidence != made.evidence:
        (readme_tables.ROOT / old.evidence).unlink(missing_ok=True)
    text = support_matrix.written(matrix.with_level(made))
    readme_tables.MATRIX.write_text(text, encoding="utf-8", newline="\n")
    return made


if __name__ == "__main__":
    main()
