# SPDX-License-Identifier: Apache-2.0
"""`portakv bench` as a whole: fresh processes, the full preset, plots, what is left out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
from support.benchmarks_cases import FULL, tiny

import portakv_benchmarks.cli as bench
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.cold_start import measure_startup

# --- starts -----------------------------------------------------------------------------------


@pytest.mark.full
def test_fresh_processes_start_cold_and_warm() -> None:
    rows = measure_startup("reference", "cpu", 1)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    assert all(row["verified"] for row in rows)
    assert all(0 < row["import_seconds"] < row["seconds"] for row in rows)


def test_a_start_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*words: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "boom")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match="boom"):
        measure_startup("reference", "cpu", 1)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def tiny_bench(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    shapes = {"seed": tiny(), "llama3-8b-16": tiny("llama3-8b-16", tokens=16),
              "llama3-8b-64": tiny("llama3-8b-64", tokens=64)}  # fmt: skip
    monkeypatch.setattr(bench, "load", lambda: MappingProxyType(shapes))
    full = dataclasses.replace(FULL, repeats=1, overhead_rounds=10, starts=0)
    monkeypatch.setattr(suite, "PRESETS", {"full": full})
    return ["--preset", "full", "--device", "cpu", "--backend", "reference"]


@pytest.mark.full
def test_the_full_preset_prints_and_draws_everything(
    tmp_path: Path, tiny_bench: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    assert bench.main([*tiny_bench, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ladder: every way of moving seed" in shown
    assert "pool = slots of the cache" in shown
    assert "verdict" not in shown  # this project's bars are for its own machines
    drawn = {path.name.rpartition("-")[2] for path in tmp_path.glob("*.svg")}
    assert drawn == {"bandwidth.svg", "heatmap.svg", "host.svg", "ladder.svg"}
    for path in tmp_path.glob("*.svg"):
        assert path.read_text().count("<path") > 20


@pytest.mark.full
def test_the_same_result_gives_the_same_plots(tmp_path: Path, tiny_bench: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks.shared.plots import draw

    assert bench.main([*tiny_bench, "--shape", "seed", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    again = {path.name: path.read_bytes() for path in draw(results, tmp_path, file.stem)}
    assert first == again


def test_without_matplotlib_the_result_is_written_all_the_same(
    tmp_path: Path,
    tiny_bench: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "portakv_benchmarks.shared.plots", raising=False)
    absent: ModuleType | None = None
    monkeypatch.setitem(sys.modules, "matplotlib", absent)
    assert bench.main([*tiny_bench, "--shape", "llama3-8b-16", "--out", str(tmp_path)]) == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert "portakv[bench]" in capsys.readouterr().err


def test_what_no_time_is_left_for_is_told(tmp_path: Path, tiny_bench: list[str]) -> None:
    assert bench.main([*tiny_bench, "--seconds", "0", "--out", str(tmp_path)]) == 0
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert written["rows"] == []
    assert "seed, layers apart: no time was left" in written["left_out"]


def test_a_step_that_fails_leaves_the_others(
    tmp_path: Path, tiny_bench: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Any] = suite.run_task

    def sometimes(task: suite.Task, *more: Any) -> Any:
        if task.shape.name == "llama3-8b-64":
            raise RuntimeError("out of memory")
        return whole(task, *more)

    monkeypatch.setattr(suite, "run_task", sometimes)
    shapes = ["--shape", "llama3-8b-16", "--shape", "llama3-8b-64"]
    assert bench.main([*tiny_bench, *shapes, "--out", str(tmp_path)]) == 0
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "llama3-8b-64, layers apart: RuntimeError: out of memory" in written["left_out"]
    assert {r["shape"] for r in written["rows"] if r["kind"] == "copy"} == {"llama3-8b-16"}
