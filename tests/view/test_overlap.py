# SPDX-License-Identifier: Apache-2.0
"""Destinations of which two rows share a byte are refused, and no others are."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from portakv import KVView, LayoutError, copy_blocks
from portakv.storage import BlockForm
from portakv.view import overlap
from portakv.view.view import check_writable

DIMENSIONS = ("layer", "kv", "block", "token", "head", "dim")
LARGEST = 1 << 20  # elements from the first to the last of a drawn tensor


def overlapping(tensors: list[torch.Tensor]) -> bool:
    """Return True if two elements of one or several tensors lie at one address, by counting."""
    places = []
    for tensor in tensors:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        at = np.array([tensor.data_ptr()])
        for extent, stride in steps:
            at = np.add.outer(at, np.arange(extent) * stride * tensor.itemsize).reshape(-1)
        places.append(at)
    every = np.concatenate(places)
    return len(np.unique(every)) < len(every)


def refused(view: KVView) -> bool:
    try:
        check_writable(view)
    except LayoutError:
        return True
    return False


@st.composite
def _strided(draw: st.DrawFn, count: int) -> tuple[list[torch.Tensor], list[str]]:
    """Return ``count`` tensors of one shape and strides in one storage, and their axes."""
    axes = draw(st.permutations(DIMENSIONS[1:] if count > 1 else DIMENSIONS))
    axes = [axis for axis in axes if axis in ("dim", "token") or draw(st.booleans())]
    shape: list[int] = []
    strides: list[int] = []
    step = 1
    for axis in reversed(axes):
        extent = 2 if axis == "kv" else draw(st.integers(1, 4))
        # From the stride of a contiguous tensor on: also smaller and larger ones.
        stride = max(0, step + draw(st.sampled_from([0, 0, 0, 0, 1, 2, -1, -2, step, 3])))
        if draw(st.integers(0, 9)) == 0:
            stride = draw(st.integers(0, 12))
        shape.insert(0, extent)
        strides.insert(0, stride)
        step = max(step, stride * extent)
    order = draw(st.permutations(range(len(axes))))  # strides need not descend
    shape = [shape[i] for i in order]
    strides = [strides[i] for i in order]
    axes = [axes[i] for i in order]
    dtype = draw(st.sampled_from([torch.uint8, torch.int16]))
    starts = [draw(st.integers(0, 2 * step)) for _ in range(count)]
    last = sum((n - 1) * each for n, each in zip(shape, strides, strict=True))
    assume(last < LARGEST)
    memory = torch.zeros(max(starts) + last + 1, dtype=dtype, device="cpu")
    return [memory.as_strided(shape, strides, start) for start in starts], axes


@settings(max_examples=4 * settings().max_examples)
@given(_strided(1))
def test_strides_of_one_tensor_decide_as_a_count_of_its_places_does(
    drawn: tuple[list[torch.Tensor], list[str]],
) -> None:
    (tensor,), axes = drawn
    assert refused(KVView(tensor, " ".join(axes))) == overlapping([tensor])


@settings(max_examples=4 * settings().max_examples)
@given(st.integers(2, 4).flatmap(_strided))
def test_several_tensors_decide_as_a_count_of_their_places_does(
    drawn: tuple[list[torch.Tensor], list[str]],
) -> None:
    tensors, axes = drawn
    assert refused(KVView(tensors, f"layer | {' '.join(axes)}")) == overlapping(tensors)


@st.composite
def _terms(draw: st.DrawFn) -> list[tuple[int, int]]:
    return draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=5))


@settings(max_examples=4 * settings().max_examples)
@given(_terms(), _terms(), st.integers(-60, 60))
@example([(1000, 1_000_003), (1000, 1_000_000)], [(1, 1)], 0)
def test_sums_are_found_as_a_search_of_all_finds_them(
    one: list[tuple[int, int]], other: list[tuple[int, int]], target: int
) -> None:
    def sums(steps: list[tuple[int, int]]) -> Any:
        at = np.zeros(1, dtype=np.int64)
        for extent, stride in steps:
            at = np.add.outer(at, np.arange(extent) * stride).reshape(-1)
        return at

    mine = sums(one)
    inside = [overlap.Term(1 - n, n - 1, stride, "token") for n, stride in one]
    found = overlap.solve(inside, 0, nonzero=True)
    assert (found is not None) == (len(np.unique(mine)) < len(mine))
    if len(mine) * len(sums(other)) > 1_000_000:
        return
    between = [overlap.Term(0, n - 1, stride, "token") for n, stride in one]
    between += [overlap.Term(1 - n, 0, stride, "token") for n, stride in other]
    found = overlap.solve(between, target)
    assert (found is not None) == bool(np.isin(mine - target, sums(other)).any())


@pytest.mark.parametrize(
    ("shape", "strides", "layout", "axes"),
    [
        ((5, 3, 8), (16, 4, 1), "token head dim", "'head' and 'dim'"),
        ((5, 4, 8), (24, 8, 1), "block token dim", "'block' and 'token'"),
        ((2, 5, 8), (36, 8, 1), "kv token dim", "'kv'"),
        ((3, 5, 8), (36, 8, 1), "layer token dim", "'layer'"),
    ],
)
def test_partly_shared_rows_are_refused_before_a_byte_changes(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: str, axes: str
) -> None:
    memory = torch.zeros(4096, dtype=torch.int8, device="cpu")
    dst = KVView(memory.as_strided(shape, strides), layout)
    src = KVView(torch.ones(shape, dtype=torch.int8, device="cpu"), layout)
    with pytest.raises(LayoutError, match=f"rows, which are apart along .*{axes}.* share bytes"):
        copy_blocks(src, dst, *([0], [0]) if dst.form.paged else (None, None))
    assert not memory.any()


def test_rows_between_each_other_are_written() -> None:
    """Blocks lie inside of tokens, and keys between values: each byte has one place."""
    memory = torch.zeros(2 * 3 * 4 * 8, dtype=torch.int8, device="cpu")
    dst = KVView(memory.view(4, 3, 2, 8).permute(2, 1, 0, 3), "kv block token dim")
    src = KVView(torch.ones(2, 3, 4, 8, dtype=torch.int8, device="cpu"), "kv block token dim")
    copy_blocks(src, dst, [0, 1, 2], [2, 0, 1]).synchronize()
    assert bool(memory.all())


def test_one_tensor_for_two_layers_is_told_to_have_separate_memory() -> None:
    layer = torch.zeros(2, 3, 4, 8, device="cpu")
    with pytest.raises(LayoutError, match=r"'layer' axis has stride 0.*separate memory for each l"):
        check_writable(KVView([layer, layer], "layer | kv block token dim"))
    with pytest.raises(LayoutError, match=r"'token' axis has stride 0.*Pass tensor.contiguous\(\)"):
        check_writable(KVView(layer[0, 0, :1].expand(4, 8), "token dim"))


@pytest.mark.parametrize("order", [*product((0, 1), repeat=2)])
def test_layers_in_any_order_between_each_other_are_written(order: tuple[int, int]) -> None:
    memory = torch.zeros(5, 4, 8, dtype=torch.int8, device="cpu")
    layers = [memory[:, n] for n in (3, 0, 2, 1)]
    if order[0]:
        layers = layers[::-1]
    if order[1]:
        layers[0] = layers[1]
    assert refused(KVView(layers, "layer | token dim")) == bool(order[1])


@pytest.mark.parametrize("sliced", [False, True])
def test_images_that_begin_at_each_page_are_written(sliced: bool) -> None:
    """A store names only images that are apart; their form is judged as one image."""
    cache = KVView(torch.ones(2, 3, 64, 2, 32, device="cpu"), "layer block token head dim")
    form = BlockForm.of(cache, model="test")
    assert form.image_bytes > 2 * 4096
    pages = torch.zeros(32, 4096, dtype=torch.uint8, device="cpu")
    rows = form.view(pages)
    if sliced:
        rows, cache = (each.slice(layers=1) for each in (rows, cache))
    check_writable(rows)
    copy_blocks(cache, rows, [0, 2], [0, form.image_bytes // 4096]).synchronize()
    assert bool(rows.plane(0, 0)[0].all())
    twice = torch.zeros(16, 8192, dtype=torch.uint8, device="cpu").as_strided((8, 64), (32, 1))
    assert refused(KVView(twice, "block page", block_size=64))
