# SPDX-License-Identifier: Apache-2.0
"""Measure what the tests of the compiled core catch: change one place of its C++, run its tests.

In the folder `tests`:

    python -m support.mutants_core RESULTS.json              300 mutants, 25 of each file
    python -m support.mutants_core RESULTS.json --files rows.cpp --sample 40

A changed file is compiled with -O1 and linked with the objects of the others, which are compiled
once. Its library takes the place of the right one in a copy of the tree, and a process that has
imported torch already forks for the tests: those of the file's subject first, in their fixed draws.

A mutant is killed if a test fails, or if its process dies. It hangs if one test takes `EACH`
seconds of a processor, or all take `TIMES` times as long as without it. A change after which the
compiler makes the same code is no mutant.

The results are written after each mutant. The same command goes on where an earlier run was cut
off, at the same commit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch  # noqa: F401  # before a process forks for tests

from support.mutants import ROOT, Judge

SOURCES = ROOT / "native" / "core"
PIECES = ("tests/interconnect/test_pieces.py", "tests/interconnect/test_wide_pieces.py")
WHOLE = (
    *("tests/copy/test_inside.py", "tests/copy/test_inside_device.py"),
    *("tests/copy/test_launches_on_device.py", "tests/connector"),
)
#: The tests that begin with a file's own: each calls the core, and builds no library.
TESTS: dict[str, tuple[str, ...]] = {
    "plan.cpp": ("tests/core/test_plan.py", "tests/plan", "tests/copy/test_packing.py"),
    "runs.cpp": ("tests/core/test_runs.py", "tests/plan", *PIECES),
    "pieces.cpp": ("tests/core/test_runs.py", *PIECES),
    "ids.cpp": ("tests/core/test_ids.py", "tests/view/test_index.py"),
    "view.cpp": ("tests/core/test_core_view.py", "tests/view"),
    "rows.cpp": ("tests/core/test_rows.py", "tests/backends/test_rows_kernel.py"),
    "call.cpp": WHOLE,
    "tensors.cpp": (*WHOLE, "tests/core/test_core_view.py", "tests/view/test_index.py"),
    "link.cpp": ("tests/interconnect/test_submission.py", "tests/interconnect/test_link_cuda.py"),
    "pack.cpp": ("tests/core/test_pack.py", "tests/copy/test_packing.py"),
    "xxh3.cpp": ("tests/core/test_xxh3.py",),
    "slice.cpp": tuple(f"tests/view/test_{name}.py" for name in ("slicing", "addresses", "packed")),
    "pick.cpp": tuple(f"tests/interconnect/test_{name}.py" for name in ("pick", "costs", "choose")),
    "io.cpp": tuple(f"tests/storage/test_{name}.py" for name in ("engine", "ring")),
}
ALL = (
    *(f"tests/core/test_{name}.py" for name in ("plan", "runs", "ids", "core_view", "rows")),
    "tests/plan",
    "tests/view",
    "tests/backends/test_rows_kernel.py",
)
#: The files of what `ALL` tests; the others are judged by their own tests alone.
TESTED_BY_ALL = frozenset({"plan.cpp", "runs.cpp", "pieces.cpp", "ids.cpp", "view.cpp", "rows.cpp"})
FLAGS = ("-O1", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections")
#: Seconds of a processor after which a test hangs; without a change none takes a tenth.
EACH = 30.0
#: The tests of a mutant count as hanging after `TIMES` times their time and these seconds.
TIMES = 5
START = 60.0
#: Bytes that a process of tests may allocate: a wrong count could take all memory.
MEMORY = 12 << 30

# --- mutations


class Change(NamedTuple):
    """One change of a file: text in the place of the characters from `begin` to `end`."""

    kind: str
    line: int
    begin: int
    end: int
    after: str


_HIDDEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'|^#[^\n]*", re.S | re.M
)
#: Operators as the formatter writes them, between spaces: templates and pointers have none.
_SWAPPED = {
    "comparison": {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    "arithmetic": {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "<<": ">>", ">>": "<<"},
    "assignment": {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|="},
    "and, or": {"&&": "||", "||": "&&"},
}
_OPERATOR = re.compile(r"(?<= )(<=|>=|==|!=|<<|>>|\+=|-=|\*=|/=|\|=|&=|&&|\|\||[<>+*/%-])(?= )")
_NUMBER = re.compile(r"(?<![\w.'])(\d+)(?![\w.'])")
_TRUTH = re.compile(r"\b(true|false)\b")
_IF = re.compile(r"\b(?:if|while) \(")
#: A call, an assignment, or a jump that stands alone in its line. What declares a name is drawn
#: too, and does not compile without it.
_STATEMENT = re.compile(
    r"^[ ]+((?:throw\b|continue|break|(?:[\w.>\[\]*-]+)(?:\(| [|&+*/-]?= ))[^;{}\n]*;)$", re.M
)


def masked(text: str) -> str:
    """Return a text whose comments, literals of text and directives are spaces."""
    return _HIDDEN.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


def changes_of(text: str) -> list[Change]:
    """Return all changes of a file's text; some of them cannot be compiled."""
    code = masked(text)
    lines = [0, *(found.end() for found in re.finditer("\n", text))]

    def change(kind: str, begin: int, end: int, after: str) -> Change:
        line = sum(1 for start in lines if start <= begin)
        return Change(kind, line, begin, end, after)

    changes = []
    for found in _OPERATOR.finditer(code):
        for kind, others in _SWAPPED.items():
            if (after := others.get(found.group())) is not None:
                changes.append(change(kind, *found.span(), after))
    for found in _NUMBER.finditer(code):
        number = int(found.group())
        changes.append(change("constant", *found.span(), str(number + 1)))
        if number:
            changes.append(change("constant", *found.span(), str(number - 1)))
    for found in _TRUTH.finditer(code):
        after = "false" if found.group() == "true" else "true"
        changes.append(change("constant", *found.span(), after))
    for begin, end in _conditions(code):
        changes.append(change("condition", begin, end, f"!({text[begin:end]})"))
    for found in _STATEMENT.finditer(code):
        changes.append(change("statement", *found.span(1), ";"))
    return changes


def _conditions(code: str) -> Iterator[tuple[int, int]]:
    """Yield the places of conditions, without their brackets."""
    for found in _IF.finditer(code):
        depth = 1
        end = found.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        yield found.end(), end - 1


def applied(change: Change, text: str) -> str:
    """Return a file's text with a change in it."""
    return text[: change.begin] + change.after + text[change.end :]


def draw(name: str, text: str, seed: int) -> Iterator[Change]:
    """Yield changes of a file; each line and kind of change is as likely as others."""
    places: dict[tuple[int, str], list[Change]] = defaultdict(list)
    for change in changes_of(text):
        places[change.line, change.kind].append(change)
    chance = random.Random(f"{seed} {name}")
    for place in chance.sample(sorted(places), len(places)):
        yield chance.choice(places[place])


# --- libraries


class Builder:
    """The objects of the right sources, and the libraries that have one changed file."""

    def __init__(self, folder: Path) -> None:
        path = ROOT / "build_backend" / "compile_core.py"
        spec = importlib.util.spec_from_file_location("portakv_compile_core", path)
        assert spec is not None
        assert spec.loader is not None
        self.recipe: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.recipe)
        self.folder = folder
        self.command: list[str] = self.recipe.command_for("")
        # The loader compares the sources of the tree, which do not change.
        self.hash = self.recipe.sources.hash_of(SOURCES)
        self.exports = folder / "exports.map"
        self.exports.write_text(self.recipe.EXPORTS)
        self.objects: dict[str, Path] = {}
        for source in sorted(SOURCES.glob("*.cpp")):
            made = self.compiled(source.name, source.read_text(encoding="utf-8"), source.name)
            assert made is not None, source
            self.objects[source.name] = made

    def compiled(self, name: str, text: str, stem: str) -> Path | None:
        """Compile a text in the place of a file; return the object, or None if it is no C++."""
        source = self.folder / "changed" / name  # the same path each time, for the same bytes
        source.parent.mkdir(exist_ok=True)
        source.write_text(text, encoding="utf-8")
        made = self.folder / f"{stem}.o"
        define = f'-DPORTAKV_CORE_SOURCES="{self.hash}"'
        flags = [*self.recipe.LANGUAGE, *FLAGS, "-w", define, "-I", str(SOURCES)]
        done = subprocess.run(
            [*self.command, *flags, "-c", str(source), "-o", str(made)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        return made if done.returncode == 0 else None

    def linked(self, name: str, changed: Path, output: Path) -> None:
        """Link the objects, one of them changed, and put the library in its place."""
        objects = [str(changed if each == name else made) for each, made in self.objects.items()]
        temporary = output.with_suffix(".new")
        link = [*self.command, *self.recipe.linking(self.exports), *objects, "-o", str(temporary)]
        subprocess.run(link, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        os.replace(temporary, output)


# --- the run


def run_tests(tree: Path, names: Sequence[str], seconds: float) -> int | None:
    """Run tests in a process that this one forks; return its exit code, or None if it hangs."""
    process = os.fork()
    if process == 0:
        try:
            _become_tests(tree, names)
        finally:
            os._exit(70)
    until = time.monotonic() + seconds
    ended = 0
    status = 0
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
        ended, status = os.waitpid(process, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


class _Limit:
    """Ends the process if one test takes too long, also inside of the core."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, EACH)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)


def _become_tests(tree: Path, names: Sequence[str]) -> None:
    os.setsid()
    os.chdir(tree)
    nothing = os.open(os.devnull, os.O_RDWR)
    for each in range(3):
        os.dup2(nothing, each)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.path[:0] = [str(tree / "src"), str(tree / "tests")]
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0"]
    os._exit(
        pytest.main(
            [*options, "--deselect", "tests/core/test_library.py", *names], plugins=[_Limit()]
        )
    )


def tests_of(name: str) -> list[str]:
    """Return the tests that judge a file, its own first."""
    others = [each for each in ALL if each not in TESTS[name]] if name in TESTED_BY_ALL else []
    return [*TESTS[name], *others]


def report(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the score of each file, and of the mutants that no test has killed."""
    states = ("killed", "hung", "survived")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for each in results:
        for row in (each["file"], "all"):
            counts[row][each["state"]] += 1
    lines = [f"{'file':<12}{'mutants':>9}" + "".join(f"{x:>10}" for x in states) + "  score"]
    for name in [*(each for each in TESTS if each in counts), "all"]:
        row = counts[name]
        many = sum(row.values())
        score = 100 * (row["killed"] + row["hung"]) / max(many, 1)
        figures = "".join(f"{row[state]:>10}" for state in states)
        lines.append(f"{name:<12}{many:>9}{figures}  {score:.0f} %")
    lines += ["", "not killed:"]
    for each in sorted(results, key=lambda each: str(each["mutant"])):
        if each["state"] == "survived":
            lines.append(f"{each['mutant']}  {each['kind']}: {each['before']}  ->  {each['after']}")
    return lines


def main() -> None:
    """Draw mutants, judge those without a result, and print the score."""
    parser = argparse.ArgumentParser(description="Measure what the tests of the core catch.")
    parser.add_argument("results", type=Path, help="a JSON file; an earlier run goes on")
    parser.add_argument("--sample", type=int, default=300, help="mutants, of all files together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", choices=[*TESTS], default=[*TESTS])
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short=12", "HEAD:native/core"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    known: dict[str, Any] = {"sources": done.stdout.strip(), "seed": args.seed, "results": []}
    if args.results.exists():
        known = json.loads(args.results.read_text(encoding="utf-8"))
        if known["sources"] != done.stdout.strip():
            raise SystemExit(
                f"Expected results of the sources {done.stdout.strip()}, got those of "
                f"{known['sources']}. Pass another file."
            )
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(Path(folder))
        tree = Judge(Path(folder), 1).idle.get()
        for result in judged(builder, tree, args.files, args.sample, known):
            known["results"].append(result)
            args.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            words = f"{result['state']} {result['mutant']} {result['kind']} {result['seconds']} s"
            print(f"{len(known['results'])} {words}", flush=True)
    print("\n".join(["", *report(known["results"])]))


def judged(
    builder: Builder,
    tree: Path,
    files: Sequence[str],
    sample: int,
    known: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield the result of each mutant that has none yet, a file in turn with the others."""
    library = tree / "portakv" / "core" / "libportakv_core.so"
    if "seconds" not in known:
        builder.linked("", Path(), library)
        began = time.monotonic()
        every = [*ALL, *dict.fromkeys(test for name in files for test in tests_of(name))]
        if (code := run_tests(tree, list(dict.fromkeys(every)), 3600)) != 0:
            raise SystemExit(f"Expected the tests to pass unchanged, got the exit code {code}.")
        known["seconds"] = round(time.monotonic() - began)
        print(f"{known['seconds']} s without a change", flush=True)
    texts = {name: (SOURCES / name).read_text(encoding="utf-8") for name in files}
    draws = {name: draw(name, texts[name], known["seed"]) for name in files}
    # The recorded path of a file is in no object, but its right one is compared in the same way.
    right = {name: builder.objects[name].read_bytes() for name in files}
    ended = {each["mutant"] for each in known["results"]}
    for number in range(sample):
        name = files[number % len(files)]
        made = None
        for change in draws[name]:
            key = f"{name}:{change.line}:{change.begin}-{change.end}:{change.after}"
            if key in ended:
                break
            made = builder.compiled(name, applied(change, texts[name]), "mutant")
            if made is not None and made.read_bytes() != right[name]:
                break
            made = None
        if made is None:
            continue  # it has a result, or there is no further place
        builder.linked(name, made, library)
        began = time.monotonic()
        code = run_tests(tree, tests_of(name), START + TIMES * known["seconds"])
        yield {
            "mutant": key,
            "file": name,
            "kind": change.kind,
            "before": " ".join(texts[name][change.begin : change.end].split()),
            "after": change.after,
            "line": " ".join(texts[name].splitlines()[change.line - 1].split()),
            "state": "hung"
            if code in (None, -signal.SIGPROF)
            else "survived"
            if code == 0
            else "killed",
            "exit": code,
            "seconds": round(time.monotonic() - began, 1),
        }


if __name__ == "__main__":
    main()
