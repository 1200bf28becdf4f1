# SPDX-License-Identifier: Apache-2.0
"""The fake HIP driver: ``hip_fake.cpp``, built by g++ when it is asked for. EMULATED."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import zlib
from functools import cache
from pathlib import Path

from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.hip import Driver, DriverMissing, bound

EMULATED = True
#: What makes a kernel's text a C++ program.
SHIM = Path(__file__).with_name("kernel_on_cpu.h")
_SOURCE = SHIM.with_name("hip_fake.cpp")
_FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compiler() -> str | None:
    """The C++ compiler that builds the library and then the kernels; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def library() -> ctypes.CDLL:
    """The fake runtime, which is also the fake hipRTC; `DriverMissing` as `built` raises."""
    # Without a name on disk, and open for good, as the simulated device is loaded.
    handle = os.memfd_create("portakv_hip_fake")
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(built())
        file.flush()
        return ctypes.CDLL(f"/proc/self/fd/{handle}")


@cache
def built() -> bytes:
    """The library as a file holds it, kept on disk.

    Raises:
        DriverMissing: there is no compiler, or it failed.
    """
    found = compiler()
    if found is None:
        raise DriverMissing("the fake HIP driver needs g++ (Debian: apt install g++), or set CXX")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    named = [f"-DPORTAKV_FAKE_PATCH={patch()}"]
    named += [
        f'-D{name}="{path}"' for name, path in (("PORTAKV_SHIM", SHIM), ("PORTAKV_CXX", found))
    ]
    key = ("hip_fake", *named, *_FLAGS, told.stdout)
    return _kernel_cache.cached(key, lambda: _build([found, *_FLAGS, *named]))


@cache
def fake_driver() -> Driver:
    """The fake libraries as `hip` calls them; `DriverMissing` as `library` raises."""
    return bound(library(), library())


def patch() -> int:
    """The last part of its version: kernels are kept on disk by it, apart from those of any real
    HIP and from those of other sources than these."""
    return zlib.crc32(_SOURCE.read_bytes() + SHIM.read_bytes()) % 100_000


def _build(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="portakv-hip-fake-") as folder:
        target = Path(folder) / "hip_fake.so"
        done = subprocess.run(
            [*command, str(_SOURCE), "-o", str(target), "-ldl"], capture_output=True, text=True
        )
        if done.returncode:
            raise DriverMissing(f"the fake HIP driver does not compile:\n{done.stderr.strip()}")
        return target.read_bytes()
