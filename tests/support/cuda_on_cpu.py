# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel's text compiled by g++ and run on host tensors, through its real arguments.

`CudaOnCpu` is a backend like any other, so that the library brings everything to it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from portakv import CopyPlan, KVView
from portakv.backends.base import (
    Backend,
    Capabilities,
    Decision,
    Launch,
)
from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_kernel import NAMES, kernels_of
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.core.rows import MOST_CARRIED, RowsShape
from portakv.runtime.cuda import CudaDriver
from portakv_conformance.vendor.hip_emulated import SHIM

THREADS = 128
CPU = torch.device("cpu")
#: Of the argument, as the core packs it, up to its tables.
ARGUMENT_BYTES = 440
#: Further flags for g++, from the environment: a process under a sanitizer sets them.
FLAGS = "PORTAKV_TEST_GXX_FLAGS"
# `offsetof` of a class with a base is supported by g++, with a warning; and it does
# not see that an address is used only where both numbers were found.
_STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-invalid-offsetof", "-Wno-maybe-uninitialized"]
#: cuLaunchKernel, of which the list of parameters is read.
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
HOST_PLACES = frozenset((a, b) for a in ("pageable", "pinned") for b in ("pageable", "pinned"))
_HEAD = f'#include "{SHIM}"\n#include "{Path(__file__).with_name("cuda_on_cpu.h")}"\n'
# After the text: the grid, what the compiler makes of the argument, and where it prefetched.
_ENTRIES = f"""
extern "C" void run_kernel(
    const void* argument, unsigned each, unsigned blocks, unsigned planes, unsigned threads) {{
    touches = 0;
    run_grid<Argument>(each == 2 ? {NAMES[2]} : {NAMES[1]}, argument, blocks, planes, threads);
}}
extern "C" unsigned argument_bytes() {{ return sizeof(Argument); }}
extern "C" unsigned dst_table_at() {{ return offsetof(Argument, dst_table); }}
extern "C" unsigned prefetched(const void** into) {{
    for (unsigned n = 0; n < touches; ++n) into[n] = touched[n];
    return touches;
}}
"""


def argument_bytes(shape: RowsShape) -> int:
    """Return the bytes of a kernel's argument, with both sides' tables and the ids that travel
    with a launch."""
    plain = ARGUMENT_BYTES + 8 * sum(max(1, side.entries) for side in (shape.src, shape.dst))
    carried = min((4096 - plain) // 4, MOST_CARRIED)
    if not (shape.src.ids or shape.dst.ids):
        carried = 2
    return -(-(plain + 4 * carried) // 8) * 8


def why_not() -> str | None:
    """Return the reason why the kernel cannot be compiled here, or None."""
    return None if shutil.which("g++") else "g++ is not installed: the kernel cannot be compiled"


@cache
def compiled(source: str, entries: str = _ENTRIES) -> ctypes.CDLL:
    """Return a kernel's text and its entries as a loaded library; each is compiled once in a
    process."""
    with tempfile.TemporaryDirectory(prefix="cuda-on-cpu-") as folder:
        path = Path(folder, "kernel.cpp")
        library = Path(folder, "kernel.so")
        text = source.replace("(void)address;", "touch(address);").replace("#pragma once", "")
        path.write_text(_HEAD + text + entries)
        flags = [*_STRICT, *os.environ.get(FLAGS, "").split()]
        # Optimised, a kernel takes longer to compile than its few launches take to run.
        command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", *flags, str(path)]
        environment = {**os.environ, "LD_PRELOAD": ""}  # a sanitizer's runtime is not for g++
        done = subprocess.run(
            [*command, "-o", str(library)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))


class CudaOnCpu(Backend):
    """The CUDA kernel on the host."""

    name = "cuda-on-cpu"
    #: The driver of a launch.
    driver: type[HostDriver]

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        why = why_not()
        if device.type != "cpu":
            why = f"it runs on the host, not on {device}"
        return Decision(cls.name, why is None, why or "g++ compiles the kernel")

    def capabilities(self) -> Capabilities:
        return Capabilities(places=HOST_PLACES, skips_negative=True, guards=True)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._driver = self.driver()
        self._loaded = LoadedKernels(self._driver, lambda: False)
        self.row_kernels = RowKernels(self._driver, device, self.name)
        self._table = self.row_kernels.table

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = kernels_of(plan)
        self._loaded.add_to(self._table, kernels)
        functions = self._loaded.functions(kernels)
        for kernel, function in zip(kernels, functions, strict=True):
            entry: Any = function[1]
            library, _ = entry
            sources = max(1, kernel.shape.src.entries)
            assert library.dst_table_at() == ARGUMENT_BYTES + 8 * sources
            assert library.argument_bytes() == argument_bytes(kernel.shape)
        return _Launch(plan, kernels, self._table, self._driver, self.device)


class _Launch(RowsLaunch):
    """Tells its driver where a prefetch may be: one of a wrong address does a device no harm."""

    def __call__(self, src: KVView, *rest: Any, **named: Any) -> None:
        assert isinstance(self._driver, HostDriver)
        self._driver.readable = src.spans
        try:
            super().__call__(src, *rest, **named)
        finally:
            self._driver.readable = None


class HostDriver(CudaDriver):
    """A driver of the host: work is done when a launch returns."""

    def __init__(self) -> None:
        #: The memory where a prefetch may be; None: of a launch of the core, anywhere.
        self.readable: Sequence[tuple[int, int]] | None = None
        self._functions = list[Any]()
        self._failures = list[BaseException]()
        self._entry = LAUNCH(self._launch)
        self.entry = ctypes.cast(self._entry, ctypes.c_void_p).value or 0

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        assert source.count("(void)address;") == 1, "where the kernel prefetches was not found"
        numbers = {name: each for each, name in NAMES.items()}
        return {name: (compiled(source), numbers[name]) for name in names}

    def number(self, stream: torch.Stream | None) -> int:
        assert stream is None, "the host has no streams"
        return 0

    def address(self, function: Any) -> int:
        self._functions.append(function)
        return len(self._functions)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def _launch(self, handle: int, *rest: Any) -> int:
        """Call `run`, and keep what it raises: the core is in between."""
        try:
            self.run(self._functions[handle - 1], *rest)
        except BaseException as failure:
            self._failures.append(failure)
            return 1
        return 0

    def run(
        self, function: Any, blocks: int, planes: int, _z: int, threads: int, *rest: Any
    ) -> None:
        library, each = function
        argument = rest[-2][0]
        library.run_kernel(ctypes.c_void_p(argument), each, blocks, planes, threads)
        if self.readable is None:
            return
        into = (ctypes.c_void_p * (1 << 12))()
        for address in into[: library.prefetched(into)]:
            inside = any(first <= (address or 0) < past for first, past in self.readable)
            assert inside, "prefetched elsewhere"

    def refuse(self, error: int, what: str) -> NoReturn:
        raise self._failures.pop()

    def word(self, address: int) -> int:
        return address


CudaOnCpu.driver = HostDriver
