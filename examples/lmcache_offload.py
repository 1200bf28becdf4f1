# SPDX-License-Identifier: Apache-2.0
"""LMCache stores an engine's paged caches and loads them again, with PortaKV as its device.

    python examples/lmcache_offload.py [device] [--order HND]

The calls are LMCache's own (engine-driven mode). The one line of configuration is the variable
``LMCACHE_DEVICE_BACKEND``, which this script sets before it imports LMCache. The script clears the
caches between the two calls, and compares every loaded byte.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

LAYERS = 8
BLOCKS = 64
BLOCK_SIZE = 16
HEADS = 4
DIM = 64
BLOCKS_PER_CHUNK = 16  # LMCache's chunk of 256 tokens


def main(arguments: list[str] | None = None) -> int:
    """Store, clear and load; return the exit code, 1 if a byte differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, cuda, npu or mlu")
    parser.add_argument("--order", choices=("NHD", "HND"), default="HND", help="of the caches")
    args = parser.parse_args(arguments)
    os.environ["LMCACHE_DEVICE_BACKEND"] = f"portakv-{args.device}"
    try:
        from lmcache.v1.multiprocess.transfer_context import base
    except ImportError as error:
        print(f"LMCache cannot be imported: {error}. See docs/engines/lmcache.md.", file=sys.stderr)
        return 2
    import torch
    from lmcache.v1.platform import resolve_device_ops

    device = torch.device(args.device)

    def finish() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    inner = (BLOCK_SIZE, HEADS) if args.order == "NHD" else (HEADS, BLOCK_SIZE)
    shape = (2, BLOCKS, *inner, DIM)
    made = [torch.randn(shape, device="cpu").bfloat16() for _ in range(LAYERS)]
    caches = {f"layer.{n}": each.to(device) for n, each in enumerate(made)}
    blocks = torch.randperm(BLOCKS, device="cpu")[: 3 * BLOCKS_PER_CHUNK].tolist()
    hints = {"kv_layout": args.order}

    began = time.perf_counter()
    chunks = base.gather_paged_kv_to_cpu(caches, blocks, BLOCKS_PER_CHUNK, layout_hints=hints)
    finish()
    stored = time.perf_counter()
    for each in caches.values():
        each.zero_()
    base.scatter_cpu_to_paged_kv(caches, blocks, chunks, BLOCKS_PER_CHUNK, layout_hints=hints)
    finish()
    loaded = time.perf_counter()

    same = all(
        each.cpu()[:, blocks].equal(made[n][:, blocks]) for n, each in enumerate(caches.values())
    )
    nbytes = sum(chunk.nbytes for chunk in chunks)
    ops = type(resolve_device_ops(device.type))
    print(f"{ops.__name__} on {device}, {args.order} caches")
    if not ops.__module__.startswith("portakv."):
        print("PortaKV was not chosen; `portakv doctor` reports why.")
        return 1
    print(f"stored {len(chunks)} chunks of {nbytes // len(chunks)} bytes in {stored - began:.4f} s")
    print(
        f"loaded them in {loaded - stored:.4f} s; "
        + ("all bytes are the same" if same else "BYTES DIFFER")
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
