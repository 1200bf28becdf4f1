# SPDX-License-Identifier: Apache-2.0
"""Index lists that broke released KV movers: each test names the fault it met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.core_cases import Mover, by_backend, by_runs, noise

from portakv import Index, KVView, SlotError, copy_rows

SCATTERED = pytest.mark.parametrize("scattered", [False, True], ids=["gather", "scatter"])


@pytest.fixture(params=[by_backend, by_runs], ids=["backend", "runs"])
def carry(request: pytest.FixtureRequest) -> Mover:
    found: Mover = request.param
    return found


class Rig:
    """A paged cache of 5 blocks x 4 tokens and a chunk, each between canaries."""

    def __init__(self, tokens: int) -> None:
        self.memory, self.chunk_memory = noise(7, 4, 8), noise(tokens + 8, 8, seed=1)
        self.before, self.chunk_before = self.memory.clone(), self.chunk_memory.clone()
        self.paged = KVView(self.memory[1:6], "block token dim")
        self.dense = KVView(self.chunk_memory[4:-4], "token dim")

    def move(self, carry: Mover, index: Any, scattered: bool) -> None:
        if scattered:
            carry(self.dense, self.paged, None, index)
        else:
            carry(self.paged, self.dense, index, None)

    def copy(self, index: Index, scattered: bool, count: int) -> None:
        if scattered:
            copy_rows(self.dense, self.paged, None, index, count=count).synchronize()
        else:
            copy_rows(self.paged, self.dense, index, None, count=count).synchronize()

    def expect(self, slots: list[int], *, scattered: bool) -> None:
        """The rows of ``slots`` moved, in their order; every other byte is as it was."""
        cache, chunk = self.before[1:6].view(20, 8), self.chunk_before[4:-4]
        at = [i for i, slot in enumerate(slots) if slot >= 0]
        if scattered:
            cache[[slots[i] for i in at]] = chunk[at]
        else:
            chunk[at] = cache[[slots[i] for i in at]]
        assert torch.equal(self.memory, self.before)
        assert torch.equal(self.chunk_memory, self.chunk_before)


LISTS: dict[str, Callable[[list[int]], Any]] = {
    "int64": lambda ids: torch.tensor(ids, dtype=torch.int64),
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "not contiguous": lambda ids: (
        torch.tensor([*ids, *ids], dtype=torch.int64).reshape(2, -1).T.contiguous()[:, 0]
    ),
    "array": lambda ids: np.array(ids, dtype=np.int64),
    "list": lambda ids: ids,
}


@pytest.mark.parametrize("make", LISTS.values(), ids=LISTS.keys())
@SCATTERED
@pytest.mark.parametrize(
    "slots",
    [
        [],
        [13],
        [19, 0],
        [3, 9, 4, 18, 1, 0, 12],
        list(range(20)),
        [4, 5, 6, 7, 12, 13],  # a block and a half
        [3, -1, 9],
        [-1, -1, -1],
        [-7, 2, -(2**31), 19],
    ],
    ids=str,
)
def test_lists_of_any_length_make_and_order(
    carry: Mover, make: Callable[[list[int]], Any], scattered: bool, slots: list[int]
) -> None:
    """Empty, one element, no multiple of the block; int32; not contiguous. A negative slot was
    skipped by one backend and read as the last row by another: here it is skipped by all."""
    rig = Rig(len(slots))
    rig.move(carry, make(slots), scattered)
    rig.expect(slots, scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("slot", [20, 21, 2**31, 2**40, 2**62])
def test_a_slot_past_the_end_moves_nothing(carry: Mover, scattered: bool, slot: int) -> None:
    """A wild write, or a device assert that poisons the context, where nobody looked."""
    rig = Rig(3)
    with pytest.raises(SlotError, match=f"slot {slot}, but the view has 20 slots"):
        rig.move(carry, torch.tensor([1, slot, 2]), scattered)
    rig.expect([-1, -1, -1], scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("block", [5, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("count", [10, 12])
def test_a_block_past_the_end_moves_nothing(scattered: bool, block: int, count: int) -> None:
    """2**62 * 4 is 0 in 64 bits: a wild block must not come back as block 0."""
    rig = Rig(12)
    told = rf"Position 4 .* \(of id {block}, 4 slots each\), .* has 20 slots"
    with pytest.raises(SlotError, match=told):
        rig.copy(Index([0, block, 1], step=4), scattered, count)
    rig.expect([-1] * 12, scattered=scattered)


def test_duplicates_in_a_scatter_are_refused_and_in_a_gather_are_served(carry: Mover) -> None:
    rig = Rig(4)
    with pytest.raises(SlotError, match="Slot 7 occurs 2 times in the destination index"):
        rig.move(by_backend, [7, 3, 7, 1], scattered=True)
    rig.expect([-1] * 4, scattered=True)
    rig.move(carry, [7, 3, 7, 1], scattered=False)
    rig.expect([7, 3, 7, 1], scattered=False)


@SCATTERED
@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 9, 12])
@pytest.mark.parametrize("offset", [0, 1, 4, 6])
def test_a_partial_chunk_is_moved_like_a_whole_one(
    scattered: bool, count: int, offset: int
) -> None:
    """A partial last chunk was taken by the fallback and refused by the kernel: here head and
    tail of the blocks move by token."""
    rig = Rig(12)
    table = Index([3, 0, 4, 1, 2], step=4, offset=offset)
    slots = table.slots(count).tolist() + [-1] * (12 - count)
    rig.copy(table, scattered, count)
    rig.expect(slots, scattered=scattered)


@SCATTERED
@pytest.mark.parametrize("padding", [-1, -7, -(2**31), -(2**62), -(2**63)])
@pytest.mark.parametrize("count", [10, 12])
def test_a_negative_block_skips_its_tokens(scattered: bool, padding: int, count: int) -> None:
    """-2**63 * 4 is 0 in 64 bits: padding must not come back as block 0."""
    rig = Rig(12)
    rig.copy(Index([4, padding, 1], step=4), scattered, count)
    rig.expect([16, 17, 18, 19, *[-1] * 4, *range(4, count - 4)], scattered=scattered)
