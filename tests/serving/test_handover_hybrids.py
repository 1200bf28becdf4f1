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
from support.waits import LIMIT

from portakv.errors import InvalidTerms
from portakv.migrate import Shard, Ticket, shared_empty
from portakv.serving import Group, SchedulerSide
from portakv.serving.handover import Endpoint, Handover, HandoverTerms
from portakv.serving.plan import Handovers, OfferJob, PullJob, RemoteRows
from portakv.serving.scheduler import SHORT
from portakv.view import Index, KVView

HEADS = 4
DIM = 4
LAYERS = 2
#: Rows of a state, as those of a convolution.
STEPS = 3
BLOCKS = 96
LONGEST = 300
#: The groups of each family; a group's blocks are drawn.
FAMILIES: dict[str, list[Group]] = {
    "states": [Group(1, states="last"), Group(1)],
    "windows": [Group(1, window=24), Group(1)],
    "windows of a token more": [Group(1, window=33), Group(1, window=16), Group(1)],
    "chunks": [Group(1, chunk=32), Group(1)],
    "windows and states": [Group(1, window=40), Group(1, states="every"), Group(1)],
    "latent rows and an index": [Group(1), Group(1)],
}
#: How rows come: from memory that both map, or in copies.
TERMS = (HandoverTerms(), HandoverTerms(expose="staging"))
#: Numbers of a row without and with quantization.
DTYPES = (torch.int32, torch.uint8)


class Wrong(AssertionError):
    """Rows are not those of the request."""


def row_of(request: int, group: int, tokens: int) -> torch.Tensor:
    """Return the rows of a group, int32 ``[layers, tokens, heads, dim]``, all different."""
    draw = torch.Generator().manual_seed(request * 31 + group)
    shape = (tokens, LAYERS, HEADS, DIM)
    return torch.randint(0, 250, shape, generator=draw).transpose(0, 1)


class Rank:
    """A worker with some of the heads."""

    def __init__(
        self,
        groups: Sequence[Group],
        heads: tuple[int, int],
        dtype: torch.dtype,
        kind: type[Handover],
        offers: bool,
        terms: HandoverTerms,
    ) -> None:
        self.heads = slice(*heads)
        many = heads[1] - heads[0]
        self.memory = [
            shared_empty(
                (LAYERS, BLOCKS, STEPS if each.states else each.block_size, many, DIM), dtype
            )
            for each in groups
        ]
        for each in self.memory:
            each.fill_(251)
        views = [KVView([*each], "layer | block token head dim") for each in self.memory]
        shards = [Shard(view, heads=(*heads, HEADS)) for view in views]
        self.handover = kind(
            shards, "a model", terms, offers=offers, pulls=not offers, parts=[*enumerate(groups)]
        )


class Engines:
    """A prefill and a decode engine, with other block sizes and numbers of ranks."""

    def __init__(self, seed: int, family: str, kind: type[Handover] = Handover) -> None:
        self.chance = chance = random.Random(f"{family} {seed}")
        groups = FAMILIES[family]
        sizes = [[chance.choice([8, 16]) for _ in groups] for _ in "pd"]
        self.dtype = chance.choice(DTYPES)
        terms = TERMS[seed % 2]
        both = [
            [each._replace(block_size=size) for each, size in zip(groups, some, strict=True)]
            for some in sizes
        ]
        self.src_groups = both[0]
        self.dst_groups = both[1]
        ranks = [chance.choice([1, 2, 4]) for _ in "pd"]
        parts = [
            [(n * HEADS // many, (n + 1) * HEADS // many) for n in range(many)] for many in ranks
        ]
        self.src = [Rank(both[0], x, self.dtype, kind, True, terms) for x in parts[0]]
        self.dst = [Rank(both[1], x, self.dtype, kind, False, terms) for x in parts[1]]

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
        rows = [row_of(number, at, tokens).to(self.dtype) for at in range(len(src))]
        for rank in self.src:
            for at, group in enumerate(self.src_groups):
                self._put(rank, at, group, src[at], rows[at], tokens)
        name = token_bytes(32)
        tickets = list[bytes]()
        for rank in self.src:
            rank.handover.begin(Handovers(offers=[OfferJob("r", name, tokens, (*src,), 60.0)]))
            endpoint = rank.handover.endpoint
            assert endpoint is not None
            tickets.append(Ticket.of(*endpoint, name))
        for rank in self.dst:
            for each in rank.memory:
                each.fill_(251)
            pull = PullJob(number, "r", (*tickets,), first, tokens, (*dst,))
            rank.handover.begin(Handovers(pulls=[pull]))
        for rank in self.dst:
            if not landed(rank.handover):
                raise Wrong("a pull has failed")
            self._check(rank, dst, rows, first, tokens)
        for rank in self.src:
            assert rank.handover.owner is not None
            rank.handover.owner.revoke_all()
            rank.handover.ended_offers()

    def _put(
        self,
        rank: Rank,
        at: int,
        group: Group,
        ids: Sequence[int],
        rows: torch.Tensor,
        tokens: int,
    ) -> None:
        """Write the rows of a request into its blocks, and others into all other ones."""
        memory = rank.memory[at]
        memory.copy_(torch.randint(0, 250, memory.shape).to(self.dtype))
        for place, block in enumerate(ids):
            if group.states:
                memory[:, block] = rows[:, -STEPS:, rank.heads]
            elif block >= 0:
                first = place * group.block_size
                some = rows[:, first : first + group.block_size, rank.heads]
                memory[:, block, : some.shape[1]] = some

    def _check(
        self,
        rank: Rank,
        dst: Sequence[Sequence[int]],
        rows: Sequence[torch.Tensor],
        first: int,
        tokens: int,
    ) -> None:
        """Compare all of a rank's memory."""
        for at, group in enumerate(self.dst_groups):
            wanted = torch.full_like(rank.memory[at], 251)
            needed = max(first, group.first_needed(tokens))
            for place, block in enumerate(dst[at]):
                if group.states:
                    wanted[:, block] = rows[at][:, -STEPS:, rank.heads]
                    continue
                begin = max(needed, place * group.block_size)
                end = min(tokens, (place + 1) * group.block_size)
                if begin < end:
                    span = slice(begin - place * group.block_size, end - place * group.block_size)
                    wanted[:, block, span] = rows[at][:, begin:end, rank.heads]
            if not torch.equal(rank.memory[at], wanted):
                raise Wrong(f"group {at}, from {first} to {tokens}")


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


def left_out(lists: list[Any], at: int, tokens: int) -> Any:
    """Return ids that bring nothing."""
    return Index(torch.full((tokens,), -1))


def shifted(lists: list[Any], at: int, tokens: int) -> Any:
    """Return ids that bring the rows to other positions."""
    ids = lists[at]
    slots = torch.from_numpy(ids.slots(tokens)) if isinstance(ids, Index) else None
    if slots is None:
        return (*ids[1:], ids[0])
    there = (slots >= 0).nonzero().flatten()
    slots[there] = slots[there].roll(1)
    return Index(slots)


PARTS = [(family, at) for family, groups in FAMILIES.items() for at in range(len(groups))]


@pytest.mark.parametrize("fault", [left_out, shifted])
@pytest.mark.parametrize(("family", "at"), PARTS)
def test_each_group_matters(
    fault: Callable[[list[Any], int, int], Any], family: str, at: int
) -> None:
    """The controls: a group does not come, or to another position."""

    class Faulty(Handover):
        def ids_of(self, job: Any, pulls: bool) -> list[Any]:
            lists = super().ids_of(job, pulls)
            if pulls:
                lists[at] = fault(lists, at, job.tokens)
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
            walk(seed, "windows", 8, Asking)

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
