# SPDX-License-Identifier: Apache-2.0
"""The library of CUDA's driver as it is, which comes with the driver and needs no extra."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

LIBRARY = "libcuda.so.1"


@cache
def library() -> Any:
    """The loaded library; raises `OSError` where there is none."""
    return ctypes.CDLL(LIBRARY)


def function(library: Any, name: str, *arguments: Any) -> Any:
    """A function that returns an error's number; raises `AttributeError` where it is not there."""
    found = library[name]  # an object of its own: nobody else's declarations
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found


def error_name(error: int, library: Any) -> str:
    """What the driver calls an error."""
    called = ctypes.c_char_p()
    try:
        name = function(library, "cuGetErrorName", ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
    except AttributeError:
        return f"error {error}"
    if name(error, ctypes.byref(called)) or not called.value:
        return f"error {error}"
    return called.value.decode()
