# SPDX-License-Identifier: Apache-2.0
"""`ring` on the simulated device: bytes, what may be touched when, interrupts, threads, devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engine_cases import Case, cases, judge
from support.simdev_cases import DEVICE, OTHER, on

from portakv import Index, KVView
from portakv.backends.strided import HostRows
from portakv.engines import pageable as ring
from portakv.engines import slices as schedule
from portakv.engines.link import TorchLink
from portakv.engines.pageable import Ring
from portakv.engines.slices import Sizes
from portakv.engines.staging import BUFFERS, bounce_buffers
from portakv.plan.plan import CopyPlan
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

CASES = cases()
LAYERS, TOKENS, WIDTH = 2, 96, 32
SLICE = 2048
REPEATS = 20


@pytest.fixture(autouse=True)
def _no_faults_left() -> Any:
    yield
    torch.accelerator.synchronize(DEVICE)
    torch.accelerator.synchronize(OTHER)
    assert not simdev.take_faults()


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SIZES", Sizes(SLICE // 4, SLICE // 4, SLICE))
    monkeypatch.setattr(schedule, "LARGEST", SLICE)


class Copies:
    """One chunk on each side, with a prepared copy between them."""

    def __init__(self, down: bool, device: torch.device = DEVICE, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        shape = (2, LAYERS, tokens, WIDTH)
        self.host = torch.zeros(shape, dtype=torch.uint8)
        self.rows = torch.zeros(shape, dtype=torch.uint8, device=device)
        views = [KVView(x, "kv layer token (head dim)", heads=1) for x in (self.rows, self.host)]
        self.views = views if down else views[::-1]
        self.down = down
        # Backwards, so that the device's half is no plain copy.
        ids = Index(list(range(tokens))[::-1])
        self.indices = (ids, Index()) if down else (Index(), ids)
        forms, steps = (v.form for v in self.views), (i.plan_step for i in self.indices)
        plan = CopyPlan(*forms, *steps)  # type: ignore[arg-type]
        self.launch: Any = Ring(device).prepare(plan)

    def fill(self, seed: int) -> torch.Tensor:
        """Other bytes in the source; returns what the destination is to hold."""
        generator = torch.Generator().manual_seed(seed)
        made = torch.randint(0, 256, self.host.shape, dtype=torch.uint8, generator=generator)
        if self.down:
            self.rows.copy_(made)
        else:
            self.host.copy_(made)
        return made.flip(2)

    def run(self, stream: torch.Stream | None = None) -> None:
        self.launch(*self.views, *self.indices, self.tokens, stream, None)

    def landed(self) -> torch.Tensor:
        """The destination; of the device, behind everything."""
        if self.down:
            return self.host.clone()
        torch.accelerator.synchronize(self.rows.device)
        return self.rows.cpu()


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("small", [True, False], ids=["small slices", "one slice"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_byte(case: Case, down: bool, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(ring, "SIZES", Sizes(1 << 20, 1 << 20, 1 << 20))
    judge(case, Ring(DEVICE), down, torch.Tensor.clone)


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_slices_go_round_the_slots(down: bool) -> None:
    copies = Copies(down)
    assert len(slices_of(copies)) > 2 * BUFFERS
    for seed in range(REPEATS):
        wanted = copies.fill(seed)
        copies.run()
        if not down:
            copies.host.fill_(0xEE)  # all of it has been read
        assert torch.equal(copies.landed(), wanted)


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_on_another_stream_behind_its_producer(down: bool) -> None:
    copies, stream = Copies(down), torch.Stream(DEVICE)
    for seed in range(REPEATS):
        torch.accelerator.synchronize(DEVICE)
        with on(stream):
            wanted = copies.fill(seed)
            copies.run(stream)
            found = copies.host.clone() if down else copies.rows.clone()
        stream.synchronize()
        assert torch.equal(found.cpu(), wanted)


def interrupted(plain: Callable[..., Any], after: int, late: bool) -> Callable[..., Any]:
    """A stand-in that is interrupted in its n-th call, before or after the work."""
    calls = iter(range(1 << 30))

    def stand_in(*arguments: Any) -> Any:
        number = next(calls)
        if number == after and not late:
            raise KeyboardInterrupt
        found = plain(*arguments)
        if number == after:
            raise KeyboardInterrupt
        return found

    return stand_in


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("after", [0, 1, 3, 4])
@pytest.mark.parametrize("where", ["rows", "link"])
def test_an_interrupt_leaves_the_ring_usable(
    down: bool, late: bool, after: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {"rows": (HostRows, "copy"), "link": (TorchLink, "copy")}[where]
    plain: Callable[..., Any] = getattr(owner, name)
    for seed in range(4):
        copies = Copies(down)
        copies.fill(seed)
        monkeypatch.setattr(owner, name, interrupted(plain, after, late))
        with pytest.raises(KeyboardInterrupt):
            copies.run()
        monkeypatch.setattr(owner, name, plain)
        # The memory goes at once, and the next transfer takes the same slots.
        del copies
        other = Copies(not down)
        wanted = other.fill(seed + 100)
        other.run()
        assert torch.equal(other.landed(), wanted)


def test_memory_that_an_interrupt_leaves_behind_is_not_written_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = Copies(True)
    copies.fill(1)
    monkeypatch.setattr(HostRows, "copy", interrupted(HostRows.copy, 2, False))
    with pytest.raises(KeyboardInterrupt):
        copies.run()
    copies.host.fill_(0x11)
    torch.accelerator.synchronize(DEVICE)
    assert (copies.host == 0x11).all()


@pytest.mark.parametrize("devices", [(DEVICE, DEVICE), (DEVICE, OTHER)], ids=["one", "two"])
def test_threads_on_streams_of_their_own(devices: tuple[torch.device, torch.device]) -> None:
    wrong: list[str] = []

    def work(number: int, device: torch.device, down: bool) -> None:
        copies, stream = Copies(down, device), torch.Stream(device)
        for seed in range(REPEATS):
            with on(stream):
                wanted = copies.fill(100 * number + seed)
                copies.run(stream)
                found = copies.host.clone() if down else copies.rows.clone()
            stream.synchronize()
            if not torch.equal(found.cpu(), wanted):
                wrong.append(f"thread {number}, round {seed}")

    threads = [threading.Thread(target=work, args=(n, devices[n % 2], n < 2)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pinned_memory_is_bounded_and_no_more_than_a_payload_needs() -> None:
    bounce_buffers.cache_clear()
    few = Copies(True, tokens=4)
    few.fill(0)
    few.run()
    assert bounce_buffers(DEVICE).nbytes == BUFFERS * 2 * LAYERS * 4 * WIDTH
    many = Copies(True, tokens=4096)
    many.fill(0)
    many.run()
    assert bounce_buffers(DEVICE).nbytes == BUFFERS * SLICE


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("layout", ["block layer kv token dim", "layer | kv block token dim"])
def test_a_slice_is_no_larger_than_asked_or_by_one_block(
    layout: str, block: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 512 B, 2 KiB and 8 KiB in slices of 3 KiB, where `staged` may have far more."""
    monkeypatch.setattr(ring, "SIZES", Sizes(1024, 1024, 3072))
    monkeypatch.setattr(schedule, "LARGEST", 1 << 20)
    layers, blocks = 2, 640 // block
    if layout.startswith("block"):
        made: Any = torch.zeros((blocks, layers, 2, block, WIDTH), dtype=torch.uint8)
        rows: Any = made.to(DEVICE)
    else:
        shape = (2, blocks, block, WIDTH)
        made = [torch.zeros(shape, dtype=torch.uint8) for _ in range(layers)]
        rows = [each.to(DEVICE) for each in made]
    device, host = KVView(rows, layout), KVView(made, layout)
    theirs = Index(list(range(blocks))[::-1], block, offset)
    launch: Any = Ring(DEVICE).prepare(CopyPlan(device.form, host.form, 0, block))
    for piece in launch.slices(device, host, theirs, 640 - offset):
        once = piece.dense.nbytes(piece.dense.block_size)
        assert piece.dense.nbytes(piece.held) <= max(3072, once) + (once if offset else 0)


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_ids_that_are_brought_for_the_copy_are_there_before_they_are_read(down: bool) -> None:
    """A column of a block table: it is made contiguous on the caller's stream, which is late."""
    copies, stream = Copies(down), torch.Stream(DEVICE)
    for seed in range(4):
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
        table = torch.stack([order, torch.zeros_like(order)], 1).to(DEVICE)
        made = copies.fill(seed).flip(2)
        wanted = made[:, :, order] if down else torch.empty_like(made)
        if not down:
            wanted[:, :, order] = made
        torch.accelerator.synchronize(DEVICE)
        ids = Index(table[:, 0])
        indices = (ids, Index()) if down else (Index(), ids)
        with on(stream):
            simdev.delay(stream, 20)
            copies.launch(*copies.views, *indices, TOKENS, stream, None)
            stream.synchronize()
        assert torch.equal(copies.landed(), wanted)


@pytest.mark.parametrize("page", [96, 100])  # the bytes of 16 tokens, whole for each or not
@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_opaque_pages_of_any_size(page: int, down: bool) -> None:
    made = torch.randint(0, 256, (2, 9, page), dtype=torch.uint8)
    rows, host = (torch.zeros_like(made, device=each) for each in (DEVICE, "cpu"))
    (rows if down else host).copy_(made)
    views = [KVView(x, "layer block page", kv=1, block_size=16) for x in (rows, host)]
    src, dst = views if down else views[::-1]
    launch: Any = Ring(DEVICE).prepare(CopyPlan(src.form, dst.form, 0, 0))
    launch(src, dst, Index(), Index(), 9 * 16, None, None)
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(host, rows.cpu())
    assert torch.equal(host, made)


def test_a_copy_of_nothing() -> None:
    copies = Copies(True)
    copies.launch(*copies.views, *copies.indices, 0, None, None)
    assert not copies.host.any()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 63, 64, 65, 1000])
@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_slices_cover_every_position_of_every_plane_once(tokens: int, down: bool) -> None:
    copies = Copies(down, tokens=tokens)
    slices = slices_of(copies)
    device, host = copies.views if down else copies.views[::-1]
    for whole, mine in (
        (device, [x.rows for x in slices]),
        (host, [host.planes(x.cut.layers, x.cut.kv) for x in slices]),
    ):
        met = sorted(
            (origin, at)
            for piece, view in zip(slices, mine, strict=True)
            for origin in planes_of(view)
            for at in range(piece.cut.start, piece.cut.start + piece.cut.count)
        )
        assert met == [(origin, at) for origin in sorted(planes_of(whole)) for at in range(tokens)]
    assert all(piece.cut.count <= piece.held for piece in slices)
    assert all(piece.dense.nbytes(piece.held) <= SLICE for piece in slices)


def planes_of(view: KVView) -> list[int]:
    """Where the planes of a chunk begin."""
    return [
        view.plane(layer, kv).data_ptr() for layer in range(view.layers) for kv in range(view.kv)
    ]


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_small_slices_stand_where_only_one_side_is_busy(down: bool) -> None:
    """At the beginning the link to the host, at the end the one to the device."""
    slices = slices_of(Copies(down, tokens=1000))
    sizes = [piece.dense.nbytes(piece.cut.count) for piece in (slices if down else slices[::-1])]
    assert sizes[0] == SLICE // 4
    assert max(sizes) == sizes[1] == SLICE


def slices_of(copies: Copies) -> list[Any]:
    """The slices that a copy is made of."""
    rows, host = copies.views if copies.down else copies.views[::-1]
    theirs = copies.indices[1 if copies.down else 0]
    found: list[Any] = copies.launch.slices(rows, host, theirs, copies.tokens)
    return found
