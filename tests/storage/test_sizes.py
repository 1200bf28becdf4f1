# SPDX-License-Identifier: Apache-2.0
"""The sizes of tasks."""

from __future__ import annotations

from portakv.storage.calls import BLOCKS, task_blocks

MB = 1 << 20


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
