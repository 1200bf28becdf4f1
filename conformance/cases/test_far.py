# SPDX-License-Identifier: Apache-2.0
"""Rows far from their address: byte offsets, and products of slots and strides, have 64 bits.

On the CPU the memory is mapped and only the rows that are touched exist, so that gigabytes cost
nothing. On a device it has to be there (profile `full`).
"""

from __future__ import annotations

import mmap
from math import prod
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
_ODD = 131  # bytes of a row that nothing divides


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
    size = plane.shape[1] if plane.dim() == 4 else 1
    shape = (len(slots), *plane.shape[-2:])
    wanted = fresh(judge, shape).to(plane.device)
    dense = torch.full(shape, 0xA5, dtype=torch.uint8).to(plane.device)
    cache = KVView(plane, layout, **extents)
    chunk = KVView(dense, "token head dim")
    where = [(slot // size, slot % size) if plane.dim() == 4 else (slot,) for slot in slots]
    if direction == "gather":
        for at, row in zip(where, wanted, strict=True):
            plane[at] = row
        carried = carry(judge, cache, chunk, Index(slots), Index())
        found = dense
    else:
        dense.copy_(wanted)
        carried = carry(judge, chunk, cache, Index(), Index(slots))
        found = torch.stack([plane[at] for at in where])
    if not carried:
        return
    for slot, row, right in zip(slots, found.cpu(), wanted.cpu(), strict=True):
        assert torch.equal(row, right), (
            f"The row of slot {slot}, {slot // size * plane.stride(0)} bytes behind its address, "
            f"was not moved right: an offset or a product of it was cut."
        )
    judge.examples += 1


def fresh(judge: Judge, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes of the pattern on the host."""
    return torch.from_numpy(pattern_bytes(judge.seed, 1, prod(shape)).copy()).view(shape)


def carry(
    judge: Judge, src: KVView, dst: KVView, mine: Index, theirs: Index, count: int | None = None
) -> bool:
    """Copy, and wait for it; False where the backend declines the plan."""
    try:
        judge.finish(judge.subject.copy(src, dst, mine, theirs, count=count))
    except Unsupported as error:
        judge.may_decline(error, src, dst, mine, theirs)
        return False
    return True


@pytest.mark.needs("host")
@pytest.mark.parametrize("stride", [2**31 + 256, 2**32 + 256, 2**33 + 4096, 2**35 + 256])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_that_lie_far_apart(judge: Judge, direction: str, stride: int) -> None:
    """A block may lie any number of bytes behind the one before it."""
    plane = far_blocks(mapped(2 * stride + 4096), stride, 3)
    check(judge, direction, plane, [5, 0, 2, 3], "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("rows", [(_HEADS, _DIM), (1, _ODD)], ids=["even", "odd"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slots_that_are_far_out(judge: Judge, direction: str, rows: tuple[int, int]) -> None:
    """The product of a slot and a row's bytes passes 2**31, 2**32 and 2**33, whatever divides the
    row."""
    row = prod(rows)
    slots = (2**33 + 2**20) // row // _SIZE * _SIZE
    plane = mapped(slots * row).view(slots // _SIZE, _SIZE, *rows)
    picked = [slots - 1, 0, 2**31 // row, 2**32 // row + 3, 2**33 // row + 5, 1]
    check(judge, direction, plane, picked, "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("first", [0, 2**31 // _ODD, 2**32 // _ODD + 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_far_chunk(judge: Judge, direction: str, first: int) -> None:
    """A chunk may have planes gigabytes apart, and a copy may begin gigabytes behind its address;
    here with rows of an odd number of bytes."""
    tokens, slots = first + 100, [3, 0, 5, 2]
    apart = max(tokens * _ODD, 2**32) + 3
    chunk = mapped(2 * apart).as_strided((2, tokens, _ODD), (apart, _ODD, 1))
    shape = (2, 4, _SIZE, _ODD)
    dense = torch.full(shape, 0xA5, dtype=torch.uint8)
    wanted = fresh(judge, (2, len(slots), _ODD))
    cache, other = KVView(dense, "kv block token dim"), KVView(chunk, "kv token dim")
    told, at, near = Index(slots), Index(offset=first), dense.view(2, 4 * _SIZE, _ODD)
    span = slice(first, first + len(slots))
    if direction == "gather":
        near[:, slots] = wanted
        carried = carry(judge, cache, other, told, at, len(slots))
        found = chunk[:, span]
    else:
        chunk[:, span] = wanted
        carried = carry(judge, other, cache, at, told, len(slots))
        found = near[:, slots]
    if not carried:
        return
    for kv in range(2):
        assert torch.equal(found[kv], wanted[kv]), (
            f"Tokens from {first} on of kv {kv}, {kv * apart + first * _ODD} bytes behind the "
            f"address of the chunk, were not moved right: an offset or a product of it was cut."
        )
    judge.examples += 1


@pytest.mark.needs("host")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_that_lie_far_apart(judge: Judge, direction: str) -> None:
    """Planes of one allocation may lie gigabytes apart."""
    stride, slots = 2**32 + 512, [3, 0, 2]
    memory = mapped(2 * stride + 4096)
    plane = memory.as_strided((3, 2, _SIZE, _HEADS, _DIM), (stride, 256, 128, _DIM, 1))
    chunk = torch.full((3, 3, _HEADS, _DIM), 0xA5, dtype=torch.uint8)
    wanted = fresh(judge, tuple(chunk.shape))
    cache = KVView(plane, "layer block token head dim")
    dense = KVView(chunk, "layer token head dim")
    if direction == "gather":
        for at, slot in enumerate(slots):
            plane[:, slot // _SIZE, slot % _SIZE] = wanted[:, at]
        carried = carry(judge, cache, dense, Index(slots), Index())
        found = chunk
    else:
        chunk.copy_(wanted)
        carried = carry(judge, dense, cache, Index(), Index(slots))
        found = torch.stack([plane[:, slot // _SIZE, slot % _SIZE] for slot in slots], dim=1)
    if not carried:
        return
    for layer in range(3):
        assert torch.equal(found[layer], wanted[layer]), (
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


@full
@pytest.mark.needs("memory")
@pytest.mark.parametrize("row", [128, _ODD])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_flat_pool_on_a_device(subject: Subject, judge: Judge, direction: str, row: int) -> None:
    """On a device too, the product of a slot and a row's bytes passes 2**31 and 2**32."""
    slots = (2**32 + 2**20) // row // _SIZE * _SIZE
    memory = torch.zeros(slots * row, dtype=torch.uint8, device=subject.device)
    plane = memory.view(slots, 1, row)
    picked = [slots - 1, 0, 2**31 // row, 2**31 // row + 1, 2**32 // row + 3, 1]
    check(judge, direction, plane, picked, "(block token) head dim", block_size=_SIZE)
    del plane, memory
    judge.facility.release()
