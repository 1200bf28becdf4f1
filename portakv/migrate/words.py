# SPDX-License-Identifier: Apache-2.0
"""Validity words: a page of shared memory in which an owner says which of its offers hold.

An offer has a place in the page and a tag, 60 of the random bits of its number. The word at the
place is the tag while the offer holds. The owner overwrites it before the offer's end returns,
so before any block is used again. A reader copies rows and then reads the word: if it is still the
tag, no row had changed when the copy ended. That needs no answer of the owner, and is right also if
the owner has died, since a dead process writes nothing. So only memory that no other process writes
has words: another process may go on to write it.

An offer that was made before its rows are complete has a second word at its place: bits of the tag,
and its mark, the number of layers or tokens that are complete. The owner raises it after the rows
were written; a reader reads it before it reads rows, and never reads rows past it.

A word is one aligned store and one aligned load of eight bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from portakv.errors import PortaKVError
from portakv.migrate import ipc

PLACES = 8192  # offers that hold together and have a word; readers ask the owner about others
_BITS = 3  # of an ended word, for the state
_MARK = 32  # bits of the second word, for the mark; 31 bits of the tag stand above them
_ENDED = ("expired", "revoked", "taken", "lost")


class Place(NamedTuple):
    """The place of an offer's word and its tag. ``number`` is -1 if the offer has no word."""

    number: int = -1
    tag: int = 0

    @classmethod
    def of(cls, number: int, offer: bytes) -> Place:
        """Return the place of the offer with these random bytes. A tag is above 0."""
        return cls(number, int.from_bytes(offer[:8], "little") >> _BITS + 1 or 1)

    def marked(self, mark: int) -> int:
        """Return the second word of an offer with a mark."""
        return self.tag % (1 << 63 - _MARK) << _MARK | mark


class Words:
    """The page of an owner. The owner's lock guards all calls."""

    def __init__(self, places: int = PLACES) -> None:
        self._places = places
        # The words, then the second words.
        self._page = ipc.shared_empty(2 * places, torch.int64)
        self._words = self._page.numpy().data
        # The place that was released last is used last, so that readers find why an offer ended.
        self._free = deque(range(places))
        self._full = False  # the last list of free places was empty, and no offer with one ended

    def export(self, files: ipc.SharedFiles) -> ipc.Held:
        """Return the page, for readers to open; raise `Unsupported` as `ipc.export` does."""
        return ipc.export(self._page.untyped_storage(), files)

    def take(self, offer: bytes, in_use: Iterable[Place]) -> Place:
        """Return the place of a new offer, and write that it holds. ``in_use``: of all offers."""
        if not self._free and not self._full:
            # Also places of which an interrupt has cut the offer off.
            self._free.extend({*range(self._places)} - {place.number for place in in_use})
            self._full = not self._free
        if not self._free:
            return Place()
        place = Place.of(self._free.popleft(), offer)
        self._words[place.number] = place.tag
        return place

    def mark(self, place: Place, mark: int) -> None:
        """Write the mark of an offer that holds, after its rows were written."""
        if place.number >= 0:
            fence()
            self._words[self._places + place.number] = place.marked(mark)

    def end(self, place: Place, state: str) -> None:
        """Write the state of an offer that has ended, before the caller uses its blocks again."""
        if place.number >= 0:
            self._words[place.number] = -(place.tag << _BITS | _ENDED.index(state))
            fence()
            self._free.append(place.number)
            self._full = False


class WordsOfOwner:
    """The page of another process, or of this one."""

    def __init__(self, handle: bytes) -> None:
        """Map the page; raise `Unsupported` or `PeerError` as `ipc.open_shared` does."""
        page = ipc.open_shared(handle, "cpu").view(torch.int64)
        self._words = page.numpy().data.toreadonly()
        self._places = len(self._words) // 2

    def has(self, place: Place) -> bool:
        """Return True if an offer has a word here."""
        return 0 <= place.number < self._places

    def mark(self, place: Place) -> int:
        """Return the mark of an offer; 0 if the second word is another offer's.

        Rows that are read after the call are at least as complete as the mark says.
        """
        word: int = self._words[self._places + place.number]
        fence()
        mark = word % (1 << _MARK)
        return mark if word == place.marked(mark) else 0

    def state(self, place: Place) -> str:
        """Return "held", or how the offer of a place ended; "gone" if the word has none of it.

        Call `fence` first if rows were read.
        """
        word: int = self._words[place.number]
        if word == place.tag:
            return "held"
        if word < 0 and -word >> _BITS == place.tag and -word % (1 << _BITS) < len(_ENDED):
            return _ENDED[-word % (1 << _BITS)]
        return "gone"


def open_words(handle: bytes) -> WordsOfOwner | None:
    """Map the page of an owner; None if it shares none that this process can map."""
    if not handle:
        return None
    try:
        return WordsOfOwner(handle)
    except PortaKVError:
        return None


def fence() -> None:
    """Order all memory accesses of this thread before the call before all after it.

    A lock's release orders what is before it, and the next acquisition what is after it. The lock
    is new, so no other thread holds it, not even in a forked process.
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()
