# SPDX-License-Identifier: Apache-2.0
"""Fill a host pool of SGLang from the device and read it back; `sgl_kernel` is not needed.

    python examples/sglang_kvcacheio.py [device]

The calls are those of SGLang's host pool (page first), by the names of `sgl_kernel.kvcacheio`. One
line chooses PortaKV: it replaces SGLang's module. The script clears the layers between the two
halves, and compares every loaded byte.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from portakv.integrations import kvcacheio

sys.modules["sgl_kernel.kvcacheio"] = kvcacheio  # the one line, before SGLang is imported

LAYERS = 8
PAGES = 64
PAGE_SIZE = 16
HEADS = 4
DIM = 64


def main(arguments: list[str] | None = None) -> int:
    """Back up, clear and load; return the exit code, 1 if a byte differs."""
    from sgl_kernel.kvcacheio import transfer_kv_all_layer_lf_pf, transfer_kv_per_layer_pf_lf

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="cpu", help="cpu, cuda, npu or mlu")
    device = torch.device(parser.parse_args(arguments).device)

    tokens = PAGES * PAGE_SIZE
    shape = (PAGES * PAGE_SIZE, HEADS, DIM)
    pools = [[torch.randn(shape).bfloat16().to(device) for _ in range(LAYERS)] for _ in "kv"]
    originals = [[layer.cpu().clone() for layer in pool] for pool in pools]
    tables = [torch.tensor([x.data_ptr() for x in pool], dtype=torch.uint64) for pool in pools]
    tables = [table.to(device) for table in tables]
    pin = device.type != "cpu"
    host_shape = (tokens, LAYERS, HEADS, DIM)
    host = [torch.zeros(host_shape, dtype=torch.bfloat16, pin_memory=pin) for _ in "kv"]
    row = HEADS * DIM * 2  # bytes of a token of one layer
    used = torch.randperm(tokens)[: tokens // 2]
    places = torch.randperm(tokens)[: tokens // 2]
    ids = used.to(device), places.to(device)  # SGLang's kernels take ids on the device

    began = time.perf_counter()
    transfer_kv_all_layer_lf_pf(
        tables[0], host[0], tables[1], host[1], *ids, row, row * LAYERS, LAYERS
    )
    synchronize(device)
    stored = time.perf_counter()
    for pool in pools:
        for layer in pool:
            layer.zero_()
    for n in range(LAYERS):
        transfer_kv_per_layer_pf_lf(
            host[0], pools[0][n], host[1], pools[1][n], *reversed(ids), n, row, row * LAYERS
        )
    synchronize(device)
    loaded = time.perf_counter()

    same = all(
        layer.cpu()[used].equal(before[used])
        for pool, copies in zip(pools, originals, strict=True)
        for layer, before in zip(pool, copies, strict=True)
    )
    print(f"{len(used)} tokens of {LAYERS} layers on {device}")
    print(f"stored {2 * LAYERS * len(used) * row} bytes, page first, in {stored - began:.4f} s")
    print(
        f"loaded them layer by layer in {loaded - stored:.4f} s; "
        + ("all bytes are the same" if same else "BYTES DIFFER")
    )
    return 0 if same else 1


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
