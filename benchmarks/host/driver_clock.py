# SPDX-License-Identifier: Apache-2.0
"""Tell how much of a call's host time the driver's own submissions take."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from portakv.core import library, link
from portakv.runtime import cuda

_SOURCE = Path(__file__).resolve().parents[2] / "native" / "clock" / "driver_clock.cpp"
#: What submits work. Questions about streams are not timed.
SUBMISSIONS = (
    "cuMemcpyAsync",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyBatchAsync_v2",
    "cuMemcpyBatchAsync",
    "cuLaunchKernel",
    "cuEventRecord",
    "cuStreamWaitEvent",
)


class DriverClock:
    """Times functions of a driver. One thread calls them.

    Args:
        clock: the compiled clock.
        timed: the functions' names.
    """

    def __init__(self, clock: ctypes.CDLL, timed: Sequence[str] = SUBMISSIONS) -> None:
        self._clock = clock
        self._timed = timed
        clock.driver_clock_wrap.restype = ctypes.c_void_p
        clock.driver_clock_wrap.argtypes = (ctypes.c_void_p,)
        self._wrapped = dict[int, int]()

    def address(self, driver: ctypes.CDLL, name: str) -> int:
        """Return the address through which a function is called, timed or not."""
        address = library.address_in(driver, name)
        if name not in self._timed:
            return address
        if address not in self._wrapped:
            self._wrapped[address] = self._clock.driver_clock_wrap(address) or address
        return self._wrapped[address]

    def start(self) -> None:
        """Begin at zero."""
        self._clock.driver_clock_start()

    def stop(self) -> tuple[float, int]:
        """Return the microseconds of the calls since `start`, and their number."""
        spent = ctypes.c_int64()
        calls = ctypes.c_int64()
        self._clock.driver_clock_stop(ctypes.byref(spent), ctypes.byref(calls))
        return spent.value / 1e3, calls.value


def built() -> ctypes.CDLL | None:
    """Return the compiled clock; None: no compiler or no source is here."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not _SOURCE.exists():
        return None
    with TemporaryDirectory() as folder:  # a library that is loaded needs its file no more
        target = Path(folder) / "driver_clock.so"
        words = (compiler, "-std=c++17", "-O2", "-shared", "-fPIC", _SOURCE, "-o", target)
        if subprocess.run(words, check=False, capture_output=True).returncode:
            return None
        return ctypes.CDLL(str(target))


@cache
def driver_clock() -> DriverClock | None:
    """Return the clock of CUDA's driver in this process; None: it cannot be compiled here.

    The first call comes before the first copy of the process, when the core gets its functions.
    """
    compiled = built()
    if compiled is None:
        return None
    clock = DriverClock(compiled)
    for module in (link, cuda):
        module.address_in = clock.address  # type: ignore[attr-defined]
    return clock
