# SPDX-License-Identifier: Apache-2.0
"""Write tables and pictures of ``docs/benchmarks.md``: ``python -m benchmarks.choosing``.

The page shows the figures that decide a choice. `benchmarks.guide` writes all tables, and this
command runs it too. ``--check`` writes and draws nothing. It fails if a table differs from what the
result files give, or if a picture was drawn from other results. To draw needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median

from portakv_benchmarks import guide
from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.harness import Fields, Row, having
from portakv_benchmarks.shared.shapes import in_words

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
IMAGES = PAGE.with_name("images")
#: The result file of each picture.
PICTURES = {
    "backends": "h200",
    "strategies": "h200-host",
    "model": "h200-host",
    "disks": "parts/h200-storage",
    "pulls": "parts/h200-x2-migration",
}
_FILES = "https://github.com/portakv/portakv/blob/main/benchmarks/results/"
#: The rows of the table of waits: the kind of copy, and its host memory.
_WAITS = (("wall_copy", "dense"), ("wall_pages", "block-first random"))


def order(result: Fields) -> list[str]:
    """Return a line for each backend, the fastest first."""
    table = [
        [f"`{method}`", f"{median(ratios):.2f}", f"{min(ratios):.2f}", str(len(ratios))]
        for method, ratios in guide.preference(guide.copies_of(result)).items()
        if method != "compiled graph"
    ]
    return guide.table_of(["backend", "of copy_, median", "at worst", "copies"], table)


def link(result: Fields) -> list[str]:
    """Return a line for each payload: the chosen strategy's time, of memcpy."""
    return guide.table_of(*guide.link_sizes(having(result["rows"], verified=True)))


def waits(result: Fields) -> list[str]:
    """Return a line for each copy: the times of a memcpy, of PortaKV and of LMCache's kernel."""
    rows = having(result["rows"], verified=True)
    table = []
    for kind, side in _WAITS:
        selected = having(rows, kind=kind, host_side=side)
        for size in sorted({row["payload_bytes"] for row in selected}):
            for op, words in guide.DIRECTIONS.items():
                of = having(selected, payload_bytes=size, op=op)
                runs = in_words(of[0]["run_bytes"])
                cells = [f"{in_words(size)} in runs of {runs}, {words}"]
                cells.append(_time(having(of, backend="memcpy")))
                cells.append(_time(having(of, backend="host", ids="kept Index")))
                cells.append(_time(having(of, backend="host", ids="host tensor")))
                cells.append(_time(having(of, backend="lmcache")))
                table.append(cells)
    heads = ["copy", "one memcpy", "PortaKV, kept ids", "PortaKV, new ids", "LMCache's kernel"]
    return guide.table_of(heads, table)


def _time(rows: Sequence[Row]) -> str:
    return f"{rows[0]['p50_us']:,.0f}" if rows else "not measured"


#: The result file of each mark in the page, and the function that makes its table, if it has one.
TABLES: Mapping[str, tuple[str, Callable[[Fields], list[str]] | None]] = {
    "backends": ("h200", order),
    "link": ("h200-host", link),
    "model": ("h200-host", None),
    "waits": ("h200-wall", waits),
    "disks": ("parts/h200-storage", None),
    "pulls": ("parts/h200-x2-migration", None),
}


def filled(text: str) -> str:
    """Return the page with its tables made anew; ValueError if it lacks a mark."""
    for mark, (name, table) in TABLES.items():
        result = recorded.read(guide.RESULTS / f"{name}.json")
        lines = [*table(result), ""] if table else []
        machine = result["machine"]
        lines.append(
            f"{guide.measured(machine)} on {machine['device']}: [{name}.json]({_FILES}{name}.json)."
        )
        parts = re.split(rf"(?s)(?<=<!-- table: {mark} -->\n).*?(?=\n<!-- end -->)", text)
        if len(parts) != 2:
            raise ValueError(
                f"Expected one `<!-- table: {mark} -->` ... `<!-- end -->`, got {len(parts) - 1}. "
                f"Write it into {PAGE.name}."
            )
        text = "\n".join(lines).join(parts)
    return text


def source_of(name: str) -> str:
    """Return what a picture says of its result file: the path, and the checksum of its bytes."""
    content = guide.RESULTS.joinpath(f"{name}.json").read_bytes()
    return f"benchmarks/results/{name}.json, SHA-256 {sha256(content).hexdigest()[:32]}"


def stale() -> list[str]:
    """Return the names of pages and pictures that differ from what the results give."""
    names = []
    text = PAGE.read_text(encoding="utf-8")
    if filled(text) != text:
        names.append(PAGE.name)
    return names + stale_pictures(IMAGES)


def stale_pictures(folder: Path) -> list[str]:
    """Return the names of the pictures that a folder lacks, or that show other results."""
    names = []
    for picture, name in PICTURES.items():
        path = folder / f"choosing-{picture}.svg"
        if not path.exists() or source_of(name) not in path.read_text(encoding="utf-8"):
            names.append(path.name)
    return names


def write() -> None:
    """Write the tables of the page, and draw its pictures."""
    from portakv_benchmarks import choosing_plots

    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
    for picture, name in PICTURES.items():
        result = recorded.read(guide.RESULTS / f"{name}.json")
        device = result["machine"]["device"]
        path = choosing_plots.write(IMAGES, picture, result["rows"], device, source_of(name))
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and pictures, or with ``--check`` compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    check = parser.parse_args(argv).check
    code = guide.main(["--check"] if check else [])
    if not check:
        write()
    elif names := stale():
        print(f"{', '.join(names)}: stale. Run `python -m benchmarks.choosing`.", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
