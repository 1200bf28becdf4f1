# SPDX-License-Identifier: Apache-2.0
"""Packed views: how their tensors are read, and what they refuse."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from portakv import CopyPlan, InvalidTerms, KVView, LayoutError, Pack, Unsupported

IMAGE = "block layer kv head page"
SLOT = 448  # bytes of planes of 256 values


def image(*size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros((*size, SLOT), dtype=dtype, device="cpu")


def packed(tensors: Any, layout: str = IMAGE, **more: Any) -> KVView:
    declared = {"block_size": 16, "dim": 16, "encoding": "pack", **more}
    return KVView(tensors, layout, **declared)


def test_a_block_has_a_slot_for_each_layer_kv_and_head() -> None:
    view = packed(image(5, 3, 2, 4))
    form = view.form
    assert (form.layers, form.kv, form.heads, form.block_size) == (3, 2, 4, 16)
    assert form.encoding == (Pack().plane(256),) * 2
    assert form.widths == (SLOT, SLOT)
    assert view.slots == 5 * 16
    assert view.opaque
    assert pickle.loads(pickle.dumps(form)) == form
    rows = view.as_slots()
    assert (rows.block_size, rows.slots, rows.form.encoding) == (1, 5, ())
    assert view.as_slots() is rows
    raw = packed(image(5, 3, 2, 4), encoding=Pack(3, SLOT)).form
    assert raw != form


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("block layer (kv head page)", (5, 3, 8)),
        ("layer kv | block head page", (5, 4)),
        ("block head layer (kv page)", (5, 4, 3, 2)),
    ],
)
def test_slots_in_other_orders(layout: str, size: tuple[int, ...]) -> None:
    tensors: Any = image(*size)
    if layout.startswith("layer kv |"):
        tensors = [(image(*size), image(*size)) for _ in range(3)]
    elif "(kv head" in layout:
        tensors = tensors.flatten(2)
    else:
        tensors = tensors.flatten(3)
    view = packed(tensors, layout, kv=2, heads=4)
    assert (view.layers, view.kv, view.heads, view.slots) == (3, 2, 4, 80)
    assert view.layout.text == layout


def test_slices_are_slices_of_slots() -> None:
    whole = image(5, 3, 2, 4)
    part = packed(whole).slice(layers=1, heads=slice(1, 3), kv=1)
    assert (part.layers, part.kv, part.heads, part.slots) == (1, 1, 2, 80)
    assert part.form.encoding == (Pack().plane(256),)
    assert part.origins == (whole[0, 1, 1, 1].data_ptr(),)


@pytest.mark.parametrize(
    ("arguments", "expected", "error"),
    [
        ({"encoding": "zip"}, "encoding to be 'pack'", InvalidTerms),
        ({"encoding": 4}, "encoding to be 'pack'", InvalidTerms),
        ({"block_size": None}, "Expected block_size for the packed view", LayoutError),
        ({"dim": None}, "Expected dim for the packed view", LayoutError),
        ({"block_size": 3}, "planes of 48 values", Unsupported),
        ({"dim": 128}, "slot of 3136 bytes, got 448", LayoutError),
        ({"layout": "block layer kv head dim"}, "to name `block`, and `page`", LayoutError),
        ({"layout": "layer kv head page"}, "to name `block`, and `page`", LayoutError),
        ({"tensors": image(5, 3, 2, 4).view(torch.bfloat16)}, "224|tensors of uint8", LayoutError),
    ],
)
def test_wrong_packed_views(arguments: dict[str, Any], expected: str, error: type) -> None:
    supplied = {"tensors": image(5, 3, 2, 4), **arguments}
    with pytest.raises(error, match=expected):
        packed(**supplied)


@pytest.mark.parametrize("wrong", [torch.zeros(5, 2, 4, 448, dtype=torch.uint8), torch.zeros(5, 2)])
def test_each_tensor_of_a_list_has_to_hold_slots(wrong: torch.Tensor) -> None:
    with pytest.raises(LayoutError, match="a slot of 3136 bytes, got "):
        KVView(
            [wrong] * 3,
            "layer | block kv head page",
            block_size=16,
            dim=128,
            encoding="pack",
        )


def test_a_slot_has_contiguous_bytes() -> None:
    spread = torch.zeros((5, 3, 2, 4, SLOT, 2), dtype=torch.uint8, device="cpu")[..., 0]
    with pytest.raises(Unsupported, match="bytes of a slot must be contiguous"):
        packed(spread)


def test_no_plan_of_rows_reads_a_packed_view() -> None:
    """What was not taught the encoding cannot take slots for rows or pages."""
    view = packed(image(5, 3, 2, 4))
    pages = KVView(image(5, 3, 2), "block layer kv page", block_size=16)
    for src, dst in ((view, view), (view, pages), (pages, view)):
        with pytest.raises(Unsupported, match="packed view"):
            CopyPlan(src.form, dst.form, 16, 16)
    with pytest.raises(LayoutError, match="packed by 'pack'"):
        view.plane(0, 0)
