# SPDX-License-Identifier: Apache-2.0
"""Rows far from their address: byte offsets, and products of slots and strides, have 64 bits.

On the CPU and the simulated device only the rows that are touched exist, so that gigabytes cost
nothing. On a real device the memory has to be there (profile `full`, mark `bigmem`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch

from portakv import Index, KVView
from portakv_conformance.cases import Judge, Subject, full
from portakv_conformance.judge.pattern import pattern_bytes

pytestmark = pytest.mark.area("safety")

Bytes = Callable[[int], torch.Tensor]
_NORESERVE = 0x4000  # Linux; not named by every Python's mmap
# of uint8: a block of 256 B
_HEADS = 2
_DIM = 64
_SIZE = 2
_ODD = 131  # bytes of a row that nothing divides
#: How blocks are named, and what has ids: a cache and a chunk, or two caches.
MIGRATIONS = ("blocks-gather", "blocks-scatter", "blocks-both", "slots-both")


def mapped(nbytes: int) -> torch.Tensor:
    """Return zeros, uint8, of which only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def far_blocks(memory: torch.Tensor, stride: int, blocks: int) -> torch.Tensor:
    """Return one plane ``[blocks, block_size, heads, dim]``.

    Its blocks lie ``stride`` bytes apart.
    """
    sizes = (blocks, _SIZE, _HEADS, _DIM)
    return memory.as_strided(sizes, (stride, _HEADS * _DIM, _DIM, 1))


class Place:
    """One side of a copy: a tensor, where in it each piece lies, and its view and index."""

    def __init__(
        self,
        tensor: torch.Tensor,
        layout: str,
        where: list[Any],
        index: Index | None = None,
        **extents: Any,
    ) -> None:
        self.tensor = tensor
        self.where = where
        self.index = index or Index()
        self.view = KVView(tensor, layout, **extents)


def near(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return a small tensor of other bytes on the device of a far one."""
    return torch.full(shape, 0xA5, dtype=torch.uint8).to(like.device)


def check(judge: Judge, direction: str, far: Place, other: Place) -> None:
    """Put bytes into the pieces of the source, which is ``far`` in a gather, copy them, and compare
    those of the destination."""
    src, dst = (far, other) if direction == "gather" else (other, far)
    shape = (len(src.where), *src.tensor[src.where[0]].shape)
    wanted = torch.from_numpy(pattern_bytes(judge.seed, 1, prod(shape)).copy()).view(shape)
    for at, piece in zip(src.where, wanted.to(src.tensor.device), strict=True):
        src.tensor[at] = piece
    arguments = (src.view, dst.view, src.index, dst.index)
    if judge.carried(lambda: judge.finish(judge.subject.copy(*arguments)), arguments):
        for at, place, piece in zip(dst.where, far.where, wanted, strict=True):
            assert torch.equal(dst.tensor[at].cpu(), piece), (
                f"What lies {far.tensor[place].storage_offset() - far.tensor.storage_offset()} "
                f"bytes after the address, at {place} of {far.view.layout.text!r}, was not moved "
                f"right: an offset or a product of it was cut."
            )
        judge.examples += 1


def check_rows(
    judge: Judge, direction: str, plane: torch.Tensor, slots: list[int], layout: str, **extents: int
) -> None:
    """Copy rows of one far plane to a dense chunk or back."""
    where = [divmod(slot, _SIZE) if plane.dim() == 4 else slot for slot in slots]
    dense = near(plane, len(slots), *plane.shape[-2:])
    far = Place(plane, layout, where, Index(slots), **extents)
    check(judge, direction, far, Place(dense, "token head dim", list(range(len(slots)))))


def check_blocks(judge: Judge, kind: str, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole blocks of one far plane, by `MIGRATIONS`."""
    step = 1 if kind == "slots-both" else _SIZE

    def place(plane: torch.Tensor, blocks: list[int]) -> Place:
        ids = [(at * _SIZE + n) // step for at in blocks for n in range(0, _SIZE, step)]
        return Place(plane, "block token head dim", blocks, Index(ids, step=step))

    there = place(src, [2, 0, 1])
    here = place(dst, [1, 2, 0])
    blocks = [slice(at, at + _SIZE) for at in range(0, 3 * _SIZE, _SIZE)]
    chunk = Place(near(src, 3 * _SIZE, _HEADS, _DIM), "token head dim", blocks)
    if kind == "blocks-scatter":
        check(judge, "scatter", here, chunk)
    else:
        check(judge, "gather", there, here if kind.endswith("both") else chunk)


def check_chunk(judge: Judge, direction: str, chunk: torch.Tensor, first: int) -> None:
    """Copy tokens from ``first`` on of a far chunk ``[kv, tokens, bytes]`` to a cache or back."""
    kvs = range(len(chunk))
    slots = [3, 0, 5, 2]
    tokens = [(kv, slice(first, first + len(slots))) for kv in kvs]
    far = Place(chunk, "kv token dim", tokens, Index(offset=first))
    rows = [(kv, [at // _SIZE for at in slots], [at % _SIZE for at in slots]) for kv in kvs]
    cache = Place(near(chunk, 2, 4, _SIZE, _ODD), "kv block token dim", rows, Index(slots))
    # Of a gather the cache is the source.
    check(judge, "scatter" if direction == "gather" else "gather", far, cache)


def check_layers(judge: Judge, direction: str, memory: torch.Tensor, stride: int) -> None:
    """Copy rows of three layers that lie ``stride`` bytes apart."""
    slots = [3, 0, 2]
    layers = range(3)
    plane = memory.as_strided((3, 2, _SIZE, _HEADS, _DIM), (stride, 256, 128, _DIM, 1))
    rows = [(layer, *divmod(slot, _SIZE)) for layer in layers for slot in slots]
    far = Place(plane, "layer block token head dim", rows, Index(slots))
    tokens = [(layer, at) for layer in layers for at in range(len(slots))]
    dense = near(memory, 3, 3, _HEADS, _DIM)
    check(judge, direction, far, Place(dense, "layer token head dim", tokens))


@pytest.mark.needs("host")
@pytest.mark.parametrize("stride", [2**31 + 256, 2**32 + 256, 2**33 + 4096, 2**35 + 256])
def test_blocks_that_lie_far_apart(judge: Judge, direction: str, stride: int) -> None:
    """A block may lie any number of bytes after the block before it."""
    plane = far_blocks(mapped(2 * stride + 4096), stride, 3)
    check_rows(judge, direction, plane, [5, 0, 2, 3], "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("kind", MIGRATIONS)
@pytest.mark.parametrize("stride", [2**31 + 256, 2**32 + 256])
def test_whole_blocks_and_two_lists(judge: Judge, kind: str, stride: int) -> None:
    """Offsets have 64 bits also where whole blocks move, and where both sides have ids."""
    src, dst = (far_blocks(mapped(2 * stride + 4096), stride, 3) for _ in range(2))
    check_blocks(judge, kind, src, dst)


@pytest.mark.needs("host")
@pytest.mark.parametrize("rows", [(_HEADS, _DIM), (1, _ODD)], ids=["even", "odd"])
def test_slots_that_are_far_out(judge: Judge, direction: str, rows: tuple[int, int]) -> None:
    """The product of a slot and a row's bytes passes 2**31, 2**32 and 2**33."""
    row = prod(rows)
    slots = (2**33 + 2**20) // row // _SIZE * _SIZE
    plane = mapped(slots * row).view(slots // _SIZE, _SIZE, *rows)
    picked = [slots - 1, 0, 2**31 // row, 2**32 // row + 3, 2**33 // row + 5, 1]
    check_rows(judge, direction, plane, picked, "block token head dim")


@pytest.mark.needs("host")
@pytest.mark.parametrize("first", [0, 2**31 // _ODD, 2**32 // _ODD + 3])
def test_a_far_chunk(judge: Judge, direction: str, first: int) -> None:
    """A chunk may have planes gigabytes apart, and a copy may begin gigabytes after its start."""
    tokens = first + 100
    apart = max(tokens * _ODD, 2**32) + 3
    chunk = mapped(2 * apart).as_strided((2, tokens, _ODD), (apart, _ODD, 1))
    check_chunk(judge, direction, chunk, first)


@pytest.mark.needs("host")
def test_layers_that_lie_far_apart(judge: Judge, direction: str) -> None:
    """Planes of one allocation may lie gigabytes apart."""
    stride = 2**32 + 512
    check_layers(judge, direction, mapped(2 * stride + 4096), stride)


@pytest.fixture
def memory(subject: Subject, judge: Judge) -> Iterator[Bytes]:
    """Yield a function that makes bytes of the judged device, and release them afterwards.

    The bytes are not written: on the simulated device only touched memory takes room.
    """
    yield lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=subject.device)
    judge.facility.release()


def on_a_device(test: object) -> object:
    """Mark a case that takes gigabytes of a device."""
    for mark in (full, pytest.mark.needs("memory"), pytest.mark.bigmem):
        test = mark(test)
    return test


@on_a_device
def test_far_blocks_on_a_device(judge: Judge, memory: Bytes, direction: str) -> None:
    """A block on a device may lie more than 2**32 bytes after the first."""
    stride = 2**32 + 256
    plane = far_blocks(memory(stride + 4096), stride, 2)
    check_rows(judge, direction, plane, [3, 0, 2], "block token head dim")


@on_a_device
@pytest.mark.parametrize("kind", MIGRATIONS)
def test_whole_blocks_and_two_lists_on_a_device(judge: Judge, memory: Bytes, kind: str) -> None:
    """Far blocks on a device move whole, also under ids on both sides."""
    stride = 2**31 + 256
    offset = 2048
    whole = memory(2 * stride + 8192)
    src = far_blocks(whole, stride, 3)
    dst = far_blocks(whole[offset:], stride, 3)
    check_blocks(judge, kind, src, dst)


@on_a_device
@pytest.mark.parametrize("row", [128, _ODD])
def test_a_flat_pool_on_a_device(judge: Judge, memory: Bytes, direction: str, row: int) -> None:
    """The product of a slot and a row's bytes may exceed 2**31 and 2**32 on a device."""
    slots = (2**32 + 2**20) // row // _SIZE * _SIZE
    plane = memory(slots * row).view(slots, 1, row)
    picked = [slots - 1, 0, 2**31 // row, 2**31 // row + 1, 2**32 // row + 3, 1]
    check_rows(judge, direction, plane, picked, "(block token) head dim", block_size=_SIZE)


@on_a_device
@pytest.mark.parametrize("far", ["planes", "tokens"])
def test_a_far_chunk_on_a_device(judge: Judge, memory: Bytes, direction: str, far: str) -> None:
    """Planes of a chunk on a device, and its first token, may lie gigabytes after its start."""
    first = 0
    apart = 2**32 + 3
    row = _ODD
    if far == "tokens":  # keys and values of a token side by side
        first = 2**32 // (2 * _ODD) + 3
        apart = _ODD
        row = 2 * _ODD
    whole = memory(apart + (first + 16) * row)
    chunk = whole.as_strided((2, first + 16, _ODD), (apart, row, 1))
    check_chunk(judge, direction, chunk, first)


@on_a_device
def test_layers_that_lie_far_apart_on_a_device(judge: Judge, memory: Bytes, direction: str) -> None:
    """Planes of one allocation on a device may lie gigabytes apart."""
    stride = 2**31 + 512  # of three layers the last lies past 2**32
    check_layers(judge, direction, memory(2 * stride + 4096), stride)
