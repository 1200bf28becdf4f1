# SPDX-License-Identifier: Apache-2.0
"""What owners and readers tell each other: schemas with limits, for the channel and for tickets.
Nothing that arrives is trusted further than what its schema says."""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b
from hmac import compare_digest
from typing import Annotated, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from portakv.errors import OfferGone, PeerError

VERSION = 2  # of all of this; a channel refuses another one by its first byte
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]  # random, of an owner or of an offer
Name = Annotated[str, Meta(max_length=64)]
Text = Annotated[str, Meta(max_length=1024)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 48)]  # of memory; also extents and strides in elements
Count = Annotated[int, Meta(ge=0, le=1 << 31)]  # of tokens, blocks, slots
Small = Annotated[int, Meta(ge=0, le=1 << 16)]  # of layers, heads, groups, regions
Handle = Annotated[bytes, Meta(max_length=4096)]  # what `ipc` made, for `ipc` alone
Key = Annotated[bytes, Meta(max_length=64)]  # of a MAC
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
MOST_ID_BYTES = 4 << 20
MOST_REGIONS = 1024  # of an owner, its proof included
Ids = Annotated[
    bytes, Meta(max_length=MOST_ID_BYTES)
]  # int32, least byte first, one behind the other
Range = tuple[Small, Small, Small]  # from, to, of: on an axis of the whole model
Box = tuple[tuple[int, int], ...]  # from and to on each axis
Dims = Annotated[tuple[Bytes, ...], Meta(max_length=16)]
Names = Annotated[tuple[Name, ...], Meta(max_length=16)]
#: What tensors of a view share: torch's name of the dtype, shape and strides in elements.
Kind = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{2,31}$")], Dims, Dims]
Sent = TypeVar("Sent", bound="Message")
_MAC = 16  # bytes


#: Names of fields that the messages of this version keep on the wire.
_ON_THE_WIRE = {"transport": "mover"}


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """What all have: a tag, and no field that this release does not know. ``purpose`` begins the
    sentences that say what became of a question."""

    purpose: ClassVar[str] = "A message to"


class Group(Message, frozen=True):
    """A shard as far as the other side's must be like it: for each kv ``widths`` in bytes and the
    number types, none if rows are bytes; of opaque pages ``page`` is their tokens, else 0."""

    layers: Range
    heads: Range
    widths: Annotated[Dims, Meta(min_length=1)]
    numbers: Names = ()
    page: Count = 0

    @property
    def box(self) -> Box:
        """Its layers and heads."""
        return self.layers[:2], self.heads[:2]


class Region(Message, frozen=True):
    """An allocation, the device that has it, and its handle: empty, with the reason, if none."""

    nbytes: Bytes
    device: Text
    handle: Handle = b""
    why: Text = ""


class Described(Message, frozen=True):
    """A view as what `KVView` takes: tensors in ``containers`` of these lengths, outermost first,
    each of a place: number of the region, byte offset, number of the kind."""

    group: Group
    layout: Annotated[str, Meta(max_length=256)]
    kinds: Annotated[tuple[Kind, ...], Meta(min_length=1, max_length=16)]
    containers: Annotated[tuple[Small, ...], Meta(max_length=8)]
    places: Annotated[tuple[tuple[Small, Bytes, Small], ...], Meta(min_length=1, max_length=8192)]
    block_size: Count


class Hello(Message, frozen=True, rename=_ON_THE_WIRE):
    """A reader asks for what an owner has, and to have it moved by a transport into its slots."""

    purpose: ClassVar[str] = "Pairing with the owner at"

    model: Text
    device: Text = ""
    transport: Name = ""


class Welcome(Message, frozen=True, rename=_ON_THE_WIRE):
    """The owner's answer. Rows that cannot be mapped cross in ``slots`` of ``slot_bytes`` bytes, by
    ``transport``: the one that both sides agreed on, or before that the one that the owner
    names."""

    epoch: Id
    described: Annotated[tuple[Described, ...], Meta(min_length=1, max_length=64)]
    regions: Annotated[tuple[Region, ...], Meta(max_length=MOST_REGIONS)]
    events: Annotated[tuple[Handle, ...], Meta(max_length=256)] = ()
    transport: Name = ""
    slots: Small = 0
    slot_bytes: Bytes = 0
    #: Under which the owner signs the tickets of this epoch; only this message carries it.
    key: Key = b""


class About(Message, frozen=True):
    """What is about one offer of one owner."""

    epoch: Id
    offer: Id


class Begin(About, frozen=True):
    """One-way: a reader begins to read an offer, which ends with its channel from now on."""

    purpose: ClassVar[str] = "Beginning a pull from the owner at"


class Check(About, frozen=True):
    """Asks whether an offer has held until now."""

    purpose: ClassVar[str] = "Asking whether an offer held, of the owner at"


class Close(About, frozen=True):
    """One-way: a reader is through with an offer: it has ``taken`` the rows, or its pull failed."""

    purpose: ClassVar[str] = "Ending a pull from the owner at"

    taken: bool


class Renew(About, frozen=True):
    """Asks for a deadline so many seconds from now."""

    purpose: ClassVar[str] = "Renewing a lease of the owner at"

    seconds: Seconds


class Gather(About, frozen=True, rename=_ON_THE_WIRE):
    """Begins, and asks for ``count`` tokens from ``first`` on, of a rectangle of a group on the
    model's axes: in a slot, for a transport and under a tag; without one, for their checksum."""

    purpose: ClassVar[str] = "Asking for rows, of the owner at"

    group: Small
    layers: tuple[Small, Small]
    heads: tuple[Small, Small]
    first: Count
    count: Count
    transport: Name = ""
    slot: Small = 0
    tag: Count = 0


class Bye(Message, frozen=True):
    """One-way: a reader lets go of an owner's slots."""

    purpose: ClassVar[str] = "Leaving the owner at"


class Answer(Message, frozen=True):
    """``seconds``: of a lease that is left, or until "busy" may ask again."""

    state: Literal["held", "gone", "busy", "refused", "done"]
    why: Text = ""
    seconds: Seconds = 0.0
    digest: int = 0


class Ticket(About, frozen=True):
    """An offer: where its owner is reached and, for each group, ids (-1: elsewhere) and the tokens
    that each counts. ``event``: number of the one behind the rows, -1 if there is none."""

    address: Text
    tokens: Count
    ids: Annotated[tuple[Ids, ...], Meta(min_length=1, max_length=64)]
    steps: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=64)]
    lease: Seconds
    event: Annotated[int, Meta(ge=-1, le=255)] = -1

    def gone(self, why: str) -> OfferGone:
        """The error of an offer that does not hold; ``why`` as a clause."""
        return OfferGone(
            f"An offer of {self.address} ({self.offer.hex()[:8]}) was pulled, and does not hold: "
            f"{why}. Nothing is published; ask for another offer."
        )

    def pack(self, key: bytes) -> bytes:
        """Return the bytes that carry the ticket, with a MAC over them under the owner's key."""
        body = sealed(self)
        return _mac(body, key) + body

    @staticmethod
    def read(data: bytes) -> Ticket:
        """The ticket of these bytes; raises `PeerError`, in the same words whatever is wrong."""
        ticket = unsealed(data[_MAC:], Ticket) if isinstance(data, bytes) else None
        whole = ticket and not any(len(ids) % 4 for ids in ticket.ids)
        if ticket and whole and len(ticket.ids) == len(ticket.steps):
            return ticket
        raise no_ticket()


def no_ticket() -> PeerError:
    """Return the error of bytes that are not a ticket, the same whatever is wrong with them."""
    return PeerError(
        "Expected tickets to be the bytes of `Offer.ticket`, got others, which is no ticket of "
        "this release. Carry them unchanged, between sides of one release."
    )


def is_signed(data: bytes, key: bytes) -> bool:
    """Return True if the bytes of a ticket are as the owner with this key made them."""
    return compare_digest(data[:_MAC], _mac(data[_MAC:], key))


def _mac(body: bytes, key: bytes) -> bytes:
    """Return the MAC of the bytes of a ticket."""
    return blake2b(body, key=key, digest_size=_MAC).digest()


def sealed(message: Message) -> bytes:
    """A message that travels by others' ways, with a checksum before it."""
    told = msgspec.msgpack.encode(message)
    return blake2b(told, digest_size=16).digest() + told


def unsealed(data: bytes, kind: type[Sent]) -> Sent | None:
    """The message of these bytes; None if they are not as `sealed` made them."""
    if isinstance(data, bytes) and blake2b(data[16:], digest_size=16).digest() == data[:16]:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.msgpack.decode(data[16:], type=kind)
    return None
