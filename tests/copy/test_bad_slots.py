# SPDX-License-Identifier: Apache-2.0
"""Bad slots, ranges and batches are refused with a sentence, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import filled, refused, same, untouched
from support.scene import BLOCKS, CHUNK_LAYOUT, DIM, HEADS, LAYERS, SIZE, SLOTS, Scene

from portakv import (
    AdaptiveConnector,
    Index,
    KVView,
    LayoutError,
    SlotError,
    copy_blocks,
    copy_rows,
)

I64 = torch.iinfo(torch.int64)


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture(params=["from_gpu", "to_gpu"])
def call(request: pytest.FixtureRequest, scene: Scene) -> Callable[..., Any]:
    return getattr(scene.connector, request.param)  # type: ignore[no-any-return]


FLOATS = [[0.0, 1.0], torch.tensor([0.0, 1.0]), np.array([0.0, 1.0]), torch.tensor([]), [0, None]]
BOOLS = [[True, False], torch.tensor([True, False]), np.array([True, False])]
NARROW = [torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.int16)]


@pytest.mark.parametrize("slots", FLOATS + BOOLS + NARROW, ids=lambda x: f"{type(x).__name__}")
def test_slots_that_are_no_integers(scene: Scene, call: Callable[..., Any], slots: Any) -> None:
    with refused(SlotError, "was", watch=scene.memory):
        call(scene.chunk, scene.caches, slots)


@pytest.mark.parametrize(
    "slots",
    [
        np.array(["0", "1"]), np.array([0, None]), [2**70], [-(2**70)], "01", 3,
        torch.zeros(2, 2, dtype=torch.int64), torch.tensor(3),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ],
    ids=["text", "objects", "huge", "minus-huge", "string", "number", "square", "scalar", "meta"],
)  # fmt: skip
def test_slots_that_are_no_list_of_slots(
    scene: Scene, call: Callable[..., Any], slots: Any
) -> None:
    with refused(SlotError, "was", watch=scene.memory):
        call(scene.chunk, scene.caches, slots)


def test_no_slots_passed(scene: Scene, call: Callable[..., Any]) -> None:
    with refused(SlotError, "slot_mapping", "pass", watch=scene.memory):
        call(scene.chunk, scene.caches)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slot", [SLOTS, SLOTS + 1, 2**31 - 1])
def test_slots_past_the_end(
    scene: Scene, call: Callable[..., Any], slot: int, dtype: torch.dtype
) -> None:
    names = ("Position 2", f"slot {slot}", f"{SLOTS} slots", "0 to 19")
    with refused(SlotError, *names, watch=scene.memory):
        call(scene.chunk, scene.caches, torch.tensor([0, 1, slot, 3], dtype=dtype))


@pytest.mark.parametrize("block", [BLOCKS, 2**61, 2**62, I64.max])
@pytest.mark.parametrize("count", [10, 12])
def test_blocks_past_the_end_whose_slots_do_not_fit_64_bits(
    scene: Scene, block: int, count: int
) -> None:
    # 2**62 * 4 is 0 in 64 bits: a wild block must not come back as block 0.
    cache, chunk = scene.cache_view(), filled((2, LAYERS, 12, HEADS * DIM), poison=True)
    dense = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    with refused(SlotError, "Position 4", "slots", watch=[*scene.memory, chunk]):
        copy_rows(cache, dense, Index([0, block, 1], step=SIZE), count=count)
    with refused(SlotError, "Position 4", "slots", watch=[*scene.memory, chunk]):
        copy_rows(dense, cache, None, Index([0, block, 1], step=SIZE), count=count)


@pytest.mark.parametrize("padding", [-1, -7, I64.min, -(2**62), -(2**31)])
@pytest.mark.parametrize("count", [10, 12])
def test_any_negative_block_is_padding(scene: Scene, padding: int, count: int) -> None:
    # -2**63 * 4 is 0 in 64 bits: padding must not come back as block 0.
    before = [cache.clone() for cache in scene.caches]
    chunk = filled((2, LAYERS, 12, HEADS * DIM))
    dense = KVView(chunk, CHUNK_LAYOUT, heads=HEADS)
    copy_rows(dense, scene.cache_view(), None, Index([2, padding, 1], step=SIZE), count=count)
    rows = chunk.view(2, LAYERS, 12, HEADS, DIM)
    for layer, (was, cache) in enumerate(zip(before, scene.caches, strict=True)):
        wanted = was.clone()
        wanted[:, 2] = rows[:, layer, :4]
        wanted[:, 1, : count - 8] = rows[:, layer, 8:count]
        assert same(cache, wanted)


@pytest.mark.parametrize(
    ("start", "end", "names"),
    [
        (3, 2, ("[3:2]", "4 slots", "start <= end")),
        (0, 5, ("[0:5]", "4 slots", "start <= end")),
        (-1, 2, ("[-1:2]", "4 slots", "start <= end")),
        (5, None, ("[5:4]", "4 slots", "start <= end")),
        (0, -1, ("[0:-1]", "4 slots", "start <= end")),
    ],
)
def test_ranges_that_are_none(
    scene: Scene, call: Callable[..., Any], start: int, end: int | None, names: tuple[str, ...]
) -> None:
    with refused(SlotError, *names, watch=scene.memory):
        call(scene.chunk, scene.caches, [0, 1, 2, 3], start, end)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0.5, 2), (0, 1.5), ("0", 2), (0, "2"), (None, 2)])
def test_ranges_that_are_no_integers(
    scene: Scene, call: Callable[..., Any], start: Any, end: Any, kept: bool
) -> None:
    slots = Index([0, 1, 2, 3]) if kept else [0, 1, 2, 3]
    with refused(SlotError, "integer", watch=scene.memory):
        call(scene.chunk, scene.caches, slots, start, end)


@pytest.mark.parametrize("count", [-1, 2.0, "2"])
def test_counts_that_are_none(scene: Scene, count: Any) -> None:
    with refused(SlotError, "count", "was asked", watch=scene.memory):
        copy_rows(scene.cache_view(), scene.chunk_view(), [0, 1, 2], count=count)


def test_count_past_the_list_and_past_the_view(scene: Scene) -> None:
    cache, chunk = scene.cache_view(), scene.chunk_view()
    with refused(SlotError, "4 positions", "source index", "3 ids", watch=scene.memory):
        copy_rows(cache, chunk, [0, 1, 2], count=4)
    with refused(SlotError, "9 tokens", "destination", "holds 8", watch=scene.memory):
        copy_rows(cache, chunk, list(range(9)))
    with refused(SlotError, "covers 20", "destination 8", watch=scene.memory):
        copy_rows(cache, chunk)
    with refused(SlotError, "covers 3", "destination 2", watch=scene.memory):
        copy_rows(cache, cache, [0, 1, 2], [3, 4])
    with refused(SlotError, "step", "offset", watch=scene.memory):
        copy_rows(cache, chunk, Index([0], step=0))
    with refused(SlotError, "step", "offset", watch=scene.memory):
        copy_rows(cache, chunk, Index([0], offset=-1))


def test_duplicate_destinations(scene: Scene) -> None:
    with refused(SlotError, "Slot 7", "2 times", "once", watch=scene.memory):
        scene.connector.to_gpu(scene.chunk, scene.caches, [7, 3, 7])
    wide = filled((2, LAYERS, 600, HEADS * DIM))
    big = [filled((2, 200, SIZE, HEADS, DIM), poison=True) for _ in range(LAYERS)]
    slots = [*range(599), 598]
    with refused(SlotError, "Slot 598", "2 times", "once", watch=[wide, big]):
        AdaptiveConnector("cpu").to_gpu(wide, big, slots)
    cache = scene.cache_view()
    with refused(SlotError, "2 times", "once", watch=scene.memory):
        copy_blocks(scene.chunk_view(), cache, None, [2, 2])


def test_duplicate_sources_and_repeated_padding_are_fine(scene: Scene) -> None:
    with untouched(scene.caches):
        scene.connector.from_gpu(scene.chunk, scene.caches, [7, 3, 7, -1, -1]).synchronize()
    scene.connector.to_gpu(scene.chunk, scene.caches, [7, 3, -1, -1]).synchronize()
    assert same(scene.caches[0][0, 0, 3].reshape(-1), scene.chunk[0, 0, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_empty_list_is_a_no_op(
    scene: Scene, call: Callable[..., Any], dtype: torch.dtype
) -> None:
    empties: list[Any] = [[], torch.empty(0, dtype=dtype), np.empty(0, dtype=np.int64)]
    for slots in empties:
        with untouched(scene.memory):
            transfer = call(scene.chunk, scene.caches, slots)
            assert transfer.done()
            transfer.wait()
            transfer.synchronize()
    with untouched(scene.memory):
        assert call(scene.chunk, scene.caches, [0, 1], 1, 1).done()
        assert copy_rows(scene.cache_view(), scene.chunk_view(), [], []).done()
        assert copy_blocks(scene.cache_view(), scene.chunk_view(), [], None).done()


# Batches


def test_batches_of_unequal_lengths(scene: Scene) -> None:
    with refused(SlotError, "1 memory objects", "2 starts", "1 ends", watch=scene.memory):
        scene.connector.batched_to_gpu([scene.chunk], scene.caches, [0, 1], [0, 1], [2])


@pytest.mark.parametrize(
    ("store", "fault"),
    [
        *((True, fault) for fault in ("slot", "range", "meta", "grad", "twice")),
        *((False, fault) for fault in ("slot", "range", "meta", "duplicate")),
    ],
)
def test_a_bad_chunk_refuses_the_whole_batch(scene: Scene, store: bool, fault: str) -> None:
    # The first chunk is a set of its own: it must not be moved before the others were judged.
    chunks = [filled((2, LAYERS, n, HEADS * DIM), poison=True) for n in (3, 4, 4)]
    slots, starts, ends = [*range(11)], [0, 3, 7], [3, 7, 11]
    error: Any = SlotError
    if fault == "slot":
        slots[9] = SLOTS
    elif fault == "duplicate":
        slots[9] = slots[4]
    elif fault == "range":
        ends[2] = 12
    elif fault == "grad":
        chunks[2].requires_grad_()
        error = LayoutError
    elif fault == "twice":
        chunks[2] = chunks[1]
        error = LayoutError
    else:
        chunks[2] = chunks[2].to("meta")
        error = LayoutError
    move = scene.connector.batched_from_gpu if store else scene.connector.batched_to_gpu
    with refused(error, watch=[*scene.memory, *chunks]):
        move(chunks, scene.caches, slots, starts, ends)
