# SPDX-License-Identifier: Apache-2.0
"""Bytes of a token and of states in released models, and what is said where they are not known."""

from __future__ import annotations

from typing import Any

import pytest
from support.released_models import (
    BY_8_BITS,
    DEEPSEEK_V4,
    GDN,
    GLM_52,
    JAMBA,
    KDA,
    KNOWN,
    LLAMA_8B,
    MAMBA_1,
    MAMBA_2,
    MODELS,
    NANO,
    QWEN35_27B,
    SUPER_49B,
    block,
)

from portakv.errors import InvalidTerms
from portakv.serving.sizing import CHUNK, FULL, STATE, STEP, STEPS, WINDOW, sizes_of

#: The kinds of layers, as a model of the table counts them.
KINDS = {FULL: "full", WINDOW: "window", CHUNK: "chunk", STATE: "states"}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_released_model_keeps(name: str) -> None:
    model = MODELS[name]
    sizes = sizes_of(model.config)
    assert model.refused in sizes.refused
    assert bool(sizes.refused) == bool(model.refused)
    assert model.unknown in sizes.unknown
    if not model.refused:
        assert bool(sizes.unknown) == bool(model.unknown)
    assert {KINDS[kind]: many for kind, many in sizes.layers.items()} == {
        name: getattr(model, name) for name in KINDS.values() if getattr(model, name)
    }
    assert sizes.token == model.token
    assert KNOWN.get(name, model.token) == model.token
    assert sizes.staging == STEPS * STEP * model.token
    assert sizes.state == model.state
    assert sizes.indexed == model.indexed
    assert sizes.windows == bool(model.window or model.chunk or model.states)


@pytest.mark.parametrize(
    ("config", "layers", "layer", "block"),
    [
        ({**QWEN35_27B, **GDN}, 48, 3 * (4096 + 6144) * 2 + 48 * 128 * 128 * 4, 784),
        ({**NANO, **MAMBA_2}, 23, 3 * (4096 + 2 * 8 * 128) * 2 + 64 * 64 * 128 * 4, 2096),
        ({**LLAMA_8B, "linear_attn_config": KDA}, 31, 3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4, 544),
        (
            {**LLAMA_8B, "layer_types": ["conv", "attention"] * 16, "conv_L_cache": 3},
            16,
            2 * 4096 * 2,
            16,
        ),
        ({**JAMBA, **MAMBA_1}, 28, 3 * 8192 * 2 + 8192 * 16 * 2, 80),
    ],
)
def test_the_bytes_of_states(config: dict[str, Any], layers: int, layer: int, block: int) -> None:
    """Blocks of vLLM have as many tokens or more as take the bytes of a layer's state."""
    sizes = sizes_of(config)
    assert sizes.has_states
    assert sizes.layers[STATE] == layers
    assert sizes.state_layer == layer
    assert sizes.state == layers * layer
    assert sizes.block == block


def test_states_that_are_not_known_have_no_size() -> None:
    sizes = sizes_of({**LLAMA_8B, "layer_types": ["mamba", "attention"] * 16})
    assert sizes.has_states
    assert (sizes.state, sizes.block) == (0, 0)
    assert sizes.token > 0


def test_a_model_of_states_alone_is_served() -> None:
    sizes = sizes_of({**NANO, **MAMBA_2, "hybrid_override_pattern": "ME" * 26})
    assert sizes.refused == ""
    assert sizes.state == 26 * sizes.state_layer
    assert sizes.block == 0


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 32}, None),
        ({"sliding_window": 4096, "sliding_window_pattern": 4}, 4096),
        ({"sliding_window": 4096, "sliding_window_pattern": "LLLG"}, 4096),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 32}, None),
    ],
)
def test_windows(change: dict[str, Any], window: int | None) -> None:
    """Their rows take the same bytes."""
    sizes = sizes_of({**LLAMA_8B, **change})
    assert sizes.window == window
    assert sizes.windows == (window is not None)
    assert sizes.token == 32 * 2 * 8 * 128 * 2
    assert sizes.refused == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_share_every": 2}, "kv_share_every"),
        ({"attn_config": {"kv_n_heads": 8}}, "attn_config"),
        ({"recurrent_block": 3, "attention_window_size": 5}, "recurrent_block"),
        ({"layer_types": ["full_attention"] * 31 + ["dilated"]}, "'dilated'"),
        ({"layer_types": ["full_attention"] * 31}, "32 layers, and its configuration lists 31"),
        ({"layer_types": "full_attention"}, "where a list is expected"),
        ({"mamba_d_state": 16}, "no known key says which"),
        ({"kv_lora_rank": 512, "model_type": "minicpm3"}, "'minicpm3'"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"torch_dtype": "int3"}, "dtype"),
        ({"quantization_config": {**BY_8_BITS, "kv_cache_scheme": {"num_bits": 4}}}, "dtype"),
        ({"block_configs": [{"block_type": "attention"}] * 32}, "without attention"),
    ],
)
def test_what_is_not_known_gives_no_size(change: dict[str, Any], says: str) -> None:
    sizes = sizes_of({**LLAMA_8B, **change})
    assert sizes.token == 0
    assert says in sizes.unknown


def test_keys_of_other_things_change_nothing() -> None:
    others = {
        "attention_bias": False,
        "attention_dropout": 0.1,
        "q_lora_rank": 1536,
        "moe_latent_size": 2048,
        "attn_logit_softcapping": 50.0,
        "rope_theta": 5e5,
        "num_experts": 128,
        "vision_config": {"num_hidden_layers": 2},
        "kv_new": None,
    }
    assert sizes_of({**LLAMA_8B, **others}) == sizes_of(LLAMA_8B)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (DEEPSEEK_V4, "compressed rows"),
        ({**LLAMA_8B, "is_encoder_decoder": True}, "cross attention"),
        ({**SUPER_49B, "block_configs": [block(8)] * 40 + [block(16)] * 40}, "of several sizes"),
        ({**LLAMA_8B, "layer_types": ["mlp"] * 32}, "none of its layers keeps rows"),
    ],
)
def test_layers_that_the_connector_refuses(config: dict[str, Any], says: str) -> None:
    assert says in sizes_of(config).refused


def test_layers_with_an_index_and_rows_of_an_unknown_width() -> None:
    """A cache of 8 bits is quantized by the attention backend."""
    sizes = sizes_of({**GLM_52, "quantization_config": BY_8_BITS})
    assert sizes.unknown
    assert (sizes.refused, sizes.indexed) == ("", 21)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "Expected num_hidden_layers or n_layer, or a list such as layer_types"),
        ({**LLAMA_8B, "num_attention_heads": "32"}, "num_attention_heads .* got '32'"),
    ],
)
def test_a_file_that_is_not_of_a_model_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms, match=says):
        sizes_of(config)


@pytest.mark.parametrize(
    "odd",
    [
        {"num_key_value_heads": [2, 2, 4, 4]},
        {"head_dim": 8.0},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0, "head_dim": None, "num_key_value_heads": None},
        {"attn_layer_indices": [[1]]},
        {"linear_attn_config": {"full_attn_layers": ["x"]}},
        {"sliding_window": [128, 64]},
    ],
    ids=str,
)
def test_values_of_other_kinds_give_no_size(odd: dict[str, Any]) -> None:
    """A configuration may be right, and say what is not known here."""
    sizes = sizes_of({**LLAMA_8B, **odd})
    assert sizes.token == 0
    assert sizes.unknown or sizes.refused
