# SPDX-License-Identifier: Apache-2.0
"""Measure what the tests catch: change one expression or statement, run the tests that enter it.

    python tests/support/mutants.py RESULTS.json                  400 mutants, 100 for each package
    python tests/support/mutants.py RESULTS.json --jobs 2         two mutants at a time
    python tests/support/mutants.py RESULTS.json --sample 12 --packages plan

A first pass runs the tests of the packages once and notes which functions each test enters, in all
threads of its process. It is kept next to the results. Each mutant is then judged by the tests that
enter its function: first those of its package, the fastest first, for up to `MOST` seconds in all.
A mutant is killed if a test fails, or if the tests take `TIMES` times as long as without it.

Each job has a copy of the tree: no file here changes. The results are written after each mutant.
The same command goes on where an earlier run was cut off, at the same commit.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("plan", "copy", "storage", "migrate")
#: On a host with a CUDA driver transfers of the simulated device find that driver.
LEFT_OUT = "simdev"
#: Seconds that the tests of a mutant take without it, at most.
MOST = 60.0
#: The tests of a mutant count as hanging after `TIMES` such times and the seconds of a start.
TIMES = 5
START = 120.0
#: Seconds of the first pass over the tests of a package.
PASS = 7200.0
#: Environment variables for the plugin: the file of the tests to run, and the one to write.
CHOSEN = "PORTAKV_TESTS_CHOSEN"
ENTERED = "PORTAKV_TESTS_ENTERED"

# --- mutations


class Change(NamedTuple):
    """One change of a file: text in the place of the bytes from `begin` to `end`."""

    kind: str
    line: int
    function: int  # the line where the function of the change begins; 0 outside of functions
    begin: int
    end: int
    after: str


FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OTHER_OPERATOR: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
#: Fields whose expressions a change would not matter in, or would break each import.
SKIPPED = {"annotation", "returns", "decorator_list", "type_params", "bases"}


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the kind and the changed node of each mutation of a node."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[at] = FLIPPED[type(operator)]()
            yield "comparison", changed
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "constant", ast.Constant(node.value + 1)
        if node.value > 0:
            yield "constant", ast.Constant(node.value - 1)
    elif isinstance(node, ast.BoolOp):
        yield "and, or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.BinOp) and type(node.op) in OTHER_OPERATOR:
        yield "arithmetic", _with(node, op=OTHER_OPERATOR[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "condition", node.operand
    elif isinstance(node, ast.Return) and node.value is not None:
        if not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield "return", _with(node, value=ast.Constant(None))
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
            swapped = _with(node.value, elts=[*reversed(node.value.elts)])
            yield "return", _with(node, value=swapped)
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *others = node.args
        if not isinstance(second, ast.Starred):
            yield "arguments", _with(node, args=[second, first, *others])
    elif is_removable(node):
        yield "statement", ast.Pass()


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def is_removable(node: ast.AST) -> bool:
    """Tell whether the file can be compiled without a statement, which is no docstring."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call | ast.Await)
    if isinstance(node, ast.Assign):
        return any(isinstance(each, ast.Attribute | ast.Subscript) for each in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Delete | ast.Continue | ast.Break)


def changes_of(text: str) -> list[Change]:
    """Return all changes of a file's text; a few of them cannot be compiled."""
    tree = ast.parse(text)
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    changes: list[Change] = []
    for node, function in _changeable(tree, 0):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            _add(changes, lines, node.test, function, [("condition", _negated(node.test))])
        _add(changes, lines, node, function, variants(node))
    return changes


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _add(
    changes: list[Change],
    lines: Sequence[int],
    node: Any,
    function: int,
    made: Any,
) -> None:
    for kind, changed in made:
        begin = lines[node.lineno - 1] + node.col_offset
        end = lines[node.end_lineno - 1] + node.end_col_offset
        after = ast.unparse(changed)
        if isinstance(changed, ast.expr):
            after = f"({after})"
        changes.append(Change(kind, node.lineno, function, begin, end, after))


def _changeable(node: ast.AST, function: int) -> Iterator[tuple[ast.AST, int]]:
    """Yield the nodes that may change, with the first line of the function that each stands in."""
    for name, value in ast.iter_fields(node):
        if name in SKIPPED:
            continue
        for child in value if isinstance(value, list) else [value]:
            # Nodes of a text with fields have no places of their own in each Python.
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inner = function
            if isinstance(child, FUNCTIONS):
                inner = min(each.lineno for each in [child, *child.decorator_list])
            yield child, function
            yield from _changeable(child, inner)


def applied(change: Change, text: str) -> str:
    """Return a file's text with a change in it."""
    data = text.encode()
    return (data[: change.begin] + change.after.encode() + data[change.end :]).decode()


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


@dataclass(frozen=True)
class Mutant:
    """A change of one file of a package."""

    package: str
    path: str
    change: Change

    @property
    def key(self) -> str:
        """Return the name of the mutant in the results."""
        change = self.change
        return f"{self.path}:{change.line}:{change.begin}-{change.end}:{change.after}"


def draw(packages: Sequence[str], sample: int, seed: int) -> list[Mutant]:
    """Draw as many mutants of each package; each line and kind of change is as likely as others."""
    drawn = []
    for number, package in enumerate(packages):
        share = sample * (number + 1) // len(packages) - sample * number // len(packages)
        texts: dict[str, str] = {}
        places: dict[tuple[str, int, str], list[Change]] = defaultdict(list)
        for path in sorted((ROOT / "portakv" / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            texts[name] = path.read_text(encoding="utf-8")
            for change in changes_of(texts[name]):
                places[name, change.line, change.kind].append(change)
        chance = random.Random(f"{seed} {package}")
        for place in chance.sample(sorted(places), len(places)):
            change = chance.choice(places[place])
            if share and _compiles(applied(change, texts[place[0]])):
                drawn.append(Mutant(package, place[0], change))
                share -= 1
    random.Random(seed).shuffle(drawn)  # a run that is cut off has some of each package
    return drawn


# --- the plugin that runs in the process of the tests

_seen: dict[int, Any] = {}  # codes that were entered, by their identity


def _note(frame: Any, event: str, _argument: object) -> None:
    if event == "call":
        code = frame.f_code
        _seen[id(code)] = code


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Note functions in all threads that start from here on, in the first pass."""
    if ENTERED in os.environ:
        threading.setprofile(_note)
        config.pluginmanager.register(_Pass(Path(os.environ[ENTERED])))


class _Pass:
    """Writes for each test that passes its seconds and the functions that it enters."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._library = f"{(Path.cwd() / 'portakv').resolve()}{os.sep}"
        self._seconds = 0.0
        self._passed = True

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        _seen.clear()
        self._seconds = 0.0
        self._passed = True
        before = sys.getprofile()
        sys.setprofile(_note)
        yield
        sys.setprofile(before)
        if self._passed:
            row = {"test": item.nodeid, "seconds": self._seconds, "functions": self._functions()}
            # One call for a line: several processes write into the file.
            with self._file.open("ab", buffering=0) as file:
                file.write(json.dumps(row).encode() + b"\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        self._passed = self._passed and report.passed

    def _functions(self) -> list[str]:
        """Return the functions of the library, by their file and first line."""
        names = set()
        for code in [*_seen.values()]:
            path = os.path.realpath(code.co_filename)
            if path.startswith(self._library):
                names.add(f"portakv/{path.removeprefix(self._library)}:{code.co_firstlineno}")
        return sorted(names)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests of a mutant, and run them in their order."""
    if CHOSEN not in os.environ:
        return
    names = json.loads(Path(os.environ[CHOSEN]).read_text(encoding="utf-8"))
    places = {name: at for at, name in enumerate(names)}
    config.hook.pytest_deselected(items=[each for each in items if each.nodeid not in places])
    items[:] = sorted(
        (each for each in items if each.nodeid in places), key=lambda each: places[each.nodeid]
    )


# --- the run


class Judge:
    """Copies of the tree, in which tests run; a job takes one at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.idle: queue.SimpleQueue[Path] = queue.SimpleQueue()
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        for number in range(jobs):
            tree = folder / str(number)
            for name in done.stdout.splitlines():
                if (ROOT / name).exists():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
            build = [sys.executable, str(tree / "build_backend" / "compile_core.py")]
            subprocess.run(build, stdout=subprocess.DEVNULL, check=True)
            self.idle.put(tree)

    def run(self, tree: Path, words: Sequence[str], seconds: float, **values: str) -> int | None:
        """Run tests in a copy; return the exit code, or None after so many seconds."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-p", "support.mutants", "-k", f"not {LEFT_OUT}", *words]
        paths = [str(tree / "src"), str(tree / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            **values,
        }
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests started
            process.wait()


class Entered(NamedTuple):
    """What the first pass noted of one test."""

    test: str
    seconds: float
    functions: frozenset[str]


def notes_of(results: Path, commit: str, package: str) -> Path:
    """Return the file of what the first pass notes of the tests of a package."""
    return results.with_suffix(f".{commit}.{package}")


def first_pass(
    packages: Sequence[str], judge: Judge, jobs: int, file: Path, commit: str
) -> list[Entered]:
    """Run the tests of the packages once, or read what an earlier run noted."""

    for package in packages:
        part = notes_of(file, commit, package)
        if part.exists():
            continue
        tree = judge.idle.get()
        notes = tree / "entered"
        notes.unlink(missing_ok=True)
        words = [f"-n{jobs if jobs > 1 else 0}", "--maxfail=1000000", f"tests/{package}"]
        try:
            code = judge.run(tree, words, PASS, **{ENTERED: str(notes)})
        finally:
            judge.idle.put(tree)
        if code not in (0, 1) or not notes.exists():
            raise SystemExit(f"Expected tests/{package} to run, got the exit code {code}.")
        shutil.move(notes, part)
        print(f"tests/{package}: noted, exit code {code}", flush=True)
    entered = []
    for package in packages:
        notes = notes_of(file, commit, package)
        for line in notes.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            entered.append(Entered(row["test"], row["seconds"], frozenset(row["functions"])))
    return entered


def tests_for(mutant: Mutant, entered: Sequence[Entered]) -> list[Entered]:
    """Return the tests that judge a mutant, in their order."""
    function = f"{mutant.path}:{mutant.change.function}"
    if mutant.change.function:
        able = [each for each in entered if function in each.functions]
    else:
        start = f"{mutant.path}:"
        able = [x for x in entered if any(name.startswith(start) for name in x.functions)]
    own = f"tests/{mutant.package}/"
    able.sort(key=lambda each: (not each.test.startswith(own), each.seconds))
    chosen: list[Entered] = []
    left = MOST
    for each in able:
        left -= each.seconds
        if left < 0 and chosen:
            break
        chosen.append(each)
    return chosen


def verdict(mutant: Mutant, judge: Judge, entered: Sequence[Entered]) -> dict[str, Any]:
    """Run the tests of a mutant in a copy of the tree."""
    chosen = tests_for(mutant, entered)
    began = time.monotonic()
    state = "not entered"
    before = ""
    tree = judge.idle.get()
    try:
        path = tree / mutant.path
        text = path.read_text(encoding="utf-8")
        before = text.encode()[mutant.change.begin : mutant.change.end].decode()
        if chosen:
            names = tree / "chosen.json"
            names.write_text(json.dumps([each.test for each in chosen]), encoding="utf-8")
            files = list(dict.fromkeys(each.test.partition("::")[0] for each in chosen))
            seconds = START + TIMES * sum(each.seconds for each in chosen)
            path.write_text(applied(mutant.change, text), encoding="utf-8")
            try:
                code = judge.run(tree, ["-n0", *files], seconds, **{CHOSEN: str(names)})
            finally:
                path.write_text(text, encoding="utf-8")
            state = "hung" if code is None else "survived" if code == 0 else "killed"
            if code == 5:  # pytest has found none of the tests
                raise RuntimeError(f"Expected the tests of {mutant.key}, got none.")
    finally:
        judge.idle.put(tree)
    return {
        "mutant": mutant.key,
        "package": mutant.package,
        "place": f"{mutant.path}:{mutant.change.line}",
        "kind": mutant.change.kind,
        "before": before,
        "after": mutant.change.after,
        "state": state,
        "tests": len(chosen),
        "seconds": round(time.monotonic() - began, 1),
    }


def report(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the score of each package, and of the mutants that no test has killed."""
    states = ("killed", "hung", "survived", "not entered")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for each in results:
        for row in (each["package"], "all"):
            counts[row][each["state"]] += 1
    lines = [f"{'package':<10}{'mutants':>9}" + "".join(f"{x:>13}" for x in states) + "  score"]
    order = [package for package in PACKAGES if package in counts] + ["all"]
    for package in order:
        row = counts[package]
        many = sum(row.values())
        score = 100 * (row["killed"] + row["hung"]) / max(many, 1)
        figures = "".join(f"{row[state]:>13}" for state in states)
        lines.append(f"{package:<10}{many:>9}{figures}  {score:.0f} %")
    lines += ["", "not killed:"]
    for each in sorted(results, key=lambda each: str(each["place"])):
        if each["state"] in ("survived", "not entered"):
            before = " ".join(each["before"].split())
            lines.append(f"{each['place']}  {each['kind']}: {before}  ->  {each['after']}")
    return lines


def main() -> None:
    """Draw mutants, judge those without a result, and print the score."""
    parser = argparse.ArgumentParser(description="Measure what the tests catch.")
    parser.add_argument("results", type=Path, help="a JSON file; an earlier run goes on")
    parser.add_argument("--sample", type=int, default=400, help="mutants, of all packages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are judged at a time")
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES)
    args = parser.parse_args()
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    known: dict[str, Any] = {"commit": done.stdout.strip(), "seed": args.seed, "results": []}
    if args.results.exists():
        earlier = json.loads(args.results.read_text(encoding="utf-8"))
        if earlier["commit"] != known["commit"]:
            raise SystemExit(
                f"Expected results of {known['commit']}, got those of {earlier['commit']}. Pass "
                "another file."
            )
        known = earlier
    results: list[dict[str, Any]] = known["results"]
    ended = {each["mutant"] for each in results}
    mutants = [x for x in draw(args.packages, args.sample, args.seed) if x.key not in ended]
    writing = threading.Lock()

    def work(mutant: Mutant) -> None:
        result = verdict(mutant, judge, entered)
        with writing:
            results.append(result)
            args.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            place = f"{result['place']} {result['kind']}"
            print(f"{len(results)} {result['state']} {place} {result['seconds']} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder), args.jobs)
        entered = first_pass(args.packages, judge, args.jobs, args.results, known["commit"])
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, mutants))
    print("\n".join(["", *report(results)]))


if __name__ == "__main__":
    main()
