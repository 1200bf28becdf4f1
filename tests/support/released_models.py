# SPDX-License-Identifier: Apache-2.0
"""Released models: what their ``config.json`` says of their caches, and what a reader of it has to
answer. Each right number is a product of the facts of a family: layers, heads, numbers of a key and
a value, bytes of a number. Nothing here is read from the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    "mamba_head_dim": 64,
    "n_groups": 8,
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


class Model(NamedTuple):
    """A released model, and the right answer.

    Attributes:
        config: what its ``config.json`` says.
        token: bytes of one token in all layers.
        full: layers with rows of all tokens.
        window: layers with a window.
        chunk: layers with a chunk.
        states: layers with a state.
        state: bytes of the states of all layers; 0: not known, or none.
        indexed: layers with an index next to their rows.
        refused: words of the reason why the connector does not serve it.
        unknown: words of the reason why its sizes are not known.
    """

    config: Mapping[str, Any]
    token: int = 0
    full: int = 0
    window: int = 0
    chunk: int = 0
    states: int = 0
    state: int = 0
    indexed: int = 0
    refused: str = ""
    unknown: str = ""


def shape(
    model_type: str, layers: int, heads: int, kv_heads: int, dim: int, **others: Any
) -> dict[str, Any]:
    """Return the configuration of a model, with the keys that most families have."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        **BF16,
        **others,
    }


def dense(
    model_type: str, layers: int, heads: int, kv_heads: int, dim: int, **others: Any
) -> Model:
    """Return a model whose layers all keep rows of all tokens, in 16 bits."""
    config = shape(model_type, layers, heads, kv_heads, dim, **others)
    return Model(config, layers * 2 * kv_heads * dim * 2, full=layers)


def inside(name: str, model: Model) -> Model:
    """Return a model that also reads images or sounds, whose text model stands under a key."""
    outer = {"model_type": "outer", "vision_config": {"num_hidden_layers": 2}, name: model.config}
    return model._replace(config=outer)


def latent(model_type: str, layers: int, **others: Any) -> Model:
    """Return a model with one latent row of 512 + 64 numbers for each token and layer."""
    config = {**DEEPSEEK_V3, "model_type": model_type, "num_hidden_layers": layers, **others}
    return Model(config, layers * (512 + 64) * 2, full=layers)


def refused(model_type: str, words: str, **others: Any) -> Model:
    """Return a model that the connector does not serve."""
    return Model(shape(model_type, 24, 16, 16, 64, **others), refused=words)


def pattern(full: int, layers: int, other: str = "sliding_attention") -> list[str]:
    """Return ``layer_types`` in which each layer of a number is a full one."""
    return ["full_attention" if n % full == full - 1 else other for n in range(layers)]


def mamba_2(heads: int, dim: int, state: int, groups: int, item: int = 2) -> int:
    """Return the bytes of a layer of Mamba 2: three columns of a convolution, and its state."""
    return 3 * (heads * dim + 2 * groups * state) * 2 + heads * dim * state * item


def gdn(values: int, item: int = 4) -> int:
    """Return the bytes of a gated delta network with 16 heads of keys, of 128 numbers each."""
    return 3 * (2 * 16 + values) * 128 * 2 + values * 128 * 128 * item


def granite(layers: int, heads: int, kv_heads: int, width: int, mamba: int) -> Model:
    """Return a Granite 4 hybrid: four of its layers have attention, the others Mamba 2."""
    kinds = ["attention" if n in (5, 15, 25, 35) else "mamba" for n in range(layers)]
    config = {
        "model_type": "granitemoehybrid",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "layer_types": kinds,
        "mamba_n_heads": mamba,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        **BF16,
    }
    token = 4 * 2 * kv_heads * (width // heads) * 2
    state = (layers - 4) * mamba_2(mamba, 64, 128, 1)
    return Model(config, token, full=4, states=layers - 4, state=state)


def qwen35(layers: int, heads: int, kv_heads: int, values: int, **others: Any) -> Model:
    """Return a Qwen3.5: one of four layers has attention, the others a gated delta network."""
    config = shape(
        "qwen3_5_text",
        layers,
        heads,
        kv_heads,
        256,
        **{**GDN, "linear_num_value_heads": values},
        layer_types=pattern(4, layers, "linear_attention"),
        attn_output_gate=True,
        mtp_num_hidden_layers=1,
        **others,
    )
    full = layers // 4
    states = layers - full
    token = full * 2 * kv_heads * 256 * 2
    model = Model(config, token, full=full, states=states, state=states * gdn(values))
    return inside("text_config", model)


def nemotron_h(
    pattern: str, heads: int, kv_heads: int, mamba: int, dim: int, state: int, **others: Any
) -> Model:
    """Return a Nemotron-H, whose layers are letters: its states have 32 bits in vLLM."""
    config = shape(
        "nemotron_h",
        len(pattern),
        heads,
        kv_heads,
        128,
        hybrid_override_pattern=pattern,
        mamba_num_heads=mamba,
        mamba_head_dim=dim,
        ssm_state_size=state,
        n_groups=8,
        conv_kernel=4,
        expand=2,
        **others,
    )
    letters = Counter(pattern)
    full = letters["*"]
    states = letters["M"]
    nbytes = states * mamba_2(mamba, dim, state, 8, item=4)
    return Model(config, full * 2 * kv_heads * 128 * 2, full=full, states=states, state=nbytes)


def windows(model: Model, full: int, window: int, **others: Any) -> Model:
    """Return a dense model of which some layers have a window."""
    config = {**model.config, "sliding_window": window, **others}
    layers = model.config["num_hidden_layers"]
    return model._replace(config=config, full=full, window=layers - full)


def eight_bits(model: Model, **quantized: Any) -> Model:
    """Return a model whose checkpoint brings scales for a cache of 8 bits."""
    config = {**model.config, "quantization_config": quantized or BY_8_BITS}
    return model._replace(config=config, token=model.token // 2)


LLAMA_31_8B = Model(LLAMA_8B, 32 * 2 * 8 * 128 * 2, full=32)
NO_WINDOW = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 70}
#: Gemma 3's larger models leave out what their type has.
GEMMA3_4B = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, **BF16}
SPARSE = "its layers keep compressed rows"
CROSS = "cross attention"
BOTH = "in both directions"

#: By name, released models of 2023 to 2026.
MODELS: dict[str, Model] = {
    # Rows of all tokens.
    "Llama 2 7B": dense("llama", 32, 32, 32, 128),
    "Llama 3.1 8B": LLAMA_31_8B,
    "Llama 3.1 70B": dense("llama", 80, 64, 8, 128),
    "Llama 3.1 405B": dense("llama", 126, 128, 8, 128),
    "Llama 3.2 1B": dense("llama", 16, 32, 8, 64),
    "Llama 3.2 3B": dense("llama", 28, 24, 8, 128),
    "Llama 3.1 8B, scales of its cache": eight_bits(
        LLAMA_31_8B, quant_method="compressed-tensors", kv_cache_scheme={"num_bits": 8}
    ),
    "Mistral 7B v0.3": dense("mistral", 32, 32, 8, 128, sliding_window=None),
    "Mistral Small 3.2 24B": inside("text_config", dense("mistral", 40, 32, 8, 128)),
    "Ministral 3 8B": inside("text_config", dense("ministral3", 34, 32, 8, 128)),
    "Devstral 2 123B": dense("ministral3", 88, 96, 8, 128),
    "Voxtral Mini 3B": inside("text_config", dense("llama", 30, 32, 8, 128)),
    "Mixtral 8x7B": dense("mixtral", 32, 32, 8, 128, sliding_window=None),
    "Mixtral 8x22B": dense("mixtral", 56, 48, 8, 128, sliding_window=None),
    "Qwen2.5 7B": dense("qwen2", 28, 28, 4, 128, **NO_WINDOW),
    "Qwen2.5 72B": dense("qwen2", 80, 64, 8, 128, **NO_WINDOW),
    "Qwen2.5-VL 7B": dense("qwen2_5_vl", 28, 28, 4, 128, **NO_WINDOW),
    "QwQ 32B": dense("qwen2", 64, 40, 8, 128, **NO_WINDOW),
    "Qwen3 0.6B": dense("qwen3", 28, 16, 8, 128, **NO_WINDOW),
    "Qwen3 8B": dense("qwen3", 36, 32, 8, 128, **NO_WINDOW),
    "Qwen3 14B": dense("qwen3", 40, 40, 8, 128, **NO_WINDOW),
    "Qwen3 32B": dense("qwen3", 64, 64, 8, 128, **NO_WINDOW),
    "Qwen3 30B-A3B": dense("qwen3_moe", 48, 32, 4, 128, decoder_sparse_step=1),
    "Qwen3 235B-A22B": dense("qwen3_moe", 94, 64, 4, 128, decoder_sparse_step=1),
    "Qwen3-Coder 480B-A35B": dense("qwen3_moe", 62, 96, 8, 128, use_qk_norm=True),
    "Qwen3-VL 30B-A3B": inside("text_config", dense("qwen3_vl_moe_text", 48, 32, 4, 128)),
    "Qwen3-Omni 30B-A3B": inside(
        "thinker_config", inside("text_config", dense("qwen3_omni_moe_text", 48, 32, 4, 128))
    ),
    "InternVL3 8B": inside("llm_config", dense("qwen2", 28, 28, 4, 128)),
    "Phi-4": dense("phi3", 40, 40, 10, 128, sliding_window=None),
    "Phi-4 mini": dense("phi3", 32, 24, 8, 128, partial_rotary_factor=0.75),
    "OLMo 2 7B": dense("olmo2", 32, 32, 32, 128),
    "SmolLM3 3B": dense(
        "smollm3",
        36,
        16,
        4,
        128,
        no_rope_layers=[1, 1, 1, 0] * 9,
        no_rope_layer_interval=4,
        layer_types=["full_attention"] * 36,
        use_sliding_window=False,
    ),
    "Granite 3.3 8B": dense("granite", 40, 32, 8, 128, attention_multiplier=0.0078125),
    "Granite 4.0 Micro": dense("granitemoehybrid", 40, 40, 8, 64, layer_types=["attention"] * 40),
    "Falcon 7B": Model(FALCON_7B, 32 * 2 * 1 * 64 * 2, full=32),
    "Falcon 3 7B": dense("llama", 28, 12, 4, 256),
    "GLM-4 9B 0414": dense("glm4", 40, 32, 2, 128),
    "GLM-4.5": dense("glm4_moe", 92, 96, 8, 128, use_qk_norm=True),
    "GLM-4.5 Air": dense("glm4_moe", 46, 96, 8, 128),
    "MiniMax M2": dense("minimax_m2", 62, 48, 8, 128, attn_type_list=[1] * 62),
    "MiMo 7B": dense("mimo", 36, 32, 8, 128, num_nextn_predict_layers=1),
    "ERNIE 4.5 21B-A3B": dense("ernie4_5_moe", 28, 20, 4, 128),
    "ERNIE 4.5 300B-A47B": dense("ernie4_5_moe", 54, 64, 8, 128),
    "Seed-OSS 36B": dense("seed_oss", 64, 80, 8, 128),
    "Hunyuan A13B": dense("hunyuan_v1_moe", 32, 32, 8, 128, use_cla=False, cla_share_factor=2),
    "dots.llm1": dense("dots1", 62, 32, 32, 128),
    "Apertus 70B": dense("apertus", 80, 64, 8, 128),
    "AFM 4.5B": dense("arcee", 36, 20, 4, 128),
    "InternLM3 8B": dense("internlm3", 48, 32, 2, 128),
    "Yi 1.5 34B": dense("llama", 60, 56, 8, 128),
    "EXAONE 4.0 1.2B": dense("exaone4", 30, 32, 8, 64, sliding_window=None),
    "GPT-2, float32 served in 16 bits": Model(GPT2, 12 * 2 * 768 * 2, full=12),
    "Nemotron Super 49B": Model(SUPER_49B, 49 * 2 * 8 * 128 * 2, full=49),
    # Windows and chunks.
    "Mistral 7B v0.1": windows(dense("mistral", 32, 32, 8, 128), 0, 4096),
    "Phi-3.5 mini": windows(dense("phi3", 32, 32, 32, 96), 0, 262144),
    "StarCoder 2 15B": windows(dense("starcoder2", 40, 48, 4, 128), 0, 4096),
    "Gemma 2 9B": windows(dense("gemma2", 42, 16, 8, 256), 21, 4096),
    "Gemma 2 27B": windows(dense("gemma2", 46, 32, 16, 128), 23, 4096),
    "Gemma 3 270M": windows(
        dense("gemma3_text", 18, 4, 1, 256, layer_types=pattern(6, 18)), 3, 512
    ),
    "Gemma 3 1B": windows(dense("gemma3_text", 26, 4, 1, 256, sliding_window_pattern=6), 4, 512),
    "Gemma 3 4B": inside(
        "text_config",
        windows(Model(GEMMA3_4B, 34 * 2 * 4 * 256 * 2), 5, 1024),
    ),
    "Gemma 3 27B": inside("text_config", windows(dense("gemma3_text", 62, 32, 16, 128), 10, 1024)),
    "Gemma 3n E2B": Model(GEMMA3N_E2B, 20 * 2 * 2 * 256 * 2, full=4, window=16),
    "Gemma 4 26B": Model(GEMMA4_26B, 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2, full=5, window=25),
    "Command R7B": windows(dense("cohere2", 32, 32, 8, 128, layer_switch=4), 8, 4096),
    "Command A": windows(dense("cohere2", 64, 96, 8, 128, sliding_window_pattern=4), 16, 4096),
    "OLMo 3 7B": windows(dense("olmo3", 32, 32, 32, 128, layer_types=pattern(4, 32)), 8, 4096),
    "OLMo 3 32B": windows(dense("olmo3", 64, 40, 8, 128, layer_types=pattern(4, 64)), 16, 4096),
    "EXAONE 4.0 32B": windows(
        dense("exaone4", 64, 40, 8, 128, sliding_window_pattern="LLLG"), 16, 4096
    ),
    "Trinity Mini": windows(
        dense("afmoe", 32, 32, 4, 128, layer_types=pattern(4, 32), global_attn_every_n_layers=4),
        8,
        2048,
    ),
    "gpt-oss 20B": Model(GPT_OSS_20B, 24 * 2 * 8 * 64 * 2, full=12, window=12),
    "gpt-oss 120B": windows(dense("gpt_oss", 36, 64, 8, 64, layer_types=pattern(2, 36)), 18, 128),
    "Step 3.7 Flash": windows(
        dense("step3p7", 45, 64, 8, 128, layer_types=[*pattern(4, 48)[3:]]), 12, 512
    ),
    "MiMo V2 Flash": Model(
        MIMO_V2, 9 * 4 * (192 + 128) * 2 + 39 * 8 * (192 + 128) * 2, full=9, window=39
    ),
    "Llama 4 Scout": Model(LLAMA4, 48 * 2 * 8 * 128 * 2, full=12, chunk=36),
    "Llama 4 Maverick": Model(
        shape("llama4_text", 48, 40, 8, 128, attention_chunk_size=8192, no_rope_layers=[]),
        48 * 2 * 8 * 128 * 2,
        full=12,
        chunk=36,
    ),
    # States, alone and next to attention.
    "Mamba 2.8B": Model(
        {"model_type": "mamba", "num_hidden_layers": 64, "hidden_size": 2560}
        | {"intermediate_size": 5120, "state_size": 16, "conv_kernel": 4, "time_step_rank": 160},
        states=64,
        state=64 * (3 * 5120 + 5120 * 16) * 2,
    ),
    "Falcon Mamba 7B": Model(
        {"model_type": "falcon_mamba", "num_hidden_layers": 64, "hidden_size": 4096}
        | {"intermediate_size": 8192, "state_size": 16, "conv_kernel": 4, **BF16},
        states=64,
        state=64 * (3 * 8192 + 8192 * 16) * 2,
    ),
    "Mamba-Codestral 7B": Model(
        {"model_type": "mamba2", "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64}
        | {"state_size": 128, "n_groups": 8, "conv_kernel": 4, "hidden_size": 4096, **BF16},
        states=64,
        state=64 * mamba_2(128, 64, 128, 8),
    ),
    "Falcon-H1 7B": Model(
        shape("falcon_h1", 44, 12, 2, 128, mamba_n_heads=24, mamba_d_head=128, mamba_d_ssm=3072)
        | {"mamba_d_state": 256, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2},
        44 * 2 * 2 * 128 * 2,
        full=44,
        states=44,
        state=44 * mamba_2(24, 128, 256, 1),
    ),
    "Falcon-H1 34B": Model(
        shape("falcon_h1", 72, 20, 4, 128, mamba_n_heads=32, mamba_d_head=128, mamba_d_ssm=4096)
        | {"mamba_d_state": 256, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_expand": 2},
        72 * 2 * 4 * 128 * 2,
        full=72,
        states=72,
        state=72 * mamba_2(32, 128, 256, 2),
    ),
    "Jamba v0.1": Model(
        {**JAMBA, "mamba_expand": 2, "mamba_d_conv": 4},
        4 * 2 * 8 * 128 * 2,
        full=4,
        states=28,
        state=28 * (3 * 8192 + 8192 * 16) * 2,
    ),
    "Jamba 1.5 Large": Model(
        {**JAMBA, "num_hidden_layers": 72, "hidden_size": 8192, "num_attention_heads": 64}
        | {"mamba_expand": 2, "mamba_d_conv": 4, "intermediate_size": 24576},
        9 * 2 * 8 * 128 * 2,
        full=9,
        states=63,
        state=63 * (3 * 16384 + 16384 * 16) * 2,
    ),
    "Bamba": Model(
        {**BAMBA, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4},
        3 * 2 * 8 * 128 * 2,
        full=3,
        states=29,
        state=29 * mamba_2(128, 64, 128, 1),
    ),
    "Granite 4.0 H-Small": granite(40, 32, 8, 4096, 128),
    "Granite 4.0 H-Tiny": granite(40, 12, 4, 1536, 48),
    "Granite 4.0 H-Micro": granite(40, 32, 8, 2048, 64),
    "LFM2 1.2B": Model(
        {"model_type": "lfm2", "num_hidden_layers": 16, "hidden_size": 2048, "conv_L_cache": 3}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "conv_bias": False, **BF16}
        | {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "block_ff_dim": 12288},
        6 * 2 * 8 * 64 * 2,
        full=6,
        states=10,
        state=10 * 2 * 2048 * 2,
    ),
    "Nemotron-H 8B": nemotron_h(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 32, 8, 128, 64, 128
    ),
    "Nemotron Nano 9B v2": nemotron_h(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 40, 8, 128, 80, 128
    ),
    "Nemotron 3 Nano": Model(
        NANO,
        6 * 2 * 2 * 128 * 2,
        full=6,
        states=23,
        state=23 * mamba_2(64, 64, 128, 8, item=4),
    ),
    "Nemotron 3 Super": nemotron_h(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        32,
        2,
        128,
        64,
        128,
        mamba_ssm_cache_dtype="float32",
    ),
    "Nemotron 3 Ultra": Model(
        {**ULTRA, "mamba_num_heads": 256},
        12 * 2 * 2 * 128 * 2,
        full=12,
        states=48,
        state=48 * mamba_2(256, 64, 128, 8, item=4),
    ),
    "Qwen3-Next": Model(
        {**QWEN3_NEXT, "linear_num_value_heads": 32, "linear_key_head_dim": 128}
        | {"linear_conv_kernel_dim": 4},
        12 * 2 * 2 * 256 * 2,
        full=12,
        states=36,
        state=36 * gdn(32, item=2),
    ),
    "Qwen3.5 27B": Model(
        {**QWEN35_27B, **GDN}, 16 * 2 * 4 * 256 * 2, full=16, states=48, state=48 * gdn(48)
    ),
    "Qwen3.5 35B-A3B": qwen35(40, 16, 2, 32),
    "Qwen3.5 122B-A10B": qwen35(48, 32, 2, 64),
    "Qwen3.5 397B-A17B": qwen35(60, 32, 2, 64),
    "Qwen3.6 27B NVFP4": eight_bits(qwen35(64, 24, 4, 48)),
    "Kimi Linear 48B": Model(
        {**latent("kimi_linear", 27).config}
        | {"linear_attn_config": {**KDA, "full_attn_layers": [4, 8, 12, 16, 20, 24, 27]}},
        7 * (512 + 64) * 2,
        full=7,
        states=20,
        state=20 * (3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4),
    ),
    "Kimi K3": Model(KIMI_K3, 24 * (512 + 64) * 2, full=24, states=69),
    "Ring 2.5 1T": Model(
        latent("bailing_hybrid", 80, layer_group_size=8).config,
        10 * (512 + 64) * 2,
        full=10,
        states=70,
    ),
    # Latent rows, also with an index.
    "DeepSeek V2 Lite": latent("deepseek_v2", 27),
    "DeepSeek V3": latent("deepseek_v3", 61),
    "DeepSeek R1 NVFP4, cache in 8 bits": eight_bits(
        latent("deepseek_v3", 61), quant_method="modelopt", kv_cache_quant_algo="FP8"
    ),
    "Kimi K2": latent("kimi_k2", 61),
    "Kimi K2.5": inside("text_config", latent("kimi_k2", 61)),
    "Kimi-VL A3B": inside("text_config", latent("deepseek_v3", 27)),
    "GLM-4.7 Flash": latent("glm4_moe_lite", 47),
    "LongCat Flash": Model(
        {**DEEPSEEK_V3, "model_type": "longcat_flash", "num_hidden_layers": None, "num_layers": 28},
        2 * 28 * (512 + 64) * 2,
        full=56,
    ),
    # An index has 128 numbers of a byte and a scale of 4 bytes.
    "DeepSeek V3.2": Model(DEEPSEEK_V32, 61 * ((512 + 64) * 2 + 128 + 4), full=61, indexed=61),
    "DeepSeek V3.2, as transformers writes it": Model(
        {**DEEPSEEK_V32, "layer_types": ["indexed_attention"] * 61},
        61 * ((512 + 64) * 2 + 128 + 4),
        full=61,
        indexed=61,
    ),
    "GLM 5.2": Model(GLM_52, 78 * (512 + 64) * 2 + 21 * (128 + 4), full=78, indexed=21),
    "MiniMax M3": Model(MINIMAX_M3, 60 * 2 * 4 * 128 * 2 + 57 * 128 * 2, full=60, indexed=57),
    # What the connector does not serve.
    "DeepSeek V4": Model(DEEPSEEK_V4, refused=SPARSE),
    "Unlimited-OCR": refused(
        "unlimited_ocr_text",
        "windows of generated tokens",
        layer_types=["reference_sliding_attention"] * 24,
    ),
    "openPangu R 7B, with sinks": refused("PanguEmbedded", "rows of sinks", param_sink_number=128),
    "Whisper large v3": refused("whisper", CROSS, is_encoder_decoder=True),
    "BART large": refused("bart", CROSS, is_encoder_decoder=True),
    "T5Gemma 2B": refused("t5gemma", CROSS, is_encoder_decoder=True),
    "Llama 3.2 11B Vision": refused("mllama_text_model", CROSS, cross_attention_layers=[3, 8]),
    "BERT large": refused("bert", BOTH),
    "XLM-RoBERTa large": refused("xlm-roberta", BOTH),
    "ModernBERT large": refused("modernbert", BOTH, local_attention=128),
    "EmbeddingGemma 300M": refused("gemma3_text", BOTH, use_bidirectional_attention=True),
    "a Nemotron-NAS with groups of two sizes": Model(
        {**SUPER_49B, "block_configs": [block(8)] * 40 + [block(16)] * 40},
        40 * 2 * 8 * 128 * 2 + 40 * 2 * 4 * 128 * 2,
        full=80,
        refused="of several sizes",
    ),
    # What is not known gives no size.
    "Zamba 2 7B": Model(
        shape("zamba2", 81, 32, 32, 224, n_mamba_heads=2, kv_channels=112), unknown="n_mamba_heads"
    ),
    "MiniCPM 3 4B": Model(
        shape("minicpm3", 62, 40, 40, 96, kv_lora_rank=256, qk_rope_head_dim=32),
        unknown="'minicpm3'",
    ),
    "RecurrentGemma 2B": Model(
        shape("recurrent_gemma", 26, 10, 1, 256, attention_window_size=2048),
        unknown="attention_window_size",
    ),
    "GLM-5.1 NVFP4, cache in 8 bits": Model(
        {**GLM_52, "quantization_config": BY_8_BITS}, full=78, indexed=21, unknown="dtype"
    ),
    "Llama 3.1 8B, cache in 4 bits": Model(
        {**LLAMA_8B}
        | {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}},
        full=32,
        unknown="dtype",
    ),
}
#: Bytes of a token as reports of these models give them.
KNOWN = {
    "Nemotron Super 49B": 200_704,
    "Nemotron 3 Nano": 6_144,
    "Qwen3.5 27B": 65_536,
    "Qwen3-Next": 24_576,
    "Jamba v0.1": 16_384,
    "DeepSeek V3.2": 78_324,
}
