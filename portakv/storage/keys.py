# SPDX-License-Identifier: Apache-2.0
"""Keys of blocks, which name their contents and all before them: chains of PortaKV, LMCache and
vLLM for a caller who has tokens, and the check of keys that an engine made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np

from portakv.errors import InvalidTerms, Unsupported


def check_keys(keys: Iterable[bytes], weak_keys: bool = False) -> list[bytes]:
    """Keys of 32 bytes; shorter ones get zeros behind them. Raises `InvalidTerms` for a key above
    32 bytes, or below 16 (1 if ``weak_keys``): two of few bits meet in one store."""
    if isinstance(keys, bytes | bytearray | str) or not isinstance(keys, Iterable):
        raise InvalidTerms(
            f"Keys were given as one {type(keys).__name__}: expected a list of bytes; put a single "
            f"key into a list."
        )
    found, least = [*keys], 1 if weak_keys else 16
    for number, key in enumerate(found):
        size = len(key) if isinstance(key, bytes) else 0
        if not least <= size <= 32:
            raise InvalidTerms(
                f"Key {number} is a {type(key).__name__} of {size} bytes: expected bytes, {least} "
                f"to 32. Hash longer ones; BlockStore(..., weak_keys=True) takes shorter "
                f"ones if a wrong block now and then does no harm."
            )
    return [key.ljust(32, b"\0") for key in found]


def prefix_keys(
    tokens: Any, block_size: int, salt: bytes = b"", extra: Sequence[bytes] | None = None
) -> list[bytes]:
    """The keys of all whole blocks: SHA-256 of the previous key, tokens as little-endian u32, and
    ``extra`` of the block (of a LoRA, an image). The ``salt`` keeps tenants apart."""
    with _terms():
        if not isinstance(salt, bytes):
            raise TypeError(f"a salt of type {type(salt).__name__} was found")
        keys = [sha256(b"portakv" + salt).digest()]
        for block, more in _blocks(tokens, block_size, "<u4", extra):
            keys.append(sha256(keys[-1] + block + (more or b"")).digest())
        return keys[1:]


def lmcache_keys(tokens: Any, block_size: int = 256) -> list[bytes]:
    """The keys of LMCache's server of many processes, in chunks (`TokenHasher` of 0.5.6)."""
    try:
        from blake3 import blake3
    except ImportError:
        why = "blake3 was not found; install it by `pip install blake3`"
        raise Unsupported("The keys of LMCache were asked for", why) from None
    with _terms():
        keys = [blake3(bytes(12)).digest()]  # of int64 0 and the token 0
        for block, _ in _blocks(tokens, block_size, ">u4"):
            keys.append(blake3(keys[-1] + block).digest())
        return keys[1:]


def vllm_keys(
    tokens: Any, block_size: int, seed: str = "vllm-none-hash", extra: Sequence[Any] | None = None
) -> list[bytes]:
    """The keys of vLLM by ``sha256_cbor``. ``seed`` is PYTHONHASHSEED of its processes, by default
    what 0.33 takes without it; ``extra`` are for each block its extra keys, a tuple or None."""
    with _terms():
        keys = [sha256(_cbor("" + seed)).digest()]  # a number would be another seed
        for block, more in _blocks(tokens, block_size, "<u4", extra):
            ids = np.frombuffer(block, "<u4").tolist()
            keys.append(sha256(_cbor((keys[-1], ids, more))).digest())
        return keys[1:]


@contextmanager
def _terms() -> Iterator[None]:
    """What is refused here, by numpy or by hashlib is refused with a sentence."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidTerms(
            f"Keys were asked for, and {error}: expected a list of whole numbers from 0 to 2**32-1 "
            f"on the host, a block size of 1 or more, a salt and extras of bytes, and an extra for "
            f"each block or none at all; pass the ids of one prompt."
        ) from None


def _blocks(tokens: Any, size: int, dtype: str, extra: Any = None) -> list[tuple[bytes, Any]]:
    """The tokens of each whole block as bytes, and its extra."""
    ids, step = np.asarray(tokens), 4 * size
    more = [None] * ids.size if extra is None else extra
    known = not ids.size or (ids.dtype.kind in "iu" and ids.min() >= 0 and not ids.max() >> 32)
    if not known or ids.ndim != 1 or size < 1 or ids.size // size > len(more):
        raise ValueError(f"{ids.dtype} {[*ids.shape]} in blocks of {size} was found")
    text = ids.astype(dtype).tobytes()
    return [(text[step * at : step * (at + 1)], more[at]) for at in range(ids.size // size)]


def _cbor(value: Any, kind: int = 0) -> bytes:
    """Canonical CBOR of None, booleans, whole numbers, bytes, text, and lists of these."""
    if value is None or isinstance(value, bool):
        return {False: b"\xf4", True: b"\xf5", None: b"\xf6"}[value]
    if isinstance(value, int):
        if value < 24:
            return bytes([kind << 5 | value]) if value >= 0 else _cbor(-1 - value, 1)
        power = ((value.bit_length() - 1) // 8).bit_length()
        return bytes([kind << 5 | 24 + power]) + value.to_bytes(min(8, 1 << power), "big")
    text = value.encode() if isinstance(value, str) else value
    if isinstance(text, bytes):
        return _cbor(len(text), 2 if text is value else 3) + text
    if not isinstance(text, (list, tuple)):
        raise TypeError(f"an extra holds a {type(text).__name__}")
    return _cbor(len(text), 4) + b"".join(map(_cbor, text))
