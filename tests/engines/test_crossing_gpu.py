# SPDX-License-Identifier: Apache-2.0
"""Crossings and `descriptors` on a CUDA device: every byte, by each of the driver's copies."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.crossing_cases import bytes_of_pieces, drawn_runs, runs_of
from support.device_cases import DEVICE, LONG
from support.engine_cases import Case, cases, judge
from support.guarded_memory import refused

from portakv import CopyPlan, Index, KVView, TransferError
from portakv.engines import link as _crossing_cuda
from portakv.engines.descriptors import Descriptors
from portakv.engines.link import LEAST_BATCH, MOST_DESCRIPTORS, CudaLink, link_of
from portakv.engines.pieces import Pieces, to_2d_copies
from portakv.host import pinned
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime.transfer import copies_holding_memory

pytestmark = pytest.mark.gpu
CASES = cases()
ROOM = 1 << 20


def noise(nbytes: int, seed: int = 1) -> torch.Tensor:
    random = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return torch.from_numpy(random)


def bytes_view(memory: torch.Tensor) -> KVView:
    return KVView(memory.view(-1, 1), "token dim")


class Link:
    """A buffer on the device and one in pinned memory, and what a copy must make of them."""

    def __init__(self, to_device: bool, nbytes: int = ROOM) -> None:
        self._source, self._target = noise(nbytes), noise(nbytes, seed=2)
        device, host = (self._target, self._source) if to_device else (self._source, self._target)
        places = device.to(DEVICE), host.pin_memory()
        self.dst, self.src = places if to_device else places[::-1]
        torch.cuda.synchronize()

    def copy(self, pieces: Pieces, stream: torch.Stream | None = None) -> None:
        """Copy pieces whose addresses count from 0."""
        placed = pieces._replace(
            dst=pieces.dst + self.dst.data_ptr(), src=pieces.src + self.src.data_ptr()
        )
        link_of(DEVICE).copy(placed, bytes_view(self.src), bytes_view(self.dst), stream)

    def judge(self, pieces: Pieces) -> None:
        torch.cuda.synchronize()
        expected = self._target.numpy().copy()
        moved = bytes_of_pieces(pieces)
        if moved:
            targets, sources = np.array(moved).T
            expected[targets] = self._source.numpy()[sources]
        assert (self.dst.cpu().numpy() == expected).all()


def streams() -> list[torch.Stream | None]:
    """The current one, the legacy default stream as such, and one of our own."""
    return [None, torch.cuda.default_stream(DEVICE), torch.cuda.Stream(DEVICE)]


def scattered(count: int, width: int = 5) -> Pieces:
    """So many plain copies at odd addresses, in no order."""
    order = np.random.default_rng(count).permutation(count)
    pieces = to_2d_copies(
        runs_of((np.arange(count) * 16 + 3).tolist(), (order * 7 + 1).tolist(), width)
    )
    assert pieces.number >= count // 2
    return pieces


def test_the_driver_copies_for_this_device() -> None:
    assert _crossing_cuda.why_not(DEVICE) is None
    link = link_of(DEVICE)
    assert isinstance(link, CudaLink)
    batches = link._copies.batched(scattered(LEAST_BATCH)) is not None
    assert batches == (_cuda_driver.driver_version() >= 12080)


@pytest.mark.parametrize("to_device", [True, False], ids=["h2d", "d2h"])
def test_every_byte_of_any_pieces(to_device: bool) -> None:
    @settings(max_examples=60, deadline=None)
    @given(drawn_runs())
    def check(runs: object) -> None:
        pieces = to_2d_copies(runs)  # type: ignore[arg-type]
        link = Link(to_device)
        link.copy(pieces)
        link.judge(pieces)

    check()


@pytest.mark.parametrize("which", range(3), ids=["current", "default", "own"])
@pytest.mark.parametrize("to_device", [True, False], ids=["h2d", "d2h"])
@pytest.mark.parametrize(
    "count", [0, 1, LEAST_BATCH - 1, LEAST_BATCH, 1000, MOST_DESCRIPTORS, 3 * MOST_DESCRIPTORS + 7]
)
def test_plain_copies_one_by_one_and_in_batches(count: int, to_device: bool, which: int) -> None:
    link, pieces = Link(to_device), scattered(count)
    link.copy(pieces, streams()[which])
    link.judge(pieces)


@pytest.mark.parametrize("which", range(3), ids=["current", "default", "own"])
@pytest.mark.parametrize("to_device", [True, False], ids=["h2d", "d2h"])
def test_rows_at_odd_addresses_beside_plain_copies(to_device: bool, which: int) -> None:
    for width in (1, 7, 64, 255, 256, 4096):
        count = min(200, ROOM // 4 // (width + 3))
        src = [at * (width + 3) + 1 for at in range(count)]
        dst = [at * (width + 1) + 5 for at in range(count)]
        rows = to_2d_copies(runs_of(src, dst, width))
        assert rows.height.tolist() == [count]
        plain = scattered(40)
        far = ROOM // 2
        both = Pieces(*(np.concatenate(each) for each in zip(rows, plain, strict=True)))
        both.dst[1:] += far
        link = Link(to_device)
        link.copy(both, streams()[which])
        link.judge(both)


@pytest.mark.parametrize("which", range(3), ids=["current", "default", "own"])
@pytest.mark.parametrize("count", [1, 500])
def test_a_copy_is_ordered_on_its_stream(count: int, which: int) -> None:
    """Behind a producer that is late, and before a consumer; the host goes on at once."""
    link, pieces = Link(False), scattered(count)
    stream: Any = streams()[which] or torch.cuda.current_stream(DEVICE)
    fresh, rubbish = link.src.clone(), torch.zeros_like(link.src)
    link.src.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        link.src.copy_(fresh)
        link.copy(pieces, stream)
        assert not stream.query()
        link.src.copy_(rubbish)
    link.judge(pieces)


def test_from_new_threads() -> None:
    links = [Link(number % 2 == 0) for number in range(4)]
    pieces = scattered(300)
    threads = [threading.Thread(target=link.copy, args=(pieces,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.judge(pieces)


def test_what_the_driver_refuses_leaves_it_usable() -> None:
    link, pieces = Link(True), scattered(3)
    numbers = (0, 0, 64, 2, 32, 32)  # rows over each other
    wrong = Pieces(*(np.array([number], dtype=np.int64) for number in numbers))
    with refused(TransferError, "2 x 64 bytes", "CUDA_ERROR_INVALID_VALUE"):
        link.copy(wrong)
    link.copy(pieces)
    link.judge(pieces)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_on_a_device_that_is_not_current() -> None:
    other = torch.device("cuda", 1)
    for count in (1, 500):
        pieces, host = scattered(count), noise(ROOM).pin_memory()
        device = torch.zeros(ROOM, dtype=torch.uint8, device=other)
        placed = pieces._replace(
            dst=pieces.dst + device.data_ptr(), src=pieces.src + host.data_ptr()
        )
        link_of(other).copy(placed, bytes_view(host), bytes_view(device))
        torch.cuda.synchronize(other)
        targets, sources = np.array(bytes_of_pieces(pieces)).T
        assert (device.cpu().numpy()[targets] == host.numpy()[sources]).all()
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_descriptors_move_every_byte(case: Case, downward: bool, side: bool) -> None:
    stream = torch.cuda.Stream(DEVICE) if side else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        judge(case, Descriptors(DEVICE), downward, torch.Tensor.pin_memory, stream)


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_scattered_blocks_of_separate_layers(downward: bool) -> None:
    """Layers in allocations of their own, registered memory of several registrations."""
    layers, blocks, size = 6, 64, 4096
    cache = [noise(2 * blocks * size, seed=at).to(DEVICE) for at in range(layers)]
    order = torch.randperm(2 * blocks)[:blocks]
    with pinned.allocate(layers * blocks * size, largest=5 * 4096) as memory:
        host = memory.tensor
        host.copy_(noise(host.numel(), seed=40))
        rows = [layer.view(2 * blocks, 1, size) for layer in cache]
        views = (
            KVView(rows, "layer | block token dim"),
            KVView(host.view(layers, blocks, 1, size), "layer block token dim"),
        )
        indices = Index(order), Index(list(range(blocks)))
        if not downward:
            views, indices = views[::-1], indices[::-1]
        plan = CopyPlan(views[0].form, views[1].form, 1, 1)
        Descriptors(DEVICE).prepare(plan)(*views, *indices, blocks, None, None)
        torch.cuda.synchronize()
        for at, layer in enumerate(rows):
            assert torch.equal(layer[order, 0].cpu(), host.view(layers, blocks, size)[at])


def test_foreign_host_memory_is_held_while_a_copy_flies() -> None:
    torch.cuda.synchronize()
    assert copies_holding_memory() == 0
    memory = pinned.allocate(1 << 20)
    host, registration = memory.tensor, memory._registration
    assert registration is not None
    host.copy_(noise(host.numel()))
    wanted = host.clone()
    device = torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICE)
    src, dst = (KVView(each.view(-1, 256), "token dim") for each in (host, device))
    plan = CopyPlan(src.form, dst.form)
    launch = Descriptors(DEVICE).prepare(plan)
    torch.cuda._sleep(LONG)
    launch(src, dst, Index(), Index(), 4096, None, None)
    assert copies_holding_memory() == 1
    memory.close()
    del host, src, dst
    gc.collect()
    assert registration.pinned
    torch.cuda.synchronize()
    assert torch.equal(device.cpu(), wanted)
    assert copies_holding_memory() == 0
    gc.collect()
    assert not registration.pinned
