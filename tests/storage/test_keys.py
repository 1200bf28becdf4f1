# SPDX-License-Identifier: Apache-2.0
"""Keys: PortaKV's chain against its definition, the others against values that the released
packages computed."""

from __future__ import annotations

import hashlib
import struct
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from portakv import InvalidTerms, Unsupported
from portakv.storage.keys import check_keys, lmcache_keys, prefix_keys, vllm_keys

#: At the edges of CBOR's lengths of numbers, in two blocks of four.
TOKENS = [0, 23, 24, 255, 256, 65_535, 65_536, 151_935]


@pytest.mark.parametrize("salt", [b"", b"tenant"])
@pytest.mark.parametrize("extra", [None, [b"lora", b"", b"image"]])
def test_a_key_is_the_hash_of_all_before_it(salt: bytes, extra: list[bytes] | None) -> None:
    keys = prefix_keys(range(14), 4, salt, extra)
    previous = hashlib.sha256(b"portakv" + salt).digest()
    assert len(keys) == 3
    for number, key in enumerate(keys):
        hashed = previous + struct.pack("<4I", *range(4 * number, 4 * number + 4))
        previous = hashlib.sha256(hashed + (extra[number] if extra else b"")).digest()
        assert key == previous


def test_a_change_anywhere_changes_all_keys_behind_it() -> None:
    one = prefix_keys(TOKENS * 4, 4)
    for at in range(len(TOKENS) * 4):
        tokens = TOKENS * 4
        tokens[at] += 1
        same = [a == b for a, b in zip(one, prefix_keys(tokens, 4), strict=True)]
        assert same == [True] * (at // 4) + [False] * (8 - at // 4)
    assert not {*one} & {*prefix_keys(TOKENS * 4, 4, b"tenant")}
    assert not {*one} & {*prefix_keys(TOKENS * 4, 8)}


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint32)])
def test_tokens_of_any_kind_have_the_same_keys(kind: Any) -> None:
    assert prefix_keys(kind(TOKENS), 4) == prefix_keys(TOKENS, 4)
    assert prefix_keys(kind([2**32 - 1] * 4), 4) == prefix_keys([2**32 - 1] * 4, 4)


def available() -> list[Any]:
    """Return the functions that make keys here: blake3 has no release for Python 3.10."""
    return [prefix_keys, vllm_keys, *([lmcache_keys] if find_spec("blake3") else [])]


@pytest.mark.parametrize("tokens", [[], [1, 2, 3]])
def test_what_fills_no_block_has_no_keys(tokens: list[int]) -> None:
    assert [keys(tokens, 4) for keys in available()] == [[]] * len(available())


NO_TOKENS = [
    *([-1] * 4, [2**32] * 4, [0.5] * 4, [[1] * 4] * 2, ["a"] * 4, [[1], [2, 3]], None),
    torch.zeros(4, dtype=torch.int64, device="meta"),  # as any that is not on the host
    torch.zeros(4, dtype=torch.bfloat16, device="cpu"),
]


@pytest.mark.parametrize("tokens", NO_TOKENS)
def test_what_is_no_token_is_refused(tokens: Any) -> None:
    for keys in available():
        with pytest.raises(InvalidTerms, match="whole numbers from 0 to"):
            keys(tokens, 4)


@pytest.mark.parametrize(
    "terms",
    [
        *({"block_size": x} for x in (0, -4, "4", 4.0, None)),
        *({"extra": x} for x in ([b""], ["lora", "lora"], [None] * 99, 5)),
        {"salt": "tenant"},
    ],
)
def test_other_wrong_terms_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(InvalidTerms, match=rf"Expected {next(iter(terms))}\b"):
        prefix_keys(TOKENS, **{"block_size": 4, **terms})


@pytest.mark.parametrize("extra", [1.5, {"a": 1}, np.int64(3), 2**64, object()])
def test_extras_that_vllm_would_encode_otherwise_are_refused(extra: Any) -> None:
    with pytest.raises(InvalidTerms, match=r"Expected extra\[0\] to be"):
        vllm_keys(TOKENS, 8, extra=[(extra,)])
    with pytest.raises(InvalidTerms):
        vllm_keys(TOKENS, 8, seed=0)  # type: ignore[arg-type]


def test_a_salt_that_is_no_bytes_is_named() -> None:
    with pytest.raises(InvalidTerms, match="Expected salt to be bytes, got 'tenant'"):
        prefix_keys(TOKENS, 4, salt="tenant")  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [None, 5, bytes(32), bytearray(32), "a" * 32])
def test_what_is_no_list_of_keys_is_refused(keys: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected keys "):
        check_keys(keys)


def test_booleans_are_no_numbers_in_vllm_s_chain() -> None:
    """RFC 8949: 81 f5 is a list of true, 81 01 of one."""
    ids = b"\x84\x00\x17\x18\x18\x18\xff"
    seed = hashlib.sha256(b"\x61a").digest()
    for extra, encoded in ((True, b"\x81\xf5"), (False, b"\x81\xf4"), (1, b"\x81\x01")):
        keys = vllm_keys(TOKENS[:4], 4, "a", [(extra,)])
        assert keys == [hashlib.sha256(b"\x83\x58\x20" + seed + ids + encoded).digest()]


def test_lmcache_s_chain() -> None:
    """``TokenHasher(4).compute_chunk_hashes(TOKENS)`` of lmcache 0.5.6."""
    pytest.importorskip("blake3", reason="LMCache's keys need blake3")
    assert [key.hex() for key in lmcache_keys(TOKENS, 4)] == [
        "90f5eacb797a60bcb698ac9a18415f534679b59e2bd5c0163410b0a8377ea7dd",
        "e3f0fb33d877169845b0c684e2493c158586010eeb8476fb4e9743ad56d6d93c",
    ]


def test_lmcache_s_chain_without_blake3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(Unsupported, match="pip install blake3"):
        lmcache_keys(TOKENS, 4)


@pytest.mark.parametrize(
    ("seed", "extra", "keys"),
    [
        (None, None, ("dc7fbfd287fac7b6243222eb8a406c3a", "a174cdc874a91cc4a2939cf7a4f234fa")),
        ("0", None, ("ca90027d467f8ae0c02e71aa4eff29f1", "a00e16765098cf2d30bf90a61b546e19")),
        (
            "0",
            [("lora-a",), ("image", 3, b"\x01\x02", ("x", None))],
            ("dac8f4c2ed9b89f094b6a065ce5b5081", "4f4a51e17a697edd90f4234d9604a1fd"),
        ),
        (
            "0",
            [("a" * 30, -5, -300), (2**40, 70_000, [], b"\x00" * 256)],
            ("958402ecd63b1ed07a9a4de90a82924b", "870758170a35f2d0fcae16ee3f68c74e"),
        ),
    ],
)
def test_vllm_s_chain(seed: str | None, extra: Any, keys: tuple[str, str]) -> None:
    """The first halves of what ``init_none_hash(sha256_cbor)`` with PYTHONHASHSEED=``seed``, then
    ``hash_block_tokens`` with extra keys make, in vllm 0.33.0 with cbor2 6.3.0."""
    options: dict[str, Any] = {} if seed is None else {"seed": seed}
    result = vllm_keys(TOKENS, 4, extra=extra, **options)
    assert [key.hex()[:32] for key in result] == [*keys]


def test_shorter_keys_get_zeros_behind_them() -> None:
    """Fault 63. Keys of wrong length: what may be padded is, in order, duplicates included."""
    keys = [bytes(range(size)) for size in (16, 20, 32, 32)]
    assert check_keys(keys) == [key + bytes(32 - len(key)) for key in keys]
    assert check_keys([b"12345678"], weak_keys=True) == [b"12345678" + bytes(24)]


@pytest.mark.parametrize("weak", [None, 1, torch.zeros(2)])
def test_weak_keys_is_a_flag(weak: Any) -> None:
    with pytest.raises(InvalidTerms, match=r"^Expected weak_keys to be True or False"):
        check_keys([bytes(32)], weak)


@pytest.mark.parametrize(
    ("key", "weak"),
    [
        *((bytes(15), False), (b"", False), (b"", True), (bytes(33), False), (bytes(33), True)),
        *(("a" * 32, False), (2**63, True), (None, False), (bytearray(32), False)),
    ],
)
def test_keys_of_a_wrong_length_are_refused(key: Any, weak: bool) -> None:
    """Fault 63. Keys of wrong length: a sentence that names the key's number, not the key."""
    with pytest.raises(InvalidTerms, match=r"Expected keys .* as keys\[1\]") as error:
        check_keys([bytes(32), key], weak)
    assert ("Pass bytes" in str(error.value)) is not isinstance(key, bytes)
    assert "aaa" not in str(error.value)
