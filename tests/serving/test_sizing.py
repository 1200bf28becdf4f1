# SPDX-License-Identifier: Apache-2.0
"""Bytes of a token in real models. Each right value is a product of the facts of its family: layers
with rows, heads, numbers of a key and a value, bytes of a number."""

from __future__ import annotations

from typing import Any

import pytest

from portakv.errors import InvalidTerms
from portakv.serving.sizing import STATE, STEP, STEPS, sizes_of

BF16 = {"torch_dtype": "bfloat16"}


def block(heads_in_group: int | None) -> dict[str, Any]:
    """Return an entry of block_configs; None: a layer without attention."""
    off = heads_in_group is None
    return {
        "attention": {"n_heads_in_group": heads_in_group, "no_op": off},
        "ffn": {"no_op": False},
    }


def of_layers(**counts: int) -> list[str]:
    """Return the names of layers, each so many times."""
    return [name for name, count in counts.items() for _ in range(count)]


LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    **BF16,
}
#: Llama-3.3-Nemotron-Super-49B: 49 of 80 layers have attention, of 64 heads in groups of 8.
SUPER_49B = {
    "model_type": "nemotron-nas",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "block_configs": [block(8)] * 49 + [block(None)] * 31,
    **BF16,
}
NEMOTRON_H = {
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "sliding_window": None,
    **BF16,
}
NANO = {
    **NEMOTRON_H,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}
#: It has no num_hidden_layers.
ULTRA = {
    **NEMOTRON_H,
    "num_attention_heads": 64,
    "layers_block_type": of_layers(mamba=48, moe=48, attention=12),
    "mtp_layers_block_type": ["attention", "moe"],
    "num_nextn_predict_layers": 1,
}
QWEN35_27B = {
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
        "linear_num_value_heads": 48,
        "linear_conv_kernel_dim": 4,
        "attn_output_gate": True,
        "dtype": "bfloat16",
    },
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    **BF16,
}
JAMBA = {
    "model_type": "jamba",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "mamba_d_state": 16,
    **BF16,
}
BAMBA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attn_layer_indices": [9, 18, 27],
    "mamba_n_heads": 128,
    **BF16,
}
KIMI_K3 = {
    "model_type": "kimi_k3",
    "text_config": {
        "model_type": "kimi_linear",
        "num_hidden_layers": 93,
        "num_attention_heads": 96,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "linear_attn_config": {"full_attn_layers": [*range(4, 93, 4), 93], "num_heads": 96},
        "dtype": "bfloat16",
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1536,
    "v_head_dim": 128,
    **BF16,
}
INDEXED = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}
DEEPSEEK_V32 = {**DEEPSEEK_V3, "model_type": "deepseek_v32", **INDEXED}
#: Layers share the index of an earlier one: 0, 1, 2, then each fourth.
GLM_52 = {
    **DEEPSEEK_V32,
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 78,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_share_for_mtp_iteration": True,
    "indexer_rope_interleave": True,
}
DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "sliding_window": 128,
    "compress_ratios": [0, 0, 4, 128],
    **INDEXED,
    **BF16,
}
MINIMAX_M3 = {
    "model_type": "minimax_m3",
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_attention_freq": [0] * 3 + [1] * 57,
    },
    **BF16,
}
#: Five of six layers have a window, and other heads than the others.
GEMMA4_26B = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        "dtype": "bfloat16",
    },
}
#: The last 10 of 30 layers read the caches of earlier ones.
GEMMA3N_E2B = {
    "model_type": "gemma3n",
    "text_config": {
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_kv_shared_layers": 10,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6,
        "torch_dtype": "bfloat16",
    },
}
MIMO_V2 = {
    "model_type": "mimo_v2_flash",
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "sliding_window": 128,
    "attention_chunk_size": 128,
    "hybrid_layer_pattern": [0, *[1] * 4, *([0, *[1] * 5] * 7), 0],
    **BF16,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_chunk_size": 8192,
        "torch_dtype": "bfloat16",
    },
}
FALCON_7B = {
    "model_type": "falcon",
    "num_hidden_layers": 32,
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    **BF16,
}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024}
BY_8_BITS = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}

#: Of each family: its configuration, the bytes of a token, some layers keep no rows of all tokens.
FAMILIES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "Llama 3.1 8B": (LLAMA_8B, 32 * 2 * 8 * 128 * 2, False),
    "Llama 4": (LLAMA4, 48 * 2 * 8 * 128 * 2, False),
    "Nemotron Super 49B": (SUPER_49B, 49 * 2 * 8 * 128 * 2, False),
    "Nemotron 3 Nano": (NANO, 6 * 2 * 2 * 128 * 2, True),
    "Nemotron 3 Ultra": (ULTRA, 12 * 2 * 2 * 128 * 2, True),
    "Qwen3.5 27B": (QWEN35_27B, 16 * 2 * 4 * 256 * 2, True),
    "Qwen3-Next": (QWEN3_NEXT, 12 * 2 * 2 * 256 * 2, True),
    "Jamba v0.1": (JAMBA, 4 * 2 * 8 * 128 * 2, True),
    "Bamba": (BAMBA, 3 * 2 * 8 * 128 * 2, True),
    "Kimi K3": (KIMI_K3, 24 * (512 + 64) * 2, True),
    "DeepSeek V3": (DEEPSEEK_V3, 61 * (512 + 64) * 2, False),
    # The index has 128 numbers of a byte and a scale of 4 bytes.
    "DeepSeek V3.2": (DEEPSEEK_V32, 61 * ((512 + 64) * 2 + 128 + 4), False),
    "GLM 5.2": (GLM_52, 78 * (512 + 64) * 2 + 21 * (128 + 4), False),
    "MiniMax M3": (MINIMAX_M3, 60 * 2 * 4 * 128 * 2 + 57 * 128 * 2, False),
    "Gemma 4 26B": (GEMMA4_26B, 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2, True),
    "Gemma 3n E2B": (GEMMA3N_E2B, 20 * 2 * 2 * 256 * 2, True),
    "MiMo V2 Flash": (MIMO_V2, 9 * 4 * (192 + 128) * 2 + 39 * 8 * (192 + 128) * 2, True),
    "gpt-oss 20B": (GPT_OSS_20B, 24 * 2 * 8 * 64 * 2, True),
    "Falcon 7B": (FALCON_7B, 32 * 2 * 1 * 64 * 2, False),
    "GPT-2, float32 served in 16 bits": (GPT2, 12 * 2 * 768 * 2, False),
    "8 bits": ({**LLAMA_8B, "quantization_config": BY_8_BITS}, 32 * 2 * 8 * 128, False),
}
#: The same numbers as reports of these models give them.
KNOWN = {
    "Nemotron Super 49B": 200_704,
    "Nemotron 3 Nano": 6_144,
    "Qwen3.5 27B": 65_536,
    "Qwen3-Next": 24_576,
    "Jamba v0.1": 16_384,
    "DeepSeek V3.2": 78_324,
}
#: How many layers keep an index next to their rows; those of other models keep none.
INDEXED = {"DeepSeek V3.2": 61, "GLM 5.2": 21, "MiniMax M3": 57}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_of_a_token(name: str) -> None:
    config, token, windows = FAMILIES[name]
    assert KNOWN.get(name, token) == token
    sizes = sizes_of(config)
    assert sizes.token == token
    assert sizes.staging == STEPS * STEP * token
    assert sizes.windows == windows
    assert sizes.unknown == ""
    assert sizes.refused == ""
    assert sizes.indexed == INDEXED.get(name, 0)


#: Qwen3.5 27B's gated delta networks, Nemotron 3 Nano's Mamba 2, a Kimi Linear, a short
#: convolution and Jamba's Mamba 1.
GDN = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
}
MAMBA_2 = {
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
}
KDA = {"num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4, "full_attn_layers": [4]}
MAMBA_1 = {"mamba_expand": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "hidden_size": 4096}


@pytest.mark.parametrize(
    ("config", "layers", "layer", "block"),
    [
        ({**QWEN35_27B, **GDN}, 48, 3 * (4096 + 6144) * 2 + 48 * 128 * 128 * 4, 784),
        ({**NANO, **MAMBA_2}, 23, 3 * (4096 + 2 * 8 * 128) * 2 + 64 * 64 * 128 * 2, 1072),
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
        ({**DEEPSEEK_V3, "sliding_window": 128}, "as latent rows"),
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
