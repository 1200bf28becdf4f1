# SPDX-License-Identifier: Apache-2.0
"""Building the simulated device: once for each source, torch and compiler, then kept on disk."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from portakv.errors import BackendUnavailable
from portakv.runtime import kernel_cache as _kernel_cache

_HERE = Path(__file__).parent
_MAIN = "device.cpp"
_SOURCES = (_MAIN, "operators.h", "memory.h", "jobs.h")
_COMPILERS = ("g++", "clang++", "c++")
_SECONDS = 600


class SimulatedDeviceError(BackendUnavailable):
    """The simulated device cannot be had; the message is a sentence that says why."""


def missing() -> str | None:
    """What the build needs and this machine has not, as a sentence; None where nothing is."""
    if platform.system() != "Linux":
        return f"The simulated device needs Linux; this is {platform.system()}."
    if _compiler() is None:
        named = os.environ.get("CXX")
        asked = f"CXX={named}" if named else "any of " + ", ".join(_COMPILERS)
        return (
            f"The simulated device is compiled when it is first used, but there is no C++ compiler "
            f"({asked} was looked for). Install one (Debian: apt install g++), or set CXX."
        )
    return None


def load_library() -> None:
    """Load the device's library into this process, after building it where nobody did before.

    Raises:
        SimulatedDeviceError: no compiler, or it failed.
    """
    why = missing()
    if why is not None:
        raise SimulatedDeviceError(why)
    compiler = _compiler()
    assert compiler is not None
    parts = _key(compiler)
    with _one_builder():
        library = _kernel_cache.cached(parts, lambda: _build(compiler))
    # Without a name on disk: nobody can put another library in its place between check and load.
    # It stays open: the loader takes a name that comes again for the library that it had.
    handle = os.memfd_create("portakv_simdev")
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(library)
        file.flush()
        ctypes.CDLL(f"/proc/self/fd/{handle}")


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)


def _key(compiler: str) -> tuple[str, ...]:
    told = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    sources = [(_HERE / name).read_text(encoding="utf-8") for name in _SOURCES]
    return ("simdev", *sources, *_flags(), torch.__version__, told.stdout, sys.version)


def _flags() -> list[str]:
    home = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        "-std=c++20", "-O1", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}",
        f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip


def _build(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="portakv-simdev-") as folder:
        target = Path(folder, "simdev.so")
        command = [compiler, str(_HERE / _MAIN), "-o", str(target), *_flags()]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SimulatedDeviceError(
                f"The simulated device could not be compiled with {compiler}: {error}."
            ) from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no output"]
            raise SimulatedDeviceError(
                f"{compiler} failed to compile the simulated device ({lines[0].strip()}); it needs "
                f"C++20 (GCC 11 or newer) and the headers that torch brings. The command was: "
                f"{' '.join(command)}"
            )
        return target.read_bytes()


@contextmanager
def _one_builder() -> Iterator[None]:
    """Let one process build while the others wait for its result; without a folder each builds."""
    folder = _kernel_cache.directory()
    handle = None
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / "simdev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
