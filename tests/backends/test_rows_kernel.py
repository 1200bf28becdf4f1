# SPDX-License-Identifier: Apache-2.0
"""The row kernel's text and its arguments, on the host: what it refuses, a launch that is repeated,
bugs that the table of copies catches, sanitizers; and what the sources in ``native`` include."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.command_line import new_python, registered
from support.cuda_cases import COPIES, seed_bug
from support.cuda_on_cpu import FLAGS, CudaOnCpu, why_not
from support.each_backend import Carrier
from support.guarded_memory import refused

from portakv import Unsupported
from portakv.backends import ascend_kernel, rows_kernel
from portakv.backends.base import Backend
from portakv.backends.rows_kernel import kernel_text
from portakv_conformance.vendor.ascendc_emulated import AscendC
from portakv_conformance.vendor.hip_emulated import HipEmulated

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.xdist_group("cuda-on-cpu"),
]
CPU = torch.device("cpu")
NATIVE = Path(__file__).resolve().parents[2] / "native"
SOURCES = sorted(x for x in NATIVE.rglob("*") if x.suffix in (".h", ".cuh", ".cpp", ".cu"))
#: Of CANN: its runtime, its CPU twin, and what a host asks of a platform.
VENDORS = ("acl/acl.h", "tikicpulib.h", "tiling/platform/platform_ascendc.h")


@pytest.fixture(scope="module", autouse=True)
def prefetching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefetch also in the smallest copies; a separate cache on disk holds the kernels."""
    with pytest.MonkeyPatch.context() as patched, registered(**{CudaOnCpu.name: CudaOnCpu}):
        patched.delenv("PORTAKV_BACKEND", raising=False)
        patched.setenv("PORTAKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patched.setattr(rows_kernel, "TUNING", (rows_kernel.Tuning(0, 1, 48),))
        yield


@pytest.mark.parametrize("source", SOURCES, ids=lambda x: str(x.relative_to(NATIVE)))
def test_a_source_needs_nothing_but_native_and_the_vendor(source: Path) -> None:
    for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
        # The emulation stands in for the vendor's headers: it is on the compiler's path.
        folders = source.parent, NATIVE / "ascend", NATIVE / "ascend" / "emulation"
        places = [(folder / name).resolve() for folder in folders]
        inside = [x for x in places if x.exists() and x.is_relative_to(NATIVE)]
        assert inside or name in VENDORS, name


def test_a_text_has_what_it_includes_in_its_place_once() -> None:
    rows = kernel_text()
    direct = kernel_text("host/direct.cuh")
    assert direct.count(rows) == 1
    assert "#include" not in direct
    assert direct.index("void copy_rows(") < direct.index("void copy_direct(")


# What it refuses


@pytest.mark.parametrize(
    ("backend", "limit", "name"),
    [
        (AscendC, "MAX_LOOPS", "NZ blocks"),
        (AscendC, "MAX_UNITS", "gather"),
    ],
)
def test_plans_with_more_than_the_arguments_hold(
    backend: type[Backend], limit: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = COPIES[name]().plan()
    backend(CPU).prepare(plan)
    monkeypatch.setattr(ascend_kernel, limit, 0)
    with refused(Unsupported, "kernel takes", "reference"):
        backend(CPU).prepare(plan)


# The table of copies can fail

ENDS_INSIDE = "scatter to 656 B rows"  # inside a sector, as its lanes follow
# What a bug replaces, by what, and a copy that shows it without leaving the memory around its rows.
BUGS = {
    "ids are always int64": ("request.wide ?", "true ?", "gather int32"),
    "the first position is forgotten": ("request.first + unit;", "unit;", "slots to an id"),
    "a slot past the end is moved": ("if (found >= request.limit)", "if (false)", "past the end"),
    "a bad id is reported at the wrong place": (
        "(i64)unit * copy.unit + 1",
        "unit",
        "past the end",
    ),
    "one table for both sides": ("copy.dst_table, to", "copy.src_table, to", "pool to pool"),
    "units run backwards": ("+ at % Shape::per_id", "+ 1 - at % 2", "several units of an id"),
    "inner loops run across": ("(at / below) * stride", "(at % First) * stride", "NZ blocks"),
    "a row's place in its sector counts twice": (
        "in -= (unsigned)",
        "in += (unsigned)",
        ENDS_INSIDE,
    ),
    "a row's place in a line": ("dst % 32", "dst % 128", ENDS_INSIDE),
    "the last vector is left out": ("if (at >= all)", "if (at + 1 >= all)", "blocks"),
    "every other plane": ("plane = blockIdx.y;", "plane = blockIdx.y / 2 * 2;", "scatter"),
    "a prefetch of another place": ("+ (i64)(in % Run) * Bytes);", "+ (1 << 20));", "gather"),
}
#: The same in the words for AMD's compiler.
BUGS_OF_HIP = {
    "16 bytes are read as 4": ("__attribute__((vector_size(16)))", "", "gather"),
    "stores go elsewhere": ("V*)targets[nth] =", "V*)(targets[nth] + 16) =", "one plane"),
}


@pytest.mark.parametrize(
    ("backend", "bug"),
    [*((CudaOnCpu, bug) for bug in BUGS), *((HipEmulated, bug) for bug in BUGS_OF_HIP)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_a_seeded_bug_is_caught(
    backend: type[Backend], bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, position = seed_bug(monkeypatch, {**BUGS, **BUGS_OF_HIP}[bug])
    status = torch.zeros(1, dtype=torch.int64)

    def judge() -> None:
        Carrier(backend, CPU).launch_and_check(copied, status)
        assert int(status) == position

    with pytest.raises(AssertionError):
        judge()


# Under sanitizers


@pytest.mark.full
def test_the_kernel_is_clean_under_sanitizers() -> None:
    """Reads and writes outside of ids, tables and arguments; misaligned or overflowing ones."""
    # The sanitizer looks for the function that throws exceptions when it starts.
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={x}"], capture_output=True, text=True).stdout
        for x in names
    ]
    if not all(os.path.isabs(library) for library in libraries):
        pytest.skip("g++ has no address sanitizer")
    flags = {FLAGS: "-fsanitize=address,undefined -fno-sanitize-recover=all"}
    own = {"LD_PRELOAD": " ".join(map(str.strip, libraries)), "ASAN_OPTIONS": "detect_leaks=0"}
    some = "bad or several or blocks or objects or planes or split"
    these = "(cuda-on-cpu or direct)"
    file = str(Path(__file__).with_name("test_every_backend.py"))
    words = ["-q", "-n0", "-p", "no:cacheprovider", file, "-k", f"({some}) and {these}"]
    assert "passed" in new_python("-m", "pytest", *words, **flags, **own)
