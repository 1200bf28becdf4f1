# SPDX-License-Identifier: Apache-2.0
"""The plan of a pull: the steps that copy rows of owners to rows of the reader.

`planned` computes them from tickets and windows before a byte moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from portakv.arguments import invalid, naming
from portakv.copy.handle import token_bytes
from portakv.errors import InvalidTerms, SlotError, Unsupported
from portakv.layout.encodings import PACKED_DTYPE
from portakv.migrate.connections import Connection, Sources
from portakv.migrate.messages import Box, BoxPart, Ticket
from portakv.migrate.shards import (
    Piece,
    Shard,
    pieces,
    slices,
)
from portakv.migrate.staging import page_of, rows_bytes
from portakv.view import Index, KVView
from portakv.view.index import CONSECUTIVE, Ids

_ANY = 1 << 62  # slots of an owner whose memory is not mapped: the owner checks the ids
Lists = tuple[Index, list[Index]]  # of a group: the reader's index, and the index of each owner


class Slice(NamedTuple):
    """A part of a step, which crosses in one staging buffer."""

    layers: range
    first: int  # token, from the step's first one
    tokens: int


class Cut(NamedTuple):
    """A piece, and the slices of both views.

    ``src`` is None if the owner's memory is not mapped. ``layers``: the layers of the reader's view
    that the piece fills. ``token_bytes``: the bytes of a token in ``dst``. ``packed``: a side has
    packed blocks.
    """

    group: int
    piece: Piece
    src: KVView | None
    dst: KVView
    layers: range
    token_bytes: float
    packed: bool = False


class Step(NamedTuple):
    """The rows of an owner that a piece copies to rows of the reader."""

    ticket: Ticket
    owner: Connection
    cut: Cut
    src_index: Index
    dst_index: Index
    first: int  # token of the request at which both indices start
    tokens: int

    @property
    def src(self) -> KVView:
        """Return the owner's view, of a step whose rows are mapped."""
        assert self.cut.src is not None  # else the owner sends the rows
        return self.cut.src

    @property
    def page(self) -> int:
        """Return the tokens that move together: those of a packed block or an opaque page, else
        one."""
        form = self.cut.dst.form
        if self.cut.packed and not form.encoding:
            return self.owner.handshake.described[self.cut.group].block_size
        return page_of(self.cut.dst)

    @property
    def nbytes(self) -> float:
        """Return the bytes of the step if no position is skipped."""
        return self.tokens * self.cut.token_bytes

    @property
    def window(self) -> tuple[int, Box]:
        """Return the group of the rows, and their layers and heads on the axes of the model."""
        return self.cut.group, self.cut.piece.box

    def part(self, layers: range, first: int, tokens: int) -> Step:
        """Return the step for some layers and tokens, counted from the step's first ones."""
        cut = self.cut
        window = slice(layers.start, layers.stop)
        (start, _), heads = cut.piece.box
        piece = cut.piece._replace(box=((start + layers.start, start + layers.stop), heads))
        dst = cut.dst.slice(layers=window)
        part = cut._replace(
            piece=piece,
            src=None if cut.src is None else cut.src.slice(layers=window),
            dst=dst,
            layers=cut.layers[window],
            token_bytes=token_bytes(dst.form),
        )
        indices = self.src_index.shifted(first), self.dst_index.shifted(first)
        return Step(self.ticket, self.owner, part, *indices, self.first + first, tokens)

    def owner_part(self, layers: range, first: int, count: int) -> BoxPart:
        """Return layers and tokens, counted from the step's first, as the owner counts them."""
        (start, _), heads = self.cut.piece.box
        box = start + layers.start, start + layers.stop
        return BoxPart(self.cut.group, box, heads, self.first + first, count)

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs ``(from, to)`` of positions for which the owner has all wanted rows."""
        offered = self.src_index.slots(self.tokens) >= 0
        wanted = self.dst_index.slots(self.tokens) >= 0
        complete = np.concatenate([[False], ~offered | wanted, [False]])
        ends = np.flatnonzero(complete[1:] != complete[:-1]).reshape(-1, 2)
        return [(int(a), int(b)) for a, b in ends]

    def slices(self, most_bytes: int, unit: int = 1) -> Iterator[Slice]:
        """Yield the parts that each cross in one staging buffer.

        A part is as many layers as the buffer holds with all tokens, or tokens of one layer, in
        multiples of ``unit``. ``most_bytes``: the most bytes of a part, raw. Raises `Unsupported`
        if the buffer holds no token.
        """
        dst = self.cut.dst
        space = self.owner.handshake.slot_bytes
        most = self.tokens
        page = max(self.page, unit)

        def layer_bytes(tokens: int) -> int:
            return rows_bytes(dst, 1, tokens, dst.heads)

        space = min(space, max(most_bytes, layer_bytes(page)))
        while most > page and layer_bytes(most) > space:
            most = max(page, most // 2 // page * page)
        if layer_bytes(most) > space:
            why = f"a staging buffer of {space} bytes holds no token of a layer; increase staging="
            raise Unsupported(f"Pulling rows of {self.owner.address} through staging", why)
        each = max(1, min(dst.layers, space // layer_bytes(most)))
        for start in range(0, dst.layers, each):
            for at in range(0, self.tokens, most):
                layers = range(start, min(start + each, dst.layers))
                yield Slice(layers, at, min(most, self.tokens - at))


def names_of(count: int) -> list[str]:
    """Return the names of ``count`` lists of blocks in errors."""
    return ["blocks"] if count == 1 else [f"blocks[{number}]" for number in range(count)]


def index_of(name: str, view: KVView, ids: Ids | None) -> Index:
    """Return the index of a list of blocks; raise `SlotError`, which names the list."""
    try:
        return CONSECUTIVE if ids is None else Index.of(ids, view.form.block_size or 1)
    except SlotError:
        # Only now: a list without an error does not pay for it.
        with naming(name, "whole numbers in a list, an array or a tensor"):
            raise


def check_length(name: str, index: Index, first: int, count: int, slots: int) -> None:
    """Raise `SlotError` if a list of blocks does not hold ``count`` tokens from ``first`` on, or
    without ids the view of ``slots`` tokens."""
    past = index.offset + first + count
    if index.ids is None and past > slots:
        raise SlotError(
            f"Expected {name} to be None for a view of {past} tokens or more, got a view of "
            f"{slots}. Use a larger view, or fewer tokens."
        )
    needed = -(-past // index.step)
    if index.ids is not None and index.ids.numel() < needed:
        raise SlotError(
            f"Expected {name} to hold {count} tokens from token {first} on, {needed} ids of "
            f"{index.step} tokens, got {index.ids.numel()}. Pass a longer list, or fewer tokens."
        )


def indices_of(shards: Sequence[Shard], blocks: Sequence[Ids | None]) -> list[Index]:
    """Return the reader's index of each shard; raise as `Reader.pull` does."""
    if len(blocks) != len(shards):
        raise InvalidTerms(
            f"Expected blocks to be {len(shards)} lists, one for each shard, got {len(blocks)}. "
            f"Pass a list for each."
        )
    indices = list[Index]()
    for name, shard, ids in zip(names_of(len(shards)), shards, blocks, strict=True):
        view = shard.view
        if ids is None and view.form.block_size:
            expected = f"ids of the view's blocks of {view.block_size} tokens"
            raise invalid(name, expected, None, "Name the blocks that the rows fill.")
        indices.append(index_of(name, view, ids).apart())
    return indices


def check_packed(step: Step, verify: bool, auto: bool = False) -> None:
    """Raise `Unsupported` if a step with a packed side is not one of whole blocks, or cannot be
    verified, or if its owner was to choose an encoding (``auto``)."""
    local = step.cut.dst.form
    described = step.owner.handshake.described[step.cut.group]
    remote = described.group
    what = f"Pulling packed blocks of {step.owner.address}"
    size = step.page
    raw_size = 0
    if auto:
        why = "a side is packed already, so that nothing is left to choose. Leave encoding out"
        raise Unsupported("A pull with encoding='auto'", why)
    if not (local.encoding and remote.encoding):
        if verify:
            why = "checksums of packed and of raw blocks differ; leave verify out"
            raise Unsupported(what, why)
        raw_size = described.block_size if local.encoding else local.block_size
        numbers = remote.numbers if local.encoding else local.dtypes
        if {*numbers} != {PACKED_DTYPE}:
            raise Unsupported(what, f"the raw side has rows of another type than {PACKED_DTYPE}")
    if raw_size not in (0, size):
        why = f"they have {size} tokens, the raw side's blocks have {raw_size}; make them equal"
        raise Unsupported(what, why)
    indices = step.src_index, step.dst_index
    tokens = [step.tokens, *(index.offset for index in indices)]
    steps = {index.plan_step for index in indices} - {0}
    if any(number % size for number in tokens) or steps - {size}:
        why = f"a packed block moves only whole; pull whole blocks of {size} tokens, by their ids"
        raise Unsupported(what, why)


def planned(
    sources: Sources, shards: Sequence[Shard], blocks: Sequence[Index], first: int
) -> tuple[list[Step], bool]:
    """Return the steps of a pull from token ``first`` on, and True if an id of the owners or of the
    reader skips its positions; raise as `Reader.pull` does."""
    count = _common_tokens([source.ticket for source in sources], shards, first)
    lists, skips = _indices(sources, shards, blocks, first, count)

    # Without skipped positions the cuts depend on the owners alone, and are cached.
    cached = sources[0].owner.cuts
    key = tuple([source.ticket.epoch for source in sources])
    cuts = None if skips else cached.get(key)
    if cuts is None:
        cuts = [*_cuts([source.owner for source in sources], shards, lists, count)]
        if not skips:
            cached[key] = cuts

    steps = list[Step]()
    for cut in cuts:
        dst_index, src_indices = lists[cut.group]
        if cut.piece.ids is not None:
            dst_index = Index.of(np.where(cut.piece.ids, dst_index.slots(count), -1))
        source = sources[cut.piece.owner]
        src_index = src_indices[cut.piece.owner]
        step = Step(source.ticket, source.owner, cut, src_index, dst_index, first, count)
        begin = int((dst_index.slots(count) >= 0).argmax()) if skips else 0
        if begin:  # as of layers with a window
            step = step.part(range(cut.dst.layers), begin, count - begin)
        steps.append(step)
    return steps, skips


def check_arguments(
    packed: Sequence[bytes], shards: Sequence[Shard], blocks: Sequence[Index], first: int
) -> None:
    """Check the arguments of a pull whose owners are not connected; raise as `Reader.pull` does.

    Only the owners' rows say how tickets of other groups differ, so these are left to the pull.
    """
    tickets = [Ticket.read(data) for data in packed]
    if all(len(ticket.ids) == len(shards) for ticket in tickets):
        count = _common_tokens(tickets, shards, first)
        _indices((), shards, blocks, first, count)


def _common_tokens(tickets: Sequence[Ticket], shards: Sequence[Shard], first: int) -> int:
    """Return the number of tokens to pull; raise `InvalidTerms` if the tickets do not match."""
    tokens = {ticket.tokens for ticket in tickets}
    groups = {len(ticket.ids) for ticket in tickets}
    if len(tokens) != 1:
        raise InvalidTerms(
            f"Expected tickets for the same tokens, got tickets for {sorted(tokens)}. Pull the "
            f"offers of one request together."
        )
    if groups != {len(shards)}:
        raise InvalidTerms(
            f"Expected tickets of as many groups as this reader's {len(shards)} shards, got "
            f"{sorted(groups)}. Pull by a reader with the same groups."
        )
    if not 0 <= first < min(tokens):
        raise InvalidTerms(
            f"Expected first to be a token of the {min(tokens)} that the tickets offer, got "
            f"{first}. Pass fewer."
        )
    return min(tokens) - first


def _indices(
    sources: Sources, shards: Sequence[Shard], blocks: Sequence[Index], first: int, count: int
) -> tuple[list[Lists], bool]:
    """Return the checked indices of all groups, and True if any index skips a position."""
    lists = list[Lists]()
    skips = False
    names = names_of(len(shards))
    for group, (shard, whole) in enumerate(zip(shards, blocks, strict=True)):
        slots = shard.view.slots
        check_length(names[group], whole, first, count, slots)
        _check_number_of_blocks(names[group], whole, first + count)
        dst_index = whole.shifted(first) if first else whole
        skips |= dst_index.check_named(names[group], count, slots, distinct=True)

        src_indices = []
        known = dict[tuple[bytes, int], Index]()
        for ticket, owner, _ in sources:
            index = _offered(ticket, group, first, known)
            slots = owner.shards[group].view.slots if owner.shards else _ANY
            index.check_length(count, slots, "offered")
            skips |= index.check(count, slots, "offered")
            src_indices.append(index)
        lists.append((dst_index, src_indices))
    return lists, skips


def _offered(
    ticket: Ticket, group: int, first: int, known: dict[tuple[bytes, int], Index]
) -> Index:
    """Return the index of an owner's rows in a group, from a token on.

    Ranks of one engine name the same blocks: they have one index, which is ``known``.
    """
    ids = ticket.ids[group]
    step = ticket.steps[group]
    index = known.get((ids, step))
    if index is None:
        told = np.frombuffer(ids, "<i4").astype(np.int64)
        front = max(0, -(-ticket.tokens // step) - len(told))  # these have their rows elsewhere
        index = Index.of(np.pad(told, (front, 0), constant_values=-1), step)
        if first:
            index = index.shifted(first)
        known[ids, step] = index
    return index


def _check_number_of_blocks(name: str, index: Index, tokens: int) -> None:
    """Raise `SlotError` if the reader passes blocks after those that the tokens fill."""
    needed = -(-(index.offset + tokens) // index.step)
    if index.ids is None or index.ids.numel() <= needed:
        return
    raise SlotError(
        f"Expected {name} to be {needed} ids, of {index.step} tokens each, for the {tokens} tokens "
        f"of the tickets, got {index.ids.numel()}. Leave out the ids that no token fills."
    )


def count_blocks(blocks: Sequence[Index], first: int, past: int, skips: bool) -> int:
    """Return the number of the reader's blocks, in all shards, for tokens ``first`` to ``past``.

    ``skips``: some blocks may be skipped.
    """
    total = 0
    for index in blocks:
        start = (index.offset + first) // index.step
        end = -(-(index.offset + past) // index.step)
        if index.ids is None or not skips:
            total += end - start
        else:
            total += int(np.count_nonzero(index.host_ids()[start:end] >= 0))
    return total


def _cuts(
    owners: Sequence[Connection], shards: Sequence[Shard], lists: Sequence[Lists], count: int
) -> Iterator[Cut]:
    """Yield the cuts of all groups. No owner needs a position that the reader skips."""
    for group, (shard, (dst_index, src_indices)) in enumerate(zip(shards, lists, strict=True)):
        unwanted = dst_index.slots(count) < 0
        masks = [(index.slots(count) >= 0) | unwanted for index in src_indices]
        offered = [None if mask.all() else mask for mask in masks]
        boxes = [owner.handshake.described[group].group.box for owner in owners]
        mapped = [n for n, owner in enumerate(owners) if owner.shards]
        own = shard.group.box
        form = shard.view.form
        whole = form.opaque and not form.encoding
        for piece in pieces(own, boxes, offered, mapped, whole):
            owner = owners[piece.owner]
            part = slices(piece.box, own)
            at = slices(piece.box, boxes[piece.owner])
            src = owner.shards[group].view.slice(**at) if owner.shards else None
            layers = range(part["layers"].start, part["layers"].stop)
            dst = shard.view.slice(**part)
            packed = bool(form.encoding or owner.handshake.described[group].group.encoding)
            yield Cut(group, piece, src, dst, layers, token_bytes(dst.form), packed)
