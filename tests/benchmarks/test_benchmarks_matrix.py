# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix of shapes, its repeats, what cannot be carried out, and the ladder.

No test here judges a time.
"""

from __future__ import annotations

from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from support.benchmarks_cases import CPU, FULL, field, tiny

from portakv_benchmarks.device import suite
from portakv_benchmarks.device.ways import PLAIN, run_ladder
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared.harness import Measured, Variant, measure, merge, short, usable
from portakv_benchmarks.shared.shapes import load
from portakv_benchmarks.shared.timers import NEVER_HIDDEN, DeviceTimer, HostTimer

# --- the matrix -------------------------------------------------------------------------------


def test_the_matrix_holds_what_was_asked_for() -> None:
    shapes = load()
    rows = {shape.row_bytes for shape in shapes.values()}
    assert {128, 160, 256, 656, 1152, 2048, 8192} <= rows
    sweep = {s.tokens for s in shapes.values() if s.row_bytes == 2048 and s.layers == 32}
    assert {1, 16, 64, 256, 1024, 4096, 8192, 16384, 131072} <= sweep
    assert {"layer | kv block head token dim", "block layer kv token head dim"} <= {
        s.cache for s in shapes.values()
    }
    full = {s.name for s in shapes.values() if s.slots_used == 1}
    assert {"seed-full", "llama3-70b-tp8-full", "deepseek-mla-full"} <= full
    assert any(s.dtype.startswith("float8") for s in shapes.values())


def test_131072_tokens_reach_past_4_gib_in_cache_and_chunk() -> None:
    shape = load()["llama3-8b-131072"]
    assert not shape.apart  # a layer alone would not
    assert shape.payload > 2**32
    assert shape.slots * shape.kv * shape.row_bytes * (shape.layers - 1) > 2**32


def test_a_single_token_lies_in_a_large_pool() -> None:
    shape = load()["llama3-8b-1"]
    assert (shape.tokens, shape.slots) == (1, 16384)
    assert shape.slots_used == pytest.approx(1 / 16384)


@pytest.mark.parametrize("like", ["nobody", "later"])
def test_a_shape_is_like_one_above_it(tmp_path: Path, like: str) -> None:
    file = tmp_path / "shapes.toml"
    file.write_text(f'[[shape]]\nname = "first"\nlike = "{like}"\n[[shape]]\nname = "later"\n')
    with pytest.raises(ValueError, match=f"like '{like}'"):
        load(file)


@pytest.mark.parametrize("name", ["llama3-8b-hnd", "llama3-8b-cross-layer", "llama3-8b-1",
                                  "narrow-160", "seed-full", "deepseek-fp8-656"])  # fmt: skip
def test_rows_say_how_large_and_how_full_the_pool_is(name: str) -> None:
    shape = tiny(name)
    for task in suite.tasks(FULL, [shape], CPU):
        rows, refused = suite.run_task(task, FULL, field())
        assert refused == []
        assert all(row["verified"] for row in rows)
        assert {row["pool_slots"] for row in rows} == {shape.slots}
        assert {row["slots_used"] for row in rows} == {short(shape.slots_used)}
        assert {(row["op"], row["index"]) for row in rows[1:]} == {
            (op, index) for op in ("gather", "scatter") for index in shape.index
        }


def test_small_payloads_are_measured_several_times_in_other_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Workload] = []

    class Counted(Workload):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(suite, "Workload", Counted)
    task = next(iter(suite.tasks(FULL, [tiny()], CPU)))
    rows, _ = suite.run_task(task, FULL, field())
    assert len(made) == 2
    assert {len(row["repeats"]) for row in rows} == {2}
    monkeypatch.setattr(suite, "REPEATED_BELOW", 0)
    suite.run_task(task, FULL, field())
    assert len(made) == 3


def test_repeats_are_merged_by_their_medians() -> None:
    def one(ratio: float, verified: bool = True) -> list[Measured]:
        return [Measured({}, 1.0, 10 / ratio, 11 / ratio, ratio, 0.0, 1.0, 1.0, 5, True, verified)]

    (merged,) = merge([one(0.9), one(0.5), one(0.8)])
    assert (merged.ratio, merged.repeats, merged.rounds) == (0.8, (0.9, 0.5, 0.8), 15)
    assert merged.p50 == pytest.approx(10 / 0.8)
    assert merged.verified
    assert not merge([one(0.9), one(0.9, verified=False)])[0].verified


def test_backends_that_compile_serve_the_marked_shapes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite, "COMPILING", ("reference",))
    marked, other = tiny("seed", compiled=True), tiny("seed", compiled=False)
    assert [task.shape.compiled for task in suite.tasks(FULL, [marked, other], CPU)][-1]
    for shape, indices in ((marked, {"random"}), (other, set())):
        rows, _ = suite.run_task(suite.Task(shape, "apart"), FULL, field())
        assert {row["index"] for row in rows[1:]} == indices


# --- what cannot be carried out ---------------------------------------------------------------


def failing(error: Exception) -> Variant:
    def call(i: int) -> None:
        raise error

    labels = {"backend": "broken", "op": "gather", "index": "random"}
    return Variant(labels, call, lambda i: None, lambda i: True)


def test_a_way_that_raises_is_left_out_with_its_reason() -> None:
    right = Variant({}, lambda i: None, lambda i: None, lambda i: True)
    good, refused = usable([failing(RuntimeError("no\nmore")), right])
    assert good == [right]
    assert [why for _, why in refused] == ["RuntimeError: no"]
    late = RuntimeError("the capture failed")
    late.__context__ = ValueError("why it did")
    told = usable([failing(late)])[1][0][1]
    assert told == "RuntimeError: the capture failed (behind ValueError: why it did)"
    with pytest.raises(ZeroDivisionError):  # a mistake in the benchmark is no answer of a way
        usable([failing(ZeroDivisionError())])


def test_a_refused_way_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [failing(RuntimeError("no"))]
    monkeypatch.setattr(suite, "connector_ways", lambda work, backend, index: broken)
    rows, refused = suite.run_task(suite.Task(tiny(), "apart"), FULL, field())
    assert [row["backend"] for row in rows] == ["copy_"]
    assert refused == ["seed, layers apart, broken gather random: RuntimeError: no"] * 3


def test_a_way_that_takes_too_long_to_hide_is_not_delayed() -> None:
    """Thousands of launches fill the device's queue: a longer delay would only wait longer."""
    timer = DeviceTimer.__new__(DeviceTimer)
    timer._module = SimpleNamespace(synchronize=lambda: None)
    timer._never_hidden, timer._settling, timer.alone = NEVER_HIDDEN, 3, WeakKeyDictionary()
    assert timer.settle(lambda i: sleep(0.025), 1) == 0.0
    assert timer.settle(lambda i: None, 1) >= 50


# --- the ladder -------------------------------------------------------------------------------


def test_the_ladder_checks_every_way() -> None:
    rows, refused = run_ladder(tiny(), field(), 5)
    assert refused == []
    assert all(row["verified"] for row in rows)
    assert {(row["way"], row["op"]) for row in rows} == {
        (way, op) for way in (*PLAIN, "reference") for op in ("gather", "scatter")
    } | {("copy_", "copy_")}


def test_measuring_leaves_out_nothing_of_a_variant() -> None:
    """A check that fails behind the rounds counts as much as one before them."""
    turns = iter([True, True, False])
    late = Variant({}, lambda i: None, lambda i: None, lambda i: next(turns))
    calm = Variant({}, lambda i: None, lambda i: None, lambda i: True)
    rows = measure(calm, [late], HostTimer(CPU), objects=2, rounds=5, seconds=9)
    assert [row.verified for row in rows] == [True, False]
