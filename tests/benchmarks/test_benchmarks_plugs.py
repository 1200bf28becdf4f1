# SPDX-License-Identifier: Apache-2.0
"""The benchmark of integrations, in sizes that mean nothing: each part with any installed engine,
and with own code that is a fake only at the patch point between the benchmark and an engine.

No test here judges a time. `.ci/plugs` runs it in the engines' environments, too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.benchmarks_cases import CPU, MACHINE, host_result
from support.simdev_cases import DEVICE, NAME
from torch.utils._python_dispatch import TorchDispatchMode

import portakv_benchmarks.cli as bench
from portakv.integrations.lmcache.formats import LAYOUTS
from portakv.integrations.sglang import kvcacheio
from portakv_benchmarks import check
from portakv_benchmarks.host import merge
from portakv_benchmarks.plugs import lmcache, sglang, suite, vllm
from portakv_benchmarks.plugs.suite import (
    INTEGRATION_PRESETS,
    OURS,
    OWN,
    IntegrationBench,
    Side,
    Sides,
)
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Row, Rows, having

TINY = INTEGRATION_PRESETS["tiny"]
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(DEVICE, marks=[pytest.mark.simdev, pytest.mark.full], id="simdev"),
    pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu, id="cuda"),
]
on_devices = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.setattr(harness, "REST", 0.0)  # no figure counts here


def run(folder: Path, device: str, *words: str) -> tuple[int, Row]:
    """The exit code and what was written."""
    code = bench.main(
        ["--plugs", "--device", device, "--preset", "tiny", *words, "--out", str(folder)]
    )
    (file,) = folder.glob("*-plugs*.json")
    return code, json.loads(file.read_text())


def check_lmcache(ours: list[dict[str, Any]], with_own: bool, device: torch.device) -> None:
    """Check the formats and the kernels of PortaKV's rows for LMCache."""
    assert with_own == (find_spec("lmcache") is not None)
    formats = {0, 1, 4, 6, 8, 12, 16, 17} | ({7} if device.type != "cuda" else set())
    assert {row["format"] for row in ours if "format" in row} >= formats
    kernels = {"slots", "blocks", "connector"} if with_own else {"slots", "blocks"}
    assert {row["kernel"] for row in ours if "kernel" in row} == kernels


@on_devices
@pytest.mark.parametrize("part", ["lmcache", "vllm", "sglang"])
def test_a_part_with_the_engine_that_is_here(
    part: str, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = NAME if device == DEVICE else device.type
    code, result = run(tmp_path, name, "--only", part)
    drawn = {path.stem.rpartition("-")[2] for path in tmp_path.glob("*.svg")}
    rows = result["rows"]
    left_out = result["left_out"]
    shown = capsys.readouterr().out
    assert code == 0
    assert (result["suite"], result["asked"]["parts"]) == ("plugs", [part])
    assert all(row["verified"] and row["part"] == part for row in rows)
    assert all(f"left out: {line}"[:60] in shown for line in left_out)
    if part == "vllm" and find_spec("vllm") is None:
        assert rows == []
        assert left_out[0].startswith("vllm: IntegrationError: The integration 'vllm' of PortaKV")
        return
    ours = having(rows, backend=OURS)
    own = having(rows, backend=OWN)
    both = {"both", "step"} if part == "vllm" else set()
    assert {row["op"] for row in ours if "op" in row} == {"d2h", "h2d"} | both
    quotas = {row["block_quota"] for row in ours if "block_quota" in row}
    assert quotas == ({0, 8, 32} if part == "sglang" else set())
    assert bool(own) == (part in result["asked"]["peers"])
    assert bool(own) or any(line.startswith(f"{part}: its own") for line in left_out)
    if part == "lmcache":
        check_lmcache(ours, bool(own), device)
    kinds = {"plug_copy"}
    if device.type != "cpu":
        kinds.add("plug_interference")
    else:
        assert any("there is no accelerator" in line for line in left_out)
    if part == "lmcache" and device.type != "cuda":
        kinds.add("plug_calls")
    if own:
        kinds.add("plug_median")
        compared = having(ours, kind="plug_copy")
        assert any(row["of_own"] > 0 < row["host_of_own"] for row in compared if "of_own" in row)
        alongside = having(ours, kind="plug_interference")
        assert all({"over_own", "over_noise", "link_to_own"} <= row.keys() for row in alongside)
    assert {row["kind"] for row in rows} == kinds
    if find_spec("matplotlib") is not None:
        plots = {"plug_median": "own", "plug_interference": "beside"}
        assert drawn == {plots[kind] for kind in kinds & plots.keys()}
    # PortaKV's own rows are all there: nothing of them was left out.
    assert not [line for line in left_out if OURS in line or "no time" in line]


@pytest.mark.simdev
@pytest.mark.full
def test_calls_of_lmcaches_torch_ops_are_fewer_by_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is for a model of 32 layers: LMCache calls torch for each of them."""
    if find_spec("lmcache") is None:
        pytest.skip("LMCache is not installed; see .ci/plugs")
    counted = INTEGRATION_PRESETS["full"].counted
    monkeypatch.setitem(INTEGRATION_PRESETS, "tiny", dataclasses.replace(TINY, counted=counted))
    _, result = run(tmp_path, NAME, "--only", "lmcache")
    machine = {**result["machine"], "device_type": "simdev"}
    (verdict,) = check.judge({**result, "machine": machine}, check.load_targets())
    assert (verdict.word, verdict.rows) == ("met", 6)


# --- Own code that is a fake ----------------------------------------------------------------------


def fake_ops(functions: Any) -> Callable[[IntegrationBench], lmcache.Ops]:
    """Return a replacement for LMCache's ops, which takes tensors."""
    forms = {x: x for x in (1, 4, 6, 12)}
    return lambda bench_: lmcache.Ops(functions, SimpleNamespace, forms, (0, 1), False)


def tried(
    part: Callable[[IntegrationBench], Any], steps: slice = slice(2)
) -> tuple[Rows, list[str]]:
    """The rows of some steps on the CPU, and what was left out."""
    bench_ = IntegrationBench(CPU, "tiny")
    rows = [row for _, measure in [*part(bench_)][steps] for row in measure()]
    return rows, bench_.left_out


def test_own_code_that_is_as_good_is_compared_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sglang, "own_kernels", lambda bench_: kvcacheio)
    rows, _ = tried(sglang.sglang_steps)
    assert [row["backend"] for row in rows] == ["memcpy", OWN, OURS] * 2
    for row in rows:
        assert row["verified"]
        assert ("of_own" in row) == ("host_of_own" in row) == (row["backend"] == OURS)
        assert ("peer" in row) == (row["backend"] == OWN)
    named = [{**row, "part": "sglang"} for row in rows]
    if find_spec("matplotlib") is not None:
        from portakv_benchmarks.shared.plots import draw

        (drawn,) = draw({"rows": named, "machine": MACHINE}, tmp_path, "x")
        assert drawn.name == "x-own.svg"
    (median,) = suite.medians(named)
    assert median["of_own"] == pytest.approx(sum(row["of_own"] for row in rows[2::3]) / 2, rel=1e-3)


def test_the_whole_of_a_call_is_its_host_time_and_what_follows() -> None:
    times = {"host_us": 10.0, "p50_us": 20.0}
    rows: Rows = [
        {**times, "backend": OWN, "host_hidden": True, "verified": True},
        {"backend": OURS, "host_us": 5.0, "p50_us": 60.0, "host_hidden": False},
    ]
    suite.compare(rows)
    ratios = [rows[1][name] for name in ("of_own", "host_of_own", "whole_of_own")]
    assert ratios == [3.0, 0.5, 2.0]


def test_a_slow_down_within_the_noise_of_its_meeting_is_none() -> None:
    repeats = {"memcpy": [1.0, 1.5, 2.0], OWN: [3.0, 2.5, 2.0], OURS: [9.0, 5.0, 7.0]}
    rows: Rows = [
        {"backend": name, "slowdowns_pct": slowdowns} for name, slowdowns in repeats.items()
    ]
    assert suite.noise(rows) == 1.0  # of PortaKV's own repeats none
    rows[2]["slowdowns_pct"] = [4.0, -1.25, 4.0]
    assert suite.noise(rows) == 1.25  # nothing makes a loop quicker


class Left(TorchDispatchMode):
    """An error of a failed call, which the next op of torch's raises."""

    left = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left:
            self.left = False
            raise RuntimeError("CUDA error: invalid argument")
        return op(*args, **(kwargs or {}))


def test_an_error_that_a_failed_way_leaves_is_not_the_next_way_s() -> None:
    mode = Left()
    left_out = list[str]()

    def fails(i: int) -> None:
        mode.left = True
        raise RuntimeError("cudaMemcpyBatchAsync failed")

    methods = [
        harness.Variant({"backend": name}, call, lambda i: None, lambda i: True)
        for name, call in ((OWN, fails), (OURS, lambda i: torch.zeros(1)))
    ]
    with mode:
        assert harness.usable(methods, "somewhere", left_out) == methods[1:]
    assert left_out == ["somewhere, own: RuntimeError: cudaMemcpyBatchAsync failed"]


def test_what_bars_judge_comes_first_and_what_they_can_do_without_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lmcache, "own_ops", fake_ops(None))
    large = "32 MB, object on the host"
    small = "1 MB, object on the host"
    bench_: Any = SimpleNamespace(
        sizes=INTEGRATION_PRESETS["full"], device=DEVICE, left_out=[], installed={}
    )
    names = [name for name, _ in lmcache.lmcache_steps(bench_) if not name.startswith("calls")]
    cases = [name for name in names if "alongside" not in name]
    loops = [at for at, name in enumerate(names) if "alongside" in name]
    assert {name.partition(", format")[0] for name in names[loops[-1] + 1 :]} == {
        f"{kernel}, {small}" for kernel in ("slots", "blocks")
    }
    assert len(names) == len({*names}) == len(cases) + 4
    for words in ("slots, 32", "blocks, 32", "connector", "narrow", "object on the device"):
        assert [name for name in cases[:20] if words in name], words
    for number, place, op in product(LAYOUTS, (large, small), ("d2h", "h2d")):
        matching = {name for name in cases if name.endswith(f"{place}, format {number}, {op}")}
        kernels = {"blocks"} | ({"slots"} if number not in (16, 17) else set())
        kernels |= {"connector"} if number in (1, 7) else set()
        assert {name.partition(",")[0] for name in matching} == (kernels if number != 14 else set())


def test_own_code_that_fails_is_told_and_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise IndexError("no such layout")

    ops = SimpleNamespace(multi_layer_kv_transfer=broken, multi_layer_block_kv_transfer=broken)
    monkeypatch.setattr(lmcache, "own_ops", fake_ops(ops))
    rows, left_out = tried(lmcache.lmcache_steps)
    assert [row["backend"] for row in rows] == ["memcpy", OURS] * 2
    assert all("of_own" not in row for row in rows)
    reasons = [line for line in left_out if "own d2h: IndexError: no such layout" in line]
    assert [line.partition(",")[0] for line in reasons] == ["lmcache: slots", "lmcache: blocks"]


@pytest.mark.slow
def test_own_code_whose_bytes_are_wrong_is_no_measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing = SimpleNamespace(
        multi_layer_kv_transfer=lambda *arguments, **more: None,
        multi_layer_kv_transfer_unilateral=lambda *arguments, **more: None,
        multi_layer_block_kv_transfer=lambda *arguments, **more: None,
    )
    monkeypatch.setattr(lmcache, "own_ops", fake_ops(nothing))
    code, result = run(tmp_path, "cpu", "--only", "lmcache")
    assert code == 0  # it is the engine's, not PortaKV's
    own = having(result["rows"], backend=OWN)
    assert own
    assert not any(row["verified"] for row in own)
    assert all(row["verified"] for row in having(result["rows"], backend=OURS))
    assert not any("of_own" in row for row in result["rows"])


def test_one_wrong_byte_is_seen(device: torch.device) -> None:
    bench_ = IntegrationBench(device, "tiny")
    shape = dataclasses.replace(suite.LIKE, dim=64, block_size=4, tokens=8, heads=2, pool=2)
    src = Side.make(bench_, "(block token) head dim", shape, 1, salt=1)
    dst = Side.make(bench_, "block head token dim", shape, 1, on_host=True)
    sides = Sides(bench_, src, dst)
    rows = src.rows

    def copy() -> None:
        moved = src.tensors[0][rows.to(device)].cpu()
        for at, row in zip(rows.tolist(), moved, strict=True):
            dst.tensors[0][at // 4, :, at % 4] = row

    sides.poison()
    assert not sides.right()
    copy()
    assert sides.right()
    words = dst.tensors[0].view(torch.uint8).view(-1)
    for at in (0, words.numel() // 2, words.numel() - 1):
        sides.poison()
        copy()
        words[at] ^= 1
        assert not sides.right()


def test_blocks_are_poisoned_before_vllms_load_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own loads wait for no stream, so that what is enqueued could follow them."""
    done: list[str] = []

    class Layer(list[int]):
        def __getitem__(self, at: Any) -> Any:
            return self

        def __setitem__(self, at: Any, value: Any) -> None:
            done.append("poison")

    def specs(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        return arguments

    if find_spec("vllm") is None:  # only names stand for it then
        engine = SimpleNamespace(GPULoadStoreSpec=specs, CPULoadStoreSpec=list)
        for name in ("base", "cpu.common"):
            monkeypatch.setitem(sys.modules, f"vllm.v1.kv_offload.{name}", engine)
    module = SimpleNamespace(synchronize=lambda: done.append("synchronize"))
    bench_: Any = SimpleNamespace(device=CPU, sizes=TINY, module=module)
    handlers = SimpleNamespace(
        get_finished=list,
        wait=lambda jobs: None,
        submit_store=lambda *job: done.append("store"),
        submit_load=lambda *job: done.append("load"),
    )
    layers: Any = [Layer(range(2 * TINY.blocks + 8))]
    method = vllm.Worker(bench_, handlers, layers, bench_.sizes.blocks).variant(OWN, "h2d")
    method.poison(0)
    method.call(0)
    assert done == ["store", "synchronize", "poison", "synchronize", "load"]


# --- Options, targets and several files -----------------------------------------------------------


def test_what_no_time_is_left_for_is_told(tmp_path: Path) -> None:
    code, result = run(tmp_path, "cpu", "--only", "sglang", "--seconds", "1e-9")
    assert (code, result["rows"]) == (0, [])
    late = [line for line in result["left_out"] if line.endswith("no time was left")]
    assert late[0] == "sglang: kernel, all layers, lf, d2h: no time was left"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nonsense"], "to be one of sglang, vllm, engine, lmcache"),
        (["--host"], "unrecognized arguments: --plugs"),
        (["--peer", "lmcache"], "unrecognized arguments"),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = bench.main(["--plugs", "--device", "cpu", "--preset", "tiny", *words])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.simdev
def test_times_of_an_emulated_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--plugs", "--device", NAME, "--only", "sglang"]) == 1
    assert "Expected real hardware for figures" in capsys.readouterr().err


def integrations_result(rows: Rows, part: str) -> Row:
    more = {"suite": "plugs", "name": f"some-gpu-plugs-{part}"}
    return host_result(rows, **more, asked={"parts": [part], "peers": {part: "1"}})


def test_bars_of_plugs_judge_results_of_plugs_alone() -> None:
    row = {
        "kind": "plug_copy",
        "part": "lmcache",
        "backend": OURS,
        "narrow": False,
        "shape": "s",
        "kernel": "slots",
        "payload_bytes": 1 << 20,
        "of_own": 1.5,
        "verified": True,
        "op": "d2h",
    }
    verdicts = check.judge(integrations_result([row], "lmcache"), check.load_targets())
    assert MACHINE["device_type"] == "cuda"
    assert {verdict.bar.suite for verdict in verdicts} == {"plugs"}
    (judged,) = [verdict for verdict in verdicts if verdict.rows]
    assert (judged.word, judged.figure) == ("missed", 1.5)
    others = {"host", "wall", "storage", "migration", "engines", "encodings"}
    assert check.SUITES.keys() == {"plugs", *others}


@pytest.mark.full
def test_each_bar_of_sglang_s_transfers_finds_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "own_kernels", lambda bench_: kvcacheio)
    rows = [{**row, "part": "sglang"} for row in tried(sglang.sglang_steps, slice(None))[0]]
    verdicts = check.judge(integrations_result(rows, "sglang"), check.load_targets())
    judged = {verdict.bar.figure: verdict.rows for verdict in verdicts if verdict.rows}
    assert judged == {"of_own": 6, "host_us": 6, "whole_of_own": 3}  # none with other quotas
    assert max(verdict.rows for verdict in verdicts) == 10  # and those without a kernel


def test_parts_of_several_files_make_one_result() -> None:
    files = [
        integrations_result([{"part": part, "kind": "plug_copy"}], part) for part in ("a", "b")
    ]
    whole = merge.merge(files)
    assert (whole["name"], whole["asked"]["parts"]) == ("some-gpu-plugs", ["a", "b"])
    assert [row["part"] for row in whole["rows"]] == ["a", "b"]
    with pytest.raises(ValueError, match="to be a result of `portakv bench --plugs`"):
        merge.merge([host_result([]), files[0]])
