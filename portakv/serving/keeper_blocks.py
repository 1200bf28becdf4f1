# SPDX-License-Identifier: Apache-2.0
"""`KeptBlocks`: the blocks of a group of layers of a rank, in the store of a keeper."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Literal

import numpy as np

from portakv.arguments import flag, one_of, seconds
from portakv.errors import InvalidTerms, PortaKVError, StoreError, TransferError
from portakv.graph import SLACK, Mask, Priority
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
from portakv.serving.keeper_moving import Moving
from portakv.serving.keeper_requests import Requests
from portakv.serving.keeper_rows import RankForm
from portakv.serving.keeper_transfer import KeptTransfer
from portakv.storage.keys import check_keys, predecessors
from portakv.storage.pins import Pins
from portakv.storage.rows import Crossing
from portakv.storage.tier import After, Keys
from portakv.view import IdList, KVView


class KeptBlocks:
    """The blocks of one group of layers of a rank. `KeeperClient` makes it.

    It saves and loads as a `FormStore` does, but never raises for a keeper that is gone, and waits
    for no tier.

    Attributes:
        form: of the rank's part of the blocks.
    """

    def __init__(self, requests: Requests, link: Link, group: int, part: RankForm) -> None:
        self.form = part.form
        self._requests = requests
        self._link = link
        self._group = group
        self._part = part

    def save(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        after: After = None,
        priority: Priority = "background",
    ) -> KeptTransfer:
        """Save the rank's part of blocks of a view; see `FormStore.save`.

        A block is stored once all ranks of the engine have saved their parts of it, in calls with
        equal keys. Blocks that find no free staging are dropped.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `FormStore.save` does.
        """
        checked = _checked(keys, priority)
        before = predecessors(after, checked)
        return self._moving(view, blocks, len(checked), True).save(checked, before, priority)

    def load(
        self,
        view: KVView,
        blocks: IdList,
        keys: Keys,
        *,
        priority: Priority = "urgent",
        deadline: float | None = None,
        by_layer: bool = False,
        missing: Literal["skip"] = "skip",
    ) -> KeptTransfer:
        """Load the rank's part of blocks into a view; see `FormStore.load`.

        Blocks that do not come within ``deadline`` seconds are missing. The call sends one request
        for each 1,024 keys to the keeper. It copies blocks of the host tier itself, ordered on the
        current stream of the view's device, except for a large copy on the host. Workers copy the
        others. ``by_layer``: `KeptTransfer.layers` has an end for each layer, which is the end of
        all layers unless the call copies all blocks.

        Raises `InvalidTerms`, `LayoutError` and `SlotError` as `FormStore.load` does.
        """
        checked = _checked(keys, priority)
        one_of("missing", missing, ("skip",))
        flag("by_layer", by_layer)
        if deadline is not None:
            seconds("deadline", deadline)
        moving = self._moving(view, blocks, len(checked), False)
        return moving.load(checked, deadline, priority, by_layer)

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
                return np.frombuffer(answer.done, np.bool_).copy()
        return np.zeros(count, np.bool_)

    def _unlock(self, session: Session, number: int) -> None:
        """Tell the keeper of the end of locks, in a worker."""
        with suppress(TransferError):  # the client was closed, and its locks have ended
            tell = partial(self._link.tell, session, Unlock(session.number, number))
            self._requests.run("load", tell)

    def _moving(self, view: KVView, blocks: IdList, keys: int, saves: bool) -> Moving:
        """Return a transfer of blocks of a view. Raises `StoreError` in a forked process."""
        if self._requests.process.forked:
            raise StoreError(
                "Expected the client of a keeper of this process, got one of the process that this "
                "one was forked from. Make another."
            )
        crossing = Crossing(view, blocks, keys, self.form.block_size, store=saves)
        return Moving(self._requests, self._link, self._group, self._part, view, crossing)


def _checked(keys: Keys, priority: Priority) -> list[bytes]:
    """Return keys of 32 bytes that differ; reject wrong terms."""
    checked = check_keys(keys)
    one_of("priority", priority, SLACK)
    if len({*checked}) < len(checked):
        raise InvalidTerms("Expected keys that differ, got one twice. Pass each key once.")
    return checked
