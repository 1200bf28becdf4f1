# SPDX-License-Identifier: Apache-2.0
"""A witness beside LMCache's own copies: it finds chunks that come back in another order.

    python examples/witness_lmcache.py [device]

The calls are LMCache's (engine-driven mode), and LMCache is not changed. With vLLM nothing of this
is needed: wrap LMCache's connector by `PortaKVWitness`, as docs/witness.md shows.
"""

from __future__ import annotations

import argparse
import sys
from hashlib import sha256

LAYERS = 4
BLOCKS = 96
BLOCK_SIZE = 16
HEADS = 4
DIM = 64
BLOCKS_PER_CHUNK = 16  # LMCache's chunk of 256 tokens


def main(arguments: list[str] | None = None) -> int:
    """Store chunks and load them, once rightly and once not; return 1 if the witness is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, cuda, npu or mlu")
    args = parser.parse_args(arguments)
    try:
        from lmcache.v1.multiprocess.transfer_context import base
    except ImportError as error:
        print(f"LMCache cannot be imported: {error}. See docs/engines/lmcache.md.", file=sys.stderr)
        return 2
    import torch

    from portakv import KVView
    from portakv.witness import Witness

    shape = (2, BLOCKS, BLOCK_SIZE, HEADS, DIM)
    caches = {f"layer.{n}": torch.randn(shape).bfloat16().to(args.device) for n in range(LAYERS)}
    view = KVView(caches, "layer | kv block token head dim")
    witness = Witness(view, check="all", action="recompute")

    # LMCache stores two chunks of 16 blocks. Its keys are hashes of the chunks' tokens; here are
    # those of blocks, as an engine has them.
    blocks = torch.randperm(BLOCKS)[: 2 * BLOCKS_PER_CHUNK].tolist()
    keys = [sha256(f"block {n} of the prompt".encode()).digest() for n in range(len(blocks))]
    witness.stored(blocks, keys)
    hints = {"kv_layout": "NHD"}
    chunks = base.gather_paged_kv_to_cpu(caches, blocks, BLOCKS_PER_CHUNK, layout_hints=hints)

    failed = list[int]()
    for loaded in (chunks, chunks[::-1]):
        for cache in caches.values():
            cache.zero_()
        base.scatter_cpu_to_paged_kv(caches, blocks, loaded, BLOCKS_PER_CHUNK, layout_hints=hints)
        comparison = witness.restored(blocks, keys)
        print(f"{len(comparison.failed)} of {len(blocks)} blocks are computed again")
        for fault in comparison.faults[:1]:
            print(fault.sentence)
        failed.append(len(comparison.failed))
    return int(failed != [0, len(blocks)])


if __name__ == "__main__":
    sys.exit(main())
