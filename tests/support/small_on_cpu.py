# SPDX-License-Identifier: Apache-2.0
"""The small copies' kernels compiled by g++ and launched on host tensors, through the same packing.

`installed` puts them in the place of the CUDA driver, for the device "cpu".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from portakv.host import _small_ways, small
from portakv.runtime import cuda as _cuda_driver
from support.small_cases import forget

CPU = torch.device("cpu")
MOST = 32736  # bytes that go by value
_STRICT = ("-Wall", "-Wextra", "-Werror")


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    return None if shutil.which("g++") else "g++ is not installed: the kernel cannot be compiled"


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels, each behind an entry that runs its grid."""
    head = files("portakv_conformance.vendor").joinpath("kernel_on_cpu.h").read_text()
    text = _small_ways.source(MOST)
    kinds = {_small_ways.MAPPED_NAME: "Mapped", _small_ways.VALUES_NAME: "Values"}
    entries = "".join(
        f'extern "C" void run_{name}(const void* argument, unsigned blocks, unsigned threads) {{\n'
        f"    run_grid<portakv::small::{kind}>({name}, argument, blocks, 1, threads);\n}}\n"
        f'extern "C" unsigned bytes_{name}() {{ return sizeof(portakv::small::{kind}); }}\n'
        for name, kind in kinds.items()
    )
    with tempfile.TemporaryDirectory(prefix="small-on-cpu-") as folder:
        path = Path(folder) / "small.cpp"
        path.write_text((head + text + entries).replace("#pragma once", ""))
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *_STRICT]
        target = path.with_suffix(".so")
        done = subprocess.run(
            [*command, str(path), "-o", str(target)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))


class Launcher:
    """Launches at once, and counts."""

    launches = 0

    def __init__(self, device: torch.device, threads: int) -> None:
        self._threads = threads

    def __call__(self, function: Any, blocks: int, address: int, stream: object) -> None:
        assert 1 <= blocks <= _small_ways.MOST_BLOCKS
        Launcher.launches += 1
        argument = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0]
        function(ctypes.c_void_p(argument), blocks, self._threads)


class Arguments(_cuda_driver.Arguments):
    """The same, without a context to adopt."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_cuda_driver, "adopt", lambda device: None)
            super().__init__(nbytes, device)


def _load(source: str, names: Iterable[str], device: torch.device) -> dict[str, Any]:
    return {name: getattr(library(), f"run_{name}") for name in names}


@contextmanager
def installed() -> Iterator[None]:
    """Inside, small copies to the CPU go by the kernels as on a CUDA device."""

    def why_not(way: str, device: torch.device, nbytes: int) -> str | None:
        if way == "inline":
            return "it is emulated on the CPU"
        return f"it is emulated up to {MOST} bytes" if way == "value" and nbytes > MOST else None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_cuda_driver, "driver_version", lambda: 13000)
        patched.setattr(_cuda_driver, "capability", lambda device: 90)
        patched.setattr(_cuda_driver, "load", _load)
        patched.setattr(_cuda_driver, "Launcher", Launcher)
        patched.setattr(_cuda_driver, "Arguments", Arguments)
        patched.setattr(small, "_why_not", why_not)
        forget()
        yield
    forget()
