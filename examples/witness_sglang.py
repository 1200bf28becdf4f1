# SPDX-License-Identifier: Apache-2.0
"""A witness of SGLang's pools: it finds a page that comes back with keys and values exchanged.

    python examples/witness_sglang.py [device]

The tensors are those of SGLang's `MHATokenToKVPool` and of its host pool; SGLang is not needed. In
SGLang, `k_buffer` and `v_buffer` of the pool are the tensors, and the keys are the hashes of pages
that its radix tree passes to a storage backend: ``bytes.fromhex(hash)``. Call `stored` where
HiCache writes pages through, and `restored` after `load_to_device_per_layer` of the last layer.
"""

from __future__ import annotations

import argparse
from hashlib import sha256

import torch

from portakv import KVView
from portakv.witness import Witness

LAYERS = 4
PAGES = 32
PAGE_SIZE = 16
HEADS = 4
DIM = 64


def main(arguments: list[str] | None = None) -> int:
    """Back up and load pages, once rightly and once not; return 1 if the witness is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, cuda, npu or mlu")
    device = torch.device(parser.parse_args(arguments).device)
    shape = (PAGES * PAGE_SIZE, HEADS, DIM)
    k_buffer, v_buffer = (
        [torch.randn(shape).bfloat16().to(device) for _ in range(LAYERS)] for _ in "kv"
    )
    view = KVView((k_buffer, v_buffer), "sglang-mha", block_size=PAGE_SIZE)
    witness = Witness(view, check="all", action="recompute")

    # HiCache writes pages through to the host.
    pages = [3, 8, 9, 21]
    hashes = [sha256(f"page {n}".encode()).hexdigest() for n in range(len(pages))]
    keys = [bytes.fromhex(each) for each in hashes]
    witness.stored(pages, keys)
    host = [[layer[_slots(pages)].cpu() for layer in pool] for pool in (k_buffer, v_buffer)]

    # They come back to other pages, first rightly, then with keys and values exchanged.
    places = [0, 1, 2, 4]
    wrong = list[int]()
    for order in (1, -1):
        for pool, rows in zip((k_buffer, v_buffer), host[::order], strict=True):
            for layer, saved in zip(pool, rows, strict=True):
                layer[_slots(places)] = saved.to(device)
        comparison = witness.restored(places, keys)
        print(f"{len(comparison.failed)} of {len(places)} pages are computed again")
        for fault in comparison.faults[:1]:
            print(fault.sentence)
        wrong.append(len(comparison.failed))
    return int(wrong != [0, len(places)])


def _slots(pages: list[int]) -> torch.Tensor:
    """Return the slots of pages."""
    first = torch.tensor(pages)[:, None] * PAGE_SIZE
    return (first + torch.arange(PAGE_SIZE)).flatten()


if __name__ == "__main__":
    raise SystemExit(main())
