# SPDX-License-Identifier: Apache-2.0
"""Lists of ids as tensors: their types, their checks, and repeated ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import kind_of, shown
from portakv.errors import SlotError
from portakv.view.bound import address_of

IdList: TypeAlias = "torch.Tensor | npt.NDArray[np.signedinteger[Any]] | Sequence[int]"
_INT = frozenset({int})
ID_DTYPES = (torch.int64, torch.int32)
#: A slot past the end of any view, and far from where 64 bits overflow.
PAST_ANY_VIEW = 2**62
#: The most tokens of an id.
MOST_STEP = 2**31 - 1
_INT64 = np.dtype(np.int64)
#: Numbers that Python looks through, or reckons with, faster than numpy (8 ids: 1 us in place of 6;
#: the addresses of 6 pages: 3 us in place of 12).
SHORT = 64


def as_ids(ids: object) -> torch.Tensor:
    """Return ids as a dense tensor of one dimension; a list or an array becomes one.

    Raises:
        SlotError: another type, dtype or rank, or a tensor that owns no memory.
    """
    array = host_array(ids)
    if array is not None:
        return ids if isinstance(ids, torch.Tensor) else torch.from_numpy(array)
    if isinstance(ids, np.ndarray):
        ids = _tensor_of(ids)
    if not isinstance(ids, torch.Tensor):
        raise SlotError(
            f"Expected an index as a tensor, an array or a list of integers, got {kind_of(ids)}. "
            f"Convert it to one of these."
        )
    _check_tensor(ids)
    return ids


def host_array(ids: object) -> npt.NDArray[np.int64] | None:
    """Return the contiguous int64 array of a list, or an array or the memory of a tensor that is
    one already; None for all else. Raise `SlotError` as `as_ids` does."""
    if type(ids) is torch.Tensor:
        return _array_of_tensor(ids) if ids.is_cpu else None
    if isinstance(ids, np.ndarray):
        usual = ids.dtype is _INT64 and ids.strides == (8,) and ids.flags.writeable
        return ids if usual else None
    return _array_of(ids) if isinstance(ids, (list, tuple, range)) else None


def _array_of_tensor(ids: torch.Tensor) -> npt.NDArray[np.int64] | None:
    try:
        array = ids.numpy()
        memory = ids.data_ptr() or not array.size  # a function transform shows none
    except (RuntimeError, TypeError):  # it is no plain tensor
        return None
    usual = memory and array.dtype is _INT64 and array.strides == (8,)
    return array if usual and _in_storage(ids) else None


def _array_of(ids: list[Any] | tuple[Any, ...] | range) -> npt.NDArray[np.int64]:
    for each in () if {*map(type, ids)} <= _INT else ids:
        if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
            raise SlotError(f"Expected integers in an index, got {shown(each)}. Pass ids.")
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        raise SlotError(
            "Expected integers of at most 64 bits in an index, got a larger number. Pass ids that "
            "the view has."
        ) from None


def _tensor_of(ids: npt.NDArray[Any]) -> torch.Tensor:
    if ids.dtype.kind != "i" or ids.dtype.itemsize not in (4, 8):
        raise SlotError(
            f"Expected an index of int32 or int64, got dtype {ids.dtype}. Convert it with "
            f".astype('int64') if it holds ids."
        )
    # Torch takes neither negative strides, nor other byte orders, nor read-only memory.
    native = np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("="))
    # To numpy an array of one number is contiguous with any stride.
    plain = native.flags.writeable and min(native.strides, default=0) >= 0
    return torch.from_numpy(native if plain else native.copy())


def _check_tensor(ids: torch.Tensor) -> None:
    if ids.dtype not in ID_DTYPES:
        raise SlotError(
            f"Expected an index of torch.int32 or torch.int64, got dtype {ids.dtype}. Convert it "
            f"with .to(torch.int64) if it holds ids."
        )
    if ids.is_nested or ids.layout is not torch.strided:
        kind = "nested" if ids.is_nested else str(ids.layout).removeprefix("torch.")
        raise SlotError(f"Expected a dense tensor as an index, got a {kind} one. Pass its slots.")
    if ids.is_neg():
        raise SlotError(
            "Expected an index whose bytes are its ids, got a lazily negated tensor. Pass "
            "tensor.resolve_neg()."
        )
    if ids.dim() != 1:
        raise SlotError(
            f"Expected an index of one dimension, got shape {tuple(ids.shape)}. Flatten it."
        )
    if ids.is_meta:
        raise SlotError(
            "Expected an index on the host or a device, got one on device meta, which holds no "
            "ids. Make the index where its ids are."
        )
    if not address_of(ids) and ids.numel():
        raise SlotError(
            "Expected an index with memory, got one that owns no memory, as inside torch.vmap. "
            "Call the copy outside of function transforms."
        )
    if not _in_storage(ids, ids.stride(0)):
        raise SlotError(
            f"Expected an index whose storage holds its {len(ids)} ids, got one whose storage was "
            f"resized to {ids.untyped_storage().nbytes()} bytes. Make the index again."
        )


def _in_storage(ids: torch.Tensor, step: int = 1) -> bool:
    """Return whether a tensor's storage, which may have been resized, holds ids that are so many
    apart."""
    many = ids.numel()
    past = ids.storage_offset() + step * (many - 1) + 1
    return not many or past * ids.itemsize <= ids.untyped_storage().nbytes()


def out_of_range(used: npt.NDArray[np.int64], most: int) -> bool:
    """Return True if a number is negative or above ``most``. There is at least one number."""
    # A negative number read as unsigned is huge, so one pass shows if all are in range.
    return int(np.maximum.reduce(used.view(np.uint64))) > most


def has_repeats(used: npt.NDArray[np.int64]) -> bool:
    """Return True if a number occurs twice."""
    if used.size <= SHORT:
        return len(set(used.tolist())) < used.size
    largest = int(np.maximum.reduce(used.view(np.uint64)))  # a negative number reads as huge
    if largest < 64 * used.size:
        # One byte for each number is faster than a sort: 16,384 ids take 20 - 72 us, a sort 460.
        seen = np.zeros(largest + 1, np.bool_)
        seen[used] = True
        return int(np.count_nonzero(seen)) < used.size
    ordered = np.sort(used)
    return bool((ordered[1:] == ordered[:-1]).any())
