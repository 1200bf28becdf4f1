# SPDX-License-Identifier: Apache-2.0
"""Load the compiled core, for the modules that call it.

`native/core/core.h` is the contract. Each module that calls the core declares the prototypes of
the functions that it uses.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from portakv.errors import PortaKVError

from .sources import hash_of

#: PORTAKV_CORE_ABI of the `core.h` that this package is written for.
ABI = 1
NAME = "libportakv_core.so"
HERE = Path(__file__).resolve().parent
#: The folder of a clone, or the folder of the installed packages.
ROOT = HERE.parent.parent
BUILD = "build_backend/compile_core.py"
_EMPTY = array("q", [0])


@cache
def library() -> ctypes.CDLL:
    """Return the core for functions that read no Python object; calls release the interpreter.

    Raises:
        PortaKVError: the library is missing, does not load, or was built from other sources.
    """
    return ctypes.CDLL(_checked())


@cache
def pylibrary() -> ctypes.PyDLL:
    """Return the core for functions that read Python objects; calls hold the interpreter.

    Raises:
        PortaKVError: the library is missing, does not load, or was built from other sources.
    """
    return ctypes.PyDLL(_checked())


@cache
def _checked() -> str:
    """Return the path of the library after `check`, which reads all sources of a clone, once."""
    path = HERE / NAME
    check(path, ROOT)
    return str(path)


def check(path: Path, root: Path) -> None:
    """Raise an error unless the library at ``path`` is built from the sources below ``root``.

    An installed release has no sources; only the version of the contract is compared there.

    Raises:
        PortaKVError: the library is missing, does not load, or was built from other sources.
    """
    clone = (root / BUILD).exists()
    remedy = "Install PortaKV again."
    if clone:
        remedy = f"Run `python {BUILD}` in {root}, then start Python again."
    if not path.exists():
        if clone:
            remedy += " To use an installed release, start Python in another folder."
        raise PortaKVError(f"Expected the compiled core at {path}, got no file. {remedy}")
    try:
        built = ctypes.CDLL(str(path))
        abi = int(built.portakv_core_abi())
        built.portakv_core_sources.restype = ctypes.c_char_p
        sources = built.portakv_core_sources().decode()
    except (OSError, AttributeError) as error:
        raise PortaKVError(
            f"Expected a compiled core that loads, got: {error}. {remedy}"
        ) from error
    if abi != ABI:
        raise PortaKVError(
            f"Expected version {ABI} of the compiled core's contract, got {abi}. {remedy}"
        )
    if clone and sources != hash_of(root / "native" / "core"):
        raise PortaKVError(
            f"Expected a compiled core of the sources in {root / 'native' / 'core'}, got an older "
            f"one. {remedy}"
        )


def function(name: str, result: Any, *arguments: Any, waits: bool = False) -> Callable[..., Any]:
    """Return a function of the core with its prototype, as a separate object.

    Args:
        name: the function's in `core.h`, after ``portakv_``.
        result, arguments: types of ctypes.
        waits: calls release the interpreter. Others are shorter than taking it back.
    """
    made = (library() if waits else pylibrary())[f"portakv_{name}"]
    made.argtypes = arguments
    made.restype = result
    return made


def address_in(library: ctypes.CDLL, name: str) -> int:
    """Return the address of a function; raise `AttributeError` if a library lacks it."""
    return ctypes.cast(library[name], ctypes.c_void_p).value or 0


def function_of_numbers(number: int, name: str, *arguments: Any) -> Callable[..., int]:
    """Return a function of the core that takes numbers and addresses, and returns a number.

    If the core found the interpreter, this is a function of Python, since ctypes takes longer to
    convert the arguments than such a function takes. Calls keep the interpreter: they are shorter
    than taking it back.

    Args:
        number: the function's in `portakv_python_function`.
        name, arguments: as for `function`.
    """
    if pylibrary().portakv_python_found():
        return python_function(number)
    return function(name, ctypes.c_int64, *arguments)


def written(write: Callable[..., int], room: int, *arguments: object) -> tuple[int, array[int]]:
    """Return the number of words that a function of the core writes, or its code, and the words.

    Args:
        write: takes the arguments, the address of words and their number. If it has more words, it
            returns how many, and is called again.
        room: words that most calls take.
    """
    while True:
        out = _EMPTY * room
        count = write(*arguments, out.buffer_info()[0], room)
        if count <= room:
            return count, out
        room = count


class Opened:
    """An object of the core at an address, which is closed with this object.

    Attributes:
        address: of the object; 0: there is none.
    """

    address: int = 0
    _close: Callable[[int], object]

    def __del__(self) -> None:
        if self.address:
            self._close(self.address)


def python_function(number: int) -> Callable[..., Any]:
    """Return a function of Python that the core makes; `portakv_python_function` lists them. The
    core has found the interpreter."""
    make = function("python_function", ctypes.py_object, ctypes.c_int64)
    return make(number)  # type: ignore[no-any-return]
