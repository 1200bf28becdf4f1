# SPDX-License-Identifier: Apache-2.0
"""`ring` on a CUDA device: many slices of the default size, reuse of slots, streams, interrupts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.device_cases import LONG

from portakv import Index, KVView
from portakv.backends.strided import HostRows
from portakv.engines.pageable import Ring
from portakv.engines.staging import BUFFERS
from portakv.plan.plan import CopyPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
LAYERS, BLOCK, HEADS, DIM = 8, 16, 2, 64
LAYOUTS = (
    "kv layer token (head dim)",
    "block layer kv token head dim",
    "layer | kv block token head dim",
)


class Copies:
    """Scattered rows of a device and pageable rows of the host, with a prepared copy."""

    def __init__(self, down: bool, layout: str, tokens: int) -> None:
        self.down, self.tokens = down, tokens
        device, blocks = torch.device("cuda", 0), tokens // BLOCK
        shape = (2, 2 * blocks, BLOCK, HEADS, DIM)
        self.caches = [torch.zeros(shape, dtype=torch.int16, device=device) for _ in range(LAYERS)]
        order = torch.Generator().manual_seed(tokens)
        if layout == LAYOUTS[0]:
            self.host = torch.zeros(2, LAYERS, tokens, HEADS * DIM, dtype=torch.int16)
            self.host_ids, theirs = None, Index()
            host = KVView(self.host, layout, heads=HEADS)
        else:
            self.host_ids = torch.randperm(2 * blocks, generator=order)[:blocks]
            theirs = Index(self.host_ids, step=BLOCK)
            if layout == LAYOUTS[1]:
                self.host = torch.zeros(2 * blocks, LAYERS, 2, BLOCK, HEADS, DIM, dtype=torch.int16)
                host = KVView(self.host, layout)
            else:
                self.host = torch.zeros(LAYERS, *shape, dtype=torch.int16)
                host = KVView(list(self.host), layout)
        self.ids = torch.randperm(2 * blocks, generator=order)[:blocks]
        mine = Index(self.ids, step=BLOCK)
        rows = KVView(self.caches, "layer | kv block token head dim")
        self.views, self.indices = (rows, host), (mine, theirs)
        if not down:
            self.views, self.indices = self.views[::-1], self.indices[::-1]
        forms, steps = (v.form for v in self.views), (i.plan_step for i in self.indices)
        plan = CopyPlan(*forms, *steps)  # type: ignore[arg-type]
        self.launch = Ring(device).prepare(plan)

    def fill(self) -> None:
        """Other bytes in the source."""
        for tensor in self.caches if self.down else [self.host]:
            tensor.random_(-32768, 32767)

    def run(self, stream: torch.Stream | None = None) -> None:
        self.launch(*self.views, *self.indices, self.tokens, stream, None)

    def right(self) -> bool:
        """Whether both sides hold the same rows."""
        torch.cuda.synchronize()
        rows = torch.stack([cache[:, self.ids.cuda()] for cache in self.caches])
        rows = rows.cpu()  # layer kv block token head dim
        if self.host_ids is None:
            return torch.equal(rows.permute(1, 0, 2, 3, 4, 5).reshape(self.host.shape), self.host)
        if self.host.shape[0] == LAYERS and self.host.shape[1] == 2:
            return torch.equal(rows, self.host[:, :, self.host_ids])
        return torch.equal(rows.permute(2, 0, 1, 3, 4, 5), self.host[self.host_ids])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("tokens", [16, 1024, 1040, 4080, 32_000])
def test_every_byte_of_many_slices(down: bool, layout: str, tokens: int) -> None:
    copies = Copies(down, layout, tokens)
    for _ in range(3):
        copies.fill()
        copies.run()
        assert copies.right()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_source_may_be_overwritten_at_once(layout: str) -> None:
    copies = Copies(False, layout, 32_000)
    copies.fill()
    kept = copies.host.clone()
    copies.run()
    copies.host.zero_()
    torch.cuda.synchronize()
    copies.host.copy_(kept)
    assert copies.right()


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_threads_with_streams_of_their_own(down: bool) -> None:
    wrong = []

    def work(layout: str, down: bool) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            copies = Copies(down, layout, 16_000)
            for _ in range(4):
                copies.fill()
                copies.run(stream)
                if not copies.right():
                    wrong.append(layout)

    threads = [
        threading.Thread(target=work, args=(layout, down ^ (n == 1)))
        for n, layout in enumerate(LAYOUTS[:2])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("after", [0, BUFFERS])
def test_an_interrupt_leaves_the_ring_usable(
    down: bool, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, plain, calls = Copies(down, LAYOUTS[0], 32_000), HostRows.copy, iter(range(1 << 30))

    def interrupted(self: HostRows, *arguments: Any) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt
        plain(self, *arguments)

    copies.fill()
    with monkeypatch.context() as patched:
        patched.setattr(HostRows, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copies.run()
    del copies
    other = Copies(not down, LAYOUTS[1], 32_000)
    other.fill()
    other.run()
    assert other.right()


@pytest.mark.parametrize("down", [True, False], ids=["d2h", "h2d"])
def test_ids_that_are_brought_for_the_copy_are_there_before_they_are_read(down: bool) -> None:
    """A column of a block table on the device: it is made contiguous on the caller's stream."""
    copies, stream = Copies(down, LAYOUTS[1], 32_000), torch.cuda.Stream()
    table = torch.stack([copies.ids, torch.full_like(copies.ids, 1 << 40)], 1).cuda()
    mine, theirs = Index(table[:, 0], step=BLOCK), Index(copies.host_ids, step=BLOCK)
    copies.indices = (mine, theirs) if down else (theirs, mine)
    copies.fill()
    copies.run(stream)  # what is made once is there
    copies.fill()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        copies.run(stream)
    assert copies.right()
