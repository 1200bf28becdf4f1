# SPDX-License-Identifier: Apache-2.0
"""How `compiled` compiles: once, in prepare, without copying a cache, and never eagerly instead."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiled_cases import copy, needs_compiler, on_each_device
from support.triton_cases import chunk, dense, paged, pool, rows_of

from portakv import BackendUnavailable, CopyPlan, Index, KVView, copy_rows
from portakv.backends import compiled as module
from portakv.backends._compiled_program import Program
from portakv.backends.compiled import Compiled
from portakv.registry import registry

CPU = torch.device("cpu")


def _plan(device: str, *, layers: int = 3) -> CopyPlan:
    src, dst = paged(pool(device, layers=layers)), dense(chunk(device, 4, layers=layers))
    return CopyPlan(src.form, dst.form, 1, 0)


def _home(device: str) -> torch.device:
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


@on_each_device
@pytest.mark.parametrize("scatters", [False, True], ids=["gather", "scatter"])
def test_the_code_is_one_kernel_without_a_buffer(device: str, scatters: bool) -> None:
    """No copy of a cache, and no rows kept between: what is loaded is stored.

    A copy of a cache would also have to take as much memory as a process can address.
    """
    from torch._inductor.utils import run_and_get_code

    src, dst = paged(pool(device)), dense(chunk(device, 4))
    views = (dst, src) if scatters else (src, dst)
    plan = CopyPlan(views[0].form, views[1].form, int(not scatters), int(scatters))
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(Compiled(_home(device)).prepare, plan)
    assert len(codes) == 2  # the copy and the report
    # Units are the outermost loop: otherwise each vector would be divided by a variable.
    outermost = re.search(r"for\(.*?;(.*?);", codes[0])
    assert outermost is None or "ks" in outermost[1]
    assert not re.search(r"(?://|%) ks", codes[0])
    for code in codes:
        body = re.sub("#.*", "", code[code.index("def call(") :])
        made = re.findall(r"async_compile\.(?:cpp_pybinding|triton)\(", code)
        assert len(made) == 1, "one kernel"
        assert not re.search(r"empty_strided\w*\(|\.clone\(|extern_kernels\.|aten\.", body), body


@pytest.mark.gpu
def test_a_scatter_takes_no_memory() -> None:
    caches = [torch.zeros(2, 4096, 16, 8, 128, dtype=torch.float16, device="cuda") for _ in "ab"]
    rows = torch.zeros(2, 2, 64, 1024, dtype=torch.float16, device="cuda")
    slots, dst = torch.arange(64, device="cuda"), paged(caches)
    src = KVView(rows, "kv layer token (head dim)", heads=8)
    copy(src, dst, None, Index(slots))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    copy(src, dst, None, Index(slots))
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@on_each_device
def test_what_torch_guards_for_does_not_compile_again(device: str) -> None:
    """Each of these would be a recompilation of a function called through torch.compile."""
    backend, caches = Compiled(_home(device)), pool(device)
    with torch.inference_mode():
        launch = backend.prepare(_plan(device))
    ids = Index(torch.tensor([3, 0, 23, 5], device=device))

    def check() -> None:
        rows = torch.zeros(2, 3, 4, 16, dtype=torch.int16, device=device)
        launch(paged(caches), dense(rows), ids, Index(), 4, None, None)
        assert torch.equal(rows.cpu(), rows_of(caches)[:, :, [3, 0, 23, 5]])

    made = backend.compilations
    threads, promised = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        check()
        with torch.inference_mode():
            check()
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16):
            check()
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        torch._dynamo.reset()
        check()
    finally:
        torch.use_deterministic_algorithms(promised)
        torch.set_num_threads(threads)
    assert backend.compilations == made == 2


@needs_compiler
def test_a_promise_of_one_order_is_kept_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under it inductor would write rows by a slow way of its own, over all memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        Compiled(CPU).prepare(_plan("cpu"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_compiler
def test_torchs_limit_of_recompilations_is_not_met() -> None:
    """Each program has its own count, so that no number of plans ends in an eager run."""
    backend = Compiled(CPU)
    limits = ("recompile_limit", "cache_size_limit")  # its name, and its name in older releases
    limit = next(name for name in limits if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 1}):
        for layers in (1, 2, 3):
            backend.prepare(_plan("cpu", layers=layers))
    assert backend.compilations == 4  # three copies, one report


@needs_compiler
def test_a_second_compilation_is_an_error() -> None:
    program = Program(_add, {}, [torch.zeros(8, dtype=torch.int64), 0])
    with pytest.raises(RuntimeError, match="compiled again"):
        program._compile(torch.fx.GraphModule({}, torch.fx.Graph()), [])


def _add(*arguments: Any) -> None:
    arguments[0].add_(arguments[1])


def _take_for_a_constant(*arguments: Any) -> None:
    arguments[0].add_(sum([1] * arguments[1]))


@needs_compiler
def test_integers_stay_variable() -> None:
    target = torch.zeros(8, dtype=torch.int64)
    program = Program(_add, {}, [torch.zeros(8, dtype=torch.int64), 0])
    for number in (0, 1, 5, -7, 2**40):
        target.zero_()
        program([target, number])
        assert target.tolist() == [number] * 8
    assert program.compilations == 1


@needs_compiler
def test_an_integer_that_became_a_constant_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="for a constant"):
        Program(_take_for_a_constant, {}, [torch.zeros(8, dtype=torch.int64), 0])


@needs_compiler
def test_an_eager_run_is_refused_before_it_touches_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its arguments are marks, not addresses."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    caches, rows = pool("cpu"), chunk("cpu", 2)
    wanted = rows.clone()
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(BackendUnavailable, match="ran it as plain Python"):
            copy_rows(paged(caches), dense(rows), [1, 2], backend="compiled")
    finally:
        torch.compiler.set_stance("default")
    assert torch.equal(rows, wanted)


# What it says of devices


def _reason(device: torch.device) -> str:
    decision = Compiled.probe(device)
    assert not decision.accepted
    return decision.reason


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not there" in _reason(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "install g++" in _reason(CPU)


def test_without_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "python3-dev" in _reason(CPU)
    (tmp_path / "Python.h").touch()
    assert Compiled.probe(CPU).accepted


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_switched_off(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setenv(switch, "1")
    assert f"switched off by {switch}" in _reason(CPU)


def test_on_a_gpu_without_triton_or_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "triton" in _reason(cuda)
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install gcc" in _reason(cuda)


def test_on_another_device() -> None:
    assert "not on xpu" in _reason(torch.device("xpu", 0))


def test_a_torch_without_tensors_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    assert "tensor of an address" in _reason(CPU)


@needs_compiler
def test_a_compiler_that_fails_is_the_self_checks_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())

    def fails(*given: Any, **more: Any) -> Any:
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(BackendUnavailable, match="the compiler broke"):
        registry.choose(CPU, "compiled")
    assert registry.choose(CPU).name == "reference"


def test_on_a_host_it_is_only_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    assert "compiled" not in registry.REGISTRY.automatic(CPU)
    said = {decision.name: decision for decision in registry.trace(CPU)}
    assert "on cpu it is used only when asked for" in said["compiled"].reason


def test_on_a_gpu_it_stands_between_triton_and_the_reference() -> None:
    order = registry.REGISTRY.automatic(torch.device("cuda", 0))
    assert order[order.index("triton") :][-2:] == ["compiled", "reference"]


def test_a_probe_imports_no_compiler() -> None:
    program = (
        "import sys, torch\n"
        "from portakv.registry import registry\n"
        "registry.trace('cpu')\n"
        "assert not {'torch._inductor', 'torch._dynamo'} & set(sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PORTAKV_BACKEND"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
