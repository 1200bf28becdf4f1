# SPDX-License-Identifier: Apache-2.0
"""The models that the engines of a benchmark serve: shapes of real ones, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: Tokens that a prompt may have, with those that are generated.
LONGEST = 17408
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Model:
    """A model, and how its engine is started.

    Attributes:
        shape: in words.
        config: of the model, as its ``config.json`` has it.
        prompts: the lengths of prompts in tokens. None of them is whole blocks.
        terms: of vLLM's ``LLM``, besides those that all have.
        environment: variables of the engine's process.
        own: vLLM's own offloading serves it, and is measured next to ours.
        rounds: of each kind of prompt.
        runs: of requests that decode.
        host: bytes of host memory of each connector.
        disk: a connector with a disk and no host memory is measured, too. One shape shows what a
            disk costs, and each prompt takes several times as long as with host memory.
        packed: a connector whose host memory has packed rows is measured, too.
    """

    shape: str
    config: Mapping[str, Any]
    prompts: tuple[int, ...] = (4103, 16391)
    terms: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    own: bool = True
    rounds: int = 20
    runs: int = 3
    host: int = 8 << 30
    disk: bool = False
    packed: bool = False


_GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24],
}
_GPU = {
    "dtype": "bfloat16",
    "max_model_len": LONGEST,
    "num_gpu_blocks_override": 2600,
    "gpu_memory_utilization": 0.6,
    "compilation_config": _GRAPHS,
}
MODELS = {
    "8b": Model("Llama-3-8B, a tensor for each layer", _LLAMA, terms=_GPU, disk=True),
    "8b-cross-layer": Model(
        "Llama-3-8B, one tensor for all layers",
        _LLAMA,
        terms=_GPU,
        environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},
    ),
    "rank": Model(
        "one of eight ranks of Llama-3-8B",
        {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1},
        terms=_GPU,
    ),
    "mla": Model(
        "DeepSeek-V2-Lite's attention (MLA), dense layers",
        {
            **_LLAMA,
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 64,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 8,  # in no layer
            "first_k_dense_replace": 27,
            "moe_layer_freq": 1,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "topk_group": 1,
            "rope_theta": 10000.0,
            "rope_scaling": None,
        },
        terms=_GPU,
    ),
    "hybrid": Model(
        "Gemma 3's layers: five of a window of 1,024 tokens for each whole one",
        {
            **_LLAMA,
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "layer_types": 5 * (5 * ["sliding_attention"] + ["full_attention"]),
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "hidden_activation": "gelu_pytorch_tanh",
            # With tied ones, random weights repeat the last token.
            "tie_word_embeddings": False,
        },
        terms={**_GPU, "num_gpu_blocks_override": 8000},
    ),
    "8b-packed": Model(
        "Llama-3-8B, blocks of 64 tokens",
        _LLAMA,
        terms={**_GPU, "block_size": 64, "num_gpu_blocks_override": 650},
        own=False,
        rounds=8,
        packed=True,
    ),
    "tiny": Model(
        "four layers, for a run without an accelerator",
        {
            **_LLAMA,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "vocab_size": 4096,
            "torch_dtype": "float32",
        },
        prompts=(333, 967),
        terms={
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 256 << 20,
        },
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"},
        rounds=2,
        runs=1,
        host=1 << 28,
        disk=True,
    ),
}


# Some CPUs have bf16 kernels of AMX, whose order of rows is not known, but not for such heads.
MODELS["tiny-packed"] = replace(
    MODELS["tiny"],
    shape="four layers in bf16",
    config={**MODELS["tiny"].config, "torch_dtype": "bfloat16", "head_dim": 48},
    terms={**MODELS["tiny"].terms, "dtype": "bfloat16"},
    disk=False,
    packed=True,
)


@dataclass(frozen=True)
class Pair:
    """Two engines, of which one hands requests over to the other.

    Attributes:
        model: of both.
        blocks: tokens of a block of the prefill engine, and of the decode engine.
        lengths: of prompts in tokens. One token follows whole blocks of the prefill engine, so
            that one token is computed after a hand-over, as after a hit in the engine's own cache.
        alike: the length that is also handed over between blocks of one size, and by NIXL.
        rounds: of each length.
    """

    model: Model
    blocks: tuple[int, int] = (16, 64)
    lengths: tuple[int, ...] = (1025, 4097, 16385, 32705)
    alike: int = 16385
    rounds: int = 7


_LOADED = {
    "max_model_len": 32768,
    "gpu_memory_utilization": 0.15,
    # 3,072 blocks of 16 tokens. With a number of bytes vLLM does not measure what is free, which
    # the other engines of the device change.
    "kv_cache_memory_bytes": 6 << 30,
}
_EIGHT = {name: value for name, value in _GPU.items() if name != "num_gpu_blocks_override"}
_SMALL = {
    **_LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
    "torch_dtype": "float32",
}
_FLOAT32 = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 512 << 20,
}
#: The engines whose hand-over is timed, and those that are put through faults.
PAIRS = {
    "8b": Pair(Model("Llama-3-8B", _LLAMA, terms={**_EIGHT, **_LOADED})),
    "tiny": Pair(
        replace(MODELS["tiny"], shape="four layers"),
        blocks=(32, 64),
        lengths=(321, 961),
        alike=961,
        rounds=3,
    ),
    "small": Pair(
        Model(
            "eight layers",
            _SMALL,
            terms={**_FLOAT32, "attention_backend": "TRITON_ATTN"},
        ),
        lengths=(),
    ),
    "small-tiny": Pair(
        Model(
            "four layers",
            MODELS["tiny"].config,
            terms={**_FLOAT32, "kv_cache_memory_bytes": 128 << 20},
            environment=MODELS["tiny"].environment,
        ),
        blocks=(32, 64),
        lengths=(),
    ),
}
#: Of engines with several ranks, which read their parts of the weights from a file. Sums of ranks
#: use no memory that several devices write together.
_IN_RANKS = {"load_format": "safetensors", "disable_custom_all_reduce": True}
_OWN_MEMORY = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
PAIRS |= {
    f"ranks{size}": replace(
        pair,
        model=replace(
            pair.model,
            terms={**pair.model.terms, **_IN_RANKS},
            environment={**pair.model.environment, **_OWN_MEMORY},
        ),
    )
    for size, pair in (("", PAIRS["small"]), ("-tiny", PAIRS["small-tiny"]))
}
#: The parts of the benchmark that hand requests over: in time, with faults, and from two ranks.
HANDOVER = "handover"
FAULTS = "handover-faults"
RANKS = "handover-ranks"
HANDOVERS = (HANDOVER, FAULTS, RANKS)
#: The models of a run on an accelerator, and on a CPU.
FULL = ("8b", "8b-cross-layer", "rank", "mla", "hybrid", "8b-packed")
TINY = ("tiny", "tiny-packed")
