# SPDX-License-Identifier: Apache-2.0
"""What compilers make of the kernel of `direct`: NVRTC without a GPU, and g++ with sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cuda_cases import COPIES, Copy, by, chunk, pool
from support.cuda_on_cpu import FLAGS
from support.direct_on_cpu import why_not

from portakv.engines.direct import CUT, NAME, DirectKernel
from portakv.runtime import nvrtc as _nvrtc

needs_compiler = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
needs_nvrtc = pytest.mark.skipif(_nvrtc.missing() is not None, reason=str(_nvrtc.missing()))


def kernels() -> list[DirectKernel]:
    """One for each width and each pair of tables."""
    chosen = {}
    for make in COPIES.values():
        plan = make().plan()
        for nest in plan.nests:
            kernel = DirectKernel(nest, plan)
            chosen[kernel.vector, kernel.src.kind, kernel.dst.kind] = kernel
    assert {vector for vector, _, _ in chosen} == {16, 8, 4, 2, 1}
    return list(chosen.values())


_PTX = {16: ".v4.u32", 8: ".u64", 4: ".u32", 2: ".u16", 1: ".u8"}


@needs_nvrtc
def test_nvrtc_keeps_all_vectors_of_a_thread_in_registers() -> None:
    for kernel in kernels():
        text = _nvrtc._compile(kernel.source, "compute_80").decode()
        assert text.count(".entry") == 1
        assert f".entry {NAME}(" in text
        assert f".maxntid {CUT.threads}" in text
        assert ".local" not in text
        stores = f"st.global{_PTX[kernel.vector]}"
        assert text.count(f"{stores} ") + text.count(f"{stores}\t") == CUT.each
        assert "ld.u" not in text, "a generic load"


@needs_nvrtc
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_nvrtc_makes_machine_code(architecture: int) -> None:
    for kernel in kernels()[:4]:
        binary = _nvrtc._compile(kernel.source, f"sm_{architecture}")
        assert binary.startswith(b"\x7fELF")


def test_nests_of_one_shape_have_one_text() -> None:
    def text(layers: int, tokens: int) -> str:
        plan = Copy(by(pool(layers=layers), [1, 0, 2][:tokens]), chunk(tokens, layers), tokens)
        made = plan.plan()
        return DirectKernel(made.nests[0], made).source

    assert text(3, 2) == text(3, 3)
    assert text(3, 2) != text(2, 2), "the number of planes is in the text"


# Under sanitizers


@needs_compiler
@pytest.mark.slow
def test_the_kernel_is_clean_under_sanitizers() -> None:
    """Reads and writes outside of ids, tables and arguments; misaligned or overflowing ones."""
    asked = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not os.path.isabs(asked.stdout.strip()):
        pytest.skip("g++ has no address sanitizer")
    environment = {
        **os.environ,
        FLAGS: "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": asked.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    some = "bad or several or blocks or objects or split or part"
    words = ["-q", "-p", "no:cacheprovider", "-k", f"({some}) and Stores and not seeded"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "test_direct_kernel.py"],
        cwd=Path(__file__).parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
