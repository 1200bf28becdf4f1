# SPDX-License-Identifier: Apache-2.0
"""Sealed messages that a transport damages, or that a lying owner makes."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec


def lied(data: bytes, **fields: Any) -> bytes:
    """Return the bytes with false fields, as a lying owner would make them; in lists only the
    numbered places change."""
    message = msgspec.msgpack.decode(data[16:])
    for field, value in fields.items():
        if isinstance(value, dict):
            value = [value.get(i, old) for i, old in enumerate(message[field])]
        message[field] = value
    return sealed(msgspec.msgpack.encode(message))


def sealed(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest() + body


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a flipped bit, another byte, a piece cut out or doubled, or without their
    end."""
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    flipped = bytes([data[at] ^ 1 << rng.randrange(8)])
    variants = (
        data[:at] + flipped + data[at + 1 :],
        data[:at] + rng.randbytes(1) + data[at + 1 :],
        data[:at] + data[to:],
        data[:to] + data[at:],
        data[:at],
    )
    return rng.choice(variants)
