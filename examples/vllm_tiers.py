# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine whose blocks outlive it: `examples/vllm_tiers.sh` runs it twice.

    python examples/vllm_tiers.py FOLDER [--model NAME] [--hybrid] [--block-size 32] [--ranks 1]
                                  [--wait]

Answers a prompt of 1,000 tokens, and prints the answer's tokens and how many tokens of the prompt
came from the store. Without ``--model``, a small Llama with random weights is made in FOLDER, so
that nothing is downloaded. ``--hybrid``: the model has layers with states, as Qwen3-Next has.
``--ranks``: of tensor parallelism. ``--wait``: then wait to be killed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

PROMPT_TOKENS = 1000
STORED = 32  # tokens of a stored block, whatever the engine's blocks are
LIMIT = 120  # seconds until all blocks are stored


def make_model(folder: Path) -> None:
    """Write a small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.125,  # so that the answer depends on the whole prompt
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_hybrid(folder: Path) -> None:
    """Write a small hybrid with random weights: three layers with states, one of full attention."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        mlp_only_layers=[0, 1, 2],
        max_position_embeddings=8192,
        initializer_range=0.125,
    )
    Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_engine(model: str, store: Path, block_size: int, ranks: int, hybrid: bool) -> LLM:
    """Return an engine that keeps its blocks in a folder."""
    import torch
    from vllm import LLM

    transfers: dict[str, Any] = {
        "kv_connector": "PortaKVConnector",
        "kv_connector_module_path": "portakv.integrations.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "folder": str(store),
            "block_size": STORED,
            "capacity": 1 << 30,
            "host": 256 << 20,
            "staging": 256 << 20,
        },
    }
    terms: dict[str, Any] = {"block_size": block_size}
    if hybrid:  # vLLM chooses its blocks, and PortaKV stores them
        terms = {"dtype": "bfloat16", "enable_prefix_caching": True, "mamba_cache_mode": "align"}
        del transfers["kv_connector_extra_config"]["block_size"]
    elif not torch.accelerator.is_available():
        terms["dtype"] = "float32"  # rows of bfloat16 of a CPU with AMX cannot be read by token
    return LLM(
        model,
        tensor_parallel_size=ranks,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **terms,
        disable_log_stats=False,  # for the figures that stored() reads
        kv_transfer_config=transfers,
    )


def answer(llm: LLM, prompt: list[int], tokens: int) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many tokens of the prompt were not computed."""
    from vllm import SamplingParams

    terms = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": prompt}, terms, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens or 0


def stored(llm: LLM) -> float:
    """Return how many blocks were stored."""
    metrics = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
    return metrics.get("vllm:portakv_stored_blocks", 0)


def main() -> None:
    """Answer the prompt."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--wait", action="store_true")
    args = parser.parse_args()

    if args.model is None:
        args.model = str(args.folder / "model")
        if not Path(args.model).exists():
            (make_hybrid if args.hybrid else make_model)(Path(args.model))
    llm = make_engine(args.model, args.folder / "kv", args.block_size, args.ranks, args.hybrid)

    draw = random.Random(0)
    prompt = [draw.randrange(3, 4000) for _ in range(PROMPT_TOKENS)]
    began = time.monotonic()
    tokens, cached = answer(llm, prompt, 12)
    seconds = round(time.monotonic() - began, 2)
    print(json.dumps({"tokens": tokens, "from the store": cached, "seconds": seconds}))

    if args.wait:
        blocks = 1 if args.hybrid else PROMPT_TOKENS // STORED
        while stored(llm) < blocks:  # an engine saves while it steps
            if time.monotonic() > began + LIMIT:
                raise SystemExit("The blocks of the prompt were not stored in time.")
            answer(llm, [5, 6, 7], 2)
        print("stored", flush=True)
        time.sleep(LIMIT)


if __name__ == "__main__":
    main()
