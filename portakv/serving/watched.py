# SPDX-License-Identifier: Apache-2.0
"""Let `portakv top` read the figures of a process, over a channel that the process has anyway.

A channel at a Unix socket is reached by the processes of one user alone.
"""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from portakv.graph.meter import Meter, Source
from portakv.migrate.channel import Channel
from portakv.migrate.messages import Message, prepare

#: The most values of an answer, which is then below the channel's limit.
MOST = 4096
#: Labels of series that no one reads in a table.
_BUCKET = "bucket"


class AskFigures(Message, frozen=True):
    """Request the figures of a process."""

    purpose: ClassVar[str] = "Reading the figures of the process at"


class Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value of a metric. ``series``: "" or, of a histogram, "sum" or "count"."""

    name: str
    series: str
    labels: dict[str, str]
    value: float


class FiguresPage(Message, frozen=True):
    """The answer to `AskFigures`."""

    values: Annotated[tuple[Value, ...], Meta(max_length=MOST)]


def answer(channel: Channel, *sources: Source, **stores: Source) -> None:
    """Have a channel answer `portakv top` with the figures of sources, which are as those of
    `Collector`. The channel must be one of this process, and answers until it is closed.

    Raises `InvalidTerms` for an object without figures.
    """
    meter = Meter(*sources, **stores)
    channel.serve(AskFigures, lambda *_: _page(meter))


def ask(address: str, timeout: float = 5.0) -> tuple[Value, ...]:
    """Return the figures of the process whose channel has an address.

    Raises `PeerError` if it cannot be reached or has no figures, and `TransferTimeout`.
    """
    with closing(Channel(timeout=timeout)) as channel:
        return channel.ask(address, AskFigures(), FiguresPage).values


def _page(meter: Meter) -> FiguresPage:
    """Return the figures now; those that an answer does not hold are left out."""
    values = (
        Value(family.name, sample.series, {**sample.labels}, sample.value)
        for family in meter.families()
        for sample in family.samples
        if sample.series != _BUCKET
    )
    return FiguresPage(tuple(islice(values, MOST)))


prepare(globals())
