# SPDX-License-Identifier: Apache-2.0
"""Transfers that are made again and again: the second takes a lane, and is as right, and refuses
as much, as the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device_cases import (
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
from guarded_memory import untouched

from portakv import AdaptiveConnector, Index, LayoutError, SlotError
from portakv.lanes import Lanes

pytestmark = pytest.mark.gpu

IDS = [9, 2, 17, 6, 0]


@pytest.fixture(params=["cuda", "triton"])
def connector(request: pytest.FixtureRequest) -> AdaptiveConnector:
    return AdaptiveConnector(DEVICE, request.param)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each transfer on the current stream whether it took a lane."""
    seen: list[bool] = []
    find = Lanes.transfer

    def transfer(self: Lanes, *arguments: Any) -> Any:
        found = find(self, *arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(Lanes, "transfer", transfer)
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
