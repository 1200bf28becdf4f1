# SPDX-License-Identifier: Apache-2.0
"""Parameters, their boxes and splits: each element has one owner, or an error names it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.weight_cases import Array, local_of, whole_of

from portakv.errors import InvalidTerms, LayoutError
from portakv.migrate.checksum import box_checksums
from portakv.weights.parameters import Box, Parameter, items_of, part_of, plan


def pulled(local: dict[str, Parameter], owners: Sequence[dict[str, Parameter]]) -> None:
    """Carry a plan out, between tensors of this process."""
    for name, i, box, remote in plan(items_of(local), [items_of(x) for x in owners]):
        source = part_of(owners[i][name].tensor, remote, box.extents)
        part_of(local[name].tensor, box.start, box.extents).copy_(source)


def checksum_of(tensor: torch.Tensor, box: Box) -> int:
    """The checksum of a box of a tensor."""
    return box_checksums([(part_of(tensor, box.start, box.extents), box.offset)])[0]


def tensor_of(array: Array, strided: bool) -> torch.Tensor:
    """The same elements, with others between them if ``strided``."""
    if not strided or not array.ndim:
        return torch.from_numpy(array.copy())
    memory = torch.full((*array.shape[:-1], 2 * array.shape[-1] + 1), -7, dtype=torch.int32)
    retained = memory[..., 1::2]
    retained.copy_(torch.from_numpy(array))
    return retained


@given(st.data())
def test_any_tp_pulls_from_any_other(data: st.DataObject) -> None:
    """Column and row parallel, fused with uneven parts, ranks that outnumber the units: each rank
    of the reader finds numpy's slices, and nothing between its elements is touched."""
    draw = data.draw
    axis, dims = draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]))
    unit = draw(st.integers(1, 3))
    parts = [unit * x for x in draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))]
    shape = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    shape[axis] = sum(parts)
    whole = whole_of(shape)
    (remote, ours) = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    ranks = draw(st.permutations(range(remote)))
    owners = list[dict[str, Parameter]]()
    for r in ranks:
        retained = tensor_of(local_of(whole, axis, parts, r, remote, unit), draw(st.booleans()))
        owners.append({"w": Parameter.split(retained, axis, parts, (r, remote), unit)})
    for rank in range(ours):
        expected = local_of(whole, axis, parts, rank, ours, unit)
        tensor = tensor_of(np.zeros_like(expected), draw(st.booleans()))
        pulled({"w": Parameter.split(tensor, axis, parts, (rank, ours), unit)}, owners)
        assert np.array_equal(tensor.numpy(), expected)
        if not tensor.is_contiguous():
            assert torch.as_strided(tensor, tensor.shape, tensor.stride(), 0).eq(-7).all()


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
    """A tensor cut on all its axes, into cells that are in any order."""
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    return draw(st.permutations([*product(*map(pairwise, edges))]))


def dealt(whole: Array, cells: Sequence[tuple[tuple[int, int], ...]]) -> Parameter:
    """A process that holds some cells of a tensor, flat, one after the other."""
    rows = sum(past - first for (first, past), *_ in cells)
    memory = torch.zeros(rows, *whole.shape[1:], dtype=torch.int32)
    boxes = list[Box]()
    at = 0
    for cell in cells:
        first = tuple(a for a, _ in cell)
        extents = tuple(b - a for a, b in cell)
        start = (at, *[0] * (whole.ndim - 1))
        boxes.append(Box(first, start, extents))
        part_of(memory, start, extents).copy_(
            torch.from_numpy(whole[tuple(slice(*x) for x in cell)])
        )
        at += extents[0]
    return Parameter(memory, whole.shape, boxes)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_boxes_of_any_grid_are_found(data: st.DataObject, shape: list[int]) -> None:
    """Boxes cut on every axis, dealt out to several owners that may hold one twice."""
    whole = whole_of(shape)
    cells = data.draw(grids(shape))
    local = data.draw(grids(shape))
    count = data.draw(st.integers(1, 3))
    extra = data.draw(st.lists(st.sampled_from(cells), max_size=2))
    owners = [{"w": dealt(whole, [*cells[i::count], *extra])} for i in range(count)]
    reader = dealt(np.zeros_like(whole), local)
    expected = dealt(whole, local)
    pulled({"w": reader}, owners)
    assert torch.equal(reader.tensor, expected.tensor)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_a_cell_that_nobody_holds_is_named(data: st.DataObject, shape: list[int]) -> None:
    whole = whole_of(shape)
    cells = data.draw(grids(shape))
    gone, *retained = cells
    owners = (
        [{"w": dealt(whole, retained)}]
        if retained
        else [
            {
                "w": Parameter(
                    torch.zeros(0, *shape[1:], dtype=torch.int32),
                    shape,
                    [Box((0,) * len(shape), (0,) * len(shape), (0,) * len(shape))],
                )
            }
        ]
    )
    reader = Parameter(torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(LayoutError, match="w: no owner has") as caught:
        pulled({"w": reader}, owners)
    assert str(tuple(b - a for a, b in gone)) in str(caught.value)
    assert not reader.tensor.any()


@given(
    st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]),
    st.lists(st.integers(1, 9), max_size=3),
    st.data(),
)
def test_a_checksum_is_of_values_and_places_only(
    dtype: torch.dtype, shape: list[int], data: st.DataObject
) -> None:
    """The same wherever the elements lie, dense, strided or transposed; another for one that
    changed, or at another place."""
    whole = torch.from_numpy(whole_of([n + 2 for n in shape])).to(dtype)
    offset = tuple(data.draw(st.integers(0, 2)) for _ in shape)
    extents = tuple(shape)
    part = part_of(whole, offset, extents)
    dense = part.clone()
    turned = part.clone().T.contiguous().T if len(shape) == 2 else part
    box = Box(offset, offset, extents)
    zero = (0,) * len(shape)
    result = checksum_of(whole, box)
    for tensor in (dense, turned.clone(memory_format=torch.preserve_format)):
        assert checksum_of(tensor, Box(offset, zero, extents)) == result
    dense[(-1,) * len(shape)] += 1
    assert checksum_of(dense, Box(offset, zero, extents)) != result
    if shape:
        moved = Box((*offset[:-1], (offset[-1] + 1) % 3), offset, extents)
        assert checksum_of(whole, moved) != result


def test_scalars_and_empty_tensors_are_parameters() -> None:
    owner = {"s": Parameter(torch.tensor(3.0)), "e": Parameter(torch.zeros(0, 4))}
    local = {"s": Parameter(torch.tensor(0.0)), "e": Parameter(torch.zeros(0, 4))}
    pulled(local, [owner])
    assert local["s"].tensor == 3.0


def test_padding_is_left_alone() -> None:
    """A vocabulary of 10 rows, padded to 12 by the reader."""
    local = Parameter(torch.full((12, 2), -1), (10, 2), [Box((0, 0), (0, 0), (10, 2))])
    pulled({"w": local}, [{"w": Parameter(torch.ones(10, 2, dtype=torch.int64))}])
    assert local.tensor.tolist() == [[1, 1]] * 10 + [[-1, -1]] * 2


def test_the_owner_that_was_named_first_is_preferred() -> None:
    owners = [{"w": Parameter(torch.full((4,), float(i)))} for i in (1, 2)]
    local = Parameter(torch.zeros(4))
    pulled({"w": local}, owners)
    assert local.tensor.eq(1).all()


def test_experts_that_were_moved_are_boxes_of_one_axis() -> None:
    """Two owners hold experts in an order of their own; the reader has all, in another one."""
    whole = torch.arange(4 * 6).view(4, 3, 2)

    def holds(*experts: int) -> Parameter:
        boxes = [Box((e, 0, 0), (i, 0, 0), (1, 3, 2)) for i, e in enumerate(experts)]
        return Parameter(whole[[*experts]], (4, 3, 2), boxes)

    local = holds(2, 0, 3, 1)
    local.tensor.zero_()
    pulled({"w": local}, [{"w": holds(3, 0)}, {"w": holds(1, 2)}])
    assert torch.equal(local.tensor, whole[[2, 0, 3, 1]])


@pytest.mark.parametrize(
    ("start", "extents"), [((0, 0), (5, 2)), ((3, 0), (2, 2)), ((-1, 0), (1, 2))]
)
def test_a_box_outside_of_its_tensor_is_refused(start: Any, extents: Any) -> None:
    boxes = [Box((0, 0), start, extents)]
    with pytest.raises(LayoutError, match="Expected a box in a tensor"):
        items_of({"w": Parameter(torch.zeros(4, 2), (100, 2), boxes)})


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((8, 0), (10, 2)), ((-1, 0), (10, 2)), ((0, 0), (3, 2)), ((0,), (10, 2)), ((0, 0), (9,))],
)
def test_a_box_outside_of_the_whole_is_refused(offset: Any, shape: Any) -> None:
    with pytest.raises(LayoutError, match="Expected a box in the shape"):
        items_of({"w": Parameter(torch.zeros(4, 2), shape, [Box(offset, (0, 0), (4, 2))])})


def test_blocks_that_share_a_scale_are_not_cut() -> None:
    """Halves of 6 blocks of 4 rows (the last is shorter) may be cut at 12, not at 11."""
    rows = torch.zeros(11, 2)
    items_of({"w": Parameter(rows, (23, 2), [Box((12, 0), (0, 0), (11, 2))], block=(4, 2))})
    for offset, n in ((11, 11), (12, 10)):
        cut = Parameter(rows, (23, 2), [Box((offset, 0), (0, 0), (n, 2))], block=(4, 2))
        with pytest.raises(LayoutError, match=r"cuts no block of \(4, 2\)"):
            items_of({"w": cut})


def test_a_block_of_zero_rows_is_refused() -> None:
    """A peer's message may have one: its check must not end by a division by zero."""
    one = Parameter(torch.zeros(4, 2), (4, 2), [Box((0, 0), (0, 0), (4, 2))], block=(0, 2))
    with pytest.raises(LayoutError, match=r"cuts no block of \(0, 2\)"):
        items_of({"w": one})


def test_a_tensor_is_split_along_its_last_axis() -> None:
    cut = Parameter.split(torch.zeros(3, 4), -1, [8], (1, 2))
    assert (cut.shape, cut.boxes) == ((3, 8), (Box((0, 4), (0, 0), (3, 4)),))


@pytest.mark.parametrize(
    ("rows", "axis", "parts", "unit"), [(5, 0, (8,), 1), (4, 0, (8,), 3), (4, 2, (8,), 1)]
)
def test_a_split_that_does_not_fit_is_refused(rows: int, axis: int, parts: Any, unit: int) -> None:
    with pytest.raises((LayoutError, InvalidTerms), match=r"or give boxes|Expected axis"):
        Parameter.split(torch.zeros(rows, 2), axis, parts, (0, 2), unit)


def test_mismatches_are_one_error_that_lists_all() -> None:
    """Fault 37. Names that one side lacks, another dtype, shape, packing and block, tensors tied on
    one side only, rows that no owner has: all are reported together, and nothing was written."""
    tied = torch.zeros(4, 2)
    half = Parameter.split(torch.ones(2, 2), 0, [4], (0, 2))
    local = {
        "missing": Parameter(torch.zeros(3)),
        "dtype": Parameter(torch.zeros(3, dtype=torch.float16)),
        "shape": Parameter(torch.zeros(3)),
        "packing": Parameter(torch.zeros(3), packing="marlin"),
        "block": Parameter(torch.zeros(4, 4), block=(2, 2)),
        "embed": Parameter(tied),
        "head": Parameter(tied),
        "half": Parameter(torch.zeros(4, 2)),
        "right": Parameter(torch.zeros(3)),
    }
    owner = {
        "surplus": Parameter(torch.ones(3)),
        "dtype": Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "shape": Parameter(torch.ones(4)),
        "packing": Parameter(torch.ones(3)),
        "block": Parameter(torch.ones(4, 4), block=(4, 4)),
        "embed": Parameter(torch.ones(4, 2)),
        "head": Parameter(torch.ones(4, 2)),
        "half": half,
        "right": Parameter(torch.ones(3)),
    }
    with pytest.raises(LayoutError) as caught:
        pulled(local, [owner])
    assert str(caught.value).splitlines()[1:] == [
        "surplus: it was not requested",
        "dtype: its dtype is 'float16' here and 'bfloat16' there",
        "shape: its shape is (3,) here and (4,) there",
        "packing: its packing is 'marlin' here and '' there",
        "block: its block is (2, 2) here and (4, 4) there",
        "embed: ['embed', 'head'] are one tensor here, and ['embed'] there",
        "head: ['embed', 'head'] are one tensor here, and ['head'] there",
        "missing: no owner has it",
        "half: no owner has (2, 2) elements from (2, 0) on",
    ]
    assert not any(x.tensor.any() for x in local.values())


def test_a_tensor_without_an_axis_cannot_be_split() -> None:
    with pytest.raises(InvalidTerms, match=r"^Expected tensor to be a tensor with an axis"):
        Parameter.split(torch.tensor(3), 0, [1], cut=(0, 1))
