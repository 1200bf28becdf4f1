# SPDX-License-Identifier: Apache-2.0
"""Presets: complete, well-formed, and true of tensors as engines hand them over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.core_cases import address
from support.presets_cases import LAYOUTS, side

from portakv.cli.layouts import draw
from portakv.errors import LayoutError
from portakv.layout.language import parse
from portakv.layout.presets import PRESETS, resolve
from portakv.view.view import KVView
from portakv_conformance.cases.test_presets import MEMORY
from portakv_conformance.judge.oracle import Rows


def test_every_preset_has_the_string_of_its_engine() -> None:
    assert {name: preset.layout for name, preset in PRESETS.items()} == LAYOUTS


def test_memory_orders_are_those_of_the_engines() -> None:
    assert {n: p.memory.removeprefix("layer | ") for n, p in PRESETS.items() if p.memory} == {
        name: order for name, order in MEMORY.items() if not name.startswith("vllm-0.29")
    }


def test_every_preset_is_well_formed() -> None:
    for name, preset in PRESETS.items():
        assert preset.name == name == name.lower()
        assert preset.engine
        assert set(preset.extents) <= {"block_size", "layers", "heads", "kv", "dim"}
        assert not hasattr(preset.extents, "__setitem__")
        assert resolve(name) == (preset.layout, dict(preset.extents))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layer | block token dim", ("layer | block token dim", {})),
        ("(block token)", ("(block token)", {})),
        ("token", ("token", {})),  # an axis: the parser says what is missing
        (" vllm-nhd ", ("layer | kv block token head dim", {})),
        ("NL_X_NB_BSV_BSS", ("layer | block page", {})),
        ("vllm-dsa-split", ("layer | block (kv token dim)", {"kv": 2, "dim": (128, 4)})),
    ],
)
def test_resolve_gives_a_string_and_extents_that_may_be_changed(text: str, expected: Any) -> None:
    resolve(text)[1]["kv"] = 7
    assert resolve(text) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("vllm-ndh", "name of a preset .*got 'vllm-ndh'.*vllm-nhd"),
        ("flexkv", "name of a preset .*got 'flexkv'.*flexkv-"),
        ("VLLM-NHD", "name of a preset .*got 'VLLM-NHD'.*vllm-nhd"),
        ("qqqq", r"name of a preset .*got 'qqqq'\. No name is near"),
        (17, "got 17"),
        # Swapped arguments of KVView: no text of a tensor is in the message.
        ([torch.zeros(2)], r"got a list\. Pass a string\. Pass the tensors first"),
    ],
)
def test_unknown_name_lists_near_names(wrong: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        resolve(wrong)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_view_finds_every_row_where_the_engine_put_it(name: str) -> None:
    engine = side(name)
    view = KVView(engine.tensors, name, **engine.extents)
    actual = view.layers, view.kv, view.heads, view.widths, view.block_size, view.slots, view.opaque
    assert actual == (
        engine.layers,
        len(engine.widths),
        engine.heads,
        engine.widths,
        engine.block_size,
        engine.slots,
        engine.opaque,
    )
    rows = Rows(engine.tensors, LAYOUTS[name], engine.extents)
    for kv in range(view.kv):
        first = rows.row_addresses(kv, view.layers - 1, range(view.slots))[:, :, 0]
        for slot in range(0, view.slots, view.form.block_size if view.opaque else 1):
            for head in range(view.heads):
                assert address(view, kv, view.layers - 1, slot, head) == first[slot, head]
    for extent in ("layers", "heads", "kv"):
        with pytest.raises(LayoutError):
            KVView(engine.tensors, name, **{**engine.extents, extent: engine.extents[extent] + 1})


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
        ("(kv layer) | (block token) head dim",
         "kv_caches[kv * layers + layer][block * block_size + token, head, dim]"),
        ("layer | block (kv token dim)",
         "kv_caches[layer][block, (kv * block_size + token) * dims + dim]"),
        ("layer kv | block head dim/32 token dim%32",
         "kv_caches[layer][kv][block, head, dim // 32, token, dim % 32]"),
    ],
)  # fmt: skip
def test_picture_starts_with_how_an_element_is_found(text: str, first: str) -> None:
    assert draw(text).splitlines()[0] == first


def test_every_picture_is_small() -> None:
    for preset in PRESETS.values():
        lines = draw(preset.layout).splitlines()
        layout = parse(preset.layout)
        assert len(lines) == 2 + len(layout.containers) + len(layout.dims) <= 10
        assert max(map(len, lines)) <= 110
    with pytest.raises(LayoutError):
        draw("vllm-nhd")
