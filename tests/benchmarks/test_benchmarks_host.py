# SPDX-License-Identifier: Apache-2.0
"""The host benchmarks: cases, the judgement of bytes, figures across rows, several files, plots.

No test here judges a time.
"""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.benchmarks_cases import CPU, host_result, linked

from portakv import copy_blocks
from portakv_benchmarks.guide import RESULTS
from portakv_benchmarks.host import grid, interference, memory, merge, small, suite
from portakv_benchmarks.host.cases import (
    BLOCK_FIRST,
    DIRECTIONS,
    SCENES,
    Region,
    Scene,
    Sides,
    case_of,
    cases,
    scene,
)
from portakv_benchmarks.host.suite import GB, HOST_PRESETS, KB, MB, Bench
from portakv_benchmarks.shared import recorded
from portakv_benchmarks.shared.shapes import POISON

FULL = HOST_PRESETS["full"]


def test_the_grid_has_every_length_of_runs_and_every_host_side() -> None:
    assert {one.run for one in SCENES} == set(FULL.runs) == {256, 2 * KB, 8 * KB, 32 * KB, 2 * MB}
    sides = {(one.host, one.order) for one in SCENES}
    for run in set(FULL.runs) - {2 * MB}:
        assert {(one.host, one.order) for one in SCENES if one.run == run} == sides
    assert len({one.name for one in SCENES}) == len(SCENES)
    assert SCENES[0].name == "256 B runs, dense"
    large = {(one.host, one.order) for one in SCENES if suite.RARE in FULL.payloads_of(one)}
    assert large == {("kv layer token (head dim)", "dense"), (BLOCK_FIRST, "random")}


def test_cases_move_exactly_what_they_say() -> None:
    result = cases(SCENES, FULL.payloads)
    assert {case.payload for case in result} == set(FULL.payloads)
    for case in result:
        assert case.runs * case.scene.run == case.payload
        assert case.on_device.payload == case.on_host.payload == case.payload
        assert case.on_device.slots >= 4 * case.tokens
    assert case_of(scene(32 * KB), GB) is not None
    # A payload that is not whole blocks has no case.
    assert case_of(scene(2 * MB, BLOCK_FIRST, "random"), MB) is None
    assert case_of(scene(8 * KB), 8 * KB) is None
    assert [few.layers for few in cases([scene(32 * KB)], [MB])] == [16]


def test_what_bars_judge_comes_first_and_pools_by_layer_last() -> None:
    names = [name for name, _ in grid.grid_steps(Bench(CPU, FULL))]
    late = ["layer-first" in name for name in names]
    assert late == sorted(late)
    assert sum(late) == 4
    assert names.index("grid: 1 GB") == late.index(True) - 1


def test_descriptors_are_not_measured_with_a_descriptor_for_each_row() -> None:
    wanted = ((8 * KB, MB), (32 * KB, 512 * MB), (32 * KB, GB), (256, 128 * MB))
    result = [case for run, payload in wanted for case in cases([scene(run)], [payload])]
    reasons = [suite.BATCHED_MEMCPY.left_out(case) for case in result]
    assert list(map(bool, reasons)) == [True, False, True, True]
    assert str(GB // (32 * KB)) in reasons[2]
    assert result[3].runs > suite.MOST_RUNS
    assert not suite.HOST.left_out(result[3])


def moved(one: Scene, direction: str) -> tuple[Sides, torch.Tensor, torch.Tensor]:
    """A small case that was moved by `reference` between two regions of the host; the bytes of
    its destination, and where in them poison is left."""
    (case,) = cases([one], [64 * KB])
    sides = Sides(case, region := Region.reserve(CPU, 64 * KB, pageable=True))
    sides.fill(direction)
    sides.poison(direction)
    assert not sides.right(direction), "nothing was moved yet"
    sides.poison(direction)
    copy_blocks(*sides.arguments(direction), backend="reference")
    written = region.host if direction == "d2h" else region.device
    end = sides.chunk.nbytes if direction == "d2h" else sides.dense.data_ptr() - written.data_ptr()
    poisoned = (written[:end].view(-1, 8) == POISON).all(1).nonzero().flatten() * 8
    return sides, written[:end], poisoned


SMALL = [one for one in SCENES if case_of(one, 64 * KB) is not None]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("one", SMALL, ids=lambda one: str(one.name))
def test_every_byte_counts(one: Scene, direction: str) -> None:
    assert moved(one, direction)[0].right(direction)
    sides, written, poisoned = moved(one, direction)
    rows = torch.ones(written.numel() // 8, dtype=torch.bool)
    rows[poisoned // 8] = False
    written[8 * int(rows.nonzero()[-1]) + 7] ^= 1
    assert not sides.right(direction)
    sides, written, poisoned = moved(one, direction)
    if poisoned.numel():  # the destination has room for a stray byte
        written[int(poisoned[-1])] ^= 1
        assert not sides.right(direction)


def test_plain_copies_in_the_halves_of_a_region() -> None:
    """They share no byte; the beginning of the same host memory serves them."""
    (case,) = cases([scene(2 * KB)], [64 * KB])
    first, second = Region.reserve(CPU, 128 * KB, pageable=True).halves()
    for lower, upper in zip(first, second, strict=True):
        assert lower.data_ptr() + lower.numel() == upper.data_ptr()
    sides = Sides(case, second)
    sides.fill("d2h")
    sides.poison("d2h", plain=True)
    assert not sides.plain_right()
    sides.flat.copy_(sides.dense)
    assert sides.plain_right()
    assert sides.flat.data_ptr() == sides.chunk.data_ptr()


def test_the_loss_is_against_the_best_engine_that_the_terms_allow() -> None:
    gentle = ["batched_memcpy", "staged"]
    every = ["batched_memcpy", "zero_copy", "staged"]
    rows = [
        linked("memcpy", 7.0),
        linked("staged", 10.0),
        linked("batched_memcpy", 5.0, verified=False),
        linked("zero_copy", 8.0, ratio=0.875),
        linked("host", 11.0, allowed=gentle),
        linked("host idle", 10.0, allowed=every),
        linked("staged", 4.0, op="h2d"),
        linked("host", 9.0, allowed=["pageable"]),  # what the terms allow was not measured
        linked("zero_copy beside", 8.5, engine="zero_copy"),
        linked("host", 10.2, allowed=every),
    ]
    grid.compare(rows)
    losses = [one.get("chosen_loss") for one in rows]
    assert losses == [None, None, None, None, 0.1, 0.25, None, None, None, 0.2]
    best = [(one.get("best_engine"), one.get("best_ratio")) for one in rows]
    assert best[4:8] == [
        ("zero_copy", 0.875),
        ("zero_copy", 0.875),
        (None, None),
        ("zero_copy", 0.875),
    ]


def test_interference_is_beyond_that_of_memcpy_beside_the_same_loop() -> None:
    rows = [linked("memcpy", loop="matmul", stream="default", slowdown_pct=3.0, link_gb_per_s=50.0)]
    for loop, stream in (("matmul", "default"), ("attention", "default"), ("matmul", "own")):
        rows.append(linked("host", loop=loop, stream=stream, slowdown_pct=4.5, link_gb_per_s=45.0))
    interference.compare(rows)
    assert (rows[1]["over_memcpy"], rows[1]["link_ratio"]) == (1.5, 0.9)
    assert "over_memcpy" not in rows[0] | rows[2] | rows[3]


def test_pageable_and_small_copies_are_against_the_best_plain_one() -> None:
    rows = [
        linked("torch", 20.0, plain=True),
        linked("ring a", 10.0, plain=True),
        linked("ring b", 8.0, plain=True, verified=False),
        linked("host", 12.5, plain=False),
    ]
    memory.compare(rows)
    assert (rows[3]["to_ring"], rows[3]["best_ring"]) == (0.8, "ring a")
    assert "to_ring" not in rows[0]
    rows = [
        linked("to_device", idle_us=5.0, paced_us=30.0),
        linked("pinned copy", idle_us=10.0, paced_us=40.0),
    ]
    small.compare(rows)
    assert [(one["idle_to_pinned"], one["paced_to_pinned"]) for one in rows] == [
        (0.5, 0.75),
        (1, 1),
    ]


def test_what_a_process_has_in_memory() -> None:
    before = memory.resident()
    memory_map = torch.frombuffer(mmap.mmap(-1, 64 * MB), dtype=torch.uint8).fill_(1)
    assert memory_map.numel() - 4 * MB < memory.resident() - before < memory_map.numel() + 16 * MB


@pytest.mark.parametrize(("count", "samples", "expected"), [(64, 6, 6), (1000, 31, 10), (1, 2, 1)])
def test_only_the_copy_in_flight_differs(
    monkeypatch: pytest.MonkeyPatch, count: int, samples: int, expected: int
) -> None:
    noted: list[str] = []

    def send(bench: Any, method: str, count: int, n: int, large: Any, flies: bool) -> Any:
        noted.append(f"{method} {'idle' if large is None else 'busy' if flies else 'paced'}")
        return small.Seen(9.0 if flies else 6.0 if large else 5.0, 1.0, 2.0, flies, True)

    monkeypatch.setattr(small, "timed", send)
    preset = SimpleNamespace(small_samples=samples, large=1 << 30)
    module = SimpleNamespace(synchronize=lambda: noted.append("ends"))
    bench: Any = SimpleNamespace(preset=preset, module=module)
    large: Any = SimpleNamespace(pass_by=lambda: noted.append("large"))
    monkeypatch.setattr(small, "WARM_UP", 0)
    methods: Any = {"one": "one", "other": "other"}
    seen = small.sends_of(bench, methods, count, large)
    turn = [f"{method} idle" for method in methods for _ in range(expected)] * small.TURNS
    alongside = [
        [f"{method} paced", "large", f"{method} busy"] * expected for method in methods
    ]  # a large copy has ended before each
    assert [one for one in noted if one != "ends"] == [
        *turn,
        "large",
        *alongside[0],
        "large",
        *alongside[1],
    ]
    assert all(noted[at + 1] == "ends" for at, one in enumerate(noted) if " " in one)
    row = small.row_of(bench, "one", count, seen["one"])
    assert (row["samples"], row["overtook"], row["busy_to_idle"]) == (expected, expected, 1.5)
    assert (row["idle_us"], row["paced_us"], row["busy_us"]) == (5.0, 6.0, 9.0)
    assert (row["idle_samples"], row["verified"]) == (small.TURNS * expected, True)


@pytest.mark.parametrize("waits_for_work", [True, False])
def test_a_copy_that_waits_for_work_is_timed_from_the_end_of_the_work(waits_for_work: bool) -> None:
    """The work takes a hundredth of a second, and the copy waits for its stream."""
    seconds = 0.01
    began = perf_counter()
    log: list[object] = []
    ready = SimpleNamespace(query=lambda: perf_counter() >= began + seconds)
    ended = SimpleNamespace(record=log.append, query=lambda: True)
    work: Any = SimpleNamespace(start=lambda: ready, stream="work")
    stream: Any = SimpleNamespace(wait_stream=log.append)
    module = SimpleNamespace(stream=lambda stream: nullcontext(), Event=lambda: ended)
    bench: Any = SimpleNamespace(module=module)
    queue: Any = SimpleNamespace(go_on=lambda: None)
    taken = interference.seen(
        bench, queue, stream, lambda: log.append("copy"), work if waits_for_work else None
    )
    assert log == (["work", "copy", stream] if waits_for_work else ["copy", stream])
    assert not waits_for_work or taken <= perf_counter() - began - seconds


@pytest.mark.parametrize(("flies", "moved"), [(False, small.SHORT), (True, 100_000)])
def test_the_other_copy_is_large_or_short_and_has_ended(
    flies: bool, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, False, True])
    event = SimpleNamespace(record=lambda stream: None, query=lambda: next(answers))
    monkeypatch.setattr(torch, "Event", lambda device: event)
    source, target = (make(100_000, dtype=torch.uint8) for make in (torch.ones, torch.zeros))
    bench: Any = SimpleNamespace(
        device=None,
        stream=lambda: None,
        preset=SimpleNamespace(large=source.nbytes),
        module=SimpleNamespace(stream=lambda stream: nullcontext()),
        region=lambda nbytes: SimpleNamespace(host=source, device=target),
    )
    small.Large(bench).start(flies)
    assert int(target.sum()) == moved
    assert len(list(answers)) == (3 if flies else 0)


def test_parts_are_merged_and_the_last_of_each_counts(tmp_path: Path) -> None:
    def part(name: str, figure: float) -> dict[str, Any]:
        rows = [linked("host", ratio=figure, part=name)]
        return host_result(
            rows,
            name=f"some-gpu-host-{name}",
            left_out=["same"],
            asked={"parts": [name], "peers": {}},
        )

    merged = merge.merge([part("grid", 0.1), part("small", 0.2), part("grid", 0.3)])
    assert [(r["part"], r["ratio"]) for r in merged["rows"]] == [("small", 0.2), ("grid", 0.3)]
    assert (merged["name"], merged["left_out"]) == ("some-gpu-host", ["same"])
    late = part("grid", 0.3) | {"left_out": ["grid: 1 GB: no time was left", "grid of four"]}
    assert merge.merge([late, part("grid", 0.1)])["left_out"] == ["grid of four", "same"]
    other = part("small", 0.2)
    other["machine"]["driver_version"] = "2"
    with pytest.raises(ValueError, match="driver_version"):
        merge.merge([part("grid", 0.1), other])
    with pytest.raises(ValueError, match="to be a result of"):
        merge.merge([{**part("grid", 0.1), "suite": "other"}])
    assert merge.main([str(tmp_path / "absent.json"), "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("h200", "bandwidth heatmap host ladder"), ("h200-host", "ratio interference")],
)
def test_plots_of_a_recorded_result(name: str, drawn: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks.shared.plots import draw

    results = recorded.read(RESULTS / f"{name}.json")
    results["rows"] = results["rows"][::8]
    paths = draw(results, tmp_path, "x")
    assert [path.name for path in paths] == [f"x-{one}.svg" for one in drawn.split()]
    assert all("prefers-color-scheme: dark" in path.read_text() for path in paths)
