# SPDX-License-Identifier: Apache-2.0
"""The steps of a pull: which rows of which owner go into which of the reader's, worked out from
tickets and windows before a byte moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from portakv.errors import InvalidTerms, SlotError, Unsupported
from portakv.migrate.chunks import chunk_bytes, page_of
from portakv.migrate.messages import Gather, Ticket
from portakv.migrate.pairing import Paired
from portakv.migrate.shards import Piece, Shard, Window, pieces
from portakv.view import Index, KVView
from portakv.view.index import IdList

Told = Sequence[tuple[Ticket, Paired]]  # tickets, and their owners


class Step(NamedTuple):
    """A piece: rows of an owner (without a view they are moved) into those of the reader."""

    ticket: Ticket
    owner: Paired
    group: int
    piece: Piece
    src: KVView | None
    dst: KVView
    theirs: Index
    mine: Index
    first: int  # token of the request at which both indices begin
    tokens: int

    @property
    def layers(self) -> range:
        """The layers of the reader's view that it fills."""
        layers = self.piece.mine["layers"]
        return range(layers.start, layers.stop)

    @property
    def nbytes(self) -> int:
        """Bytes that it brings, if it brings all positions."""
        return chunk_bytes(self.dst, self.tokens)

    def gather(self, layers: range, first: int, count: int, **terms: Any) -> Gather:
        """Some layers and tokens of it, counted from its own first ones, as its owner is asked."""
        window, theirs = self.owner.window(self.group), self.piece.theirs
        start, heads = window.layers[0] + theirs["layers"].start, theirs["heads"]
        box = (
            (start + layers.start, start + layers.stop),
            (window.heads[0] + heads.start, window.heads[0] + heads.stop),
        )
        about = self.ticket.epoch, self.ticket.offer, self.group
        return Gather(*about, *box, self.first + first, count, **terms)

    def whole(self) -> tuple[Gather, Window]:
        """All of it as its owner is asked for a digest; and where it lies in the model."""
        asked = self.gather(range(self.dst.layers), 0, self.tokens)
        own = self.owner.window(self.group)
        return asked, Window((*asked.layers, own.layers[2]), (*asked.heads, own.heads[2]))

    def slices(self) -> Iterator[tuple[range, int, int]]:
        """What crosses at once in a slot: as many layers as it holds, of all tokens; or tokens of
        one layer. Raises `Unsupported` if it holds none."""
        room, page, most = self.owner.welcome.slot_bytes, page_of(self.dst), self.tokens
        layer = self.dst.slice(layers=slice(0, 1))
        while most > page and chunk_bytes(layer, most) > room:
            most = max(page, most // 2 // page * page)
        if chunk_bytes(layer, most) > room:
            why = f"a slot of {room} bytes holds no token of a layer; give its owner more staging"
            raise Unsupported(f"Pulling rows of {self.owner.address} through staging", why)
        each = max(1, min(self.dst.layers, room // chunk_bytes(layer, most)))
        for start in range(0, self.dst.layers, each):
            for at in range(0, self.tokens, most):
                layers = range(start, min(start + each, self.dst.layers))
                yield layers, at, min(most, self.tokens - at)


def steps(told: Told, shards: Sequence[Shard], blocks: Sequence[IdList], first: int) -> list[Step]:
    """The steps of a pull from token ``first`` on; raises as `Reader.pull` does."""
    tokens = {ticket.tokens for ticket, _ in told}
    groups = {len(shards), len(blocks), *(len(ticket.ids) for ticket, _ in told)}
    count = min(tokens, default=0) - first
    if len(tokens) != 1 or len(groups) != 1 or first < 0 or count < 1:
        raise InvalidTerms(
            f"A pull of tickets for {sorted(tokens)} tokens was asked from token {first} on, with "
            f"{len(blocks)} lists of blocks for {len(shards)} shards: expected tickets for the "
            f"same tokens and groups, a list for each shard, and a token or more."
        )
    found = list[Step]()
    for group, (shard, ids) in enumerate(zip(shards, blocks, strict=True)):
        mine = _index(ids, shard.view.block_size, first, count, "the reader's")
        mine.check(count, shard.view.slots, "reader's", distinct=True)
        theirs = list[Index]()
        for ticket, owner in told:
            numbers = np.frombuffer(ticket.ids[group], "<i4").astype(np.int64)
            index = _index(numbers, ticket.steps[group], first, count, f"{ticket.address}'s")
            index.check(
                count, owner.shards[group].view.slots if owner.shards else 1 << 62, "offered"
            )
            theirs.append(index)
        masks = [index.slots(count) >= 0 for index in theirs]
        here = [None if mask.all() else mask for mask in masks]
        windows = [owner.window(group) for _, owner in told]
        for piece in pieces(shard.window, windows, here, whole=shard.view.opaque):
            ticket, owner = told[piece.owner]
            src = owner.shards[group].view.slice(**piece.theirs) if owner.shards else None
            into = mine
            if piece.ids is not None:
                into = Index(np.where(piece.ids, mine.slots(count), -1))
            dst, index = shard.view.slice(**piece.mine), theirs[piece.owner]
            found.append(Step(ticket, owner, group, piece, src, dst, index, into, first, count))
    return found


def _index(ids: IdList, step: int | None, first: int, count: int, whose: str) -> Index:
    index = Index(ids, step=step or 1).shifted(first)
    if (index.length or 0) < count:
        raise SlotError(
            f"{count} tokens were to be pulled from token {first} on, and {whose} blocks have "
            f"{index.length}: expected blocks for all of them."
        )
    return index
