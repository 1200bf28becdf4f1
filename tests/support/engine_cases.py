# SPDX-License-Identifier: Apache-2.0
"""Copies between a device and the host through one strategy, judged against `reference` on the
host, with slices of any size and links that break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from portakv import Index, KVView, copy_rows
from portakv.backends.base import Backend
from portakv.interconnect import pageable, staged
from portakv.interconnect.batched_memcpy import BatchedMemcpy
from portakv.interconnect.choose import Host
from portakv.interconnect.pageable import Pageable
from portakv.interconnect.slices import Sizes
from portakv.interconnect.staged import Staged
from portakv.plan.plan import CopyPlan, Move
from portakv.view.example import example_tensors
from support.guarded_memory import tensors_in

BLOCK = 8
BLOCKS = 24
DIM = 16
#: Layouts of the device's side, and of the host's.
PAGED = (
    "layer | kv block token head dim",
    "layer kv | block head token dim",
    "block layer kv token head dim",
    "kv layer | (block token) head dim",
)
CHUNKS = ("kv layer token (head dim)", "layer token kv head dim", "kv layer head token dim")
POOLS = (*PAGED, "block | kv layer token (head dim)")
EXTENTS: dict[str, Any] = {"layers": 3, "kv": 2, "heads": 2, "dim": DIM}


@dataclass(frozen=True)
class Case:
    """One copy: the device's layout and index, the host's, and how many tokens."""

    device: str
    host: str
    ids: tuple[Any, int] | None  # of the device: list, step
    host_ids: tuple[Any, int] | None
    count: int
    offset: int = 0  # of the host's index


def scattered(count: int, step: int, seed: int = 7) -> tuple[list[int], int]:
    """Return distinct ids in no order, of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    units = BLOCKS * BLOCK // step
    return torch.randperm(units, generator=generator)[: -(-count // step)].tolist(), step


def cases() -> list[Case]:
    """Return every pair of layouts by tokens and by blocks, with heads and tails."""
    result = []
    for layout in PAGED:
        result += [Case(layout, host, scattered(37, 1), None, 37) for host in CHUNKS]
        result += [Case(layout, host, scattered(64, BLOCK), None, 61) for host in CHUNKS]
    for layout in PAGED[:2]:
        for host in POOLS:
            blocks = scattered(96, BLOCK), scattered(96, BLOCK, seed=8)
            result.append(Case(layout, host, *blocks, 96))
            result.append(Case(layout, host, scattered(41, 1), scattered(41, 1, seed=9), 41))
            result.append(Case(layout, host, scattered(72, BLOCK), (range(3, 12), BLOCK), 70))
            result.append(Case(layout, host, scattered(40, 1), None, 40, offset=21))
    for layout, host in zip((*PAGED, PAGED[0]), POOLS, strict=True):
        result.append(Case(layout, host, scattered(72, BLOCK), (range(11, 2, -1), BLOCK), 72))
        result.append(Case(layout, host, scattered(40, 1), (range(0, 80, 2), 1), 40))
    return result


def tensors_of(layout: str, tokens: int, seed: int) -> Any:
    """Return random bytes on the host in a layout's containers."""
    paged = " block" in f" {layout}" or "(block" in layout
    made = example_tensors(
        layout, **EXTENTS, blocks=BLOCKS, tokens=BLOCK if paged else tokens, dtype=torch.int16
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors_in(made):
        tensor.copy_(torch.randint(-32768, 32767, tensor.shape, generator=generator).short())
    return made


def mapped(tensors: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the containers with another tensor for each."""
    if isinstance(tensors, torch.Tensor):
        return make(tensors)
    return [mapped(each, make) for each in tensors]


def view_of(tensors: Any, layout: str) -> KVView:
    """Return a view with every extent declared."""
    size: dict[str, Any] = {"block_size": BLOCK} if "block" in layout else {}
    return KVView(tensors, layout, **EXTENTS, **size)


def index_of(ids: tuple[Any, int] | None, offset: int = 0) -> Index:
    return Index(offset=offset) if ids is None else Index(list(ids[0]), step=ids[1])


DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
#: Each strategy that copies by pieces, with the host memory that it takes.
ON_HOST: dict[type[Backend], Callable[[torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys((Staged, BatchedMemcpy, Host), torch.Tensor.pin_memory),
    Pageable: torch.Tensor.clone,
}
#: Tokens of the usual case, and its first slot.
TOKENS = 40
FIRST = 100
USUAL = Case(PAGED[0], CHUNKS[0], (range(FIRST, FIRST + TOKENS), 1), None, TOKENS)


class Transfers:
    """Transfers of one kind by a strategy, ``downward`` to the host, through launches that are
    prepared once, judged by `reference`. ``pageable``: the host's memory is, whatever the strategy
    usually takes."""

    def __init__(
        self,
        strategy: Backend,
        downward: bool,
        case: Case = USUAL,
        seed: int = 1,
        pageable: bool | None = None,
    ) -> None:
        self.strategy = strategy
        self.downward = downward
        self.case = case
        self._on_host = ON_HOST[
            type(strategy) if pageable is None else Pageable if pageable else Staged
        ]
        made = tensors_of(case.device, case.count, seed)
        # The memory of the device and of the host, and the index of either.
        self.rows = view_of(mapped(made, lambda x: x.to(strategy.device)), case.device)
        self.host = self.chunk(seed + 1)
        self.device_index = index_of(case.ids)
        self.host_index = index_of(case.host_ids, case.offset)
        self.plan = self._plan_of(None)
        self._prepared: dict[int, Any] = {}

    def chunk(self, seed: int) -> KVView:
        """Return other memory of the host, of random bytes."""
        made = tensors_of(self.case.host, self.case.count + self.case.offset, seed)
        return view_of(mapped(made, self._on_host), self.case.host)

    def _plan_of(self, unit: int | None) -> CopyPlan:
        src, dst = self.turned(self.rows.form, self.host.form)
        steps = self.turned(self.device_index.plan_step, self.host_index.plan_step)
        return CopyPlan(src, dst, steps[0], steps[1], unit)

    def prepared(self, unit: int | None = None) -> Any:
        """Return the launch of the plan in units of so many tokens; None: the plan's unit."""
        unit = unit or self.plan.unit
        if unit not in self._prepared:
            plan = self._plan_of(unit)
            assert self.strategy.check(plan).accepted, self.strategy.check(plan)
            self._prepared[unit] = self.strategy.prepare(plan)
        return self._prepared[unit]

    def move(self, host: KVView | None = None, tokens: int | None = None) -> Move:
        """Return the transfer as requested."""
        src, dst = self.turned(self.rows, host or self.host)
        src_index, dst_index = self.turned(self.device_index, self.host_index)
        return Move(src, dst, src_index, dst_index, self.case.count if tokens is None else tokens)

    def go(
        self,
        host: KVView | None = None,
        tokens: int | None = None,
        stream: torch.Stream | None = None,
    ) -> None:
        """Launch whole units, and head and tail by tokens, as the library does, without waiting."""
        move = self.move(host, tokens)
        for first, count, unit in self.plan.split(move):
            src_index = move.src_index.shifted(first)
            dst_index = move.dst_index.shifted(first)
            self.prepared(unit)(move.src, move.dst, src_index, dst_index, count, stream, None)

    def expected(self, host: KVView | None = None, tokens: int | None = None) -> KVView:
        """Return the expected destination after the rows were moved, on the host."""
        requested = self.move(host, tokens)
        src = self._plain(requested.src)
        dst = self._plain(requested.dst)
        copy_rows(
            src,
            dst,
            requested.src_index.to_host(),
            requested.dst_index.to_host(),
            count=requested.count,
        )
        return dst

    def check(self, expected: KVView, host: KVView | None = None) -> None:
        """Check every byte of the destination after all has ended."""
        torch.accelerator.synchronize(self.strategy.device)
        self._alike(self.turned(self.rows, host or self.host)[1], expected)

    def __call__(
        self,
        host: KVView | None = None,
        tokens: int | None = None,
        stream: torch.Stream | None = None,
    ) -> None:
        """Move the rows and judge; the source is as it was."""
        source = self.turned(self.rows, host or self.host)[0]
        before = self._plain(source)
        expected = self.expected(host, tokens)
        if stream is not None:
            stream.wait_stream(torch.accelerator.current_stream(stream.device_index))
        self.go(host, tokens, stream)
        self.check(expected, host)
        self._alike(source, before)

    def _plain(self, view: KVView) -> KVView:
        layout = self.case.device if view is self.rows else self.case.host
        return view_of(mapped(view.tensors, lambda x: x.cpu().clone()), layout)

    def _alike(self, actual: KVView, wanted: KVView) -> None:
        pairs = zip(tensors_in(actual.tensors), tensors_in(wanted.tensors), strict=True)
        assert all(torch.equal(one.cpu(), other) for one, other in pairs), self.case

    def turned(self, device_side: Any, host_side: Any) -> Any:
        """Return (source, destination) of a pair that belongs to the device and to the host."""
        return (device_side, host_side) if self.downward else (host_side, device_side)


def small_slices(monkeypatch: pytest.MonkeyPatch, largest: int = 2048) -> None:
    """Make slices so small that every copy has many."""
    for name, size in (("LARGEST", largest), ("SMALLEST", largest // 4), ("WHOLE", 0)):
        monkeypatch.setattr(staged, name, size)
    monkeypatch.setattr(pageable, "SIZES", Sizes(largest // 4, largest // 4, largest))
    monkeypatch.setattr(pageable, "WITHOUT_KERNELS", Sizes(*[2 * largest] * 3))


def broken_at(
    nth: int,
    copy: Callable[..., None],
    error: type[BaseException] = RuntimeError,
    late: bool = False,
) -> Callable[..., None]:
    """Return a copy whose ``nth`` call fails, before the bytes are copied or ``late``."""
    calls = list[None]()

    def failing(*arguments: Any) -> None:
        calls.append(None)
        if late or len(calls) != nth:
            copy(*arguments)
        if len(calls) == nth:
            raise error("the link is down")

    return failing


def full(*_sizes: Any, **_how: Any) -> torch.Tensor:
    """Stand for `torch.empty` on a device without room."""
    raise torch.OutOfMemoryError("the device is full")
