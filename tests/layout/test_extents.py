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
    ("layer token dim", (3, 5, 8), {"layers": 4}, "Axis 'layer' .* have extent 4, but 3 was found"),
    ("block token dim", (5, 4, 8), {"block_size": 8}, "Axis 'token' .* extent 8, but 4 was found"),
    ("token head dim", (5, 4, 8), {"heads": 2}, "Axis 'head' .* extent 2, but 4 was found"),
    ("token dim", (5, 8), {"dim": 16}, "Axis 'dim' .* extent 16, but 8 was found"),
    ("kv token dim", (3, 5, 8), {}, "Axis 'kv' .* extent 2, but 3 was found"),
    ("token kv dim", (5, 2, 8), {"kv": 3}, "Axis 'kv' .* extent 3, but 2 was found"),
    ("kv block token dim", (4, 2, 4, 8), {}, "Axis 'kv' .* extent 2, but 4 was found"),
    ("token (head dim)", (5, 24), {"heads": 5},
     r"\(head dim\) \(head=5, dim=\?\) .* extent that 5 divides, but 24"),
    ("token (head dim)", (5, 24), {"heads": 3, "dim": 4},
     r"\(head dim\) \(head=3, dim=4\) .* extent 12, but 24 was found"),
    ("block token (kv dim)", (5, 4, 15), {}, r"\(kv dim\) .* an extent that 2 divides, but 15"),
    ("token (head dim)", (5, 48), {"heads": 7}, "an extent that 7 divides, but 48 was"),
    ("block token (kv dim)", (5, 4, 16), {"dim": (8, 4)}, "extent 12, but 16 was found"),
    ("token 1 dim", (5, 2, 8), {}, "The dimension `1` .* extent 1, but 2 was found"),
    ("token dim/4 dim%4", (5, 2, 3), {}, "Axis 'dim' .* extent 4, but 3 was found"),
    ("token dim/4 dim%4", (5, 2, 4), {"dim": 16}, "Axis 'dim' .* extent 4, but 2 was found"),
    ("token dim/4 dim%4", (5, 2, 4), {"dim": 10}, "extent 10, which dim/4 cannot divide"),
    ("block page", (5, 24), {"block_size": 4, "dim": 32}, "'page' .* extent 32, but 24 was found"),
    ("(block token) dim", (20, 8), {}, r"block and token share.*: declare block_size\."),
    ("token (head dim)", (5, 24), {}, r"head and dim share.*: declare heads or dim\."),
    ("(layer head) token dim", (6, 5, 8), {}, r"head share.*: declare layers or heads\."),
    # What grows cannot be declared, so the message must not ask for it.
    ("(token head) dim", (12, 8), {}, r"token and head share.*: declare heads\."),
    ("(block head) token dim", (12, 4, 8), {}, r"block and head share.*: declare heads\."),
    ("(block token head) dim", (24, 8), {}, r"share.*: declare block_size or heads\."),
    # A loop of extent 0 must never be taken for one of extent 1, nor a block of no tokens for a
    # view without blocks: only blocks and the tokens of a chunk may be none.
    ("layer kv token dim", (0, 2, 5, 8), {}, "Axis 'layer' .* has extent 0"),
    ("token head dim", (5, 0, 8), {}, "Axis 'head' .* has extent 0"),
    ("token dim", (5, 0), {}, "Axis 'dim' .* has extent 0"),
    ("block token dim", (5, 0, 8), {}, "Axis 'token' .* has extent 0"),
    ("block dim/4 token dim%4", (5, 0, 4, 4), {}, "Axis 'dim' .* has extent 0"),
    ("block page", (5, 0), {"block_size": 4}, "Axis 'page' .* has extent 0"),
    # Declarations that no tensor can make true.
    ("token dim", (5, 8), {"layers": 2}, "does not name 'layer', whose extent is then 1"),
    ("token dim", (5, 8), {"heads": 2}, "does not name 'head'"),
    ("token dim", (5, 8), {"kv": 2}, "does not name 'kv'"),
    ("token dim", (5, 8), {"block_size": 4}, "no `block` axis"),
    ("block page", (5, 8), {}, "declare block_size"),
    ("layer token dim", (1, 5, 8), {"layers": 0}, "layers=0 .* positive integer"),
    ("kv token dim", (2, 5, 8), {"kv": 2**70}, "at most 1024 planes"),
    ("token head dim", (5, 1, 8), {"heads": -1}, "heads=-1 .* positive integer"),
    ("token dim", (5, 1), {"dim": True}, "dim=True .* positive integer"),
    ("token head dim", (5, 2, 8), {"heads": 2.5}, "heads=2.5 .* positive integer"),
    ("block token dim", (5, 4, 8), {"block_size": "4"}, "block_size='4' .* positive integer"),
    ("kv token dim", (2, 5, 8), {"dim": (8, 8, 8)}, "3 widths, but kv has extent 2"),
    # Widths may differ in containers and right of kv in its parentheses.
    ("kv token dim", (2, 5, 8), {"dim": (8, 4)}, "unequal widths, but .* `kv` stands neither in"),
    ("token (dim kv)", (5, 12), {"dim": (8, 4)}, "unequal widths"),
    ("token (kv head) dim", (5, 4, 8), {"dim": (8, 4), "heads": 2}, "unequal widths"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "shape", "extents", "why"), CONTRADICTIONS)
def test_a_contradiction_names_axis_expected_and_found(
    layout: str, shape: tuple[int, ...], extents: dict[str, Any], why: str
) -> None:
    with pytest.raises(LayoutError, match=why):
        KVView(zeros(*shape), layout, **extents)
