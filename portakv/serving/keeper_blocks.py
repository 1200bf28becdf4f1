# SPDX-License-Identifier: Apache-2.0
"""`KeptBlocks`: the blocks of a group of layers of a rank, in the store of a keeper."""

from __future__ import annotations

from typing import Literal

from portakv.arguments import flag, one_of, seconds
from portakv.errors import InvalidTerms, StoreError
from portakv.graph import SLACK, Priority
from portakv.serving.keeper_link import Link
from portakv.serving.keeper_moving import Moving
from portakv.serving.keeper_requests import Requests
from portakv.serving.keeper_rows import RankForm
from portakv.serving.keeper_transfer import KeptTransfer
from portakv.storage.keys import check_keys, predecessors
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
