# SPDX-License-Identifier: Apache-2.0
"""Compiling for AMD and Hygon at run time: hipRTC, without a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.hip import Driver

FLAGS = ("-std=c++17", "-O3")


def hiprtc_version(driver: Driver) -> str:
    """The versions of hipRTC and of its runtime, which decide what it makes of a text.

    Raises:
        RuntimeError: one of them is not told.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    error = driver.compiler.hiprtcVersion(ctypes.byref(major), ctypes.byref(minor))
    _check(driver, error, "Asking for its version")
    runtime = driver.number("hipRuntimeGetVersion")  # hipRTC 5.2 calls itself 9.0
    return f"{major.value}.{minor.value} of HIP {hip_release(runtime)}"


def hip_release(number: int) -> str:
    """A version of HIP as a number, written as its releases are (``HIP_VERSION`` of its
    headers)."""
    return f"{number // 10_000_000}.{number // 100_000 % 100}.{number % 100_000}"


def compile_kernel(driver: Driver, source: str, architecture: str) -> bytes:
    """The code object of a text for an architecture such as ``gfx90a:xnack-``, kept on disk.

    Raises:
        RuntimeError: the text does not compile, with hipRTC's log.
    """
    key = _key(driver, source, architecture)
    return _kernel_cache.cached(key, lambda: _compile(driver, source, architecture))


def compiled_before(driver: Driver, source: str, architecture: str) -> bool:
    """True where the cache on disk holds the code object of a text for an architecture."""
    return _kernel_cache.holds(_key(driver, source, architecture))


def _key(driver: Driver, source: str, architecture: str) -> tuple[str, ...]:
    return source, " ".join(FLAGS), architecture, f"hipRTC {hiprtc_version(driver)}"


def _compile(driver: Driver, source: str, architecture: str) -> bytes:
    rtc, program = driver.compiler, ctypes.c_void_p()
    name = b"portakv_rows.hip"
    error = rtc.hiprtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None)
    _check(driver, error, "Creating a program")
    try:
        options = [flag.encode() for flag in (*FLAGS, f"--offload-arch={architecture}")]
        listed = (ctypes.c_char_p * len(options))(*options)
        error = rtc.hiprtcCompileProgram(program, len(options), listed)
        if error:
            log = _read(driver, program, rtc.hiprtcGetProgramLogSize, rtc.hiprtcGetProgramLog)
            told = log.decode(errors="replace").strip("\0 \n") or _named(driver, error)
            raise RuntimeError(f"hipRTC refused the kernel for {architecture}:\n{told}")
        return _read(driver, program, rtc.hiprtcGetCodeSize, rtc.hiprtcGetCode)
    finally:
        rtc.hiprtcDestroyProgram(ctypes.byref(program))


def _read(
    driver: Driver, program: Any, ask_size: Callable[..., int], read: Callable[..., int]
) -> bytes:
    """What hipRTC holds of a program."""
    size = ctypes.c_size_t()
    _check(driver, ask_size(program, ctypes.byref(size)), "Asking for the size of a result")
    result = ctypes.create_string_buffer(size.value or 1)
    if size.value:
        _check(driver, read(program, result), "Reading a result")
    return result.raw[: size.value]


def _check(driver: Driver, error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"{what} of hipRTC failed: {_named(driver, error)}")


def _named(driver: Driver, error: int) -> str:
    return f"{driver.compiler.hiprtcGetErrorString(error).decode()} ({error})"
