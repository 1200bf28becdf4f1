# SPDX-License-Identifier: Apache-2.0
"""Deliberately wrong tiers, transports and I/O engines, each of which one check must find.

`WRONG` names the checks. `portakv conform --contract io portakv_conformance.contract.wrong:Cut`
shows what a broken contract looks like.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from portakv.migrate.transports.base import Moving
from portakv.migrate.transports.distributed import Distributed, Pair
from portakv.storage import Disk
from portakv.storage.form import BlockForm
from portakv.storage.io.base import Ended, Request
from portakv.storage.io.choose import Threads
from portakv.storage.work import Graph

# --- I/O engines ----------------------------------------------------------------------------------


class Cut(Threads):
    """Moves one byte less than a request of more than a page wants."""

    name = "cut"

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Report the bytes that were requested."""
        cut = [each._replace(nbytes=each.nbytes - (each.nbytes > 4096)) for each in requests]
        got = super().run(cut)
        results = [
            each.nbytes if result >= 0 else result
            for each, result in zip(requests, got, strict=True)
        ]
        for number, result in enumerate(results):
            if ended is not None:
                ended(number, result)
        return results


class Early(Threads):
    """Reports that requests have ended before it carries them out."""

    name = "early"

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Report first, then move."""
        for number, request in enumerate(requests):
            if ended is not None:
                ended(number, request.nbytes)
        return super().run(requests)


class Hides(Threads):
    """Returns success for requests that failed."""

    name = "hides"

    def run(self, requests: Sequence[Request], ended: Ended | None = None) -> list[int]:
        """Hide each errno but that of a closed engine."""
        results = super().run(requests, ended)
        return [
            request.nbytes if result not in (request.nbytes, -errno.ECANCELED) else result
            for request, result in zip(requests, results, strict=True)
        ]


class Goes(Threads):
    """Moves bytes after it was closed."""

    name = "goes"

    def close(self) -> None:
        """Stay open."""


# --- tiers ----------------------------------------------------------------------------------------


class _Changed:
    """A store of a disk tier, of which a subclass changes one call."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _Tier:
    """A disk tier whose stores are changed."""

    store: Callable[[Any], Any]

    def __init__(self, folder: Path) -> None:
        self._disk = Disk(folder, capacity=8 << 20)

    def forms(self, form: BlockForm) -> Any:
        """Return what the disk tier finds."""
        return self._disk.forms(form)

    def open(self, graph: Graph, rows: object, forms: Sequence[BlockForm]) -> list[Any]:
        """Open the disk tier, with changed stores."""
        return [type(self).store(store) for store in self._disk.open(graph, rows, forms)]


class _Believes(_Changed):
    def read(self, keys: Sequence[bytes], *rest: object) -> list[bool]:
        """Return each block as landed."""
        self._store.read(keys, *rest)
        return [True] * len(keys)


class _Silent(_Changed):
    def read(
        self, keys: object, rows: object, segments: object, stop: object, report: object
    ) -> Any:
        """Report no reason."""
        return self._store.read(keys, rows, segments, stop)


class _First(_Changed):
    def read(
        self, keys: object, rows: object, segments: object, stop: object, report: object
    ) -> Any:
        """Read the first segment alone."""
        return self._store.read(keys, rows, segments and [0], stop, report)


class _Evicts(_Changed):
    def write(self, *known: object, report: object) -> Any:
        """Evict although the caller forbids it."""
        return self._store.write(*known[:6], report=report)


class Believes(_Tier):
    """Returns blocks that are not there as landed."""

    store = _Believes


class Silent(_Tier):
    """Reports no reasons."""

    store = _Silent


class First(_Tier):
    """Reads the first segment in place of the others."""

    store = _First


class Evicts(_Tier):
    """Evicts old blocks for a save that may evict none."""

    store = _Evicts


class _Mixed(_Changed):
    """A store that also has the blocks of another form."""

    def __init__(self, store: Any, other: Any) -> None:
        super().__init__(store)
        self._other = other

    def has(self, keys: Sequence[bytes], timeout: float | None = None) -> list[bool]:
        """Return which blocks either form has."""
        both = zip(self._store.has(keys), self._other.has(keys), strict=True)
        return [one or other for one, other in both]


class Mixes(_Tier):
    """Has the blocks of the first own form also for the others."""

    def open(
        self, graph: Graph, rows: object, forms: Sequence[BlockForm], own: int = 1
    ) -> list[Any]:
        """Open the disk tier, with changed stores."""
        stores = self._disk.open(graph, rows, forms, own)
        return [_Mixed(store, stores[0]) for store in stores]


# --- transports -----------------------------------------------------------------------------------


class _Deaf(Pair):
    def close(self, error: Exception) -> None:
        """Leave the slots under way as they are, if the peer is gone."""
        if "gone" not in str(error):
            super().close(error)


class Deaf(Distributed):
    """Does not end slots when the channel reports that the peer is gone."""

    name = "deaf"
    kind = _Deaf


class _Hasty(Pair):
    def move(self, slot: torch.Tensor, tag: int) -> Moving:
        """Report that a slot ended when it was passed."""
        moving = super().move(slot, tag)
        if self.address:
            moving.end()
        return moving


class Hasty(Distributed):
    """Ends the reader's slots before their bytes are there."""

    name = "hasty"
    kind = _Hasty


#: The checks that must find each wrong implementation, by contract.
WRONG = {
    "io": {
        "Cut": "reads_bring_the_bytes_of_the_file",
        "Early": "bytes_are_there_when_their_end_is_reported",
        "Hides": "a_fault_concerns_its_request_alone",
        "Goes": "a_closed_engine_moves_nothing",
    },
    "tier": {
        "Believes": "missing_blocks_are_misses",
        "Silent": "a_reason_for_each_block_that_did_not_come",
        "First": "segments",
        "Evicts": "a_write_without_eviction_keeps_what_is_there",
        "Mixes": "own_forms_are_apart",
    },
    "transport": {
        "Deaf": "a_death_ends_slots_in_flight",
        "Hasty": "a_slot_has_landed_when_it_ends",
    },
}
