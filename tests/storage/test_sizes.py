# SPDX-License-Identifier: Apache-2.0
"""The sizes of tasks, and of the parts of a copy."""

from __future__ import annotations

from itertools import pairwise

import pytest

from portakv.storage.calls import BLOCKS, task_blocks
from portakv.storage.memory import FIRST_PART, copy_parts

MB = 1 << 20


@pytest.mark.parametrize("many", [0, 1, 2, 31, 32, 33, 1000, 4096])
@pytest.mark.parametrize("nbytes", [1, 640 << 10, 2 * MB, 100 * MB])
def test_parts_cover_all_blocks_and_grow(many: int, nbytes: int) -> None:
    parts = copy_parts(many, nbytes)
    covered = [number for part in parts for number in range(many)[part]]
    assert covered == [*range(many)]
    counts = [part.stop - part.start for part in parts]
    if len(parts) > 1:
        assert counts[0] == max(1, FIRST_PART // nbytes)
        assert all(after >= before for before, after in pairwise(counts))
        assert all(after == 2 * one for one, after in pairwise(counts[:-1]))


def test_a_short_copy_is_one_part() -> None:
    assert copy_parts(8, 2 * MB) == [slice(0, 8)]
    assert len(copy_parts(33, 2 * MB)) == 2


def test_few_bytes_are_one_task_unless_workers_share_them() -> None:
    eight = [*range(8)]
    assert task_blocks(eight, 4096, 32 * MB, 512, 2, ()) == [eight]
    assert task_blocks(eight, 2 * MB, 32 * MB, 512, 2, ()) == [eight[:4], eight[4:]]
    assert [len(x) for x in task_blocks(eight, 4096, 32 * MB, 512, 2, (4,))] == [2, 2, 2, 2]


def test_a_task_is_bounded_by_blocks_bytes_and_rows() -> None:
    many = [*range(2000)]
    assert {len(x) for x in task_blocks(many, 4096, 32 * MB, 4096, 1, ())} == {
        BLOCKS,
        2000 % BLOCKS,
    }
    assert {len(x) for x in task_blocks(many, 2 * MB, 16 * MB, 4096, 1, ())} == {8}
    assert {len(x) for x in task_blocks(many, 4096, 32 * MB, 10, 1, ())} == {10}
    assert {len(x) for x in task_blocks(many, 64 * MB, 16 * MB, 10, 1, ())} == {1}
