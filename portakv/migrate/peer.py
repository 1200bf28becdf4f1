# SPDX-License-Identifier: Apache-2.0
"""A connection between two channels, as one side of it sees the other."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Peer:
    """A connection to a peer. ``id`` is random: the id of the peer's `Channel`."""

    def __init__(self, id: bytes = b"") -> None:
        self.id = id
        self.gone = False
        self._calls = dict[object, Callable[[], object]]()
        self.link = b""  # the number by which the requester knows the connection

    def on_gone(self, call: Callable[[], object]) -> Callable[[], object]:
        """Call ``call`` once when the connection ends, immediately if it has ended.

        The call must be quick: it runs in the thread that detects the end. Returns a function that
        withdraws the call.
        """
        key = object()
        self._calls[key] = call
        if self.gone:
            self.end()
        return lambda: self._calls.pop(key, None)

    def end(self) -> None:
        """Mark the connection as ended, and make the calls of `on_gone`."""
        self.gone = True
        for key in list(self._calls):
            if call := self._calls.pop(key, None):  # else another thread has made the call
                try:
                    call()
                except Exception:  # the other calls must be made, too
                    _log.exception("A call for the end of a connection failed.")
