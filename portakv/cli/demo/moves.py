# SPDX-License-Identifier: Apache-2.0
"""The demo's second part, how it is moved: each backend's copies, checked, then timed in rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from portakv.blocks.blocks import copy_blocks
from portakv.cli.demo.scenario import Founding
from portakv.cli.demo.timing import interleaved
from portakv.connector.connector import AdaptiveConnector
from portakv.errors import Unsupported
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        backend: its name; "torch" for a plain ``copy_`` of the same bytes.
        call: the call that was made.
        way: what it moved, in words.
        checked: bytes that were compared.
        wrong: bytes that are not what plain torch indexing says.
        refused: why the backend does not take this copy, in its own words; empty otherwise.
        failed: what it raised instead of copying; empty otherwise.
        seconds: the median time of one copy; None where it was not timed.
        ratio: the median, over rounds, of the time of ``copy_`` by this one's: 1 is as fast.
    """

    backend: str
    call: str
    way: str
    checked: int = 0
    wrong: int = 0
    refused: str = ""
    failed: str = ""
    seconds: float | None = None
    ratio: float | None = None

    @property
    def good(self) -> bool:
        """True unless bytes were wrong or it failed; a copy may be refused."""
        return not self.wrong and not self.failed

    @property
    def right(self) -> bool:
        """True where bytes were compared and all were right."""
        return self.good and not self.refused and self.checked > 0

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {**asdict(self), "refused": self.refused or None, "failed": self.failed or None}


@dataclass(frozen=True)
class _Move:
    """A copy that can be run again and again, and the check of what it left behind."""

    row: Row
    run: Callable[[], Transfer]
    wrong: Callable[[], int]


def measured(founding: Founding, backends: Sequence[str], forced: bool) -> list[Row]:
    """Check every copy of every backend, then time in rounds those that were right.

    Args:
        forced: a copy that the backend does not take is an error, not a row.

    Returns:
        One row for each copy; the first is ``copy_``.

    Raises:
        Unsupported: only where ``forced``.
    """
    moves = [move for name in backends for move in _moves(founding, name)]
    rows = [_checked(founding, move, forced) for move in moves]
    timed = [i for i, row in enumerate(rows) if row.right]
    plain, times = interleaved(
        founding.device,
        partial(founding.chunk.copy_, founding.stored),
        [moves[i].run for i in timed],
    )
    for i, (seconds, ratio) in zip(timed, times, strict=True):
        rows[i] = replace(rows[i], seconds=seconds, ratio=ratio)
    return [Row("torch", "copy_", "chunk -> chunk", seconds=plain, ratio=1.0), *rows]


def _checked(founding: Founding, move: _Move, forced: bool) -> Row:
    founding.poison()
    try:
        move.run().synchronize()
        return replace(move.row, wrong=move.wrong())
    except Unsupported as error:
        if forced:
            raise
        return replace(move.row, refused=str(error))
    except Exception as error:  # one backend's failure must not hide what the others do
        return replace(move.row, failed=f"{type(error).__name__}: {error}")


def _moves(f: Founding, backend: str) -> list[_Move]:
    """Gather and scatter: by slots through a connector, by block ids through `copy_blocks`."""
    s = f.scenario
    reader, writer = (AdaptiveConnector(f.device, backend) for _ in range(2))
    reader.register_kv_caches(f.pool)
    writer.register_kv_caches(f.target)
    slots = Index(f.slots)
    pool, target = (KVView(x, "layer | kv block token head dim") for x in (f.pool, f.target))
    chunk, stored = (
        KVView(x, "kv layer token (head dim)", heads=s.heads) for x in (f.chunk, f.stored)
    )
    by_block = partial(copy_blocks, backend=backend)

    def move(call: str, way: str, run: Callable[[], Transfer], ids: Any, out: bool) -> _Move:
        row = Row(backend, call, way, checked=s.payload if out else s.pool)
        return _Move(row, run, partial(f.wrong_in_chunk if out else f.wrong_in_target, ids))

    return [
        move("from_gpu", f"{s.tokens} slots -> chunk",
             partial(reader.from_gpu, f.chunk, slot_mapping=slots), f.slots, True),
        move("to_gpu", f"chunk -> {s.tokens} slots",
             partial(writer.to_gpu, f.stored, slot_mapping=slots), f.slots, False),
        move("copy_blocks", f"{len(f.blocks)} blocks -> chunk",
             partial(by_block, pool, chunk, f.blocks, None), f.slots_of_blocks, True),
        move("copy_blocks", f"chunk -> {len(f.blocks)} blocks",
             partial(by_block, stored, target, None, f.blocks), f.slots_of_blocks, False),
    ]  # fmt: skip
