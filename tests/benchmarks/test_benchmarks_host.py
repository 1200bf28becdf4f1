# SPDX-License-Identifier: Apache-2.0
"""The host benchmarks: cases, the judgement of bytes, figures across rows, bars, refusals.

No test here judges a time.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmarks_host_rows import result, row

import portakv_benchmarks.cli as bench
from portakv import copy_blocks
from portakv_benchmarks import guide
from portakv_benchmarks.cli import PARTS
from portakv_benchmarks.host import grid as host_grid
from portakv_benchmarks.host import interference as host_interference
from portakv_benchmarks.host import memory as host_memory
from portakv_benchmarks.host import merge as host_merge
from portakv_benchmarks.host import pageable as host_pageable
from portakv_benchmarks.host import pinning as host_pinning
from portakv_benchmarks.host import small as host_small
from portakv_benchmarks.host.cases import (
    BLOCK_FIRST,
    DIRECTIONS,
    LAYER_FIRST,
    SCENES,
    Case,
    Scene,
    case_of,
    cases,
    scene,
)
from portakv_benchmarks.host.memory import Region, Sides
from portakv_benchmarks.host.suite import GB, HOST_PRESETS, KB, MB, RARE, Bench
from portakv_benchmarks.host.ways import DESCRIPTORS, HOST, MOST_RUNS, direct
from portakv_benchmarks.shared.shapes import in_words
from portakv_benchmarks.shared.timers import HostTimer

FULL = HOST_PRESETS["full"]
CPU = torch.device("cpu")


# --- cases ------------------------------------------------------------------------------------


def test_the_grid_has_every_length_of_runs_and_every_host_side() -> None:
    assert {one.run for one in SCENES} == set(FULL.runs) == {256, 2 * KB, 8 * KB, 32 * KB, 2 * MB}
    sides = {(one.host, one.order) for one in SCENES}
    for run in set(FULL.runs) - {2 * MB}:
        assert {(one.host, one.order) for one in SCENES if one.run == run} == sides
    assert len({one.name for one in SCENES}) == len(SCENES)


def test_cases_move_exactly_what_they_say() -> None:
    found = cases(SCENES, FULL.payloads)
    assert {case.payload for case in found} == set(FULL.payloads)
    for case in found:
        assert case.runs * case.scene.run == case.payload
        assert case.on_device.payload == case.on_host.payload == case.payload
        assert case.on_device.slots >= 4 * case.tokens
    assert case_of(scene(32 * KB), GB) is not None


def test_a_payload_that_is_no_whole_block_has_no_case() -> None:
    assert case_of(scene(2 * MB, BLOCK_FIRST, "random"), MB) is None
    assert case_of(scene(8 * KB), 8 * KB) is None
    small = case_of(scene(32 * KB), MB)
    assert small is not None
    assert small.layers == 16


def test_the_largest_payloads_meet_fewer_host_sides() -> None:
    sides = {(one.host, one.order) for one in SCENES if RARE in FULL.payloads_of(one)}
    assert sides == {("kv layer token (head dim)", "dense"), (BLOCK_FIRST, "random")}


def test_what_bars_judge_comes_first_and_pools_by_layer_last() -> None:
    names = [name for name, _ in host_grid.grid_steps(Bench(CPU, HOST_PRESETS["full"]))]
    late = ["layer-first" in name for name in names]
    assert late == sorted(late)
    assert sum(late) == 4
    assert names.index("grid: 1 GB") == late.index(True) - 1


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (256, 2 * KB, 32 * MB, GB)] == ["256 B", "2 KB", "32 MB", "1 GB"]


def test_descriptors_are_not_measured_with_a_descriptor_for_each_row() -> None:
    told = {
        (run, payload): DESCRIPTORS.left_out(found)
        for run, payload in ((8 * KB, MB), (32 * KB, 512 * MB), (32 * KB, GB))
        if (found := case_of(scene(run), payload)) is not None
    }
    assert list(map(bool, told.values())) == [True, False, True]
    assert str(GB // (32 * KB)) in told[32 * KB, GB]
    rows = case_of(scene(256), 128 * MB)
    assert rows is not None
    assert rows.runs > MOST_RUNS
    assert not HOST.left_out(rows)
    assert direct(4).terms == {"max_thread_blocks": 4}


# --- whether bytes are right --------------------------------------------------------------------


def moved(one: Scene, direction: str) -> Sides:
    """A small case that was moved by `reference`, between two regions of the host."""
    case = case_of(one, 64 * KB)
    assert case is not None
    sides = Sides(case, Region.reserve(CPU, 64 * KB, pageable=True))
    sides.fill(direction)
    sides.poison(direction)
    assert not sides.right(direction), "nothing was moved yet"
    sides.poison(direction)
    copy_blocks(*sides.arguments(direction), backend="reference")
    return sides


SMALL = [one for one in SCENES if case_of(one, 64 * KB) is not None]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("one", SMALL, ids=lambda one: str(one.name))
def test_every_byte_counts(one: Scene, direction: str) -> None:
    assert moved(one, direction).right(direction)
    for spoil in (_in_a_row, _beside_the_rows):
        sides = moved(one, direction)
        if spoil(sides, direction):
            assert not sides.right(direction)


def _destination(sides: Sides, direction: str) -> torch.Tensor:
    region = sides._region
    return region.host if direction == "d2h" else region.device


def _in_a_row(sides: Sides, direction: str) -> bool:
    here, there = sides._rows
    unit = int((there if direction == "d2h" else here)[-1])
    _destination(sides, direction)[256 * unit + 255] ^= 1
    return True


def _beside_the_rows(sides: Sides, direction: str) -> bool:
    """A stray byte, where the destination has room for one."""
    here, there = sides._rows
    rows = set((there if direction == "d2h" else here).tolist())
    end = sides._host_bytes if direction == "d2h" else sides._spread
    free = set(range(end // 256)) - rows
    if not free:
        return False
    _destination(sides, direction)[256 * max(free)] ^= 1
    return True


def test_the_beginning_of_the_same_host_memory_serves_plain_copies() -> None:
    case = case_of(scene(2 * KB), 64 * KB)
    assert case is not None
    sides = Sides(case, Region.reserve(CPU, 64 * KB, pageable=True))
    sides.fill("d2h")
    sides.poison_plain("d2h")
    assert not sides.plain_right("d2h")
    sides.flat.copy_(sides.dense)
    assert sides.plain_right("d2h")
    assert sides.flat.data_ptr() == sides.chunk().data_ptr()


def test_two_halves_share_no_byte() -> None:
    whole = Region.reserve(CPU, 128 * KB, pageable=True)
    first, second = whole.halves()
    for mine, theirs in ((first.device, second.device), (first.host, second.host)):
        assert mine.data_ptr() + mine.numel() == theirs.data_ptr()


def test_a_call_is_timed_on_an_idle_device_and_then_forgotten() -> None:
    timer, made = HostTimer(CPU), torch.zeros(4)

    def call(i: int) -> torch.Tensor:
        return made.add_(i)

    timer.settle(call, 1)
    sample = timer.sample(call, 0, None)
    assert sample.elapsed >= sample.host > 0
    assert timer.alone[call] > 0
    held = weakref.ref(call)
    del call
    assert held() is None
    assert not timer.alone


def test_ids_outside_of_their_pool_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(scene(256, BLOCK_FIRST, "random"), 64 * KB)
    assert case is not None
    region = Region.reserve(CPU, 64 * KB, pageable=True)
    mine, theirs = host_memory._ids(case)
    assert theirs is not None
    for spoilt in (mine + case.on_device.blocks, mine - case.on_device.blocks, mine * 0):
        monkeypatch.setattr(host_memory, "_ids", lambda case, ids=spoilt: (ids, theirs))
        with pytest.raises(ValueError, match="device's ids"):
            Sides(case, region)
    monkeypatch.setattr(host_memory, "_ids", lambda case: (mine, theirs + case.on_host.blocks))
    with pytest.raises(ValueError, match="host's ids"):
        Sides(case, region)


def test_places_that_were_overwritten_are_told_and_not_indexed_with() -> None:
    sides = moved(SMALL[0], "d2h")
    sides._rows[0][3] = 1 << 40  # as a kernel does that writes to freed memory
    with pytest.raises(RuntimeError, match="overwritten"):
        sides.right("d2h")


# --- figures across rows ------------------------------------------------------------------------


def test_the_loss_is_against_the_best_engine_that_the_terms_allow() -> None:
    gentle, every = ["descriptors", "staged"], ["descriptors", "direct", "staged"]
    rows = [
        row("memcpy", 7.0), row("staged", 10.0), row("descriptors", 5.0, verified=False),
        row("direct", 8.0, ratio=0.875), row("host", 11.0, allowed=gentle),
        row("host idle", 10.0, allowed=every), row("staged", 4.0, op="h2d"),
    ]  # fmt: skip
    host_grid.compare(rows)
    assert [one.get("chosen_loss") for one in rows] == [None, None, None, None, 0.1, 0.25, None]
    assert {(one["best_engine"], one["best_ratio"]) for one in rows[4:6]} == {("direct", 0.875)}


def test_what_the_terms_allow_is_not_measured_here_and_there_is_no_loss() -> None:
    rows = [row("direct", 8.0, ratio=0.875), row("host", 11.0, allowed=["staged"])]
    host_grid.compare(rows)
    assert "chosen_loss" not in rows[1]
    assert rows[1]["best_engine"] == "direct"


def test_interference_is_beyond_that_of_memcpy_beside_the_same_loop() -> None:
    rows = [
        row(way, loop=loop, stream=stream, slowdown_pct=slow, link_gb_per_s=link)
        for way, loop, stream, slow, link in (
            ("memcpy", "matmul", "default", 3.0, 50.0),
            ("host", "matmul", "default", 4.5, 45.0),
            ("host", "attention", "default", 4.5, 45.0),
            ("host", "matmul", "own", 4.5, 45.0),
        )
    ]
    host_interference.compare(rows)
    assert (rows[1]["over_memcpy"], rows[1]["link_ratio"]) == (1.5, 0.9)
    assert "over_memcpy" not in rows[0] | rows[2] | rows[3]


def test_pageable_copies_are_against_the_best_plain_ring() -> None:
    rows = [
        row("torch", 20.0, plain=True), row("ring a", 10.0, plain=True),
        row("ring b", 8.0, plain=True, verified=False), row("host", 12.5, plain=False),
    ]  # fmt: skip
    host_pageable.compare(rows)
    assert (rows[3]["to_ring"], rows[3]["best_ring"]) == (0.8, "ring a")
    assert "to_ring" not in rows[0]


def test_small_copies_are_against_a_pinned_one() -> None:
    rows = [row("SmallCopy", idle_us=5.0, paced_us=30.0),
            row("pinned copy", idle_us=10.0, paced_us=40.0)]  # fmt: skip
    host_small.compare(rows)
    assert [one["idle_to_pinned"] for one in rows] == [0.5, 1.0]
    assert [one["paced_to_pinned"] for one in rows] == [0.75, 1.0]


def test_what_a_process_has_in_memory() -> None:
    before = host_pinning.resident()
    held = torch.ones(64 * MB, dtype=torch.uint8)
    assert held.numel() - 4 * MB < host_pinning.resident() - before < held.numel() + 16 * MB


# --- several files, the guide, plots ------------------------------------------------------------


def test_parts_are_merged_and_the_last_of_each_counts(tmp_path: Path) -> None:
    def part(name: str, figure: float) -> dict[str, Any]:
        found = [row("host", ratio=figure, part=name)]
        return result(found, name=f"some-gpu-host-{name}", left_out=["same"],
                      asked={"parts": [name], "peers": {}})  # fmt: skip

    merged = host_merge.merge([part("grid", 0.1), part("small", 0.2), part("grid", 0.3)])
    assert [(one["part"], one["ratio"]) for one in merged["rows"]] == [
        ("small", 0.2),
        ("grid", 0.3),
    ]
    assert merged["name"] == "some-gpu-host"
    assert merged["left_out"] == ["same"]
    late = part("grid", 0.3) | {"left_out": ["grid: 1 GB: no time was left", "grid of four"]}
    assert host_merge.merge([late, part("grid", 0.1)])["left_out"] == ["grid of four", "same"]
    other = part("small", 0.2)
    other["machine"]["driver_version"] = "2"
    with pytest.raises(ValueError, match="driver_version"):
        host_merge.merge([part("grid", 0.1), other])
    with pytest.raises(ValueError, match="no result"):
        host_merge.merge([{**part("grid", 0.1), "suite": "other"}])
    assert host_merge.main([str(tmp_path / "absent.json"), "--out", str(tmp_path)]) == 2


def test_the_guide_has_a_section_of_its_own_for_host_memory(tmp_path: Path) -> None:
    rows = [row("staged", 10.0, kind="host_copy", payload_bytes=256 * MB, run_bytes=2 * KB),
            row("host", 10.0, kind="host_copy", payload_bytes=256 * MB, run_bytes=2 * KB,
                ratio=0.987)]  # fmt: skip
    (tmp_path / "some-host.json").write_text(json.dumps(result(rows)))
    text = guide.page(tmp_path.glob("*.json"))
    assert "## Host memory, Some GPU" in text
    assert "## Some GPU" not in text
    assert "| 256 MB | 0.987 | 0.987 |" in text
    assert "| 2 KB | from 128 MB | `staged` 1 |" in text


def test_plots_of_a_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks.shared.plots import draw

    rows = [row(way, op=op, payload_bytes=n * MB, run_bytes=run, host_side="dense", ratio=0.9)
            for way in ("host", "staged") for op in DIRECTIONS for n in (1, 32)
            for run in (256, 2 * KB)]  # fmt: skip
    rows += [row(way, kind="host_interference", op=op, loop="matmul", stream="own",
                 slowdown_pct=3.0, link_gb_per_s=50.0)
             for way in ("memcpy", "host") for op in DIRECTIONS]  # fmt: skip
    drawn = draw(result(rows), tmp_path, "x")
    assert [path.name for path in drawn] == ["x-ratio.svg", "x-interference.svg"]
    first = [path.read_bytes() for path in drawn]
    assert first == [path.read_bytes() for path in draw(result(rows), tmp_path, "x")]


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"), [(["--device", "cpu"], "accelerator"), (["--device", "nonsense"], "nonsense")]
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    assert bench.main(["--host", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("portakv bench --host: ")
    assert why in told


def test_a_forced_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "staged")
    assert bench.main(["--host"]) == 2
    assert "PORTAKV_BACKEND=staged" in capsys.readouterr().err


def test_its_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--host", "--help"])
    shown = capsys.readouterr().out
    assert all(part in shown for part in PARTS)
    assert "portakv bench --host" in shown


def test_calls_of_the_issue_are_1000_blocks_of_64_planes() -> None:
    place = Scene(16 * 256, 1, LAYER_FIRST, "blocks", BLOCK_FIRST, "random")
    case = Case(place, 32, 16 * FULL.call_blocks)
    assert (case.tokens // 16, 2 * case.layers, case.runs) == (1000, 64, 64_000)
