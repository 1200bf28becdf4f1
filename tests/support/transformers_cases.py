# SPDX-License-Identifier: Apache-2.0
"""A small model of transformers, a pool for its rows, and the calls that change a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from portakv import KVView

LAYERS = 3
KV_HEADS = 2
DIM = 16
BLOCKS = 24
SIZE = 8


def small(kind: str = "Llama", **more: Any) -> Any:
    """A model of three layers on the host, always the same."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def prompt(batch: int = 1, tokens: int = 21) -> torch.Tensor:
    return torch.randint(1, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


def pool_of(device: torch.device, layout: str) -> KVView:
    """Paged memory with noise in it, in the layout of an engine."""
    if layout.startswith("layer | kv"):
        size: tuple[int, ...] = (2, BLOCKS, SIZE, KV_HEADS, DIM)
        return KVView([torch.randn(size).to(device) for _ in range(LAYERS)], layout)
    size = (BLOCKS, LAYERS, 2, KV_HEADS, SIZE, DIM)
    return KVView(torch.randn(size).to(device), layout)


CHANGES: dict[str, Callable[[Any, torch.device], Any]] = {
    "nothing": lambda layer, device: None,
    "cropped": lambda layer, device: layer.crop(-5),
    "reordered": lambda layer, device: layer.reorder_cache(torch.tensor([1, 0], device=device)),
    "repeated": lambda layer, device: layer.batch_repeat_interleave(2),
    "selected": lambda layer, device: layer.batch_select_indices(torch.tensor([1], device=device)),
    "reset": lambda layer, device: layer.reset(),
}
