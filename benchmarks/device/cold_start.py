# SPDX-License-Identifier: Apache-2.0
"""The fresh process of `startup`, run by its path: ``python cold_start.py BACKEND DEVICE``.

It imports nothing of PortaKV before the clock runs, so it belongs to no package while it runs.
Prints seconds, and whether the bytes were right, as JSON.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

import torch


def main(backend: str, device: str) -> None:
    """Time the first transfer, everything of PortaKV included."""
    size, slots = (2, 4, 16, 8, 64), [5, 33, 18]
    count = 2 * 4 * 16 * 8 * 64
    caches = [
        torch.arange(count, dtype=torch.int32, device=device).to(torch.int16).view(size)
        for _ in range(4)
    ]
    chunk = torch.empty((2, 4, len(slots), 512), dtype=torch.int16, device=device)
    ids = torch.tensor(slots, device=device)
    if not device.startswith("cpu"):
        torch.get_device_module(device.partition(":")[0]).synchronize()
    early = [name for name in sys.modules if name.partition("_")[0].partition(".")[0] == "portakv"]
    assert not early, f"imported before the clock runs: {early}"
    began = perf_counter()
    from portakv import AdaptiveConnector

    imported = perf_counter()
    connector = AdaptiveConnector(device, backend)
    connector.register_kv_caches(caches)
    connector.from_gpu(chunk, slot_mapping=ids).synchronize()
    ended = perf_counter()
    rows = torch.stack([cache.flatten(1, 2)[:, ids].flatten(2) for cache in caches], 1)
    print(json.dumps({
        "seconds": ended - began,
        "imported": imported - began,
        "right": bool(torch.equal(rows, chunk)),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
