# SPDX-License-Identifier: Apache-2.0
"""The tier protocol: a tier stores blocks outside of the host memory of a block store.

A *tier* (`Tier`) says where blocks go: `Disk`, `Remote`, or a class of another package. Opened for
the forms of a cache, it gives one *tier store* (`TierStore`) for each form. A tier store reads and
writes sealed images of blocks (`portakv.storage.image`) between its medium and rows of host memory
that the block store owns.

The library calls a tier in this order:

- `Tier.forms` when a block store is made, for each form that it saves: the other forms of the same
  cache that lie in the tier.
- `Tier.open` once, with the block store's own forms first. It opens everything or raises.
- For each call of a user, under the lock of the task graph: `known`, `wants`, `queue`,
  `queue_for_write` and `touch`. They answer from memory and return within microseconds.
- `has` in the thread of a `lookup`, without that lock. It may ask over a network until its timeout.
- `read` and `write` in the turns of the queue that `queue` or `queue_for_write` returned, several
  together for one tier store. They block until the blocks came or are stored. The rows belong to
  them until they return, and no medium uses them afterwards: an operation that still uses a row
  has to end first.
- `close` once for each tier store, after the last call, the tier store of the first form last.

Promises of an implementation:

- A block that `read` or `write` returns as landed is whole and right. A tier verifies checksums on
  each read, and forgets a block whose bytes are wrong.
- Failures of a medium are no exceptions: the block has not landed, and `report` gets the reason for
  each such block. An exception fails the whole task, with a traceback in the log.
- A tier may lose any block at any time. It may not return one form's block for another form.
- `stop()` turns true when nothing waits for a read any more. The read then returns soon.

A tier store with a method ``look`` looks at its medium there, before figures are read for operators
and their alarms. An engine reads `statistics` in its steps, without that.

A tier store with an index that another process may follow also has the methods of
`portakv.storage.calls.Listed`.

`portakv conform --contract tier NAME` runs these promises over a tier.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Protocol, TypeAlias

from portakv.arguments import invalid, items, shown
from portakv.errors import InvalidTerms, StoreError
from portakv.graph.trace import Figures
from portakv.selection import Catalog, Kind
from portakv.storage.form import BlockForm
from portakv.storage.image import Row
from portakv.storage.memory import Rows
from portakv.storage.reasons import Report
from portakv.storage.work import Graph, Queue

# ------------------------------------------------------------------------------------------------
# Figures for operators from what tier stores report about themselves.


#: Figures of folders, by what `TierStore.statistics` calls them.
FACTS = {"disk_evicted_total": "evicted", "disk_missing_slots": "missing", "disk_lost": "lost"}


def tier_figures(tiers: Iterable[Mapping[str, Any]]) -> Figures:
    """Return the slots of folders, how full and how sound these are, and which object stores are
    left alone.

    ``tiers``: what `TierStore.statistics` returns, each with the ``form`` of its blocks. A tier
    store of another package adds no figures.
    """
    slots: list[dict[str, str | float]] = []
    left_alone: list[dict[str, str | float]] = []
    facts_by_name: Figures = {name: [] for name in FACTS}
    fill = dict[str, float]()  # of all forms that the store saves there
    free_bytes = dict[str, float]()
    for tier in tiers:
        form = tier["form"]
        if "left_alone" in tier:
            url = str(tier.get("url", ""))
            left_alone.append({"form": form, "url": url, "value": bool(tier["left_alone"])})
        for place, facts in tier.items():
            if not isinstance(facts, Mapping) or "broken" not in facts:
                continue
            folder = os.path.dirname(place)  # it has a folder of slots for each form
            named = {"form": form, "folder": folder}
            free = facts["count"] - facts["used"] - facts["broken"]
            states = {"used": facts["used"], "free": free, "broken": facts["broken"]}
            for state, value in states.items():
                slots.append({**named, "state": state, "value": value})
            for name, fact in FACTS.items():
                facts_by_name[name].append({**named, "value": facts[fact]})
            if facts["writable"]:
                fill[folder] = fill.get(folder, 0.0) + facts["used"] / facts["configured"]
            if facts["free_bytes"] is not None:
                free_bytes[folder] = facts["free_bytes"]
    return {
        "disk_slots": slots,
        "disk_fill_ratio": [{"folder": x, "value": share} for x, share in fill.items()],
        "disk_free_bytes": [{"folder": x, "value": free} for x, free in free_bytes.items()],
        "remote_left_alone": left_alone,
        **facts_by_name,
    }


Keys = Sequence[bytes]
#: What the keys of a save follow: the key before the first one, or None if it begins a prompt; or
#: that for each key, if they are of several prompts.
After: TypeAlias = "bytes | Sequence[bytes | None] | None"
#: What makes a tier, by name; other packages use the entry-point group ``portakv.tiers``. It is
#: called with one text, the tier's place: a folder, an address.
BUILT_IN = {
    "disk": "portakv.storage.tiers.disk:Disk",
    "remote": "portakv.storage.tiers.remote:Remote",
}


class Tier(Protocol):
    """The storage of a block store, not open yet."""

    def forms(self, form: BlockForm, /) -> list[BlockForm]:
        """Return the other forms of the form's cache that lie in the tier."""
        ...

    def open(
        self, graph: Graph, rows: Rows, forms: Sequence[BlockForm], own: int = 1, /
    ) -> Sequence[TierStore]:
        """Open the tier for forms, the block store's own ones first.

        Args:
            graph: makes the queues that reads and writes run on, and counts what happened.
            rows: the host memory of the block store; an engine may register ``rows.memory``.
            forms: the own forms, which are created if need be, and other ones, which are read only.
            own: the number of own forms. A tier without this argument serves stores of one form.

        Returns the tier stores of the own forms in their order, and those of other forms that can
        be read.

        Raises:
            StoreError: the tier cannot be opened for an own form.
        """
        ...


TIERS = Catalog[Tier](
    Kind("tier", error=StoreError, unknown=InvalidTerms), None, BUILT_IN, "portakv.tiers"
)


def tier_of(text: str) -> Tier:
    """Return the tier that a text ``NAME:PLACE`` names, such as ``remote:s3://bucket/prefix``.

    Raises:
        InvalidTerms: there is no tier of that name, the text has no place, or the tier needs more
            than a place.
        StoreError: the name does not load. PortaKVError: the tier rejects the place.
    """
    name, _, place = text.partition(":")
    if not place:
        raise InvalidTerms(
            f"Expected a tier as NAME:PLACE, such as 'remote:s3://bucket/kv', got {shown(text)}. "
            f"Write the place after a colon, or pass an object such as Disk(...)."
        )
    make: Callable[[str], Tier] = TIERS.load(TIERS.check("tiers", name))
    try:
        signature(make).bind(place)
    except TypeError as error:
        raise InvalidTerms(
            f"Expected a tier that is made with its place alone, got {name!r} ({error}). Pass the "
            f"object itself, such as Disk(folder, capacity=...)."
        ) from None
    return make(place)


def tiers_of(tiers: object) -> list[Tier]:
    """Return tiers as a list, those made that are named; raise `InvalidTerms` for anything else."""
    result = [
        tier_of(each) if isinstance(each, str) else each
        for each in items("tiers", tiers, "tiers, such as Disk(...)")
    ]
    for number, tier in enumerate(result):
        if not callable(getattr(tier, "open", None)) or not callable(getattr(tier, "forms", None)):
            do = "Pass a Disk, a Remote, an object with forms() and open(), or a text NAME:PLACE."
            raise invalid(f"tiers[{number}]", "a tier", tier, do)
    return result


class TierStore(Protocol):
    """The blocks of one form in one tier.

    Attributes:
        tier: the kind of tier, such as "disk", for statistics.
        form: the form of its blocks.
        writable: True for the store of an own form of the block store.
        notes: sentences for `BlockStore.explain`.
        where: its paths or its URL, for errors; without secrets.
        generation: the highest generation of a block that it found when it was opened.
    """

    tier: str
    form: BlockForm
    writable: bool

    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def where(self) -> str: ...
    @property
    def generation(self) -> int: ...

    def has(self, keys: Keys, timeout: float | None = None, /) -> list[bool]:
        """Return which blocks are there; it may ask the medium, ``timeout`` seconds at most."""
        ...

    def known(self, keys: Keys, /) -> list[bool]:
        """Return which blocks are stored as far as is known here; send no request."""
        ...

    def wants(self, keys: Keys, /) -> list[bool]:
        """Return which blocks a save has to bring: those that are missing here and admitted."""
        ...

    def queue(self, key: bytes, /) -> Queue:
        """Return the queue in whose turn a block is read."""
        ...

    def queue_for_write(self, nbytes: int, /) -> Queue:
        """Return the queue in whose turn so many bytes are best written now."""
        ...

    def read(
        self,
        keys: Keys,
        rows: Sequence[Row],
        segments: Sequence[int] | None,
        stop: Callable[[], bool],
        report: Report,
        /,
    ) -> list[bool]:
        """Read images of blocks into rows; return which came whole and right.

        Args:
            segments: the parts of the payload to read, by number in ``form.segments``; with the
                first one comes the header. None: the whole image.
            stop: returns True when nothing waits for the blocks any more.
            report: gets the key of each block that did not come, and the reason.
        """
        ...

    def write(
        self,
        queue: Queue,
        keys: Keys,
        rows: Sequence[Row],
        generations: Sequence[int],
        checksums: Sequence[Sequence[int]],
        own: Mapping[bytes, int] | None = None,
        evict: bool = True,
        *,
        report: Report,
    ) -> list[bool]:
        """Store sealed images of blocks; return which are there now.

        Args:
            queue: the queue that `queue_for_write` returned for them.
            generations: one for each block; a prefix has a newer one than what follows it.
            checksums: those of each block's segments, as they stand in its header.
            own: the keys of the whole save with their order; no later one evicts an earlier one.
            evict: False drops a block rather than evict another one.
            report: gets the key of each block that is not stored, and the reason.
        """
        ...

    def touch(self, keys: Keys, follows: Sequence[int] = (), /) -> None:
        """Note that blocks of a prefix were used, in its order; ``follows``: the mark of the block
        that each of them follows, if a save names them."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Return figures that fit into JSON."""
        ...

    def close(self) -> None:
        """Make everything durable that `write` returned as stored, and release the medium."""
        ...
