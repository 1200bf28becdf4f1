# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: shapes, the harness and its verdicts on bytes, bars, and what is refused.

No test here judges a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from support.benchmarks_cases import field

import portakv_benchmarks.cli as bench
from portakv_benchmarks.device import suite
from portakv_benchmarks.device.overhead import measure_overhead
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared.harness import Measured, Variant, measure, quantile
from portakv_benchmarks.shared.shapes import Shape, load, planes
from portakv_benchmarks.shared.timers import DeviceTimer, Sample

CPU = torch.device("cpu")


def shape(**fields: Any) -> Shape:
    usual: dict[str, Any] = {
        "name": "tiny", "model": "none", "source": "this test", "layers": 3, "heads": 2, "dim": 8,
        "dtype": "float16", "block_size": 4, "tokens": 8, "pool": 3,
        "cache": "layer | kv block token head dim", "chunk": "kv layer token (head dim)",
    }  # fmt: skip
    return Shape(**{**usual, **fields})


TINY = shape()
TINIES = (
    TINY,
    shape(dtype="float8_e4m3fn"),
    shape(cache="layer | block token dim", kv=1, heads=1, dim=41, dtype="uint8"),
    shape(cache="block token dim", chunk="token dim", layers=1, kv=1, heads=1),
)
QUICK = suite.Preset(None, ("random", "contiguous", "blocks"), True, 5, 60.0, 20, compiling=False)


# --- shapes ---------------------------------------------------------------------------------


def test_every_shape_names_its_model_and_its_source() -> None:
    for name, known in load().items():
        assert known.name == name
        assert known.model.strip()
        assert len(known.source) > 20


@pytest.mark.parametrize(
    ("name", "row", "payload"),
    [
        ("seed", 8192, 67_108_864),
        ("seed-fp8", 4096, 33_554_432),
        ("llama3-8b-chunk", 2048, 33_554_432),
        ("llama3-8b-long", 2048, 1_073_741_824),
        ("llama3-70b-tp8", 256, 167_772_160),
        ("qwen2.5-7b", 1024, 58_720_256),
        ("deepseek-mla", 1152, 287_834_112),
        ("deepseek-fp8-656", 656, 163_905_536),
        ("encoder-cache", 8192, 37_748_736),
    ],
)
def test_rows_and_payloads(name: str, row: int, payload: int) -> None:
    known = load()[name]
    assert (known.row_bytes, known.payload) == (row, payload)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("", "occurs twice"),
        ('name = "b"\nsource = " "', "no source"),
        ('name = "b"\ndtype = "float17"', "float17"),
        ('name = "b"\ntokens = 9', "whole blocks"),
        ('name = "b"\nindex = ["sorted"]', "sorted"),
        ('name = "b"\ncolour = 1', "colour"),
    ],
)
def test_bad_shapes_are_refused(tmp_path: Path, change: str, why: str) -> None:
    good = {
        "name": '"a"', "model": '"m"', "source": '"s"', "cache": '"block token dim"',
        "chunk": '"token dim"', "layers": "1", "dim": "4", "dtype": '"uint8"', "block_size": "4",
        "tokens": "8",
    }  # fmt: skip
    bad = {**good, **dict(line.split(" = ", 1) for line in change.splitlines())}
    texts = ["\n".join(f"{k} = {v}" for k, v in fields.items()) for fields in (good, bad)]
    file = tmp_path / "shapes.toml"
    file.write_text("".join(f"[[shape]]\n{text}\n" for text in texts))
    with pytest.raises(ValueError, match=why):
        load(file)


# --- what is moved, and whether it is right ---------------------------------------------------


def test_planes_against_plain_indexing() -> None:
    work = Workload(TINY, "apart", CPU)
    cache = planes(work.source, TINY.cache, TINY)
    chunk = planes(work.loaded[0], TINY.chunk, TINY)
    for layer in range(3):
        for kv in range(2):
            plane = work.source[layer].view(torch.int16)[kv]
            assert torch.equal(cache[2 * layer + kv], plane)
            rows = work.loaded[0].view(torch.int16)[kv, layer].view(1, 8, 2, 8)
            assert torch.equal(chunk[2 * layer + kv], rows)


@pytest.mark.parametrize("arrangement", ["apart", "together"])
def test_layers_lie_as_they_were_asked_for(arrangement: str) -> None:
    caches = Workload(TINY, arrangement, CPU).source
    storages = {layer.untyped_storage().data_ptr() for layer in caches}
    assert len(storages) == (3 if arrangement == "apart" else 1)


def test_memory_objects_hold_bytes_of_their_own() -> None:
    work = Workload(TINY, "apart", CPU)
    held = [*work.loaded, *work.source]
    assert len({bytes(x.view(torch.uint8).flatten().numpy()) for x in held}) == len(held)


@pytest.mark.parametrize("index", ["random", "contiguous", "blocks"])
def test_one_wrong_byte_is_seen(index: str) -> None:
    work = Workload(TINY, "apart", CPU)
    (variant_gather, variant_scatter) = suite.connector_ways(work, "reference", index)
    variant_gather.call(1)
    assert variant_gather.right(1)
    work.stored[1].view(torch.uint8)[1, 2, 7, 31] ^= 1
    assert not variant_gather.right(1)

    variant_scatter.call(2)
    assert variant_scatter.right(2)
    variant_scatter.poison(2)
    assert not variant_scatter.right(2)  # nothing was written
    variant_scatter.poison(2)
    variant_scatter.call(2)
    untouched = set(range(24)) - set(_slots(work, index))
    slot = min(untouched)
    work.target[0].view(torch.uint8)[1, slot // 4, slot % 4, 1, 3] ^= 1
    assert not variant_scatter.right(2)  # a stray write


def _slots(work: Workload, index: str) -> list[int]:
    ids = work.ids(index).tolist()
    return ids if index != "blocks" else [4 * block + i for block in ids for i in range(4)]


# --- the harness ------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", TINIES, ids=lambda s: f"{s.cache} {s.dtype}")
def test_a_tiny_shape_gives_verified_rows(tiny: Shape) -> None:
    for task in suite.tasks(QUICK, [tiny], CPU):
        rows, refused = suite.run_task(task, QUICK, field())
        assert refused == []
        assert len(rows) == 1 + 2 * 3  # copy_; gather and scatter by three index lists
        assert all(row["verified"] for row in rows)
        assert rows[0]["backend"] == "copy_"
        assert rows[0]["ratio"] == 1.0
        assert {row["rounds"] for row in rows} == {5}
        assert {(row["op"], row["index"]) for row in rows[1:]} == {
            (op, index) for op in ("gather", "scatter") for index in QUICK.index
        }


class Script:
    """A timer that makes times up and notes which call was made with which memory object."""

    name = "script"

    def __init__(self, times: Callable[[int, int], float]) -> None:
        self.times = times
        self.calls: list[tuple[int, int]] = []

    def settle(self, call: Callable[[int], object], objects: int) -> None:
        pass

    def sample(self, call: Callable[[int], object], i: int, settled: None) -> Sample:
        number = int(call(-1))  # type: ignore[call-overload]
        self.calls.append((number, i))
        turn = sum(n == number for n, _ in self.calls) - 1
        return Sample(self.times(number, turn), 1.0, True)


def variant(number: int, right: bool = True) -> Variant:
    return Variant({"backend": str(number)}, lambda i: number, lambda i: None, lambda i: right)


def test_variants_take_turns_with_other_memory_objects() -> None:
    script = Script(lambda number, turn: 1.0)
    measure(variant(0), [variant(1), variant(2)], script, objects=3, rounds=6, seconds=60)
    rounds = [script.calls[i : i + 3] for i in range(0, 18, 3)]
    assert all({number for number, _ in one} == {0, 1, 2} for one in rounds)
    assert [one[0][0] for one in rounds] == [0, 1, 2, 0, 1, 2]
    assert all(before[1] != after[1] for before, after in pairwise(script.calls))
    assert {i for number, i in script.calls if number == 1} == {0, 1, 2}


def test_the_ratio_is_the_median_over_rounds() -> None:
    """A machine that slows down over the rounds slows both: each round is a factor 2."""
    script = Script(lambda number, turn: (1 + number) * 10.0**turn)
    ceiling, other = measure(variant(0), [variant(1)], script, objects=2, rounds=7, seconds=60)
    assert ceiling.ratio == 1.0
    assert other.ratio == pytest.approx(0.5)
    assert other.noisy
    steady = Script(lambda number, turn: 1.0 + number)
    rows = measure(variant(0), [variant(1)], steady, objects=2, rounds=7, seconds=60)
    assert not any(row.noisy for row in rows)


def test_wrong_bytes_and_visible_host_time_are_told() -> None:
    script = Script(lambda number, turn: 1.0)
    rows = measure(variant(0), [variant(1, False)], script, objects=2, rounds=5, seconds=60)
    assert [row.verified for row in rows] == [True, False]
    assert all(row.hidden for row in rows)


def test_rounds_end_when_the_time_is_over() -> None:
    script = Script(lambda number, turn: 1.0)
    rows = measure(variant(0), [], script, objects=2, rounds=1000, seconds=0.0)
    assert rows[0].rounds == 5


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([7.0], 0.9) == 7.0


def test_a_row_is_noisy_from_a_spread_of_a_fifth() -> None:
    quiet = Measured({}, 1.0, 1.0, 1.2, 1.0, 1.0, 1.0, 1.0, 5, True, True)
    assert not quiet.noisy
    assert Measured({}, 1.0, 1.0, 1.21, 1.0, 1.0, 1.0, 1.0, 5, True, True).noisy


def test_overhead_rows() -> None:
    rows = measure_overhead("reference", CPU, 10)
    assert [row["ids"] for row in rows] == ["kept Index", "host tensor"]
    assert all(row["verified"] and row["launch_us"] > 0 for row in rows)


def test_what_memory_cannot_hold_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite, "free_memory", lambda device: 10_000_000_000)
    found = list(suite.tasks(suite.PRESETS["full"], list(load().values()), CPU))
    left_out = {task.shape.name for task in found if task.left_out}
    assert left_out == {
        "llama3-8b-long", "llama3-8b-long-full", "llama3-8b-16384", "llama3-8b-131072",
    }  # fmt: skip
    assert "10.0 GB are free" in next(task.left_out for task in found if task.left_out)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def tiny_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(bench, "load", lambda: MappingProxyType({"tiny": TINY}))


@pytest.mark.usefixtures("tiny_only")
def test_bench_prints_and_writes_one_json_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "quick", "--device", "cpu", "--shape", "tiny", "--json"]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (file,) = tmp_path.glob("*.json")
    assert file.name.startswith("cpu-")
    assert json.loads(file.read_text()) == printed
    assert {"torch", "python", "device", "cpu", "date", "portakv"} <= set(printed["machine"])
    assert {row["kind"] for row in printed["rows"]} == {"copy", "overhead"}
    assert all(row["verified"] for row in printed["rows"])


@pytest.mark.usefixtures("tiny_only")
def test_bench_prints_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no heading is folded
    words = ["--preset", "quick", "--device", "cpu", "--shape", "tiny", "--backend", "reference"]
    assert bench.main(words) == 0
    shown = capsys.readouterr()
    assert "of copy_" in shown.out
    assert not {"bars", "verdict", "missed"} & set(shown.out.split())  # they are this project's own
    assert bench.main([*words, "--bars"]) == 0
    assert "3 bars are about rows that were not measured." in capsys.readouterr().out
    assert "added us" in shown.out
    assert "tiny, layers apart" in shown.err


@pytest.mark.usefixtures("tiny_only")
def test_wrong_bytes_end_in_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "stored_right", lambda self, i, index: False)
    assert bench.main(["--preset", "quick", "--device", "cpu", "--shape", "tiny"]) == 1


@pytest.mark.usefixtures("tiny_only")
def test_interrupted_it_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*job: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_task", interrupted)
    words = ["--preset", "quick", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    written = json.loads(file.read_text())
    assert {row["kind"] for row in written["rows"]} == {"overhead"}
    assert written["left_out"] == ["interrupted: the last 1 steps"]


def test_a_forced_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", "reference")
    assert bench.main(["--preset", "quick"]) == 2
    assert "PORTAKV_BACKEND=reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--shape", "nonsense"], "nonsense"),
        (["--backend", "nonsense"], "registry accepts"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_unknown_names_are_refused(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    assert bench.main(["--preset", "quick", "--device", "cpu", *words]) == 2
    assert why in capsys.readouterr().err


# --- on a device ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tiny", TINIES, ids=lambda s: f"{s.cache} {s.dtype}")
def test_a_tiny_shape_gives_verified_rows_on_a_gpu(tiny: Shape) -> None:
    device = torch.device("cuda", 0)
    for task in suite.tasks(QUICK, [tiny], device):
        ways = suite.Field(["reference"], (), DeviceTimer(device), device)
        rows, _ = suite.run_task(task, QUICK, ways)
        assert all(row["verified"] and row["p50_us"] > 0 for row in rows)
        assert all(row["host_hidden"] for row in rows if row["backend"] == "copy_")


@pytest.mark.gpu
def test_overhead_rows_on_a_gpu() -> None:
    rows = measure_overhead("reference", torch.device("cuda", 0), 10)
    assert [row["ids"] for row in rows] == ["kept Index", "host tensor", "device tensor"]
    assert all(row["verified"] for row in rows)
