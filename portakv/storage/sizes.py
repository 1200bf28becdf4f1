# SPDX-License-Identifier: Apache-2.0
"""The sizes of the tasks of a block store, and of the steps in which a call is planned."""

from __future__ import annotations

from collections.abc import Sequence

#: Bytes of a task of a save, and of a load, unless a block is larger. A load in 16 MiB pieces left
#: a disk's queue too short on an H200 machine: 1.6 GB/s, by 32 MiB 2.1. An urgent load waits for
#: one piece of a save.
SAVED = 16 << 20
LOADED = 32 << 20
#: Bytes of a task of a save whose copy was issued and that no tier stores: each task takes the
#: host some 0.1 ms.
ISSUED = 128 << 20
#: Bytes up to which tasks share no work of a call.
SHARED = 1 << 20
#: Blocks of a task at most: the end of a task takes the graph's lock for 4 us a block, and urgent
#: work waits for it.
BLOCKS = 256
#: Blocks of a call that are planned before others may take the graph's lock.
SLICE = 256
#: Bytes of the first part of a copy that a caller's thread issues; a copy of less than twice as
#: many is one part.
FIRST_PART = 32 << 20
#: Bytes of a block below which a read keeps the interpreter more than the disk.
SMALL = 64 << 10


def task_blocks(
    blocks: list[int], size: int, nbytes: int, rows: int, least: int, widths: Sequence[int]
) -> list[list[int]]:
    """Return the blocks of each task, at most ``nbytes`` and ``rows`` of them.

    At least ``least`` tasks share the blocks, or all workers of a queue of some width. Few bytes
    are one task, unless the workers share them, as each task costs its steps.
    """
    if len(blocks) * size <= SHARED:
        least = 1
    share = -(-len(blocks) // max([least, *widths]))
    most = max(1, min(rows, nbytes // size, share, BLOCKS))
    return [blocks[first : first + most] for first in range(0, len(blocks), most)]


def copy_parts(many: int, nbytes: int) -> list[slice]:
    """Return the parts of a copy of so many blocks, each of ``nbytes``.

    The first part is short, so that its copy begins soon. Each next part has twice as many blocks.
    """
    most = max(1, FIRST_PART // nbytes)
    parts = list[slice]()
    first = 0
    while many - first > 2 * most:
        parts.append(slice(first, first + most))
        first += most
        most *= 2
    return [*parts, slice(first, many)]
