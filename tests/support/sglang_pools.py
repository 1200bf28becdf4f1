# SPDX-License-Identifier: Apache-2.0
"""SGLang's own pools of a device, on the CPU. Import `support.sglang_on_cpu` before."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

LAYERS = 3
PAGE = 8
HEADS = 2
DIM = 16


class DevicePool(NamedTuple):
    """A pool of a device.

    Attributes:
        pool: SGLang's object.
        info: its description, of which host pools are made.
        buffers: the memory of its layers.
    """

    pool: Any
    info: Any
    buffers: list[torch.Tensor]


def device_pool(kind: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> DevicePool:
    """Return a pool of keys and values (``mha``, ``unequal``) or of latents (``mla``)."""
    if kind == "mla":
        latents = MLATokenToKVPool(
            tokens,
            PAGE,
            dtype,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
            kv_lora_rank=DIM,
            qk_rope_head_dim=DIM // 2,
        )
        return DevicePool(latents, latents._mla_buffer_info(), [*latents.kv_buffer])
    wide = DIM // 2 if kind == "unequal" else None
    pool = MHATokenToKVPool(tokens, PAGE, dtype, HEADS, DIM, LAYERS, "cpu", False, v_head_dim=wide)
    return DevicePool(pool, pool._mha_buffer_info(), [*pool.k_buffer, *pool.v_buffer])
