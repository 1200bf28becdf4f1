# SPDX-License-Identifier: Apache-2.0
"""Transfers inside `torch.compile`: one opaque op for each direction, for every backend.

A compiler sees the op's schema alone: which tensors it reads and which it writes, so that it
orders the op among the model's own reads and writes of the caches. At run time the op is the
connector's eager call. Eager calls never come here, and do not pay for the dispatcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache, partial
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

import torch

from portakv.errors import LayoutError, TransferError

NAMESPACE = "portakv"
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
    """The caches as a compiler is shown them: one tensor for each allocation.

    Shown the layers of one allocation apart, it takes them for tensors that share memory, and works
    on copies of them. Shown what they are views of, it works in place. ``leaves`` are the tensors,
    flat; ``tensors`` the allocations; ``levels`` the length of each level of the containers.
    """

    def __init__(self, nest: Any) -> None:
        self.leaves, self.levels = flatten(nest)
        groups: dict[int, list[torch.Tensor]] = {}
        for leaf in self.leaves:
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
        self._leaf_addresses = [leaf.data_ptr() for leaf in self.leaves]
        numbers = {storage: number for number, storage in enumerate(groups)}
        self.tensors = [_allocation(group) for group in groups.values()]
        self._addresses = [one.data_ptr() for one in self.tensors]
        self._places = []
        for leaf in self.leaves:
            number = numbers[leaf.untyped_storage().data_ptr()]
            self._places.append((number, leaf.data_ptr() - self._addresses[number]))

    def unchanged(self) -> bool:
        """Whether each tensor is where it was: not freed, resized, or given other memory."""
        return [*map(torch.Tensor.data_ptr, self.leaves)] == self._leaf_addresses

    def are(self, given: Sequence[torch.Tensor]) -> bool:
        """Whether these are the allocations themselves, not a compiler's copies."""
        return self._addresses == [one.data_ptr() for one in given]

    def holds(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors, the same objects in the same order."""
        return len(leaves) == len(self.leaves) and all(map(is_, leaves, self.leaves))

    def nested_in(self, given: Sequence[torch.Tensor]) -> Any:
        """The nested tensors as they lie in copies of the allocations."""
        for own, copy in zip(self.tensors, given, strict=True):
            if (copy.shape, copy.stride()) != (own.shape, own.stride()):
                raise LayoutError(
                    f"A compiler handed over a copy of shape {tuple(copy.shape)} and strides "
                    f"{copy.stride()} of caches of {tuple(own.shape)} and {own.stride()}; keep "
                    f"the caches out of what it may lay out anew."
                )
        leaves = []
        for leaf, (number, behind) in zip(self.leaves, self._places, strict=True):
            storage = given[number].untyped_storage()
            start = given[number].data_ptr() - storage.data_ptr() + behind
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            at = start // leaf.element_size()
            leaves.append(empty.set_(storage, at, leaf.size(), leaf.stride()))
        return nested(leaves, self.levels)


def _allocation(group: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that tensors of one storage lie in."""
    first = group[0]
    if len(group) == 1:
        return first
    base = first._base
    if base is not None and all(leaf._base is base for leaf in group):
        return base
    storage = first.untyped_storage()
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(storage, 0, (storage.nbytes() // first.element_size(),), (1,))


def flatten(nest: Any) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors of nested containers, and the length of each level."""
    level = [nest]
    levels = []
    while not isinstance(level[0], torch.Tensor):
        rows = []
        for one in level:
            if not isinstance(one, (list, tuple, Mapping)):
                raise LayoutError(
                    f"A {type(one).__name__} was found where tensors, lists, tuples or dicts were "
                    f"expected."
                )
            rows.append(list(one.values()) if isinstance(one, Mapping) else list(one))
        lengths = [len(row) for row in rows]
        if not lengths[0] or len(set(lengths)) > 1:
            raise LayoutError(
                f"Containers of {lengths} things were found in one level; all hold the same "
                f"number, and at least one."
            )
        levels.append(lengths[0])
        level = [item for row in rows for item in row]
    return level, levels


def nested(tensors: Sequence[torch.Tensor], levels: Sequence[int]) -> Any:
    """Lists in lists, as they were before `flatten`."""
    level: list[Any] = list(tensors)
    for length in reversed(levels):
        level = [level[i : i + length] for i in range(0, len(level), length)]
    return level[0]


def enlist(connector: Any) -> int:
    """The number by which compiled functions name a connector, as long as it lives."""
    _define()
    number = next(_numbers)
    _enlisted[number] = connector
    return number


_enlisted: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count(1)


def eagerly(call: Any, *arguments: Any) -> Any:
    """Inside torch.compile: ``call`` as it is, outside of the graph, which breaks here (with
    ``fullgraph=True`` that is the compiler's error)."""
    _make_outside()
    return _outside(call, *arguments)


_outside: Any = None


def _make_outside() -> None:
    """Make ``_outside``. The compiler runs this while it traces, so that it meets the result."""
    global _outside
    if _outside is None:
        why = "PortaKV's op in a graph is a connector's transfer on the current stream, with slots "
        _outside = torch.compiler.disable(_call, reason=why + "in a tensor")


def _call(call: Any, *arguments: Any) -> Any:
    return call(*arguments)


# What `torch.compiler.assume_constant_result` sets, without the import of the whole compiler,
# which takes longer than everything else that PortaKV does when it is imported.
setattr(_make_outside, "_dynamo_marked_constant", True)  # noqa: B010 - unknown to type checkers


@cache
def _define() -> torch.library.Library:
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
    *ranges: Any,
) -> None:
    """What an op does when it runs; ``ranges``: slots, starts and ends."""
    found = _enlisted.get(connector)
    if found is None:
        raise TransferError(
            "A compiled function asked for a transfer of a connector that is gone; keep the "
            "connector as long as functions that were compiled with it."
        )
    found._run_op(store, kv_caches, cache_levels, nested(memory_objs, chunk_levels), *ranges)


def _fake(*arguments: object) -> None:
    """Nothing to say about shapes: the op returns nothing."""
