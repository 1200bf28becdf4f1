# SPDX-License-Identifier: Apache-2.0
"""A worker of an engine that hands rows over, over real channels and real caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from portakv import KVView
from portakv.migrate import Shard, Ticket, shared_empty
from portakv.serving import GroupCache, Plan, Report, WorkerSide
from portakv.serving.handover import Handover, HandoverTerms
from portakv.serving.local import NoBlocks
from portakv.serving.plan import NO_HANDOVERS, Handovers, OfferJob, PullJob
from portakv.storage import BlockForm
from support.waits import LIMIT, until

LAYOUT = "layer | kv block token head dim"
MODEL = "a model"
LAYERS = 3
HEADS = 4
DIM = 8
TOKENS = 75
LEASE = 20.0
USUAL = HandoverTerms()


class Side:
    """A worker of an engine.

    Args:
        blocks, size: of its cache.
        heads: that it has, of `HEADS`.
        terms: of `Handover`.
    """

    def __init__(
        self,
        blocks: int,
        size: int,
        heads: tuple[int, int] = (0, HEADS),
        handing: HandoverTerms = USUAL,
        **terms: Any,
    ) -> None:
        shape = (LAYERS, 2, blocks, size, heads[1] - heads[0], DIM)
        self.memory = shared_empty(shape, torch.int32)
        self.memory.fill_(-1)
        view = KVView([*self.memory], LAYOUT)
        shard = Shard(view, heads=(*heads, HEADS))
        model = terms.pop("model", MODEL)
        address = handing.address_of(0)
        self.handover = Handover([shard], model, handing, address=address, **terms)
        blocks_of = NoBlocks(BlockForm.of(view, MODEL))
        self.worker_side = WorkerSide([GroupCache(view, blocks_of)], handover=self.handover)
        self.heads = heads
        self.freed = set[str]()
        self.report = Report()
        self.loaded = set[str]()
        self.failed = set[int]()

    def write(self, ids: range) -> None:
        """Write the rows of a prompt into blocks."""
        self.rows(ids).copy_(ROWS[:, :, :, self.heads[0] : self.heads[1]])

    def rows(self, ids: range) -> torch.Tensor:
        """Return the rows of a prompt in blocks that follow each other, without a copy."""
        return self.memory[:, :, ids.start : ids.stop].flatten(2, 3)[:, :, :TOKENS]

    def right(self, ids: Sequence[int]) -> bool:
        """Return whether blocks have the rows of a prompt."""
        rows = ROWS[:, :, :, self.heads[0] : self.heads[1]]
        return torch.equal(self.memory[:, :, [*ids]].flatten(2, 3)[:, :, :TOKENS], rows)

    def step(
        self,
        handovers: Handovers = NO_HANDOVERS,
        retained: tuple[str, ...] = (),
        idle: bool = False,
    ) -> Side:
        """Carry out a plan, take what has ended, and return this side."""
        self.worker_side.load(Plan(handovers=handovers, retained=[*retained], idle=idle))
        self.report = self.report.merged(self.worker_side.report())
        ended = self.worker_side.ended()
        self.freed |= ended.freed
        self.loaded |= ended.loaded
        self.failed |= ended.failed[0]
        return self

    def offer(self, name: bytes, ids: Sequence[int], lease: float = LEASE) -> None:
        """Offer the rows of a prompt, whose request has ended."""
        job = OfferJob("p", name, TOKENS, ((*ids,),), lease)
        self.step(Handovers(offers=[job]), retained=("p",))

    def pull(self, tickets: Sequence[bytes], ids: Sequence[int], first: int = 0) -> None:
        """Pull the rows of a prompt."""
        job = PullJob(1, "d", (*tickets,), first, TOKENS, ((*ids,),))
        self.step(Handovers(pulls=[job]))

    def pulled(self) -> bool:
        """Wait for a pull; return whether its rows landed."""
        assert until(lambda: bool(self.step().loaded), LIMIT)
        return self.report.missing == {1: frozenset()}

    def ticket(self, name: bytes) -> bytes:
        """Return the ticket of an offer."""
        endpoint = self.handover.endpoint
        assert endpoint is not None
        return Ticket.of(*endpoint, name)


def prompt_rows() -> torch.Tensor:
    """Return different rows, int32 ``[layer, kv, token, head, dim]``."""
    shape = (LAYERS, 2, TOKENS, HEADS, DIM)
    count = LAYERS * 2 * TOKENS * HEADS * DIM
    return torch.arange(count, dtype=torch.int32, device="cpu").view(shape)


ROWS = prompt_rows()
