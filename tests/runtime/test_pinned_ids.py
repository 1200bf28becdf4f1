# SPDX-License-Identifier: Apache-2.0
"""The pool of short lists of ids in pinned memory."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.simdev_cases import DEVICE

from portakv.runtime.pinned_ids import PinnedIds
from portakv.view.addresses import RawMemory


class Pool(PinnedIds):
    """A separate pool."""

    _free: ClassVar = deque[PinnedIds]()
    _reserved = False


@pytest.mark.simdev
def test_lists_are_reserved_once_and_hold_what_is_written() -> None:
    assert Pool.acquire() is None
    Pool.reserve()
    Pool.reserve()
    taken = []
    while (listed := Pool.acquire()) is not None:
        taken.append(listed)
    assert len(taken) == 64
    written = [
        (each.write(0, np.array([n, n + 1])), each.write(1, np.arange(PinnedIds.MOST) + n))
        for n, each in enumerate(taken)
    ]
    memory = RawMemory(torch.int64, 8 * PinnedIds.MOST)
    for n, (few, many) in enumerate(written):
        (ids,) = memory.tensors([few.data_ptr()], DEVICE)
        assert ids[:2].tolist() == [n, n + 1]
        (ids,) = memory.tensors([many.data_ptr()], DEVICE)
        assert ids[-1] == n + PinnedIds.MOST - 1
    with pytest.raises(ValueError, match="structures"):
        taken[0].write(0, np.arange(PinnedIds.MOST + 1))
    for each in taken:
        each.release()
    assert Pool.acquire() is taken[-1]


@pytest.mark.simdev
def test_without_pinned_memory_there_are_no_lists() -> None:
    class Huge(Pool):
        MOST = 1 << 50
        _free: ClassVar = deque[PinnedIds]()

    Huge.reserve()
    assert Huge.acquire() is None
