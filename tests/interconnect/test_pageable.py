# SPDX-License-Identifier: Apache-2.0
"""`pageable`: bounce buffers used again and again, what may be touched when, interrupts, threads,
devices; and how its slices are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.device_cases import current, delay, on
from support.engine_cases import CHUNKS, DOWNWARD, Case, Transfers, broken_at, small_slices
from support.guarded_memory import tensors_in
from support.simdev_cases import DEVICE
from support.threads import run_threads

from portakv import Index, KVView
from portakv.backends import strided
from portakv.interconnect import pageable, staged, staging
from portakv.interconnect.link import link_of
from portakv.interconnect.pageable import Pageable
from portakv.interconnect.slices import BothStages, Sizes, SlicedRows
from portakv.interconnect.staging import BUFFERS, BounceBuffers, bounce_buffers
from portakv.plan.plan import CopyPlan

# bytes, of a token; tokens of a copy
SLICE = 2048
TOKEN = 3 * 2 * 2 * 16 * 2
TOKENS = 96
REPEATS = 8
#: Bytes of the largest slice, of whole tokens.
LARGEST = SLICE // TOKEN * TOKEN


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch, SLICE)


def between_chunks(
    device: torch.device, downward: bool, tokens: int = TOKENS, seed: int = 1
) -> Transfers:
    """One chunk on each side; backwards, so that the device's half is no plain copy."""
    case = Case(CHUNKS[0], CHUNKS[0], (range(tokens - 1, -1, -1), 1), None, tokens)
    return Transfers(Pageable(device), downward, case, seed)


def slices_of(transfer: Transfers) -> SlicedRows:
    stages: BothStages = transfer.prepared().stages
    ends = transfer.rows, transfer.host, transfer.host_index
    return SlicedRows(stages, *ends, transfer.case.count, pageable.SIZES)


@DOWNWARD
@pytest.mark.usefixtures("small")
def test_slices_go_round_buffers(accelerator: torch.device, downward: bool) -> None:
    transfer = between_chunks(accelerator, downward)
    assert len(slices_of(transfer).cuts) > 2 * BUFFERS
    for seed in range(REPEATS):
        chunk = transfer.chunk(seed)
        expected = transfer.expected(chunk)
        (tensor,) = tensors_in(chunk.tensors)
        transfer.go(chunk)
        if downward:
            assert torch.equal(tensor, expected.tensors)  # it has landed when the call returns
        else:
            tensor.fill_(0xEE)  # all of it has been read
            transfer.check(expected)


@DOWNWARD
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1040, 64_000])
def test_slices_of_the_default_size(tokens: int, downward: bool) -> None:
    transfer = between_chunks(torch.device("cuda", 0), downward, tokens)
    for seed in range(3):
        transfer(transfer.chunk(seed))


@DOWNWARD
@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("nth", [1, 2, BUFFERS + 1, BUFFERS + 2])
@pytest.mark.parametrize("where", ["rows", "link"])
@pytest.mark.usefixtures("small")
def test_an_interrupt_leaves_the_ring_usable(
    accelerator: torch.device,
    downward: bool,
    late: bool,
    nth: int,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner: Any = {"rows": pageable, "link": link_of(accelerator)}[where]
    name = {"rows": "copy_on_host", "link": "copy"}[where]
    transfer = between_chunks(accelerator, downward)
    assert len(slices_of(transfer).cuts) > BUFFERS + 2
    after = between_chunks(accelerator, not downward, seed=9)
    after()  # so that nothing is made for it later, which would wait for the device
    expected = after.expected()
    with monkeypatch.context() as patch:
        broken = broken_at(nth, getattr(owner, name), KeyboardInterrupt, late)
        patch.setattr(owner, name, broken)
        with pytest.raises(KeyboardInterrupt):
            transfer.go()
    (chunk,) = tensors_in(transfer.host.tensors)
    chunk.fill_(0x11)
    del transfer
    after.go()  # through the same buffers, while the interrupted slices cross
    after.check(expected)
    assert (chunk == 0x11).all()  # the interrupted slices are not written later


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.usefixtures("small")
def test_threads_on_streams_of_their_own(accelerator: torch.device, devices: int) -> None:
    if torch.get_device_module(accelerator).device_count() < devices:
        pytest.skip("there is one device of this kind")

    def work(number: int) -> None:
        device = torch.device(accelerator.type, number % devices)
        transfer = between_chunks(device, number < 2, seed=10 * number)
        expected = transfer.expected()
        stream = torch.Stream(device)
        target = transfer.host if number < 2 else transfer.rows
        for _ in range(REPEATS):
            with on(stream):
                tensors_in(target.tensors)[0].zero_()
                transfer.go(stream=stream)
                actual = tensors_in(target.tensors)[0].cpu().clone()
            stream.synchronize()
            assert torch.equal(actual, expected.tensors)

    run_threads(work, range(4))


@DOWNWARD
@pytest.mark.usefixtures("small")
def test_ids_that_are_brought_for_the_copy_are_there_before_they_are_read(
    accelerator: torch.device, downward: bool
) -> None:
    """A column of a block table: it is made contiguous on the caller's stream, which is late."""
    transfer = between_chunks(accelerator, downward)
    stream = torch.Stream(accelerator)
    for seed in range(4):
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
        table = torch.stack([order, torch.full_like(order, 1 << 40)], 1).to(accelerator)
        transfer.device_index = Index(table[:, 0])
        expected = transfer.expected()
        transfer.device_index = Index(table[:, 0])  # of which the host knows nothing
        torch.accelerator.synchronize(accelerator)
        with on(stream):
            delay(stream)
            transfer.go(stream=stream)
            stream.synchronize()
        transfer.check(expected)


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_pinned_memory_is_bounded_and_no_more_than_a_payload_needs() -> None:
    bounce_buffers.cache_clear()
    between_chunks(DEVICE, True).go(tokens=0)
    assert bounce_buffers(DEVICE).nbytes == 0
    for tokens, nbytes in ((1, TOKEN), (1000, LARGEST)):
        between_chunks(DEVICE, True, tokens).go()
        assert bounce_buffers(DEVICE).nbytes == BUFFERS * nbytes


@pytest.mark.parametrize("ended", [False, True])
def test_buffers_are_replaced_once_nothing_crosses(accelerator: torch.device, ended: bool) -> None:
    """Each of them is read or written until then, as after a transfer that was interrupted."""
    buffers = BounceBuffers()
    link = torch.Stream(accelerator)
    buffers.reserve(64)
    for at in range(BUFFERS):
        delay(link)
        buffers.begin(at, link)
        if ended:
            buffers.end(at, link)
        buffers.reserve(128 << at)
        assert link.query()


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_the_host_copies_a_slice_while_others_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = between_chunks(DEVICE, True)
    busy = list[bool]()
    copy = strided.copy_on_host
    transfer()
    link = staging.staging(DEVICE, current(DEVICE)).link

    def noted(*arguments: Any) -> None:
        busy.append(not link.query())
        copy(*arguments)

    monkeypatch.setattr(pageable, "copy_on_host", noted)
    transfer()
    assert all(busy[:-1])


# Slices


@pytest.mark.simdev
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("layout", ["block layer kv token dim", "layer | kv block token dim"])
def test_a_slice_is_no_larger_than_asked_or_by_one_block(
    layout: str, block: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 512 B, 2 KiB and 8 KiB in slices of 3 KiB, where `staged` may have far more."""
    monkeypatch.setattr(pageable, "SIZES", Sizes(1024, 1024, 3072))
    monkeypatch.setattr(staged, "LARGEST", 1 << 20)
    layers = 2
    blocks = 640 // block
    shape = (blocks, layers, 2) if layout.startswith("block") else (layers, 2, blocks)
    made = torch.zeros((*shape, block, 32), dtype=torch.uint8)
    sides = [made.to(DEVICE), made] if "|" not in layout else [list(made.to(DEVICE)), list(made)]
    device, host = (KVView(x, layout) for x in sides)
    host_index = Index(list(range(blocks))[::-1], block, offset)
    launch: Any = Pageable(DEVICE).prepare(CopyPlan(device.form, host.form, 0, block))
    stages: BothStages = launch.stages
    slices = SlicedRows(stages, device, host, host_index, 640 - offset, pageable.SIZES)
    once = stages.dense.nbytes(stages.dense.block_size)
    assert slices.nbytes <= max(3072, once) + (once if offset else 0)
    assert all(cut.count + slices.inside.offset <= slices.slots for cut in slices.cuts)


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 63, 64, 65, 1000])
@pytest.mark.usefixtures("small")
def test_slices_cover_every_position_once(tokens: int, downward: bool) -> None:
    transfer = between_chunks(DEVICE, downward, tokens)
    slices = slices_of(transfer)
    covered = [at for cut in slices.cuts for at in range(cut.start, cut.start + cut.count)]
    assert sorted(covered) == [*range(tokens)]
    assert all(cut.count <= slices.slots for cut in slices.cuts)
    assert slices.nbytes <= SLICE
    transfer()


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_a_backend_without_kernels_makes_dense_what_crosses_in_parts(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part is larger than a slice may be."""
    transfer = between_chunks(DEVICE, downward)
    transfer()
    made = list[int]()
    crossed = list[int]()
    link: Any = link_of(DEVICE)
    copy = link.copy
    owner: Any = pageable
    dense = owner.by_backend

    def noted(pieces: Any, *rest: Any) -> None:
        crossed.append(int((pieces.width * pieces.height).sum()))
        copy(pieces, *rest)

    def noted_stage(number: int, *rest: Any) -> None:
        made.append(number)
        dense(number, *rest)

    monkeypatch.setattr(link, "copy", noted)
    monkeypatch.setattr(pageable, "by_backend", noted_stage)
    transfer()
    assert max(crossed) <= SLICE
    assert sum(crossed) == TOKENS * TOKEN
    assert len(made) == -(-TOKENS // (2 * SLICE // TOKEN))
    assert len(crossed) > 2 * len(made)


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_small_slices_stand_where_only_one_side_is_busy(downward: bool) -> None:
    cuts = slices_of(between_chunks(DEVICE, downward, 1000)).cuts
    sizes = [cut.count * TOKEN for cut in cuts[:: 1 if downward else -1]]
    assert sizes[0] == SLICE // 4 // TOKEN * TOKEN
    assert max(sizes) == sizes[1] == LARGEST
