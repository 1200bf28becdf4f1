# SPDX-License-Identifier: Apache-2.0
"""The field `traceparent` of tickets: those of releases without it are read, and read ours."""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Literal

import msgspec
import pytest
import torch
from msgspec import Meta
from support.migrate_pulls import Rows, sides
from support.waits import LIMIT, until

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


class Broken:
    """A tracer that fails at each span."""

    def __init__(self) -> None:
        self.names = list[str]()

    def current(self) -> str:
        return HEADER

    def span(self, name: str, *_: object) -> None:
        self.names.append(name)
        raise RuntimeError("the exporter is gone")


def test_a_tracer_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The pull is committed, its offer ends, and the log has a line."""
    broken = Broken()
    rows = Rows()
    target = Rows(fill=0)
    tracing.use(broken)
    try:
        with sides() as made:
            owner = made.owner(rows.shard)
            reader = made.reader(target.shard)
            offer = owner.offer([1, 2], tokens=20)
            pulled = reader.pull(offer.ticket, [1, 2])
            pulled.synchronize(LIMIT)
            assert pulled.published
            assert offer.taken(LIMIT)
            assert until(lambda: {*broken.names} == {"portakv pull", "portakv offer"}, LIMIT)
            assert until(lambda: reader.statistics()["pulls"] == 0, LIMIT)
            assert owner.statistics()["taken"] == 1
    finally:
        tracing.use(None)
    assert torch.equal(target.rows([1, 2], 20), rows.rows([1, 2], 20))
    assert "the exporter is gone" in caplog.text


def test_headers_nest() -> None:
    """The innermost counts; without one, and without a tracer, nothing is noted."""
    with tracing.under(HEADER):
        assert tracing.begin().traceparent == HEADER
        with tracing.under(""):
            assert tracing.begin() is tracing.UNTRACED
        assert tracing.begin() == tracing.Began(HEADER, 0)
    assert tracing.begin() is tracing.UNTRACED
