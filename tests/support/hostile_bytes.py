# SPDX-License-Identifier: Apache-2.0
"""Sealed messages as a carrier damages them, or as an owner that lies makes them."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec


def lied(data: bytes, **fields: Any) -> bytes:
    """The bytes as an owner that lies would have made them; of lists only the numbered places."""
    told = msgspec.msgpack.decode(data[16:])
    for field, value in fields.items():
        if isinstance(value, dict):
            value = [value.get(i, old) for i, old in enumerate(told[field])]
        told[field] = value
    return sealed(msgspec.msgpack.encode(told))


def sealed(told: bytes) -> bytes:
    return hashlib.blake2b(told, digest_size=16).digest() + told


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A bit flipped, a byte, a piece cut out, doubled, or the end."""
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    flipped = bytes([data[at] ^ 1 << rng.randrange(8)])
    ways = (
        data[:at] + flipped + data[at + 1 :],
        data[:at] + rng.randbytes(1) + data[at + 1 :],
        data[:at] + data[to:],
        data[:to] + data[at:],
        data[:at],
    )
    return rng.choice(ways)
