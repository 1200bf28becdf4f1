# SPDX-License-Identifier: Apache-2.0
"""Objects that threads wait for with a limit: no wait is longer than it."""

from __future__ import annotations

import threading
from queue import Empty

import pytest
from support.waits import LIMIT

from portakv.runtime.inbox import Inbox


def test_the_oldest_comes_first() -> None:
    inbox = Inbox[int | None]()
    for each in (1, None, 3):
        inbox.put(each)
    assert [inbox.get(), inbox.get(1.0), inbox.get_nowait()] == [1, None, 3]


def test_an_empty_inbox_raises() -> None:
    inbox = Inbox[int]()
    for call in (inbox.get_nowait, lambda: inbox.get(0.0), lambda: inbox.get(1e-3)):
        with pytest.raises(Empty):
            call()


def test_a_thread_that_waits_gets_what_comes() -> None:
    inbox = Inbox[int]()
    seen = list[int]()
    threads = [threading.Thread(target=lambda: seen.append(inbox.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for each in range(3):  # several may come before the first thread wakes
        inbox.put(each)
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(seen) == [0, 1, 2]


def test_no_object_is_lost_between_many_threads() -> None:
    inbox = Inbox[int]()
    seen = list[int]()

    def take() -> None:
        while (item := inbox.get(LIMIT)) >= 0:
            seen.append(item)

    takers = [threading.Thread(target=take) for _ in range(4)]

    def give(first: int) -> None:
        for each in range(first, first + 1000):
            inbox.put(each)

    givers = [threading.Thread(target=give, args=(n * 1000,)) for n in range(4)]
    for thread in (*takers, *givers):
        thread.start()
    for thread in givers:
        thread.join(LIMIT)
    for _ in takers:
        inbox.put(-1)
    for thread in takers:
        thread.join(LIMIT)
    assert sorted(seen) == [*range(4000)]


def test_a_wait_that_is_over_before_it_begins_ends() -> None:
    """`queue.SimpleQueue` waits for ever here after some thousand rounds, before Python 3.13."""
    inbox = Inbox[int]()

    def work() -> None:
        for each in range(50_000):
            inbox.put(each)
            inbox.get()
            with pytest.raises(Empty):
                inbox.get(timeout=1e-9)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive()
