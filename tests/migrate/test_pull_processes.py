# SPDX-License-Identifier: Apache-2.0
"""Pulls between processes, which are killed and stopped meanwhile: nothing of a pull with one that
is gone is published, nothing hangs, and nothing is left."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ready
from support.migrate_nursery import Nursery
from support.migrate_pulls import LAYOUT, SMALL, Couple, Rows, Sides, left, sides
from support.stopping import go_on, stop
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import OfferGone, PeerError, TransferError
from portakv.migrate.messages import Ticket
from portakv.migrate.shards import Shard

SLOW = 2e-4  # 10^9 bytes a second: a pull of 75 tokens takes a tenth of a second
NEVER = 1e-9  # 10^9 bytes a second: a pull of 75 tokens takes hours
BLOCKS = [7, 3, 11, 0, 5]
TOKENS = 75
OWNER = """
import time
from support.migrate_pulls import *
made, rows = Sides(), Rows()
shard = Shard(rows.view) if layer is None else Shard(
    KVView([rows.whole[layer]], LAYOUT), layers=(layer, layer + 1, 2))
owner = made.owner(shard, expose=expose, staging=SMALL)
offers = [owner.offer(blocks, tokens=tokens, **terms) for _ in range(count)]
tell([offer.ticket for offer in offers])
"""
READER = """
import time
from support.migrate_pulls import *
made, rows = Sides(), Rows(8, 32, fill=-1)
reader = made.reader(rows.shard)
pulls = [reader.pull(ticket, [6, 1, 4], **terms) for ticket in tickets]
tell(None)
for pulled in pulls:
    try:
        pulled.synchronize(30)
        tell(rows.rows([6, 1, 4], 75).numpy())
    except Exception as error:
        tell(type(error).__name__)
"""
FIRST_PULLS = """
import sys
from support.migrate_pulls import *
sys.setswitchinterval(1e-5)
made, rows = Sides(), Rows(8, 32, fill=-1)
reader = made.reader(rows.shard)
start = threading.Barrier(2)
ends = []
def pull(number, into):
    start.wait()
    try:
        reader.pull([rank[number] for rank in ranks], into).synchronize(120)
        ends.append(rows.rows(into, 75).numpy())
    except Exception as error:
        ends.append(repr(error))
threads = [threading.Thread(target=pull, args=each) for each in enumerate(([6, 1, 4], [0, 2, 3]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
tell(ends)
"""
WAYS = pytest.mark.parametrize("expose", ["mapped", "staging"])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as those:
        yield those


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


def owned(
    nursery: Nursery, expose: str, count: int = 1, layer: int | None = None, **terms: Any
) -> Any:
    """A process that owns rows, and tickets of it; ``terms``: of its offers."""
    options = {"blocks": BLOCKS, "tokens": TOKENS, "terms": terms}
    return nursery.born(OWNER, expose=expose, count=count, layer=layer, **options)


@WAYS
def test_rows_of_two_processes_come_to_a_third(nursery: Nursery, made: Sides, expose: str) -> None:
    owners = [owned(nursery, expose, layer=layer) for layer in (1, 0)]
    remote = Rows()
    local = Rows(8, 32, fill=-1)
    pulled = made.reader(local.shard).pull([x[1][0] for x in owners], [6, 1, 4], verify=True)
    pulled.synchronize(LIMIT)
    assert torch.equal(local.rows([6, 1, 4], TOKENS), remote.rows(BLOCKS, TOKENS))
    assert (local.whole[:, :, [0, 2, 3, 5, 7]] == -1).all()
    for pid, _ in owners:
        nursery.end(pid)


@pytest.mark.full
@WAYS
def test_first_pulls_from_two_ranks(nursery: Nursery, expose: str) -> None:
    """50 processes pull for the first time from two ranks, in two threads; all get their rows.

    A first pull shakes hands with both ranks together, each in a separate thread.
    """
    ranks = [owned(nursery, expose, 2, layer, readers=50, lease=3600.0) for layer in (0, 1)]
    tickets = [rank[1] for rank in ranks]
    right = Rows().rows(BLOCKS, TOKENS)
    for _ in range(50):
        pid, ends = nursery.born(FIRST_PULLS, ranks=tickets)  # raises if the process has died
        assert len(ends) == 2
        for rows in ends:
            assert not isinstance(rows, str), rows
            assert torch.equal(torch.as_tensor(rows), right)
        nursery.end(pid)
    for pid, _ in ranks:
        nursery.end(pid)


@WAYS
def test_rows_of_this_process_come_to_another(nursery: Nursery, made: Sides, expose: str) -> None:
    both = Couple(made, expose)
    offers = [both.offer() for _ in range(2)]
    tickets = [x.ticket for x in offers]
    pid, _ = nursery.born(READER, tickets=tickets, terms={"verify": True})
    for _ in offers:
        read = torch.from_numpy(nursery.hear(pid))
        assert torch.equal(read, both.src.rows(BLOCKS, TOKENS))
    assert all(offer.taken(LIMIT) for offer in offers)
    nursery.end(pid)


@WAYS
def test_an_owner_that_is_killed_in_mid_copy_publishes_nothing(
    nursery: Nursery, made: Sides, expose: str
) -> None:
    """Faults 4 and 5. The error comes with the channel's notice; the reader goes on with others."""
    local = Rows(8, 32, fill=-1)
    reader = made.reader(local.shard)
    # A copy that ends before the reader notices the death is right, as the owner wrote nothing.
    terms: dict[str, Any] = {"max_gbps": NEVER} if expose == "mapped" else {}
    pid, tickets = owned(nursery, expose, 20)
    reader.pull(tickets[0], [6, 1, 4]).synchronize(LIMIT)
    pulls = [reader.pull(ticket, [6, 1, 4], **terms) for ticket in tickets[1:]]
    nursery.end(pid)
    failed = 0
    for pulled in pulls:
        try:
            pulled.synchronize(LIMIT)
        except TransferError:
            failed += 1
            assert pulled.ended
            assert not pulled.published
    assert failed
    assert (local.whole[:, :, [0, 2, 3, 5, 7]] == -1).all()
    with pytest.raises((PeerError, OfferGone)):
        reader.pull(tickets[-1], [0, 2, 3]).synchronize(LIMIT)
    pid, tickets = owned(nursery, expose)
    reader.pull(tickets[0], [6, 1, 4]).synchronize(LIMIT)
    assert torch.equal(local.rows([6, 1, 4], TOKENS), Rows().rows(BLOCKS, TOKENS))
    nursery.end(pid)


@WAYS
def test_a_reader_that_is_killed_in_mid_copy_frees_its_offers(
    nursery: Nursery, made: Sides, expose: str
) -> None:
    """Fault 7. As soon as the channel is dead, long before the lease ends."""
    both = Couple(made, expose)
    offers = [both.offer(lease=600.0) for _ in range(8)]
    # A pair that is made with one who is killed ends with the transport's own timeout.
    terms = {"max_gbps": NEVER if expose == "mapped" else SLOW / 4}
    pid, _ = nursery.born(READER, tickets=[x.ticket for x in offers], terms=terms)
    assert until(lambda: any(offer.begun for offer in offers))
    if expose == "staging":
        assert until(lambda: both.owner.statistics()["slots"] > 0)
    nursery.end(pid)
    begun = [offer for offer in offers if offer.begun or offer.state != "held"]
    assert all(offer.taken(LIMIT) for offer in begun)
    assert {offer.state for offer in begun} <= {"lost", "taken"}
    assert until(lambda: both.owner.statistics()["slots"] == 0)
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.right()
    both.owner.revoke_all()


def test_the_error_of_an_owner_that_is_killed_names_it(nursery: Nursery, made: Sides) -> None:
    """Rows that are in staging buffers then do not all come; whatever notices it first says so."""
    local = Rows(8, 32, fill=-1)
    reader = made.reader(local.shard)
    pid, tickets = owned(nursery, "staging", 4)
    address = Ticket.read(tickets[0]).address
    reader.pull(tickets[0], [6, 1, 4]).synchronize(LIMIT)
    pulls = [reader.pull(ticket, [6, 1, 4], max_gbps=SLOW / 10) for ticket in tickets[1:]]
    nursery.end(pid)
    for pulled in pulls:
        with pytest.raises(TransferError) as error:
            pulled.synchronize(LIMIT)
        assert address in str(error.value)
        assert re.search("gone|ended|runs|did not cross", str(error.value))
        assert not pulled.published


def test_a_reader_that_was_stopped_finds_its_offer_gone(nursery: Nursery, made: Sides) -> None:
    """Fault 8."""
    both = Couple(made)
    offer = both.offer(lease=2.5)
    pid, _ = nursery.born(READER, tickets=[offer.ticket], terms={"max_gbps": NEVER})
    assert until(lambda: bool(offer.begun), LIMIT)
    stop(pid)
    assert offer.taken(LIMIT)
    both.src.whole.fill_(9)
    go_on(pid)
    assert nursery.hear(pid) in ("OfferGone", "PeerError")
    nursery.end(pid)
    assert offer.state in ("expired", "lost")


def check_whole_or_unpublished(pulled: Any, rows: Rows, right: torch.Tensor) -> None:
    """Wait for a pull; its rows are right, or nothing of it is published."""
    try:
        pulled.synchronize(LIMIT)
        assert torch.equal(rows.rows([6, 1, 4], TOKENS), right)
    except TransferError:
        assert not pulled.published


@pytest.mark.parametrize("rounds", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_leaks_and_nobody_hangs(
    nursery: Nursery, made: Sides, rounds: int
) -> None:
    """Faults 4, 5, 7 and 8. Owners and readers of both ways, in turns."""
    seed = random.Random(3)
    local = Rows(8, 32, fill=-1)
    before = None
    couples = {expose: Couple(made, expose) for expose in ("mapped", "staging")}
    reader = made.reader(local.shard)
    right = Rows().rows(BLOCKS, TOKENS)
    for number in range(rounds):
        expose = ("mapped", "staging")[number % 2]
        terms: dict[str, Any] = {"max_gbps": SLOW * 10} if expose == "mapped" else {}
        moment = seed.random() * 0.15
        if number % 4 < 2:
            pid, tickets = owned(nursery, expose, 8)
            pulls = list[Any]()
            try:
                pulls += [reader.pull(ticket, [6, 1, 4], **terms) for ticket in tickets[:4]]
                time.sleep(moment)
                nursery.end(pid)
                pulls += [reader.pull(ticket, [6, 1, 4], **terms) for ticket in tickets[4:]]
            except (PeerError, OfferGone):
                pass
            for pulled in pulls:
                check_whole_or_unpublished(pulled, local, right)
        else:
            both = couples[expose]
            offers = [both.offer() for _ in range(4)]
            pid, _ = nursery.born(READER, tickets=[x.ticket for x in offers], terms=terms)
            time.sleep(moment)
            nursery.end(pid)
            both.owner.revoke_all()
            assert until(lambda both=both: both.owner.statistics()["slots"] == 0)
        if number == 7:
            assert until(lambda: reader.channel.statistics()["links"] <= 1)
            before = left()
    now = before or left()
    # Workers that take rows begin when they are needed first. One connection has four files. Fifty
    # owners that leave a thread or a file would exceed both.
    threads = now[0] + 4
    assert until(lambda: left()[0] <= threads and left()[1] <= now[1] + 4, LIMIT), (left(), now)
    assert (local.whole[:, :, [0, 2, 3, 5, 7]] == -1).all()


EXIT = """
import sys
sys.path[:0] = [{0!r}]
from support.migrate_pulls import *
made = Sides()
both = Couple(made, {1!r})
both.pull(both.offer()).synchronize(30)
pulled = both.pull(both.offer(), **{2!r})
print("begun")
"""


@pytest.mark.parametrize(
    ("expose", "terms"),
    [
        ("mapped", {"max_gbps": 1e-9}),
        pytest.param("staging", {}, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_the_interpreters_end_waits_for_no_pull(expose: str, terms: dict[str, Any]) -> None:
    """Fault 31. Between slices, with everything open; no message is sent, and no library aborts."""
    text = EXIT.format(str(Path(__file__).parents[1]), expose, terms)
    done = ready.run("-c", text)  # the copy would take days
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")


@pytest.mark.full
def test_the_shards_of_the_owner_process_are_what_the_reader_expects() -> None:
    """The text above and this module mean the same rows."""
    rows = Rows()
    assert Shard(KVView([rows.whole[1]], LAYOUT), layers=(1, 2, 2)).group.box == ((1, 2), (0, 4))
    assert SMALL < rows.whole.nbytes
