# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of `Owner.offer`, and record the span of an offer."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from portakv import arguments
from portakv.errors import LayoutError, SlotError
from portakv.graph.alarms import watch as watch
from portakv.migrate import messages
from portakv.migrate.figures import Figures as Figures
from portakv.migrate.figures import owner_figures as owner_figures
from portakv.migrate.gathers import BlockList
from portakv.migrate.shards import Shard
from portakv.runtime import tracing
from portakv.runtime.tracing import UNTRACED as UNTRACED
from portakv.runtime.tracing import begin
from portakv.view.index import Ids as Ids
from portakv.view.index import Index as Index

begin_span = begin
MOST_LEASE = 1e6  # seconds
SECONDS = "a number of seconds above 0, at most 10^6"


def block_lists(
    shards: Sequence[Shard], blocks: Sequence[Ids | None], tokens: int
) -> list[BlockList]:
    """Return checked ids and the tokens of a block, for each shard; raise as `Owner.offer`."""
    if len(blocks) != len(shards):
        raise SlotError(
            f"Expected blocks to be {len(shards)} lists, one for each shard, got {len(blocks)}. "
            f"Pass a list for each."
        )
    try:
        return [block_list(*each, tokens) for each in zip(shards, blocks, strict=True)]
    except (SlotError, LayoutError):
        # Only now: an offer without an error does not pay for it.
        with arguments.naming("blocks", "lists of ids of the views' blocks"):
            raise


def checked_lease(tokens: int, lease: float, readers: int, max_lease: float) -> tuple[float, float]:
    """Return the lease and the longest lease of an offer; raise as `Owner.offer`."""
    if (
        type(tokens) is int
        and 1 <= tokens <= 1 << 31
        and type(readers) is int
        and 1 <= readers <= 1 << 31
        and type(lease) is float
        and type(max_lease) is float
        and 1e-9 <= lease <= max_lease <= MOST_LEASE
    ):
        return lease, max_lease  # plain numbers, as in most calls
    arguments.whole("tokens", tokens, 1, 1 << 31)
    lease = arguments.number("lease", lease, 1e-9, MOST_LEASE, SECONDS)
    arguments.whole("readers", readers, 1, 1 << 31)
    least = f"at least the lease of {lease:g} s"
    return lease, arguments.number("max_lease", max_lease, lease, inf, least)


def checked_extension(seconds: float) -> float:
    """Return the seconds of `Offer.extend`; raise as it does."""
    return arguments.number("seconds", seconds, 0.0, MOST_LEASE, SECONDS)


def end_span(began: tracing.Began, state: str, tokens: int) -> None:
    """Record the span of an offer that has ended, if the process makes spans."""
    if began.at:
        tracing.end("portakv offer", began, {"offer.state": state, "offer.tokens": tokens})


def block_list(shard: Shard, block_ids: Ids | None, tokens: int) -> BlockList:
    """Return the checked ids of a shard's blocks, and the tokens of a block."""
    if block_ids is None:
        raise arguments.invalid("blocks", "ids", None, "Name the blocks to offer.")
    view = shard.view
    slots = view.slots
    index = Index.of(block_ids, view.block_size or 1)
    index.check_length(tokens, slots, "offered")
    if not index.on_host:
        index = index.to_host()
    if index.offset or index.ids is None:
        index = Index(index.slots(tokens))
    skips = index.check(tokens, slots, "offered", distinct=True)
    used = index.host_ids()[: -(-tokens // index.step)]
    if skips:
        used = used.clip(min=-1)
    ids = used.astype("<i4")
    if ids.nbytes > messages.MOST_ID_BYTES:
        raise SlotError(
            f"Expected at most {messages.MOST_ID_BYTES // 4} ids in a list of blocks, "
            f"got {len(ids)}. Offer blocks in place of slots, or make several offers."
        )
    return ids, index.step
