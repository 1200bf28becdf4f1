# SPDX-License-Identifier: Apache-2.0
"""Integers and bytes of a caller as arrays of one dtype, for small copies."""

from __future__ import annotations

import mmap
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import DeviceMismatch, LayoutError

Array = npt.NDArray[Any]
#: What small copies take: integers, bytes, a numpy array, or a tensor on the host.
Values = Sequence[int] | bytes | bytearray | memoryview | Array | torch.Tensor

_NAMES = "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64"
_NUMPY = {getattr(torch, name): np.dtype(name) for name in _NAMES.split()}
#: What torch calls the dtype of an array that `as_array` returned.
TORCH_DTYPES: dict[np.dtype[Any], torch.dtype] = {own: dtype for dtype, own in _NUMPY.items()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What numpy calls a dtype; raises `LayoutError` for anything but an integer dtype or bool."""
    if not isinstance(dtype, torch.dtype) or dtype not in _NUMPY:
        raise LayoutError(
            f"A small copy of {dtype} was asked; it carries integers and bytes: "
            f"{', '.join(map(str, TORCH_DTYPES))}. For other elements pass a tensor's bytes: "
            f"tensor.view(torch.uint8)."
        )
    return _NUMPY[dtype]


def as_array(values: Values, dtype: torch.dtype | None = None) -> Array:
    """Values as an array of a dtype, in their own shape; a copy only if they have another dtype.

    Args:
        values: see `Values`.
        dtype: None: the array's or tensor's own, uint8 for bytes, int64 for other sequences.

    Raises:
        DeviceMismatch: a tensor that is not on the host.
        LayoutError: something that has no length, elements that are no integers, or a value that
            the dtype cannot hold.
    """
    wanted = None if dtype is None else numpy_dtype(dtype)
    if isinstance(values, torch.Tensor):
        array = _of_tensor(values)
    elif isinstance(values, np.ndarray):
        array = values
    elif isinstance(values, (bytes, bytearray, memoryview)):
        array = np.asarray(memoryview(values))
    elif isinstance(values, str) or not hasattr(values, "__len__"):
        raise LayoutError(
            f"A small copy was asked of a {type(values).__name__}; expected a list of integers, "
            f"bytes, an array, or a tensor on the host. Make a list of it first."
        )
    else:
        wanted = wanted or _NUMPY[torch.int64]
        array = _of_sequence(values, wanted)
    wanted = wanted or array.dtype.newbyteorder("=")
    if array.dtype == wanted and wanted in TORCH_DTYPES:
        return array
    if array.dtype.kind not in "iub" or wanted not in TORCH_DTYPES:
        raise LayoutError(
            f"A small copy was asked of an array of {array.dtype}; expected integers or bool. For "
            f"other elements pass the array's bytes: array.view('uint8')."
        )
    cast: Array = array.astype(wanted)
    same = cast == array  # a value that wrapped round differs by 256 or more, also as a float
    if not same.all():
        position = int(same.ravel().argmin())
        raise _wrong_value(array.ravel()[position], position, wanted)
    return cast


class PackedInts:
    """Memory that values are written to, again and again, as elements of one dtype.

    Args:
        memory: writable bytes.
        most: how many values they have room for.
        dtype: of the values.
        offset: bytes of the memory before the first value.

    Attributes:
        whole: all of it, as an array of the dtype.
    """

    def __init__(
        self, memory: bytearray | mmap.mmap | Array, most: int, dtype: torch.dtype, offset: int = 0
    ) -> None:
        self._most, self._dtype = most, dtype
        self.whole: Array = np.ndarray((most,), numpy_dtype(dtype), memory, offset)

    def fill(self, values: Values) -> int:
        """Write values to the beginning; returns how many they are.

        Raises as `as_array` does, and `LayoutError` for more values than there is room for, before
        anything is written.
        """
        array = as_array(values, self._dtype)
        if array.size > self._most:
            raise LayoutError(
                f"{array.size} values of {self._dtype} were sent by a small copy made for "
                f"{self._most}; expected no more. Make one for the most that occur."
            )
        self.whole[: array.size].reshape(array.shape)[...] = array
        return array.size


def _of_tensor(values: torch.Tensor) -> Array:
    if values.layout != torch.strided:
        raise LayoutError(
            f"A small copy was asked of a tensor with the layout {values.layout}; expected "
            f"torch.strided. Call to_dense() first."
        )
    if not values.is_cpu:
        raise DeviceMismatch(
            f"A small copy was asked of a tensor on {values.device}; expected values on the "
            f"host. Use copy_ for what is on a device."
        )
    numpy_dtype(values.dtype)
    found: Array = values.numpy()
    return found


def _of_sequence(values: Sequence[int], wanted: np.dtype[Any]) -> Array:
    try:
        array = np.asarray(values)
        if array.ndim == 1 and array.dtype.kind in "iub":
            return array
    except Exception:  # ragged, or elements that numpy cannot read: told one by one below
        pass
    # Also 2**63 among smaller ones, of which numpy would make floats.
    least, most = _bounds(wanted)
    numbers = []
    for position, value in enumerate(values):
        try:
            numbers.append(operator.index(value))
        except Exception:
            raise _wrong_value(f"a {type(value).__name__}", position, wanted) from None
        if not least <= numbers[-1] <= most:
            raise _wrong_value(numbers[-1], position, wanted)
    return np.array(numbers, wanted)


def _bounds(wanted: np.dtype[Any]) -> tuple[int, int]:
    if wanted.kind == "b":
        return 0, 1
    return int(np.iinfo(wanted).min), int(np.iinfo(wanted).max)


def _wrong_value(found: object, position: int, wanted: np.dtype[Any]) -> LayoutError:
    least, most = _bounds(wanted)
    return LayoutError(
        f"A small copy to {TORCH_DTYPES[wanted]} was asked of values with {found} at position "
        f"{position}; expected integers from {least} to {most}. Correct the value or take a wider "
        f"dtype."
    )
