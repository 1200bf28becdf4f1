# SPDX-License-Identifier: Apache-2.0
"""`copy_rows`: the primitive as a caller asks for it, all at once, by layer, or on terms."""

from __future__ import annotations

from time import perf_counter

import torch

from portakv.arguments import flag, invalid
from portakv.copy.between import carrier, seen_by_reader, written_behind
from portakv.copy.copy import Check, Ids, checked, copy_move, follow_current, is_strict, source_of
from portakv.copy.handle import BlockTransfer
from portakv.copy.repeat import remember, repeated
from portakv.copy.slices import in_layers, in_slices
from portakv.interconnect.strategy import Overlap, Terms
from portakv.plan.plan import Move
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import check_stream, side_stream
from portakv.runtime.transfer import LateErrors
from portakv.view import Index, KVView


def copy_rows(
    src: KVView,
    dst: KVView,
    src_index: Ids | None = None,
    dst_index: Ids | None = None,
    *,
    count: int | None = None,
    backend: str | None = None,
    stream: torch.Stream | None = None,
    by_layer: bool = False,
    overlap: Overlap = "compute",
    max_thread_blocks: int | None = None,
    max_gbps: float | None = None,
    cancellable: bool = False,
    detached: bool = False,
    reinterpret: bool = False,
    check: Check = "usual",
    late: LateErrors | None = None,
) -> BlockTransfer:
    """Copy rows between views.

    Everything is issued before this returns, ordered on a stream. With ``cancellable`` or
    ``max_gbps`` a thread issues the copy in slices instead, behind what the current stream holds at
    the call, and no stream orders them: `Transfer.wait` blocks the host.

    A ``detached`` copy begins behind the same work, and no stream waits for its end unless
    `Transfer.wait` makes one. The next transfer then need not wait for this one's last bytes, which
    keeps the link busy beside a model that leaves few gaps. Two detached copies are not ordered
    either: until the end the caller must not write what is read, nor use what is written.

    Args:
        src, dst: views of equal extents and widths in bytes, of any layouts; on one device, on it
            and the host, or on two of one type, of which the destination's reads the other.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive.
        count: tokens to move; by default what the indices cover.
        backend: the name of a backend or of an engine, which then must carry it out.
        stream: where to order the work; it first waits for the current stream. Its priority is
            that of the kernels; copy engines know none.
        by_layer: one layer behind the other, each with an end of its own: `BlockTransfer.layers`.
        overlap: what else the device does: ``compute``, it runs a model; or ``idle``, nothing.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory, or
            reads another device's.
        max_gbps: the most 10^9 bytes in a second.
        cancellable: `BlockTransfer.cancel` stops it between two slices.
        detached: no stream waits for its end, not even ``stream``; the handle alone tells it.
        reinterpret: rows of one number type may go to rows of another: their bits are moved.
        check: ``usual`` looks at ids on the host; ``strict`` also at ids on a device, which it
            waits for: ids past the end and destinations that occur twice are refused before
            anything is moved.
        late: raises, before this copy, an error that an earlier copy with it found after its call;
            for callers that keep no handles.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host, or sides that cover different numbers of tokens; bad
            device ids are raised by the transfer. Slices also refuse those at once.
        DeviceMismatch: a stream of another device, or devices of two types.
        InvalidTerms: another ``overlap`` or ``check``, a flag or number that is none for its term.
        BackendUnavailable, Unsupported: no backend carries it out, with the trace; terms that
            cannot be kept; in slices, detached or strict, inside graph capture.
    """
    return issued(
        source_of(src, dst, reinterpret),
        dst,
        src_index,
        dst_index,
        count,
        backend,
        stream,
        by_layer,
        overlap,
        max_thread_blocks,
        max_gbps,
        cancellable,
        detached,
        check,
        late,
    )


def issued(
    src: KVView,
    dst: KVView,
    src_index: Ids | None,
    dst_index: Ids | None,
    count: int | None,
    backend: str | None,
    stream: torch.Stream | None,
    by_layer: bool,
    overlap: Overlap,
    max_thread_blocks: int | None,
    max_gbps: float | None,
    cancellable: bool,
    detached: bool,
    check: Check,
    late: LateErrors | None,
) -> BlockTransfer:
    """`copy_rows` from what `source_of` made of the source. All terms by position: a call with as
    many by name takes longer."""
    given = count, backend, stream, by_layer, overlap, max_thread_blocks, max_gbps, cancellable
    if late is not None:
        if not isinstance(late, LateErrors):
            raise invalid("late", "a LateErrors or None", late, "Pass LateErrors().")
        late.check(src.device if src.device.type != "cpu" else dst.device)
        transfer = issued(src, dst, src_index, dst_index, *given, detached, check, None)
        late.keep(transfer)
        return transfer
    if src.device != dst.device and "cpu" not in (src.device.type, dst.device.type):
        peer = seen_by_reader(src, dst.device, stream)
        # Once, in place of each question about a device that is not the current one.
        apart = torch.accelerator.current_device_index() != dst.device.index
        with inside(dst.device if apart else None):
            transfer = issued(peer, dst, src_index, dst_index, *given, detached, check, None)
        if detached is False and cancellable is False and max_gbps is None:
            written_behind(src, transfer)
        return transfer
    if by_layer is not False or cancellable is not False:
        flag("by_layer", by_layer), flag("cancellable", cancellable)
    strict = is_strict(check)
    sliced = cancellable or max_gbps is not None
    terms = None
    if overlap != "compute" or max_thread_blocks is not None or sliced or detached is not False:
        # No stream orders slices anyway.
        terms = Terms(overlap, max_thread_blocks, max_gbps, False if sliced else detached)
    mine = src_index if isinstance(src_index, Index) else Index.of(src_index)
    theirs = dst_index if isinstance(dst_index, Index) else Index.of(dst_index)
    move, choice = checked(src, dst, mine, theirs, count, backend)
    if stream is not None:  # now: some ways use it before their first copy looks at it
        check_stream(stream, choice.backend.device)
    if terms is not None or src.form.place == "peer":
        choice = carrier(src, dst, choice, terms)
    if sliced:
        return in_slices(move, choice, stream, max_gbps, by_layer)
    began = perf_counter()
    behind = None
    if src.foreign and dst.foreign and stream is None and not (by_layer or strict or detached):
        made = repeated(move, choice)
        if made is None:
            made = copy_move(move, choice, None)
            remember(move, choice, made)
        return BlockTransfer(made, move, began)
    if detached and choice.backend.device.type != "cpu":
        behind = stream
        stream = _beside(stream, choice.backend.device, move)
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
        captured = capturing(device)
        behind = torch.accelerator.current_stream(device.index)
    if captured or capturing(device):
        why = "a graph has no work that its stream does not wait for; leave out detached"
        raise refuse_capture("A detached copy", why)
    if stream is not None:
        follow_current(stream, [move])
    return side_stream(behind, move.src.form.place, move.dst.form.place)
