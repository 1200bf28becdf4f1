# SPDX-License-Identifier: Apache-2.0
"""The oracle finds rows as plain indexing and addresses worked out by hand do; its expectation of
a copy, its name of a wrong byte, and the draws of the strategies."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import cases, page_cases
from portakv_conformance.judge.grammar import read_layout
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import Rows, compare, expand, expected_copy
from portakv_conformance.judge.pattern import canary_bytes, guarded, pattern_bytes, poison_bytes


def numbered(*shape: int, first: int = 0) -> torch.Tensor:
    """A contiguous int32 tensor whose elements are all different."""
    return torch.arange(first, first + prod(shape), dtype=torch.int32).reshape(shape)


def pair(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """One tensor for each shape, all elements different."""
    return [numbered(*shape, first=1000 * n) for n, shape in enumerate(shapes)]


# A layout, tensors for it, how a person would index one head of one row of them, `(tensors, kv,
# layer, slot, head) -> elements`, the extents; and layers, heads, elements of each kv, slots.
HANDS: list[tuple[str, Any, Any, dict[str, Any], tuple[Any, ...]]] = [
    ("layer | kv block token head dim", pair((2, 3, 4, 2, 5), (2, 3, 4, 2, 5)),
     lambda t, kv, layer, s, h: t[layer][kv, s // 4, s % 4, h], {}, (2, 2, (5, 5), 12)),
    ("layer | kv block head token dim",
     {"a": numbered(2, 3, 2, 4, 5), "b": numbered(2, 3, 2, 4, 5, first=900)},
     lambda t, kv, layer, s, h: list(t.values())[layer][kv, s // 4, h, s % 4],
     {"block_size": 4, "heads": 2, "dim": 5}, (2, 2, (5, 5), 12)),
    ("layer | block head token (kv dim)", pair((3, 2, 4, 8)),
     lambda t, kv, layer, s, h: t[layer][s // 4, h, s % 4, kv * 5 : 5 + kv * 3],
     {"dim": (5, 3)}, (1, 2, (5, 3), 12)),
    ("layer | block (kv token dim)", pair((3, 20), (3, 20)), lambda t, kv, layer, s, h: (
         t[layer][s // 4, s % 4 * 4 : s % 4 * 4 + 4] if kv == 0
         else t[layer][s // 4, 16 + s % 4 : 17 + s % 4]), {"dim": (4, 1), "block_size": 4},
     (2, 1, (4, 1), 12)),
    ("kv layer | (block token) head dim",
     (pair((12, 2, 3), (12, 2, 3)), pair((12, 2, 3), (12, 2, 3))),
     lambda t, kv, layer, s, h: t[kv][layer][s, h], {"block_size": 4}, (2, 2, (3, 3), 12)),
    ("(kv layer) | (block token) head dim", pair(*[(12, 2, 3)] * 6),
     lambda t, kv, layer, s, h: t[kv * 3 + layer][s, h], {"block_size": 6}, (3, 2, (3, 3), 12)),
    ("layer kv | block token 1 dim",
     [(numbered(3, 4, 1, 7), numbered(3, 4, 1, 2, first=500)) for _ in range(2)],
     lambda t, kv, layer, s, h: t[layer][kv][s // 4, s % 4, 0], {}, (2, 1, (7, 2), 12)),
    ("layer kv | block head dim/4 token dim%4",
     [(numbered(3, 2, 2, 5, 4), numbered(3, 2, 2, 5, 4, first=700))],
     lambda t, kv, layer, s, h: torch.cat([t[layer][kv][s // 5, h, n, s % 5] for n in (0, 1)]),
     {}, (1, 2, (8, 8), 15)),
    ("layer | block token dim", pair((3, 4, 9), (3, 4, 9)),
     lambda t, kv, layer, s, h: t[layer][s // 4, s % 4], {"kv": 1, "heads": 1}, (2, 1, (9,), 12)),
    ("block head layer kv token dim", numbered(3, 2, 2, 3, 4, 3),
     lambda t, kv, layer, s, h: t[s // 4, h, layer, kv, s % 4], {"kv": 3, "layers": 2},
     (2, 2, (3, 3, 3), 12)),
    ("kv layer token (head dim)", numbered(2, 3, 7, 6),
     lambda t, kv, layer, s, h: t[kv, layer, s, 3 * h : 3 * h + 3], {"heads": 2},
     (3, 2, (3, 3), 7)),
    # the last group covers two dimensions
    ("kv layer token (head dim)", numbered(2, 3, 7, 2, 3),
     lambda t, kv, layer, s, h: t[kv, layer, s, h], {"dim": 3}, (3, 2, (3, 3), 7)),
    ("block | kv layer token (head dim)", pair((2, 3, 4, 6), (2, 3, 4, 6)),
     lambda t, kv, layer, s, h: t[s // 4][kv, layer, s % 4, 3 * h : 3 * h + 3], {"heads": 2},
     (3, 2, (3, 3), 8)),
    ("layer kv | 1 head token dim",
     [[numbered(1, 2, 5, 3), numbered(1, 2, 5, 3, first=100)] for _ in range(2)],
     lambda t, kv, layer, s, h: t[layer][kv][0, h, s], {}, (2, 2, (3, 3), 5)),
    ("kv | block layer head token dim", pair((3, 2, 2, 4, 3), (3, 2, 2, 4, 3)),
     lambda t, kv, layer, s, h: t[kv][s // 4, layer, h, s % 4], {}, (2, 2, (3, 3), 12)),
    ("token/2 (dim kv) token%2 head", numbered(3, 6, 2, 2),
     lambda t, kv, layer, s, h: t[s // 2, kv::2, s % 2, h], {}, (1, 2, (3, 3), 6)),
    # pages of 8 elements, 50 apart, after an offset
    ("layer | block token dim", [numbered(400).as_strided((3, 2, 4), (50, 4, 1), 7)],
     lambda t, kv, layer, s, h: t[0][s // 2, s % 2], {}, (1, 1, (4,), 6)),
    ("token head kv dim", numbered(2, 3, 4, 2).permute(2, 3, 0, 1),
     lambda t, kv, layer, s, h: t[s, h, kv], {}, (1, 2, (3, 3), 4)),
    # an opaque page is one row
    ("layer | block page", pair((3, 4, 6)), lambda t, kv, layer, s, h: t[0][s // 4].flatten(),
     {"block_size": 4}, (1, 1, (24,), 12)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "tensors", "by_hand", "extents", "facts"),
    HANDS,
    ids=[each[0] for each in HANDS],
)
def test_rows_are_those_of_plain_indexing(
    layout: str, tensors: Any, by_hand: Any, extents: dict[str, Any], facts: tuple[Any, ...]
) -> None:
    rows = Rows(tensors, layout, extents)
    memory = Memory.snapshot(tensors)
    elements = tuple(width // 4 for width in rows.widths)
    assert (rows.layers, rows.heads, elements, rows.slots) == facts
    assert rows.kv == len(elements)
    for kv, layer, slot in product(range(rows.kv), range(rows.layers), range(rows.slots)):
        result = memory.read(rows.row_addresses(kv, layer, [slot]))[0].view(np.int32)
        for head in range(rows.heads):
            assert result[head].tolist() == by_hand(tensors, kv, layer, slot, head).tolist()


def test_addresses_worked_out_by_hand() -> None:
    """An indexer's block of 64 tokens: 64 * 128 bytes of values, then 64 * 4 bytes of scales."""
    page = torch.zeros(2, 64, 132, dtype=torch.uint8)
    split = Rows([page], "layer | block (kv token dim)", {"dim": (128, 4), "block_size": 64})
    values, scales = (split.row_addresses(kv, 0, [64 + 3]) - page.data_ptr() for kv in (0, 1))
    assert values[0, 0].tolist() == list(range(8448 + 3 * 128, 8448 + 4 * 128))
    assert scales[0, 0].tolist() == list(range(8448 + 8192 + 12, 8448 + 8192 + 16))


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


@pytest.mark.parametrize(("layout", "shape", "extents"), [
    ("kv token dim", (3, 4, 5), {}),  # a written kv is 2
    ("kv token dim", (2, 4, 5), {"dim": 6}),
    ("kv token dim", (2, 4, 5, 1), {}),
    ("token (head dim)", (4, 6), {}),  # two unknowns
    ("token (head dim)", (4, 7), {"heads": 2}),
    ("token dim", (4, 6), {"heads": 2}),
    ("kv token dim", (2, 4, 6), {"dim": (6, 2)}),  # unequal widths need parentheses
    ("token head dim/2 dim%2", (4, 6, 2, 3), {}),
])  # fmt: skip
def test_contradictions_are_refused(layout: str, shape: Any, extents: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Expected .* got "):
        Rows(torch.zeros(shape), layout, extents)


def test_index_by_its_definition() -> None:
    table = torch.tensor([7, -1, 2], dtype=torch.int32)
    assert expand(table, 4, 2, 9).tolist() == [30, 31, -1, -1, -1, -1, 8, 9, 10]
    assert expand(table[::2], 1, 0, 2).tolist() == [7, 2]
    assert expand(None, 1, 5, 3).tolist() == [5, 6, 7]


# -- verdicts -----------------------------------------------------------------------------------


def patterned(*shape: int, storage: int) -> torch.Tensor:
    """A float16 tensor of pattern bytes between canaries."""
    retained = guarded(2 * prod(shape), seed=1, storage=storage)
    return retained.tensor(torch.float16, shape, torch.empty(shape).stride())


def gather() -> list[Any]:
    """Arguments of a gather of slots 9, (hole), 2 into a chunk of four tokens."""
    cache = [patterned(2, 3, 4, 2, 5, storage=n) for n in range(2)]
    src = [cache, "layer | kv block token head dim", None]
    dst = [patterned(2, 2, 4, 10, storage=7), "kv layer token (head dim)", {"heads": 2}]
    return [*src, *dst, [9, -1, 2], [0, 1, 3]]


def spoil(what: str, cache: list[torch.Tensor], chunk: torch.Tensor) -> None:
    words = chunk.view(torch.int16)
    row = chunk.view(torch.uint8)[0, 0, 0]
    if what == "kv":
        words[:, 1, 3] = words[:, 1, 3].flip(0)
    elif what == "hole":
        words[1, 0, 1] = cache[0].view(torch.int16)[1, 0, 2].reshape(10)
    elif what == "shift":
        row[:] = row.roll(-1)
    elif what == "tail":
        torch.empty(0, dtype=torch.uint8).set_(chunk.untyped_storage())[-64] = 0
    elif what == "bit":
        chunk.view(torch.uint8)[0, 1, 3, 13] ^= 0x10
    else:
        cache[1].view(torch.uint8)[1, 2, 3, 1, 4] ^= 1


@pytest.mark.parametrize(("what", "names"), [
    ("kv", ["layer 1 key slot 3 head 0 byte 0", "source layer 1 value slot 2 head 0 byte 0",
            "expected", "source layer 1 key slot 2 head 0 byte 0", "40 bytes"]),
    ("hole", ["layer 0 value slot 1 head 0 byte 0", "source layer 0 value slot 2 head 0",
              "must not write"]),
    ("shift", ["layer 0 key slot 0 head 0 byte 0", "source layer 0 key slot 9 head 0 byte 1;"]),
    ("tail", ["padding or canary (storage 0, offset 384)", "must not write", "1 bytes"]),
    ("bit", ["layer 1 key slot 3 head 1 byte 3", "unknown origin", "slot 2 head 1 byte 3"]),
    ("source", ["wrote 1 bytes of its source", "layer 1 value slot 11 head 1 byte 4"]),
])  # fmt: skip
def test_a_copy_by_hand_is_right_and_a_wrong_byte_is_named(what: str, names: list[str]) -> None:
    arguments = gather()
    cache = arguments[0]
    chunk = arguments[3]
    expected = expected_copy(*arguments)
    assert "was not written" in (compare(expected, chunk) or "")
    for layer, (slot, token) in product(range(2), ((9, 0), (2, 3))):
        row = cache[layer].view(torch.int16)[:, slot // 4, slot % 4].reshape(2, 10)
        chunk.view(torch.int16)[:, layer, token] = row
    assert compare(expected, chunk, cache) is None
    spoil(what, cache, chunk)
    verdict = compare(expected, chunk, cache) or ""
    assert all(name in verdict for name in names), verdict


@pytest.mark.parametrize(
    ("shape", "extents"), [((2, 2, 4, 12), {}), ((1, 2, 4, 10), {"kv": 1}), ((2, 3, 4, 10), {})]
)
def test_sides_that_hold_other_rows_are_refused(shape: Any, extents: dict[str, Any]) -> None:
    arguments = gather()
    arguments[3:] = [torch.zeros(shape), arguments[4], arguments[5] | extents, [0], [0]]
    with pytest.raises(ValueError, match=r"Expected equal .* at src and .* at dst"):
        expected_copy(*arguments)


def test_opaque_pages_go_whole_or_not_at_all() -> None:
    src = pattern_bytes(0, 0, 96).reshape(4, 24)
    dst = np.zeros((2, 24), dtype=np.uint8)
    form = ("layer | block page", {"block_size": 4})
    sides = ([torch.from_numpy(src)], *form, [torch.from_numpy(dst)], *form)
    after = expected_copy(*sides, [12, 13, 14, 15, -1, -1, -1, -1], np.arange(8)).after
    assert after.regions[0].content.tolist() == [*src[3].tolist(), *[0] * 24]
    for wrong in ([12, 13, 14], [1, 2, 3, 4], [12, 13, 14, -1], [-1, 13, 14, 15]):
        with pytest.raises(ValueError, match="whole blocks"):
            expected_copy(*sides, wrong, np.arange(len(wrong)))


def test_storages_that_share_memory_are_kept_once() -> None:
    content = np.arange(32, dtype=np.uint8)
    low = torch.from_numpy(content[:24])
    high = torch.from_numpy(content[8:])
    memory = Memory.snapshot([low, high])
    assert [r.content.tolist() for r in memory.regions] == [list(range(32))]
    address = np.array([high.data_ptr() + 23])
    assert memory.read(address).tolist() == [31]
    with pytest.raises(IndexError):
        memory.read(address + 1)


# -- pattern --------------------------------------------------------------------------------------


def test_pattern_depends_on_place_alone() -> None:
    whole = pattern_bytes(3, 5, 4096)
    assert (pattern_bytes(3, 5, 100, start=1001) == whole[1001:1101]).all()
    others = (pattern_bytes(3, 6, 4096), pattern_bytes(4, 5, 4096), poison_bytes(3, 5, 4096))
    assert all((whole != other).mean() > 0.99 for other in others)
    assert np.unique(whole).size == 256
    windows = np.lib.stride_tricks.sliding_window_view(whole, 8).copy().view(np.uint64)
    assert np.unique(windows).size == windows.size
    halves = torch.from_numpy(whole.copy()).view(torch.float16)
    assert bool(halves.isnan().any())


def test_canaries_notice() -> None:
    assert canary_bytes(9, start=3)[5] == canary_bytes(1)[0]
    retained = guarded(40)
    assert retained.payload().tolist() == pattern_bytes(0, 0, 40, start=64).tolist()
    retained.payload().fill_(9)
    assert retained.broken() is None
    for at in (104, 63, 0):
        retained.whole[at] ^= 1
        assert f"the first at {at}." in str(retained.broken())
    with pytest.raises(ValueError, match="Expected a tensor inside"):
        retained.tensor(torch.float32, (2, 6), (5, 1))


# -- strategies -----------------------------------------------------------------------------------


@given(cases(holes=False, ragged=False, factored=False, containers=("layer",)))
def test_options_are_kept(case: Case) -> None:
    for side in (case.src, case.dst):
        assert (side.at(case.count) >= 0).all()
        assert "/" not in side.layout
        assert side.layout.partition("|")[0].strip(" ()") == "layer" or "|" not in side.layout


@given(page_cases(loose_pages=False, expanded=False))
def test_drawn_pages_go_whole_and_can_be_dense(case: Case) -> None:
    for rows in (case.expected().src, case.expected().dst):
        page = rows.row_addresses(0, 0, [0]).ravel()
        assert (np.diff(page) == 1).all()
    assert case.src.opaque
    assert case.count % (case.src.block_size or 0) == 0
    assert case.src.widths == case.dst.widths
