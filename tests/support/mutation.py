# SPDX-License-Identifier: Apache-2.0
"""Measure what the tests of a package catch: change one expression, run the tests, count failures.

Draw mutants once (needs `pip install cosmic-ray`, whose operators make them), then run them before
and after a change of the tests. The list holds the changed lines themselves, so that a run needs no
further package and finds a line again after other lines moved:

    python tests/support/mutation.py draw --seed 0 --count 500 mutants.json
    python tests/support/mutation.py run --jobs 2 mutants.json results.json

A mutant is killed if a test of its package fails, or if the tests do not end in time. The results
name the failed tests of each mutant, so that tests which catch nothing alone can be found. Tests
that killed earlier mutants of the file run first, so that most mutants end after seconds. To see
whether the wide tests kill more, run the survivors again with `--mark "full or slow"`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: The modules that are changed, and the tests that judge them.
SUBJECTS = {
    "portakv/plan": "tests/plan",
    "portakv/layout": "tests/layout",
    "portakv/view/index.py": "tests/view",
    "portakv/migrate/shards.py": "tests/migrate/test_shards.py tests/migrate/test_pull.py",
    "portakv/migrate/plan.py": "tests/migrate/test_pull.py",
    **{
        f"portakv/migrate/{each}.py": (
            "tests/migrate/test_channel.py tests/migrate/test_channel_model.py"
        )
        for each in ("channel", "channel_client", "channel_loop", "channel_server")
    },
    "portakv/storage": "tests/storage --ignore=tests/storage/test_remote.py",
    "portakv/storage/remote.py": "tests/storage/test_remote.py tests/storage/test_reasons.py",
    "portakv/storage/remote_store.py": "tests/storage/test_remote.py tests/storage/test_reasons.py",
    "portakv/graph": "tests/graph",
}
#: Operators that change names and decorators: most of what they make fails when it is imported.
LEFT_OUT = ("VariableReplacer", "VariableInserter", "RemoveDecorator")
#: On a host with a CUDA driver transfers of the simulated device find that driver.
LEFT_OUT_TESTS = "simdev"
#: The environment variable that names a file of tests, which run before all others.
FIRST = "PORTAKV_TESTS_FIRST"
#: Seconds after which the tests of one mutant count as hanging.
PATIENCE = 600


@dataclass(frozen=True)
class Mutant:
    """One change: lines of a file in the place of others."""

    path: str
    operator: str
    line: int  # of the first changed line, when it was drawn
    before: str
    after: str
    tests: str


@dataclass(frozen=True)
class Result:
    """What the tests did with a mutant: killed, survived, hung or lost (the lines are gone)."""

    mutant: Mutant
    state: str
    failed: list[str]
    seconds: float


def modules() -> dict[Path, str]:
    """Return the files that are changed, with their tests."""
    found = {}
    for name, tests in SUBJECTS.items():
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*.py")):
            # A file's own entry comes after the entry of its folder.
            if path.name != "__init__.py":
                found[path] = tests
    return found


def _meaning(text: str) -> str:
    """Return the syntax tree without annotations and docstrings, which change nothing."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def places_in(path: Path) -> dict[tuple[str, int, str], list[tuple[str, int]]]:
    """Return where a file can be changed: for each line and kind of operator, the operators."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
    found = defaultdict(list)
    for name in sorted(operator_names()):
        kind = name.partition("/")[2].partition("_")[0]
        if kind in LEFT_OUT:
            continue
        operator = get_operator(name)()
        starts = [at for node in nodes for at in operator.mutation_positions(node)]
        for occurrence, ((line, _), _end) in enumerate(starts):
            found[str(path), line, kind].append((name, occurrence))
    return found


def mutant_of(path: Path, operator: str, occurrence: int, tests: str) -> Mutant | None:
    """Return one mutant; None if the change has no meaning."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = path.read_text(encoding="utf-8")
    changed = mutate_code(text, get_operator(operator)(), occurrence)
    if not changed or not _differs(changed, _meaning(text)):
        return None
    return _as_lines(path, operator, text, changed, tests)


def _differs(text: str, meaning: str) -> bool:
    try:
        return _meaning(text) != meaning
    except SyntaxError:
        return False


def _as_lines(path: Path, operator: str, old: str, new: str, tests: str) -> Mutant | None:
    """Return the lines that differ between two texts of a file."""
    before = old.splitlines()
    after = new.splitlines()
    first = next(
        (i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None
    )
    if first is None:
        return None
    last = 0
    while before[-1 - last] == after[-1 - last] and len(before) - last - 1 > first:
        last += 1
    return Mutant(
        path.relative_to(ROOT).as_posix(),
        operator,
        first + 1,
        "\n".join(before[first : len(before) - last]),
        "\n".join(after[first : len(after) - last]),
        tests,
    )


def draw(seed: int, count: int) -> list[Mutant]:
    """Draw mutants: each line and kind of operator is as likely as any other."""
    subjects = modules()
    places: dict[tuple[str, int, str], list[tuple[str, int]]] = {}
    for path in subjects:
        places.update(places_in(path))
    chance = random.Random(seed)
    drawn: list[Mutant] = []
    for place in chance.sample(sorted(places), len(places)):
        path = Path(place[0])
        mutant = mutant_of(path, *chance.choice(places[place]), subjects[path])
        if mutant:
            drawn.append(mutant)
        if len(drawn) == count:
            break
    return drawn


def applied(mutant: Mutant, text: str) -> str | None:
    """Return a file's text with the mutant in it; None if its lines are not there any more."""
    places = [m.start() for m in re.finditer(re.escape(mutant.before) + r"(?=\n|$)", text)]
    places = [at for at in places if at == 0 or text[at - 1] == "\n"]
    if not places:
        return None
    at = min(places, key=lambda at: abs(text.count("\n", 0, at) + 1 - mutant.line))
    return text[:at] + mutant.after + text[at + len(mutant.before) :]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests first that killed earlier mutants of the file.

    Pytest loads this module as a plugin.
    """
    places = {name: i for i, name in enumerate(json.loads(Path(os.environ[FIRST]).read_text()))}
    items.sort(key=lambda item: places.get(item.nodeid, len(places)))


@dataclass
class Judge:
    """A copy of the repository, and how its tests are run."""

    copy: Path
    most: int  # failures after which a run stops
    mark: str  # the expression of pytest's -m
    killers: dict[str, Counter[str]]  # for each file the tests that killed its mutants


def run_tests(tests: str, judge: Judge, first: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the repository, some of them first."""
    copy = judge.copy
    names = [name for name in tests.split() if name.startswith("-") or (copy / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-p", "support.mutation", "-k", f"not {LEFT_OUT_TESTS}", "-m", judge.mark]
    command += ["--timeout", "60", "--maxfail", str(judge.most), "-rfE", *names]
    paths = [str(copy / "src"), str(copy / "tests"), os.environ.get("PYTHONPATH", "")]
    order = copy / "first.json"
    order.write_text(json.dumps(first))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        FIRST: str(order),
    }
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def check_unchanged(mutants: list[Mutant], judges: list[Judge]) -> None:
    """Raise `SystemExit` if tests fail without a mutant: every mutant would count as killed."""
    tests = sorted({mutant.tests for mutant in mutants})
    idle: queue.SimpleQueue[Judge] = queue.SimpleQueue()
    for judge in judges:
        idle.put(judge)

    def check(names: str) -> subprocess.CompletedProcess[str]:
        judge = idle.get()
        try:
            return run_tests(names, judge, [])
        finally:
            idle.put(judge)

    with ThreadPoolExecutor(len(judges)) as pool:
        for names, done in zip(tests, pool.map(check, tests), strict=True):
            if done.returncode:
                raise SystemExit(f"{names} fail without a mutant:\n{done.stdout[-3000:]}")


def verdict(mutant: Mutant, judge: Judge) -> Result:
    """Run the tests of a mutant."""
    began = time.monotonic()
    path = judge.copy / mutant.path
    text = path.read_text(encoding="utf-8")
    changed = applied(mutant, text)
    if changed is None:
        return Result(mutant, "lost", [], 0.0)
    path.write_text(changed, encoding="utf-8")
    try:
        first = [name for name, _ in judge.killers[mutant.path].most_common()]
        done = run_tests(mutant.tests, judge, first)
    except subprocess.TimeoutExpired:
        return Result(mutant, "hung", [], time.monotonic() - began)
    finally:
        path.write_text(text, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    judge.killers[mutant.path].update(failed)
    state = "survived" if done.returncode == 0 else "killed"
    return Result(mutant, state, failed, time.monotonic() - began)


def run(mutants: list[Mutant], jobs: int, most: int, mark: str, file: Path) -> list[Result]:
    """Run the tests of each mutant, some at a time, each in a copy of the repository.

    Writes the results to a file after each mutant, so that a run that is cut off leaves them.
    """
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    results: list[Result] = []
    killers: dict[str, Counter[str]] = defaultdict(Counter)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tracked = [ROOT / name for name in listed.stdout.splitlines()]

    def make(copy: Path) -> Judge:
        for path in tracked:
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
        return Judge(copy, most, mark, killers)

    def work(judge: Judge) -> None:
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            results.append(verdict(mutant, judge))
            file.write_text(json.dumps([asdict(each) for each in results], indent=1))
            print(f"{len(results)}/{len(mutants)} {results[-1].state} {mutant.path}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        judges = [make(Path(folder, str(n))) for n in range(jobs)]
        check_unchanged(mutants, judges)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, judges))
    return results


def main() -> None:
    """Draw mutants, or run the tests of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    drawing = verbs.add_parser("draw")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--count", type=int, default=500)
    drawing.add_argument("mutants", type=Path)
    running = verbs.add_parser("run")
    running.add_argument("--jobs", type=int, default=2)
    running.add_argument("--only", default="", help="the tests whose mutants are run")
    running.add_argument("--failures", type=int, default=1, help="stop a mutant after so many")
    running.add_argument("--mark", default="", help="the expression of pytest's -m")
    running.add_argument("--survivors", type=Path, help="run the survivors of these results alone")
    running.add_argument("mutants", type=Path)
    running.add_argument("results", type=Path)
    args = parser.parse_args()
    if args.verb == "draw":
        drawn = draw(args.seed, args.count)
        args.mutants.write_text(json.dumps([asdict(each) for each in drawn], indent=1))
        return
    mutants = [Mutant(**each) for each in json.loads(args.mutants.read_text())]
    mutants = [each for each in mutants if args.only in each.tests]
    if args.survivors:
        earlier = json.loads(args.survivors.read_text())
        left = [each["mutant"] for each in earlier if each["state"] == "survived"]
        mutants = [each for each in mutants if asdict(each) in left]
    results = run(mutants, args.jobs, args.failures, args.mark, args.results)
    states = Counter(each.state for each in results)
    judged = len(results) - states["lost"]
    print(f"{judged - states['survived']} of {judged} killed; {dict(states)}")


if __name__ == "__main__":
    main()
