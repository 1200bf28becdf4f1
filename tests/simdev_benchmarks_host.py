# SPDX-License-Identifier: Apache-2.0
"""The host benchmark as a whole on the simulated device, in sizes that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import portakv_benchmarks.cli as bench
import pytest
import torch
from portakv_benchmarks import host_grid, host_interference, host_merge
from portakv_benchmarks.host_cases import DIRECTIONS
from portakv_benchmarks.host_cli import PARTS
from portakv_benchmarks.host_memory import Sides
from portakv_benchmarks.host_suite import PRESETS, Bench
from simdev_cases import DEVICE, NAME

WORDS = ["--host", "--device", NAME, "--preset", "tiny"]
KINDS = {"host_copy", "host_direct", "host_duplex", "host_call", "host_small", "host_interference",
         "host_pageable", "host_pinning"}  # fmt: skip


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


def test_every_part_is_measured_and_every_byte_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*WORDS, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (file,) = tmp_path.glob("*-host.json")
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert (written["suite"], written["format"]) == ("host", 2)
    assert {row["part"] for row in rows} == set(PARTS) == set(written["asked"]["parts"])
    assert {row["kind"] for row in rows} == KINDS
    assert all(row["verified"] for row in rows)
    assert {"torch", "python", "device", "date", "portakv"} <= set(written["machine"])
    assert "direct: " in written["left_out"][0]  # there is no CUDA driver
    assert not [line for line in written["left_out"] if "Error" in line]
    grid = [row for row in rows if row["kind"] == "host_copy"]
    for row in grid:
        assert ("took" in row) == ("chosen_loss" in row) == row["backend"].startswith("host")
    assert {row["op"] for row in grid} == set(DIRECTIONS)
    assert {"staged", "descriptors", "host", "host idle", "memcpy"} == {r["backend"] for r in grid}
    assert all(title in shown for title in ("both directions at once", "beside a loop", "bars"))
    assert len(list(tmp_path.glob("*.svg"))) == 2 or not _plots()


def _plots() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_parts_on_their_own_make_one_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("small", "pinning"):
        assert bench.main([*WORDS, "--only", part, "--out", str(tmp_path / part)]) == 0
    files = sorted(str(file) for file in tmp_path.glob("*/*.json"))
    assert [Path(file).stem.rpartition("-")[2] for file in files] == ["pinning", "small"]
    host_merge.main([*files, "--out", str(tmp_path)])
    (merged,) = tmp_path.glob("*-host.json")
    rows = json.loads(merged.read_text())["rows"]
    assert [row["kind"] for row in rows[:2]] == ["host_pinning", "host_pinning"]
    assert "integers" in capsys.readouterr().out


def test_wrong_bytes_end_in_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sides, "right", lambda self, direction: False)
    assert bench.main([*WORDS, "--only", "duplex"]) == 1


def test_figures_come_from_real_hardware_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--host", "--device", NAME]) == 2
    assert "emulated" in capsys.readouterr().err
    assert bench.main([*WORDS, "--only", "grid,nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_an_engine_that_fails_is_told_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sides.arguments

    def broken(self: Sides, direction: str, ids: Any = None) -> Any:
        if direction == "h2d":
            raise RuntimeError("the link is down")
        return whole(self, direction, ids)

    monkeypatch.setattr(Sides, "arguments", broken)
    step = next(iter(host_grid.duplex_steps(Bench(DEVICE, PRESETS["tiny"]))))[1]
    rows, left_out = step()
    assert [row["backend"] for row in rows] == ["memcpy"]
    assert any("the link is down" in line for line in left_out)


def test_a_loop_lasts_as_long_as_was_asked_for() -> None:
    bench_ = Bench(DEVICE, PRESETS["tiny"])
    loop = host_interference._matmul(bench_)
    assert loop.steps >= 8
    streams = bench_.stream(), bench_.stream()
    taken, link = host_interference._meet(bench_, loop, None, streams)
    assert taken > 0
    assert link == 0.0
    torch.accelerator.synchronize(DEVICE)
