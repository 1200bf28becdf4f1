# SPDX-License-Identifier: Apache-2.0
"""An owner whose rows are written while a reader pulls them: unwritten rows hold poison."""

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import replace

from portakv.migrate.messages import BoxPart, Ticket
from portakv.migrate.owner import Offer, Owner
from support.migrate_pulls import MODEL, Couple, Sides, key_of

POISON = -77  # no row has it, and no place of the reader before a pull
UNTOUCHED = -1  # what the reader has before a pull
LAYERS = 2
TOKENS = 75


class Writing(Couple):
    """An owner of poison, and a reader. ``write`` writes right rows in place of poison."""

    def __init__(self, made: Sides, method: str = "mapped", **options: Any) -> None:
        super().__init__(made, method, **options)
        self.rows = self.src.whole.clone()
        self.src.whole.fill_(POISON)

    def write(self, unit: str, begin: int, end: int) -> None:
        """Write layers, or tokens in all layers."""
        if unit == "layers":
            self.src.whole[begin:end] = self.rows[begin:end]
            return
        for token in range(begin, end):
            block = self.blocks[token // self.src.size]
            at = token % self.src.size
            self.src.whole[:, :, block, at] = self.rows[:, :, block, at]

    def right_layer(self, layer: int) -> bool:
        """Return True if the reader has a layer of the rows that the owner writes."""
        there = self.rows[layer][:, self.blocks].flatten(1, 2)[:, : self.tokens]
        return torch.equal(there, self.dst.rows(self.into, self.tokens)[layer])

    def right(self) -> bool:
        """Return True if the reader has all rows."""
        return all(self.right_layer(layer) for layer in range(LAYERS))

    def poisoned(self) -> bool:
        """Return True if the reader has a row that was not written."""
        return bool(self.dst.whole.eq(POISON).any())

    def unguarded(self, offer: Offer) -> bytes:
        """Return a ticket that hides the mark, as a reader could make it that ignores marks."""
        return replace(Ticket.read(offer.ticket), progress="").pack(key_of(self.owner))


class Trusting(Owner):
    """An owner that sends rows past the mark."""

    def __init__(self, *shards: Any, **options: Any) -> None:
        super().__init__(*shards, **{"model": MODEL, **options})

    def _is_complete(self, offer: Offer, part: BoxPart) -> bool:
        return True


def end_of(unit: str) -> int:
    """Return the mark when all rows are complete."""
    return LAYERS if unit == "layers" else TOKENS


def steps_of(unit: str) -> list[int]:
    """Return marks, up to the end."""
    return [1, 2] if unit == "layers" else [5, 37, 48, 75]
