# SPDX-License-Identifier: Apache-2.0
"""Random weights of a Llama in a file, which each rank of an engine reads its part of.

`weights` draws the weights of each rank by themselves, so that two ranks together have another
model than one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

#: How much larger weights of attention are than those which keep the size of a row, so that tokens
#: depend on the whole prompt.
_SCALES = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 4.0, "o_proj": 4.0}
_SEED = 7
#: The file of the weights.
WEIGHTS = "model.safetensors"


def write_checkpoint(config: Mapping[str, Any], folder: Path) -> None:
    """Write a model's configuration, and random weights in float32."""
    from safetensors.torch import save_file

    drawn = torch.Generator(device="cpu").manual_seed(_SEED)
    weights = {name: _drawn(name, shape, drawn) for name, shape in _shapes(config)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config}))


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the extents of each weight."""
    words = config["vocab_size"]
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (words, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (words, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)


def _drawn(name: str, shape: tuple[int, ...], drawn: torch.Generator) -> torch.Tensor:
    """Return a weight; those of norms are ones."""
    if len(shape) < 2:
        return torch.ones(shape, device="cpu")
    made: torch.Tensor = torch.randn(shape, generator=drawn, device="cpu")
    if "embed" in name:
        return made
    part = name.split(".")[-2]
    return made.mul_(_SCALES.get(part, 1.0) * shape[-1] ** -0.5)
