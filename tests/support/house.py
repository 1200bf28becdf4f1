# SPDX-License-Identifier: Apache-2.0
"""Print how large the project is, and what ten calls pass through. Nothing limits these figures.

    python tests/support/house.py                  sizes, words of pages, traced calls
    python tests/support/house.py --times          host times of these calls as well
    python tests/support/house.py --json FILE      write the figures, with commit, date and versions
    python tests/support/house.py --against FILE   print the difference to such a file
    python tests/support/house.py --names          list the caches, threads and ends of work

The columns of a package:

nodes        nodes of the syntax trees of its Python files; packed lines do not lower them
files        Python files; a link to another file counts as no file
classes      all classes, also those in functions
records      dataclasses, and classes of `NamedTuple`, `TypedDict`, msgspec's `Struct` or `Enum`
locks        locks, conditions, events, semaphores and barriers of `threading` that the code makes
threads      places that start a thread, a timer or an executor, and classes that are a thread
caches       mappings that `Bounded` makes, which have a name; `--names` lists them
ends         kinds of "end of work": classes that define `wait` or `synchronize`, and `done`,
             `ended`, `landed`, `poll` or `query`; and those with such a base. A protocol is none

`traced_calls.py` makes the calls on the CPU. Their host times depend on the machine and its load.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("native", "conformance", "benchmarks", "examples", "tests")
COLUMNS = ("nodes", "files", "classes", "records", "locks", "threads", "caches", "ends")
#: Suffixes of C++ and CUDA.
NATIVE = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}

RECORDS = {"NamedTuple", "TypedDict", "Struct", "Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"}
LOCKS = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}
THREADS = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor"}
#: Modules that have classes of the same names.
OTHERS = {"torch", "cuda", "zmq", "module"}
WAITS = {"wait", "synchronize"}
LOOKS = {"done", "ended", "landed", "poll", "query"}

Figures = dict[str, dict[str, int]]


def modules(folder: Path) -> list[Path]:
    """Return the Python files below a folder, without links."""
    return sorted(
        path
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts and not path.is_symlink()
    )


def last_name(node: ast.expr) -> str:
    """Return the last part of a dotted name, of what is called or of what has an index."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def package_of(module: Path, root: Path = ROOT) -> str:
    """Return the package of the library that a module belongs to; "top" for the library itself."""
    parts = module.relative_to(root).parts
    return parts[1] if len(parts) > 2 else "top"


def is_record(node: ast.ClassDef) -> bool:
    """Return True for a class that only holds values, by the rule at the head of this file."""
    marks = {last_name(each) for each in node.decorator_list}
    bases = {last_name(each) for each in node.bases}
    return "dataclass" in marks or bool(bases & RECORDS)


def makes(node: ast.AST, names: set[str]) -> bool:
    """Tell whether a node calls one of these names of `threading`, or is a field that does so."""
    made: ast.expr | None = None
    if isinstance(node, ast.Call):
        made = node.func
    elif isinstance(node, ast.keyword) and node.arg == "default_factory":
        made = node.value
    if made is None or last_name(made) not in names:
        return False
    return not (isinstance(made, ast.Attribute) and last_name(made.value) in OTHERS)


def cache_name(node: ast.AST) -> str | None:
    """Return the name of a mapping that `Bounded` makes; None for any other node."""
    if not isinstance(node, ast.Call) or last_name(node) != "Bounded":
        return None
    first = node.args[0] if node.args else None
    return str(first.value) if isinstance(first, ast.Constant) else "(a parameter)"


def ends_of_work(classes: Sequence[ast.ClassDef]) -> list[ast.ClassDef]:
    """Return the classes that one waits for, by the rule at the head of this file."""
    ends = [node for node in classes if WAITS & members(node) and LOOKS & members(node)]
    names = {node.name for node in ends}
    before = -1
    while before != len(names):
        before = len(names)
        ends = [x for x in classes if x in ends or names & {last_name(base) for base in x.bases}]
        names = {node.name for node in ends}
    return [node for node in ends if "Protocol" not in map(last_name, node.bases)]


def members(node: ast.ClassDef) -> set[str]:
    """Return the names of the methods and of the fields that a class declares."""
    names = set()
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(each.name)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            names.add(each.target.id)
    return names


class Library:
    """The syntax nodes of the library's modules."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.nodes = {path: nodes_of(path) for path in modules(root / "portakv")}
        every = chain.from_iterable(self.nodes.values())
        classes = [node for node in every if isinstance(node, ast.ClassDef)]
        self.ends = ends_of_work(classes)

    def packages(self) -> Figures:
        """Return the figures of each package."""
        ends = set(self.ends)
        figures: Figures = {}
        for path, nodes in self.nodes.items():
            package = package_of(path, self.root)
            counts = figures.setdefault(package, dict.fromkeys(COLUMNS, 0))
            counts["nodes"] += len(nodes)
            counts["files"] += 1
            for node in nodes:
                counts["locks"] += makes(node, LOCKS)
                counts["threads"] += makes(node, THREADS)
                counts["caches"] += cache_name(node) is not None
                if isinstance(node, ast.ClassDef):
                    counts["classes"] += 1
                    counts["records"] += is_record(node)
                    counts["threads"] += "Thread" in map(last_name, node.bases)
                    counts["ends"] += node in ends
        return figures

    def names(self) -> dict[str, list[str]]:
        """Return the names of caches and of ends of work, and the modules that start threads."""
        caches = [cache_name(node) for nodes in self.nodes.values() for node in nodes]
        threads = [
            path.relative_to(self.root / "portakv").as_posix()
            for path, nodes in self.nodes.items()
            for node in nodes
            if makes(node, THREADS)
        ]
        return {
            "caches": sorted(filter(None, caches)),
            "ends": sorted(node.name for node in self.ends),
            "threads": sorted(threads),
        }


def folders(root: Path = ROOT) -> Figures:
    """Return the nodes, the Python files and the lines of C++ and CUDA of the other folders."""
    figures = {}
    for folder in FOLDERS:
        files = modules(root / folder)
        sources = [path for path in (root / folder).rglob("*") if path.suffix in NATIVE]
        figures[folder] = {
            "nodes": sum(len(nodes_of(path)) for path in files),
            "files": len(files),
            "lines of C++": sum(len(path.read_bytes().splitlines()) for path in sources),
        }
    return figures


def nodes_of(path: Path) -> list[ast.AST]:
    """Return the nodes of a file's syntax tree."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def words(root: Path = ROOT) -> dict[str, int]:
    """Return the words of the pages: those of docs, of the top folder, and of notes on benchmarks.

    Tables that a program writes into `results` are apart.
    """
    pages = {
        "docs": [*(root / "docs").rglob("*.md")],
        "top": [*root.glob("*.md")],
        "benchmarks": [
            path
            for path in (root / "benchmarks").rglob("*.md")
            if "results" not in path.relative_to(root).parts
        ],
    }
    counts = {name: sum(map(words_of, paths)) for name, paths in pages.items()}
    counts["all pages"] = sum(counts.values())
    counts["tables of results"] = sum(map(words_of, (root / "benchmarks/results").rglob("*.md")))
    return counts


def words_of(path: Path) -> int:
    """Return the number of words of a page, as `wc -w` counts them."""
    return len(path.read_text(encoding="utf-8").split())


def total(figures: Figures) -> dict[str, int]:
    """Return the sum of each column."""
    columns = dict.fromkeys(column for row in figures.values() for column in row)
    return {column: sum(row.get(column, 0) for row in figures.values()) for column in columns}


def run_git(*arguments: str) -> str:
    """Return the output of git, or "" without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def measure(times: bool) -> dict[str, Any]:
    """Return all figures of this tree.

    ``times``: measure host times of the calls too, which takes a minute.
    """
    library = Library()
    results: dict[str, Any] = {
        "commit": run_git("rev-parse", "HEAD"),
        "uncommitted changes": bool(run_git("status", "--porcelain", "--", "portakv")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy")},
        },
        "packages": library.packages(),
        "folders": folders(),
        "words": words(),
        "names": library.names(),
        "calls": traced_calls("trace"),
    }
    if times:
        results["times"] = traced_calls("times")
    return results


def traced_calls(verb: str) -> dict[str, dict[str, Any]]:
    """Return what `traced_calls.py` measures, in a process that this one starts."""
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "support.traced_calls", verb],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        return {"all": {"failed": f"support.traced_calls ended with {done.returncode}"}}
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


Rows = Mapping[str, Mapping[str, Any]]


def cell(now: Any, before: Any) -> str:
    """Return a figure, and its difference to the earlier one in brackets if there is any."""
    if not isinstance(now, int | float):
        return "-" if now is None else str(now)
    if not isinstance(before, int | float) or now == before:
        return f"{now:,}"
    return f"{now:,} ({round(now - before, 1):+,})"


def table(title: str, now: Rows, before: Rows | None, columns: Sequence[str]) -> list[str]:
    """Return the lines of a table; a row that only one of the two has is compared with zero."""
    names = [*now, *(name for name in before or {} if name not in now)]
    rows = [[title, *columns]]
    for name in names:
        row = now.get(name)
        earlier = before.get(name) if before is not None else None
        if row is not None and "failed" in row:
            rows.append([name, row["failed"]])
            continue
        cells = []
        for column in columns:
            nothing = None if before is None else 0
            figure = (row or {}).get(column, 0)
            cells.append(cell(figure, nothing if earlier is None else earlier.get(column)))
        rows.append([name, *cells])
    full = [cells for cells in rows if len(cells) > len(columns)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for first, *others in rows:
        if len(others) < len(columns):
            lines.append(f"{first.ljust(widths[0])}  {others[0]}")
            continue
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return [*lines, ""]


def with_total(figures: Figures, name: str) -> Rows:
    """Return the rows of the figures, sorted, with the sum as the last one."""
    return {**dict(sorted(figures.items())), name: total(figures)}


def report(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """Return the lines of all tables; with figures from before the differences to them."""
    lines = []
    if before is not None:
        date = before["date"]
        lines += [f"In brackets: the difference to {before['commit'][:12]} of {date}.", ""]

    def earlier(section: str) -> Any:
        return None if before is None else before.get(section, {})

    packages = earlier("packages")
    lines += table(
        "portakv",
        with_total(now["packages"], "portakv"),
        None if packages is None else with_total(packages, "portakv"),
        COLUMNS,
    )
    lines += table(
        "beside it", now["folders"], earlier("folders"), ("nodes", "files", "lines of C++")
    )
    pages = {name: {"words": count} for name, count in now["words"].items()}
    old_pages = earlier("words")
    if old_pages is not None:
        old_pages = {name: {"words": count} for name, count in old_pages.items()}
    lines += table("pages", pages, old_pages, ("words",))
    lines += table("a call", now["calls"], earlier("calls"), ("files", "functions", "changes"))
    if "times" in now:
        old_times = None if before is None else before.get("times")
        lines += table("host time, us", now["times"], old_times, ("median", "least", "times"))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures of this tree."""
    parser = argparse.ArgumentParser(description="Print sizes, and what calls pass through.")
    parser.add_argument("--times", action="store_true", help="measure host times of calls too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--against", type=Path, metavar="FILE", help="figures to compare with")
    parser.add_argument("--names", action="store_true", help="list caches, threads, ends of work")
    args = parser.parse_args(argv)
    before = json.loads(args.against.read_text(encoding="utf-8")) if args.against else None
    now = measure(args.times)
    print("\n".join(report(now, before)))
    if args.names:
        for title, names in now["names"].items():
            print(f"{title}: {', '.join(names)}\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
