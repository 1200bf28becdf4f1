# SPDX-License-Identifier: Apache-2.0
"""Where the oracle finds rows, against plain indexing and addresses worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from portakv_conformance.judge.grammar import Factor, read_layout
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import Rows, expand, locate

Reading = Callable[[Any, int, int, int, int], torch.Tensor]


def numbered(*shape: int, first: int = 0) -> torch.Tensor:
    """A contiguous int32 tensor whose elements are all different."""
    return torch.arange(first, first + prod(shape), dtype=torch.int32).reshape(shape)


@dataclass
class Hand:
    """A layout, tensors for it, and how a person would index them: one head of one row."""

    layout: str
    tensors: Any
    read: Reading  # (tensors, kv, layer, slot, head) -> elements of `dim`
    extents: dict[str, Any]
    facts: tuple[Any, ...]  # layers, kv, heads, elements for each kv, slots


def pair(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """One tensor for each shape, all elements different."""
    return [numbered(*shape, first=1000 * n) for n, shape in enumerate(shapes)]


HANDS = [
    Hand("layer | kv block token head dim", pair((2, 3, 4, 2, 5), (2, 3, 4, 2, 5)),
         lambda t, kv, layer, s, h: t[layer][kv, s // 4, s % 4, h], {}, (2, 2, 2, (5, 5), 12)),
    Hand("layer | kv block head token dim",
         {"a": numbered(2, 3, 2, 4, 5), "b": numbered(2, 3, 2, 4, 5, first=900)},
         lambda t, kv, layer, s, h: list(t.values())[layer][kv, s // 4, h, s % 4],
         {"block_size": 4, "heads": 2, "dim": 5}, (2, 2, 2, (5, 5), 12)),
    Hand("layer | block head token (kv dim)", pair((3, 2, 4, 8)),
         lambda t, kv, layer, s, h: t[layer][s // 4, h, s % 4, kv * 5 : 5 + kv * 3],
         {"dim": (5, 3)}, (1, 2, 2, (5, 3), 12)),
    Hand("layer | block (kv token dim)", pair((3, 20), (3, 20)), lambda t, kv, layer, s, h: (
         t[layer][s // 4, s % 4 * 4 : s % 4 * 4 + 4] if kv == 0
         else t[layer][s // 4, 16 + s % 4 : 17 + s % 4] ), {"dim": (4, 1), "block_size": 4},
         (2, 2, 1, (4, 1), 12)),
    Hand("kv layer | (block token) head dim",
         (pair((12, 2, 3), (12, 2, 3)), pair((12, 2, 3), (12, 2, 3))),
         lambda t, kv, layer, s, h: t[kv][layer][s, h], {"block_size": 4}, (2, 2, 2, (3, 3), 12)),
    Hand("(kv layer) | (block token) head dim", pair(*[(12, 2, 3)] * 6),
         lambda t, kv, layer, s, h: t[kv * 3 + layer][s, h], {"block_size": 6},
         (3, 2, 2, (3, 3), 12)),
    Hand("layer kv | block token 1 dim",
         [(numbered(3, 4, 1, 7), numbered(3, 4, 1, 2, first=500)) for _ in range(2)],
         lambda t, kv, layer, s, h: t[layer][kv][s // 4, s % 4, 0], {}, (2, 2, 1, (7, 2), 12)),
    Hand("layer kv | block head dim/4 token dim%4",
         [(numbered(3, 2, 2, 5, 4), numbered(3, 2, 2, 5, 4, first=700))],
         lambda t, kv, layer, s, h: torch.cat([t[layer][kv][s // 5, h, n, s % 5] for n in (0, 1)]),
         {}, (1, 2, 2, (8, 8), 15)),
    Hand("layer | block token dim", pair((3, 4, 9), (3, 4, 9)),
         lambda t, kv, layer, s, h: t[layer][s // 4, s % 4], {"kv": 1, "heads": 1},
         (2, 1, 1, (9,), 12)),
    Hand("block layer kv token head dim", numbered(3, 2, 2, 4, 2, 3),
         lambda t, kv, layer, s, h: t[s // 4, layer, kv, s % 4, h], {"layers": 2},
         (2, 2, 2, (3, 3), 12)),
    Hand("block head layer kv token dim", numbered(3, 2, 2, 3, 4, 3),
         lambda t, kv, layer, s, h: t[s // 4, h, layer, kv, s % 4], {"kv": 3},
         (2, 3, 2, (3, 3, 3), 12)),
    Hand("kv layer token (head dim)", numbered(2, 3, 7, 6),
         lambda t, kv, layer, s, h: t[kv, layer, s, 3 * h : 3 * h + 3], {"heads": 2},
         (3, 2, 2, (3, 3), 7)),
    # the last group covers two dimensions
    Hand("kv layer token (head dim)", numbered(2, 3, 7, 2, 3),
         lambda t, kv, layer, s, h: t[kv, layer, s, h], {"dim": 3}, (3, 2, 2, (3, 3), 7)),
    Hand("block | kv layer token (head dim)", pair((2, 3, 4, 6), (2, 3, 4, 6)),
         lambda t, kv, layer, s, h: t[s // 4][kv, layer, s % 4, 3 * h : 3 * h + 3], {"heads": 2},
         (3, 2, 2, (3, 3), 8)),
    Hand("layer kv | 1 head token dim",
         [[numbered(1, 2, 5, 3), numbered(1, 2, 5, 3, first=100)] for _ in range(2)],
         lambda t, kv, layer, s, h: t[layer][kv][0, h, s], {}, (2, 2, 2, (3, 3), 5)),
    Hand("kv | block layer head token dim", pair((3, 2, 2, 4, 3), (3, 2, 2, 4, 3)),
         lambda t, kv, layer, s, h: t[kv][s // 4, layer, h, s % 4], {}, (2, 2, 2, (3, 3), 12)),
    Hand("token/2 (dim kv) token%2 head", numbered(3, 6, 2, 2),
         lambda t, kv, layer, s, h: t[s // 2, kv::2, s % 2, h], {}, (1, 2, 2, (3, 3), 6)),
]  # fmt: skip


def every_row(rows: Rows) -> Iterator[tuple[int, int, int]]:
    for kv in range(rows.kv):
        for layer in range(rows.layers):
            for slot in range(rows.slots):
                yield kv, layer, slot


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.layout)
def test_rows_are_those_of_plain_indexing(hand: Hand) -> None:
    rows = locate(hand.tensors, hand.layout, hand.extents)
    layers, kv, heads, elements, slots = hand.facts
    assert (rows.layers, rows.kv, rows.heads, rows.slots) == (layers, kv, heads, slots)
    assert rows.widths == tuple(4 * n for n in elements)
    memory = Memory.snapshot(hand.tensors)
    for kv, layer, slot in every_row(rows):
        found = memory.read(rows.row_addresses(kv, layer, [slot]))[0]
        for head in range(heads):
            by_hand = hand.read(hand.tensors, kv, layer, slot, head)
            assert found[head].view(np.int32).tolist() == by_hand.tolist()


def test_addresses_worked_out_by_hand() -> None:
    # [blocks 3, kv 2, tokens 4, heads 2, dim 5] of float16: strides 160, 80, 20, 10, 2 bytes.
    cache = torch.zeros(3, 2, 4, 2, 5, dtype=torch.float16)
    rows = locate([cache], "layer | block kv token head dim")
    found = rows.row_addresses(1, 0, [0, 9]) - cache.data_ptr()
    assert found[0, 0].tolist() == list(range(80, 90))
    assert found[1, 1].tolist() == list(range(2 * 160 + 80 + 20 + 10, 2 * 160 + 80 + 20 + 20))
    # An indexer block of 64 tokens: 64 * 128 bytes of values, then 64 * 4 bytes of scales.
    page = torch.zeros(2, 64, 132, dtype=torch.uint8)
    split = locate([page], "layer | block (kv token dim)", {"dim": (128, 4), "block_size": 64})
    values, scales = (split.row_addresses(kv, 0, [64 + 3]) - page.data_ptr() for kv in (0, 1))
    assert values[0, 0, 0] == 64 * 132 + 3 * 128
    assert values[0, 0, -1] == 64 * 132 + 3 * 128 + 127
    assert scales[0, 0].tolist() == list(range(8448 + 8192 + 12, 8448 + 8192 + 16))


def test_strides_offsets_and_padding_are_read() -> None:
    storage = torch.arange(400, dtype=torch.uint8)
    padded = storage.as_strided((3, 2, 4), (50, 4, 1), 7)  # pages of 8 bytes, 50 bytes apart
    rows = locate([padded], "layer | block token dim")
    found = rows.row_addresses(0, 0, [5]) - storage.data_ptr()
    assert found.ravel().tolist() == [7 + 2 * 50 + 4 + n for n in range(4)]
    turned = storage[:48].reshape(2, 3, 4, 2).permute(2, 3, 0, 1)  # token, head, kv, dim
    rows = locate(turned, "token head kv dim")
    found = rows.row_addresses(1, 0, [3])[0, 1] - storage.data_ptr()
    assert found.tolist() == [24 + 3 * 2 + 1 + 8 * n for n in range(3)]


def test_opaque_rows_are_whole_blocks() -> None:
    pages = torch.zeros(3, 4, 6, dtype=torch.int16)
    rows = locate([pages], "layer | block page", {"block_size": 4})
    assert rows.opaque
    assert (rows.widths, rows.slots, rows.block_size) == ((48,), 12, 4)
    found = rows.row_addresses(0, 0, [4]) - pages.data_ptr()
    assert found.ravel().tolist() == list(range(48, 96))


def test_equal_bytes_in_two_dtypes_are_one_row() -> None:
    rows = [
        locate(torch.zeros(2, 3, 4, dtype=dtype).repeat(1, 1, n), "kv token dim")
        for dtype, n in ((torch.float32, 1), (torch.bfloat16, 2), (torch.uint8, 4))
    ]
    assert {r.widths for r in rows} == {(16, 16)}


def test_grammar() -> None:
    axes = read_layout("(kv layer)|block dim/32 1 (token dim%32)")
    assert axes.left == ((Factor("kv"), Factor("layer")),)
    quotient, remainder = Factor("dim", "/", 32), Factor("dim", "%", 32)
    assert axes.right == ((Factor("block"),), (quotient,), (), (Factor("token"), remainder))
    assert axes.open_end
    assert not read_layout("kv (token head) dim").open_end


@pytest.mark.parametrize(
    "text",
    [
        "layer | block tokens dim",
        "token token dim",
        "token dim/4",
        "token dim/4 dim%8",
        "token (dim",
        "token dim)",
        "token () dim",
        "layer | kv | token dim",
        "token, dim",
        "token dim%0 dim/0",
        "(layer | token) dim",
    ],
)
def test_strings_outside_the_language_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        read_layout(text)


@pytest.mark.parametrize(
    ("layout", "shape", "extents"),
    [
        ("kv token dim", (3, 4, 5), {}),  # a written kv is 2
        ("kv token dim", (2, 4, 5), {"dim": 6}),
        ("kv token dim", (2, 4, 5, 1), {}),
        ("token (head dim)", (4, 6), {}),  # two unknowns
        ("token (head dim)", (4, 7), {"heads": 2}),
        ("token dim", (4, 6), {"heads": 2}),
        ("kv token dim", (2, 4, 6), {"dim": (6, 2)}),  # unequal widths need parentheses
        ("token head dim/2 dim%2", (4, 6, 2, 3), {}),
    ],
)
def test_contradictions_are_refused(
    layout: str, shape: tuple[int, ...], extents: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"found|declare|declared"):
        locate(torch.zeros(shape), layout, extents)


def test_index_by_its_definition() -> None:
    table = torch.tensor([7, -1, 2], dtype=torch.int32)
    assert expand(table, 4, 2, 9).tolist() == [30, 31, -1, -1, -1, -1, 8, 9, 10]
    assert expand(table[::2], 1, 0, 2).tolist() == [7, 2]
    assert expand(None, 1, 5, 3).tolist() == [5, 6, 7]
