# SPDX-License-Identifier: Apache-2.0
"""Extents: solved from shapes and declarations, nothing guessed, contradictions named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from portakv import KVView, LayoutError


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def facts(view: KVView) -> tuple[Any, ...]:
    return view.layers, view.kv, view.heads, view.widths, view.block_size, view.slots


# What `copy/test_properties.py` does not draw. layout, shape, extents, expected (layers, kv, heads,
# bytes of dim for each kv, block size, slots)
SOLVED: list[tuple[str, tuple[int, ...], dict[str, Any], tuple[Any, ...]]] = [
    ("kv token (head dim)", (2, 5, 24), {"heads": np.int64(3)}, (1, 2, 3, (16, 16), None, 5)),
    ("kv token (head dim)", (2, 5, 24), {"dim": 8}, (1, 2, 3, (16, 16), None, 5)),
    ("kv token (dim)", (3, 5, 24), {"kv": 3}, (1, 3, 1, (48,) * 3, None, 5)),
    ("(kv layer) token dim", (6, 5, 8), {}, (3, 2, 1, (16, 16), None, 5)),
    ("block (token head) dim", (5, 8, 6), {"block_size": 4}, (1, 1, 2, (12,), 4, 20)),
    ("block (kv token dim)", (5, 40), {"dim": (8, 2)}, (1, 2, 1, (16, 4), 4, 20)),
    ("token (kv layer dim)", (5, 36), {"dim": (8, 4), "layers": 3}, (3, 2, 1, (16, 8), None, 5)),
    ("block/2 token block%2 dim", (3, 4, 2, 8), {}, (1, 1, 1, (16,), 4, 24)),
    ("block page", (5, 4, 6), {"block_size": 4, "dim": 24}, (1, 1, 1, (48,), 4, 20)),
    ("token dim", (5, 8), {"layers": 1, "kv": 1, "heads": 1, "dim": 8}, (1, 1, 1, (16,), None, 5)),
    ("block token dim", (0, 4, 8), {}, (1, 1, 1, (16,), 4, 0)),
    ("kv token dim", (2, 0, 8), {}, (1, 2, 1, (16, 16), None, 0)),
    ("(layer token) dim", (0, 8), {"layers": 3}, (3, 1, 1, (16,), None, 0)),
]


@pytest.mark.parametrize(("layout", "shape", "extents", "expected"), SOLVED)
def test_what_is_not_declared_is_solved(
    layout: str, shape: tuple[int, ...], extents: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert facts(KVView(zeros(*shape), layout, **extents)) == expected


# layout, shape, extents, part of the message: axis, expected and found extent
CONTRADICTIONS: list[tuple[str, tuple[int, ...], dict[str, Any], str]] = [
    ("layer token dim", (3, 5, 8), {"layers": 4}, "axis 'layer' .* have extent 4, got 3"),
    ("block token dim", (5, 4, 8), {"block_size": 8}, "axis 'token' .* extent 8, got 4"),
    ("token head dim", (5, 4, 8), {"heads": 2}, "axis 'head' .* extent 2, got 4"),
    ("token dim", (5, 8), {"dim": 16}, "axis 'dim' .* extent 16, got 8"),
    ("kv token dim", (3, 5, 8), {}, "axis 'kv' .* extent 2, got 3"),
    ("token kv dim", (5, 2, 8), {"kv": 3}, "axis 'kv' .* extent 3, got 2"),
    ("kv block token dim", (4, 2, 4, 8), {}, "axis 'kv' .* extent 2, got 4"),
    ("token (head dim)", (5, 24), {"heads": 5},
     r"\(head dim\) \(head=5, dim=\?\) .* extent that 5 divides, got 24"),
    ("token (head dim)", (5, 24), {"heads": 3, "dim": 4},
     r"\(head dim\) \(head=3, dim=4\) .* extent 12, got 24"),
    ("block token (kv dim)", (5, 4, 15), {}, r"\(kv dim\) .* an extent that 2 divides, got 15"),
    ("token (head dim)", (5, 48), {"heads": 7}, "an extent that 7 divides, got 48"),
    ("block token (kv dim)", (5, 4, 16), {"dim": (8, 4)}, "extent 12, got 16"),
    ("token 1 dim", (5, 2, 8), {}, "the dimension `1` .* extent 1, got 2"),
    ("token dim/4 dim%4", (5, 2, 3), {}, "axis 'dim' .* extent 4, got 3"),
    ("token dim/4 dim%4", (5, 2, 4), {"dim": 16}, "axis 'dim' .* extent 4, got 2"),
    ("token dim/4 dim%4", (5, 2, 4), {"dim": 10}, "extent that dim/4 divides, got 10"),
    ("block page", (5, 24), {"block_size": 4, "dim": 32}, "'page' .* extent 32, got 24"),
    ("(block token) dim", (20, 8), {}, r"got block and token\. Declare block_size\."),
    ("token (head dim)", (5, 24), {}, r"got head and dim\. Declare heads or dim\."),
    ("(layer head) token dim", (6, 5, 8), {}, r"got layer and head\. Declare layers or heads\."),
    # What grows cannot be declared, so the message must not ask for it.
    ("(token head) dim", (12, 8), {}, r"got token and head\. Declare heads\."),
    ("(block head) token dim", (12, 4, 8), {}, r"got block and head\. Declare heads\."),
    ("(block token head) dim", (24, 8), {},
     r"got block and token and head\. Declare block_size or heads\."),
    # A loop of extent 0 must never be taken for one of extent 1, nor a block of no tokens for a
    # view without blocks: only blocks and the tokens of a chunk may be none.
    ("layer kv token dim", (0, 2, 5, 8), {}, "axis 'layer' .* at least 1, got 0"),
    ("token head dim", (5, 0, 8), {}, "axis 'head' .* at least 1, got 0"),
    ("token dim", (5, 0), {}, "axis 'dim' .* at least 1, got 0"),
    ("block token dim", (5, 0, 8), {}, "axis 'token' .* at least 1, got 0"),
    ("block dim/4 token dim%4", (5, 0, 4, 4), {}, "axis 'dim' .* at least 1, got 0"),
    ("block page", (5, 0), {"block_size": 4}, "axis 'page' .* at least 1, got 0"),
    # Declarations that no tensor can make true.
    ("token dim", (5, 8), {"layers": 2}, "layers=1 .* does not name 'layer', got 2"),
    ("token dim", (5, 8), {"heads": 2}, "heads=1 .* does not name 'head', got 2"),
    ("token dim", (5, 8), {"kv": 2}, "kv=1 .* does not name 'kv', got 2"),
    ("token dim", (5, 8), {"block_size": 4}, "no `block` axis"),
    ("block page", (5, 8), {}, "got None.*Declare block_size"),
    ("layer token dim", (1, 5, 8), {"layers": 0}, "layers to be a positive integer, got 0"),
    ("kv token dim", (2, 5, 8), {"kv": 2**70}, "at most 1024 planes"),
    ("token head dim", (5, 1, 8), {"heads": -1}, "heads to be a positive integer, got -1"),
    ("token dim", (5, 1), {"dim": True}, "dim to be a positive integer, got True"),
    ("token head dim", (5, 2, 8), {"heads": 2.5}, "heads to be a positive integer, got 2.5"),
    ("block token dim", (5, 4, 8), {"block_size": "4"},
     "block_size to be a positive integer, got '4'"),
    ("kv token dim", (2, 5, 8), {"dim": (8, 8, 8)}, "one width, or 2, .* got 3 widths"),
    # Widths may differ in containers and right of kv in its parentheses.
    ("kv token dim", (2, 5, 8), {"dim": (8, 4)}, "`kv` stands neither in .* unequal widths"),
    ("token (dim kv)", (5, 12), {"dim": (8, 4)}, "unequal widths"),
    ("token (kv head) dim", (5, 4, 8), {"dim": (8, 4), "heads": 2}, "unequal widths"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "shape", "extents", "why"), CONTRADICTIONS)
def test_a_contradiction_names_axis_expected_and_found(
    layout: str, shape: tuple[int, ...], extents: dict[str, Any], why: str
) -> None:
    with pytest.raises(LayoutError, match=why):
        KVView(zeros(*shape), layout, **extents)
