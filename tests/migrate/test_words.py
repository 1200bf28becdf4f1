# SPDX-License-Identifier: Apache-2.0
"""Validity words: mapped pulls are committed by a word in shared memory, without a question."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.migrate_nursery import Nursery
from support.migrate_pulls import (
    MODEL,
    SMALL,
    Clock,
    Copies,
    Couple,
    Rows,
    Sides,
    key_of,
    sides,
    waiting_copies,
)
from support.named_memory import named_memory
from support.peer_cases import reading
from support.seeded_loop import run_seeded
from support.waits import LIMIT, until

from portakv import CopyPlan, InvalidTerms
from portakv.errors import (
    OfferGone,
    PeerError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.migrate import reader as housekeeping
from portakv.migrate import shared_memory
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.connections import Attempt, Connections, OwnerKey
from portakv.migrate.messages import Answer, Check, Close, Handshake, Hello, Renew, Ticket
from portakv.migrate.owner import Owner
from portakv.migrate.owner import Ticket as TicketByName
from portakv.migrate.pull import Pull
from portakv.migrate.reader import IDLE, Housekeeper, Wakes
from portakv.migrate.words import PLACES, Place, Words, WordsOfOwner, fence, open_page
from portakv.tasks import Runtime, Wait, runtime

SLOW = 2e-4  # 10^9 bytes a second: a pull of 75 tokens takes a tenth of a second
NEVER = 1e-9  # 10^9 bytes a second: a pull of 75 tokens takes hours


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


@pytest.fixture
def page() -> tuple[Words, WordsOfOwner]:
    """A page of words, as its owner and as a reader see it."""
    words = Words()
    return words, WordsOfOwner(words.export(shared_memory.SharedFiles()).handle)


# --- the page


def test_a_word_holds_until_its_end_and_then_says_why(page: tuple[Words, WordsOfOwner]) -> None:
    words, remote = page
    places = [words.take(os.urandom(16), ()) for _ in range(4)]
    assert [remote.state(place) for place in places] == ["held"] * 4
    for place, state in zip(places, ("expired", "revoked", "taken", "lost"), strict=True):
        words.end(place, state)
        assert remote.state(place) == state


def test_another_tag_at_a_place_never_holds(page: tuple[Words, WordsOfOwner]) -> None:
    words, remote = page
    place = words.take(os.urandom(16), ())
    for tag in (place.tag ^ 1, 0, -place.tag, place.tag << 1, 1 << 60):
        assert remote.state(Place(place.number, tag)) == "gone"
    words.end(place, "taken")
    for tag in (place.tag ^ 1, 0, -place.tag):
        assert remote.state(Place(place.number, tag)) == "gone"


def test_a_place_that_is_used_again_does_not_hold_for_its_last_offer() -> None:
    words = Words()
    remote = WordsOfOwner(words.export(shared_memory.SharedFiles()).handle)
    first = words.take(os.urandom(16), ())
    words.end(first, "taken")
    for _ in range(PLACES - 1):  # released places are used last
        assert words.take(os.urandom(16), ()).number != first.number
    assert remote.state(first) == "taken"
    again = words.take(os.urandom(16), ())
    assert (again.number, remote.state(again)) == (first.number, "held")
    assert remote.state(first) == "gone"


def test_places_that_an_interrupt_cut_off_are_used_again() -> None:
    words = Words()
    held = [words.take(os.urandom(16), ()) for _ in range(PLACES)]
    assert words.take(os.urandom(16), held[1:]).number == held[0].number


def test_places_in_use_are_not_listed_at_each_offer() -> None:
    """After a list without a free place, only an end makes another list worth its time."""
    words = Words(4)
    held = [words.take(os.urandom(16), ()) for _ in range(4)]
    lists = list[int]()

    def in_use() -> Iterator[Place]:
        lists.append(1)
        yield from held

    for _ in range(3):
        assert words.take(os.urandom(16), in_use()) == Place()
    assert len(lists) == 1
    words.end(Place(), "taken")  # it had no place
    assert words.take(os.urandom(16), in_use()) == Place()
    assert len(lists) == 1
    words.end(held[2], "taken")
    assert words.take(os.urandom(16), in_use()).number == held[2].number
    assert len(lists) == 1
    assert words.take(os.urandom(16), in_use()) == Place()
    assert len(lists) == 2


def test_a_tag_is_positive_and_leaves_bits_for_the_state() -> None:
    for data in (bytes(16), b"\xff" * 16):
        assert 0 < Place.of(3, data).tag < 1 << 60
    assert not WordsOfOwner.has(
        WordsOfOwner(Words().export(shared_memory.SharedFiles()).handle), Place()
    )
    assert open_page(WordsOfOwner, b"") is None
    assert open_page(WordsOfOwner, b"no handle") is None
    fence()


# --- pulls


class Noting(Owner):
    """An owner that notes what readers send about offers."""

    def __init__(self, *shards: Any, **options: Any) -> None:
        self.noted = list[object]()
        super().__init__(*shards, model=MODEL, **options)

    def _check(self, peer: Peer, check: Check) -> Answer:
        self.noted.append(check)
        return super()._check(peer, check)

    def _renew(self, peer: Peer, renew: Renew) -> Answer:
        self.noted.append(renew)
        return super()._renew(peer, renew)

    def _close(self, peer: Peer, close: Close) -> None:
        self.noted.append(close)
        super()._close(peer, close)


def noting(made: Sides) -> tuple[Couple, list[object]]:
    """Return a couple whose owner notes, and the list of what it has noted."""
    both = Couple(made)
    both.owner.close()
    owner = Noting(both.owner.channel, both.src.shard)
    made.made.append(owner)
    both.owner = owner
    return both, owner.noted


def test_a_mapped_pull_asks_its_owner_nothing(made: Sides) -> None:
    both, noted = noting(made)
    offers = [both.offer() for _ in range(5)]
    for offer in offers:
        both.pull(offer).synchronize(LIMIT)
        assert offer.taken(LIMIT)
    assert [type(each) for each in noted] == [Close] * 5
    assert both.right()


def test_a_pull_ends_in_its_caller_s_thread(made: Sides) -> None:
    """Nothing else has to run: the loop is held up, which serves the reader and the owner."""
    both = Couple(made)
    both.pull(both.offer()).synchronize(LIMIT)
    go = threading.Event()
    both.owner.channel.serve(Close, lambda *_: go.wait(LIMIT) and None)  # type: ignore[arg-type]
    runtime().call_soon(go.wait, LIMIT)
    for n in range(3):
        both.dst.whole.fill_(-1)
        pulled = both.pull(both.offer())
        if n:
            pulled.synchronize()
        assert pulled.done()
        assert both.right()
    go.set()


def test_a_pull_that_nobody_looks_at_is_committed_and_reported(made: Sides) -> None:
    both = Couple(made)
    offer = both.offer()
    both.pull(offer, max_gbps=SLOW * 10)
    assert offer.taken(LIMIT)
    assert offer.state == "taken"
    assert until(lambda: both.reader.statistics()["pulls"] == 0)
    assert both.reader.statistics()["committed"] == 1
    assert both.right()


@pytest.mark.parametrize("state", ["revoked", "expired"])
def test_an_offer_that_ends_between_the_copy_and_the_look_is_not_committed(
    made: Sides, state: str
) -> None:
    """The bytes have been read, and the handle was not looked at yet."""
    both = Couple(made)
    over = threading.Event()

    class Waits(Copies):
        def observe(self, plan: CopyPlan) -> Any:
            return over if plan.dst == both.dst.view.form else None

    over.done = over.is_set  # type: ignore[attr-defined]
    offer = both.offer()
    with reading(Waits):
        pulled = both.pull(offer)
        if state == "revoked":
            offer.revoke()
        else:
            both.owner.now = lambda: time.monotonic() + 60
            assert offer.state == "expired"
        both.src.whole.fill_(9)
        over.set()
        with pytest.raises(OfferGone, match="revoked it" if state == "revoked" else "expired"):
            pulled.synchronize(LIMIT)
    assert not pulled.published
    assert isinstance(pulled.error, OfferGone)


def test_offers_without_a_word_are_confirmed_by_their_owner(made: Sides) -> None:
    """More offers than have a place."""
    both, noted = noting(made)
    both.owner.words = Words(1)
    both.owner.reallocate(both.src.shard)
    offers = [both.offer(), both.offer()]
    assert [offer.place.number for offer in offers] == [0, -1]
    for offer in offers:
        both.pull(offer).synchronize(LIMIT)
        assert offer.taken(LIMIT)
    assert sum(isinstance(each, Check) for each in noted) == 1
    assert both.right()


def test_a_reader_that_cannot_map_the_words_asks(made: Sides) -> None:
    both, noted = noting(made)
    handshake = both.reader.channel.ask(both.owner.channel.address, Hello(MODEL), Handshake)
    both.owner.channel.serve(Hello, lambda *_: replace(handshake, words=b"another kind"))
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    assert pulled.statistics.strategy == "mapped"
    assert [type(each) for each in noted if not isinstance(each, Close)] == [Check]
    offer = both.offer()
    slow = both.pull(offer, max_gbps=NEVER)
    offer.revoke()
    with pytest.raises(OfferGone, match="revoked it"):
        slow.synchronize(LIMIT)


def test_rows_that_other_processes_write_are_confirmed_by_their_owner(made: Sides) -> None:
    """Others may write the file of a dead owner, so its words would hold for ever."""
    shape = 2, 2, 16, 16, 4, 8
    name = f"words-{os.getpid()}"
    with named_memory(name, 2 * math.prod(shape)) as memory:
        rows = memory.view(torch.int16).view(shape).fill_(5)
        owner = Noting(Channel(), Rows.shard_of(rows), expose="mapped")
        made.made += [owner.channel, owner]
        local = Rows(8, 32, fill=-1)
        reader = made.reader(local.shard)
        offer = owner.offer([7, 3, 11, 0, 5], tokens=75)
        pulled = reader.pull(offer.ticket, [6, 1, 4])
        pulled.synchronize(LIMIT)
        assert pulled.statistics.strategy == "mapped"
        assert offer.taken(LIMIT)
        assert [type(each) for each in owner.noted] == [Check, Close]
        assert (local.rows([6, 1, 4], 75) == 5).all()
        for one in reversed(made.made):  # before the pool
            one.close()


@pytest.mark.parametrize("place", [0, 5, PLACES - 1, PLACES, 1 << 16])
def test_a_ticket_with_another_place_commits_nothing(made: Sides, place: int) -> None:
    """Signed by the owner's key, which any reader has: the tag is of the offer's number."""
    both = Couple(made)
    both.offer()
    offer = both.offer()
    parsed = replace(Ticket.read(offer.ticket), place=place)
    offer.revoke()
    pulled = both.reader.pull(parsed.pack(key_of(both.owner)), both.into)
    with pytest.raises(OfferGone):
        pulled.synchronize(LIMIT)
    assert not pulled.published
    with pytest.raises(PeerError, match="not a ticket"):
        both.reader.pull(offer.ticket[:16] + parsed.pack(b"")[16:], both.into)


def test_a_forked_child_ends_no_offer_of_its_parent(made: Sides) -> None:
    """It has the same page."""
    both = Couple(made)
    offer = both.offer()
    child = os.fork()
    if not child:
        with suppress(Exception):
            offer.revoke()
            both.owner.revoke_all()
            both.owner.close()
        os._exit(0)
    os.waitpid(child, 0)
    both.pull(offer).synchronize(LIMIT)
    assert both.right()
    assert offer.taken(LIMIT)


OWNER = """
from support.migrate_pulls import *
made, rows = Sides(), Rows()
owner = made.owner(rows.shard)
made = [owner.offer([7, 3, 11, 0, 5], tokens=75, name=name) for name in names]
tell((owner.channel.address, owner.epoch, [offer.ticket for offer in made]))
"""


def test_rows_of_an_owner_that_died_after_it_had_offered_them_are_right(made: Sides) -> None:
    """It wrote nothing since, and no other process writes its memory: the offer is committed. Names
    are found in its table."""
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    reader = made.reader(local.shard)
    # The reader does not notice the death, so that the words alone decide.
    reader.channel.watch = lambda *_: lambda: None  # type: ignore[method-assign]
    with Nursery() as nursery:
        names = [None, None, *[os.urandom(16) for _ in range(2)]]
        pid, (address, epoch, tickets) = nursery.born(OWNER, names=names)
        reader.pull(tickets[0], [6, 1, 4]).synchronize(LIMIT)
        nursery.end(pid)
        tickets[2:] = [TicketByName.of(address, epoch, name) for name in names if name]
        for ticket in tickets[1:]:
            local.whole.fill_(-1)
            reader.pull(ticket, [6, 1, 4]).synchronize(LIMIT)
            assert torch.equal(local.rows([6, 1, 4], 75), remote.rows([7, 3, 11, 0, 5], 75))


def test_long_copies_on_the_host_do_not_hold_up_the_call(made: Sides) -> None:
    """Also layer by layer; and a cancelled one copies no further layer."""
    shape = (2, 2, 64, 16, 4, 512)
    remote, local = (shared_memory.shared_empty(shape, torch.int16).fill_(n) for n in (7, 3))
    both = [Rows.shard_of(each) for each in (remote, local)]
    owner = made.owner(both[0])
    reader = made.reader(both[1])
    go = threading.Event()
    threads = list[threading.Thread]()

    class Held(Copies):
        def observe(self, plan: CopyPlan) -> None:
            threads.append(threading.current_thread())
            assert go.wait(LIMIT)

    with reading(Held):
        for terms in ({}, {"by_layer": True}):
            local.fill_(3)
            go.clear()
            threads.clear()
            offer = owner.offer(range(64), tokens=1024)
            pulled = reader.pull(offer.ticket, range(64), **terms)  # type: ignore[arg-type]
            assert not pulled.done()
            assert not pulled.ended
            assert pulled.error is None
            go.set()
            for layer in pulled.layers:
                layer.synchronize(LIMIT)
            pulled.synchronize(LIMIT)
            assert torch.equal(local, remote)
            assert threads
            assert threading.current_thread() not in threads
        go.clear()
        offer = owner.offer(range(64), tokens=1024)
        pulled = reader.pull(offer.ticket, range(64))
        assert pulled.cancel()
        go.set()
        with pytest.raises(TransferCancelled):
            pulled.synchronize(LIMIT)
        assert isinstance(pulled.error, TransferCancelled)
        assert offer.state == "held"
        offer.revoke()


def test_a_copy_that_fails_ends_its_pull_as_a_transfer_error(made: Sides) -> None:
    """Whatever the library below raises when it is asked for the end."""
    both = Couple(made)

    broken = [True]  # until the end of the test: what waits for a copy outlives its pull

    def fail() -> bool:
        if broken:
            raise RuntimeError("the device is gone")
        return True

    class Fails(Copies):
        def observe(self, plan: CopyPlan) -> Any:
            kind = type("Broken", (), {"done": staticmethod(fail), "wait": staticmethod(fail)})
            return kind() if plan.dst == both.dst.view.form else None

    offer = both.offer()
    with reading(Fails):
        pulled = both.pull(offer)
        with pytest.raises(TransferError, match="the device is gone"):
            pulled.synchronize()
    assert not pulled.published
    assert until(lambda: both.reader.statistics()["failed"] == 1)
    assert offer.state == "held"
    broken.clear()


# --- ends


def test_ended_pulls_and_offers_wake_an_event_loop(made: Sides) -> None:
    import select

    both = Couple(made)
    assert both.reader.finished() == []
    assert both.owner.finished() == []
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulls = [both.pull(both.offer()) for _ in range(2)]
        gone = both.offer()
        gone.revoke()
        pulls.append(both.pull(gone))
        copied.set()
        ended = list[Any]()
        while len(ended) < 3:
            assert select.select([both.reader.finished_fd()], [], [], 20)[0]
            ended += both.reader.finished()
    assert {*ended} == {*pulls}
    assert [pull.error is None for pull in pulls] == [True, True, False]
    ends = list[Any]()
    while len(ends) < 3:
        assert select.select([both.owner.finished_fd()], [], [], 20)[0]
        ends += both.owner.finished()
    assert ends[0][:2] == (gone, "revoked")
    assert {end.state for end in ends[1:]} == {"taken"}
    assert ends[1].readers == {both.reader.channel.id}
    expired = both.offer(lease=0.01)
    time.sleep(0.02)
    assert [end.offer for end in both.owner.finished()] == [expired]


def test_leases_are_extended_and_offers_revoked_by_their_tickets(made: Sides) -> None:
    both = Couple(made)
    offer = both.offer(lease=5.0, max_lease=20.0)
    assert 9 < both.reader.extend(offer.ticket, 10.0) <= 10
    assert both.reader.extend(offer.ticket, 1000.0) <= 20
    assert offer.extend(1000.0)
    assert both.reader.extend(offer.ticket, 1.0) > 900
    assert both.owner.revoke(offer.ticket)
    assert not both.owner.revoke(offer.ticket)
    assert not offer.extend(10.0)
    with pytest.raises(OfferGone, match="revoked it"):
        both.reader.extend(offer.ticket, 10.0)
    other = made.owner(both.src.shard).offer([1], tokens=16)
    for ticket in (other.ticket, b"no ticket"):
        with pytest.raises(PeerError, match="not a ticket"):
            both.owner.revoke(ticket)
    both.owner.reallocate(both.src.shard)
    assert not both.owner.revoke(offer.ticket)  # its own, of an earlier epoch
    with pytest.raises(InvalidTerms, match="seconds"):
        offer.extend(-1.0)
    assert other.state == "held"


def test_an_owner_is_prepared_before_the_first_pull(made: Sides) -> None:
    both = Couple(made)
    paired = both.owner.counts["paired"]
    for _ in range(2):
        both.reader.prepare(both.owner.channel.address).synchronize(LIMIT)
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.owner.counts["paired"] == paired + 1
    assert both.right()
    failed = both.reader.prepare("ipc:///proc/1/fd/999999")
    with pytest.raises(PeerError):
        failed.synchronize(LIMIT)


def test_owners_prepared_together_have_one_connection(made: Sides) -> None:
    """The second call has seen no connection, waits for the first, and then uses that one's."""
    both = Couple(made)
    callers = list[OwnerKey]()
    hellos = list[Hello]()

    class Noted(Connections):
        def begin(self, owner: OwnerKey) -> Attempt:
            callers.append(owner)
            return super().begin(owner)

    handshake = both.reader.channel.ask(both.owner.channel.address, Hello(MODEL), Handshake)

    def hello(_: Peer, message: Hello) -> Handshake:
        hellos.append(message)
        assert until(lambda: len(callers) == 2)
        return handshake

    both.owner.channel.serve(Hello, hello)
    connections = Noted(both.reader.channel, [both.dst.shard], MODEL, None)
    run = runtime().run
    address = both.owner.channel.address
    terms = connections.prepare, address
    prepared = [threading.Thread(target=run, args=terms) for _ in range(2)]
    for one in prepared:
        one.start()
    for one in prepared:
        one.join(LIMIT)
    connection = run(connections.of, Ticket.read(both.offer().ticket))
    assert not connection.gone
    assert (len(connections), len(hellos), len(callers)) == (1, 1, 2)
    run(connections.close)


def test_staging_of_all_readers_has_a_total(made: Sides) -> None:
    """A second reader waits until the first has left."""
    both = Couple(made, "staging", staging_total=SMALL)
    both.pull(both.offer()).synchronize(LIMIT)
    other = Rows(8, 32, fill=-1)
    reader = made.reader(other.shard)
    offer = both.offer()
    pulled = reader.pull(offer.ticket, both.into)
    time.sleep(0.2)
    assert not pulled.ended
    assert 0 < both.owner.statistics()["slots"]
    both.reader.close()
    pulled.synchronize(LIMIT)
    assert torch.equal(other.rows(both.into, 75), both.src.rows(both.blocks, 75))
    with pytest.raises(InvalidTerms, match="staging_total"):
        made.owner(both.src.shard, staging_total=1)


def test_an_end_that_cannot_be_sent_is_sent_later(made: Sides) -> None:
    """The owner holds the connection up, and the other pulls of that owner end meanwhile."""
    both = Couple(made)
    go = threading.Event()
    refused = list[object]()
    send = both.reader.channel.send

    async def busy(address: str, message: Any, timeout: float) -> None:
        if not go.is_set():
            refused.append(message)
            raise TransferTimeout("another request waits for its answer")
        await send(address, message, timeout)

    both.reader.channel.send = busy  # type: ignore[assignment, method-assign]
    both.reader.finished()
    offers = [both.offer() for _ in range(3)]
    for offer in offers:
        both.pull(offer).synchronize(LIMIT)
    assert until(lambda: len(refused) >= 2)
    assert both.reader.statistics()["pulls"] == 3
    go.set()
    for offer in offers:
        assert offer.taken(LIMIT)
        assert offer.state == "taken"
    assert until(lambda: both.reader.statistics()["pulls"] == 0)
    assert both.reader.statistics()["committed"] == len(both.reader.finished()) == 3


@pytest.mark.parametrize("counts", [True, False])
def test_pulls_that_follow_each_other_wake_nothing(counts: bool) -> None:
    """A wake takes the interpreter from the call. ``counts`` False: the control, in which a look at
    a pull that ended between two turns of the coroutine counts as an idle one."""
    wakes = list[int]()

    class Counting(Housekeeper):
        def wake(self) -> None:
            wakes.append(1)
            super().wake()

        async def _look_at_all(self) -> bool:
            return await super()._look_at_all() and counts

    with closing(Counting(torch.device("cpu"))) as housekeeper:
        for _ in range(2 * IDLE):
            pull = Pull((), math.inf, housekeeper.report)
            housekeeper.add(pull)
            assert pull.look()
            assert until(lambda: not housekeeper.pulls)
    # A machine that stands still for seconds lets the coroutine wait.
    assert (len(wakes) < IDLE // 2) == counts


@pytest.mark.parametrize("seed", range(20))
def test_ends_are_reported_together_unless_there_is_a_reason_to_look(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A caller that pulls on is not held up by the report of its last pull."""
    monkeypatch.setattr(housekeeping, "GATHER", 600.0)

    async def steps(runtime: Runtime) -> None:
        wakes = Wakes(runtime)
        looks = list[float]()

        async def look() -> None:
            while await wakes.wait(3600.0):
                looks.append(runtime.time())

        looking = runtime.start(look())
        for _ in range(3):
            wakes.end()
            await Wait(until=runtime.time() + 1.0)
        assert not looks
        wakes.look()
        await Wait(until=runtime.time() + 1.0)
        assert looks == [3.0], "one look is for all ends"
        wakes.look()
        await Wait(until=runtime.time() + 1.0)
        assert looks[1:] == [4.0], "no end, so nothing is gathered"
        wakes.end()
        await looking
        assert looks[2:] == [604.0], "the coroutine looks for further ends by itself"
        assert runtime.time() == 604.0 + 3600.0

    run_seeded(seed, steps)


def test_an_end_that_nobody_can_receive_is_dropped(made: Sides) -> None:
    both = Couple(made)
    refused = list[object]()

    async def busy(*sent: object) -> None:
        refused.append(sent)
        raise TransferTimeout("another request waits for its answer")

    both.reader.channel.send = busy  # type: ignore[assignment, method-assign]
    both.pull(both.offer()).synchronize(LIMIT)
    assert until(lambda: bool(refused))
    assert both.reader.statistics()["pulls"] == 1
    both.owner.close()
    both.owner.channel.close()
    assert until(lambda: both.reader.statistics()["pulls"] == 0)


def test_an_old_offer_is_renewed_long_before_a_third_of_its_lease(made: Sides) -> None:
    """A ticket does not say how much of its lease is left."""
    both, noted = noting(made)
    offer = both.offer(lease=600.0)
    both.owner.now = lambda: time.monotonic() + 590
    pulled = both.pull(offer, max_gbps=NEVER)
    assert until(lambda: bool(noted))
    assert isinstance(noted[0], Renew)
    both.owner.now = lambda: time.monotonic() + 700
    assert offer.state == "held"
    pulled.cancel()
    offer.revoke()


def test_a_renewal_of_the_readers_thread_needs_no_answer(made: Sides) -> None:
    """A pull waits for its copy behind long work. An owner that is busy is not waited for."""
    both, noted = noting(made)
    clock = Clock(both.owner)
    offer = both.offer(lease=0.5)
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulled = both.pull(offer)
        clock.outlast(offer, 0.5)
        copied.set()
        pulled.synchronize(LIMIT)
    assert until(lambda: offer.state == "taken")
    assert any(isinstance(each, Renew) for each in noted)


def test_an_owner_that_ends_before_its_end_is_watched_is_not_known(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later pulls would wait for rows of a process that has ended."""
    both = Couple(made)
    channel = both.reader.channel
    connections = Connections(channel, [both.dst.shard], MODEL, None)
    ticket = Ticket.read(both.offer().ticket)
    watch = channel.watch

    def refused(address: str, gone: Any) -> Any:
        raise PeerError("no channel listens there any more")

    def late(address: str, gone: Any) -> Any:
        gone()
        return watch(address, gone)

    monkeypatch.setattr(channel, "watch", refused)
    with pytest.raises(PeerError, match="any more"):
        runtime().run(connections.of, ticket)
    assert not len(connections)
    monkeypatch.setattr(channel, "watch", late)
    assert runtime().run(connections.of, ticket).gone
    assert not len(connections)
    monkeypatch.undo()
    assert not runtime().run(connections.of, ticket).gone
    assert len(connections) == 1
    runtime().run(connections.close)
