# SPDX-License-Identifier: Apache-2.0
"""The offers of an owner by name, and why its last offers have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from portakv.errors import InvalidTerms, SlotError
from portakv.migrate import messages
from portakv.migrate.name_table import Entry, NameTable
from portakv.runtime.bounded import Bounded

MOST_FOUND = 1 << 19  # bytes of the tickets in an answer
MOST_NAMED = MOST_FOUND - (64 << 10)  # bytes of the ids in one of them
_REMEMBERED = 4096  # ended offers for which an owner still reports the reason


class EndedOffers(Bounded[bytes, str]):
    """Why the last offers have ended, as clauses for readers."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        super().__init__(name, _REMEMBERED)


class Offered(Protocol):
    """An offer, as this module sees it."""

    name: bytes
    ticket: bytes
    entry: Entry

    def holds(self) -> bool:
        """Return True if the offer holds, for a caller that may have the owner's lock."""


Held = TypeVar("Held", bound=Offered)


class Names(Generic[Held]):
    """The offers of an owner by name. The owner's lock guards all calls.

    Attributes:
        table: the offers' tickets, for readers of this host.
    """

    def __init__(self, key: bytes) -> None:
        self.table = NameTable(key)
        self._offers = dict[bytes, Held]()
        self._ended = EndedOffers("ended names")

    def check_new(self, name: object, nbytes: int) -> None:
        """Raise for a name that readers could not find, with so many bytes of ids.

        Raises `InvalidTerms` for a wrong name and for a name of an offer that holds, which the
        error does not show, and `SlotError` for too many bytes.
        """
        self._check_free(messages.offer_name(name))
        if nbytes > MOST_NAMED:
            raise SlotError(
                f"Expected at most {MOST_NAMED} bytes of ids for an offer with a name, got "
                f"{nbytes}. Offer blocks in place of slots, or without a name."
            )

    def _check_free(self, name: bytes) -> None:
        """Raise `InvalidTerms` for a name of an offer that holds."""
        offer = self._offers.get(name)
        if offer is not None and offer.holds():
            raise InvalidTerms(
                "Expected name to be new, got the name of an offer that holds. Take random bytes."
            )

    def add(self, offer: Held) -> None:
        """Let readers find an offer by its name, if it has one.

        Raises `InvalidTerms` if another thread has used the name since `check_new`.
        """
        if offer.name:
            self._check_free(offer.name)
            self._ended.pop(offer.name, None)
            self._offers[offer.name] = offer
            self.table.add(offer)

    def end(self, offer: Held, why: str) -> None:
        """Record why an offer has ended."""
        if offer.name and self._offers.get(offer.name) is offer:
            self.table.remove(offer.entry)
            del self._offers[offer.name]
            self._ended[offer.name] = why

    def find(self, names: Sequence[bytes]) -> messages.Found:
        """Return the tickets of names, as many as an answer holds."""
        tickets = list[bytes]()
        why = list[str]()
        left = MOST_FOUND
        for name in names:
            offer = self._offers.get(name)
            holds = offer is not None and offer.holds()  # this may end it
            ticket = offer.ticket if offer is not None and holds else b""
            if len(ticket) > left:
                ticket = b""
            left -= len(ticket)
            tickets.append(ticket)
            why.append("" if holds else self._ended.get(name, ""))
        return messages.Found(tuple(tickets), tuple(why))

    def held(self, names: Sequence[bytes]) -> list[Held]:
        """Return the offers of names that hold."""
        offers = [self._offers.get(name) for name in names]
        return [offer for offer in offers if offer is not None and offer.holds()]

    def withdraw(self, name: bytes) -> Held | None:
        """Return the offer of a name that holds. Without one, record that none will come, for
        readers that wait for it."""
        offer = self._offers.get(name)
        if offer is None and name not in self._ended:
            self._ended[name] = messages.REASONS["revoked"]
        return offer
