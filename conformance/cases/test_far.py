# SPDX-License-Identifier: Apache-2.0
"""Rows far from their address: byte offsets, and products of slots and strides, have 64 bits.

On the CPU the memory is mapped and only the rows that are touched exist, so that gigabytes cost
nothing; so it is on the simulated device. On a real one it has to be there (profile `full`, mark
`bigmem`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch

from portakv import Index, KVView, Unsupported
from portakv_conformance.judge.claims import full
from portakv_conformance.judge.judging import Judge
from portakv_conformance.judge.pattern import pattern_bytes
from portakv_conformance.judge.subject import Subject

pytestmark = pytest.mark.area("safety")

DIRECTIONS = ("gather", "scatter")
Bytes = Callable[[int], torch.Tensor]
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


#: How blocks are named, and what has ids: a cache and a chunk, or two caches.
MIGRATIONS = ("blocks-gather", "blocks-scatter", "blocks-both", "slots-both")


def check_blocks(judge: Judge, kind: str, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole blocks of one far plane, by `MIGRATIONS`, and compare them by plain indexing."""
    layout, text = "block token head dim", "token head dim"
    wanted = fresh(judge, (3, _SIZE, _HEADS, _DIM)).to(src.device)
    there, here = [2, 0, 1], [1, 2, 0]
    dense = torch.full_like(wanted, 0xA5)
    views, flat = (KVView(src, layout), KVView(dst, layout)), KVView(dense.flatten(0, 1), text)
    if kind == "blocks-scatter":
        dense.copy_(wanted)
        carried = carry(judge, flat, views[1], Index(), Index(here, step=_SIZE))
        found = [dst[at] for at in here]
    else:
        for at, block in zip(there, wanted, strict=True):
            src[at] = block
        step = 1 if kind == "slots-both" else _SIZE
        told, target = (
            Index([at * (_SIZE // step) + n for at in ids for n in range(_SIZE // step)], step=step)
            for ids in (there, here)
        )
        if kind == "blocks-gather":
            carried, found = carry(judge, views[0], flat, told, Index()), list(dense)
        else:
            carried = carry(judge, *views, told, target)
            found = [dst[at] for at in here]
    if not carried:
        return
    for mine, theirs, block, right in zip(there, here, found, wanted, strict=True):
        assert torch.equal(block.cpu(), right.cpu()), (
            f"Block {mine} of the source did not come out right as block {theirs} of the "
            f"destination; blocks lie {src.stride(0)} bytes apart. An offset or a product of it "
            f"was cut."
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
@pytest.mark.parametrize("kind", MIGRATIONS)
@pytest.mark.parametrize("stride", [2**31 + 256, 2**32 + 256])
def test_whole_blocks_and_two_lists(judge: Judge, kind: str, stride: int) -> None:
    """Offsets have 64 bits also where whole blocks move, and where both sides have ids."""
    planes = [far_blocks(mapped(2 * stride + 4096), stride, 3) for _ in range(2)]
    check_blocks(judge, kind, *planes)


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


def check_chunk(judge: Judge, direction: str, chunk: torch.Tensor, first: int, apart: int) -> None:
    """Copy tokens from ``first`` on of a far chunk ``[kv, tokens, bytes]`` to a small cache or
    back, and compare them by plain indexing."""
    kvs, slots = len(chunk), [3, 0, 5, 2]
    dense = torch.full((kvs, 4, _SIZE, _ODD), 0xA5, dtype=torch.uint8).to(chunk.device)
    wanted = fresh(judge, (kvs, len(slots), _ODD)).to(chunk.device)
    cache, other = KVView(dense, "kv block token dim"), KVView(chunk, "kv token dim")
    told, at, near = Index(slots), Index(offset=first), dense.view(kvs, 4 * _SIZE, _ODD)
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
    for kv in range(kvs):
        assert torch.equal(found[kv].cpu(), wanted[kv].cpu()), (
            f"Tokens from {first} on of kv {kv}, {kv * apart + first * chunk.stride(1)} bytes "
            f"behind the address of the chunk, were not moved right: an offset or a product of it "
            f"was cut."
        )
    judge.examples += 1


@pytest.mark.needs("host")
@pytest.mark.parametrize("first", [0, 2**31 // _ODD, 2**32 // _ODD + 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_far_chunk(judge: Judge, direction: str, first: int) -> None:
    """A chunk may have planes gigabytes apart, and a copy may begin gigabytes behind its address;
    here with rows of an odd number of bytes."""
    tokens = first + 100
    apart = max(tokens * _ODD, 2**32) + 3
    chunk = mapped(2 * apart).as_strided((2, tokens, _ODD), (apart, _ODD, 1))
    check_chunk(judge, direction, chunk, first, apart)


def check_layers(judge: Judge, direction: str, memory: torch.Tensor, stride: int) -> None:
    """Copy rows of three layers that lie ``stride`` bytes apart, and compare them by indexing."""
    slots, layers = [3, 0, 2], 3
    plane = memory.as_strided((layers, 2, _SIZE, _HEADS, _DIM), (stride, 256, 128, _DIM, 1))
    chunk = torch.full((layers, 3, _HEADS, _DIM), 0xA5, dtype=torch.uint8).to(memory.device)
    wanted = fresh(judge, tuple(chunk.shape)).to(memory.device)
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
    for layer in range(layers):
        assert torch.equal(found[layer].cpu(), wanted[layer].cpu()), (
            f"Layer {layer}, {layer * stride} bytes behind the address, was not moved right."
        )
    judge.examples += 1


@pytest.mark.needs("host")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_that_lie_far_apart(judge: Judge, direction: str) -> None:
    """Planes of one allocation may lie gigabytes apart."""
    stride = 2**32 + 512
    check_layers(judge, direction, mapped(2 * stride + 4096), stride)


# -- on a device ----------------------------------------------------------------------------------


@pytest.fixture
def device_memory(subject: Subject, judge: Judge) -> Iterator[Bytes]:
    """Makes bytes of the judged device, which get them back afterwards. What they hold is not
    written: on the simulated device only what is touched takes memory."""
    yield lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=subject.device)
    judge.facility.release()


def on_a_device(test: Any) -> Any:
    """A case that takes gigabytes of a device."""
    for mark in (full, pytest.mark.needs("memory"), pytest.mark.bigmem):
        test = mark(test)
    return test


@on_a_device
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_blocks_on_a_device(judge: Judge, device_memory: Bytes, direction: str) -> None:
    """On a device too, a block may lie more than 2**32 bytes behind the first."""
    stride = 2**32 + 256
    plane = far_blocks(device_memory(stride + 4096), stride, 2)
    check(judge, direction, plane, [3, 0, 2], "block token head dim")


@on_a_device
@pytest.mark.parametrize("kind", MIGRATIONS)
def test_whole_blocks_and_two_lists_on_a_device(
    judge: Judge, device_memory: Bytes, kind: str
) -> None:
    """On a device too, far blocks move whole, and under ids on both sides."""
    stride, offset = 2**31 + 256, 2048
    memory = device_memory(2 * stride + 8192)
    src, dst = far_blocks(memory, stride, 3), far_blocks(memory[offset:], stride, 3)
    check_blocks(judge, kind, src, dst)


@on_a_device
@pytest.mark.parametrize("row", [128, _ODD])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_flat_pool_on_a_device(
    judge: Judge, device_memory: Bytes, direction: str, row: int
) -> None:
    """On a device too, the product of a slot and a row's bytes passes 2**31 and 2**32."""
    slots = (2**32 + 2**20) // row // _SIZE * _SIZE
    plane = device_memory(slots * row).view(slots, 1, row)
    picked = [slots - 1, 0, 2**31 // row, 2**31 // row + 1, 2**32 // row + 3, 1]
    check(judge, direction, plane, picked, "(block token) head dim", block_size=_SIZE)


@on_a_device
@pytest.mark.parametrize("far", ["planes", "tokens"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_far_chunk_on_a_device(
    judge: Judge, device_memory: Bytes, direction: str, far: str
) -> None:
    """On a device too, a chunk may have planes gigabytes apart, and a copy may begin gigabytes
    behind its address."""
    first, apart, row = 0, 2**32 + 3, _ODD
    if far == "tokens":  # keys and values of a token side by side
        first, apart, row = 2**32 // (2 * _ODD) + 3, _ODD, 2 * _ODD
    memory = device_memory(apart + (first + 16) * row)
    chunk = memory.as_strided((2, first + 16, _ODD), (apart, row, 1))
    check_chunk(judge, direction, chunk, first, apart)


@on_a_device
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_that_lie_far_apart_on_a_device(
    judge: Judge, device_memory: Bytes, direction: str
) -> None:
    """On a device too, planes of one allocation may lie gigabytes apart."""
    stride = 2**31 + 512  # of three layers the last lies behind 2**32
    check_layers(judge, direction, device_memory(2 * stride + 4096), stride)
