# SPDX-License-Identifier: Apache-2.0
"""Shapes, widths and strides that have broken copies of rows in the field, in both directions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from portakv_conformance.cases import BOTH, DIRECTIONS, Bench, Case, Shape, Workshop, between, full
from portakv_conformance.draw import by_hand
from portakv_conformance.draw.arrangement import Keywords

pytestmark = pytest.mark.area("corners")

Ints = tuple[int, ...]
NHD = "layer | kv block token head dim"
HND = "layer | kv block head token dim"
FUSED = "layer | block head token (kv dim)"
PLAIN = "layer token (kv head dim)"  # a chunk that holds unequal widths as well

_COMMON = (
    *range(1, 10),
    12,
    15,
    16,
    17,
    20,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    66,
    100,
    127,
    128,
    129,
    132,
    255,
    256,
    576,
    584,
    656,
    1152,
)
_WIDTHS = [
    pytest.param(width, marks=[] if width in _COMMON else [full])
    for width in sorted({*range(1, 257), *_COMMON})
]


def both_directions(bench: Bench, source: Any, target: Any) -> None:
    """Judge a copy from the first maker's side, which has ids, to the second's, and back."""
    for make, take in ((source, target), (target, source)):
        src = make(source=True)
        dst = take(source=False)
        bench.copy(Case(src, dst, min(len(side.ids) * side.step for side in (src, dst))))


@pytest.mark.parametrize("width", _WIDTHS)
def test_row_width(bench: Bench, width: int) -> None:
    """A row of any number of bytes moves whole: nothing is rounded, and no last piece is lost."""
    shape = Shape(layers=1, heads=1, widths=(width, width), blocks=5)
    # Backends that compile make a separate program for each width, so others go in one direction.
    for direction in DIRECTIONS if width in _COMMON else (DIRECTIONS[width % 2],):
        bench.copy(bench.some(direction, shape, 7, 1, dtype=torch.uint8))


#: Bytes of a row, and of the widest vector that its addresses allow. A sector has 32 bytes.
_QUICK_ROWS = ((12, 4), (20, 4), (28, 4), (30, 2), (36, 4), (52, 4), (56, 8), (656, 16))
_ROWS_IN_SECTORS = [
    *_QUICK_ROWS,
    *((width, 1) for width in (7, 28, 61, 95, 160)),
    *((width, 2) for width in (14, 62, 94, 126, 190, 576)),
    *((width, 4) for width in (44, 60, 92, 124, 156, 188, 220, 252, 584, 656)),
    *((width, 8) for width in (24, 40, 88, 120, 184, 216, 248, 656)),
    *((width, 16) for width in (48, 80, 112, 144, 176, 272)),
]


@pytest.mark.parametrize("units", ["slots", "blocks"])
@pytest.mark.parametrize(
    ("width", "vector"),
    [pytest.param(*row, marks=[] if row in _QUICK_ROWS else [full]) for row in _ROWS_IN_SECTORS],
)
def test_rows_that_begin_anywhere_in_a_sector(
    bench: Bench, direction: str, width: int, vector: int, units: str
) -> None:
    """A row moves whole wherever it begins in a sector, whether or not it ends with a sector."""
    shape = Shape(heads=1, widths=(width, width), block_size=3, blocks=11)
    step = shape.block_size if units == "blocks" else 1
    # A vector is as wide as the first address allows. Rows a vector further apart begin at each
    # place of a sector; dense blocks are one run.
    for apart in (0, vector):
        how = {"step": step, "shift": vector, **by_hand.widened(bench.paged, "token", apart)}
        chunk = {"shift": vector}
        bench.copy(bench.some(direction, shape, 9, 1, chunk, dtype=torch.uint8, **how))


def heads_first(bench: Bench, direction: str, heads: int, width: int) -> None:
    """Judge copies of caches in which each head lies apart, by their layout or in memory alone."""
    shape = Shape(heads=heads, widths=(width, width))
    bench.copy(bench.some(direction, shape, 9, 1, layout=HND))
    memory = by_hand.reordered(bench.paged, "kv block head token dim")
    bench.copy(bench.some(direction, shape, 9, 1, memory=memory))


@pytest.mark.parametrize("width", [2, 6, 10, 20, 34, 66, 100, 132])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_heads_that_no_vector_divides(bench: Bench, heads: int, width: int) -> None:
    """The bytes of a head bound the widest access in HND, even where a vector divides the row."""
    for direction in DIRECTIONS:
        heads_first(bench, direction, heads, width)


@pytest.mark.parametrize("heads", [5, 6, 12, 40])
def test_heads_that_are_no_power_of_two(bench: Bench, direction: str, heads: int) -> None:
    """Heads that lie apart are each moved, and nothing next to the last one."""
    heads_first(bench, direction, heads, 32)


@pytest.mark.parametrize(("layout", "widths"), [
    ("layer kv | block token head dim", (64, 48)), ("layer kv | block token head dim", (6, 10)),
    ("layer kv | block token head dim", (2, 96, 34)), (FUSED, (256, 128)), (FUSED, (10, 6)),
    ("layer | block token head (kv dim)", (48, 16)), ("layer | block (kv token dim)", (128, 4)),
    ("layer | block (kv token dim)", (576, 8)), ("layer | block head (kv token dim)", (64, 32)),
])  # fmt: skip
def test_keys_and_values_of_unequal_width(workshop: Bench, layout: str, widths: Ints) -> None:
    """Each kv has a separate width: in containers, interleaved and one after the other."""
    shape = Shape(heads=2 if "head" in layout else 1, widths=widths)
    workshop.both(shape, 9, 1, {"layout": PLAIN}, layout=layout)


@pytest.mark.parametrize(
    ("heads", "width", "layers"),
    [
        (heads, width, layers)
        for heads, width in (
            (128, 2),
            (128, 128),
            (128, 256),
            (1030, 16),
            (1, 1152),
            (1, 2),
            (300, 6),
        )
        for layers in (1, 2, 5)
        if layers < 5 or heads * width <= 1 << 14  # what interprets kernels takes its time
    ],
)
def test_many_heads_and_few(bench: Bench, heads: int, width: int, layers: int) -> None:
    """128 heads are as good as one, and so is a row of more than 1,024 vectors."""
    shape = Shape(layers=layers, heads=heads, widths=(width, width), blocks=3)
    for layout in (bench.paged, HND):
        bench.both(shape, 5, 1, layout=layout)


@pytest.mark.parametrize("layout", ["layer | block token dim", "layer | (block token) 1 dim"])
@pytest.mark.parametrize("width", [1152, 640, 656, 132])
def test_one_latent_row_for_each_token(workshop: Bench, width: int, layout: str) -> None:
    """MLA keeps one row for each token and layer, without keys, values or heads."""
    workshop.both(Shape(layers=3, heads=1, widths=(width,)), 11, 2, layout=layout)


@pytest.mark.parametrize("sizes", [
    (1, 1), (16, 16), (128, 128), (1, 16), (16, 1), (16, 128), (128, 16), (4, 6), (6, 4), (3, 5),
    (48, 32), (2, 7),
])  # fmt: skip
def test_block_sizes(workshop: Bench, sizes: Ints) -> None:
    """Blocks of both sides may have any sizes, and need have no common factor."""
    first, second = (Shape(widths=(12, 12), block_size=n, blocks=2 + 256 // n) for n in sizes)
    count = min(first.slots, second.slots) - 3

    def make(shape: Shape, layout: str, *, source: bool) -> object:
        rng = workshop.other(source)
        return rng.cache(shape, rng.shuffled(shape.slots, count), layout=layout, source=source)

    for layout in (NHD, HND) if first.block_size != second.block_size else (NHD,):
        both_directions(workshop, partial(make, first, layout), partial(make, second, HND))


@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4), (4, 6), (16, 128), (3, 4)])
def test_block_tables_of_both_sides(workshop: Bench, sizes: Ints) -> None:
    """Block tables on both sides move every token once, whatever their steps have in common."""
    first, second = (Shape(widths=(16, 16), block_size=n, blocks=768 // n) for n in sizes)

    def make(shape: Shape, layout: str) -> object:
        blocks = workshop.shuffled(shape.blocks, 384 // shape.block_size)
        return partial(workshop.cache, shape, blocks, step=shape.block_size, layout=layout)

    both_directions(workshop, make(first, NHD), make(second, HND))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [
        "layer | kv block token head dim",
        "layer | block kv token head dim",
        "layer | block token kv head dim",
        "layer kv | block token head dim",
        "kv layer | block token head dim",
        "block layer kv token head dim",
        "layer | block head token (kv dim)",
        "kv layer | (block token) head dim",
    ],
)
def test_shapes_in_which_every_extent_is_two(workshop: Bench, layout: str, layers: int) -> None:
    """The layout decides which axis is which, never an extent that happens to be 2."""
    shape = Shape(layers, widths=(4, 4), block_size=2, blocks=2)
    for direction in DIRECTIONS:
        workshop.copy(workshop.move(direction, shape, [3, 0, 1], layout=layout))
        workshop.copy(workshop.move(direction, shape, [1, 0], step=2, layout=layout))


#: How a cache lies: the axis that is further apart, by how many elements; the order in memory; or
#: keywords of `arranged`.
_PADDED: Keywords = {
    "pages": ("block", 24), "blocks-by-one": ("block", 1), "rows": ("head", 3),
    "heads": ("token", 8), "planes": ("kv", 7), "layers": {"place": "strided", "pads": {1: 16}},
    "elements": {"gap": 2}, "scattered": {"place": "scattered"}, "offset": {"shift": 8},
    "odd-offset": {"shift": 3}, "kernel-blocks": ("block", 64, {"shift": 16}),
    "token-outermost": "token head kv block dim", "dim-outermost": "dim kv block token head",
    "cross-layer": "block layer kv token head dim",
    "layer-innermost": "kv block token head layer dim",
}  # fmt: skip


def _lying(layout: str, how: Any) -> Keywords:
    """Return an entry of `_PADDED` as keywords, for a cache of a layout."""
    if isinstance(how, tuple):
        axis, elements, *more = how
        return {**by_hand.widened(layout, axis, elements), **dict(*more)}
    if isinstance(how, dict):
        return how
    memory = by_hand.reordered(layout, how)
    pads = {memory.split().index("head") + 1: 4} if "head layer" in memory else {}
    return {"memory": memory, "pads": pads}


@pytest.mark.parametrize("how", _PADDED)
def test_strides_and_padding(bench: Bench, direction: str, how: str) -> None:
    """Rows lie where strides and storage offsets say; the bytes between them are not touched."""
    shape = Shape(layers=3, widths=(16, 16))
    wanted = _lying(bench.paged, _PADDED[how])
    bench.copy(bench.some(direction, shape, 9, 1, **wanted))
    bench.copy(bench.some(direction, shape, 3, 1, step=4, **wanted))


#: How a chunk lies, as keywords of `arranged`.
_CHUNKS: dict[str, Keywords] = {
    "rows": {"pads": {3: 5}},
    "planes": {"pads": {2: 9}},
    "elements": {"gap": 3},
    "permuted": {"memory": "token layer kv (head dim)"},
    "shift": {"shift": 5},
    "split": {"split_end": True, "pads": {3: 2}},
}


@pytest.mark.parametrize("how", _CHUNKS)
def test_chunks_that_are_not_contiguous(bench: Bench, direction: str, how: str) -> None:
    """A chunk need not be contiguous: what is written arrives in it, not in a copy of it."""
    bench.copy(bench.some(direction, Shape(widths=(16, 16)), 9, 1, _CHUNKS[how]))


@pytest.mark.parametrize(
    "layout",
    [
        "block | kv layer token (head dim)",
        "block | layer token kv head dim",
        "block token | layer kv head dim",
    ],
)
@pytest.mark.parametrize("place", ["separate", "strided", "scattered"])
def test_lists_of_memory_objects(bench: Bench, layout: str, place: str) -> None:
    """A list of buffers, each a block, is one paged view and moves in one copy."""
    cache = Shape(blocks=8)
    store = Shape(block_size=16, blocks=2)
    paged = partial(bench.cache, cache, bench.shuffled(cache.slots, 27, 2))
    both_directions(
        bench, paged, partial(bench.cache, store, range(27), layout=layout, place=place)
    )


@pytest.mark.parametrize("layout", ["layer | block page", "block layer page", "block | layer page"])
@pytest.mark.parametrize("page", [132 * 4, 66, 7, 584 * 4])
def test_opaque_pages(workshop: Bench, page: int, layout: str) -> None:
    """An opaque page moves whole, and its padding stays."""
    shape = Shape(widths=(page,), heads=1)
    make = partial(workshop.cache, shape, step=shape.block_size, dtype=torch.uint8)
    holes = workshop.shuffled(6, 4, 1)
    blocks = workshop.shuffled(6, 4)
    padded = partial(make, holes, layout="layer | block page", pads={1: 5})
    both_directions(workshop, padded, partial(make, blocks, layout=layout))


def test_one_source_row_for_many_tokens(bench: Bench) -> None:
    """A source may have a stride of 0, and one slot may be read many times."""
    spread = {"layout": "kv layer token head dim", "expand": 2}
    bench.copy(bench.some("scatter", Shape(), 8, 0, spread))
    bench.copy(bench.gather(Shape(), [5, 5, 5, 0, 5, -1, 5]))


@BOTH
@pytest.mark.parametrize("kind", ["tokens", "blocks", "layers", "rows-of-a-block"])
def test_more_than_a_grid_holds(bench: Bench, kind: str, direction: str) -> None:
    """Nothing is clipped of many tokens, many blocks, many runs of a token or a long block."""
    rng = torch.Generator().manual_seed(bench.seed)
    how: Keywords = {}
    if kind == "tokens":
        shape = Shape(1, 1, (2, 2), block_size=16, blocks=12_600)
        ids: Any = torch.randperm(shape.slots, generator=rng)[:200_000]
    elif kind == "blocks":
        shape = Shape(1, 1, (4, 4), block_size=2, blocks=70_001)
        how = {"step": 2}
        ids = torch.randperm(shape.blocks, generator=rng)
    elif kind == "layers":
        shape = Shape(300, 117, (2, 2), block_size=2, blocks=2)
        ids = [3, 0]
        how = {"layout": HND, "place": "strided"}
    else:
        shape = Shape(1, 2, (2, 2), block_size=35_000, blocks=2)
        ids = [1]
        how = {"layout": HND, "step": 35_000}
    bench.copy(bench.move(direction, shape, ids, **how))


@full
@pytest.mark.needs("accelerator")
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_more_runs_than_one_call_of_a_copy_engine_takes(
    bench: Bench, direction: str, pinned: bool
) -> None:
    """Between host and device one call moves 20,000 runs, no two of them neighbours on either side:
    engines that take 8,192 at a time are called again."""
    shape = Shape(2, 1, (24, 24), blocks=2 * 5_000 // 4)
    source = direction == "gather"
    slots = bench.shuffled(shape.slots // 2, 5_000)
    cache = bench.cache(shape, [2 * slot for slot in slots], source=source)
    host = Workshop("cpu", bench.seed)
    chunk = by_hand.on_host(host.chunk(shape, 5_000, source=not source, pads={3: 4}), pinned)
    bench.copy(between(direction, cache, chunk, 5_000))


@pytest.mark.parametrize("same", [True, False], ids=["same-dtype", "other-dtype"])
def test_widths_are_compared_in_bytes(bench: Bench, same: bool) -> None:
    """Both sides may have different dtypes where rows have equal bytes; bits are not converted."""
    bench.both(Shape(), 9, 1, {"dtype": torch.float16 if same else torch.int64})


def test_a_row_that_is_larger_than_a_page_of_memory(workshop: Bench, direction: str) -> None:
    """A row of many kilobytes is one run, as in caches of encoders."""
    shape = Shape(1, 1, (70_002,), blocks=3)
    chunk = {"layout": "token (head dim)"}
    workshop.copy(workshop.some(direction, shape, 5, 1, chunk, layout="block token dim"))
