# SPDX-License-Identifier: Apache-2.0
"""CORE: what every backend does, whatever it claims. Nothing here can be unclaimed or waived. Each
case is judged in the first of the library's own test layouts that the backend takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portakv.registry.registry import SelfCheck, self_check
from portakv_conformance.cases import Bench, Case, Judge, Shape
from portakv_conformance.judge.judging import ENDS

pytestmark = pytest.mark.area("core")

#: One dtype for each width of an element in bytes.
ELEMENTS = {
    1: torch.uint8,
    2: torch.bfloat16,
    4: torch.float32,
    8: torch.int64,
    16: torch.complex128,
}
SHAPE = Shape()
SIZE = SHAPE.block_size
DTYPES = pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])


def must(bench: Bench, case: Case, end: str = ENDS[0]) -> None:
    """Judge a case that no backend may decline."""
    copied = bench.judge.copy(case, end=end)
    assert copied, f"CORE cannot be declined, and it was: {bench.judge.declined[-1]}"


@pytest.mark.parametrize("width", ELEMENTS)
@DTYPES
def test_rows_move(bench: Bench, direction: str, ids: torch.dtype, width: int) -> None:
    """Rows under int32 or int64 slots, with holes, arrive byte by byte, whatever an element is."""
    dtype = ELEMENTS[width]
    try:
        torch.empty(1, dtype=dtype, device=bench.subject.device)
    except (RuntimeError, TypeError, NotImplementedError):
        dtype = torch.int64  # the device's torch has none of that width
    slots = torch.tensor(bench.shuffled(SHAPE.slots, 11, holes=3), dtype=ids)
    must(bench, bench.move(direction, SHAPE, slots, dtype=dtype))


HOLES = {
    "none": [5, 0, 17, 3], "first": [-1, 5, 0, 17], "last": [5, 0, 17, -1],
    "all": [-1, -1, -7, -100], "least-int32": [5, -(2**31), 17, 3],
    "between": [-1, 5, -1, -1, 0, -1, 23, -1],
}  # fmt: skip


@pytest.mark.parametrize("heads", [1, 3, 5, 6, 12, 40])
def test_head_counts(bench: Bench, direction: str, heads: int) -> None:
    """Any number of heads moves, whether or not it is a power of two."""
    must(bench, bench.some(direction, replace(SHAPE, heads=heads), 9, 1))


@pytest.mark.parametrize("holes", HOLES)
def test_negative_slots_are_skipped(bench: Bench, direction: str, holes: str) -> None:
    """A negative slot is padding: its position moves nothing, and is never the last row."""
    for dtype in (torch.int64, torch.int32):
        must(bench, bench.move(direction, SHAPE, torch.tensor(HOLES[holes], dtype=dtype)))


def test_negative_blocks_are_skipped(bench: Bench, direction: str) -> None:
    """A negative entry of a block table skips a whole block."""
    must(bench, bench.move(direction, SHAPE, [3, -1, 0, -5], step=SIZE))


@DTYPES
def test_an_empty_list_moves_nothing(bench: Bench, direction: str, ids: torch.dtype) -> None:
    """An empty list of ids is not an error, and no byte changes."""
    must(bench, bench.move(direction, SHAPE, torch.empty(0, dtype=ids)))


@pytest.mark.parametrize("slot", [0, 1, 3, 4, 22, 23])
def test_one_row(bench: Bench, direction: str, slot: int) -> None:
    """One slot moves one row of each plane, the first and the last of a block and a cache too."""
    must(bench, bench.move(direction, SHAPE, [slot]))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 15, 16, 17, 23])
def test_counts_that_fill_no_block(bench: Bench, direction: str, count: int) -> None:
    """Any number of tokens moves, also through a block table whose last block is partly used."""
    must(bench, bench.some(direction, SHAPE, count))
    must(bench, replace(bench.some(direction, SHAPE, -(-count // SIZE), step=SIZE), count=count))


@pytest.mark.parametrize("offset", [1, 4, 7])
def test_an_index_begins_at_its_offset(bench: Bench, direction: str, offset: int) -> None:
    """Positions count from the index's offset, in slots and in tokens of a block table."""
    must(bench, bench.some(direction, SHAPE, 12, 2, offset=offset))
    must(bench, bench.some(direction, SHAPE, 4, 1, step=SIZE, offset=offset))


@pytest.mark.parametrize("tail", [1, 2, 5])
def test_a_list_that_is_longer_than_the_copy(bench: Bench, direction: str, tail: int) -> None:
    """Ids after the requested count are not read."""
    must(bench, replace(bench.some(direction, SHAPE, 14, 1), count=14 - tail))


def test_consecutive_rows_need_no_list(bench: Bench, direction: str) -> None:
    """Without ids on either side, rows move in their order."""
    case = bench.move(direction, SHAPE, list(range(SHAPE.slots)))
    case.src.ids = None
    case.dst.ids = None
    must(bench, case)


@pytest.mark.parametrize("end", ENDS)
def test_a_transfer_that_ended_has_landed(bench: Bench, direction: str, end: str) -> None:
    """After a transfer reports its end, in any of three ways, every byte is in its place."""
    many = Shape(layers=3, widths=(128, 128), blocks=32)
    must(bench, bench.some(direction, many, 60), end)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_bit_pattern_survives(bench: Bench, direction: str, width: int) -> None:
    """Bytes are moved, not numbers: NaN payloads, signs of zero, denormals, all 16-bit patterns."""
    floats = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    wide = Shape(layers=1, heads=2, widths=(4096, 4096), block_size=4, blocks=4)
    case = bench.some(direction, wide, wide.slots, dtype=floats[width])
    sizes = [guard.nbytes for guard in case.src.guards]
    odd = _odd_floats(width, sum(sizes))
    for guard, piece in zip(case.src.guards, odd.split(sizes), strict=True):
        guard.payload().copy_(piece)
    case.src.arrangement = None  # these bytes come from no seed
    must(bench, case)


def _odd_floats(width: int, nbytes: int) -> torch.Tensor:
    """Return bytes of numbers that arithmetic changes: every pattern, or NaNs of every payload."""
    count = torch.arange(nbytes // width, dtype=torch.int64)
    bits = count
    if width > 2:
        top, sign = {4: (0x7F80_0001, -(1 << 31)), 8: (0x7FF0_0000_0000_0001, -(1 << 63))}[width]
        bits = top + count * 37  # signalling NaNs, as most payloads are
        bits[::5] |= sign
        bits[1::5] = count[1::5]  # denormals
    narrow = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return bits.to(narrow).view(torch.uint8)


def test_a_second_call_is_a_call_of_its_own(bench: Bench, direction: str) -> None:
    """The same plan again, with other ids, another count and other addresses, keeps nothing."""
    retained = []  # so that no call gets the addresses of the one before it
    for number, count in enumerate((9, 9, 4, 16, 9)):
        retained.append(bench.other(number).some(direction, SHAPE, count, number % 2))
        must(bench, retained[-1])
    again = bench.other(9).shuffled(SHAPE.slots, 9)
    for case in retained[:2]:  # the addresses of an earlier call, under other ids
        side = case.src if direction == "gather" else case.dst
        side.ids = torch.tensor(again)
        must(bench, case)


def test_ids_changed_after_the_call(bench: Bench, direction: str) -> None:
    """An id list that is filled anew is a new list: nothing of the old one is kept."""
    first = torch.tensor(bench.shuffled(SHAPE.slots, 8))
    for step in range(3):
        must(bench, bench.move(direction, SHAPE, first))
        first.copy_(torch.tensor(bench.other(50 + step).shuffled(SHAPE.slots, 8)))


def test_layers_in_one_allocation(bench: Bench, direction: str) -> None:
    """The same rows move if layers share one allocation and if each has its own."""
    for place in ("strided", "separate"):
        must(bench, bench.some(direction, SHAPE, 9, 1, place=place))


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_ids_on_either_side(bench: Bench, direction: str, place: str) -> None:
    """Ids on the host or on the device, contiguous or not, int32 or int64, are the same ids."""
    where = bench.subject.device if place == "device" else torch.device("cpu")
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor(bench.shuffled(SHAPE.slots, 10, 2), dtype=dtype).to(where)
        must(bench, bench.move(direction, SHAPE, ids))
        spread = torch.stack([ids, ids.clone().fill_(SHAPE.slots + 9)], dim=1)[:, 0]
        must(bench, bench.move(direction, SHAPE, spread))


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("end", ENDS)
def test_to_the_host_and_back(bench: Bench, direction: str, end: str) -> None:
    """A cache on the device is stored to a chunk on the host, and loaded from one."""
    must(bench, bench.some(direction, SHAPE, 9, 2, {"device": "cpu"}), end)


def test_the_power_on_self_check(judge: Judge) -> None:
    """The library's own self-check accepts the backend, or takes none of its layouts."""
    verdict, why = self_check(judge.subject.backend)
    assert verdict is not SelfCheck.FAILED, f"{why}."
