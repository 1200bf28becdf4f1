# SPDX-License-Identifier: Apache-2.0
"""A process takes over from a serving process: its weights, and a prompt's keys and values.

    python examples/switch_role.py [device]     # extras migrate and demo

A process serves a small Llama (random weights, nothing is downloaded) as two tensor-parallel ranks.
It has answered a prompt, and offers its rows. A second process has other weights. It pulls the
weights into one rank while the first process continues to serve, and every checksum agrees. Then it
pulls the prompt's rows into pages of another layout and block size. The first process is killed,
and the second process continues with the same tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from portakv import KVView
from portakv.errors import PortaKVError
from portakv.integrations.transformers import cache_argument, load_prefix, save_prefix
from portakv.migrate import Channel, Owner, Reader, Shard, shared_empty
from portakv.weights import Parameter, publish, pull_weights

PROMPT = (
    b"Who takes a role over needs the weights, and the rows of the prompts that are under way. "
)
MODEL = "a small Llama"
RANKS = 2
STEPS = 24
LAYERS = 4
KV_HEADS = 4
HEAD_DIM = 32
#: Pages of the first process, in blocks of 16 tokens, and of the second, in blocks of 64.
FIRST = "layer | kv block token head dim"
SECOND = "block layer kv head token dim"


def small_model(seed: int) -> PreTrainedModel:
    """Return a Llama with random weights; a byte is a token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.2,  # wide enough that attention looks at some tokens more than others
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rank_of(model: PreTrainedModel, rank: int) -> dict[str, Parameter]:
    """Return the part of a model's weights that a tensor-parallel rank holds.

    Here each part is a view of the whole. A rank of an engine has separate tensors.
    """
    parameters = dict[str, Parameter]()
    for name, whole in model.named_parameters():
        if "norm" in name:  # every rank has all of it
            parameters[name] = Parameter(whole)
            continue
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        part = whole.detach().chunk(RANKS, axis)[rank]
        size = whole.shape[axis]
        parameters[name] = Parameter.split(part, axis, [size], (rank, RANKS))
    return parameters


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


def serve(device: str) -> None:
    """Run the first process: answer, publish the weights, offer the rows, until it is killed."""
    model = small_model(seed=0).to(device)
    blocks = [9, 2, 14, 5, 0, 11]
    if device == "cpu":
        model.share_memory()  # device memory can be shared without this
    size = (2, 16, 16, KV_HEADS, HEAD_DIM)
    caches = [shared_empty(size, torch.float32).to(device) for _ in range(LAYERS)]
    pages = KVView(caches, FIRST)
    cache = DynamicCache()
    answer = go_on(model, cache, PROMPT)
    save_prefix(cache, pages, blocks, len(PROMPT) - 1).synchronize()
    weights = list[str]()
    rows = list[str]()
    open_until_killed = list[object]()
    for rank in range(RANKS):
        channel = Channel()
        each = KV_HEADS // RANKS
        heads = rank * each, (rank + 1) * each
        own = KVView([whole[:, :, :, slice(*heads)] for whole in caches], FIRST)
        owner = Owner(channel, Shard(own, heads=(*heads, KV_HEADS)), model=MODEL)
        published = publish(channel, rank_of(model, rank))
        open_until_killed += [owner, published]
        weights.append(published.ticket.hex())
        rows.append(owner.offer(blocks, tokens=len(PROMPT) - 1, lease=60).ticket.hex())
    print(json.dumps({"weights": weights, "rows": rows, "answer": answer}), flush=True)
    sys.stdin.read()


def take_over(
    device: str, tickets: Mapping[str, Sequence[str]], tell: Callable[[str], None]
) -> tuple[PreTrainedModel, DynamicCache]:
    """Run the second process: return a model with pulled weights, and a cache with pulled rows."""
    model = small_model(seed=1).to(device)
    tokens = len(PROMPT) - 1
    weights, rows = ([*map(bytes.fromhex, tickets[what])] for what in ("weights", "rows"))
    pages = KVView(torch.empty(4, LAYERS, 2, KV_HEADS, 64, HEAD_DIM, device=device), SECOND)
    with closing(Channel()) as channel:
        local = dict(model.named_parameters())  # whole
        nbytes = pull_weights(channel, weights, local)
        tell(f"weights   {nbytes:,} bytes of {len(local)} tensors, TP {RANKS} -> 1; digests agree")
        with closing(Reader(channel, Shard(pages), model=MODEL)) as reader:
            pulled = reader.pull(rows, [3, 1], verify=True)
            pulled.synchronize(timeout=30)
            statistics = pulled.statistics
        why = f"{statistics.strategy}: {statistics.why}"
        tell(f"rows      {tokens} tokens, 16 -> 64 in a block; {why}")
    cache = DynamicCache()
    load_prefix(cache, pages, [3, 1], tokens).synchronize()
    return model, cache


def main(device: str = "cpu", tell: Callable[[str], None] = print) -> bool:
    """Take over from a process, then kill it; return True if the tokens are the same."""
    command = [sys.executable, __file__, device, "--serve"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as first:
        try:
            assert first.stdout is not None
            message = next((line for line in first.stdout if line.startswith("{")), "{}")
            tickets = json.loads(message)
            if not tickets:
                tell("the serving process has ended; its standard error shows why")
                return False
            tell(f"serving   process {first.pid}, {RANKS} ranks; {STEPS} tokens answered")
            model, cache = take_over(device, tickets, tell)
        finally:
            first.kill()
    tell(f"killed    process {first.pid}")
    same = bool(go_on(model, cache, PROMPT[-1:]) == tickets["answer"])
    without = bool(go_on(small_model(seed=1), DynamicCache(), PROMPT) != tickets["answer"])
    tell(f"goes on   {STEPS} tokens, {'the same' if same else 'NOT THE SAME'}")
    tell(f"control   its own weights {'give others' if without else 'GIVE THEM TOO'}")
    return same and without


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if the tokens are the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--serve", action="store_true", help="be the first process")
    args = parser.parse_args(words)
    try:
        if args.serve:
            serve(args.device)
            return 0
        return 0 if main(args.device) else 1
    except PortaKVError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
