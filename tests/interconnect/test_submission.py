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
from support.counted_shapes import ShapeCounter
from support.cuda_on_cpu import CPU, why_not
from support.late_driver import LateDriver, Work, perform

from portakv import CopyPlan, Index, KVView, SlotError, TransferError, copy_rows
from portakv.backends.rows_kernel import kernels_of
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.copy.inside import open_view
from portakv.core.call import (
    DRIVER,
    OTHERWISE,
    TOKENS,
    CopyEnd,
    Crossings,
    Executor,
    Watch,
)
from portakv.core.link import EVENTS
from portakv.core.pick import BITS, ORDER, pack_copies, pick_copy
from portakv.core.rows import Kernels
from portakv.host import pinned
from portakv.interconnect import batched_memcpy, link, staged
from portakv.interconnect.batched_memcpy import BatchedMemcpy
from portakv.interconnect.choose import EVEN, NARROW, WIDE, Rules
from portakv.interconnect.costs import unmeasured
from portakv.interconnect.link import CudaLink
from portakv.interconnect.slices import BothStages, Sizes
from portakv.interconnect.staged import StagedCrossing
from portakv.interconnect.staging import DETACHED_RING, RING, DenseRows, Staging, cached_staging
from portakv.interconnect.strategy import Cross, StrategyLaunch, Terms, WholeCopies
from portakv.plan.plan import Move
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


class Slices(StrategyLaunch):
    """The strategy `staged` over the stages of a rig."""

    strategy = "staged"

    def __init__(self, rig: Rig) -> None:
        assert isinstance(rig.stages.plan, CopyPlan)
        super().__init__(rig.stages.plan, CPU)
        self._crossing = rig.crossing()

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        plan = self._crossing.words
        if plan is None:
            return None
        words.plans[ORDER.index(strategy)] = plan.buffer_info()[0]
        return self._crossing.cross


class Unprepared(StrategyLaunch):
    """Prepares no strategy.

    Attributes:
        requested: the strategy that was requested last.
    """

    requested = ""

    def described(self, words: Crossings, strategy: str) -> None:
        self.requested = strategy


class Whole(Rig):
    """The same copy by one call of the core, from lists of ids or from arrays.

    ``event``: the handle of an event and the address of what records it, of the copy's end.
    """

    event = 0, 0

    def by_slices(self) -> WholeCopies:
        """Return what makes the copies of the strategy `staged`."""
        return self._whole(Slices(self))

    def by_pieces(self) -> WholeCopies:
        """Return what makes the copies of the strategy `batched_memcpy`."""
        self._patch.setattr(batched_memcpy, "link_of", lambda _: self.link)
        assert isinstance(self.stages.plan, CopyPlan)
        launch = BatchedMemcpy(CPU).prepare(self.stages.plan)
        assert isinstance(launch, StrategyLaunch)
        return self._whole(launch)

    def _whole(self, launch: StrategyLaunch) -> WholeCopies:
        reader = plain_reader()
        assert reader is not None
        kernels: Any = SimpleNamespace(executor=Executor(None, reader.address, None))
        return WholeCopies(launch, kernels, self.link)

    def make(self, whole: WholeCopies, *terms: int, listed: bool = True) -> int:
        """Make the copy, and return the core's result; raise the driver's error.

        ``terms``: of the pick.
        """
        ids = [self._ids_of(index, listed) for index in self.indices]
        self._opened = []
        for view in self.ends:
            device = (2, 0) if view is self.rows else (1, 0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "__dlpack_device__", lambda _, at=device: at)
                self._opened.append(open_view(view, Watch(view.owners)))
        steps = [BLOCK if each is not None else 1 for each in ids]
        offsets = [index.offset for index in self.indices]
        end = CopyEnd(0, *self.event)
        views = [each.address for each in self._opened]
        sides = *views, *ids, *steps, *offsets, self.count, *(terms or (0, 0, 0))
        at = ctypes.addressof(end)
        result = whole.copy(self.rows, self.host, sides, at, self.work)
        if result <= DRIVER:
            self.driver.refuse(DRIVER - result, "The launch")
        return result

    def made(self, whole: WholeCopies, *, listed: bool = True) -> bool:
        """Make the copy; return whether the core did."""
        result = self.make(whole, listed=listed)
        assert result == OTHERWISE or result >> TOKENS == self.count
        return result >= 0

    def issue_pieces(self) -> None:
        """Issue a copy by its pieces alone."""
        assert not self.driver.note("write", self.work, self._write)
        assert self.made(self.by_pieces())
        self.driver.note("read", self.work, self._read)

    @staticmethod
    def _ids_of(index: Index, listed: bool) -> Any:
        if index.ids is None or not listed:
            return index.ids
        return index.ids.tolist()

    def issue_whole(self, copies: int = 1) -> None:
        """Issue as `issue` does."""
        assert not self.driver.note("write", self.work, self._write)
        whole = self.by_slices()
        for nth in range(copies):
            assert self.made(whole, listed=nth % 2 == 0)
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
    whole = rig.by_slices()
    assert rig.made(whole)
    for refused in range(len(rig.driver.queue)):
        rig.driver.forget()
        rig.driver.refuse_at = refused
        with pytest.raises(TransferError, match="error 1"):
            rig.make(whole)


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
    rig.event = 7, ctypes.cast(function, ctypes.c_void_p).value or 0
    whole = (rig.by_slices if by == "slices" else rig.by_pieces)()
    assert rig.made(whole)
    if by == "pieces":
        assert recorded == [(7, rig.work, len(rig.driver.queue))]
    else:  # the copy's stream waits for the event
        assert recorded == [(7, LINK if downward else HALF, len(rig.driver.queue) - 1)]
        assert rig.driver.queue[-1].kind == "wait"
        assert rig.driver.queue[-1].stream == rig.work
    with pytest.raises(TransferError, match="an event that orders copies"):
        rig.make(whole)


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
    whole = rig.by_slices()
    for _ in range(2):
        assert not rig.made(whole)
    assert len(prepared) == 1
    assert rig.driver.queue == []


def test_what_one_call_does_not_make(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, True)
    whole = rig.by_pieces()
    assert rig.made(whole)
    whole.words.counted[0] = 5  # part of a unit
    assert not rig.made(whole)
    whole.words.counted[0] = BLOCK
    good = rig.indices
    wrong = [
        torch.full((9,), 2),  # twice in the destination
        torch.arange(5, 14),  # past the end
        torch.arange(-1, 8),  # skips a block
        torch.arange(8),  # another number
    ]
    for ids in wrong:
        rig.indices = good[0], Index(ids, BLOCK)
        assert not rig.made(whole)


@pytest.mark.parametrize("source", [[0, 1, 2, 5, 6, 9, 8, 3, 11], [*range(9)]])
def test_one_call_picks_by_the_groups_of_a_plan(
    source: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = "block layer kv token head dim", "block layer kv token head dim"
    rig = Whole(monkeypatch, layouts, True)
    target = [4, 5, 6, 7, 8, 1, 0, 2, 3]
    rig.indices = Index(torch.tensor(source), BLOCK), Index(torch.tensor(target), BLOCK)
    plan = rig.stages.plan
    assert isinstance(plan, CopyPlan)
    both = ShapeCounter(plan)
    host = ShapeCounter.of_host(plan)
    groups = both.groups(*rig.indices, rig.count)
    host_groups = host.groups(rig.indices[1], rig.indices[1], rig.count)
    sizes = plan.unit, plan.token_bytes, plan.runs_per_unit
    table = unmeasured("")
    costs = table.addresses["d2h"]
    kernel_out = BITS["zero_copy"]
    picked = set()
    shape = both.shape(groups, rig.count)
    run = shape.nbytes // shape.runs
    for wide in (run, run + 1):
        copies = pack_copies(both.plan_at, host.plan_at, *sizes) + both.folding.tobytes()
        words = array("q", copies + Rules("d2h", Terms()).words)
        assert words[18:21].tolist() == [WIDE, EVEN, NARROW]
        words[15:21] = array("q", [0, 0, 0, wide, EVEN, 0])  # no copy is small or narrow
        at = words.buffer_info()[0]
        whole = rig.by_pieces()
        whole.words.picked = at
        whole.words.counted[:] = plan.unit, *both.limits, host.limits[1]
        whole.launch = Unprepared(plan, CPU)
        assert rig.make(whole, costs, kernel_out, True) == OTHERWISE
        answer = pick_copy()(at, costs, groups, host_groups, rig.count, kernel_out, 0, True)
        assert whole.launch.requested == ORDER[answer & 15]
        picked.add(whole.launch.requested)
    assert picked == {"staged", "batched_memcpy"}
