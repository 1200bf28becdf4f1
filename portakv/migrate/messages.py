# SPDX-License-Identifier: Apache-2.0
"""The messages between owners and readers: schemas with limits, for the channel and for tickets.

No message is trusted further than its schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from hmac import compare_digest
from string import hexdigits
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta
from msgspec.msgpack import Decoder

from portakv.arguments import invalid, items, kind_of, shown
from portakv.errors import InvalidTerms, OfferGone, PeerError, PortaKVError
from portakv.runtime.bounded import Bounded
from portakv.runtime.tracing import PATTERN
from portakv.tasks import runtime

VERSION = 5  # of all messages; a channel rejects another version by the first byte
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]  # random, of an owner or of an offer
Name = Annotated[str, Meta(max_length=64)]
Text = Annotated[str, Meta(max_length=1024)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 48)]  # of memory; also extents and strides in elements
Count = Annotated[int, Meta(ge=0, le=1 << 31)]  # of tokens, blocks, slots
Small = Annotated[int, Meta(ge=0, le=1 << 16)]  # of layers, heads, groups, regions
LEAST_NAME = 16
MOST_NAME = 64
OfferName = Annotated[bytes, Meta(min_length=LEAST_NAME, max_length=MOST_NAME)]
MOST_NAMES = 256  # of one question
MOST_PARTS = 64  # of one request for rows
Handle = Annotated[bytes, Meta(max_length=4096)]  # made by `shared_memory` for itself alone
Key = Annotated[bytes, Meta(max_length=64)]  # of a MAC
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Figure = Annotated[float, Meta(ge=0, le=1e9)]  # of a choice: a rate, a ratio, a share
MOST_ID_BYTES = 4 << 20
MOST_REGIONS = 1024  # the most regions of an owner, its proof included
Ids = Annotated[bytes, Meta(max_length=MOST_ID_BYTES)]  # int32, little-endian, contiguous
Range = tuple[Small, Small, Small]  # from, to, of: on an axis of the whole model
Box = tuple[tuple[int, int], ...]  # from and to on each axis
Dims = Annotated[tuple[Bytes, ...], Meta(max_length=16)]
Names = Annotated[tuple[Name, ...], Meta(max_length=16)]
Reasons = Annotated[tuple[Text, ...], Meta(max_length=MOST_NAMES)]  # for each subject of a question
#: The dtype's name in torch, the shape and the strides in elements.
Kind = tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{2,31}$")], Dims, Dims]
Sent = TypeVar("Sent", bound="Message")
_MAC = 16  # bytes
_SUM = 16  # bytes of the checksum before a message that callers carry
_NO_MAC = bytes(_MAC)  # stands before a ticket by name
#: The errors of decoding a peer's bytes: msgspec's own, text that is not UTF-8, arrays nested too
#: deeply, and the checks of a message.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, PortaKVError)

_decoders: Bounded[Any, Decoder[Any]] = Bounded("decoders of messages", 512)


def new_decoder(kind: Any) -> Decoder[Any]:
    """Return a new decoder of a type, such as a message or a union of messages.

    msgspec publishes the type information of a Struct before it is complete. A thread that decodes
    such a Struct meanwhile ends the process by a read of a null pointer. Every decoder of messages
    is therefore made here, under the runtime's lock.
    """
    with runtime().lock:
        return Decoder(kind)


def decoder_of(kind: Any) -> Decoder[Any]:
    """Return the decoder of a type, made by `new_decoder` at the first call."""
    try:  # each message asks; a call to make the decoder costs as much as a message
        return _decoders[kind]
    except KeyError:
        return _decoders.setdefault(kind, new_decoder(kind))


def prepare(names: dict[str, Any]) -> None:
    """Make the decoders of all messages of a module, which calls this last with its `globals()`.

    So no thread is the first to decode a message, and no first request waits for it.
    """
    for each in [*names.values()]:
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            decoder_of(each)


#: Why an offer has ended, by its state, as a clause for a reader.
REASONS = {
    "expired": "its lease expired",
    "revoked": "its owner revoked it",
    "taken": "its readers have taken it; offer it with a larger readers=",
    "lost": "a reader that started to read it is gone",
    "restarted": "its owner was restarted, or has other memory, since then",
    "gone": "this owner has no such offer, or it ended long ago",
}


class Refused(PeerError):
    """A request that its receiver has understood and rejects. ``reason``: the receiver's sentence,
    or the whole text if it sent none."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason or text


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The base of all messages: a tag, and no field that this release does not know.

    ``purpose`` begins the error messages about a request.
    """

    purpose: ClassVar[str] = "A message to"


class Group(Message, frozen=True, omit_defaults=True):
    """The facts of a shard that the other side's shard must match.

    ``widths``: the bytes of a raw row of each kv. ``numbers``: the number type of each kv, none if
    rows are bytes. ``page``: the tokens of an opaque page or of a packed block, else 0.
    ``encoding``: the parameters of packed blocks, as `Pack.text` writes them, else empty.
    """

    layers: Range
    heads: Range
    widths: Annotated[Dims, Meta(min_length=1)]
    numbers: Names = ()
    page: Count = 0
    encoding: Name = ""

    @property
    def box(self) -> Box:
        """Return the layers and heads."""
        return self.layers[:2], self.heads[:2]


class Region(Message, frozen=True):
    """An allocation, its device, and its handle; an empty handle comes with a reason."""

    nbytes: Bytes
    device: Text
    handle: Handle = b""
    why: Text = ""


class Described(Message, frozen=True):
    """The arguments of `KVView` as data.

    Tensors are in ``containers`` of these lengths, outermost first. Each tensor has a place: the
    number of its region, its byte offset, the number of its kind.
    """

    group: Group
    layout: Annotated[str, Meta(max_length=256)]
    kinds: Annotated[tuple[Kind, ...], Meta(min_length=1, max_length=16)]
    containers: Annotated[tuple[Small, ...], Meta(max_length=8)]
    places: Annotated[tuple[tuple[Small, Bytes, Small], ...], Meta(min_length=1, max_length=8192)]
    block_size: Count


class Hello(Message, frozen=True):
    """A reader requests the owner's description, and a transport into its staging buffers."""

    purpose: ClassVar[str] = "The handshake with the owner at"

    model: Text
    device: Text = ""
    transport: Name = ""


class Handshake(Message, frozen=True, tag="Welcome"):
    """The owner's answer to `Hello`; its name on the wire is ``Welcome``.

    Rows that cannot be mapped cross in ``slots`` staging buffers of ``slot_bytes`` bytes, by
    ``transport``: the transport that both sides agreed on, or before that the one that the owner
    names.
    """

    epoch: Id
    described: Annotated[tuple[Described, ...], Meta(min_length=1, max_length=64)]
    regions: Annotated[tuple[Region, ...], Meta(max_length=MOST_REGIONS)]
    events: Annotated[tuple[Handle, ...], Meta(max_length=256)] = ()
    transport: Name = ""
    slots: Small = 0
    slot_bytes: Bytes = 0
    #: The key that signs the tickets of this epoch; only this message carries it.
    key: Key = b""
    #: The page of validity words; empty if the owner shares no memory.
    words: Handle = b""
    #: The table of names; empty if the owner shares no memory.
    names: Handle = b""


class About(Message, frozen=True):
    """The base of messages about one offer of one owner."""

    epoch: Id
    offer: Id


class Begin(About, frozen=True):
    """One-way: a reader starts to read an offer, which from now on ends with its channel."""

    purpose: ClassVar[str] = "Starting a pull from the owner at"


class Check(About, frozen=True):
    """Request the state of an offer."""

    purpose: ClassVar[str] = "Confirming an offer of the owner at"


class Close(About, frozen=True):
    """One-way: a reader has ``taken`` the rows of an offer, or its pull failed."""

    purpose: ClassVar[str] = "Ending a pull from the owner at"

    taken: bool


class Renew(About, frozen=True):
    """Request a lease of so many seconds from now."""

    purpose: ClassVar[str] = "Renewing a lease of the owner at"

    seconds: Seconds


class BoxPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``count`` tokens from ``first`` on, of a box of a group on the model's axes."""

    group: Small
    layers: tuple[Small, Small]
    heads: tuple[Small, Small]
    first: Count
    count: Count

    @property
    def box(self) -> Box:
        """Return the layers and heads."""
        return self.layers, self.heads


class Gather(About, frozen=True, omit_defaults=True):
    """Request rows in parts, one for each staging buffer. Also counts as `Begin`.

    The owner sends the parts in their order by the transport, under the tags from ``tag`` on.
    ``encoding``: the parameters of the slots to send, as `Pack.text` writes them; empty: raw rows.
    """

    purpose: ClassVar[str] = "Requesting rows of the owner at"

    parts: Annotated[tuple[BoxPart, ...], Meta(min_length=1, max_length=MOST_PARTS)]
    transport: Name
    tag: Count
    encoding: Name = ""


class Stop(Message, frozen=True):
    """End the request for rows with this tag early.

    The owner sends as many ``parts`` as the reader waits for, and reads no more rows for them.
    """

    purpose: ClassVar[str] = "Stopping rows of the owner at"

    tag: Count
    parts: Count


class Stopped(Message, frozen=True):
    """The answer to `Stop`: the number of parts that the owner has sent or will send."""

    parts: Count


class AboutPart(About, frozen=True):
    """The base of requests about rows of one offer. They also count as `Begin`."""

    part: BoxPart

    @property
    def parts(self) -> tuple[BoxPart, ...]:
        """Return the part, as `Gather.parts`."""
        return (self.part,)


class Sum(AboutPart, frozen=True):
    """Request the checksum of rows."""

    purpose: ClassVar[str] = "Requesting a checksum of the owner at"


class Choose(AboutPart, frozen=True):
    """Request the choice of an encoding for rows, by a sample of them.

    ``link_gbps``: 10^9 bytes of raw rows a second that cross by the transport. ``again``: many
    blocks did not fit, so an earlier sample does not hold.
    """

    purpose: ClassVar[str] = "Choosing an encoding with the owner at"

    link_gbps: Annotated[float, Meta(gt=0, le=1e9)]
    again: bool = False


class OfNames(Message, frozen=True):
    """The base of messages about the offers of one owner that have these names."""

    epoch: Id
    names: Annotated[tuple[OfferName, ...], Meta(min_length=1, max_length=MOST_NAMES)]


class Find(OfNames, frozen=True):
    """Request the tickets of offers by their names."""

    purpose: ClassVar[str] = "Finding offers of the owner at"


class Found(Message, frozen=True):
    """The answer to `Find`: for each name the bytes of its ticket.

    They are empty if there is no such offer yet, or no space in the answer. ``why`` is then empty,
    or why an offer of that name has ended.
    """

    tickets: Annotated[tuple[bytes, ...], Meta(max_length=MOST_NAMES)]
    why: Reasons


class RenewNamed(OfNames, frozen=True):
    """One-way: readers will pull the offers of these names. Requests leases of so many seconds."""

    purpose: ClassVar[str] = "Renewing offers by name of the owner at"

    seconds: Seconds


class EndNamed(OfNames, frozen=True):
    """One-way: no further reader will pull the offers of these names."""

    purpose: ClassVar[str] = "Ending offers by name of the owner at"


class Marks(Message, frozen=True):
    """Request the marks of offers whose rows are not complete."""

    purpose: ClassVar[str] = "Following offers of the owner at"

    epoch: Id
    offers: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=MOST_NAMES)]


class Marked(Message, frozen=True):
    """The answer to `Marks`: for each offer the number of layers or tokens that are complete.

    ``why`` is empty, or why the offer does not hold.
    """

    marks: Annotated[tuple[Count, ...], Meta(max_length=MOST_NAMES)]
    why: Reasons


class Bye(Message, frozen=True):
    """One-way: a reader releases an owner's staging buffers."""

    purpose: ClassVar[str] = "Leaving the owner at"


class Answer(Message, frozen=True):
    """Answer with a state. ``seconds``: the rest of a lease, or the pause before a retry."""

    state: Literal["held", "gone", "busy", "refused", "done"]
    why: Text = ""
    seconds: Seconds = 0.0
    digest: int = 0


class Chosen(Answer, frozen=True, omit_defaults=True):
    """Answer `Choose` with the reason in ``why``, and the figures of `EncodingChoice`.

    ``encoding``: the parameters of slots, as `Pack.text` writes them; empty: the rows cross raw.
    """

    encoding: Name = ""
    packing_gbps: Figure | None = None
    ratio: Figure | None = None
    escapes: Figure | None = None
    fits: Figure | None = None


#: The requests about the rows of an offer.
ForRows: TypeAlias = Gather | Sum | Choose


class Ticket(About, frozen=True, omit_defaults=True):
    """An offer: the address of its owner and, for each group, block ids and the tokens of a block.

    An id of -1 has its rows elsewhere. ``event``: the number of the event after the rows, -1 if
    there is none. ``place``: of its validity word, -1 if it has none. ``progress``: the unit of its
    mark, empty if its rows were complete when it was made. ``traceparent``: of the span in which it
    was made, empty if there is none; a ticket without it has the bytes of earlier releases.
    """

    address: Text
    tokens: Count
    ids: Annotated[tuple[Ids, ...], Meta(min_length=1, max_length=64)]
    steps: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=64)]
    lease: Seconds
    event: Annotated[int, Meta(ge=-1, le=255)] = -1
    place: Annotated[int, Meta(ge=-1, le=1 << 16)] = -1
    progress: Literal["", "layers", "tokens"] = ""
    traceparent: Annotated[str, Meta(max_length=55, pattern=PATTERN)] = ""

    def gone(self, why: str) -> OfferGone:
        """Return the error of an offer that does not hold; ``why`` is a clause."""
        return _gone(f"offer {self.offer.hex()[:8]}", self.address, why)

    def pack(self, key: bytes) -> bytes:
        """Return the bytes that carry the ticket, with a MAC under the owner's key over their
        checksum."""
        body = sealed(self)
        return _mac(body, key) + body

    @staticmethod
    def read(data: bytes) -> Ticket:
        """Return the ticket of these bytes.

        Raises the same `PeerError` whatever is wrong, and `InvalidTerms` for a ticket by name.
        """
        ticket = unsealed(data[_MAC:], Ticket) if isinstance(data, bytes) else None
        if ticket is not None and len(ticket.ids) == len(ticket.steps):
            for ids in ticket.ids:
                if len(ids) % 4:
                    break
            else:
                return ticket
        if isinstance(data, bytes) and Named.read(data):
            raise InvalidTerms(
                "Expected tickets to be tickets of offers, got one by name. Pull it by "
                "`Reader.pull`."
            )
        raise no_ticket()


class Named(Message, frozen=True):
    """The offer of an owner that has a name, as `owner.Ticket.of` makes it."""

    epoch: Id
    address: Text
    name: OfferName

    def gone(self, why: str) -> OfferGone:
        """Return the error of an offer that does not hold; ``why`` is a clause."""
        return _gone("offer of that name", self.address, why)

    def pack(self) -> bytes:
        """Return the bytes of a ticket by name. No MAC protects them: the name is the secret."""
        return _NO_MAC + sealed(self)

    @staticmethod
    def read(data: bytes) -> Named | None:
        """Return what `pack` made; None for other bytes."""
        return unsealed(data[_MAC:], Named) if data.startswith(_NO_MAC) else None


def any_named(tickets: Iterable[bytes]) -> bool:
    """Return True if some tickets may be by name."""
    for ticket in tickets:  # noqa: SIM110 - each pull asks; a generator is two more calls
        if ticket.startswith(_NO_MAC):
            return True
    return False


def offer_name(name: object) -> bytes:
    """Return the name of an offer; raise `InvalidTerms`, which does not show it, for another
    value."""
    if isinstance(name, bytes) and LEAST_NAME <= len(name) <= MOST_NAME:
        return name
    got = f"{len(name)} bytes" if isinstance(name, bytes) else kind_of(name)
    raise InvalidTerms(
        f"Expected name to be {LEAST_NAME} to {MOST_NAME} bytes, got {got}. Pass random bytes."
    )


def carried(name: str, value: object, do: str) -> bytes:
    """Return bytes that a caller carries between processes, such as a ticket.

    Raises `InvalidTerms`, which does not show the value, for another type; a sentence about digits
    or other memory says how to convert them. ``do``: what to pass.
    """
    if isinstance(value, bytes):
        return value
    got = shown(value) if value is None or isinstance(value, int) else kind_of(value)
    if isinstance(value, str):
        got = "a text"
        if value and {*value} <= {*hexdigits}:
            got = "a text of hexadecimal digits"
            do = "Convert it by bytes.fromhex(text)."
    elif isinstance(value, bytearray | memoryview):
        do = "Convert it by bytes(value)."
    raise InvalidTerms(f"Expected {name} to be bytes, got {got}. {do}")


def listed(tickets: object, do: str = "Pass Offer.ticket.") -> list[bytes]:
    """Return the different tickets of a call; raise as `carried` for other values."""
    if isinstance(tickets, bytes | str | bytearray | memoryview):
        packed = [carried("tickets", tickets, do)]
    else:
        packed = items("tickets", tickets, "the bytes of tickets")
    for number, one in enumerate(packed):
        if not isinstance(one, bytes):
            carried(f"tickets[{number}]", one, do)
    packed = list(dict.fromkeys(packed))
    if not packed:
        raise invalid("tickets", "one ticket or more", tickets, do)
    return packed


def _gone(offer: str, address: str, why: str) -> OfferGone:
    """Return the error of an offer that does not hold."""
    return OfferGone(
        f"The {offer} of {address} does not hold: {why}. No rows were committed; request another "
        f"offer."
    )


def no_ticket() -> PeerError:
    """Return the error of bytes that are not a ticket, the same whatever is wrong with them."""
    return PeerError(
        "Expected tickets to be the bytes of `Offer.ticket`, got bytes that are not a "
        "ticket of this release. Carry them unchanged, between sides of one release."
    )


def is_signed(data: bytes, key: bytes) -> bool:
    """Return True if the bytes of a ticket, which `Ticket.read` has read, are as the owner with
    this key made them."""
    return compare_digest(data[:_MAC], _mac(data[_MAC:], key))


def _mac(body: bytes, key: bytes) -> bytes:
    """Return the MAC of the bytes of a ticket: of their cryptographic checksum, which is checked
    when they are read."""
    return blake2b(body[:_SUM], key=key, digest_size=_MAC).digest()


def sealed(message: Message) -> bytes:
    """Return a message as bytes, with a checksum before it, for callers to carry."""
    data = msgspec.msgpack.encode(message)
    return blake2b(data, digest_size=_SUM).digest() + data


def unsealed(data: bytes, kind: type[Sent]) -> Sent | None:
    """Return the message of these bytes; None if `sealed` did not make them."""
    if isinstance(data, bytes) and blake2b(data[_SUM:], digest_size=_SUM).digest() == data[:_SUM]:
        try:
            message: Sent = decoder_of(kind).decode(data[_SUM:])
            return message
        except UNDECODABLE:  # another release made the bytes
            return None
    return None


prepare(globals())
