# SPDX-License-Identifier: Apache-2.0
"""A model's KV cache leaves its paged memory, returns to other blocks, and no logit changes.

    python examples/offload_transformers.py [device] [--host pinned]

A Llama from `transformers` (random weights, nothing is downloaded) reads a prompt. Its keys and
values are copied as a prefix to paged caches like those of a serving engine. They are stored as
chunks in host memory, and the pages are overwritten. Then the chunks are loaded into other blocks,
and decoding continues from there. With ``--host pinned`` the chunks are in pinned memory, and all
of them are copied together in the background.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from portakv import AdaptiveConnector, KVView
from portakv.host import pinned
from portakv.integrations.transformers import cache_argument, load_prefix, save_prefix

PROMPT = (
    b"A serving engine keeps the keys and values of every token in pages that are scattered over "
    b"its memory. When room runs out they have to leave, and when the request goes on they have "
    b"to come back, in other pages, without one bit changed."
)
# grouped queries: two heads share a kv head
LAYERS = 4
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 32
# the paged caches
BLOCKS = 64
BLOCK_SIZE = 16
CHUNK = 64  # tokens of a stored chunk
STEPS = 24  # tokens that are decoded afterwards
DTYPE = torch.float32  # of the model, the caches and the chunks


@dataclass(frozen=True)
class Outcome:
    """The result of the example: ``identical`` and ``control_differs`` must both be true."""

    tokens: int
    chunks: int
    steps: int
    identical: bool
    control_differs: bool


def main(
    device: torch.device | str = "cpu", tell: Callable[[str], None] = print, host: str = "pageable"
) -> Outcome:
    """Run the example.

    Args:
        device: the device of the model and the caches.
        tell: is called with each line of the output.
        host: the memory of the chunks, ``pageable`` or, where the device supports it, ``pinned``.
    """
    torch.manual_seed(0)
    model = tiny_llama().to(device)
    tokens = len(PROMPT)
    # 1. transformers reads the prompt into its own cache. A byte is a token: 256 are enough.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        prompt = torch.tensor([list(PROMPT)], device=device)
        prefilled = model(prompt, **{cache_argument(model): cache})
    first = prefilled.logits[:, -1:].argmax(-1)
    tell(f"prefill  a Llama of {LAYERS} layers, random weights, read {tokens} bytes of English")

    # 2. Copy the cache to an engine's paged caches, as a prefix in random blocks of the pool.
    kv_caches = empty_pages(device)
    paged = KVView(kv_caches, "layer | kv block token head dim")
    needed = -(-tokens // BLOCK_SIZE)
    blocks, other_blocks = torch.randperm(BLOCKS)[: 2 * needed].split(needed)
    save_prefix(cache, paged, blocks)
    tell(f"paged    its KV cache went to shuffled blocks of {LAYERS} paged caches")

    # 3. Store chunks in host memory. Then another request overwrites the pages.
    connector = AdaptiveConnector(device)
    connector.register_kv_caches(kv_caches)
    chunks = store(connector, slots_of(blocks, tokens), host)
    sizes = " + ".join(str(chunk.shape[2]) for chunk in chunks)
    memory = "pinned" if chunks[0].is_pinned() else "pageable"
    tell(f"stored   from_gpu: {len(chunks)} chunks of {sizes} tokens in {memory} memory")
    overwrite(kv_caches)
    noise = prefix_at(blocks, tokens, paged)
    tell("lost     all of the paged memory was overwritten with noise")

    # 4. Load the chunks into other blocks, and hand the prefix back to transformers.
    load(connector, chunks, slots_of(other_blocks, tokens))
    returned = prefix_at(other_blocks, tokens, paged)
    tell("loaded   to_gpu: the chunks came back, into other blocks")

    # 5. Continue to decode: from the cache that stayed, the cache that returned, and the noise.
    stayed, came_back, control = (decode(model, x, first) for x in (cache, returned, noise))
    identical = torch.equal(stayed, came_back)
    differs = not torch.equal(stayed, control)
    verdict = "bit-identical to" if identical else "NOT those of"
    tell(f"decoded  {STEPS} more tokens: logits {verdict} the run that never left")
    tell(f"control  logits decoded from the noise {'differ' if differs else 'DO NOT DIFFER'}")
    return Outcome(tokens, len(chunks), STEPS, identical, differs)


def empty_pages(device: torch.device | str) -> list[torch.Tensor]:
    """Return an engine's caches: for each layer ``(2, blocks, block_size, heads, head_dim)``."""
    size = (2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return [torch.empty(size, dtype=DTYPE, device=device) for _ in range(LAYERS)]


def overwrite(kv_caches: list[torch.Tensor]) -> None:
    """Overwrite the pages with noise, as another request would."""
    for layer in kv_caches:
        layer.normal_()


def store(connector: AdaptiveConnector, slots: torch.Tensor, host: str) -> list[torch.Tensor]:
    """Store the rows at ``slots`` as chunks ``[2, layers, tokens, heads * dim]``.

    The last chunk is partial.
    """
    chunks = []
    transfers = []
    for start in range(0, len(slots), CHUNK):
        end = min(start + CHUNK, len(slots))
        size = (2, LAYERS, end - start, KV_HEADS * HEAD_DIM)
        chunk = pinned.empty(size, DTYPE) if host == "pinned" else torch.empty(size, dtype=DTYPE)
        transfers.append(connector.from_gpu(chunk, slot_mapping=slots, start=start, end=end))
        chunks.append(chunk)
    for transfer in transfers:  # before another request uses the pages
        transfer.synchronize()
    return chunks


def load(connector: AdaptiveConnector, chunks: list[torch.Tensor], slots: torch.Tensor) -> None:
    """Load the chunks, one after the other, to the rows at ``slots``."""
    start = 0
    transfers = []
    for chunk in chunks:
        end = start + chunk.shape[2]
        transfers.append(connector.to_gpu(chunk, slot_mapping=slots, start=start, end=end))
        start = end
    for transfer in transfers:
        transfer.synchronize()


def slots_of(blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the slots of a prefix's tokens in these blocks."""
    return (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:tokens]


def prefix_at(blocks: torch.Tensor, tokens: int, paged: KVView) -> DynamicCache:
    """Return a new cache of transformers, with a prefix from the pool."""
    cache = DynamicCache()
    load_prefix(cache, paged, blocks, tokens)
    return cache


@torch.no_grad()
def decode(model: LlamaForCausalLM, cache: DynamicCache, token: torch.Tensor) -> torch.Tensor:
    """Decode greedily after ``cache``; return the logits of all steps, ``[STEPS, vocabulary]``."""
    logits = []
    for _ in range(STEPS):
        logits.append(model(token, **{cache_argument(model): cache}).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return torch.cat(logits)


def tiny_llama() -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.2,  # wide enough that attention looks at some tokens more than others
    )
    return LlamaForCausalLM(config).to(DTYPE).eval()


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if no logit changed and the control differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--host", choices=("pageable", "pinned"), default="pageable")
    args = parser.parse_args(words)
    try:
        torch.empty(0, device=args.device)
    # Torch raises another error for each type of device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = f"torch cannot use it here ({str(error).splitlines()[0].rstrip('.')})"
        print(f"Device {args.device!r} was requested, but {why}; name another.", file=sys.stderr)
        return 1
    outcome = main(args.device, host=args.host)
    return 0 if outcome.identical and outcome.control_differs else 1


if __name__ == "__main__":
    sys.exit(run())
