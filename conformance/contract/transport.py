# SPDX-License-Identifier: Apache-2.0
"""The contract of a transport between processes: `portakv.migrate.transports.base.Transport`.

Every check gets a `Wire`: the transports of an owner and of a reader in one process, with a
connection between them that a check can end. Slots are on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from portakv.errors import PeerError, TransferError, TransferTimeout
from portakv.migrate.channel import Peer
from portakv.migrate.messages import decoder_of
from portakv.migrate.transports.base import Moving, MovingStage, Transport
from portakv_conformance.contract.runner import expect

#: Seconds in which a slot has to cross, or its failure to be noticed, if a check gets no other.
SOON = 20.0


class End:
    """One end of the channel: all that a transport uses of it."""

    address = "tcp://127.0.0.1:7777"

    def __init__(self, connection: Peer) -> None:
        self.connection = connection
        self.other = self
        self.answers: dict[type, Callable[[Peer, Any], Any]] = {}

    def serve(self, kind: type, answer: Callable[[Peer, Any], Any]) -> None:
        """Answer messages of a kind."""
        self.answers[kind] = answer

    def ask(self, address: str, message: Any, kind: type, stop: Callable[[], bool] = bool) -> Any:
        """Return the answer of the other end, encoded and decoded as on a wire."""
        if self.connection.gone:
            raise PeerError(f"{address} is gone.")
        sent = decoder_of(type(message)).decode(msgspec.msgpack.encode(message))
        answer = self.other.answers[type(message)](self.connection, sent)
        return decoder_of(kind).decode(msgspec.msgpack.encode(answer))

    def tell(self, address: str, message: object) -> None:
        """Send a message that has no answer."""
        self.ask(address, message, type(None))

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """Register a function for the end of the other side; return a function that undoes this."""
        return self.connection.on_gone(gone)


class Wire:
    """The transports of an owner and a reader, with a connection between them.

    Args:
        kind: the class of the transport.
        timeout: the seconds after which a slot has failed.
        on: the devices of the owner's and of the reader's slots.
        soon: the seconds in which a check expects a slot to cross or to fail.
    """

    def __init__(
        self,
        kind: type[Transport],
        timeout: float = SOON,
        on: tuple[str, str] = ("cpu", "cpu"),
        soon: float = SOON,
    ) -> None:
        self.soon = soon
        self.devices = tuple(map(torch.device, on))
        self.owner: Any = kind(self.devices[0], timeout)
        self.reader: Any = kind(self.devices[1], timeout)
        self.connect()

    def connect(self) -> None:
        """Connect, also once more."""
        # The ends have what a transport uses of a channel, and are none.
        self.life: Any = Peer(b"the only reader")
        self.there: Any = End(self.life)
        self.here: Any = End(self.life)
        self.there.other = self.here
        self.here.other = self.there
        for each in self.owner.asks:
            self.there.serve(each, partial(self._answer, self.there))

    def _answer(self, there: object, life: object, question: object) -> Any:
        return self.owner.answer(life, there, question)

    def give(self, slot: torch.Tensor, tag: int = 0) -> Moving:
        """Begin to send a slot of the owner."""
        moving: Moving = self.owner.lane(self.life, self.there).move(slot, tag)
        return moving

    def take(self, into: torch.Tensor, tag: int = 0) -> Moving:
        """Begin to receive into a slot of the reader."""
        moving: Moving = self.reader.lane(End.address, self.here).move(into, tag)
        return moving

    def cross(self, nbytes: int, tag: int = 0) -> None:
        """Send bytes, and expect them at the reader."""
        slot = slot_of(nbytes, tag)
        there, here = self.devices
        into = torch.zeros(nbytes, dtype=torch.uint8, device=here)
        giving = self.give(slot.to(there), tag)
        taking = self.take(into, tag)
        taking.wait(3 * self.soon)
        giving.wait(3 * self.soon)
        expect(torch.equal(slot, into.cpu()), f"{nbytes} bytes came wrong")

    def close(self) -> None:
        """Close both transports."""
        self.reader.close()
        self.owner.close()


def slot_of(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Return bytes that a seed decides."""
    numbers = torch.arange(seed, seed + nbytes, dtype=torch.int64, device="cpu")
    return (numbers * 2654435761 >> 7).to(torch.uint8)


def empty(nbytes: int) -> torch.Tensor:
    """Return zeroed bytes on the host."""
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


@contextmanager
def wire(
    kind: type[Transport],
    timeout: float = SOON,
    on: tuple[str, str] = ("cpu", "cpu"),
    soon: float = SOON,
) -> Iterator[Wire]:
    """Connect two transports, and close them afterwards."""
    both = Wire(kind, timeout, on, soon)
    try:
        yield both
    finally:
        both.close()


def _expect_error(
    moving: Moving, errors: type[Exception] | tuple[type[Exception], ...], soon: float
) -> None:
    """Expect that a slot ends with an error within ``soon`` seconds."""
    began = time.monotonic()
    try:
        ended = moving.wait(2 * soon)
    except errors:
        pass
    except Exception as error:  # a transport of another package may raise any other error
        expect(False, f"a slot ended with {type(error).__name__}: {error}")
    else:
        expect(False, "a slot landed that cannot" if ended else "a slot did not end")
    expect(time.monotonic() - began < soon, f"the failure was noticed after {soon:g} s")


def check_slots_of_any_size_cross(both: Wire, folder: Path) -> None:
    """Slots of 0 bytes to 1 MiB cross in right bytes."""
    for tag, nbytes in enumerate((0, 1, 7, 1000, 1 << 20)):
        both.cross(nbytes, tag)


def check_slots_cross_in_order(both: Wire, folder: Path) -> None:
    """Slots cross in the order in which both sides passed them, also if the reader is first."""
    slots = [slot_of(10_000, seed) for seed in range(8)]
    into = [empty(10_000) for _ in slots]
    taken = [both.take(each, tag % 2) for tag, each in enumerate(into[:4])]
    sent = [both.give(slot, tag % 2) for tag, slot in enumerate(slots)]
    taken += [both.take(each, tag % 2) for tag, each in enumerate(into[4:], 4)]
    for moving in (*taken, *sent):
        expect(moving.wait(both.soon), "a slot did not end")
    for number, (slot, landed) in enumerate(zip(slots, into, strict=True)):
        expect(torch.equal(slot, landed), f"slot {number} came wrong, or in another's place")


def check_a_slot_has_landed_when_it_ends(both: Wire, folder: Path) -> None:
    """The reader's slot holds all bytes when its `wait` returns, and is free then."""
    for seed in range(6):
        slot = slot_of(3 << 20, seed)
        into = empty(3 << 20)
        giving = both.give(slot, seed)
        taking = both.take(into, seed)
        expect(taking.wait(both.soon), "the reader's slot did not end")
        expect(torch.equal(slot, into), "the slot ended before its bytes were there")
        expect(giving.wait(both.soon), "the owner's slot did not end")
        for moving in (giving, taking):
            expect(moving.wait_for(MovingStage.FREE, both.soon), "a slot that ended is not free")
        slot.fill_(0)


def check_another_length_is_an_error(both: Wire, folder: Path) -> None:
    """A slot of another length than the reader expects fails on both sides; a later one crosses."""
    for sent, wanted in ((5000, 100), (100, 5000)):
        giving = both.give(slot_of(sent))
        into = empty(wanted)
        taking = both.take(into)
        _expect_error(taking, TransferError, both.soon)
        expect(not bool(into.any()), "bytes of another length were written")
        with suppress(TransferError):  # the owner may have sent all before the reader noticed
            giving.wait(2 * both.soon)
        both.owner.forget(both.life)
        both.reader.forget(End.address)
        both.cross(1000)


def check_a_death_ends_slots_in_flight(both: Wire, folder: Path) -> None:
    """Each slot in flight ends with `PeerError` and is free after the channel reports that the peer
    is gone; after a new connection slots cross again."""
    both.cross(100)
    both.owner.timeout = 300.0
    both.reader.timeout = 300.0
    into = [empty(1 << 16), empty(1 << 16)]
    moving = [both.take(each, tag) for tag, each in enumerate(into)]
    time.sleep(0.1)
    both.life.end()
    for each in moving:
        _expect_error(each, PeerError, both.soon)
        expect(each.wait_for(MovingStage.FREE, both.soon), "a slot that ended is not free")
    both.owner.forget(both.life)
    both.reader.forget(End.address)
    both.connect()
    both.cross(100)


def check_the_timeout_is_the_last_resort(both: Wire, folder: Path) -> None:
    """A slot for which the peer brings nothing fails after the transport's ``timeout``."""
    both.cross(100)
    both.reader.timeout = 0.3
    taking = both.take(empty(100))
    _expect_error(taking, (TransferTimeout, TransferError), both.soon)


def check_nothing_is_left_after_forget(both: Wire, folder: Path) -> None:
    """`forget` ends the slots under way with a peer immediately, and does not block."""
    both.cross(100)
    taking = both.take(empty(1 << 16))
    began = time.monotonic()
    both.reader.forget(End.address)
    expect(time.monotonic() - began < 2, "`forget` blocked for 2 s")
    _expect_error(taking, PeerError, both.soon)
    expect(End.address not in both.reader.lanes, "a lane of the peer is left")


def check_the_callers_settings_do_not_matter(both: Wire, folder: Path) -> None:
    """Slots cross under `inference_mode` and with another default device."""
    with torch.inference_mode(), torch.device("meta"):
        both.cross(1000)


def check_the_transport_says_why(both: Wire, folder: Path) -> None:
    """`probe` returns a decision with a reason, starts nothing, and rejects an unknown device."""
    kind = type(both.owner)
    for device, accepted in (("cpu", True), ("meta", False)):
        decision = kind.probe(torch.device(device))
        expect(decision.accepted is accepted, f"its decision for {device}: {decision}")
        expect(bool(decision.reason), f"its decision for {device} has no reason")
    expect(bool(kind.name), "it has no name")
