# SPDX-License-Identifier: Apache-2.0
"""Memory by its address, as LMCache hands it over: until G1 (`KVView.at`, views over addresses) the
plug makes tensors of it that own nothing, and reads tables that lie on a device.

LMCache never keeps an engine's tensors, so that the engine can free them, and nor does what is made
here. The caller of an op keeps the memory until the work has ended, as with LMCache's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import indexed

#: Tables that were read: a weak reference to the tensor, its version, and its addresses.
_tables: Bounded[int, tuple[Any, int, tuple[int, ...]]] = Bounded("LMCache's tables", 64)


def tensor_at(
    address: int, shape: Sequence[int], device: torch.device, strides: Sequence[int] | None = None
) -> torch.Tensor:
    """Bytes at an address, as a uint8 tensor that owns nothing; strides count bytes."""
    if not address:
        raise ValueError("A tensor at address 0 was asked for; pass the address of the memory.")
    steps = dense(shape) if strides is None else strides
    nbytes = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, shape, steps)


def dense(shape: Sequence[int]) -> list[int]:
    return [prod(shape[at + 1 :]) for at in range(len(shape))]


def typed_at(
    address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A dense tensor over an address, which owns nothing."""
    rows = tensor_at(address, [prod(shape) * dtype.itemsize], indexed(device))
    return rows.view(dtype).view(tuple(shape))


def addresses_of(table: torch.Tensor | Sequence[Any]) -> tuple[int, ...] | None:
    """The addresses that caches are handed over as; None if they are tensors. A table on a device
    is read once, and again if it was written since."""
    if not isinstance(table, torch.Tensor):
        return tuple(table) if len(table) and isinstance(table[0], int) else None
    if table.dim() != 1 or table.dtype not in (torch.int64, torch.uint64):
        return None
    version = 0 if table.is_inference() else table._version  # of such a tensor none is kept
    known = _tables.get(id(table))
    if known is None or known[0]() is not table or known[1] != version:
        found = tuple(address % 2**64 for address in table.tolist())
        known = _tables[id(table)] = weakref.ref(table), version, found
    return known[2]


def aliases(held: Any) -> Any:
    """Tensors in containers as others over the same memory, which do not keep it."""
    if not isinstance(held, torch.Tensor):
        return [aliases(each) for each in held]
    shape, strides = held.shape, held.stride()
    nbytes = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    nbytes *= held.element_size()
    storage = torch._C._construct_storage_from_data_pointer(held.data_ptr(), held.device, nbytes)
    empty = torch.empty(0, dtype=held.dtype, device=held.device)
    return empty.set_(storage, 0, shape, strides)


def key_of(held: Any) -> tuple[Any, ...]:
    """What aliases of tensors in containers rest on: alike for the same memory alone."""
    if isinstance(held, torch.Tensor):
        return held.data_ptr(), held.shape, held.stride(), held.dtype
    return tuple(key_of(each) for each in held)
