# SPDX-License-Identifier: Apache-2.0
"""Transfers inside `torch.compile`: one op in the graph, ordered among reads and writes of the
caches, the same bytes as the eager call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.in_graph_cases import (  # noqa: F401
    ALLOCATIONS,
    BLOCKS,
    COMPILERS,
    DEVICES,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    SLOTS,
    Counter,
    fresh,
    in_one_allocation,
    make_caches,
    make_chunk,
    rows_of,
)

from portakv import (
    AdaptiveConnector,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("registered", [True, False])
def test_a_store_stands_behind_writes_and_before_reads(
    device: str, compiler: str, registered: bool
) -> None:
    connector, caches = AdaptiveConnector(device), make_caches(device)
    connector.register_kv_caches(caches)

    def step(row: torch.Tensor, chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        for layer, cache in enumerate(caches):
            cache[0, 1] = row + layer
        connector.from_gpu(chunk, None if registered else caches, slots)
        return chunk * 2

    counter = Counter(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens in (5, 6, 7, 9, 12):
        row, chunk = torch.randn(SIZE, HEADS, DIM, device=device), make_chunk(tokens, device)
        slots = torch.randperm(SLOTS, device=device)[:tokens]
        found = compiled(row, chunk, slots)
        assert torch.equal(caches[1][0, 1], row + 1)
        wanted = rows_of(caches, slots)
        assert torch.equal(chunk, wanted)
        assert torch.equal(found, wanted * 2)
    assert counter.frame_count <= 2  # once for the first length, once for any
    assert set(counter.ops()) == {"portakv.from_gpu"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("make", ALLOCATIONS)
def test_a_load_stands_behind_the_chunk_and_before_reads_of_the_cache(
    device: str, compiler: str, registered: bool, make: Callable[[str], list[torch.Tensor]]
) -> None:
    connector, caches = AdaptiveConnector(device), make(device)
    connector.register_kv_caches(caches)

    def step(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        chunk = rows * 3  # made by the graph itself
        connector.to_gpu(chunk, None if registered else caches, slots, 1, 5)
        return sum((cache.double().sum() for cache in caches), torch.zeros((), device=device))

    before = [cache.clone() for cache in caches]
    rows, slots = make_chunk(4, device), torch.randperm(SLOTS, device=device)[:6]
    found = torch.compile(step, fullgraph=True, backend=compiler)(rows, slots)
    for layer, cache in enumerate(before):
        flat = cache.view(2, SLOTS, HEADS * DIM)
        flat[:, slots[1:5]] = rows[:, layer] * 3
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))
    torch.testing.assert_close(found, sum(cache.double().sum() for cache in caches))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", ALLOCATIONS)
@pytest.mark.parametrize("passed", [True, False])
def test_the_compiler_makes_no_copy_of_the_caches(
    device: str,
    make: Callable[[str], list[torch.Tensor]],
    passed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connector, caches = AdaptiveConnector(device), make(device)
    connector.register_kv_caches(caches)
    monkeypatch.setattr(connector, "_read", None)  # only other tensors would be read

    def step(chunk: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        connector.from_gpu(chunk, caches if passed else None, slots)
        connector.to_gpu(chunk, caches if passed else None, slots + 1)
        connector.from_gpu(chunk, caches if passed else None, slots + 2)
        return caches[0].sum() + chunk.sum()

    chunk, slots = make_chunk(4, device), torch.arange(4, device=device)
    first, second = rows_of(caches, slots), rows_of(caches, slots + 2)
    second[:, :, :3] = first[:, :, 1:]  # slots 2, 3, 4 were loaded in between
    torch.compile(step, fullgraph=True)(chunk, slots)
    assert torch.equal(chunk, second)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_that_the_graph_writes_by_indexing_and_then_loads(device: str) -> None:
    """Inductor then works on a copy of that cache and puts it back; slow, and right."""
    connector, caches = AdaptiveConnector(device), make_caches(device)
    connector.register_kv_caches(caches)

    def step(row: torch.Tensor, chunk: torch.Tensor, slots: torch.Tensor) -> None:
        caches[0][0, 1] = row
        connector.to_gpu(chunk, None, slots)

    row, chunk = torch.randn(SIZE, HEADS, DIM, device=device), make_chunk(4, device)
    slots = torch.tensor([9, SIZE + 1, 17, 6], device=device)
    wanted = [cache.clone() for cache in caches]
    wanted[0][0, 1] = row
    for layer, cache in enumerate(wanted):
        cache.view(2, SLOTS, HEADS * DIM)[:, slots] = chunk[:, layer]
    torch.compile(step, fullgraph=True)(row, chunk, slots)
    assert all(torch.equal(x, y) for x, y in zip(caches, wanted, strict=True))
    connector.from_gpu(chunk, None, slots)  # what was registered is so still
    assert torch.equal(chunk, rows_of(caches, slots))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", [True, False])
def test_a_batch_is_one_op(device: str, store: bool) -> None:
    connector, caches = AdaptiveConnector(device), make_caches(device)
    twin = AdaptiveConnector(device)
    slots = torch.randperm(SLOTS, device=device)[:9]
    starts, ends = [0, 3, 6], [3, 6, 9]

    def run(one: AdaptiveConnector, pool: list[torch.Tensor], objects: list[torch.Tensor]) -> None:
        batched = one.batched_from_gpu if store else one.batched_to_gpu
        batched(objects, pool, slots, starts, ends)

    objects = [make_chunk(3, device) for _ in starts]
    eager_pool = [cache.clone() for cache in caches]
    eager_objects = [chunk.clone() for chunk in objects]
    counter = Counter("aot_eager")
    torch.compile(run, fullgraph=True, backend=counter)(connector, caches, objects)
    run(twin, eager_pool, eager_objects)
    assert len(counter.ops()) == 1
    assert all(torch.equal(x, y) for x, y in zip(caches, eager_pool, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(objects, eager_objects, strict=True))
