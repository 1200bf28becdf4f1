# SPDX-License-Identifier: Apache-2.0
"""`Index.of_requests`: the tokens of several requests in one list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_cases import LAYERS, layered
from support.guarded_memory import check_sentence
from support.read_back import ReadBack

from portakv import Index, KVView, SlotError, copy_rows

SIZE = 4
TABLES = [[5, 0, 7, -9], [2, -9, -9, -9], [1, 6, 3, 4]]
LENGTHS = [9, 0, 14]
FIRST = [2, 1, 1]


def slots(lengths: list[int], first: list[int]) -> list[int]:
    return [
        table[token // SIZE] * SIZE + token % SIZE
        for table, begin, length in zip(TABLES, first, lengths, strict=True)
        for token in range(begin, begin + length)
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [None, 23, 30])
@pytest.mark.parametrize("first", [None, FIRST], ids=["all", "later"])
def test_slots(device: torch.device, dtype: torch.dtype, count: int | None, first: Any) -> None:
    tables = torch.tensor(TABLES, dtype=dtype, device=device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    index = Index.of_requests(tables, lengths, SIZE, first=first, count=count)
    expected = slots(LENGTHS, first or [0] * 3)
    assert index.ids is not None
    assert index.ids.device == tables.device
    assert index.ids.tolist() == expected + [-1] * ((count or 23) - 23)


@pytest.mark.parametrize("count", [None, 26, 30])
@pytest.mark.parametrize("tables", [TABLES, []], ids=["three", "none"])
def test_positions_in_front(device: torch.device, tables: Any, count: int | None) -> None:
    """They are skipped, like positions after the last request."""
    tensor = torch.tensor(tables, dtype=torch.int64, device=device).view(-1, 4)
    lengths = LENGTHS[: len(tables)]
    front = torch.tensor([3], device=device)
    index = Index.of_requests(tensor, lengths, SIZE, front=front, count=count)
    assert index.ids is not None
    expected = [-1] * 3 + (slots(LENGTHS, [0] * 3) if tables else [])
    number = len(expected) if count is None else count
    assert index.ids.tolist() == expected + [-1] * (number - len(expected))


def test_requests_are_gathered_in_one_copy(accelerator: torch.device) -> None:
    """And the host waits for nothing."""
    src = layered(accelerator)
    out = torch.zeros(2, LAYERS, 23, 2, 16, dtype=torch.float16, device=accelerator)
    dense = KVView(out, "kv layer token head dim")
    tables = torch.tensor(TABLES, device=accelerator)
    lengths = torch.tensor(LENGTHS, device=accelerator)

    def gathered() -> Any:
        index = Index.of_requests(tables, lengths, SIZE, count=23, trusted=True)
        return copy_rows(src.view, dense, index)

    gathered().synchronize()
    out.zero_()
    with ReadBack() as read:
        transfer = gathered()
    assert not read.seen
    transfer.synchronize()
    actual = out.cpu().view(torch.int16).view(2, LAYERS, 23, -1).transpose(0, 1)
    assert torch.equal(actual, src.rows()[:, :, slots(LENGTHS, [0] * 3)])


def test_a_request_longer_than_its_table(device: torch.device) -> None:
    tables = torch.tensor(TABLES, device=device)[:, :2]
    if device.type != "cpu":
        index = Index.of_requests(tables, LENGTHS, SIZE, count=23)
        src = layered(device)
        out = torch.zeros(2, LAYERS, 23, 2, 16, dtype=torch.float16)
        transfer = copy_rows(src.view, KVView(out.to(device), "kv layer token head dim"), index)
        with pytest.raises(SlotError, match=r"Position (8|20)"):
            transfer.synchronize()
        return
    with pytest.raises(SlotError) as refused:
        Index.of_requests(tables, LENGTHS, SIZE)
    check_sentence(str(refused.value), "request 0", "9 tokens", "2 blocks x 4")


@pytest.mark.parametrize(
    ("lengths", "first", "count"),
    [([9, 0, -1], None, 9), ([9, 0, 1], [0, 0, -2], 10), ([9, -4, 1], [0, 0, 0], None)],
)
def test_numbers_below_0(device: torch.device, lengths: Any, first: Any, count: Any) -> None:
    """Lists are looked at wherever the tables are; tensors on a device only without a count."""
    tables = torch.tensor(TABLES, device=device)
    with pytest.raises(SlotError) as refused:
        Index.of_requests(tables, lengths, SIZE, first=first, count=count)
    check_sentence(str(refused.value), "below 0")
    if count is None:
        with pytest.raises(SlotError, match="below 0"):
            Index.of_requests(tables, torch.tensor(lengths, device=device), SIZE)


def test_what_is_no_number_in_front(device: torch.device) -> None:
    tables = torch.tensor(TABLES, device=device)
    for front, expected in (([-1], "below 0"), ([1, 2], "2 front")):
        with pytest.raises(SlotError) as refused:
            Index.of_requests(tables, LENGTHS, SIZE, front=front, count=23)
        check_sentence(str(refused.value), expected)


def test_numbers_below_0_on_a_device(accelerator: torch.device) -> None:
    """A length is 0 then, and no other block of a table is taken for a first token."""
    tables = torch.tensor(TABLES, device=accelerator)
    lengths = torch.tensor([2, -4, 5], device=accelerator)
    first = torch.tensor([0, 0, -2], device=accelerator)
    index = Index.of_requests(tables, lengths, SIZE, first=first, count=8)
    assert index.ids is not None
    ids = index.ids.tolist()
    assert ids[:2] == [20, 21]
    assert min(ids[2:4]) > 2**32  # past the end of any view, so that the copy refuses it
    assert ids[4:] == [4, 5, 6, -1]


@pytest.mark.parametrize("count", [None, 0, 3])
@pytest.mark.parametrize("blocks", [0, 3])
def test_no_requests(device: torch.device, blocks: int, count: int | None) -> None:
    tables = torch.zeros(0, blocks, dtype=torch.int32, device=device)
    index = Index.of_requests(tables, [], SIZE, first=[], count=count)
    assert index.ids is not None
    assert index.ids.device == tables.device
    assert index.ids.tolist() == [-1] * (count or 0)


def nested() -> torch.Tensor:
    """Make a nested tensor in a test: torch imports its compiler for the first one."""
    return torch.nested.nested_tensor([torch.zeros(3).int()], layout=torch.jagged)


@pytest.mark.parametrize(
    ("tables", "lengths", "words"),
    [
        ([[1]], [1], "list"),
        (torch.zeros(3, dtype=torch.int64), [1], "shape (3,)"),
        (torch.zeros(2, 3), [1, 1], "torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32).to_sparse(), [1, 1], "sparse tensor"),
        (nested, [1], "nested"),
        (torch.zeros(2, 3, dtype=torch.int32), [1], "1 lengths"),
        (torch.zeros(2, 0, dtype=torch.int32), [1, 1], "(2, 0)"),
        (torch.zeros(2, 3, dtype=torch.int32), [1.0, 2.0], "1.0"),
        (torch.zeros(2, 3, dtype=torch.int32), [1, -2], "below 0"),
        (torch.zeros(1, 3, dtype=torch.int32, device="meta"), [1], "meta"),
    ],
)  # fmt: skip
def test_what_are_no_requests(tables: Any, lengths: Any, words: str) -> None:
    if callable(tables):
        tables = tables()
    with pytest.raises(SlotError) as refused:
        Index.of_requests(tables, lengths, SIZE)
    check_sentence(str(refused.value), words)


@pytest.mark.parametrize("terms", [{"step": 0}, {"step": "four"}, {"count": -1}, {"count": 2.5}])
def test_what_are_no_numbers(terms: Any) -> None:
    with pytest.raises(SlotError) as refused:
        Index.of_requests(torch.zeros(1, 3, dtype=torch.int32), [1], **{"step": SIZE, **terms})
    check_sentence(str(refused.value), *(f"{name}={value!r}" for name, value in terms.items()))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
def test_tables_inside_function_transforms(transform: Any) -> None:
    """Torch would hand over whatever lies in memory as their numbers."""
    tables = torch.zeros(2, 1, 3, dtype=torch.int64)[0 if transform is not torch.vmap else slice(2)]
    with pytest.raises(SlotError, match="owns no memory"):
        transform(lambda passed: Index.of_requests(passed, [1], SIZE).ids)(tables)
