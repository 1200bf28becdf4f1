# SPDX-License-Identifier: Apache-2.0
"""Presets: complete, well-formed, and true of tensors as engines hand them over."""

from __future__ import annotations

import re

import pytest
import torch
from support.presets_cases import GUARD, HANDED, build, meet, traits

from portakv.errors import LayoutError
from portakv.layout.language import parse
from portakv.layout.picture import draw
from portakv.layout.presets import PRESETS, resolve
from portakv.view.view import KVView

# LMCache 0.5.6's formats: the position is the id.
LMCACHE = (
    "block layer kv token head dim",
    "layer | kv block token head dim",
    "layer | block kv token head dim",
    "layer | block token dim",
    "kv layer | (block token) head dim",
    "layer | (block token) 1 dim",
    "layer | kv block head token dim",
    "layer | block kv head token dim",
    "block layer kv head token dim",
    "kv layer | block token head dim",
    "layer | block head token (kv dim)",
    "layer | block token head (kv dim)",
    "layer | block head token dim",
    "layer | block token head dim",
    "layer | block page",
    "layer | kv block head 1 token dim",
    "layer kv | block token head dim",
    "layer kv | block token 1 dim",
    "layer | block token head dim",
)
# One line of each engine's documented layout; the memory order is the tensors' affair.
ENGINES = {
    "vllm-nhd": "layer | kv block token head dim",
    "vllm-hnd": "layer | kv block token head dim",
    "vllm-0.23": "layer | block kv token head dim",
    "vllm-0.26-nhd": "layer | block head token (kv dim)",
    "vllm-0.26-cross-nhd": "block layer token head (kv dim)",
    "vllm-0.26-cross-hnd": "block head layer token (kv dim)",
    "vllm-mla": "layer | block token dim",
    "vllm-dsa": "layer | block page",
    "vllm-dsa-split": "layer | block (kv token dim)",
    "sglang-mha": "kv layer | (block token) head dim",
    "sglang-mha-flat": "(kv layer) | (block token) head dim",
    "sglang-host-page-first-direct": "kv block layer token head dim",
    "sglang-host-page-head": "kv block head token layer dim",
    "trtllm-hnd": "block layer kv head token dim",
    "vllm-ascend": "layer kv | block token head dim",
    "vllm-ascend-nz": "layer kv | block head dim/32 token dim%32",
    "swifttransformer": "kv | block layer head token dim",
    "epd": "layer kv block token head dim",
    "flexkv-layerfirst": "layer kv block token head dim",
    "flexkv-blockfirst": "block layer kv token head dim",
    "flexkv-layerblock": "layer block kv token head dim",
    "dynamo-universal": "block head layer kv token dim",
    "transformers": "layer kv | 1 head token dim",
    "chunk-2ltd": "kv layer token (head dim)",
    "chunk-list": "block | kv layer token (head dim)",
}
VIEWS = ("lbhnc", "lbnhc", "lhbnc", "blhnc", "blnhc", "bhlnc")


def test_lmcache_ids_have_their_strings() -> None:
    found = [PRESETS[f"lmcache-{number}"].layout for number in range(19)]
    assert found == list(LMCACHE)
    assert "lmcache-19" not in PRESETS


@pytest.mark.parametrize("name", ENGINES)
def test_engine_has_its_string(name: str) -> None:
    assert PRESETS[name].layout == ENGINES[name]


def test_every_preset_is_well_formed() -> None:
    assert len(PRESETS) >= 40
    for name, preset in PRESETS.items():
        assert preset.name == name == name.lower()
        assert parse(preset.layout).text == preset.layout
        assert preset.engine
        assert set(preset.extents) <= {"block_size", "layers", "heads", "kv", "dim"}
        assert resolve(name) == (preset.layout, dict(preset.extents))


def test_every_preset_has_a_case() -> None:
    assert set(HANDED) == set(PRESETS)


def test_resolve_takes_strings_and_lmcache_names() -> None:
    assert resolve("layer | block token dim") == ("layer | block token dim", {})
    assert resolve("(block token)") == ("(block token)", {})
    assert resolve("token") == ("token", {})  # an axis: the parser says what is missing
    assert resolve(" vllm-nhd ")[0] == "layer | kv block token head dim"
    assert resolve("NL_X_NB_BSV_BSS") == ("layer | block page", {})


def test_resolve_gives_extents_that_may_be_changed() -> None:
    _, extents = resolve("vllm-dsa-split")
    assert extents == {"kv": 2, "dim": (128, 4)}
    extents["kv"] = 7
    assert resolve("vllm-dsa-split")[1]["kv"] == 2
    with pytest.raises(TypeError):
        PRESETS["vllm-dsa-split"].extents["kv"] = 7  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "near"), [("vllm-ndh", "vllm-nhd"), ("flexkv", "flexkv-"), ("VLLM-NHD", "vllm-nhd")]
)
def test_unknown_name_lists_near_names(wrong: str, near: str) -> None:
    with pytest.raises(LayoutError, match=f"no preset named '{wrong}'.*{near}"):
        resolve(wrong)


def test_unknown_name_far_from_all() -> None:
    with pytest.raises(LayoutError, match=r"no preset named 'qqqq'\. No name is near"):
        resolve("qqqq")
    with pytest.raises(LayoutError, match="17 was given"):
        resolve(17)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HANDED)
@pytest.mark.parametrize("how", ["extents", "declared"])
def test_view_accepts_what_the_engine_hands_over(name: str, how: str) -> None:
    case = build(name)
    held = case.geometry
    view = KVView(case.tensors, name, **getattr(case, how))
    assert (view.layers, view.kv, view.heads) == (held.layers, case.traits.kv, held.heads)
    assert tuple(view.widths) == held.widths
    assert view.opaque == case.traits.opaque
    assert view.block_size == (held.block_size if case.traits.paged else None)
    assert view.slots == held.slots


@pytest.mark.parametrize("name", HANDED)
def test_view_refuses_other_extents(name: str) -> None:
    case = build(name)
    for extent in ("layers", "heads", "kv"):
        wrong = {**case.declared, extent: case.declared[extent] + 1}
        with pytest.raises(LayoutError):
            KVView(case.tensors, name, **wrong)


@pytest.mark.parametrize("name", [n for n in HANDED if not traits(n).opaque])
def test_view_finds_every_row_where_the_engine_put_it(name: str) -> None:
    """Planes of the view against plain indexing of the engine's shape."""
    case = build(name, guard=32)
    view = KVView(case.tensors, name, **case.extents)
    # A plane that no single strided tensor can show: a split axis, or blocks of their own.
    if name in ("vllm-ascend-nz", "dynamo-universal-blocks", "chunk-list"):
        with pytest.raises(LayoutError, match=re.escape(view.form.unshown)):
            view.plane(0, 0, torch.uint8)
        split = "run of bytes" if name == "vllm-ascend-nz" else "'block' axis goes through tensors"
        assert split in view.form.unshown
        return
    assert not view.form.unshown
    for kv in range(view.kv):
        rows = case.rows(kv)
        for layer in range(view.layers):
            found = view.plane(layer, kv, torch.uint8).reshape(rows[layer].shape)
            assert torch.equal(found, rows[layer])


@pytest.mark.parametrize("order", VIEWS)
def test_vllm_views_lie_in_the_order_of_their_name(order: str) -> None:
    case = build(f"vllm-{order}")
    first, second = list(case.tensors.values())
    assert first.shape == second.shape == (6, 2, 4, 12)
    assert first.storage_offset() > 0
    assert first.data_ptr() != second.data_ptr()
    strides = dict(zip("bhnc", first.stride(), strict=True))
    strides["l"] = second.storage_offset() - first.storage_offset()
    assert "".join(sorted(strides, key=strides.__getitem__, reverse=True)) == order
    inner = order[order.index("b") + 1 :]
    dense = torch.tensor([{"l": 2, "h": 2, "n": 4, "c": 12}[letter] for letter in inner]).prod()
    assert strides["b"] > dense  # padded pages


def test_hnd_keeps_the_logical_shape() -> None:
    nhd, hnd = build("vllm-nhd"), build("vllm-hnd")
    (one, *_), (other, *_) = nhd.tensors.values(), hnd.tensors.values()
    assert one.shape == other.shape == (2, 6, 4, 2, 8)
    assert one.is_contiguous()
    assert not other.is_contiguous()
    assert other.transpose(2, 3).is_contiguous()


def test_dsv4_pages_are_rounded_up() -> None:
    (first, *_) = build("vllm-dsv4-split").tensors.values()
    assert first.shape == (6, 4, 584)
    assert first.stride() == (5 * 576, 584, 1)


def test_ascend_parts_differ_in_width_and_start_inside_their_storage() -> None:
    (parts, *_) = build("vllm-ascend-dsa").tensors.values()
    assert [part.shape[-1] for part in parts] == [8, 4, 8]
    assert all(part.storage_offset() for part in parts)


def test_guards_surround_every_allocation() -> None:
    for name in HANDED:
        for buffer in build(name, guard=48).buffers:
            assert (buffer[:48] == GUARD).all()
            assert (buffer[-48:] == GUARD).all()
            assert (buffer != GUARD).any()


def test_most_pairs_can_hold_each_other() -> None:
    pairs = [(one, other) for one in HANDED for other in HANDED]
    held = {pair: meet(*pair) for pair in pairs}
    assert all(held[name, name] is not None for name in HANDED)
    assert all(held[one, other] == held[other, one] for one, other in pairs)
    assert sum(value is not None for value in held.values()) > len(pairs) // 2
    assert held["vllm-nhd", "vllm-mla"] is None
    assert held["vllm-dsa", "vllm-dsa-split"] is None


def test_picture_of_the_founding_layout() -> None:
    assert draw("layer | kv block token (head dim)").splitlines() == [
        "kv_caches[layer][kv, block, token, head * dims + dim]",
        "",
        "layer                    list of tensors   one step for each layer",
        "└─ kv                    dim 0             key, then value",
        "   └─ block              dim 1             a block (page) of block_size tokens",
        "      └─ token           dim 2             a token of the block",
        "         └─ (head dim)   dim 3 ..          head 0 [dim 0 1 ..] head 1 [dim 0 1 ..] ..",
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("kv layer token (head dim)", "chunk[kv, layer, token, head * dims + dim]"),
        ("layer | block page", "kv_caches[layer][block, ...]"),
        ("layer kv | 1 head token dim", "chunk[layer][kv][0, head, token, dim]"),
        (
            "(kv layer) | (block token) head dim",
            "kv_caches[kv * layers + layer][block * block_size + token, head, dim]",
        ),
        (
            "layer | block (kv token dim)",
            "kv_caches[layer][block, (kv * block_size + token) * dims + dim]",
        ),
        (
            "layer kv | block head dim/32 token dim%32",
            "kv_caches[layer][kv][block, head, dim // 32, token, dim % 32]",
        ),
    ],
)
def test_picture_starts_with_how_an_element_is_found(text: str, first: str) -> None:
    assert draw(text).splitlines()[0] == first


def test_every_picture_is_small() -> None:
    for preset in PRESETS.values():
        lines = draw(preset.layout).splitlines()
        layout = parse(preset.layout)
        assert len(lines) == 2 + len(layout.containers) + len(layout.dims) <= 10
        assert max(map(len, lines)) <= 110


def test_picture_of_nonsense_is_an_error() -> None:
    with pytest.raises(LayoutError):
        draw("vllm-nhd")
