# SPDX-License-Identifier: Apache-2.0
"""`triton`: its kernel under the interpreter, compiled for absent targets, and on a GPU."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_memory import refused
from triton_cases import CASES, chunk, dense, paged, pool, prepared, rows_of, word

from portakv import (
    BackendUnavailable,
    CopyPlan,
    Index,
    KVView,
    SlotError,
    Unsupported,
    copy_rows,
    registry,
)
from portakv.backends import triton as triton_backend
from portakv.backends._triton_rows import NestKernel
from portakv.backends.triton import Triton, compile_kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# (backend, architecture, width of a warp)
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx90a": ("hip", "gfx90a", 64)}


# The kernel makes the right copies


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """For each case what went wrong under Triton's interpreter, in one process for all."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PORTAKV_BACKEND", None)
    program = Path(__file__).with_name("triton_cases.py")
    ran = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_under_the_interpreter(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    CASES[name]("cuda")


# The code that is generated


def _compiled(nest: NestKernel, target: str) -> tuple[str, Any]:
    from triton.backends.compiler import GPUTarget

    kernel = compile_kernel(nest, GPUTarget(*TARGETS[target]))
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"], kernel.metadata


def _rows_plan(width: int, src_step: int, dst_step: int) -> CopyPlan:
    """Between two layers of rows of ``width`` bytes and a chunk, ids on either side or on both."""
    caches = [torch.zeros(5, 4, width, dtype=torch.uint8) for _ in range(2)]
    rows = torch.zeros(2, 7, width, dtype=torch.uint8)
    views = [KVView(caches, "layer | block token dim"), KVView(rows, "layer token dim")]
    if src_step and dst_step:
        views[1] = KVView([c.clone() for c in caches], "layer | block token dim")
    src, dst = views if src_step else views[::-1]
    return CopyPlan(src.form, dst.form, src_step, dst_step)


# What loads and stores one vector: in PTX, then in GCN's assembler.
_ACCESS = {
    16: (r"{}\.global\.(?:v2\.b64|v4\.b32)", r"global_{}_dwordx4"),
    8: (r"{}\.global\.(?:b64|v2\.b32)", r"global_{}_dwordx2"),
    4: (r"{}\.global\.b32", r"global_{}_dword\b"),
    2: (r"{}\.global\.b16", r"global_{}_u?short"),
    1: (r"{}\.global\.b8", r"global_{}_u?byte"),
}


def _accesses(text: str, width: int, verb: str) -> int:
    ptx, gcn = _ACCESS[width]
    if ".target sm_" in text:
        return len(re.findall(ptx.format({"load": "ld", "store": "st"}[verb]), text))
    return len(re.findall(gcn.format(verb), text))


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("width", "vector"), [(4096, 16), (656, 16), (40, 8), (12, 4), (6, 2), (3, 1)]
)
@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (1, 1)], ids=["gather", "scatter", "both"])
def test_the_generated_code_has_the_vector_width(
    target: str, width: int, vector: int, steps: tuple[int, int]
) -> None:
    plan = _rows_plan(width, *steps)
    nest = NestKernel(plan.nests[0], plan)
    text, metadata = _compiled(nest, target)
    threads = nest.tile.warps * TARGETS[target][2]
    for verb in ("load", "store"):
        found = {w: _accesses(text, w, verb) for w in _ACCESS}
        # Ids are 8 and 4 bytes wide, addresses and the status word 8: beside them stands only the
        # vector, as often as a thread moves one.
        narrow = (2, 1, 4) if verb == "store" else (2, 1)
        assert found[vector] >= nest.tile.vectors // threads, f"{verb}s of {vector} B: {found}"
        assert not any(found[w] for w in narrow if w != vector), f"{verb}s: {found}"
        if vector != 16:
            assert not found[16], f"{verb}s: {found}"
    assert metadata.shared == 0, "rows go through registers only"


@needs_triton
def test_a_table_that_units_walk_through_keeps_wide_vectors() -> None:
    objects = [torch.zeros(2, 3, 4, 16, dtype=torch.int16) for _ in range(3)]
    listed = KVView(objects, "block | kv layer token (head dim)", heads=2)
    src = paged(pool("cpu"))
    plan = CopyPlan(src.form, listed.form, 1, 0)
    nest = NestKernel(plan.nests[0], plan)
    assert nest.constants["DST_TABLE"] == 2
    for target in TARGETS:
        text, _ = _compiled(nest, target)
        assert _accesses(text, 16, "load") > 0, target
        assert _accesses(text, 16, "store") > 0, target


# One kernel serves all lengths


def _keys(plans: list[CopyPlan]) -> set[Any]:
    return {NestKernel(nest, plan).key for plan in plans for nest in plan.nests}


@pytest.mark.parametrize("steps", [(1, 0), (4, 0)], ids=["slots", "blocks"])
def test_another_length_or_pool_is_another_plan_but_no_other_kernel(steps: tuple[int, int]) -> None:
    plans = [
        CopyPlan(paged(pool("cpu", blocks=blocks)).form, dense(chunk("cpu", tokens)).form, *steps)
        for tokens in (1, 2, 4, 7, 64, 1000)
        for blocks in (1, 2, 6, 37)
    ]
    assert len({str(plan) for plan in plans}) > 4  # their strides differ
    assert len(_keys(plans)) == 1


def test_what_a_model_fixes_is_another_kernel() -> None:
    plans = [
        CopyPlan(paged(pool("cpu", **shape)).form, dense(chunk("cpu", 8, **shape)).form, step, 0)
        for step in (1, 4)
        for shape in ({}, {"dim": 16}, {"layers": 2})
    ]
    assert len(_keys(plans)) == 6


@pytest.mark.gpu
def test_another_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counted(*args: Any) -> Any:
        compiled.append(args)
        return compile_kernel(*args)

    monkeypatch.setattr(triton_backend, "compile_kernel", counted)
    backend, caches = Triton(CUDA), pool("cuda", blocks=300)
    for tokens in (1, 2, 7, 64, 1000):
        for dtype in (torch.int32, torch.int64):
            rows, slots = chunk("cuda", tokens), torch.randperm(1200)[:tokens].to("cuda", dtype)
            src, dst, ids = paged(caches), dense(rows), Index(slots)
            _, launch = prepared(src, dst, ids, Index(), backend)
            launch(src, dst, ids, Index(), tokens, None, None)
            assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])
    assert len(compiled) == 1


# What it says of devices


def _reason(device: torch.device) -> str:
    decision = Triton.probe(device)
    assert not decision.accepted
    return decision.reason


def test_it_is_asked_before_the_reference() -> None:
    names = registry.REGISTRY.names()
    assert names.index("triton") < names.index("reference")


def test_the_host_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _reason(CPU)
    assert "GPU" in _reason(CPU)


def test_the_host_is_refused_without_importing_triton() -> None:
    program = (
        "import sys, torch\n"
        "from portakv.backends.triton import Triton\n"
        "assert not Triton.probe(torch.device('cpu')).accepted\n"
        "assert 'triton' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_forced_on_the_host_it_says_how_to_ask_for_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    caches, rows = pool("cpu"), chunk("cpu", 2)
    with refused(BackendUnavailable, "'triton'", "TRITON_INTERPRET=1", watch=[*caches, rows]):
        registry.choose("cpu", "triton")


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every import of triton fail."""
    usual = builtins.__import__

    def fails(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise error
        return usual(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", fails)
    for name in ("portakv.backends._triton_kernel",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import portakv.backends as package

    monkeypatch.delattr(package, "_triton_kernel", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "install portakv[triton]"),
        (ImportError("libtriton.so: undefined symbol: foo\nmore"), "undefined symbol: foo"),
        (OSError("libtriton.so: file too short"), "file too short"),
        (RuntimeError("this build needs another Python"), "another Python"),
    ],
)
def test_triton_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    _failing(monkeypatch, error)
    assert reason in _reason(CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason in _reason(CPU)


class _Driver:
    """Stands for Triton's driver: serves devices of one type, or cannot be made."""

    def __init__(self, serves: str) -> None:
        self.serves = serves

    def get_active_torch_device(self) -> torch.device:
        return torch.device(self.serves)


@needs_triton
def test_a_driver_that_fails_or_serves_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def broken() -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton_backend, "_driver", broken)
    assert "Failed to find C compiler" in _reason(CUDA)
    monkeypatch.setattr(triton_backend, "_driver", lambda: _Driver("xpu"))
    assert "serves xpu devices, not cuda" in _reason(CUDA)


@needs_triton
def test_a_gpu_under_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in _reason(CUDA)


@needs_triton
def test_an_interpreter_asked_for_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import portakv.backends._triton_kernel  # noqa: F401 - imported without the interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "before Python starts" in _reason(CPU)


# On a GPU


def _gather(tokens: int = 8) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    return pool("cuda"), chunk("cuda", tokens), torch.arange(tokens, device="cuda")


@pytest.mark.gpu
def test_a_captured_launch_reads_the_slots_of_each_replay() -> None:
    caches, rows, slots = _gather()
    src, dst, ids, status = paged(caches), dense(rows), Index(slots), word("cuda")
    _, launch = prepared(src, dst, ids, Index())
    launch(src, dst, ids, Index(), 8, None, status)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(src, dst, ids, Index(), 8, None, status)
    for seed in range(3):
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:8]
        drawn[seed] = -1
        slots.copy_(drawn)
        rows.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wanted = rows_of(caches)[:, :, drawn]
        wanted[:, :, seed] = 0
        assert torch.equal(rows.cpu(), wanted)
    slots.fill_(99)
    graph.replay()
    torch.cuda.synchronize()
    assert 1 <= int(status) <= 8


@pytest.mark.gpu
def test_a_first_use_inside_a_capture_is_refused() -> None:
    caches, rows, slots = _gather()
    src, dst, ids = paged(caches), dense(rows), Index(slots)
    backend, side = Triton(CUDA), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            with pytest.raises(Unsupported, match="capture"):
                prepared(src, dst, ids, Index(), backend)
        finally:
            graph.capture_end()
    prepared(src, dst, ids, Index(), backend)


@pytest.mark.gpu
def test_bad_device_ids_leave_the_context_usable() -> None:
    caches, rows, slots = _gather()
    slots[3] = 24
    with pytest.raises(SlotError, match="Position 3"):
        copy_rows(paged(caches), dense(rows), slots, backend="triton").synchronize()
    slots[3] = 23
    copy_rows(paged(caches), dense(rows), slots, backend="triton").synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])


@pytest.mark.gpu
def test_a_stream_is_honoured() -> None:
    caches, rows, slots = _gather()
    src, dst, ids = paged(caches), dense(rows), Index(slots)
    _, launch = prepared(src, dst, ids, Index())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        caches[0].add_(1)
    launch(src, dst, ids, Index(), 8, side, None)
    side.synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, :8])
    side_by_side = torch.Stream(device="cuda")  # not a torch.cuda.Stream
    rows.zero_()
    torch.cuda.synchronize()
    launch(src, dst, ids, Index(), 8, side_by_side, None)
    side_by_side.synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, :8])


@pytest.mark.gpu
def test_several_threads_launch_at_once() -> None:
    caches = pool("cuda", blocks=300)
    _, launch = prepared(paged(caches), dense(chunk("cuda", 4)), Index([0]), Index())
    wrong: list[int] = []

    def work(seed: int) -> None:
        drawn = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))[:4]
        ids = Index(drawn.cuda())
        for _ in range(50):
            rows = chunk("cuda", 4)
            launch(paged(caches), dense(rows), ids, Index(), 4, None, None)
            if not torch.equal(rows.cpu(), rows_of(caches)[:, :, drawn]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
