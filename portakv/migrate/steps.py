# SPDX-License-Identifier: Apache-2.0
"""The steps of a pull: which rows of which owner go into which of the reader's, worked out from
tickets and windows before a byte moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from portakv.arguments import naming
from portakv.copy.handle import token_bytes
from portakv.errors import InvalidTerms, Unsupported
from portakv.migrate.chunks import chunk_bytes, page_of
from portakv.migrate.messages import Gather, Ticket
from portakv.migrate.pairing import Paired
from portakv.migrate.shards import Piece, Shard, pieces, slices
from portakv.view import Index, KVView
from portakv.view.index import Ids

_ANY = 1 << 62  # slots of an owner that looks itself
Slice = tuple[range, int, int]  # of a step: layers, first token, tokens; as its own
Told = Sequence[tuple[Ticket, Paired]]  # tickets, and their owners
Lists = tuple[Index, list[Index]]  # of a group: the reader's, and that of each owner


class Cut(NamedTuple):
    """A piece, and the slices of both views; an owner whose rows are moved has no view here.
    ``layers``: those of the reader's view that it fills."""

    group: int
    piece: Piece
    src: KVView | None
    dst: KVView
    layers: range


class Step(NamedTuple):
    """What a piece is to bring: rows of an owner for those of the reader."""

    ticket: Ticket
    owner: Paired
    cut: Cut
    theirs: Index
    mine: Index
    first: int  # token of the request at which both indices begin
    tokens: int

    @property
    def nbytes(self) -> float:
        """Bytes that it brings, if it brings all positions."""
        return self.tokens * token_bytes(self.cut.dst.form)

    def gather(self, layers: range, first: int, count: int, **terms: Any) -> Gather:
        """Some layers and tokens of it, counted from its own first ones, as its owner is asked."""
        (start, _), heads = self.cut.piece.box
        asked = start + layers.start, start + layers.stop
        about = self.ticket.epoch, self.ticket.offer, self.cut.group
        return Gather(*about, asked, heads, self.first + first, count, **terms)

    def runs(self) -> list[tuple[int, int]]:
        """From and to of the runs of positions in which it brings all that its owner has."""
        theirs = self.theirs.slots(self.tokens) >= 0
        mine = self.mine.slots(self.tokens) >= 0
        wanted = np.concatenate([[False], ~theirs | mine, [False]])
        ends = np.flatnonzero(wanted[1:] != wanted[:-1]).reshape(-1, 2)
        return [(int(a), int(b)) for a, b in ends]

    def slices(self, at_once: int) -> Iterator[Slice]:
        """What crosses at once in a slot: as many layers as it holds, of all tokens; or tokens of
        one layer. ``at_once``: the most bytes. Raises `Unsupported` if it holds none."""
        dst = self.cut.dst
        room = self.owner.welcome.slot_bytes
        most = self.tokens
        layer = dst.slice(layers=slice(0, 1))
        page = page_of(dst)
        room = min(room, max(at_once, chunk_bytes(layer, page)))
        while most > page and chunk_bytes(layer, most) > room:
            most = max(page, most // 2 // page * page)
        if chunk_bytes(layer, most) > room:
            why = f"a slot of {room} bytes holds no token of a layer; give its owner more staging"
            raise Unsupported(f"Pulling rows of {self.owner.address} through staging", why)
        each = max(1, min(dst.layers, room // chunk_bytes(layer, most)))
        for start in range(0, dst.layers, each):
            for at in range(0, self.tokens, most):
                layers = range(start, min(start + each, dst.layers))
                yield layers, at, min(most, self.tokens - at)


def steps(told: Told, shards: Sequence[Shard], blocks: Sequence[Ids], first: int) -> list[Step]:
    """The steps of a pull from token ``first`` on; raises as `Reader.pull` does."""
    tokens = {ticket.tokens for ticket, _ in told}
    groups = {len(ticket.ids) for ticket, _ in told}
    count = min(tokens, default=0) - first
    if len(tokens) != 1:
        raise InvalidTerms(
            f"Expected tickets for the same tokens, got tickets for {sorted(tokens)}. Pull what is "
            f"offered of one request."
        )
    if groups != {len(shards)}:
        raise InvalidTerms(
            f"Expected tickets of as many groups as this reader's {len(shards)} shards, got "
            f"{sorted(groups)}. Pull by a reader with the same groups."
        )
    if len(blocks) != len(shards):
        raise InvalidTerms(
            f"Expected blocks to be {len(shards)} lists, one for each shard, got {len(blocks)}. "
            f"Pass a list for each."
        )
    if not 0 <= first < min(tokens):
        raise InvalidTerms(
            f"Expected first to be a token of the {min(tokens)} that the tickets offer, got "
            f"{first}. Pass fewer."
        )
    lists = list[Lists]()
    skips = False
    for group, (shard, ids) in enumerate(zip(shards, blocks, strict=True)):
        theirs = []
        with naming("blocks", "lists of ids of the views' blocks"):
            mine = Index.of(ids, shard.view.block_size or 1).shifted(first)
            mine.check_length(count, shard.view.slots, "reader's")
            skips |= mine.check(count, shard.view.slots, "reader's", distinct=True)
        for ticket, owner in told:
            numbers = np.frombuffer(ticket.ids[group], "<i4").astype(np.int64)
            index = Index.of(numbers, ticket.steps[group]).shifted(first)
            slots = owner.shards[group].view.slots if owner.shards else _ANY
            index.check_length(count, slots, "offered")
            skips |= index.check(count, slots, "offered")
            theirs.append(index)
        lists.append((mine, theirs))
    kept = told[0][1].cuts
    key = tuple(ticket.epoch for ticket, _ in told)
    cuts = None if skips else kept.get(key)
    if cuts is None:
        cuts = [*_cuts([owner for _, owner in told], shards, lists, count)]
        if not skips:
            kept[key] = cuts
    found = list[Step]()
    for cut in cuts:
        mine, theirs = lists[cut.group]
        if (mask := cut.piece.ids) is not None:
            mine = Index(np.where(mask, mine.slots(count), -1))
        (ticket, owner) = told[cut.piece.owner]
        index = theirs[cut.piece.owner]
        found.append(Step(ticket, owner, cut, index, mine, first, count))
    return found


def count_blocks(shards: Sequence[Shard], blocks: Sequence[Ids], first: int, past: int) -> int:
    """Return how many blocks of the reader tokens ``first`` to ``past`` go to, in all shards."""
    total = 0
    for shard, ids in zip(shards, blocks, strict=True):
        index = Index.of(ids, shard.view.block_size or 1)
        start = (index.offset + first) // index.step
        end = -(-(index.offset + past) // index.step)
        if index.ids is None:
            total += end - start
        else:
            total += int((index.host_ids()[start:end] >= 0).sum())
    return total


def _cuts(
    owners: Sequence[Paired], shards: Sequence[Shard], lists: Sequence[Lists], count: int
) -> Iterator[Cut]:
    """The pieces of all groups. A position that the reader does not want, nobody has to hold."""
    for group, (shard, (mine, theirs)) in enumerate(zip(shards, lists, strict=True)):
        unwanted = mine.slots(count) < 0
        masks = [(index.slots(count) >= 0) | unwanted for index in theirs]
        here = [None if mask.all() else mask for mask in masks]
        boxes = [owner.welcome.described[group].group.box for owner in owners]
        mapped = [n for n, owner in enumerate(owners) if owner.shards]
        own = shard.group.box
        for piece in pieces(own, boxes, here, mapped, shard.view.opaque):
            owner = owners[piece.owner]
            part = slices(piece.box, own)
            at = slices(piece.box, boxes[piece.owner])
            src = owner.shards[group].view.slice(**at) if owner.shards else None
            layers = range(part["layers"].start, part["layers"].stop)
            yield Cut(group, piece, src, shard.view.slice(**part), layers)
