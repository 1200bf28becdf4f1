# SPDX-License-Identifier: Apache-2.0
"""What is under way although nobody may hold it: completions, and errors that nobody asked for."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from portakv.runtime.transfer import Completion, failed

if TYPE_CHECKING:
    from portakv.errors import PortaKVError

# Work that no stream orders, and status words, must outlive a handle that the caller dropped.
_watched: deque[Completion] = deque()
_WATCHED = 16  # looked through only when there are more, so that a call seldom pays for it


def watch(completion: Completion, owner: Any = None) -> None:
    """Hold a completion until it has ended.

    Args:
        completion: what a launch left behind.
        owner: a weak reference to who is told of an error that nobody asked for.
    """
    if completion.owner is None:
        completion.owner = owner
    _watched.append(completion)
    # Two for each that comes, so that a long queue becomes shorter again.
    for _ in range(2):
        if len(_watched) <= _WATCHED or not _retire():
            return


def _retire() -> bool:
    """Let the oldest completion go; False where it has not ended."""
    try:
        oldest = _watched.popleft()  # taken at once: no other thread looks at it meanwhile
    except IndexError:
        return False
    if not oldest.ended():
        _watched.appendleft(oldest)
        return False
    return True


def fail(completion: Completion, owner: Any) -> None:
    """Keep a completion whose error is known already, for its owner to be told."""
    completion.owner = owner
    failed.append(completion)


def unasked_error(owner: Any) -> PortaKVError | None:
    """An error of this owner's that nobody was told of yet, once; never blocks."""
    for completion in tuple(_watched):
        if completion.owner is owner or completion.owner is None:
            completion.ended()  # takes an error out of its word, where nobody has to look again
        if completion.owner is owner:
            error = completion.take_error()  # also of work that goes on
            if error is not None:
                return error
    for completion in tuple(failed):
        if completion.owner is owner:
            error = completion.take_error()
            if error is not None:
                return error
        # Told by now, one way or the other, or nobody is left to be told.
        if not completion.untold or completion.owner is None or completion.owner() is None:
            with suppress(ValueError):  # another thread was faster
                failed.remove(completion)
    return None
