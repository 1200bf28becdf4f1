# SPDX-License-Identifier: Apache-2.0
"""Block transfers on the host: every way moves the same bytes, tells of itself, and refuses what
it cannot do."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.block_cases import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    SLICED,
    WAYS,
    block_first,
    layered,
    wanted,
)
from support.guarded_memory import filled, refused, same, untouched

from portakv import (
    BlockTransfer,
    DeviceMismatch,
    Index,
    KVView,
    LayoutError,
    SlotError,
    Transfer,
    TransferError,
    Unsupported,
    copy_blocks,
)
from portakv.blocks import slices as block_slices
from portakv.errors import InvalidTerms

SRC, DST = [5, 0, 7, 2, 3], [1, 6, 0, 4, 2]
BLOCK_BYTES = LAYERS * 2 * SIZE * HEADS * DIM * 2


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks to a slice."""
    monkeypatch.setattr(block_slices, "SLICE", 2 * BLOCK_BYTES)


@pytest.fixture(params=WAYS, ids=str)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def layers_of(transfer: BlockTransfer, options: dict[str, Any]) -> tuple[Transfer, ...]:
    """A transfer for each layer; none, and an error that says so, without ``by_layer``."""
    if "by_layer" in options:
        assert len(transfer.layers) == LAYERS
        return transfer.layers
    with refused(TransferError, "by_layer=True"):
        _ = transfer.layers
    return ()


# The bytes


def test_blocks_of_other_layouts(options: dict[str, Any]) -> None:
    for src, dst in ((layered(), block_first()), (block_first(), layered())):
        expected = wanted(src, dst, SRC, DST)
        with untouched(src.tensors):
            transfer = copy_blocks(src.view, dst.view, SRC, DST, **options)
            transfer.synchronize()
        assert isinstance(transfer, BlockTransfer)
        assert transfer.done()
        assert torch.equal(dst.rows(), expected)


def test_blocks_of_another_size(options: dict[str, Any]) -> None:
    src, dst = layered(), block_first(blocks=BLOCKS // 2, size=2 * SIZE)
    expected = wanted(src, dst, [5, 0, 7, 2], [3, 1])
    copy_blocks(src.view, dst.view, [5, 0, 7, 2], [3, 1], **options).synchronize()
    assert torch.equal(dst.rows(), expected)
    back = layered()
    expected = wanted(dst, back, [3, 1], [5, 0, 7, 2])
    copy_blocks(dst.view, back.view, [3, 1], [5, 0, 7, 2], **options).synchronize()
    assert torch.equal(back.rows(), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_skipped_blocks(options: dict[str, Any], dtype: Any) -> None:
    src, dst = layered(), block_first()
    mine, theirs = np.array([5, -1, 7, 2, 3], dtype), np.array([1, 6, 0, -3, 2], dtype)
    expected = wanted(src, dst, list(mine), list(theirs))
    transfer = copy_blocks(src.view, dst.view, mine, theirs, **options)
    transfer.synchronize()
    assert torch.equal(dst.rows(), expected)
    found = transfer.statistics
    assert (found.blocks, found.blocks_asked, found.nbytes) == (3, 3, 3 * BLOCK_BYTES)


def test_a_chunk_on_one_side(options: dict[str, Any]) -> None:
    cache, ids = layered(), [6, 1, 4]
    tokens = len(ids) * SIZE
    chunk = filled((2, LAYERS, tokens, HEADS * DIM), poison=True)
    view = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    stored = copy_blocks(cache.view, view, ids, None, **options)
    stored.synchronize()
    rows = cache.rows()[:, :, cache.slots(ids)]
    assert same(chunk.view(torch.int16), rows.permute(1, 0, 2, 3).contiguous())
    assert stored.statistics.blocks == 3
    other = layered()
    expected = other.rows()
    expected[:, :, other.slots([0, 5, 2])] = rows
    loaded = copy_blocks(view, other.view, None, [0, 5, 2], **options)
    loaded.synchronize()
    assert torch.equal(other.rows(), expected)
    assert loaded.statistics.blocks == 3


def test_an_index_that_begins_inside_a_block(options: dict[str, Any]) -> None:
    cache = layered()
    chunk = filled((2, LAYERS, 3 * SIZE - 1, HEADS * DIM), poison=True)
    view = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    copy_blocks(cache.view, view, Index([6, 1, 4], SIZE, 1), None, **options).synchronize()
    rows = cache.rows()[:, :, cache.slots([6, 1, 4])[1:]]
    assert same(chunk.view(torch.int16), rows.permute(1, 0, 2, 3).contiguous())


def test_opaque_pages(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_slices, "SLICE", 1)
    pages = [filled((6, 64), torch.uint8) for _ in range(2)]
    targets = [filled((6, 64), torch.uint8, poison=True) for _ in range(2)]
    src, dst = (KVView(x, "layer | block page", block_size=4) for x in (pages, targets))
    expected = [target.clone() for target in targets]
    for page, target in zip(pages, expected, strict=True):
        target[[3, 0]] = page[[1, 5]]
    transfer = copy_blocks(src, dst, [1, -1, 5], [3, 1, 0], **options)
    transfer.synchronize()
    assert all(same(a, b) for a, b in zip(targets, expected, strict=True))
    assert transfer.statistics.nbytes == 2 * 2 * 64


def test_within_one_cache(options: dict[str, Any]) -> None:
    cache = layered()
    expected = wanted(cache, cache, [5, 0, 7], [1, 6, 2])
    copy_blocks(cache.view, cache.view, [5, 0, 7], [1, 6, 2], **options).synchronize()
    assert torch.equal(cache.rows(), expected)
    with refused(SlotError, "both source and destination", watch=cache.tensors):
        copy_blocks(cache.view, cache.view, [5, 0, 7], [1, 5, 2], **options)


def test_nothing_to_move(options: dict[str, Any]) -> None:
    src, dst = layered(), layered()
    for mine, theirs in (([], []), ([-1, 3], [2, -1])):
        with untouched(dst.tensors):
            transfer = copy_blocks(src.view, dst.view, mine, theirs, **options)
            assert transfer.done()
            transfer.wait()
            transfer.synchronize()
        found = transfer.statistics
        assert (found.nbytes, found.blocks, found.blocks_asked) == (0, 0, 0)
        layers = layers_of(transfer, options)
        assert all(layer.done() for layer in layers)
        assert not transfer.cancel()


def test_caches_of_inference_mode(options: dict[str, Any]) -> None:
    with torch.inference_mode():
        src, dst = layered(), block_first()
        expected = wanted(src, dst, SRC, DST)
        transfer = copy_blocks(src.view, dst.view, SRC, DST, **options)
    transfer.synchronize()
    assert torch.equal(dst.rows(), expected)


def test_an_index_is_used_again(options: dict[str, Any]) -> None:
    mine, theirs = Index(SRC, SIZE), Index(torch.tensor(DST), SIZE)
    for _ in range(2):
        src, dst = layered(), block_first()
        expected = wanted(src, dst, SRC, DST)
        copy_blocks(src.view, dst.view, mine, theirs, **options).synchronize()
        assert torch.equal(dst.rows(), expected)


# What it tells of itself


def test_statistics(options: dict[str, Any]) -> None:
    src, dst = layered(), block_first()
    transfer = copy_blocks(src.view, dst.view, SRC, DST, **options)
    assert transfer.statistics.blocks_asked == 5
    transfer.synchronize()
    found = transfer.statistics
    assert (found.nbytes, found.blocks, found.blocks_asked) == (5 * BLOCK_BYTES, 5, 5)
    assert (found.engine, found.why) == ("reference", "takes the plan")
    assert found.seconds is not None
    assert found.gbps == pytest.approx(found.nbytes / found.seconds / 1e9)
    assert not found.cancelled
    slices = 3 if set(options) - {"by_layer", "detached"} else 1
    if "by_layer" in options:
        # A layer of all five blocks is smaller than a slice.
        slices = LAYERS
    assert found.slices == slices


def test_statistics_before_the_end_of_a_transfer_that_nobody_asked() -> None:
    transfer = copy_blocks(layered().view, layered().view, SRC, DST, cancellable=True)
    found = transfer.statistics
    while found.seconds is None:
        assert found.gbps is None
        found = transfer.statistics
    assert found.blocks == 5


def test_layers_end_one_by_one(options: dict[str, Any]) -> None:
    transfer = copy_blocks(layered().view, layered().view, SRC, DST, **options)
    for layer in layers_of(transfer, options):
        layer.wait()
        layer.synchronize()
        assert layer.done()
    transfer.synchronize()


def test_a_transfer_that_was_issued_at_once_cannot_be_cancelled() -> None:
    for options in (WAYS["at once"], WAYS["by layer"]):
        transfer = copy_blocks(layered().view, layered().view, SRC, DST, **options)
        assert not transfer.cancel()
        assert not transfer.cancelled
        transfer.synchronize()
        assert not transfer.cancel()


def test_memory_is_held_until_the_end_and_no_longer(options: dict[str, Any]) -> None:
    src, dst = layered(), layered()
    refs = [weakref.ref(x) for x in (*src.tensors, *dst.tensors)]
    transfer = copy_blocks(src.view, dst.view, SRC, DST, **options)
    del src, dst
    transfer.synchronize()
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    assert transfer.statistics.blocks == 5
    assert transfer.statistics.engine == "reference"


def test_layer_views_are_made_once() -> None:
    src, dst = layered(), layered()
    for _ in range(2):
        copy_blocks(src.view, dst.view, SRC, DST, by_layer=True)
    views = [src.view.planes((i, i + 1), None) for i in range(LAYERS)]
    assert [src.view.planes((i, i + 1), None) for i in range(LAYERS)] == views
    assert len({id(view.form) for view in views}) == 1


# Bad input


def test_ids_that_nobody_may_use(options: dict[str, Any]) -> None:
    src, dst = layered(), block_first()
    memory = [src.tensors, dst.tensors]
    with refused(SlotError, "source", f"{BLOCKS * SIZE} slots", watch=memory):
        copy_blocks(src.view, dst.view, [0, BLOCKS], [1, 2], **options)
    with refused(SlotError, "destination", f"id {BLOCKS + 3}", watch=memory):
        copy_blocks(src.view, dst.view, [0, 1, 2], [1, 2, BLOCKS + 3], **options)
    # The two of them would be in different slices.
    with refused(SlotError, "occurs 2 times", "destination", watch=memory):
        copy_blocks(src.view, dst.view, [0, 1, 2, 3, 4], [1, 2, 3, 4, 1], **options)
    with refused(SlotError, f"covers {2 * SIZE}", f"destination {SIZE}", watch=memory):
        copy_blocks(src.view, dst.view, [0, 1], [1], **options)
    with refused(SlotError, "float", watch=memory):
        copy_blocks(src.view, dst.view, torch.tensor([0.0]), [1], **options)


def test_views_that_cannot_hold_each_other(options: dict[str, Any]) -> None:
    src, dst = layered(), block_first()
    wide = filled((2, BLOCKS, SIZE, HEADS, 2 * DIM))
    view = KVView([wide] * LAYERS, "layer | kv block token head dim")
    with refused(LayoutError, "bytes", watch=[src.tensors, wide]):
        copy_blocks(view, src.view, [0], [1], **options)
    with refused(LayoutError, "share one place", "written", watch=[src.tensors, wide]):
        twice = KVView([src.tensors[0]] * LAYERS, "layer | kv block token head dim")
        copy_blocks(dst.view, twice, [0], [1], **options)
    with refused(LayoutError, "two views"):
        copy_blocks(src.tensors, dst.view, [0], [1], **options)
    with refused(LayoutError, "'layer' extent 1", watch=[src.tensors, dst.tensors]):
        copy_blocks(src.view.slice(layers=0), dst.view, [0], [1], **options)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"overlap": "never"}, "compute, idle; pass one of these, or leave it out"),
        ({"max_gbps": 0}, "above 0; pass so many, or None"),
        ({"max_gbps": -1.5}, "above 0; pass so many, or None"),
        ({"max_gbps": "fast"}, "above 0; pass so many, or None"),
        ({"max_thread_blocks": 0}, "whole number from 1 on; pass one, or None"),
        ({"max_thread_blocks": 2.5}, "whole number"),
        ({"max_thread_blocks": 4}, "leave it out"),
    ],
)
def test_terms_that_nobody_can_keep(terms: dict[str, Any], words: str) -> None:
    src, dst = layered(), layered()
    error = Unsupported if words == "leave it out" else InvalidTerms
    with refused(error, words, str(next(iter(terms))), watch=dst.tensors) as caught:
        copy_blocks(src.view, dst.view, SRC, DST, **terms)
    assert isinstance(caught.value, ValueError) == (error is InvalidTerms)


def test_terms_that_change_nothing_on_the_host() -> None:
    src, dst = layered(), layered()
    expected = wanted(src, dst, SRC, DST)
    copy_blocks(src.view, dst.view, SRC, DST, overlap="idle").synchronize()
    assert torch.equal(dst.rows(), expected)


def test_a_stream_of_another_device(options: dict[str, Any]) -> None:
    class Elsewhere:
        device = torch.device("cuda", 1)

    src, dst = layered(), layered()
    with refused(DeviceMismatch, "cpu", "cuda:1", "stream", watch=dst.tensors):
        copy_blocks(src.view, dst.view, SRC, DST, stream=Elsewhere(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", SLICED)
def test_a_backend_that_takes_no_such_plan_is_told_at_the_call(way: str) -> None:
    pages = KVView(filled((2, 6, 64), torch.uint8), "layer block page", block_size=4)
    rows = KVView(filled((2, 8, 4, 16), torch.uint8), "layer block token dim")
    with refused(Unsupported, "opaque"):
        copy_blocks(pages, rows, [0], [1], **WAYS[way])
