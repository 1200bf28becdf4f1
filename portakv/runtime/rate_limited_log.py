# SPDX-License-Identifier: Apache-2.0
"""Log warnings of faults that may occur a thousand times a second, at a few lines a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from portakv.runtime.bounded import Bounded

#: The most lines of one topic that are logged within `SECONDS`.
LINES = 10
#: Seconds after which a topic may be logged again.
SECONDS = 60.0
#: What an operator does about a tier that is slow or hangs.
SLOW_DEVICE = "Look at its device and mount: dmesg, iostat."
_TOPICS = 256


@dataclass
class _Topic:
    """The lines of one topic since a time."""

    since: float
    logged: int = 0
    left_out: int = 0


class RateLimitedLog:
    """Log warnings, at most ``lines`` of each topic within `SECONDS`.

    The first line after that reports how many were left out. Any number of threads may use one log;
    those that log at the same moment may log more lines.

    Args:
        logger: gets the lines.
        clock: returns seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._topics: Bounded[str, _Topic] = Bounded("topics of warnings", _TOPICS)

    def warning(self, topic: str, text: str, *values: object, lines: int = LINES) -> None:
        """Log ``text % values`` unless the topic has had its ``lines``. Pass no secret."""
        now = self._clock()
        left_out = 0
        entry = self._topics.get(topic)
        if entry is None or now >= entry.since + SECONDS:
            left_out = entry.left_out if entry else 0
            entry = _Topic(now)
            self._topics[topic] = entry
        if entry.logged >= lines:
            entry.left_out += 1
            return
        entry.logged += 1
        if left_out:
            text += " (%d more like this one were not logged)"
            values = (*values, left_out)
        self._logger.warning(text, *values)
