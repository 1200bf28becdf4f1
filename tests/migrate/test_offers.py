# SPDX-License-Identifier: Apache-2.0
"""Pulls commit rows or nothing, whatever ends, fails, is forged or changes meanwhile."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace
from support.migrate_channels import SECRET, Network
from support.migrate_pulls import (
    LAYOUT,
    MODEL,
    SMALL,
    Compares,
    Copies,
    Couple,
    Rows,
    Sides,
    key_of,
    sides,
    waiting_copies,
)
from support.peer_cases import reading
from support.threads import interrupting
from support.waits import LIMIT, until

from portakv import CopyPlan, KVView
from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    PeerError,
    SlotError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.described import EVENTS
from portakv.migrate.messages import Answer, Begin, BoxPart, Check, Gather, Handshake, Hello, Ticket
from portakv.migrate.owner import Owner
from portakv.migrate.pull import Pull
from portakv.migrate.reader import Reader
from portakv.migrate.shards import Shard
from portakv.migrate.shared_memory import shared_empty
from portakv.migrate.staged_reader import ask
from portakv.tasks import runtime

SLOW = 2e-4  # 10^9 bytes a second: a pull of 75 tokens takes a tenth of a second
NEVER = 1e-9  # 10^9 bytes a second: a pull of 75 tokens takes hours
WAYS = pytest.mark.parametrize("expose", ["mapped", "staging"])


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


def ended(pulled: Any, kind: type[Exception], match: str | None = None) -> None:
    """It ends by an error, and nothing is published."""
    with pytest.raises(kind, match=match):
        pulled.synchronize(LIMIT)
    assert not pulled.published
    assert pulled.statistics.nbytes == 0


def changed(both: Couple, offer: Any = None) -> None:
    """Pull rows that change after they were read: they are not published."""
    compares = Compares(both.owner)
    pulled = both.pull(offer or both.offer(), verify=True)
    assert compares.asked.wait(LIMIT)
    both.src.whole[0, 0, 7, 0] ^= 1
    compares.may.set()
    ended(pulled, TransferError, "Expected the bytes of the rows")


def readdressed(owner: Owner, offer: Any, address: str, asker: Channel) -> bytes:
    """The ticket of an offer, as if its owner were reached at another address."""
    parsed = Ticket.read(offer.ticket)
    key = asker.ask(parsed.address, Hello(owner.model), Handshake).key
    return replace(parsed, address=address).pack(key)


@pytest.mark.parametrize("end", ["expired", "revoked"])
def test_an_offer_that_ends_in_mid_copy_is_not_published(made: Sides, end: str) -> None:
    """Faults 2 and 3. Its owner uses the blocks immediately; the offer is gone after the copy."""
    both = Couple(made)
    offer = both.offer()
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulled = both.pull(offer)
        if end == "expired":
            both.owner.now = lambda: time.monotonic() + 60
        else:
            offer.revoke()
        assert offer.taken(0)
        assert offer.state == end
        both.src.whole.fill_(9)
        assert not pulled.done()
        copied.set()
        ended(pulled, OfferGone)
    assert both.spared()


def test_an_owner_that_is_busy_for_too_long_is_given_up_in_a_sentence() -> None:
    """Not if it sums digests up, which take as long as they take."""

    async def answer(*_: object, **__: object) -> Answer:
        return Answer("busy")

    owner = SimpleNamespace(address="it", channel=SimpleNamespace(answer=answer))
    source = cast(Any, SimpleNamespace(owner=owner))
    pull = cast(Any, SimpleNamespace(over=False))
    gather = Gather(b"", b"", (BoxPart(0, (0, 1), (0, 1), 0, 1),), "", 1)
    with pytest.raises(PeerError, match="it sent no rows: it is busy"):
        runtime().run(ask, source, gather, pull, 0.0)


def test_an_owner_that_was_closed_offers_nothing(made: Sides) -> None:
    """Also readers that it does not know yet get this error, not that their rows are others."""
    both = Couple(made)
    offer = both.offer()
    both.owner.close()
    with pytest.raises(OfferGone, match="this owner has no such offer"):
        both.pull(offer).synchronize(LIMIT)


def test_an_owner_that_was_restarted_at_its_address_is_another(made: Sides) -> None:
    """Fault 6. Its predecessor's tickets are gone; a new handshake is made."""
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    before = Channel("tcp://127.0.0.1:0", secret=SECRET)
    owner = Owner(before, remote.shard, model=MODEL)
    asker = Channel(secret=SECRET)
    made.made += [asker, reader := Reader(asker, local.shard, model=MODEL)]
    old = [owner.offer([1, 2], tokens=32).ticket for _ in range(2)]
    reader.pull(old[0], [3]).synchronize(LIMIT)
    owner.close()
    before.close()
    after = Channel(before.address, secret=SECRET)
    made.made += [after, again := Owner(after, remote.shard, model=MODEL)]
    assert until(lambda: not reader_reaches(reader, old[1]))
    with pytest.raises(OfferGone, match="restarted"):
        reader.pull(old[1], [3]).synchronize(LIMIT)
    offer = again.offer([5, 6], tokens=32)
    reader.pull(offer.ticket, [3]).synchronize(LIMIT)
    assert torch.equal(local.rows([3], 32), remote.rows([5, 6], 32))


def reader_reaches(reader: Reader, ticket: bytes) -> bool:
    """Return True if a reader takes the owner of a ticket for the same as before."""
    try:
        reader.explain(ticket)
    except (PeerError, OfferGone):
        return False
    return True


def test_a_network_that_is_cut_publishes_nothing_and_hangs_nobody(made: Sides) -> None:
    """Fault 9. Both live, both count; afterwards both go on."""
    there = Channel("tcp://127.0.0.1:0", secret=SECRET)
    here = Channel(secret=SECRET, timeout=1.0)
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    made.made += [there, owner := Owner(there, remote.shard, model=MODEL)]
    made.made += [here, reader := Reader(here, local.shard, model=MODEL)]
    net = Network(there.address)

    def ticket(**options: Any) -> tuple[Any, bytes]:
        offer = owner.offer([1, 2], tokens=32, **options)
        return offer, readdressed(owner, offer, net.address, here)

    offer, parsed = ticket(lease=0.5)
    # Its copy lasts longer than a silent connection. One that ends before is committed by its word.
    pulled = reader.pull(parsed, [3], by_layer=True, max_gbps=NEVER)
    net.cut.set()
    ended(pulled, TransferError)
    assert offer.taken(LIMIT)
    assert offer.state in ("expired", "lost")
    net.cut.clear()
    again = ticket()[1]
    assert until(lambda: reader_reaches(reader, again))
    reader.pull(again, [3]).synchronize(LIMIT)
    assert torch.equal(local.rows([3], 32), remote.rows([1, 2], 32))
    net.close()


def test_a_check_whose_answer_is_lost_is_repeated(made: Sides) -> None:
    """Fault 10."""
    there, here = (Channel(x, secret=SECRET) for x in ("tcp://127.0.0.1:0", None))
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    made.made += [there, owner := Owner(there, remote.shard, model=MODEL)]
    made.made += [here, reader := Reader(here, local.shard, model=MODEL)]
    net = Network(there.address)
    offer = owner.offer([1, 2], tokens=32)
    parsed = readdressed(owner, offer, net.address, here)
    reader.explain(parsed)
    net.eat = 1
    net.quiet.set()
    pulled = reader.pull(parsed, [3])
    pulled.synchronize(LIMIT)
    assert pulled.published
    assert offer.taken(LIMIT)
    assert (owner.statistics()["closed"], offer.state) == (1, "taken")
    net.close()


@WAYS
def test_what_is_no_ticket_is_refused_in_the_same_words(made: Sides, expose: str) -> None:
    """Fault 12. Truncated and bit-flipped ones; the ids of one owner's offer forged."""
    both = Couple(made, expose)
    good = both.offer().ticket
    flipped = [bytes([*good[:n], good[n] ^ 1, *good[n + 1 :]]) for n in range(0, len(good), 7)]
    for bad in (b"", good[:-1], good[:16], good + b"\0", *flipped):
        with pytest.raises(PeerError, match=r"Expected tickets .* not a ticket of this"):
            both.reader.pull(bad, both.into).synchronize(LIMIT)
    key = key_of(both.owner)
    odd = replace(Ticket.read(good), ids=(Ticket.read(good).ids[0] + b"\0",)).pack(key)
    with pytest.raises(PeerError, match="not a ticket of this release"):
        both.reader.pull(odd, both.into).synchronize(LIMIT)
    forged = replace(Ticket.read(good), offer=bytes(16)).pack(key)
    with pytest.raises(OfferGone):
        both.reader.pull(forged, both.into).synchronize(LIMIT)
    both.reader.pull(good, both.into).synchronize(LIMIT)
    assert both.right()
    assert both.spared()


def test_a_ticket_of_another_group_is_refused(made: Sides) -> None:
    """Fault 12. Of rows that are others, of more groups, and of other tokens than another's."""
    both = Couple(made)
    other = Rows()
    wide = made.owner(
        Shard(KVView([*other.whole.view(2, 2, 16, 16, 2, 16)], both.src.view.layout.text))
    )
    with pytest.raises(LayoutError, match="bytes of a row of group 0"):
        both.reader.pull(wide.offer([1], tokens=16).ticket, [0]).synchronize(LIMIT)
    two = made.owner(other.shard, other.shard)
    with pytest.raises(LayoutError, match="groups: 1 here and 2 there"):
        both.reader.pull(two.offer([1], [1], tokens=16).ticket, [0]).synchronize(LIMIT)
    tickets = [both.owner.offer([1, 2], tokens=n).ticket for n in (16, 17)]
    with pytest.raises(InvalidTerms, match=r"the same tokens, got tickets for \[16, 17\]"):
        both.reader.pull(tickets, [0])
    for bad in (16, -1):
        with pytest.raises(InvalidTerms):
            both.reader.pull(tickets[0], [0], first=bad)
    assert (both.dst.whole == -1).all()


def test_a_forged_ticket_reads_nothing_past_a_region(made: Sides) -> None:
    """Fault 16, of one who has the ticket: ids that its owner would not have offered."""
    both = Couple(made)
    past = torch.tensor([7, 3, 11, 0, 1 << 20], dtype=torch.int32, device="cpu").numpy().tobytes()
    edited = replace(Ticket.read(both.offer().ticket), ids=(past,)).pack(key_of(both.owner))
    with pytest.raises(SlotError):
        both.reader.pull(edited, both.into).synchronize(LIMIT)
    assert (both.dst.whole == -1).all()


@WAYS
def test_bad_blocks_of_the_reader_are_refused_before_anything_moves(
    made: Sides, expose: str
) -> None:
    """Fault 17. Duplicates, past the end, too few; the offer still stands."""
    both = Couple(made, expose)
    offer = both.offer()
    for bad in ([1, 2, 1], [1, 2, 8], [1, 2]):
        with pytest.raises(SlotError):
            both.reader.pull(offer.ticket, bad)
    assert (both.dst.whole == -1).all()
    both.pull(offer).synchronize(LIMIT)
    assert both.right()


def test_an_owner_that_reallocates_between_two_greetings_is_not_paired_with(made: Sides) -> None:
    """It would be known by an epoch that it no longer has, with buffers that are never released."""
    both = Couple(made, "staging")

    say_hello = both.owner._hello

    def hello(peer: Peer, requested: Hello) -> Any:
        answer = say_hello(peer, requested)
        both.owner.channel.serve(Hello, say_hello)
        both.owner.reallocate(both.src.shard)
        return answer

    both.owner.channel.serve(Hello, hello)
    with pytest.raises(OfferGone, match="other memory"):
        both.pull(both.offer()).synchronize(LIMIT)
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.right()


def test_a_mapping_that_reads_other_bytes_is_not_used(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 22. As an IOMMU that breaks P2P has it: the self-check rejects it, and rows move."""
    monkeypatch.setattr(
        "portakv.migrate.described.proof", lambda *_: Rows(1, 2).whole.flatten()[:32]
    )
    both = Couple(made)
    offer = both.offer()
    assert "does not show the bytes of its owner" in both.reader.explain(offer.ticket)
    both.pull(offer).synchronize(LIMIT)
    assert both.right()
    assert both.spared()


def test_a_pull_inside_a_capture_is_refused(made: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 26."""
    both = Couple(made)
    offer = both.offer()
    monkeypatch.setattr("portakv.migrate.reader.capturing", lambda _: True)
    host = both.reader.device
    both.reader.device = torch.device("cuda:0")  # nothing captures the host
    with pytest.raises(Unsupported, match="pull outside"):
        both.pull(offer)
    both.reader.device = host
    monkeypatch.undo()
    both.pull(offer).synchronize(LIMIT)


def test_too_little_staging_is_an_error_before_anything_moves(made: Sides) -> None:
    """Fault 27. A buffer that holds not one token of a layer."""
    wide = torch.zeros(1, 2, 4, 16, 4, 1024, dtype=torch.int16)
    shard = [Shard(KVView([*x], "layer | kv block token head dim")) for x in (wide, wide.clone())]
    owner = made.owner(shard[0], expose="staging", staging=1 << 14)
    offer = owner.offer([1], tokens=3)
    with pytest.raises(Unsupported, match="holds no token of a layer; increase staging="):
        made.reader(shard[1]).pull(offer.ticket, [0]).synchronize(LIMIT)
    assert offer.state == "held"
    offer.revoke()
    with pytest.raises(InvalidTerms, match=r"Expected staging .* at least 16384"):
        made.owner(shard[0], staging=100)


def test_rows_that_change_after_they_were_read_are_not_verified(made: Sides) -> None:
    """Fault 29. An owner that does not keep its promise is found by the digest."""
    changed(Couple(made))


@WAYS
def test_a_pull_is_cancelled_at_any_moment(made: Sides, expose: str) -> None:
    """Fault 30. Nothing is published, buffers are free, and the next pull is right."""
    both = Couple(made, expose)
    seed = random.Random(1)
    for _ in range(12):
        terms: dict[str, Any] = {"max_gbps": SLOW * 20} if expose == "mapped" else {}
        offer = both.offer()
        pulled = both.pull(offer, **terms)
        time.sleep(seed.random() * 0.03)
        if pulled.cancel():
            with pytest.raises(TransferCancelled):
                pulled.synchronize(LIMIT)
            assert not pulled.published
            assert pulled.statistics.cancelled
            assert offer.state == "held"
            both.pull(offer).synchronize(LIMIT)  # by the same ticket
        assert offer.taken(LIMIT)
        assert (offer.taken(LIMIT), offer.state) == (
            True,
            "taken",
        )  # the owner learns of it after us
    both.dst.whole.fill_(-1)
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    assert not pulled.cancel()
    assert pulled.published
    assert not pulled.statistics.cancelled
    assert both.right()
    assert both.spared()


def test_who_cancels_a_pull_at_its_very_end_is_told_what_became_of_it(made: Sides) -> None:
    """Fault 30. Also after the owner's last answer: no pull is cancelled and published."""
    both = Couple(made)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    made.made.append(SimpleNamespace(close=lambda: sys.setswitchinterval(interval)))
    for _ in range(100):
        pulled = both.pull(both.offer())
        while pulled.statistics.seconds is None:
            pass
        cancelled = pulled.cancel()
        with pytest.raises(TransferCancelled) if cancelled else nullcontext():
            pulled.synchronize(LIMIT)
        assert pulled.published != cancelled


def test_a_pull_that_has_no_time_ends(made: Sides) -> None:
    both = Couple(made)
    pulled = both.pull(both.offer(), max_gbps=NEVER, timeout=0.05)
    ended(pulled, TransferTimeout, "Increase timeout")
    both.pull(both.offer(), timeout=30.0).synchronize()
    assert both.right()


def test_a_pull_that_has_no_time_for_digests_ends(made: Sides) -> None:
    """An owner that is busy with others for longer holds up no pull past its time."""
    both = Couple(made)
    both.owner._gathers.answer = lambda *_: Answer("busy", seconds=1e-3)  # type: ignore[method-assign]
    ended(both.pull(both.offer(), verify=True, timeout=0.1), TransferTimeout, "Increase timeout")


def test_a_pull_whose_owner_does_not_answer_ends_in_its_own_time(made: Sides) -> None:
    """The channel's time is longer; and the pull does not count as cancelled."""
    both = Couple(made, "staging")
    both.reader.channel.timeout = 25.0
    both.pull(both.offer()).synchronize(LIMIT)
    both.owner.channel.serve(Check, lambda *_: None)
    pulled = both.pull(both.offer(), timeout=0.2)
    assert until(lambda: pulled.ended, LIMIT)
    ended(pulled, TransferTimeout, "Increase timeout")
    assert not pulled.statistics.cancelled


@WAYS
def test_an_owner_that_is_gone_is_found_before_its_rows_would_be_here(
    made: Sides, expose: str
) -> None:
    """Faults 4 and 5, at a rate by which they would take for ever."""
    both = Couple(made, expose)
    both.pull(both.offer()).synchronize(LIMIT)
    pulled = both.pull(both.offer(), max_gbps=1e-6)
    both.owner.channel.close()
    ended(pulled, PeerError)


def test_rows_that_are_moved_keep_to_a_rate(made: Sides) -> None:
    """A pull that would take far too long at its rate is under way until it is cancelled."""
    both = Couple(made, "staging")
    pulled = both.pull(both.offer(), max_gbps=1e-9)
    assert until(lambda: any(x.ended for x in pulled.slices))
    assert not any(x.wait(0.1) for x in pulled.slices if not x.ended)
    assert pulled.cancel()
    ended(pulled, TransferCancelled)
    groups = [[Rows(8, fill=n).shard for n in range(3)] for _ in range(2)]
    offer = made.owner(*groups[0]).offer(*[[0, 1]] * 3, tokens=32)
    pulled = made.reader(*groups[1]).pull(offer.ticket, *[[2, 3]] * 3, max_gbps=SLOW / 4)
    pulled.synchronize(LIMIT)
    rate = pulled.statistics.gbps
    assert 0 < (rate or 0) < SLOW / 2  # all groups together, not each
    whole = Couple(made, "staging", staging=1 << 20)
    whole.reader.prepare(whole.owner.channel.address).synchronize(LIMIT)
    transfers = [whole.pull(whole.offer(), **terms) for terms in ({}, {"max_gbps": SLOW / 16})]
    one, several = (x.statistics.slices for x in transfers)
    assert one == 1
    assert several > 1  # one slice would be a burst
    both.owner.revoke_all()


@pytest.mark.slow
@WAYS
def test_a_reader_that_is_closed_writes_nothing_from_then_on(made: Sides, expose: str) -> None:
    """A pull that would take for ever is cancelled in the end; its offer stays for another one."""
    both = Couple(made, expose)
    offer = both.offer()
    pulled = both.pull(offer, max_gbps=1e-9)
    both.reader.close()
    assert until(lambda: pulled.ended)
    ended(pulled, TransferCancelled)
    written = both.dst.whole.clone()
    assert not offer.taken(0.5)
    assert offer.state == "held"
    assert torch.equal(both.dst.whole, written)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_refuses_and_the_parent_goes_on(made: Sides) -> None:
    """Fault 31."""
    both = Couple(made)
    offers = [both.offer() for _ in range(2)]
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulled = both.pull(offers[0])
        child = os.fork()
        refused = 0
        if not child:
            both.into = [0, 2, 3]  # of memory that the parent has as well
            try:
                both.pull(offers[1])
            except (PeerError, TransferError):
                refused += bool((both.dst.whole.numpy()[:, :, both.into] == -1).all())
            try:
                pulled.synchronize(LIMIT)
            except TransferError:
                refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        copied.set()
        pulled.synchronize(LIMIT)
    assert both.right()
    both.pull(offers[1]).synchronize(LIMIT)


def test_ctrl_c_ends_a_wait_and_no_pull(made: Sides) -> None:
    """Fault 31."""
    both = Couple(made)
    copied = threading.Event()
    with reading(waiting_copies(both, copied)):
        pulled = both.pull(both.offer())
        with interrupting(Pull.synchronize), pytest.raises(KeyboardInterrupt):
            pulled.synchronize(LIMIT)
        copied.set()
        pulled.synchronize(LIMIT)
    assert pulled.published
    assert both.right()


@WAYS
def test_many_pulls_at_once_are_each_right(made: Sides, expose: str) -> None:
    """Fault 32. Readers of one owner, and one reader of several."""
    owners = [Rows() for _ in range(2)]
    made_owners = [made.owner(x.shard, expose=expose, staging=SMALL) for x in owners]
    readers = [Rows(8, 32, fill=-1) for _ in range(3)]
    pulls = []
    for local in readers:
        reader = made.reader(local.shard)
        for n in range(6):
            blocks = [(n + 3 * k) % 16 for k in range(2)]
            offer = made_owners[n % 2].offer(blocks, tokens=30)
            pulls.append((reader.pull(offer.ticket, [n]), local, n, owners[n % 2], blocks))
    for pulled, local, n, remote, blocks in pulls:
        pulled.synchronize(LIMIT)
        assert torch.equal(local.rows([n], 30), remote.rows(blocks, 30))


# --- offers end as taken only if their rows were published


def failing(both: Couple, offer: Any, how: str) -> None:
    """Have a pull of an offer fail; its reader has nothing of it."""
    if how == "cancelled":
        pulled = both.pull(offer, max_gbps=NEVER)
        assert pulled.cancel()
        ended(pulled, TransferCancelled)
    elif how == "late":
        ended(both.pull(offer, max_gbps=NEVER, timeout=0.1), TransferTimeout)
    else:
        changed(both, offer)


@pytest.mark.parametrize("how", ["cancelled", "late", "changed"])
def test_a_pull_that_failed_leaves_its_offer_for_another(made: Sides, how: str) -> None:
    """Also the same reader may pull it, by the same ticket."""
    both = Couple(made)
    offer = both.offer()
    failing(both, offer, how)
    assert offer.state == "held"
    assert not offer.taken(0.05)
    both.pull(offer, verify=True).synchronize(LIMIT)
    assert offer.taken(LIMIT)
    assert (offer.taken(LIMIT), offer.state) == (True, "taken")  # the owner learns of it after us
    assert both.right()


# --- tickets that say what their owner did not


def forged(ticket: bytes, **fields: Any) -> bytes:
    """The ticket with other fields, by one who has no key: its MAC is the old one."""
    parsed = Ticket.read(ticket)
    return ticket[:16] + replace(parsed, **fields).pack(b"")[16:]


#: Blocks 1 to 5, which were not offered.
OTHERS = torch.arange(1, 6, dtype=torch.int32, device="cpu").numpy().tobytes()


@WAYS
@pytest.mark.parametrize(
    "fields",
    [
        {"ids": (OTHERS,)},
        {"tokens": 70},
        {"steps": (8,)},
        {"event": 3},
        {"lease": 1e5},
        {"offer": bytes(16)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_edited_ticket_reads_nothing(made: Sides, expose: str, fields: dict[str, Any]) -> None:
    both = Couple(made, expose)
    offer = both.offer()
    with pytest.raises(PeerError, match="not a ticket of this release"):
        both.reader.pull(forged(offer.ticket, **fields), both.into).synchronize(LIMIT)
    assert (both.dst.whole == -1).all()
    both.pull(offer).synchronize(LIMIT)
    assert both.right()


def test_the_mac_is_what_stops_an_edited_ticket(made: Sides) -> None:
    """The control: signed with the owner's key, the same ids are read."""
    both = Couple(made)
    parsed = replace(Ticket.read(both.offer().ticket), ids=(OTHERS,))
    both.reader.pull(parsed.pack(key_of(both.owner)), both.into).synchronize(LIMIT)
    wanted = both.src.rows([1, 2, 3, 4, 5], both.tokens)
    assert torch.equal(both.dst.rows(both.into, both.tokens), wanted)


def test_an_owner_whose_events_cannot_be_opened_is_not_mapped(made: Sides) -> None:
    """Its rows would be read before its stream has written them; they are moved instead."""

    class Eventful(Owner):
        def _hello(self, peer: Peer, hello: Hello) -> Any:
            answer = super()._hello(peer, hello)
            return answer if isinstance(answer, Answer) else replace(answer, events=(b"no event",))

    both = Couple(made)
    both.owner.close()
    both.owner = Eventful(both.owner.channel, both.src.shard, model=MODEL)
    made.made.append(both.owner)
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    assert pulled.statistics.strategy == "distributed"
    assert both.right()


def test_a_pull_counts_the_readers_blocks(made: Sides) -> None:
    both = Couple(made)
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    parsed = pulled.statistics
    assert (parsed.blocks, parsed.blocks_requested) == (3, 3)
    pulled = both.pull(both.offer(), first=40)  # the first block of 32 tokens is there already
    pulled.synchronize(LIMIT)
    assert pulled.statistics.blocks == 2


def test_a_forked_process_makes_no_offer(made: Sides) -> None:
    both = Couple(made)
    child = os.fork()
    if not child:
        code = 1
        with suppress(PeerError):
            both.offer()
            code = 2
        os._exit(code if code == 2 else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert both.owner.statistics()["held"] == 0


# --- the five references of vLLM #52234


def test_an_unknown_reference_is_never_published(made: Sides) -> None:
    """Fault 38."""
    both = Couple(made)
    parsed = Ticket.read(both.offer().ticket)
    other = replace(parsed, offer=os.urandom(16)).pack(key_of(both.owner))
    ended(both.reader.pull(other, both.into), OfferGone)


def test_a_reference_out_of_range_is_never_published(made: Sides) -> None:
    """Fault 38. More tokens than were offered, and another group."""
    both = Couple(made, "staging")
    parsed = Ticket.read(both.offer().ticket)
    longer = replace(parsed, tokens=80)
    ended(
        both.reader.pull(longer.pack(key_of(both.owner)), both.into),
        PeerError,
        "Expected offered rows",
    )
    assert both.spared()


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.slow)])
@WAYS
def test_rows_of_an_owner_that_reuses_its_blocks_at_once_are_never_stale(
    made: Sides, expose: str, rounds: int
) -> None:
    """Faults 2, 3 and 38. Offers end at any moment of a pull; what is published is what was
    offered."""
    both = Couple(made, expose)
    seed = random.Random(7)
    published = 0
    gone = 0
    both.pull(both.offer()).synchronize(LIMIT)  # they are paired
    spans = list[float]()
    for _ in range(5):
        began = time.monotonic()
        both.pull(both.offer()).synchronize(LIMIT)
        spans.append(time.monotonic() - began)
    span = 2 * min(spans)  # the moments at which offers end; nothing judges it
    for number in range(rounds):
        both.src.whole.fill_(number)
        offer = both.offer()
        after = seed.random() * span

        def reuse(offer: Any = offer, after: float = after) -> None:
            time.sleep(after)
            offer.revoke()
            both.src.whole.fill_(-2)

        thread = threading.Thread(target=reuse)
        thread.start()
        try:
            both.pull(offer).synchronize(LIMIT)
            published += 1
            assert (both.dst.rows(both.into, both.tokens) == number).all()
        except OfferGone:
            gone += 1
        thread.join()
    assert published
    assert gone
    assert both.spared()


def test_offers_that_nobody_asks_about_expire(made: Sides) -> None:
    both = Couple(made)
    both.offer(lease=0.01)
    time.sleep(0.02)
    for _ in range(70):
        both.offer().revoke()
    assert both.owner.counts["expired"] == 1


def test_an_owner_knows_of_its_reader_while_rows_of_the_host_are_copied(made: Sides) -> None:
    """Fault 7, of copies that end within the call: else a reader that dies in one holds the offer
    until the lease ends."""
    remote, local = (shared_empty((2, 2, 64, 16, 4, 512), torch.int16).fill_(x) for x in (7, 3))
    views = [KVView([*x], LAYOUT) for x in (remote, local)]
    owner = made.owner(Shard(views[0]))
    reader = made.reader(Shard(views[1]))
    offer = owner.offer(range(64), tokens=1024)
    knew = list[bool]()

    class Watched(Copies):
        def observe(self, plan: CopyPlan) -> None:
            if plan.dst == views[1].form:
                knew.append(until(lambda: bool(offer.begun), LIMIT))

    with reading(Watched):
        reader.pull(offer.ticket, range(64)).synchronize(LIMIT)
    assert knew == [True]
    assert torch.equal(remote, local)


@pytest.mark.parametrize("lasts", [False, True])
def test_an_owner_is_told_of_copies_that_last(made: Sides, lasts: bool) -> None:
    """A short copy is not reported: the message takes longer than the copy."""
    both = Couple(made)
    parsed = list[Begin]()
    over = threading.Event()
    both.owner.channel.serve(Begin, lambda _, begin: parsed.append(begin))

    def begin() -> None:
        (threading.Timer(0.3, over.set).start if lasts else over.set)()

    with reading(waiting_copies(both, over, begin)):
        both.pull(both.offer()).synchronize(LIMIT)
    assert len(parsed) == lasts
    assert both.right()


def test_owners_that_come_and_go_leave_no_workers(made: Sides) -> None:
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    reader = made.reader(local.shard)
    threads = list[int]()
    for _ in range(4):
        channel = Channel()
        owner = Owner(channel, remote.shard, model=MODEL, expose="staging", staging=SMALL)
        reader.pull(owner.offer([1, 2], tokens=32).ticket, [3]).synchronize(LIMIT)
        owner.close()
        channel.close()
        assert until(lambda: reader.channel.statistics()["links"] == 0)
        threads.append(threading.active_count())
    assert until(lambda: threading.active_count() <= threads[0])


def test_a_channel_has_one_owner_and_one_reader_at_a_time(made: Sides) -> None:
    """Two would answer for each other's offers and take each other's buffers; one that closes would
    end the other."""
    both = Couple(made, "staging")
    with pytest.raises(InvalidTerms, match="Expected a channel without"):
        Owner(
            both.owner.channel, both.src.shard, model=MODEL
        )  # before its shards are looked at, and exported
    with pytest.raises(LayoutError):
        Owner(both.reader.channel, model=MODEL)
    made.made.append(Owner(both.reader.channel, both.dst.shard, model=MODEL))
    for kind, one in ((Owner, both.owner), (Reader, both.reader)):
        terms: Any = one.channel, both.src.shard if kind is Owner else both.dst.shard
        with pytest.raises(InvalidTerms, match="Expected a channel without"):
            kind(*terms, model=MODEL)
        one.close()
        made.made.append(again := kind(*terms, model=MODEL))
        setattr(both, kind.__name__.lower(), again)
        one.close()
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.right()


def test_an_event_of_an_older_offer_stands_behind_its_rows_still(made: Sides) -> None:
    """Fault 24. Events are used again: what follows one follows both offers' streams."""
    both = Couple(made)
    log = list[str]()

    class Event:
        def wait(self, stream: Any) -> None:
            log.append("wait")

        def record(self, stream: Any) -> None:
            log.append("record")

    both.owner._events = [cast(Any, Event()) for _ in range(EVENTS)]
    parsed = Ticket.read(both.offer().ticket)
    assert log == ["wait", "record"]
    with pytest.raises(LayoutError, match="Expected shards to be one or more"):
        both.owner.reallocate()
    both.owner._events = []
    key = key_of(both.owner)
    forged = replace(parsed, event=EVENTS + 1).pack(key)
    both.reader.pull(forged, both.into).synchronize(LIMIT)
    (connection,) = both.reader._owners._owners.values()
    for over, waits in ((True, 2), (False, 3)):  # a stream waits for none that has ended
        connection.events = [cast(Any, SimpleNamespace(query=partial(bool, over), wait=log.append))]
        parsed = replace(Ticket.read(both.offer().ticket), event=0)
        both.reader.pull(parsed.pack(key), both.into).synchronize(LIMIT)
        assert len(log) == waits
