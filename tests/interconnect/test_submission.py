# SPDX-License-Identifier: Apache-2.0
"""A copy in slices that the core submits to CUDA's driver, of which a stand-in does the work late.

Bytes are judged after every order of the streams that the waits allow. Without any one of the waits
some order gives other bytes.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cuda_on_cpu import CPU, why_not
from support.late_driver import LateDriver, Work, perform

from portakv import CopyPlan, Index, KVView, SlotError, TransferError, copy_rows
from portakv.backends.rows_kernel import kernels_of
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.copy.inside import open_view
from portakv.core.call import OTHERWISE, CopyEnd, Watch, calls
from portakv.core.link import COUNT, EVENTS
from portakv.core.rows import Kernels
from portakv.host import pinned
from portakv.interconnect import batched_memcpy, link, staged
from portakv.interconnect.batched_memcpy import BatchedMemcpy
from portakv.interconnect.link import CheckedCopy, CudaLink
from portakv.interconnect.pieces import RunCounter
from portakv.interconnect.slices import BothStages, Sizes
from portakv.interconnect.staged import StagedCrossing
from portakv.interconnect.staging import DETACHED_RING, RING, DenseRows, Staging, cached_staging
from portakv.interconnect.strategy import StrategyLaunch
from portakv.plan.move import Move
from portakv.runtime import cuda
from portakv.view.form import plain_reader

#: The handles of streams: a copy's four, and one in place of the legacy default stream.
WORK, HALF, LINK, BEFORE, ASIDE = range(51, 56)
BLOCK = 4
USUAL = Sizes(0, 1 << 10, 2 << 10)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

#: Layouts of a cache of 2 layers and 2 kv: its shape for some blocks, and whether it is a list.
LAYOUTS: dict[str, Callable[[int], Any]] = {
    "block layer kv token head dim": lambda n: torch.zeros(n, 2, 2, BLOCK, 2, 16),
    "layer kv block token head dim": lambda n: torch.zeros(2, 2, n, BLOCK, 2, 16),
    "layer | block kv token head dim": lambda n: [
        torch.zeros(n, 2, BLOCK, 2, 16) for _ in range(2)
    ],
}


def stream(handle: int) -> Any:
    return SimpleNamespace(device=CPU, cuda_stream=handle)


def tensors_of(view: KVView) -> list[torch.Tensor]:
    return list(view.owners)


class OnHost(BothStages):
    """Stages of host memory, the device's by the kernels that a driver does late."""

    def __init__(self, plan: CopyPlan, downward: bool, driver: LateDriver) -> None:
        super().__init__(plan, DenseRows(plan.dst if downward else plan.src))
        self.downward = downward
        self._driver = driver

    def of(self, dense: KVView, slots: int) -> tuple[Any, CopyPlan]:
        plan = self.plan
        form = dense.form
        ends = (plan.src, form, plan.src_step, 0), (form, plan.dst, 0, plan.dst_step)
        stage, crossing = ends if self.downward else ends[::-1]
        made = CopyPlan(*stage, plan.unit)
        kernels = kernels_of(made)
        table = Kernels(self._driver.entry)
        LoadedKernels(self._driver, lambda: False).add_to(table, kernels)
        launch = RowsLaunch(made, kernels, table, self._driver, CPU)
        return SimpleNamespace(launch=launch, tables=launch.tables), CopyPlan(*crossing, plan.unit)


class HostStaging(Staging):
    """Buffers of host memory, with streams and events that are numbers."""

    def __init__(self, detached: bool) -> None:
        self._device = CPU
        self._memory = []
        self.detached = detached
        self.half: Any = stream(HALF)
        self.link: Any = stream(LINK)
        self.buffers = DETACHED_RING if detached else RING
        self.events = [None] * (self.buffers + EVENTS)
        self._turn = array("q", [0, 0])
        self._words = None
        self.lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        if not self._memory or self._memory[0].numel() < nbytes:
            self.allocate(nbytes)

    def allocate(self, nbytes: int) -> None:
        """Make buffers that are full of other bytes."""
        self._words = None
        self._memory = [
            torch.full((nbytes,), 85, dtype=torch.uint8, device="cpu") for _ in range(self.buffers)
        ]

    def handles(self) -> array[int]:
        return array("q", range(100, 100 + self.buffers + EVENTS))


class Rig:
    """A copy between blocks of a "device" and of the host, with work before and after it."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        layouts: tuple[str, str],
        downward: bool,
        seed: int = 0,
        blocks: int = 9,
        detached: bool = False,
        host_ids: bool = True,
        sizes: Sizes = USUAL,
        work: int = WORK,
        usual: bool = False,
    ) -> None:
        self.work = work
        self.driver = LateDriver()
        self._patch = patch
        patch.setattr(cuda, "library", lambda: self.driver)
        patch.setattr(cuda, "adopt", lambda device: None)
        patch.setattr(cuda, "raw", lambda stream, index: stream.cuda_stream)
        patch.setattr(link, "own_stream", lambda device: stream(ASIDE))
        patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        self.downward = downward
        random = np.random.default_rng(seed)
        sides = []
        for layout in layouts:
            made = LAYOUTS[layout](blocks + 3)
            halves = [x.to(torch.float16) for x in (made if isinstance(made, list) else [made])]
            for tensor in halves:
                noise = random.integers(0, 1 << 10, tensor.shape)
                tensor.copy_(torch.from_numpy(noise))
            sides.append(KVView(halves if isinstance(made, list) else halves[0], layout))
        self.rows, self.host = sides
        self.count = blocks * BLOCK
        orders = [random.permutation(blocks + 3)[:blocks] for _ in range(2)]
        self.device_index = Index(torch.from_numpy(orders[0].copy()), BLOCK)
        self.host_index = Index(torch.from_numpy(orders[1].copy()), BLOCK)
        if not host_ids:
            self.host_index = Index(offset=2 * BLOCK)
        self.ends = (self.rows, self.host)[:: 1 if downward else -1]
        self.indices = (self.device_index, self.host_index)[:: 1 if downward else -1]
        steps = [0 if index.ids is None else BLOCK for index in self.indices]
        plan = CopyPlan(self.ends[0].form, self.ends[1].form, *steps)
        self.stages = OnHost(plan, downward, self.driver)
        self.buffers = HostStaging(detached)
        if usual and self.stages.dense.any_length:
            memory = torch.zeros(1 << 16, dtype=torch.uint8, device="cpu")
            quantum = self.stages.quantum
            self.stages.usual = self.stages.of(self.stages.dense.view(memory, quantum), quantum)
        self.link = CudaLink(torch.device("cuda", 0))
        self.sizes = sizes
        source, target = map(tensors_of, self.ends)
        self._source = [tensor.clone() for tensor in source]
        self._before = [tensor.clone() for tensor in target]
        src, dst = self.ends
        by_oracle = copy_rows(src, dst, *self.indices, count=self.count, backend="reference")
        by_oracle.synchronize()
        self.expected = [tensor.clone() for tensor in target]
        self.result = [torch.zeros_like(tensor) for tensor in target]

    def crossing(self) -> StagedCrossing:
        """Return what makes the copies of the strategy `staged`."""
        for name, nbytes in self.sizes._asdict().items():
            self._patch.setattr(staged, name.upper(), nbytes)
        work = SimpleNamespace(stream_id=self.work)
        self._patch.setattr(torch.accelerator, "current_stream", lambda _: work)
        cached = cast("Any", cached_staging)
        self._patch.setitem(cached, (CPU, self.work, False, False), self.buffers)
        return StagedCrossing(self.stages, self.link, CPU)

    def carry(self, crossing: StagedCrossing) -> None:
        """Submit the copy with indices that Python has read."""
        assert crossing.stage(self.buffers) is not None
        before = BEFORE if self.buffers.detached else self.work
        src, dst = self.ends
        src_index, dst_index = self.indices
        move = Move(src, dst, src_index, dst_index, self.count)
        crossing.carry(move, self.device_index, self.buffers, self.work, before)

    def issue(self, copies: int = 1) -> None:
        """Note the source's last write, the copies, and the first read of the destination."""
        before = BEFORE if self.buffers.detached else self.work
        assert not self.driver.note("write", before, self._write)
        crossing = self.crossing()
        for _ in range(copies):
            self.carry(crossing)
        self.driver.note("read", self.work, self._read)

    def _write(self) -> None:
        for tensor, value in zip(tensors_of(self.ends[0]), self._source, strict=True):
            tensor.copy_(value)

    def _read(self) -> None:
        for tensor, value in zip(self.result, tensors_of(self.ends[1]), strict=True):
            tensor.copy_(value)

    def right(self, eager: tuple[int, ...], without: int = -1) -> bool:
        """Do the work; return whether what was read is right."""
        for tensor in tensors_of(self.ends[0]):
            tensor.fill_(77)
        for tensor, value in zip(tensors_of(self.ends[1]), self._before, strict=True):
            tensor.copy_(value)
        for memory in self.buffers._memory:
            memory.fill_(85)
        perform(self.driver.queue, eager, without)
        return all(map(torch.equal, self.result, self.expected))

    @property
    def orders(self) -> list[tuple[int, ...]]:
        streams = dict.fromkeys(work.stream for work in self.driver.queue)
        return list(permutations(streams))


DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])


@DOWNWARD
@pytest.mark.parametrize("detached", [False, True], ids=["", "detached"])
def test_each_wait_is_needed_and_no_other(
    downward: bool, detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = "layer | block kv token head dim", "block layer kv token head dim"
    rig = Rig(monkeypatch, layouts, downward, blocks=14, detached=detached)
    rig.issue()
    kinds = [work.kind for work in rig.driver.queue]
    slices = kinds.count("launch")
    assert slices > rig.buffers.buffers + 1
    reused = slices - rig.buffers.buffers
    assert kinds.count("wait") == slices + reused + 2
    assert all(map(rig.right, rig.orders))
    for nth, work in enumerate(rig.driver.queue):
        if work.kind == "wait":
            assert not all(rig.right(order, nth) for order in rig.orders), nth


@DOWNWARD
def test_a_wrong_piece_is_seen(downward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = "layer kv block token head dim", "block layer kv token head dim"
    rig = Rig(monkeypatch, layouts, downward)
    rig.issue()
    order = rig.orders[0]
    assert rig.right(order)
    queue = rig.driver.queue
    for nth, work in enumerate(queue):
        if work.kind in ("copy", "rows", "batch", "launch"):
            queue[nth] = Work(work.kind, work.stream, lambda: None)
            assert not rig.right(order)
            queue[nth] = work


@given(st.data())
def test_every_byte_in_every_order(data: st.DataObject) -> None:
    draw = data.draw
    layouts = draw(st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))))
    detached = draw(st.booleans())
    smallest, largest = draw(st.sampled_from([(1, 1), (512, 1024), (1024, 1 << 12), (1, 1 << 20)]))
    with pytest.MonkeyPatch.context() as patch:
        if draw(st.booleans()):  # no batches
            patch.setattr(link, "LEAST_BATCH", 1 << 30)
        patch.setattr(link, "IN_A_ROW", draw(st.sampled_from([1 << 40, 3000, 100])))
        rig = Rig(
            patch,
            layouts,
            draw(st.booleans()),
            draw(st.integers(0, 99)),
            draw(st.integers(1, 12)),
            detached,
            draw(st.booleans()),
            Sizes(draw(st.sampled_from([0, 2048, 1 << 20])), smallest, largest),
            draw(st.sampled_from([WORK, 0])),
            draw(st.booleans()),
        )
        rig.driver.busy = draw(st.booleans())
        if draw(st.booleans()):  # the host's memory was registered in two parts
            part = tensors_of(rig.host)[0]
            patch.setattr(pinned, "boundaries", lambda: (part.data_ptr() + part.nbytes // 3,))
        rig.issue(draw(st.integers(1, 2)))
        for order in rig.orders:
            assert rig.right(order)


@DOWNWARD
@pytest.mark.parametrize("detached", [False, True], ids=["", "detached"])
def test_what_was_submitted_stays_ordered(
    downward: bool, detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call is refused: the caller's stream waits for both others, and a detached copy
    after it for the buffers."""
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Rig(monkeypatch, layouts, downward, detached=detached)
    crossing = rig.crossing()
    rig.carry(crossing)
    calls = len(rig.driver.queue)
    for refused in range(calls):
        rig.driver.forget()
        rig.driver.refuse_at = refused
        with pytest.raises(TransferError, match="error 1"):
            rig.carry(crossing)
        queue = rig.driver.queue
        waits = [work.after for work in queue if work.kind == "wait" and work.stream == WORK]
        for stream in (HALF, LINK):
            moved = [n for n, x in enumerate(queue) if x.stream == stream and x.kind != "record"]
            assert not moved or any(x > moved[-1] for x in waits if queue[x].stream == stream)
        marked = [work for work in queue if work.kind == "record" and work.stream == WORK]
        assert len(marked) >= detached * rig.buffers.buffers


def test_the_sentences_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Rig(monkeypatch, layouts, True)
    crossing = rig.crossing()
    sentences = [(0, "an event that orders copies"), (2, "The launch: expected success")]
    for refuse_at, what in sentences:
        rig.driver.forget()
        rig.driver.refuse_at = refuse_at
        with pytest.raises(TransferError, match=what):
            rig.carry(crossing)
    rig.driver.refuse_at = -1
    ids = rig.host_index.ids
    assert ids is not None
    rig.indices = rig.device_index, Index(torch.full_like(ids, 99), BLOCK)
    with pytest.raises(SlotError, match="99"):
        rig.carry(crossing)


class Whole(Rig):
    """The same copy by one call of the core, from lists of ids or from arrays."""

    def read(self, *, listed: bool = True, words: tuple[int, ...] = (1, 0, 0, 0)) -> CheckedCopy:
        """Return the copy as the core has read and checked it; raise for a code."""
        reader = plain_reader()
        assert reader is not None
        room = self._room = np.zeros(64, dtype=np.int64)
        ids = [self._ids_of(index, listed) for index in self.indices]
        views = []
        for view in self.ends:
            device = (2, 0) if view is self.rows else (1, 0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "__dlpack_device__", lambda _, at=device: at)
                views.append(open_view(view, Watch(view.owners)))
        steps = [BLOCK if each is not None else 1 for each in ids]
        offsets = [index.offset for index in self.indices]
        ends = self.rows, self.host
        end = CopyEnd(room.__array_interface__["data"][0], room.size, 0, 0, 0, 0)
        at = ctypes.addressof(end)
        copy = CheckedCopy(*ends, self.downward, self.work)
        result = calls().read_copy(
            *(reader.address, views[0].address, views[1].address, *ids, *steps, *offsets),
            *(self.count, *words, copy.address, at, self.work),
        )
        assert result == self.count << 2 or result == OTHERWISE
        if result < 0:
            raise ValueError("the core makes no such copy")
        return copy

    def by_pieces(self) -> StrategyLaunch:
        """Return what makes the copies of the strategy `batched_memcpy`."""
        self._patch.setattr(batched_memcpy, "link_of", lambda _: self.link)
        assert isinstance(self.stages.plan, CopyPlan)
        launch = BatchedMemcpy(CPU).prepare(self.stages.plan)
        assert isinstance(launch, StrategyLaunch)
        return launch

    def issue_pieces(self) -> None:
        """Issue a copy by its pieces alone."""
        assert not self.driver.note("write", self.work, self._write)
        copy = self.read()
        assert self.by_pieces().cross(copy) == self.count << 2
        self.driver.note("read", self.work, self._read)

    @staticmethod
    def _ids_of(index: Index, listed: bool) -> Any:
        if index.ids is None or not listed:
            return index.ids
        return index.ids.tolist()

    def issue_whole(self, copies: int = 1) -> None:
        """Issue as `issue` does."""
        assert not self.driver.note("write", self.work, self._write)
        crossing = self.crossing()
        for nth in range(copies):
            assert crossing.cross(self.read(listed=nth % 2 == 0)) == self.count << 2
        self.driver.note("read", self.work, self._read)


@given(st.data())
def test_one_call_moves_every_byte_in_every_order(data: st.DataObject) -> None:
    draw = data.draw
    layouts = draw(st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))))
    smallest, largest = draw(st.sampled_from([(1, 1), (512, 1024), (1024, 1 << 12), (1, 1 << 20)]))
    with pytest.MonkeyPatch.context() as patch:
        if draw(st.booleans()):  # no batches
            patch.setattr(link, "LEAST_BATCH", 1 << 30)
        patch.setattr(link, "IN_A_ROW", draw(st.sampled_from([1 << 40, 3000, 100])))
        rig = Whole(
            patch,
            layouts,
            draw(st.booleans()),
            draw(st.integers(0, 99)),
            draw(st.integers(1, 12)),
            host_ids=draw(st.booleans()),
            sizes=Sizes(draw(st.sampled_from([0, 2048, 1 << 20])), smallest, largest),
            work=draw(st.sampled_from([WORK, 0])),
            usual=draw(st.booleans()),
        )
        rig.driver.busy = draw(st.booleans())
        if draw(st.booleans()):  # the host's memory was registered in two parts
            part = tensors_of(rig.host)[0]
            patch.setattr(pinned, "boundaries", lambda: (part.data_ptr() + part.nbytes // 3,))
        rig.issue_whole(draw(st.integers(1, 2)))
        for order in rig.orders:
            assert rig.right(order)


@DOWNWARD
@pytest.mark.parametrize("host_ids", [True, False], ids=["ids", ""])
@pytest.mark.parametrize("layouts", [(a, b) for a in sorted(LAYOUTS) for b in sorted(LAYOUTS)])
def test_one_call_moves_all_pieces(
    layouts: tuple[str, str], host_ids: bool, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Whole(monkeypatch, layouts, downward, host_ids=host_ids)
    rig.issue_pieces()
    assert not any(work.kind == "launch" for work in rig.driver.queue)
    assert all(map(rig.right, rig.orders))


@DOWNWARD
def test_a_driver_that_refuses_a_slice_of_one_call(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, downward, usual=True)
    launch = rig.crossing()
    copy = rig.read()
    assert launch.cross(copy) == rig.count << 2
    for refused in range(len(rig.driver.queue)):
        rig.driver.forget()
        rig.driver.refuse_at = refused
        with pytest.raises(TransferError, match="error 1"):
            launch.cross(copy)


@DOWNWARD
@pytest.mark.parametrize("by", ["slices", "pieces"])
def test_one_call_records_the_end_after_all_work(
    by: str, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, downward, usual=True)
    recorded = []
    answers = [0, 700]

    def record(event: int, stream: int) -> int:
        recorded.append((event, stream, len(rig.driver.queue)))
        return answers.pop(0)

    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(record)
    address = ctypes.cast(function, ctypes.c_void_p).value
    copy = rig.read()
    end = CopyEnd(None, 0, 0, 7, address, None)
    copy.end = ctypes.addressof(end)
    cross = (rig.crossing if by == "slices" else rig.by_pieces)().cross
    assert cross(copy) == rig.count << 2
    assert recorded == [(7, rig.work, len(rig.driver.queue))]
    with pytest.raises(TransferError, match="error 700"):
        cross(copy)


@DOWNWARD
def test_stages_of_another_backend_are_not_one_call(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = "block layer kv token head dim", "layer | block kv token head dim"
    rig = Whole(monkeypatch, layouts, downward)
    prepared: list[int] = []

    def other(stages: OnHost, dense: KVView, slots: int) -> tuple[Any, Any]:
        prepared.append(slots)
        return SimpleNamespace(launch=None), None

    monkeypatch.setattr(OnHost, "of", other)
    launch = rig.crossing()
    for _ in range(2):
        assert launch.cross(rig.read()) == OTHERWISE
    assert len(prepared) == 1
    assert rig.driver.queue == []


def test_what_one_call_does_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, True)
    rig.read()
    with pytest.raises(ValueError, match="no such copy"):
        rig.read(words=(3, 0, 0, 0))  # part of a unit
    good = rig.indices
    wrong = [
        torch.full((9,), 2),  # twice in the destination
        torch.arange(5, 14),  # past the end
        torch.arange(-1, 8),  # skips a block
        torch.arange(8),  # another number
    ]
    for ids in wrong:
        rig.indices = good[0], Index(ids, BLOCK)
        with pytest.raises(ValueError, match="no such copy"):
            rig.read()


def test_groups_are_counted_as_by_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, True)
    source = [0, 1, 2, 5, 6, 9, 8, 3, 11]
    target = [4, 5, 6, 7, 8, 1, 0, 2, 3]
    rig.indices = Index(torch.tensor(source), BLOCK), Index(torch.tensor(target), BLOCK)
    plan = rig.stages.plan
    assert isinstance(plan, CopyPlan)
    both = RunCounter(plan)
    host = RunCounter.of_host(plan)
    copy = rig.read(words=(plan.unit, *both.limits, host.limits[1]))
    _, groups, host_groups = copy.words[COUNT : COUNT + 3]
    assert groups == both.groups(*rig.indices, rig.count)
    assert host_groups == host.groups(rig.indices[1], rig.indices[1], rig.count)
