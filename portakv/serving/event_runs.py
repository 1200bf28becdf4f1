# SPDX-License-Identifier: Apache-2.0
"""Changes of a store as events of engines name them: runs of blocks, in a medium."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from portakv.serving.ledger import Described as Described
from portakv.storage.changes import Change

#: The media of vLLM's events, by tier; other tiers are storage.
MEDIA = {"host": "CPU"}


def medium_of(change: Change) -> str:
    """Return the medium of the tier of a change."""
    return MEDIA.get(change.tier, "STORAGE")


def number_of(key: bytes) -> int:
    """Return the number by which events name a block: the last 64 bits of its key.

    vLLM's events have such numbers, and routers read no other hashes.
    """
    return int.from_bytes(key[-8:], "big")


def runs_of(
    changes: Iterable[Change], describe: Callable[[bytes], Described | None] | None = None
) -> Iterator[Sequence[Change]]:
    """Yield changes that one event can name: of a form and a tier, lost, or stored one after the
    other.

    ``describe``: returns what a block was made of. None: nothing is known of blocks, so an event
    names any stored blocks.
    """
    run = list[Change]()
    for change in changes:
        if run and not _continues(run[-1], change, describe):
            yield run
            run = []
        run.append(change)
    if run:
        yield run


def _continues(
    last: Change, change: Change, describe: Callable[[bytes], Described | None] | None
) -> bool:
    """Return whether the event of the last change can name this one as well."""
    if (change.tier, change.stored, change.form) != (last.tier, last.stored, last.form):
        return False
    if not change.stored or describe is None:
        return True
    described = describe(change.key)
    return described is not None and described.after == last.key
