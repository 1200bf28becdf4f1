# SPDX-License-Identifier: Apache-2.0
"""Transfers that are made again and again: the second takes a shortcut, and is as right, and
refuses as much, as the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.device_cases import (
    DEVICE,
    LONG,
    SLOTS,
    check_caches,
    check_chunk,
    gathered,
    host_bytes,
    make_caches,
    make_chunk,
    scattered,
)
from support.guarded_memory import untouched

from portakv import AdaptiveConnector, Index, LayoutError, SlotError, TransferError
from portakv.copy.shortcut import Shortcuts

pytestmark = pytest.mark.gpu

IDS = [9, 2, 17, 6, 0]


@pytest.fixture(params=["cuda", "triton"])
def connector(request: pytest.FixtureRequest) -> AdaptiveConnector:
    return AdaptiveConnector(DEVICE, request.param)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each transfer on the current stream whether it took a shortcut."""
    seen: list[bool] = []
    find = Shortcuts.transfer

    def transfer(self: Shortcuts, *arguments: Any) -> Any:
        found = find(self, *arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(Shortcuts, "transfer", transfer)
    return seen


def placed(ids: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(ids, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_stores_and_loads_again_with_everything_new(
    connector: AdaptiveConnector, taken: list[bool], dtype: torch.dtype
) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    for ids in (IDS, [3, 1, -1, 23, 8], [0, 1, 2, 3, 4], [-1, -2, -3, -4, -5]):
        chunk, other = make_chunk(len(ids)), make_chunk(len(ids))
        wanted = gathered(caches, chunk, ids)
        connector.from_gpu(chunk, None, placed(ids, dtype)).synchronize()
        check_chunk(chunk, wanted)
        back = scattered(caches, other, ids)
        connector.to_gpu(other, None, placed(ids, dtype)).synchronize()
        check_caches(caches, back)
    assert taken == [False, False] + [True] * 6


def test_ranges_of_the_slot_mapping_and_shorter_ones(
    connector: AdaptiveConnector, taken: list[bool]
) -> None:
    caches, ids = make_caches(), placed(range(SLOTS))
    connector.register_kv_caches(caches)
    for start, end in ((0, 5), (3, 8), (7, 9), (19, SLOTS), (4, None)):
        chunk = make_chunk(5 if end else SLOTS)
        wanted = gathered(caches, chunk, list(range(start, end or SLOTS)))
        connector.from_gpu(chunk, None, ids, start, end).synchronize()
        check_chunk(chunk, wanted)
    assert taken == [False, True, True, True, False]
    for start, end in ((-1, 3), (4, 3), (0, SLOTS + 1), (0, 6)):
        with untouched(caches), pytest.raises(SlotError):
            connector.from_gpu(make_chunk(5), None, ids, start, end)


def test_the_caches_may_be_named_each_time_or_change(
    connector: AdaptiveConnector, taken: list[bool]
) -> None:
    first, second = make_caches(), make_caches()
    for caches in (first, first, second, first, first):
        chunk = make_chunk(len(IDS))
        wanted = gathered(caches, chunk, IDS)
        connector.from_gpu(chunk, caches, placed(IDS)).synchronize()
        check_chunk(chunk, wanted)
    assert taken == [False, True, False, False, True]


def test_what_does_not_fit_goes_the_long_way(
    connector: AdaptiveConnector, taken: list[bool]
) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()
    wide = torch.stack([placed(IDS)] * 2, dim=1)
    for ids in (IDS, torch.tensor(IDS), wide[:, 0]):  # a list, host ids, ids that lie apart
        chunk = make_chunk(5)
        wanted = gathered(caches, chunk, IDS)
        connector.from_gpu(chunk, None, ids).synchronize()
        check_chunk(chunk, wanted)
    odd = torch.empty(make_chunk(5).numel() + 1, dtype=torch.float16, device=DEVICE)[1:]
    odd = odd.view(make_chunk(5).shape)  # of the same shape, but two bytes off
    wanted = gathered(caches, odd, IDS)
    connector.from_gpu(odd, None, placed(IDS)).synchronize()
    assert torch.equal(host_bytes(odd), wanted)
    assert taken == [False] * 5


def test_host_ids_in_a_kept_index(connector: AdaptiveConnector, taken: list[bool]) -> None:
    caches, slots = make_caches(), [9, 2, -1, 6, 0, 4, 8, 6]
    connector.register_kv_caches(caches)
    index = Index(slots)
    for start, end in ((0, 5), (0, 5), (3, 8), (3, 8), (0, 5)):
        chunk, other = make_chunk(5), make_chunk(5)
        wanted = gathered(caches, chunk, slots[start:end])
        connector.from_gpu(chunk, None, index, start, end).synchronize()
        check_chunk(chunk, wanted)
        if start:
            # Slot 6 twice: sources may be repeated, destinations may not, first time or not.
            with untouched(caches), pytest.raises(SlotError, match="Slot 6 occurs 2 times"):
                connector.to_gpu(other, None, index, start, end)
            continue
        back = scattered(caches, other, slots[start:end])
        connector.to_gpu(other, None, index, start, end).synchronize()
        check_caches(caches, back)
    assert taken == [False, False, True, True, False, False, True, False, True, True]
    bad = Index([1, 2, SLOTS, 3, 4])
    for _ in range(2):
        with untouched(caches), pytest.raises(SlotError, match=f"slot {SLOTS}"):
            connector.to_gpu(make_chunk(5), None, bad)


def test_a_first_chunk_off_its_alignment_does_not_slow_later_ones(
    connector: AdaptiveConnector, taken: list[bool]
) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    off = torch.empty(make_chunk(5).numel() + 1, dtype=torch.float16, device=DEVICE)[1:]
    for chunk in (off.view(make_chunk(5).shape), make_chunk(5), make_chunk(5)):
        wanted = gathered(caches, chunk, IDS)
        connector.from_gpu(chunk, None, placed(IDS)).synchronize()
        assert torch.equal(host_bytes(chunk), wanted)
    assert taken == [False, False, True]  # one lane for each alignment


@pytest.mark.parametrize("store", [True, False])
def test_a_lane_behind_a_late_producer_and_before_a_late_consumer(
    connector: AdaptiveConnector, taken: list[bool], store: bool
) -> None:
    caches, fresh = make_caches(), make_caches()
    connector.register_kv_caches(caches)
    move = connector.from_gpu if store else connector.to_gpu
    move(make_chunk(5), None, placed(IDS)).synchronize()
    chunk, new, ids = make_chunk(5), make_chunk(5), placed(IDS)
    wanted = gathered(fresh, chunk, IDS)
    back = scattered(fresh, new, IDS)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)  # the producer comes late
    for cache, other in zip(caches, fresh, strict=True):
        cache.copy_(other)
    if not store:
        chunk.copy_(new)
    transfer = move(chunk, None, ids)
    assert not transfer.done()
    landed = [chunk.clone()] if store else [cache.clone() for cache in caches]
    torch.cuda._sleep(LONG // 8)
    for written in [*caches] if store else [chunk]:
        written.zero_()  # must not overtake the transfer
    torch.cuda.synchronize()
    wants = [wanted] if store else back
    for found, want in zip(landed, wants, strict=True):
        assert torch.equal(host_bytes(found), want)
    assert taken == [False, True]


@pytest.mark.parametrize("layer", [0, 2])
def test_caches_whose_memory_was_freed(connector: AdaptiveConnector, layer: int) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    host = torch.tensor(IDS)
    connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()
    caches[layer].untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="register the kv_caches again"):
        # The long way looks at every layer, a lane at the first.
        connector.from_gpu(make_chunk(5), None, placed(IDS) if layer == 0 else host)


def test_refusals_are_those_of_the_long_way(connector: AdaptiveConnector) -> None:
    caches = make_caches()
    whole = torch.cat([cache.flatten() for cache in caches])
    caches = [part.view(caches[0].shape) for part in whole.chunk(len(caches))]
    connector.register_kv_caches(caches)
    connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()
    inside = whole[64 : 64 + make_chunk(5).numel()].view(make_chunk(5).shape)
    with untouched(caches), pytest.raises(LayoutError, match="memory of the kv_caches"):
        connector.from_gpu(inside, None, placed(IDS))
    with untouched(caches), pytest.raises(LayoutError, match="requires grad"):
        connector.from_gpu(make_chunk(5).requires_grad_(), None, placed(IDS))
    with untouched(caches), pytest.raises(SlotError, match="one dimension"):
        connector.from_gpu(make_chunk(5), None, placed(IDS).view(1, 5))


@pytest.mark.parametrize("asked", [True, False])
def test_bad_ids_in_a_lane(connector: AdaptiveConnector, taken: list[bool], asked: bool) -> None:
    caches, others = make_caches(), make_caches()
    other = AdaptiveConnector(DEVICE, "cuda")
    other.register_kv_caches(others)
    connector.register_kv_caches(caches)
    connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()
    bad = [4, SLOTS, 1, 2, 3]
    chunk = make_chunk(5)
    wanted = gathered(caches, chunk, bad)
    transfer = connector.from_gpu(chunk, None, placed(bad))
    torch.cuda.synchronize()
    check_chunk(chunk, wanted)
    other.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()  # it is not this one's error
    if asked:
        with pytest.raises(SlotError, match="Position 1 "):
            transfer.synchronize()
    else:
        with pytest.raises(SlotError, match="Position 1 "):
            connector.from_gpu(make_chunk(5), None, placed(IDS))
    chunk = make_chunk(5)
    wanted = gathered(caches, chunk, IDS)
    connector.from_gpu(chunk, None, placed(IDS)).synchronize()
    check_chunk(chunk, wanted)
    assert taken[-1]


def test_many_transfers_that_nobody_waits_for(
    connector: AdaptiveConnector, taken: list[bool]
) -> None:
    caches = make_caches()
    connector.register_kv_caches(caches)
    chunks = [make_chunk(5) for _ in range(300)]
    lists = [[(n * 5 + i) % SLOTS for i in range(5)] for n in range(300)]
    ids = [placed(one) for one in lists]
    torch.cuda._sleep(LONG)
    for chunk, one in zip(chunks, ids, strict=True):
        connector.from_gpu(chunk, None, one)
    torch.cuda.synchronize()
    for chunk, slots in zip(chunks[-24:], lists[-24:], strict=True):
        check_chunk(chunk, gathered(caches, chunk, slots))
    assert taken.count(True) == 299


def test_a_lane_is_captured_and_replayed(connector: AdaptiveConnector) -> None:
    caches, chunk, ids = make_caches(), make_chunk(5), placed(IDS)
    connector.register_kv_caches(caches)
    for _ in range(2):
        connector.from_gpu(chunk, None, ids).synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        connector.from_gpu(chunk, None, ids)
    for slots in (IDS, [5, 4, 3, 2, 1]):
        ids.copy_(placed(slots))
        chunk.zero_()
        wanted = gathered(caches, chunk, slots)
        graph.replay()
        check_chunk(chunk, wanted)


def test_a_bad_id_in_a_replayed_graph(connector: AdaptiveConnector) -> None:
    caches, chunk, ids = make_caches(), make_chunk(5), placed(IDS)
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, None, ids).synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer = connector.from_gpu(chunk, None, ids)
    with pytest.raises(TransferError, match="no completion of its own"):
        transfer.synchronize()
    for bad in ([9, 2, SLOTS, 6, 0], [SLOTS + 7, 1, 2, 3, 4]):
        ids.copy_(placed(bad))
        wanted = gathered(caches, chunk, bad)
        graph.replay()
        torch.cuda.synchronize()
        check_chunk(chunk, wanted)
        position = next(n for n, slot in enumerate(bad) if slot >= SLOTS)
        with pytest.raises(SlotError, match=f"Position {position} "):
            connector.from_gpu(make_chunk(5), None, placed(IDS))
        connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()
    ids.copy_(placed(IDS))
    wanted = gathered(caches, chunk, IDS)
    graph.replay()
    check_chunk(chunk, wanted)
    connector.from_gpu(make_chunk(5), None, placed(IDS)).synchronize()


@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled"])
def test_a_transfer_does_not_stand_behind_another_streams_work(backend: str) -> None:
    connector, caches = AdaptiveConnector(DEVICE, backend), make_caches()
    connector.register_kv_caches(caches)
    busy, free = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
    chunks, ids = [make_chunk(5), make_chunk(5)], placed(IDS)
    for stream in (busy, free):
        with torch.cuda.stream(stream):
            connector.from_gpu(chunks[0], None, ids).synchronize()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(4 * LONG)
        late = connector.from_gpu(chunks[0], None, ids)
    with torch.cuda.stream(free):
        soon = connector.from_gpu(chunks[1], None, ids)
    soon.synchronize()
    assert not late.done()
    late.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled", "reference"])
def test_a_transfer_of_a_device_that_is_not_current_is_not_done_early(backend: str) -> None:
    there = torch.device("cuda", 1)
    connector, caches = AdaptiveConnector(there, backend), make_caches(device=there)
    connector.register_kv_caches(caches)
    # The first compiles, which takes longer than the sleep; after it lanes are taken.
    connector.from_gpu(make_chunk(5, device=there), None, torch.tensor(IDS, device=there))
    for _ in range(2):
        chunk = make_chunk(5, device=there)
        ids = torch.tensor(IDS, device=there)
        wanted = gathered(caches, chunk, IDS)
        torch.cuda.synchronize(there)
        with torch.cuda.device(there):
            torch.cuda._sleep(LONG)
        assert torch.cuda.current_device() == 0
        transfer = connector.from_gpu(chunk, None, ids)
        if backend != "reference":  # which reads device ids, and so waits for them
            assert not transfer.done()
        transfer.synchronize()
        assert torch.cuda.current_stream(there).query()
        check_chunk(chunk, wanted)
