# SPDX-License-Identifier: Apache-2.0
"""`copy_rows`: copy rows, in one call, by layer, or on terms such as a rate."""

from __future__ import annotations

from time import perf_counter

import torch

from portakv.arguments import flag, invalid
from portakv.copy.between import carrier, order_after, seen_by_reader
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
    ``max_gbps`` a thread issues the copy in slices instead, after the present work of the current
    stream. No stream orders slices: `Transfer.wait` blocks the host.

    A ``detached`` copy begins after the same work, and no stream waits for its end unless
    `Transfer.wait` makes one wait. The next transfer then need not wait for the last bytes of this
    one, which keeps the link busy next to a model that leaves few gaps. Two detached copies are not
    ordered either: until the end the caller must not write what is read, nor use what is written.

    Args:
        src, dst: views of equal extents and of equal widths in bytes, of any layouts. Both on one
            device, one on it and one on the host, or on two devices of one type; then the
            destination's device reads the source.
        src_index, dst_index: an `Index`, or ids as a slot mapping (step 1); None: consecutive
            tokens.
        count: tokens to move; None: those that the indices cover.
        backend: the name of the backend or strategy that must execute it.
        stream: where to order the work; it first waits for the current stream. Kernels run at its
            priority; copy engines have no priorities.
        by_layer: copy one layer after another, each with a separate end: `BlockTransfer.layers`.
        overlap: what else the device does meanwhile: ``compute``, it runs a model; ``idle``,
            nothing.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory, or
            reads another device's memory.
        max_gbps: the most 10^9 bytes a second.
        cancellable: `BlockTransfer.cancel` can stop it between two slices.
        detached: no stream waits for its end, not even ``stream``; only the handle reports it.
        reinterpret: allow rows of one number type to go to rows of another; their bits are moved.
        check: ``usual`` checks ids on the host. ``strict`` also waits for ids on a device: ids past
            the end and destinations that occur twice are refused before anything is moved.
        late: before this copy, raise an error of an earlier copy that passed the same object and
            failed after its call. For callers that keep no handles.

    Raises:
        LayoutError: the views cannot hold each other's rows, or the destination cannot be written.
        SlotError: a bad index on the host, or sides that cover different numbers of tokens. The
            transfer raises bad device ids; slices refuse those before they begin.
        DeviceMismatch: a stream of another device, or devices of two types.
        InvalidTerms: a term with a value that it cannot have.
        BackendUnavailable: no backend executes it; ``trace`` has the decisions.
        Unsupported: terms that cannot be kept; slices, or a detached or strict copy, inside graph
            capture.
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
    """Copy as `copy_rows`, from the result of `source_of`.

    All terms are positional: a call with as many keywords takes longer.
    """
    options = count, backend, stream, by_layer, overlap, max_thread_blocks, max_gbps, cancellable
    if late is not None:
        if not isinstance(late, LateErrors):
            raise invalid("late", "a LateErrors or None", late, "Pass LateErrors().")
        late.check(src.device if src.device.type != "cpu" else dst.device)
        transfer = issued(src, dst, src_index, dst_index, *options, detached, check, None)
        late.keep(transfer)
        return transfer
    if src.device != dst.device and "cpu" not in (src.device.type, dst.device.type):
        peer = seen_by_reader(src, dst.device, stream)
        # Once, instead of a query about every device that is not the current one.
        apart = torch.accelerator.current_device_index() != dst.device.index
        with inside(dst.device if apart else None):
            transfer = issued(peer, dst, src_index, dst_index, *options, detached, check, None)
        if detached is False and cancellable is False and max_gbps is None:
            order_after(src, transfer)
        return transfer
    if by_layer is not False or cancellable is not False:
        flag("by_layer", by_layer), flag("cancellable", cancellable)
    strict = is_strict(check)
    sliced = cancellable or max_gbps is not None
    terms = None
    if overlap != "compute" or max_thread_blocks is not None or sliced or detached is not False:
        # No stream orders slices.
        terms = Terms(overlap, max_thread_blocks, max_gbps, False if sliced else detached)
    src_of = src_index if isinstance(src_index, Index) else Index.of(src_index)
    dst_of = dst_index if isinstance(dst_index, Index) else Index.of(dst_index)
    move, choice = checked(src, dst, src_of, dst_of, count, backend)
    if stream is not None:  # now: some strategies use it before their first copy checks it
        check_stream(stream, choice.backend.device)
    if terms is not None or src.form.place == "peer":
        choice = carrier(src, dst, choice, terms)
    if sliced:
        return in_slices(move, choice, stream, max_gbps, by_layer)
    began = perf_counter()
    begins_after = None
    if src.raw and dst.raw and stream is None and not (by_layer or strict or detached):
        made = repeated(move, choice)
        if made is None:
            made = copy_move(move, choice, None)
            remember(move, choice, made)
        return BlockTransfer(made, move, began)
    if detached and choice.backend.device.type != "cpu":
        begins_after = stream
        stream = _detached_stream(stream, choice.backend.device, move)
    elif not by_layer:  # it saves the host the context
        return BlockTransfer(copy_move(move, choice, stream, strict=strict), move, began)
    with inside(begins_after):
        if by_layer:
            return in_layers(move, choice, stream, strict, began)
        return BlockTransfer(copy_move(move, choice, stream, strict=strict), move, began)


def _detached_stream(stream: torch.Stream | None, device: torch.device, move: Move) -> torch.Stream:
    """Return the stream of a copy that begins after ``stream``, which does not wait for its end.

    Raises `Unsupported` while a graph is captured.
    """
    with inside(stream):
        captured = capturing(device)
        begins_after = torch.accelerator.current_stream(device.index)
    if captured or capturing(device):
        why = "a graph has no work that its stream does not wait for; leave out detached"
        raise refuse_capture("A detached copy", why)
    if stream is not None:
        follow_current(stream, [move])
    return side_stream(begins_after, move.src.form.place, move.dst.form.place)
