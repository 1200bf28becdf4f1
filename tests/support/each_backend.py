# SPDX-License-Identifier: Apache-2.0
"""What holds of every backend alike: sources with stride 0, torch's ambient state, memory that is
replaced. Each runs on the CPU, or where `moved` brings the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from portakv import Index, KVView, LayoutError, copy_rows
from portakv.backends.base import Backend
from support.cuda_cases import (
    CHUNK,
    COPIES,
    NHD,
    SLOTS,
    Copy,
    End,
    by,
    chunk,
    objects,
    pool,
    unequal,
)
from support.guarded_memory import filled

Place = Callable[[torch.Tensor], torch.Tensor]


def _chunk(tensor: torch.Tensor, **more: Any) -> End:
    return End(tensor, CHUNK, {"heads": 2}, **more)


def _pools(shape: tuple[int, ...], **ids: Any) -> End:
    """Three layers, each expanded to a pool of three blocks."""
    return End([filled(shape).expand(2, 3, 4, 2, 8) for _ in range(3)], NHD, **ids)


def _windows(step: int) -> Copy:
    """Rows that begin ``step`` elements behind each other, and so share most of their bytes."""
    source = filled((64,)).as_strided((9, 16), (step, 1), 3)
    return Copy(End(source, "token dim", offset=1), by(End(filled((3, 4, 16)), "block token dim"),
                                                       SLOTS), 7)  # fmt: skip


#: Sources of which several rows, or parts of them, are one: a step of 0 bytes, or of one element.
REPEATED: dict[str, Callable[[], Copy]] = {
    "one token for all": COPIES["a repeated source"],
    "one token for all, from the second on": lambda: Copy(
        _chunk(filled((2, 3, 1, 16)).expand(2, 3, 9, 16), offset=2), by(pool(), SLOTS), 7
    ),
    "one token for all, to a chunk": lambda: Copy(
        _chunk(filled((2, 3, 1, 16)).expand(2, 3, 7, 16)), chunk(7), 7
    ),
    "one token for all, by ids": lambda: Copy(_pools((2, 1, 1, 2, 8), ids=SLOTS), chunk(7), 7),
    "one token of a block for all": lambda: Copy(_pools((2, 3, 1, 2, 8), ids=SLOTS), chunk(7), 7),
    "one block for all": lambda: Copy(_pools((2, 1, 4, 2, 8), ids=SLOTS), chunk(7), 7),
    "one block for all, by blocks": lambda: Copy(
        _pools((2, 1, 4, 2, 8), ids=[2, 0], step=4), by(pool(), [1, 2], 4), 8
    ),
    "one head for all": lambda: Copy(_pools((2, 3, 4, 1, 8), ids=SLOTS), chunk(7), 7),
    "keys for values": lambda: Copy(_pools((1, 3, 4, 2, 8), ids=SLOTS), chunk(7), 7),
    "one element for all": lambda: Copy(_pools((2, 3, 4, 2, 1), ids=SLOTS), chunk(7), 7),
    "one layer for all": lambda: Copy(
        _chunk(filled((2, 1, 7, 16)).expand(2, 3, 7, 16)), by(pool(), SLOTS), 7
    ),
    "rows of one element's step": lambda: _windows(1),
    "rows of three elements' step": lambda: _windows(3),
}


def copied(copy: Copy, backend: str, place: Place | None = None) -> None:
    """Copy through a backend, the tensors brought to ``place``, every byte judged."""
    if place is None:
        copy.check(lambda: run(copy, backend))
        return
    sides = (copy.src, copy.dst)
    src, dst = there = [replace(side, tensors=moved(side.tensors, place)) for side in sides]

    def carry() -> None:
        run(Copy(src, dst, copy.count), backend)
        for here, landed in zip(leaves(copy.dst.tensors), leaves(there[1].tensors), strict=True):
            here.copy_(landed)

    copy.check(carry)


def run(copy: Copy, backend: str) -> None:
    copy_rows(
        copy.src.view(), copy.dst.view(), copy.src.index(), copy.dst.index(), count=copy.count,
        backend=backend,
    ).synchronize()  # fmt: skip


def moved(tree: Any, place: Place) -> Any:
    """The same containers with tensors elsewhere, their strides and offsets as they were."""
    if not isinstance(tree, torch.Tensor):
        return [moved(each, place) for each in tree]
    elements = tree.untyped_storage().nbytes() // tree.itemsize
    whole = place(tree.as_strided((elements,), (1,), 0))
    return whole.as_strided(tree.shape, tree.stride(), tree.storage_offset())


def leaves(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for each in tree for leaf in leaves(each)]


# Torch's ambient state


@contextmanager
def _default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    # What torch.use_deterministic_algorithms calls, which imports all of inductor before.
    torch._C._set_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device meta": lambda: _default_device("meta"),
    "within a device": lambda: torch.device("meta"),
    "default dtype bfloat16": _default_dtype,
    "inference mode": torch.inference_mode,
    "deterministic algorithms": _deterministic,
    "three threads": _threads,
    "warnings as errors": _warnings,
}
_CLEAN = [11, 0, 6, 5, 3, 9, 1]
#: Copies with clean ids that show of every part of a backend whether it minds.
SHOWN: dict[str, Callable[[], Copy]] = {
    "gather": lambda: Copy(by(pool(), _CLEAN), chunk(7), 7),
    "scatter": lambda: Copy(chunk(7), by(pool(), _CLEAN), 7),
    "blocks": lambda: Copy(by(pool(), [2, 0], 4), chunk(8), 8),
    "memory objects": lambda: Copy(by(pool(), _CLEAN), objects(), 7),
    "two nests": lambda: Copy(by(unequal().src, _CLEAN), unequal().dst, 7),
}


def within(state: str, copy: Copy, make: Callable[[], Backend]) -> None:
    """Make a backend, prepare a copy and launch it inside a state of torch; every byte judged."""
    src, dst, plan = copy.src.view(), copy.dst.view(), copy.plan()
    indices = copy.src.index(), copy.dst.index()

    def carry() -> None:
        with STATES[state]():
            backend = make()
            can = backend.capabilities()
            home = can.home_of_ids(backend.device)
            mine, theirs = (
                x if x.ids is None else x.placed(home, can.index_dtypes) for x in indices
            )
            pending = backend.prepare(plan)(src, dst, mine, theirs, copy.count, None, None)
            if pending is not None:
                pending.wait()

    copy.check(carry)


def refuses_memory_that_is_elsewhere(
    backend: str, change: Callable[[torch.Tensor], object], place: Place | None = None
) -> None:
    """Views of caches, of which one then changes: refused, and nothing is moved."""
    for gathers in (True, False):
        caches, rows = pool().tensors, chunk(7).tensors
        if place is not None:
            caches, rows = moved(caches, place), moved(rows, place)
        cache, dense = KVView(caches, NHD), KVView(rows, CHUNK, heads=2)
        ids = Index([11, 0, 6, 5, 3, 9, 1])
        sides = (cache, dense, ids, Index()) if gathers else (dense, cache, Index(), ids)
        copy_rows(*sides, count=7, backend=backend).synchronize()
        change(caches[1])
        kept = [leaf.cpu().clone() for leaf in (rows, caches[0], caches[2])]
        with pytest.raises(LayoutError, match="was replaced after it was read"):
            copy_rows(*sides, count=7, backend=backend).synchronize()
        for before, leaf in zip(kept, (rows, caches[0], caches[2]), strict=True):
            assert np.array_equal(before.view(torch.uint8), leaf.cpu().view(torch.uint8))


def shrunk(tensor: torch.Tensor) -> None:
    """Its storage resized in place: what it read is no longer all there."""
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() // 2)


def freed(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


CHANGES = {"shrunk": shrunk, "freed": freed}
