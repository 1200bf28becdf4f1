# SPDX-License-Identifier: Apache-2.0
"""The demo's second part, how it is moved: each backend's copies, checked, then timed in rounds in
which plain torch takes turns with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from portakv.blocks.blocks import copy_blocks
from portakv.cli.demo.scenario import Founding
from portakv.connector.connector import AdaptiveConnector
from portakv.errors import Unsupported
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

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
    refused: str = ""  # why the backend does not take this copy, in its own words
    failed: str = ""  # what it raised instead of copying
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

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {**asdict(self), "refused": self.refused or None, "failed": self.failed or None}


class _Move(NamedTuple):
    """A copy that can be run again and again, and the check of what it left behind; None: it is
    plain torch, and the check itself."""

    row: Row
    run: Work
    wrong: Callable[[], int] | None = None


def measured(
    founding: Founding, backends: Sequence[str], forced: bool
) -> tuple[list[Row], int | None]:
    """Check every copy of every backend, then time in rounds those that were right.

    Returns:
        One row for each copy, those of plain torch first, `copy_` before all; and how many CPU
        threads all were timed with, None on an accelerator.

    Raises:
        Unsupported: a copy that the backend does not take, if it is ``forced``; else it is a row.
    """
    moves = [*_plain(founding), *(move for name in backends for move in _moves(founding, name))]
    rows = [_checked(founding, move, forced) for move in moves]
    timed = [i for i, row in enumerate(rows) if row.right or row.backend == "torch"]
    works = [moves[i].run for i in timed]
    threads = _fastest_threads(works) if founding.device.type == "cpu" else None
    with _threads(threads):
        times = interleaved(founding.device, works)
    for i, own in zip(timed, times, strict=True):
        rows[i] = replace(rows[i], seconds=own, ratio=times[0] / own)
    return rows, threads


def interleaved(device: torch.device, works: Sequence[Work], rounds: int = 0) -> list[float]:
    """Each work's median seconds over `ROUNDS` rounds, or so many, in which all take turns, after
    one round that does not count."""
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


def _fastest_threads(works: Sequence[Work]) -> int:
    """The number of torch's threads with which these copies take the least time now. With other
    work on the cores one thread is: copies of a few milliseconds wait for the thread that the
    system has set aside."""
    most, taken = torch.get_num_threads(), dict[int, float]()
    for count in dict.fromkeys((most, max(1, most // 2), 1)):
        with _threads(count):
            taken[count] = sum(interleaved(torch.device("cpu"), works, 3))
    return min(taken, key=taken.__getitem__)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
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
        transfer = move.run()
        assert isinstance(transfer, Transfer)
        transfer.synchronize()
        return replace(move.row, wrong=move.wrong())
    except Unsupported as error:
        if forced:
            raise
        return replace(move.row, refused=str(error))
    except Exception as error:  # one backend's failure must not hide what the others do
        return replace(move.row, failed=f"{type(error).__name__}: {error}")


def _plain(f: Founding) -> list[_Move]:
    """The same bytes by plain torch: one dense copy, and indexing layer by layer, both ways."""
    source, target = ([x.flatten(1, 2).flatten(2) for x in pool] for pool in (f.pool, f.target))

    def gather() -> None:
        for layer, cache in enumerate(source):
            f.chunk[:, layer] = cache[:, f.slots]

    def scatter() -> None:
        for layer, cache in enumerate(target):
            cache[:, f.slots] = f.stored[:, layer]

    tokens = f.scenario.tokens
    return [
        _Move(Row("torch", "copy_", "chunk -> chunk"), partial(f.chunk.copy_, f.stored)),
        _Move(Row("torch", "indexing", f"{tokens} slots -> chunk"), gather),
        _Move(Row("torch", "indexing", f"chunk -> {tokens} slots"), scatter),
    ]


def _moves(f: Founding, backend: str) -> list[_Move]:
    """Gather and scatter: by slots through a connector, by block ids through `copy_blocks`."""
    s = f.scenario
    reader, writer = (AdaptiveConnector(f.device, backend) for _ in range(2))
    reader.register_kv_caches(f.pool)
    writer.register_kv_caches(f.target)
    pool, target = (KVView(x, "layer | kv block token head dim") for x in (f.pool, f.target))
    chunk, stored = (
        KVView(x, "kv layer token (head dim)", heads=s.heads) for x in (f.chunk, f.stored)
    )

    def move(call: str, what: str, out: bool, ids: torch.Tensor, run: Work) -> _Move:
        way, checked = (f"{what} -> chunk", s.payload) if out else (f"chunk -> {what}", s.pool)
        wrong = f.wrong_in_chunk if out else f.wrong_in_target
        return _Move(Row(backend, call, way, checked), run, partial(wrong, ids))

    slots, blocks = f"{s.tokens} slots", f"{len(f.blocks)} blocks"
    index, by_block = Index(f.slots), partial(copy_blocks, backend=backend)
    return [
        move("from_gpu", slots, True, f.slots,
             partial(reader.from_gpu, f.chunk, slot_mapping=index)),
        move("to_gpu", slots, False, f.slots,
             partial(writer.to_gpu, f.stored, slot_mapping=index)),
        move("copy_blocks", blocks, True, f.slots_of_blocks,
             partial(by_block, pool, chunk, f.blocks, None)),
        move("copy_blocks", blocks, False, f.slots_of_blocks,
             partial(by_block, stored, target, None, f.blocks)),
    ]  # fmt: skip
