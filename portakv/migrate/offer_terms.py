# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of `Owner.offer`, and record the span of an offer."""

from __future__ import annotations

from collections.abc import Sequence

from portakv import arguments
from portakv.errors import SlotError
from portakv.graph.alarms import watch as watch
from portakv.migrate import messages
from portakv.migrate.figures import Figures as Figures
from portakv.migrate.figures import owner_figures as owner_figures
from portakv.migrate.gathers import BlockList
from portakv.migrate.shards import Shard, check_length, index_of, names_of
from portakv.runtime import tracing
from portakv.runtime.tracing import UNTRACED as UNTRACED
from portakv.runtime.tracing import begin
from portakv.view.index import Ids as Ids
from portakv.view.index import Index as Index

begin_span = begin
MOST_LEASE = 1e6  # seconds
SECONDS = "a number of seconds above 0, at most 10^6"
EXTENSION = "a number of seconds from 0 to 10^6"


def block_lists(
    shards: Sequence[Shard], blocks: Sequence[Ids | None], tokens: int
) -> list[BlockList]:
    """Return checked ids and the tokens of a block, for each shard; raise as `Owner.offer`."""
    if len(blocks) != len(shards):
        raise SlotError(
            f"Expected blocks to be {len(shards)} lists, one for each shard, got {len(blocks)}. "
            f"Pass a list for each."
        )
    names = names_of(len(shards))
    return [block_list(*each, tokens) for each in zip(names, shards, blocks, strict=True)]


def checked(
    tokens: int, readers: int, lease: float, max_lease: float
) -> tuple[int, int, float, float]:
    """Return the tokens, the readers, the lease and the longest lease of an offer; raise as
    `Owner.offer`."""
    if (
        type(tokens) is int
        and 1 <= tokens <= 1 << 31
        and type(readers) is int
        and 1 <= readers <= 1 << 31
        and type(lease) is float
        and type(max_lease) is float
        and 1e-9 <= lease <= max_lease <= MOST_LEASE
    ):
        return tokens, readers, lease, max_lease  # plain numbers, as in most calls
    tokens = arguments.whole("tokens", tokens, 1, 1 << 31)
    lease = arguments.number("lease", lease, 1e-9, MOST_LEASE, SECONDS)
    readers = arguments.whole("readers", readers, 1, 1 << 31)
    limits = f"a number of seconds from the lease of {lease:g} s to 10^6"
    max_lease = arguments.number("max_lease", max_lease, lease, MOST_LEASE, limits)
    return tokens, readers, lease, max_lease


def checked_extension(seconds: float) -> float:
    """Return the seconds of `Offer.extend`; raise as it does."""
    return arguments.number("seconds", seconds, 0.0, MOST_LEASE, EXTENSION)


def end_span(began: tracing.Began, state: str, tokens: int) -> None:
    """Record the span of an offer that has ended, if the process makes spans."""
    if began.at:
        tracing.end("portakv offer", began, {"offer.state": state, "offer.tokens": tokens})


def block_list(name: str, shard: Shard, block_ids: Ids | None, tokens: int) -> BlockList:
    """Return the checked ids of a shard's blocks, and the tokens of a block; ``name``: of the
    list in errors."""
    if block_ids is None:
        raise arguments.invalid(name, "ids", None, "Name the blocks to offer.")
    view = shard.view
    slots = view.slots
    index = index_of(name, view, block_ids)
    check_length(name, index, 0, tokens, slots)
    if not index.on_host:
        index = index.to_host()
    if index.offset or index.ids is None:
        index = Index(index.slots(tokens))
    skips = index.check_named(name, tokens, slots, distinct=True)
    used = index.host_ids()[: -(-tokens // index.step)]
    if skips:
        used = used.clip(min=-1)
    ids = used.astype("<i4")
    if ids.nbytes > messages.MOST_ID_BYTES:
        raise SlotError(
            f"Expected {name} to have at most {messages.MOST_ID_BYTES // 4} ids, "
            f"got {len(ids)}. Offer blocks in place of slots, or make several offers."
        )
    return ids, index.step
