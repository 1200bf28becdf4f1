# SPDX-License-Identifier: Apache-2.0
"""Caches whose blocks a witness checks, an oracle for fingerprints, and the kernel on a host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from portakv import KVView
from portakv.runtime.word_sums import AXIS, MODULUS, key_of
from portakv.witness import Witness
from portakv.witness.fingerprint import FingerprintKernel, Geometry
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.rows import Rows
from support.sums_on_cpu import CPU, HostDriver

LAYERS = 3
BLOCKS = 40
TOKENS = 16
HEADS = 4
DIM = 8
LAYOUT = "layer | kv block token head dim"


class WitnessDriver(HostDriver):
    """A driver of the host for the kernel of fingerprints."""

    argument = "portakv::fingerprints::Blocks"


def host_kernel(**text: str) -> FingerprintKernel:
    """Return the kernel of fingerprints for host tensors."""
    return FingerprintKernel(CPU, WitnessDriver(**text))


def key(number: int) -> bytes:
    """Return the key of a block."""
    return sha256(number.to_bytes(8, "little")).digest()


def oracle(
    tensors: Any, layout: str, extents: dict[str, Any], geometry: Geometry, block: int
) -> Any:
    """Return the fingerprint of a block, int64 ``[count]``: as fingerprint.py defines it, from rows
    that the conformance suite's oracle reads byte by byte."""
    rows = Rows(tensors, layout, extents)
    memory = Memory.snapshot(tensors)
    size = rows.block_size or 0
    segments = geometry.segments
    each = max(1, geometry.tokens)
    by_head = np.zeros((geometry.layers, geometry.kv, geometry.heads), object)
    by_segment = np.zeros((geometry.layers, geometry.kv, segments), object)
    for layer in range(geometry.layers):
        for kv in range(geometry.kv):
            slots = [block * size] if rows.opaque else range(block * size, (block + 1) * size)
            addresses = rows.row_addresses(kv, layer, list(slots))
            octets = memory.read(addresses)  # [tokens, heads, width]
            if not geometry.tokens:  # parts of pages
                octets = octets.reshape(1, geometry.heads, segments, -1).transpose(0, 2, 1, 3)[0]
            words = np.ascontiguousarray(octets).view(f"<i{geometry.unit}").astype(object)
            for token in range(words.shape[0]):
                segment, inside = divmod(token, each)
                for head in range(geometry.heads):
                    row = sum(int(w) * key_of(n) for n, w in enumerate(words[token, head]))
                    by_head[layer, kv, head] += row * key_of(AXIS + token)
                    in_segment = row * key_of(2 * AXIS + inside) * key_of(3 * AXIS + head)
                    by_segment[layer, kv, segment] += in_segment
    sums = [int(x) % MODULUS for x in (*by_head.ravel(), *by_segment.ravel())]
    return np.array(sums, np.uint64).view(np.int64)


class Engine:
    """A cache, a tier that saves its blocks, and a witness of both.

    Args:
        device: of the cache.
        layout: of the cache, with these axes in any order.
        terms: of the witness.
    """

    def __init__(
        self, device: str = "cpu", seed: int = 0, heads: int = HEADS, **terms: Any
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cache = [
            torch.randn(2, BLOCKS, TOKENS, heads, DIM, generator=generator).to(device)
            for _ in range(LAYERS)
        ]
        self.view = KVView(self.cache, LAYOUT)
        self.saved = dict[bytes, list[torch.Tensor]]()
        terms = {"check": "all", "nbytes": 1 << 20, **terms}
        self.witness = Witness(self.view, **terms)

    def rows(self, block: int) -> list[torch.Tensor]:
        """Return a copy of the rows of a block, for each layer ``[kv, tokens, heads, dim]``."""
        return [layer[:, block].clone() for layer in self.cache]

    def store(self, blocks: Iterable[int], numbers: Iterable[int], **terms: Any) -> None:
        """Save blocks under the keys of some numbers."""
        listed = [*blocks]
        keys = [key(n) for n in numbers]
        for block, each in zip(listed, keys, strict=True):
            self.saved[each] = self.rows(block)
        self.witness.stored(listed, keys, **terms)

    def write(self, block: int, rows: Sequence[torch.Tensor]) -> None:
        """Write rows, as `rows` returns them, into a block."""
        for layer, new in zip(self.cache, rows, strict=True):
            layer[:, block] = new

    def load(self, block: int, number: int) -> None:
        """Write the saved rows of a key into a block."""
        self.write(block, self.saved[key(number)])
