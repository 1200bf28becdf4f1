# SPDX-License-Identifier: Apache-2.0
"""A table in shared memory from the names of offers to their tickets.

A reader on the owner's host finds an offer by its name here, without a question. The table may lack
an offer that holds: then the reader asks the owner.

The page begins with slots. A slot is 0, or the position of a record; behind the slots lie the
records, in a ring. Positions only grow, so a slot never has a value twice. A reader copies a record
and then reads its slot again. If the slot is the same, the record was not overwritten meanwhile:
the owner clears the slot before it writes over the record.

A name is not in the page. The record has a tag, a hash of name and epoch under the owner's key, and
the ticket. The rest of that hash and the record's position make a mask, which hides the ticket's
MAC, checksum and number. No two records have one mask, even if a name is used again. So whoever has
the page but not the name has no ticket that its owner accepts.
"""

from __future__ import annotations

from collections import deque
from hashlib import blake2b
from typing import NamedTuple, Protocol

import torch

from portakv.errors import PeerError, PortaKVError
from portakv.migrate import ipc
from portakv.migrate.messages import Ticket
from portakv.migrate.words import fence
from portakv.runtime.devices import this_process

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
            self.page = _Page(ipc.shared_empty(_NBYTES, torch.uint8), to_read=False)

    def export(self, files: ipc.SharedFiles) -> ipc.Held:
        """Return the page, for readers to open; raise `Unsupported` as `ipc.export` does.

        ``files`` are those of a time after `allocate`, which the caller has called.
        """
        assert self.page is not None
        return ipc.export(self.page.memory.untyped_storage(), files)

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
        """Map the page; raise `Unsupported` or `PeerError` as `ipc.open_shared` does."""
        page = ipc.open_shared(handle, "cpu").view(torch.uint8)
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


def open_names(handle: bytes, key: bytes) -> NamesOfOwner | None:
    """Map the table of an owner; None if it shares none that this process can map."""
    if not handle:
        return None
    try:
        return NamesOfOwner(handle, key)
    except PortaKVError:
        return None
