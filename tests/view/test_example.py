# SPDX-License-Identifier: Apache-2.0
"""Example tensors: a view reads what was made for its layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from portakv import PRESETS, KVView, LayoutError
from portakv.layout.language import parse
from portakv.view.example import example_tensors


@pytest.mark.parametrize("name", PRESETS)
def test_a_view_reads_the_example_of_every_preset(name: str) -> None:
    preset = PRESETS[name]
    layout = parse(preset.layout)
    counts: dict[str, Any] = {"layers": 3 if "layer" in layout.axes else 1}
    if "heads" not in preset.extents:
        counts["heads"] = 2 if "head" in layout.axes else 1
    if "dim" not in preset.extents:
        counts["dim"] = 64
    tensors = example_tensors(name, **counts, blocks=3, tokens=4)
    view = KVView(tensors, name, **counts, block_size=4 if layout.paged else None)
    assert view.slots == (12 if layout.paged else 4)
    assert view.layers == counts["layers"]


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        ("kv | block token dim", [(3, 4, 512), (3, 4, 64)]),
        ("layer kv | block token dim", [[(3, 4, 512), (3, 4, 64)]] * 2),
        ("(kv layer) | block token dim", [(3, 4, 512)] * 2 + [(3, 4, 64)] * 2),
        ("block (kv token dim)", (3, 4 * 576)),
        ("block token (kv dim)", (3, 4, 576)),
    ],
)
def test_widths_say_how_many_kv_there_are(layout: str, shapes: Any) -> None:
    made = example_tensors(layout, layers=2, dim=(512, 64), blocks=3, tokens=4)
    assert _shapes(made) == shapes
    extents: dict[str, Any] = {"dim": (512, 64), "layers": 2 if "layer" in layout else 1}
    assert KVView(made, layout, **extents, block_size=4).kv == 2


@pytest.mark.parametrize("name", [p.name for p in PRESETS.values() if p.memory])
def test_an_example_lies_in_memory_as_its_preset_says(name: str) -> None:
    preset = PRESETS[name]
    made = example_tensors(name, layers=3, heads=2, dim=8, blocks=3, tokens=4)
    # The same tensors under the layout that writes memory order down: contiguous there.
    ordered = parse(preset.memory)
    groups = [*parse(preset.layout).containers, *parse(preset.layout).dims]
    apart = (made[1].data_ptr() - made[0].data_ptr()) // made[0].element_size()
    strides = dict(zip(groups, (apart, *made[0].stride()), strict=True))
    assert len(made) == 3
    actual = [strides[group] for group in ordered.dims]
    assert actual == sorted(actual, reverse=True)
    assert actual[-1] == 1


def test_a_preset_says_what_is_not_given() -> None:
    assert tuple(example_tensors("vllm-dsa-split", tokens=64)[0].shape) == (1, 132 * 64)


def test_widths_against_kv() -> None:
    with pytest.raises(LayoutError, match=r"2 widths, but .* has kv=3"):
        example_tensors("kv | token dim", kv=3, dim=(8, 4))


def _shapes(level: Any) -> Any:
    return tuple(level.shape) if isinstance(level, torch.Tensor) else [_shapes(x) for x in level]
