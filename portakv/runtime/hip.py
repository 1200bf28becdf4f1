# SPDX-License-Identifier: Apache-2.0
"""HIP, for devices of AMD and Hygon: compile through hipRTC, and load and launch kernels.

The libraries are called through ctypes. Only functions are used whose arguments are the same in
every HIP since 4.2. Structures such as the device's properties differ between AMD's runtime and
Hygon's (hashcat/hashcat pull request 4758). Torch, which was built for the installed runtime,
therefore provides their values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from portakv.runtime import kernel_cache
from portakv.runtime.cuda import KernelDriver, refused

# AMD's runtime, and the runtime of Hygon's DTK (the same pull request).
_RUNTIMES = ("amdhip64", "galaxyhip")
# A separate library in newer releases; in HIP 5.2 a part of the runtime.
_COMPILER = "hiprtc"
_MAJORS = ("", ".7", ".6", ".5")
_INSTALL = "install ROCm for an AMD device, or load the environment of the DTK for a Hygon DCU"

#: Types of ctypes, which have no common public base.
CTypes: TypeAlias = tuple[Any, ...]

_pointer = ctypes.c_void_p
_size = ctypes.POINTER(ctypes.c_size_t)
_text = ctypes.c_char_p
_number = ctypes.POINTER(ctypes.c_int)
_handle = ctypes.POINTER(ctypes.c_void_p)
_texts = ctypes.POINTER(ctypes.c_char_p)

#: The functions of the runtime, with their arguments; each returns an error (hip_runtime_api.h).
RUNTIME: dict[str, CTypes] = {
    "hipGetDeviceCount": (_number,),
    "hipRuntimeGetVersion": (_number,),
    "hipModuleLoadData": (_handle, _pointer),
    "hipModuleGetFunction": (_handle, _pointer, _text),
    "hipModuleLaunchKernel": (_pointer, *[ctypes.c_uint] * 7, _pointer, _pointer, _pointer),
    "hipHostGetDevicePointer": (_handle, _pointer, ctypes.c_uint),
}
#: The functions of hipRTC, with their arguments (hiprtc.h).
COMPILER: dict[str, CTypes] = {
    "hiprtcVersion": (_number, _number),
    "hiprtcCreateProgram": (_handle, _text, _text, ctypes.c_int, _texts, _texts),
    "hiprtcCompileProgram": (_pointer, ctypes.c_int, _texts),
    "hiprtcGetProgramLogSize": (_pointer, _size),
    "hiprtcGetProgramLog": (_pointer, _pointer),
    "hiprtcGetCodeSize": (_pointer, _size),
    "hiprtcGetCode": (_pointer, _pointer),
    "hiprtcDestroyProgram": (_handle,),
}
_NAMES = ("hipGetErrorName", "hipGetErrorString"), ("hiprtcGetErrorString",)


class DriverMissing(Exception):
    """The libraries of HIP cannot be used; the text is a clause with the reason and a remedy."""


class Driver(NamedTuple):
    """The two libraries, which may be one library.

    They are never closed: the DTK's library crashes at exit after it was closed (the pull request
    above).
    """

    runtime: ctypes.CDLL
    compiler: ctypes.CDLL

    def check(self, error: int, what: str) -> None:
        """Raise `TransferError` if a function of the runtime returned an error."""
        if error:
            raise refused(self.error(error), what, "HIP")

    def error(self, error: int) -> str:
        """Describe an error of the runtime by its name, its number and its text."""
        name: str = self.runtime.hipGetErrorName(error).decode()
        text: str = self.runtime.hipGetErrorString(error).decode()
        return f"{name} ({error})" + (f", {text}" if text != name else "")

    def check_compiler(self, error: int, what: str) -> None:
        """Raise `RuntimeError` if a function of the compiler returned an error."""
        if error:
            raise RuntimeError(f"{what} of hipRTC failed: {self.compiler_error(error)}")

    def compiler_error(self, error: int) -> str:
        """Describe an error of the compiler by its text and its number."""
        return f"{self.compiler.hiprtcGetErrorString(error).decode()} ({error})"

    def number(self, function: str) -> int:
        """Return the number that a function writes; raise `RuntimeError` if it fails."""
        value = ctypes.c_int()
        error = getattr(self.runtime, function)(ctypes.byref(value))
        if error:
            raise RuntimeError(f"{function} failed: {self.error(error)}")
        return value.value


@cache
def driver() -> Driver:
    """Return the libraries of this process, preferably those that torch has loaded.

    Raises:
        DriverMissing: a library was not found, or lacks a function.
    """
    runtime = _open([place for stem in _RUNTIMES for place in places(stem)], "the HIP runtime")
    try:
        compiler = _open([*places(_COMPILER, Path(runtime._name).parent)], "hipRTC")
    except DriverMissing:
        if not hasattr(runtime, "hiprtcCompileProgram"):
            raise
        compiler = runtime
    return bound(runtime, compiler)


def bound(runtime: ctypes.CDLL, compiler: ctypes.CDLL) -> Driver:
    """Return a driver of two open libraries, with the arguments of each function declared.

    Raises:
        DriverMissing: a library lacks a function.
    """
    for library, table, names in zip((runtime, compiler), (RUNTIME, COMPILER), _NAMES, strict=True):
        for name in (*table, *names):
            try:
                function = getattr(library, name)
            except AttributeError:
                why = f"{library._name} has no function {name}; this HIP is not supported"
                raise DriverMissing(why) from None
            function.argtypes = table.get(name, (ctypes.c_int,))
            function.restype = ctypes.c_int if name in table else ctypes.c_char_p
    return Driver(runtime, compiler)


def _open(places: list[str], what: str) -> ctypes.CDLL:
    why = ""
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError as error:
            why = why or str(error)
    raise DriverMissing(f"{what} cannot be loaded ({why}); {_INSTALL}")


def places(stem: str, near: Path | None = None) -> Iterator[str]:
    """Yield paths that a library may have, best first: two copies of a runtime must not be loaded.

    ``near`` is the folder of a library that it belongs to.
    """
    name = f"lib{stem}.so"
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line[line.find("/") :].rstrip("\n") for line in maps if "/" in line}
        yield from sorted(path for path in paths if Path(path).name.startswith(name))
    for folder in (near, Path(torch.__file__).parent / "lib"):
        if folder is not None and folder.is_absolute():
            yield from map(str, sorted(folder.glob(f"{name}*")))
    yield from (f"{name}{major}" for major in _MAJORS)


# --- compiling ------------------------------------------------------------------------------------

FLAGS = ("-std=c++17", "-O3")


def hiprtc_version(driver: Driver) -> str:
    """Return the versions of hipRTC and of its runtime, which decide the compiled code.

    Raises:
        RuntimeError: a version is not reported.
    """
    major = ctypes.c_int()
    minor = ctypes.c_int()
    error = driver.compiler.hiprtcVersion(ctypes.byref(major), ctypes.byref(minor))
    driver.check_compiler(error, "Reading the version")
    runtime = driver.number("hipRuntimeGetVersion")  # hipRTC 5.2 calls itself 9.0
    return f"{major.value}.{minor.value} of HIP {hip_release(runtime)}"


def hip_release(number: int) -> str:
    """Format a version number (``HIP_VERSION`` of HIP's headers) as releases are written."""
    return f"{number // 10_000_000}.{number // 100_000 % 100}.{number % 100_000}"


def compile_kernel(driver: Driver, source: str, architecture: str) -> bytes:
    """Return the code object of a source text, cached on disk.

    Args:
        architecture: of the device, such as ``gfx90a:xnack-``.

    Raises:
        RuntimeError: the compilation failed, with hipRTC's log.
    """
    key = _cache_key(driver, source, architecture)
    return kernel_cache.cached(key, lambda: compile_text(driver, source, architecture))


def compiled_before(driver: Driver, source: str, architecture: str) -> bool:
    """Return True if the cache on disk has the code object of a text for an architecture."""
    return kernel_cache.holds(_cache_key(driver, source, architecture))


def _cache_key(driver: Driver, source: str, architecture: str) -> tuple[str, ...]:
    return source, " ".join(FLAGS), architecture, f"hipRTC {hiprtc_version(driver)}"


def compile_text(driver: Driver, source: str, architecture: str) -> bytes:
    """Return the code object of a source text for an architecture, without the cache."""
    rtc = driver.compiler
    program = ctypes.c_void_p()
    name = b"portakv_rows.hip"
    error = rtc.hiprtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None)
    driver.check_compiler(error, "Creating a program")
    try:
        options = [flag.encode() for flag in (*FLAGS, f"--offload-arch={architecture}")]
        listed = (ctypes.c_char_p * len(options))(*options)
        error = rtc.hiprtcCompileProgram(program, len(options), listed)
        if error:
            log = _read(driver, program, rtc.hiprtcGetProgramLogSize, rtc.hiprtcGetProgramLog)
            text = log.decode(errors="replace").strip("\0 \n") or driver.compiler_error(error)
            raise RuntimeError(f"hipRTC refused the kernel for {architecture}:\n{text}")
        return _read(driver, program, rtc.hiprtcGetCodeSize, rtc.hiprtcGetCode)
    finally:
        rtc.hiprtcDestroyProgram(ctypes.byref(program))


def _read(
    driver: Driver,
    program: ctypes.c_void_p,
    get_size: Callable[..., int],
    read: Callable[..., int],
) -> bytes:
    """Return a result of hipRTC for a program."""
    size = ctypes.c_size_t()
    driver.check_compiler(get_size(program, ctypes.byref(size)), "Reading the size of a result")
    result = ctypes.create_string_buffer(size.value or 1)
    if size.value:
        driver.check_compiler(read(program, result), "Reading a result")
    return result.raw[: size.value]


# --- devices --------------------------------------------------------------------------------------

# Architectures that only Hygon makes; its Z100 is a gfx906, as some of AMD's devices are.
_HYGON = frozenset({"gfx926", "gfx928", "gfx936", "gfx938"})
_HYGON_NAMES = ("hygon", "dcu", "z100", "k100", "k500", "bw1000", "bw500")


class Card(KernelDriver):
    """One device of AMD or Hygon.

    Attributes:
        architecture: the target of hipRTC, such as ``gfx90a:sramecc+:xnack-``.
        name: the model's name.

    Raises:
        RuntimeError: torch does not report the architecture.
    """

    platform = "HIP"
    named = "HIP"
    on_launch = "hipModuleLaunchKernel"
    on_events = (
        "hipEventCreateWithFlags",
        "hipEventRecord",
        "hipEventQuery",
        "hipEventSynchronize",
        "hipStreamWaitEvent",
    )
    on_streams = ("hipGetDevice", "hipStreamIsCapturing")

    def __init__(self, device: torch.device, driver: Driver) -> None:
        super().__init__(device)
        self._driver = driver
        self.name, self.architecture = self._facts()
        if not self.architecture.startswith("gfx"):
            raise RuntimeError(
                f"Expected an architecture of {device} such as gfx906 from torch, got "
                f"{self.architecture!r}; use a newer torch for ROCm"
            )
        # A runtime need not copy a module's code, so that the code is retained here.
        self._loaded: list[tuple[ctypes.c_void_p, bytes]] = []

    @property
    def library(self) -> ctypes.CDLL:
        """The runtime."""
        return self._driver.runtime

    def _facts(self) -> tuple[str, str]:
        facts = torch.cuda.get_device_properties(self.device)
        return str(facts.name), str(getattr(facts, "gcnArchName", ""))

    def __str__(self) -> str:
        kind = self.architecture.partition(":")[0]
        hygon = kind in _HYGON or any(word in self.name.lower() for word in _HYGON_NAMES)
        return f"{kind} ({self.name or 'unnamed'}{', a Hygon DCU' if hygon else ''})"

    def load(self, source: str, names: Iterable[str]) -> dict[str, object]:
        """Compile a source text, or read it from disk, and load its kernels.

        Raises as `compile_kernel` and `check` do.
        """
        binary = compile_kernel(self._driver, source, self.architecture)
        module = ctypes.c_void_p()
        functions: dict[str, object] = {}
        runtime = self._driver.runtime
        with self.current():
            error = runtime.hipModuleLoadData(ctypes.byref(module), binary)
            self._driver.check(error, "Loading the kernel")
            for name in names:
                function = ctypes.c_void_p()
                functions[name] = function
                error = runtime.hipModuleGetFunction(ctypes.byref(function), module, name.encode())
                self._driver.check(error, "Finding the kernel")
        self._loaded.append((module, binary))
        return functions

    def address(self, function: Any) -> int:
        """Return a kernel's handle as a number."""
        return int(function.value)

    def describe(self, error: int) -> str:
        """Describe an error of the runtime."""
        return self._driver.error(error)

    def word(self, address: int) -> int:
        """Return the device's address of pinned memory, which differs for registered memory."""
        pointer = ctypes.c_void_p()
        error = self._driver.runtime.hipHostGetDevicePointer(ctypes.byref(pointer), address, 0)
        self._driver.check(error, "Finding the status word")
        return pointer.value or 0
