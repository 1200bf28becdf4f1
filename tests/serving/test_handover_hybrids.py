# SPDX-License-Identifier: Apache-2.0
"""Requests of models with several groups of layers that cross between two engines, at random: all
rows and states come that the next token needs, and nothing else is touched."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from secrets import token_bytes
from typing import Any

import pytest
import torch
from support.hybrid_model import Model
from support.hybrid_rows import FAMILIES, UNDIVIDED, Places, Rows
from support.waits import LIMIT

from portakv.errors import InvalidTerms
from portakv.migrate import Shard, Ticket, shared_empty
from portakv.serving import Group, SchedulerSide
from portakv.serving.handover import Endpoint, Handover, HandoverTerms
from portakv.serving.plan import Handovers, OfferJob, PullJob, RemoteRows
from portakv.serving.scheduler import SHORT
from portakv.view import Index

#: Tokens of a block of either engine.
SIZES = (8, 16)
BLOCKS = 48
LONGEST = 300
#: How rows come: from memory that both map, or in copies.
TERMS = (HandoverTerms(), HandoverTerms(expose="staging"))


class Wrong(AssertionError):
    """Rows are not those of the request."""


class Rank:
    """A worker with some of the heads."""

    def __init__(
        self,
        model: Model,
        groups: Sequence[Group],
        rank: int,
        ranks: int,
        kind: type[Handover],
        offers: bool,
        terms: HandoverTerms,
    ) -> None:
        self.rows = [
            Rows(number, kind, group, parts, BLOCKS, rank, ranks, memory=shared)
            for number, (kind, group, parts) in enumerate(
                zip(model.kinds, groups, model.parts, strict=True)
            )
        ]
        shards = list[Shard]()
        of_groups = list[tuple[int, Group]]()
        for number, rows in enumerate(self.rows):
            for each, heads in zip(rows.views, rows.heads, strict=True):
                shards.append(Shard(each.view, heads=heads))
                of_groups.append((number, groups[number]))
        self.handover = kind(
            shards, "a model", terms, offers=offers, pulls=not offers, parts=of_groups
        )


def shared(nbytes: int) -> torch.Tensor:
    """Return memory that engines of one host can map."""
    return shared_empty((nbytes,), torch.uint8)


class Engines:
    """A prefill and a decode engine, with other block sizes and numbers of ranks."""

    def __init__(self, seed: int, family: str, kind: type[Handover] = Handover) -> None:
        self.chance = chance = random.Random(f"{family} {seed}")
        model = Model(chance, family, SIZES)
        # Compressed rows are not handed over.
        model.kinds = [kind._replace(tokens=1) for kind in model.kinds]
        terms = TERMS[seed % 2]
        both = [[Group(chance.choice(SIZES), **span) for span in model.spans] for _ in "pd"]
        self.src_groups = both[0]
        self.dst_groups = both[1]
        ranks = [chance.choice([1, 2, 4]) for _ in "pd"]
        if family in UNDIVIDED:
            ranks = [ranks[0], ranks[0]]
        self.src, self.dst = (
            [Rank(model, groups, n, many, kind, offers, terms) for n in range(many)]
            for groups, many, offers in zip(both, ranks, (True, False), strict=True)
        )

    def close(self) -> None:
        """Close all channels."""
        for rank in (*self.dst, *self.src):
            rank.handover.close()

    def blocks(self, groups: Sequence[Group], tokens: int) -> list[tuple[int, ...]]:
        """Return blocks of each group, without those that an engine has given up."""
        made = list[tuple[int, ...]]()
        for group in groups:
            many = 1 if group.states else -(-tokens // group.block_size)
            ids = self.chance.sample(range(BLOCKS), many)
            gone = 0 if group.states else group.first_needed(tokens) // group.block_size
            made.append((*[-1] * gone, *ids[gone:]))
        return made

    def hand_over(self, number: int) -> None:
        """Hand a request over, and compare. Raises `Wrong`."""
        chance = self.chance
        tokens = chance.choice([chance.randrange(SHORT, LONGEST), 16 * chance.randrange(4, 18)])
        src = self.blocks(self.src_groups, tokens)
        dst = self.blocks(self.dst_groups, tokens)
        first = 16 * chance.randrange((tokens - 1) // 16 + 1)
        dst = [
            ids
            if group.states
            else (*[-1] * (first // group.block_size), *ids[first // group.block_size :])
            for ids, group in zip(dst, self.dst_groups, strict=True)
        ]
        known = [chance.getrandbits(63) for _ in range(tokens)]
        for rank in self.src:
            for rows, group, ids in zip(rank.rows, self.src_groups, src, strict=True):
                first_kept = group.first_needed(tokens) // group.block_size * group.block_size
                rows.spoil()
                rows.write(*rows_at(rows, group, ids, range(first_kept, tokens), known))
        name = token_bytes(32)
        tickets = list[bytes]()
        for rank in self.src:
            rank.handover.begin(Handovers(offers=[OfferJob("r", name, tokens, (*src,), 60.0)]))
            endpoint = rank.handover.endpoint
            assert endpoint is not None
            tickets.append(Ticket.of(*endpoint, name))
        for rank in self.dst:
            for rows in rank.rows:
                rows.spoil()
            pull = PullJob(number, "r", (*tickets,), first, tokens, (*dst,))
            rank.handover.begin(Handovers(pulls=[pull]))
        for rank in self.dst:
            if not landed(rank.handover):
                raise Wrong("a pull has failed")
            for at, (rows, group) in enumerate(zip(rank.rows, self.dst_groups, strict=True)):
                needed = range(max(first, group.first_needed(tokens)), tokens)
                places, expected = rows_at(rows, group, dst[at], needed, known)
                wrong = rows.wrong(places, expected)
                rows.spoil(places)
                if wrong or not rows.is_spoiled():
                    raise Wrong(f"group {at}, from {first} to {tokens}: {wrong}")
        for rank in self.src:
            assert rank.handover.owner is not None
            rank.handover.owner.revoke_all()
            rank.handover.ended_offers()


def rows_at(
    rows: Rows, group: Group, ids: Sequence[int], tokens: range, known: Sequence[int]
) -> tuple[Places, list[int]]:
    """Return the places of rows, or of the state after the last token, and what they have."""
    if group.states:
        return ([ids[0]],), [known[-1]]
    places, ends = rows.places(ids, tokens)
    return places, [known[end - 1] for end in ends]


def landed(handover: Handover) -> bool:
    """Wait for a pull; return whether its rows landed."""
    until = time.monotonic() + LIMIT
    while not (ended := handover.ended_pulls()):
        assert time.monotonic() < until, "a pull does not end"
        time.sleep(1e-4)
    return all(each for _, each in ended)


def walk(seed: int, family: str, requests: int, kind: type[Handover] = Handover) -> None:
    """Hand requests over between two engines. Raises `Wrong`."""
    engines = Engines(seed, family, kind)
    try:
        for number in range(requests):
            engines.hand_over(number)
    finally:
        engines.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_cross(family: str, seed: int) -> None:
    walk(seed, family, 8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 142))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_requests_cross(family: str, seed: int) -> None:
    walk(seed, family, 20)


def left_out(ids: Any, tokens: int) -> Any:
    """Return ids that bring nothing."""
    return Index(torch.full((tokens,), -1))


def shifted(ids: Any, tokens: int) -> Any:
    """Return ids that bring the rows to other positions."""
    if not isinstance(ids, Index):
        return (*ids[1:], ids[0])
    slots = torch.from_numpy(ids.slots(tokens))
    there = (slots >= 0).nonzero().flatten()
    slots[there] = slots[there].roll(1) if len(there) > 1 else slots[there] ^ 1
    return Index(slots)


PARTS = [(family, at) for family, groups in FAMILIES.items() for at in range(len(groups))]


@pytest.mark.parametrize("fault", [left_out, shifted])
@pytest.mark.parametrize(("family", "at"), PARTS)
def test_each_group_matters(fault: Callable[[Any, int], Any], family: str, at: int) -> None:
    """The controls: a group does not come, or to another position."""

    class Faulty(Handover):
        def ids_of(self, job: Any, pulls: bool) -> list[Any]:
            lists = super().ids_of(job, pulls)
            if pulls:
                number = next(n for n, (group, _) in enumerate(self.parts) if group == at)
                lists[number] = fault(lists[number], job.tokens)
            return lists

    with pytest.raises(Wrong, match=f"group {at}"):
        walk(0, family, 8, Faulty)


def test_rows_that_an_engine_gave_up_are_not_asked_for() -> None:
    """The control: blocks of other sizes would begin with rows that the other engine lacks."""

    class Asking(Handover):
        def ids_of(self, job: Any, pulls: bool) -> list[Any]:
            return super().ids_of(job, False)

    def walks() -> None:
        for seed in range(6):
            walk(seed, "window + full", 8, Asking)

    with pytest.raises(Wrong):
        walks()


# --- in the scheduler


PROMPT = [*range(100)]
ENDPOINT = Endpoint("ipc:///a", bytes(16))


def side() -> SchedulerSide:
    made = SchedulerSide(16, [Group(16, states="last"), Group(16, window=32)], 1, None)
    made.open_offers([ENDPOINT], 7.0)
    return made


@pytest.mark.parametrize(
    ("tokens", "ids", "offered"),
    [
        (99, (-1, -1, -1, -1, -1, 5, 6), (6,)),
        (96, (-1, -1, -1, -1, -1, 5), (5,)),
        (99, (-1, -1, -1, -1, -1, 5, -1), None),
        (99, (-1, -1, -1, -1, -1, 5), None),
        (SHORT - 1, (-1, -1, -1, 5), None),
    ],
    ids=["", "end of a block", "no state", "no block", "few tokens"],
)
def test_an_offer_has_the_state_after_its_tokens(
    tokens: int, ids: tuple[int, ...], offered: tuple[int, ...] | None
) -> None:
    made = side()
    made.add("a", PROMPT[:tokens])
    window = (-1, -1, 1, 2, 3, 4, 5)
    rows = made.offer("a", tokens, (ids, window))
    assert (rows is None) is (offered is None)
    jobs = made.plan().handovers.offers
    assert [job.blocks for job in jobs] == ([] if offered is None else [(offered, window)])


@pytest.mark.parametrize("last", [9, -1])
def test_a_pull_needs_a_block_for_a_state(last: int) -> None:
    made = side()
    made.add("a", PROMPT, remote=RemoteRows((b"ticket",), 99, 7.0))
    assert made.leading("a", 16) == 83
    ids = ((1, -1, -1, -1, -1, -1, last), (-1, -1, -1, -1, 5, 6, 7))
    if last < 0:
        with pytest.raises(InvalidTerms, match="a block for the state after 99 tokens"):
            made.allocated("a", 16, 83, ids)
        return
    made.allocated("a", 16, 83, ids)
    (job,) = made.plan().handovers.pulls
    assert job.blocks == ((9,), (-1, -1, -1, -1, 5, 6, 7))
