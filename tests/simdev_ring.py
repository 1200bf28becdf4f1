# SPDX-License-Identifier: Apache-2.0
"""`ring` on the simulated device: bytes, what may be touched when, interrupts, threads, devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import Case, cases, judge
from portakv_conformance import simdev
from simdev_cases import DEVICE, OTHER, on

from portakv import Index, KVView
from portakv.host.engines import host_rows, ring
from portakv.host.engines._crew import Batch
from portakv.host.engines._crossing_torch import TorchCrossing
from portakv.host.engines._ring_slots import TURNS, slots
from portakv.host.engines.host_rows import HostRows
from portakv.host.engines.ring import Ring
from portakv.plan import CopyPlan

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
    monkeypatch.setattr(ring, "SLICE", SLICE)


@pytest.fixture(autouse=True)
def _several_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Also where torch may use one: and shares so small that all of them take part."""
    monkeypatch.setattr(host_rows, "SHARE", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


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
        monkeypatch.setattr(ring, "SLICE", 16 << 20)
    judge(case, Ring(DEVICE), down, torch.Tensor.clone)


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_slices_go_round_the_slots(down: bool) -> None:
    copies = Copies(down)
    assert len(copies.launch.slices(0, TOKENS)) > 2 * TURNS
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
@pytest.mark.parametrize("where", ["rows", "start", "wait", "link"])
def test_an_interrupt_leaves_the_ring_usable(
    down: bool, late: bool, after: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {
        "rows": (HostRows, "batch"), "start": (Batch, "start"), "wait": (Batch, "wait"),
        "link": (TorchCrossing, "copy"),
    }[where]  # fmt: skip
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
    monkeypatch.setattr(HostRows, "batch", interrupted(HostRows.batch, 2, False))
    with pytest.raises(KeyboardInterrupt):
        copies.run()
    copies.host.fill_(0x11)
    torch.accelerator.synchronize(DEVICE)
    assert (copies.host == 0x11).all()


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_an_error_of_the_crew_is_the_caller_s(down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, plain, under_way = threading.get_ident(), np.copyto, list[int]()

    def fails(*arguments: Any) -> None:
        under_way.append(1)
        time.sleep(0.001)
        try:
            plain(*arguments)
            if threading.get_ident() != caller:
                raise MemoryError("no more")
        finally:
            under_way.pop()

    copies = Copies(down)
    copies.fill(1)
    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", fails)
        with pytest.raises(MemoryError, match="no more"):
            copies.run()
        assert not under_way
    wanted = copies.fill(2)
    copies.run()
    assert torch.equal(copies.landed(), wanted)


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
    ring_slots = slots(DEVICE)
    before = ring_slots.nbytes
    few = Copies(True, tokens=4)
    few.fill(0)
    few.run()
    many = Copies(True, tokens=4096)
    many.fill(0)
    many.run()
    assert max(before, TURNS * 2 * LAYERS * 4 * WIDTH) <= ring_slots.nbytes
    assert ring_slots.nbytes <= max(before, TURNS * SLICE)


def test_a_copy_of_nothing() -> None:
    copies = Copies(True)
    copies.launch(*copies.views, *copies.indices, 0, None, None)
    assert not copies.host.any()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 63, 64, 65, 1000])
@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_slices_cover_every_position_once(tokens: int, down: bool) -> None:
    slices = Copies(down).launch.slices(0, tokens)
    met = [at for each in slices for at in range(each.start, each.start + each.count)]
    assert sorted(met) == list(range(tokens))
    assert all(each.count <= each.held for each in slices)
    each = 2 * LAYERS * WIDTH
    assert all(piece.held * each <= SLICE for piece in slices)
    # One of half a slice where only the link is busy, or only the host, and then the largest.
    assert ring.GROWING == (2,)
    most, left, wanted = SLICE // each, tokens, list[int]()
    for size in (most // 2 if tokens > most // 2 else most, *[most] * tokens):
        wanted += [min(size, left)] * bool(left)
        left -= min(size, left)
    assert [piece.count for piece in (slices if down else slices[::-1])] == wanted
