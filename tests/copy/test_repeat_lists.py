# SPDX-License-Identifier: Apache-2.0
"""Repeated copies by short lists of new ids, read from pinned memory of a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import simdev_cases as simulated
from support.command_line import registered
from support.device_cases import DEVICE
from torch.cuda import _sleep

from portakv import Index, KVView, copy_blocks, copy_rows
from portakv.backends.base import Capabilities, Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.copy.repeat import dtypes_of
from portakv.host import pinned
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.pinned_ids import PinnedIds
from portakv.runtime.transfer import copies_holding_memory
from portakv.view.addresses import RawMemory
from portakv_conformance.simdev import delay

TOKENS = 600
DIM = 8
LAYOUT = "token dim"


Dtypes = tuple[torch.dtype | None, torch.dtype | None]


class _Again:
    """A packed launch that finds its ids by their addresses, when the device comes to it."""

    most = 1 << 20
    calls = 0

    def __init__(self, launch: Launch, sides: tuple[KVView, KVView], dtypes: Dtypes) -> None:
        self._launch = launch
        self._sides = sides
        self._dtypes = dtypes

    def __call__(self, src: int, dst: int, first: int, count: int, status: int) -> None:
        _Again.calls += 1
        src_index = self._index(src, self._dtypes[0], count)
        dst_index = self._index(dst, self._dtypes[1], count)
        self._launch(*self._sides, src_index, dst_index, count, None, None)

    @staticmethod
    def _index(address: int, dtype: torch.dtype | None, count: int) -> Index:
        if dtype is None:
            return Index()
        return Index(
            RawMemory(dtype, count * dtype.itemsize).tensors([address], simulated.DEVICE)[0]
        )


class _Launch(MoveLaunch):
    reads_pinned_ids = True

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def enqueue(self, move: Move, stream: torch.Stream | None, status: Any) -> Pending | None:
        return self._launch(*move, stream, status)

    def again(self, src: KVView, dst: KVView, src_index: Index, dst_index: Index) -> _Again:
        return _Again(self._launch, (src, dst), dtypes_of(src_index, dst_index))


class Reading(Reference):
    name = "reading"

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), index_on="device", skips_negative=True, guards=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Launch(super().prepare(plan))


@pytest.fixture
def reading() -> Iterator[None]:
    _Again.calls = 0
    with registered(reading=Reading):
        yield


@pytest.fixture
def acquired(monkeypatch: pytest.MonkeyPatch) -> list[PinnedIds]:
    """The lists that copies took."""
    taken: list[PinnedIds] = []
    acquire = PinnedIds.acquire

    def noted() -> PinnedIds | None:
        listed = acquire()
        if listed is not None:
            taken.append(listed)
        return listed

    monkeypatch.setattr(PinnedIds, "acquire", noted)
    return taken


def two_sides() -> tuple[torch.Tensor, torch.Tensor]:
    one, other = (
        torch.zeros(TOKENS, DIM, dtype=torch.int32, device=simulated.DEVICE) for _ in "ab"
    )
    return one, other


def copied(
    sides: tuple[torch.Tensor, torch.Tensor], views: tuple[KVView, KVView], read: Any, written: Any
) -> None:
    """Copy rows, and look at every byte."""
    one, other = sides
    rows = torch.randint(1, 1 << 30, one.shape, dtype=torch.int32)
    one.copy_(rows)
    other.zero_()
    count = next(len(x) for x in (read, written) if x is not None)
    expected = torch.zeros(one.shape, dtype=torch.int32)
    places = [
        torch.arange(count) if x is None else torch.as_tensor(x).cpu() for x in (read, written)
    ]
    expected[places[1].long()] = rows[places[0].long()]
    copy_rows(views[0], views[1], read, written, backend="reading").synchronize()
    assert torch.equal(other.cpu(), expected)


KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": lambda ids: ids,
    "int64": lambda ids: np.array(ids),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "strided": lambda ids: torch.tensor([*zip(ids, ids, strict=True)])[:, 0],
}


@pytest.mark.simdev
@pytest.mark.parametrize("without", ["", "read", "written"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_new_ids(kind: str, without: str, reading: None, acquired: list[PinnedIds]) -> None:
    made = KINDS[kind]
    sides = two_sides()
    views = KVView(sides[0], LAYOUT), KVView(sides[1], LAYOUT)
    for read, written in (
        ([9, 2], [0, 5]),
        ([5, 2], [7, 0]),
        ([1, 7, 300], [8, 3, 9]),
        ([4], [399]),
        (list(range(64)), list(range(64, 128))),
    ):
        copied(
            sides,
            views,
            None if without == "read" else made(read),
            None if without == "written" else made(written),
        )
    # The simulated device gets int32 ids as they are, and its packed launch reads those.
    assert _Again.calls == 3
    assert len(acquired) == 3
    acquired.clear()
    # More ids than a list holds are sent to the device.
    many = list(range(PinnedIds.MOST + 1))
    copied(sides, views, None if without == "read" else made(many), made(many))
    assert not acquired


@pytest.mark.simdev
def test_new_ids_on_one_side_and_others_on_the_device(
    reading: None, acquired: list[PinnedIds]
) -> None:
    sides = two_sides()
    views = KVView(sides[0], LAYOUT), KVView(sides[1], LAYOUT)
    kept = torch.tensor([3, 1, 2], device=simulated.DEVICE)
    for index in (Index(kept, trusted=True), Index([3, 1, 2])):
        acquired.clear()
        for read in ([9, 2, 8], [5, 2, 7], [6, 2, 9], [1, 3, 5]):
            one, other = sides
            one.copy_(torch.arange(one.numel(), dtype=torch.int32).view(one.shape))
            other.zero_()
            copy_rows(*views, read, index, backend="reading").synchronize()
            assert torch.equal(other[[3, 1, 2]].cpu(), one[read].cpu())
        assert len(acquired) == 2


@pytest.mark.simdev
def test_a_list_is_given_back_at_the_end(reading: None, acquired: list[PinnedIds]) -> None:
    sides = two_sides()
    views = KVView(sides[0], LAYOUT), KVView(sides[1], LAYOUT)
    for turn in range(20):
        copied(sides, views, [turn, 30 + turn], [2, 1])
    assert len(acquired) == 18
    assert len(set(acquired)) == 1


def rows_of_copies_in_flight() -> tuple[torch.Tensor, torch.Tensor]:
    """Make six copies that begin late, whose ids the caller overwrites; return the rows that
    arrived, and those that were asked for."""
    sides = two_sides()
    views = KVView(sides[0], LAYOUT), KVView(sides[1], LAYOUT)
    for _ in range(3):
        copied(sides, views, [1, 2], [3, 4])
    one, other = sides
    rows = one.cpu()
    other.zero_()
    wanted = torch.zeros(rows.shape, dtype=rows.dtype)
    stream = torch.accelerator.current_stream(simulated.DEVICE)
    delay(stream, 100)
    for turn in range(6):
        read = np.array([turn, 50 + turn])
        written = np.array([100 + turn, 200 + turn])
        wanted[written] = rows[read]
        copy_rows(*views, read, written, backend="reading")
        read[:] = written[:] = 399
    torch.accelerator.synchronize(simulated.DEVICE)
    return other.cpu(), wanted


@pytest.mark.simdev
def test_copies_in_flight_have_lists_of_their_own(reading: None) -> None:
    arrived, wanted = rows_of_copies_in_flight()
    assert torch.equal(arrived, wanted)


@pytest.mark.simdev
def test_control_of_lists_of_their_own(reading: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(PinnedIds):
        def release(self) -> None:
            """Stay out of the pool."""

    memory = torch.zeros(PinnedIds.MOST, dtype=torch.int64).pin_memory()
    monkeypatch.setattr(PinnedIds, "acquire", lambda: Shared(memory))
    arrived, wanted = rows_of_copies_in_flight()
    assert not torch.equal(arrived, wanted)


@pytest.mark.simdev
def test_more_copies_in_flight_than_there_are_lists(
    reading: None, acquired: list[PinnedIds]
) -> None:
    """The ids of further copies are sent to the device; the host waits for none of them."""
    sides = two_sides()
    views = KVView(sides[0], LAYOUT), KVView(sides[1], LAYOUT)
    for _ in range(3):
        copied(sides, views, [1], [3])
    copies_holding_memory()  # of tests before this one: they give their lists back
    taken = []
    while (listed := PinnedIds.acquire()) is not None:
        taken.append(listed)
    for listed in taken[:3]:
        listed.release()
    acquired.clear()
    one, other = sides
    rows = one.cpu()
    other.zero_()
    delay(torch.accelerator.current_stream(simulated.DEVICE), 500)
    for turn in range(8):
        copy_rows(*views, [turn], [turn + 1], backend="reading")
    assert len(acquired) == 3
    torch.accelerator.synchronize(simulated.DEVICE)
    assert torch.equal(other[1:9].cpu(), rows[:8])
    copied(sides, views, [1], [3])
    assert len(acquired) == 4
    for listed in taken[3:]:
        listed.release()


@pytest.mark.gpu
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_loads_and_saves_in_flight_on_a_device(store: bool, acquired: list[PinnedIds]) -> None:
    shape = (96, 4, 2, 64)
    host = pinned.empty(shape, torch.int32)
    device = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    sides = (device, host) if store else (host, device)
    src, dst = (KVView(each, "block token head dim") for each in sides)
    for _ in range(3):
        copy_blocks(src, dst, [1], [2], overlap="idle").synchronize()
    acquired.clear()
    rows = torch.randint(1, 1 << 30, shape, dtype=torch.int32)
    sides[0].copy_(rows)
    sides[1].zero_()
    wanted = torch.zeros(shape, dtype=torch.int32)
    torch.accelerator.synchronize(DEVICE)
    _sleep(100_000_000)
    for turn in range(32):
        read = np.array([turn])
        written = np.array([32 + turn])
        wanted[written] = rows[read]
        copy_blocks(src, dst, read, written, overlap="idle")
        read[:] = written[:] = 95
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(sides[1].cpu(), wanted)
    assert len(acquired) == 32
