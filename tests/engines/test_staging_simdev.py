# SPDX-License-Identifier: Apache-2.0
"""What engines keep between transfers, on the simulated device: staging, slices and pieces; after
failures, under threads, and when memory of the host is pinned in other parts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_cases import index_of, leaves, view_of
from support.simdev_cases import DEVICE
from support.staging_cases import (
    CHUNK,
    FIRST,
    TOKENS,
    broken_at,
    full,
    moved,
    sides,
    small_slices,
)

from portakv import CopyPlan, Index, KVView
from portakv.backends.base import Backend
from portakv.engines import staging
from portakv.engines.descriptors import Descriptors
from portakv.engines.link import TorchLink
from portakv.engines.pieces import ALL, Pieces
from portakv.engines.slices import Slice
from portakv.engines.staged import Staged
from portakv.engines.staging import Staging
from portakv.host import pinned
from portakv.runtime.bounded import Bounded
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])


@pytest.fixture(autouse=True)
def _no_faults_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Staging of each test's own, too: what an earlier one reserved might be enough."""
    monkeypatch.setattr(staging, "_known", Bounded("staging", staging._STREAMS))
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


class Transfers:
    """Transfers of one kind through one prepared copy, with the same lists of ids each time."""

    def __init__(self, engine: Backend, downward: bool, host_ids: bool = False) -> None:
        self.rows, self.host = sides()
        self._downward = downward
        self.mine = index_of((list(range(FIRST, FIRST + TOKENS)), 1))
        self.theirs = index_of((list(range(TOKENS)), 1) if host_ids else None)
        forms = self._turned(self.rows.form, self.host.form)
        steps = self._turned(self.mine.plan_step, self.theirs.plan_step)
        self.launch: Any = engine.prepare(CopyPlan(*forms, *steps))

    def __call__(self, host: KVView | None = None, tokens: int = TOKENS) -> None:
        """Move the rows, and compare."""
        host = host or self.host
        indices: tuple[Index, Index] = self._turned(self.mine, self.theirs)
        self.launch(*self._turned(self.rows, host), *indices, tokens, None, None)
        torch.accelerator.synchronize(DEVICE)
        assert torch.equal(moved(self.rows, tokens), leaves(host.tensors)[0][:, :, :tokens])

    def _turned(self, mine: Any, theirs: Any) -> Any:
        return (mine, theirs) if self._downward else (theirs, mine)


@pytest.mark.parametrize("larger", [(8, 2), (1, 3)], ids=["slices", "more mirrors"])
def test_staging_is_empty_and_usable_after_it_found_no_memory(
    larger: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was enough before is taken to be there still."""
    halves = Transfers(Staged(DEVICE), True).launch.stages.whole
    held = halves.held(8, 0, True)
    nbytes = halves.dense.nbytes(held)
    for later in ((1, 2), larger):
        room = Staging(DEVICE)
        room.reserve(nbytes, 2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", full)
            with pytest.raises(torch.OutOfMemoryError):
                room.reserve(nbytes * larger[0], larger[1])
        assert not room.nbytes
        room.reserve(nbytes * later[0], later[1])
        assert room.nbytes >= nbytes * later[0] * later[1]
        mirrors = [room.view(at, halves.dense, held) for at in range(later[1])]
        starts = [mirror.origins[0] for mirror in mirrors]
        assert all(b - a >= nbytes for a, b in pairwise(starts))


@DOWNWARD
def test_transfers_go_on_after_one_that_found_no_memory(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = Transfers(Staged(DEVICE), downward)
    transfer(tokens=8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            transfer()
    transfer(tokens=8)
    transfer()


def test_of_too_many_streams_the_one_used_longest_ago_gives_its_staging_back() -> None:
    streams = [torch.Stream(DEVICE) for _ in range(staging._STREAMS + 1)]
    assert len({stream.stream_id for stream in streams}) == len(streams)
    first, second, *_ = rooms = [staging.staging(DEVICE, stream) for stream in streams[:-1]]
    second.reserve(1 << 12, 2)
    gone = weakref.ref(second)
    assert staging.staging(DEVICE, streams[0]) is first  # used again, so not the next to go
    staging.staging(DEVICE, streams[-1])
    assert list(staging._known.values())[:-2] == rooms[2:]
    del second, rooms, _
    gc.collect()
    assert gone() is None
    assert staging.staging(DEVICE, streams[0]) is first


@DOWNWARD
def test_threads_that_settle_one_slice_at_once_agree(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever one is interrupted by another, whose staging lies elsewhere, pieces lie in the
    mirror that they are asked for. The interruptions are calls, so that each of them happens."""
    transfer = Transfers(Staged(DEVICE), downward)
    host = transfer.host

    def fresh() -> Slice:
        transfer.rows.derived.clear()
        legs = transfer.launch.slices(transfer.rows, host, transfer.theirs, TOKENS, True)
        assert len(legs) == 1
        return legs[0]  # type: ignore[no-any-return]

    leg = fresh()
    rooms = [torch.empty(leg.nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    mirrors = [leg.dense.view(room, leg.held) for room in rooms]
    expected = [fresh().pieces(mirror, host, ALL) for mirror in mirrors]
    turns = list[int]()

    def interrupted(leg: Slice, name: str, value: Any) -> None:
        turns.append(turns[-1] - 1)
        if turns[-1] == 0:
            assert_alike(leg.pieces(mirrors[1], host, ALL), expected[1])
        object.__setattr__(leg, name, value)

    for turn in range(1, 9):  # before the first attribute that is set, the second, ...
        leg = fresh()
        with monkeypatch.context() as patch:
            turns[:] = [turn]
            patch.setattr(Slice, "__setattr__", interrupted, raising=False)
            assert_alike(leg.pieces(mirrors[0], host, ALL), expected[0])
        for mirror, wanted in zip(mirrors, expected, strict=True):
            assert_alike(leg.pieces(mirror, host, ALL), wanted)
        if turns[-1] > 0:
            break
        assert len(turns) > 1
    assert turn > 1


def assert_alike(found: Pieces, expected: Pieces) -> None:
    for column, wanted in zip(found, expected, strict=True):
        assert np.array_equal(column, wanted)


@DOWNWARD
def test_a_transfer_that_failed_leaves_no_memory_of_the_host_held(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices behind the one that failed still have the memory that they were made for."""
    small_slices(monkeypatch)
    transfer = Transfers(Staged(DEVICE), downward)
    chunk = torch.zeros(2, 3, TOKENS, 32, dtype=torch.int16).pin_memory()
    host, gone = view_of(chunk, CHUNK), weakref.ref(chunk)
    failing = broken_at(2, transfer.launch.link.copy)
    with monkeypatch.context() as patch:
        patch.setattr(transfer.launch.link, "copy", failing)
        with pytest.raises(RuntimeError, match="the link is down") as caught:
            transfer(host)
    torch.accelerator.synchronize(DEVICE)
    del chunk, host, caught
    gc.collect()
    assert gone() is None
    transfer()


@DOWNWARD
@pytest.mark.parametrize("host_ids", [False, True], ids=["dense", "host ids"])
@pytest.mark.parametrize("engine", [Staged, Descriptors])
def test_memory_that_is_pinned_in_other_parts_is_cut_there(
    engine: type[Backend], host_ids: bool, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same address, with the same ids, where pieces are kept: none may reach over a seam."""
    transfer = Transfers(engine(DEVICE), downward, host_ids)
    crossed, copy = list[tuple[int, int]](), TorchLink.copy

    def noted(self: Any, pieces: Pieces, *others: Any) -> None:
        start, pitch = (
            (pieces.dst, pieces.dst_pitch) if downward else (pieces.src, pieces.src_pitch)
        )
        past = start + (pieces.height - 1) * pitch + pieces.width
        crossed.extend(zip(start.tolist(), past.tolist(), strict=True))
        copy(self, pieces, *others)

    monkeypatch.setattr(TorchLink, "copy", noted)
    transfer()
    for _ in range(3):
        start, past = max(crossed, key=lambda ends: ends[1] - ends[0])
        seam = (start + past) // 2
        assert start < seam < past  # it is one that matters
        monkeypatch.setattr(pinned, "seams", lambda seam=seam: (seam,))
        crossed.clear()
        transfer()
        assert crossed
        assert not [ends for ends in crossed if ends[0] < seam < ends[1]]
