# SPDX-License-Identifier: Apache-2.0
"""Checksums of parts add up to the checksum of the whole, which numpy computes from its definition.

One changed byte, or two exchanged words, change it.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ambient import STATES
from support.core_cases import noise
from support.migrate_cases import WIDTHS, Held, Rank, drawn_model, ranks

from portakv import Index, KVView
from portakv.migrate.checksum import box_checksums, checksum
from portakv.runtime.word_sums import MODULUS

Words = np.ndarray[Any, np.dtype[np.int64]]


def mixed(words: Words, starts: list[tuple[int, int]] | None = None) -> int:
    """The sum of words, each times a number for its place on each axis: splitmix64's multiplier and
    its first two mixes, with shifts that keep the sign, and odd. ``starts``: which axis is each,
    and where it begins."""
    for (axis, start), n in zip(starts or enumerate([0] * words.ndim), words.shape, strict=True):
        key = (np.arange(n, dtype=np.int64) + start + (axis << 48)) * (0x9E3779B97F4A7C15 - MODULUS)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            key = (key ^ key >> shift) * (factor - MODULUS)
        words = np.tensordot(words, key | 1, (0, 0))
    return int(words) % MODULUS


def expected(model: list[Any], first: int = 0) -> int:
    """The checksum of whole rows [layer, token, head, byte] of each kv: axes are layer, token, and
    for each kv the words of all heads, which are as wide as all rows allow."""
    unit = gcd(4, *(kv.shape[3] for kv in model))
    total = 0
    for nth, kv in enumerate(model):
        words = np.ascontiguousarray(kv).view(f"i{unit}").astype(np.int64)
        rows = words.reshape(*kv.shape[:2], -1).transpose(1, 0, 2)
        total += mixed(rows, [(1, first), (0, 0), (2 + nth, 0)])
    return total % MODULUS


def of(cached: Held, ids: Any = None, first: int = 0, count: int | None = None) -> int:
    """The checksum of what a rank holds."""
    slots = cached.slots if ids is None else ids
    index = Index(torch.from_numpy(slots))
    return checksum(cached.cache.view, index, len(slots), cached.rank.box, first)


@given(st.sampled_from([*WIDTHS, (3, 1), (6,)]), st.data())
def test_checksums_of_all_ranks_add_up_to_that_of_the_model(
    widths: tuple[int, ...], data: st.DataObject
) -> None:
    """TP 2 and TP 3, other layouts, other block sizes, tokens dealt out in turns: one checksum."""
    layers = data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 40))
    heads = 1 if len(widths) == 1 else data.draw(st.integers(1, 6))
    model = drawn_model(layers, tokens, heads, widths)
    first = data.draw(st.integers(0, 1 << 20))
    presets = WIDTHS.get(widths, "vllm-mla" if len(widths) == 1 else "vllm-ascend").split()
    size = data.draw(st.integers(1, 9))
    total = 0
    seen = set()
    for rank in data.draw(ranks(layers, heads, tokens)):
        reference = rank.layers, rank.heads, rank.tokens.tobytes()
        if reference not in seen:
            cached = Held(rank, data.draw(st.sampled_from(presets)), widths, size)
            cached.fill(model)
            total += of(cached, first=first)
        seen.add(reference)
    assert total % MODULUS == expected(model, first)


def whole_rank(tokens: int = 24, layers: int = 2, heads: int = 2) -> Rank:
    return Rank((0, layers, layers), (0, heads, heads), np.ones(tokens, bool))


def test_block_tables_and_slots_have_one_checksum() -> None:
    cached = Held(whole_rank(), "vllm-nhd", (8, 8), 4)
    blocks = Index(torch.from_numpy(cached.blocks), step=4)
    view = cached.cache.view
    window = cached.rank.box
    assert checksum(view, blocks, 24, window) == of(cached)
    tail = checksum(view, Index(blocks.ids, step=4, offset=6), 18, window, first=6)
    assert (checksum(view, blocks, 6, window) + tail) % MODULUS == of(cached)


def test_a_flipped_bit_and_swapped_words_change_it() -> None:
    cached = Held(whole_rank(), "vllm-nhd", (8, 8), 4)
    before = of(cached)
    rows = cached.cache.tensors[1].view(torch.int64)
    at = int(cached.blocks[0])
    sums = {before}
    for bit in range(64):
        rows[0, at, 1, 1, 0] ^= 1 << bit if bit < 63 else -1 << 63
        sums.add(of(cached))
    assert len(sums) == 65
    rows.copy_(rows[:, :, [1, 0, 2, 3]])
    sums.add(of(cached))
    rows.copy_(rows[..., [1, 0]])
    sums.add(of(cached))
    assert len(sums) == 67
    swapped = cached.slots.copy()
    swapped[[2, 9]] = swapped[[9, 2]]
    assert of(cached, swapped) != of(cached)
    assert of(cached, first=1) != of(cached)


def test_what_is_left_out_does_not_count() -> None:
    """Skipped positions, and slots that no position names."""
    cached = Held(whole_rank(10), "sglang-mha", (8, 8), 4)
    none = np.full(10, -1)
    nothing = np.zeros(0, np.int64)
    assert of(cached, none) == of(cached, nothing) == 0
    odd = np.arange(10) % 2 == 1
    parts = [np.where(odd, cached.slots, -1), np.where(odd, -1, cached.slots)]
    assert sum(map(of, [cached] * 2, parts)) % MODULUS == of(cached)
    before = of(cached)
    other = int(({*range(12)} - {*cached.slots.tolist()}).pop())
    cached.cache.tensors[0][0][other] += 1
    assert of(cached) == before


def test_many_rows_are_summed_in_slices() -> None:
    """The rows are more than one gather takes."""
    tokens = 3000
    layers = 8
    pool = noise(layers, tokens, 2048, dtype=torch.uint8)
    view = KVView([*pool], "layer | (block token) dim", block_size=1)
    window = (0, 8), (0, 1)
    model = [pool.numpy()[:, :, None]]
    assert checksum(view, Index([*range(tokens)]), tokens, window) == expected(model)


@pytest.mark.parametrize("kv", [1, 2])
def test_pages_are_summed_whole(kv: int) -> None:
    pages = [noise(5, 33 * 4, dtype=torch.uint8, seed=n) for n in range(3 * kv)]
    layout = "layer | block page" if kv == 1 else "(layer kv) | block page"
    view = KVView(pages, layout, block_size=4, kv=kv)
    window = ((0, 3), (0, 1))
    ids = Index([4, -1, 2], step=4)
    sums = checksum(view, ids, 12, window)
    turned = KVView([page.clone() for page in pages], layout, block_size=4, kv=kv)
    assert sums == checksum(turned, ids, 12, window)
    parts = [(Index([4], step=4), 0), (Index([2], step=4), 8)]
    assert sums == sum(checksum(turned, x, 4, window, at) for x, at in parts) % MODULUS
    pages[0][4, 131] += 1
    assert sums != checksum(view, ids, 12, window)


def box_checksum(box: torch.Tensor, *start: int) -> int:
    """The checksum of one part of a tensor."""
    return box_checksums([(box, start)])[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.float64])
def test_boxes_of_a_tensor_add_up(dtype: torch.dtype) -> None:
    """A column, a row and an uneven split of a parameter, none of them contiguous: cut at whole
    words, they have the sum that numpy finds in the whole."""
    bits = noise(6, 12 * dtype.itemsize, dtype=torch.uint8)
    whole = (bits % 2 if dtype == torch.bool else bits).view(dtype)
    reference = box_checksum(whole, 0, 0)
    for axis, cut in ((0, 3), (1, 4), (1, 8), (0, 5)):
        one, other = whole.split([cut, whole.shape[axis] - cut], axis)
        start = (cut, 0) if axis == 0 else (0, cut)
        assert sum(box_checksums([(one, (0, 0)), (other, start)])) % MODULUS == reference
    assert reference == mixed(whole.view(torch.int32).numpy().astype(np.int64))
    assert len({reference, box_checksum(whole.flip(0), 0, 0), box_checksum(whole, 0, 4)}) == 3


@pytest.mark.parametrize("shape", [(5, 300_000), (300_000, 5), (700_001,), (1, 1, 300_000), (3, 2)])
def test_large_boxes_are_mixed_in_pieces(shape: tuple[int, ...]) -> None:
    words = noise(*shape, 4, dtype=torch.uint8).view(torch.int32)[..., 0]
    reference = mixed(words.numpy().astype(np.int64))
    assert box_checksum(words, *[0] * len(shape)) == reference


@pytest.mark.parametrize("words", [3, 1000, 40_000])
def test_parts_of_one_shape_have_a_sum_each(words: int) -> None:
    """Several fit one batch, or none does."""
    tensors = [noise(words, 4, dtype=torch.uint8, seed=n).view(torch.int32) for n in range(50)]
    boxes = [(tensor, (9, 0)) for tensor in tensors]
    assert box_checksums(boxes) == [box_checksum(tensor, *start) for tensor, start in boxes]


def test_bits_that_flip_in_an_even_number_of_words_do_not_cancel() -> None:
    """Each bit, the highest as well, in all words together."""
    cached = noise(64, 32, dtype=torch.uint8).view(torch.int64)
    flips = [0, *(1 << bit for bit in range(63)), -1 << 63]
    assert len({box_checksum(cached ^ flip, 0, 0) for flip in flips}) == 65


def test_a_transposed_tensor_has_another_checksum() -> None:
    square = noise(8, 32, dtype=torch.uint8).view(torch.int32)
    assert box_checksum(square, 0, 0) != box_checksum(square.T.contiguous(), 0, 0)
    assert box_checksum(square, 0, 0) == box_checksum(square.T.contiguous().T, 0, 0)


def test_scalars_complex_numbers_and_nothing_have_checksums() -> None:
    values = {box_checksum(torch.tensor(x, dtype=torch.float32)) for x in (0.0, 1.0, -0.0)}
    assert len(values) == 3
    number = torch.tensor([1 + 2j, 3j], dtype=torch.complex64)
    assert box_checksum(number, 0) != box_checksum(number.conj().resolve_conj(), 0)
    assert box_checksum(torch.zeros(0, 4, dtype=torch.float32), 0, 0) == 0
    assert box_checksum(torch.zeros(1, 0, dtype=torch.int8), 0, 0) == 0
    grad = torch.ones(3, dtype=torch.float32, requires_grad=True)
    assert box_checksum(grad, 0) == box_checksum(torch.ones(3), 0)


@pytest.mark.parametrize("state", STATES)
def test_checksums_in_any_state_of_torch(state: str) -> None:
    cached = Held(whole_rank(), "vllm-hnd", (8, 8), 4)
    weight = noise(3, 4, dtype=torch.bfloat16)
    reference = of(cached), box_checksum(weight, 0, 0)
    with STATES[state](torch.device("cpu")):
        assert (of(cached), box_checksum(weight, 0, 0)) == reference
