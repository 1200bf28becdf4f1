# SPDX-License-Identifier: Apache-2.0
"""A hand-over before an engine's first step, so that its first real one stalls no request.

The other side of a rehearsal is a second `Handover` of this process, over a few blocks of scratch
memory. So the rehearsal needs no other engine, and passes through the same channels, threads,
modules and kernels as a real hand-over. What only the real peer has is left: its handshake, and the
mapping of its memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from secrets import token_bytes
from typing import Literal, TypeAlias, TypeVar

from portakv.copy import copy_rows
from portakv.copy.options import Overlap
from portakv.errors import TransferTimeout, Unsupported
from portakv.migrate import Shard, Ticket
from portakv.migrate.described import can_resize, scratch_like
from portakv.migrate.messages import EndNamed
from portakv.migrate.reader import LONG
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.handover import Handover, HandoverTerms
from portakv.serving.plan import Handovers, OfferJob, PullJob
from portakv.view import Index, KVView

_log = RateLimitedLog(logging.getLogger(__name__))
Result = TypeVar("Result")
Expose: TypeAlias = Literal["mapped", "staging"]
#: Tokens of a block that another engine may have: those that vLLM chooses by itself.
SIZES = (16, 32, 64, 128)
#: The most bytes of scratch memory for one size; a device has little left beside its caches.
LARGEST = 256 << 20
#: How a pull shares the device: with a model, and alone.
OVERLAPS: tuple[Overlap, ...] = ("compute", "idle")
#: Seconds for a rehearsal, and between two looks at it.
PATIENCE = 30.0
PAUSE = 5e-4


def rehearse(handover: Handover) -> None:
    """Hand rows of a worker's caches over to scratch memory, and pull them back.

    The caches keep their bytes. A failure is no error of the engine: the log has a line, and the
    first hand-over takes longer.

    Args:
        handover: of a worker whose caches nothing uses yet.
    """
    try:
        _read_all_forms(handover)
        for expose in _exposures(handover.terms):
            _hand_over_and_back(handover, expose)
    except Exception as error:  # compilers and drivers raise errors of their own types
        _log.warning("rehearse", "The first hand-over of an engine will be slow: %s", error)


def _exposures(terms: HandoverTerms) -> list[Expose]:
    """Return how the rows of other engines may come: engines of other hosts map no memory."""
    if terms.address is None or terms.expose == "staging":
        return [terms.expose]
    return [terms.expose, "staging"]


def _blocks(handover: Handover, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the first blocks of each shard of one side of a rehearsal, for so many tokens."""
    sizes = [shard.view.block_size or 1 for shard in handover.shards]
    return tuple(tuple(range(-(-tokens // size))) for size in sizes)


def _hand_over_and_back(handover: Handover, expose: Expose) -> None:
    """Hand the rows of the first blocks over to scratch memory, and pull them from there."""
    own = handover.shards
    counts = [*_counts(own)]
    most = max(counts)
    scratch = [
        scratch_like(shard, shard.view.block_size or 1, most, listed=_listed(shard.view))
        for shard in own
    ]
    terms = handover.terms
    address = None
    if terms.address is not None:
        address = f"{terms.address.rpartition(':')[0]}:0"
    peer = Handover(
        scratch,
        handover.model,
        replace(terms, expose=expose),
        offers=handover.reader is not None,
        pulls=handover.owner is not None,
        address=address,
    )
    try:
        for tokens in counts:
            _copy(own, scratch, tokens)
            for idle in (False, True):
                if handover.owner is not None:
                    _hand_over(handover, peer, tokens, idle)
                if handover.reader is not None:
                    _hand_over(peer, handover, tokens, idle)
    finally:
        peer.close()
        _end_all(handover)


def _counts(shards: Sequence[Shard]) -> Iterator[int]:
    """Yield how many tokens are handed over: more than one block, and more bytes than the caller of
    a pull copies itself on the host. The last block of each is not full."""
    slots = min(shard.view.slots for shard in shards)
    size = max(shard.view.block_size or 1 for shard in shards)
    yield min(slots, size + 1)
    of_token = min(_token_bytes(shard.view) for shard in shards)
    long = LONG // of_token + 2
    if size + 1 < long <= slots:
        yield long


def _token_bytes(view: KVView) -> int:
    return max(1, view.layers * view.heads * sum(view.widths))


def _hand_over(src: Handover, dst: Handover, tokens: int, idle: bool) -> None:
    """Offer rows of the first blocks of one side, pull them into those of the other side, and end
    the offer, by the calls that a worker makes in its steps.

    ``idle``: of an engine that does nothing else.
    """
    endpoint = src.endpoint
    assert endpoint is not None
    name = token_bytes(32)
    ticket = Ticket.of(endpoint.address, endpoint.epoch, name)
    offer = OfferJob("rehearsal", name, tokens, _blocks(src, tokens), PATIENCE)
    src.begin(Handovers(offers=[offer]))
    pull = PullJob(0, "rehearsal", (ticket,), 0, tokens, _blocks(dst, tokens))
    dst.begin(Handovers(pulls=[pull]), idle)
    landed = _await(dst.ended_pulls, "the end of a pull")
    dst.tell((ticket,), EndNamed)
    _await(src.ended_offers, "the end of an offer")
    if not all(ended for _, ended in landed):
        raise TransferTimeout("Expected the rows of a rehearsal, got none. See the lines above.")


def _end_all(handover: Handover) -> None:
    """End what a rehearsal that has failed has left, so that the engine sees nothing of it."""
    if handover.owner is not None and handover.lending:
        handover.owner.revoke_all()

    def ended() -> bool:
        handover.ended_pulls()
        handover.ended_offers()
        return not handover.busy

    _await(ended, "the ends of offers and pulls")


def _await(happened: Callable[[], Result], what: str) -> Result:
    """Return the first result that is not empty; raise `TransferTimeout` after `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while not (result := happened()):
        if time.monotonic() > until:
            raise TransferTimeout(f"Expected {what} within {PATIENCE:g} s, got none.")
        time.sleep(PAUSE)
    return result


def _listed(view: KVView) -> bool:
    """Return whether the addresses of layers are a table, as those of separate allocations are."""
    return any(step.table for part in view.form.parts for step in part.layer)


def _read_all_forms(handover: Handover) -> None:
    """Copy rows as pulls of mapped memory do: a kernel is built for each size of the other engine's
    blocks, and another one reads memory of another device while a model runs.

    Layers of the other engine may be separate allocations, or lie at the distances of these ones.
    """
    shards = () if handover.reader is None else handover.reader.shards
    for shard in shards:
        own = shard.view.block_size
        if own is not None and not shard.view.layout.opaque:
            _read_forms_of(shard, own)


def _read_forms_of(shard: Shard, own: int) -> None:
    """Do so for the caches of a shard, whose blocks have ``own`` tokens."""
    others = SIZES if can_resize(shard) else ()
    for size in dict.fromkeys([own, *others]):
        tokens = max(own, size) + 1  # a block of either size is whole, and another one is not
        nbytes = tokens * _token_bytes(shard.view)
        if tokens <= shard.view.slots and nbytes <= LARGEST:
            for listed in {True, _listed(shard.view)}:
                _read_from(shard, own, size, tokens, listed)


def _read_from(shard: Shard, own: int, size: int, tokens: int, listed: bool) -> None:
    """Copy rows to scratch memory, and back as a pull from blocks of ``size`` tokens does."""
    view = shard.view
    scratch_shard = scratch_like(shard, size, tokens, listed=listed)
    (scratch,) = _copy([shard], [scratch_shard], tokens)
    src_index = Index.of([*range(-(-tokens // size))], size)
    dst_index = Index.of([*range(-(-tokens // own))], own)
    sources = [scratch.view]
    if view.device.type != "cpu":
        sources.append(scratch.view.as_peer(view.device))
    for src, overlap in product(sources, OVERLAPS):
        with suppress(Unsupported):  # nothing here reads memory of another device
            copied = copy_rows(src, view, src_index, dst_index, count=tokens, overlap=overlap)
            copied.synchronize()


def _copy(src: Sequence[Shard], dst: Sequence[Shard], tokens: int) -> Sequence[Shard]:
    """Copy the rows of the first tokens, and return the destination.

    No pull copies so, thus by no kernel that would have to be built.
    """
    for one, other in zip(src, dst, strict=True):
        copied = copy_rows(one.view, other.view, count=tokens, backend="reference")
        copied.synchronize()
    return dst
