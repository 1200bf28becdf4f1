# SPDX-License-Identifier: Apache-2.0
"""The messages between a server and its clients: schemas with limits, for the channel.

Clients request rows and report their copies. The server answers, and sends the rows that it lends
later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from portakv.migrate.messages import Handle, Message, Seconds, Small, Text, prepare

#: The version of these messages. A client of another version is a client of no server.
PROTOCOL = 7
#: The most keys of a request, which is cut into several ones above it: with as many keys that they
#: follow it is a message of the channel.
MOST_KEYS = 960
#: The most keys of a lookup in a bucket.
MOST_LOOKED_UP = 1024
#: The most changes of a message, and keys of a page of an index.
MOST_CHANGES = 512
MOST_PAGE = 16384
#: In `Report.landed`: a block does not fit into packed slots.
UNFIT = 2

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]  # of a session, of a request, or of a lease
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Keys = Annotated[tuple[Key, ...], Meta(max_length=MOST_KEYS)]
Page = Annotated[tuple[Key, ...], Meta(max_length=MOST_PAGE)]
Id = Annotated[int, Meta(ge=0, lt=1 << 31)]  # of a row, or of a block in a request
Ids = Annotated[tuple[Id, ...], Meta(max_length=MOST_KEYS)]
Mask = Annotated[bytes, Meta(max_length=MOST_KEYS)]  # a byte each, 0 or 1, or `UNFIT`
#: What keys follow, as `after_of` returns it.
AfterKeys = Key | Annotated[tuple[Key | None, ...], Meta(max_length=MOST_KEYS)] | None
FormText = Annotated[str, Meta(max_length=16384)]  # the JSON of a form
#: The namespace, the number and the start of a process.
Process = tuple[Number, Number, Number]


class AskProtocol(Message, frozen=True):
    """Request the version of the server's messages. This message is the same in all versions."""

    purpose: ClassVar[str] = "The handshake with the store server at"

    version: Number


class ServerProtocol(Message, frozen=True):
    """The answer to `AskProtocol`."""

    version: Number


class Join(Message, frozen=True):
    """Request a session for a rank of an engine.

    ``address``: the channel of the rank. ``forms``: its parts of the blocks of each group of
    layers. ``before``: an earlier session of this client, none of whose copies is under way; or 0.
    """

    purpose: ClassVar[str] = "Joining the store server at"

    engine: Text
    process: Process
    address: Text
    forms: Annotated[tuple[FormText, ...], Meta(min_length=1, max_length=64)]
    before: Number = 0


class Joined(Message, frozen=True):
    """The answer to `Join`: a session, and the rows of the store, for `open_shared`."""

    session: Number
    rows: Handle


class Follow(Message, frozen=True):
    """Request a session for an index of the blocks of each group of an engine."""

    purpose: ClassVar[str] = "Following the store server at"

    engine: Text
    process: Process
    address: Text
    groups: Small


class Followed(Message, frozen=True):
    """The answer to `Follow`: a session, and of each group the bytes of a block.

    ``forms``: the numbers of the forms of each group's blocks in `Changes`: its own, then packed
    ones of raw blocks, or raw ones of packed blocks. ``bucket``: the store has a bucket, which
    answers `LookUp` alone.
    """

    session: Number
    forms: tuple[tuple[Small, ...], ...]
    nbytes: tuple[Number, ...]
    bucket: bool = False


class Later(Message, frozen=True):
    """The answer to a request that the server cannot answer yet: ask again soon."""


class OfSession(Message, frozen=True):
    """The base of messages within a session."""

    session: Number


class Alive(OfSession, frozen=True):
    """Request an `Alive` of the same session, which says that the session goes on."""

    purpose: ClassVar[str] = "A sign of life from the store server at"


class Load(OfSession, frozen=True):
    """Request the rows of blocks of a group, to copy them from there.

    ``seconds``: after which blocks that have no rows yet are missing; 0: never.
    """

    purpose: ClassVar[str] = "Requesting rows of the store server at"

    number: Number
    group: Small
    keys: Keys
    seconds: Seconds
    priority: Literal["urgent", "normal", "background"]


class Save(OfSession, frozen=True):
    """Request rows for blocks of a group, to copy them there."""

    purpose: ClassVar[str] = "Requesting space of the store server at"

    number: Number
    group: Small
    keys: Keys
    after: AfterKeys
    priority: Literal["urgent", "normal", "background"]


class Grant(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows that a client may use until it reports the end of the lease.

    ``places``: the numbers of their blocks in the request. ``form``: the JSON of the form of the
    images in them, or nothing for the group's form of whole blocks.
    """

    lease: Number
    places: Ids
    rows: Ids
    form: FormText = ""


class Progress(OfSession, frozen=True):
    """Rows for a request, as its answer or later. ``more``: other rows may follow.

    ``stored``: for each block of a save that has ended, whether it is stored.
    """

    purpose: ClassVar[str] = "Lending rows to"

    number: Number
    grants: Annotated[tuple[Grant, ...], Meta(max_length=MOST_KEYS)] = ()
    more: bool = True
    stored: Mask | None = None


class Report(OfSession, frozen=True):
    """One-way: the copy of a lease has ended. ``landed``: for each of its blocks, if it was
    made, or `UNFIT`."""

    purpose: ClassVar[str] = "Reporting a copy to the store server at"

    lease: Number
    landed: Mask


class Stop(OfSession, frozen=True):
    """One-way: nothing waits for a request any longer, or its blocks may be evicted again."""

    purpose: ClassVar[str] = "Stopping a request of the store server at"

    number: Number


class Pin(OfSession, frozen=True):
    """Request that blocks of a group are not evicted before `Stop` of the number, or the end of the
    session."""

    purpose: ClassVar[str] = "Pinning blocks of the store server at"

    number: Number
    group: Small
    keys: Keys


class Delete(OfSession, frozen=True):
    """Request that blocks of a group are forgotten, locked or not."""

    purpose: ClassVar[str] = "Deleting blocks of the store server at"

    group: Small
    keys: Keys


class Done(OfSession, frozen=True):
    """The answer to `Pin` and `Delete`: for which blocks that was done."""

    done: Mask


class Leave(OfSession, frozen=True):
    """One-way: a session ends, none of whose copies is under way."""

    purpose: ClassVar[str] = "Leaving the store server at"


class Farewell(OfSession, frozen=True):
    """Tell a client or a follower that the server ends in order; its answer is the same."""

    purpose: ClassVar[str] = "Taking leave of"


class AskKeys(OfSession, frozen=True):
    """Request a page of the keys of a group. Page 0 takes the snapshot of the later pages."""

    purpose: ClassVar[str] = "Requesting the index of the store server at"

    group: Small
    page: Small


class KeysPage(Message, frozen=True):
    """The answer to `AskKeys`.

    ``number``: of the last change before the snapshot. ``tier``: the name of the tier that has the
    keys, as `tier_of` returns it. ``more``: another page follows; the last one has no keys.
    """

    number: Number
    tier: Text = ""
    keys: Page = ()
    more: bool = False


class LookUp(OfSession, frozen=True):
    """One-way: look up blocks of all groups in the bucket; `LookedUp` follows."""

    purpose: ClassVar[str] = "A lookup in the bucket of the store server at"

    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_LOOKED_UP)]


class LookedUp(OfSession, frozen=True):
    """One-way, from the server: the lookup of keys has ended.

    ``count``: how many leading blocks can be loaded.
    ``answers``: the bucket answered in time.
    """

    purpose: ClassVar[str] = "Reporting a lookup to"

    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MOST_LOOKED_UP)]
    count: Number
    answers: bool


class Changed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A block that was stored in a tier, or lost. ``form``: a number of `Followed`."""

    number: Number
    form: Small
    key: Key
    tier: Text
    stored: bool
    why: Text = ""


class Changes(OfSession, frozen=True):
    """One-way, from the server: blocks that were stored or lost, in order."""

    purpose: ClassVar[str] = "Announcing blocks to"

    changes: Annotated[tuple[Changed, ...], Meta(min_length=1, max_length=MOST_CHANGES)]


def tier_of(form: int, tier: str) -> str:
    """Return the name of a tier for the blocks of a form, by its number in `Followed`."""
    return f"{form} {tier}"


def after_of(after: Sequence[bytes | None], keys: Sequence[bytes]) -> AfterKeys:
    """Return what keys follow for a message: the key before the first one, or None, if each other
    key follows the one before it; else a key, or None, for each."""
    if [*after[1:]] == [*keys[:-1]]:
        return after[0]
    return tuple(after)


prepare(globals())
