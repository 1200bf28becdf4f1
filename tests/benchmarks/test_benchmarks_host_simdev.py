# SPDX-License-Identifier: Apache-2.0
"""The host benchmark as a whole on the simulated device, in sizes that mean nothing."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.simdev_cases import DEVICE, NAME

import portakv_benchmarks.cli as bench
from portakv_benchmarks import cli as host_cli
from portakv_benchmarks.cli import PARTS
from portakv_benchmarks.host import grid as host_grid
from portakv_benchmarks.host import interference as host_interference
from portakv_benchmarks.host import loops as host_loops
from portakv_benchmarks.host import merge as host_merge
from portakv_benchmarks.host.cases import DIRECTIONS, case_of, scene
from portakv_benchmarks.host.memory import Sides
from portakv_benchmarks.host.movers import Mover
from portakv_benchmarks.host.suite import HOST_PRESETS, KB, Bench
from portakv_benchmarks.host.ways import HOST, STAGED
from portakv_benchmarks.shared.command import Step
from portakv_benchmarks.shared.harness import Variant
from portakv_benchmarks.shared.peers import PeerMissing

pytestmark = pytest.mark.simdev

WORDS = ["--host", "--device", NAME, "--preset", "tiny"]
KINDS = {"host_copy", "host_direct", "host_duplex", "host_call", "host_small", "host_interference",
         "host_waiting", "host_pageable", "host_pinning"}  # fmt: skip


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)


@pytest.mark.full
def test_every_part_is_measured_and_every_byte_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*WORDS, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (file,) = tmp_path.glob("*-host.json")
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert (written["suite"], written["format"]) == ("host", 2)
    assert set(written["asked"]["parts"]) == set(PARTS)
    assert {row["part"] for row in rows} == set(PARTS) - {"peers"}  # none was asked for
    assert {row["kind"] for row in rows} == KINDS
    assert all(row["verified"] for row in rows)
    assert {"torch", "python", "device", "date", "portakv"} <= set(written["machine"])
    assert "direct: " in written["left_out"][0]  # there is no CUDA driver
    assert not [line for line in written["left_out"] if "Error" in line]
    grid = [row for row in rows if row["kind"] == "host_copy"]
    for row in grid:
        assert ("chosen" in row) == ("chosen_loss" in row) == row["backend"].startswith("host")
    chosen = [row for row in rows if row.get("engine") == "host"]
    terms = {"overlap=compute", "overlap=idle", "overlap=compute, detached=True"}
    assert {row["terms"] for row in chosen} == terms
    assert {row["kind"] for row in chosen} == KINDS - {"host_direct", "host_small", "host_pinning"}
    assert {row["chosen"] for row in chosen} <= {"staged", "descriptors", "ring"}
    assert {"chosen", "best"} <= set(shown.split())
    assert {row["op"] for row in grid} == set(DIRECTIONS)
    assert {"staged", "descriptors", "host", "host idle", "memcpy"} == {r["backend"] for r in grid}
    assert all(title in shown for title in ("both directions at once", "beside a loop"))
    assert len(list(tmp_path.glob("*.svg"))) == 2 or not _plots()


def _plots() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.full
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
    assert bench.main([*WORDS, "--only", "calls"]) == 1


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
    step = next(iter(host_grid.duplex_steps(Bench(DEVICE, HOST_PRESETS["tiny"]))))[1]
    rows, left_out = step()
    assert [row["backend"] for row in rows] == ["memcpy"]
    assert any("the link is down" in line for line in left_out)


class Beside:
    """Movers of which one fails; it counts what became of the others."""

    def __init__(self, bench_: Bench, fails: Callable[[int], None]) -> None:
        self._bench, self._fails = bench_, fails
        self.failed = 0

    def __call__(self, bench_: Bench, direction: str, left_out: list[str]) -> list[Mover]:
        return [self._mover("memcpy", lambda: None), self._mover("bad", self._fail),
                self._mover("host", lambda: None)]  # fmt: skip

    def _fail(self) -> None:
        self.failed += 1
        self._fails(self.failed)

    def _mover(self, name: str, issue: Callable[[], None]) -> Mover:
        labels = {"shape": "s", "backend": name, "engine": name}
        return Mover(labels, issue, lambda: None, lambda: True, 1 << 20)


def beside(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    bench_ = Bench(DEVICE, HOST_PRESETS["tiny"])
    monkeypatch.setattr(host_interference, "_engines", Beside(bench_, fails))
    return next(iter(host_interference.interference_steps(bench_)))[1]()


@pytest.mark.parametrize("at", [1, 2, 8])  # while it is tried alone, and beside the loop
def test_a_way_that_fails_beside_a_loop_leaves_the_others(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(times: int) -> None:
        if times >= at:
            raise RuntimeError("no such kernel\nand more")

    rows, left_out = beside(monkeypatch, fails)
    assert [row["backend"] for row in rows] == ["memcpy", "host"]
    assert {row["repeats"] for row in rows} == {HOST_PRESETS["tiny"].repeats}
    place = "beside matmul on the default stream, d2h"
    assert left_out == [f"{place}, bad s: RuntimeError: no such kernel"]


def test_a_way_that_takes_the_device_ends_the_step_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = torch.get_device_module(DEVICE)
    whole = module.synchronize
    lost: list[bool] = []

    def synchronize(*arguments: Any) -> None:
        if lost:
            raise RuntimeError("device-side assert")
        whole(*arguments)

    def fails(times: int) -> None:
        if times > 1:
            lost.append(True)

    monkeypatch.setattr(module, "synchronize", synchronize)
    rows, left_out = beside(monkeypatch, fails)
    assert [row["backend"] for row in rows] == ["memcpy"]
    assert rows[0]["repeats"] == 1
    place = "beside matmul on the default stream, d2h"
    assert [line.partition(": ")[0] for line in left_out] == [
        f"{place}, bad s",
        f"{place}, the device cannot be used any more (RuntimeError",
    ]


def test_peers_come_last_and_beside_a_memcpy_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        name = "other"

    def by_peer(peer: Peer, sides: Sides, direction: str) -> Any:
        if sides.case.scene.run == 256:
            raise PeerMissing("it takes no such rows")
        return lambda: HOST.move(sides, direction)

    monkeypatch.setattr(host_interference, "_by_peer", by_peer)
    assert list(PARTS)[-1] == "peers"
    peers: Any = [Peer()]
    bench_ = Bench(DEVICE, HOST_PRESETS["tiny"], peers)
    found = [measure() for _, measure in PARTS["peers"](bench_)]
    assert [row["peer"] for rows, _ in found for row in rows] == ["other"] * 4
    assert all("over_memcpy" in row and row["verified"] for rows, _ in found for row in rows)
    assert all("no such rows" in line for _, told in found for line in told)
    steps = [measure for _, measure in PARTS["interference"](bench_)]
    assert not any("peer" in row for row in steps[0]()[0])


def test_a_part_that_fails_is_told_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(bench_: Bench) -> Iterator[Step]:
        raise RuntimeError("out of cases")

    def fails() -> Any:
        raise OSError("out of memory")

    parts = {"grid": broken, "direct": lambda _: iter([("a step", fails)])}
    monkeypatch.setattr(host_cli, "PARTS", dict(PARTS) | parts)
    words = [*WORDS, "--only", "grid,direct,calls", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    written = json.loads(file.read_text())
    assert {row["part"] for row in written["rows"]} == {"calls"}
    assert all(row["verified"] for row in written["rows"])
    assert "grid: RuntimeError: out of cases" in written["left_out"]
    assert "direct: a step: OSError: out of memory" in written["left_out"]


def test_staging_is_what_a_call_takes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(DEVICE)
    taken = [5 << 20]  # left by whoever came before
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(module.current_stream(DEVICE).stream_id)
        taken.append(taken[0] + (3 << 20))

    monkeypatch.setattr(module, "memory_allocated", lambda _: taken[0], raising=False)
    monkeypatch.setattr(module, "reset_peak_memory_stats", lambda _: None, raising=False)
    monkeypatch.setattr(module, "max_memory_allocated", lambda _: max(taken), raising=False)
    variant = Variant({}, call, lambda i: None, lambda i: True)
    told = [host_grid._staging(Bench(DEVICE, HOST_PRESETS["tiny"]), variant) for _ in range(2)]
    assert told == [{"staging_mb": 3.0}] * 2
    assert len({*seen, module.current_stream(DEVICE).stream_id}) == 3


def test_what_an_overlap_allows_depends_on_the_payload() -> None:
    bench_ = Bench(DEVICE, HOST_PRESETS["tiny"])
    case = case_of(scene(2 * KB), 64 * KB)
    assert case is not None
    sides = bench_.sides(case)
    for direction in DIRECTIONS:
        transfer = HOST.move(sides, direction)
        assert HOST.taken(transfer)["chosen"] in HOST.allowed(sides, direction)
        assert HOST.allowed(sides, direction) == {"staged", "descriptors"}
        assert STAGED.taken(transfer) == {}


def test_a_loop_keeps_what_a_captured_graph_reads_and_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A graph holds addresses alone: memory that it writes to was given to the ids of a transfer.
    monkeypatch.setattr(host_loops, "_captured", lambda step, device: lambda: None)
    held: list[weakref.ref[torch.Tensor]] = []
    made = torch.empty_like

    def watched(*arguments: Any) -> torch.Tensor:
        tensor = made(*arguments)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty_like", watched)
    loop = host_loops.matmul(DEVICE, 16, 0.0)
    assert held[0]() is not None
    del loop
    assert held[0]() is None


def test_a_loop_that_is_held_up_ends_the_way_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_interference, "_HELD_UP", 0)
    rows, left_out = beside(monkeypatch, lambda times: None)
    assert not rows
    assert len(left_out) == 3
    assert all("held up" in line for line in left_out)


def test_a_loop_lasts_as_long_as_was_asked_for() -> None:
    bench_ = Bench(DEVICE, HOST_PRESETS["tiny"])
    loop = host_interference._matmul(bench_)
    assert loop.steps >= 8
    assert host_interference._alone(bench_, loop, bench_.stream()) > 0
    torch.accelerator.synchronize(DEVICE)
