# SPDX-License-Identifier: Apache-2.0
"""Slices by layers, heads and kv: the same memory, and one form for every single layer."""

from __future__ import annotations

import gc
from itertools import permutations, product
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.core_cases import address, noise

from portakv import KVView, LayoutError
from portakv.migrate.staging import part_of
from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.strategies import cases

Range = slice | int | None


def picked(requested: Range, extent: int) -> range:
    if requested is None:
        return range(extent)
    if isinstance(requested, slice):
        return range(extent)[requested]
    return range(requested, requested + 1)


def check(part: KVView, whole: KVView, layers: Range, heads: Range, kv: Range) -> None:
    """Each row of a slice lies where the whole view has it, and its alignment is true."""
    expected = picked(layers, whole.layers), picked(heads, whole.heads), picked(kv, whole.kv)
    assert (part.layers, part.heads, part.kv, part.slots) == (*map(len, expected), whole.slots)
    assert part.widths == tuple(whole.widths[k] for k in expected[2])
    for (i, layer), (j, head), (k, plane) in product(*map(enumerate, expected)):
        for slot in range(whole.slots):
            assert address(part, k, i, slot, j) == address(whole, plane, layer, slot, head)
    assert not any(at % part.form.alignment for at in part.addresses.tolist())


def _separate() -> list[torch.Tensor]:
    return [noise(2, 3, 4, 8, seed=i) for i in range(4)]


MEMORY = noise(100, 8)
BOTH = noise(4 * 12 * 18)
# All keys, then all values: from layer to layer they come nearer to each other.
KEYS_THEN_VALUES = BOTH[: 4 * 12 * 16].view(4, 3, 4, 16), BOTH[4 * 12 * 16 :].view(4, 3, 4, 2)
VIEWS: dict[str, tuple[Any, ...]] = {
    # Layers begin 132 bytes apart: the first is aligned to 16, the others to 4.
    "rows of 132 bytes": (noise(5, 4, 66, dtype=torch.bfloat16), "token layer dim"),
    "unequal, one allocation":
        (list(zip(*KEYS_THEN_VALUES, strict=True)), "layer kv | block token dim"),
    "unequal, kv first": ([list(part) for part in KEYS_THEN_VALUES], "kv layer | block token dim"),
    "unequal in one dimension": (noise(5, 4 * 18), "token (kv layer dim)", (16, 2)),
    "unequal memory objects":
        ([noise(5, 4 * 18, seed=i) for i in range(3)], "block | token (kv layer dim)", (16, 2)),
    "equal widths that drift apart":
        ([(MEMORY[10 * i : 10 * i + 5], MEMORY[40 + 12 * i : 45 + 12 * i]) for i in range(4)],
         "layer kv | token dim"),
    # vLLM's BLNHC: a block holds all layers; each layer is a strided tensor over it.
    "packed in a block":
        ([layer.transpose(1, 2) for layer in noise(3, 4, 5, 2, 16).unbind(1)],
         "layer | block head token (kv dim)"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_slices_of_one_layer_have_one_form(name: str) -> None:
    tensors, layout, *dim = VIEWS[name]
    whole = KVView(tensors, layout, **({"dim": dim[0], "layers": 4} if dim else {}))
    for cut in ({}, {"heads": slice(0, 1)}, {"kv": 0}, {"kv": slice(-1, None)}):
        slices = [whole.slice(layers=i, **cut) for i in range(4)]
        assert len({part.form for part in slices}) == 1
        for i, part in enumerate(slices):
            check(part, whole, i, cut.get("heads"), cut.get("kv"))
    pairs = {whole.slice(layers=slice(i, i + 2)).form for i in range(3)}
    assert len(pairs) == 1


def test_a_slice_of_many_memory_objects() -> None:
    """The entries of its table take more room than the answer of the core usually has."""
    blocks = [noise(2, 3, 2, 8, seed=i) for i in range(150)]
    whole = KVView(blocks, "block | layer token head dim")
    part = whole.slice(layers=1, heads=1)
    assert part.entries == len(blocks)
    check(part, whole, 1, 1, None)


def test_a_slice_of_everything_is_the_view_itself() -> None:
    whole = KVView(*VIEWS["rows of 132 bytes"])
    assert whole.slice(layers=slice(0, 4), heads=slice(None), kv=0) is whole
    assert whole.slice() is whole


@pytest.mark.parametrize("layers", [4, 3])
def test_parts_of_a_view_do_not_keep_it(layers: int) -> None:
    """They are cached with the view; the part of everything is the view."""
    tensor = noise(5, 4, 8)
    whole = KVView(tensor, "token layer dim")
    parts = whole.planes((0, layers), (0, 1)), part_of(whole, slice(0, layers))
    assert [part is whole for part in parts] == 2 * [layers == 4]
    assert part_of(whole, slice(0, layers)) is parts[1]
    kept = ref(tensor)
    gc.disable()
    try:
        del tensor, whole, parts
        assert kept() is None
    finally:
        gc.enable()


OUTSIDE = "Expected a range of at least one"


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        ({"layers": 4}, OUTSIDE),
        ({"layers": -1}, OUTSIDE),
        ({"layers": slice(2, 2)}, OUTSIDE),
        ({"layers": slice(0, 4, 2)}, OUTSIDE),
        ({"layers": slice(None, None, -1)}, OUTSIDE),
        ({"heads": 1}, OUTSIDE),
        ({"kv": 2}, OUTSIDE),
        ({"kv": slice(2, None)}, OUTSIDE),
        ({"kv": "1"}, "an integer or a slice of integers"),
        ({"layers": slice(0.5)}, "an integer or a slice of integers"),
        ({"layers": slice(0, 4, 0)}, "an integer or a slice of integers"),
        ({"blocks": 3}, "layers, heads or kv, got .* an Index of the blocks"),
        ({"tokens": object}, "layers, heads or kv"),
    ],
)
def test_ranges_that_are_empty_stepped_outside_or_nonsense(cut: dict[str, Any], why: str) -> None:
    with pytest.raises(LayoutError, match=why) as caught:
        KVView(_separate(), "layer | kv block token dim").slice(**cut)
    assert f"{next(iter(cut))}=" in str(caught.value)


def test_split_heads_are_cut_out_of_one_factor_only() -> None:
    view = KVView(noise(3, 5, 2, 8), "head/2 token head%2 dim")
    whole: list[Range] = [0, 3, 5, slice(2, 4), slice(0, 4), slice(2, 6), slice(0, 6)]
    for heads in whole:
        check(view.slice(heads=heads), view, None, heads, None)
    for cut in (slice(1, 3), slice(0, 3), slice(1, 5), slice(3, 6)):
        with pytest.raises(LayoutError, match="cuts through a factor of the 'head' axis"):
            view.slice(heads=cut)


def _nested(sizes: list[int], *shape: int) -> Any:
    """Tensors of their own in nested lists."""
    return [_nested(sizes[1:], *shape) for _ in range(sizes[0])] if sizes else noise(*shape)


def test_a_slice_stands_for_the_memory_that_is_left_of_it() -> None:
    apart = [torch.zeros(5, 8) for _ in range(3)]
    whole = KVView(apart, "layer | token dim")
    begins = [t.data_ptr() for t in apart]
    pair = whole.slice(layers=slice(1, 3))
    part = whole.slice(layers=1)
    assert pair.addresses.tolist() == [t.data_ptr() for t in pair.owners] == begins[1:]
    assert part.spans == [(begins[1], begins[1] + apart[1].nbytes)]
    part.check_memory()
    apart[0].untyped_storage().resize_(4)
    part.check_memory()
    with pytest.raises(LayoutError, match="was replaced"):
        whole.check_memory()
    apart[1].untyped_storage().resize_(4)
    with pytest.raises(LayoutError, match="was replaced"):
        part.check_memory()
    together = KVView(list(noise(3, 5, 8)), "layer | token dim")
    assert together.slice(layers=1).spans == together.spans


@settings(max_examples=2 * settings().max_examples)
@given(cases(containers=("layer", "kv", "block", "token", "head")), st.data())
def test_any_slice_of_any_layout(case: Case, data: st.DataObject) -> None:
    side = data.draw(st.sampled_from([case.src, case.dst]))
    whole = KVView(side.tensors, side.layout, **side.extents)

    def cut(extent: int, axis: str) -> slice:
        first = 0 if f"{axis}/" in side.layout else data.draw(st.integers(0, extent - 1))
        least = extent if f"{axis}/" in side.layout else first + 1
        return slice(first, data.draw(st.integers(least, extent)))

    layers = cut(whole.layers, "layer")
    heads = cut(whole.heads, "head")
    kv = cut(whole.kv, "kv")
    check(whole.slice(layers=layers, heads=heads, kv=kv), whole, layers, heads, kv)
    check(whole.slice(kv=kv).slice(layers=layers).slice(heads=heads), whole, layers, heads, kv)
    assert len({whole.slice(layers=i, kv=kv).form for i in range(whole.layers)}) == 1


_EXTENTS = {"block/2": 3, "block%2": 2, "token/2": 3, "token%2": 2, "layer": 3, "kv": 2}


@pytest.mark.parametrize("unbounded", ["block", "token"])
@pytest.mark.parametrize("listed", [2, 3, 4])
def test_factors_of_blocks_or_tokens_in_any_order(unbounded: str, listed: int) -> None:
    """The remainder outside the quotient: its steps through the table are the longer ones."""
    factors = (f"{unbounded}/2", f"{unbounded}%2", "layer", "kv")
    tokens = ["token"] if unbounded == "block" else []
    for order in permutations(factors):
        outer = order[:listed]
        inner = [*order[listed:], *tokens]
        shape = [_EXTENTS.get(name, 4) for name in inner]
        sizes = [_EXTENTS[name] for name in outer]
        whole = KVView(
            _nested(sizes, *shape, 8), f"{' '.join(outer)} | {' '.join([*inner, 'dim'])}"
        )
        for layers, kv in ((slice(1, 3), None), (2, 1), (slice(0, 2), 0), (None, 1)):
            check(whole.slice(layers=layers, kv=kv), whole, layers, None, kv)
