# SPDX-License-Identifier: Apache-2.0
"""Building the simulated device: once for each source, torch and compiler, then kept on disk."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from portakv.errors import BackendUnavailable
from portakv.runtime import kernel_cache
from portakv_conformance.vendor import cpp

_SOURCES = [
    Path(__file__).with_name(n) for n in ("device.cpp", "operators.h", "memory.h", "jobs.h")
]
_COMPILERS = ("g++", "clang++", "c++")


class SimulatedDeviceError(BackendUnavailable):
    """The simulated device cannot be had; the message is a sentence that says why."""


def missing() -> str | None:
    """Return a sentence on what the build needs and this machine does not have; None if it
    has all."""
    if platform.system() != "Linux":
        return f"The simulated device needs Linux; this is {platform.system()}."
    if cpp.compiler(*_COMPILERS) is None:
        named = os.environ.get("CXX")
        requested = f"CXX={named}" if named else "any of " + ", ".join(_COMPILERS)
        return (
            f"The simulated device is compiled when it is first used, but there is no C++ compiler "
            f"({requested} was looked for). Install one (Debian: apt install g++), or set CXX."
        )
    return None


def load_library() -> None:
    """Load the device's library into this process, after building it where no process did before.

    Raises:
        SimulatedDeviceError: no compiler, or it failed.
    """
    ctypes.CDLL(cpp.in_memory("portakv_simdev", library()))


def library() -> bytes:
    """Return the device's library, built unless a process with this source, torch and compiler
    built it before. The compiler has no limit of time.

    Raises:
        SimulatedDeviceError: no compiler, or it failed.
    """
    compiler = cpp.compiler(*_COMPILERS)
    if (why := missing()) or compiler is None:
        raise SimulatedDeviceError(str(why))
    package = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    command = [
        compiler,
        str(_SOURCES[0]),
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-I{package / 'include'}",
        f"-I{package / 'include/torch/csrc/api/include'}",
        f"-L{package / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    key = [*(source.read_text(encoding="utf-8") for source in _SOURCES), torch.__version__]
    try:
        with one_builder():
            return cpp.built(command, [*key, sys.version])
    except cpp.CompilerError as error:
        raise SimulatedDeviceError(
            f"Expected {compiler} to compile the simulated device, got an error ({error}). Install "
            f"a compiler with C++20 (GCC 11 or newer) and the headers of torch. The command was: "
            f"{' '.join(command)}"
        ) from error


@contextmanager
def one_builder() -> Iterator[None]:
    """Let one process build while the others wait for its result. The lock ends with its process.
    Without a folder for the lock each process builds."""
    folder = kernel_cache.directory()
    handle = None
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / "simdev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # also for a process that was forked meanwhile and has it too
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
