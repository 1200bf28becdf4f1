# SPDX-License-Identifier: Apache-2.0
"""The events by which vLLM tells routers which blocks the store has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from portakv.serving import Described
from portakv.storage.changes import Change


class Kinds(NamedTuple):
    """vLLM's classes of events."""

    stored: Any
    removed: Any


try:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
except ImportError:  # a release without events
    KINDS = None
else:
    KINDS = Kinds(BlockStored, BlockRemoved)

#: The media of vLLM's events, by tier; other tiers are storage.
MEDIA = {"host": "CPU"}


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
    for run in _runs(changes, describe):
        medium = MEDIA.get(run[0].tier, "STORAGE")
        hashes = [change.key for change in run]
        if not run[0].stored:
            events.append(kinds.removed(block_hashes=hashes, medium=medium))
            continue
        described = [each for key in hashes if (each := describe(key)) is not None]
        if not described:
            continue
        adapter = getattr(described[0].about, "lora_request", None)
        events.append(
            kinds.stored(
                block_hashes=hashes,
                parent_block_hash=described[0].after,
                token_ids=[token for each in described for token in each.tokens],
                block_size=block_size,
                lora_id=getattr(adapter, "lora_int_id", None),
                medium=medium,
                lora_name=getattr(adapter, "lora_name", None),
            )
        )
    return events


def _runs(
    changes: Iterable[Change], describe: Callable[[bytes], Described | None]
) -> Iterator[Sequence[Change]]:
    """Yield changes that one event can name: of a tier, lost, or stored one after the other."""
    run = list[Change]()
    for change in changes:
        if run:
            last = run[-1]
            same = (change.tier, change.stored) == (last.tier, last.stored)
            described = describe(change.key) if same and change.stored else None
            follows = described is not None and described.after == last.key
            if not same or (change.stored and not follows):
                yield run
                run = []
        run.append(change)
    if run:
        yield run
