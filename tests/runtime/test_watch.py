# SPDX-License-Identifier: Apache-2.0
"""Completions that nobody holds, and errors that nobody asked for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from portakv.errors import SlotError
from portakv.runtime import transfer, watch, words
from portakv.runtime.transfer import Completion


class _Work:
    """Work that ends when it is told to."""

    def __init__(self) -> None:
        self.ended = False

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.ended = True


class _Owner:
    pass


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_watched", type(watch._watched)())
    failed: list[Completion] = []
    monkeypatch.setattr(watch, "failed", failed)
    monkeypatch.setattr(transfer, "failed", failed)
    monkeypatch.setattr(watch, "_WATCHED", 4)


@pytest.fixture(autouse=True)
def _host_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words without a device, in memory that is not pinned."""
    import torch

    batch = torch.zeros(64, dtype=torch.int64)
    made = [words.Word(batch[i : i + 1]) for i in range(64)]
    monkeypatch.setattr(words, "_free", type(words._free)(made))
    monkeypatch.setattr(words, "_bytes", [batch.numpy()])


def _troubled() -> bool:
    """What a connector asks in each call."""
    return bool(transfer.failed) or words.any_set()


def begun(owner: Any = None) -> tuple[_Work, words.Word, Completion]:
    work, word = _Work(), words.acquire()
    completion = Completion(pendings=[work], words=[(word, 10)])
    watch.watch(completion, owner)
    return work, word, completion


def bad(word: words.Word, position: int) -> None:
    word._values[0] = position + 1


def test_words_come_back_once_their_work_has_ended() -> None:
    works = [begun()[0] for _ in range(12)]
    assert len(words._free) == 64 - 12
    for work in works:
        work.ended = True
    for _ in range(4):
        begun()
    assert len(watch._watched) == 8  # two went for each that came
    for _ in range(4):
        begun()
    assert len(watch._watched) == 8  # the oldest has not ended


def test_an_error_is_told_to_its_owner_once_and_to_nobody_else() -> None:
    mine, theirs = weakref.ref(one := _Owner()), weakref.ref(two := _Owner())
    begun(mine)
    work, word, _ = begun(theirs)
    assert not _troubled()
    bad(word, 3)
    assert _troubled()
    assert watch.unasked_error(mine) is None
    error = watch.unasked_error(theirs)
    assert isinstance(error, SlotError)
    assert "Position 13 " in str(error)
    assert watch.unasked_error(theirs) is None
    work.ended = True
    assert watch.unasked_error(theirs) is None  # it has ended, so that its word is put back
    assert not _troubled()
    assert one is not two


def test_an_error_outlives_the_queue() -> None:
    owner = weakref.ref(one := _Owner())
    work, word, _ = begun(owner)
    bad(word, 0)
    work.ended = True
    for _ in range(9):
        begun()[0].ended = True
    assert not words.any_set()
    assert _troubled()
    assert "Position 10 " in str(watch.unasked_error(owner))
    assert watch.unasked_error(owner) is None
    assert not _troubled()
    assert one


def test_an_error_that_was_told_by_its_handle_is_not_told_again() -> None:
    owner = weakref.ref(one := _Owner())
    work, word, completion = begun(owner)
    bad(word, 0)
    work.ended = True
    completion.synchronize()
    assert completion.take_error() is not None
    assert watch.unasked_error(owner) is None
    assert one


def test_errors_of_an_owner_that_is_gone_are_dropped() -> None:
    owner = weakref.ref(one := _Owner())
    watch.fail(Completion(error=SlotError("an error")), owner)
    del one
    gc.collect()
    assert _troubled()
    assert watch.unasked_error(None) is None
    assert not _troubled()
