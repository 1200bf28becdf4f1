# SPDX-License-Identifier: Apache-2.0
"""Let `portakv top` read the figures of a process, over a channel that the process has anyway.

A channel at a Unix socket is reached by the processes of one user alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import closing
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from portakv.errors import PeerError
from portakv.graph.meter import Meter, Metered, Source
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Message, prepare

#: The most bytes of an answer, below the channel's limit, and of what it unpacks to.
MOST = 56 << 10
_UNPACKED = 8 << 20
#: Labels of series that no one reads in a table.
_BUCKET = "bucket"


class AskFigures(Message, frozen=True):
    """Request the figures of a process."""

    purpose: ClassVar[str] = "Reading the figures of the process at"


class FiguresPage(Message, frozen=True):
    """The answer to `AskFigures`: figures as JSON, compressed."""

    data: Annotated[bytes, Meta(max_length=MOST)]


class Value(msgspec.Struct, frozen=True, array_like=True):
    """A value of a metric. ``series``: "" or, of a histogram, "sum" or "count"."""

    name: str
    series: str
    labels: dict[str, str]
    value: float


#: Made at import, before any thread decodes values; see `messages.new_decoder`.
_VALUES = msgspec.json.Decoder(list[Value])


def answer(channel: Channel, *sources: Source | Metered, **stores: Source | Metered) -> None:
    """Have a channel answer `portakv top` with the figures of sources, which are as those of
    `Collector`. The channel must be one of this process, and answers until it is closed.

    Raises `InvalidTerms` for an object without figures.
    """
    meter = Meter(*sources, **stores)
    channel.serve(AskFigures, lambda *_: _page(meter))


def ask(address: str, timeout: float = 5.0) -> list[Value]:
    """Return the figures of the process whose channel has an address.

    Raises `PeerError` if it cannot be reached or has no figures, and `TransferTimeout`.
    """
    with closing(Channel(timeout=timeout)) as channel:
        page = channel.ask(address, AskFigures(), FiguresPage)
    unpacked = zlib.decompressobj()
    try:
        text = unpacked.decompress(page.data, _UNPACKED)
        return _VALUES.decode(text)
    except (zlib.error, msgspec.DecodeError) as error:
        raise PeerError(
            f"Expected figures of {address}, got other bytes: {error}. Run the same release on "
            f"both sides."
        ) from None


def _page(meter: Meter) -> FiguresPage:
    """Return the figures now; those that an answer does not hold are left out."""
    values = [
        Value(family.name, sample.series, {**sample.labels}, sample.value)
        for family in meter.families()
        for sample in family.samples
        if sample.series != _BUCKET
    ]
    while len(data := _packed(values)) > MOST:
        values = values[: len(values) // 2]
    return FiguresPage(data)


def _packed(values: Iterable[Value]) -> bytes:
    return zlib.compress(msgspec.json.encode([*values]))


prepare(globals())
