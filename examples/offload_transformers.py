# SPDX-License-Identifier: Apache-2.0
"""A model's KV cache leaves its paged memory, comes back elsewhere, and no logit changes.

    python examples/offload_transformers.py [device]

A Llama from `transformers` (random weights, nothing is downloaded) reads a prompt. Its keys and
values go into paged caches as a serving engine keeps them, are stored as chunks in host memory and
lost from the pages; the chunks are loaded into other slots, and decoding goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from portakv import AdaptiveConnector, KVView, copy_rows

PROMPT = (
    b"A serving engine keeps the keys and values of every token in pages that are scattered over "
    b"its memory. When room runs out they have to leave, and when the request goes on they have "
    b"to come back, in other pages, without one bit changed."
)
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 4, 32  # grouped queries: two heads share a kv head
BLOCKS, BLOCK_SIZE = 64, 16  # the paged caches
CHUNK = 64  # tokens of a stored chunk
STEPS = 24  # tokens that are decoded afterwards


@dataclass(frozen=True)
class Outcome:
    """What happened: ``identical`` and ``control_differs`` must both be true."""

    tokens: int
    chunks: int
    steps: int
    identical: bool
    control_differs: bool


def main(device: torch.device | str = "cpu", tell: Callable[[str], None] = print) -> Outcome:
    """Run the example on ``device``; ``tell`` is handed each line of the story."""
    torch.manual_seed(0)
    model = tiny_llama().to(device)
    prompt = torch.tensor([list(PROMPT)], device=device)  # a byte is a token, so 256 are enough
    tokens = prompt.shape[1]

    # 1. transformers reads the prompt. Its cache: for each layer keys and values [1, H, T, D].
    with torch.no_grad():
        prefilled = model(prompt, past_key_values=DynamicCache())
    cache, first = prefilled.past_key_values, prefilled.logits[:, -1:].argmax(-1)
    tell(f"prefill  a Llama of {LAYERS} layers read {tokens} tokens of English, a byte each")

    # 2. Into the paged caches of an engine, each token in a slot of its own. Two layouts, no code.
    kv_caches = [
        torch.empty(2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, device=device) for _ in range(LAYERS)
    ]
    paged = KVView(kv_caches, "layer | kv block token head dim")
    old_slots, new_slots = torch.randperm(BLOCKS * BLOCK_SIZE)[: 2 * tokens].split(tokens)
    copy_rows(view_of(cache), paged, dst_index=old_slots)
    tell(f"paged    its KV cache went to {tokens} shuffled slots of {LAYERS} paged caches")

    # 3. Store chunks in host memory, as an offload tier does. The last one is partial.
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(kv_caches)
    ranges = [(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]
    chunks = [torch.empty(2, LAYERS, end - start, KV_HEADS * HEAD_DIM) for start, end in ranges]
    for chunk, (start, end) in zip(chunks, ranges):
        connector.from_gpu(chunk, slot_mapping=old_slots, start=start, end=end).synchronize()
    sizes = " + ".join(str(end - start) for start, end in ranges)
    tell(f"stored   from_gpu: {len(chunks)} chunks of {sizes} tokens in host memory")

    # 4. Somebody else's rows now: everything in the paged memory is lost.
    for layer in kv_caches:
        layer.normal_()
    control = cache_from(paged, old_slots)
    tell("lost     the whole paged memory was overwritten with noise")

    # 5. Load the chunks into slots that were not theirs, and hand the rows back to transformers.
    for chunk, (start, end) in zip(chunks, ranges):
        connector.to_gpu(chunk, slot_mapping=new_slots, start=start, end=end).synchronize()
    returned = cache_from(paged, new_slots)
    tell("loaded   to_gpu: the chunks came back into other slots, and from there to transformers")

    # 6. Decode on: from the cache that never left, from the one that did, and from the noise.
    stayed = decode(model, cache, first)
    identical = torch.equal(decode(model, returned, first), stayed)
    differs = not torch.equal(decode(model, control, first), stayed)
    verdict = "bit-identical to" if identical else "DIFFERENT FROM"
    tell(f"decoded  {STEPS} more tokens: all logits are {verdict} the run that never left")
    tell(f"control  decoded from the noise instead: {'they differ' if differs else 'NO DIFFERENCE'}")
    return Outcome(tokens, len(chunks), STEPS, identical, differs)


def view_of(cache: DynamicCache) -> KVView:
    """transformers' own cache, read and written where it lies: keys and values [1, H, T, D]."""
    return KVView([(x.keys, x.values) for x in cache.layers], "layer kv | 1 head token dim")


def cache_from(paged: KVView, slots: torch.Tensor) -> DynamicCache:
    """A cache for transformers that holds the rows at ``slots``."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.zeros(2, 1, KV_HEADS, len(slots), HEAD_DIM, device=paged.device)
        cache.update(keys, values, layer)  # makes room; the rows come in one copy
    copy_rows(paged, view_of(cache), src_index=slots)
    return cache


@torch.no_grad()
def decode(model: LlamaForCausalLM, cache: DynamicCache, token: torch.Tensor) -> torch.Tensor:
    """Decode greedily from ``cache`` on; the logits of every step, ``[STEPS, vocabulary]``."""
    logits = []
    for _ in range(STEPS):
        logits.append(model(token, past_key_values=cache).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)


def tiny_llama() -> LlamaForCausalLM:
    """A Llama with random weights, in float32: no rounding hides a wrong bit."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.2,  # wide enough that attention looks at some tokens more than others
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    outcome = main(*sys.argv[1:2])
    sys.exit(0 if outcome.identical and outcome.control_differs else 1)
