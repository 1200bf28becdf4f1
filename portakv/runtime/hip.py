# SPDX-License-Identifier: Apache-2.0
"""The HIP runtime and hipRTC by ctypes: which libraries, which of their functions, their errors.

Only functions whose arguments are alike in every HIP since 4.2: structures such as the device's
properties differ between AMD's runtime and Hygon's (hashcat/hashcat pull request 4758), so what
they tell is asked of torch, which was built for the one that is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# AMD's runtime, and that of Hygon's DTK (the same pull request).
_RUNTIMES = ("amdhip64", "galaxyhip")
# A library of its own in newer releases; in HIP 5.2 a part of the runtime.
_COMPILER = "hiprtc"
_MAJORS = ("", ".7", ".6", ".5")
_INSTALL = "install ROCm for an AMD device, or load the environment of the DTK for a Hygon DCU"

_pointer, _size, _text = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.c_char_p
_number, _handle = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p)
_texts = ctypes.POINTER(ctypes.c_char_p)

#: What is called of the runtime, with its arguments; each returns an error (hip_runtime_api.h).
RUNTIME: dict[str, tuple[Any, ...]] = {
    "hipGetDeviceCount": (_number,),
    "hipRuntimeGetVersion": (_number,),
    "hipModuleLoadData": (_handle, _pointer),
    "hipModuleGetFunction": (_handle, _pointer, _text),
    "hipModuleLaunchKernel": (_pointer, *[ctypes.c_uint] * 7, _pointer, _pointer, _pointer),
    "hipHostGetDevicePointer": (_handle, _pointer, ctypes.c_uint),
}
#: And of hipRTC (hiprtc.h).
COMPILER: dict[str, tuple[Any, ...]] = {
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
    """The libraries of HIP cannot be used; the text is a clause that says why and what to do."""


class Driver(NamedTuple):
    """The two libraries, which may be one. They are never closed: that of the DTK crashes at exit
    when it was (the pull request above)."""

    runtime: Any
    compiler: Any

    def check(self, error: int, what: str) -> None:
        """RuntimeError where a function of the runtime returned an error."""
        if error:
            raise RuntimeError(f"{what} failed: {self.error(error)}; the copy was not made.")

    def error(self, error: int) -> str:
        """An error of the runtime: its name, its number and what more is said of it."""
        name = self.runtime.hipGetErrorName(error).decode()
        told = self.runtime.hipGetErrorString(error).decode()
        return f"{name} ({error})" + (f", {told}" if told != name else "")

    def number(self, function: str) -> int:
        """What a function that tells one number tells; RuntimeError where it fails."""
        told = ctypes.c_int()
        self.check(getattr(self.runtime, function)(ctypes.byref(told)), function)
        return told.value


@cache
def driver() -> Driver:
    """The libraries of this process: those that torch has loaded, where it has.

    Raises:
        DriverMissing: no runtime or no hipRTC was found, or one lacks a function.
    """
    runtime = _open([place for stem in _RUNTIMES for place in _places(stem)], "the HIP runtime")
    try:
        compiler = _open([*_places(_COMPILER, Path(runtime._name).parent)], "hipRTC")
    except DriverMissing:
        if not hasattr(runtime, "hiprtcCompileProgram"):
            raise
        compiler = runtime
    return bound(runtime, compiler)


def bound(runtime: ctypes.CDLL, compiler: ctypes.CDLL) -> Driver:
    """A driver of two open libraries, each function with its arguments.

    Raises:
        DriverMissing: a function is not there.
    """
    for library, table, names in zip((runtime, compiler), (RUNTIME, COMPILER), _NAMES, strict=True):
        for name in (*table, *names):
            try:
                function = getattr(library, name)
            except AttributeError:
                why = f"{library._name} has no function {name}; it is not a HIP that is known here"
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


def _places(stem: str, beside: Path | None = None) -> Iterator[str]:
    """Where a library may be, best first: a process must not have two copies of a runtime.

    Args:
        stem: of its file's name.
        beside: the folder of a library that it belongs to.
    """
    name = f"lib{stem}.so"
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line[line.find("/") :].rstrip("\n") for line in maps if "/" in line}
        yield from sorted(path for path in paths if Path(path).name.startswith(name))
    for folder in (beside, Path(torch.__file__).parent / "lib"):
        if folder is not None and folder.is_absolute():
            yield from map(str, sorted(folder.glob(f"{name}*")))
    yield from (f"{name}{major}" for major in _MAJORS)
