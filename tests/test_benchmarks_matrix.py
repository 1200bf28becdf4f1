# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix, ladder, peers, starts, plots, bars on conditions and decision guide.

No test here judges a time.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import portakv_benchmarks.cli as bench
import pytest
import torch
from portakv_benchmarks import check, derive, guide, peers, suite
from portakv_benchmarks.harness import Measured, Variant, measure, merge, usable
from portakv_benchmarks.ladder import PLAIN, run_ladder
from portakv_benchmarks.shapes import Shape, load
from portakv_benchmarks.startup import measure_startup
from portakv_benchmarks.timers import CpuTimer
from portakv_benchmarks.workload import Workload

CPU = torch.device("cpu")
FULL = dataclasses.replace(suite.PRESETS["full"], rounds=5, repeats=2)


def tiny(name: str = "seed", **changes: Any) -> Shape:
    """A shape of the file with few layers and tokens."""
    shape = load()[name]
    tokens = shape.tokens if shape.tokens < 16 else 2 * shape.block_size
    small = {"layers": min(shape.layers, 3), "tokens": tokens, "pool": min(shape.pool, 32)}
    return dataclasses.replace(shape, **{**small, **changes})


def field(*backends: str, peers: tuple[Any, ...] = ()) -> suite.Field:
    return suite.Field(backends or ("reference",), peers, CpuTimer(), CPU)


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
        assert {row["slots_used"] for row in rows} == {suite._short(shape.slots_used)}
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
    with pytest.raises(ZeroDivisionError):  # a mistake in the benchmark is no answer of a way
        usable([failing(ZeroDivisionError())])


def test_a_refused_way_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [failing(RuntimeError("no"))]
    monkeypatch.setattr(suite, "connector_ways", lambda work, backend, index: broken)
    rows, refused = suite.run_task(suite.Task(tiny(), "apart"), FULL, field())
    assert [row["backend"] for row in rows] == ["copy_"]
    assert refused == ["seed, layers apart, broken gather random: RuntimeError: no"] * 3


# --- the ladder -------------------------------------------------------------------------------


def test_the_ladder_checks_every_way() -> None:
    rows, refused = run_ladder(tiny(), field(), 5)
    assert refused == []
    assert all(row["verified"] for row in rows)
    assert {(row["way"], row["op"]) for row in rows} == {
        (way, op) for way in (*PLAIN, "reference") for op in ("gather", "scatter")
    } | {("copy_", "copy_")}


# --- a peer -----------------------------------------------------------------------------------


class FakeOps:
    """Stands in for LMCache's compiled module: finds tensors by address, copies with torch."""

    class TransferDirection(IntEnum):
        H2D = 0
        D2H = 1

    EngineKVFormat = SimpleNamespace(**{name: name for name in peers._FORMATS.values()})
    PageBufferShapeDesc = SimpleNamespace

    def __init__(self) -> None:
        self.work: Workload | None = None
        self.calls: list[Mapping[str, Any]] = []

    def multi_layer_kv_transfer(
        self, chunk: torch.Tensor, pointers: torch.Tensor, slots: torch.Tensor,
        device: torch.device, pool: int, direction: int, form: str, **sizes: int,
    ) -> None:  # fmt: skip
        assert self.work is not None
        shape = self.work.shape
        assert (pool, form) == (shape.slots, "NL_X_TWO_NB_BS_NH_HS")
        assert sizes == {"block_size": shape.block_size, "head_size": shape.dim}
        self._copy(chunk, pointers, slots, bool(direction))

    def multi_layer_block_kv_transfer(
        self, pointers: torch.Tensor, chunks: list[int], blocks: torch.Tensor,
        device: torch.device, direction: int, described: Any, tokens: int, form: str, skip: int,
    ) -> None:  # fmt: skip
        assert self.work is not None
        shape = self.work.shape
        assert (described.nl, described.nb, described.bs) == (3, shape.blocks, shape.block_size)
        assert (described.nh, described.hs, described.element_size) == (32, 128, 2)
        assert (tokens, skip) == (shape.tokens, 0)
        known = {chunk.data_ptr(): chunk for chunk in (*self.work.stored, *self.work.loaded)}
        slots = (blocks[:, None] * shape.block_size + torch.arange(shape.block_size)).flatten()
        self._copy(known[chunks[0]], pointers, slots, bool(direction))

    def _copy(
        self, chunk: torch.Tensor, pointers: torch.Tensor, slots: torch.Tensor, store: bool
    ) -> None:
        assert self.work is not None
        known = {layer.data_ptr(): layer for layer in (*self.work.source, *self.work.target)}
        for layer, pointer in enumerate(pointers.tolist()):
            rows = known[pointer].flatten(1, 2).flatten(2).view(torch.int16)
            if store:
                chunk[:, layer] = rows[:, slots].view(chunk.dtype)
            else:
                rows[:, slots] = chunk[:, layer].view(torch.int16)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    ops = FakeOps()
    monkeypatch.setattr(peers, "_load", lambda package, module: (ops, "0.5.3"))

    class Seen(Workload):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            ops.work = self

    monkeypatch.setattr(suite, "Workload", Seen)
    return ops


def test_a_peer_is_called_and_its_bytes_are_checked(fake: FakeOps) -> None:
    peer = peers.load_peer("lmcache")
    rows, refused = suite.run_task(suite.Task(tiny(), "apart"), FULL, field(peers=(peer,)))
    assert refused == []
    theirs = [row for row in rows if row.get("peer")]
    assert {(row["backend"], row["op"], row["index"]) for row in theirs} == {
        (f"lmcache {kernel}", op, index)
        for op in ("gather", "scatter")
        for kernel, indices in (
            ("slot kernel", ("random", "contiguous", "blocks")),
            ("block kernel", ("contiguous", "blocks")),
        )
        for index in indices
    }
    assert all(row["verified"] for row in theirs)


def test_a_peer_that_is_wrong_is_told_and_is_not_compared_with(
    fake: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeOps, "_copy", lambda self, chunk, pointers, slots, store: None)
    peer = peers.load_peer("lmcache")
    rows, _ = suite.run_task(suite.Task(tiny(), "apart"), FULL, field(peers=(peer,)))
    derive.relate(rows)
    assert not any("to_peer" in row for row in rows)
    told = derive.peer_failures(rows)
    assert len(told) == 10
    assert told[0] == (
        "seed, layers apart, lmcache slot kernel gather random: some bytes were wrong"
    )


def test_a_peer_says_which_caches_it_has_no_format_for(fake: FakeOps) -> None:
    peer = peers.load_peer("lmcache")
    shape = tiny("encoder-cache", tokens=576)
    _, refused = suite.run_task(suite.Task(shape, "together"), FULL, field(peers=(peer,)))
    assert len(refused) == 1
    assert "LMCache has no format" in refused[0]


def test_a_missing_peer_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    words = ["--preset", "quick", "--device", "cpu", "--backend", "reference"]
    assert bench.main([*words, "--peer", "lmcache"]) == 2
    assert "pip install --no-deps lmcache==0.5.3" in capsys.readouterr().err
    assert bench.main([*words, "--peer", "nobody"]) == 2
    assert "known are lmcache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "why"), [(None, "no compiled c_ops"), (b"not a library", "does not load")]
)
def test_a_peer_that_does_not_load_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: bytes | None, why: str
) -> None:
    if file is not None:
        (tmp_path / f"c_ops{peers.EXTENSION_SUFFIXES[0]}").write_bytes(file)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(peers, "find_spec", lambda package: found)
    monkeypatch.setattr(peers, "version", lambda package: "9.9")
    with pytest.raises(peers.PeerMissing, match=rf"lmcache 9\.9.*{why}"):
        peers.load_peer("lmcache")


# --- figures across rows, and bars on conditions ----------------------------------------------


def copied(backend: str, time: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "copy", "shape": "s", "layers": "apart", "op": "gather", "index": "random",
           "backend": backend, "p50_us": time, "verified": True}  # fmt: skip
    return {**row, **more}


def test_rows_are_related_to_cuda_and_to_the_better_right_peer() -> None:
    rows = [
        copied("copy_", 8.0, op="copy_", index="none"),
        copied("cuda", 10.0), copied("triton", 12.0), copied("reference", 30.0, op="scatter"),
        copied("p slow", 20.0, peer="p"), copied("p fast", 9.0, peer="p", verified=False),
        copied("p good", 12.5, peer="p"),
    ]  # fmt: skip
    derive.relate(rows)
    cuda, triton, scatter = rows[1:4]
    assert (cuda["to_peer"], cuda["best_peer"]) == (0.8, "p good")
    assert "to_cuda" not in cuda
    assert triton["to_cuda"] == 1.2
    assert "to_cuda" not in scatter
    assert "to_peer" not in scatter
    assert "to_peer" not in rows[0]


@pytest.mark.parametrize(
    ("where", "picked"),
    [
        ({"bytes": {"at_least": 32, "below": 128}}, [32, 100]),
        ({"bytes": {"multiple_of": 32}}, [32, 128]),
        ({"bytes": {"no_multiple_of": 32}}, [31, 100]),
        ({"bytes": {"any_of": [31, 99]}}, [31]),
        ({"bytes": {"none_of": [31, 128]}}, [32, 100]),
        ({"bytes": 100}, [100]),
        ({"absent": 100}, []),
    ],
)
def test_bars_pick_rows_on_conditions(where: Mapping[str, Any], picked: list[int]) -> None:
    bar = check.Bar("b", where, "ratio", at_least=0.5)
    rows = [{"bytes": size, "ratio": 0.9} for size in (31, 32, 100, 128)]
    assert [row["bytes"] for row in rows if bar.picks(row)] == picked
    assert not bar.picks({"bytes": 100})  # a row without the figure


def test_a_bar_with_an_unknown_condition_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bars.toml"
    bar = 'name = "b"\nwhere = { size = { about = 3 } }\nfigure = "ratio"\nat_least = 1.0'
    file.write_text(f"[[bar]]\n{bar}\n")
    with pytest.raises(ValueError, match="about"):
        check.load_bars(file)


def test_the_verdict_names_the_worst_row(capsys: pytest.CaptureFixture[str]) -> None:
    bar = check.Bar("b", {"backend": "cuda"}, "ratio", at_least=0.5)
    rows = [copied("cuda", 1.0, ratio=0.9), copied("cuda", 1.0, ratio=0.4, index="blocks")]
    (verdict,) = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, [bar])
    assert (verdict.word, verdict.figure, verdict.rows) == ("missed", 0.4, 2)
    assert verdict.row == "s apart cuda gather blocks"


def test_every_bar_of_a_cuda_device_asks_for_rows_that_the_full_preset_gives() -> None:
    """A bar whose conditions no shape fulfils would be missed for ever, or judge nothing."""
    rows = []
    for shape in load().values():
        for layers in ("apart", "together"):
            for op in ("gather", "scatter"):
                for backend in ("cuda", "triton", "compiled", "compiled graph", "reference"):
                    if backend.startswith("compiled") and not shape.compiled:
                        continue
                    for index in shape.index:
                        rows.append(copied(
                            backend, 1.0, shape=shape.name, op=op, layers=layers, index=index,
                            row_bytes=shape.row_bytes, payload_bytes=shape.payload, ratio=1.0,
                            slots_used=shape.slots_used, tokens=shape.tokens, to_peer=0.9,
                            to_cuda=1.0,
                        ))  # fmt: skip
    kinds = [{"kind": "overhead", "backend": b, "ids": i, "call_us": 1.0, "added_us": 1.0}
             for b in ("cuda", "triton") for i in ("kept Index", "device tensor")]  # fmt: skip
    kinds += [{"kind": "startup", "backend": "cuda", "cache": c, "seconds": 0.1}
              for c in ("cold", "warm")]  # fmt: skip
    rows += [{**row, "verified": True} for row in kinds]
    verdicts = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, check.load_bars())
    assert len(verdicts) > 25
    assert [v.bar.name for v in verdicts if v.word != "met"] == []


# --- starts -----------------------------------------------------------------------------------


def test_fresh_processes_start_cold_and_warm() -> None:
    rows = measure_startup("reference", "cpu", 1)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    assert all(row["verified"] for row in rows)
    assert all(0 < row["import_seconds"] < row["seconds"] for row in rows)


def test_a_start_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*words: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "boom")

    monkeypatch.setattr(subprocess, "run", failed)
    with pytest.raises(RuntimeError, match="boom"):
        measure_startup("reference", "cpu", 1)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def tiny_bench(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    shapes = {"seed": tiny(), "llama3-8b-16": tiny("llama3-8b-16", tokens=16),
              "llama3-8b-64": tiny("llama3-8b-64", tokens=64)}  # fmt: skip
    monkeypatch.setattr(bench, "load", lambda: MappingProxyType(shapes))
    full = dataclasses.replace(FULL, repeats=1, overhead_rounds=10, starts=0)
    monkeypatch.setattr(bench, "PRESETS", {"full": full})
    return ["--preset", "full", "--device", "cpu", "--backend", "reference"]


def test_the_full_preset_prints_and_draws_everything(
    tmp_path: Path, tiny_bench: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    assert bench.main([*tiny_bench, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ladder: every way of moving seed" in shown
    assert "pool = slots of the cache" in shown
    assert "no such row was measured" not in shown  # the bars for a CPU are about seed
    drawn = {path.name.rpartition("-")[2] for path in tmp_path.glob("*.svg")}
    assert drawn == {"bandwidth.svg", "heatmap.svg", "host.svg", "ladder.svg"}
    for path in tmp_path.glob("*.svg"):
        assert path.read_text().count("<path") > 20


def test_the_same_result_gives_the_same_plots(tmp_path: Path, tiny_bench: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks.plots import draw

    assert bench.main([*tiny_bench, "--shape", "seed", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    again = {path.name: path.read_bytes() for path in draw(results, tmp_path, file.stem)}
    assert first == again


def test_without_matplotlib_the_result_is_written_all_the_same(
    tmp_path: Path,
    tiny_bench: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "portakv_benchmarks.plots", raising=False)
    absent: ModuleType | None = None
    monkeypatch.setitem(sys.modules, "matplotlib", absent)  # type: ignore[arg-type]
    assert bench.main([*tiny_bench, "--shape", "llama3-8b-16", "--out", str(tmp_path)]) == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert "portakv[bench]" in capsys.readouterr().err


def test_what_no_time_is_left_for_is_told(tmp_path: Path, tiny_bench: list[str]) -> None:
    assert bench.main([*tiny_bench, "--seconds", "0", "--out", str(tmp_path)]) == 0
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert written["rows"] == []
    assert "seed, layers apart: no time was left" in written["left_out"]


def test_a_step_that_fails_leaves_the_others(
    tmp_path: Path, tiny_bench: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Any] = bench.run_task

    def sometimes(task: suite.Task, *more: Any) -> Any:
        if task.shape.name == "seed":
            raise RuntimeError("out of memory")
        return whole(task, *more)

    monkeypatch.setattr(bench, "run_task", sometimes)
    assert bench.main([*tiny_bench, "--out", str(tmp_path)]) == 0
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "seed, layers apart: out of memory" in written["left_out"]
    assert {r["shape"] for r in written["rows"] if r["kind"] == "copy"} == {
        "llama3-8b-16", "llama3-8b-64",
    }  # fmt: skip


# --- the decision guide -----------------------------------------------------------------------


def test_the_guide_is_what_the_results_say() -> None:
    assert guide.PAGE.read_text() == guide.page(guide.RESULTS.glob("*.json")), (
        "docs/choosing.md is old: python -m benchmarks.guide"
    )


def test_the_guide_follows_the_figures(tmp_path: Path) -> None:
    def row(backend: str, size: int, time: float, **more: Any) -> dict[str, Any]:
        return copied(
            backend, time, shape="llama3-8b-x", payload_bytes=size * 1_000_000, row_bytes=2048,
            slots_used=0.25, cache="layer | kv block token head dim", host_us=9.0,
            ratio=round(10 / time, 2), **more,
        )  # fmt: skip

    rows = [row("cuda", size, 10.0, to_peer=0.9) for size in (1, 40, 100)]
    rows += [row("triton", size, time, to_cuda=time / 10)
             for size, time in ((1, 10.1), (40, 12.0), (100, 13.0))]  # fmt: skip
    machine = {"device_type": "cuda", "device": "Some GPU", "torch": "2.11", "python": "3.12",
               "date": "2026-11-20"}  # fmt: skip
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}))
    text = guide.page([file])
    assert "- `cuda`: 1.00 of `copy_` in the median of 3 rows, 1.00 at worst." in text
    assert "| `triton` | each layer an allocation | 1.20 | 1.30 | 3 |" in text
    assert "- `triton` is more than 5% slower than `cuda` at 40, 100 MB." in text
    assert "| rows of 256 B and more, from 32 MB | gather | 0.90 | 0.90 | 2 |" in text
    assert text.index("`cuda`: 1.00") < text.index("`triton`: ")


def test_measuring_leaves_out_nothing_of_a_variant() -> None:
    """A check that fails behind the rounds counts as much as one before them."""
    turns = iter([True, True, False])
    late = Variant({}, lambda i: None, lambda i: None, lambda i: next(turns))
    calm = Variant({}, lambda i: None, lambda i: None, lambda i: True)
    rows = measure(calm, [late], CpuTimer(), objects=2, rounds=5, seconds=9)
    assert [row.verified for row in rows] == [True, False]
