# SPDX-License-Identifier: Apache-2.0
"""`AdaptiveConnector`: what may be passed, in which layouts, alone and in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.connector_cases import (
    BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    SIZE,
    make_caches,
    make_chunk,
    rows,
    scattered,
)
from support.guarded_memory import filled, refused, same, untouched
from support.small_backends import small_backend

from portakv import (
    AdaptiveConnector,
    BlockTransfer,
    CopyOptions,
    Index,
    InvalidTerms,
    KVView,
    LateErrors,
    LayoutError,
    SlotError,
    Transfer,
    Unsupported,
)
from portakv.connector import CHUNK_LAYOUT
from portakv.connector.connector import Batch
from portakv.copy.call import Context
from portakv.registry import registry

SLOTS = [9, 2, 17, 6]
MANY = [9, 2, 17, 6, 0, 3, 11, 23, 14, 5, 20, 8]


@pytest.fixture
def connector() -> AdaptiveConnector:
    return AdaptiveConnector("cpu")


def test_defaults_are_flash_attention_and_2ltd(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunk = make_chunk(5)
    with untouched(caches):
        stored = connector.from_gpu(chunk, caches, [7, 0, 23, 4, 11])
    assert isinstance(stored, Transfer)
    assert same(chunk, rows(caches, [7, 0, 23, 4, 11]))
    wanted = scattered(caches, chunk, [1, 2, 20, 9, 5])
    with untouched(chunk):
        loaded = connector.to_gpu(chunk, caches, [1, 2, 20, 9, 5])
    assert all(map(same, caches, wanted))
    for transfer in (stored, loaded):
        assert transfer.done()
        transfer.wait()
        transfer.synchronize()
        transfer.synchronize()


def test_slots_that_change_after_the_call(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunk = make_chunk(3)
    slots = torch.tensor([9, 2, 17])
    for wanted in ([9, 2, 17], [1, 3, 5]):
        slots.copy_(torch.tensor(wanted))
        connector.from_gpu(chunk, caches, slots)
        assert same(chunk, rows(caches, wanted))


def test_start_and_end(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    slots = [9, 2, 17, 6, 0, 3]
    for start, end in ((0, None), (0, 6), (2, 5), (5, None), (3, 3)):
        chunk = make_chunk(6 if end is not None else 6 - start)
        wanted = chunk.clone()
        wanted[:, :, : len(slots[start:end])] = rows(caches, slots[start:end])
        connector.from_gpu(chunk, caches, slots, start, end)
        assert same(chunk, wanted)
        expected = scattered(caches, chunk, slots[start:end])
        connector.to_gpu(chunk, caches, slots, start=np.int64(start), end=end)
        assert all(map(same, caches, expected))


def test_nothing_to_move(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunk = make_chunk(4)
    for slots in ([], torch.empty(0, dtype=torch.int32), [-1, -1, -1]):
        for move in (connector.from_gpu, connector.to_gpu):
            with untouched(caches, chunk):
                assert move(chunk, caches, slots, 0, len(slots)).done()


def test_caches_in_every_container(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    named = {f"model.layers.{i}.attn": cache for i, cache in enumerate(caches)}
    for passed in (caches, tuple(caches), named):
        chunk = make_chunk(3)
        connector.from_gpu(SimpleNamespace(tensor=chunk, metadata="kept"), passed, [4, 5, 6])
        assert same(chunk, rows(caches, [4, 5, 6]))


@pytest.mark.parametrize(
    ("memory_obj", "reason"),
    [(None, "got None"), (SimpleNamespace(tensor=None), "got None"), ([3], "int"), ([], "empty")],
    ids=str,
)
def test_no_memory_object(connector: AdaptiveConnector, memory_obj: Any, reason: str) -> None:
    caches = make_caches()
    with refused(LayoutError, "memory_obj", reason, watch=caches):
        connector.to_gpu(memory_obj, caches, SLOTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_chunk_of_another_shape_is_not_blamed_on_its_dtype(
    connector: AdaptiveConnector, dtype: torch.dtype
) -> None:
    """Unless the dtype has another width, which changes the extent that fits."""
    caches = make_caches()
    own = caches[0].dtype
    chunk = torch.zeros(2, LAYERS, 3, HEADS * DIM + 1, dtype=dtype)
    said = f"memory_obj to hold chunks of these caches, got a tensor of shape {[*chunk.shape]}"
    with pytest.raises(LayoutError) as raised:
        connector.to_gpu(chunk, caches, SLOTS)
    assert said in str(raised.value)
    assert ("float" in str(raised.value)) == (dtype.itemsize != own.itemsize)


def test_a_view_is_copied_by_other_calls(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunk = KVView(make_chunk(3), CHUNK_LAYOUT, heads=HEADS)
    with refused(LayoutError, "memory_obj", "a KVView", "copy_rows or copy_blocks", watch=caches):
        connector.to_gpu(cast(Any, chunk), caches, SLOTS)


# Layouts


def test_mla_gets_its_chunk_of_one_kv() -> None:
    caches = [filled((BLOCKS, SIZE, 72)) for _ in range(LAYERS)]
    chunk = filled((1, LAYERS, 4, 72), poison=True)
    connector = AdaptiveConnector("cpu", kv_layout="layer | block token dim")
    connector.from_gpu(chunk, caches, SLOTS)
    assert same(chunk[0], torch.stack([cache.view(-1, 72)[SLOTS] for cache in caches]))
    with refused(LayoutError, "memory_obj", "'kv'", "1", "2", watch=caches):
        connector.from_gpu(filled((2, LAYERS, 4, 72)), caches, SLOTS)


def test_block_first_chunks() -> None:
    caches = make_caches()
    slots = [9, 2, 17, 6, 0, 3, 11]
    chunk = filled((2, LAYERS, 2, SIZE, HEADS, DIM), poison=True)
    before = chunk.clone()
    connector = AdaptiveConnector("cpu", chunk_layout="block layer kv token head dim")
    connector.from_gpu(chunk, caches, slots)
    dense = chunk.permute(2, 1, 0, 3, 4, 5).reshape(2, LAYERS, 8, HEADS * DIM)
    assert same(dense[:, :, :7].contiguous(), rows(caches, slots))
    assert same(chunk[1, :, :, 3], before[1, :, :, 3])
    chunks = [filled((1, LAYERS, 2, SIZE, HEADS, DIM), poison=True) for _ in range(3)]
    connector.batched_from_gpu(chunks, caches, MANY, [0, 4, 8], [4, 8, 12])
    for i, one in enumerate(chunks):
        plain = one[0].permute(1, 0, 2, 3, 4).reshape(2, LAYERS, SIZE, HEADS * DIM)
        assert same(plain.contiguous(), rows(caches, MANY[4 * i : 4 * i + 4]))


def test_opaque_pages() -> None:
    pages = [filled((BLOCKS, SIZE * HEADS * DIM)) for _ in range(LAYERS)]
    connector = AdaptiveConnector(
        "cpu", kv_layout="layer | block page", chunk_layout="layer block page", block_size=SIZE
    )
    opaque = filled((LAYERS, 2, SIZE * HEADS * DIM), poison=True)
    connector.from_gpu(opaque, pages, Index([4, 1], step=SIZE))
    assert same(opaque, torch.stack([cache[[4, 1]] for cache in pages]))


# Batches. Name: tokens of each chunk, starts, ends

BATCHES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "equal": ([4, 4, 4], [0, 4, 8], [4, 8, 12]),
    "one": ([4], [3], [7]),
    "partial last": ([4, 4, 4], [0, 4, 8], [4, 8, 10]),
    "partial first": ([4, 4], [0, 2], [2, 6]),
    "all partial": ([4, 4, 4], [0, 2, 5], [2, 5, 6]),
    "unequal": ([4, 2, 4, 3], [0, 4, 6, 10], [4, 6, 10, 12]),
    "apart": ([4, 4], [7, 1], [11, 5]),
    "a gap": ([3, 3, 3], [0, 4, 8], [3, 7, 11]),
    "some empty": ([4, 4, 4], [0, 4, 4], [4, 4, 8]),
    "nothing to move": ([4, 4], [3, 5], [3, 5]),
    "none": ([], [], []),
}


@pytest.mark.parametrize("skipped", [[], [1, 4, 5, 6, 7, 10]], ids=["all", "some skipped"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(connector: AdaptiveConnector, name: str, skipped: list[int]) -> None:
    sizes, starts, ends = BATCHES[name]
    caches = make_caches()
    chunks = [make_chunk(size) for size in sizes]
    slots = [-1 if at in skipped else slot for at, slot in enumerate(MANY)]
    ids = torch.tensor(slots, dtype=torch.int32 if skipped else torch.int64)
    wanted = [chunk.clone() for chunk in chunks]
    jobs = list(zip(wanted, starts, ends, strict=True))
    for want, start, end in jobs:
        used = [at for at in range(start, end) if slots[at] >= 0]
        want[:, :, [at - start for at in used]] = rows(caches, [slots[at] for at in used])
    with untouched(caches):
        stored = connector.batched_from_gpu(chunks, caches, ids, starts, ends)
    assert stored.done()
    assert all(map(same, chunks, wanted))
    targets = make_caches()
    expected = [cache.clone() for cache in targets]
    for chunk, start, end in jobs:
        used = [at for at in range(start, end) if slots[at] >= 0]
        tokens = chunk[:, :, [at - start for at in used]]
        expected = scattered(expected, tokens, [slots[at] for at in used])
    with untouched(chunks):
        connector.batched_to_gpu(chunks, targets, ids, starts, ends).synchronize()
    assert all(map(same, targets, expected))


@pytest.mark.parametrize("kind", ["dtypes", "widths", "ranks", "strides", "objects"])
def test_chunks_of_several_kinds(kind: str) -> None:
    """Chunks that hold equal rows but are not alike as tensors."""
    other: Any = {
        "dtypes": make_chunk(4, torch.bfloat16),
        "widths": filled((2, LAYERS, 4, HEADS * DIM // 2), torch.float32),
        "ranks": filled((2, LAYERS, 4, HEADS, DIM), poison=True),
        "strides": filled((2, LAYERS, 4, 2, HEADS * DIM), poison=True)[:, :, :, 1],
        "objects": SimpleNamespace(tensor=make_chunk(4)),
    }[kind]
    connector = AdaptiveConnector("cpu", reinterpret=kind in ("dtypes", "widths"))
    caches = make_caches()
    pair = [other, make_chunk(4)]
    connector.batched_from_gpu(pair, caches, MANY, [0, 4], [4, 8])
    for chunk, part in zip(pair, (MANY[:4], MANY[4:8]), strict=True):
        plain = getattr(chunk, "tensor", chunk).contiguous().view(2, LAYERS, 4, -1)
        assert same(plain.view(torch.float16), rows(caches, part))


def test_one_launch_for_chunks_of_equal_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    backend = small_backend("counts")
    registry.register_backend("counts", backend)
    connector = AdaptiveConnector("cpu", backend="counts")
    checks = len(backend.launches)
    caches = make_caches()
    chunks = [make_chunk(n) for n in (4, 2, 4, 2, 4)]
    connector.batched_from_gpu(chunks, caches, MANY, [0, 4, 6, 10, 11], [4, 6, 10, 11, 12])
    assert len(backend.launches) - checks == 2


def test_overlapping_ranges_are_stored_but_not_loaded(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    chunks = [make_chunk(4), make_chunk(4)]
    connector.batched_from_gpu(chunks, caches, MANY, [0, 2], [4, 6])
    assert same(chunks[1], rows(caches, MANY[2:6]))
    with refused(SlotError, "2 times", "once", watch=[*caches, *chunks]):
        connector.batched_to_gpu(chunks, caches, MANY, [0, 2], [4, 6])


@pytest.mark.parametrize("at", range(3), ids=["memory_objs", "starts", "ends"])
@pytest.mark.parametrize("wrong", [None, 3, 1.5, ..., [], [0, 0]], ids=str)
def test_batches_of_lists_that_do_not_fit(at: int, wrong: object) -> None:
    caches = make_caches()
    lists = list[Any](wrong if at == n else [0] for n in range(3))
    with refused(SlotError, "one start and one end for each", watch=caches):
        AdaptiveConnector("cpu").batched_to_gpu(lists[0], caches, MANY, *lists[1:])


@pytest.mark.parametrize("tokens", [(4, 4), (4, 3)], ids=["one set", "two sets"])
def test_strict_looks_at_slots_on_a_device(device: torch.device, tokens: tuple[int, int]) -> None:
    connector = AdaptiveConnector(device, check="strict")
    caches = make_caches(device=device)
    chunks = [make_chunk(n, device=device) for n in tokens]
    slots = torch.tensor([9, 2, 17, 9, 17, 3, 11], device=device)
    with refused(SlotError, "occurs 2 times", "destination", watch=[*caches, *chunks]):
        connector.to_gpu(chunks[0], caches, slots, 0, 4)
    with refused(SlotError, "2 times", watch=[*caches, *chunks]):
        connector.batched_to_gpu(chunks, caches, slots, [1, 4], [3, 7])
    with refused(SlotError, "24 slots", watch=[*caches, *chunks]):
        connector.from_gpu(chunks[0], caches, slots + 10, 0, 3)
    for first in (0, 4):  # again: what was made before is looked at as well
        chunk = make_chunk(3, device=device)
        connector.from_gpu(chunk, caches, slots, first, first + 3).synchronize()
        assert same(chunk.cpu(), rows(caches, slots[first : first + 3].tolist()).cpu())
    connector.to_gpu(chunks[0], None, slots, 1, 4).synchronize()
    with refused(SlotError, "occurs 2 times", watch=caches):
        connector.to_gpu(chunks[0], None, slots, 0, 4)


@contextmanager
def nothing_lands(*levels: Any) -> Iterator[None]:
    """Check that no storage changes inside, nor soon after it by a thread that goes on."""
    with untouched(*levels):
        yield
        time.sleep(0.1)


@pytest.mark.parametrize("tokens", [(4, 4), (4, 6)], ids=["one set", "two sets"])
@pytest.mark.parametrize("ids", ["host", "device", "index"])
@pytest.mark.parametrize("options", [{"cancellable": True}, {"max_gbps": 100.0}], ids=str)
def test_a_batch_in_slices_is_checked_before_its_first_copy(
    options: dict[str, Any], ids: str, tokens: tuple[int, int], accelerator: torch.device
) -> None:
    connector = AdaptiveConnector(accelerator, options=CopyOptions(**options))
    caches = make_caches(device=accelerator)
    chunks = [make_chunk(n, device=accelerator) for n in tokens]
    starts = [0, tokens[0]]
    ends = [tokens[0], sum(tokens)]

    def slots(second: list[int]) -> Any:
        listed = [0, 1, 2, 3, *second[: tokens[1]]]
        if ids == "host":
            return listed
        placed = torch.tensor(listed, device=accelerator)
        return Index(placed, trusted=True) if ids == "index" else placed

    past = slots([4, 5, 6, 999, 8, 9])
    twice = slots([3, 5, 6, 7, 8, 9])
    right = slots([4, -1, 6, 7, 8, 9])
    for move in (connector.batched_from_gpu, connector.batched_to_gpu):
        with nothing_lands(caches, chunks), refused(SlotError, "24 slots", "nothing was moved"):
            move(chunks, caches, past, starts, ends)
    with nothing_lands(caches, chunks), refused(SlotError, "occurs 2 times", "destination"):
        connector.batched_to_gpu(chunks, caches, twice, starts, ends)

    # A source may occur twice, and negative ids are skipped.
    connector.batched_from_gpu(chunks, caches, twice, starts, ends).synchronize()
    wanted = [3, 5, 6, 7, 8, 9][: tokens[1]]
    assert same(chunks[1].cpu(), rows(caches, wanted).cpu())
    kept = rows(caches, [5]).cpu()
    connector.batched_to_gpu(chunks, caches, right, starts, ends).synchronize()
    assert same(rows(caches, [4]).cpu(), chunks[1][:, :, :1].cpu())
    assert same(rows(caches, [5]).cpu(), kept)


def test_a_batch_in_slices_reads_slots_of_a_device_once(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = AdaptiveConnector(accelerator, options=CopyOptions(cancellable=True))
    caches = make_caches(device=accelerator)
    chunks = [make_chunk(n, device=accelerator) for n in (4, 6, 2)]
    slots = torch.tensor(MANY[:12], device=accelerator)
    reads = []
    to_host = torch.Tensor.cpu

    def noted(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if tensor.dtype == torch.int64 and tensor.device == accelerator:
            reads.append(tensor)
        return to_host(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    transfer = connector.batched_from_gpu(chunks, caches, slots, [0, 4, 10], [4, 10, 12])
    transfer.synchronize()
    assert len(reads) == 1
    for chunk, (start, end) in zip(chunks, [(0, 4), (4, 10), (10, 12)], strict=True):
        assert same(chunk.cpu(), rows(caches, MANY[start:end]).cpu())


def test_a_batch_in_slices_reads_no_slots_inside_graph_capture(accelerator: torch.device) -> None:
    chunks = [make_chunk(4), make_chunk(6)]
    batch = Batch.of(chunks, torch.arange(10, device=accelerator), [0, 4], [4, 10])
    captured = Context(accelerator, None, captured=True)
    with refused(Unsupported, "A copy in slices", "graph capture", "cancellable"):
        batch.with_ids_on_host(captured)
    on_host = batch._replace(slot_mapping=MANY)
    assert on_host.with_ids_on_host(captured) is on_host


def test_chunks_of_two_shapes_that_a_batch_fills_in_part(connector: AdaptiveConnector) -> None:
    """Positions in chunks of one shape occur in chunks of another shape, too."""
    caches = make_caches()
    chunks = [make_chunk(n) for n in (4, 4, 6, 6)]
    connector.batched_from_gpu(chunks, caches, MANY, [0, 2, 4, 6], [2, 4, 6, 8])
    for nth, chunk in enumerate(chunks):
        assert same(chunk[:, :, :2], rows(caches, MANY[2 * nth : 2 * nth + 2]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "reference"},
        {"check": "strict"},
        {"by_layer": True},
        {"cancellable": True},
        {"max_gbps": 100.0},
        {"overlap": "idle"},
        {"late": LateErrors()},
    ],
    ids=lambda options: next(iter(options), "none"),
)
def test_options_of_a_connector_hold_for_every_transfer(options: dict[str, Any]) -> None:
    connector = AdaptiveConnector("cpu", options=CopyOptions(**options))
    caches = make_caches()
    chunks = [make_chunk(4), make_chunk(4)]
    for _ in range(3):  # the third is made by what was remembered, if that is possible
        connector.from_gpu(chunks[0], caches, SLOTS).synchronize()
        assert same(chunks[0], rows(caches, SLOTS))
    connector.batched_from_gpu(chunks, caches, MANY[:8], [0, 4], [4, 8]).synchronize()
    assert same(chunks[1], rows(caches, MANY[4:8]))
    wanted = scattered(caches, chunks[1], SLOTS)
    transfer = connector.to_gpu(chunks[1], caches, SLOTS)
    transfer.synchronize()
    assert all(map(same, caches, wanted))
    if options.get("by_layer"):
        assert isinstance(transfer, BlockTransfer)
        assert len(transfer.layers) == LAYERS


def test_a_connector_takes_options_or_keywords() -> None:
    with pytest.raises(InvalidTerms, match="got options and check"):
        AdaptiveConnector("cpu", check="strict", options=CopyOptions())
    half = AdaptiveConnector("cpu", options=CopyOptions(reinterpret=True))
    caches = make_caches()
    chunk = make_chunk(4)
    half.from_gpu(chunk.view(torch.int16), caches, SLOTS).synchronize()
    assert same(chunk, rows(caches, SLOTS))


@pytest.mark.parametrize("name", ["overlap", "max_gbps", "detached", "stream"])
def test_an_option_that_is_passed_like_an_extent_is_named(name: str) -> None:
    terms: dict[str, Any] = {name: None}
    with refused(InvalidTerms, f"Pass options=CopyOptions({name}=...)"):
        AdaptiveConnector("cpu", **terms)
