# SPDX-License-Identifier: Apache-2.0
"""Caches of any preset, full of noise, their rows as the oracle finds them, and normal numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.layout.presets import PRESETS
from portakv.view.example import example_tensors
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import Rows, leaves
from support.core_cases import noise

Logical = list[np.ndarray[Any, np.dtype[np.uint8]]]  # for each kv [layer, token, head, byte]


class Cache:
    """A cache of a preset, full of noise, of ``blocks`` blocks of ``size`` tokens; ``shared`` with
    other processes."""

    def __init__(
        self,
        preset: str,
        layers: int,
        heads: int,
        widths: tuple[int, ...],
        blocks: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
        shared: bool = False,
    ) -> None:
        shape: dict[str, Any] = {"layers": layers, "heads": heads, "dim": widths, "kv": len(widths)}
        self.tensors = example_tensors(preset, blocks=blocks, tokens=size, dtype=dtype, **shape)
        for number, tensor in enumerate(leaves(self.tensors)):
            tensor.copy_(noise(*tensor.shape, dtype=dtype, seed=seed + number))
            if shared:
                tensor.share_memory_()
        self.view = KVView(self.tensors, preset, block_size=size, **shape)
        self.rows = Rows(self.tensors, PRESETS[preset].layout, {"block_size": size, **shape})

    def logical(self, blocks: torch.Tensor) -> Logical:
        """Return the rows of these blocks, as the oracle finds them."""
        rows = self.rows
        memory = Memory.snapshot(self.tensors)
        size = rows.block_size or 1
        slots = (blocks.numpy()[:, None] * size + np.arange(size)).ravel()
        return [
            np.stack([memory.read(rows.row_addresses(k, x, slots)) for x in range(rows.layers)])
            for k in range(rows.kv)
        ]


def shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def normal_layers(
    size: Sequence[int], layers: int, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Return layers of normal numbers on the host, the same in each call."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    made = [
        torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        for _ in range(layers)
    ]
    return [layer.to(dtype) for layer in made]
