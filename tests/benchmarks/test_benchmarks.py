# SPDX-License-Identifier: Apache-2.0
"""The benchmark of copies in a device: shapes, the judgement of bytes, the harness, the matrix.

No test here judges a time.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from itertools import pairwise
from time import sleep
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from weakref import WeakKeyDictionary

import pytest
import torch
from support.benchmarks_cases import CPU, FULL, ON_CPU_AND_CUDA, copied, field, tiny

from portakv.cli.sides import INDEX_KINDS, SHAPES, Shape, load_shapes
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.cold_start import measure_startup
from portakv_benchmarks.device.methods import PLAIN, run_all_methods
from portakv_benchmarks.device.overhead import measure_overhead
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import HostTimer, Measured, Sample, Timer, Variant, measure


def shape(**fields: Any) -> Shape:
    usual: dict[str, Any] = {
        "name": "tiny",
        "model": "none",
        "source": "this test",
        "layers": 3,
        "heads": 2,
        "dim": 8,
        "dtype": "float16",
        "block_size": 4,
        "tokens": 8,
        "pool": 3,
        "cache": "layer | kv block token head dim",
        "chunk": "kv layer token (head dim)",
    }
    return Shape(**{**usual, **fields})


TINY = shape()
TINIES = (
    TINY,
    shape(dtype="float8_e4m3fn"),
    shape(cache="layer | block token dim", kv=1, heads=1, dim=41, dtype="uint8"),
    shape(cache="block token dim", chunk="token dim", layers=1, kv=1, heads=1),
    *(
        tiny(name)
        for name in (
            "llama3-8b-hnd",
            "llama3-8b-cross-layer",
            "llama3-8b-1",
            "narrow-160",
            "seed-full",
            "deepseek-fp8-656",
        )
    ),
)
PRESET = dataclasses.replace(FULL, rounds=5, repeats=1, compiling=False)


def test_the_matrix_holds_what_was_asked_for() -> None:
    shapes = load_shapes()
    assert all(s.model.strip() and len(s.source) > 20 for s in shapes.values())
    assert {128, 160, 256, 656, 1152, 2048, 8192} <= {s.row_bytes for s in shapes.values()}
    sweep = {s.tokens for s in shapes.values() if s.row_bytes == 2048 and s.layers == 32}
    assert {1, 16, 64, 256, 1024, 4096, 8192, 16384, 131072} <= sweep
    assert {"layer | kv block head token dim", "block layer kv token head dim"} <= {
        s.cache for s in shapes.values()
    }
    full = [shapes[x] for x in ("seed-full", "llama3-70b-tp8-full", "deepseek-mla-full")]
    assert [s.slots_used for s in full] == [1] * 3
    assert any(s.dtype.startswith("float8") for s in shapes.values())
    long = shapes["llama3-8b-131072"]  # its offsets reach past 4 GiB in cache and chunk
    assert not long.apart  # a layer alone would not
    assert long.payload > 2**32
    assert long.slots * long.kv * long.row_bytes * (long.layers - 1) > 2**32
    one = shapes["llama3-8b-1"]  # a single token in a large pool
    assert (one.tokens, one.slots, one.slots_used) == (1, 16384, 1 / 16384)


def test_rows_and_payloads() -> None:
    expected = {
        "seed": (8192, 67_108_864), "seed-fp8": (4096, 33_554_432),
        "llama3-8b-chunk": (2048, 33_554_432), "llama3-8b-long": (2048, 1_073_741_824),
        "llama3-70b-tp8": (256, 167_772_160), "qwen2.5-7b": (1024, 58_720_256),
        "deepseek-mla": (1152, 287_834_112), "deepseek-fp8-656": (656, 163_905_536),
        "encoder-cache": (8192, 37_748_736),
    }  # fmt: skip
    known = load_shapes()
    assert {name: (known[name].row_bytes, known[name].payload) for name in expected} == expected


def test_every_shape_can_be_measured() -> None:
    shapes = load_shapes()
    assert SHAPES.read_text(encoding="utf-8").count("[[shape]]") == len(shapes)  # separate names
    for shape in shapes.values():
        assert isinstance(getattr(torch, shape.dtype), torch.dtype)
        assert shape.index
        assert {*shape.index} <= {*INDEX_KINDS}
        numbers = (shape.layers, shape.kv, shape.heads, shape.dim, shape.block_size, shape.tokens)
        assert min(*numbers, shape.pool, shape.objects) >= 1
        if "blocks" in shape.index:
            assert shape.tokens % shape.block_size == 0


def test_every_tensor_has_bytes_of_its_own_where_they_were_asked_for() -> None:
    for arrangement, allocations in (("apart", 3), ("together", 1)):
        work = Workload(TINY, arrangement, CPU)
        tensors = [*work.loaded, *work.source]
        assert len({bytes(x.view(torch.uint8).flatten().numpy()) for x in tensors}) == len(tensors)
        assert len({x.untyped_storage().data_ptr() for x in work.source}) == allocations


@pytest.mark.parametrize("index", ["random", "contiguous", "blocks"])
def test_one_wrong_byte_is_seen(index: str) -> None:
    work = Workload(TINY, "apart", CPU)
    gather, scatter = suite.connector_methods(work, "reference", index)
    gather.call(1)
    assert gather.right(1)
    work.stored[1].view(torch.uint8)[1, 2, 7, 31] ^= 1
    assert not gather.right(1)

    scatter.call(2)
    assert scatter.right(2)
    scatter.poison(2)
    assert not scatter.right(2)  # nothing was written
    scatter.poison(2)
    scatter.call(2)
    slot = min(set(range(24)) - set(work.slots(index).tolist()))
    work.target[0].view(torch.uint8)[1, slot // 4, slot % 4, 1, 3] ^= 1
    assert not scatter.right(2)  # a stray write


class Script(Timer):
    """A timer that makes times up and notes which call was made with which memory object."""

    name = "script"

    def __init__(self, times: Callable[[int, int], float] = lambda number, turn: 1.0) -> None:
        self.times = times
        self.calls: list[tuple[int, int]] = []

    def settle(self, call: Callable[[int], object], objects: int) -> float:
        return 0.0

    def sample(self, call: Callable[[int], object], i: int, settled: float) -> Sample:
        number = int(call(-1))  # type: ignore[call-overload]
        self.calls.append((number, i))
        turn = sum(n == number for n, _ in self.calls) - 1
        return Sample(self.times(number, turn), 1.0, True)


def variant(number: int, right: Callable[[int], bool] = lambda i: True) -> Variant:
    return Variant({"backend": str(number)}, lambda i: number, lambda i: None, right)


def test_variants_take_turns_with_other_memory_objects() -> None:
    script = Script()
    measure(variant(0), [variant(1), variant(2)], script, objects=3, rounds=6, seconds=60)
    rounds = [script.calls[i : i + 3] for i in range(0, 18, 3)]
    assert all({number for number, _ in one} == {0, 1, 2} for one in rounds)
    orders = {tuple(number for number, _ in one) for one in rounds}
    assert len(orders) > 1  # no variant always follows the same one
    assert all(before[1] != after[1] for before, after in pairwise(script.calls))
    assert {i for number, i in script.calls if number == 1} == {0, 1, 2}


def test_the_ratio_is_the_median_over_rounds() -> None:
    """A machine that slows down over the rounds slows both: each round is a factor 2."""
    script = Script(lambda number, turn: (1 + number) * 10.0**turn)
    ceiling, other = measure(variant(0), [variant(1)], script, objects=2, rounds=7, seconds=60)
    assert ceiling.row(1)["ratio"] == 1.0
    assert other.row(1)["ratio"] == pytest.approx(0.5)
    assert other.noisy
    steady = Script(lambda number, turn: 1.0 + number)
    rows = measure(variant(0), [variant(1)], steady, objects=2, rounds=7, seconds=60)
    assert not any(row.noisy for row in rows)


def test_wrong_bytes_before_or_behind_the_rounds_are_told_and_rounds_end_in_time() -> None:
    turns = iter([True, True, False])
    wrong = [variant(1, lambda i: False), variant(2, lambda i: next(turns))]
    rows = measure(variant(0), wrong, Script(), objects=2, rounds=99, seconds=0.0)
    assert [row.verified for row in rows] == [True, False, False]
    assert all(row.hidden and row.rounds == 5 for row in rows)


def test_repeats_are_merged_by_their_medians() -> None:
    def one(ratio: float, verified: bool = True) -> list[Measured]:
        figures = {"p50_us": 10 / ratio, "p90_us": 12.1 / ratio, "ratio": ratio}
        return [Measured({}, figures, 5, True, verified)]

    (merged,) = harness.merge([one(0.9), one(0.5), one(0.8)])
    assert (merged.repeats, merged.rounds, merged.noisy) == ((0.9, 0.5, 0.8), 15, True)
    assert merged.figures["p50_us"] == pytest.approx(10 / 0.8)
    assert merged.verified
    assert not harness.merge([one(0.9), one(0.9, verified=False)])[0].verified


def failing(error: Exception) -> Variant:
    labels = {"backend": "broken", "op": "gather", "index": "random"}
    return Variant(labels, Mock(side_effect=error), lambda i: None, lambda i: True)


def test_a_way_that_raises_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []
    methods = [failing(RuntimeError("no\nmore")), right := variant(1)]
    assert harness.usable(methods, "s", left_out) == [right]
    assert left_out == ["s, broken gather random: RuntimeError: no"]
    late = RuntimeError("the capture failed")
    late.__context__ = ValueError("why it did")
    assert harness.usable([failing(late)], "s", left_out) == []
    assert left_out[1].endswith("RuntimeError: the capture failed (after ValueError: why it did)")
    with pytest.raises(ZeroDivisionError):  # a mistake in the benchmark is not a result of a method
        harness.usable([failing(ZeroDivisionError())], "s", left_out)
    broken = [failing(RuntimeError("no"))]
    monkeypatch.setattr(suite, "connector_methods", lambda work, backend, index: broken)
    rows = suite.run_task(suite.Task(tiny(), "apart"), FULL, bench_field := field())
    assert [row["backend"] for row in rows] == ["copy_"]
    assert (
        bench_field.left_out == ["seed, layers apart, broken gather random: RuntimeError: no"] * 3
    )


def test_a_way_that_takes_too_long_to_hide_is_not_delayed() -> None:
    """Thousands of launches fill the device's queue: a longer delay would only wait longer."""
    timer = harness.DeviceTimer.__new__(harness.DeviceTimer)
    timer._module = SimpleNamespace(synchronize=lambda: None)
    timer._never_hidden = harness.NEVER_HIDDEN
    timer._settling = 3
    timer.alone = WeakKeyDictionary()
    assert timer.settle(lambda i: sleep(0.025), 1) == 0.0
    assert timer.settle(lambda i: None, 1) >= 50


def test_a_call_is_timed_on_an_idle_device_and_then_forgotten() -> None:
    timer = HostTimer(CPU)
    made = torch.zeros(4)

    def call(i: int) -> torch.Tensor:
        return made.add_(i)

    sample = timer.sample(call, 0, timer.settle(call, 1))
    assert sample.elapsed >= sample.host > 0
    assert timer.alone[call] > 0
    del call
    assert not timer.alone


@ON_CPU_AND_CUDA
@pytest.mark.parametrize("tiny", TINIES, ids=lambda s: f"{s.name} {s.cache} {s.dtype}")
def test_a_tiny_shape_gives_verified_rows(tiny: Shape, device: torch.device) -> None:
    for task in suite.tasks(PRESET, [tiny], device):
        rows = suite.run_task(task, PRESET, bench_field := field(device))
        assert bench_field.left_out == []
        assert all(row["verified"] and row["p50_us"] > 0 for row in rows)
        assert (rows[0]["backend"], rows[0]["ratio"], rows[0]["host_hidden"]) == ("copy_", 1, True)
        assert {row["rounds"] for row in rows} == {5}
        assert {row["pool_slots"] for row in rows} == {tiny.slots}
        assert {row["slots_used"] for row in rows} == {harness.short(tiny.slots_used)}
        assert [(row["op"], row["index"]) for row in rows[1:]] == [
            (op, index) for index in tiny.index for op in ("gather", "scatter")
        ]


@ON_CPU_AND_CUDA
def test_overhead_rows(device: torch.device) -> None:
    rows = measure_overhead("reference", device, 10)
    on_device = [] if device.type == "cpu" else ["device tensor"]
    assert [row["ids"] for row in rows] == ["kept Index", "host tensor", *on_device]
    assert all(row["verified"] and row["launch_us"] > 0 for row in rows)


def test_small_payloads_are_measured_again_in_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for repeats, below in ((2, suite.REPEATED_BELOW), (1, 0)):
        made = Mock(wraps=Workload)
        monkeypatch.setattr(suite, "Workload", made)
        monkeypatch.setattr(suite, "REPEATED_BELOW", below)
        rows = suite.run_task(suite.Task(tiny(), "apart"), FULL, field())
        assert made.call_count == repeats
        assert {len(row["repeats"]) for row in rows} == {repeats}


def test_backends_that_compile_serve_marked_shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "COMPILING", ("reference",))
    marked = tiny("seed", compiled=True)
    other = tiny("seed", compiled=False)
    assert [task.shape.compiled for task in suite.tasks(FULL, [marked, other], CPU)][-1]
    for known, indices in ((marked, {"random"}), (other, set())):
        rows = suite.run_task(suite.Task(known, "apart"), FULL, field())
        assert {row["index"] for row in rows[1:]} == indices


def test_what_memory_cannot_hold_is_left_out_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "free_memory", lambda device: 10_000_000_000)
    tasks = list(suite.tasks(suite.PRESETS["full"], list(load_shapes().values()), CPU))
    left_out = {task.shape.name for task in tasks if task.left_out}
    assert left_out == {
        "llama3-8b-long",
        "llama3-8b-long-full",
        "llama3-8b-16384",
        "llama3-8b-131072",
    }
    assert "10.0 GB are free" in next(task.left_out for task in tasks if task.left_out)


def test_the_ladder_checks_every_way() -> None:
    rows = run_all_methods(tiny(), bench_field := field(), 5)
    assert bench_field.left_out == []
    assert all(row["verified"] for row in rows)
    assert {(row["way"], row["op"]) for row in rows} == {
        (method, op) for method in (*PLAIN, "reference") for op in ("gather", "scatter")
    } | {("copy_", "copy_")}


def test_rows_are_related_to_cuda_and_to_the_better_right_peer() -> None:
    rows = [
        copied("copy_", 8.0, op="copy_", index="none"),
        copied("cuda", 10.0),
        copied("triton", 12.0),
        copied("reference", 30.0, op="scatter"),
        copied("p slow", 20.0, peer="p"),
        copied("p fast", 9.0, peer="p", verified=False),
        copied("p good", 12.5, peer="p"),
    ]
    suite.relate(rows)
    cuda, triton, scatter = rows[1:4]
    assert (cuda["to_peer"], cuda["best_peer"]) == (0.8, "p good")
    assert "to_cuda" not in cuda
    assert triton["to_cuda"] == 1.2
    assert not {"to_cuda", "to_peer"} & {*scatter, *rows[0]}


@pytest.mark.full
def test_fresh_processes_start_cold_and_warm() -> None:
    rows = measure_startup("reference", "cpu", 1)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    assert all(row["verified"] for row in rows)
    assert all(0 < row["import_seconds"] < row["seconds"] for row in rows)


def test_a_start_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "boom")
    monkeypatch.setattr(subprocess, "run", lambda *words, **settings: failed)
    with pytest.raises(RuntimeError, match="boom"):
        measure_startup("reference", "cpu", 1)
