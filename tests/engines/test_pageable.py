# SPDX-License-Identifier: Apache-2.0
"""`ring`: bounce buffers used again and again, what may be touched when, interrupts, threads,
devices; and how its slices are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.device_cases import delay, on
from support.engine_cases import DOWNWARD, small_slices
from support.simdev_cases import DEVICE, OTHER
from support.threads import run_threads

from portakv import Index, KVView
from portakv.backends.strided import HostRows
from portakv.engines import pageable
from portakv.engines import slices as schedule
from portakv.engines.link import link_of
from portakv.engines.pageable import Ring
from portakv.engines.slices import Sizes
from portakv.engines.staging import BUFFERS, bounce_buffers
from portakv.plan.plan import CopyPlan

TOKENS, WIDTH, SLICE = 96, 32, 2048
REPEATS = 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_slices(monkeypatch, SLICE)


class Copies:
    """One chunk on each side, with a prepared copy between them."""

    def __init__(
        self, down: bool, device: torch.device, tokens: int = TOKENS, layers: int = 2,
        width: int = WIDTH,
    ) -> None:  # fmt: skip
        self.tokens, self.down = tokens, down
        shape = (2, layers, tokens, width)
        self.host = torch.zeros(shape, dtype=torch.uint8)
        self.rows = torch.zeros(shape, dtype=torch.uint8, device=device)
        views = [KVView(x, "kv layer token (head dim)", heads=1) for x in (self.rows, self.host)]
        self.views = views if down else views[::-1]
        # Backwards, so that the device's half is no plain copy.
        self.indices = self.turned(Index(torch.arange(tokens).flip(0)))
        forms, steps = (v.form for v in self.views), (i.plan_step for i in self.indices)
        plan = CopyPlan(*forms, *steps)  # type: ignore[arg-type]
        self.launch: Any = Ring(device).prepare(plan)

    def turned(self, ids: Index) -> tuple[Index, Index]:
        """Both indices, of which the device's has ids."""
        return (ids, Index()) if self.down else (Index(), ids)

    def fill(self, seed: int) -> torch.Tensor:
        """Other bytes in the source; returns what the destination is to hold."""
        generator = torch.Generator().manual_seed(seed)
        made = torch.randint(0, 256, self.host.shape, dtype=torch.uint8, generator=generator)
        (self.rows if self.down else self.host).copy_(made)
        return made.flip(2)

    def run(self, stream: torch.Stream | None = None) -> None:
        self.launch(*self.views, *self.indices, self.tokens, stream, None)

    def landed(self) -> torch.Tensor:
        """The destination; of the device, behind everything."""
        torch.accelerator.synchronize(self.rows.device)
        return self.host.clone() if self.down else self.rows.cpu()

    def slices(self) -> list[Any]:
        """The slices that a copy is made of."""
        rows, host, _, theirs = self.launch.ends((*self.views, *self.indices, self.tokens))
        found: list[Any] = self.launch.slices(rows, host, theirs, self.tokens)
        return found


@DOWNWARD
@pytest.mark.usefixtures("small")
def test_slices_go_round_the_buffers(accelerator: torch.device, downward: bool) -> None:
    copies = Copies(downward, accelerator)
    assert len(copies.slices()) > 2 * BUFFERS
    for seed in range(REPEATS):
        wanted = copies.fill(seed)
        copies.run()
        if downward:
            assert torch.equal(copies.host, wanted)  # it has landed when the call returns
        else:
            copies.host.fill_(0xEE)  # all of it has been read
        assert torch.equal(copies.landed(), wanted)


@DOWNWARD
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1040, 32_000])
def test_slices_of_the_default_size(tokens: int, downward: bool) -> None:
    copies = Copies(downward, torch.device("cuda", 0), tokens, layers=8, width=256)
    for seed in range(3):
        wanted = copies.fill(seed)
        copies.run()
        assert torch.equal(copies.landed(), wanted)


def interrupted(plain: Callable[..., Any], after: int, late: bool) -> Callable[..., Any]:
    """A stand-in that is interrupted in its n-th call, before or after the work."""
    calls = iter(range(1 << 30))

    def stand_in(*arguments: Any) -> None:
        number = next(calls)
        if number != after or late:
            plain(*arguments)
        if number == after:
            raise KeyboardInterrupt

    return stand_in


@DOWNWARD
@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("after", [0, 1, BUFFERS, BUFFERS + 1])
@pytest.mark.parametrize("where", ["rows", "link"])
@pytest.mark.usefixtures("small")
def test_an_interrupt_leaves_the_ring_usable(
    accelerator: torch.device, downward: bool, late: bool, after: int, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    owner: Any = {"rows": HostRows, "link": type(link_of(accelerator))}[where]
    plain: Callable[..., Any] = owner.copy
    for seed in range(2):
        copies = Copies(downward, accelerator)
        copies.fill(seed)
        monkeypatch.setattr(owner, "copy", interrupted(plain, after, late))
        with pytest.raises(KeyboardInterrupt):
            copies.run()
        monkeypatch.setattr(owner, "copy", plain)
        if downward:  # what is left behind is not written later
            copies.host.fill_(0x11)
            assert (copies.landed() == 0x11).all()
        # The memory goes at once, and the next transfer takes the same buffers.
        del copies
        other = Copies(not downward, accelerator)
        wanted = other.fill(seed + 100)
        other.run()
        assert torch.equal(other.landed(), wanted)


def on_streams_of_their_own(devices: list[torch.device]) -> None:
    """Two threads of each direction."""
    wrong: list[str] = []

    def work(number: int) -> None:
        down, device = number < 2, devices[number % len(devices)]
        copies, stream = Copies(down, device), torch.Stream(device)
        for seed in range(REPEATS):
            with on(stream):
                wanted = copies.fill(100 * number + seed)
                copies.run(stream)
                found = copies.host.clone() if down else copies.rows.clone()
            stream.synchronize()
            if not torch.equal(found.cpu(), wanted):
                wrong.append(f"thread {number}, round {seed}")

    run_threads(work, range(4))
    assert not wrong


@pytest.mark.usefixtures("small")
def test_threads_on_streams_of_their_own(accelerator: torch.device) -> None:
    on_streams_of_their_own([accelerator])


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_threads_on_devices_of_their_own() -> None:
    on_streams_of_their_own([DEVICE, OTHER])


@DOWNWARD
@pytest.mark.usefixtures("small")
def test_ids_that_are_brought_for_the_copy_are_there_before_they_are_read(
    accelerator: torch.device, downward: bool
) -> None:
    """A column of a block table: it is made contiguous on the caller's stream, which is late."""
    copies, stream = Copies(downward, accelerator), torch.Stream(accelerator)
    for seed in range(4):
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
        table = torch.stack([order, torch.full_like(order, 1 << 40)], 1).to(accelerator)
        made = copies.fill(seed).flip(2)
        wanted = made[:, :, order if downward else order.argsort()]
        copies.indices = copies.turned(Index(table[:, 0]))
        torch.accelerator.synchronize(accelerator)
        with on(stream):
            delay(stream)
            copies.run(stream)
            stream.synchronize()
        assert torch.equal(copies.landed(), wanted)


@DOWNWARD
@pytest.mark.parametrize("page", [96, 100])  # the bytes of 16 tokens, whole for each or not
@pytest.mark.usefixtures("small")
def test_opaque_pages_of_any_size(accelerator: torch.device, page: int, downward: bool) -> None:
    made = torch.randint(0, 256, (2, 9, page), dtype=torch.uint8)
    rows, host = (torch.zeros_like(made, device=each) for each in (accelerator, "cpu"))
    (rows if downward else host).copy_(made)
    views = [KVView(x, "layer block page", kv=1, block_size=16) for x in (rows, host)]
    src, dst = views if downward else views[::-1]
    launch: Any = Ring(accelerator).prepare(CopyPlan(src.form, dst.form, 0, 0))
    launch(src, dst, Index(), Index(), 9 * 16, None, None)
    torch.accelerator.synchronize(accelerator)
    assert torch.equal(host, rows.cpu())
    assert torch.equal(host, made)


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_pinned_memory_is_bounded_and_no_more_than_a_payload_needs() -> None:
    bounce_buffers.cache_clear()
    for tokens, nbytes in ((0, 0), (4, 2 * 2 * 4 * WIDTH), (4096, SLICE)):
        copies = Copies(True, DEVICE, tokens or 1)
        copies.tokens = tokens
        copies.run()
        assert bounce_buffers(DEVICE).nbytes == BUFFERS * nbytes


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
    monkeypatch.setattr(schedule, "LARGEST", 1 << 20)
    layers, blocks = 2, 640 // block
    shape = (blocks, layers, 2) if layout.startswith("block") else (layers, 2, blocks)
    made = torch.zeros((*shape, block, WIDTH), dtype=torch.uint8)
    sides = [made.to(DEVICE), made] if "|" not in layout else [list(made.to(DEVICE)), list(made)]
    device, host = (KVView(x, layout) for x in sides)
    theirs = Index(list(range(blocks))[::-1], block, offset)
    launch: Any = Ring(DEVICE).prepare(CopyPlan(device.form, host.form, 0, block))
    for piece in launch.slices(device, host, theirs, 640 - offset):
        once = piece.dense.nbytes(piece.dense.block_size)
        assert piece.nbytes <= max(3072, once) + (once if offset else 0)


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 63, 64, 65, 1000])
@pytest.mark.usefixtures("small")
def test_slices_cover_every_position_of_every_plane_once(tokens: int, downward: bool) -> None:
    copies = Copies(downward, DEVICE, tokens)
    slices = copies.slices()
    device, host = copies.views if downward else copies.views[::-1]
    of_host = [host.planes(x.cut.layers, x.cut.kv) for x in slices]
    for whole, mine in ((device, [x.rows for x in slices]), (host, of_host)):
        met = sorted(
            (origin, at)
            for piece, view in zip(slices, mine, strict=True)
            for origin in planes_of(view)
            for at in range(piece.cut.start, piece.cut.start + piece.cut.count)
        )
        assert met == [(origin, at) for origin in sorted(planes_of(whole)) for at in range(tokens)]
    assert all(piece.cut.count <= piece.held and piece.nbytes <= SLICE for piece in slices)


def planes_of(view: KVView) -> list[int]:
    """Where the planes of a chunk begin."""
    return [
        view.plane(layer, kv).data_ptr() for layer in range(view.layers) for kv in range(view.kv)
    ]


@DOWNWARD
@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_small_slices_stand_where_only_one_side_is_busy(downward: bool) -> None:
    """At the beginning the link to the host, at the end the one to the device."""
    slices = Copies(downward, DEVICE, 1000).slices()
    sizes = [piece.dense.nbytes(piece.cut.count) for piece in slices[:: 1 if downward else -1]]
    assert sizes[0] == SLICE // 4
    assert max(sizes) == sizes[1] == SLICE
