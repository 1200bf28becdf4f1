# SPDX-License-Identifier: Apache-2.0
"""Transfers inside `torch.compile`: one opaque op for each direction, whatever the backend.

A compiler sees the op's schema alone: which tensors it reads and which it writes, so that it
orders the op among the model's own reads and writes of the caches. At run time the op is the
connector's eager call. Eager calls never come here, and do not pay for the dispatcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch

from portakv.connector.roots import flatten, nested
from portakv.errors import TransferError

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

_connectors: WeakValueDictionary[int, Any] = WeakValueDictionary()
_handles = itertools.count(1)


def enlist(connector: Any) -> int:
    """The number by which a compiled function names this connector; defines the ops."""
    _define()
    handle = next(_handles)
    _connectors[handle] = connector
    return handle


def transfer(
    store: bool,
    handle: int,
    memory_objs: Sequence[Any],
    caches: Sequence[torch.Tensor],
    cache_levels: Sequence[int],
    slot_mapping: torch.Tensor,
    starts: Sequence[Any],
    ends: Sequence[Any],
) -> None:
    """Put the op into the graph that is being traced.

    Args:
        store: which op.
        handle: the connector's number.
        memory_objs, slot_mapping, starts, ends: as in a connector's batch.
        caches: the roots of the registered caches (no levels), or other caches, flat.
        cache_levels: the lengths of their containers.

    Raises:
        LayoutError: what does not fit together already shows.
    """
    chunks, chunk_levels = flatten([getattr(one, "tensor", one) for one in memory_objs])
    length = slot_mapping.shape[0]
    ends = [length if end is None else end for end in ends]
    op = torch.ops.portakv.from_gpu if store else torch.ops.portakv.to_gpu
    given = (list(caches), list(cache_levels), slot_mapping, list(starts), ends)
    op(handle, chunks, chunk_levels, *given)


def eagerly(call: Any, *arguments: Any) -> Any:
    """Inside torch.compile: ``call`` as it is, outside of the graph, which breaks here.

    With ``fullgraph=True`` that is the compiler's error.
    """
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
        library.impl(name, _carry(name == "from_gpu"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    return library


def _carry(store: bool) -> Any:
    """What the op does when it runs."""

    def carry(
        connector: int,
        memory_objs: Sequence[torch.Tensor],
        chunk_levels: Sequence[int],
        kv_caches: Sequence[torch.Tensor],
        cache_levels: Sequence[int],
        slot_mapping: torch.Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        found = _connectors.get(connector)
        if found is None:
            raise TransferError(
                "A compiled function asked for a transfer of a connector that is gone; keep the "
                "connector as long as functions that were compiled with it."
            )
        found.carry_op(
            store,
            nested(memory_objs, chunk_levels),
            kv_caches,
            cache_levels,
            slot_mapping,
            starts,
            ends,
        )

    return carry


def _fake(*arguments: object) -> None:
    """Nothing to say about shapes: the op returns nothing."""
