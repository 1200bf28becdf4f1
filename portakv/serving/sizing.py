# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk the blocks of a model take, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from portakv.arguments import whole
from portakv.errors import InvalidTerms

#: Bytes of a number, by the name of its dtype in a model's configuration.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
#: Tokens of a step of a serving engine, whose rows are saved together.
STEP = 8192
#: Steps whose rows are in staging at the same time: of saves, and of loads.
STEPS = 2


class Sizes(NamedTuple):
    """The bytes that a model's rows take.

    Attributes:
        token: of one token in all layers.
        staging: that saves and loads do not wait for, with steps of `STEP` tokens.
        windows: some layers keep a window of the tokens, or no rows of tokens.
    """

    token: int
    staging: int
    windows: bool = False

    def tokens(self, nbytes: int) -> int:
        """Return how many tokens fit into some bytes."""
        return nbytes // self.token


def sizes_of(config: Mapping[str, Any], dtype: str = "", ranks: int = 1) -> Sizes:
    """Return the sizes of a model.

    Args:
        config: of ``config.json``, as Hugging Face has it.
        dtype: of the rows; empty: the model's.
        ranks: of tensor parallelism, of which each keeps a part of the heads.

    Raises `InvalidTerms` for a configuration that lacks a number, and for an unknown dtype.
    """
    whole("ranks", ranks, 1)
    text = config.get("text_config")
    if isinstance(text, Mapping):  # of a model that also reads images
        config = {**config, **text}
    name = dtype or str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    if name not in ITEM_BYTES:
        raise InvalidTerms(
            f"Expected a dtype of {', '.join(ITEM_BYTES)}, got {name!r}. Pass the rows' dtype."
        )
    layers = _number(config, "num_hidden_layers")
    if config.get("kv_lora_rank"):  # each rank has the latent row
        wide = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
    else:
        heads = _number(config, "num_attention_heads")
        kv_heads = _number(config, "num_key_value_heads", heads)
        dim = _number(config, "head_dim", _number(config, "hidden_size", 0) // heads)
        wide = 2 * dim * max(1, kv_heads // ranks)
    token = layers * wide * ITEM_BYTES[name]
    return Sizes(token, STEPS * STEP * token, _has_windows(config))


def _has_windows(config: Mapping[str, Any]) -> bool:
    """Return whether some layers of a model do not keep the rows of all tokens."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    used = config.get("use_sliding_window", True) is not False
    return used and bool(config.get("sliding_window"))


def _number(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a number of a configuration."""
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or value < 0:
        raise InvalidTerms(
            f"Expected a number for {name} in a model's configuration, got {value!r}. Pass the "
            f"config.json of a model."
        )
    return value
