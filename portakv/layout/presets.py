# SPDX-License-Identifier: Apache-2.0
"""Named layouts: one preset for each layout that an engine is known to use, by release.

A preset is data: a layout string, the engine and releases it is true for, and the extents that
hold for every model. Extents that depend on the model stay undeclared; the caller declares them.
Several presets may share a string: they differ in the memory order of the tensors, which is read
from the strides and never guessed.

Facts were read from released packages: vLLM's attention backends (`get_kv_cache_shape`,
`get_kv_cache_stride_order`) and, from 0.29, its `KVCacheLayout`; LMCache 0.5.6's
`EngineKVFormat`; SGLang's memory pools; FlexKV; vllm-ascend; TensorRT-LLM; Dynamo's KVBM.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from portakv.arguments import shown
from portakv.errors import LayoutError
from portakv.layout.language import AXES

Extent = int | tuple[int, ...]


@dataclass(frozen=True)
class Preset:
    """A named layout.

    Attributes:
        name: what a caller writes instead of the string.
        layout: the layout string.
        engine: the engine or tool that uses it.
        releases: the releases it is true for, in words; empty if no release is known.
        extents: extents that are always true for it, as `KVView` takes them; ``dim`` counts
            elements of the tensors' dtype, one number or one for each ``kv``.
        memory: the same groups in the order in which they lie in memory, if that is not the
            order of ``layout``. What stands right of ``|`` is one allocation.
        note: what a caller has to know; one or two sentences.
    """

    name: str
    layout: str
    engine: str
    releases: str = ""
    extents: Mapping[str, Extent] = field(default_factory=lambda: MappingProxyType({}))
    memory: str = ""
    note: str = ""


def memory_order(text: str) -> str:
    """Return a preset's groups in the order of memory; a layout string as it is."""
    preset = _named(text)
    return (preset.memory or preset.layout) if preset else text


def _named(text: str) -> Preset | None:
    return PRESETS.get(text.strip()) or _BY_LMCACHE_NAME.get(text.strip())


def resolve(text: str) -> tuple[str, dict[str, Extent]]:
    """Turn a preset's name, LMCache's name of a format or a layout string into a layout string.

    Returns:
        The layout string and the extents that the preset declares (none for a string).

    Raises:
        LayoutError: a single word that is neither a preset nor an axis; near names are listed.
    """
    if not isinstance(text, str):
        raise LayoutError(
            f"Expected a layout string or the name of a preset, got {shown(text)}. Pass a "
            f"string. Pass the tensors first, then the layout."
        )
    preset = _named(text)
    word = text.strip()
    if preset is not None:
        return preset.layout, dict(preset.extents)
    # What can only be meant as a layout string; an empty one is left to the parser.
    if not word or word in (*AXES, "1") or any(c in " \t\n|()/%" for c in word):
        return text, {}
    near = difflib.get_close_matches(word.lower(), PRESETS, n=5, cutoff=0.5)
    hint = f"Near names: {', '.join(near)}." if near else "No name is near."
    raise LayoutError(
        f"Expected the name of a preset or a layout string, got {word!r}. {hint} Write one "
        f"of the names that `portakv layouts` prints, or a layout string such as "
        f"'layer | kv block token head dim'."
    )


_PACKED = "Packed content as one plane, {}; key and value widths may differ inside it."

# LMCache's formats in the order of their numbers. NB blocks, NL layers, BS block size, NH heads,
# HS head size, CS content, `_X_` a list level.
_LMCACHE: tuple[tuple[str, str, str], ...] = (
    ("NB_NL_TWO_BS_NH_HS", "block layer kv token head dim", "vLLM cross-layer, TRT-LLM NHD."),
    ("NL_X_TWO_NB_BS_NH_HS", "layer | kv block token head dim", "vLLM flash attention NHD."),
    ("NL_X_NB_TWO_BS_NH_HS", "layer | block kv token head dim", "vLLM FlashInfer, Triton NHD."),
    ("NL_X_NB_BS_HS", "layer | block token dim", "vLLM MLA."),
    ("TWO_X_NL_X_NBBS_NH_HS", "kv layer | (block token) head dim", "SGLang MHA."),
    ("NL_X_NBBS_ONE_HS", "layer | (block token) 1 dim", "SGLang MLA."),
    ("NL_X_TWO_NB_NH_BS_HS", "layer | kv block head token dim", "vLLM flash attention HND."),
    ("NL_X_NB_TWO_NH_BS_HS", "layer | block kv head token dim", "vLLM FlashInfer HND."),
    ("NB_NL_TWO_NH_BS_HS", "block layer kv head token dim", "TRT-LLM HND."),
    ("TWO_X_NL_X_NB_BS_NH_HS", "kv layer | block token head dim", "SGLang, LMCache's daemon."),
    ("NL_X_NB_NH_BS_TWO_HS", "layer | block head token (kv dim)", "vLLM fused K/V, HND."),
    ("NL_X_NB_BS_NH_TWO_HS", "layer | block token head (kv dim)", "vLLM fused K/V, NHD."),
    ("NL_X_NB_NH_BS_CS", "layer | block head token dim", _PACKED.format("HND")),
    ("NL_X_NB_BS_NH_CS", "layer | block token head dim", _PACKED.format("NHD")),
    ("NL_X_NB_BSV_BSS", "layer | block page",
     "DSA indexer: a block's values, then its scales. Whole blocks only."),
    ("NL_X_TWO_NB_NH_ONE_BS_HS", "layer | kv block head 1 token dim", "vLLM-RBLN."),
    ("NL_X_TWO_X_NB_BS_NH_HS", "layer kv | block token head dim", "vLLM-Ascend (K, V) tuples."),
    ("NL_X_NP_X_NB_BS_ONE_HS", "layer kv | block token 1 dim",
     "vLLM-Ascend MLA and DSA: 2 or 3 parts of unequal width; declare kv=3 for DSA."),
    ("NL_X_NB_BS_NH_HS", "layer | block token head dim", "SGLang unified components."),
)  # fmt: skip

_FUSED = "layer | block head token (kv dim)"
_FUSED_NOTE = "Logical shape (blocks, heads, block_size, 2 * head_dim) in either memory order."
_VIEW_NOTE = (
    "KVCacheLayout.{}: memory order of layer, block, head, token (N) and content. Each layer is a "
    "view [B, H, N, C] whatever the order: strides, padding and offset are read. K and V may "
    "differ in width: dim=(k, v). Dimension 0 may count kernel blocks."
)
_PAGE_NOTE = "The nominal row is not one run of bytes; whole blocks only. Token-exact: {}."
_SPLIT_NOTE = "A block holds all values, then all scales. Block size must be declared."
_FLAT_NOTE = "A flat pool of token slots; declare block_size = the pool's page size (1 is right)."

_VIEW_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
_ALSO = {"LBHNC": " Also called HND.", "LBNHC": " Also called NHD."}
_LETTERS = {"L": "layer", "B": "block", "H": "head", "N": "token", "C": "(kv dim)"}


def _spelled(order: str) -> str:
    """Return the groups of a memory order that is named by letters."""
    return " ".join(_LETTERS[letter] for letter in order)


# Presets whose tensors do not lie in the order of their dimensions.
_MEMORY = {
    "vllm-hnd": "layer | kv block head token dim",
    "vllm-flashinfer-hnd": "layer | block kv head token dim",
    "vllm-0.26-nhd": "layer | block token head (kv dim)",
    **{f"vllm-{order.lower()}": _spelled(order) for order in _VIEW_ORDERS},
}

# name, layout, engine, releases, extents, note
_ROWS: tuple[tuple[str, str, str, str, dict[str, Extent], str], ...] = (
    # vLLM, keys and values with an axis of their own
    ("vllm-nhd", "layer | kv block token head dim", "vLLM flash attention", "<= 0.22.1", {},
     "Shape (2, blocks, block_size, heads, head_dim), memory in the same order."),
    ("vllm-hnd", "layer | kv block token head dim", "vLLM flash attention", "<= 0.22.1", {},
     "The same logical shape as vllm-nhd over memory ordered K B H T D: strides are read."),
    ("vllm-flashinfer-nhd", "layer | block kv token head dim", "vLLM FlashInfer", "<= 0.22.1", {},
     "Shape (blocks, 2, block_size, heads, head_dim); also with fp8 KV."),
    ("vllm-flashinfer-hnd", "layer | block kv token head dim", "vLLM FlashInfer", "<= 0.22.1", {},
     "Logical shape as vllm-flashinfer-nhd over memory ordered B K H T D. A tensor that was "
     "permuted to (blocks, 2, heads, block_size, head_dim) is flashinfer-hnd."),
    ("vllm-triton", "layer | block kv token head dim", "vLLM Triton", "<= 0.22.1", {},
     "Shape (blocks, 2, block_size, heads, head_dim); also with fp8 KV."),
    ("flashinfer-hnd", "layer | block kv head token dim", "FlashInfer", "", {},
     "Shape (blocks, 2, heads, block_size, head_dim), as FlashInfer itself takes it."),
    ("vllm-cross-nhd", "block layer kv token head dim", "vLLM cross-layer", "<= 0.25", {},
     "One tensor in memory order: a block is one run over all layers."),
    ("vllm-0.23", "layer | block kv token head dim", "vLLM", "0.23 - 0.25", {},
     "Shape (blocks, 2, block_size, heads, head_dim)."),
    # vLLM, keys and values side by side in the content
    ("vllm-0.26-nhd", _FUSED, "vLLM", "0.26 - 0.28", {}, _FUSED_NOTE + " Memory: B T H 2D."),
    ("vllm-0.26-hnd", _FUSED, "vLLM", "0.26 - 0.28", {}, _FUSED_NOTE + " Memory: B H T 2D."),
    ("vllm-0.26-cross-nhd", "block layer token head (kv dim)", "vLLM cross-layer", "0.26 - 0.28",
     {}, "One tensor in memory order: a block is one run over all layers."),
    ("vllm-0.26-cross-hnd", "block head layer token (kv dim)", "vLLM cross-layer", "0.26 - 0.28",
     {}, "One tensor in memory order: a block is one run over all layers."),
    *((f"vllm-{order.lower()}", _FUSED, "vLLM", ">= 0.29", {},
       _VIEW_NOTE.format(order) + _ALSO.get(order, "")) for order in _VIEW_ORDERS),
    ("vllm-0.29-planes", "layer | block kv token (head dim)", "vLLM on ROCm (AITER)", ">= 0.29", {},
     "Views [B, 2, N, heads * head_dim]: key and value groups take the place of the heads. "
     "Declare heads."),
    ("vllm-0.29-cpu", "layer | block page", "vLLM CPU attention", ">= 0.29", {},
     "Views [B, H, N, 2 * head_dim] whose inside depends on the kernels' ISA: vec and vec16 write "
     "a head's keys as [dim, N] and its values as [N, dim], AMX packs keys in another way. Whole "
     "blocks only."),
    # vLLM, one latent row for each token
    ("vllm-mla", "layer | block token dim", "vLLM MLA", "<= 0.28", {},
     "Shape (blocks, block_size, 576); some models 320."),
    ("vllm-0.29-mla", "layer | block 1 token dim", "vLLM MLA", ">= 0.29", {},
     "Views [B, 1, N, C] in any KVCacheLayout; pages may be padded."),
    ("vllm-mla-fp8", "layer | block token dim", "vLLM fp8_ds_mla", "<= 0.28", {"dim": 656},
     "uint8 rows of 512 fp8 values, 16 bytes of scales, 128 bytes bf16. Bytes, not numbers."),
    ("vllm-dsv4", "layer | block page", "vLLM DeepSeek-V4 fp8", "", {},
     "Nominal (blocks, block_size, 584) uint8, page rounded up to 576 bytes. "
     + _PAGE_NOTE.format("vllm-dsv4-split")),
    ("vllm-dsv4-split", "layer | block (kv token dim)", "vLLM DeepSeek-V4 fp8", "",
     {"kv": 2, "dim": (576, 8)}, _SPLIT_NOTE + " Values 448 fp8 + 128 bytes bf16, scales 8."),
    ("vllm-mla-nvfp4", "layer | block page", "vLLM nvfp4_ds_mla", "", {},
     "Nominal (blocks, block_size, 352) uint8. " + _PAGE_NOTE.format("vllm-mla-nvfp4-split")),
    ("vllm-mla-nvfp4-split", "layer | block (kv token dim)", "vLLM nvfp4_ds_mla", "",
     {"kv": 2, "dim": (320, 32)}, _SPLIT_NOTE + " 320 + 32 bytes, as LMCache's table has it."),
    ("vllm-dsa", "layer | block page", "vLLM DSA indexer keys", "", {},
     "Nominal (blocks, block_size, 132) uint8. " + _PAGE_NOTE.format("vllm-dsa-split")),
    ("vllm-dsa-split", "layer | block (kv token dim)", "vLLM DSA indexer keys", "",
     {"kv": 2, "dim": (128, 4)}, _SPLIT_NOTE + " 128 bytes of fp8 values, one fp32 scale."),
    ("vllm-rbln", "layer | kv block head 1 token dim", "vLLM-RBLN", "", {}, "HND."),
    # SGLang: device pools are flat, host pools are one tensor
    ("sglang-mha", "kv layer | (block token) head dim", "SGLang MHA pool", "", {},
     "(key layers, value layers), each (slots, heads, head_dim). " + _FLAT_NOTE),
    ("sglang-mha-flat", "(kv layer) | (block token) head dim", "SGLang MHA pool", "", {},
     "One list: all key layers, then all value layers. " + _FLAT_NOTE),
    ("sglang-mla", "layer | (block token) 1 dim", "SGLang MLA pool", "", {}, _FLAT_NOTE),
    ("sglang-npu", "kv | layer block token head dim", "SGLang on Ascend", "", {},
     "(all keys, all values), each (layers, blocks, block_size, heads, head_dim)."),
    ("sglang-host-layer-first", "kv layer (block token) head dim", "SGLang host pool", "", {},
     "Shape (2, layers, slots, heads, head_dim). " + _FLAT_NOTE),
    ("sglang-host-page-first", "kv (block token) layer head dim", "SGLang host pool", "", {},
     "Shape (2, slots, layers, heads, head_dim). " + _FLAT_NOTE),
    ("sglang-host-page-first-direct", "kv block layer token head dim", "SGLang host pool", "", {},
     "Shape (2, blocks, layers, block_size, heads, head_dim)."),
    ("sglang-host-page-head", "kv block head token layer dim", "SGLang host pool", "", {},
     "Shape (2, blocks, heads, block_size, layers, head_dim)."),
    # other engines
    ("trtllm-hnd", "block layer kv head token dim", "TensorRT-LLM", "", {}, "One pool."),
    ("trtllm-nhd", "block layer kv token head dim", "TensorRT-LLM", "", {}, "One pool."),
    ("vllm-ascend", "layer kv | block token head dim", "vLLM-Ascend", "", {},
     "(key, value) tuples, separate allocations, storage offsets; widths may differ."),
    ("vllm-ascend-mla", "layer kv | block token 1 dim", "vLLM-Ascend MLA", "", {},
     "(latent, rope) tuples of unequal width."),
    ("vllm-ascend-dsa", "layer kv | block token 1 dim", "vLLM-Ascend DSA", "", {"kv": 3},
     "(latent, rope, indexer key) tuples of unequal width."),
    ("vllm-ascend-nz", "layer kv | block head dim/32 token dim%32", "vLLM-Ascend int8 NZ", "", {},
     "(key, value) tuples, each (blocks, heads, head_dim / 32, block_size, 32) int8."),
    ("vllm-ascend-merged", "layer | kv block token head dim", "vLLM-Ascend", "0.9.2", {},
     "Older releases: one tensor (2, blocks, block_size, heads, head_dim) for each layer."),
    ("mlu", "layer kv | block head token dim", "Cambricon torch_mlu_ops", "", {},
     "Key and value caches (blocks, heads, block_size, head_dim); int32 slots."),
    ("mlu-merged", "layer | kv block head token dim", "Cambricon torch_mlu_ops", "", {},
     "TWO_NB_HN_BS_HS of its transfer ops, from a third-party copy: not confirmed by the vendor."),
    ("swifttransformer", "kv | block layer head token dim", "SwiftTransformer", "", {},
     "(keys, values), each e.g. (7491, 32, 32, 16, 128)."),
    ("epd", "layer kv block token head dim", "EPD", "", {}, "E.g. (32, 2, 7491, 16, 32, 128)."),
    ("flexkv-layerfirst", "layer kv block token head dim", "FlexKV LAYERFIRST", "", {}, ""),
    ("flexkv-blockfirst", "block layer kv token head dim", "FlexKV BLOCKFIRST", "", {},
     "Usual for CPU and SSD: a block is one run."),
    ("flexkv-layerblock", "layer block kv token head dim", "FlexKV LAYERBLOCK", "", {}, ""),
    ("dynamo-universal", "block head layer kv token dim", "Dynamo KVBM", "", {},
     "Heads outermost in a block: another tensor-parallel size is a slice by heads."),
    ("dynamo-universal-blocks", "block | head layer kv token dim", "Dynamo KVBM", "", {},
     "The same with one tensor for each block."),
    ("encoder-cache", "block token dim", "multimodal encoder cache", "", {},
     "Shape (entries, tokens, dim), e.g. (1000, 576, 4096): one plane."),
    ("transformers", "layer kv | 1 head token dim", "Hugging Face transformers", "", {},
     "[(layer.keys, layer.values) for layer in past_key_values.layers], batch 1."),
    ("opaque", "layer | block page", "any", "", {}, "Whole blocks of unknown content."),
    ("opaque-cross", "block page", "any", "", {},
     "One tensor (blocks, page bytes): whole blocks of unknown content."),
    # chunks: dense buffers of tokens
    ("chunk-2ltd", "kv layer token (head dim)", "LMCache KV_2LTD", "", {},
     "The default chunk [2, layers, tokens, heads * head_dim]; 256 tokens."),
    ("chunk-2ltd-mla", "kv layer token (head dim)", "LMCache KV_2LTD, MLA", "",
     {"kv": 1, "heads": 1}, "[1, layers, tokens, C]."),
    ("chunk-t2d", "token kv (head dim)", "LMCache KV_T2D", "", {}, "Layerwise: one layer."),
    ("chunk-2td", "kv token (head dim)", "LMCache KV_2TD", "", {}, "Layerwise: one layer."),
    ("chunk-block-first", "block layer kv token head dim", "FlexKV and storage", "", {},
     "[blocks, layers, 2, block_size, heads, head_dim]: a block is one run."),
    ("chunk-universal", "head layer kv token dim", "Dynamo KVBM", "", {},
     "[heads, layers, 2, tokens, head_dim]: for another tensor-parallel size."),
    ("chunk-list", "block | kv layer token (head dim)", "LMCache", "", {},
     "A list of memory objects as one paged view; block_size is the chunk's tokens."),
)  # fmt: skip

_BY_LMCACHE_NAME = {
    name: Preset(f"lmcache-{number}", layout, "LMCache", "0.5.6", note=f"{name}. {note}")
    for number, (name, layout, note) in enumerate(_LMCACHE)
}
_BY_NAME = {
    name: Preset(
        name, layout, engine, releases, MappingProxyType(always), _MEMORY.get(name, ""), note
    )
    for name, layout, engine, releases, always, note in _ROWS
}
PRESETS: Mapping[str, Preset]
PRESETS = MappingProxyType({p.name: p for p in _BY_LMCACHE_NAME.values()} | _BY_NAME)
"""All presets by name, in the order in which `portakv layouts` prints them."""

#: Words of the engines that run on the devices of one vendor alone.
_ONE_VENDOR = ("Ascend", "Cambricon", "RBLN")


def suggested() -> list[Preset]:
    """Return all presets, in the order in which an error suggests those that fit.

    Engines that run on the devices of one vendor come after engines for all, LMCache's numbers
    last. Of the others, tensors in memory as their shape has it come first, then later releases.
    """

    def order(preset: Preset) -> tuple[bool, bool, bool]:
        by_vendor = any(word in preset.engine for word in _ONE_VENDOR)
        return preset.name.startswith("lmcache-"), by_vendor, bool(preset.memory)

    latest_first = list(PRESETS.values())[::-1]
    return sorted(latest_first, key=order)
