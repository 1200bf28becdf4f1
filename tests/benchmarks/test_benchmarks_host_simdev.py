# SPDX-License-Identifier: Apache-2.0
"""The host benchmark as a whole: on the simulated device in sizes that mean nothing, and on a CUDA
device in small ones."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.simdev_cases import DEVICE, NAME

import portakv_benchmarks.cli as bench
from portakv_benchmarks.cli import PARTS
from portakv_benchmarks.host import grid, interference, merge, traffic_sources
from portakv_benchmarks.host.calls import IDS
from portakv_benchmarks.host.cases import DIRECTIONS, Arguments, BothIds, Sides, cases, scene
from portakv_benchmarks.host.suite import HOST, HOST_PRESETS, KB, MB, STAGED, Bench
from portakv_benchmarks.host.traffic_sources import LOOPS, Traffic
from portakv_benchmarks.host.whole_call import chosen_with
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, Variant
from portakv_benchmarks.shared.peers import PeerMissing

WORDS = ["--host", "--device", NAME, "--preset", "tiny"]
TINY = HOST_PRESETS["tiny"]
SMALL = dataclasses.replace(
    TINY,
    runs=(256, 2 * KB, 32 * KB),
    payloads=(512 * KB, 2 * MB),
    largest=2 * MB,
    direct=2 * MB,
    duplex=(2 * MB,),
    pageable=(2 * MB,),
    ring_slots=((2, 256 * KB),),
    alongside=2 * MB,
    loop_seconds=0.05,
    matmul=1024,
    attention=(2, 4, 512),
    large=64 * MB,
    small=(1, 64, 10_000),
    pinned=17 * MB,
)
KINDS = {
    "host_copy",
    "host_direct",
    "host_duplex",
    "host_call",
    "host_small",
    "host_interference",
    "host_interference_short",
    "host_waiting",
    "host_pageable",
    "host_pinning",
}


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(harness, "REST", 0.0)  # no figure counts here


def written(folder: Path) -> Row:
    (file,) = folder.glob("*.json")
    result: Row = json.loads(file.read_text())
    return result


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(DEVICE, marks=[pytest.mark.simdev, pytest.mark.full], id="simdev"),
        pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda"),
    ],
    indirect=True,
)
def test_every_part_is_measured_and_every_byte_right(
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    cuda = device.type == "cuda"
    monkeypatch.setattr(bench, "HOST_PRESETS", {"tiny": SMALL if cuda else TINY, "full": SMALL})
    words = ["--host", "--device", device.type if cuda else NAME, "--preset", "tiny"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = written(tmp_path)
    rows = result["rows"]
    assert (result["suite"], result["format"], len([*tmp_path.glob("*.svg")])) == ("host", 2, 2)
    assert result["asked"]["parts"] == list(PARTS)
    assert {row["part"] for row in rows} == set(PARTS) - {"peers"}  # none was requested
    assert {row["kind"] for row in rows} == KINDS
    assert all(row["verified"] for row in rows)
    assert {"torch", "python", "device", "date", "portakv"} <= set(result["machine"])
    assert not [line for line in result["left_out"] if "Error" in line]
    assert cuda or "zero_copy: " in result["left_out"][0]  # there is no CUDA driver
    chosen = [row for row in rows if row.get("engine") == "host"]
    terms = {"overlap=compute", "overlap=idle", "overlap=compute, detached=True"}
    assert {row["terms"] for row in chosen} == terms
    assert {row["kind"] for row in chosen} == KINDS - {"host_direct", "host_small", "host_pinning"}
    engines = {"staged", "batched_memcpy", *(("zero_copy",) if cuda else ())}
    assert {row["chosen"] for row in chosen} <= {"pageable", *engines}
    grid = [row for row in rows if row["kind"] == "host_copy"]
    alongside = {"zero_copy beside"} if cuda else set[str]()
    assert {row["backend"] for row in grid} == {"memcpy", "host", "host idle", *engines, *alongside}
    assert {row["op"] for row in grid} == set(DIRECTIONS)
    for row in grid:
        assert ("chosen" in row) == ("chosen_loss" in row) == row["backend"].startswith("host")
        assert not cuda or ("staging_mb" in row) == (row["backend"] != "memcpy")
    assert {row["thread_blocks"] for row in rows if "thread_blocks" in row} == (
        {8} if cuda else set()
    )
    assert {"chosen", "best"} <= set(shown.split())
    assert all(title in shown for title in ("both directions at the same time", "alongside a loop"))
    if cuda:
        # Two buffers of a slice of 32 MiB and a block: a plan may need its buffers at their length.
        assert 0 < max(row["staging_mb"] for row in grid if row["backend"] == "staged") < 80
        methods = {row["backend"] for row in rows if row["kind"] == "host_small"}
        assert {"to_device", "torch.tensor"} <= methods


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(DEVICE, marks=pytest.mark.simdev, id="simdev"),
        pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda"),
    ],
    indirect=True,
)
def test_copies_by_the_wall(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = device.type == "cuda"
    monkeypatch.setattr(bench, "HOST_PRESETS", {"tiny": SMALL if cuda else TINY, "full": SMALL})
    words = ["--wall", "--device", device.type if cuda else NAME, "--preset", "tiny"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    result = written(tmp_path)
    assert result["suite"] == "wall"
    rows = result["rows"]
    assert all(row["verified"] for row in rows)
    methods = {"host", "host idle", "staged", *(("zero_copy",) if cuda else ())}
    of_pages = {"batched_memcpy", *(("zero_copy beside",) if cuda else ())}
    for kind, expected in (("wall_copy", methods), ("wall_pages", methods | of_pages)):
        measured = {(row["backend"], row.get("ids")) for row in rows if row["kind"] == kind}
        assert measured == {("memcpy", None)} | {
            (method, ids) for method in expected for ids in ("kept Index", "host tensor")
        }
    inside = [row for row in rows if row["kind"] == "wall_inside"]
    assert {row["op"] for row in inside} == {"copy_", "gather", "scatter"}
    assert {"copy_", "cuda" if cuda else "reference"} <= {row["backend"] for row in inside}
    assert all(("chosen" in row) == row.get("backend", "").startswith("host") for row in rows)
    assert all(row["host_us"] > 0 for row in rows)
    assert all(row["p50_us"] >= row["host_us"] for row in rows if "p50_us" in row)
    assert any("ceiling" in row for row in rows) == cuda
    registered = [row for row in rows if row["kind"] == "wall_registered"]
    kinds = {"kept Index", "host tensor", "device tensor"}
    assert {row["op"] for row in registered} == {"from_gpu", "to_gpu"}
    assert {row["ids"] for row in registered} == kinds
    blocks = [row for row in rows if row["kind"] == "wall_blocks"]
    assert {(row["backend"], row["op"]) for row in blocks} == {
        (method, direction) for method in ("host", "host idle") for direction in DIRECTIONS
    }
    assert all(row["ids"] == "host tensor" for row in blocks)


def test_what_precedes_a_launch_is_measured_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--wall", "--device", "cpu", "--preset", "tiny", "--bars", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    rows = written(tmp_path)["rows"]
    assert {row["kind"] for row in rows} == {"wall_anew"}
    assert len(rows) == 3
    assert all(row["verified"] and row["host_us"] >= row["least_us"] > 0 for row in rows)
    assert capsys.readouterr().out.count("host time of ") >= len(rows)  # each is judged


class NotedSides(Sides):
    """Sides that record whether each copy gets new ids."""

    seen: list[bool]

    def arguments(self, direction: str, ids: BothIds | None = None) -> Arguments:
        self.seen.append(ids is not None)
        return super().arguments(direction, ids)


@pytest.mark.simdev
def test_the_strategy_of_a_row_is_that_of_its_ids() -> None:
    """New ids may have another strategy than kept ones."""
    bench_ = Bench(DEVICE, TINY)
    case, *_ = cases([scene(256)], TINY.whole_call)
    NotedSides.seen = []
    sides = NotedSides(case, bench_.region(case.payload))
    sides.settle()
    for nth, ids in enumerate(IDS):
        NotedSides.seen.clear()
        assert chosen_with(sides, "h2d", HOST.name, ids)["chosen"]
        assert NotedSides.seen == [bool(nth)]
    assert chosen_with(sides, "h2d", STAGED.name, IDS[0]) == {}


@pytest.mark.simdev
@pytest.mark.full
def test_single_parts_make_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("small", "pinning"):
        assert bench.main([*WORDS, "--only", part, "--out", str(tmp_path / part)]) == 0
    files = sorted(str(file) for file in tmp_path.glob("*/*.json"))
    assert [Path(file).stem.rpartition("-")[2] for file in files] == ["pinning", "small"]
    merge.main([*files, "--out", str(tmp_path)])
    kinds = [row["kind"] for row in written(tmp_path)["rows"]]
    assert kinds[:2] == ["host_pinning", "host_pinning"]
    assert "integers" in capsys.readouterr().out


@pytest.mark.simdev
def test_an_engine_that_fails_is_told_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sides.arguments

    def broken(self: Sides, direction: str, ids: Any = None) -> Any:
        if direction == "h2d":
            raise RuntimeError("the link is down")
        return whole(self, direction, ids)

    monkeypatch.setattr(Sides, "arguments", broken)
    bench_ = Bench(DEVICE, TINY)
    rows = next(iter(grid.duplex_steps(bench_)))[1]()
    assert [row["backend"] for row in rows] == ["memcpy"]
    assert any("the link is down" in line for line in bench_.left_out)


PLACE = "alongside matmul on the default stream, d2h"


def alongside(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], None]
) -> tuple[Rows, list[str]]:
    """Return the rows of the first step of the interference, alongside transfers of which one may
    fail: ``fails`` gets the number of its calls."""
    calls_of_bad = count(1)

    def traffic(name: str, call: Callable[[int], None]) -> Traffic:
        labels = {"backend": name, "engine": name, "op": "d2h"}
        return Traffic(Variant(labels, call, lambda i: None, lambda i: True), 1 << 20, shape="s")

    calls: dict[str, Any] = {
        "memcpy": Mock(),
        "bad": lambda i: fails(next(calls_of_bad)),
        "host": Mock(),
    }
    three = [traffic(name, call) for name, call in calls.items()]
    monkeypatch.setattr(interference, "each_engine", lambda bench_, direction: three)
    bench_ = Bench(DEVICE, TINY)
    rows = next(iter(interference.interference_steps(bench_)))[1]()
    return rows, bench_.left_out


@pytest.mark.simdev
@pytest.mark.parametrize("at", [1, 2, 8])  # while it is tried alone, and alongside the loop
def test_a_failure_beside_a_loop_leaves_others(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(times: int) -> None:
        if times >= at:
            raise RuntimeError("no such kernel\nand more")

    rows, left_out = alongside(monkeypatch, fails)
    assert [row["backend"] for row in rows] == ["memcpy", "host"]
    assert {row["repeats"] for row in rows} == {TINY.repeats}
    assert left_out == [f"{PLACE}, bad s: RuntimeError: no such kernel"]


@pytest.mark.simdev
def test_one_that_takes_the_device_ends_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(DEVICE)
    synchronize = Mock(wraps=module.synchronize)
    monkeypatch.setattr(module, "synchronize", synchronize)

    def lose(times: int) -> None:
        if times > 1:
            synchronize.side_effect = RuntimeError("device-side assert")

    rows, left_out = alongside(monkeypatch, lose)
    assert [(row["backend"], row["repeats"]) for row in rows] == [("memcpy", 1)]
    beginnings = [
        "bad s: RuntimeError: device-side",
        "the device cannot be used any more (RuntimeError:",
    ]
    for line, begin in zip(left_out, beginnings, strict=True):
        assert line.startswith(f"{PLACE}, {begin}")


@pytest.mark.simdev
def test_a_loop_that_is_held_up_ends_the_way_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "HELD_UP", 0)
    rows, left_out = alongside(monkeypatch, lambda times: None)
    assert not rows
    assert len(left_out) == 3
    assert all("held up" in line for line in left_out)


@pytest.mark.simdev
def test_copies_that_are_ready_and_that_wait_for_a_kernel() -> None:
    bench_ = Bench(DEVICE, TINY)
    steps = [measure for _, measure in PARTS["waiting"](bench_)]
    rows = [row for measure in steps for row in measure()]
    assert not bench_.left_out
    assert all(row["verified"] for row in rows)
    copies = {"64 B copy", "1 MB copy", "64 B copy that waits for a kernel"}
    for backend in {row["backend"] for row in rows}:
        own = [row for row in rows if row["backend"] == backend]
        assert {(row["op"], row["other"]) for row in own} == set(product(DIRECTIONS, copies))


@pytest.mark.simdev
def test_peers_come_last_and_beside_a_memcpy_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_peer(peer: Any, sides: Sides, direction: str) -> Any:
        if sides.case.scene.run == 256:
            raise PeerMissing("it takes no such rows")
        return lambda: HOST.move(sides, direction)

    monkeypatch.setattr(interference, "by_peer", by_peer)
    assert list(PARTS)[-1] == "peers"
    peers: Any = [SimpleNamespace(name="other")]
    bench_ = Bench(DEVICE, TINY, peers)
    rows = [row for _, measure in PARTS["peers"](bench_) for row in measure()]
    assert [row["peer"] for row in rows] == ["other"] * 4
    assert all("over_memcpy" in row and row["verified"] for row in rows)
    assert [line.endswith("no such rows") for line in bench_.left_out] == [True] * 4
    steps = [measure for _, measure in PARTS["interference"](bench_)]
    assert not any("peer" in row for row in steps[0]())


@pytest.mark.simdev
def test_a_part_that_fails_or_is_wrong_is_told_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken, fails = (Mock(side_effect=x) for x in (RuntimeError("no cases"), OSError("no memory")))
    parts = {"grid": broken, "direct": lambda _: iter([("a step", fails)])}
    monkeypatch.setattr(bench, "PARTS", dict(PARTS) | parts)
    monkeypatch.setattr(Sides, "right", lambda self, direction: False)
    assert bench.main([*WORDS, "--only", "grid,direct,duplex", "--out", str(tmp_path)]) == 1
    result = written(tmp_path)
    outcomes = {
        (row["part"], row["backend"] == "memcpy", row["verified"]) for row in result["rows"]
    }
    assert outcomes == {("duplex", True, True), ("duplex", False, False)}
    assert "grid: RuntimeError: no cases" in result["left_out"]
    assert "direct: a step: OSError: no memory" in result["left_out"]


@pytest.mark.simdev
def test_staging_is_what_a_call_takes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(DEVICE)
    # 5 MB are left by what came before
    taken = [5 << 20]
    seen = []

    def call(i: int) -> None:
        seen.append(module.current_stream(DEVICE).stream_id)
        taken.append(taken[0] + (3 << 20))

    monkeypatch.setattr(module, "memory_allocated", lambda _: taken[0], raising=False)
    monkeypatch.setattr(module, "reset_peak_memory_stats", lambda _: None, raising=False)
    monkeypatch.setattr(module, "max_memory_allocated", lambda _: max(taken), raising=False)
    variant = Variant({}, call, lambda i: None, lambda i: True)
    staging = [grid.staging_of(Bench(DEVICE, TINY), variant) for _ in range(2)]
    assert staging == [{"staging_mb": 3.0}] * 2
    assert len({*seen, module.current_stream(DEVICE).stream_id}) == 3


@pytest.mark.simdev
def test_what_an_overlap_allows_depends_on_the_payload() -> None:
    (case,) = cases([scene(2 * KB)], [64 * KB])
    sides = Bench(DEVICE, TINY).sides(case)
    for direction in DIRECTIONS:
        transfer = HOST.move(sides, direction)
        assert HOST.taken(transfer)["chosen"] in HOST.allowed(sides, direction)
        assert HOST.allowed(sides, direction) == {"staged", "batched_memcpy"}
        assert STAGED.taken(transfer) == {}


@pytest.mark.simdev
def test_a_loop_keeps_what_its_graph_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses alone: memory that it writes to was reused for a transfer's ids."""
    monkeypatch.setattr(traffic_sources, "captured", lambda step, device: lambda: None)
    references: list[weakref.ref[torch.Tensor]] = []
    made = torch.empty_like

    def watched(*arguments: Any) -> torch.Tensor:
        references.append(weakref.ref(tensor := made(*arguments)))
        return tensor

    monkeypatch.setattr(torch, "empty_like", watched)
    loop = LOOPS["matmul"](DEVICE, TINY)
    assert references[0]() is not None
    del loop
    assert references[0]() is None


@pytest.mark.gpu
def test_loops_last_as_long_as_was_asked_for_and_write_to_their_own_memory() -> None:
    device = torch.device("cuda", 0)
    for make in LOOPS.values():
        loop = make(device, SMALL)
        others = [torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device) for _ in range(8)]
        # In milliseconds. A run may be a little shorter than the run that set the length.
        assert loop._time() >= 0.9 * 40.0
        torch.cuda.synchronize()
        assert not any(tensor.any() for tensor in others)
