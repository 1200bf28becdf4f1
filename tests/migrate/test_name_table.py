# SPDX-License-Identifier: Apache-2.0
"""The table of names: readers of a host find offers by name in shared memory."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from secrets import token_bytes
from time import monotonic
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.migrate_pulls import MODEL, Rows, Sides, sides
from support.waits import LIMIT

from portakv.errors import InvalidTerms, OfferGone, PeerError
from portakv.migrate import Ticket, messages, shared_memory, words
from portakv.migrate.messages import Handshake, Hello
from portakv.migrate.owner import Owner
from portakv.migrate.words import (
    RING,
    TRIES,
    WAYS,
    Entry,
    NamesOfOwner,
    NameTable,
    Words,
    fence,
    open_page,
)

KEY = bytes(range(32))
EPOCH = b"e" * 16
BLOCKS = [7, 3, 11]
INTO = [6, 1]
TOKENS = 45
SMALL = 16 << 10  # bytes of a ring


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


class Listed:
    """An offer with a name; ``nbytes``: of its ids."""

    def __init__(self, nbytes: int = 64, epoch: bytes = EPOCH, name: bytes | None = None) -> None:
        self.name = token_bytes(16) if name is None else name
        self.number = token_bytes(16)
        self.ids = token_bytes(nbytes)
        ticket = messages.Ticket(epoch, self.number, "ipc://x", 16, (self.ids,), (16,), 1.0)
        self.ticket = ticket.pack(KEY)
        self.entry = Entry()


def xored(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, two, strict=True))


class Unbound(words.Hashed):
    """A hash of a name whose records all have one mask."""

    def masked(self, ticket: bytes | memoryview, start: int) -> bytes:
        return super().masked(ticket, 0)


class Tables:
    """A table as its owner and as a reader see it."""

    def __init__(self) -> None:
        self.owner = NameTable(KEY)
        self.owner.allocate()
        self.reader = NamesOfOwner(self.owner.export(shared_memory.SharedFiles()).handle, KEY)

    def add(self, offer: Listed) -> Listed:
        self.owner.add(offer)
        return offer

    def find(self, offer: Listed) -> bytes:
        return self.reader.find(EPOCH, offer.name)

    def record(self, offer: Listed) -> bytes:
        """Return the masked ticket of an offer in the page."""
        at = 8 * WAYS * words.BUCKETS + offer.entry.start % RING + 24
        return self.page[at : at + len(offer.ticket)]

    @property
    def page(self) -> bytes:
        """Return all bytes of the page."""
        assert self.owner.page is not None
        return bytes(self.owner.page.memory.numpy().data)


@pytest.fixture
def tables() -> Tables:
    return Tables()


# --- the page


def test_a_name_is_found_until_it_is_removed(tables: Tables) -> None:
    offers = [tables.add(Listed(size)) for size in (4, 64, 4096, 100_000)]
    assert [tables.find(offer) for offer in offers] == [offer.ticket for offer in offers]
    for offer in offers:
        tables.owner.remove(offer.entry)
        assert tables.find(offer) == b""
    assert not any(tables.page[: 8 * WAYS * words.BUCKETS])


def test_another_name_epoch_or_key_finds_nothing(tables: Tables) -> None:
    offer = tables.add(Listed())
    assert tables.find(Listed()) == b""
    assert tables.reader.find(b"f" * 16, offer.name) == b""
    other = NamesOfOwner(tables.owner.export(shared_memory.SharedFiles()).handle, b"k" * 32)
    assert other.find(EPOCH, offer.name) == b""


def test_the_page_has_neither_names_nor_the_numbers_of_offers(tables: Tables) -> None:
    """Its other contents, such as block ids, are the control."""
    offer = tables.add(Listed())
    page = tables.page
    assert offer.ids in page
    assert offer.name not in page
    assert offer.number not in page
    assert offer.ticket[:16] not in page  # the MAC
    assert offer.ticket[16:32] not in page  # the checksum


@pytest.mark.parametrize("bound", [True, False])
def test_a_ticket_of_a_name_unmasks_no_later_one(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """``bound`` False: the control, in which a mask does not depend on the record's position."""
    if not bound:
        of = words.hashed
        monkeypatch.setattr(words, "hashed", lambda *given: Unbound(*of(*given)))
    name = token_bytes(16)
    first = tables.add(Listed(name=name))
    old = tables.record(first)
    tables.owner.remove(first.entry)
    later = tables.add(Listed(name=name))
    mask = xored(old, first.ticket)
    assert (xored(tables.record(later), mask) == later.ticket) is not bound
    assert tables.find(later) == later.ticket


@pytest.fixture
def small(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """A table with a small ring."""
    monkeypatch.setattr(words, "RING", SMALL)
    return tables


def test_the_oldest_names_make_room(small: Tables) -> None:
    """Records of a quarter of a ring: the fifth takes the place of the first, or of more."""
    tables = small
    offers = list[Listed]()
    for _ in range(11):
        offers.append(tables.add(Listed(SMALL // 4 - 200)))
        found = [tables.find(offer) for offer in offers]
        assert found[-4:] == [offer.ticket for offer in offers[-4:]]
        assert not any(found[:-4])
    for offer in offers:  # the entry of an old one may be another's by now
        tables.owner.remove(offer.entry)
    assert not any(tables.find(offer) for offer in offers)


def test_a_record_does_not_cross_the_end_of_the_ring(small: Tables) -> None:
    seed = random.Random(3)
    offers = list[Listed]()
    for _ in range(100):
        offers.append(small.add(Listed(seed.randrange(1, SMALL // 40) * 4)))
        assert all(small.find(x) == x.ticket for x in offers[-5:])
    found = [small.find(x) for x in offers]
    assert all(ticket in (b"", x.ticket) for ticket, x in zip(found, offers, strict=True))


def test_a_bucket_that_is_full_loses_its_oldest_name(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "BUCKETS", 1)
    offers = [tables.add(Listed()) for _ in range(WAYS + 2)]
    assert [bool(tables.find(offer)) for offer in offers] == [False] * 2 + [True] * WAYS
    for offer in offers[:2]:  # an entry that another name has got
        tables.owner.remove(offer.entry)
    assert all(tables.find(offer) == offer.ticket for offer in offers[2:])
    tables.owner.remove(offers[5].entry)
    last = tables.add(Listed())  # the free slot, whatever is older
    assert tables.find(offers[2]) == offers[2].ticket
    assert tables.find(last) == last.ticket


def test_a_ticket_that_is_larger_than_the_ring_is_left_out(small: Tables) -> None:
    offer = small.add(Listed())
    assert small.find(small.add(Listed(SMALL))) == b""
    assert small.find(offer) == offer.ticket


class Changing:
    """A ring in which the owner does something between two looks of a reader."""

    def __init__(self, ring: memoryview, looks: int, change: Callable[[], object]) -> None:
        self._ring = ring
        self._looks = looks
        self._change = change

    def __getitem__(self, place: slice) -> memoryview:
        if not self._looks:
            self._change()
        self._looks -= 1
        return self._ring[place]


def overwrite(tables: Tables, offer: Listed) -> list[Listed]:
    """End an offer, and use its place in the ring again."""
    tables.owner.remove(offer.entry)
    return [tables.add(Listed(SMALL // 4 - 200)) for _ in range(4)]


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("looks", [0, 1])
def test_a_record_that_is_overwritten_while_it_is_read_is_not_returned(
    small: Tables, guarded: bool, looks: int
) -> None:
    """``looks``: before the change. ``guarded`` False: the control, in which the reader looks at
    slots of a time before the change."""
    offer = small.add(Listed(SMALL // 4 - 300))
    page: Any = small.reader.page
    page.ring = Changing(page.ring, looks, lambda: overwrite(small, offer))
    if not guarded:
        page.slots = memoryview(bytes(page.slots)).cast("q")
    found = small.find(offer)
    if guarded or not looks:
        assert found == b""
    else:
        assert found not in (b"", offer.ticket)


def test_a_name_that_is_offered_again_while_it_is_read_is_found(tables: Tables) -> None:
    first = tables.add(Listed())
    again = Listed(name=first.name)

    def change() -> None:
        tables.owner.remove(first.entry)
        tables.add(again)

    page: Any = tables.reader.page
    page.ring = Changing(page.ring, 1, change)
    assert tables.find(first) == again.ticket


def test_a_reader_gives_up_a_name_that_changes_all_the_time(tables: Tables) -> None:
    offer = tables.add(Listed())
    changes = list[int]()

    class Restless:
        """A ring whose owner offers the name again at each look at a record."""

        def __getitem__(self, place: slice) -> memoryview:
            changes.append(1)
            tables.owner.remove(offer.entry)
            tables.add(offer)
            return ring[place]

    page: Any = tables.reader.page
    ring: memoryview = page.ring
    page.ring = Restless()
    assert tables.find(offer) == b""
    assert len(changes) == 2 * TRIES  # a head and a ticket
    page.ring = ring
    assert tables.find(offer) == offer.ticket


@pytest.mark.parametrize("written", [False, True])
def test_the_end_of_an_offer_removes_what_an_interrupt_has_left(
    tables: Tables, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """``written``: the slot; the call returns no entry in either case."""
    offer = Listed()

    def interrupt() -> None:
        if written:
            assert tables.owner.page is not None
            tables.owner.page.slots[offer.entry.slot] = offer.entry.start
        raise KeyboardInterrupt

    monkeypatch.setattr("portakv.migrate.words.fence", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tables.owner.add(offer)
    monkeypatch.setattr("portakv.migrate.words.fence", fence)
    assert bool(tables.find(offer)) == written
    tables.owner.remove(offer.entry)
    assert tables.find(offer) == b""
    again = tables.add(Listed(name=offer.name))
    assert tables.find(offer) == again.ticket


def test_a_forked_child_changes_nothing(tables: Tables) -> None:
    """It has the same page."""
    offer = tables.add(Listed())
    before = tables.page
    child = os.fork()
    if not child:
        with suppress(Exception):
            tables.owner.remove(offer.entry)
            tables.owner.add(Listed())
        os._exit(0)
    os.waitpid(child, 0)
    assert tables.page == before
    assert tables.find(offer) == offer.ticket


def test_bytes_of_any_kind_in_the_page_raise_nothing(tables: Tables) -> None:
    """Whoever maps the owner's memory may write the page."""
    page = tables.owner.page
    assert page is not None
    seed = random.Random(7)
    whole = page.memory.numpy()
    for _ in range(20):
        offer = tables.add(Listed())
        start = page.slots[offer.entry.slot] % RING
        page.ring[start + 16 : start + 24] = seed.randbytes(8)  # the length
        tables.find(offer)
        page.ring[start + 16 : start + 24] = bytes(8)
        tables.find(offer)
        page.slots[offer.entry.slot] = -seed.randrange(1, 1 << 62)
        tables.find(offer)
    whole[: 8 * WAYS * words.BUCKETS] = 0xFF
    assert tables.find(Listed()) == b""


def test_other_memory_is_not_a_table() -> None:

    def opened(handle: bytes) -> NamesOfOwner:
        return NamesOfOwner(handle, KEY)

    assert open_page(opened, b"") is None
    assert open_page(opened, b"no handle") is None
    assert open_page(opened, Words().export(shared_memory.SharedFiles()).handle) is None


# --- pulls


class Pair:
    """An owner and a reader that are connected, and the questions about names."""

    def __init__(self, made: Sides, prepare: bool = True) -> None:
        self.src = Rows()
        self.dst = Rows(8, 32, fill=-1)
        self.owner: Owner = made.owner(self.src.shard)
        self.reader = made.reader(self.dst.shard)
        self.asked = list[bytes]()
        self.count()
        if prepare:
            self.reader.prepare(self.owner.channel.address).synchronize(LIMIT)

    def count(self) -> None:
        """Note the questions to the owner."""
        find = self.owner.names.find

        def noted(names: Sequence[bytes]) -> messages.Found:
            self.asked += names
            return find(names)

        self.owner.names.find = noted  # type: ignore[method-assign]

    def offer(self, name: bytes, **terms: Any) -> Any:
        return self.owner.offer(BLOCKS, tokens=TOKENS, name=name, **terms)

    def ticket(self, name: bytes, epoch: bytes | None = None) -> bytes:
        return Ticket.of(self.owner.channel.address, epoch or self.owner.epoch, name)

    def pull(self, ticket: bytes, **terms: Any) -> Any:
        return self.reader.pull(ticket, INTO, timeout=LIMIT, **terms)

    def right(self) -> bool:
        return torch.equal(self.src.rows(BLOCKS, TOKENS), self.dst.rows(INTO, TOKENS))


@pytest.mark.parametrize("listed", [True, False])
def test_a_pull_by_name_asks_its_owner_nothing(
    made: Sides, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """``listed`` False: the names have no space in the table, so the owner is asked."""
    if not listed:
        monkeypatch.setattr(NameTable, "add", lambda *_: None)
    pair = Pair(made)
    for _ in range(3):
        pair.dst.whole.fill_(-1)
        name = token_bytes(16)
        offer = pair.offer(name)
        pair.pull(pair.ticket(name)).synchronize(LIMIT)
        assert pair.right()
        assert offer.taken(LIMIT)
        assert offer.state == "taken"
    assert bool(pair.asked) != listed


def test_a_reader_that_cannot_map_the_table_asks(made: Sides) -> None:
    pair = Pair(made, prepare=False)
    answer = pair.reader.channel.ask(pair.owner.channel.address, Hello(MODEL), Handshake)
    pair.owner.channel.serve(Hello, lambda *_: replace(answer, names=b"another kind"))
    name = token_bytes(16)
    pair.offer(name)
    pulled = pair.pull(pair.ticket(name))
    pulled.synchronize(LIMIT)
    assert pulled.statistics.strategy == "mapped"
    assert pair.right()
    assert pair.asked


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("end", ["revoked", "expired", "taken"])
def test_a_name_that_is_used_again_brings_the_new_rows(
    made: Sides, monkeypatch: pytest.MonkeyPatch, end: str, removed: bool
) -> None:
    """``removed`` False: the control, in which the table goes on to have the ended offer. Its rows
    are not committed either: its word says that it ended."""
    if not removed:
        monkeypatch.setattr(NameTable, "remove", lambda *_: None)
    pair = Pair(made)
    name = token_bytes(16)
    now = [0.0]
    pair.owner.now = lambda: now[0]
    offer = pair.owner.offer([1, 2, 4], tokens=TOKENS, name=name, lease=5.0)
    if end == "taken":
        pair.pull(pair.ticket(name)).synchronize(LIMIT)
        assert offer.taken(LIMIT)
    elif end == "expired":
        now[0] = 6.0
        assert offer.state == "expired"
    else:
        assert pair.owner.revoke(pair.ticket(name))
    pair.src.whole[:, :, [1, 2, 4]] = -5
    if removed:
        with pytest.raises(OfferGone, match={"taken": "have taken it"}.get(end, end)):
            pair.pull(pair.ticket(name)).synchronize(LIMIT)
        assert pair.asked
    pair.offer(name)
    pulled = pair.pull(pair.ticket(name))
    if removed:
        pulled.synchronize(LIMIT)
        assert pair.right()
    else:
        with pytest.raises(OfferGone):
            pulled.synchronize(LIMIT)
        assert not pulled.published


def test_a_name_that_two_calls_take_is_of_the_first(made: Sides) -> None:
    """The second offer is made while the first is between its check and its entry."""
    owner = made.owner(Rows().shard)
    name = token_bytes(16)
    offers = list[Any]()

    def now() -> float:
        owner.now = monotonic
        offers.append(owner.offer(BLOCKS, tokens=TOKENS, name=name))
        return monotonic()

    owner.now = now
    with pytest.raises(InvalidTerms, match="name of an offer that holds"):
        owner.offer(BLOCKS, tokens=TOKENS, name=name)
    assert owner.names.held([name]) == offers
    assert [*owner.offers.values()] == offers
    offers[0].revoke()
    assert owner.names.held([name]) == []
    owner.offer(BLOCKS, tokens=TOKENS, name=name)


def test_a_withdrawn_name_is_not_waited_for(made: Sides) -> None:
    pair = Pair(made)
    ticket = pair.ticket(token_bytes(16))
    assert not pair.owner.revoke(ticket)
    with pytest.raises(OfferGone, match="revoked it"):
        pair.pull(ticket).synchronize(LIMIT)


@pytest.mark.parametrize("bound", [True, False])
def test_a_name_of_an_earlier_epoch_finds_no_later_offer(
    made: Sides, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """The page is the same. ``bound`` False: the control, in which hashes are of names alone."""
    if not bound:
        of = words.hashed
        monkeypatch.setattr(words, "hashed", lambda _, name, key: of(EPOCH, name, key))
    pair = Pair(made)
    name = token_bytes(16)
    old = pair.ticket(name)
    pair.owner.reallocate(pair.src.shard)
    pair.offer(name)
    pulled = pair.pull(old)
    if bound:
        with pytest.raises(OfferGone, match="restarted"):
            pulled.synchronize(LIMIT)
        pair.pull(pair.ticket(name)).synchronize(LIMIT)
    else:
        pulled.synchronize(LIMIT)
    assert pair.right()


def test_another_owner_at_the_address_has_another_table(made: Sides) -> None:
    pair = Pair(made)
    names = [token_bytes(16) for _ in range(2)]
    pair.offer(names[0])
    old = pair.ticket(names[0])
    pair.owner.close()
    pair.owner = Owner(pair.owner.channel, pair.src.shard, model=MODEL)
    made.made.append(pair.owner)
    pair.count()
    for name in names:
        pair.offer(name)
    with pytest.raises(OfferGone, match="restarted"):
        pair.pull(old).synchronize(LIMIT)
    pair.asked.clear()
    pair.reader.prepare(pair.owner.channel.address).synchronize(LIMIT)
    for name in names:  # the first one also connects anew
        pair.dst.whole.fill_(-1)
        pair.pull(pair.ticket(name)).synchronize(LIMIT)
        assert pair.right()
    assert len(pair.asked) <= 1


def test_a_ticket_by_name_is_for_pulls(made: Sides) -> None:
    pair = Pair(made)
    ticket = pair.ticket(token_bytes(16))
    with pytest.raises(InvalidTerms, match="by name"):
        pair.reader.explain(ticket)
    with pytest.raises(InvalidTerms, match="by name"):
        pair.reader.extend(ticket, 3.0)
    edited = ticket[:40] + bytes([ticket[40] ^ 1]) + ticket[41:]
    with pytest.raises(PeerError, match="not a ticket"):
        pair.reader.pull(edited, INTO)


def test_rows_up_to_a_mark_are_followed_by_name(made: Sides) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    offer = pair.offer(name, progress="layers")
    pulled = pair.pull(pair.ticket(name), by_layer=True)
    offer.raise_to(1)
    pulled.layers[0].synchronize(LIMIT)
    assert not pulled.layers[1].done()
    offer.raise_to(2)
    pulled.synchronize(LIMIT)
    assert pair.right()
    assert not pair.asked
