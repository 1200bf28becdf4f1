# SPDX-License-Identifier: Apache-2.0
"""Run transfers inside `torch.compile`: one opaque op for each direction, for every backend.

A compiler sees only the op's schema: which tensors it reads and which it writes. So it orders the
op among the model's reads and writes of the caches. At run time the op is the connector's eager
call. Eager calls do not use this module, and do not pay for the dispatcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache, partial
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

import torch

from portakv.arguments import kind_of
from portakv.core.call import Watch
from portakv.errors import LayoutError, TransferError
from portakv.runtime.bounded import making
from portakv.runtime.eager import eagerly as eagerly
from portakv.view import KVView
from portakv.view.bound import Tensors

NAMESPACE = "portakv"
TO_THE_END = -(1 << 62)  # stands for None among the ends of ranges, which an op takes as integers
# Nested containers travel as flat lists, with the length of each level, outermost first.
_ARGUMENTS = (
    "(int connector, {chunks} memory_objs, int[] chunk_levels, {caches} kv_caches, "
    "int[] cache_levels, Tensor slot_mapping, SymInt[] starts, SymInt[] ends) -> ()"
)
_SCHEMAS = {
    "from_gpu": _ARGUMENTS.format(chunks="Tensor(a!)[]", caches="Tensor[]"),
    "to_gpu": _ARGUMENTS.format(chunks="Tensor[]", caches="Tensor(a!)[]"),
}


class Allocations:
    """The caches in the form for a compiler: one tensor for each allocation.

    A compiler that sees the layers of one allocation separately takes them for tensors that share
    memory, and works on copies of them. If it sees the allocation, it works in place.

    Attributes:
        leaves: the tensors of the caches, flat.
        tensors: the allocations.
        levels: the length of each level of the containers.
        memory: of the tensors, as it was when they were read.
    """

    def __init__(self, nest: object) -> None:
        self.leaves, self.levels = flatten(nest)
        groups: dict[int, list[torch.Tensor]] = {}
        for leaf in self.leaves:
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
        numbers = {storage: number for number, storage in enumerate(groups)}
        self.tensors = [_allocation(group) for group in groups.values()]
        self._addresses = [one.data_ptr() for one in self.tensors]
        self._places = []
        for leaf in self.leaves:
            number = numbers[leaf.untyped_storage().data_ptr()]
            self._places.append((number, leaf.data_ptr() - self._addresses[number]))
        self.memory = Watch(self.leaves)

    def are(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return True if these are the allocations themselves, not a compiler's copies."""
        return self._addresses == [one.data_ptr() for one in tensors]

    def holds(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Return True if these are the tensors, the same objects in the same order."""
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def nested_in(self, copies: Sequence[torch.Tensor]) -> Tensors:
        """Return the nested tensors at their places in copies of the allocations."""
        for own, copy in zip(self.tensors, copies, strict=True):
            if (copy.shape, copy.stride()) != (own.shape, own.stride()):
                raise LayoutError(
                    f"Expected the compiler to keep shape {tuple(own.shape)} and strides "
                    f"{own.stride()} of the caches, got a copy of {tuple(copy.shape)} and "
                    f"{copy.stride()}. Keep the caches out of tensors that it may lay out again."
                )
        leaves = []
        for leaf, (number, offset) in zip(self.leaves, self._places, strict=True):
            storage = copies[number].untyped_storage()
            start = copies[number].data_ptr() - storage.data_ptr() + offset
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            at = start // leaf.element_size()
            leaves.append(empty.set_(storage, at, leaf.size(), leaf.stride()))
        return nested(leaves, self.levels)


def _allocation(group: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensor that contains all tensors of one storage."""
    first = group[0]
    if len(group) == 1:
        return first
    base = first._base
    if base is not None and all(leaf._base is base for leaf in group):
        return base
    storage = first.untyped_storage()
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(storage, 0, (storage.nbytes() // first.element_size(),), (1,))


def flatten(nest: object) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tensors of nested containers, and the length of each level."""
    level: list[Any] = [nest]
    levels = []
    while not isinstance(level[0], torch.Tensor):
        rows = []
        for one in level:
            if not isinstance(one, (list, tuple, Mapping)):
                raise LayoutError(
                    f"Expected tensors, lists, tuples or dicts, got {kind_of(one)}. Pass "
                    f"containers of tensors."
                )
            rows.append(list(one.values()) if isinstance(one, Mapping) else list(one))
        lengths = [len(row) for row in rows]
        if not lengths[0] or len(set(lengths)) > 1:
            raise LayoutError(
                f"Expected containers of one length, at least 1, in one level, got lengths "
                f"{lengths}. Pass containers of equal length."
            )
        levels.append(lengths[0])
        level = [item for row in rows for item in row]
    return level, levels


def first_tensor(level: object) -> torch.Tensor:
    """Return the first tensor of a memory object; raise `LayoutError` if it has none."""
    while not isinstance(level, torch.Tensor):
        if not isinstance(level, (list, tuple, Mapping)):
            do = "Make a tensor of a numpy array by torch.from_numpy."
            if isinstance(level, KVView):
                do = "Copy views by copy_rows or copy_blocks, which also pack and unpack."
            raise LayoutError(
                f"Expected the memory_obj to hold a tensor, the containers that chunk_layout "
                f"names, or an object with these as `.tensor`, got {kind_of(level)}. {do}"
            )
        items = list(level.values()) if isinstance(level, Mapping) else list(level)
        if not items:
            raise LayoutError(
                "Expected a memory_obj with tensors, got an empty container. Pass its tensors."
            )
        level = items[0]
    return level


def nested(tensors: Sequence[torch.Tensor], levels: Sequence[int]) -> Tensors:
    """Return lists in lists, the inverse of `flatten`."""
    level: list[Tensors] = list(tensors)
    for length in reversed(levels):
        level = [level[i : i + length] for i in range(0, len(level), length)]
    return level[0]


def enlist(connector: object) -> int:
    """Return the number by which compiled functions name a connector while it lives.

    Its method ``_run_op`` runs the calls of such functions.
    """
    with making():  # `cache` does not wait
        _define()
    number = next(_numbers)
    _enlisted[number] = connector
    return number


_enlisted: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count(1)


@cache
def _define() -> torch.library.Library:
    """Define the ops of compiled functions, which torch allows once for the process."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, arguments in _SCHEMAS.items():
        # A view is read by its strides, so the compiler must not choose others.
        library.define(name + arguments, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, partial(_run, name == "from_gpu"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    return library


def _run(
    store: bool,
    connector: int,
    memory_objs: Sequence[torch.Tensor],
    chunk_levels: Sequence[int],
    kv_caches: Sequence[torch.Tensor],
    cache_levels: Sequence[int],
    *ranges: object,
) -> None:
    """Run an op; ``ranges``: slots, starts and ends."""
    caller = _enlisted.get(connector)
    if caller is None:
        raise TransferError(
            "Expected the connector of a compiled function to exist, got a transfer of one that is "
            "gone. Keep the connector as long as functions that were compiled with it."
        )
    caller._run_op(store, kv_caches, cache_levels, nested(memory_objs, chunk_levels), *ranges)


def _fake(*arguments: object) -> None:
    """Return nothing, as the op does: there is no shape to compute."""
