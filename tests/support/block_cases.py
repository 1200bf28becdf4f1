# SPDX-License-Identifier: Apache-2.0
"""Paged caches in several layouts, the rows that they hold by plain torch, and the methods of
`copy_blocks`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from portakv import BlockTransfer, KVView, copy_blocks
from portakv.copy.slices import Slices
from portakv.host import pinned
from portakv.tasks import runtime
from support.device_cases import settle
from support.guarded_memory import filled
from support.waits import LIMIT

LAYERS = 3
BLOCKS = 8
SIZE = 4
HEADS = 2
DIM = 16
BLOCK_BYTES = LAYERS * 2 * SIZE * HEADS * DIM * 2
SRC = [5, 0, 7, 2, 3]
DST = [1, 6, 0, 4, 2]
BIG = 1 << 20  # bytes of a block of the large caches
PATIENCE = LIMIT  # seconds that no test should ever take
#: Every method of issuing blocks.
METHODS: dict[str, dict[str, Any]] = {
    "together": {},
    "by layer": {"by_layer": True},
    "detached": {"detached": True},
    "detached by layer": {"detached": True, "by_layer": True},
    "in slices": {"cancellable": True},
    "in slices by layer": {"cancellable": True, "by_layer": True},
    "at a rate": {"max_gbps": 1.0},
}
SLICED = [name for name, options in METHODS.items() if set(options) - {"by_layer", "detached"}]


@dataclass
class Cache:
    """Tensors, a view of them, and their rows ``[layers, kv, slots, row]`` by plain torch."""

    tensors: Any
    view: KVView
    size: int

    def rows(self) -> torch.Tensor:
        """Return a copy on the host with int16 elements."""
        if isinstance(self.tensors, list):
            stacked = torch.stack([x.cpu().view(torch.int16) for x in self.tensors])
        else:
            stacked = self.tensors.cpu().view(torch.int16).permute(1, 2, 0, 3, 4, 5)
        return stacked.reshape(LAYERS, 2, -1, HEADS * DIM).clone()

    def slots(self, blocks: Sequence[int]) -> list[int]:
        """Return the slots of some blocks."""
        return [block * self.size + token for block in blocks for token in range(self.size)]


def layered(
    device: torch.device | str = "cpu", pin: bool = False, blocks: int = BLOCKS, size: int = SIZE
) -> Cache:
    """Return a list over layers of ``(2, blocks, size, HEADS, DIM)``, each a separate
    allocation."""
    shape = (2, blocks, size, HEADS, DIM)
    tensors = [_placed(filled(shape, device=device), pin) for _ in range(LAYERS)]
    return Cache(tensors, KVView(tensors, "layer | kv block token head dim"), size)


def block_first(
    device: torch.device | str = "cpu", pin: bool = False, blocks: int = BLOCKS, size: int = SIZE
) -> Cache:
    """Return one tensor ``(blocks, LAYERS, 2, size, HEADS, DIM)``."""
    tensor = _placed(filled((blocks, LAYERS, 2, size, HEADS, DIM), device=device), pin)
    return Cache(tensor, KVView(tensor, "block layer kv token head dim"), size)


class Pair:
    """Two caches, blocks to copy from the first to the second, and the rows expected in the
    second."""

    def __init__(
        self,
        src: Cache,
        dst: Cache,
        src_ids: Sequence[int] = SRC,
        dst_ids: Sequence[int] = DST,
    ) -> None:
        self.src = src
        self.dst = dst
        self.ids = (src_ids, dst_ids)
        self.expected = wanted(src, dst, src_ids, dst_ids)

    def start(self, src_ids: Any = None, dst_ids: Any = None, **options: Any) -> BlockTransfer:
        """Return the transfer; the caller may pass its ids in another form."""
        src_ids = self.ids[0] if src_ids is None else src_ids
        dst_ids = self.ids[1] if dst_ids is None else dst_ids
        return copy_blocks(self.src.view, self.dst.view, src_ids, dst_ids, **options)

    def landed(self) -> bool:
        """Return True if the destination holds the expected rows."""
        return torch.equal(self.dst.rows(), self.expected)


def pair(device: torch.device, store: bool, pin: bool = True, *ids: Sequence[int]) -> Pair:
    """Return caches of a device and of the host in different layouts, with nothing under way."""
    there = layered(device)
    here = block_first(pin=pin and device.type != "cpu")
    settle(device)
    return Pair(there, here, *ids) if store else Pair(here, there, *ids)


def inside(device: torch.device) -> Pair:
    """Return caches of a device in different layouts, with nothing under way."""
    there = layered(device)
    here = block_first(device)
    settle(device)
    return Pair(there, here)


def _placed(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    return tensor.pin_memory() if pin else tensor


def wanted(
    src: Cache, dst: Cache, src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> torch.Tensor:
    """Return the destination's rows after the blocks are copied; a negative id skips its
    positions."""
    result = dst.rows()
    rows = src.rows()
    src_slots = src.slots(src_blocks)
    dst_slots = dst.slots(dst_blocks)
    for a, b in zip(src_slots, dst_slots, strict=True):
        if a >= 0 and b >= 0:
            result[:, :, b] = rows[:, :, a]
    return result


def until(true: Callable[[], bool]) -> None:
    """Wait for an effect of another thread."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def copies_in_slices() -> list[Slices]:
    """Return the copies in slices that have not ended."""
    known = [each for each in runtime().shut_at_exit if isinstance(each, Slices)]
    return [each for each in known if each.ended_at is None]


def large(blocks: int, layers: int, device: torch.device | str) -> tuple[torch.Tensor, KVView]:
    """Return ``layers * blocks`` blocks of `BIG` bytes; on the host pinned, outside torch's
    allocator."""
    shape = (layers, blocks, 1, BIG // 4)
    if device == "cpu":
        tensor = pinned.empty(shape, torch.int32).zero_()
    else:
        tensor = torch.zeros(shape, dtype=torch.int32, device=device)
    return tensor, KVView(tensor, "layer block token dim")


def numbered(tensor: torch.Tensor) -> torch.Tensor:
    """Number the blocks, one number for each block of each layer."""
    count = tensor.shape[0] * tensor.shape[1]
    numbers = torch.arange(1, count + 1, dtype=torch.int32, device=tensor.device)
    return tensor.copy_(numbers.view(*tensor.shape[:2], 1, 1))


def holds(tensor: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Return True if each block holds its number throughout."""
    return bool((tensor == numbers.to(tensor.device).view(*tensor.shape[:2], 1, 1)).all())
