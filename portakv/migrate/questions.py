# SPDX-License-Identifier: Apache-2.0
"""Questions of the thread that looks after pulls, to several owners at a time.

The thread must not wait for one owner while the pulls of others wait, so an owner that does not
answer in time is left alone for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, TypeAlias

from portakv.errors import TransferTimeout
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Answer, Message
from portakv.runtime.bounded import Bounded

ASKING = 0.1  # the most seconds that a question may take, since other pulls wait meanwhile
PAUSE = 4e-3  # seconds between two questions to an owner about the same
BUSY = 0.5  # seconds without a question to an owner that did not answer in time

#: The address and the epoch of an owner.
OwnerKey: TypeAlias = tuple[str, bytes]


class Questions:
    """Asks owners. One thread calls it; any may call `note`.

    Args:
        channel: of the reader.
        what: the name of the subjects, in the plural.
        kind: the message that answers; an owner may also answer by `Answer`.
    """

    def __init__(self, channel: Channel, what: str, kind: type[Message]) -> None:
        self._channel = channel
        self._kind: Any = kind | Answer
        # Owners with the time of the next question, and whether they were late with an answer.
        self._next: Bounded[OwnerKey, tuple[float, bool]] = Bounded(f"owners of {what}", 1024)

    def is_due(self, owner: OwnerKey, first: bool = False) -> bool:
        """Return True if an owner may get a question now.

        ``first``: about something for the first time, which waits for a late owner alone.
        """
        due, late = self._next.get(owner, (0.0, False))
        return monotonic() >= due or (first and not late)

    def note(self, owner: OwnerKey) -> None:
        """Note that an owner has just answered another thread."""
        self._next[owner] = monotonic() + PAUSE, False

    def ask(self, questions: Sequence[tuple[OwnerKey, Message]]) -> list[Any]:
        """Return the answer, or the error, of each question; None if an owner is late."""
        if not questions:
            return []
        requests = [(address, message) for (address, _), message in questions]
        answers = self._channel.ask_all(requests, self._kind, ASKING)
        result = list[Any]()
        for (owner, _), answer in zip(questions, answers, strict=True):
            late = isinstance(answer, TransferTimeout)
            self._next[owner] = monotonic() + (BUSY if late else PAUSE), late
            result.append(None if late else answer)
        return result
