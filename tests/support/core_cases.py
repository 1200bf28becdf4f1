# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the core: addresses from a form, bytes moved run by run, noise."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
import torch

from portakv import CopyPlan, KVView, copy_rows
from portakv.plan import Move
from portakv.view.form import locate as step_to
from portakv.view.index import index_of
from portakv.view.view import check_writable

GIB = 1 << 30
_MAP_NORESERVE = 0x4000  # Linux; not named by every Python's mmap


def address(view: KVView, kv: int = 0, layer: int = 0, slot: int = 0, head: int = 0) -> int:
    """Return the address of the first byte of a row, by the view's form and table alone."""
    form = view.form
    part = view.form.parts[kv]
    table, offset = step_to(part.table, part.offset, part.layer, layer)
    if form.paged:
        table, offset = step_to(table, offset, part.block, slot // form.block_size)
        slot %= form.block_size
    table, offset = step_to(table, offset, part.token, slot)
    table, offset = step_to(table, offset, part.head, head)
    return int(view.addresses[table]) + offset


def move(runs: Iterable[Any]) -> None:
    """Carry runs out, one memmove each."""
    for source, target, nbytes in zip(*(column.tolist() for column in runs), strict=True):
        ctypes.memmove(target, source, nbytes)


Copier = Callable[..., None]


def by_backend(
    src: KVView, dst: KVView, src_index: Any, dst_index: Any, count: int | None = None
) -> None:
    """Copy with the backend that the library chooses."""
    copy_rows(src, dst, src_index, dst_index, count=count).synchronize()


def by_runs(
    src: KVView, dst: KVView, src_index: Any, dst_index: Any, count: int | None = None
) -> None:
    """Copy run by run, as a copy engine would."""
    indices = index_of(src_index), index_of(dst_index)
    lengths = [x.length for x in indices if x.length is not None]
    count = min(lengths or [src.slots, dst.slots]) if count is None else count
    check_writable(dst)
    for plan, part in sections(Move(src, dst, *indices, count)):
        move(plan.runs(*part))


def sections(whole: Move) -> Iterator[tuple[CopyPlan, Move]]:
    """Yield a copy in the library's sections: whole units, and head and tail by tokens, each with a
    plan."""
    forms = whole.src.form, whole.dst.form
    for first, tokens, unit in CopyPlan(*forms, *whole.steps).split(whole):
        yield CopyPlan(*forms, *whole.steps, unit), whole.part(first, tokens)


def noise(*shape: int, dtype: torch.dtype = torch.int16, seed: int = 0) -> torch.Tensor:
    """Return random bits of any dtype, always the same."""
    count = prod(shape) * dtype.itemsize
    random = np.random.default_rng([seed, *shape]).integers(0, 256, count, dtype=np.uint8)
    return torch.from_numpy(random).view(dtype).view(shape)


def lazy(nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` of zeros of which only the touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
