# SPDX-License-Identifier: Apache-2.0
"""Measure every method of moving one workload, from Python loops to a memory copy.

Plain torch code, as an engine could write it, is compared with the backends. All methods use the
same caches, slots and memory objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from portakv.cli.sides import Shape
from portakv_benchmarks.device.suite import Field, both_directions, ceiling, connector_methods
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared.harness import Call, Rows, measure, usable

#: The plain methods, the slowest first.
PLAIN = ("Python loops", "advanced indexing", "vectorised")
INDEX = "random"
# A call of the first method takes a fifth of a second: a few rounds suffice.
_SLOW_ROUNDS = 5


def run_all_methods(shape: Shape, field: Field, rounds: int) -> Rows:
    """Return a row for each method and direction.

    The shape's cache is a list over layers of ``(2, blocks, block_size, heads, dim)``. Its chunk is
    ``[2, L, T, H*D]``.
    """
    work = Workload(shape, "apart", field.device, shape.objects)
    slots = work.slots(INDEX).to(work.device)
    plain = [
        method
        for name, make in zip(PLAIN, (_loops, _indexing, _vectorised), strict=True)
        for method in both_directions(work, INDEX, name, (name, name), *make(work, slots))
    ]
    slow = plain[:2]
    fast = plain[2:]
    for backend in field.backends:
        fast += usable([*connector_methods(work, backend, INDEX)], "ladder", field.left_out)
    few = measure(ceiling(work), slow, field.timer, shape.objects, _SLOW_ROUNDS, 20.0)
    results = measure(ceiling(work), fast, field.timer, shape.objects, rounds, 20.0)
    names = ("p50_us", "ratio", "host_us", "rounds", "noisy", "host_hidden", "verified")
    rows = []
    for one in (*few[1:], *results):  # one row of `copy_` suffices: that of the fast methods
        fields = one.row(2 * shape.payload)
        rows.append(
            {
                "kind": "ladder",
                "shape": shape.name,
                "way": one.labels["backend"],
                "op": one.labels["op"],
                "pool_slots": shape.slots,
                "slots_used": shape.slots_used,
                "payload_bytes": shape.payload,
                **{name: fields[name] for name in names},
            }
        )
    return rows


def _loops(work: Workload, slots: torch.Tensor) -> tuple[Call, Call]:
    """Return loops with a copy for each layer, K or V, and token."""
    shape = work.shape
    size = work.shape.block_size
    places = [(slot // size, slot % size) for slot in slots.tolist()]

    def pairs(
        chunk: torch.Tensor, caches: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for layer, kv in product(range(shape.layers), range(shape.kv)):
            for token, (block, place) in enumerate(places):
                yield chunk[kv, layer, token], caches[layer][kv, block, place].view(-1)

    def gather(i: int) -> None:
        for row, cached in pairs(work.stored[i], work.source):
            row.copy_(cached)

    def scatter(i: int) -> None:
        for row, cached in pairs(work.loaded[i], work.target):
            cached.copy_(row)

    return gather, scatter


def _indexing(work: Workload, slots: torch.Tensor) -> tuple[Call, Call]:
    """Return indexing by blocks and places, for each layer and K or V."""
    shape = work.shape
    kvs = range(work.shape.kv)
    heads = (shape.tokens, shape.heads, shape.dim)

    def gather(i: int) -> None:
        block = slots // shape.block_size
        place = slots % shape.block_size
        for (layer, cache), kv in product(enumerate(work.source), kvs):
            work.stored[i][kv, layer].view(heads).copy_(cache[kv, block, place])

    def scatter(i: int) -> None:
        block = slots // shape.block_size
        place = slots % shape.block_size
        for (layer, cache), kv in product(enumerate(work.target), kvs):
            cache[kv, block, place] = work.loaded[i][kv, layer].view(heads)

    return gather, scatter


def _vectorised(work: Workload, slots: torch.Tensor) -> tuple[Call, Call]:
    """Return one indexed copy for each layer, K and V together, over the flattened slots."""
    source, target = (
        [cache.flatten(1, 2).flatten(2) for cache in caches]
        for caches in (work.source, work.target)
    )

    def gather(i: int) -> None:
        for layer, cache in enumerate(source):
            work.stored[i][:, layer] = cache[:, slots]

    def scatter(i: int) -> None:
        for layer, cache in enumerate(target):
            cache[:, slots] = work.loaded[i][:, layer]

    return gather, scatter
