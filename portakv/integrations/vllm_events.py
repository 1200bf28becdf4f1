# SPDX-License-Identifier: Apache-2.0
"""The events by which vLLM tells routers which blocks the store has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from portakv.serving import Described
from portakv.serving.event_runs import medium_of, number_of, runs_of
from portakv.storage.changes import Change


class Kinds(NamedTuple):
    """vLLM's classes of events, and how its events name a block by its key."""

    stored: Any
    removed: Any
    hash_of: Callable[[bytes], Any] = number_of


try:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
except ImportError:  # a release without events
    KINDS = None
else:
    try:
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
    except ImportError:  # a release whose events have no numbers
        KINDS = Kinds(BlockStored, BlockRemoved)
    else:
        KINDS = Kinds(BlockStored, BlockRemoved, maybe_convert_block_hash)


def are_wanted(config: Any, kinds: Kinds | None = KINDS) -> bool:
    """Return whether an engine is to publish events, and its release of vLLM has them."""
    events = getattr(config, "kv_events_config", None)
    return kinds is not None and bool(getattr(events, "enable_kv_cache_events", False))


def events_of(
    changes: Iterable[Change],
    describe: Callable[[bytes], Described | None],
    block_size: int,
    kinds: Kinds | None = KINDS,
) -> list[Any]:
    """Return vLLM's events of the changes of a store, in order.

    Blocks that follow each other in a tier are one event. Blocks that were stored before the engine
    started have no description, and no event.

    Args:
        describe: returns what a block has been made of.
        block_size: the tokens of a stored block.
    """
    events = list[Any]()
    if kinds is None:
        return events
    for run in runs_of(changes, describe):
        medium = medium_of(run[0])
        keys = [change.key for change in run]
        hashes = [kinds.hash_of(key) for key in keys]
        if not run[0].stored:
            events.append(kinds.removed(block_hashes=hashes, medium=medium))
            continue
        described = [each for key in keys if (each := describe(key)) is not None]
        if not described:
            continue
        after = described[0].after
        adapter = getattr(described[0].about, "lora_request", None)
        events.append(
            kinds.stored(
                block_hashes=hashes,
                parent_block_hash=None if after is None else kinds.hash_of(after),
                token_ids=[token for each in described for token in each.tokens],
                block_size=block_size,
                lora_id=getattr(adapter, "lora_int_id", None),
                medium=medium,
                lora_name=getattr(adapter, "lora_name", None),
            )
        )
    return events
