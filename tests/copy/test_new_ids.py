# SPDX-License-Identifier: Apache-2.0
"""Copies by short lists of new ids, which travel with the launches of kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import simdev_cases as simulated
from support.carrying_backend import Carrying, CarryingLaunch
from support.command_line import registered
from support.device_cases import DEVICE
from support.whole_copies import watch_copies_of_views
from torch.cuda import _sleep

from portakv import Index, KVView, LateErrors, SlotError, copy_blocks, copy_rows
from portakv.core.rows import MOST_LISTED
from portakv.host import pinned
from portakv.runtime import transfer as transfers
from portakv.runtime.transfer import free_words
from portakv_conformance.simdev import delay

BLOCKS = 300
SIZE = 2  # tokens of a block
DIM = 8

NAME = Carrying.name


class Sides:
    """Two pools of the simulated device."""

    def __init__(self) -> None:
        shape = BLOCKS, SIZE, DIM
        self.one = torch.zeros(shape, dtype=torch.int32, device=simulated.DEVICE)
        self.other = torch.zeros_like(self.one)
        self.src = KVView(self.one, "block token dim")
        self.dst = KVView(self.other, "block token dim")

    def fill(self) -> torch.Tensor:
        """Fill the source with numbers, and return them."""
        rows = torch.randint(1, 1 << 30, self.one.shape, dtype=torch.int32)
        self.one.copy_(rows)
        self.other.zero_()
        return rows

    def copied(self, read: Any, written: Any, **terms: Any) -> None:
        """Copy blocks, and look at every byte."""
        rows = self.fill()
        expected = torch.zeros_like(rows)
        expected[places(written, read)] = rows[places(read, written)]
        copy_blocks(self.src, self.dst, read, written, backend=NAME, **terms).synchronize()
        assert torch.equal(self.other.cpu(), expected)


def places(ids: Any, others: Any) -> torch.Tensor:
    """Return the ids of blocks as a tensor; the first blocks for no ids."""
    if ids is None:
        return torch.arange(len(others))
    ids = ids.host_ids() if isinstance(ids, Index) else ids
    return torch.as_tensor(ids).long().cpu()


@pytest.fixture
def sides() -> Iterator[Sides]:
    with registered(**{NAME: Carrying}):
        made = Sides()
        made.copied([1], [2])  # tests the backend
        yield made


@pytest.fixture
def carried() -> list[torch.Tensor]:
    """The ids that launches carried."""
    Carrying.carried.clear()
    return Carrying.carried


KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": lambda ids: ids,
    "array": np.array,
    "int64": torch.tensor,
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "strided": lambda ids: torch.tensor([*zip(ids, ids, strict=True)])[:, 0],
}


@pytest.mark.simdev
@pytest.mark.parametrize("without", ["", "read", "written"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_by_new_ids(
    kind: str, without: str, sides: Sides, carried: list[torch.Tensor]
) -> None:
    made = KINDS[kind]
    for read, written in (
        ([9, 2], [0, 5]),
        ([5, 2], [7, 0]),
        ([1, 7, 200], [8, 3, 9]),
        ([4], [299]),
        ([*range(64)], [*range(64, 128)]),
    ):
        sides.copied(
            None if without == "read" else made(read),
            None if without == "written" else made(written),
        )
    assert len(carried) == 5 * (1 if without else 2)


@pytest.mark.simdev
def test_more_ids_than_travel(sides: Sides, carried: list[torch.Tensor]) -> None:
    most = MOST_LISTED
    many = torch.arange(most + 1) % BLOCKS  # a block may be read several times
    rows = sides.fill()
    into = torch.zeros(most + 1, SIZE, DIM, dtype=torch.int32, device=simulated.DEVICE)
    dst = KVView(into, "block token dim")
    for count, lists in ((most + 1, 0), (most, 2)):
        carried.clear()
        into.zero_()
        ids = many[:count], np.arange(count)
        copy_blocks(sides.src, dst, *ids, backend=NAME).synchronize()
        assert torch.equal(into[:count].cpu(), rows[many[:count]])
        assert len(carried) == lists


@pytest.mark.simdev
@pytest.mark.parametrize("where", ["host", "device"])
def test_new_ids_on_one_side_alone(where: str, sides: Sides, carried: list[torch.Tensor]) -> None:
    device = simulated.DEVICE if where == "device" else torch.device("cpu")
    kept = Index(torch.tensor([3, 1, 2], device=device), SIZE, trusted=True)
    for read in ([9, 2, 8], [5, 2, 7], [6, 2, 9], [1, 3, 5]):
        carried.clear()
        sides.copied(read, kept)
        assert len(carried) == 1
    other = Index(torch.tensor([3, 1, 2], dtype=torch.int32, device=device), SIZE, trusted=True)
    for read in ([9, 2, 8], [5, 2, 7]):
        sides.copied(read, other)


@pytest.mark.simdev
def test_ids_on_the_device_are_still_guarded(
    sides: Sides, carried: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Completions of other tests would be retired first.
    monkeypatch.setattr(transfers, "in_flight", deque())
    on_device = torch.tensor([3, 1], device=simulated.DEVICE)
    Carrying.judging.clear()
    for read in ([9, 2], [5, 2]):
        sides.copied(read, on_device)
        sides.copied(read, [7, 8])
    assert Carrying.judging == [True, False, True, False]
    assert len(carried) == 6
    words = len(free_words)
    for turn in range(40):  # without a handle
        copy_blocks(sides.src, sides.dst, [turn, 99], on_device, backend=NAME)
    torch.accelerator.synchronize(simulated.DEVICE)
    for _ in range(40):
        copy_blocks(sides.src, sides.dst, [1, 2], on_device, backend=NAME).synchronize()
    assert len(free_words) >= words


@pytest.mark.simdev
def test_an_error_of_a_copy_that_nobody_holds_is_reported(sides: Sides) -> None:
    on_device = torch.tensor([3, 1], device=simulated.DEVICE)
    for read in ([9, 2], [5, 2], [6, 2]):
        sides.copied(read, on_device)
    late = LateErrors()
    transfer = copy_blocks(sides.src, sides.dst, [1, 2], on_device, backend=NAME)
    ((word, _),) = transfer.completions[0].words
    late.keep(transfer)
    del transfer
    word.value[0] = 2  # as a kernel does that finds a bad id at position 1
    with pytest.raises(SlotError, match="Position 1"):
        late.check()


@pytest.mark.simdev
def test_parts_of_lists_and_of_blocks(sides: Sides, carried: list[torch.Tensor]) -> None:
    rows = sides.fill()
    ids = [9, 4, 6], [1, 2, 3]
    copy_blocks(sides.src, sides.dst, *ids, skip=SIZE, backend=NAME).synchronize()
    expected = torch.zeros_like(rows)
    expected[[2, 3]] = rows[[4, 6]]
    assert torch.equal(sides.other.cpu(), expected)
    assert len(carried) == 2
    for read in (Index.of([2, 9, 4]).shifted(1), [9, 4]):
        rows = sides.fill()
        copy_rows(sides.src, sides.dst, read, [5, 6], count=2, backend=NAME).synchronize()
        assert torch.equal(sides.other[2, 1].cpu(), rows[4, 1])
        assert torch.equal(sides.other[3, 0].cpu(), rows[2, 0])
    rows = sides.fill()
    copy_blocks(sides.src, sides.dst, *ids, count=5, backend=NAME).synchronize()
    expected = torch.zeros_like(rows)
    expected[[1, 2]] = rows[[9, 4]]
    expected[3, 0] = rows[6, 0]
    assert torch.equal(sides.other.cpu(), expected)


@pytest.mark.simdev
def test_a_copy_on_another_stream_is_ordered_there(
    sides: Sides, carried: list[torch.Tensor]
) -> None:
    for n in range(4):
        sides.copied([n], [n + 1])
    carried.clear()
    rows = sides.fill()
    torch.accelerator.synchronize(simulated.DEVICE)
    stream = torch.Stream(simulated.DEVICE)
    delay(stream, 300)
    transfer = copy_blocks(sides.src, sides.dst, [7], [3], backend=NAME, stream=stream)
    torch.accelerator.current_stream(simulated.DEVICE).synchronize()
    assert not transfer.done()
    assert not sides.other.any()
    transfer.synchronize()
    assert torch.equal(sides.other[3].cpu(), rows[7])
    assert len(carried) == 2


@pytest.mark.simdev
@pytest.mark.parametrize("options", [{"by_layer": True}, {"cancellable": True}])
def test_several_launches_of_one_copy(
    options: dict[str, bool], sides: Sides, carried: list[torch.Tensor]
) -> None:
    sides.copied([7, 2], [3, 9], **options)
    assert len(carried) >= 2


def rows_of_copies_in_flight(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """Make six copies that begin late, whose ids the caller overwrites; return the rows that
    arrived, and those that were requested."""
    for _ in range(3):
        sides.copied([1, 2], [3, 4])
    rows = sides.fill()
    wanted = torch.zeros_like(rows)
    torch.accelerator.synchronize(simulated.DEVICE)
    delay(torch.accelerator.current_stream(simulated.DEVICE), 100)
    for turn in range(6):
        read = np.array([turn, 50 + turn])
        written = np.array([100 + turn, 200 + turn])
        wanted[written] = rows[read]
        copy_blocks(sides.src, sides.dst, read, written, backend=NAME)
        read[:] = written[:] = BLOCKS - 1
    torch.accelerator.synchronize(simulated.DEVICE)
    return sides.other.cpu(), wanted


@pytest.mark.simdev
def test_copies_in_flight_have_ids_of_their_own(sides: Sides) -> None:
    arrived, wanted = rows_of_copies_in_flight(sides)
    assert torch.equal(arrived, wanted)


@pytest.mark.simdev
def test_control_of_ids_of_their_own(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CarryingLaunch, "take", staticmethod(lambda ids: ids))
    arrived, wanted = rows_of_copies_in_flight(sides)
    assert not torch.equal(arrived, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_loads_and_saves_in_flight_on_a_device(
    store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = watch_copies_of_views(monkeypatch)
    shape = (96, 4, 2, 64)
    host = pinned.empty(shape, torch.int32)
    device = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
    sides = (device, host) if store else (host, device)
    src, dst = (KVView(each, "block token head dim") for each in sides)
    for _ in range(3):
        copy_blocks(src, dst, [1], [2], overlap="idle").synchronize()
    made.clear()
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
    assert made == [True] * 32


@pytest.mark.gpu
def test_a_bad_id_of_the_device_beside_new_ids_of_the_host() -> None:
    host = pinned.empty((96, 2, 64), torch.int32)
    device = torch.zeros_like(host, device=DEVICE)
    src = KVView(host, "token head dim")
    dst = KVView(device, "token head dim")
    for last in (3, 4, 5):
        ids = torch.tensor([1, last], device=DEVICE)
        copy_rows(src, dst, [7, 8], ids, overlap="idle").synchronize()
    bad = torch.tensor([1, 96], device=DEVICE)
    transfer = copy_rows(src, dst, [7, 8], bad, overlap="idle")
    with pytest.raises(SlotError, match="Position 1"):
        transfer.synchronize()
