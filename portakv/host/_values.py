# SPDX-License-Identifier: Apache-2.0
"""Integers and bytes of the host as the bytes of a tensor, packed into memory that is there."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError

# What `struct`, and numpy, call each dtype.
_CODES = {
    torch.bool: "B",  # "?" would take anything for true
    torch.uint8: "B",
    torch.int8: "b",
    torch.int16: "h",
    torch.uint16: "H",
    torch.int32: "i",
    torch.uint32: "I",
    torch.int64: "q",
    torch.uint64: "Q",
}
_NUMPY = {
    dtype: np.dtype(str(dtype).removeprefix("torch.")) for dtype in _CODES
}  # fmt: skip
_OF_NUMPY = {found: dtype for dtype, found in _NUMPY.items()}

Values = Any  # a sequence of integers, bytes, a numpy array, or a tensor on the host


def check_dtype(dtype: Any) -> None:
    """Raise `LayoutError` for anything but an integer dtype or bool."""
    if dtype not in _CODES:
        raise LayoutError(
            f"A small copy of {dtype} was asked; it carries integers and bytes: "
            f"{', '.join(str(one).removeprefix('torch.') for one in _CODES)}. For other elements "
            f"pass a tensor's bytes: tensor.view(torch.uint8)."
        )


def settle(values: Values) -> Values:
    """Values in a form that `pack` takes: bytes, a sequence or a numpy array.

    Raises:
        DeviceMismatch: a tensor that is not on the host.
        LayoutError: something that has no length, or elements that are no integers.
    """
    if type(values) is np.ndarray:
        return values
    if isinstance(values, torch.Tensor):
        if not values.is_cpu:
            raise DeviceMismatch(
                f"A small copy was asked of a tensor on {values.device}; expected values on the "
                f"host. Use copy_ for what is on a device."
            )
        check_dtype(values.dtype)
        return values.numpy()
    if isinstance(values, memoryview):
        return np.asarray(values)
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise LayoutError(
            f"A small copy was asked of a {type(values).__name__}; expected a list of integers, "
            f"bytes, an array, or a tensor on the host. Make a list of it first."
        )
    return values


def dtype_of(settled: Values) -> torch.dtype:
    """The dtype that values have by themselves: bytes uint8, an array its own, others int64.

    Raises:
        LayoutError: an array of anything but integers.
    """
    if isinstance(settled, (bytes, bytearray)):
        return torch.uint8
    if isinstance(settled, np.ndarray):
        own = settled.dtype
        found = _OF_NUMPY.get(own) or _OF_NUMPY.get(own.newbyteorder("="))
        if found is None:
            raise _not_integers(settled)
        return found
    return torch.int64


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What numpy calls a dtype."""
    return _NUMPY[dtype]


def shape_of(settled: Values) -> tuple[int, ...]:
    """The shape that a tensor of the values has."""
    return settled.shape if isinstance(settled, np.ndarray) else (len(settled),)


def count_of(settled: Values) -> int:
    """How many elements the values are."""
    return int(settled.size) if isinstance(settled, np.ndarray) else len(settled)


def check_count(count: int, most: int, dtype: torch.dtype) -> None:
    """Raise `LayoutError` for more values than there is room for."""
    if count > most:
        raise LayoutError(
            f"{count} values of {dtype} were sent by a small copy made for {most}; expected no "
            f"more. Make one for the most that occur."
        )


def pack(room: memoryview, settled: Values, dtype: torch.dtype) -> int:
    """Write the values as elements of ``dtype`` to the beginning of ``room``; returns the bytes.

    Raises:
        LayoutError: a value that the dtype cannot hold, or more than there is room for; the room's
            contents are then unspecified.
    """
    count = count_of(settled)
    nbytes = count * dtype.itemsize
    if nbytes > len(room):
        check_count(count, len(room) // dtype.itemsize, dtype)
    if not nbytes:
        return 0
    if isinstance(settled, np.ndarray):
        _pack_array(room, settled, dtype)
    elif isinstance(settled, (bytes, bytearray)) and dtype == torch.uint8:
        room[:nbytes] = settled
    else:
        try:
            _form(count, _CODES[dtype]).pack_into(room, 0, *settled)
        except (struct.error, TypeError) as error:
            raise _wrong_value(settled, dtype) from error
        if dtype == torch.bool and max(room[:nbytes]) > 1:
            raise _wrong_value(settled, dtype)
    return nbytes


def packed_bytes(settled: Values, dtype: torch.dtype) -> bytearray:
    """The values as elements of ``dtype`` in memory of their own; raises as `pack` does."""
    packed = bytearray(count_of(settled) * dtype.itemsize)
    pack(memoryview(packed), settled, dtype)
    return packed


@lru_cache(256)
def _form(count: int, code: str) -> struct.Struct:
    return struct.Struct(f"={count}{code}")


class Room:
    """Memory that values are written into, again and again, as elements of one dtype.

    Args:
        memory: for as many elements as it has bytes.
        dtype: of the elements.

    Attributes:
        memory: as it was given.
        whole: the same as an array of the dtype.
    """

    def __init__(self, memory: memoryview, dtype: torch.dtype) -> None:
        self.memory, self._dtype = memory, dtype
        self._most = len(memory) // dtype.itemsize
        self._form = _form(self._most, _CODES[dtype])
        self._own = numpy_dtype(dtype)
        self.whole: npt.NDArray[Any] = np.ndarray((self._most,), self._own, memory)

    def fill(self, values: Values) -> int:
        """Write the values to the beginning; returns how many they are.

        Raises as `settle` and `pack` do.
        """
        # What is handed over most: nothing of it has to be converted, or looked at.
        kind = type(values)
        if kind is torch.Tensor and values.dtype is self._dtype and values.is_cpu:
            values = values.numpy()
            kind = np.ndarray
        if kind is np.ndarray and values.dtype is self._own and values.ndim == 1:
            count: int = values.size
            if count == self._most:
                self.whole[...] = values
                return count
            if count < self._most:
                self.whole[:count] = values
                return count
        elif kind is list and len(values) == self._most and self._dtype != torch.bool:
            try:
                self._form.pack_into(self.memory, 0, *values)
                return self._most
            except (struct.error, TypeError):
                pass  # `pack` says which value it was
        settled = settle(values)
        return pack(self.memory, settled, self._dtype) // self._dtype.itemsize


def _pack_array(room: memoryview, array: npt.NDArray[Any], dtype: torch.dtype) -> None:
    wanted = _NUMPY[dtype]
    if array.dtype != wanted:
        if array.dtype.kind not in "iub":
            raise _not_integers(array)
        least, most = _bounds(dtype)
        if int(array.min()) < least or int(array.max()) > most:
            raise _wrong_value(array.ravel().tolist(), dtype)
    written = np.frombuffer(room, wanted, array.size)
    written.reshape(array.shape)[...] = array


def _bounds(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return 0, 1
    found = torch.iinfo(dtype)
    return found.min, found.max


def _not_integers(array: npt.NDArray[Any]) -> LayoutError:
    return LayoutError(
        f"A small copy was asked of an array of {array.dtype}; expected integers or bool. For "
        f"other elements pass the array's bytes: array.view('uint8')."
    )


def _wrong_value(values: Any, dtype: torch.dtype) -> LayoutError:
    least, most = _bounds(dtype)
    for position, value in enumerate(values):
        if not isinstance(value, int) and not hasattr(value, "__index__"):
            found = f"a {type(value).__name__}"
        elif not least <= int(value) <= most:
            found = str(int(value))
        else:
            continue
        return LayoutError(
            f"A small copy to {dtype} was asked of values with {found} at position {position}; "
            f"expected integers from {least} to {most}. Correct the value or take a wider dtype."
        )
    return LayoutError(
        f"A small copy to {dtype} was asked of values that are no integers of it; expected "
        f"integers from {least} to {most}. Correct them or take another dtype."
    )
