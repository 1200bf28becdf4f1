# SPDX-License-Identifier: Apache-2.0
"""`triton` on targets that are not here: its code for AMD's, and what it says of ``npu`` and
``mlu`` under a driver of theirs. Compiled and asked, never run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from portakv import CopyPlan, KVView
from portakv.backends._triton_rows import NestKernel
from portakv.backends.triton import compile_kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


# Code for AMD's targets

# gfx906 is also Hygon's Z100. None of Hygon's own targets is known to any Triton of upstream.
TARGETS = ("gfx906", "gfx908", "gfx90a", "gfx942")
# Targets that a Triton may refuse: 3.7.1 refuses gfx906, and 3.9.0 takes it.
PERHAPS = {"gfx906"}
REFUSALS = "unsupported target: '{}'"
# What loads and stores one vector, in the assembler's words.
WORDS = {
    16: ("global_load_dwordx4", "global_store_dwordx4"),
    8: ("global_load_dwordx2", "global_store_dwordx2"),
    4: ("global_load_dword", "global_store_dword"),
    2: ("global_load_ushort", "global_store_short"),
    1: ("global_load_ubyte", "global_store_byte"),
}


def nest(width: int, src_step: int, dst_step: int) -> NestKernel:
    """The kernel between two layers of rows of ``width`` bytes and a chunk."""
    caches = [torch.zeros(5, 4, width, dtype=torch.uint8) for _ in range(2)]
    rows = torch.zeros(2, 7, width, dtype=torch.uint8)
    views = [KVView(caches, "layer | block token dim"), KVView(rows, "layer token dim")]
    src, dst = views if src_step else views[::-1]
    plan = CopyPlan(src.form, dst.form, src_step, dst_step)
    return NestKernel(plan.nests[0], plan)


def compiled(kernel: NestKernel, target: str, told: pytest.CaptureFixture[str]) -> Any:
    """The compiled kernel; skips where this Triton refuses a target that it may refuse."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        return compile_kernel(kernel, GPUTarget("hip", target, 64))
    except RuntimeError:
        if target in PERHAPS and REFUSALS.format(target) in told.readouterr().err:
            pytest.skip(f"Triton {triton.__version__} refuses {target}; 3.9.0 takes it")
        raise


@needs_triton
@pytest.mark.parametrize(
    "target", [pytest.param(x, marks=[pytest.mark.full] * (x != "gfx90a")) for x in TARGETS]
)
@pytest.mark.parametrize(("width", "vector"), [(4096, 16), (40, 8), (12, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("steps", [(1, 0), (0, 1)], ids=["gather", "scatter"])
def test_the_code_for_amd_is_wide(
    target: str, width: int, vector: int, steps: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    kernel = nest(width, *steps)
    made = compiled(kernel, target, capfd)
    text, metadata = made.asm["amdgcn"], made.metadata
    each = kernel.tile.vectors // (64 * kernel.tile.warps)
    for way, word in enumerate(("loads", "stores")):
        found = {w: len(re.findall(rf"\b{words[way]}\b", text)) for w, words in WORDS.items()}
        assert found[vector] >= each, f"{word}: {found}"
        # Beside the vectors only ids (8 and 4 B), addresses and the status (8 B).
        others = [w for w in (16, 2, 1, *([4] if way else [])) if w != vector]
        assert not any(found[w] for w in others), f"{word}: {found}"
    assert (metadata.warp_size, metadata.shared) == (64, 0)
    assert re.findall(r"; ScratchSize: (\d+)", text) == ["0"]
    assert re.search(rf'\.amdgcn_target "amd\S*-{target}"', text)
    assert made.asm["hsaco"][:4] == b"\x7fELF"


# Other vendors' drivers

# Torch takes one name for a device of somebody else's in a process, so that each name has its own.
# The drivers stand for those of vendors' Tritons: triton-ascend's has both methods of `Driver`, and
# Cambricon's, as FlagTree has it, tells only its target.
PROGRAM = """
import json, sys, torch
from portakv.backends import triton as backend

name = sys.argv[1]
torch.utils.rename_privateuse1_backend(name)
found = {}


def ask(case):
    decision = backend.Triton.probe(torch.device(name, 0))
    found[case] = [decision.accepted, decision.reason]


class Target:
    serves = name

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.serves, "Ascend910B1" if name == "npu" else 5, 0)


class Driver(Target):
    def get_active_torch_device(self):
        if self.serves is None:
            raise RuntimeError("libascendcl.so: cannot open shared object file\\nmore")
        return torch.device(self.serves, 0)


sys.modules["triton"] = None
ask("missing")
del sys.modules["triton"]
try:
    from triton.runtime import driver
except ImportError:
    pass
else:
    if not torch.cuda.is_available():
        ask("upstream's")
    for case, serves in (("active", name), ("another", "cuda"), ("broken", None)):
        Target.serves = serves
        driver.set_active(Driver())
        ask(case)
    for case, serves in (("only a target", name), ("another's target", "maca")):
        Target.serves = serves
        driver.set_active(Target())
        ask(case)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["npu", "mlu"])
def answers(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `triton` says of a device of that name, by case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request.param],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {"name": request.param, **found}


@needs_triton
@pytest.mark.parametrize("case", ["active", "only a target"])
def test_a_triton_that_serves_the_device_is_taken(case: str, answers: dict[str, Any]) -> None:
    accepted, reason = answers[case]
    target = {"npu": "npu Ascend910B1", "mlu": "mlu 5"}[answers["name"]]
    assert accepted, reason
    assert reason.endswith(f"compiles its kernel for {target}")


@needs_triton
def test_a_triton_that_serves_others_says_which(answers: dict[str, Any]) -> None:
    reason = f"Triton's active driver serves cuda devices, not {answers['name']}"
    assert answers["another"] == [False, reason]
    assert answers["another's target"] == [False, reason.replace("cuda", "maca")]


@needs_triton
def test_a_driver_that_fails_is_the_reason(answers: dict[str, Any]) -> None:
    reason = "RuntimeError: libascendcl.so: cannot open shared object file"
    assert answers["broken"] == [False, f"Triton has no driver for this machine: {reason}"]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="upstream's Triton has a driver here")
def test_upstreams_triton_alone_has_no_driver(answers: dict[str, Any]) -> None:
    accepted, reason = answers["upstream's"]
    assert not accepted
    assert reason.startswith("Triton has no driver for this machine: RuntimeError: 0 active driver")


def test_without_triton_it_says_what_to_install(answers: dict[str, Any]) -> None:
    reason = "the package 'triton' is missing; install portakv[triton]"
    assert answers["missing"] == [False, reason]
