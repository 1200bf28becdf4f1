# SPDX-License-Identifier: Apache-2.0
"""NVRTC compiles the CUDA kernel for devices that are not here; reasons why `cuda` is rejected."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.command_line import python, rejection
from support.cuda_cases import COPIES
from support.cuda_on_cpu import ARGUMENT_BYTES

from portakv.backends.cuda import Cuda
from portakv.backends.rows_kernel import LOOKUPS, MAX_ENTRIES, NAMES, RowsKernel, kernels_of
from portakv.runtime import cuda as _cuda

DEVICE = torch.device("cuda", 0)
ARCHITECTURES = (80, 90, 100)
needs_nvrtc = pytest.mark.skipif(_cuda.no_nvrtc() is not None, reason=str(_cuda.no_nvrtc()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on disk that holds nothing."""
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path / "cache"))


def kernels() -> dict[str, RowsKernel]:
    """The table's kernels by their texts."""
    result: dict[str, RowsKernel] = {}
    for make in COPIES.values():
        plan = make().plan()
        for kernel in kernels_of(plan):
            result.setdefault(kernel.source, kernel)
    return result


KERNELS = kernels()


# The table


def test_the_table_has_every_shape_of_kernel() -> None:
    shapes = [kernel.shape for kernel in KERNELS.values()]
    assert {kernel.vector for kernel in shapes} == {16, 8, 4, 2, 1}
    assert {len(kernel.inner) for kernel in shapes} >= {0, 1, 2, 3}
    assert {len(kernel.outer) for kernel in shapes} == {0, 1, 2}
    assert {(kernel.src.ids, kernel.dst.ids) for kernel in shapes} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    for sides in ([kernel.src for kernel in shapes], [kernel.dst for kernel in shapes]):
        assert {LOOKUPS[side.lookup] for side in sides} == {"NONE", "PLANES", "UNITS"}
        assert {1 + len(side.bounded) for side in sides} == {1, 2, 3}
        assert max(side.per_id for side in sides) > 1


def test_arguments_stay_below_the_classic_limit() -> None:
    """4,096 bytes: more takes a device of 7.0 and CUDA 12.1 (CUDA C++ programming guide)."""
    assert ARGUMENT_BYTES + 2 * 8 * MAX_ENTRIES <= 4096
    shapes = [kernel.shape for kernel in KERNELS.values()]
    assert not any(x.src.entries > MAX_ENTRIES for x in shapes)


# Machine code


def _tool() -> str | None:
    """``nvdisasm``, from Triton's wheel or a CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    places = [Path(str(spec.origin)).parent / "backends/nvidia/bin"] if spec else []
    places += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    return next((str(p / "nvdisasm") for p in places if (p / "nvdisasm").exists()), None)


def _disassembled(binary: bytes, stem: Path) -> str:
    stem.write_bytes(binary)
    return subprocess.run([str(_tool()), stem], capture_output=True, text=True, check=True).stdout


# What loads and stores one vector, in machine code and in PTX.
_SASS = {16: ".E.128", 8: ".E.64", 4: ".E", 2: ".E.U16", 1: ".E.U8"}
_PTX = {16: ".v4.u32", 8: ".u64", 4: ".u32", 2: ".u16", 1: ".u8"}


def _judge_sass(code: str, vector: int) -> None:
    """Assert as many loads and stores of the vector as a thread moves; the only other ones are of
    ids, addresses and the status."""
    for each, name in NAMES.items():
        _, there, rest = code.partition(f".section\t.text.{name},")
        assert there, f"{name} was not found"
        entry = rest.partition(".section\t")[0]
        accesses = re.findall(r"\b(LDG?|STG?|LDL|STL)((?:\.[A-Z0-9]+)*) ", entry)
        assert not {op for op, _ in accesses} & {"LD", "ST", "LDL", "STL"}, (
            "generic or local memory"
        )
        loads = [kind for op, kind in accesses if op == "LDG" and ".STRONG" not in kind]
        stores = [kind for op, kind in accesses if op == "STG" and ".STRONG" not in kind]
        assert stores == [_SASS[vector]] * each, stores
        assert loads.count(_SASS[vector]) >= each, loads
        assert set(loads) <= {_SASS[vector], _SASS[8], _SASS[4]}, loads


def compiles(sources: Iterable[str], architecture: int) -> None:
    """Compile kernels to programs that all differ and are cached."""
    texts = list(sources)
    with ThreadPoolExecutor(2) as pool:
        binaries = list(pool.map(lambda s: _cuda.compile_kernel(s, architecture), texts))
    assert all(binary.startswith(b"\x7fELF") for binary in binaries)
    assert all(_cuda.compiled_before(source, architecture) for source in texts)
    assert len(set(binaries)) == len(texts)


@needs_nvrtc
def test_a_kernel_of_each_width_compiles_to_machine_code() -> None:
    compiles((source for source, _ in chosen(False)), 90)


@needs_nvrtc
@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_to_machine_code(architecture: int) -> None:
    compiles(KERNELS, architecture)


def chosen(tables: bool) -> list[tuple[str, RowsKernel]]:
    """One kernel for each width, or for each pair of tables too."""
    kinds = {}
    for source, kernel in KERNELS.items():
        shape = kernel.shape
        kinds[shape.vector, shape.src.lookup * tables, shape.dst.lookup * tables] = source
    return [(source, KERNELS[source]) for source in kinds.values()]


@needs_nvrtc
@pytest.mark.skipif(_tool() is None, reason="nvdisasm is not installed: pip install triton")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.full
def test_machine_code_has_the_vector_width(tables: bool, architecture: int, tmp_path: Path) -> None:
    """The machine code is disassembled, which takes longer than to compile it."""
    assert {kernel.shape.vector for _, kernel in chosen(tables)} == set(_SASS)
    for number, (source, kernel) in enumerate(chosen(tables)):
        binary = _cuda.compile_kernel(source, architecture)
        code = _disassembled(binary, tmp_path / f"{number}.cubin")
        assert f".target\tsm_{architecture}" in code
        _judge_sass(code, kernel.shape.vector)


@needs_nvrtc
@pytest.mark.parametrize("tables", [False, pytest.param(True, marks=pytest.mark.full)])
def test_ptx_has_the_vector_width(tables: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made where NVRTC does not know a device, for the nearest older one."""
    monkeypatch.setattr(_cuda, "architectures", lambda: [75, 80])
    for source, kernel in chosen(tables):
        binary = _cuda.compile_kernel(source, 90)
        assert binary.endswith(b"\0"), "the driver wants text that ends"
        text = binary.decode()
        assert ".target sm_80" in text
        assert [f".entry {name}(" in text for name in NAMES.values()] == [True, True]
        vector = _PTX[kernel.shape.vector]
        loads = set(re.findall(r"\bld\.(?!param|volatile)\S+", text))
        assert loads <= {f"ld.global{kind}" for kind in (vector, ".u64", ".s32")}
        assert f"ld.global{vector}" in loads
        stores = re.findall(r"\bst\.(?!volatile)\S+", text)
        assert stores == [f"st.global{vector}"] * sum(NAMES)


@needs_nvrtc
def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ARCHITECTURES) <= set(_cuda.architectures())
    monkeypatch.setattr(_cuda, "architectures", lambda: [75, 80, 90])
    assert [_cuda.target_for(n) for n in (75, 86, 90, 130)] == [
        "sm_75",
        "compute_80",
        "sm_90",
        "compute_90",
    ]
    with pytest.raises(
        RuntimeError, match=r"Expected compute capability 7\.5 or later, .* got 7\.0"
    ):
        _cuda.target_for(70)


@needs_nvrtc
def test_an_error_carries_the_compilers_log() -> None:
    source = next(iter(KERNELS)).replace("Argument copy)", "Argument nothing)")
    with pytest.raises(RuntimeError) as caught:
        _cuda.compile_kernel(source, 90)
    assert "NVRTC refused the kernel for sm_90:\n" in str(caught.value)
    assert 'identifier "copy" is undefined' in str(caught.value)
    assert "\0" not in str(caught.value)


@needs_nvrtc
def test_compiling_needs_no_cuda_core() -> None:
    """A separate process, which cannot import it, compiles a kernel."""
    program = (
        "import sys; sys.modules['cuda.core'] = None\n"
        "from portakv.runtime import cuda as _cuda\n"
        "assert _cuda.no_nvrtc() is None, _cuda.no_nvrtc()\n"
        "print(len(_cuda.compile_kernel(sys.argv[1], 90)))"
    )
    assert int(python("-c", program, next(iter(KERNELS)))) > 1000


# Why `cuda` is rejected


def _report(name: str, *answer: Any) -> Any:
    """Return a binding whose version a function of that name reports."""
    return SimpleNamespace(**{name: lambda: answer})


_LOST = RuntimeError("libnvrtc.so.13 was not found\nsearched in:\n  nowhere")
NOT_THERE = SimpleNamespace(nvrtcVersion=Mock(side_effect=_LOST))


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """cuda-bindings of a machine on which nothing is missing: tests take one thing away."""

    def version(package: str) -> str:
        if package != "cuda-bindings":
            raise importlib.metadata.PackageNotFoundError(package)
        return "13.1.0"

    made: Any = ModuleType("cuda.bindings")
    made.nvrtc = _report("nvrtcVersion", 0, 13, 2)
    made.driver = _report("cuDriverGetVersion", 0, 13000)
    monkeypatch.setitem(sys.modules, "cuda.bindings", made)
    for name in ("cuda.bindings.nvrtc", "cuda.bindings.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(_cuda, "version", version)
    monkeypatch.setattr(_cuda, "architectures", lambda: [75, 80, 90])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return made


def test_nothing_is_missing(bindings: Any) -> None:
    decision = Cuda.probe(DEVICE)
    assert (decision.accepted, decision.name) == (True, "cuda")
    assert "NVRTC 13.2" in decision.reason


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("version", Mock(side_effect=importlib.metadata.PackageNotFoundError),
         "cuda-bindings is not installed; pip install '.[cuda]' in a clone"),
        ("version", Mock(return_value="12.9.1"),
         "cuda-bindings 12.9.1 is installed, but 13.x is needed; pip install"),
        ("nvrtc", None, "NVRTC cannot be loaded (cannot import name 'nvrtc'"),
        ("nvrtc", _report("nvrtcVersion", 0, 12, 2), "NVRTC 12.2 is installed, but 13.x is needed"),
        ("nvrtc", _report("nvrtcVersion", 7, 13, 2), "NVRTC does not report its version (7)"),
        ("nvrtc", NOT_THERE, "NVRTC cannot be loaded (libnvrtc.so.13 was not found); pip install"),
        ("driver", _report("cuDriverGetVersion", 0, 12080),
         "the driver supports CUDA 12.8, but 13.0 is needed; update the"),
        ("driver", _report("cuDriverGetVersion", 3, None),
         "the driver does not report its version"),
        ("get_device_capability", Mock(return_value=(7, 0)),
         "Expected compute capability "),
    ],
)  # fmt: skip
def test_what_is_missing_is_the_reason(
    what: str, value: Any, reason: str, bindings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"version": _cuda, "get_device_capability": torch.cuda}.get(what, bindings)
    monkeypatch.setattr(where, what, value)
    if value is None:
        delattr(bindings, what)
    assert rejection(Cuda, DEVICE).startswith(reason)
