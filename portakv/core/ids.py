# SPDX-License-Identifier: Apache-2.0
"""Call the core about lists of ids in host memory, for `view.index`.

A call packs one struct of `native/core/core.h` into bytes and passes its address. Ctypes takes
0.1 us for one pointer and 0.7 us for ten numbers. The calls are so short that they hold the
interpreter: to get it back may take milliseconds if other threads run.
"""

from __future__ import annotations

import ctypes
from functools import cache
from struct import Struct
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .library import function

_INT64 = np.dtype(np.int64)
#: Codes of `check`. Below 0: a sentence is due.
CLEAN = 0
NEGATIVE = 1
PAST = -30
TWICE = -31
_NO_MEMORY = -2

_pack_list = Struct("@PPq").pack
_pack_check = Struct("@P9q").pack
_pack_written = Struct("@P8q").pack
_pack_last = Struct("@P7q").pack


class Fault(NamedTuple):
    """What is wrong with ids, as `portakv_ids_fault` in `core.h` documents it."""

    position: int
    slot: int
    id: int
    times: int
    past_place: int
    past_id: int
    first_place: int
    again_place: int
    again_id: int


_Fault = ctypes.c_int64 * len(Fault._fields)


def read_list(ids: list[Any]) -> tuple[torch.Tensor, npt.NDArray[np.int64]] | None:
    """Return the integers of a list as an int64 array, and as a tensor of the same memory.

    None: an item has another type than int, or more than 64 bits.
    """
    number = len(ids)
    array = np.empty(number, _INT64)
    tensor = torch.from_numpy(array)
    # The identity of an object of CPython is its address, and the caller holds the list.
    code = _functions().read_list(_pack_list(id(ids), tensor.data_ptr(), number))
    return None if code else (tensor, array)


def check(
    ids: torch.Tensor,
    step: int,
    offset: int,
    count: int,
    slots: int,
    distinct: bool,
    found: int = 0,
) -> int:
    """Check the ids that ``count`` positions use in a view of ``slots`` slots; return a code.

    Args:
        ids: int32 or int64 on the host, with any stride.
        step, offset: as for an `Index`.
        distinct: no slot may occur twice.
        found: where the core writes a fault; 0: nowhere.
    """
    width = ids.itemsize
    (stride,) = ids.stride()
    pitch = stride * width
    # As `_listed`, which would take a quarter longer.
    words = _pack_check(
        ids.data_ptr(), width, pitch, ids.numel(), step, offset, count, slots, distinct, found
    )
    code: int = _functions().check(words)
    if code == _NO_MEMORY:
        raise MemoryError
    return code


def fault(
    ids: torch.Tensor, step: int, offset: int, count: int, slots: int, distinct: bool
) -> Fault:
    """Return what is wrong with ids for which `check` returned `PAST` or `TWICE`."""
    found = _Fault()
    check(ids, step, offset, count, slots, distinct, ctypes.addressof(found))
    return Fault(*found)


def slots(
    ids: torch.Tensor, step: int, offset: int, count: int, every: int
) -> npt.NDArray[np.int64]:
    """Return the slots of ``count`` positions, or of each ``every``-th; -1 for negative ids.

    Raises:
        IndexError: the ids do not cover the positions.
    """
    number = -(-count // every)
    out = np.empty(number, np.int64)
    if number:
        words = _pack_written(*_listed(ids), step, offset, count, every, _address(out))
        if _functions().slots(words) < number:
            raise IndexError(f"{ids.numel()} ids do not cover {count} positions from {offset} on")
    return out


def without_repeats(ids: torch.Tensor) -> npt.NDArray[np.int64] | None:
    """Return ids on the host with -1 for each that a later one equals; None: no id occurs twice."""
    number = ids.numel()
    listed = *_listed(ids), 1, 0, number
    replaced = _functions().last(_pack_last(*listed, 0))
    if replaced == _NO_MEMORY:
        raise MemoryError
    if not replaced:
        return None
    out = np.empty(number, np.int64)
    _functions().last(_pack_last(*listed, _address(out)))
    return out


def _listed(ids: torch.Tensor) -> tuple[int, int, int, int]:
    """Return a list as the core reads it: its address, its width, its stride and its length."""
    width = ids.itemsize
    (stride,) = ids.stride()
    return ids.data_ptr(), width, stride * width, ids.numel()


def _address(array: npt.NDArray[np.int64]) -> int:
    """Return the address of an array that is not empty, in a quarter of the time that numpy takes
    to return it."""
    return ctypes.addressof(ctypes.c_int64.from_buffer(array.data))


@cache
def _functions() -> SimpleNamespace:
    """Return the functions."""
    return SimpleNamespace(
        read_list=function("ids_read_list", ctypes.c_int, ctypes.c_void_p),
        check=function("ids_check", ctypes.c_int, ctypes.c_void_p),
        slots=function("ids_slots", ctypes.c_int64, ctypes.c_void_p),
        last=function("ids_last", ctypes.c_int64, ctypes.c_void_p),
    )
