# SPDX-License-Identifier: Apache-2.0
"""The code that Triton makes of the kernel for targets that are not here, and how often it does."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from support.paged_cases import chunk, dense, paged, pool

from portakv import CopyPlan, KVView
from portakv.backends._triton_rows import NestKernel
from portakv.backends.triton import compile_kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
# (backend, architecture, width of a warp)
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx90a": ("hip", "gfx90a", 64)}


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
    ("width", "vector"),
    [
        (4096, 16),
        pytest.param(656, 16, marks=pytest.mark.full),
        (40, 8),
        pytest.param(12, 4, marks=pytest.mark.full),
        pytest.param(6, 2, marks=pytest.mark.full),
        (3, 1),
    ],
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
