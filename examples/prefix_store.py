# SPDX-License-Identifier: Apache-2.0
"""A prompt's keys and values outlive their cache, in an object store or on a disk.

    python examples/prefix_store.py [device] [--remote memory://] [--disk FOLDER] [--model NAME]

A model from `transformers` answers a prompt: a small Llama with random weights, so that nothing is
downloaded, or ``--model NAME``. The whole blocks of the prompt are stored under the hashes of its
tokens. A second engine, whose pages have another layout, loads the blocks, computes the rest of the
prompt and returns the same answer. ``--remote s3://bucket/folder`` takes its credentials from the
environment. Run it twice, and the first engine loads the blocks too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)

from portakv import KVView
from portakv.errors import PortaKVError
from portakv.integrations.transformers import cache_argument, load_prefix, save_prefix
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys

PROMPT = (
    "A serving engine computes the keys and values of every prompt that it meets. Most prompts "
    "begin as others did: with the same instructions, the same document, the same conversation. "
    "What was computed once can be stored under the tokens that it follows from, and loaded."
)
# of the paged memory
BLOCK_SIZE = 16
BLOCKS = 256
STEPS = 24  # tokens of an answer
Tier: TypeAlias = "Disk | Remote"
#: The pages of the two engines: a list of layers, and one tensor.
LAYOUTS = ("layer | kv block token head dim", "block layer kv head token dim")


@dataclass(frozen=True)
class Answer:
    """An answer to the prompt.

    Attributes:
        loaded: tokens of the prompt that were loaded from the store.
        computed: tokens of the prompt that were computed.
        tokens: the answer.
    """

    loaded: int
    computed: int
    tokens: list[int]


def small_model() -> PreTrainedModel:
    """Return a Llama with random weights, the same in each process; a byte is a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.2,  # wide enough that attention looks at some tokens more than others
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def pages_for(model: PreTrainedModel, layout: str) -> KVView:
    """Return empty paged memory for a model's keys and values, in this layout."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    heads = config.num_key_value_heads
    extents = {"layer": layers, "kv": 2, "block": BLOCKS, "token": BLOCK_SIZE, "head": heads}
    extents["dim"] = head_dim
    lists, _, dims = layout.rpartition("|")
    size = [extents[axis] for axis in dims.split()]
    count = layers if lists else 1
    made = [torch.empty(size, dtype=model.dtype, device=model.device) for _ in range(count)]
    return KVView(made if lists else made[0], layout)


def answer(
    model: PreTrainedModel,
    prompt: Sequence[int],
    pages: KVView,
    store: BlockStore,
    salt: bytes = b"",
) -> Answer:
    """Answer a prompt with the blocks that the store has of it, and store its other blocks."""
    whole = (len(prompt) - 1) // BLOCK_SIZE  # blocks; at least one token is computed
    keys = prefix_keys(prompt[: whole * BLOCK_SIZE], BLOCK_SIZE, salt)
    blocks = torch.randperm(BLOCKS, device="cpu")[:whole]
    stored = store.lookup(keys)
    cache = DynamicCache()
    if stored:
        loaded = store.load(pages, blocks[:stored], keys[:stored], missing="skip")
        loaded.synchronize(timeout=60)
        # A block may be missing or damaged by now.
        stored = int(loaded.landed.cumprod().sum())
    if stored:
        load_prefix(cache, pages, blocks[:stored], stored * BLOCK_SIZE)
    done = stored * BLOCK_SIZE
    tokens = go_on(model, cache, prompt[done:])
    if stored < whole:
        save_prefix(cache, pages, blocks, whole * BLOCK_SIZE)
        after = keys[stored - 1] if stored else None
        saved = store.save(pages, blocks[stored:], keys[stored:], after=after)
        saved.synchronize(timeout=60)
    return Answer(done, len(prompt) - done, tokens)


@torch.no_grad()
def go_on(model: PreTrainedModel, cache: DynamicCache, tokens: Sequence[int]) -> list[int]:
    """Return the next tokens, greedily, after a cache and the tokens that it lacks."""
    fresh = list(tokens)
    answered = list[int]()
    while len(answered) < STEPS:
        ids = torch.tensor([fresh], dtype=torch.int64, device=model.device)
        logits = model(ids, **{cache_argument(model): cache}).logits
        fresh = [int(logits[0, -1].argmax())]
        answered += fresh
    return answered


def main(
    device: str = "cpu",
    name: str | None = None,
    tiers: Sequence[Tier] = (),
    tell: Callable[[str], None] = print,
) -> bool:
    """Answer twice, by engines of different layouts; return True if the answers are the same."""
    if name is None:
        model = small_model().to(device)
        prompt = list(PROMPT.encode())
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval()
        prompt = AutoTokenizer.from_pretrained(name)(PROMPT)["input_ids"]
    answers = []
    for layout in LAYOUTS:
        pages = pages_for(model, layout)
        form = BlockForm.of(pages, model=name or "a small Llama, seed 0")
        store = BlockStore(form, staging=64 << 20, tiers=tiers)
        try:
            answers.append(answer(model, prompt, pages, store))
        finally:
            store.close()
        last = answers[-1]
        tell(f"{layout!r}: {last.loaded} tokens of the prompt loaded, {last.computed} computed")
    same = answers[0].tokens == answers[1].tokens
    tell(f"{STEPS} tokens follow: {'the same twice' if same else 'NOT the same'}")
    return same and answers[1].loaded > 0


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if the second engine loaded blocks and answered the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--remote", metavar="URL", help="s3://, gs://, az://, file://, memory://")
    parser.add_argument("--allow-http", action="store_true", help="an endpoint without TLS")
    parser.add_argument("--disk", metavar="FOLDER", help="a folder on a local disk")
    parser.add_argument("--model", metavar="NAME", help="of the Hugging Face hub, or a folder")
    args = parser.parse_args(words)
    tiers: list[Tier] = [Disk(args.disk, capacity=256 << 20)] if args.disk else []
    try:
        if args.remote or not tiers:
            url = args.remote or "memory://"
            if args.allow_http:
                tiers.append(Remote(url, client_options={"allow_http": True}))
            else:
                tiers.append(Remote(url))
        return 0 if main(args.device, args.model, tiers) else 1
    except PortaKVError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
