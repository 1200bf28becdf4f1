# SPDX-License-Identifier: Apache-2.0
"""`triton`: what it says of devices, how often it compiles, and the code that Triton makes of the
kernel for targets that are not here. Its bytes: test_every_backend.py."""

from __future__ import annotations

import importlib.util
import re
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.command_line import rejection
from support.cuda_cases import COPIES, gathered, scattered
from support.own_process import own_process
from support.paged_cases import chunk, dense, paged, pool, rows_of

from portakv import CopyPlan, Index
from portakv.backends import triton as triton_backend
from portakv.backends._triton_rows import NestKernel
from portakv.backends.triton import Triton, compile_kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


# What it says of devices


def test_the_host_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in rejection(Triton, CPU)
    assert "GPU" in rejection(Triton, CPU)


@needs_triton
def test_an_interpreter_asked_for_too_late_or_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import portakv.backends._triton_kernel  # noqa: F401 - imported without the interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "before Python starts" in rejection(Triton, CPU)
    assert "unset it" in rejection(Triton, CUDA)


@pytest.mark.gpu
def test_another_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(wraps=compile_kernel)
    monkeypatch.setattr(triton_backend, "compile_kernel", counted)
    backend = Triton(CUDA)
    caches = pool("cuda", blocks=300)
    for tokens in (1, 2, 7, 64, 1000):
        for dtype in (torch.int32, torch.int64):
            rows = chunk("cuda", tokens)
            slots = torch.randperm(1200)[:tokens].to("cuda", dtype)
            src = paged(caches)
            dst = dense(rows)
            ids = Index(slots)
            launch = backend.prepare(CopyPlan(src.form, dst.form, 1, 0))
            launch(src, dst, ids, Index(), tokens, None, None)
            assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])
    assert counted.call_count == 1


# Other vendors' drivers


class Target:
    """Stands in for Cambricon's driver, by FlagTree: it reports only what it compiles for."""

    def __init__(self, serves: str) -> None:
        self.serves = serves

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.serves, "Ascend910B1" if self.serves == "npu" else 5, 0)


class Driver(Target):
    """Stands in for triton-ascend's driver, which has both methods."""

    def get_active_torch_device(self) -> torch.device:
        if not self.serves:
            raise RuntimeError("libascendcl.so: cannot open shared object file\nmore")
        return torch.device(self.serves, 0)


@needs_triton
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param("npu", "npu Ascend910B1", marks=own_process("npu", "ascend")),
        pytest.param("mlu", "mlu 5", marks=[*own_process("mlu", "mlu"), pytest.mark.full]),
    ],
)
def test_what_it_says_under_a_vendor_s_driver(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    def answer(active: Any) -> str:
        monkeypatch.setattr(driver, "_active", active)
        return str(Triton.probe(torch.device(name, 0)))

    fails = f"triton: rejected, Triton finds no driver for {name} devices here"
    assert torch.cuda.is_available() or answer(None) == fails
    for right in (Driver(name), Target(name)):
        assert answer(right).startswith("triton: accepted, ")
        assert answer(right).endswith(f"compiles its kernel for {target}")
    serves = f"triton: rejected, Triton's active driver serves {{}} devices, not {name}"
    assert answer(Driver("cuda")) == serves.format("cuda")
    assert answer(Target("maca")) == serves.format("maca")
    assert (
        answer(Driver(""))
        == f"{fails} (RuntimeError: libascendcl.so: cannot open shared object file)"
    )


# The code for targets that are not here

#: (backend, architecture, width of a warp); gfx906 is also Hygon's Z100.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    **{name: ("hip", name, 64) for name in ("gfx906", "gfx908", "gfx90a", "gfx942")},
}
# Of which one of each vendor is compiled for in every run; Triton 3.7.1 refuses gfx906, 3.9.0 not.
WIDER = [
    pytest.param(x, marks=[pytest.mark.full] * (x not in ("sm_90", "gfx90a"))) for x in TARGETS
]
REFUSAL = "unsupported target: 'gfx906'"
# What loads and stores one vector: in PTX, then in GCN's assembler.
_ACCESS = {
    16: (r"{}\.global\.(?:v2\.b64|v4\.b32)", r"global_{}_dwordx4"),
    8: (r"{}\.global\.(?:b64|v2\.b32)", r"global_{}_dwordx2"),
    4: (r"{}\.global\.b32", r"global_{}_dword\b"),
    2: (r"{}\.global\.b16", r"global_{}_u?short"),
    1: (r"{}\.global\.b8", r"global_{}_u?byte"),
}


def compiled(
    nest: NestKernel, target: str, captured: pytest.CaptureFixture[str]
) -> tuple[str, Any]:
    """The text of a nest's kernel, and what Triton knows of it."""
    from triton.backends.compiler import GPUTarget

    try:
        kernel = compile_kernel(nest, GPUTarget(*TARGETS[target]))
    except RuntimeError:
        if REFUSAL in captured.readouterr().err:
            pytest.skip("this Triton refuses gfx906; 3.9.0 takes it")
        raise
    assert target.startswith("sm_") or kernel.asm["hsaco"][:4] == b"\x7fELF"
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"], kernel.metadata


def accesses(text: str, width: int, verb: str) -> int:
    ptx, gcn = _ACCESS[width]
    if ".target sm_" in text:
        return len(re.findall(ptx.format({"load": "ld", "store": "st"}[verb]), text))
    return len(re.findall(gcn.format(verb), text))


def nest_of(name: str, width: int) -> NestKernel:
    """The kernel between two layers of rows of ``width`` bytes and a chunk, or two more layers."""
    plan = (scattered if name == "scatter" else gathered)(width).plan()
    if name == "both":
        plan = CopyPlan(plan.src, plan.src, 1, 1)
    return NestKernel(plan.nests[0], plan)


@needs_triton
@pytest.mark.parametrize("target", WIDER)
@pytest.mark.parametrize(
    ("width", "vector"),
    [(4096, 16), (40, 8), (3, 1),
     *(pytest.param(*x, marks=pytest.mark.full) for x in ((656, 16), (12, 4), (6, 2)))],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gather", "scatter", "both"])
def test_the_generated_code_has_the_vector_width(
    target: str, width: int, vector: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    nest = nest_of(name, width)
    text, metadata = compiled(nest, target, capfd)
    threads = nest.tile.warps * TARGETS[target][2]
    for verb in ("load", "store"):
        counts = {w: accesses(text, w, verb) for w in _ACCESS}
        # Ids are 8 and 4 bytes wide, addresses and the status word 8: the only other
        # accesses are of the vector, as often as a thread moves one.
        narrow = (2, 1, 4) if verb == "store" else (2, 1)
        assert counts[vector] >= nest.tile.vectors // threads, f"{verb}s of {vector} B: {counts}"
        assert not any(counts[w] for w in narrow if w != vector), f"{verb}s: {counts}"
        if vector != 16:
            assert not counts[16], f"{verb}s: {counts}"
    # Warps find the first bad position together, by 8 bytes each; rows go through registers only.
    assert metadata.shared <= 8 * nest.tile.warps
    if not target.startswith("sm_"):
        assert metadata.warp_size == 64
        assert re.findall(r"; ScratchSize: (\d+)", text) == ["0"]
        assert re.search(rf'\.amdgcn_target "amd\S*-{target}"', text)


@needs_triton
@pytest.mark.parametrize("target", WIDER)
def test_a_table_keeps_wide_vectors(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    plan = COPIES["memory objects, gathered"]().plan()
    nest = NestKernel(plan.nests[0], plan)
    assert nest.constants["DST_TABLE"] == 2
    text, _ = compiled(nest, target, capfd)
    assert accesses(text, 16, "load") > 0
    assert accesses(text, 16, "store") > 0


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
