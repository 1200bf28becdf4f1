# SPDX-License-Identifier: Apache-2.0
"""Transfers and completions: what is in flight, its errors, waiting with a limit, events and status
words under any settings of torch; when slices start, of which `tests/copy` judges the rest."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.ambient import STATES
from support.connector_cases import make_caches, make_chunk, rows
from support.guarded_memory import refused, same
from support.small_backends import small_backend
from support.waits import LIMIT

from portakv import AdaptiveConnector, Transfer, register_backend
from portakv.errors import (
    InvalidTerms,
    PortaKVError,
    SlotError,
    TransferError,
    TransferTimeout,
)
from portakv.registry import registry
from portakv.runtime import transfer
from portakv.runtime.streams import own_stream
from portakv.runtime.transfer import Completion, EventPool, StatusWord, acquire_word, any_late_error


class Later:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.waited = 0

    def done(self) -> bool:
        return self.ended

    def wait(self) -> None:
        self.waited += 1
        self.ended = True


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in flight, and words are had without a device, in memory that is not pinned."""
    monkeypatch.setattr(transfer, "in_flight", type(transfer.in_flight)())
    monkeypatch.setattr(transfer, "failed", [])
    monkeypatch.setattr(transfer, "UNCHECKED", 4)
    batch = torch.zeros(64, dtype=torch.int64)
    free = deque[StatusWord]()
    free.extend(StatusWord(batch[i : i + 1], free) for i in range(64))
    monkeypatch.setattr(transfer, "free_words", free)
    monkeypatch.setattr(transfer, "word_batches", [batch.numpy()])


def begun(owner: Any = None) -> tuple[Later, StatusWord, Completion]:
    work = Later()
    word = acquire_word()
    completion = Completion(pendings=[work], words=[(word, 10)])
    transfer.hold(completion, owner)
    return work, word, completion


def bad(word: StatusWord, position: int) -> None:
    word.value[0] = position + 1


@pytest.mark.usefixtures("apart")
def test_what_no_stream_orders_is_told() -> None:
    assert Transfer().ordered, "it ended with the call"
    assert not Transfer([begun()[2]]).ordered
    assert Transfer([Completion()]).ordered


@pytest.mark.usefixtures("apart")
def test_words_come_back_once_their_work_has_ended() -> None:
    works = [begun()[0] for _ in range(12)]
    assert len(transfer.free_words) == 64 - 12
    for work in works:
        work.ended = True
    for _ in range(4):
        begun()
    assert len(transfer.in_flight) == 8  # two went for each that came
    for _ in range(4):
        begun()
    assert len(transfer.in_flight) == 8  # the oldest has not ended


@pytest.mark.usefixtures("apart")
def test_an_error_is_told_to_its_owner_once_and_to_nobody_else() -> None:
    first_owner = weakref.ref(first := Later())
    second_owner = weakref.ref(second := Later())
    begun(first_owner)
    work, word, _ = begun(second_owner)
    assert not any_late_error()
    bad(word, 3)
    assert any_late_error()
    assert transfer.unreported_error(first_owner) is None
    error = transfer.unreported_error(second_owner)
    assert isinstance(error, SlotError)
    assert "Position 13 " in str(error)
    assert transfer.unreported_error(second_owner) is None
    work.ended = True
    # The work has ended, so its word is put back.
    assert transfer.unreported_error(second_owner) is None
    assert not any_late_error()
    assert first is not second


@pytest.mark.usefixtures("apart")
def test_an_error_outlives_the_queue() -> None:
    owner = weakref.ref(one := Later())
    work, word, _ = begun(owner)
    bad(word, 0)
    work.ended = True
    for _ in range(9):
        begun()[0].ended = True
    assert not any(batch.any() for batch in transfer.word_batches)
    assert any_late_error()
    assert "Position 10 " in str(transfer.unreported_error(owner))
    assert transfer.unreported_error(owner) is None
    assert not any_late_error()
    assert one


@pytest.mark.usefixtures("apart")
def test_errors_of_an_owner_that_is_gone_are_dropped() -> None:
    owner = weakref.ref(one := Later())
    transfer.failed.append(Completion(error=SlotError("an error")))
    transfer.failed[0].owner = owner
    del one
    gc.collect()
    assert any_late_error()
    assert transfer.unreported_error(None) is None
    assert not any_late_error()


def overflow() -> PortaKVError:
    return SlotError("a block does not fit")


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("late", [True, False])
def test_errors_that_handles_report_are_not_retained(late: bool) -> None:
    """``late``: the work reports its error at its end; else a word has it."""
    owner = weakref.ref(one := Later())
    for first in (owner, None):
        for _ in range(3):
            work, word, completion = begun(first)
            if late:
                completion.late_error = overflow
            else:
                bad(word, 3)
            work.ended = True
            assert completion.ended()
            assert any_late_error() is (first is owner), "the control: an owner may still ask"
            with pytest.raises(SlotError):
                Transfer([completion]).synchronize()
            assert not transfer.failed
    assert one


@pytest.mark.usefixtures("apart")
def test_a_dropped_error_without_an_owner_is_not_retained() -> None:
    owner = weakref.ref(one := Later())
    gone = weakref.ref(Later())
    for first in (None, gone, owner):
        work, _, completion = begun(first)
        completion.late_error = overflow
        work.ended = True
        assert completion.ended()
    assert [each.owner for each in transfer.failed] == [owner]
    assert one


# Work that no stream orders: a transfer waits for it, and what it touches stays.


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Register a backend ``later``, whose launches return this, alone in a separate registry."""
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    pending = Later()
    backend = small_backend("later", pending=pending)
    register_backend("later", backend)
    registry.choose("cpu", "later")  # its self-check waits as well
    # It keeps nothing: views are what these tests are about.
    backend.launches = deque(maxlen=0)  # type: ignore[assignment]
    pending.ended = False
    pending.waited = 0
    return pending


def start() -> tuple[Transfer, list[Callable[[], object]]]:
    """A transfer, and weak references to what it reads and writes."""
    caches = make_caches()
    chunk = make_chunk(3)
    slots = torch.tensor([4, 1, 9])
    refs: list[Callable[[], object]] = [weakref.ref(x) for x in (*caches, slots, chunk)]
    transfer = AdaptiveConnector("cpu", backend="later").from_gpu(chunk, caches, slots)
    assert same(chunk, rows(caches, [4, 1, 9]))
    return transfer, refs


@pytest.mark.parametrize("how", ["synchronize", "wait", "done"])
def test_a_transfer_ends_when_its_work_does(later: Later, how: str) -> None:
    transfer, _ = start()
    assert not transfer.done()
    if how == "done":
        later.ended = True
    else:
        getattr(transfer, how)()
        assert later.waited == 1
    assert transfer.done()


@pytest.mark.parametrize("retained", [True, False])
def test_views_and_ids_are_held_until_the_end_also_of_a_transfer_that_nobody_kept(
    later: Later, retained: bool
) -> None:
    transfer, refs = start()
    if not retained:
        del transfer
    gc.collect()
    assert all(ref() is not None for ref in refs), "memory was freed below a copy in flight"
    if retained:
        transfer.synchronize()
        gc.collect()
        assert not any(ref() is not None for ref in refs)


def test_a_batch_waits_for_all_of_its_work(later: Later) -> None:
    caches = make_caches()
    chunks = [make_chunk(3), make_chunk(2)]
    connector = AdaptiveConnector("cpu", backend="later")
    transfer = connector.batched_from_gpu(chunks, caches, [4, 1, 9, 2, 3], [0, 3], [3, 5])
    assert not transfer.done()
    transfer.synchronize()
    assert later.waited == 2
    assert transfer.done()


# Waiting with a limit, and what is shown of a transfer


def test_waiting_with_a_limit(later: Later) -> None:
    transfer = start()[0]
    with refused(TransferTimeout, "timed out after 0.01 s, and goes on. Wait again"):
        transfer.synchronize(timeout=0.01)
    for timeout in ("soon", float("nan"), -1, 1j):
        with refused(InvalidTerms, "Expected timeout to be", "0 or more, or None for no limit"):
            transfer.synchronize(timeout=timeout)  # type: ignore[arg-type]
    for stream in ("soon", 0, torch.device("cpu")):
        with refused(InvalidTerms, "Expected stream to be a stream of torch"):
            transfer.wait(stream)  # type: ignore[arg-type]
    assert issubclass(TransferTimeout, TimeoutError)
    assert issubclass(TransferTimeout, TransferError)
    ending = threading.Timer(0.05, lambda: setattr(later, "ended", True))
    ending.start()
    transfer.synchronize(timeout=LIMIT)
    ending.join()
    transfer.synchronize(timeout=0)
    assert later.waited <= 2  # it is never left to wait without a limit
    transfer.synchronize(timeout=np.float32(1))
    transfer.synchronize(timeout=10**400)
    assert transfer.done()


@pytest.mark.usefixtures("apart")
def test_waiting_with_a_limit_raises_what_the_work_met() -> None:
    work, word, completion = begun()
    waiting = Transfer([completion])
    bad(word, 3)
    work.ended = True
    with pytest.raises(SlotError, match="Position 13 "):
        waiting.synchronize(timeout=1.0)


def test_a_transfer_shows_what_is_known_of_it(later: Later) -> None:
    transfer, _ = start()
    assert repr(transfer) == "<BlockTransfer by later, not seen to have ended>"
    later.ended = True
    assert "not seen" in repr(transfer)  # which asks nothing: a graph may be being captured
    transfer.synchronize()
    assert repr(transfer) == "<BlockTransfer by later, ended>"
    assert repr(Transfer(carried=("reference", "it runs everywhere"))) == (
        "<Transfer by reference, ended>"
    )
    failed = Transfer([Completion(error=SlotError("no")), Completion()])
    assert repr(failed) == "<Transfer, failed with SlotError>"
    standing = Completion()
    standing.standing = True
    captured = Transfer([standing])
    assert repr(captured) == "<Transfer, captured into a graph>"


# What torch is set to


@pytest.mark.parametrize("state", STATES)
def test_words_and_events_are_made_under_any_settings(
    state: str, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("free_words", "word_batches"):
        monkeypatch.setattr(transfer, name, type(getattr(transfer, name))())
    with STATES[state](accelerator):
        word = acquire_word()
        pool = EventPool(accelerator)
        stream = own_stream(accelerator)
        completion = Completion(pool.recorded(stream), words=[(word, 0)], pool=pool)
        completion.synchronize()
        assert completion.settled
    assert (word.tensor.dtype, word.tensor.device) == (torch.int64, torch.device("cpu"))
    assert word.tensor.is_pinned()
    word.tensor += 2  # a launch may write it by torch, whatever the mode in which it was made
    assert any_late_error()
    assert word.value[0] == 2
    word.value[0] = 0


@pytest.mark.parametrize("how", ["wait", "synchronize"])
def test_an_event_that_was_given_back_meanwhile_is_not_waited_for(how: str) -> None:
    """While one thread waits for work of the host, another may see the end of all of it."""
    event = Mock()
    pool = EventPool(torch.device("cpu"))
    later = Later()
    completion = Completion(event, [later], pool=pool)
    wait = later.wait

    def waited() -> None:
        wait()
        assert completion.ended()  # as another thread's question would find
        assert pool.acquire() is event  # which the next transfer records

    later.wait = waited  # type: ignore[method-assign]
    getattr(completion, how)(*[None] * (how == "wait"))
    assert not event.wait.called
    assert not event.synchronize.called


class Slow:
    """An event that ends while a thread blocks until it, and not before."""

    def __init__(self) -> None:
        self.blocked = threading.Event()
        self.go = threading.Event()

    def query(self) -> bool:
        return self.blocked.is_set()

    def synchronize(self) -> None:
        self.blocked.set()
        assert self.go.wait(LIMIT)


def test_no_other_work_gets_an_event_that_a_thread_waits_for() -> None:
    """It would wait for that work, which may never end."""
    pool = EventPool(torch.device("cpu"))
    event: Any = Slow()
    completion = Completion(event, pool=pool)
    thread = threading.Thread(target=completion.synchronize)
    thread.start()
    assert event.blocked.wait(LIMIT)
    assert completion.ended()  # seen by another thread, such as one that looks at held memory
    assert pool.acquire() is not event
    event.go.set()
    thread.join(LIMIT)
    assert pool.acquire() is event  # the thread waits no more
    alone: Any = Slow()
    alone.blocked.set()
    assert Completion(alone, pool=pool).ended()
    assert pool.acquire() is alone  # the control: nobody waited


def test_events_are_used_again(accelerator: torch.device) -> None:
    pool = EventPool(accelerator)
    first = pool.recorded(None)
    first.synchronize()
    pool.release(first)
    assert pool.recorded(own_stream(accelerator)) is first
    assert pool.acquire() is not first
