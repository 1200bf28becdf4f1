# SPDX-License-Identifier: Apache-2.0
"""Copies between two views that are made again and again: each is checked, moves and refuses what
the first one did."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from support import simdev_cases as simulated
from support.command_line import registered
from support.device_cases import DEVICE
from support.slot_cases import ended_well, forked
from torch.cuda import _sleep

from portakv import (
    Index,
    KVView,
    LayoutError,
    PortaKVError,
    SlotError,
    TransferError,
    Unsupported,
    copy_blocks,
    copy_rows,
)
from portakv.backends.base import Capabilities, Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.host import pinned
from portakv.interconnect.link import TorchLink
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.transfer import UNCHECKED, copies_holding_memory, in_flight
from portakv_conformance.simdev import delay

TOKENS = 96
HEADS = 2
DIM = 16
LAYERS = 5
LAYERED = "layer | token head dim"
WHOLE = "token layer head dim"


class Pools:
    """A pool of the device, layer by layer, and another one, token by token, known by addresses."""

    def __init__(self, other: torch.device) -> None:
        made: Any = pinned.empty if other.type == "cpu" else torch.empty
        kwargs: Any = {"dtype": torch.int32} if other.type == "cpu" else {"device": other}
        self.layers = torch.zeros(LAYERS, TOKENS, HEADS, DIM, dtype=torch.int32, device=DEVICE)
        shape = TOKENS, LAYERS, HEADS, DIM
        self.whole = made(shape, **kwargs).view(torch.int32).zero_()
        at = [each.data_ptr() for each in self.layers]
        self.views = (
            KVView.at(at, LAYERED, shape=shape[:1] + shape[2:], dtype=torch.int32, device=DEVICE),
            KVView.at([self.whole.data_ptr()], WHOLE, shape=shape, dtype=torch.int32, device=other),
        )

    def copied(self, store: bool, read: list[int], written: list[int], **terms: Any) -> None:
        """Copy rows that differ from each other and from before, and look at every byte."""
        src, dst = self.views if store else self.views[::-1]
        source, target = (self.layers, self.whole) if store else (self.whole, self.layers)
        source.copy_(torch.randint(1, 1 << 30, source.shape, dtype=torch.int32))
        target.fill_(-1)
        wanted = target.cpu().clone()
        rows = source.cpu() if not store else source.cpu().transpose(0, 1)
        into = wanted if store else wanted.transpose(0, 1)
        into[written] = rows[read]
        src_ids, dst_ids = (torch.tensor(x, device=DEVICE) for x in (read, written))
        torch.accelerator.synchronize(DEVICE)
        ids = Index(src_ids, trusted=True), Index(dst_ids, trusted=True)
        copy_rows(src, dst, *ids, **terms).synchronize()
        assert torch.equal(target.cpu(), wanted)


@pytest.fixture(params=["pinned", "device"])
def pools(request: pytest.FixtureRequest) -> Pools:
    return Pools(torch.device("cpu") if request.param == "pinned" else DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
class TestsOfCopiesAgain:
    def test_other_ids_and_other_rows(self, pools: Pools, store: bool) -> None:
        pools.copied(store, [9, 2, 17], [0, 5, 3])
        pools.copied(store, [1, 2, 3], [95, 0, 7])
        pools.copied(store, [40], [41])
        pools.copied(store, [1, 2, 3], [3, 2, 1])

    def test_a_limit_of_thread_blocks_is_another_way(self, pools: Pools, store: bool) -> None:
        if pools.whole.is_cuda:
            pytest.skip("the limit is of kernels that read or write host memory")
        for _ in range(3):
            pools.copied(store, [9, 2, 17], [0, 5, 3], max_thread_blocks=1)
            pools.copied(store, [9, 2, 17], [0, 5, 3])

    def test_on_another_stream(self, pools: Pools, store: bool) -> None:
        for _ in range(3):
            with torch.Stream(DEVICE):
                pools.copied(store, [9, 2, 17], [0, 5, 3])

    def test_behind_what_the_stream_holds(self, pools: Pools, store: bool) -> None:
        source = pools.layers if store else pools.whole
        target = pools.whole if store else pools.layers
        src, dst = pools.views if store else pools.views[::-1]
        if not source.is_cuda:
            pytest.skip("rows of the host are not written by a stream")
        ids = Index(torch.arange(TOKENS, device=DEVICE), trusted=True)
        copy_rows(src, dst, ids, ids).synchronize()
        for value in (3, 4):
            _sleep(20_000_000)
            source.fill_(value)
            copy_rows(src, dst, ids, ids).synchronize()
            assert bool((target == value).all())

    def test_in_a_capture_it_is_a_copy_like_any_other(self, pools: Pools, store: bool) -> None:
        src, dst = pools.views if store else pools.views[::-1]
        source, target = (pools.layers, pools.whole) if store else (pools.whole, pools.layers)
        src_ids, dst_ids = (torch.tensor(x, device=DEVICE) for x in ([1, 2], [3, 4]))
        backend = None if pools.whole.is_cuda else "zero_copy"
        ids = Index(src_ids, trusted=True), Index(dst_ids, trusted=True)
        for _ in range(2):
            copy_rows(src, dst, *ids, backend=backend).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            copy_rows(src, dst, *ids, backend=backend)
        for value in (7, 8):
            source.fill_(value)
            target.zero_()
            graph.replay()
            torch.accelerator.synchronize(DEVICE)
            assert int((target == value).sum()) == 2 * LAYERS * HEADS * DIM

    def test_with_another_current_device(self, pools: Pools, store: bool) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("it takes two devices")
        for _ in range(2):
            pools.copied(store, [9, 2, 17], [0, 5, 3])
        with torch.cuda.device(1):
            for _ in range(2):
                pools.copied(store, [8, 2, 17], [0, 6, 3])


@pytest.mark.gpu
def test_ids_without_a_promise_are_guarded_each_time() -> None:
    pools = Pools(DEVICE)
    ids = torch.tensor([1, TOKENS + 5], device=DEVICE)
    for _ in range(4):
        transfer = copy_rows(*pools.views, ids, torch.tensor([0, 1], device=DEVICE))
        with pytest.raises(SlotError, match="Position 1"):
            transfer.synchronize()


SHAPE = (LAYERS, 24, 4, HEADS, DIM)  # of blocks of four tokens
PAGED = "layer block token head dim"


class Paged:
    """Blocks on the device, and pinned ones, as tensors."""

    def __init__(self) -> None:
        self.device = torch.zeros(SHAPE, dtype=torch.int32, device=DEVICE)
        self.host = pinned.empty(SHAPE, torch.int32)
        self.views = KVView(self.device, PAGED), KVView(self.host, PAGED)

    def copied(self, store: bool, read: list[int], written: list[int], **terms: Any) -> None:
        """Copy blocks that differ from before, and look at every byte."""
        source, target = (self.device, self.host) if store else (self.host, self.device)
        source.copy_(torch.randint(1, 1 << 30, SHAPE, dtype=torch.int32))
        target.fill_(-1)
        wanted = target.cpu().clone()
        pairs = [(a, b) for a, b in zip(read, written, strict=True) if min(a, b) >= 0]
        for a, b in pairs:
            wanted[:, b] = source[:, a].cpu()
        torch.accelerator.synchronize(DEVICE)
        src, dst = self.views if store else self.views[::-1]
        copy_blocks(src, dst, read, written, **terms).synchronize()
        assert torch.equal(target.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_blocks_of_tensors_by_new_ids_of_the_host(store: bool, streams: bool) -> None:
    blocks = Paged()
    for read, written in [
        ([9, 2, 17], [0, 5, 3]),
        ([1, 2, 3], [22, 0, 7]),
        ([1, -1, 3], [4, 5, -2]),
        ([3, 2, 1], [1, 2, 3]),
    ]:
        terms = {"stream": torch.Stream(DEVICE)} if streams else {}
        blocks.copied(store, read, written, overlap="idle", **terms)
    src, dst = blocks.views if store else blocks.views[::-1]
    for read, written in [([1, 2, 24], [1, 2, 3]), ([1, 2, 3], [4, 4, 5]), ([1, 2, 3], [4, 24, 5])]:
        with pytest.raises(SlotError):
            copy_blocks(src, dst, read, written, overlap="idle")
    # Half a block is no copy of whole units.
    copy_blocks(src, dst, [1, 2, 3], [4, 5, 6], count=10, overlap="idle").synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("listed", ["list", "Index", "int32", "device"])
def test_blocks_inside_a_device_by_new_ids(listed: str) -> None:
    """A launch is packed once; later ids may be of another dtype, of another number, or wrong."""
    caches = [torch.zeros(24, 4, HEADS, DIM, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    pool = torch.zeros(24, 2, 4, HEADS, DIM, dtype=torch.int32, device=DEVICE)
    src = KVView(caches, "layer | block token head dim")
    dst = KVView(pool, "block layer token head dim")

    def made(ids: list[int], dtype: torch.dtype) -> Any:
        if listed == "list":
            return ids
        tensor = torch.tensor(ids, dtype=dtype, device=DEVICE if listed == "device" else "cpu")
        return Index(tensor, 4) if listed == "Index" else tensor

    usual = torch.int32 if listed == "int32" else torch.int64
    other = torch.int64 if listed == "int32" else torch.int32
    for read, written, dtype in [
        ([9, 2, 17], [0, 5, 3], usual),
        ([1, 2, 3], [22, 0, 7], usual),
        ([1, -1, 3], [4, 5, -2], usual),
        ([3, 2, 1], [1, 2, 3], other),
        ([3, 2], [8, 9], usual),
    ]:
        for each in caches:
            each.copy_(torch.randint(1, 1 << 30, each.shape, dtype=torch.int32))
        pool.fill_(-1)
        wanted = pool.clone()
        for a, b in zip(read, written, strict=True):
            if min(a, b) >= 0:
                wanted[b] = torch.stack([each[a] for each in caches])
        copy_blocks(src, dst, made(read, dtype), made(written, dtype)).synchronize()
        assert torch.equal(pool, wanted)
    read = made([1, 24, 3], usual)
    written = made([1, 2, 3], usual)
    with pytest.raises(SlotError):
        copy_blocks(src, dst, read, written).synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_keys_and_values_that_lie_apart_keep_their_places(backend: str) -> None:
    """Their tensors have different widths, so that each has separate kernels and an address."""
    paged = KVView(
        torch.zeros(TOKENS, 3, dtype=torch.int32, device=DEVICE), "token (kv dim)", dim=(2, 1)
    )
    parts = [torch.zeros(TOKENS, each, dtype=torch.int32, device=DEVICE) for each in (2, 1)]
    apart = KVView(parts, "kv | token dim", dim=(2, 1))
    for step in range(4):
        paged.tensors[:] = torch.arange(paged.tensors.numel(), device=DEVICE).view(-1, 3) + step
        for each in parts:
            each.fill_(-1)
        ids = torch.randperm(TOKENS)[:40].to(DEVICE)
        copy_rows(paged, apart, ids, None, backend=backend).synchronize()
        assert torch.equal(parts[0][:40], paged.tensors[ids, :2])
        assert torch.equal(parts[1][:40], paged.tensors[ids, 2:])


@pytest.mark.gpu
def test_pinned_memory_stays_until_a_repeated_copy_that_nobody_holds_has_ended() -> None:
    blocks = Paged()
    for _ in range(3):
        blocks.copied(False, [9, 2, 17], [0, 5, 3], overlap="idle")
    blocks.host.fill_(7)
    blocks.device.zero_()
    torch.accelerator.synchronize(DEVICE)
    address = blocks.host.data_ptr()
    _sleep(200_000_000)
    copy_blocks(*blocks.views[::-1], [9, 2, 17], [0, 5, 3], overlap="idle")
    device = blocks.device
    del blocks
    gc.collect()
    others = [pinned.empty(SHAPE, torch.int32).fill_(3) for _ in range(4)]
    assert address not in [each.data_ptr() for each in others]
    # The ids of the call lie in pinned memory too.
    ids = [torch.full((n,), 20, dtype=torch.int64).pin_memory() for n in range(1, 17)]
    torch.accelerator.synchronize(DEVICE)
    moved = (device == 7).transpose(0, 1).flatten(1).all(1).nonzero()[:, 0]
    assert moved.tolist() == [0, 3, 5]
    assert int((device == 7).sum()) == 3 * LAYERS * 4 * HEADS * DIM
    del ids


# --- Without a GPU --------------------------------------------------------------------------------


@pytest.mark.simdev
@pytest.mark.parametrize("copies", [1, 3])
def test_ids_that_nobody_holds_stay_until_the_copy_has_ended(guarding: None, copies: int) -> None:
    """They were brought on one stream, and are read on another."""
    in_flight.clear()  # of tests before: one that has not ended would hide those after it
    device = simulated.DEVICE
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    ids = Index([1, 2], 4)
    brought = weakref.ref(ids.ids_on(device))
    for _ in range(copies - 1):
        copy_blocks(src, dst, ids, ids, backend="guarding").synchronize()
    stream = torch.Stream(device)
    with torch.get_device_module(device).stream(stream):
        delay(stream, 100)
        copy_blocks(src, dst, ids, ids, backend="guarding")
    del ids
    gc.collect()
    assert brought() is not None
    torch.accelerator.synchronize(device)
    for _ in range(2 * UNCHECKED):  # later copies look for ended ones
        copy_blocks(src, dst, [3], [4], backend="guarding").synchronize()
    gc.collect()
    assert brought() is None


@pytest.mark.simdev
def test_events_of_dropped_handles_are_used_again(
    guarding: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    created = list[object]()
    event = torch.Event

    def counted(*arguments: Any) -> torch.Event:
        created.append(arguments)
        return event(*arguments)

    for ids in ([1, 2], torch.tensor([1, 2], device=simulated.DEVICE)):
        for turn in range(5 * UNCHECKED):
            if turn == 3 * UNCHECKED:  # a batch of ends was released
                created.clear()
            monkeypatch.setattr(torch, "Event", counted)
            copy_blocks(src, dst, ids, ids, backend="guarding")
            monkeypatch.setattr(torch, "Event", event)
            torch.accelerator.synchronize(simulated.DEVICE)
        assert len(created) <= 1


class _Judging(MoveLaunch):
    """A launch that notes which copies get a status word."""

    noted: ClassVar[list[bool]] = []

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def enqueue(self, move: Move, stream: torch.Stream | None, status: Any) -> Pending | None:
        _Judging.noted.append(status is not None)
        return self._launch(*move, stream, status)


class Guarding(Reference):
    """The reference, which says that it guards: ids of the host are checked anyway."""

    name = "guarding"

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), guards=True, skips_negative=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Judging(super().prepare(plan))


@pytest.fixture
def guarding() -> Iterator[None]:
    _Judging.noted = []
    with registered(guarding=Guarding):
        yield


def blocks_of_simdev() -> tuple[torch.Tensor, torch.Tensor]:
    one, other = (torch.zeros(SHAPE, dtype=torch.int32, device=simulated.DEVICE) for _ in "ab")
    return one, other


@pytest.mark.simdev
def test_ids_of_the_host_are_checked_in_each_copy(guarding: None) -> None:
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    ids = [([9, 2], [0, 5]), ([5, 2], [7, 0]), ([1, 7], [8, 3]), ([4, 6], [6, 4])]
    for read, written in ids:
        rows = torch.randint(1, 1 << 30, SHAPE, dtype=torch.int32)
        one.copy_(rows)
        other.zero_()
        transfer = copy_blocks(src, dst, read, written, backend="guarding")
        transfer.synchronize()
        assert transfer.statistics.blocks == 2
        expected = torch.zeros(SHAPE, dtype=torch.int32)
        expected[:, written] = rows[:, read]
        assert torch.equal(other.cpu(), expected)
    for bad in ([1, 24], [24, 1], [1, 1 << 40]):
        with pytest.raises(SlotError, match="inside the view"):
            copy_blocks(src, dst, bad, [1, 2], backend="guarding")
        with pytest.raises(SlotError):
            copy_blocks(src, dst, [1, 2], bad, backend="guarding")
    with pytest.raises(SlotError, match="occurs 2 times"):
        copy_blocks(src, dst, [1, 2], [3, 3], backend="guarding")
    with pytest.raises(SlotError):
        copy_blocks(src, dst, [1, 2], [3, 3], count=9, backend="guarding")
    copy_blocks(src, dst, [1, 2], [3, 4], count=5, backend="guarding").synchronize()


@pytest.mark.simdev
def test_a_device_judges_only_ids_that_the_host_has_not_checked(guarding: None) -> None:
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    on_device = torch.tensor([1, 2], device=simulated.DEVICE)
    copy_blocks(src, dst, [1], [1], backend="guarding").synchronize()  # the self-check
    for ids, judging in (([1, 2], False), (Index([1, 2], 4), False), (on_device, True)):
        _Judging.noted = []
        for _ in range(4):
            copy_blocks(src, dst, ids, ids, backend="guarding").synchronize()
        assert _Judging.noted == [judging] * 4


@pytest.mark.simdev
@pytest.mark.parametrize("backend", [None, "batched_memcpy"])
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_a_strategy_is_picked_again_for_other_ids_of_the_host(
    store: bool, backend: str | None
) -> None:
    device = torch.zeros(SHAPE, dtype=torch.int32, device=simulated.DEVICE)
    host = pinned.empty(SHAPE, torch.int32)
    source, target = (device, host) if store else (host, device)
    src = KVView(source, PAGED)
    dst = KVView(target, PAGED)
    for read, written in [
        ([9, 2], [0, 5]),
        ([1, 2], [7, 8]),
        ([9, 4], [8, 9]),
        ([4], [8]),
        ([6, -1], [1, 4]),
        ([-3, 1], [1, 4]),
        ([7, 3], [1, 23]),
    ]:
        rows = torch.randint(1, 1 << 30, SHAPE, dtype=torch.int32)
        source.copy_(rows)
        target.fill_(-1)
        transfer = copy_blocks(src, dst, read, written, backend=backend)
        transfer.synchronize()
        assert transfer.carried[0] == (backend or "staged")
        expected = torch.full(SHAPE, -1, dtype=torch.int32)
        for a, b in zip(read, written, strict=True):
            if a >= 0:
                expected[:, b] = rows[:, a]
        assert torch.equal(target.cpu(), expected)
    for bad in ([1, 24], [24, 1]):
        with pytest.raises(SlotError, match="inside the view"):
            copy_blocks(src, dst, bad, [1, 2], backend=backend)
        with pytest.raises(SlotError, match="inside the view"):
            copy_blocks(src, dst, [1, 2], bad, backend=backend)
    with pytest.raises(SlotError, match="occurs 2 times"):
        copy_blocks(src, dst, [1, 2], [3, 3], backend=backend)


@pytest.mark.simdev
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("fails", [False, True], ids=["whole", "broken"])
def test_host_memory_outlives_a_copy_engines_copies(
    copies: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No allocator knows of such copies, and some of them are on their way after an error."""
    torch.accelerator.synchronize(simulated.DEVICE)
    assert copies_holding_memory() == 0
    device = torch.zeros(SHAPE, dtype=torch.int32, device=simulated.DEVICE)
    host = pinned.empty(SHAPE, torch.int32)
    src = KVView(device, PAGED)
    dst = KVView(host, PAGED)
    for first in range(copies - 1):
        copy_blocks(src, dst, [first, 9], [4, 5], backend="batched_memcpy").synchronize()
    assert copies_holding_memory() == 0
    real = TorchLink.copy

    def copy(self: TorchLink, *args: Any) -> None:
        real(self, *args)
        raise TransferError("the link broke")

    if fails:
        monkeypatch.setattr(TorchLink, "copy", copy)
    delay(simulated.current(), 100)
    with pytest.raises(TransferError) if fails else nullcontext():
        copy_blocks(src, dst, [7, 9], [4, 5], backend="batched_memcpy")
    assert copies_holding_memory() == 1
    torch.accelerator.synchronize(simulated.DEVICE)
    assert copies_holding_memory() == 0


@pytest.mark.simdev
def test_memory_that_was_replaced_is_refused(guarding: None) -> None:
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    for _ in range(3):
        copy_blocks(src, dst, [1, 2], [3, 4], backend="guarding").synchronize()
    other.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        copy_blocks(src, dst, [1, 2], [3, 4], backend="guarding")


@pytest.mark.simdev
def test_a_view_that_is_dropped_leaves_no_memory_behind(guarding: None) -> None:
    one, other = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    for _ in range(3):
        copy_blocks(src, dst, [1, 2], [3, 4], backend="guarding").synchronize()
    gone = weakref.ref(dst.owners[0].untyped_storage())
    alive = weakref.ref(other)
    del dst, other
    gc.collect()
    assert gone() is None
    assert alive() is None


@pytest.mark.simdev
def test_rows_that_both_sides_may_share_are_compared_each_time(guarding: None) -> None:
    one, _ = blocks_of_simdev()
    src = KVView(one, PAGED)
    dst = KVView(one, PAGED)
    for _ in range(3):
        copy_blocks(src, dst, [1, 2], [3, 4], backend="guarding").synchronize()
    with pytest.raises(SlotError, match="both source and destination"):
        copy_blocks(src, dst, [1, 2], [2, 4], backend="guarding")


# --- On the host ----------------------------------------------------------------------------------


class OnHost:
    """Two views of the host, between which blocks are copied."""

    def __init__(self) -> None:
        self.one, self.other = (torch.zeros(SHAPE, dtype=torch.int32) for _ in "ab")
        self.src = KVView(self.one, PAGED)
        self.dst = KVView(self.other, PAGED)
        for _ in range(2):
            self.copy()

    def copy(self, **options: Any) -> Any:
        return copy_blocks(self.src, self.dst, [1, 2], [3, 4], **options)


@pytest.mark.parametrize("listed", ["list", "Index"])
def test_copies_of_the_host_by_new_ids(listed: str) -> None:
    sides = OnHost()

    def made(ids: list[int]) -> Any:
        return Index(ids, 4) if listed == "Index" else ids

    for read, written in [
        ([9, 2], [0, 5]),
        ([4, 9, 1], [8, 9, 0]),
        ([6, -1], [1, 4]),
        ([7, 3], [1, 23]),
    ]:
        sides.one.copy_(torch.randint(1, 1 << 30, SHAPE, dtype=torch.int32))
        sides.other.fill_(-1)
        transfer = copy_blocks(sides.src, sides.dst, made(read), made(written))
        assert transfer.done()
        assert transfer.carried[0] == "reference"
        assert transfer.statistics.blocks == sum(block >= 0 for block in read)
        expected = torch.full(SHAPE, -1, dtype=torch.int32)
        for a, b in zip(read, written, strict=True):
            if a >= 0:
                expected[:, b] = sides.one[:, a]
        assert torch.equal(sides.other, expected)
    for bad in ([1, 24], [24, 1]):
        with pytest.raises(SlotError, match="inside the view"):
            copy_blocks(sides.src, sides.dst, made(bad), made([1, 2]))
    with pytest.raises(SlotError, match="occurs 2 times"):
        copy_blocks(sides.src, sides.dst, made([1, 2]), made([3, 3]))
    sides.other.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        copy_blocks(sides.src, sides.dst, made([1, 2]), made([3, 4]))


def test_each_copy_asks_the_environment_and_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = OnHost()
    with pytest.raises(Unsupported):
        sides.copy(max_thread_blocks=4)
    with monkeypatch.context() as patched:
        patched.setenv("PORTAKV_BACKEND", "nothing")
        with pytest.raises(PortaKVError, match="nothing"):
            sides.copy()
    sides.copy()


def test_a_view_keeps_nothing_of_a_copy() -> None:
    sides = OnHost()
    gone = weakref.ref(sides.dst.owners[0].untyped_storage())
    del sides.dst, sides.other
    gc.collect()
    assert gone() is None


def test_a_forked_process_copies() -> None:
    sides = OnHost()

    def copies() -> None:
        sides.one.fill_(7)
        sides.copy()
        assert bool((sides.other[:, 3:5] == 7).all())

    assert ended_well(forked(copies))
