# SPDX-License-Identifier: Apache-2.0
"""The benchmark of encodings as a whole, in sizes that mean nothing: every method, every byte."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.simdev_cases import DEVICE, NAME

import portakv_benchmarks.cli as bench
from portakv import Index, Unsupported, copy_blocks
from portakv_benchmarks.encodings import across
from portakv_benchmarks.encodings.suite import ENCODING_PRESETS, EncodingBench
from portakv_benchmarks.host.traffic_sources import LOOPS
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, having

TINY = ENCODING_PRESETS["tiny"]
INSIDE = {"copy_", "gather", "scatter", "pack", "unpack", "pack, call", "unpack, call"}


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(harness, "REST", 0.0)  # no figure counts here


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(DEVICE, marks=[pytest.mark.simdev, pytest.mark.full], id="simdev"),
        pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda"),
    ],
    indirect=True,
)
def test_every_method_is_measured_and_every_byte_right(
    device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    name = device.type if device.type == "cuda" else NAME
    words = ["--encodings", "--device", name, "--preset", "tiny", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    result: Row = json.loads(file.read_text())
    assert (result["suite"], len([*tmp_path.glob("*-payload.svg")])) == ("encodings", 1)
    rows = result["rows"]
    assert all(row["verified"] for row in rows)
    for case in TINY.cases:
        own = having(rows, kind="encoding_copy", shape=case.name)
        assert {row["backend"] for row in own} == INSIDE
        assert all(row["of_plain"] > 0 for row in own if "pack" in row["backend"])
    links = having(rows, kind="encoding_link")
    assert {row["op"] for row in links} == {"d2h", "h2d", "both"}
    assert {row["backend"] for row in links} == {"memcpy", "raw", "pack"}
    for row in links:
        packed = row["backend"] == "pack"
        assert (row["wire_bytes"] < row["payload_bytes"]) == packed
        assert row["payload_to_wire"] == (1.306 if packed else 1)
    beside = having(rows, kind="encoding_alongside")
    assert {(row["loop"], row["op"]) for row in beside} == {*product(LOOPS, ("d2h", "h2d", "both"))}
    assert {row["backend"] for row in beside} == {"memcpy", "raw, detached", "pack, detached"}
    for row in beside:
        assert ("over_raw" in row) == (row["backend"] == "pack, detached")
        assert row["payload_bytes"] == TINY.alongside
    shown = capsys.readouterr().out
    assert "packing and unpacking inside a device" in shown
    assert "packed and raw rows between a device and pinned host" in shown


@pytest.mark.simdev
def test_a_block_that_does_not_arrive_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(iter(across.across_steps(bench_ := EncodingBench(DEVICE, TINY))))[1]

    def shorter(src: Any, dst: Any, src_ids: Index, dst_ids: Index) -> Any:
        case = TINY.linked[0]
        count = src.slots if src_ids is None else len(src_ids.host_ids()) * case.tokens
        count -= case.tokens
        return copy_blocks(src, dst, src_ids, dst_ids, count=count)

    monkeypatch.setattr(across, "copy_blocks", shorter)
    rows = step()
    assert not bench_.left_out
    verdicts = {(row["backend"], row["verified"]) for row in rows}
    assert verdicts == {("memcpy", True), ("raw", False), ("pack", False)}


def test_a_link_needs_a_device() -> None:
    bench_ = EncodingBench(torch.device("cpu"), TINY)
    with pytest.raises(Unsupported, match="Packed copies over a link"):
        next(iter(across.across_steps(bench_)))


@pytest.mark.slow
def test_pulls_by_transports_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--encodings", "--device", "cpu", "--preset", "tiny", "--out", str(tmp_path)]
    assert bench.main([*words, "--only", "transports"]) == 0
    (file,) = tmp_path.glob("*.json")
    rows: list[Row] = json.loads(file.read_text())["rows"]
    (raw,) = having(rows, backend="raw")
    (packed,) = having(rows, backend="pack")
    assert raw["verified"]
    assert packed["verified"]
    assert packed["of_raw"] > 0
    assert raw["wire_bytes"] == raw["payload_bytes"] == packed["payload_bytes"]
    assert (raw["payload_to_wire"], packed["payload_to_wire"]) == (1, 1.306)
    assert "packed and raw pulls through staging buffers" in capsys.readouterr().out
