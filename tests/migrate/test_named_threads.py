# SPDX-License-Identifier: Apache-2.0
"""Pulls by names that several threads make by one reader."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from secrets import token_bytes
from typing import Any

import pytest
import torch
from support.migrate_pulls import SMALL, Rows, Sides, sides
from support.waits import LIMIT

from portakv.errors import TransferTimeout
from portakv.migrate import Reader, Ticket
from portakv.migrate.pull import Pull
from portakv.migrate.reader import Finder

THREADS = 4
PULLS = 60  # of each thread
TOKENS = 16


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


@pytest.fixture(params=["mapped", "staging"])
def terms(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return how an owner's rows cross."""
    return {"expose": "staging", "staging": SMALL} if request.param == "staging" else {}


@pytest.fixture(params=["guard", "control"])
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a pull that has not begun is not over; without that it counts as begun."""
    if request.param == "guard":
        return True
    monkeypatch.setattr(Pull, "begun", property(lambda _: True, lambda *_: None))
    return False


def connected(made: Sides, src: Rows, dst: Rows, **terms: Any) -> tuple[Reader, Any]:
    """Return a reader and an owner that it is connected to."""
    owner = made.owner(src.shard, **terms)
    reader: Reader = made.reader(dst.shard)
    reader.prepare(owner.channel.address).synchronize(LIMIT)
    return reader, owner


def test_a_pull_that_has_not_begun_is_not_over(
    made: Sides, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The next call looks at the pull of a call that still asks for its offer."""
    reader, owner = connected(made, Rows(), Rows(fill=-1))
    asks = threading.Event()
    goes_on = threading.Event()
    find_now = Finder.find_now

    def slow(self: Finder, wanted: Any) -> bool:
        if not asks.is_set():
            asks.set()
            goes_on.wait(LIMIT)
        return find_now(self, wanted)

    monkeypatch.setattr(Finder, "find_now", slow)

    def pull() -> Pull:
        ticket = Ticket.of(owner.channel.address, owner.epoch, token_bytes(16))
        return reader.pull(ticket, [0], timeout=1.0)

    pulls = list[Pull]()
    thread = threading.Thread(target=lambda: pulls.append(pull()))
    thread.start()
    assert asks.wait(LIMIT)
    pull().cancel()
    goes_on.set()
    thread.join(LIMIT)
    if guarded:
        with pytest.raises(TransferTimeout):
            pulls[0].synchronize(LIMIT)
    else:
        pulls[0].synchronize(LIMIT)  # although no offer exists
    assert pulls[0].published is not guarded


def test_rows_are_there_after_pulls_of_several_threads(made: Sides, terms: dict[str, Any]) -> None:
    src = Rows()
    dst = Rows(fill=-1)
    reader, owner = connected(made, src, dst, **terms)
    wrong = list[int]()

    def work(block: int) -> None:
        for _ in range(PULLS):
            dst.whole[:, :, block] = -1
            name = token_bytes(16)
            ticket = Ticket.of(owner.channel.address, owner.epoch, name)
            pulled = reader.pull(ticket, [block], timeout=LIMIT)
            owner.offer([block], tokens=TOKENS, name=name, lease=LIMIT)
            pulled.synchronize(LIMIT)
            if not torch.equal(src.rows([block], TOKENS), dst.rows([block], TOKENS)):
                wrong.append(block)

    with ThreadPoolExecutor(THREADS) as pool:
        assert [*pool.map(work, range(THREADS))] == [None] * THREADS
    assert not wrong


def test_a_call_asks_after_one_that_was_interrupted(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pull never begins, and no later one waits for it."""
    reader, owner = connected(made, Rows(), Rows(fill=-1))
    find_now = Finder.find_now
    asked = list[Any]()

    def interrupted(self: Finder, wanted: Any) -> bool:
        asked.append(wanted)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return find_now(self, wanted)

    monkeypatch.setattr(Finder, "find_now", interrupted)
    ticket = Ticket.of(owner.channel.address, owner.epoch, token_bytes(16))
    with pytest.raises(KeyboardInterrupt) as kept:
        reader.pull(ticket, [0], timeout=LIMIT)
    reader.pull(ticket, [0], timeout=LIMIT).cancel()
    assert len(asked) == 2
    del kept
