# SPDX-License-Identifier: Apache-2.0
"""`compiled` compiles once for all lengths, in prepare, without copying a cache, and never runs
eagerly instead. test_every_backend.py judges the bytes that it moves."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.command_line import rejection
from support.guarded_memory import filled, same
from support.inductor import needs_inductor
from support.paged_cases import chunk, dense, paged, pool, rows_of

from portakv import BackendUnavailable, CopyPlan, Index, KVView, copy_rows
from portakv.backends import compiled as module
from portakv.backends.compiled import Compiled, Program
from portakv.registry import registry
from portakv.runtime.kernel_cache import LOADED

pytestmark = pytest.mark.xdist_group("inductor")  # one process imports it
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param(CPU, marks=needs_inductor), pytest.param(CUDA, marks=pytest.mark.gpu)],
    ids=str,
)


def compiled(device: torch.device) -> Compiled:
    """The registry's backend: its programs are shared by all tests."""
    backend = registry.choose(device, "compiled").backend
    assert isinstance(backend, Compiled)
    return backend


def programs(backend: Compiled) -> int:
    """Return how many programs a backend has compiled."""
    return sum(owner is backend for owner, _ in LOADED)


def copy(
    src: KVView, dst: KVView, src_index: Any = None, dst_index: Any = None, **more: Any
) -> None:
    copy_rows(src, dst, src_index, dst_index, backend="compiled", **more).synchronize()


def _plan(device: torch.device, *, layers: int = 3) -> CopyPlan:
    src = paged(pool(device, layers=layers))
    dst = dense(chunk(device, 4, layers=layers))
    return CopyPlan(src.form, dst.form, 1, 0)


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())


# One program serves all


@on_each_device
@pytest.mark.full
def test_every_dtype_through_one_program(device: torch.device) -> None:
    dtypes = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.int16,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    counts = set()
    slots = [23, 0, 9, 4, 5]
    for dtype in dtypes:
        caches = [filled((2, 6, 4, 2, 32 // dtype.itemsize), dtype, device=device)]
        rows = filled((2, 1, 5, 64 // dtype.itemsize), dtype, poison=True, device=device)
        copy(paged(caches), dense(rows), slots)
        counts.add(programs(compiled(device)))
        assert same(rows, caches[0].flatten(3).flatten(1, 2)[:, slots].unsqueeze(1)), dtype
    assert len(counts) == 1


@on_each_device
@pytest.mark.full
def test_another_length_stride_pool_or_place_compiles_nothing(device: torch.device) -> None:
    """Strides of chunks, and sizes and places of pools, differ each time."""
    first = pool(device)
    copy(paged(first), dense(chunk(device, 3)), [1, 2, 3])
    copy(dense(chunk(device, 3)), paged(first), None, [1, 2, 3])
    made = programs(compiled(device))
    for n, tokens in enumerate((1, 2, 3, 4, 5, 8, 13, 21, 34, 55, 89, 144, 12, 233)):
        caches = pool(device, blocks=60 + n)
        # Of a longer one: neither the tokens nor the distances between planes are the same.
        rows = chunk(device, tokens + n % 3)[:, :, :tokens]
        slots = torch.randperm(240, generator=torch.Generator().manual_seed(n))[:tokens]
        ids = slots.to(device)
        copy(paged(caches), dense(rows), ids)
        assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots]), tokens
        rows.copy_(chunk(device, tokens))
        wanted = rows_of(caches)
        wanted[:, :, slots] = rows.cpu()
        copy(dense(rows), paged(caches), None, ids)
        assert torch.equal(rows_of(caches), wanted), tokens
    assert programs(compiled(device)) == made


@on_each_device
@pytest.mark.parametrize(
    "scatters", [pytest.param(False, marks=pytest.mark.full), True], ids=["gather", "scatter"]
)
@pytest.mark.full
def test_the_code_is_one_kernel_without_a_buffer(device: torch.device, scatters: bool) -> None:
    """No copy of a cache, and no rows kept between: what is loaded is stored.

    A copy of a cache would also have to take as much memory as a process can address.
    """
    from torch._inductor.utils import run_and_get_code

    src = paged(pool(device))
    dst = dense(chunk(device, 4))
    views = (dst, src) if scatters else (src, dst)
    plan = CopyPlan(views[0].form, views[1].form, int(not scatters), int(scatters))
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(Compiled(device).prepare, plan)
    assert len(codes) == 2  # the copy and the report
    # Units are the outermost loop: otherwise each vector would be divided by a variable.
    outermost = re.search(r"for\(.*?;(.*?);", codes[0])
    assert outermost is None or "ks" in outermost[1]
    assert not re.search(r"(?://|%) ks", codes[0])
    made = re.findall(r"async_compile\.(?:cpp_pybinding|triton)\(", codes[0])
    assert len(made) == 1, "one kernel"
    copied, reported = (re.sub("#.*", "", x[x.index("def call(") :]) for x in codes)
    assert not re.search(r"empty_strided\w*\(|\.clone\(|extern_kernels\.|aten\.", copied), copied
    # The report keeps the first bad position of a block of threads, and no rows.
    assert not re.search(r"\.clone\(|extern_kernels\.|aten\.", reported), reported


@pytest.mark.gpu
def test_a_scatter_takes_no_memory() -> None:
    caches = [torch.zeros(2, 4096, 16, 8, 128, dtype=torch.float16, device="cuda") for _ in "ab"]
    rows = torch.zeros(2, 2, 64, 1024, dtype=torch.float16, device="cuda")
    slots = torch.arange(64, device="cuda")
    dst = paged(caches)
    src = KVView(rows, "kv layer token (head dim)", heads=8)
    copy(src, dst, None, Index(slots))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    copy(src, dst, None, Index(slots))
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@on_each_device
@pytest.mark.full
def test_what_torch_guards_for_does_not_compile_again(device: torch.device) -> None:
    """Each of these would be a recompilation of a function called through torch.compile."""
    backend = Compiled(device)
    caches = pool(device)
    threads = torch.get_num_threads()
    promised = torch.are_deterministic_algorithms_enabled()
    # Under this promise inductor would write rows by a slow method that goes over all memory.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.inference_mode():
        launch = backend.prepare(_plan(device))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(promised)
    ids = Index(torch.tensor([3, 0, 23, 5], device=device))

    def check() -> None:
        rows = torch.zeros(2, 3, 4, 16, dtype=torch.int16, device=device)
        launch(paged(caches), dense(rows), ids, Index(), 4, None, None)
        assert torch.equal(rows.cpu(), rows_of(caches)[:, :, [3, 0, 23, 5]])

    made = programs(backend)
    try:
        check()
        with torch.inference_mode():
            check()
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16):
            check()
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        torch._dynamo.reset()
        check()
    finally:
        torch.use_deterministic_algorithms(promised)
        torch.set_num_threads(threads)
    assert programs(backend) == made == 2


@pytest.mark.full
@needs_inductor
def test_torchs_limit_of_recompilations_is_not_met() -> None:
    """Each program has its own count, so that no number of plans ends in an eager run."""
    backend = Compiled(CPU)
    limits = ("recompile_limit", "cache_size_limit")  # its name, and its name in older releases
    limit = next(name for name in limits if hasattr(torch._dynamo.config, name))
    with torch._dynamo.config.patch({limit: 1}):
        for layers in (1, 2):
            backend.prepare(_plan(CPU, layers=layers))
    assert programs(backend) == 3  # two copies, one report


@needs_inductor
def test_integers_stay_variable() -> None:
    def add(*arguments: Any) -> None:
        arguments[0].add_(arguments[1])

    def take_for_a_constant(*arguments: Any) -> None:
        arguments[0].add_(sum([1] * arguments[1]))

    target = torch.zeros(8, dtype=torch.int64)
    program = Program(add, {}, [torch.zeros(8, dtype=torch.int64), 0], torch.zeros(0))
    for number in (0, 1, 5, -7, 2**40):
        target.zero_()
        program([target, number])
        assert target.tolist() == [number] * 8
    with pytest.raises(RuntimeError, match="compiled again"):
        program._compile(torch.fx.GraphModule({}, torch.fx.Graph()), [])
    with pytest.raises(RuntimeError, match="for a constant"):
        Program(take_for_a_constant, {}, [torch.zeros(8, dtype=torch.int64), 0], torch.zeros(0))


@needs_inductor
def test_an_eager_run_is_refused_before_it_touches_memory(nothing_chosen: None) -> None:
    """Its arguments are marks, not addresses."""
    caches = pool("cpu")
    rows = chunk("cpu", 2)
    wanted = rows.clone()
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(BackendUnavailable, match="ran the copy as plain Python"):
            copy_rows(paged(caches), dense(rows), [1, 2], backend="compiled")
    finally:
        torch.compiler.set_stance("default")
    assert torch.equal(rows, wanted)


# What it says of devices


def test_what_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "not on xpu" in rejection(Compiled, torch.device("xpu", 0))
    with monkeypatch.context() as patched:
        patched.setenv("CXX", "no-such-compiler")
        assert "'no-such-compiler' is not there" in rejection(Compiled, CPU)
        patched.delenv("CXX")
        patched.setenv("PATH", "")
        assert "install g++" in rejection(Compiled, CPU)
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        with monkeypatch.context() as patched:
            patched.setenv(switch, "1")
            assert f"switched off by {switch}" in rejection(Compiled, CPU)
    with monkeypatch.context() as patched:
        patched.setattr(module, "find_spec", lambda name: None)
        assert "triton" in rejection(Compiled, CUDA)
        patched.setattr(module, "find_spec", lambda name: name)
        patched.setattr(shutil, "which", lambda name: None)
        assert "install gcc" in rejection(Compiled, CUDA)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        patched.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        patched.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
        assert "python3-dev" in rejection(Compiled, CPU)
        (tmp_path / "Python.h").touch()
        assert Compiled.probe(CPU).accepted
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__file__", str(tmp_path / "with space" / "torch" / "__init__.py"))
        assert "with a space" in rejection(Compiled, CPU)
    monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    assert "tensor of an address" in rejection(Compiled, CPU)


@needs_inductor
def test_a_compiler_that_fails_is_the_self_checks_reason(
    nothing_chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broke = Mock(side_effect=RuntimeError("the compiler broke"))
    monkeypatch.setattr(torch._inductor, "compile", broke)
    with pytest.raises(BackendUnavailable, match="the compiler broke"):
        registry.choose(CPU, "compiled")
    assert registry.choose(CPU).name == "reference"


@needs_inductor
def test_where_it_stands(nothing_chosen: None) -> None:
    """A host uses it only when it is named; a GPU tries it between `triton` and `reference`."""
    assert "compiled" not in registry.REGISTRY.automatic(CPU)
    decisions = {decision.name: decision for decision in registry.trace(CPU)}
    assert "on cpu it is used only when named" in decisions["compiled"].reason
    order = registry.REGISTRY.automatic(CUDA)
    assert order[order.index("triton") :] == ["triton", "compiled", "reference"]
