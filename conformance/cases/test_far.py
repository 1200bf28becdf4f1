# SPDX-License-Identifier: Apache-2.0
"""Rows far from their address: byte offsets, and products of slots and strides, have 64 bits.

On the CPU the memory is mapped and only the rows that are touched exist, so that gigabytes cost
nothing. On a device it has to be there (profile `full`).
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from portakv_conformance.claims import full
from portakv_conformance.judging import Judge
from portakv_conformance.pattern import pattern_bytes
from portakv_conformance.subject import Subject

from portakv import Index, KVView, Unsupported

pytestmark = pytest.mark.area("safety")

DIRECTIONS = ("gather", "scatter")
GIB = 1 << 30
_NORESERVE = 0x4000  # Linux; not named by every Python's mmap
_HEADS, _DIM, _SIZE = 2, 64, 2  # of uint8: a block of 256 B


def mapped(nbytes: int) -> torch.Tensor:
    """Zeros of which only the pages that are touched take memory, uint8."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def far_blocks(memory: torch.Tensor, stride: int, blocks: int) -> torch.Tensor:
    """One plane ``[blocks, block_size, heads, dim]`` whose blocks lie ``stride`` bytes apart."""
    sizes = (blocks, _SIZE, _HEADS, _DIM)
    return memory.as_strided(sizes, (stride, _HEADS * _DIM, _DIM, 1))


def check(
    judge: Judge, direction: str, plane: torch.Tensor, slots: list[int], layout: str, **extents: Any
) -> None:
    """Copy rows of one far plane to a dense chunk or back, and compare them by plain indexing."""
    device, size = plane.device, plane.shape[-3]
    shape = (len(slots), _HEADS, _DIM)
    fresh = torch.from_numpy(pattern_bytes(judge.seed, 1, len(slots) * _HEADS * _DIM).copy())
    wanted = fresh.view(shape).to(device)
    dense = torch.full(shape, 0xA5, dtype=torch.uint8).to(device)
    cache = KVView(plane, layout, **extents)
    chunk = KVView(dense, "token head dim")
    where = [(slot // size, slot % size) if plane.dim() == 4 else (slot,) for slot in slots]
    try:
        if direction == "gather":
            for at, row in zip(where, wanted, strict=True):
                plane[at] = row
            judge.finish(judge.subject.copy(cache, chunk, Index(slots)))
            found = dense
        else:
            dense.copy_(wanted)
            judge.finish(judge.subject.copy(chunk, cache, None, Index(slots)))
            found = torch.stack([plane[at] for at in where])
    except Unsupported as error:
        judge.declined.append(str(error))
        return
    for slot, row, right in zip(slots, found.cpu(), wanted.cpu(), strict=True):
        assert torch.equal(row, right), (
            f"The row of slot {slot}, {slot // size * plane.stride(0)} bytes behind its address, "
            f"was not moved right: an offset or a product of it was cut."
        )
    judge.examples += 1


@pytest.mark.needs("host")
@pytest.mark.parametrize("stride", [2**31 + 256, 2**32 + 256, 2**33 + 4096, 2**35 + 256])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_that_lie_far_apart(judge: Judge, direction: str, stride: int) -> None:
    """A block may lie any number of bytes behind the one before it."""
    plane = far_blocks(mapped(2 * stride + 4096), stride, 3)
    check(judge, direction, plane, [5, 0, 2, 3], "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slots_that_are_far_out(judge: Judge, direction: str) -> None:
    """The product of a slot and a row's bytes passes 2**31, 2**32 and 2**33."""
    row = _HEADS * _DIM
    slots = (2**33 + 2**20) // row
    plane = mapped(slots * row).view(slots // _SIZE, _SIZE, _HEADS, _DIM)
    picked = [slots - 1, 0, 2**31 // row, 2**32 // row + 3, 2**33 // row + 5, 1]
    check(judge, direction, plane, picked, "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_that_lie_far_apart(judge: Judge, direction: str) -> None:
    """Planes of one allocation may lie gigabytes apart."""
    stride, slots = 2**32 + 512, [3, 0, 2]
    memory = mapped(2 * stride + 4096)
    plane = memory.as_strided((3, 2, _SIZE, _HEADS, _DIM), (stride, 256, 128, _DIM, 1))
    chunk = torch.full((3, 3, _HEADS, _DIM), 0xA5, dtype=torch.uint8)
    fresh = torch.from_numpy(pattern_bytes(judge.seed, 1, chunk.numel()).copy()).view(chunk.shape)
    cache, dense = (
        KVView(plane, "layer block token head dim"),
        KVView(chunk, "layer token head dim"),
    )
    try:
        if direction == "gather":
            for at, slot in enumerate(slots):
                plane[:, slot // _SIZE, slot % _SIZE] = fresh[:, at]
            judge.finish(judge.subject.copy(cache, dense, Index(slots)))
            found = chunk
        else:
            chunk.copy_(fresh)
            judge.finish(judge.subject.copy(dense, cache, None, Index(slots)))
            rows = [plane[:, slot // _SIZE, slot % _SIZE] for slot in slots]
            found = torch.stack(rows, dim=1)
    except Unsupported as error:
        judge.declined.append(str(error))
        return
    for layer in range(3):
        assert torch.equal(found[layer], fresh[layer]), (
            f"Layer {layer}, {layer * stride} bytes behind the address, was not moved right."
        )
    judge.examples += 1


@full
@pytest.mark.needs("memory")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_blocks_on_a_device(subject: Subject, judge: Judge, direction: str) -> None:
    """On a device too, a block may lie more than 2**32 bytes behind the first."""
    stride = 2**32 + 256
    memory = torch.zeros(stride + 4096, dtype=torch.uint8, device=subject.device)
    plane = far_blocks(memory, stride, 2)
    check(judge, direction, plane, [3, 0, 2], "block token head dim")
    del plane, memory
    judge.facility.release()
