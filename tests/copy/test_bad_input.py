# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused with a sentence, and nothing is written: rows, padding and canaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import filled, refused, same
from support.scene import BLOCKS, DIM, HEADS, LAYERS, SIZE, SLOTS, Scene

from portakv import (
    AdaptiveConnector,
    BackendUnavailable,
    DeviceMismatch,
    Index,
    KVView,
    LayoutError,
    SlotError,
    Unsupported,
    copy_blocks,
    copy_rows,
)


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture(params=["from_gpu", "to_gpu"])
def call(request: pytest.FixtureRequest, scene: Scene) -> Callable[..., Any]:
    return getattr(scene.connector, request.param)  # type: ignore[no-any-return]


# Shapes


def test_wrong_rank_of_caches(scene: Scene, call: Callable[..., Any]) -> None:
    flat = [cache.view(2, BLOCKS, SIZE, HEADS * DIM) for cache in scene.caches]
    with refused(LayoutError, "5 dimension", "(2, 5, 4, 16)", "axis", watch=scene.memory):
        call(scene.chunk, flat, [0, 1])


def test_wrong_rank_of_chunk(scene: Scene, call: Callable[..., Any]) -> None:
    with refused(LayoutError, "4 dimension", "memory_obj", "(2, 24, 16)", watch=scene.memory):
        call(scene.chunk.view(2, LAYERS * 8, HEADS * DIM), scene.caches, [0, 1])


@pytest.mark.parametrize(
    ("declared", "axis", "expected", "found"),
    [
        ({"heads": 4}, "head", 4, HEADS),
        ({"dim": 16}, "dim", 16, DIM),
        ({"block_size": 16}, "token", 16, SIZE),
        ({"layers": 2}, "layer", 2, LAYERS),
        ({"kv": 3}, "kv", 3, 2),
    ],
)
def test_wrong_extent(
    scene: Scene, declared: dict[str, Any], axis: str, expected: int, found: int
) -> None:
    connector = AdaptiveConnector("cpu", **declared)
    names = (repr(axis), f"extent {expected}", f"{found} was found")
    with refused(LayoutError, *names, watch=scene.memory):
        connector.from_gpu(scene.chunk, scene.caches, [0, 1])


@pytest.mark.parametrize("shape", [(2, 2, 8, 16), (1, LAYERS, 8, 16), (2, LAYERS, 8, 24)])
def test_chunk_of_other_extents(
    scene: Scene, call: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    chunk = filled(shape, poison=True)
    with refused(LayoutError, "memory_obj", "expected", "found", watch=[*scene.memory, chunk]):
        call(chunk, scene.caches, [0, 1])


def test_block_first_caches_declared_kv_first() -> None:
    caches = [filled((5, 2, SIZE, HEADS, DIM)) for _ in range(LAYERS)]
    chunk = filled((2, LAYERS, 2, HEADS * DIM), poison=True)
    with refused(LayoutError, "'kv'", "extent 2", "5 was found", watch=[*caches, chunk]):
        AdaptiveConnector("cpu").from_gpu(chunk, caches, [0, 1])


def test_two_blocks_are_taken_literally() -> None:
    cache = filled((2, 2, SIZE, HEADS, DIM))
    slots = [1, 6]
    found = {}
    for layout in ("layer | kv block token head dim", "layer | block kv token head dim"):
        chunk = filled((2, 1, 2, HEADS * DIM), poison=True)
        AdaptiveConnector("cpu", kv_layout=layout).from_gpu(chunk, [cache], slots)
        found[layout] = chunk
        kv_first = cache if "kv block" in layout else cache.transpose(0, 1)
        rows = torch.stack([kv_first[:, slot // SIZE, slot % SIZE] for slot in slots], dim=1)
        assert same(chunk, rows.reshape(2, 1, 2, HEADS * DIM))
    first, second = found.values()
    assert not same(first, second)


def test_keys_and_values_of_different_block_counts(scene: Scene) -> None:
    pairs = [(filled((5, SIZE, HEADS, DIM)), filled((6, SIZE, HEADS, DIM))) for _ in range(LAYERS)]
    connector = AdaptiveConnector("cpu", kv_layout="layer kv | block token head dim")
    with refused(LayoutError, "'block'", "5", "6", "expected", watch=[scene.memory, pairs]):
        connector.from_gpu(scene.chunk, pairs, [0, 1])


@pytest.mark.parametrize("axis", ["layer", "kv", "head", "dim"])
def test_nothing_to_move_along_an_axis(axis: str) -> None:
    names = ["layer", "kv", "block", "token", "head", "dim"]
    shape = [2, 2, 3, SIZE, HEADS, DIM]
    shape[names.index(axis)] = 0
    with refused(LayoutError, repr(axis), "0"):
        KVView(torch.zeros(shape), " ".join(names))


def test_no_layers_in_a_list(scene: Scene, call: Callable[..., Any]) -> None:
    empties: list[Any] = [[], (), {}]
    for empty in empties:
        with refused(LayoutError, "empty", "at least one", watch=scene.memory):
            call(scene.chunk, empty, [0, 1])


@pytest.mark.parametrize("level", [7, "caches", [None], [[torch.zeros(1)]]])
def test_caches_that_are_no_tensors(scene: Scene, call: Callable[..., Any], level: Any) -> None:
    with refused(LayoutError, "expect", watch=scene.memory):
        call(scene.chunk, level, [0, 1])


@pytest.mark.parametrize("memory_obj", [None, 7, np.zeros(3), object()])
def test_chunk_that_is_no_tensor(
    scene: Scene, call: Callable[..., Any], memory_obj: object
) -> None:
    with refused(LayoutError, "memory_obj", "expected a tensor", watch=scene.memory):
        call(memory_obj, scene.caches, [0, 1])


def test_sparse_caches() -> None:
    dense = torch.eye(4).view(1, 4, 1, 4)
    for tensors, layout in (
        (dense.to_sparse(), "block token head dim"),
        ([dense.to_sparse()], "layer | block token head dim"),
    ):
        with refused(LayoutError, "strided", "sparse"):
            KVView(tensors, layout)


# Chunks


def test_chunk_too_short(scene: Scene, call: Callable[..., Any]) -> None:
    with refused(SlotError, "9 tokens", "holds 8", "larger", watch=scene.memory):
        call(scene.chunk, scene.caches, list(range(9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64])
def test_chunk_of_another_dtype_width(
    scene: Scene, call: Callable[..., Any], dtype: torch.dtype
) -> None:
    chunk = filled((2, LAYERS, 8, HEADS * DIM), dtype, poison=True)
    names = ("memory_obj", str(dtype), "torch.float16", "expected")
    with refused(LayoutError, *names, watch=[*scene.memory, chunk]):
        call(chunk, scene.caches, [0, 1])


def test_chunk_whose_elements_do_not_divide_a_row() -> None:
    caches = [filled((2, BLOCKS, SIZE, 1, 3), torch.uint8)]
    chunk = filled((2, 1, 8, 3), torch.int16, poison=True)
    with refused(LayoutError, "memory_obj", "2 bytes", "3", watch=[*caches, chunk]):
        AdaptiveConnector("cpu").from_gpu(chunk, caches, [0, 1])


def test_chunk_inside_the_cache(scene: Scene, call: Callable[..., Any]) -> None:
    rows = 2 * LAYERS * 2 * HEADS * DIM
    inside = scene.caches[1].view(-1)[:rows].view(2, LAYERS, 2, HEADS * DIM)
    with refused(LayoutError, "memory_obj", "kv_caches", "own", watch=scene.memory):
        call(inside, scene.caches, [8, 9])


def test_chunk_inside_the_cache_behind_a_nested_plane(scene: Scene) -> None:
    # Keys span the whole allocation; values lie between the keys' first and second block.
    pool = filled((4096,), torch.uint8)
    keys = pool.as_strided((4, 1, 16), (1000, 16, 1))
    values = pool.as_strided((4, 1, 8), (8, 8, 1), pool.storage_offset() + 100)
    chunk = pool[2000:2048].view(2, 24)
    connector = AdaptiveConnector(
        "cpu", kv_layout="layer kv | block token dim", chunk_layout="token (kv dim)"
    )
    with refused(LayoutError, "memory_obj", "kv_caches", watch=pool):
        connector.to_gpu(chunk, [(keys, values)], [0, 1])


def test_chunk_inside_caches_whose_list_was_emptied(scene: Scene) -> None:
    scene.connector.register_kv_caches(scene.caches)
    kept = list(scene.caches)
    inside = kept[0].view(-1)[: 2 * LAYERS * 2 * 16].view(2, LAYERS, 2, 16)
    scene.caches.clear()
    with refused(LayoutError, "memory_obj", "kv_caches", watch=kept):
        scene.connector.to_gpu(inside, None, [8, 9])


def test_rows_both_source_and_destination(scene: Scene) -> None:
    view = scene.cache_view()
    with refused(SlotError, "Slot 3", "source and destination", watch=scene.memory):
        copy_rows(view, view, [3, 4], [9, 3])
    first, second = view.slice(layers=slice(0, 2)), view.slice(layers=slice(1, 3))
    with refused(SlotError, "source and destination", watch=scene.memory):
        copy_rows(first, second, [3, 4], [4, 9])


@pytest.mark.parametrize(("src", "dst"), [([3, 4], None), (None, [3, 4]), ([3, 4], [9, 2])])
def test_disjoint_rows_of_one_cache_are_moved(scene: Scene, src: Any, dst: Any) -> None:
    before = [cache.clone().view(2, SLOTS, HEADS, DIM) for cache in scene.caches]
    view = scene.cache_view()
    copy_rows(view, view, src, dst, count=2).synchronize()
    for was, cache in zip(before, scene.caches, strict=True):
        wanted = was.clone()
        wanted[:, dst or [0, 1]] = was[:, src or [0, 1]]
        assert same(cache.view(2, SLOTS, HEADS, DIM), wanted)


# Devices, gradients, backends


def test_caches_on_different_devices(scene: Scene, call: Callable[..., Any]) -> None:
    mixed = [*scene.caches[:-1], scene.caches[-1].to("meta")]
    with refused(DeviceMismatch, "cpu", "meta", "one device", watch=scene.memory):
        call(scene.chunk, mixed, [0, 1])


def test_meta_tensors(scene: Scene, call: Callable[..., Any]) -> None:
    with refused(LayoutError, "meta", "memory", "allocated", watch=scene.memory):
        call(scene.chunk, [cache.to("meta") for cache in scene.caches], [0, 1])
    with refused(LayoutError, "meta", "memory", "allocated", watch=scene.memory):
        call(scene.chunk.to("meta"), scene.caches, [0, 1])


def test_destinations_that_require_grad(scene: Scene) -> None:
    grad = scene.chunk.detach().clone().requires_grad_()
    with refused(LayoutError, "destination", "grad", "detach", watch=[*scene.memory, grad]):
        scene.connector.from_gpu(grad, scene.caches, [0, 1])
    caches = [torch.nn.Parameter(cache.clone()) for cache in scene.caches]
    with refused(LayoutError, "destination", "grad", "detach", watch=[*scene.memory, *caches]):
        scene.connector.to_gpu(scene.chunk, caches, [0, 1])
    # As sources they are read like any other, and no gradient is recorded.
    scene.connector.to_gpu(grad, scene.caches, [0, 1]).synchronize()
    assert same(scene.caches[0][0, 0, 0].reshape(-1), grad[0, 0, 0])
    scene.connector.from_gpu(scene.chunk, caches, [0, 1]).synchronize()
    assert not scene.chunk.requires_grad


def test_forced_unknown_backend(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(BackendUnavailable, "'nonsense'", "no such backend", "portakv backends --device"):
        AdaptiveConnector("cpu", backend="nonsense")
    with refused(BackendUnavailable, "'nonsense'", "no such backend", watch=scene.memory):
        copy_rows(scene.cache_view(), scene.chunk_view(), [0], backend="nonsense")
    monkeypatch.setenv("PORTAKV_BACKEND", "nonsense")
    with refused(BackendUnavailable, "'nonsense'", "PORTAKV_BACKEND", watch=scene.memory):
        copy_rows(scene.cache_view(), scene.chunk_view(), [0], backend="reference")


@pytest.mark.parametrize("device", ["meta", "nonsense", None, 1.5])
def test_devices_that_nobody_serves(device: Any) -> None:
    with refused(BackendUnavailable, str(device)):
        AdaptiveConnector(device)


# Views that cannot hold each other's rows


def test_views_of_other_extents(scene: Scene) -> None:
    cache = scene.cache_view()
    for part, word in (({"layers": 0}, "'layer'"), ({"heads": 0}, "'head'"), ({"kv": 0}, "'kv'")):
        with refused(LayoutError, word, "source", "destination", watch=scene.memory):
            copy_rows(cache.slice(**part), scene.chunk_view(), [0, 1])
    wide = KVView(filled((2, LAYERS, 8, HEADS, 2 * DIM)), "kv layer token head dim")
    with refused(LayoutError, "16", "32", "bytes", watch=[*scene.memory, wide.tensors]):
        copy_rows(cache, wide, [0, 1])


def test_opaque_pages_by_token(scene: Scene) -> None:
    pages = [filled((6, 64), torch.uint8) for _ in range(2)]
    targets = [filled((6, 64), torch.uint8, poison=True) for _ in range(2)]
    src, dst = (KVView(x, "layer | block page", block_size=4) for x in (pages, targets))
    rows = KVView(filled((2, 8, 16), torch.uint8), "layer token dim")
    memory = [*pages, *targets, rows.tensors]
    with refused(Unsupported, "opaque", "whole", watch=memory):
        copy_rows(src, dst, [0, 1, 2], [4, 5, 6])
    with refused(Unsupported, "opaque", "whole", watch=memory):
        copy_rows(src, dst, Index([0, 1], step=4), Index([2, 3], step=4), count=6)
    with refused(Unsupported, "opaque", "rows", watch=memory):
        copy_rows(src, rows, Index([0, 1], step=4))
    other = KVView(targets, "layer | block page", block_size=8)
    with refused(LayoutError, "hold 4 tokens", "8", "equal", watch=memory):
        copy_blocks(src, other, [0, 1], [0])


def test_blocks_of_a_view_without_blocks(scene: Scene) -> None:
    with refused(LayoutError, "dst_blocks", "`block`", "None", watch=scene.memory):
        copy_blocks(scene.cache_view(), scene.chunk_view(), [0], [0])
    with refused(SlotError, "src_blocks", "step 2", "step=4", watch=scene.memory):
        copy_blocks(scene.cache_view(), scene.chunk_view(), Index([0], step=2), None)
    with refused(SlotError, "covers 4", "destination 8", watch=scene.memory):
        copy_blocks(scene.cache_view(), scene.cache_view(), [0], [1, 2])


def test_destinations_that_share_a_place(scene: Scene) -> None:
    shared = filled((1, 1, 1, HEADS, DIM))
    wide = shared.expand(2, 1, 8, HEADS, DIM)
    cache = scene.cache_view().slice(layers=0)
    with refused(LayoutError, "destination", "one", watch=[*scene.memory, shared]):
        copy_rows(cache, KVView(wide, "kv layer token head dim"), [0, 1])
    twice = [scene.caches[0], scene.caches[1], scene.caches[0]]
    with refused(LayoutError, "destination", "address", watch=scene.memory):
        AdaptiveConnector("cpu").to_gpu(scene.chunk, twice, [0, 1])
