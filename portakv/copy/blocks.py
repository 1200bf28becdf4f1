# SPDX-License-Identifier: Apache-2.0
"""Block transfers: copies of whole blocks by their ids, all at once, by layer, or in slices."""

from __future__ import annotations

import time

import torch

from portakv.copy.copy import Ids, carrier, checked, copy_move, follow_current, is_strict, source_of
from portakv.copy.handle import BlockTransfer
from portakv.copy.slices import in_layers, in_slices
from portakv.engines.engine import Terms
from portakv.errors import LayoutError, SlotError, flag
from portakv.plan.move import Move
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import beside, check_stream
from portakv.view import Index, KVView


def copy_blocks(
    src: KVView,
    dst: KVView,
    src_blocks: Ids | None,
    dst_blocks: Ids | None,
    *,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    by_layer: bool = False,
    overlap: str = "compute",
    max_thread_blocks: int | None = None,
    max_gbps: float | None = None,
    cancellable: bool = False,
    detached: bool = False,
    reinterpret: bool = False,
    check: str = "usual",
) -> BlockTransfer:
    """Copy whole blocks by their ids; block sizes may differ, the numbers of tokens may not.

    Everything is issued before this returns, ordered on a stream. With ``cancellable`` or
    ``max_gbps`` a thread issues the copy in slices instead, behind what the current stream holds at
    the call, and no stream orders them: `Transfer.wait` blocks the host.

    A ``detached`` copy begins behind the same work, and no stream waits for its end unless
    `Transfer.wait` makes one. The next transfer then need not wait for this one's last bytes, which
    keeps the link busy beside a model that leaves few gaps. Two detached copies are not ordered
    either: until the end the caller must not write what is read, nor use what is written.

    Args:
        src, dst: paged views, or chunks if that side's blocks are None (consecutive tokens).
        src_blocks, dst_blocks: block ids, int32 or int64, negative = skipped; or an `Index` of
            them with ``step=block_size``, which is validated once however often it is used.
        backend: the name of a backend or of an engine, which then must carry it out.
        stream: where to order the work; it first waits for the current stream. Its priority is
            that of the kernels; copy engines know none.
        by_layer: one layer behind the other, each with an end of its own: `BlockTransfer.layers`.
        overlap: what else the device does: ``compute``, it runs a model; or ``idle``, nothing.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory.
        max_gbps: the most 10^9 bytes in a second.
        cancellable: `BlockTransfer.cancel` stops it between two slices.
        detached: no stream waits for its end, not even ``stream``; the handle alone tells it.
        reinterpret: rows of one number type may go to rows of another: their bits are moved.
        check: ``usual`` looks at ids on the host; ``strict`` also at ids on a device, which it
            waits for: ids past the end and destinations that occur twice are refused before
            anything is moved.

    Raises:
        LayoutError: ids for a view that is not paged.
        SlotError: the two sides cover different numbers of tokens.
        DeviceMismatch: a stream of another device.
        InvalidTerms: another ``overlap`` or ``check``, a flag or number that is none for its term.
        Unsupported: terms that cannot be kept; in slices, detached or strict, inside graph capture.
        PortaKVError: what `copy_rows` raises. Slices also refuse bad ids on a device at once.
    """
    strict, sliced = is_strict(check), flag("cancellable", cancellable) or max_gbps is not None
    flag("by_layer", by_layer)
    terms = None
    if overlap != "compute" or max_thread_blocks is not None or sliced or detached is not False:
        # No stream orders slices anyway.
        terms = Terms(overlap, max_thread_blocks, max_gbps, False if sliced else detached)
    src = source_of(src, dst, reinterpret)
    mine, theirs = _block_index(src, src_blocks, "src"), _block_index(dst, dst_blocks, "dst")
    move, choice = checked(src, dst, mine, theirs, None, backend)
    if stream is not None:  # now: some ways use it before their first copy looks at it
        check_stream(stream, choice.backend.device)
    if terms is not None:
        choice = carrier(src, dst, choice, terms)
    if sliced:
        return in_slices(move, choice, stream, max_gbps, by_layer)
    began, behind = time.perf_counter(), None
    if detached and choice.backend.device.type != "cpu":
        behind, stream = stream, _beside(stream, choice.backend.device, move)
    elif not by_layer:  # it spares the host the context
        return BlockTransfer(copy_move(move, choice, stream, strict=strict), move, began)
    with inside(behind):
        if by_layer:
            return in_layers(move, choice, stream, strict, began)
        return BlockTransfer(copy_move(move, choice, stream, strict=strict), move, began)


def _beside(stream: torch.Stream | None, device: torch.device, move: Move) -> torch.Stream:
    """The stream of a copy that begins behind ``stream``, which does not wait for its end; raises
    `Unsupported` while a graph is captured."""
    with inside(stream):
        captured, behind = capturing(device), torch.accelerator.current_stream(device.index)
    if captured or capturing(device):
        why = "a graph has no work that its stream does not wait for; leave out detached"
        raise refuse_capture("A detached copy", why)
    if stream is not None:
        follow_current(stream, [move])
    return beside(behind, move.src.form.place, move.dst.form.place)


def _block_index(view: KVView, blocks: Ids | None, side: str) -> Index:
    if blocks is None:
        return Index()
    size = view.form.block_size
    if not size:
        raise LayoutError(
            f"{side}_blocks was given, but {view.layout.text!r} has no `block` axis; pass None for "
            f"consecutive tokens."
        )
    if isinstance(blocks, Index):
        if blocks.step != size:
            raise SlotError(
                f"{side}_blocks is an Index with step {blocks.step}, but the view's blocks hold "
                f"{size} tokens; pass Index(ids, step={size}), or ids."
            )
        return blocks
    return Index.of(blocks, size)
