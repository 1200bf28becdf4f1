# SPDX-License-Identifier: Apache-2.0
"""Copies inside a device that the core checks and a backend's launch makes: bytes and errors are
those of the general way, for ids on the host and on the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import registered
from support.device_cases import on
from support.simdev_cases import DEVICE, OTHER
from support.small_backends import Late
from support.whole_copies import watch_copies_of_views, watch_whole_copies

from portakv import (
    AdaptiveConnector,
    CopyOptions,
    Index,
    KVView,
    PortaKVError,
    SlotError,
    TransferError,
    copy_blocks,
    copy_rows,
)
from portakv.backends._vendor_rows import GuardedRows
from portakv.backends.base import Capabilities, Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.copy import inside, rows
from portakv.copy.inside import ChunkCopies
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.transfer import copies_holding_memory, in_flight
from portakv_conformance.simdev import delay

pytestmark = pytest.mark.simdev
LAYERS = 3
BLOCKS = 5
SIZE = 4
HEADS = 2
DIM = 4
SLOTS = BLOCKS * SIZE
CACHE = "layer | kv block token head dim"
STORED = "block layer kv token head dim"
BY = CopyOptions(backend="judging")


class Judging(Reference):
    """Copies by indexing, and leaves bad ids out.

    Attributes:
        moves: the copies of its launches, each with its status word.
        pending: what the next launches return.
        tables: of its launches.
        interrupts: its launches end by an interrupt.
    """

    name = "judging"
    moves: ClassVar = list[tuple[Move, torch.Tensor | None]]()
    pending: ClassVar[Pending | None] = None
    tables: ClassVar = (False, False)
    interrupts: ClassVar = False

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), guards=True, skips_negative=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Launch(plan, self.device)


class _Launch(MoveLaunch):
    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        self.device = device
        self.tables = Judging.tables
        self._rows = GuardedRows(plan, device, 4)

    def enqueue(
        self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None
    ) -> Pending | None:
        Judging.moves.append((move, status))
        super().enqueue(move, stream, status)
        if Judging.interrupts:
            raise KeyboardInterrupt
        return Judging.pending

    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        self._rows(move, status)


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with registered(judging=Judging):
        # The backend checks itself now.
        copy_blocks(*views()[:2], [1], [2], options=BY).synchronize()
        Judging.moves.clear()
        yield
    Judging.moves.clear()
    Judging.pending = None
    Judging.tables = (False, False)
    Judging.interrupts = False


def caches_of(device: torch.device = DEVICE) -> list[torch.Tensor]:
    shape = LAYERS, 2, BLOCKS, SIZE, HEADS, DIM
    numbers = torch.arange(LAYERS * 2 * SLOTS * HEADS * DIM, dtype=torch.int32)
    return [each.to(device) for each in numbers.view(shape)]


def views(device: torch.device = DEVICE) -> tuple[KVView, KVView, list[torch.Tensor], torch.Tensor]:
    """Return paged caches, and blocks of all layers in one tensor, with these tensors."""
    paged = caches_of(device)
    shape = BLOCKS + 2, LAYERS, 2, SIZE, HEADS, DIM
    stored = torch.full(shape, 77, dtype=torch.int32).to(device)
    return KVView(paged, CACHE), KVView(stored, STORED), paged, stored


def connector_of(caches: list[torch.Tensor]) -> AdaptiveConnector:
    connector = AdaptiveConnector(caches[0].device, backend=Judging.name)
    connector.register_kv_caches(caches)
    return connector


def chunk_of(tokens: int, value: int = 77, device: torch.device = DEVICE) -> torch.Tensor:
    shape = 2, LAYERS, tokens, HEADS * DIM
    return torch.full(shape, value, dtype=torch.int32).to(device)


def rows_of(caches: list[torch.Tensor]) -> torch.Tensor:
    """Return the rows [kv, layer, slot, elements] on the host."""
    return torch.stack([cache.cpu().view(2, SLOTS, -1) for cache in caches], dim=1)


def as_passed(kind: str, ids: list[int]) -> Any:
    """Return ids as a caller may pass them."""
    there = torch.tensor(ids).to(DEVICE)
    return {
        "list": ids,
        "array": np.array(ids),
        "host": torch.tensor(ids),
        "index": Index(ids),
        "device": there,
        "device int32": there.to(torch.int32),
        "index on device": Index(there),
        "after others": Index(torch.tensor([-5, 9999, *ids]).to(DEVICE), offset=2),
    }[kind]


KINDS = ["list", "array", "host", "index", "device", "device int32", "index on device"]
ON_HOST = KINDS[:4]


@given(
    kind=st.sampled_from([*KINDS, "after others"]),
    order=st.permutations(range(SLOTS)),
    skipped=st.sets(st.integers(0, SLOTS - 1), max_size=3),
    ends=st.lists(st.integers(0, SLOTS), min_size=2, max_size=2, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_chunks_by_any_ids(kind: str, order: list[int], skipped: set[int], ends: list[int]) -> None:
    start, end = sorted(ends)
    ids = [-3 if place in skipped else slot for place, slot in enumerate(order)]
    here = ids[start:end]
    used = [place for place, slot in enumerate(here) if slot >= 0]
    slots = [here[place] for place in used]
    caches = caches_of()
    before = rows_of(caches)
    connector = connector_of(caches)
    with pytest.MonkeyPatch.context() as patched:
        watched = watch_whole_copies(patched)
        for _ in range(2):
            chunk = chunk_of(end - start)
            connector.from_gpu(chunk, None, as_passed(kind, ids), start, end).synchronize()
            expected = chunk_of(end - start).cpu()
            expected[:, :, used] = before[:, :, slots]
            assert torch.equal(chunk.cpu(), expected)
        for value in (5, 6):
            chunk = chunk_of(end - start, value)
            connector.to_gpu(chunk, None, as_passed(kind, ids), start, end).synchronize()
            expected = before.clone()
            expected[:, :, slots] = value
            assert torch.equal(rows_of(caches), expected)
    # The first call reads the layout of chunks. The core leaves copies of nothing to the others.
    assert watched == [False, *[bool(used)] * 3]


@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    offsets=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    count=st.none() | st.integers(-2, 9),
    read=st.lists(st.integers(-2, SLOTS), min_size=1, max_size=12),
    written=st.none() | st.lists(st.integers(-2, SLOTS), min_size=1, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_rows_by_any_ids_end_as_on_the_general_way(
    kinds: tuple[str, str],
    offsets: tuple[int, int],
    count: int | None,
    read: list[int],
    written: list[int] | None,
) -> None:
    """Bytes, errors and statistics are equal: of skipped ids, and of ids past the end."""
    if kinds[1] not in ON_HOST and written is not None:
        written = [*dict.fromkeys(written)]  # nothing judges which of two rows comes last
    ends = []
    for general in (False, True):
        src, dst, _, stored = views()
        indices = [Index(offset=each) for each in offsets]
        for side, (kind, ids) in enumerate(zip(kinds, (read, written), strict=True)):
            if ids is not None:
                passed = as_passed(kind, ids)
                if not isinstance(passed, Index):
                    passed = Index(passed, offset=offsets[side])
                indices[side] = passed
        end: list[object] = []
        with pytest.MonkeyPatch.context() as patched:
            if general:
                patched.setattr(rows, "copied", lambda *_: None)
            try:
                made = copy_rows(src, dst, *indices, count=count, options=BY)
                end.append((made.statistics.blocks_requested, made.carried))
                made.synchronize()
                end.append((made.statistics.blocks, made.statistics.nbytes))
            except PortaKVError as error:
                end.append((type(error), str(error)))
        torch.accelerator.synchronize(DEVICE)
        ends.append((end, stored.cpu()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_between_two_views(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = watch_copies_of_views(monkeypatch)
    src, dst, paged, stored = views()
    read = [4, 0, -1, 3, 3]
    written = [6, 2, 1, -7, 0]
    expected = stored.cpu()
    for block, to in ((4, 6), (0, 2), (3, 0)):
        expected[to] = torch.stack([cache.cpu()[:, block] for cache in paged])
    ids = [as_passed(kind, each) for each in (read, written)]
    if isinstance(ids[0], Index):
        ids = [Index(each.ids, SIZE) for each in ids]
    copy_blocks(src, dst, *ids, options=BY).synchronize()
    assert torch.equal(stored.cpu(), expected)
    assert whole == [True]
    # A launch judges what no host has checked, and what it skips.
    assert [status is not None for _, status in Judging.moves] == [True]


def test_ids_of_the_host_that_skip_nothing_have_no_status_word() -> None:
    src, dst, _, _ = views()
    copy_blocks(src, dst, [1, 2], [3, 4], options=BY).synchronize()
    assert [status for _, status in Judging.moves] == [None]


def test_ids_on_both_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which units the host's ids skip together with the device's is not known."""
    whole = watch_copies_of_views(monkeypatch)
    src, dst, paged, stored = views()
    there = torch.tensor([3, 1], device=DEVICE)
    for ids in ([2, 4], [2, -1]):
        stored.fill_(77)
        made = copy_blocks(src, dst, there, ids, options=BY)
        made.synchronize()
        assert torch.equal(stored.cpu()[2, 1], paged[1].cpu()[:, 3])
        assert bool((stored.cpu()[4] == 77).all()) == (ids[1] < 0)
        assert made.statistics.blocks == 2 - (ids[1] < 0)
    assert whole == [True, False]


@pytest.mark.parametrize("store", [True, False], ids=["store", "load"])
def test_a_bad_id_of_a_device_is_reported_once(store: bool) -> None:
    """By the handle, or, if the handle is dropped, by the connector's next call."""
    caches = caches_of()
    before = rows_of(caches)
    connector = connector_of(caches)
    move = connector.from_gpu if store else connector.to_gpu
    good = torch.tensor([2, 3, 4], device=DEVICE)
    bad = torch.tensor([-1, 2, SLOTS, 4], device=DEVICE)
    move(chunk_of(3), None, good).synchronize()
    chunk = chunk_of(3)
    with pytest.raises(SlotError, match="Position 1 of a device index"):
        move(chunk, None, bad, 1).synchronize()
    move(chunk, None, good)
    move(chunk, None, bad, 1)
    torch.accelerator.synchronize(DEVICE)
    with pytest.raises(SlotError, match="Position 1 of a device index"):
        move(chunk, None, good)
    move(chunk, None, good).synchronize()
    if store:
        assert torch.equal(chunk.cpu(), before[:, :, [2, 3, 4]])


WRONG: dict[str, Any] = {
    "past the end": lambda c, x: c.from_gpu(chunk_of(2), None, [3, SLOTS]),
    "twice": lambda c, x: c.to_gpu(chunk_of(2), None, [3, 3]),
    "shorter chunk": lambda c, x: c.from_gpu(chunk_of(1), None, torch.tensor([3, 4]).to(DEVICE)),
    "longer chunk": lambda c, x: c.from_gpu(chunk_of(3), None, torch.tensor([3, 4]).to(DEVICE)),
    "range": lambda c, x: c.from_gpu(chunk_of(2), None, torch.tensor([3, 4]).to(DEVICE), 1, 3),
    "float ids": lambda c, x: c.from_gpu(chunk_of(2), None, torch.tensor([3.0, 4.0]).to(DEVICE)),
    "two dimensions": lambda c, x: c.from_gpu(chunk_of(2), None, torch.tensor([[3, 4]]).to(DEVICE)),
    "text": lambda c, x: c.from_gpu(chunk_of(2), None, ["3", "4"]),
    "one place": lambda c, x: c.from_gpu(
        chunk_of(1).expand(2, LAYERS, 2, HEADS * DIM), None, [3, 4]
    ),
    "another dtype": lambda c, x: c.from_gpu(chunk_of(2).float(), None, [3, 4]),
    "another device": lambda c, x: c.from_gpu(chunk_of(2, device=OTHER), None, [3, 4]),
    "ids of another device": lambda c, x: c.from_gpu(
        chunk_of(2), None, torch.tensor([3, 4]).to(OTHER)
    ),
    "in the caches": lambda c, x: c.from_gpu(
        x[0].view(-1)[: 2 * LAYERS * HEADS * DIM].view(2, LAYERS, 1, HEADS * DIM), None, [3]
    ),
    "a cache without memory": lambda c, x: (
        x[1].untyped_storage().resize_(0),
        c.from_gpu(chunk_of(2), None, torch.tensor([3, 4]).to(DEVICE)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_has_the_end_of_the_general_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = list[tuple[type[PortaKVError] | None, str]]()
    for general in (False, True):
        caches = [cache.clone() for cache in caches_of()]
        connector = connector_of(caches)
        connector.from_gpu(chunk_of(2), None, [3, 4]).synchronize()
        connector.to_gpu(chunk_of(2), None, [3, 4]).synchronize()
        if general:
            monkeypatch.setattr(ChunkCopies, "transfer", lambda *_: None)
        try:
            WRONG[name](connector, caches)
            ends.append((None, ""))
        except PortaKVError as error:
            ends.append((type(error), str(error)))
    assert ends[0] == ends[1]
    assert ends[0][0] is not None or name == "ids of another device"


def test_a_backend_that_judges_no_ids_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general way does. Ids of the host, and those that a caller vouches for, wait for
    nothing."""
    whole = watch_copies_of_views(monkeypatch)
    src, dst, paged, stored = views()
    there = torch.tensor([3, -1], device=DEVICE)
    for read, written, made in (
        (there, [5, 6], False),
        ([3, -1], [5, 6], False),
        ([3], [5], True),
        (Index(there[:1], SIZE), [5], False),
        (Index(there[:1], SIZE, trusted=True), [5], True),
    ):
        stored.fill_(77)
        copy_blocks(src, dst, read, written, backend="reference").synchronize()
        assert torch.equal(stored.cpu()[5, 1], paged[1].cpu()[:, 3])
        assert bool((stored.cpu()[6] == 77).all())
        assert whole.pop() == made


def test_no_launch_follows_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general way knows what can be captured."""
    caches = caches_of()
    connector = connector_of(caches)
    ids = torch.tensor([3, 4], device=DEVICE)
    connector.from_gpu(chunk_of(2), None, ids).synchronize()
    src, dst, _, _ = views()
    whole = watch_copies_of_views(monkeypatch)
    chunks = watch_whole_copies(monkeypatch)
    for captured in (False, True):
        monkeypatch.setattr(inside, "capturing", lambda device, answer=captured: answer)
        connector.from_gpu(chunk_of(2), None, ids).synchronize()
        copy_blocks(src, dst, [1], [2], options=BY).synchronize()
    assert chunks == [True, False]
    assert whole == [True, False]


def test_an_end_follows_the_current_stream() -> None:
    """Also of a device that is not the current one."""
    for device in (DEVICE, OTHER):
        src, dst, _, stored = views(device)
        copy_blocks(src, dst, [1], [2], options=BY).synchronize()
        stream = torch.Stream(device)
        with on(stream):
            delay(stream, 50)
        torch.accelerator.set_device_index(device.index)
        try:
            with on(stream):
                torch.accelerator.set_device_index(0)
                made = copy_blocks(src, dst, [1], [3], options=BY)
        finally:
            torch.accelerator.set_device_index(0)
        made.synchronize()
        assert bool((stored.cpu()[3] != 77).all())


def test_a_launch_may_end_later() -> None:
    """Until then the views are retained, also if the handle is dropped."""
    in_flight.clear()
    src, dst, _, _ = views()
    Judging.pending = Late()
    transfer = copy_blocks(src, dst, [1], [2], options=BY)
    assert not transfer.done()
    with pytest.raises(TransferError, match="it failed"):
        transfer.synchronize()
    copy_blocks(src, dst, [1], [2], options=BY)
    gone = weakref.ref(src.tensors[0])
    del src, dst, transfer
    Judging.moves.clear()
    gc.collect()
    assert gone() is not None
    Judging.pending.over = True
    torch.accelerator.synchronize(DEVICE)
    for completion in in_flight:
        completion.ended()
    in_flight.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_table_of_addresses_outlives_its_view(interrupted: bool) -> None:
    """No allocator knows the streams that read it, and what was launched goes on."""
    in_flight.clear()
    Judging.tables = (True, True)
    blocks = [torch.zeros(LAYERS, 2, SIZE, HEADS, DIM, dtype=torch.int32) for _ in range(BLOCKS)]
    there = [each.to(DEVICE) for each in blocks]
    src = KVView(there, "block | layer kv token head dim")
    _, dst, _, stored = views()
    gone = weakref.ref(src.table)
    stream = torch.Stream(DEVICE)
    with on(stream):
        delay(stream, 50)
        Judging.interrupts = interrupted
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            copy_blocks(src, dst, [1], [2], options=BY)
    del src
    Judging.moves.clear()
    gc.collect()
    assert gone() is not None
    torch.accelerator.synchronize(DEVICE)
    assert bool((stored.cpu()[2] == 0).all())
    for completion in in_flight:
        completion.ended()
    in_flight.clear()
    copies_holding_memory()
    gc.collect()
    assert gone() is None
