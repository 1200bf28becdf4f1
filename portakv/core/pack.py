# SPDX-License-Identifier: Apache-2.0
"""Call the core's launches of kernels that pack and unpack."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from ctypes import c_char_p, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from portakv.errors import PortaKVError

from .library import Opened, function
from .rows import SideShape, address_of, read_extents, read_side, words_of_nest


class PackShape(NamedTuple):
    """One nest of a plan as a kernel, as ``pack.h`` describes it."""

    planes: int
    run: int
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    src: SideShape
    dst: SideShape


def shape_of(plan: array[int], nest: int, options: array[int]) -> PackShape:
    """Return one nest of a plan as a kernel; see `portakv_pack_describe`.

    Args:
        plan: the words of the plan.
        options: the words of `RowsOptions`.

    Raises:
        Refused: the kernels' argument does not hold it; the values are its loops over planes and
            those inside a plane.
    """
    words = iter(words_of_nest(_functions().describe, plan, nest, options))
    return PackShape(
        next(words),
        next(words),
        read_extents(words),
        read_extents(words),
        read_side(words),
        read_side(words),
    )


class Packs(Opened):
    """The launches of a plan by its kernels, which any thread may call; see `portakv_pack_open`.

    Args:
        cuts: for each kernel the threads and the planes of a thread block.
        functions: for each kernel the driver's handle.
        launch: the address of the driver's function.
    """

    def __init__(
        self,
        plan: array[int],
        options: array[int],
        cuts: Iterable[int],
        functions: Iterable[int],
        launch: int,
    ) -> None:
        core = _functions()
        words = array("q", cuts)
        handles = array("q", functions)
        self._close = core.close
        self._run = core.run
        self.address = core.open(
            address_of(plan), address_of(options), address_of(words), address_of(handles), launch
        )
        if not self.address:
            raise PortaKVError(
                "Expected the plan of a copy that packs, and memory for its launches, got a "
                "refusal of the core. Free memory."
            )

    def run(
        self, src: bytes, dst: bytes, count: int, status: int, overflow: int, stream: int
    ) -> int:
        """Order a copy, and return 0, `UNITS` or the driver's error; see `portakv_pack_run`.

        ``src`` and ``dst`` are sides by `portakv.core.rows.pack_side`.
        """
        result: int = self._run(self.address, src, dst, count, status, overflow, stream)
        return result


@cache
def _functions() -> SimpleNamespace:
    """Return the functions. They wait, since a driver with a full queue blocks."""
    words = c_void_p, c_int64, c_void_p, c_void_p, c_int64
    copy = c_void_p, c_char_p, c_char_p, c_int64, c_uint64, c_uint64, c_void_p
    return SimpleNamespace(
        describe=function("pack_describe", c_int64, *words, waits=True),
        open=function("pack_open", c_void_p, *(c_void_p,) * 5, waits=True),
        close=function("pack_close", None, c_void_p, waits=True),
        run=function("pack_run", c_int, *copy, waits=True),
    )
