# SPDX-License-Identifier: Apache-2.0
"""The demo's second part: the founding scenario as tensors on a device, and each backend's copies
of it, checked, then timed in rounds in which plain torch takes turns with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple, cast

import torch

from portakv.connector.connector import AdaptiveConnector
from portakv.copy.blocks import copy_blocks
from portakv.errors import Unsupported
from portakv.host.pinned import available
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

#: What destinations hold before a copy; random bits do not repeat it.
POISON = 0x5A5AC3C35A5AC3C3


@dataclass(frozen=True)
class Scenario:
    """Paged caches ``[2, blocks, block_size, heads, dim]`` in fp16, and what is moved of them."""

    layers: int = 32
    tokens: int = 128
    heads: int = 32
    dim: int = 128
    block_size: int = 16
    blocks: int = 32
    full_layers: int = 0  # before `fitted` took some away; 0: ``layers``

    @property
    def slots(self) -> int:
        """Tokens that the pool has room for."""
        return self.blocks * self.block_size

    @property
    def payload(self) -> int:
        """Bytes that one copy moves."""
        return self.layers * 2 * self.tokens * self.heads * self.dim * 2

    @property
    def pool(self) -> int:
        """Bytes of the paged caches."""
        return self.payload // self.tokens * self.slots

    @property
    def needed(self) -> int:
        """Bytes of memory that the demo takes: two pools, three chunks, and what checks take."""
        return 2 * self.pool + 3 * self.payload + 4 * self.pool // self.layers


#: The scenario that PortaKV was begun for.
FOUNDING = Scenario()


def fitted(scenario: Scenario, free: int | None) -> Scenario:
    """The scenario with as few layers as it takes to need at most half of ``free`` bytes."""
    found = scenario
    while free is not None and found.layers > 1 and found.needed > free // 2:
        found = replace(found, layers=found.layers // 2, full_layers=scenario.layers)
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None if the system does not tell."""
    with suppress(OSError, AttributeError):
        if device.type == "cpu":
            return available()
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return None


class Founding:
    """A scenario's tensors.

    Attributes:
        pool, target: the paged caches that are read, of random bits, and those that are written;
            ``read, written``: their rows, of each layer ``[2, slots, heads * dim]``.
        stored, chunk: the dense chunk ``[2, layers, tokens, heads * dim]`` that is read, of random
            bits, and the one that is written.
        slots, blocks: where tokens lie and ids of blocks, in random order, int64 on the device.
        slots_of_blocks: the slots of these blocks' tokens, by plain arithmetic.
    """

    def __init__(self, device: torch.device, s: Scenario) -> None:
        self.device = device
        self.scenario = s
        draw = torch.Generator().manual_seed(0)
        paged = (2, s.blocks, s.block_size, s.heads, s.dim)
        self.pool = [_random_bits(paged, draw).to(device) for _ in range(s.layers)]
        self.target = [torch.empty_like(layer) for layer in self.pool]
        self.read, self.written = (
            [layer.flatten(1, 2).flatten(2) for layer in each] for each in (self.pool, self.target)
        )
        dense = (2, s.layers, s.tokens, s.heads * s.dim)
        self.stored = _random_bits(dense, draw).to(device)
        self.chunk = torch.empty_like(self.stored)
        self.slots = torch.randperm(s.slots, generator=draw)[: s.tokens].to(device)
        drawn = torch.randperm(s.blocks, generator=draw)
        self.blocks = drawn[: s.tokens // s.block_size].to(device)
        within = torch.arange(s.block_size, device=device)
        self.slots_of_blocks = (self.blocks[:, None] * s.block_size + within).flatten()

    def poison(self) -> None:
        """Fill both destinations with what no copy would leave."""
        for tensor in (*self.target, self.chunk):
            tensor.view(torch.int64).fill_(POISON)

    def wrong_in_chunk(self, slots: torch.Tensor) -> int:
        """Bytes of ``chunk`` that are not the rows of ``pool`` at ``slots``."""
        chunk = self.chunk.unbind(1)
        return sum(_differing(x, y[:, slots]) for x, y in zip(chunk, self.read, strict=True))

    def wrong_in_target(self, slots: torch.Tensor) -> int:
        """Bytes of ``target`` that are not the rows of ``stored`` at ``slots``, and poison else."""
        wrong = 0
        for stored, found in zip(self.stored.unbind(1), self.written, strict=True):
            expected = torch.full_like(found.view(torch.int64), POISON).view(found.dtype)
            expected[:, slots] = stored
            wrong += _differing(found, expected)
        return wrong


def _random_bits(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """fp16 of every bit pattern. Drawn on the CPU: the same on every device."""
    bits = torch.empty((*shape[:-1], shape[-1] // 4), dtype=torch.int64)
    return bits.random_(-(2**63), None, generator=draw).view(torch.float16)


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Bytes that differ, whatever numbers they spell."""
    if torch.equal(found.view(torch.int64), expected.view(torch.int64)):
        return 0  # a tenth of the time of what follows
    return int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())


ROUNDS = 9
#: Copies between two events on a device: the host's part of the first then hides no longer.
REPEATS = 10

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    backend: str  # its name; "torch" for what plain torch does with the same bytes
    call: str
    way: str  # what it moved, in words
    checked: int = 0  # bytes that were compared
    wrong: int = 0  # bytes that are not what plain torch indexing says
    refused: str | None = None  # why the backend does not take this copy, in its own words
    failed: str | None = None  # what it raised instead of copying
    seconds: float | None = None  # the median time of one copy; None if it was not timed
    ratio: float | None = None  # ``copy_``'s ``seconds`` by its own: 1 is as fast

    @property
    def good(self) -> bool:
        """True unless bytes were wrong or it failed; a copy may be refused."""
        return not self.wrong and not self.failed

    @property
    def right(self) -> bool:
        """True if bytes were compared and all were right."""
        return self.good and not self.refused and self.checked > 0


class _Move(NamedTuple):
    """A copy, and what counts the wrong bytes that it left; None of plain torch."""

    row: Row
    run: Work
    wrong: Callable[[], int] | None = None


def measured(
    founding: Founding, backends: Sequence[str], forced: bool
) -> tuple[list[Row], int | None]:
    """Check every copy of every backend, then time in rounds those that were right: a row for each
    copy, plain torch's first, `copy_` before all; and how many CPU threads served, None on an
    accelerator. A copy that a ``forced`` backend does not take raises `Unsupported`."""
    moves = [*_plain(founding), *(move for name in backends for move in _moves(founding, name))]
    rows = [_checked(founding, move, forced) for move in moves]
    timed = [i for i, row in enumerate(rows) if row.right or row.backend == "torch"]
    works = [moves[i].run for i in timed]
    threads = fastest_threads(works) if founding.device.type == "cpu" else None
    with torch_threads(threads):
        times = interleaved(founding.device, works)
    for i, own in zip(timed, times, strict=True):
        rows[i] = replace(rows[i], seconds=own, ratio=times[0] / own)
    return rows, threads


def interleaved(device: torch.device, works: Sequence[Work], rounds: int = 0) -> list[float]:
    """Each work's median seconds in `ROUNDS` rounds, or so many, after one that does not count."""
    taken = [[seconds(device, work) for work in works] for _ in range((rounds or ROUNDS) + 1)]
    return [median(times) for times in zip(*taken[1:], strict=True)]


def seconds(device: torch.device, work: Work) -> float:
    """Seconds that one run takes; on a device, by its own clock and as a mean of `REPEATS`."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(REPEATS):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / REPEATS


def fastest_threads(works: Sequence[Work]) -> int:
    """The number of torch's threads with which these copies take the least time now: one, if other
    work on the cores sets a thread aside, for which a copy of a few milliseconds waits."""
    most = torch.get_num_threads()
    taken = dict[int, float]()
    for count in dict.fromkeys((most, max(1, most // 2), 1)):
        with torch_threads(count):
            taken[count] = sum(interleaved(torch.device("cpu"), works, 3))
    return min(taken, key=taken.__getitem__)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch has so many threads; None: as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked(founding: Founding, move: _Move, forced: bool) -> Row:
    if move.wrong is None:
        return move.row
    founding.poison()
    try:
        cast(Transfer, move.run()).synchronize()
        return replace(move.row, wrong=move.wrong())
    except Unsupported as error:
        if forced:
            raise
        return replace(move.row, refused=str(error))
    except Exception as error:  # one backend's failure must not hide what the others do
        return replace(move.row, failed=f"{type(error).__name__}: {error}")


def _plain(f: Founding) -> list[_Move]:
    """The same bytes by plain torch: one dense copy, and indexing layer by layer, both ways."""

    def gather() -> None:
        for chunk, cache in zip(f.chunk.unbind(1), f.read, strict=True):
            chunk.copy_(cache[:, f.slots])

    def scatter() -> None:
        for stored, cache in zip(f.stored.unbind(1), f.written, strict=True):
            cache[:, f.slots] = stored

    tokens = f.scenario.tokens
    return [
        _Move(Row("torch", "copy_", "chunk -> chunk"), partial(f.chunk.copy_, f.stored)),
        _Move(Row("torch", "indexing", f"{tokens} slots -> chunk"), gather),
        _Move(Row("torch", "indexing", f"chunk -> {tokens} slots"), scatter),
    ]


def _moves(f: Founding, backend: str) -> list[_Move]:
    """Gather and scatter: by slots through a connector, by block ids through `copy_blocks`."""
    s = f.scenario
    dense = "kv layer token (head dim)"
    reader, writer = (AdaptiveConnector(f.device, backend) for _ in range(2))
    reader.register_kv_caches(f.pool)
    writer.register_kv_caches(f.target)
    pool, target = (KVView(x, "layer | kv block token head dim") for x in (f.pool, f.target))
    chunk, stored = (KVView(x, dense, heads=s.heads) for x in (f.chunk, f.stored))

    def out(call: str, what: str, ids: torch.Tensor, run: Work) -> _Move:
        row = Row(backend, call, f"{what} -> chunk", s.payload)
        return _Move(row, run, partial(f.wrong_in_chunk, ids))

    def back(call: str, what: str, ids: torch.Tensor, run: Work) -> _Move:
        row = Row(backend, call, f"chunk -> {what}", s.pool)
        return _Move(row, run, partial(f.wrong_in_target, ids))

    slots = (f"{s.tokens} slots", f.slots)
    blocks = (f"{len(f.blocks)} blocks", f.slots_of_blocks)
    index = Index(f.slots)
    by_block = partial(copy_blocks, backend=backend)
    return [
        out("from_gpu", *slots, partial(reader.from_gpu, f.chunk, slot_mapping=index)),
        back("to_gpu", *slots, partial(writer.to_gpu, f.stored, slot_mapping=index)),
        out("copy_blocks", *blocks, partial(by_block, pool, chunk, f.blocks, None)),
        back("copy_blocks", *blocks, partial(by_block, stored, target, None, f.blocks)),
    ]
