# SPDX-License-Identifier: Apache-2.0
"""A prompt's keys and values outlive their cache, in an object store or on a disk.

    python examples/prefix_store.py [device] [--remote memory://] [--disk FOLDER] [--model NAME]
    python examples/prefix_store.py [device] --disk FOLDER --kill [--encoding pack]

A model from `transformers` answers a prompt: a small Llama with random weights, so that nothing is
downloaded, or ``--model NAME``. The whole blocks of the prompt are stored under the hashes of its
tokens. A second engine, whose pages have another layout, loads the blocks, computes the rest of the
prompt and returns the same answer. From pages of noise it returns another one. ``--remote
s3://bucket/folder`` takes its credentials from the environment. Run it twice, and the first engine
loads the blocks too.

With ``--kill`` the first engine is a separate process, which is killed before it closes its store.
With ``--encoding pack`` the model computes in bf16, and the store packs its blocks without loss.
Blocks that do not fit stay raw.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)

from portakv import KVView, Pack
from portakv.errors import PortaKVError
from portakv.integrations.transformers import cache_argument, load_prefix, save_prefix
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys
from portakv.storage.store import FormStore

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
        noise: the answer after pages of noise; empty if nothing was loaded.
        stored: the blocks of each form on disks, and the bytes of a block.
    """

    loaded: int
    computed: int
    tokens: list[int]
    noise: list[int] = field(default_factory=list)
    stored: dict[str, tuple[int, int]] = field(default_factory=dict)


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


def forms_of(pages: KVView, model: str, packed: bool) -> dict[str, BlockForm]:
    """Return the forms of the stored blocks by name; a store saves to the first one that fits."""
    raw = BlockForm.of(pages, model=model)
    if not packed:
        return {"raw": raw}
    return {"packed": BlockForm.of(pages, model=model, encoding=Pack()), "raw": raw}


def answer(
    model: PreTrainedModel, prompt: Sequence[int], pages: KVView, store: FormStore
) -> Answer:
    """Answer a prompt with the blocks that the store has of it, and store its other blocks."""
    whole = (len(prompt) - 1) // BLOCK_SIZE  # blocks; at least one token is computed
    keys = prefix_keys(prompt[: whole * BLOCK_SIZE], BLOCK_SIZE)
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

    # The answer must depend on the pages, or the same answer shows nothing.
    noise = list[int]()
    if stored:
        for tensor in pages.owners:
            tensor.normal_()
        cache = DynamicCache()
        load_prefix(cache, pages, blocks[:stored], done)
        noise = go_on(model, cache, prompt[done:])
    return Answer(done, len(prompt) - done, tokens, noise)


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


@dataclass(frozen=True)
class Setup:
    """What both engines have: a device, a model and the place of the blocks."""

    device: str = "cpu"
    model: str | None = None  # None: the small Llama
    disk: str | None = None
    remote: str | None = None
    allow_http: bool = False
    packed: bool = False

    def tiers(self) -> list[Tier]:
        """Return the tiers of a store."""
        tiers: list[Tier] = []
        if self.disk:
            tiers.append(Disk(self.disk, capacity=256 << 20))
        if self.remote:
            options = {"allow_http": True} if self.allow_http else {}
            tiers.append(Remote(self.remote, client_options=options))
        return tiers

    def engine(self, number: int, tiers: Sequence[Tier], close: bool = True) -> Answer:
        """Answer the prompt by the first engine or the second one, with a separate store.

        Without ``close`` the store stays open.
        """
        if self.model is None:
            model = small_model().to(self.device)
            prompt = list(PROMPT.encode())
        else:
            loaded = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
            model = loaded.to(self.device).eval()
            prompt = AutoTokenizer.from_pretrained(self.model)(PROMPT)["input_ids"]
        if self.packed:
            model = model.to(torch.bfloat16)
        pages = pages_for(model, LAYOUTS[number])
        forms = forms_of(pages, self.model or "a small Llama, seed 0", self.packed)
        store = BlockStore(forms, staging=64 << 20, tiers=tiers)
        try:
            result = answer(model, prompt, pages, store.of(next(iter(forms))))
            for tier in store.statistics()["tiers"]:
                folders = [each for each in tier.values() if isinstance(each, dict)]
                used = sum(folder.get("used", 0) for folder in folders)
                result.stored[tier["form"]] = used, forms[tier["form"]].payload_bytes
        finally:
            if close:
                store.close()
        return result


def killed(setup: Setup, tell: Callable[[str], None]) -> Answer | None:
    """Answer by the first engine in another process, and kill it; None if it failed."""
    command = [sys.executable, __file__, "--first", json.dumps(asdict(setup))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((x for x in process.stdout if x.startswith("{")), "")
        finally:
            process.kill()
    if not line:
        tell("the first engine's process has ended; its standard error shows why")
        return None
    tell(f"process {process.pid} was killed by signal {-process.returncode}, its store not closed")
    return Answer(**json.loads(line))


def main(setup: Setup, tell: Callable[[str], None] = print, kill: bool = False) -> bool:
    """Answer twice, by engines of different layouts; return True if the answers are the same."""
    tiers = setup.tiers()
    answers = list[Answer]()
    for number, layout in enumerate(LAYOUTS):
        first_elsewhere = kill and number == 0
        made = killed(setup, tell) if first_elsewhere else setup.engine(number, tiers)
        if made is None:
            return False
        answers.append(made)
        tell(f"{layout!r}: {made.loaded} tokens of the prompt loaded, {made.computed} computed")
    first, second = answers
    if setup.packed:
        blocks = [f"{n} {name} of {size} B" for name, (n, size) in second.stored.items()]
        tell(f"blocks on the disk: {', '.join(blocks)}")
    same = first.tokens == second.tokens
    differs = second.noise != second.tokens
    tell(f"{STEPS} tokens follow: {'the same twice' if same else 'NOT the same'}")
    tell(f"after pages of noise: {'other tokens' if differs else 'THE SAME TOKENS'}")
    return same and differs and second.loaded > 0


def run(words: list[str] | None = None) -> int:
    """Run the command line; return 0 if the second engine loaded blocks and answered the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", default=usual, help=f"a torch device ({usual})")
    parser.add_argument("--remote", metavar="URL", help="s3://, gs://, az://, file://, memory://")
    parser.add_argument("--allow-http", action="store_true", help="an endpoint without TLS")
    parser.add_argument("--disk", metavar="FOLDER", help="a folder on a local disk")
    parser.add_argument("--model", metavar="NAME", help="of the Hugging Face hub, or a folder")
    parser.add_argument("--encoding", choices=("pack",), help="pack the blocks of a bf16 model")
    kill = "kill the first engine's process, before it closes its store"
    parser.add_argument("--kill", action="store_true", help=kill)
    parser.add_argument("--first", metavar="JSON", help="be the first engine's process")
    args = parser.parse_args(words)
    if args.kill and not args.disk:
        parser.error("--kill goes with --disk")
    try:
        if args.first is not None:
            setup = Setup(**json.loads(args.first))
            print(json.dumps(asdict(setup.engine(0, setup.tiers(), close=False))), flush=True)
            sys.stdin.read()  # until it is killed
            return 0
        setup = Setup(
            device=args.device,
            model=args.model,
            disk=args.disk,
            remote=args.remote or (None if args.disk else "memory://"),
            allow_http=args.allow_http,
            packed=args.encoding is not None,
        )
        return 0 if main(setup, kill=args.kill) else 1
    except PortaKVError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
