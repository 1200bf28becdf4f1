# SPDX-License-Identifier: Apache-2.0
"""An interrupt at any line of a pool loses no block and hands none to two callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.interrupts import files_of, orphans
from support.pinned_runtime import absent
from support.waits import LIMIT

from portakv.host.pool import Block, PinnedPool

STRIDE = 1024
FILES = files_of("host/pool.py")
pytestmark = pytest.mark.filterwarnings("ignore:Blocks were in use:ResourceWarning")
Steps = Iterator[Callable[[], object]]


def scenario(kind: type[PinnedPool]) -> Callable[[Path], Any]:
    """Return the use of a pool: blocks of several sizes, and growth."""

    def steps(_: Path) -> Steps:
        pool = kind(1000, 4, limit=16, grow=4)
        blocks = list[Block]()

        def act() -> None:
            blocks.extend(pool.acquire_many(2))
            blocks.extend(pool.acquire_many(2, nbytes=2000))
            blocks[0].release()
            blocks[2].release(after=SimpleNamespace(done=lambda: True))
            blocks.append(pool.acquire(nbytes=4000, wait=True, timeout=LIMIT))
            blocks[1].release()
            blocks[4].release()
            blocks[3].release()

        yield act
        for block in blocks:
            if block.in_use:
                block.release()
        # A block that was on its way to its caller stays in use, and `leaks` shows it.
        lost = pool.leaks()
        assert all(leak.dropped for leak in lost)
        units = sum(-(-leak.nbytes // STRIDE) for leak in lost)
        assert pool.bytes_used == units * STRIDE
        rest = pool.acquire_many(pool.free)
        assert len({block.address for block in rest}) == len(rest) == pool.blocks - units
        pool.close()

    return steps


class NeverRepairs(PinnedPool):
    """A pool that goes on with what an interrupted change left: the negative control."""

    def _intact_units(self) -> Any:
        return self._units


@pytest.mark.parametrize("kind", [PinnedPool, NeverRepairs])
def test_an_interrupt_loses_no_block(
    kind: type[PinnedPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch)
    left, count = orphans(scenario(kind), tmp_path, FILES, every=True)
    assert bool(left) == (kind is NeverRepairs), left
    assert count > (1 if left else 200)
