# SPDX-License-Identifier: Apache-2.0
"""What a channel does after an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.migrate_channels import Ping, Pong, Server, server_and_asker
from support.waits import LIMIT

from portakv.errors import PeerError, TransferTimeout
from portakv.migrate.channel import Channel
from portakv.tasks import runtime


@pytest.fixture
def both() -> Iterator[tuple[Server, Channel]]:
    with server_and_asker(None) as those:
        yield those


@pytest.mark.parametrize("guarded", [True, False])
def test_what_follows_an_answer_does_not_delay_it(
    both: tuple[Server, Channel], guarded: bool
) -> None:
    server, asker = both
    answered = threading.Event()
    ran = threading.Event()
    waited = list[bool]()

    def follow() -> None:
        waited.append(answered.wait(LIMIT if guarded else 3.0))
        ran.set()

    def answer(_: Any, ping: Ping) -> Pong:
        if guarded:
            runtime().call_soon(follow)
        else:
            follow()
        return Pong(ping.data)

    server.channel.serve(Ping, answer)
    try:
        asker.ask(server.address, Ping(b"a"), Pong, LIMIT if guarded else 1.0)
    except (TransferTimeout, PeerError):
        assert not guarded
    else:
        assert guarded
    answered.set()
    assert ran.wait(LIMIT)
    assert waited == [True] or not guarded


@pytest.mark.parametrize("pause", [60_000, 20])
def test_a_question_for_a_moment_ends_after_it(monkeypatch: pytest.MonkeyPatch, pause: int) -> None:
    """Also if a requester looks seldom at its connection."""
    monkeypatch.setattr("portakv.migrate.channel.LOOK", pause)
    with server_and_asker(None) as (server, asker):
        release = threading.Event()
        answer: Any = lambda *_: release.wait(LIMIT) and Pong()  # noqa: E731
        assert asker.ask(server.address, Ping(b"up"), Pong).data == b"up"
        server.channel.serve(Ping, answer)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(asker.ask, server.address, Ping(), Pong, 1e-3)
            # A busy machine may not hear of the connection within the moment.
            assert isinstance(asked.exception(20), (TransferTimeout, PeerError))
            release.set()
            assert isinstance(asker.ask(server.address, Ping(), Pong, 20.0), Pong)


def test_a_request_behind_one_that_lost_its_connection_is_an_error_of_the_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first requester closes the connection while the second one waits for it."""
    monkeypatch.setattr("portakv.migrate.channel.LOOK", 60_000)
    with server_and_asker(None) as (server, asker):
        asked = threading.Event()
        assert asker.ask(server.address, Ping(b"up"), Pong).data == b"up"
        server.channel.serve(Ping, lambda *_: asked.set())
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(asker.ask, server.address, Ping(), Pong, 1.0)
            assert asked.wait(LIMIT)
            second = pool.submit(asker.ask, server.address, Ping(), Pong, LIMIT)
            server.channel.close()
            assert isinstance(first.exception(LIMIT), PeerError)
            assert isinstance(second.exception(LIMIT), PeerError)
