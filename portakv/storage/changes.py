# SPDX-License-Identifier: Apache-2.0
"""What a store announces: handles that have ended, and blocks that were stored or lost.

Another process that holds an index of a store's blocks takes a `Snapshot` and then each `Change`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

from portakv.graph import Graph, Handle, Task
from portakv.runtime.finished import Finished
from portakv.storage.chains import Changed

#: Seconds between two looks at copies that were issued.
LOOK = 5e-4


class Change(NamedTuple):
    """A block that was stored in a tier, or lost.

    Attributes:
        number: counts all changes; a listener that misses a number has missed changes.
        key: 32 bytes.
        tier: "host", "disk", or that of another package; a second disk is "disk 2".
        stored: False if it was lost.
        why: of a block that was lost: "evicted", "damaged" or "deleted".
        form: the name of its form, of a store with several forms; else empty.
    """

    number: int
    key: bytes
    tier: str
    stored: bool
    why: str = ""
    form: str = ""


class Snapshot(NamedTuple):
    """The keys of each tier after the change of a number.

    The snapshot may have later changes already: apply those after ``number`` once more.
    """

    number: int
    keys: dict[str, list[bytes]]


@runtime_checkable
class Listed(Protocol):
    """A tier store with an index that others may follow.

    A `TierStore` need not be one: that of an object store has no index.
    """

    tier: str

    def keys(self) -> list[bytes]:
        """Return the keys of all blocks."""

    def announce(self, changed: Changed, /) -> None:
        """Report from now on each block that is stored or lost.

        The index changes before the report. Reports come from any thread, under any lock of the
        tier.
        """


def _named(tier_stores: Iterable[Listed]) -> dict[str, Listed]:
    """Return tier stores by the names of their tiers: "disk", and "disk 2" for a second one."""
    named = dict[str, Listed]()
    for each in tier_stores:
        same = sum(other.tier == each.tier for other in named.values())
        named[f"{each.tier} {same + 1}" if same else each.tier] = each
    return named


class Announced:
    """Handles and changes that wait for their consumers, once there are consumers.

    Attributes:
        handles: those that have ended.
        changes: blocks that were stored or lost, with numbers in order.
    """

    def __init__(self, graph: Graph) -> None:
        self.handles = Finished[Handle]()
        self.changes = Finished[Change]()
        self._graph = graph
        self._issued = deque[tuple[Handle, Task | None]]()
        self._lock = threading.Lock()  # reports come from several tiers
        self._beginning = threading.Lock()
        self._begun = False  # changes are announced
        self._number = 0

    def close(self) -> None:
        """Announce nothing from now on."""
        self.handles.close()
        self.changes.close()

    def follow(self, handle: Handle, barrier: Task | None) -> None:
        """Announce a handle at its end, under the graph's lock.

        ``barrier``: the task with which the part of the workers ends.
        """
        if barrier is None or barrier.ended:
            self.handles.add(handle)
        else:
            barrier.on_end = partial(self.handles.add, handle)

    def follow_issued(self, handle: Handle, barrier: Task | None) -> None:
        """Announce a handle at its end, of which a part was issued.

        Nothing reports the end of such a copy, so a worker looks for it.
        """
        self._issued.append((handle, barrier))
        task = Task(self._look, 1, queue=self._graph.queue("ends"), name="end")
        self._graph.submit([task], priority="urgent")

    def _look(self, *unused: object) -> None:
        """Look for the ends of issued copies until all have ended, in any order."""
        while self._issued and not self._graph.closed.is_set():
            for _ in range(len(self._issued)):
                handle, barrier = self._issued.popleft()
                if handle.issued_ended():
                    self._graph.run(partial(self.follow, handle, barrier))
                else:
                    self._issued.append((handle, barrier))
            time.sleep(LOOK)

    @property
    def is_unchanged(self) -> bool:
        """Return whether the consumer of changes has taken them all."""
        return self._begun and self.changes.is_idle

    def listen(self, forms: Mapping[str, Sequence[Listed]]) -> Finished[Change]:
        """Return the changes of the tier stores of forms, which are kept from the first call on."""
        with self._beginning:  # two first calls
            if not self.changes.started:
                self.changes.start()
                for form, tier_stores in forms.items():
                    for name, each in _named(tier_stores).items():
                        each.announce(partial(self._report, form, name))
                self._begun = True
        return self.changes

    def snapshot(self, forms: Mapping[str, Sequence[Listed]], form: str) -> Snapshot:
        """Return the keys of a form's tier stores, and listen to all from the first call on."""
        self.listen(forms)
        with self._lock:
            number = self._number  # before the keys, in which later changes may be
        named = _named(forms[form])
        return Snapshot(number, {name: each.keys() for name, each in named.items()})

    def _report(self, form: str, tier: str, key: bytes, stored: bool, why: str) -> None:
        """Number a change, and keep it."""
        with self._lock:
            self._number += 1
            self.changes.add(Change(self._number, key, tier, stored, why, form))
