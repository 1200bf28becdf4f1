# SPDX-License-Identifier: Apache-2.0
"""Every layout that an engine is known to use: rows go out of it, into it, within it, and over
into another. Small shapes; the memory orders, paddings and widths are those of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from portakv.layout.presets import PRESETS
from portakv_conformance.cases import CHUNK, PAGED, Bench, Case, Shape, Workshop, between, full
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.judge.grammar import read_layout

pytestmark = pytest.mark.area("corners")

OPERATIONS = ("gather", "scatter", "migrate", "convert")
DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32)
#: The physical order where it is not the logical one; with `layer`, all layers lie in one pool.
MEMORY = {
    "vllm-hnd": "kv block head token dim",
    "vllm-flashinfer-hnd": "block kv head token dim",
    "vllm-0.26-nhd": "block token head (kv dim)",
    "vllm-lbhnc": "layer block head token (kv dim)",
    "vllm-lbnhc": "layer block token head (kv dim)",
    "vllm-lhbnc": "layer head block token (kv dim)",
    "vllm-blhnc": "block layer head token (kv dim)",
    "vllm-blnhc": "block layer token head (kv dim)",
    "vllm-bhlnc": "block head layer token (kv dim)",
    "vllm-0.29-planes": "layer block kv token (head dim)",
    "vllm-0.29-mla": "block layer 1 token dim",
}
#: Bytes of each kv where the engine fixes them; of a nominal row where pages are opaque.
WIDTHS = {
    "vllm-mla-fp8": (656,),
    "vllm-dsv4": (584,),
    "vllm-dsv4-split": (576, 8),
    "vllm-mla-nvfp4": (352,),
    "vllm-mla-nvfp4-split": (320, 32),
    "vllm-dsa": (132,),
    "vllm-dsa-split": (128, 4),
}
#: Widths in elements where the parts of a row differ, as in latent and rope.
UNEQUAL = {
    "vllm-ascend-mla": (32, 8), "vllm-ascend-dsa": (32, 8, 16), "lmcache-17": (32, 8),
    "vllm-lbnhc": (24, 16), "vllm-bhlnc": (16, 8),
}  # fmt: skip
_PAD = 16  # elements between the pages of layouts that lie in one pool


def _table() -> Iterator[Any]:
    """Yield (operation, preset, dtype): one dtype for each preset in `core`, others in `full`."""
    for number, (name, preset) in enumerate(PRESETS.items()):
        dtypes = (torch.uint8,) if name in WIDTHS else DTYPES
        paged = read_layout(preset.layout).written("block")
        for at, operation in product(range(len(dtypes)), OPERATIONS):
            first = at == number % len(dtypes)
            dtype = str(dtypes[at]).removeprefix("torch.")
            if operation == "migrate" and not paged:
                continue
            if not first and operation not in ("gather", "scatter"):
                continue  # these move the same rows, and each is a program to compile
            tags = pytest.mark.tags(layout=name, dtype=dtype, operation=operation)
            marks = [tags, *([] if first else [full])]
            label = f"{operation}-{name}-{dtype}"
            yield pytest.param(operation, name, dtypes[at], marks=marks, id=label)


@pytest.mark.parametrize(("operation", "name", "dtype"), list(_table()))
def test_preset(workshop: Bench, operation: str, name: str, dtype: torch.dtype) -> None:
    """Rows are gathered from, scattered to, migrated within and converted from every preset."""
    workshop.copy(_case(workshop, operation, name, dtype))


def shape_of(name: str, dtype: torch.dtype) -> Shape:
    """Return the shape that the tensors of a preset have here."""
    preset = PRESETS[name]
    axes = read_layout(preset.layout)
    kv = int(preset.extents.get("kv", 2 if axes.written("kv") else 1))  # type: ignore[arg-type]
    split = any(factor.part for group in axes.right for factor in group)
    elements = UNEQUAL.get(name, (64 if split else 16,) * kv)
    widths = WIDTHS.get(name) or tuple(n * dtype.itemsize for n in elements)
    heads = 2 if axes.written("head") and name != "chunk-2ltd-mla" else 1
    shape = Shape(2 if axes.written("layer") else 1, heads, widths)
    page = widths[0] if name in WIDTHS else 24 * dtype.itemsize
    return replace(shape, widths=(page * shape.block_size,)) if axes.written("page") else shape


def lies(name: str, dtype: torch.dtype) -> Keywords:
    """Return the memory arrangement of a preset's tensors, as `by_hand.arranged` takes it."""
    how: Keywords = {"dtype": dtype}
    if memory := MEMORY.get(name):
        how["memory"] = memory
        if "layer" in memory.split():
            how.update(pads={memory.split().index("block") + 1: _PAD}, shift=_PAD)
    if name.startswith("vllm-dsv4"):
        how["pads"] = {1: -(584 * 4) % 576}  # the page is rounded up to whole values
    if name.startswith("vllm-ascend"):
        how["shift"] = _PAD  # slices of larger allocations
    return how


def _case(shop: Bench, operation: str, name: str, dtype: torch.dtype) -> Case:
    layout = PRESETS[name].layout
    shape = shape_of(name, dtype)
    axes = read_layout(layout)
    how = lies(name, dtype)
    if axes.written("page") and operation != "migrate":
        return _pages(shop, operation, layout, shape, how)
    if not axes.written("block"):
        return _chunks(shop, operation, layout, shape, dtype)
    if operation == "migrate":  # whole blocks of one cache, by block tables on both sides
        blocks = shop.shuffled(shape.blocks, 4)
        step = shape.block_size
        return shop.within(shape, blocks[:2], blocks[2:], layout=layout, step=step, **how)
    equal = len(set(shape.widths)) == 1
    if operation == "convert":  # to a paged layout that is like none of the presets
        other = replace(shape, block_size=6, blocks=4)
        text = "head | block layer token kv dim" if equal else "block head layer token (kv dim)"
        ids = shop.shuffled(other.slots, 13)
        target = shop.cache(other, ids, layout=text, source=False, dtype=dtype)
        slots = shop.shuffled(shape.slots, 13, 2)
        return Case(shop.cache(shape, slots, layout=layout, **how), target, 13)
    chunk = {"layout": CHUNK if equal else "layer token (kv head dim)"}
    return shop.some(operation, shape, 13, 2, chunk, layout=layout, **how)


def _pages(shop: Workshop, operation: str, layout: str, shape: Shape, how: Keywords) -> Case:
    size = shape.block_size
    blocks = shop.shuffled(shape.blocks, 3, 1)
    own = {"layout": layout, "step": size, **how}
    flat = "block page" if shape.layers == 1 else "block layer page"
    if operation == "convert":
        store = shop.cache(shape, blocks[::-1], layout=flat, step=size, source=False)
        return Case(shop.cache(shape, shop.shuffled(shape.blocks, 3), **own), store, 3 * size)
    few = replace(shape, blocks=3)
    store = shop.cache(few, None, layout=flat, source=operation == "scatter")
    pages = shop.cache(shape, blocks, source=operation == "gather", **own)
    return between(operation, pages, store, 3 * size)


def _chunks(shop: Workshop, operation: str, layout: str, shape: Shape, dtype: torch.dtype) -> Case:
    """Return a copy between a chunk's layout and a paged cache's, or another chunk's."""
    if operation == "convert":
        source = shop.chunk(shape, 13, layout=layout, dtype=dtype)
        other = "token layer head kv dim"
        return Case(source, shop.chunk(shape, 13, layout=other, source=False, dtype=dtype), 13)
    return shop.some(operation, shape, 13, 2, {"layout": layout}, layout=PAGED, dtype=dtype)
