# SPDX-License-Identifier: Apache-2.0
"""`KeptLocks`: locks and deletions of blocks in the store of a keeper."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np

from portakv.errors import PortaKVError, TransferError
from portakv.graph import Mask
from portakv.serving.keeper_link import ASKING, Link, Session
from portakv.serving.keeper_messages import (
    KEY,
    MOST_KEYS,
    Delete,
    Done,
    Lock,
    Unlock,
    joined_keys,
)
from portakv.serving.keeper_requests import Requests
from portakv.storage.keys import check_keys
from portakv.storage.pins import Pins
from portakv.storage.tier import Keys


class KeptLocks:
    """The locks of a process on blocks of one group of layers. `KeeperClient` makes it.

    It never raises for a keeper that is gone, which locks and deletes nothing.
    """

    def __init__(self, requests: Requests, link: Link, group: int) -> None:
        self._requests = requests
        self._link = link
        self._group = group

    def pin(self, keys: Keys) -> Pins:
        """Keep blocks from eviction until `Pins.release`, as far as the keeper has them.

        Waits for the keeper's answer, two seconds at most. The end of the session, such as that of
        the keeper, ends the pins too.
        """
        checked = check_keys(keys)
        pins = Pins(len(checked))
        for first in range(0, len(checked), MOST_KEYS):
            some = checked[first : first + MOST_KEYS]
            number = self._requests.next_number()
            session = self._link.session
            if session is None:
                break
            done = self._done(Lock(session.number, number, self._group, joined_keys(some)))
            places = [first + at for at in np.flatnonzero(done).tolist()]
            release = partial(self._unlock, session, number)
            for place in places:
                pins.add(place, release if place == places[0] else bool)
            if not places:
                release()
        return pins

    def delete(self, keys: Keys) -> Mask:
        """Forget blocks, for all processes; return which were there, bool ``[keys]``.

        Waits for the keeper's answer, two seconds at most.
        """
        checked = check_keys(keys)
        gone = np.zeros(len(checked), np.bool_)
        for first in range(0, len(checked), MOST_KEYS):
            some = checked[first : first + MOST_KEYS]
            session = self._link.session
            if session is None:
                break
            message = Delete(session.number, self._group, joined_keys(some))
            gone[first : first + len(some)] = self._done(message)
        return gone

    def _done(self, message: Lock | Delete) -> Mask:
        """Return for which blocks the keeper has done a request; for none without an answer."""
        count = len(message.keys) // KEY
        session = None if self._requests.process.forked else self._link.session
        if session is not None and session.number == message.session:
            with suppress(PortaKVError):  # the session has ended, or ends now
                answer = self._link.ask(session, message, Done, ASKING)
                done: Mask = np.frombuffer(answer.done, np.bool_).copy()
                return done
        return np.zeros(count, np.bool_)

    def _unlock(self, session: Session, number: int) -> None:
        """Tell the keeper of the end of locks, in a worker."""
        with suppress(TransferError):  # the client was closed, and its locks have ended
            tell = partial(self._link.tell, session, Unlock(session.number, number))
            self._requests.run("load", tell)
