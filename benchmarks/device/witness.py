# SPDX-License-Identifier: Apache-2.0
"""Time fingerprints of a step's blocks, compared with one read of the same bytes.

    python -m portakv_benchmarks.device.witness [--device cuda] [--json]

For each number of blocks of Llama-3-8B and of DeepSeek's latent rows, medians in microseconds: of
the host until `Witness.stored` and `Witness.restored` return, of the device for the fingerprints,
and of the device for a sum of as many contiguous bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

from portakv import KVView
from portakv.runtime.devices import usual_device
from portakv.witness import Witness

REPEATS = 50
BLOCKS = 1024
COUNTS = (1, 4, 32, 512)
#: Of each model the layers, the shape of a layer with BLOCKS blocks, and its layout.
MODELS = {
    "llama-3-8b": (32, (2, BLOCKS, 16, 8, 128), "layer | kv block token head dim"),
    "deepseek-v3": (61, (BLOCKS // 4, 64, 576), "layer | block token dim"),
}


@dataclass
class Row:
    """The times of one number of blocks, in microseconds."""

    model: str
    blocks: int
    nbytes: int
    fingerprint_bytes: int
    stored_host: float
    restored_host: float
    stored_device: float
    read_device: float


def measure(model: str, device: torch.device) -> list[Row]:
    """Return the times of a model's blocks."""
    (layers, shape, layout) = MODELS[model]
    cache = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(layers)]
    for layer in cache:
        layer.normal_()
    view = KVView(cache, layout)
    witness = Witness(view, check="all", nbytes=256 << 20)
    most = view.slots // (view.block_size or 1)
    rows = list[Row]()
    for count in (n for n in COUNTS if n <= most):
        blocks = torch.randperm(most)[:count].tolist()
        keys = [n.to_bytes(32, "little") for n in blocks]
        nbytes = count * sum(each.nbytes for each in cache) // most
        contiguous = torch.zeros(nbytes // 8, dtype=torch.int64, device=device)

        def stored(blocks: list[int] = blocks, keys: list[bytes] = keys) -> None:
            witness.stored(blocks, keys)

        def restored(blocks: list[int] = blocks, keys: list[bytes] = keys) -> object:
            return witness.restored(blocks, keys)

        def settle() -> None:
            witness.settle(wait=True)

        (stored_host, stored_device) = _times(stored, settle, device)
        (restored_host, _) = _times(restored, settle, device)
        (_, read_device) = _times(contiguous.sum, lambda: None, device)
        each = witness.block_bytes[""]
        times = stored_host, restored_host, stored_device, read_device
        rows.append(Row(model, count, nbytes, each, *(round(x, 1) for x in times)))
    faults = witness.figures()[""].faults
    assert not faults, faults
    return rows


def _times(
    call: Callable[[], object], after: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Return medians in microseconds: of the host until the call returns, and of the device."""
    host = list[float]()
    there = list[float]()
    for _ in range(REPEATS):
        if device.type == "cpu":
            began = time.perf_counter()
            call()
            host.append(time.perf_counter() - began)
            there.append(host[-1])
        else:
            events = [torch.Event(device, enable_timing=True) for _ in range(2)]
            torch.accelerator.synchronize(device)
            if device.type == "cuda":  # work waits for the host otherwise, and its time counts
                torch.cuda._sleep(2_000_000)
            events[0].record()
            began = time.perf_counter()
            call()
            host.append(time.perf_counter() - began)
            events[1].record()
            torch.accelerator.synchronize(device)
            there.append(events[0].elapsed_time(events[1]) / 1e3)
        after()
    return median(host) * 1e6, median(there) * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    device = torch.device(args.device) if args.device else usual_device()
    rows = [row for model in MODELS for row in measure(model, device)]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    print("model        blocks       MiB  host: stored  restored  device: stored  a read")
    for row in rows:
        print(
            f"{row.model:12} {row.blocks:6} {row.nbytes / 2**20:9.1f} {row.stored_host:10.1f} us "
            f"{row.restored_host:6.1f} us {row.stored_device:12.1f} us {row.read_device:5.1f} us"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
