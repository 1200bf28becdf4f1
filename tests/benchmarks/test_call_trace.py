# SPDX-License-Identifier: Apache-2.0
"""The trace of a call: what counts, what does not, and what the traced calls are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import simdev_cases as simulated
from support.command_line import registered
from support.packed_backend import Packing
from support.waits import LIMIT

import portakv
from portakv_benchmarks.shared import call_trace, traced_calls
from portakv_benchmarks.shared.call_trace import Recorder, Switches, Trace, figures

CPU = torch.device("cpu")
NAMES = [
    "from_gpu, registered",
    "copy_blocks",
    "copy_blocks, new ids",
    "host hit",
    "disk hit",
    "offer and ticket",
    "mapped pull",
]
FIRST = """
from second import other
def outer(lock):
    inner()
    other(lock)
    inner()
def inner():
    pass
"""
SECOND = """
def other(lock):
    with lock:
        lock.locked()
    assert lock.acquire()
    assert not lock.acquire(False)
    lock.release()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of a folder, which calls a second module of it."""
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "second", raising=False)
    spec = importlib.util.spec_from_file_location("first", tmp_path / "first.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "second")
    return module


def figures_of(trace: Trace) -> dict[str, Any]:
    return figures(trace, Switches(0.0, 0.0, None), threading.get_ident())


def test_each_file_call_and_lock_of_the_caller_counts(package: Any, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    with recorder.count_locks():
        lock = threading.Lock()
    package.outer(lock)  # is not recorded
    result, trace = recorder.record(lambda: package.outer(lock) or 7, package.inner)
    package.outer(lock)
    assert result == 7
    row = figures_of(trace)
    assert row["functions"] == {"first.py": ["outer", "inner", "inner"], "second.py": ["other"]}
    assert (row["files"], row["changes"], row["library_calls"]) == (2, 3, 4)
    assert (row["locks"], row["locks_of_others"]) == (2, 0)  # the one that was refused is none
    assert row["calls_of_others"] == 0
    outside, trace = recorder.record(lambda: json.dumps([1]), package.inner)
    assert outside == "[1]"
    row = figures_of(trace)
    assert (row["files"], row["library_calls"]) == (0, 0)
    assert row["calls"] > 1


def test_each_call_and_lock_of_a_thread_counts(package: Any, tmp_path: Path) -> None:
    """A thread that runs on after the operation counts until it is at rest."""
    recorder = Recorder(tmp_path)
    with recorder.count_locks():
        lock = threading.Lock()
    go = threading.Event()
    ended = threading.Event()

    def work() -> None:
        go.wait(LIMIT)
        package.outer(lock)
        ended.set()

    with recorder.follow():
        thread = threading.Thread(target=work)
        thread.start()
    trace = recorder.record(go.set, lambda: ended.wait(LIMIT))[1]
    thread.join(LIMIT)
    row = figures_of(trace)
    assert (row["files"], row["files_of_all"]) == (0, 2)
    assert (row["locks"], row["locks_of_others"]) == (0, 2)
    assert row["calls_of_others"] >= 4
    untraced = threading.Thread(target=package.outer, args=(lock,))  # nothing follows it
    trace = recorder.record(untraced.start, untraced.join)[1]
    assert figures_of(trace)["files_of_all"] == 0


def test_the_locks_of_threading_are_its_own_again() -> None:
    kinds = (threading.Lock, threading.RLock)
    recorder = Recorder(Path())
    with recorder.count_locks():
        condition = threading.Condition()
        with condition:
            condition.wait(0)
        assert threading.Lock is not kinds[0]
    assert (threading.Lock, threading.RLock) == kinds


class Near:
    """The owner of the rows of a pull, in this process."""

    def __init__(self, device: torch.device) -> None:
        self.side = traced_calls.Side(device)

    def do(self, name: str) -> Any:
        return getattr(self.side, name)()

    def close(self) -> None:
        self.side.owner.close()
        self.side.channel.close()


class Damaged(Near):
    """An owner whose rows are not those that it was made with."""

    def do(self, name: str) -> Any:
        self.side.owner.shards[0].view.tensors[0].fill_(3)
        return super().do(name)


def test_the_calls_are_what_their_names_say() -> None:
    rows = call_trace.measure(CPU, (1, 1, 1), start=Near)
    assert list(rows) == NAMES
    through = {name: {*row["functions"]} for name, row in rows.items()}
    assert "connector/connector.py" in through["from_gpu, registered"]
    assert "copy/rows.py" in through["copy_blocks"]
    assert "storage/loans.py" in through["host hit"]
    assert any("backends" in file for file in through["host hit"])
    assert rows["disk hit"]["files_of_all"] > rows["disk hit"]["files"]
    assert "storage/plan.py" in through["disk hit"]
    assert not any("backends" in file for file in through["disk hit"])
    assert "migrate/offers.py" in through["offer and ticket"]
    assert not any("backends" in file for file in through["offer and ticket"])


#: The most files that one repeated call may enter, and the most changes of file: on a CPU, and on
#: the simulated device by the reference and by a backend with packed launches. A backend's files
#: count if they belong to the library, which those of `packing` do not. On the device two changes
#: are for the look at the oldest copy in flight, which a call makes if many are.
TRIPS = {
    ("cpu", "reference"): {
        "from_gpu, registered": (23, 60),
        "copy_blocks": (14, 35),
        "copy_blocks, new ids": (16, 44),
    },
    ("simdev", "reference"): {
        "from_gpu, registered": (24, 69),
        "copy_blocks": (14, 40),
        "copy_blocks, new ids": (16, 47),
    },
    ("simdev", "packing"): {
        "from_gpu, registered": (7, 22),
        "copy_blocks": (10, 27),
        "copy_blocks, new ids": (12, 33),
    },
}


@pytest.mark.parametrize(
    ("place", "backend"),
    [pytest.param(*case, marks=[pytest.mark.simdev] * (case[0] == "simdev")) for case in TRIPS],
)
def test_a_repeated_call_enters_no_more_files(
    place: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", backend)
    device = CPU if place == "cpu" else simulated.DEVICE
    recorder = Recorder(Path(portakv.__file__).parent)
    with registered(packing=Packing):
        for call in traced_calls.copies(device):
            row = figures_of(call_trace.trace_call(recorder, call, 20, 9))
            files, changes = TRIPS[place, backend][call.name]
            entered = row["functions"]
            assert row["files"] <= files, f"{call.name} enters {row['files']}: {entered}"
            assert row["changes"] <= changes, f"{call.name} changes {row['changes']}: {entered}"


def test_a_pull_that_brings_other_rows_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="Expected the rows of the owner"),
        traced_calls.operations(CPU, start=Damaged),
    ):
        pass


@pytest.mark.full
def test_the_command_counts_locks_and_the_owners_switches() -> None:
    words = ["-m", "portakv_benchmarks.shared.call_trace", "--device", "cpu", "--quick"]
    ended = subprocess.run(
        [sys.executable, *words, "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    rows = json.loads(ended.stdout)
    assert list(rows) == NAMES
    assert rows["host hit"]["locks"] == 0
    assert rows["disk hit"]["locks"] > 0
    assert rows["disk hit"]["locks_of_others"] > 0
    assert rows["mapped pull"]["switches_of_owner"] is not None
    shown = subprocess.run(
        [sys.executable, *words, "--functions"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert "what one call passes through, on cpu" in shown.stdout
    assert "storage/form_store.py: FormStore.load" in shown.stdout
