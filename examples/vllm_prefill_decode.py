# SPDX-License-Identifier: Apache-2.0
"""A prefill engine and a decode engine of vLLM: `examples/vllm_prefill_decode.sh` runs both.

    python examples/vllm_prefill_decode.py prefill FOLDER [--model NAME] [--block-size 32]
    python examples/vllm_prefill_decode.py decode FOLDER NUMBER [--model NAME] [--block-size 64]

The prefill engine computes two prompts of 1,000 tokens, writes what the decode engine needs into
FOLDER, and waits to be killed. The decode engine goes on with the prompt of a number, and prints
the answer's tokens and how many tokens of the prompt it has pulled. Without ``--model``, a small
Llama with random weights is made in FOLDER, so that nothing is downloaded. ``--max-gbps``: the most
10^9 bytes that a pull takes in a second.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

PROMPT_TOKENS = 1000
PROMPTS = 2
ANSWER = 12  # tokens
LEASE = 600.0  # seconds; the decode engines of this example start later
LIMIT = 120  # seconds
COUNTED = 10  # seconds after an answer in which its pull has been counted


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


def make_engine(model: str, role: str, block_size: int, hand_over: dict[str, Any]) -> LLM:
    """Return an engine that computes prompts for another one, or goes on with them."""
    import torch
    from vllm import LLM

    return LLM(
        model,
        # Rows of bfloat16 of a CPU with AMX cannot be read by token.
        dtype="auto" if torch.accelerator.is_available() else "float32",
        block_size=block_size,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,  # for the figures that counter() reads
        kv_transfer_config={
            "kv_connector": "PortaKVConnector",
            "kv_connector_module_path": "portakv.integrations.vllm_connector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"hand_over": hand_over},
        },
    )


def prompt_of(number: int) -> list[int]:
    """Return a prompt, the same in both engines."""
    draw = random.Random(number)
    return [draw.randrange(3, 4000) for _ in range(PROMPT_TOKENS)]


def answer(
    llm: LLM, prompt: list[int], tokens: int, params: dict[str, Any] | None = None
) -> tuple[list[int], dict[str, Any]]:
    """Return the tokens of an answer, and what its request carries to another engine."""
    from vllm import SamplingParams

    extra = None if params is None else {"kv_transfer_params": params}
    terms = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )
    (output,) = llm.generate({"prompt_token_ids": prompt}, terms, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.kv_transfer_params or {}


def counter(llm: LLM, name: str) -> float:
    """Return a counter of the connector."""
    metrics = {each.name: getattr(each, "value", 0) for each in llm.get_metrics()}
    return metrics.get(f"vllm:portakv_{name}", 0)


def prefill(llm: LLM, folder: Path) -> None:
    """Compute prompts for the decode engine, then go on until this engine is killed or Ctrl-C."""
    for number in range(PROMPTS):
        own, _ = answer(llm, prompt_of(number), ANSWER)
        print(json.dumps({"tokens": own}), flush=True)
        _, params = answer(llm, prompt_of(number), 1, {"do_remote_decode": True})
        part = folder / f"{number}.part"
        part.write_text(json.dumps(params))
        part.rename(folder / f"{number}.json")
    until = time.monotonic() + LEASE
    with suppress(KeyboardInterrupt):
        # An engine offers rows, and gets its blocks back, in its steps.
        while time.monotonic() < until:
            answer(llm, [5, 6, 7], 2)
            time.sleep(0.05)


def decode(llm: LLM, folder: Path, number: int) -> None:
    """Go on with a prompt that the prefill engine has computed."""
    file = folder / f"{number}.json"
    until = time.monotonic() + LIMIT
    while not file.exists():
        if time.monotonic() > until:
            raise SystemExit("The prefill engine has not computed the prompt in time.")
        time.sleep(0.1)
    print("pulling", flush=True)
    began = time.monotonic()
    tokens, _ = answer(llm, prompt_of(number), ANSWER, json.loads(file.read_text()))
    seconds = round(time.monotonic() - began, 2)
    # They change once a second, in the engine's steps. A ticket that is refused changes none.
    until = time.monotonic() + COUNTED
    while time.monotonic() < until and not (
        counter(llm, "pulled_tokens") + counter(llm, "failed_pulls")
    ):
        answer(llm, [5, 6, 7], 2)
    pulled = int(counter(llm, "pulled_tokens"))
    print(json.dumps({"tokens": tokens, "pulled": pulled, "seconds": seconds}), flush=True)


def main() -> None:
    """Run one of the two engines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("role", choices=["prefill", "decode"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int, nargs="?", default=0)
    parser.add_argument("--model")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--max-gbps", type=float)
    args = parser.parse_args()

    if args.model is None:
        args.model = str(args.folder / "model")
        if not Path(args.model).exists():
            make_model(Path(args.model))
    if args.role == "prefill":
        llm = make_engine(args.model, "kv_producer", args.block_size or 32, {"lease": LEASE})
        prefill(llm, args.folder)
    else:
        terms = {"timeout": LIMIT, "max_gbps": args.max_gbps}
        llm = make_engine(args.model, "kv_consumer", args.block_size or 64, terms)
        decode(llm, args.folder, args.number)


if __name__ == "__main__":
    main()
