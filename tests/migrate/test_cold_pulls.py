# SPDX-License-Identifier: Apache-2.0
"""Pulls from owners that are not connected yet, while other owners are stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from time import sleep

import pytest
import torch
from support.migrate_nursery import Nursery
from support.migrate_pulls import MODEL, Couple, Rows, Sides, sides
from support.stopping import go_on, stop
from support.waits import LIMIT, until

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    PeerError,
    SlotError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.migrate import Reader, Ticket
from portakv.migrate.messages import Handshake, Hello
from portakv.migrate.pull import PartTransfer
from portakv.migrate.reader import LONG
from portakv.tasks.runtime import BLOCKING

NAME = bytes(range(16))
#: Preparations for one owner.
MANY = 32
OWNER = """
from support.migrate_pulls import *
made, rows = Sides(), Rows()
owner = made.owner(rows.shard)
tell((owner.channel.address, [owner.offer([1, 2], tokens=32).ticket for _ in range(4)]))
"""


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as those:
        yield those


def error_of(reader: Reader, ticket: bytes, timeout: float) -> Exception:
    """Return the error of a renewal that fails."""
    with pytest.raises(TransferError) as caught:
        reader.extend(ticket, 5.0, timeout=timeout)
    return caught.value


@contextmanager
def stopped(nursery: Nursery, count: int) -> Iterator[list[tuple[str, list[bytes]]]]:
    """Yield the addresses and tickets of stopped owners; they end afterwards."""
    born = [nursery.born(OWNER) for _ in range(count)]
    with ExitStack() as stack:
        for pid, _ in born:
            stack.callback(nursery.end, pid)
            stop(pid)
        yield [said for _, said in born]


def couple(made: Sides, timeout: float = LIMIT) -> Couple:
    """Return an owner and a reader whose handshakes with stopped owners last so many seconds."""
    both = Couple(made)
    both.reader.channel.timeout = timeout
    return both


def begun(reader: Reader, owners: list[tuple[str, list[bytes]]]) -> list[PartTransfer]:
    """Prepare for stopped owners, and return the ends when the handshakes are under way."""
    before = reader.channel.statistics()["links"]
    hung = [reader.prepare(address) for address, _ in owners]
    assert until(lambda: reader.channel.statistics()["links"] == before + len(owners))
    sleep(0.1)
    return hung


@pytest.mark.parametrize("count", [1, 2])
def test_a_stopped_owner_delays_no_handshake_with_another(
    made: Sides, nursery: Nursery, count: int
) -> None:
    both = couple(made)
    offer = both.offer()
    with stopped(nursery, count) as owners:
        hung = begun(both.reader, owners)
        both.pull(offer).synchronize(LIMIT)
        assert not any(each.done() for each in hung)
        assert both.right()
    for each in hung:
        with pytest.raises(PeerError):
            each.synchronize(LIMIT)


def test_handshakes_with_stopped_owners_occupy_no_thread_that_copies(
    made: Sides, nursery: Nursery
) -> None:
    blocks = 2 * LONG // Rows(1).whole.nbytes
    src = Rows(blocks)
    dst = Rows(blocks, fill=-1)
    owner = made.owner(src.shard)
    reader = made.reader(dst.shard, timeout=LIMIT)
    reader.prepare(owner.channel.address).synchronize(LIMIT)
    offer = owner.offer(range(blocks), tokens=16 * blocks)
    with stopped(nursery, BLOCKING) as owners:
        hung = begun(reader, owners)
        pulled = reader.pull(offer.ticket, range(blocks))
        assert until(lambda: pulled.slices or pulled.ended)  # threads copy: it is long
        pulled.synchronize(LIMIT)
        assert not any(each.done() for each in hung)
        assert torch.equal(dst.whole, src.whole)


def test_a_pull_of_a_stopped_owner_does_not_block_its_call(made: Sides, nursery: Nursery) -> None:
    both = couple(made)
    with stopped(nursery, 1) as [(_, tickets)]:
        pulled = both.reader.pull(tickets[0], [3], timeout=0.3)
        with pytest.raises(TransferTimeout, match="The handshake of the pull timed out"):
            pulled.synchronize(LIMIT)
        assert isinstance(pulled.error, TransferTimeout)
        pulled = both.reader.pull(tickets[1], [3])
        assert pulled.cancel()
        with pytest.raises(TransferCancelled):
            pulled.synchronize(LIMIT)
    assert (both.dst.whole == -1).all()


def test_a_renewal_with_a_stopped_owner_ends_by_its_timeout(made: Sides, nursery: Nursery) -> None:
    """Also after the handshake of another thread, and if the owner is connected."""
    both = couple(made)
    with stopped(nursery, 1) as [(address, tickets)]:
        hung = begun(both.reader, [(address, tickets)])
        error = error_of(both.reader, tickets[0], timeout=0.3)
        assert isinstance(error, TransferTimeout)
        assert not any(each.done() for each in hung)

    both = couple(made)
    with stopped(nursery, 1) as [(_, tickets)]:
        assert isinstance(error_of(both.reader, tickets[0], timeout=0.3), PeerError)

    pid, (_, tickets) = nursery.born(OWNER)
    assert both.reader.extend(tickets[0], 20.0) > 19
    stop(pid)
    error = error_of(both.reader, tickets[0], timeout=0.3)
    assert isinstance(error, TransferTimeout)
    assert "the connection stands" in str(error)
    nursery.end(pid)


def test_a_renewal_waits_for_an_owner_that_goes_on(made: Sides, nursery: Nursery) -> None:
    """The test above shows something: without a timeout the call waits as long as the owner."""
    both = couple(made)
    pid, (_, tickets) = nursery.born(OWNER)
    stop(pid)
    with ThreadPoolExecutor(1) as pool:
        renewed = pool.submit(both.reader.extend, tickets[0], 20.0)
        sleep(0.5)
        assert not renewed.done()
        go_on(pid)
        assert renewed.result(LIMIT) > 19
    nursery.end(pid)


def test_a_pull_ends_with_the_error_of_its_own_handshake(made: Sides, nursery: Nursery) -> None:
    """A handshake that began before the pull may fail before the owner goes on."""
    both = couple(made, timeout=0.5)
    with stopped(nursery, 1) as [(address, tickets)]:
        prepared = both.reader.prepare(address)
        pulled = both.reader.pull(tickets[0], [3])
        with pytest.raises((PeerError, TransferTimeout)):
            prepared.synchronize(LIMIT)
        with pytest.raises((PeerError, TransferTimeout)):
            pulled.synchronize(LIMIT)


@pytest.mark.parametrize("named", [False, True])
def test_a_stopped_owner_gets_one_handshake(made: Sides, nursery: Nursery, named: bool) -> None:
    """Pulls and preparations of it share a handshake. Those of a third owner begin meanwhile."""
    both = couple(made)
    offer = both.offer(name=NAME) if named else both.offer()
    ticket = offer.ticket
    if named:
        ticket = Ticket.of(both.owner.channel.address, both.owner.epoch, NAME)
    with stopped(nursery, 1) as [(address, tickets)]:
        hung = [both.reader.prepare(address) for _ in range(MANY)]
        waiting = [both.reader.pull(each, [3]) for each in tickets]
        both.reader.pull(ticket, both.into).synchronize(LIMIT)
        assert not any(each.done() for each in hung)
        assert both.right()
        attempts = vars(vars(both.reader)["_owners"])["_attempts"]
        assert [key[0] for key in attempts].count(address) == 1
        assert not any(each.ended for each in waiting)
        for each in waiting:
            each.cancel()


def test_a_pull_goes_on_with_an_owner_that_goes_on(made: Sides, nursery: Nursery) -> None:
    both = couple(made)
    pid, (_, tickets) = nursery.born(OWNER)
    stop(pid)
    pulled = both.reader.pull(tickets[:1], [3], by_layer=True)
    sleep(0.1)
    assert not pulled.ended
    go_on(pid)
    for layer in pulled.layers:
        layer.synchronize(LIMIT)
    pulled.synchronize(LIMIT)
    assert torch.equal(both.dst.rows([3], 32), Rows().rows([1, 2], 32))
    nursery.end(pid)


@pytest.mark.parametrize("connected", [False, True])
def test_errors_of_arguments_are_raised_by_the_call(made: Sides, connected: bool) -> None:
    both = couple(made)
    if connected:
        both.reader.prepare(both.owner.channel.address).synchronize(LIMIT)
    ticket = both.offer().ticket
    other = both.owner.offer([1, 2], tokens=17).ticket
    for blocks in ([1, 2, 1], [1, 2, 8], [1, 2]):
        with pytest.raises(SlotError, match=r"\bblocks\b"):
            both.reader.pull(ticket, blocks)
    with pytest.raises(InvalidTerms, match="Expected first to be a token of the 75"):
        both.reader.pull(ticket, both.into, first=75)
    with pytest.raises(InvalidTerms, match="for the same tokens"):
        both.reader.pull([ticket, other], both.into)
    with pytest.raises(PeerError, match="not a ticket"):
        both.reader.pull([ticket, b"x" * 40], both.into)
    assert both.reader.statistics()["pulls"] == 0
    assert both.reader.statistics()["owners"] == connected


def test_another_model_is_an_error_of_the_pull(made: Sides) -> None:
    """Fault 19. By the fingerprint that the caller gives."""
    both = Couple(made)
    offer = both.offer()
    offer.revoke()
    pulled = made.reader(both.dst.shard, model="another").pull(offer.ticket, both.into)
    with pytest.raises(LayoutError, match="the owner's model is 'a model', the reader's 'another'"):
        pulled.synchronize(LIMIT)
    assert isinstance(pulled.error, LayoutError)


def test_a_handshake_that_outlives_its_reader_connects_nothing(made: Sides) -> None:
    both = couple(made)
    address = both.owner.channel.address
    handshake = both.reader.channel.ask(address, Hello(MODEL), Handshake)
    answered = threading.Event()
    requested = threading.Event()

    def late(*_: object) -> Handshake:
        requested.set()
        answered.wait(LIMIT)
        return handshake

    both.owner.channel.serve(Hello, late)
    prepared = both.reader.prepare(address)
    assert requested.wait(LIMIT)
    both.reader.close()
    answered.set()
    assert until(lambda: prepared.endings[0].done())
    assert both.reader.statistics()["owners"] == 0
    with pytest.raises(PeerError, match="one that is closed"):
        prepared.synchronize(LIMIT)
