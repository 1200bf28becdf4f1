# SPDX-License-Identifier: Apache-2.0
"""Copies between a device and the host through one engine, judged against `reference` on the host,
with slices of any size and links that break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from portakv import Index, KVView, copy_rows
from portakv.backends.base import Backend
from portakv.engines import pageable, slices
from portakv.engines.descriptors import Descriptors
from portakv.engines.pageable import Ring
from portakv.engines.slices import Sizes
from portakv.engines.staged import Staged
from portakv.plan.plan import CopyPlan, Move
from portakv.view.example import example_tensors
from support.guarded_memory import tensors_in

BLOCK, BLOCKS, DIM = 8, 24, 16
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
    """Distinct ids in no order, of so many tokens each."""
    generator = torch.Generator().manual_seed(seed)
    units = BLOCKS * BLOCK // step
    return torch.randperm(units, generator=generator)[: -(-count // step)].tolist(), step


def cases() -> list[Case]:
    """Every pair of layouts by tokens and by blocks, with heads and tails."""
    found = []
    for layout in PAGED:
        found += [Case(layout, host, scattered(37, 1), None, 37) for host in CHUNKS]
        found += [Case(layout, host, scattered(64, BLOCK), None, 61) for host in CHUNKS]
    for layout in PAGED[:2]:
        for host in POOLS:
            blocks = scattered(96, BLOCK), scattered(96, BLOCK, seed=8)
            found.append(Case(layout, host, *blocks, 96))
            found.append(Case(layout, host, scattered(41, 1), scattered(41, 1, seed=9), 41))
            found.append(Case(layout, host, scattered(72, BLOCK), (range(3, 12), BLOCK), 70))
            found.append(Case(layout, host, scattered(40, 1), None, 40, offset=21))
    return found


def tensors_of(layout: str, tokens: int, seed: int) -> Any:
    """Random bytes on the host in a layout's containers."""
    paged = " block" in f" {layout}" or "(block" in layout
    made = example_tensors(
        layout, **EXTENTS, blocks=BLOCKS, tokens=BLOCK if paged else tokens, dtype=torch.int16
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors_in(made):
        tensor.copy_(torch.randint(-32768, 32767, tensor.shape, generator=generator).short())
    return made


def mapped(tensors: Any, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The containers with another tensor for each."""
    if isinstance(tensors, torch.Tensor):
        return make(tensors)
    return [mapped(each, make) for each in tensors]


def view_of(tensors: Any, layout: str) -> KVView:
    """A view with every extent declared."""
    size: dict[str, Any] = {"block_size": BLOCK} if "block" in layout else {}
    return KVView(tensors, layout, **EXTENTS, **size)


def index_of(ids: tuple[Any, int] | None, offset: int = 0) -> Index:
    return Index(offset=offset) if ids is None else Index(list(ids[0]), step=ids[1])


def judge(
    case: Case,
    engine: Backend,
    downward: bool,
    on_host: Callable[[torch.Tensor], torch.Tensor],
    stream: torch.Stream | None = None,
) -> None:
    """Copy through an engine; every byte of the destination must be as `reference` has it."""
    device = engine.device
    there, here = tensors_of(case.device, 0, 1), tensors_of(case.host, case.count + case.offset, 2)
    on_device = mapped(there, lambda x: x.to(device))
    pinned = mapped(here, on_host)
    views = view_of(on_device, case.device), view_of(pinned, case.host)
    plain = view_of(there, case.device), view_of(here, case.host)
    indices = index_of(case.ids), index_of(case.host_ids, case.offset)
    if not downward:
        views, plain, indices = views[::-1], plain[::-1], indices[::-1]
    copy_rows(*plain, *indices, count=case.count)
    launch_pieces(engine, Move(*views, *indices, case.count), stream)
    torch.accelerator.synchronize(device)
    found, expected = (pinned, here) if downward else (on_device, there)
    for tensor, wanted in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert torch.equal(tensor.cpu(), wanted), case


def launch_pieces(engine: Backend, move: Move, stream: torch.Stream | None) -> None:
    """Launch whole units, and head and tail by tokens, as the library does."""
    forms = move.src.form, move.dst.form
    for first, tokens, unit in CopyPlan(*forms, *move.steps).split(move):
        plan = CopyPlan(*forms, *move.steps, unit)
        assert engine.check(plan).accepted, engine.check(plan)
        engine.prepare(plan)(*move.part(first, tokens), stream, None)


DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
#: Each engine that copies by pieces, with the host memory that it takes.
ON_HOST: dict[type[Backend], Callable[[torch.Tensor], torch.Tensor]] = {
    Staged: torch.Tensor.pin_memory,
    Descriptors: torch.Tensor.pin_memory,
    Ring: torch.Tensor.clone,
}
#: Tokens of a transfer of `Transfers`, and its first slot.
TOKENS, FIRST = 40, 100


class Transfers:
    """Transfers of one kind between a paged cache and a chunk, through one prepared copy, with the
    same lists of ids each time.

    Args:
        engine: carries them out.
        downward: from the device to the host.
        host_ids: the host's rows have ids, too.
    """

    def __init__(self, engine: Backend, downward: bool, host_ids: bool = False) -> None:
        self.engine, self.downward = engine, downward
        there = mapped(tensors_of(PAGED[0], 0, 1), lambda x: x.to(engine.device))
        self.rows, self.host = view_of(there, PAGED[0]), self.chunk(2)
        self.mine = index_of((list(range(FIRST, FIRST + TOKENS)), 1))
        self.theirs = index_of((list(range(TOKENS)), 1) if host_ids else None)
        forms = self.turned(self.rows.form, self.host.form)
        steps = self.turned(self.mine.plan_step, self.theirs.plan_step)
        self.launch: Any = engine.prepare(CopyPlan(*forms, *steps))

    def chunk(self, seed: int) -> KVView:
        """Other memory of the host, of random bytes."""
        made = tensors_of(CHUNKS[0], TOKENS, seed)
        return view_of(ON_HOST[type(self.engine)](made), CHUNKS[0])

    def go(self, host: KVView, tokens: int, stream: torch.Stream | None = None) -> None:
        """Launch; nothing is waited for."""
        indices = self.turned(self.mine, self.theirs)
        self.launch(*self.turned(self.rows, host), *indices, tokens, stream, None)

    def __call__(self, host: KVView | None = None, tokens: int = TOKENS) -> None:
        """Move the rows, and compare."""
        host = host or self.host
        source = (self.rows if self.downward else host).tensors
        before = mapped(source, torch.Tensor.clone)
        self.go(host, tokens)
        torch.accelerator.synchronize(self.engine.device)
        for now, then in zip(tensors_in(source), tensors_in(before), strict=True):
            assert torch.equal(now, then)
        assert torch.equal(self.moved(tokens), tensors_in(host.tensors)[0][:, :, :tokens])

    def moved(self, tokens: int = TOKENS) -> torch.Tensor:
        """The device's rows that are read or written, as a chunk."""
        layers = [layer.cpu().flatten(1, 2) for layer in tensors_in(self.rows.tensors)]
        return torch.stack([x[:, FIRST : FIRST + tokens].flatten(2) for x in layers], 1)

    def turned(self, mine: Any, theirs: Any) -> Any:
        """(Source, destination) of what belongs to the device and to the host."""
        return (mine, theirs) if self.downward else (theirs, mine)


def small_slices(monkeypatch: pytest.MonkeyPatch, largest: int = 2048) -> None:
    """Slices so small that every copy has many."""
    for name, size in (("LARGEST", largest), ("SMALLEST", largest // 4), ("WHOLE", 0)):
        monkeypatch.setattr(slices, name, size)
    monkeypatch.setattr(pageable, "SIZES", Sizes(largest // 4, largest // 4, largest))


def broken_at(
    nth: int, copy: Callable[..., None], error: type[BaseException] = RuntimeError
) -> Callable[..., None]:
    """A copy across the link whose ``nth`` call fails."""
    calls = list[None]()

    def failing(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) == nth:
            raise error("the link is down")
        copy(*arguments)

    return failing


def full(*_sizes: Any, **_how: Any) -> torch.Tensor:
    """Stands for `torch.empty` on a device without room."""
    raise torch.OutOfMemoryError("the device is full")
