# SPDX-License-Identifier: Apache-2.0
"""The measure of the project: what counts, how a difference is shown, and what a trace records."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from support import house, traced_calls
from support.waits import LIMIT

MODULE = """
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from portakv.runtime.bounded import Bounded

answers = Bounded("answers", 8)

class Kind(Enum):
    ONE = 1

@dataclass(frozen=True)
class Held:
    lock: threading.Lock = field(default_factory=threading.Lock)

class Row(NamedTuple):
    event: torch.Event

class Pending(Protocol):
    def done(self): ...
    def wait(self): ...

class End:
    ended = None
    def done(self): ...
    def wait(self): ...

class Late(End):
    pass

class Loop(threading.Thread):
    def wait(self): ...

def work():
    torch.Event()
    threading.Condition(threading.RLock())
    threading.Thread(target=work).start()
    ThreadPoolExecutor(1)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a project with one package of one file."""
    (tmp_path / "portakv/copy").mkdir(parents=True)
    (tmp_path / "portakv/__init__.py").write_text("x = 1\n")
    (tmp_path / "portakv/copy/one.py").write_text(MODULE)
    (tmp_path / "portakv/copy/link.py").symlink_to("one.py")
    (tmp_path / "docs/plugs").mkdir(parents=True)
    (tmp_path / "docs/plugs/page.md").write_text("three words here\n")
    (tmp_path / "README.md").write_text("two words\n")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/NOTES.md").write_text("one")
    (tmp_path / "benchmarks/results/TABLES.md").write_text("a table of 5 words")
    (tmp_path / "native").mkdir()
    (tmp_path / "native/one.cu").write_text("a\nb\n")
    return tmp_path


def test_figures_of_a_package(tree: Path) -> None:
    library = house.Library(tree)
    figures = library.packages()
    assert set(figures) == {"top", "copy"}
    assert figures["top"] == {**dict.fromkeys(house.COLUMNS, 0), "nodes": 5, "files": 1}
    assert figures["copy"].pop("nodes") > 100
    assert figures["copy"] == {
        "files": 1,
        "classes": 7,
        "records": 3,
        "locks": 3,
        "threads": 3,
        "caches": 1,
        "ends": 2,
    }
    names = library.names()
    assert names["caches"] == ["answers"]
    assert names["ends"] == ["End", "Late"]
    assert names["threads"] == ["copy/one.py"] * 2


def test_words_and_lines_of_other_folders(tree: Path) -> None:
    assert house.words(tree) == {
        "docs": 3,
        "top": 2,
        "benchmarks": 1,
        "all pages": 6,
        "tables of results": 5,
    }
    assert house.folders(tree)["native"] == {"nodes": 0, "files": 0, "lines of C++": 2}


def test_a_difference_stands_in_brackets() -> None:
    now: house.Rows = {"copy": {"files": 3}, "new": {"files": 1}}
    before: house.Rows = {"copy": {"files": 1005}, "gone": {"files": 2}}
    assert house.table("package", now, before, ["files"]) == [
        "package       files",
        "copy     3 (-1,002)",
        "new          1 (+1)",
        "gone         0 (-2)",
        "",
    ]
    assert house.table("package", {"copy": {"files": 3}}, None, ["files"])[1] == "copy         3"


def test_a_call_that_fails_is_a_row_with_its_reason() -> None:
    now: house.Rows = {"copy": {"failed": "it has no rows"}, "load": {"files": 2, "changes": 3}}
    assert house.table("call", now, {"copy": {"files": 7}}, ["files", "changes"])[:3] == [
        "call   files  changes",
        "copy  it has no rows",
        "load  2 (+2)   3 (+3)",
    ]


FIRST = """
from second import other
def outer():
    inner()
    other()
    inner()
def inner():
    pass
"""
SECOND = """
def other():
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of a folder, which calls a second module of it."""
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "second", raising=False)
    spec = util.spec_from_file_location("first", tmp_path / "first.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "second")
    return module


def test_a_trace_has_the_frames_of_all_threads(package: Any, tmp_path: Path) -> None:
    go = threading.Event()

    def work() -> None:
        go.wait(LIMIT)
        package.outer()

    recorder = traced_calls.Recorder(tmp_path)
    with recorder.follow():
        thread = threading.Thread(target=work)
        thread.start()
        package.outer()  # is not recorded
        assert traced_calls.counts(recorder.record(package.outer)) == {
            "files": 2,
            "functions": 3,
            "changes": 3,
        }
        frames = recorder.record(go.set)  # the thread goes on after the call
        package.outer()
    thread.join(LIMIT)
    assert {frame.thread for frame in frames} == {thread.ident}
    assert traced_calls.counts(frames)["changes"] == 3


@pytest.mark.parametrize("name", ["copy_rows, third", "BlockStore.load, host"])
def test_a_call_of_the_library(name: str) -> None:
    (call,) = (call for call in traced_calls.CALLS if call.name == name)
    row = traced_calls.trace(call)
    assert row["changes"] >= row["files"] > 1
    assert row["functions"] > row["files"]


#: The most files that a call enters: those that a reader opens to follow it.
MOST_FILES = {
    "copy_rows, third": 5,
    "BlockStore.load, host": 12,
    "BlockStore.load, disk": 25,
    "BlockStore.save": 26,
    "Reader.pull, first": 41,
    "Reader.pull, later": 16,
}


def test_a_reader_opens_few_files() -> None:
    """In processes that have made no call before. Name a new file in place of another one."""
    command = [sys.executable, "-m", "support.traced_calls", "trace", *MOST_FILES]
    done = subprocess.run(
        command, cwd=house.ROOT / "tests", capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [*rows] == [call.name for call in traced_calls.CALLS if call.name in MOST_FILES]
    files = {name: row["files"] for name, row in rows.items()}
    assert {name: many for name, many in files.items() if many > MOST_FILES[name]} == {}


@pytest.mark.full
def test_the_command_measures_every_call(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "tests/support/house.py", "--json", str(file)]
    recorded = [*(house.ROOT / "benchmarks/results/house").glob("*.json")]
    command += ["--against", str(min(recorded))]
    done = subprocess.run(command, cwd=house.ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    calls = json.loads(file.read_text())["calls"]
    assert set(calls) == {call.name for call in traced_calls.CALLS}
    assert [name for name, row in calls.items() if "failed" in row] == []
    assert "the difference to" in done.stdout
