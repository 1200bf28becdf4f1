# SPDX-License-Identifier: Apache-2.0
"""Print how much smaller encodings make rows, next to what any entropy coder can reach, as figures.

Run as ``python -m portakv_benchmarks.encodings.ratios [FILE]``, with rows as `errors` takes them.
The entropy coders of GPUs (nvCOMP's ANS) code bytes by how often each occurs in a chunk of 64 KiB.
Their figures here are bounds by the entropy: headers and tables of a real coder come on top.
"""

from __future__ import annotations

import sys

import torch

from portakv.errors import Unsupported
from portakv.layout.encodings import Fp8, Pack
from portakv_benchmarks.encodings.errors import main

#: Bytes that an entropy coder codes together.
CHUNK = 64 << 10
#: Tokens of a block.
TOKENS = 16
Rows = torch.Tensor


def entropy(symbols: torch.Tensor) -> torch.Tensor:
    """Return the bits of a symbol for each line of numbers from 0 to 255, ``[lines, symbols]``."""
    counts = torch.zeros((len(symbols), 256), dtype=torch.float64, device=symbols.device)
    ones = torch.ones(symbols.shape, dtype=torch.float64, device=symbols.device)
    counts.scatter_add_(1, symbols.to(torch.int64), ones)
    shares = counts / symbols.shape[1]
    bits: torch.Tensor = -(shares * shares.clamp(min=1e-300).log2()).sum(1)
    return bits


def planes_of(rows: Rows, tokens: int = TOKENS) -> torch.Tensor:
    """Return the bits of rows ``[tokens, heads, dim]`` of bf16 as planes of blocks, int16."""
    blocks = len(rows) // tokens
    made = rows[: blocks * tokens].unflatten(0, (blocks, tokens)).transpose(1, 2)
    planes: torch.Tensor = made.reshape(blocks * rows.shape[1], -1).contiguous()
    return planes.view(torch.int16)


def exponents_of(planes: torch.Tensor) -> torch.Tensor:
    """Return the exponents of planes, uint8."""
    return (planes.to(torch.int32) >> 7 & 0xFF).to(torch.uint8)


def chunks_of(symbols: torch.Tensor) -> torch.Tensor:
    """Return bytes as whole chunks of `CHUNK`; all of them as one if they are fewer."""
    flat = symbols.flatten()
    size = min(CHUNK, len(flat))
    return flat[: len(flat) // size * size].view(-1, size)


def ratios_of(rows: Rows) -> dict[str, float]:
    """Return raw bytes / encoded bytes of rows ``[tokens, heads, dim]`` of bf16, by method.

    Blocks have `TOKENS` tokens. A plane that does not fit into a slot of ``pack`` counts as its
    slot and its raw bytes.
    """
    planes = planes_of(rows)
    exponents = exponents_of(planes)
    raw = 2 * planes.shape[1]
    made = {f"pack, {bits} bits": _of_pack(exponents, bits) for bits in (4, 3)}
    made["fp8 (lossy)"] = raw / Fp8().plane(TOKENS, rows.shape[2]).slot_bytes
    made["a cast to fp8 (lossy), as LMCache's serde"] = 2.0
    together = entropy(chunks_of(exponents)).mean()
    made["bound: exponents, chunks of 64 KiB"] = float(16 / (8 + together))
    each = entropy(exponents)
    made["bound: exponents, planes alone, slots for the largest"] = float(16 / (8 + each.max()))
    made["bound: bytes, chunks of 64 KiB"] = float(
        8 / entropy(chunks_of(planes.view(torch.uint8))).mean()
    )
    return made


def _of_pack(exponents: torch.Tensor, bits: int) -> float:
    """Return raw bytes / encoded bytes of planes in usual slots."""
    try:
        plane = Pack(bits).plane(exponents.shape[1])
    except Unsupported:
        return 1.0
    counts = torch.zeros((len(exponents), 256), dtype=torch.int64, device=exponents.device)
    ones = torch.ones(exponents.shape, dtype=torch.int64, device=exponents.device)
    counts.scatter_add_(1, exponents.to(torch.int64), ones)
    frequent = counts.sort(1, descending=True).values[:, : (1 << bits) - 1].sum(1)
    too_many = (exponents.shape[1] - frequent > plane.most_escapes).double().mean()
    return float(plane.raw_bytes / (plane.slot_bytes + too_many * plane.raw_bytes))


def table(named: dict[str, Rows]) -> list[str]:
    """Return the lines of a table of ratios."""
    columns = {name: ratios_of(rows) for name, rows in named.items()}
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for method in next(iter(columns.values())):
        figures = " | ".join(f"{column[method]:.3f}" for column in columns.values())
        lines.append(f"| {method} | {figures} |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:], table)
