# SPDX-License-Identifier: Apache-2.0
"""Random weights for vLLM's engines, with which tokens depend on the whole prompt.

Plain random weights repeat one token, so that wrong rows change nothing, and prove nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from portakv.integrations import check_release

check_release("vllm")

from vllm.model_executor.model_loader import register_model_loader  # noqa: E402
from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # noqa: E402

#: The name of the loader for vLLM's ``load_format``.
FORMAT = "portakv-random"
#: How much larger weights of attention are than those which keep the size of a row.
_SCALES = {"qkv": 3.0, "q_": 2.0, "kv_": 3.0, "o_proj": 4.0}


@register_model_loader(FORMAT)
class RandomLoader(BaseModelLoader):  # type: ignore[misc]
    """Draws the weights before kernels pack them."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        drawn = dict[torch.device, torch.Generator]()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                device = weight.device
                if device not in drawn:
                    drawn[device] = torch.Generator(device=device).manual_seed(7)
                if "norm" in name:
                    weight.fill_(1)
                elif weight.dim() < 2:
                    weight.fill_(0)
                else:
                    deviation = _deviation(name, weight, model_config.hf_config.model_type)
                    weight.normal_(0, deviation, generator=drawn[device])


def _deviation(name: str, weight: torch.Tensor, kind: str) -> float:
    """Return the standard deviation of a matrix ``[outputs, inputs]`` of a kind of model."""
    if "embed" in name:
        # Gemma multiplies a token's row by the root of its width; it would outweigh all layers.
        return float(weight.shape[-1] ** -0.5) if kind.startswith("gemma") else 1.0
    part = name.rpartition("self_attn.")[2] if "self_attn." in name else ""
    scale = next((factor for begin, factor in _SCALES.items() if part.startswith(begin)), 1.0)
    return float(scale * weight.shape[-1] ** -0.5)
