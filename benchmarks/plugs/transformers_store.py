# SPDX-License-Identifier: Apache-2.0
"""Faults of a store of prefixes that a model of transformers loads.

    python -m portakv_benchmarks.plugs.transformers_store FOLDER [--faults 200] [--json FILE]

It lets so many faults of each kind happen to the files, the disk and the process, after a small
Llama has stored the blocks of a prompt. It counts how the blocks came that a load put into a cache,
bit for bit, and which tokens the model answered with that cache. It needs no device.

Two controls have wrong blocks and wrong answers. ``unchecked`` is the same store without its
checksums, which takes each call of the disk as complete. ``hasty`` takes each block as loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from portakv.errors import PortaKVError
from portakv_benchmarks.plugs import faults

CHECKED = "portakv"
UNCHECKED = "unchecked"
HASTY = "hasty"
BLOCKS = 64
SIZE = 8  # tokens of a block
TOKENS = BLOCKS * SIZE
NEW = 8  # tokens of an answer
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # wide enough that an answer depends on the whole prompt
    "pad_token_id": 0,
    "eos_token_id": None,
}
BLOCK_BYTES = SIZE * 4 * 2 * 4 * 32 * 4  # layers, keys and values, heads, dim, bytes of float32
HEADER = 4096  # bytes of an image before its block
#: Bytes of its staging: a process begins sooner with less.
STAGING = 16 << 20
IMPORTS = ("portakv.integrations.transformers_store", "transformers.models.llama.modeling_llama")


def small_model() -> Any:
    """Return a model of four layers, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def _believe_the_disk() -> None:
    """Take off the checks of what a disk returns, in this process."""
    from portakv.storage.io.choose import Threads
    from portakv.storage.tiers import disk

    run = Threads.run

    def believe(self: Any, requests: Any, ended: Any = None) -> list[int]:
        def complete(number: int, _: int) -> None:
            ended(number, requests[number].nbytes)

        run(self, requests, ended and complete)
        return [each.nbytes for each in requests]

    # These raise if a name has gone.
    patch.object(Threads, "run", believe).start()
    patch.object(disk, "verifies", lambda _: False).start()
    patch.object(disk.DiskStore, "is_right", lambda *_: True).start()


def as_if_loaded(load: Callable[..., int]) -> Callable[..., int]:
    """Return a load of blocks that takes each as loaded; memory that it leaves has other bytes."""

    def believe(prefixes: Any, view: Any, keys: Any) -> int:
        for pair in view.tensors:
            for rows in pair:
                rows.fill_(7)
        load(prefixes, view, keys)
        return len(keys)

    return believe


def _believe_in_blocks() -> None:
    """Take each block of a prompt as stored and as loaded, in this process."""
    from portakv.serving.prefixes import Prefixes

    Prefixes.load = as_if_loaded(Prefixes.load)  # type: ignore[method-assign]
    Prefixes.lookup = lambda _, keys: len(keys)  # type: ignore[method-assign, assignment]


#: What makes a store a control.
CONTROLS = {UNCHECKED: _believe_the_disk, HASTY: _believe_in_blocks}


class FaultyStore:
    """A store of prefixes over a folder, whose loads end soon, for `faults`."""

    files = "slots"
    image = BLOCK_BYTES + HEADER

    def __init__(self, name: str, folder: Path) -> None:
        torch.set_num_threads(1)
        from portakv.integrations.transformers.store import PrefixStore

        if name in CONTROLS:
            CONTROLS[name]()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._model = small_model()
        terms = {
            "folder": str(folder),
            "capacity": BLOCKS * self.image * 5 // 4,
            "host": 0,
            "staging": STAGING,
            "deadline": faults.DEADLINE,
            "block_size": SIZE,
        }
        self._store = PrefixStore(self._model, terms)
        self._tokens = torch.zeros((1, TOKENS + 1), dtype=torch.int64)
        self._own: Any = None  # a cache that the model has computed
        self._loaded: Any = None
        self._error: BaseException | None = None
        self._before: torch.Tensor | None = None

    def renew(self, seed: int) -> None:
        draw = torch.Generator("cpu").manual_seed(seed)
        vocabulary = CONFIG["vocab_size"]
        self._tokens = torch.randint(1, vocabulary, (1, TOKENS + 1), generator=draw)
        self._own = self._computed()

    def save(self, limit: float = faults.LIMIT) -> None:
        for transfer in self._store.save(self._own, self._tokens):
            with suppress(PortaKVError):  # not all were stored
                transfer.synchronize(timeout=limit)

    def begin_load(self) -> None:
        self._loaded = None
        self._error = None
        threading.Thread(target=self._load, daemon=True).start()

    def _load(self) -> None:
        try:
            self._loaded = self._store.load(self._tokens)
        except BaseException as error:
            self._error = error

    def ended(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._loaded is not None

    def landed(self) -> list[bool]:
        count = self._loaded.get_seq_length() // SIZE
        return [number < count for number in range(BLOCKS)]

    def right(self) -> list[bool]:
        count = self._loaded.get_seq_length() // SIZE
        made = [False] * BLOCKS
        if count:
            loaded = _rows(self._loaded)
            own = _rows(self._own)
            for number in range(count):
                tokens = slice(number * SIZE, (number + 1) * SIZE)
                made[number] = torch.equal(loaded[..., tokens, :], own[..., tokens, :])
        return made

    def answers(self) -> Mapping[str, int]:
        """Return whether the model answers with the loaded cache as with a computed one."""
        loaded = self._answer(self._loaded)
        own = self._answer(None)
        return {"right answers" if torch.equal(loaded, own) else "wrong answers": 1}

    def touched(self) -> bool:
        before = self._before
        loaded = self._loaded is not None and self._loaded.get_seq_length()
        self._before = _rows(self._loaded) if loaded else None
        return before is not None and loaded and not torch.equal(before, _rows(self._loaded))

    def close(self) -> None:
        self._store.close()

    @torch.no_grad()
    def _computed(self) -> Any:
        """Return a cache with the rows of the prompt."""
        from transformers import DynamicCache

        from portakv.integrations.transformers.caches import cache_argument

        cache = DynamicCache(config=self._model.config)
        self._model(self._tokens, **{cache_argument(self._model): cache})
        return cache

    def _answer(self, cache: Any) -> torch.Tensor:
        """Return greedy tokens after the prompt."""
        terms: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        from portakv.integrations.transformers.caches import cache_argument

        terms[cache_argument(self._model)] = cache
        output: torch.Tensor = self._model.generate(self._tokens, **terms)
        return output[:, TOKENS + 1 :]


def _rows(cache: Any) -> torch.Tensor:
    """Return a copy of the rows of a cache, ``[layer, kv, batch, head, token, dim]``."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


def main() -> None:
    """Let faults happen, print how blocks and answers came, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder on a local disk")
    parser.add_argument("--json", type=Path)
    faults.add_options(parser, [CHECKED, *CONTROLS])
    parser.set_defaults(faults=200, stores=[CHECKED])
    args = parser.parse_args()
    if len(args.stores) > 1:
        parser.error("expected one of --stores, because a control changes the process")
    args.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    faults.preload(args.folder, __spec__.name)
    terms = args.stores, args.folder, args.faults, args.kinds
    results: dict[str, Any] = {"load": os.getloadavg()[0], "blocks": BLOCKS}
    results["block_bytes"] = BLOCK_BYTES
    results["faults"] = faults.damaged(FaultyStore, *terms, imports=IMPORTS)
    shutil.rmtree(args.folder)
    faults.show(results, args.json)


if __name__ == "__main__":
    main()
