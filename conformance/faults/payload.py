# SPDX-License-Identifier: Apache-2.0
"""Make the blocks of the fault table: random bytes that a key and a model decide."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache


def key_of(number: int) -> bytes:
    """Return the 32 bytes of a block's key."""
    return hashlib.sha256(f"block {number}".encode()).digest()


@lru_cache(maxsize=256)
def payload(number: int, nbytes: int, model: str) -> bytes:
    """Return the bytes of a block of a model."""
    return random.Random(f"{model} {number}").randbytes(nbytes)
