# SPDX-License-Identifier: Apache-2.0
"""The demo's second part: each backend's copies of the founding scenario, checked and timed.

The copies and plain torch are timed alternately, in rounds.
"""

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
from portakv.copy.rows import copy_blocks
from portakv.errors import Unsupported
from portakv.host.pinned import available
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

#: The content of destinations before a copy; random bits do not repeat it.
POISON = 0x5A5AC3C35A5AC3C3


@dataclass(frozen=True)
class Scenario:
    """Paged caches ``[2, blocks, block_size, heads, dim]`` in fp16, and the tokens to move."""

    layers: int = 32
    tokens: int = 128
    heads: int = 32
    dim: int = 128
    block_size: int = 16
    blocks: int = 32
    full_layers: int = 0  # the layers before `fitted` reduced them; 0: ``layers``

    @property
    def slots(self) -> int:
        """Return the tokens that fit the pool."""
        return self.blocks * self.block_size

    @property
    def payload(self) -> int:
        """Return the bytes that one copy moves."""
        return self.layers * 2 * self.tokens * self.heads * self.dim * 2

    @property
    def pool(self) -> int:
        """Return the bytes of the paged caches."""
        return self.payload // self.tokens * self.slots

    @property
    def needed(self) -> int:
        """Return the bytes that the demo needs: two pools, three chunks, and memory for checks."""
        return 2 * self.pool + 3 * self.payload + 4 * self.pool // self.layers


#: The first scenario of PortaKV.
FOUNDING = Scenario()


def fitted(scenario: Scenario, free: int | None) -> Scenario:
    """Return the scenario, with fewer layers if it needs more than half of ``free`` bytes."""
    reduced = scenario
    while free is not None and reduced.layers > 1 and reduced.needed > free // 2:
        reduced = replace(reduced, layers=reduced.layers // 2, full_layers=scenario.layers)
    return reduced


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on ``device``; None if the system does not report them."""
    with suppress(OSError, AttributeError):  # no /proc, or a module without `mem_get_info`
        if device.type == "cpu":
            return available()
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return None


class Founding:
    """A scenario's tensors.

    Attributes:
        pool, target: the paged caches that are read, with random bits, and written. ``read`` and
            ``written`` are their rows: for each layer ``[2, slots, heads * dim]``.
        stored, chunk: the dense chunks ``[2, layers, tokens, heads * dim]`` that are read, with
            random bits, and written.
        slots, blocks: slots of tokens and ids of blocks, in random order, int64 on the device.
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
        """Fill both destinations with `POISON`, which no copy writes."""
        for tensor in (*self.target, self.chunk):
            tensor.view(torch.int64).fill_(POISON)

    def wrong_in_chunk(self, slots: torch.Tensor) -> int:
        """Return the bytes of ``chunk`` that differ from the rows of ``pool`` at ``slots``."""
        chunk = self.chunk.unbind(1)
        return sum(_differing(x, y[:, slots]) for x, y in zip(chunk, self.read, strict=True))

    def wrong_in_target(self, slots: torch.Tensor) -> int:
        """Return the bytes of ``target`` that differ from ``stored`` at ``slots``, else poison."""
        wrong = 0
        for stored, written in zip(self.stored.unbind(1), self.written, strict=True):
            expected = torch.full_like(written.view(torch.int64), POISON).view(written.dtype)
            expected[:, slots] = stored
            wrong += _differing(written, expected)
        return wrong


def _random_bits(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Return random fp16 bit patterns, drawn on the CPU: the same bits for every device."""
    bits = torch.empty((*shape[:-1], shape[-1] // 4), dtype=torch.int64)
    return bits.random_(-(2**63), None, generator=draw).view(torch.float16)


def _differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the number of bytes that differ, also in bits of NaNs."""
    if torch.equal(actual.view(torch.int64), expected.view(torch.int64)):
        return 0  # takes a tenth of the time of the comparison below
    return int((actual.view(torch.uint8) != expected.view(torch.uint8)).sum())


ROUNDS = 9
#: Copies between two events on a device, so that the host's part of the first counts little.
REPEATS = 10

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    backend: str  # the name; "torch" for plain torch with the same bytes
    call: str
    route: str  # the source and destination, in words
    checked: int = 0  # compared bytes
    wrong: int = 0  # bytes that differ from those of plain torch indexing
    refused: str | None = None  # why the backend does not accept this copy, by its message
    failed: str | None = None  # the error of the copy
    seconds: float | None = None  # the median time of one copy; None if it was not timed
    ratio: float | None = None  # the seconds of ``copy_`` / ``seconds``; 1 is as fast

    @property
    def good(self) -> bool:
        """Return True unless bytes were wrong or the copy failed; it may be rejected."""
        return not self.wrong and not self.failed

    @property
    def right(self) -> bool:
        """Return True if bytes were compared and all are right."""
        return self.good and not self.refused and self.checked > 0


class _Move(NamedTuple):
    """A copy, and the function that counts its wrong bytes; None for plain torch."""

    row: Row
    run: Work
    wrong: Callable[[], int] | None = None


def measured(
    founding: Founding, backends: Sequence[str], forced: bool
) -> tuple[list[Row], int | None]:
    """Check every copy of every backend, then time the right copies in rounds.

    Returns:
        A row for each copy, plain torch first and `copy_` before all; and the number of CPU
        threads, or None on an accelerator.

    Raises:
        Unsupported: a ``forced`` backend does not accept a copy.
    """
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
    """Return each work's median seconds in ``rounds`` or `ROUNDS` rounds, after a warm-up round."""
    taken = [[seconds(device, work) for work in works] for _ in range((rounds or ROUNDS) + 1)]
    return [median(times) for times in zip(*taken[1:], strict=True)]


def seconds(device: torch.device, work: Work) -> float:
    """Return the seconds of one run; on a device by its events, as a mean of `REPEATS` runs."""
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
    """Return the number of torch's threads with which these copies take the least time now.

    One thread can be the fastest if the cores have other work: a copy of a few milliseconds waits
    for the slowest thread.
    """
    most = torch.get_num_threads()
    taken = dict[int, float]()
    for count in dict.fromkeys((most, max(1, most // 2), 1)):
        with torch_threads(count):
            taken[count] = sum(interleaved(torch.device("cpu"), works, 3))
    return min(taken, key=taken.__getitem__)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads inside the context; None changes nothing."""
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
    except Exception as error:  # the failure of a backend must not hide the results of the others
        return replace(move.row, failed=f"{type(error).__name__}: {error}")


def _plain(f: Founding) -> list[_Move]:
    """Return copies of the same bytes by plain torch: one dense copy, and indexing by layers."""

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
    """Return gather and scatter, by slots with a connector and by block ids with `copy_blocks`."""
    s = f.scenario
    dense = "kv layer token (head dim)"
    reader, writer = (AdaptiveConnector(f.device, backend) for _ in range(2))
    reader.register_kv_caches(f.pool)
    writer.register_kv_caches(f.target)
    pool, target = (KVView(x, "layer | kv block token head dim") for x in (f.pool, f.target))
    chunk, stored = (KVView(x, dense, heads=s.heads) for x in (f.chunk, f.stored))

    def out(call: str, rows: str, ids: torch.Tensor, run: Work) -> _Move:
        row = Row(backend, call, f"{rows} -> chunk", s.payload)
        return _Move(row, run, partial(f.wrong_in_chunk, ids))

    def back(call: str, rows: str, ids: torch.Tensor, run: Work) -> _Move:
        row = Row(backend, call, f"chunk -> {rows}", s.pool)
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
