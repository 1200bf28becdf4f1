# SPDX-License-Identifier: Apache-2.0
"""Copies that the core makes as a whole on a device: as right, and refusing as much, as others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import (
    DEVICE,
    LONG,
    SLOTS,
    Rig,
    check_canaries,
    gathered,
    holds,
    host_bytes,
    make_caches,
    make_chunk,
)
from support.guarded_memory import untouched
from support.whole_copies import watch_copies_of_views, watch_whole_copies

from portakv import Index, KVView, LayoutError, SlotError, Transfer, TransferError, copy_blocks
from portakv.runtime.transfer import copies_holding_memory

pytestmark = pytest.mark.gpu

IDS = [9, 2, 17, 6, 0]


class Recorded(Rig):
    """A rig that records for each of its transfers whether the core made it as a whole."""

    def __init__(self, backend: str, device: torch.device = DEVICE) -> None:
        super().__init__(device, backend)
        self.taken: list[bool] = []

    def start(self, ids: Any = None, chunk: torch.Tensor | None = None) -> Transfer:
        """Store, by default the rows of `IDS`."""
        chunk = self.chunk() if chunk is None else chunk
        return self.connector.from_gpu(chunk, None, self.ids(IDS) if ids is None else ids)

    def moved(
        self,
        store: bool,
        slots: Sequence[int],
        ids: Any,
        *within: Any,
        chunk: torch.Tensor | None = None,
    ) -> None:
        """Store or load a chunk, and look at every row."""
        own = self.chunk(len(slots)) if chunk is None else chunk
        wanted = self.wanted(store, own, slots)
        self.move(store, own, None, ids, *within).synchronize()
        assert holds(self.targets(store, own), wanted)
        for tensor in self.targets(store, own) if chunk is None else []:
            check_canaries(tensor)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    rig = Recorded("cuda")
    rig.taken = watch_whole_copies(monkeypatch)
    return rig


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_stores_and_loads_again_with_everything_new(rig: Recorded, dtype: torch.dtype) -> None:
    for ids in (IDS, [3, 1, -1, 23, 8], [0, 1, 2, 3, 4], [-1, -2, -3, -4, -5]):
        rig.moved(True, ids, rig.ids(ids).to(dtype))
        rig.moved(False, ids, rig.ids(ids).to(dtype))
    # The kernels are those of the process, which other tests may have had compiled.
    assert rig.taken[2:] == [True] * 6


def test_ranges_of_the_slot_mapping_and_shorter_ones(rig: Recorded) -> None:
    ids = rig.ids(range(SLOTS))
    for start, end in ((0, 5), (3, 8), (7, 9), (19, SLOTS), (4, None)):
        chunk = make_chunk(5 if end else SLOTS - start)
        rig.moved(True, range(start, end or SLOTS), ids, start, end, chunk=chunk)
    assert rig.taken == [False, True, True, True, True]
    for start, end in ((-1, 3), (4, 3), (0, SLOTS + 1), (0, 6)):
        with untouched(rig.caches), pytest.raises(SlotError):
            rig.connector.from_gpu(make_chunk(5), None, ids, start, end)


def test_the_caches_may_be_named_each_time_or_change(rig: Recorded) -> None:
    rig.connector.unregister_kv_caches()
    first = make_caches()
    second = make_caches()
    for caches in (first, first, second, first, first):
        chunk = make_chunk(len(IDS))
        wanted = gathered(caches, chunk, IDS)
        rig.connector.from_gpu(chunk, caches, rig.ids(IDS)).synchronize()
        assert torch.equal(host_bytes(chunk), wanted)
    assert rig.taken == [False, True, False, False, True]


def off_alignment() -> torch.Tensor:
    """A chunk for five tokens that lies two bytes off."""
    like = make_chunk(5)
    return torch.empty(like.numel() + 1, dtype=like.dtype, device=DEVICE)[1:].view(like.shape)


def test_what_does_not_fit_goes_the_long_way(rig: Recorded) -> None:
    rig.moved(True, IDS, rig.ids(IDS))
    wide = torch.stack([rig.ids(IDS)] * 2, dim=1)
    for ids in (IDS, torch.tensor(IDS), wide[:, 0]):  # a list, host ids, ids that lie apart
        rig.moved(True, IDS, ids)
    rig.moved(True, IDS, rig.ids(IDS), chunk=off_alignment())
    assert rig.taken[:4] == [False, True, True, False]


def test_a_first_chunk_off_its_alignment_does_not_slow_later_ones(rig: Recorded) -> None:
    for chunk in (off_alignment(), make_chunk(5), make_chunk(5)):
        rig.moved(True, IDS, rig.ids(IDS), chunk=chunk)
    assert rig.taken[2]


def test_host_ids_in_a_kept_index(rig: Recorded) -> None:
    slots = [9, 2, -1, 6, 0, 4, 8, 6]
    index = Index(slots)
    for start, end in ((0, 5), (0, 5), (3, 8), (3, 8), (0, 5)):
        rig.moved(True, slots[start:end], index, start, end)
        if not start:
            rig.moved(False, slots[start:end], index, start, end)
            continue
        # Slot 6 twice: sources may be repeated, destinations may not, first time or not.
        with (
            untouched(rig.caches),
            pytest.raises(SlotError, match="slot 6, which occurs 2 times"),
        ):
            rig.connector.to_gpu(make_chunk(5), None, index, start, end)
    assert rig.taken[2:] == [True, True, True, False, True, False, True, True]
    bad = Index([1, 2, SLOTS, 3, 4])
    for _ in range(2):
        with untouched(rig.caches), pytest.raises(SlotError, match=f"slot {SLOTS}"):
            rig.connector.to_gpu(make_chunk(5), None, bad)


def test_refusals_are_those_of_the_long_way(rig: Recorded) -> None:
    whole = torch.cat([cache.flatten() for cache in rig.caches])
    caches = [part.view(rig.caches[0].shape) for part in whole.chunk(len(rig.caches))]
    rig.connector.register_kv_caches(caches)
    rig.start().synchronize()
    inside = whole[64 : 64 + make_chunk(5).numel()].view(make_chunk(5).shape)
    with untouched(caches), pytest.raises(LayoutError, match="outside the kv_caches"):
        rig.start(chunk=inside)
    with untouched(caches), pytest.raises(LayoutError, match="requires grad"):
        rig.start(chunk=make_chunk(5).requires_grad_())
    with untouched(caches), pytest.raises(LayoutError, match="converts nothing"):
        rig.start(chunk=make_chunk(5, torch.bfloat16))
    with untouched(caches), pytest.raises(SlotError, match="one dimension"):
        rig.start(rig.ids(IDS).view(1, 5))


@pytest.mark.parametrize("waits", [True, False])
def test_bad_ids(rig: Recorded, waits: bool) -> None:
    other = Recorded("cuda")
    bad = [4, SLOTS, 1, 2, 3]
    chunk = make_chunk(5)
    rig.start().synchronize()
    wanted = gathered(rig.caches, chunk, bad)
    transfer = rig.start(rig.ids(bad), chunk)
    torch.cuda.synchronize()
    assert torch.equal(host_bytes(chunk), wanted)
    other.start().synchronize()  # it is not this one's error
    with pytest.raises(SlotError, match="Position 1 "):
        transfer.synchronize() if waits else rig.start()
    rig.moved(True, IDS, rig.ids(IDS))
    assert rig.taken[-1]


def test_many_transfers_that_nobody_waits_for(rig: Recorded) -> None:
    chunks = [make_chunk(5) for _ in range(300)]
    lists = [[(n * 5 + i) % SLOTS for i in range(5)] for n in range(300)]
    ids = [rig.ids(one) for one in lists]
    torch.cuda._sleep(LONG)
    for chunk, one in zip(chunks, ids, strict=True):
        rig.start(one, chunk)
    torch.cuda.synchronize()
    for chunk, slots in zip(chunks[-24:], lists[-24:], strict=True):
        assert torch.equal(host_bytes(chunk), gathered(rig.caches, chunk, slots))
    assert rig.taken.count(True) == 299


@pytest.mark.parametrize("again", [True, False])
def test_in_a_graph_that_is_replayed(rig: Recorded, again: bool) -> None:
    chunk = make_chunk(5)
    ids = rig.ids(IDS)
    for _ in range(1 + again):
        rig.start(ids, chunk).synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer = rig.start(ids, chunk)
    with pytest.raises(TransferError, match="no separate completion"):
        transfer.synchronize()
    for slots in (IDS, [9, 2, SLOTS, 6, 0], [SLOTS + 7, 1, 2, 3, 4], [5, 4, 3, 2, 1]):
        ids.copy_(rig.ids(slots))
        wanted = gathered(rig.caches, chunk, slots)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(host_bytes(chunk), wanted)
        bad = [position for position, slot in enumerate(slots) if slot >= SLOTS]
        for position in bad:
            with pytest.raises(SlotError, match=f"Position {position} "):
                rig.start()
        rig.start().synchronize()


@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled"])
def test_a_transfer_does_not_stand_behind_another_streams_work(backend: str) -> None:
    rig = Recorded(backend)
    chunks = [make_chunk(5), make_chunk(5)]
    ids = rig.ids(IDS)
    busy = torch.cuda.Stream(DEVICE)
    free = torch.cuda.Stream(DEVICE)
    for stream in (busy, free):
        with torch.cuda.stream(stream):
            rig.start(ids, chunks[0]).synchronize()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(4 * LONG)
        late = rig.start(ids, chunks[0])
    with torch.cuda.stream(free):
        soon = rig.start(ids, chunks[1])
    soon.synchronize()
    assert not late.done()
    late.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two CUDA devices")
@pytest.mark.parametrize("backend", ["cuda", "triton", "compiled", "reference"])
def test_a_transfer_of_a_device_that_is_not_current_is_not_done_early(backend: str) -> None:
    rig = Recorded(backend, torch.device("cuda", 1))
    # The first compiles, which takes longer than the sleep.
    rig.start()
    for _ in range(2):
        chunk = rig.chunk()
        ids = rig.ids(IDS)
        wanted = rig.wanted(True, chunk, IDS)
        torch.cuda.synchronize(rig.device)
        with torch.cuda.device(rig.device):
            torch.cuda._sleep(LONG)
        assert torch.cuda.current_device() == 0
        transfer = rig.start(ids, chunk)
        if backend != "reference":  # which reads device ids, and so waits for them
            assert not transfer.done()
        transfer.synchronize()
        assert torch.cuda.current_stream(rig.device).query()
        assert holds([chunk], wanted)


# Across the link


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each copy between views whether the core made it."""
    return watch_copies_of_views(monkeypatch)


def link_views() -> tuple[KVView, KVView]:
    """Caches of three layers on the device, and blocks of all layers in pinned memory."""
    shape = 2, 24, 4, 2, 16
    layers = [torch.randn(shape, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    stored = torch.randn(30, 3, 2, 4, 2, 16, dtype=torch.float16).pin_memory()
    return (
        KVView(layers, "layer | kv block token head dim"),
        KVView(stored, "block layer kv token head dim"),
    )


def blocks_of(view: KVView) -> torch.Tensor:
    """The blocks of a view, outermost, on the host."""
    if isinstance(view.tensors, torch.Tensor):
        return view.tensors.cpu().clone()
    return torch.stack(list(view.tensors), dim=1).cpu().permute(2, 1, 0, 3, 4, 5).contiguous()


TERMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "host": {"backend": "host"},
    "idle": {"overlap": "idle"},
    "zero_copy": {"backend": "zero_copy", "overlap": "idle"},
    "few blocks": {"max_thread_blocks": 2},
}


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        *[(kind, "usual") for kind in ("list", "tensor", "array", "index")],
        *[("list", terms) for terms in TERMS if terms != "usual"],
    ],
)
def test_blocks_across_the_link(kind: str, terms: str, up: bool, whole: list[bool]) -> None:
    paged, stored = link_views()
    src, dst = (stored, paged) if up else (paged, stored)
    read = [5, 0, -1, 7, 7, 20]
    written = [3, 9, 1, -2, 0, 23]
    as_passed: Any = {
        "list": list,
        "tensor": torch.tensor,
        "array": np.array,
        "index": lambda ids: Index(ids, 4),
    }[kind]
    for _ in range(3):
        wanted = blocks_of(dst)
        rows_read = blocks_of(src)
        for one, other in zip(read, written, strict=True):
            if one >= 0 and other >= 0:
                wanted[other] = rows_read[one]
        made = copy_blocks(src, dst, as_passed(read), as_passed(written), **TERMS[terms])
        made.synchronize()
        assert torch.equal(blocks_of(dst), wanted)
        assert made.statistics.strategy == "zero_copy"
        assert made.statistics.blocks == 4
        for tensor in [dst.tensors] if up is False else dst.tensors:
            tensor.normal_()
    assert whole[1:] == [True, True]
    for bad in ([5, 0, 1, 7, 30, 20], [3, 9, 1, 9, 0, 23]):
        with pytest.raises(SlotError):
            copy_blocks(src, dst, as_passed(read), as_passed(bad), **TERMS[terms])


def test_memory_of_the_host_outlives_a_copy_that_nobody_holds(whole: list[bool]) -> None:
    paged, stored = link_views()
    copy_blocks(paged, stored, [1], [2]).synchronize()
    wanted = blocks_of(paged)[4]
    torch.cuda._sleep(LONG)
    copy_blocks(paged, stored, [4], [7])
    assert whole[-1]
    assert copies_holding_memory() == 1
    torch.cuda.synchronize()
    assert copies_holding_memory() == 0
    assert torch.equal(stored.tensors[7], wanted)
