# SPDX-License-Identifier: Apache-2.0
"""The host benchmark on a CUDA device, in small sizes: every part, every byte, every engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import portakv_benchmarks.cli as bench
from portakv_benchmarks import cli as host_cli
from portakv_benchmarks.host.loops import attention, matmul
from portakv_benchmarks.host.suite import HOST_PRESETS, KB, MB

pytestmark = pytest.mark.gpu

SMALL = dataclasses.replace(
    HOST_PRESETS["tiny"], runs=(256, 2 * KB, 32 * KB), payloads=(512 * KB, 2 * MB), largest=2 * MB,
    direct=2 * MB, duplex=(2 * MB,), pageable=(2 * MB,), ring_slots=((2, 256 * KB),),
    beside=2 * MB, loop_seconds=0.02, matmul=1024, attention=(2, 4, 512), large=64 * MB,
    small=(1, 64, 10_000), pinned=17 * MB,
)  # fmt: skip


def test_every_part_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(host_cli, "HOST_PRESETS", {"full": SMALL})
    words = ["--host", "--device", "cuda", "--preset", "full", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (file,) = tmp_path.glob("*-host.json")
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert all(row["verified"] for row in rows)
    assert {row["part"] for row in rows} == set(host_cli.PARTS) - {"peers"}
    assert not [line for line in written["left_out"] if "Error" in line]
    grid = [row for row in rows if row["kind"] == "host_copy"]
    engines = {row["backend"] for row in grid}
    assert {"memcpy", "staged", "descriptors", "direct", "host", "host idle"} == engines
    assert all("staging_mb" in row for row in grid if row["backend"] != "memcpy")
    staged = [row["staging_mb"] for row in grid if row["backend"] == "staged"]
    assert 0 < max(staged) < 64
    assert {row["terms"] for row in grid if row["engine"] == "host"} == {
        "overlap=compute",
        "overlap=idle",
    }
    assert {row["thread_blocks"] for row in rows if "thread_blocks" in row} == {8}
    ways = {row["backend"] for row in rows if row["kind"] == "host_small"}
    assert {"SmallCopy value", "SmallCopy mapped", "torch.tensor"} <= ways


def test_a_captured_loop_writes_to_nobody_elses_memory() -> None:
    device = torch.device("cuda", 0)
    loop = matmul(device, 1024, 0.01)
    theirs = [torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device) for _ in range(8)]
    loop.run()
    torch.cuda.synchronize()
    assert not any(tensor.any() for tensor in theirs)


def test_loops_last_as_long_as_was_asked_for() -> None:
    device = torch.device("cuda", 0)
    for loop in (matmul(device, 1024, 0.05), attention(device, (2, 4, 512), 0.05)):
        assert loop._time() >= 40.0  # milliseconds; the shortest of three runs set its length
