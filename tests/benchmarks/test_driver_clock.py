# SPDX-License-Identifier: Apache-2.0
"""The clock of the driver's submissions passes calls on, and counts them while it runs."""

from __future__ import annotations

import ctypes
import ctypes.util
from ctypes import c_uint, c_void_p
from typing import Any, cast

import pytest

from portakv.core.library import address_in
from portakv_benchmarks.host.driver_clock import DriverClock, built


def clock_of(*names: str) -> DriverClock:
    compiled = built()
    if compiled is None:
        pytest.skip("needs a C++ compiler")
    return DriverClock(compiled, names)


def test_the_driver_s_part_of_a_call_is_counted_while_the_clock_runs() -> None:
    clock = clock_of("usleep")
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    address = clock.address(libc, "usleep")
    assert address != address_in(libc, "usleep")
    assert clock.address(libc, "usleep") == address
    assert clock.address(libc, "getpid") == address_in(libc, "getpid")
    sleep = ctypes.CFUNCTYPE(ctypes.c_int, c_uint)(address)

    assert sleep(1) == 0
    clock.start()
    assert (sleep(2000), sleep(0)) == (0, 0)
    spent, calls = clock.stop()
    assert calls == 2
    assert spent >= 2000  # as long as it slept
    assert sleep(1) == 0
    clock.start()
    assert clock.stop() == (0, 0)


def test_a_function_gets_eleven_arguments_and_its_result_is_returned() -> None:
    def launch(*arguments: int) -> int:
        seen.extend(arguments)
        return 719

    seen = list[int]()
    kernel = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, *[c_uint] * 7, *[c_void_p] * 3)
    driver = cast(Any, {"launch": kernel(launch)})
    address = clock_of("launch").address(driver, "launch")
    assert address != address_in(driver, "launch")
    words = 1 << 40, 2, 3, 4, 5, 6, 7, 8, 1 << 41, 1 << 42, 1 << 43
    assert kernel(address)(*words) == 719
    assert seen == list(words)
