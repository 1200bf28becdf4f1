# SPDX-License-Identifier: Apache-2.0
"""A channel within one process for tests of transports, whose connection a test can end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
import torch

from portakv.errors import PeerError


class Life:
    """The connection of a reader to an owner."""

    id = b"the reader's own"

    def __init__(self) -> None:
        self.gone = False
        self.calls = dict[object, Callable[[], object]]()

    def on_gone(self, call: Callable[[], object]) -> Callable[[], object]:
        """As a channel's peer has it."""
        key = object()
        self.calls[key] = call
        return lambda: self.calls.pop(key, None)

    def end(self) -> None:
        """The other side died."""
        self.gone = True
        while self.calls:
            self.calls.popitem()[1]()


class End:
    """One end of it, with what transports use of a channel."""

    address = "tcp://127.0.0.1:7777"

    def __init__(self, life: Life) -> None:
        self.life = life
        self.other = self
        self.answers = dict[type, Any]()

    def serve(self, kind: type, answer: Any) -> None:
        """As a channel does."""
        self.answers[kind] = answer

    def ask(self, address: str, message: Any, kind: type) -> Any:
        """As a channel does, at once."""
        if self.life.gone:
            raise PeerError(f"{address} is gone.")
        asked = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
        answer = self.other.answers[type(message)](self.life, asked)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=kind)

    def tell(self, address: str, message: Any) -> None:
        """As a channel does, at once."""
        self.ask(address, message, type(None))

    def watch(self, address: str, gone: Callable[[], object]) -> Callable[[], object]:
        """As a channel does."""
        return self.life.on_gone(gone)


class Wire:
    """An owner's and a reader's transport with a connection between them."""

    def __init__(
        self, kind: Any, timeout: float = 20.0, on: tuple[str, str] = ("cpu", "cpu")
    ) -> None:
        self.devices = tuple(map(torch.device, on))
        self.owner, self.reader = (kind(device, timeout) for device in self.devices)
        self.connect()

    def connect(self) -> None:
        """Connect, also once more."""
        self.life = Life()
        self.there, self.here = End(self.life), End(self.life)
        self.there.other = self.here
        self.here.other = self.there
        for each in self.owner.asks:
            self.there.serve(each, partial(self._answer, self.there))

    def _answer(self, there: End, life: Life, asked: Any) -> Any:
        return self.owner.answer(life, there, asked)

    def give(self, slot: torch.Tensor, tag: int = 0) -> Any:
        """The owner gives."""
        return self.owner.lane(self.life, self.there).move(slot, tag)

    def take(self, into: torch.Tensor, tag: int = 0) -> Any:
        """The reader takes."""
        return self.reader.lane(End.address, self.here).move(into, tag)

    def cross(self, nbytes: int, tag: int = 0) -> None:
        """Bytes that cross, and are compared."""
        slot = slot_of(nbytes, tag)
        (there, here) = self.devices
        into = torch.zeros(nbytes, dtype=torch.uint8, device=here)
        giving = self.give(slot.to(there), tag)
        taking = self.take(into, tag)
        taking.wait(60)
        giving.wait(60)
        assert torch.equal(slot, into.cpu())


def slot_of(nbytes: int, seed: int = 0) -> torch.Tensor:
    """A slot of bytes that another seed does not have."""
    there = torch.arange(seed, seed + nbytes, dtype=torch.int64, device="cpu")
    return (there * 2654435761 >> 7).to(torch.uint8)


@contextmanager
def wire(kind: Any, timeout: float = 20.0, **given: Any) -> Iterator[Wire]:
    """Two transports; closed after it."""
    both = Wire(kind, timeout, **given)
    try:
        yield both
    finally:
        both.reader.close()
        both.owner.close()
