# SPDX-License-Identifier: Apache-2.0
"""Messages refuse what their schemas do not allow, and tickets whatever was not packed so."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import ready

from portakv.errors import PeerError
from portakv.migrate import messages
from portakv.migrate.messages import (
    Answer,
    Begin,
    BoxPart,
    Choose,
    Chosen,
    Close,
    Described,
    Gather,
    Group,
    Hello,
    Message,
    Region,
    Stop,
    Stopped,
    Sum,
    Ticket,
    is_signed,
)

OWNER = b"o" * 16
OFFER = b"f" * 16
KEY = b"k" * 32
GROUP = Group((0, 4, 8), (0, 2, 4), (256, 256), ("float16", "float16"))
TICKET = Ticket(OWNER, OFFER, "tcp://h:1", 40, (b"\1\0\0\0" * 3,), (16,), 30.0, 2)
DESCRIBED = Described(
    GROUP,
    "layer | block token dim",
    (("float16", (8, 16, 64), (1024, 64, 1)),),
    (4,),
    ((0, 0, 0), (0, 64, 0)),
    16,
)
PART = BoxPart(0, (0, 4), (1, 2), 16, 24)
TESTS = str(Path(__file__).resolve().parents[1])
PATHS = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode


def plain(message: Message) -> dict[str, Any]:
    """A message as a stranger would write it."""
    fields: dict[str, Any] = decode(encode(message))
    return fields


def plain_parts(count: int) -> list[list[Any]]:
    return [[0, [0, 4], [1, 2], 16, 24]] * count


def changed(message: Message, **fields: Any) -> bytes:
    return encode({**plain(message), **fields})


@pytest.mark.parametrize(
    "message",
    [
        TICKET,
        DESCRIBED,
        Hello("llama", "cpu", "distributed"),
        Gather(OWNER, OFFER, (PART, PART), "distributed", 7),
        Sum(OWNER, OFFER, PART),
        Choose(OWNER, OFFER, PART, 2.5, True),
        Chosen("done", "Packing pays.", encoding="pack/1:4", ratio=1.3),
        Stop(7, 2),
        Stopped(2),
        Close(OWNER, OFFER, True),
        Answer("busy", "no slot", 0.5, (1 << 64) - 1),
    ],
)
def test_what_is_sent_arrives(message: Message) -> None:
    assert decode(encode(message), type=type(message)) == message


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (Gather(OWNER, OFFER, (PART, PART), "distributed", 7), "19fc2c01fc937822"),
        (Gather(OWNER, OFFER, (PART,), "distributed", 7, "pack/1:4"), "41f3531488f30da8"),
        (Sum(OWNER, OFFER, PART), "4a093ee5098cee45"),
        (Answer("busy", "no slot", 0.5, 3), "e82b3b1b5bb2bd77"),
    ],
)
def test_pulls_without_a_choice_keep_the_bytes_of_earlier_releases(
    message: Message, digest: str
) -> None:
    assert blake2b(encode(message), digest_size=8).hexdigest() == digest


def test_every_message_has_its_own_tag() -> None:
    kinds = [x for x in vars(messages).values() if isinstance(x, type) and issubclass(x, Message)]
    assert len({kind.__struct_config__.tag for kind in kinds}) == len(kinds) > 12
    with pytest.raises(msgspec.ValidationError):
        decode(encode(Begin(OWNER, OFFER)), type=Close)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (DESCRIBED, {"places": []}),
        (DESCRIBED, {"places": [[0, -1, 0]]}),
        (DESCRIBED, {"places": [[0, 1 << 49, 0]]}),
        (DESCRIBED, {"places": [[0, 0, 0]] * 9000}),
        (DESCRIBED, {"layout": "layer " * 100}),
        (DESCRIBED, {"kinds": [["float16; import os", [1], [1]]]}),
        (DESCRIBED, {"kinds": [["float16", [1], [-1]]]}),
        (DESCRIBED, {"kinds": [["float16", [1] * 17, [1] * 17]]}),
        (DESCRIBED, {"unknown": 1}),
        (GROUP, {"layers": [0, 1]}),
        (GROUP, {"widths": []}),
        (GROUP, {"page": 1.5}),
        (Region(64, "cpu"), {"handle": bytes(5000)}),
        (Begin(OWNER, OFFER), {"offer": OFFER[:15]}),
        (Begin(OWNER, OFFER), {"epoch": "o" * 16}),
        (Gather(OWNER, OFFER, (PART,), "distributed", 7), {"parts": []}),
        (Gather(OWNER, OFFER, (PART,), "distributed", 7), {"parts": [[0, [0, 4], [1, 2], 16]]}),
        (Gather(OWNER, OFFER, (PART,), "distributed", 7), {"parts": [[0, [0, 4], [1, 2], -1, 24]]}),
        (Gather(OWNER, OFFER, (PART,), "distributed", 7), {"parts": plain_parts(65)}),
        (Choose(OWNER, OFFER, PART, 2.5), {"link_gbps": 0.0}),
        (Chosen("done"), {"ratio": -1.0}),
        (Stop(7, 2), {"parts": -1}),
        (Answer("held"), {"state": "perhaps"}),
        (Answer("held"), {"why": "x" * 2000}),
        (Answer("held"), {"seconds": float("nan")}),
    ],
)
def test_a_schema_refuses(message: Message, fields: dict[str, Any]) -> None:
    """Fault 14. Unknown fields, wrong types, numbers and lengths past their limits."""
    assert decode(changed(message), type=type(message)) == message
    with pytest.raises(msgspec.ValidationError):
        decode(changed(message, **fields), type=type(message))


def test_a_ticket_is_read_as_it_was_packed() -> None:
    assert Ticket.read(TICKET.pack(KEY)) == TICKET
    assert len(TICKET.pack(KEY)) < 250


def repacked(**fields: Any) -> Callable[[bytes], bytes]:
    """Whoever forges a ticket makes its checksum too."""
    one = TICKET.pack(KEY)
    assert one[32:] == encode(TICKET)
    new = msgspec.structs.replace(TICKET, **fields).pack(KEY)
    return lambda _: new


def nested(_: bytes) -> bytes:
    """Arrays in arrays, deeper than msgspec follows, under a right checksum."""
    body = b"\x82\xa4type\xa6Ticket\xa1x" + b"\x91" * 60000
    return bytes(16) + blake2b(body, digest_size=16).digest() + body


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:15],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[16:],
        lambda data: data.hex(),
        lambda data: None,
        repacked(epoch=b"short"),
        repacked(ids=(b"", b"")),
        repacked(event=256),
        nested,
    ],
)
def test_a_ticket_that_was_changed_or_forged_is_refused_in_constant_words(
    change: Callable[[bytes], bytes],
) -> None:
    """Fault 12. Truncated, extended, of another type, forged against the schema."""
    with pytest.raises(PeerError) as refused:
        Ticket.read(change(TICKET.pack(KEY)))
    assert str(refused.value) == words()


def test_no_bit_of_a_ticket_can_flip() -> None:
    """Fault 12. Not even one of the ids, which the schema could not tell."""
    packed = TICKET.pack(KEY)
    texts = set()
    assert is_signed(packed, KEY)
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit < 8 * 32:  # of the MAC, which only who has the key can check, or of what it is of
            assert not is_signed(bytes(flipped), KEY)
        if bit < 8 * 16:
            continue
        with pytest.raises(PeerError) as refused:
            Ticket.read(bytes(flipped))
        texts.add(str(refused.value))
    assert texts == {words()}


def test_a_ticket_is_signed_under_its_owners_key_alone() -> None:
    """Whoever changes a ticket can make its checksum anew, but not its MAC."""
    packed = TICKET.pack(KEY)
    other = msgspec.structs.replace(TICKET, ids=(b"\2\0\0\0" * 3,))
    assert not is_signed(packed, b"K" * 32)
    assert not is_signed(packed[:16] + other.pack(KEY)[16:], KEY)
    assert not is_signed(other.pack(b"K" * 32), KEY)
    assert not is_signed(b"", KEY)


def words() -> str:
    with pytest.raises(PeerError) as refused:
        Ticket.read(b"no ticket")
    return str(refused.value)


@pytest.fixture(scope="module")
def first_decodes() -> dict[str, Any]:
    """Return what `support.first_decodes` found, in a process that had decoded nothing."""
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = ready.run("-c", "from support.first_decodes import report; report(60)", env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("what", ["an answer", "sealed bytes", "another package"])
def test_a_first_decode_beside_another_one(what: str, first_decodes: dict[str, Any]) -> None:
    """A thread may decode a type while another one is the first to decode it."""
    assert first_decodes[what] == 0


def test_first_decodes_of_several_threads(first_decodes: dict[str, Any]) -> None:
    """No process dies of 60 in which 8 threads decode their first handshake together."""
    assert first_decodes["by chance"] == [0] * 60


def test_a_first_decode_of_msgspec_alone_dies(first_decodes: dict[str, Any]) -> None:
    """The cases above would see the fault: without the decoders of the library it is there."""
    assert first_decodes["msgspec alone"] == -signal.SIGSEGV


def test_an_import_builds_the_types_of_all_messages(first_decodes: dict[str, Any]) -> None:
    """No thread is the first to decode a message of the library."""
    assert first_decodes["the first"]  # of a type that no import has built
    assert first_decodes["structs"] > 60
    assert first_decodes["unbuilt"] == []
