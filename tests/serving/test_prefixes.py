# SPDX-License-Identifier: Apache-2.0
"""Prefixes in a store: blocks that come, blocks that do not, and stores that fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.held_bucket import HeldBucket, TermsWith
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, StoreBusy, TransferError
from portakv.serving import StoreTerms
from portakv.serving.prefixes import Prefixes, check_terms
from portakv.storage.memory import Crossing

SIZE = 8
ROOM: dict[str, Any] = {"staging": 1 << 20, "block_size": SIZE}
HOST: dict[str, Any] = {**ROOM, "host": 1 << 20}


def pages(blocks: int, first: float = 0.0) -> KVView:
    """Rows of some blocks, all of them different."""
    numbers = torch.arange(first, first + 2 * 2 * blocks * SIZE * 4, device="cpu")
    layers = numbers.float().view(2, 2, 1, blocks * SIZE, 4)
    return KVView([*layers], "layer | kv head (block token) dim", block_size=SIZE)


def rows_of(view: KVView) -> list[torch.Tensor]:
    return [torch.as_tensor(each) for each in view.tensors]


def opened(terms: StoreTerms, **more: Any) -> closing[Prefixes]:
    return closing(Prefixes(pages(1), terms, "model", **more))


def put(prefixes: Prefixes, view: KVView, keys: list[bytes]) -> None:
    handle = prefixes.save(view, keys)
    assert handle is not None
    handle.synchronize(timeout=LIMIT)


def test_blocks_come_back() -> None:
    with opened(StoreTerms(**HOST)) as prefixes:
        keys = prefixes.keys(range(30))
        assert len(keys) == 3
        assert prefixes.lookup(keys) == 0
        put(prefixes, pages(3), keys)
        assert prefixes.lookup(keys) == 3
        target = pages(3, 1000.0)
        assert prefixes.load(target, keys) == 3
        assert all(map(torch.equal, rows_of(target), rows_of(pages(3))))
        assert prefixes.keys(range(30), b"tenant") != keys


def test_packed_blocks_come_back(tmp_path: Path) -> None:
    """Also for a process that stores raw blocks in the same folder later."""

    def rows(blocks: int) -> KVView:
        numbers = torch.arange(2 * 2 * blocks * SIZE * 32, device="cpu")
        layers = (1 + numbers % 250).bfloat16().view(2, 2, 1, blocks * SIZE, 32)
        return KVView([*layers], "layer | kv head (block token) dim", block_size=SIZE)

    tmp_path.chmod(0o700)
    for encoding in ("pack", None):
        terms = StoreTerms(str(tmp_path), 1 << 20, encoding=encoding, **HOST)
        with closing(Prefixes(rows(1), terms, "model")) as prefixes:
            assert prefixes.form is not None
            assert bool(prefixes.form.encoding) == (encoding is not None)
            keys = prefixes.keys(range(30))
            if encoding is not None:
                put(prefixes, rows(3), keys)
            assert prefixes.lookup(keys) == 3
            target = rows(3)
            for tensor in rows_of(target):
                tensor.zero_()
            assert prefixes.load(target, keys) == 3
            assert all(map(torch.equal, rows_of(target), rows_of(rows(3))))


def test_no_keys_are_no_work() -> None:
    with opened(StoreTerms(**HOST)) as prefixes:
        assert prefixes.load(pages(1), []) == 0
        assert prefixes.save(pages(1), []) is None


def test_a_folder_that_another_store_has(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    terms = StoreTerms(folder=str(tmp_path), capacity=1 << 20, **HOST)
    with opened(terms), pytest.raises(StoreBusy, match="shared"):
        Prefixes(pages(1), terms, "model", patience=0.0)


def test_a_store_that_was_closed_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    with opened(StoreTerms(**HOST)) as prefixes:
        keys = prefixes.keys(range(SIZE))
        put(prefixes, pages(1), keys)
    with caplog.at_level(logging.WARNING):
        assert prefixes.lookup(keys) == 0
        assert prefixes.load(pages(1), keys) == 0
        assert prefixes.save(pages(1), keys) is None
    assert "computed" in caplog.text


def test_a_copy_that_fails_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TransferError("Expected a copy, got none.")

    with opened(StoreTerms(**{**HOST, "host": 0}, bucket="memory://")) as prefixes:
        keys = prefixes.keys(range(SIZE))
        put(prefixes, pages(1), keys)
        monkeypatch.setattr(Crossing, "copy", fail)
        assert prefixes.load(pages(1), keys) == 0


@pytest.mark.parametrize("call", ["lookup", "load", "save"])
def test_a_bucket_that_hangs(call: str) -> None:
    """Each call ends; the block is missing, or is not saved."""
    bucket = HeldBucket()
    room = {**ROOM, "host": 0, "staging": 4 << 14}
    with opened(TermsWith.a_bucket(bucket, **room)) as prefixes:
        keys = prefixes.keys(range(SIZE * 40))
        put(prefixes, pages(2), keys[:2])
    with opened(TermsWith.a_bucket(bucket, deadline=0.3, **room)) as prefixes:
        bucket.hold()
        calls: dict[str, Callable[[], Any]] = {
            "lookup": lambda: prefixes.lookup([key[::-1] for key in keys[:1]]),
            "load": lambda: prefixes.load(pages(2), keys[:2]),
            "save": lambda: prefixes.save(pages(40), keys) and 0,
        }
        try:
            assert not calls[call]()
        finally:
            bucket.release()


@pytest.mark.parametrize("name", ["shared", "by_layer"])
def test_terms_of_engines_are_refused(name: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    terms = {"folder": str(tmp_path), name: True}
    with pytest.raises(InvalidTerms, match=name):
        check_terms(terms)
    with pytest.raises(InvalidTerms, match="terms"):
        check_terms(str(tmp_path))  # type: ignore[arg-type]
    assert check_terms({"folder": str(tmp_path)}).block_size == 64
