# SPDX-License-Identifier: Apache-2.0
"""Copies between memory known by addresses that are made again and again: the second takes less of
the host, and moves what the first did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import simdev_cases as simulated
from support.command_line import registered
from support.device_cases import DEVICE
from torch.cuda import _sleep

from portakv import Index, KVView, SlotError, copy_rows
from portakv.backends.base import Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.host import pinned
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.bounded import caches
from portakv.view.addresses import RawMemory

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


def repeats() -> int:
    """Return the number of copies that all caches remember together."""
    registers = [each for each in caches() if each.name == "copies made again"]
    return sum(method is not None for each in registers for method in each.values())


@pytest.mark.gpu
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
class TestsOfRepeats:
    def test_other_ids_and_other_rows(self, pools: Pools, store: bool) -> None:
        before = repeats()
        pools.copied(store, [9, 2, 17], [0, 5, 3])
        pools.copied(store, [1, 2, 3], [95, 0, 7])
        pools.copied(store, [40], [41])
        pools.copied(store, [1, 2, 3], [3, 2, 1])
        assert repeats() == before + 1

    def test_a_limit_of_thread_blocks_is_another_way(self, pools: Pools, store: bool) -> None:
        if pools.whole.is_cuda:
            pytest.skip("the limit is of kernels that read or write host memory")
        before = repeats()
        for _ in range(3):
            pools.copied(store, [9, 2, 17], [0, 5, 3], max_thread_blocks=1)
            pools.copied(store, [9, 2, 17], [0, 5, 3])
        assert repeats() == before + 2

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
    before = repeats()
    ids = torch.tensor([1, TOKENS + 5], device=DEVICE)
    for _ in range(2):
        transfer = copy_rows(*pools.views, ids, torch.tensor([0, 1], device=DEVICE))
        with pytest.raises(SlotError, match="Position 1"):
            transfer.synchronize()
    assert repeats() == before


def test_without_addresses_or_on_the_host_nothing_is_remembered() -> None:
    before = repeats()
    ids = Index(torch.tensor([1, 2]), trusted=True)
    one = torch.arange(8.0).view(8, 1)
    other = torch.zeros(8, 1)
    for _ in range(2):
        copy_rows(KVView(one, "token dim"), KVView(other, "token dim"), ids, ids)
    at = [
        KVView.at(
            [x.data_ptr()], "token dim", shape=(8, 1), dtype=x.dtype, device="cpu", pinned=False
        )
        for x in (one, other)
    ]
    for _ in range(2):
        copy_rows(at[0], at[1], ids, ids)
    assert repeats() == before
    assert other[:, 0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]


# --- Without a GPU --------------------------------------------------------------------------------


class _Again:
    """A launch that finds its ids by their addresses, by plain indexing."""

    most = 1 << 20

    def __init__(self, launch: Launch, sides: tuple[KVView, KVView], like: torch.Tensor) -> None:
        self._launch = launch
        self._sides = sides
        self._like = like
        self.calls = 0

    def __call__(self, src: int, dst: int, first: int, count: int, status: int) -> None:
        self.calls += 1
        device = self._like.device
        wide = self._like.itemsize
        ids = [
            RawMemory(self._like.dtype, count * wide).tensors([at], device)[0] for at in (src, dst)
        ]
        self._launch(*self._sides, Index(ids[0]), Index(ids[1]), count, None, None)


class _Launch(MoveLaunch):
    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def enqueue(self, move: Move, stream: torch.Stream | None, status: Any) -> Pending | None:
        return self._launch(*move, stream, status)

    def again(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> _Again:
        assert src_index.ids is not None
        made.append(_Again(self._launch, (src, dst), src_index.ids))
        return made[-1]


made: list[_Again] = []


class Repeating(Reference):
    name = "repeating"

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Launch(super().prepare(plan))


@pytest.mark.simdev
def test_on_the_simulated_device() -> None:
    made.clear()
    shape = (TOKENS, HEADS, DIM)
    device = simulated.DEVICE
    one, other = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
    views = [
        KVView.at([x.data_ptr()], "token head dim", shape=shape, dtype=torch.int32, device=x.device)
        for x in (one, other)
    ]
    with registered(repeating=Repeating):
        for turn, (read, written) in enumerate(
            [([9, 2], [0, 5]), ([5, 2], [7, 0]), ([1, 7], [8, 3]), ([4], [6])]
        ):
            rows = torch.randint(1, 1 << 30, shape, dtype=torch.int32)
            one.copy_(rows)
            other.zero_()
            ids = [Index(torch.tensor(x, device=device), trusted=True) for x in (read, written)]
            transfer = copy_rows(views[0], views[1], *ids, backend="repeating")
            transfer.synchronize()
            assert transfer.carried[0] == "repeating"
            expected = torch.zeros(shape, dtype=torch.int32)
            expected[written] = rows[read]
            assert torch.equal(other.cpu(), expected)
            # A third number of tokens comes first.
            assert [each.calls for each in made] == [[], [0], [1], [1]][turn]
        with pytest.raises(SlotError):
            copy_rows(views[0], views[1], *ids, count=5, backend="repeating")
        for _ in range(3):  # without ids it depends on the tokens which rows both sides share
            copy_rows(views[0], views[1], count=8, backend="repeating").synchronize()
    assert len(made) == 1
