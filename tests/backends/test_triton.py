# SPDX-License-Identifier: Apache-2.0
"""`triton`: its kernel under the interpreter and on a GPU, and what it says of devices."""

from __future__ import annotations

import builtins
import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
from support.command_line import python, rejection
from support.paged_cases import chunk, dense, paged, pool, rows_of

from portakv import CopyPlan, Index
from portakv.backends import triton as triton_backend
from portakv.backends.triton import Triton, compile_kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# What it says of devices


def _reason(device: torch.device) -> str:
    return rejection(Triton, device)


def test_the_host_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _reason(CPU)
    assert "GPU" in _reason(CPU)


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every import of triton fail."""
    usual = builtins.__import__

    def fails(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise error
        return usual(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", fails)
    monkeypatch.delitem(sys.modules, "portakv.backends._triton_kernel", raising=False)
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


@needs_triton
def test_an_interpreter_asked_for_too_late_or_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import portakv.backends._triton_kernel  # noqa: F401 - imported without the interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "before Python starts" in _reason(CPU)
    assert "unset it" in _reason(CUDA)


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
            launch = backend.prepare(CopyPlan(src.form, dst.form, 1, 0))
            launch(src, dst, ids, Index(), tokens, None, None)
            assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])
    assert len(compiled) == 1


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


from triton.runtime import driver

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


@needs_triton
@pytest.mark.parametrize(
    ("name", "target"),
    [("npu", "npu Ascend910B1"), pytest.param("mlu", "mlu 5", marks=pytest.mark.full)],
)
def test_what_it_says_under_a_vendor_s_driver(name: str, target: str) -> None:
    told = python("-c", PROGRAM, name, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    found: dict[str, Any] = json.loads(told)
    for case in ("active", "only a target"):
        accepted, reason = found[case]
        assert accepted, reason
        assert reason.endswith(f"compiles its kernel for {target}")
    serves = f"Triton's active driver serves {{}} devices, not {name}"
    assert found["another"] == [False, serves.format("cuda")]
    assert found["another's target"] == [False, serves.format("maca")]
    fails = "Triton has no driver for this machine: RuntimeError: "
    why = f"{fails}libascendcl.so: cannot open shared object file"
    assert found["broken"] == [False, why]
    if not torch.cuda.is_available():  # upstream's Triton alone
        accepted, reason = found["upstream's"]
        assert not accepted
        assert reason.startswith(f"{fails}0 active driver")
