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

from collections import deque
from collections.abc import Callable, Iterable
from hashlib import blake2b
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

import torch

from portakv.errors import PeerError, PortaKVError
from portakv.migrate import shared_memory
from portakv.migrate.messages import Ticket
from portakv.runtime.devices import this_process

T = TypeVar("T")

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
        self._page = shared_memory.shared_empty(2 * places, torch.int64)
        self._words = self._page.numpy().data
        # The place that was released last is used last, so that readers find why an offer ended.
        self._free = deque(range(places))
        self._full = False  # the last list of free places was empty, and no offer with one ended

    def export(self, files: shared_memory.SharedFiles) -> shared_memory.Held:
        """Return the page, for readers to open.

        Raises `Unsupported` as `shared_memory.export` does.
        """
        return shared_memory.export(self._page.untyped_storage(), files)

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
        """Map the page; raise `Unsupported` or `PeerError` as `shared_memory.open_shared` does."""
        page = shared_memory.open_shared(handle, "cpu").view(torch.int64)
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


def open_page(open_handle: Callable[[bytes], T], handle: bytes) -> T | None:
    """Return the words or the names of an owner by a function that maps them; None if the owner
    shares none that this process can map."""
    if not handle:
        return None
    try:
        return open_handle(handle)
    except PortaKVError:
        return None


def fence() -> None:
    """Order all memory accesses of this thread before the call before all after it.

    A lock's release orders what is before it, and the next acquisition what is after it. The lock
    is new, so no other thread holds it, not even in a forked process.
    """
    lock = Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


# ------------------------------------------------------------------------------------------------
# A table in shared memory from the names of offers to their tickets.

BUCKETS = 1024
WAYS = 8  # slots of a bucket; the names of a bucket share them
RING = 2 << 20  # bytes of the records: 480 tickets of 16,384 tokens in blocks of 16
TRIES = 3  # looks at a record that changes meanwhile
_TAG = 16
_LENGTH = 8
_HEAD = _TAG + _LENGTH
_SLOTS = BUCKETS * WAYS
_NBYTES = 8 * _SLOTS + RING


def _bytes_of(mark: bytes) -> slice:
    """Return where a ticket has its epoch or its number, which is the same in all tickets."""
    sample = Ticket(b"E" * 16, b"N" * 16, "", 0, (b"",), (1,), 0.0).pack(b"")
    first = sample.index(mark * 16)
    return slice(first, first + 16)


_EPOCH = _bytes_of(b"E")
_NUMBER = _bytes_of(b"N")
_PROOF = slice(0, 32)  # the MAC and the checksum
_MASKED = 48  # bytes of the proof and the number


class Entry(NamedTuple):
    """A slot, and the position of the record that it has; none before `NameTable.add`."""

    slot: int = 0
    start: int = -1


class Listed(Protocol):
    """An offer, as this module sees it."""

    name: bytes
    ticket: bytes
    entry: Entry


class Hashed(NamedTuple):
    """The hash of a name: the first slot of its bucket, the tag of its records, and the secret of
    their masks."""

    first: int
    tag: bytes
    secret: bytes

    def masked(self, ticket: bytes | memoryview, start: int) -> bytes:
        """Return a ticket masked for a record at a position, or a masked one as it was."""
        at = start.to_bytes(8, "little", signed=True)  # a damaged page has any
        mask = blake2b(self.secret + at, digest_size=_MASKED).digest()
        clear = b"".join((ticket[_PROOF], ticket[_NUMBER]))
        number = int.from_bytes(clear, "little") ^ int.from_bytes(mask, "little")
        hidden = number.to_bytes(_MASKED, "little")
        between = ticket[_PROOF.stop : _NUMBER.start]
        parts = hidden[_PROOF], between, hidden[_PROOF.stop :], ticket[_NUMBER.stop :]
        return b"".join(parts)


def hashed(epoch: bytes, name: bytes, key: bytes) -> Hashed:
    """Return the hash of a name of an epoch under an owner's key."""
    digest = blake2b(key + epoch + name, digest_size=2 * _TAG).digest()
    bucket = int.from_bytes(digest[:4], "little") % BUCKETS
    return Hashed(bucket * WAYS, digest[:_TAG], digest[_TAG:])


class _Page:
    """The slots and the ring of a page."""

    def __init__(self, page: torch.Tensor, to_read: bool) -> None:
        self.memory = page
        whole = page.numpy().data
        if to_read:
            whole = whole.toreadonly()
        self.slots = whole[: 8 * _SLOTS].cast("q")
        self.ring = whole[8 * _SLOTS :]


class NameTable:
    """The table of an owner. The owner's lock guards all calls. It has no memory, and no names,
    before `allocate`."""

    def __init__(self, key: bytes) -> None:
        self._key = key  # readers have it from the handshake
        self._process = this_process()  # a forked process has the same page
        self.page: _Page | None = None
        self._listed = deque[Entry]()  # of all records that are not overwritten, the oldest first
        self._end = RING  # of the last record; a position is above 0

    def allocate(self) -> None:
        """Allocate the page, unless that was done."""
        if self.page is None:
            self.page = _Page(shared_memory.shared_empty(_NBYTES, torch.uint8), to_read=False)

    def export(self, files: shared_memory.SharedFiles) -> shared_memory.Held:
        """Return the page, for readers to open; raise `Unsupported` as `shared_memory.export` does.

        ``files`` are those of a time after `allocate`, which the caller has called.
        """
        assert self.page is not None
        return shared_memory.export(self.page.memory.untyped_storage(), files)

    def add(self, offer: Listed) -> None:
        """Let readers find the ticket of an offer by its name. The oldest records make room."""
        page = self.page
        ticket = offer.ticket
        nbytes = _HEAD + len(ticket)
        if page is None or nbytes > RING or self._process.forked:
            return
        key = hashed(ticket[_EPOCH], offer.name, self._key)
        start = self._make_room(nbytes)
        starts = page.slots[key.first : key.first + WAYS].tolist()
        # A free slot is 0. Else the oldest name of the bucket is found by a question from now on.
        slot = key.first + starts.index(min(starts))
        # First, so that the end of the offer removes it even if an interrupt comes in between.
        offer.entry = entry = Entry(slot, start)
        self._listed.append(entry)

        at = start % RING
        body = at + _HEAD
        page.ring[at:body] = key.tag + len(ticket).to_bytes(_LENGTH, "little")
        page.ring[body : at + nbytes] = key.masked(ticket, start)
        fence()
        page.slots[slot] = start

    def remove(self, entry: Entry) -> None:
        """Let no reader find the ticket of an entry any more."""
        page = self.page
        if page is None or self._process.forked:
            return
        if page.slots[entry.slot] == entry.start:  # else another name has it
            page.slots[entry.slot] = 0

    def _make_room(self, nbytes: int) -> int:
        """Return the position of a new record, after the records in its place were removed."""
        start = self._end
        left = RING - start % RING
        if left < nbytes:  # a record does not cross the end of the ring
            start += left
        self._end = start + nbytes
        listed = self._listed
        if listed and listed[0].start < self._end - RING:
            while listed and listed[0].start < self._end - RING:
                self.remove(listed.popleft())
            fence()
        return start


class NamesOfOwner:
    """The table of another process, or of this one."""

    def __init__(self, handle: bytes, key: bytes) -> None:
        """Map the page; raise `Unsupported` or `PeerError` as `shared_memory.open_shared` does."""
        page = shared_memory.open_shared(handle, "cpu").view(torch.uint8)
        if page.numel() != _NBYTES:
            raise PeerError("Expected a table of names, got other memory. Use one release.")
        self.page = _Page(page, to_read=True)
        self._key = key

    def find(self, epoch: bytes, name: bytes) -> bytes:
        """Return the ticket of the offer that an owner's epoch has under a name; empty if the table
        has none. The caller checks the ticket."""
        key = hashed(epoch, name, self._key)
        slots = self.page.slots
        for _ in range(TRIES):
            changed = False
            for slot, start in enumerate(slots[key.first : key.first + WAYS].tolist(), key.first):
                if not start:
                    continue
                fence()
                ticket = self._copy(key, start)
                fence()
                if slots[slot] != start:
                    changed = True
                elif ticket:
                    return ticket
            if not changed:
                break
        return b""

    def _copy(self, key: Hashed, start: int) -> bytes:
        """Return the ticket of a record, which may change meanwhile; empty for another tag."""
        ring = self.page.ring
        at = start % RING
        head = bytes(ring[at : at + _HEAD])
        if head[:_TAG] != key.tag:
            return b""
        nbytes = int.from_bytes(head[_TAG:], "little")
        return key.masked(ring[at + _HEAD : at + _HEAD + nbytes], start)
