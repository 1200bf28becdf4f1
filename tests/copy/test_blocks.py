# SPDX-License-Identifier: Apache-2.0
"""Block transfers on the host, within a device and between the two: every way moves the same
bytes, reports about itself, and refuses what it cannot do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.block_cases import (
    BLOCK_BYTES,
    BLOCKS,
    DIM,
    DST,
    HEADS,
    LAYERS,
    METHODS,
    SIZE,
    SLICED,
    SRC,
    Cache,
    Pair,
    block_first,
    inside,
    layered,
    pair,
)
from support.command_line import registered
from support.device_cases import STORE, current, settle
from support.guarded_memory import filled, refused, same, untouched
from support.small_backends import small_backend

from portakv import BlockTransfer, Index, KVView, copy_blocks, copy_rows
from portakv.copy import inside as copy_inside
from portakv.copy import submit as block_slices
from portakv.core import call as core_call
from portakv.errors import (
    DeviceMismatch,
    InvalidTerms,
    LayoutError,
    SlotError,
    TransferError,
    Unsupported,
)

pytestmark = pytest.mark.usefixtures("small_slices")


# The bytes


@pytest.mark.parametrize("side", [False, True], ids=["current stream", "side stream"])
@pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])
@STORE
def test_every_byte_lands(
    device: torch.device, store: bool, pin: bool, side: bool, options: dict[str, Any]
) -> None:
    blocks = pair(device, store, pin)
    host = device.type == "cpu"
    before = None if host else current(device)
    stream = torch.Stream(device) if side and not host else None
    with untouched(blocks.src.tensors):
        moved = blocks.start(stream=stream, **options)
        assert host or current(device) == before
        moved.synchronize()
    assert isinstance(moved, BlockTransfer)
    assert moved.done()
    assert blocks.landed()
    statistics = moved.statistics
    assert (statistics.blocks, statistics.blocks_requested, statistics.nbytes) == (
        5,
        5,
        5 * BLOCK_BYTES,
    )
    engines = {"cpu": {"reference"}, "cuda": {statistics.strategy}}
    on_link = {"staged", "batched_memcpy"} if pin else {"pageable"}
    assert statistics.strategy in engines.get(device.type, on_link)
    assert statistics.why
    assert statistics.seconds is not None
    assert statistics.gbps == pytest.approx(statistics.nbytes / statistics.seconds / 1e9)
    assert not statistics.cancelled


def test_inside_a_device(accelerator: torch.device, options: dict[str, Any]) -> None:
    blocks = inside(accelerator)
    moved = blocks.start(**options)
    moved.synchronize()
    assert blocks.landed()
    assert moved.statistics.seconds is not None


def test_blocks_of_another_size(device: torch.device, options: dict[str, Any]) -> None:
    there = layered(device)
    here = block_first(blocks=BLOCKS // 2, size=2 * SIZE, pin=device.type != "cpu")
    settle(device)
    for ends, ids in (((there, here), ([5, 0, 7, 2], [3, 1])), ((here, there), ([3], [5, 4]))):
        blocks = Pair(*ends, *ids)
        blocks.start(**options).synchronize()
        assert blocks.landed()


@pytest.mark.parametrize("kind", ["arrays", "on the device"])
@STORE
def test_skipped_blocks(
    device: torch.device, store: bool, kind: str, options: dict[str, Any]
) -> None:
    blocks = pair(device, store, True, [5, -1, 7, 2, 3], [1, 6, 0, -3, 2])
    ids: Any = [np.array(one, dtype) for one, dtype in zip(blocks.ids, "il", strict=True)]
    if kind == "on the device":
        ids = [torch.from_numpy(one).to(device) for one in ids]
    moved = blocks.start(*ids, **options)
    moved.synchronize()
    assert blocks.landed()
    statistics = moved.statistics
    if kind == "arrays":
        assert (statistics.blocks, statistics.blocks_requested, statistics.nbytes) == (
            3,
            3,
            3 * BLOCK_BYTES,
        )


@STORE
def test_bad_ids_on_the_device(accelerator: torch.device, store: bool, method: str) -> None:
    blocks = pair(accelerator, store, True, [5, 2], [1, 4])
    ids = torch.tensor([5, BLOCKS, 2], device=accelerator)
    if method not in SLICED:
        with pytest.raises(SlotError):
            blocks.start(ids, [1, 3, 4], **METHODS[method]).synchronize()
        assert blocks.landed()
    else:  # they are read before anything is issued
        with refused(SlotError, "source", f"id {BLOCKS}", watch=blocks.dst.tensors):
            blocks.start(ids, [1, 3, 4], **METHODS[method])


@pytest.mark.parametrize("offset", [0, 1])
def test_a_chunk_on_one_side(device: torch.device, options: dict[str, Any], offset: int) -> None:
    """With an offset the index begins inside a block."""
    cache = layered(device)
    ids = [6, 1, 4]
    tokens = len(ids) * SIZE - offset
    chunk = filled((2, LAYERS, tokens, HEADS * DIM), poison=True)
    view = KVView(chunk, "kv layer token (head dim)", heads=HEADS)
    stored = copy_blocks(cache.view, view, Index(ids, SIZE, offset), None, **options)
    stored.synchronize()
    rows = cache.rows()[:, :, cache.slots(ids)[offset:]]
    assert same(chunk.view(torch.int16), rows.permute(1, 0, 2, 3).contiguous())
    expected = cache.rows()
    expected[:, :, cache.slots([0, 5, 2])[offset:]] = rows
    loaded = copy_blocks(view, cache.view, None, Index([0, 5, 2], SIZE, offset), **options)
    loaded.synchronize()
    assert torch.equal(cache.rows(), expected)
    if not offset:
        assert (stored.statistics.blocks, loaded.statistics.blocks) == (3, 3)


def test_a_torch_of_which_the_core_reads_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10."""
    for module in (core_call, copy_inside):
        monkeypatch.setattr(module, "handle_at", lambda: None)
    cpu = torch.device("cpu")
    src = layered(cpu)
    dst = layered(cpu)
    expected = dst.rows()
    expected[:, :, dst.slots([0, 5])] = src.rows()[:, :, src.slots([6, 1])]
    copy_blocks(src.view, dst.view, [6, 1], [0, 5]).synchronize()
    assert torch.equal(dst.rows(), expected)


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
    blocks = Pair(cache, cache, [5, 0, 7], [1, 6, 2])
    blocks.start(**options).synchronize()
    assert blocks.landed()
    with refused(SlotError, "both source and destination", watch=cache.tensors):
        blocks.start(dst_ids=[1, 5, 2], **options)


def test_nothing_to_move(options: dict[str, Any]) -> None:
    src = layered()
    dst = layered()
    for src_ids, dst_ids in (([], []), ([-1, 3], [2, -1])):
        with untouched(dst.tensors):
            transfer = copy_blocks(src.view, dst.view, src_ids, dst_ids, **options)
            assert transfer.done()
            transfer.wait()
            transfer.synchronize()
        statistics = transfer.statistics
        assert (statistics.nbytes, statistics.blocks, statistics.blocks_requested) == (0, 0, 0)
        assert not transfer.cancel()


# What a transfer reports about itself


def test_layers_and_slices(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_slices, "SLICE", 2 * BLOCK_BYTES)
    transfer = Pair(layered(), layered()).start(**options)
    assert transfer.statistics.blocks_requested == 5
    if not set(options) - {"by_layer", "detached"}:
        assert not transfer.cancel()  # it was issued immediately
        assert not transfer.cancelled
    if "by_layer" in options:  # a layer of all five blocks is smaller than a slice
        slices = LAYERS
        assert len(transfer.layers) == LAYERS
        for layer in transfer.layers:
            layer.wait()
            layer.synchronize()
            assert layer.done()
    else:
        slices = 3 if set(options) - {"detached"} else 1
        with refused(TransferError, "by_layer=True"):
            _ = transfer.layers
    transfer.synchronize()
    assert transfer.statistics.slices == slices
    assert not transfer.cancel()


def test_statistics_before_the_end_of_a_transfer_that_nobody_asked() -> None:
    transfer = Pair(layered(), layered()).start(cancellable=True)
    statistics = transfer.statistics
    while statistics.seconds is None:
        assert statistics.gbps is None
        statistics = transfer.statistics
    assert statistics.blocks == 5


def test_memory_is_held_until_the_end_and_no_longer(options: dict[str, Any]) -> None:
    src = layered()
    dst = layered()
    src_ids = torch.tensor([*SRC, -1])
    dst_ids = torch.tensor([*DST, 3])
    refs = [weakref.ref(x) for x in (*src.tensors, *dst.tensors, src_ids, dst_ids)]
    transfer = copy_blocks(src.view, dst.view, src_ids, dst_ids, **options)
    del src, dst, src_ids, dst_ids
    transfer.synchronize()
    gc.collect()
    assert not any(ref() is not None for ref in refs)
    assert (transfer.statistics.blocks, transfer.statistics.strategy) == (5, "reference")


@STORE
@pytest.mark.parametrize("name", ["staged", "batched_memcpy", "zero_copy", "host"])
@pytest.mark.parametrize(
    "terms", [{}, {"overlap": "idle"}, {"max_thread_blocks": 2}, {"max_gbps": 1.0}], ids=str
)
def test_an_engine_by_its_name(
    accelerator: torch.device, name: str, terms: dict[str, Any], store: bool
) -> None:
    if name == "zero_copy" and accelerator.type != "cuda":
        pytest.skip("no kernel of this device reads host memory")
    blocks = pair(accelerator, store)
    moved = blocks.start(backend=name, **terms)
    moved.synchronize()
    assert blocks.landed()
    assert name in ("host", moved.statistics.strategy)


# Bad input


NHD = "layer | kv block token head dim"
WIDE = KVView([filled((2, BLOCKS, SIZE, HEADS, 2 * DIM))] * LAYERS, NHD)
PAGES = KVView(filled((2, 6, 64), torch.uint8), "layer block page", block_size=4)
FOR_PAGES = KVView(filled((2, 8, 4, 16), torch.uint8), "layer block token dim")
#: Views and ids of a transfer between two caches, the error, and words of its sentence.
REFUSED: list[tuple[Callable[[Cache, Cache], tuple[Any, ...]], Any, list[str]]] = [
    (lambda src, dst: (src.view, dst.view, [0, BLOCKS], [1, 2]), SlotError,
     ["source", f"{BLOCKS * SIZE} slots"]),
    (lambda src, dst: (src.view, dst.view, [0, 1, 2], [1, 2, BLOCKS + 3]), SlotError,
     ["destination", f"id {BLOCKS + 3}"]),
    (lambda src, dst: (src.view, dst.view, SRC, [1, 2, 3, 4, 1]), SlotError,  # in two slices
     ["occurs 2 times", "destination"]),
    (lambda src, dst: (src.view, dst.view, [0, 1], [1]), SlotError,
     [f"covers {2 * SIZE}", f"destination of {SIZE}"]),
    (lambda src, dst: (src.view, dst.view, torch.tensor([0.0]), [1]), SlotError, ["float"]),
    (lambda src, dst: (WIDE, src.view, [0], [1]), LayoutError, ["bytes"]),
    (lambda src, dst: (dst.view, KVView([src.tensors[0]] * LAYERS, NHD), [0], [1]), LayoutError,
     ["share one place", "writable"]),
    (lambda src, dst: (src.tensors, dst.view, [0], [1]), LayoutError, ["src to be a view"]),
    (lambda src, dst: (src.view.slice(layers=0), dst.view, [0], [1]), LayoutError,
     ["'layer' extent 1"]),
    (lambda src, dst: (PAGES, FOR_PAGES, [0], [1]), Unsupported, ["opaque"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "words"), REFUSED, ids=[" ".join(words) for _, _, words in REFUSED]
)
def test_what_all_refuse(
    arguments: Any, error: Any, words: list[str], options: dict[str, Any]
) -> None:
    src = layered()
    dst = block_first()
    with refused(error, *words, watch=[src.tensors, dst.tensors]):
        copy_blocks(*arguments(src, dst), **options)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"overlap": "never"}, "'compute' or 'idle', got 'never'"),
        ({"max_gbps": 0}, "above 0 and below 10^9"),
        ({"max_gbps": -1.5}, "above 0 and below 10^9"),
        ({"max_gbps": "fast"}, "above 0 and below 10^9"),
        ({"max_thread_blocks": 0}, "whole number of at least 1"),
        ({"max_thread_blocks": 2.5}, "whole number"),
        ({"detached": "no"}, "to be True or False"),
        ({"detached": 1}, "to be True or False"),
        ({"by_layer": "no"}, "to be True or False"),
        ({"cancellable": 0}, "to be True or False"),
        ({"reinterpret": "no"}, "to be True or False"),
        ({"max_gbps": 10**400}, "above 0 and below 10^9"),
    ],
    ids=str,
)
def test_terms_that_nobody_can_keep(terms: dict[str, Any], words: str) -> None:
    blocks = Pair(layered(), layered())
    with refused(InvalidTerms, words, str(next(iter(terms))), watch=blocks.dst.tensors) as caught:
        blocks.start(**terms)
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, Unsupported)


def test_limits_where_no_kernel_reads_host_memory(device: torch.device) -> None:
    blocks = inside(device)
    with refused(Unsupported, "max_thread_blocks=4", "Leave it out", watch=blocks.dst.tensors):
        blocks.start(max_thread_blocks=4)
    blocks.start(overlap="idle").synchronize()
    assert blocks.landed()


def test_streams_and_caches_of_other_devices(accelerator: torch.device, method: str) -> None:
    here = layered()
    name = str(accelerator)
    with refused(DeviceMismatch, "cpu", name, "stream", watch=here.tensors):
        Pair(here, here).start(stream=torch.Stream(accelerator), **METHODS[method])
    if torch.get_device_module(accelerator).device_count() > 1:
        other = torch.device(accelerator.type, 1)
        blocks = pair(accelerator, store=True)
        with refused(DeviceMismatch, name, str(other), "stream", watch=blocks.dst.tensors):
            blocks.start(stream=torch.Stream(other), **METHODS[method])
        between = Pair(blocks.src, layered(other))
        with refused(DeviceMismatch, name, str(other), "stream", watch=between.dst.tensors):
            between.start(stream=torch.Stream(accelerator), **METHODS[method])


@pytest.mark.parametrize("options", [{}, {"by_layer": True}, {"cancellable": True}], ids=str)
def test_memory_that_was_resized_is_noticed(options: dict[str, Any]) -> None:
    """The call notices it, since a backend that uses addresses cannot."""
    src = layered()
    dst = layered()
    storage = src.tensors[1].untyped_storage()
    storage.resize_(2 * storage.nbytes())
    with (
        registered(addresses=small_backend("addresses", by_runs=True)),
        refused(LayoutError, "replaced", "Make the view again", watch=dst.tensors),
    ):
        copy_blocks(src.view, dst.view, SRC, DST, backend="addresses", **options)


@pytest.mark.parametrize("how", ["data", "set_"])
def test_a_kept_view_goes_on_with_the_memory_that_it_read(device: torch.device, how: str) -> None:
    """The view keeps that memory alive, whatever its tensor holds later; see docs/operations.md."""
    src = layered(device)
    dst = layered(device)
    expected = src.rows()
    cache = src.tensors[1]
    fresh = torch.zeros_like(cache)
    if how == "data":
        cache.data = fresh
    else:
        cache.set_(fresh)
    copy_rows(src.view, dst.view).synchronize()
    assert torch.equal(dst.rows(), expected)


# Indices that are used again


@pytest.mark.parametrize("cached", ["both", "src", "dst"])
def test_a_kept_index_is_judged_for_each_view(cached: str) -> None:
    src_index: Any = SRC if cached == "dst" else Index(SRC, SIZE)
    dst_index: Any = DST if cached == "src" else Index(DST, SIZE)
    for blocks in (BLOCKS, BLOCKS, BLOCKS + 1, BLOCKS):  # other memory each time
        moved = Pair(layered(), block_first(blocks=blocks))
        moved.start(src_index, dst_index).synchronize()
        assert moved.landed()
    small = block_first(blocks=6)
    if cached != "src":
        with refused(SlotError, "slot 24", "24 slots", watch=small.tensors):
            copy_blocks(layered().view, small.view, src_index, dst_index)


def test_ids_of_a_source_that_may_not_be_a_destination() -> None:
    """The same indices in the other direction, or next to no ids, are judged again."""
    twice = Index([5, 5, 7], SIZE)
    other = Index([1, 6, 0], SIZE)
    src = layered()
    dst = layered()
    copy_blocks(src.view, dst.view, twice, other).synchronize()
    for _ in range(2):  # what was refused is refused again
        with refused(SlotError, "occurs 2 times", watch=dst.tensors):
            copy_blocks(src.view, dst.view, other, twice)
    for none in (None, Index()):
        copy_rows(src.view, dst.view, twice, none).synchronize()
    with refused(SlotError, "occurs 2 times", watch=dst.tensors):
        copy_rows(src.view, dst.view, Index(), twice)


def test_indices_do_not_hold_each_other_or_any_view() -> None:
    src_index = Index(SRC, SIZE)
    dst_index = Index(DST, SIZE)
    src = layered()
    dst = layered()
    copy_blocks(src.view, dst.view, src_index, dst_index).synchronize()
    gone = [weakref.ref(x) for x in (src.tensors[0], dst.tensors[0], dst_index.ids)]
    gc.disable()
    try:
        del src, dst, dst_index
        assert [ref() is None for ref in gone] == [True] * 3
    finally:
        gc.enable()
