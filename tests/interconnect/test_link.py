# SPDX-License-Identifier: Apache-2.0
"""The link of a device: the bytes of any pieces, in order, and copies of others in between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.block_cases import holds, large, numbered
from support.crossing_cases import Ends, drawn_runs, pieces_of_runs, runs_of
from support.device_cases import current, delay, on
from support.guarded_memory import refused
from support.simdev_cases import DEVICE

from portakv import KVView, TransferError, copy_blocks
from portakv.interconnect import link
from portakv.interconnect.link import (
    ALL,
    LEAST_BATCH,
    MOST_DESCRIPTORS,
    CudaLink,
    Pieces,
    TorchLink,
    link_of,
)
from portakv.plan.plan import Runs
from portakv.runtime import cuda
from portakv_conformance import simdev

CUDA = torch.device("cuda", 0)
TO_DEVICE = pytest.mark.parametrize("to_device", [True, False], ids=["h2d", "d2h"])
ROOM = 1 << 18
OnHost = Callable[[torch.Tensor], torch.Tensor]


def noise(nbytes: int, seed: int = 1) -> torch.Tensor:
    random = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return torch.from_numpy(random)


def bytes_view(memory: torch.Tensor) -> KVView:
    return KVView(memory.view(-1, 1), "token dim")


def foreign(memory: torch.Tensor) -> torch.Tensor:
    """Return pageable memory at an odd address inside of memory that torch did not allocate."""
    buffer = (ctypes.c_ubyte * (memory.numel() + 4))()
    return torch.frombuffer(buffer, dtype=torch.uint8)[3:-1].copy_(memory)


class Link(Ends):
    def __init__(
        self,
        device: torch.device,
        to_device: bool,
        nbytes: int = ROOM,
        on_host: OnHost = torch.Tensor.pin_memory,
    ) -> None:
        src = noise(nbytes)
        dst = noise(nbytes, seed=2)
        self.device = device
        super().__init__(
            *((on_host(src), dst.to(device)) if to_device else (src.to(device), on_host(dst)))
        )
        torch.accelerator.synchronize(device)

    def copy(self, pieces: Pieces, stream: torch.Stream | None = None) -> None:
        views = bytes_view(self.src), bytes_view(self.dst)
        link_of(self.device).copy(self.at(pieces), *views, stream)

    def judge(self, pieces: Pieces) -> None:
        torch.accelerator.synchronize(self.device)
        super().judge(pieces)


def streams_of(device: torch.device) -> list[torch.Stream | None]:
    """Return no stream, the legacy default stream if the device has one, and a new stream."""
    default = torch.cuda.default_stream(device) if device.type == "cuda" else current(device)
    return [None, default, torch.Stream(device)]


def scattered(count: int, width: int = 5) -> Pieces:
    """So many plain copies at odd addresses, in no order."""
    order = np.random.default_rng(count).permutation(count)
    pieces = pieces_of_runs(
        runs_of((np.arange(count) * 16 + 3).tolist(), (order * 7 + 1).tolist(), width)
    )
    assert pieces.number >= count // 2
    return pieces


def test_the_driver_copies_if_it_serves_the_device(accelerator: torch.device) -> None:
    made = link_of(accelerator)
    assert link_of(accelerator) is made
    assert isinstance(made, CudaLink if accelerator.type == "cuda" else TorchLink)
    if isinstance(made, CudaLink):
        assert link.why_not(accelerator) is None
        assert made.core.batches == (cuda.driver_version() >= 12080)


@TO_DEVICE
@pytest.mark.parametrize("on_host", [torch.Tensor.pin_memory, foreign])
def test_every_byte_of_any_pieces(
    accelerator: torch.device, on_host: OnHost, to_device: bool
) -> None:
    if accelerator.type == "cuda" and on_host is foreign:
        pytest.skip("the driver's copies are given pinned memory")

    @settings(max_examples=40, deadline=None)
    @given(drawn_runs())
    def check(runs: Runs) -> None:
        pieces = pieces_of_runs(runs)
        size = int(max((at + runs.nbytes).max(initial=0) for at in runs[:2])) + 16
        ends = Link(accelerator, to_device, size, on_host)
        ends.copy(pieces)
        ends.judge(pieces)

    check()
    if accelerator.type != "cuda":
        with simdev.early():  # each copy ends as soon as it may
            check()


@TO_DEVICE
@pytest.mark.parametrize("which", range(3), ids=["current", "default", "own"])
@pytest.mark.parametrize("count", [0, 1, LEAST_BATCH, 100, 3 * MOST_DESCRIPTORS + 7])
def test_plain_copies_one_by_one_and_in_batches_are_ordered_on_their_stream(
    accelerator: torch.device, count: int, to_device: bool, which: int
) -> None:
    """The copy runs after a late producer and before a consumer; the host goes on immediately."""
    if accelerator.type != "cuda" and count > 100:
        pytest.skip("each copy is a call of torch")
    ends = Link(accelerator, to_device)
    pieces = scattered(count)
    passed = streams_of(accelerator)[which]
    stream = passed or current(accelerator)
    fresh = ends.src.clone()
    rubbish = torch.zeros_like(ends.src)
    if not to_device:
        ends.src.zero_()
    torch.accelerator.synchronize(accelerator)
    with on(stream):
        delay(stream)
        if not to_device:
            ends.src.copy_(fresh)
        ends.copy(pieces, passed)
        assert count > 100 or not stream.query()  # to enqueue many may take as long as the delay
        if not to_device:
            ends.src.copy_(rubbish)
    ends.judge(pieces)


@TO_DEVICE
@pytest.mark.simdev
@pytest.mark.parametrize("on_host", [torch.Tensor.pin_memory, foreign])
def test_torch_is_never_given_strided_host_memory(
    on_host: OnHost, to_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vendors' torch packs it on the host, immediately, whatever the stream still holds, or late.
    And pageable memory must have been read when the call returns."""
    ends = Link(DEVICE, to_device, 6400, on_host)
    pieces = pieces_of_runs(runs_of(range(0, 6400, 64), range(16, 6400, 64), 32))
    assert pieces.number == 1
    real = torch.Tensor.copy_
    seen = []

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        on_the_host = source if to_device else target
        assert on_the_host.device.type == "cpu"
        seen.append((on_the_host.is_contiguous(), non_blocking))
        return real(target, source, non_blocking)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        ends.copy(pieces)
    ends.judge(pieces)
    assert set(seen) == {(True, on_host is not foreign)}


@pytest.mark.simdev
def test_memory_that_is_in_no_view() -> None:
    ends = Link(DEVICE, False, 64)
    with refused(TransferError, "65 bytes", "one allocation", watch=ends.dst):
        ends.copy(pieces_of_runs(runs_of([0], [0], 65)))


@pytest.mark.gpu
def test_what_the_driver_refuses_leaves_it_usable() -> None:
    ends = Link(CUDA, True)
    pieces = scattered(3)
    numbers = (0, 0, 64, 2, 32, 32)  # rows over each other
    wrong = Pieces(*(np.array([number], dtype=np.int64) for number in numbers))
    with refused(TransferError, "2 x 64 bytes", "CUDA_ERROR_INVALID_VALUE"):
        ends.copy(wrong)
    ends.copy(pieces)
    ends.judge(pieces)


# MiB of a transfer; transfers: 17 ms of a link of PCIe 5 in all
BLOCKS = 80
MANY = 12
TRIES = 5


@pytest.mark.gpu
@TO_DEVICE
@pytest.mark.parametrize("detached", [True, False], ids=["detached", "ordered"])
@pytest.mark.parametrize("backwards", [False, True], ids=["a run", "many runs"])
@pytest.mark.parametrize("strategy", ["staged", "batched_memcpy"])
def test_a_small_copy_need_not_wait_for_the_last_transfer(
    strategy: str, backwards: bool, detached: bool, to_device: bool
) -> None:
    places = ("cpu", CUDA) if to_device else (CUDA, "cpu")
    (full, src), (empty, dst) = (large(BLOCKS * MANY, 1, place) for place in places)
    numbers = numbered(full)[:, :, 0, 0].cpu()
    # what is less may travel by no copy engine
    other = torch.cuda.Stream(CUDA)
    small = 1 << 20
    ends = [
        torch.zeros(small, dtype=torch.uint8, device=CUDA),
        torch.zeros(small, dtype=torch.uint8).pin_memory(),
    ]
    torch.cuda.synchronize()
    terms: dict[str, Any] = {"backend": strategy, "detached": detached}
    for _ in range(TRIES):  # a host that is held up looks when all is over
        delay(current(CUDA))  # all are requested before the first begins, on a slow host too
        other.wait_stream(current(CUDA))
        ids = torch.arange(BLOCKS * MANY).split(BLOCKS)
        ids = [part.flip(0) if backwards else part for part in ids]
        moves = [copy_blocks(src, dst, part, part, **terms) for part in ids]
        with torch.cuda.stream(other):
            ends[not to_device].copy_(ends[to_device], non_blocking=True)
        other.synchronize()
        before_the_last = not moves[-1].done()
        for moved in moves:
            moved.synchronize()
        assert holds(empty, numbers)
        if before_the_last:
            return
        empty.zero_()
        torch.cuda.synchronize()
    pytest.fail("the small copy ended after every transfer")


@pytest.mark.gpu
def test_a_stream_of_torchs_general_kind_rests_too() -> None:
    (full, src), (empty, dst) = (large(BLOCKS * 4, 1, place) for place in (CUDA, "cpu"))
    numbers = numbered(full)[:, :, 0, 0].cpu()
    stream = torch.Stream(CUDA)
    for part in torch.arange(BLOCKS * 4).split(BLOCKS):
        copy_blocks(src, dst, part, part, backend="batched_memcpy", stream=stream)
    stream.synchronize()
    assert holds(empty, numbers)


@pytest.mark.gpu
@TO_DEVICE
@pytest.mark.parametrize("which", range(3), ids=["current", "default", "own"])
def test_any_stream_rests(which: int, to_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the legacy default stream. A copy raises if the driver rejects the wait."""
    monkeypatch.setattr(link, "IN_A_ROW", ROOM)
    ends = Link(CUDA, to_device)
    pieces = pieces_of_runs(runs_of([0], [0], ROOM))
    stream = streams_of(CUDA)[which]
    for _ in range(4):  # with a rest before each but the first
        delay(stream or current(CUDA))
        ends.copy(pieces, stream)
        ends.judge(pieces)
        ends.dst.zero_()
        torch.cuda.synchronize()


#: Clock cycles of a model's step: 3 ms, of the 17 ms that a transfer takes.
STEP = 6_000_000


def token_ends_first(strategy: str, backwards: bool) -> bool:
    """Return whether a token's copy to the host was seen to end before a transfer did.

    The copy waits for a model's step, which begins together with the transfer.
    """
    count = BLOCKS * MANY
    (full, src), (empty, dst) = (large(count, 1, place) for place in (CUDA, "cpu"))
    numbers = numbered(full)[:, :, 0, 0].cpu()
    token = torch.ones(1, dtype=torch.int64, device=CUDA)
    arrived = torch.zeros(1, dtype=torch.int64, device="cpu").pin_memory()
    model = current(CUDA)
    of_transfer = torch.cuda.Stream(CUDA)
    of_token = torch.cuda.Stream(CUDA)
    ids = torch.arange(count).flip(0) if backwards else torch.arange(count)
    valid = 0
    for nth in range(TRIES + 1):
        torch.cuda.synchronize()
        delay(model)
        started = model.record_event()
        moved = copy_blocks(src, dst, ids, ids, backend=strategy, stream=of_transfer)
        delay(model, STEP)
        of_token.wait_stream(model)
        with torch.cuda.stream(of_token):
            arrived.copy_(token, non_blocking=True)
        token_ended = of_token.record_event()
        all_requested_in_time = not started.query()

        first = False
        while not moved.done():
            first = first or (token_ended.query() and not moved.done())
        assert holds(empty, numbers)
        empty.zero_()
        if nth > 0 and all_requested_in_time:  # the first call prepares kernels
            valid += 1
            if first:
                return True
    assert valid, "the host was held up in every try"
    return False


@pytest.mark.gpu
@pytest.mark.parametrize("backwards", [False, True], ids=["a run", "many runs"])
@pytest.mark.parametrize("strategy", ["staged", "batched_memcpy"])
def test_a_token_that_waits_for_a_model_passes_a_transfer(strategy: str, backwards: bool) -> None:
    assert token_ends_first(strategy, backwards)


@pytest.mark.gpu
@pytest.mark.parametrize("backwards", [False, True], ids=["a run", "many runs"])
def test_without_rests_a_token_waits_for_the_end_of_a_transfer(
    backwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "IN_A_ROW", ALL)
    assert not token_ends_first("batched_memcpy", backwards)
