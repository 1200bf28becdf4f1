# SPDX-License-Identifier: Apache-2.0
"""Keys of blocks, which name their contents and all before them: chains of PortaKV, LMCache and
vLLM for a caller who has tokens, and the check of keys that an engine made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import accumulate
from typing import Any

import numpy as np

from portakv.errors import InvalidTerms, Unsupported

_Block = tuple[bytes, Any]  # tokens, extra


def check_keys(keys: Iterable[bytes], weak_keys: bool = False) -> list[bytes]:
    """Keys of 32 bytes; shorter ones get zeros behind them. Raises `InvalidTerms` for a key above
    32 bytes, or below 16 (1 if ``weak_keys``): two of few bits meet in one store."""
    found, least = [*keys], 1 if weak_keys else 16
    for number, key in enumerate(found):
        if not isinstance(key, bytes) or not least <= len(key) <= 32:
            size = (
                f"{len(key)} bytes" if isinstance(key, bytes) else f"of type {type(key).__name__}"
            )
            raise InvalidTerms(
                f"Key {number} is {size}: expected {least} to 32 bytes. Hash what is longer; if a "
                f"wrong block now and then does no harm, pass weak_keys=True for what is shorter."
            )
    return [key.ljust(32, b"\0") for key in found]


def prefix_keys(
    tokens: Any, block_size: int, salt: bytes = b"", extra: Sequence[bytes] | None = None
) -> list[bytes]:
    """The keys of all whole blocks: SHA-256 of the previous key, tokens as little-endian u32, and
    ``extra`` of the block (of a LoRA, an image). The ``salt`` keeps tenants apart."""

    blocks = _blocks(tokens, block_size, "<u4", extra)
    first = sha256(b"portakv" + salt).digest()
    return _chain(first, blocks, lambda key, x: sha256(key + x[0] + (x[1] or b"")).digest())


def lmcache_keys(tokens: Any, block_size: int = 256) -> list[bytes]:
    """The keys of LMCache's server of many processes, in chunks (`TokenHasher` of 0.5.6)."""
    try:
        from blake3 import blake3
    except ImportError:
        why = "blake3 was not found; install it by `pip install blake3`"
        raise Unsupported("The keys of LMCache were asked for", why) from None
    blocks = _blocks(tokens, block_size, ">u4")
    first = blake3(bytes(12)).digest()  # of int64 0 and the token 0
    return _chain(first, blocks, lambda key, x: blake3(key + x[0]).digest())


def vllm_keys(
    tokens: Any, block_size: int, seed: str = "vllm-none-hash", extra: Sequence[Any] | None = None
) -> list[bytes]:
    """The keys of vLLM by ``sha256_cbor``. ``seed`` is PYTHONHASHSEED of its processes, by default
    what 0.33 takes without it; ``extra`` are for each block its extra keys, a tuple or None."""

    def link(key: bytes, block: _Block) -> bytes:
        return sha256(_cbor((key, np.frombuffer(block[0], "<u4").tolist(), block[1]))).digest()

    return _chain(sha256(_cbor(seed)).digest(), _blocks(tokens, block_size, "<u4", extra), link)


def _chain(
    first: bytes, blocks: list[_Block], link: Callable[[bytes, _Block], bytes]
) -> list[bytes]:
    return [*accumulate(blocks, link, initial=first)][1:]


def _blocks(
    tokens: Any, block_size: int, dtype: str, extra: Sequence[Any] | None = None
) -> list[_Block]:
    """The tokens of each whole block as bytes, and its extra."""
    ids = np.asarray(tokens)
    known = not ids.size or (ids.dtype.kind in "iu" and ids.min() >= 0 and not ids.max() >> 32)
    count = ids.size // block_size if block_size > 0 else -1
    more = [None] * count if extra is None else extra
    if not known or ids.ndim != 1 or not 0 <= count <= len(more):
        raise InvalidTerms(
            f"Keys of {ids.size} tokens in blocks of {block_size} were asked for: expected a list "
            f"of whole numbers from 0 to 2**32 - 1, a block size of at least 1, and as many extra "
            f"as blocks; pass the ids of one prompt."
        )
    text, size = ids.astype(dtype).tobytes(), 4 * block_size
    return [(text[at * size : (at + 1) * size], more[at]) for at in range(count)]


def _cbor(value: Any) -> bytes:
    """Canonical CBOR of what vLLM hashes: None, whole numbers, bytes, text, and lists of these."""
    if value is None:
        return b"\xf6"
    if type(value) is int:
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    return _head(4, len(value)) + b"".join(map(_cbor, value))


def _head(kind: int, number: int) -> bytes:
    """The kind of a value, and a number in as few bytes as can be."""
    if number < 24:
        return bytes([kind << 5 | number])
    power = ((number.bit_length() - 1) // 8).bit_length()
    return bytes([kind << 5 | 24 + power]) + number.to_bytes(1 << power, "big")
