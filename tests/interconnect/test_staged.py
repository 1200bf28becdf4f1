# SPDX-License-Identifier: Apache-2.0
"""Strategies that copy by pieces: every byte of any layout; slices and staging of `staged`, what is
kept of them, order on streams, failures, threads, memory that is pinned in other parts; and the ids
of `batched_memcpy`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.cuda_cases import COPIES, Copy, End, by, chunk
from support.device_cases import current, delay
from support.each_backend import REPEATED, Elsewhere
from support.engine_cases import (
    CHUNKS,
    DOWNWARD,
    PAGED,
    TOKENS,
    USUAL,
    Case,
    Transfers,
    broken_at,
    cases,
    full,
    small_slices,
)
from support.guarded_memory import check_sentence, filled, tensors_in
from support.simdev_cases import DEVICE, OTHER
from support.threads import run_threads

from portakv import CopyPlan, Index, KVView, SlotError, Unsupported, copy_rows
from portakv.backends.base import Backend, Decision
from portakv.backends.reference import Reference
from portakv.errors import BackendUnavailable, PortaKVError
from portakv.host import pinned
from portakv.interconnect import link, staged, staging
from portakv.interconnect.batched_memcpy import LEAST_RUN, BatchedMemcpy
from portakv.interconnect.link import Pieces, TorchLink, pieces_of
from portakv.interconnect.pageable import Pageable
from portakv.interconnect.staged import Staged
from portakv.interconnect.staging import DenseRows
from portakv.interconnect.strategy import Strategy, Terms
from portakv.registry.registry import Choice
from portakv.runtime.transfer import copies_holding_memory

CASES = cases()
#: The host memory that a strategy takes.
PLACES = {"pageable": "cpu", "staged": "pinned", "batched_memcpy": "pinned", "zero_copy": "pinned"}


def unequal(layout: str, widths: list[list[int]]) -> Copy:
    """Return a copy of parts of unequal widths outside the tokens, each a separate tensor."""
    extents = {"layers": 2, "kv": 2, "heads": 1, "dim": (16, 8)}
    src, dst = (
        End([[filled((4, 8, 1, w), torch.uint8) for w in row] for row in widths], layout, extents)
        for _ in range(2)
    )
    return Copy(by(src, [0, 2], 8), by(dst, [1, 3], 8), 16)


TABLE: dict[str, Callable[[], Copy]] = {
    **COPIES,
    **REPEATED,
    "unequal widths in each layer": lambda: unequal(
        "layer kv | block token head dim", [[16, 8], [16, 8]]
    ),
    "layers of each width": lambda: unequal("kv layer | block token head dim", [[16, 16], [8, 8]]),
}


@pytest.fixture(autouse=True)
def _staging_of_its_own() -> None:
    staging.cached_staging.clear()


@pytest.fixture(params=[None, 512], ids=["default", "small"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        small_slices(monkeypatch, request.param)


#: Each case by each strategy in one direction, and in the other one with `full`.
EVERY = [
    pytest.param(strategy, case, downward, marks=pytest.mark.full if (n + k + downward) % 4 else ())
    for k, strategy in enumerate((Staged, Pageable, BatchedMemcpy))
    for n, case in enumerate(CASES)
    for downward in (True, False)
]


@pytest.mark.parametrize(("strategy", "case", "downward"), EVERY)
def test_every_byte(
    accelerator: torch.device,
    strategy: type[Backend],
    case: Case,
    downward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_slices(monkeypatch, 512)
    transfer = Transfers(strategy(accelerator), downward, case)
    transfer()
    if case in CASES[::5]:
        transfer(transfer.chunk(3), stream=torch.Stream(accelerator))


def crosses(copied: Copy, device: torch.device, strategy: str, downward: bool) -> None:
    """Copy between a device and the host as the library does; every byte is judged."""
    sides = [Elsewhere(device), Elsewhere(PLACES[strategy])][:: 1 if downward else -1]

    def run() -> None:
        (src,), (dst,) = (x.views(y) for x, y in zip(sides, (copied.src, copied.dst), strict=True))
        ids = copied.src.index(), copied.dst.index()
        copy_rows(src, dst, *ids, count=copied.count, backend=strategy).synchronize()
        for side in sides:
            side.bring_back()

    copied.check(run)


@DOWNWARD
@pytest.mark.parametrize("strategy", PLACES)
@pytest.mark.parametrize("name", TABLE)
def test_every_copy_of_the_table(
    accelerator: torch.device, strategy: str, name: str, downward: bool
) -> None:
    try:
        crosses(TABLE[name](), accelerator, strategy, downward)
    except BackendUnavailable as error:
        pytest.skip(str(error).partition("\n")[0])
    except Unsupported as error:
        if strategy != "batched_memcpy" or "it copies runs of 16 B or more" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[1])


@DOWNWARD
@pytest.mark.parametrize("page", [96, 100])  # the bytes of 16 tokens, whole for each or not
@pytest.mark.parametrize("strategy", ["staged", "pageable"])
def test_opaque_pages_of_any_size_in_small_slices(
    accelerator: torch.device,
    strategy: str,
    page: int,
    downward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_slices(monkeypatch)
    src, dst = (
        End(filled((2, 9, page), torch.uint8), "layer block page", {"kv": 1, "block_size": 16})
        for _ in range(2)
    )
    crosses(Copy(src, dst, 9 * 16), accelerator, strategy, downward)


@pytest.mark.parametrize(
    ("strategy", "place"),
    [("staged", "pageable"), ("batched_memcpy", "pageable"), ("pageable", "pinned")],
)
def test_a_strategy_that_does_not_serve_the_memory_says_which_one_does(
    accelerator: torch.device, strategy: str, place: str
) -> None:
    src, dst = (
        Elsewhere(each).views(chunk(7))[0]
        for each in ("cpu" if place == "pageable" else place, accelerator)
    )
    with pytest.raises(
        PortaKVError, match=f"{strategy}: rejected, it does not copy from {place} to device"
    ):
        copy_rows(src, dst, backend=strategy)


@DOWNWARD
@pytest.mark.usefixtures("slices")
def test_streams_have_staging_of_their_own(accelerator: torch.device, downward: bool) -> None:
    """The same prepared copy runs on two streams together, each through its own buffers."""
    transfer = Transfers(Staged(accelerator), downward)
    others = [transfer.host, transfer.chunk(2)]  # of the same bytes
    expected = transfer.expected()
    streams = [torch.Stream(accelerator) for _ in others]
    for _ in range(3):
        for other, stream in zip(others, streams, strict=True):
            stream.wait_stream(torch.accelerator.current_stream(accelerator.index))
            transfer.go(other, stream=stream)
    for other in others:
        transfer.check(expected, other)


@DOWNWARD
@pytest.mark.usefixtures("slices")
def test_earlier_work_of_the_stream_comes_first(accelerator: torch.device, downward: bool) -> None:
    """Rows that are still being written are read after that, or written after that."""
    transfer = Transfers(Staged(accelerator), downward)
    transfer()  # nothing is made any more

    def fill(value: int) -> None:
        for layer in tensors_in(transfer.rows.tensors):
            layer.fill_(value)

    for value in range(5):
        fill(value)
        expected = transfer.expected()
        fill(99)
        torch.accelerator.synchronize(accelerator)
        delay(torch.accelerator.current_stream(accelerator.index))
        fill(value)
        transfer.go()
        transfer.check(expected)


class OnlyByLayer(Reference):
    """Takes dense rows whose form is one of those that lie layer by layer."""

    takes: set[Any] = set()  # noqa: RUF012
    refused = 0

    def check(self, plan: CopyPlan) -> Decision:
        if {plan.src, plan.dst} & self.takes:
            return super().check(plan)
        OnlyByLayer.refused += 1
        return Decision(self.name, False, "it knows rows that lie layer by layer")


@DOWNWARD
def test_one_that_refuses_the_hosts_order(accelerator: torch.device, downward: bool) -> None:
    backend = OnlyByLayer(accelerator)
    half = Choice(backend, (Decision(backend.name, True, "chosen"),), True, backend.capabilities())
    host = Transfers(Staged(accelerator), downward).host
    OnlyByLayer.takes = set()
    OnlyByLayer.refused = 0
    with pytest.raises(Unsupported):
        Transfers(Staged(accelerator, half), downward).prepared()
    assert OnlyByLayer.refused == 2  # both were tried
    dense = DenseRows(host.form, "layer")
    sizes = {TOKENS, *(1 << n for n in range(12))}
    memory = torch.empty(dense.nbytes(max(sizes)), dtype=torch.uint8, device=accelerator)
    OnlyByLayer.takes = {dense.view(memory, each).form for each in sizes}
    Transfers(Staged(accelerator, half), downward)()


@DOWNWARD
@pytest.mark.simdev
def test_slices_cross_before_the_pieces_of_later_ones_are_made(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the link is idle until the host has expanded the whole transfer."""
    small_slices(monkeypatch, 4096)
    transfer = Transfers(Staged(DEVICE), downward)
    made = pieces_of
    copy = TorchLink.copy
    order = list[str]()

    def pieces(*arguments: Any, **terms: Any) -> Any:
        order.append("made")
        return made(*arguments, **terms)

    def crossed(*arguments: Any) -> None:
        order.append("crossed")
        copy(*arguments)

    monkeypatch.setattr(link, "pieces_of", pieces)
    monkeypatch.setattr(TorchLink, "copy", crossed)
    transfer()
    slices = order.count("crossed")
    assert slices > 2
    assert order == ["made", "crossed"] * slices


@pytest.mark.simdev
def test_staging_stays_below_its_limit() -> None:
    for case in CASES[::4]:
        Transfers(Staged(DEVICE), True, case)()
    most = staging.RING * staged.LARGEST
    assert max(each.nbytes for each in staging.cached_staging.values()) <= most


@DOWNWARD
def test_transfers_go_on_after_one_that_found_no_memory(
    accelerator: torch.device, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = Transfers(Staged(accelerator), downward)
    transfer.prepared()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            transfer.go()
    (cached,) = staging.cached_staging.values()
    assert not cached.nbytes
    transfer(tokens=8)
    transfer()


@pytest.mark.simdev
def test_of_too_many_streams_the_one_used_longest_ago_gives_its_staging_back() -> None:
    streams = [torch.Stream(DEVICE) for _ in range(staging.STREAMS + 1)]
    assert len({stream.stream_id for stream in streams}) == len(streams)
    first, second, *_ = buffers = [staging.staging(DEVICE, stream) for stream in streams[:-1]]
    second.reserve(1 << 12)
    gone = weakref.ref(second)
    assert staging.staging(DEVICE, streams[0]) is first  # used again, so not the next to go
    staging.staging(DEVICE, streams[-1])
    assert list(staging.cached_staging.values())[:-2] == buffers[2:]
    del second, buffers, _
    gc.collect()
    assert gone() is None
    assert staging.staging(DEVICE, streams[0]) is first
    # Current streams of two devices may have one number.
    assert staging.staging(OTHER, current(OTHER)) is not staging.staging(DEVICE, current(DEVICE))


@pytest.mark.simdev
@pytest.mark.parametrize("pinned", [False, True])
def test_buffers_that_grow_leave_nothing_of_the_smaller_ones(pinned: bool) -> None:
    buffers = staging.BounceBuffers() if pinned else staging.Staging(DEVICE, detached=True)
    dense = DenseRows(Transfers(Staged(DEVICE), True).host.form)
    buffers.reserve(1 << 12)
    gone = weakref.ref(buffers.view(0, dense, 4).tensors)
    buffers.reserve(1 << 13)
    assert gone() is None
    if isinstance(buffers, staging.Staging):  # each transfer goes on after the last one's buffer
        orders = [buffers.order(count, True) for count in (3, 2, 1)]
        assert [(order.first, order.used) for order in orders] == [(0, 0), (3, 7), (1, 15)]
        buffers.reserve(1 << 14)
        assert buffers.order(1, True).used == 0


@pytest.mark.simdev
@pytest.mark.parametrize("strategy", [Staged, Pageable])
def test_buffers_are_made_on_the_given_stream(
    strategy: type[Strategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.Staging.reserve
    used = list[int]()

    def reserve(self: staging.Staging, nbytes: int) -> None:
        used.append(current(DEVICE).stream_id)
        real(self, nbytes)

    monkeypatch.setattr(staging.Staging, "reserve", reserve)
    streams = [torch.Stream(DEVICE), torch.Stream(DEVICE)]
    transfer = Transfers(strategy(DEVICE), True)
    for stream in streams:
        transfer.go(stream=stream)
    transfer.go()
    torch.accelerator.synchronize(DEVICE)
    assert used == [each.stream_id for each in (*streams, current(DEVICE))]


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.parametrize("host", [CHUNKS[0], PAGED[0]], ids=["one allocation", "several"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("strategy", [Staged, Pageable, BatchedMemcpy])
@pytest.mark.usefixtures("slices")
def test_other_transfers_of_one_launch(
    strategy: type[Strategy], listed: bool, host: str, downward: bool
) -> None:
    """Other ids of the host, another offset, count or memory, by one launch of the same rows."""
    orders = [np.random.default_rng(seed).permutation(TOKENS).tolist() for seed in (1, 2)]
    case = replace(USUAL, host=host, host_ids=(orders[0], 1) if listed else None)
    transfer = Transfers(strategy(DEVICE), downward, case)
    indices = [Index(order) for order in orders] if listed else [Index()]
    indices.append(indices[0].shifted(3))
    memories = [transfer.host, transfer.chunk(5), transfer.chunk(6)]
    for transfer.host_index, memory, tokens in product(indices, memories, (16, TOKENS - 3)):
        transfer(memory, tokens)


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_transfer_that_ends_early_holds_nothing_and_leaves_streams_in_order(
    error: type[BaseException], downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was enqueued is waited for, and the next transfer is right."""
    small_slices(monkeypatch)
    transfer = Transfers(Staged(DEVICE), downward)
    host = transfer.chunk(3)
    (chunk,) = tensors_in(host.tensors)
    gone = weakref.ref(chunk)
    with monkeypatch.context() as patch:
        patch.setattr(TorchLink, "copy", broken_at(3, TorchLink.copy, error))
        with pytest.raises(error, match="the link is down") as caught:
            transfer(host)
    transfer()
    del chunk, host, caught
    gc.collect()
    assert gone() is None


@DOWNWARD
@pytest.mark.simdev
def test_the_next_detached_transfer_waits_for_the_slice_that_failed(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed slice has no event yet, and may still use its buffer."""
    small_slices(monkeypatch)
    transfer = Transfers(Staged(DEVICE, terms=Terms(detached=True)), downward)
    monkeypatch.setattr(TorchLink, "copy", broken_at(1, TorchLink.copy, RuntimeError))
    with pytest.raises(RuntimeError, match="the link is down"):
        transfer()
    (buffers,) = staging.cached_staging.values()
    assert buffers.events[0] is not None
    assert buffers.order(1, downward).used & 1


@DOWNWARD
@pytest.mark.simdev
def test_tables_of_addresses_are_held_until_the_callers_stream_is_past(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch reads them on a separate stream, and they may go with their view at any time."""
    small_slices(monkeypatch)
    transfer = Transfers(Staged(DEVICE), downward)
    recorded = list[tuple[KVView, int]]()
    monkeypatch.setattr(
        KVView, "record_table", lambda view, stream: recorded.append((view, stream.stream_id))
    )
    transfer.go()
    assert recorded == [(transfer.rows, current(DEVICE).stream_id)]


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.parametrize("host_ids", [False, True], ids=["dense", "host ids"])
@pytest.mark.parametrize("strategy", [Staged, BatchedMemcpy])
def test_memory_that_is_pinned_in_other_parts_is_cut_there(
    strategy: type[Backend], host_ids: bool, downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(USUAL, host_ids=(range(TOKENS), 1) if host_ids else None)
    transfer = Transfers(strategy(DEVICE), downward, case)
    crossed = list[tuple[int, int]]()
    copy = TorchLink.copy

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
        boundary = (start + past) // 2
        assert start < boundary < past  # it is one that matters
        monkeypatch.setattr(pinned, "boundaries", lambda boundary=boundary: (boundary,))
        crossed.clear()
        transfer()
        assert crossed
        assert not [ends for ends in crossed if ends[0] < boundary < ends[1]]


# Ids wherever they are, lists that are remembered, memory that is held


@pytest.mark.parametrize("strategy", [BatchedMemcpy, Staged, Pageable])
def test_ids_may_lie_anywhere(accelerator: torch.device, strategy: type[Strategy]) -> None:
    transfer = Transfers(strategy(accelerator), True)
    for where in (torch.device("cpu"), accelerator):
        for dtype in (torch.int32, torch.int64):
            transfer.device_index = Index(torch.randperm(190)[:TOKENS].to(where, dtype))
            transfer()


@pytest.mark.parametrize("on_host", [True, False])
def test_an_id_past_the_end_moves_nothing(accelerator: torch.device, on_host: bool) -> None:
    transfer = Transfers(BatchedMemcpy(accelerator), True)
    ids = torch.arange(TOKENS)
    ids[7] = 24 * 8
    transfer.device_index = Index(ids if on_host else ids.to(accelerator))
    before = transfer.expected(tokens=0)
    with pytest.raises(SlotError) as caught:
        transfer.go()
    check_sentence(str(caught.value), "192")
    transfer.check(before)


@pytest.mark.simdev
def test_ids_that_changed_are_read_again() -> None:
    """Another index of the same tensor may be made after its ids have changed."""
    transfer = Transfers(BatchedMemcpy(DEVICE), True)
    ids = torch.randperm(150)[:TOKENS]
    for _ in range(2):
        transfer.device_index = Index(ids)
        transfer(tokens=32)
        ids.copy_(ids.flip(0))


@pytest.mark.parametrize("strategy", [BatchedMemcpy, Staged])
def test_host_memory_outlives_the_copy(accelerator: torch.device, strategy: type[Strategy]) -> None:
    torch.accelerator.synchronize(accelerator)
    assert copies_holding_memory() == 0
    transfer = Transfers(strategy(accelerator), False)
    transfer()  # what is made once is there
    cache = tensors_in(transfer.rows.tensors)
    shape = tensors_in(transfer.host.tensors)[0].shape
    for layer in cache:
        layer.zero_()
    wanted = tensors_in(transfer.expected().tensors)
    delay(current(accelerator))
    transfer.go()
    assert copies_holding_memory() == 1
    del transfer
    gc.collect()
    rubbish = [torch.full(shape, 7, dtype=torch.int16).pin_memory() for _ in range(4)]
    torch.accelerator.synchronize(accelerator)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(cache, wanted, strict=True))
    assert copies_holding_memory() == 0
    del rubbish


def test_from_several_threads(accelerator: torch.device) -> None:
    transfers = [Transfers(BatchedMemcpy(accelerator), True) for _ in range(3)]
    for each in transfers:
        each.device_index = Index(torch.randperm(190)[:TOKENS].tolist())
        each._prepared = transfers[0]._prepared
    wanted = [each.expected() for each in transfers]
    run_threads(lambda each: [each.go(), each.go()], transfers)
    for each, expected in zip(transfers, wanted, strict=True):
        each.check(expected)


@pytest.mark.simdev
def test_runs_that_are_too_short_for_a_copy_strategy_are_refused() -> None:
    noise = torch.arange(4096).to(torch.uint8)
    src = KVView(noise.to(DEVICE).view(-1, 4, LEAST_RUN // 2), "token head dim")
    dst = KVView(noise.pin_memory().view(4, -1, LEAST_RUN // 2), "head token dim")
    decision = BatchedMemcpy(DEVICE).check(CopyPlan(src.form, dst.form))
    assert not decision.accepted
    assert f"runs of {LEAST_RUN} B" in decision.reason
    assert f"{LEAST_RUN // 2} B" in decision.reason
