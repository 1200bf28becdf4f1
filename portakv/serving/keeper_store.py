# SPDX-License-Identifier: Apache-2.0
"""`OpenStore`: the store of a keeper, with its clients and its followers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from portakv.errors import PortaKVError
from portakv.graph.alarms import watch
from portakv.migrate.ipc import share
from portakv.runtime.bounded import Bounded
from portakv.serving.bucket import LookupWorkers
from portakv.serving.keeper import KeeperState
from portakv.serving.keeper_feed import Feed, Follower
from portakv.serving.keeper_messages import LookedUp
from portakv.serving.local import StoreTerms, alike_in
from portakv.storage.changes import Change
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore

if TYPE_CHECKING:
    from portakv.serving.kv_events import EventPublisher


class OpenStore:
    """A store whose rows other processes map, and what is known of these processes.

    Args:
        terms: where blocks are stored.
        forms: of whole blocks.
        wake: is called when the state has something to do.
        patience: seconds for which a save waits for all ranks of its engine.
        events: gets the changes of the store, for routers.

    Raises `StoreError`, `StoreBusy`, `HostMemoryError` and `InvalidTerms` as `BlockStore` does.

    Attributes:
        handle: the rows, for `open_shared`.
        bucket: the store has a bucket.
        looked_up: the ends of lookups in the bucket, for the followers that requested them.
    """

    def __init__(
        self,
        terms: StoreTerms,
        forms: Sequence[BlockForm],
        wake: Callable[[], object],
        patience: float,
        events: EventPublisher | None = None,
    ) -> None:
        terms.check_room([form.raw.image_bytes for form in forms])
        tiers = terms.tiers()
        named = {form.name: form for form in [*forms, *alike_in(tiers, forms)]}
        # Ranks register their mappings. The keeper copies to no device, and needs no context.
        self.store = BlockStore(
            named,
            staging=terms.staging,
            host=terms.host,
            tiers=tiers,
            shared=True,
            pin=False,
        )
        self.state = KeeperState(wake, patience)
        watch(self.state)
        self.bucket = terms.bucket is not None
        self.looked_up = deque[tuple[Follower, LookedUp]]()
        self._wake = wake
        self._events = events
        self.feed = Feed(self.store)
        try:
            self.handle = share(self.store.rows.tensor)
            for name, form in named.items():
                self.state.stores[form.digest] = self.store.of(name)
            self.store.finished()  # from now on handles and changes are kept
            self.store.listen()
            self._publish_all()
        except BaseException:
            self.store.close()
            raise
        rows_here[self.handle] = self.store.rows.tensor

    def changes(self) -> list[Change]:
        """Return the changes of the store since the last call, and publish them to routers."""
        changes = self.store.listen()
        self._publish(changes)
        return changes

    def _publish(self, changes: Sequence[Change]) -> None:
        """Publish changes to routers, for which packed and raw blocks of a group are the same."""
        if self._events is None:
            return
        groups = dict[BlockForm, str]()
        names = {
            name: groups.setdefault(form if form.lossy else form.raw, name)
            for name, form in self.store.forms.items()
        }
        some = [change._replace(form=names[change.form]) for change in changes]
        self._events.publish(some, [*groups.values()])

    def _publish_all(self) -> None:
        """Publish to routers the blocks that the store has when it opens."""
        if self._events is None:
            return
        self._events.clear()
        for form in self.store.forms:
            for tier, keys in self.store.of(form).keys().keys.items():
                self._publish([Change(0, key, tier, True, "", form) for key in keys])

    def has(self, forms: Sequence[BlockForm]) -> bool:
        """Return whether the store has the forms of whole blocks."""
        return all(form.digest in self.state.stores for form in forms)

    def forms_of(self, engine: str) -> list[str]:
        """Return the names of the forms of an engine's groups; none before a rank has joined."""
        return [digest.hex() for digest in self.state.forms_of(engine)]

    def look_up(self, follower: Follower, number: int, keys: Sequence[bytes]) -> None:
        """Look up blocks in the bucket, in a worker, and have ``looked_up`` hold how that ended.

        Raises `TransferError` after the store was closed.
        """

        def ended(count: int, answers: bool) -> None:
            message = LookedUp(follower.session, number, count, answers)
            self.looked_up.append((follower, message))
            self._wake()

        if self.bucket:
            LookupWorkers([*map(self.store.of, follower.forms)]).begin(keys, ended)

    def close(self, timeout: float) -> PortaKVError | None:
        """End all sessions and close the store; return the error of a store that hangs."""
        rows_here.pop(self.handle, None)
        self.state.close()
        if self._events is not None:
            self._events.clear()
        try:
            self.store.close(timeout)
        except PortaKVError as error:
            return error
        return None


#: The rows of the keepers of this process, by their handles: its own clients need not map them.
rows_here: Bounded[bytes, torch.Tensor] = Bounded("rows of keepers", 16)
