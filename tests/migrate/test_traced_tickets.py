# SPDX-License-Identifier: Apache-2.0
"""The field `traceparent` of tickets: those of releases without it are read, and read ours."""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from portakv.migrate import messages
from portakv.migrate.messages import About, Ticket, is_signed, unsealed
from portakv.runtime import tracing

HEADER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
KEY = b"k" * 32
MAC = 16


class Former(About, frozen=True, tag="Ticket"):
    """A ticket as releases before `traceparent` know it."""

    address: messages.Text
    tokens: messages.Count
    ids: Annotated[tuple[messages.Ids, ...], Meta(min_length=1, max_length=64)]
    steps: Annotated[tuple[messages.Count, ...], Meta(min_length=1, max_length=64)]
    lease: messages.Seconds
    event: Annotated[int, Meta(ge=-1, le=255)] = -1
    place: Annotated[int, Meta(ge=-1, le=1 << 16)] = -1
    progress: Literal["", "layers", "tokens"] = ""


TERMS = bytes(16), bytes(range(16)), "ipc:///a", 32, (b"\0\0\0\0",), (16,), 30.0


def test_a_ticket_of_a_release_without_the_field_is_read() -> None:
    body = messages.sealed(Former(*TERMS, 3, 5, "layers"))
    read = Ticket.read(blake2b(body, key=KEY, digest_size=MAC).digest() + body)
    assert read == Ticket(*TERMS, 3, 5, "layers")
    assert read.traceparent == ""


def test_a_release_without_the_field_reads_a_ticket_without_a_trace() -> None:
    for more in ((), (3, 5, "layers"), (0, 0)):
        ticket = Ticket(*TERMS, *more)
        data = ticket.pack(KEY)
        former = unsealed(data[MAC:], Former)
        assert former == Former(*TERMS, *more)
    traced = Ticket(*TERMS, traceparent=HEADER).pack(KEY)
    assert unsealed(traced[MAC:], Former) is None  # as any other field that it does not know


def test_the_owners_key_signs_the_field() -> None:
    """Another trace in a ticket is another ticket."""
    ticket = Ticket(*TERMS, traceparent=HEADER)
    data = ticket.pack(KEY)
    assert Ticket.read(data) == ticket
    assert is_signed(data, KEY)
    other = messages.sealed(msgspec.structs.replace(ticket, traceparent=HEADER[:-1] + "0"))
    assert not is_signed(data[:MAC] + other, KEY)


def test_headers_nest() -> None:
    """The innermost counts; without one, and without a tracer, nothing is noted."""
    with tracing.under(HEADER):
        assert tracing.begin().traceparent == HEADER
        with tracing.under(""):
            assert tracing.begin() is tracing.UNTRACED
        assert tracing.begin() == tracing.Began(HEADER, 0)
    assert tracing.begin() is tracing.UNTRACED
