# SPDX-License-Identifier: Apache-2.0
"""Many pulls between processes whose owner revokes offers, lets them expire, and uses their blocks
again immediately, while owners and readers are killed: what is committed is what was offered. Of
owners that are killed every other offer is pulled by its name."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.migrate_nursery import Nursery
from support.migrate_pulls import Couple, Rows, Sides, never_end, sides
from support.waits import LIMIT, until

from portakv.errors import PeerError, TransferError

RATES = (None, 5e-3, 1e-3)  # 10^9 bytes a second: at the last one a pull takes 0.1 s
INTO = [6, 1, 4]
TOKENS = 75
READERS = 4  # offers to each reader; a process that uses a device begins slowly, and takes more
READERS_ON_DEVICES = 20


class Where(NamedTuple):
    """The devices of the owner and of the reader."""

    owner: str
    reader: str

    def sides(self, expose: str) -> AbstractContextManager[Sides]:
        """Return the sides of this process for this test."""
        on_devices = self.owner != "cpu"
        return sides([*self] if on_devices else [], nccl=on_devices and expose == "staging")


HOST = Where("cpu", "cpu")
DEVICES = Where("cuda:1", "cuda:0")

OWNER = """
import os, random, time
from support.migrate_pulls import *
from portakv.migrate import Ticket
made, rows = Sides(), Rows(device=device)
terms = {"expose": expose, "staging": SMALL} if expose == "staging" else {}
owner = made.owner(rows.shard, **terms)
if silent:
    never_end(owner)
seed = random.Random(number)
while True:
    number += 1
    rows.whole.fill_(number)
    name = os.urandom(16) if number % 2 else None  # found in the owner's table or by a question
    offer = owner.offer([7, 3, 11, 0, 5], tokens=75, lease=seed.choice([0.005, 0.02, 5.0]),
                        max_lease=5.0, name=name)
    address, epoch = owner.channel.address, owner.epoch
    tell((number, Ticket.of(address, epoch, name) if name else offer.ticket))
    how = seed.choice(["revoke", "revoke", "wait"])
    if how == "revoke":
        time.sleep(seed.random() * 0.03)
        offer.revoke()
    else:
        offer.taken(5.0)  # no shorter than the lease: a busy machine pulls slowly
        offer.revoke()
    rows.whole.fill_(-2)
"""
READER = """
from support.migrate_pulls import *
made, rows = Sides(), Rows(8, 32, fill=-1, device=device)
reader = made.reader(rows.shard)
for number, ticket, rate in offers:
    try:
        reader.pull(ticket, [6, 1, 4], max_gbps=rate).synchronize(30)
    except Exception as error:
        tell((number, type(error).__name__))
    else:
        read = rows.rows([6, 1, 4], 75)
        tell((number, "right" if (read == number).all() else "stale"))
tell(None)
"""


def pull_of_a_dying_owner(
    expose: str, rounds: int, silent: bool = False, where: Where = HOST
) -> Counter[str]:
    """Pull from an owner in another process, which is killed now and then; count the ends."""
    seed = random.Random(5)
    ends = Counter[str]()
    local = Rows(8, 32, fill=-1, device=where.reader)
    with where.sides(expose) as made, Nursery() as nursery:
        reader = made.reader(local.shard)
        code = {"expose": expose, "silent": silent, "device": where.owner}
        pid, message = nursery.born(OWNER, number=0, **code)
        for number in range(rounds):
            current, ticket = message
            pulled: Any = None
            local.whole.fill_(-1)
            killed = number % 25 == 24
            try:
                pulled = reader.pull(ticket, INTO, max_gbps=seed.choice(RATES))
                if killed:
                    nursery.end(pid)
                pulled.synchronize(LIMIT)
            except TransferError as error:
                assert pulled is None or not pulled.published
                ends[type(error).__name__] += 1
            else:
                right = bool((local.rows(INTO, TOKENS) == current).all())
                ends["right" if right else "stale"] += 1
            assert (local.whole[:, :, [0, 2, 3, 5, 7]] == -1).all()
            if killed:
                if pulled is None:
                    nursery.end(pid)
                pid, message = nursery.born(OWNER, number=current, **code)
            else:
                message = nursery.hear(pid)
        nursery.end(pid)
    return ends


def end_all(offers: list[Any], seed: random.Random, revokes_all: bool = False) -> None:
    """Revoke some offers at any moment, or all of them, and wait for the ends of the others."""
    for offer in offers:
        revoked = revokes_all or seed.random() < 0.5
        offer.taken(seed.random() * 0.05 if revoked else 20)
        offer.revoke()


def offer_to_dying_readers(
    expose: str, rounds: int, silent: bool = False, where: Where = HOST
) -> Counter[str]:
    """Offer rows to readers in other processes, which are killed now and then; count the ends."""
    seed = random.Random(6)
    ends = Counter[str]()
    with where.sides(expose) as made, Nursery() as nursery:
        both = Couple(made, expose, where.owner)
        if silent:
            never_end(both.owner)
        each = READERS if where == HOST else READERS_ON_DEVICES
        for start in range(0, rounds, each):
            both.src.whole.fill_(start)
            offers = [both.offer() for _ in range(each)]
            listed = [(start, offer.ticket, seed.choice(RATES)) for offer in offers]
            values = {"offers": listed, "device": where.reader}
            pid = nursery.do("answer = bear(run, values)", run=READER, values=values)
            killed = start // each % 4 == 3
            if killed or where != HOST:  # a process that uses a device begins slowly
                assert until(lambda x=offers: any(o.begun or o.state != "held" for o in x), LIMIT)
            if not killed:
                end_all(offers, seed, revokes_all=silent)
                both.src.whole.fill_(-2)  # all have ended
                while (message := nursery.hear(pid)) is not None:
                    ends[message[1]] += 1
            nursery.end(pid)
            both.owner.revoke_all()
            ends["killed"] += killed
    return ends


ROUNDS = pytest.mark.parametrize(
    "rounds", [26, pytest.param(2000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
EXPOSE = pytest.mark.parametrize(
    "expose", ["mapped", pytest.param("staging", marks=pytest.mark.full)]
)
#: Tests of two devices have marks; they take some minutes each.
WHERE = pytest.mark.parametrize(
    "where",
    [
        HOST,
        pytest.param(
            DEVICES,
            marks=[
                pytest.mark.gpu,
                pytest.mark.full,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two devices"),
            ],
        ),
    ],
    ids=["host", "devices"],
)


def note(what: str, where: Where, expose: str, ends: Counter[str]) -> None:
    """Print the ends of a test, and append them to the file `SOAK_RESULTS`, a line of JSON each."""
    line = json.dumps({"what": what, "where": where, "expose": expose, "ends": dict(ends)})
    print(line)
    if file := os.environ.get("SOAK_RESULTS"):
        with Path(file).open("a", encoding="utf-8") as results:
            results.write(f"{line}\n")


@WHERE
@ROUNDS
@EXPOSE
def test_no_stale_row_of_an_owner_that_is_killed(expose: str, rounds: int, where: Where) -> None:
    ends = pull_of_a_dying_owner(expose, rounds, where=where)
    note("owners are killed", where, expose, ends)
    assert ends["stale"] == 0
    assert ends["right"]
    assert ends["OfferGone"]
    assert ends.total() == rounds


@WHERE
@ROUNDS
@EXPOSE
def test_no_stale_row_at_readers_that_are_killed(expose: str, rounds: int, where: Where) -> None:
    ends = offer_to_dying_readers(expose, rounds, where=where)
    note("readers are killed", where, expose, ends)
    assert ends["stale"] == 0
    assert ends["right"]
    assert ends["killed"] or rounds < 4 * READERS_ON_DEVICES
    assert PeerError.__name__ not in ends


@WHERE
@EXPOSE
def test_stale_rows_are_found_if_an_owner_that_is_killed_ends_no_offer(
    expose: str, where: Where
) -> None:
    """The negative control: neither a word nor an answer says that an offer has ended."""
    rounds = 40 if expose == "mapped" and where == HOST else 200
    ends = pull_of_a_dying_owner(expose, rounds, silent=True, where=where)
    note("owners are killed, control", where, expose, ends)
    assert ends["stale"]


@pytest.mark.full
@WHERE
@EXPOSE
def test_stale_rows_are_found_at_readers_if_the_owner_ends_no_offer(
    expose: str, where: Where
) -> None:
    """The negative control."""
    ends = offer_to_dying_readers(expose, 200, silent=True, where=where)
    note("readers are killed, control", where, expose, ends)
    assert ends["stale"]
