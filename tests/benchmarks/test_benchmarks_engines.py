# SPDX-License-Identifier: Apache-2.0
"""Rows of the benchmark of engines, and what its command refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from portakv_benchmarks import cli
from portakv_benchmarks.engines.models import FULL, MODELS, TINY
from portakv_benchmarks.engines.rows import (
    HOST,
    OFF,
    OWN,
    PACKED,
    Served,
    rows_of_prompts,
    rows_of_steps,
)
from portakv_benchmarks.shared.harness import having
from portakv_benchmarks.shared.tables import print_results

MODEL = MODELS["tiny"]
(SHORT, LONG) = MODEL.prompts


def served(*hits: float, right: bool = True) -> list[Served]:
    return [Served(100.0, 10.0, hit, right) for hit in hits]


def rows() -> list[dict[str, Any]]:
    known = {
        (OFF, LONG): served(80.0, 100.0, 100.0),
        (OWN, LONG): served(20.0, 20.0, 40.0),
        (HOST, LONG): served(10.0, 20.0, 20.0, right=False),
    }
    return rows_of_prompts(MODEL, known, {OFF: 150.0, OWN: 160.0, HOST: 170.0})


def test_ratios_are_medians_of_pairs() -> None:
    (hit,) = having(rows(), backend=HOST, op="hit")
    assert hit["p50_ms"] == 20.0
    assert hit["of_own"] == 0.5  # of 0.5, 1 and 0.5; the medians are equal
    assert hit["of_off"] == 0.2
    assert hit["above_device_hit_ms"] == 10.0
    assert not hit["verified"]
    (again,) = having(rows(), backend=OFF, op="recompute")
    assert again["verified"]
    assert "of_off" not in again
    (cold,) = having(rows(), backend=OWN, op="cold")
    assert cold["first_ms"] == 160.0
    assert cold["of_off"] == 1.0


def test_packed_rows_are_compared_with_raw_ones() -> None:
    known = {(HOST, LONG): served(20.0, 40.0), (PACKED, LONG): served(18.0, 34.0)}
    (packed,) = having(
        rows_of_prompts(MODEL, known, {HOST: 1.0, PACKED: 1.0}), backend=PACKED, op="hit"
    )
    assert packed["of_raw"] == 0.875  # of 0.9 and 0.85
    (raw,) = having(rows_of_prompts(MODEL, known, {HOST: 1.0, PACKED: 1.0}), backend=HOST, op="hit")
    assert "of_raw" not in raw


def test_steps_are_summed_up_by_run() -> None:
    ours = [[1.0, 1.0, 4.0], [2.0, 2.0, 2.0], [3.0, 3.0, 30.0]]
    row, own = rows_of_steps(MODEL, {(HOST, "hits"): ours, (OWN, "hits"): [[4.0]]})
    assert (row["mean_ms"], row["p50_ms"], row["most_ms"]) == (2.0, 2.0, 30.0)
    assert row["of_own"] == 0.5
    assert "of_own" not in own


def test_its_tables_show_wrong_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"device": "a device", "torch": "2", "python": "3"}
    steps = rows_of_steps(MODEL, {(OFF, "nothing"): [[1.0]]})
    print_results({"machine": machine, "rows": [*rows(), *steps], "left_out": []})
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "nothing comes in" in shown


def test_models_are_named_once() -> None:
    assert {*FULL, *TINY} == {*MODELS}
    for model in MODELS.values():
        block = model.terms.get("block_size", 16)
        assert all(length % block for length in model.prompts)


def test_without_vllm_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["--engines", "--dir", str(tmp_path), "--device", "cpu", "--preset", "tiny"])
    assert code == 0  # what is absent is reported only
    assert "vllm is not installed" in capsys.readouterr().out


def test_without_a_folder_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engines", "--dir", str(tmp_path / "none"), "--device", "cpu"]
    assert cli.main(words) == 1
    assert "Expected --dir to be a folder" in capsys.readouterr().err
