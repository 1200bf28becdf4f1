# SPDX-License-Identifier: Apache-2.0
"""A quantized cache in a real vLLM engine on a CPU: a model with scales, and kernels.

vLLM's kernels for fp8 need AVX-512. On other machines torch computes in their place, with rows in
the same order: of a block and a head the keys as [dim, token], then the values as [token, dim].
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from support.vllm_cpu import LAYERS, make_model

#: The largest number of the dtype.
MOST = torch.finfo(torch.float8_e4m3fn).max
#: The scale of values.
VALUES = 0.01
SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}


def make_quantized(folder: Path, scale: float) -> None:
    """Write a model with the scales of an fp8 cache into a folder: ``scale`` of the first layer's
    keys.

    Models of two scales differ in these numbers alone, which lie where no sample of the file is
    taken, as most of a large model.
    """
    from safetensors.torch import load_file, save_file

    make_model(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for layer in range(LAYERS):
        for kind, each in (("k", scale * (1 + layer)), ("v", VALUES)):
            weights[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([each])
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": SCHEME,
    }
    (folder / "config.json").write_text(json.dumps(config))


def compute_fp8() -> None:
    """Have engines of this process keep rows in fp8, also without AVX-512."""
    from vllm import _custom_ops

    if vars(torch.cpu)["_is_avx512_supported"]():
        return
    backend = vars(importlib.import_module("vllm.v1.attention.backends.cpu_attn"))
    backend["_get_attn_isa"] = lambda *_: "vec"
    ops = vars(_custom_ops)
    ops["cpu_attn_get_scheduler_metadata"] = lambda **_: torch.empty(0)
    ops["cpu_attn_reshape_and_cache"] = _write
    ops["cpu_attention_with_kv_cache"] = _attend


def _by_dim(keys: torch.Tensor) -> torch.Tensor:
    """Return keys ``[blocks, heads, tokens, dim]`` as ``[blocks, heads, dim, tokens]``, which
    their memory has."""
    return keys.view(*keys.shape[:2], keys.shape[3], keys.shape[2])


def _write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    isa: str,
    k_scale: float,
    v_scale: float,
    kv_cache_dtype: str,
) -> None:
    """Write rows of tokens into their slots."""
    assert isa == "vec"
    count = len(slots)
    at = slots.clamp(min=0)
    there = slots >= 0
    block = at[there] // keys.shape[2]
    token = at[there] % keys.shape[2]
    _by_dim(keys)[block, :, :, token] = _fp8(key[:count][there], k_scale)
    values[block, :, token] = _fp8(value[:count][there], v_scale)


def _fp8(rows: torch.Tensor, scale: float) -> torch.Tensor:
    quantized = (rows.float() / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
    return quantized.view(torch.uint8)


def _numbers(rows: torch.Tensor, scale: float) -> torch.Tensor:
    return rows.contiguous().view(torch.float8_e4m3fn).float() * scale


def _attend(
    *,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    block_table: torch.Tensor,
    k_scale: float,
    v_scale: float,
    **_: Any,
) -> None:
    """Attend to the rows of each request."""
    size = key_cache.shape[2]
    keys = _by_dim(key_cache)
    for number, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[number : number + 2].tolist()
        blocks = block_table[number, : -(-length // size)].long()
        key = _numbers(keys[blocks].permute(1, 0, 3, 2), k_scale).flatten(1, 2)[:, :length]
        value = _numbers(value_cache[blocks].transpose(0, 1), v_scale).flatten(1, 2)[:, :length]
        wide = query.shape[1] // key.shape[0]
        asked = query[begin:end].float().transpose(0, 1)
        logits = asked @ key.repeat_interleave(wide, 0).transpose(1, 2) * scale
        place = torch.arange(length - (end - begin), length)
        logits.masked_fill_(torch.arange(length) > place[:, None], float("-inf"))
        made = logits.softmax(-1) @ value.repeat_interleave(wide, 0)
        output[begin:end] = made.transpose(0, 1).reshape(output[begin:end].shape)
