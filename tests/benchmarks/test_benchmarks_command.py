# SPDX-License-Identifier: Apache-2.0
"""`portakv bench` as a whole: what it prints, writes, draws, leaves out and refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from support.benchmarks_cases import FULL, tiny
from support.simdev_cases import NAME
from support.waits import LIMIT

import portakv_benchmarks.cli as bench
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.workload import Workload

Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Runs the full preset with small shapes and options; the exit code and the result."""
    shapes = {
        "seed": tiny(),
        "llama3-8b-16": tiny("llama3-8b-16", tokens=16),
        "llama3-8b-64": tiny("llama3-8b-64", tokens=64),
    }
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(bench, "load_shapes", lambda: MappingProxyType(shapes))
    words = ["--preset", "full", "--device", "cpu", "--backend", "reference"]

    def run(*more: str, drawn: bool = False) -> tuple[int, dict[str, Any]]:
        full = dataclasses.replace(FULL, repeats=1, overhead_rounds=10, starts=0, all_methods=drawn)
        monkeypatch.setattr(suite, "PRESETS", {"full": full})
        if not drawn:
            monkeypatch.delitem(sys.modules, "portakv_benchmarks.shared.plots", raising=False)
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        code = bench.main([*words, *more, "--out", str(tmp_path)])
        (file,) = tmp_path.glob("cpu-*core-reference.json")
        return code, json.loads(file.read_text())

    return run


@pytest.mark.full
def test_the_full_preset_prints_and_draws_everything(
    tmp_path: Path, measured: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks.shared.plots import draw

    code, results = measured(drawn=True)
    assert code == 0
    shown = capsys.readouterr().out
    assert "methods of moving one chunk of a 7B model" in shown
    assert "pool = slots of the cache" in shown
    assert "verdict" not in shown  # this project's targets are for its own machines
    drawn = {path.name.rpartition("-")[2]: path for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {"bandwidth.svg", "heatmap.svg", "host.svg", "ladder.svg"}
    assert all(path.read_text().count("<path") > 20 for path in drawn.values())
    first = {path: path.read_bytes() for path in drawn.values()}
    stem = next(tmp_path.glob("*.json")).stem
    assert first == {path: path.read_bytes() for path in draw(results, tmp_path, stem)}


def test_it_prints_a_table_or_one_json_value_and_writes_the_same(
    measured: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no heading is folded
    code, written = measured("--shape", "seed", "--json")
    assert (code, json.loads(capsys.readouterr().out)) == (0, written)
    assert {"torch", "python", "device", "cpu", "date", "portakv"} <= set(written["machine"])
    assert {row["kind"] for row in written["rows"]} == {"copy", "overhead"}
    assert all(row["verified"] for row in written["rows"])
    assert measured("--shape", "seed")[0] == 0
    shown = capsys.readouterr()
    assert "of copy_" in shown.out
    assert "added us" in shown.out
    assert not {"bars", "verdict", "missed"} & set(shown.out.split())  # they are this project's own
    assert "seed, layers apart" in shown.err
    assert "portakv[bench]" in shown.err  # there is no matplotlib, and the result is written
    assert measured("--shape", "llama3-8b-16", "--bars")[0] == 0
    judged = capsys.readouterr().out
    assert "verdict" in judged
    assert "host time that a registered call adds" in judged
    assert "3 targets concern rows that were not measured." in judged


def test_wrong_bytes_end_in_exit_code_1(measured: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "stored_right", lambda self, i, index: False)
    assert measured("--shape", "llama3-8b-16")[0] == 1


def test_what_no_time_is_left_for_is_told(measured: Bench) -> None:
    with pytest.raises(SystemExit, match="2"):
        measured("--seconds", "0")
    written = measured("--seconds", "1e-9")[1]
    assert written["rows"] == []
    assert "seed, layers apart: no time was left" in written["left_out"]


@pytest.mark.parametrize(
    ("error", "reason", "ended"),
    [
        (RuntimeError("no memory"), "llama3-8b-16, layers apart: RuntimeError: no memory", 1),
        (KeyboardInterrupt(), "interrupted: the last 1 steps", 0),
    ],
)
def test_a_step_that_fails_or_is_interrupted_leaves_what_was_measured(
    measured: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str, ended: int
) -> None:
    whole: Callable[..., Any] = suite.run_task

    def sometimes(task: suite.Task, *more: Any) -> Any:
        if (task.shape.name, task.arrangement) == ("llama3-8b-16", "apart"):
            raise error
        return whole(task, *more)

    monkeypatch.setattr(suite, "run_task", sometimes)
    code, written = measured("--shape", "llama3-8b-64", "--shape", "llama3-8b-16")
    assert code == ended
    assert reason in written["left_out"]
    assert any(row.get("shape") == "llama3-8b-64" for row in written["rows"])


#: The beginning of the error under a forced backend.
FORCED = "Expected PORTAKV_BACKEND to be unset, got 'staged'"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--preset", "quick"], FORCED),
        (["--host"], FORCED),
        (["--device", "cpu", "--shape", "nonsense"], "Expected --shape to be one of seed,"),
        (["--device", "cpu", "--backend", "nonsense"], " on cpu, got 'nonsense'"),
        (["--device", "nonsense"], "nonsense"),
        (["--host", "--device", "cpu"], "Expected an accelerator, whose copies"),
        (["--host", "--device", "nonsense"], "nonsense"),
        pytest.param(["--host", "--device", NAME], "is emulated", marks=pytest.mark.simdev),
        pytest.param(
            ["--host", "--device", NAME, "--preset", "tiny", "--only", "grid,nonsense"],
            "got 'nonsense'",
            marks=pytest.mark.simdev,
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    if why == FORCED:
        monkeypatch.setenv("PORTAKV_BACKEND", "staged")
    assert bench.main(words) == 1
    message = capsys.readouterr().err
    command = "portakv bench --host" if "--host" in words else "portakv bench"
    assert message.startswith(f"{command}: ")
    assert why in message


def test_its_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--host", "--help"])
    shown = capsys.readouterr().out
    assert all(part in shown for part in bench.PARTS)
    assert "portakv bench --host" in shown


#: Runs suites in a process that has torch and numpy alone; the texts show what each printed.
_BARE = """
import contextlib, io, json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("msgspec", "zmq", "obstore", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import portakv_benchmarks.cli as bench
answers = []
for words in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = bench.main(words)
        except SystemExit as error:
            code = error.code
    answers.append([code, printed.getvalue()])
print(json.dumps(answers))
"""


def test_most_suites_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    """The two that need more say so: the control, since the packages are hidden."""
    cpu = ["--device", "cpu"]
    runs = [
        ["--host", "--help"],
        ["--host", *cpu],
        [*cpu, "--backend", "reference", "--shape", "seed", "--seconds", "0.001", "--json"],
        ["--migration", *cpu, "--preset", "tiny"],
        ["--engines", *cpu, "--dir", str(tmp_path)],
    ]
    child = subprocess.run(
        [sys.executable, "-c", _BARE, json.dumps(runs)],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    helped, host, device, migration, engines = json.loads(child.stdout)
    assert helped[0] == 0
    assert host[0] == 1
    assert "Expected an accelerator" in host[1]
    assert device[0] == 0
    assert "no time was left" in device[1]
    for code, printed in (migration, engines):
        assert code == 1
        assert "No module named 'msgspec'" in printed


@pytest.mark.parametrize("words", [["--wall", "--storage"], ["--storage", "--wall"]])
def test_the_parts_by_the_wall_clock_are_selected_together(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.delenv("PORTAKV_IO", raising=False)
    words = [*words, "--device", "cpu", "--preset", "tiny", "--dir", str(tmp_path)]
    assert bench.main([*words, "--seconds", "1e-9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["suite"] == "storage"
    assert result["asked"]["parts"] == [*bench.BY_WALL["storage"]]
    with pytest.raises(SystemExit, match="2"):
        bench.main([*words, "--only", "tier"])
    assert "Expected --wall or --only, got both" in capsys.readouterr().err


def test_parts_by_the_wall_clock_exist() -> None:
    assert {*bench.BY_WALL["storage"]} <= {*bench.STORAGE}
    assert {*bench.BY_WALL["migration"]} <= {*bench.MIGRATION}
