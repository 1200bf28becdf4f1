# SPDX-License-Identifier: Apache-2.0
"""A witness of a model's own cache, as transformers has it: it finds a stale prefix.

    python examples/witness_cache.py [device]

As in a `StaticCache`, the tensors are keys and values ``[1, heads, tokens, dim]`` of each layer.
Blocks are runs of 16 tokens, and the key of a block is a hash of all tokens up to its end. A
dictionary on the host stores prefixes. The weights change, but the keys do not.
"""

from __future__ import annotations

import argparse
from hashlib import sha256

import torch

from portakv import KVView
from portakv.witness import Witness

LAYERS = 4
TOKENS = 256
BLOCK = 16
HEADS = 4
DIM = 64


def main(arguments: list[str] | None = None) -> int:
    """Save and load a prefix, before and after new weights; return 1 if the witness is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, cuda, npu or mlu")
    device = torch.device(parser.parse_args(arguments).device)
    cache = [
        tuple(torch.zeros(1, HEADS, TOKENS, DIM, device=device) for _ in "kv")
        for _ in range(LAYERS)
    ]
    blocks = [tuple(each[0].unflatten(1, (-1, BLOCK)) for each in layer) for layer in cache]
    view = KVView(blocks, "layer kv | head block token dim")
    witness = Witness(view, check="all", older="fault")
    prompt = [*range(128)]
    keys = [sha256(str(prompt[: end + BLOCK]).encode()).digest() for end in range(0, 128, BLOCK)]
    places = [*range(len(keys))]

    def compute(weights: int) -> None:
        """Fill the cache, as a model with some weights does."""
        generator = torch.Generator().manual_seed(weights)
        for layer in cache:
            for each in layer:
                rows = torch.randn(HEADS, len(prompt), DIM, generator=generator)
                each[0, :, : len(prompt)] = rows.to(device)
        witness.stored(places, keys)

    compute(1)
    saved = [[each.cpu().clone() for each in layer] for layer in cache]
    compute(2)
    fresh = [[each.cpu().clone() for each in layer] for layer in cache]
    kinds = list[set[str]]()
    for rows in (fresh, saved):
        for layer, some in zip(cache, rows, strict=True):
            for each, row in zip(layer, some, strict=True):
                each.copy_(row)
        faults = witness.restored(places, keys).faults
        kinds.append({fault.kind for fault in faults})
        print(f"{len(faults)} of {len(places)} blocks are wrong", *kinds[-1])
    return int(kinds != [set(), {"older version"}])


if __name__ == "__main__":
    raise SystemExit(main())
