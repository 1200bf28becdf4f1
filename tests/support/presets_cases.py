# SPDX-License-Identifier: Apache-2.0
"""Tensors that engines pass for every preset, written down independently of the library.

A preset with a wrong layout string would disagree with the table here, and with the oracle, which
reads it. Tensors lie as `portakv_conformance.cases.test_presets` describes: memory orders, padded
pages, slices of larger allocations.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from portakv_conformance.cases.test_presets import WIDTHS, lies
from portakv_conformance.draw.arrangement import Side, side_of
from portakv_conformance.draw.by_hand import Shape, arranged
from portakv_conformance.judge.grammar import read_layout

# LMCache 0.5.6's formats have their numbers.
_NAMES_BY_LAYOUT = {
    "block layer kv token head dim": "lmcache-0 vllm-cross-nhd trtllm-nhd flexkv-blockfirst "
    "chunk-block-first",
    "layer | kv block token head dim": "lmcache-1 vllm-nhd vllm-ascend-merged vllm-hnd",
    "layer | block kv token head dim": "lmcache-2 vllm-flashinfer-nhd vllm-triton vllm-0.23 "
    "vllm-flashinfer-hnd",
    "layer | block token dim": "lmcache-3 vllm-mla vllm-mla-fp8",
    "kv layer | (block token) head dim": "lmcache-4 sglang-mha",
    "layer | (block token) 1 dim": "lmcache-5 sglang-mla",
    "layer | kv block head token dim": "lmcache-6 mlu-merged",
    "layer | block kv head token dim": "lmcache-7 flashinfer-hnd",
    "block layer kv head token dim": "lmcache-8 trtllm-hnd",
    "kv layer | block token head dim": "lmcache-9",
    "layer | block head token (kv dim)": "lmcache-10 vllm-0.26-hnd vllm-0.26-nhd vllm-lbhnc "
    "vllm-lbnhc vllm-lhbnc vllm-blhnc vllm-blnhc vllm-bhlnc",
    "layer | block token head (kv dim)": "lmcache-11",
    "layer | block head token dim": "lmcache-12",
    "layer | block token head dim": "lmcache-13 lmcache-18",
    "layer | block page": "lmcache-14 opaque vllm-0.29-cpu vllm-dsv4 vllm-mla-nvfp4 vllm-dsa",
    "layer | kv block head 1 token dim": "lmcache-15 vllm-rbln",
    "layer kv | block token head dim": "lmcache-16 vllm-ascend",
    "layer kv | block token 1 dim": "lmcache-17 vllm-ascend-mla vllm-ascend-dsa",
    "block layer token head (kv dim)": "vllm-0.26-cross-nhd",
    "block head layer token (kv dim)": "vllm-0.26-cross-hnd",
    "layer | block head (kv token dim)": "",  # no engine's, and unlike all others
    "layer | block kv token (head dim)": "vllm-0.29-planes",
    "layer | block 1 token dim": "vllm-0.29-mla",
    "layer | block (kv token dim)": "vllm-dsv4-split vllm-mla-nvfp4-split vllm-dsa-split",
    "(kv layer) | (block token) head dim": "sglang-mha-flat",
    "kv | layer block token head dim": "sglang-npu",
    "kv layer (block token) head dim": "sglang-host-layer-first",
    "kv (block token) layer head dim": "sglang-host-page-first",
    "kv block layer token head dim": "sglang-host-page-first-direct",
    "kv block head token layer dim": "sglang-host-page-head",
    "layer kv | block head dim/32 token dim%32": "vllm-ascend-nz",
    "layer kv | block head token dim": "mlu",
    "kv | block layer head token dim": "swifttransformer",
    "layer kv block token head dim": "epd flexkv-layerfirst",
    "layer block kv token head dim": "flexkv-layerblock",
    "block head layer kv token dim": "dynamo-universal",
    "block | head layer kv token dim": "dynamo-universal-blocks",
    "block token dim": "encoder-cache",
    "layer kv | 1 head token dim": "transformers",
    "block page": "opaque-cross",
    "kv layer token (head dim)": "chunk-2ltd chunk-2ltd-mla",
    "token kv (head dim)": "chunk-t2d",
    "kv token (head dim)": "chunk-2td",
    "head layer kv token dim": "chunk-universal",
    "block | kv layer token (head dim)": "chunk-list",
}
LAYOUTS = {name: text for text, names in _NAMES_BY_LAYOUT.items() for name in names.split()}
# kv that is written and not 2.
_KV = {"vllm-ascend-dsa": 3, "chunk-2ltd-mla": 1}
_DTYPES = {
    "vllm-triton": torch.float8_e4m3fn,
    "vllm-flashinfer-hnd": torch.float8_e5m2,
    "vllm-lbnhc": torch.bfloat16,
    "epd": torch.float32,
    **dict.fromkeys(("trtllm-hnd", "opaque", "vllm-ascend-nz"), torch.int8),
    **dict.fromkeys((*WIDTHS, "vllm-0.29-mla"), torch.uint8),
}


def _kind(name: str) -> str:
    """Return the common part of presets whose tensors are alike in everything."""
    dtype = _DTYPES.get(name, torch.float16)
    return f"{LAYOUTS[name]} {lies(name, dtype)} {WIDTHS.get(name)} {_KV.get(name)}"


#: One preset of each kind.
KINDS = list({_kind(name): name for name in reversed(LAYOUTS)}.values())[::-1]


def meet(one: str, other: str) -> Shape | None:
    """Return the rows that both presets can hold, or None: then a copy between them must raise.
    Widths are unequal if both sides can have such."""
    sides = [read_layout(LAYOUTS[name]) for name in (one, other)]
    opaque = {axes.written("page") for axes in sides}
    kv = {_KV.get(n, 2 if a.written("kv") else 1) for n, a in zip((one, other), sides, strict=True)}
    fixed = {_fixed(name) for name in (one, other)} - {()}
    if len(opaque) > 1 or len(kv) > 1 or len(fixed) > 1:
        return None
    split = any("dim/32" in LAYOUTS[name] for name in (one, other))
    unequal = all(axes.on_left("kv") or "(kv " in axes.text for axes in sides)
    first = 96 if True in opaque else 64 if split else 16
    free = tuple(first // 2 if unequal and k % 2 else first for k in range(min(kv)))
    widths = fixed.pop() if fixed else free
    if not _possible(widths, split, unequal):
        return None
    heads = all(axes.written("head") for axes in sides) and "chunk-2ltd-mla" not in (one, other)
    layers = all(axes.written("layer") for axes in sides)
    return Shape(2 if layers else 1, 2 if heads else 1, widths)


def _possible(widths: tuple[int, ...], split: bool, unequal: bool) -> bool:
    """Return whether both sides can hold these widths."""
    if split and any(width % 32 for width in widths):
        return False
    return unequal or len(set(widths)) == 1


def _fixed(name: str) -> tuple[int, ...]:
    """Return the bytes of each kv (of a page: all of it) if the engine fixes them."""
    widths = WIDTHS.get(name, ())
    return (widths[0] * Shape.block_size,) if "page" in LAYOUTS[name] and widths else widths


def side(name: str, shape: Shape | None = None, *, source: bool = True) -> Side:
    """Return tensors of a preset between canaries, by default of the shape that it holds by
    itself."""
    shape = shape or meet(name, name)
    assert shape is not None
    axes = read_layout(LAYOUTS[name])
    dtype = _DTYPES.get(name, torch.float16)
    if not axes.written("layer"):
        shape = replace(shape, layers=1)
    to = arranged(axes.text, shape, source=source, tokens=shape.slots, **lies(name, dtype))
    made = side_of(to)
    if len(shape.widths) == 1 and not made.opaque:
        made.extents["dim"] = made.extents["dim"][0]  # as the preset declares it
    return made
