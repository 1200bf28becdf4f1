# SPDX-License-Identifier: Apache-2.0
"""Tickets that any process can make: for offers by their names."""

from __future__ import annotations

from portakv import arguments
from portakv.migrate.messages import Named, offer_name


class Ticket:
    """Makes tickets for offers that have a name. Other tickets are made by `Owner.offer`."""

    @staticmethod
    def of(address: str, epoch: bytes, name: bytes) -> bytes:
        """Return a ticket for the offer that an owner has made, or will make, under a name.

        Any process can make it, such as a scheduler, before the offer exists. A pull of it waits
        for the offer until its timeout. Whoever knows the name and the channel's secret may pull,
        so take random bytes: names that can be guessed, such as request ids, are not enough.

        Args:
            address: of the owner's channel (`Channel.address`).
            epoch: the owner's `Owner.epoch`, which changes when its memory does.
            name: 16 to 64 bytes, used for one offer. A name that is used again after the end of
                its offer brings the rows of the next one.

        Raises `InvalidTerms` for other values.
        """
        arguments.text("address", address)
        arguments.octets("epoch", epoch, 16, 16)
        return Named(epoch, address, offer_name(name)).pack()
