# SPDX-License-Identifier: Apache-2.0
"""Limits of time hold against owners that are stopped, lie, or are busy for ever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.migrate_pulls import channel_of, elsewhere
from support.waits import LIMIT

from portakv import KVView
from portakv.errors import InvalidTerms, PeerError, PortaKVError, TransferError, TransferTimeout
from portakv.migrate import Channel, Owner, Reader, Shard, shared_empty
from portakv.migrate.messages import Answer, Gather, Handshake, Hello
from portakv.migrate.pull import Pull
from portakv.tasks import Wait, runtime

SECRET = b"of both sides, 16 bytes or more"


def caches(shared: bool = True) -> Shard:
    make: Any = shared_empty if shared else torch.zeros
    tensors = [make((2, 8, 16, 2, 8), dtype=torch.float16) for _ in range(2)]
    return Shard(KVView(tensors, "vllm-nhd"))


@pytest.fixture
def staged() -> Iterator[tuple[Owner, Reader, bytes]]:
    """An owner that brings rows, its reader, whose channel waits longer than any test, and a
    ticket."""
    with closing(Channel()) as here, closing(Channel(timeout=2 * LIMIT)) as there:
        owner = Owner(here, caches(), model="m", expose="staging")
        reader = Reader(there, caches(False), model="m", transport="distributed")
        yield owner, reader, owner.offer([0, 1], tokens=20).ticket
        reader.close()
        owner.close()


def handshake_of(owner: Owner) -> Handshake:
    """Return what an owner answers to a reader that it maps for."""
    with closing(Channel()) as asker:
        return asker.ask(owner.channel.address, Hello("m"), Handshake)


def ends(pulled: Pull) -> bool:
    """Return whether a pull ends with an error, before a wait for it does."""
    with pytest.raises(TransferError):
        pulled.synchronize(LIMIT)
    return pulled.ended


@pytest.mark.parametrize("seconds", [1e6, float("nan"), 0.0])
def test_an_owner_that_is_busy_for_ever_ends_with_the_pull_s_time(
    staged: tuple[Owner, Reader, bytes], seconds: float
) -> None:
    owner, reader, ticket = staged
    owner.channel.serve(Gather, lambda *_: Answer("busy", seconds=seconds))
    pulled = reader.pull(ticket, [2, 3], timeout=0.5)
    assert ends(pulled)
    assert not pulled.published


def test_an_owner_that_never_answers_ends_with_the_pull_s_time(
    staged: tuple[Owner, Reader, bytes],
) -> None:
    owner, reader, ticket = staged
    owner.channel.serve(Gather, lambda *_: None)
    pulled = reader.pull(ticket, [2, 3], timeout=0.5)
    assert ends(pulled)


def test_a_reader_closes_while_its_owner_is_busy_for_ever(
    staged: tuple[Owner, Reader, bytes],
) -> None:
    owner, reader, ticket = staged
    owner.channel.serve(Gather, lambda *_: Answer("busy", seconds=1e6))
    pulled = reader.pull(ticket, [2, 3])
    reader.close()
    assert pulled.ended
    assert not pulled.published


@pytest.mark.parametrize("slots", [0, 65])
def test_an_owner_without_staging_buffers_is_refused(
    staged: tuple[Owner, Reader, bytes], slots: int
) -> None:
    owner, reader, ticket = staged
    handshake = handshake_of(owner)
    owner.channel.serve(Hello, lambda *_: replace(handshake, slots=slots))
    with pytest.raises(PeerError, match="Expected 1 to 64 staging buffers"):
        reader.pull(ticket, [2, 3], timeout=LIMIT).synchronize(LIMIT)


def test_a_second_answer_that_is_not_a_welcome_is_refused(
    staged: tuple[Owner, Reader, bytes],
) -> None:
    owner, reader, ticket = staged
    handshake = handshake_of(owner)
    owner.channel.serve(Hello, lambda _, hello: Answer("held") if hello.transport else handshake)
    with pytest.raises(PortaKVError):
        reader.pull(ticket, [2, 3], timeout=LIMIT).synchronize(LIMIT)


def test_regions_without_addresses_are_the_owner_s_error(
    staged: tuple[Owner, Reader, bytes],
) -> None:
    owner, reader, ticket = staged
    handshake = handshake_of(owner)

    regions = tuple(replace(region, nbytes=1 << 48) for region in handshake.regions)
    owner.channel.serve(Hello, lambda *_: replace(handshake, regions=regions))
    with pytest.raises(PeerError, match="Expected regions of memory"):
        reader.pull(ticket, [2, 3], timeout=LIMIT).synchronize(LIMIT)


def test_the_time_of_a_pull_counts_from_the_call() -> None:
    """The owner's port is open, and nothing there ever answers: pairing is part of the pull."""
    with (
        socket.create_server(("127.0.0.1", 0)) as stopped,
        closing(Channel("tcp://127.0.0.1:0", secret=SECRET)) as here,
        closing(Channel(secret=SECRET, timeout=2 * LIMIT)) as there,
    ):
        here.address = f"tcp://127.0.0.1:{stopped.getsockname()[1]}"
        owner = Owner(here, caches(), model="m")
        reader = Reader(there, caches(), model="m")
        ticket = owner.offer([0, 1], tokens=20).ticket
        assert ends(reader.pull(ticket, [2, 3], timeout=0.5))
        reader.close()
        owner.close()


@pytest.mark.parametrize("terms", [{}, {"by_layer": True, "verify": True}])
def test_an_owner_that_stops_answering_ends_with_the_pull_s_time(
    staged: tuple[Owner, Reader, bytes], terms: Any
) -> None:
    """No question about its offers is waited for longer than half a second after that time."""
    owner, reader, ticket = staged
    reader.pull(ticket, [2, 3], timeout=10.0).synchronize()
    ticket = owner.offer([0, 1], tokens=20, lease=0.15).ticket  # it is renewed after 0.05 seconds
    owner.channel.serve(Gather, lambda *_: Answer("busy", seconds=0.05))
    over = list[float]()  # seconds after the pull's time until which each question waits
    until = time.monotonic() + 0.3

    async def wait(questions: Any, kind: Any, seconds: float) -> list[PortaKVError]:
        if questions:
            over.append(time.monotonic() + seconds - until)
            await Wait(until=runtime().time() + seconds)
        return [TransferTimeout("no answer") for _ in questions]

    reader.channel.answers = wait  # type: ignore[assignment]
    with pytest.raises(TransferError):
        reader.pull(ticket, [2, 3], timeout=0.3, **terms).synchronize()
    assert over
    assert max(over) < 0.7


def test_two_pulls_of_a_stopped_owner_wait_for_their_own_times() -> None:
    """The second waits for the handshake of the first, which may last longer."""
    with (
        elsewhere() as used,
        closing(channel_of(used, "tcp://127.0.0.1:0", secret=SECRET)) as here,
        closing(Channel(secret=SECRET, timeout=2 * LIMIT)) as there,
    ):
        owner = Owner(here, caches(), model="m")
        reader = Reader(there, caches(), model="m")
        ticket = owner.offer([0, 1], tokens=20).ticket
        release = threading.Event()
        here.serve(Hello, lambda *_: release.wait(LIMIT) and None)  # type: ignore[arg-type]
        longer = reader.pull(ticket, [2, 3], timeout=LIMIT)
        time.sleep(0.3)
        with pytest.raises(TransferTimeout):
            reader.pull(ticket, [2, 3], timeout=0.3).synchronize(LIMIT)
        assert not longer.ended
        release.set()
        longer.cancel()
        assert ends(longer)
        reader.close()
        owner.close()


@pytest.mark.parametrize("timeout", [float("nan"), -1, "5", True])
def test_a_time_that_is_none_is_refused(staged: tuple[Owner, Reader, bytes], timeout: Any) -> None:
    _, reader, ticket = staged
    with pytest.raises(InvalidTerms, match="Expected timeout"):
        reader.pull(ticket, [2, 3], timeout=timeout)
