# SPDX-License-Identifier: Apache-2.0
"""Print the error of `fp8` next to that of other fp8 caches, as figures.

Run as ``python -m portakv_benchmarks.encodings.errors [FILE]``. FILE is what `torch.save` wrote: a
dict of tensors ``[tokens, heads, dim]``, such as keys and values of a model's layers. Without it
the rows are normally distributed, once as they are and once with two channels that are larger.
The other caches are computed here by their formulas:

- LMCache's fp8 serde casts to e4m3 without a scale;
- vLLM's fp8 cache has one scale for each layer and kv: 1, or the largest magnitude divided by 200
  for keys (``calculate_kv_scales``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from portakv.copy.fp8 import decode_rows, encode_rows
from portakv.layout.encodings import Fp8

E4M3_MOST = 448.0
#: The divisor of the largest magnitude for keys in vLLM.
VLLM_KEYS = 200.0
Rows = torch.Tensor


def by_portakv(rows: Rows) -> Rows:
    """Return rows ``[tokens, heads, dim]`` after `fp8`, a scale for each token and head."""
    plane = Fp8().plane(len(rows), rows.shape[2])
    planes = rows.transpose(0, 1).contiguous()
    size = (len(planes), plane.slot_bytes)
    slots = torch.empty(size, dtype=torch.uint8, device=rows.device)
    encode_rows(planes, slots, plane)
    decode_rows(slots, planes, plane)
    return planes.transpose(0, 1)


def cast(rows: Rows) -> Rows:
    """Return rows after a cast to e4m3 without a scale."""
    return rows.to(torch.float8_e4m3fn).to(rows.dtype)


def by_tensor(rows: Rows, scale: float) -> Rows:
    """Return rows after e4m3 with one scale for the tensor."""
    scaled = (rows.float() / scale).clamp(-E4M3_MOST, E4M3_MOST)
    return (scaled.to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


METHODS: dict[str, Callable[[Rows], Rows]] = {
    "fp8, a scale for each token and head": by_portakv,
    "LMCache: a cast": cast,
    "vLLM: scale 1": lambda rows: by_tensor(rows, 1.0),
    "vLLM: largest / 200": lambda rows: by_tensor(rows, float(rows.abs().max()) / VLLM_KEYS),
    "one scale, largest / 448": lambda rows: by_tensor(rows, float(rows.abs().max()) / E4M3_MOST),
}


def error_of(rows: Rows, made: Rows) -> tuple[float, float, float]:
    """Return the RMS error divided by the RMS of the values, the largest error divided by the
    largest magnitude of its token and head, and the share of values off by more than 1/16."""
    true = rows.double()
    error = (made.double() - true).abs()
    rms = (error.square().mean() / true.square().mean()).sqrt()
    largest = true.abs().amax(-1, keepdim=True)
    worst = (error / largest.clamp(min=torch.finfo(torch.float32).tiny)).max()
    off = (error > true.abs() / 16).double().mean()
    return float(rms), float(worst), float(off)


def examples(tokens: int, seed: int = 0) -> dict[str, Rows]:
    """Return normally distributed rows of 8 heads of 128 values, plain and with large channels."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (tokens, 8, 128)
    plain = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    uneven = plain.clone()
    uneven[:, :, 5] *= 30
    uneven[:, :, 7] *= 100
    return {"normal": plain.bfloat16(), "normal, two large channels": uneven.bfloat16()}


def table(named: dict[str, Rows]) -> list[str]:
    """Return the lines of a table of errors."""
    lines = [
        "| rows | method | RMS | largest | off by more than 1/16 |",
        "|---|---|---:|---:|---:|",
    ]
    for name, rows in named.items():
        for method, convert in METHODS.items():
            rms, worst, off = (100 * figure for figure in error_of(rows, convert(rows)))
            lines.append(f"| {name} | {method} | {rms:.2f} % | {worst:.2f} % | {off:.4f} % |")
    return lines


def main(arguments: list[str], lines_of: Callable[[dict[str, Rows]], list[str]] = table) -> None:
    """Print the table of a file's tensors, or of the examples."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", help="a dict of tensors of rows, by torch.save")
    file = parser.parse_args(arguments).file
    named = examples(4096)
    if file is not None:
        named = torch.load(file, map_location="cpu", weights_only=True)
    print("\n".join(lines_of(named)))


if __name__ == "__main__":
    main(sys.argv[1:])
