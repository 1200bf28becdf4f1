# SPDX-License-Identifier: Apache-2.0
"""CORE: what every backend does, whatever it claims. Nothing here can be unclaimed or waived.

Each case is carried out by ``copy_rows`` with the backend forced, in the first of the library's
own test layouts that the backend takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from portakv.registry.self_check import SelfCheck, self_check
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.by_hand import DIRECTIONS, Shape, Workshop
from portakv_conformance.judge.judging import ENDS, Judge
from portakv_conformance.judge.subject import Subject

pytestmark = pytest.mark.area("core")

#: One dtype for each width of an element in bytes.
ELEMENTS = {
    1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64, 16: torch.complex128,
}  # fmt: skip
SHAPE = Shape()


def must(judge: Judge, case: Case, **how: Any) -> None:
    """Judge a case that no backend may decline."""
    if not judge.copy(case, **how):
        raise AssertionError(f"CORE cannot be declined, and it was: {judge.declined[-1]}")


def dtypes_of_device(subject: Subject, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or where the device's torch has none of that width a narrower one."""
    try:
        torch.empty(1, dtype=dtype, device=subject.device)
    except (RuntimeError, TypeError, NotImplementedError):
        return torch.int64
    return dtype


@pytest.mark.parametrize("width", ELEMENTS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_move(
    subject: Subject, judge: Judge, home: Workshop, direction: str, ids: torch.dtype, width: int
) -> None:
    """Rows under int32 or int64 slots, with holes, arrive byte by byte, whatever an element is."""
    dtype = dtypes_of_device(subject, ELEMENTS[width])
    slots = torch.tensor(home.shuffled(SHAPE.slots, 11, holes=3), dtype=ids)
    must(judge, home.move(direction, SHAPE, slots, dtype=dtype))


HOLES: dict[str, list[int]] = {
    "none": [5, 0, 17, 3],
    "first": [-1, 5, 0, 17],
    "last": [5, 0, 17, -1],
    "all": [-1, -1, -7, -100],
    "least-int32": [5, -(2**31), 17, 3],
    "between": [-1, 5, -1, -1, 0, -1, 23, -1],
}


@pytest.mark.parametrize("heads", [1, 3, 5, 6, 12, 40])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_head_counts(judge: Judge, home: Workshop, direction: str, heads: int) -> None:
    """Any number of heads moves, whether or not it is a power of two."""
    must(judge, home.move(direction, replace(SHAPE, heads=heads), home.shuffled(SHAPE.slots, 9, 1)))


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_negative_slots_are_skipped(
    judge: Judge, home: Workshop, direction: str, holes: str
) -> None:
    """A negative slot is padding: its position moves nothing, and is never the last row."""
    for dtype in (torch.int64, torch.int32):
        must(judge, home.move(direction, SHAPE, torch.tensor(HOLES[holes], dtype=dtype)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_negative_blocks_are_skipped(judge: Judge, home: Workshop, direction: str) -> None:
    """A negative entry of a block table skips a whole block."""
    must(judge, home.move(direction, SHAPE, [3, -1, 0, -5], step=SHAPE.block_size))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_empty_list_moves_nothing(
    judge: Judge, home: Workshop, direction: str, ids: torch.dtype
) -> None:
    """An empty list of ids is no error, and no byte changes."""
    must(judge, home.move(direction, SHAPE, torch.empty(0, dtype=ids)))


@pytest.mark.parametrize("slot", [0, 1, 3, 4, 22, 23])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_row(judge: Judge, home: Workshop, direction: str, slot: int) -> None:
    """One slot moves one row of each plane, the first and the last of a block and a cache too."""
    must(judge, home.move(direction, SHAPE, [slot]))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 15, 16, 17, 23])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_counts_that_fill_no_block(
    judge: Judge, home: Workshop, direction: str, count: int
) -> None:
    """Any number of tokens moves, also through a block table whose last block is partly used."""
    must(judge, home.move(direction, SHAPE, home.shuffled(SHAPE.slots, count)))
    blocks = home.shuffled(SHAPE.blocks, -(-count // SHAPE.block_size))
    case = home.move(direction, SHAPE, blocks, step=SHAPE.block_size)
    must(judge, Case(case.src, case.dst, count))


@pytest.mark.parametrize("offset", [1, 4, 7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_index_begins_at_its_offset(
    judge: Judge, home: Workshop, direction: str, offset: int
) -> None:
    """Positions count from the index's offset, in slots and in tokens of a block table."""
    must(judge, home.move(direction, SHAPE, home.shuffled(SHAPE.slots, 12, 2), offset=offset))
    blocks = home.shuffled(SHAPE.blocks, 4, 1)
    must(judge, home.move(direction, SHAPE, blocks, step=SHAPE.block_size, offset=offset))


@pytest.mark.parametrize("tail", [1, 2, 5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_list_that_is_longer_than_the_copy(
    judge: Judge, home: Workshop, direction: str, tail: int
) -> None:
    """Ids behind the asked count are not read."""
    case = home.move(direction, SHAPE, home.shuffled(SHAPE.slots, 14, 1))
    must(judge, Case(case.src, case.dst, case.count - tail))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_consecutive_rows_need_no_list(judge: Judge, home: Workshop, direction: str) -> None:
    """Without ids on either side, rows move in their order."""
    case = home.move(direction, SHAPE, list(range(SHAPE.slots)))
    case.src.ids = case.dst.ids = None
    must(judge, case)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_transfer_that_ended_has_landed(
    judge: Judge, home: Workshop, direction: str, end: str
) -> None:
    """When a transfer says that it ended, in any of its three ways, every byte is in its place."""
    many = Shape(layers=3, widths=(128, 128), blocks=32)
    must(judge, home.move(direction, many, home.shuffled(many.slots, 60)), end=end)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_bit_pattern_survives(
    judge: Judge, home: Workshop, direction: str, width: int
) -> None:
    """Bytes are moved, not numbers: NaN payloads, signs of zero, denormals, all 16-bit patterns."""
    floats = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    wide = Shape(layers=1, heads=2, widths=(4096, 4096), block_size=4, blocks=4)
    case = home.move(direction, wide, home.shuffled(wide.slots, wide.slots), dtype=floats[width])
    sizes = [guard.nbytes for guard in case.src.guards]
    odd = _odd_floats(width, sum(sizes))
    for guard, piece in zip(case.src.guards, odd.split(sizes), strict=True):
        guard.payload().copy_(piece)
    case.src.arrangement = None  # these bytes come from no seed
    must(judge, case)


def _odd_floats(width: int, nbytes: int) -> torch.Tensor:
    """Bytes of numbers that arithmetic does not keep: every pattern, or NaNs of every payload."""
    count = torch.arange(nbytes // width, dtype=torch.int64)
    if width <= 2:
        bits = count
    else:
        top = {4: 0x7F80_0001, 8: 0x7FF0_0000_0000_0001}[width]
        bits = top + count * 37  # signalling NaNs, as most payloads are
        bits[::5] |= -(1 << 31) if width == 4 else -(1 << 63)
        bits[1::5] = count[1::5]  # denormals
    narrow = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    return bits.to(narrow).view(torch.uint8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_second_call_is_a_call_of_its_own(judge: Judge, home: Workshop, direction: str) -> None:
    """The same plan again, with other ids, another count and other addresses, keeps nothing."""
    held = []  # so that no call gets the addresses of the one before it
    for number, count in enumerate((9, 9, 4, 16, 9)):
        shop = replace(home, seed=home.seed + number)
        case = shop.move(direction, SHAPE, shop.shuffled(SHAPE.slots, count, number % 2))
        must(judge, case)
        held.append(case)
    again = replace(home, seed=home.seed + 9).shuffled(SHAPE.slots, 9)
    for case in held[:2]:  # the addresses of an earlier call, under other ids
        side = case.src if direction == "gather" else case.dst
        side.ids = torch.tensor(again)
        must(judge, case)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_changed_after_the_call(judge: Judge, home: Workshop, direction: str) -> None:
    """An id list that is filled anew is a new list: nothing of the old one is kept."""
    first = torch.tensor(home.shuffled(SHAPE.slots, 8))
    for step in range(3):
        must(judge, home.move(direction, SHAPE, first))
        first.copy_(torch.tensor(Workshop(seed=home.seed + 50 + step).shuffled(SHAPE.slots, 8)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_in_one_allocation(judge: Judge, home: Workshop, direction: str) -> None:
    """Whether layers lie in one allocation or in several, the same rows move."""
    slots = home.shuffled(SHAPE.slots, 9, 1)
    must(judge, home.move(direction, SHAPE, slots, place="strided"))
    must(judge, home.move(direction, SHAPE, slots, place="separate"))


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_on_either_side(judge: Judge, home: Workshop, direction: str, place: str) -> None:
    """Ids on the host or on the device, contiguous or not, int32 or int64, are the same ids."""
    where = judge.subject.device if place == "device" else torch.device("cpu")
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor(home.shuffled(SHAPE.slots, 10, 2), dtype=dtype).to(where)
        must(judge, home.move(direction, SHAPE, ids))
        spread = torch.stack([ids, ids.clone().fill_(SHAPE.slots + 9)], dim=1)[:, 0]
        must(judge, home.move(direction, SHAPE, spread))


@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_to_the_host_and_back(judge: Judge, home: Workshop, direction: str, end: str) -> None:
    """A cache on the device is stored to a chunk on the host, and loaded from one."""
    slots = home.shuffled(SHAPE.slots, 9, 2)
    must(judge, home.move(direction, SHAPE, slots, chunk={"device": "cpu"}), end=end)


def test_the_power_on_self_check(subject: Subject) -> None:
    """The library's own self-check accepts the backend, or takes none of its layouts."""
    found: Any = self_check(subject.backend)
    assert found.state is not SelfCheck.FAILED, f"{found.reason}."
