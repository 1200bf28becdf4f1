# SPDX-License-Identifier: Apache-2.0
"""Keys of blocks, which name their contents and all before them: chains of PortaKV, LMCache and
vLLM for a caller who has tokens, and the check of keys that an engine made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.arguments import flag, invalid, items, kind_of, octets, text, whole
from portakv.errors import InvalidTerms, Unsupported


def check_keys(keys: Iterable[bytes], weak_keys: bool = False) -> list[bytes]:
    """Return keys of 32 bytes; shorter keys get trailing zeros.

    Raises `InvalidTerms` for a key above 32 bytes, or below 16 (below 1 if ``weak_keys``): two
    short keys may be equal in one store.
    """
    flag("weak_keys", weak_keys)
    listed: list[bytes] = items("keys", keys, "bytes")
    if {*map(type, listed)} == {bytes} and {*map(len, listed)} == {32}:
        return listed
    least = 1 if weak_keys else 16
    for number, key in enumerate(listed):
        if isinstance(key, bytes) and least <= len(key) <= 32:
            continue
        # The error does not show a key: it may be what a cache of a tenant is found by.
        got = kind_of(key)
        do = "Pass bytes, such as the keys of prefix_keys."
        if isinstance(key, bytes):
            got = f"{len(key)} bytes"
            do = (
                "Hash longer ones; BlockStore(..., weak_keys=True) takes shorter ones if a wrong "
                "block now and then does no harm."
            )
        raise InvalidTerms(
            f"Expected keys of {least} to 32 bytes each, got {got} as keys[{number}]. {do}"
        )
    return [key.ljust(32, b"\0") for key in listed]


def different_keys(keys: Iterable[bytes], weak_keys: bool = False) -> list[bytes]:
    """Return keys as `check_keys` does; raise `InvalidTerms` also for a key that comes twice."""
    checked = check_keys(keys, weak_keys)
    if len({*checked}) < len(checked):
        last = {key: number for number, key in enumerate(checked)}
        first = next(number for number, key in enumerate(checked) if last[key] > number)
        raise InvalidTerms(
            f"Expected keys that differ, got keys[{last[checked[first]]}] equal to keys[{first}]. "
            f"Pass each key once."
        )
    return checked


def predecessors(
    after: bytes | Sequence[bytes | None] | None, keys: Sequence[bytes], weak_keys: bool = False
) -> list[bytes | None]:
    """Return for each of the keys of a save the key that it follows, of 32 bytes.

    Raises `InvalidTerms` for something else in ``after``, and for a sequence of another length.
    """
    keys = items("keys", keys, "bytes")
    what = "the key before the first one in `after`"
    do = "Pass that key, or None for the beginning of a prompt."
    if after is None:
        return [None, *keys[:-1]]
    if isinstance(after, bytes) or not isinstance(after, list | tuple):
        return [check_key(what, after, do, weak_keys), *keys[:-1]]
    if len(after) != len(keys):
        raise InvalidTerms(
            f"Expected a key in `after` for each of the {len(keys)} keys, got {len(after)}. Pass "
            f"the key that each of them follows, or None for the beginning of a prompt."
        )
    what = "keys and None in `after`"
    return [None if key is None else check_key(what, key, do, weak_keys) for key in after]


def check_key(what: str, key: object, do: str, weak_keys: bool) -> bytes:
    """Return one key of 32 bytes; raise `InvalidTerms` for another object."""
    flag("weak_keys", weak_keys)
    try:
        return check_keys([key], weak_keys)[0]  # type: ignore[list-item]
    except InvalidTerms:
        kind = f"{len(key)} bytes" if isinstance(key, bytes) else kind_of(key)
        raise InvalidTerms(f"Expected {what}, 16 to 32 bytes, got {kind}. {do}") from None


def prefix_keys(
    tokens: object, block_size: int, salt: bytes = b"", extra: Sequence[bytes | None] | None = None
) -> list[bytes]:
    """Return the keys of all whole blocks.

    A key is the SHA-256 of the previous key, the tokens as little-endian u32, and ``extra`` of the
    block (of a LoRA, an image). The ``salt`` keeps tenants apart.
    """
    return KeyChain(block_size, salt).extend(tokens, extra)


class KeyChain:
    """The keys of `prefix_keys`, made as the tokens of a request come.

    Args:
        block_size: the tokens of a block.
        salt: keeps tenants apart.
    """

    def __init__(self, block_size: int, salt: bytes = b"") -> None:
        octets("salt", salt)
        self.block_size = whole("block_size", block_size, 1)
        #: The keys of all whole blocks until now.
        self.keys = list[bytes]()
        self._last = sha256(b"portakv" + salt).digest()

    def extend(self, tokens: object, extra: Sequence[bytes | None] | None = None) -> list[bytes]:
        """Return the keys of the whole blocks of tokens that follow those of the earlier calls.

        ``tokens``: begin where the last block ended. Tokens of a block that is not whole are not
        remembered. ``extra``: one for each block.
        """
        made = list[bytes]()
        for number, (block, more) in enumerate(_blocks(tokens, self.block_size, "<u4", extra)):
            if more is not None and not isinstance(more, bytes):
                raise invalid(
                    f"extra[{number}]", "bytes or None", more, "Pass bytes for each block."
                )
            self._last = sha256(self._last + block + (more or b"")).digest()
            made.append(self._last)
        self.keys += made
        return made


def lmcache_keys(tokens: object, block_size: int = 256) -> list[bytes]:
    """Return the keys of LMCache's multiprocess server, by chunk (`TokenHasher` of 0.5.6)."""
    try:
        from blake3 import blake3
    except ImportError:
        why = "blake3 was not found; install it by `pip install blake3`"
        raise Unsupported("The keys of LMCache", why) from None
    keys = [blake3(bytes(12)).digest()]  # of int64 0 and the token 0
    for block, _ in _blocks(tokens, block_size, ">u4"):
        keys.append(blake3(keys[-1] + block).digest())
    return keys[1:]


def vllm_keys(
    tokens: object,
    block_size: int,
    seed: str = "vllm-none-hash",
    extra: Sequence[object] | None = None,
) -> list[bytes]:
    """Return the keys that vLLM makes by ``sha256_cbor``.

    ``seed``: the PYTHONHASHSEED of its processes, by default the seed that vLLM 0.33 takes without
    it. ``extra``: the extra keys of each block, a tuple or None.
    """
    text("seed", seed, least=0)  # a number would be another seed
    keys = [sha256(_cbor(seed)).digest()]
    for number, (block, more) in enumerate(_blocks(tokens, block_size, "<u4", extra)):
        ids = np.frombuffer(block, "<u4").tolist()
        try:
            written = _cbor((keys[-1], ids, more))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            expected = "a tuple of numbers, texts and bytes, or None"
            do = f"vLLM has no other extra keys ({error})."
            raise invalid(f"extra[{number}]", expected, more, do) from None
        keys.append(sha256(written).digest())
    return keys[1:]


def _blocks(
    tokens: object, block_size: int, dtype: str, extra: Sequence[object] | None = None
) -> list[tuple[bytes, Any]]:
    """Return the tokens of each whole block as bytes, and its extra."""
    ids = _ids(tokens)
    size = whole("block_size", block_size, 1)
    count = ids.size // size
    more = [None] * count
    if extra is not None:
        more = items("extra", extra, "extras, one for each block")
        most = -(-ids.size // size)  # with the last block, which need not be whole
        if not count <= len(more) <= most:
            blocks = f"{count} or {most}" if most > count else f"{count}"
            raise InvalidTerms(
                f"Expected extra to have an item for each block, {blocks}, got {len(more)}. Pass "
                f"None for a block without an extra."
            )
    written = ids.astype(dtype).tobytes()
    step = 4 * size
    return [(written[step * at : step * (at + 1)], more[at]) for at in range(count)]


def _ids(tokens: object) -> npt.NDArray[Any]:
    """Return tokens as an array of numbers that 32 bits hold."""
    expected = "a list of whole numbers from 0 to 2**32-1 on the host"
    do = "Pass the ids of one prompt."
    try:
        ids = np.asarray(tokens)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise invalid("tokens", expected, tokens, do) from None
    if ids.ndim == 1 and not ids.size:
        return ids
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        do = f"numpy reads them as {ids.dtype} of shape {[*ids.shape]}. {do}"
        raise invalid("tokens", expected, tokens, do)
    if ids.min() < 0 or ids.max() >> 32:
        raise invalid("tokens", expected, int(ids.min() if ids.min() < 0 else ids.max()), do)
    return ids


def _cbor(value: object, kind: int = 0) -> bytes:
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
        raise TypeError(f"an extra holds {kind_of(text)}")
    return _cbor(len(text), 4) + b"".join(map(_cbor, text))
