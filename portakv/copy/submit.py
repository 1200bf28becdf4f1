# SPDX-License-Identifier: Apache-2.0
"""Submit a copy: choose what makes it, and how: whole, by layer, in slices or detached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd, lcm
from time import perf_counter

import torch

from portakv.copy.call import (
    Context,
    Passed,
    check_ids,
    check_views,
    common_device,
    context_of,
    detached,
    drop_bad_ids,
    executor_of,
    follow_current,
    in_layers,
    launch,
    layer_of,
    settle,
)
from portakv.copy.encodings import copy_encoded
from portakv.copy.handle import BlockTransfer, token_bytes
from portakv.copy.options import CopyOptions
from portakv.copy.slices import WINDOW, Slice, Slices
from portakv.interconnect.strategy import Strategy
from portakv.plan.plan import Move, check_disjoint
from portakv.registry.prepared import bring
from portakv.registry.registry import Choice, choose
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import awaited_asleep, ignoring_captures, own_stream
from portakv.runtime.transfer import Transfer


def submit(move: Move, options: CopyOptions, passed: Passed | None = None) -> BlockTransfer:
    """Issue a copy by the schedule that its options request.

    ``passed``: the checks that the copy passed just now, alone or as a part. None: check it.

    Raises as `copy_rows`.
    """
    began = perf_counter()
    src = move.src
    dst = move.dst
    late = options.late
    if late is not None:
        late.check(src.device if src.device.type != "cpu" else dst.device)
    if options.reinterpret:
        src = src.as_bytes()
        move = move._replace(src=src)
    if src.form.encoding or dst.form.encoding:
        transfer = copy_encoded(move, options, began, submit, passed)
    elif src.device != dst.device and src.device.type != "cpu" != dst.device.type:
        transfer = _from_peer(move, options, began, passed)
    else:
        choice = choose(common_device(src, dst), options.backend)
        context = context_of(passed, choice.backend.device, options.stream)
        transfer = issue(move, choice, context, options, began, passed)
    if late is not None:
        late.keep(transfer)
    return transfer


def _from_peer(
    move: Move, options: CopyOptions, began: float, passed: Passed | None
) -> BlockTransfer:
    """Issue a copy of another device's rows, which the destination's device reads.

    Raises:
        DeviceMismatch: devices of two types.
        Unsupported: in graph capture.
        PortaKVError: as `issue`.
    """
    device = move.dst.device
    owner = move.src.memory_device
    context = context_of(passed, device, options.stream)
    seen = move._replace(src=move.src.as_peer(device))
    if context.captured or capturing(owner):
        why = (
            f"a graph would have to hold the streams of {owner} and {device}; make the copy outside"
        )
        raise refuse_capture("A copy between two devices", why)
    # The present work of the stream of the rows' device comes first.
    work = options.stream or torch.accelerator.current_stream(device.index)
    work.wait_stream(torch.accelerator.current_stream(owner.index))
    # Make the device the current one: once, instead of a query about every device that is not.
    apart = torch.accelerator.current_device_index() != device.index
    with inside(device if apart else None):
        choice = choose(device, options.backend)
        made = issue(seen, choice, context, options, began, passed)
    if not (options.detached or options.sliced):
        # Nothing overwrites the source too early; `Tensor.copy_` orders both devices the same way.
        for last in made.completions[-1:]:  # of several layers, which end in order
            last.wait(torch.accelerator.current_stream(owner.index))
    return made


def issue(
    move: Move,
    choice: Choice,
    context: Context,
    options: CopyOptions,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of one device by the schedule that its options request.

    Args:
        choice: the registry's, for the device of the copy.
        context: of that device, with the stream of the copy, whatever stream the options name.
        began: when the call began, by `perf_counter`.
        passed: the checks that a connector made. None: check it.

    Raises as `copy_rows`.
    """
    executor = executor_of(move.src, move.dst, choice, options.terms)
    if options.sliced:
        return in_slices(move, executor, context, options.max_gbps, options.by_layer, passed)
    if options.detached and context.device.type != "cpu":
        return detached(move, executor, context, options, began, passed)
    if options.by_layer:
        return in_layers(move, executor, context, options.strict, began, passed)
    settled = settle(move, executor, context, passed=passed, strict=options.strict)
    skips = settled.guarded or settled.move is not move
    return BlockTransfer.of_move(launch(settled, context), move, began, skips=skips)


def check_issue(move: Move, choice: Choice, context: Context, options: CopyOptions) -> None:
    """Raise what `issue` raises for a copy that nothing here executes; move nothing."""
    executor = executor_of(move.src, move.dst, choice, options.terms)
    settle(move._replace(count=0), executor, context, passed=Passed(skips=False))


# ------------------------------------------------------------------------------------------------
# Copy in slices, so that the copy can be cancelled or keeps a rate.

#: The most bytes of a slice, unless one block has more; three times as much if the host copies
#: too. What is in flight when a transfer is cancelled still lands, three slices of it
#: (`slices.WINDOW`): 1 ms on a link of 50 GB/s.
SLICE = 16 << 20
#: Seconds of a slice at the requested rate. It crosses as fast as the link, and
#: the pause after it makes the rate.
BEAT = 0.002
#: The checks that each slice passes: those of the whole copy, whose skipped positions are left out.
_PASSED = Passed(skips=False)


def in_slices(
    move: Move,
    choice: Choice,
    context: Context,
    rate: float | None,
    by_layer: bool,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Start a transfer in slices, at most ``rate`` 10^9 bytes a second.

    With ``by_layer`` no slice has rows of two layers. ``passed``: as for `settle`.

    Raises:
        SlotError: bad ids, also on a device, which are read first.
        Unsupported: inside graph capture.
        PortaKVError: as `settle`.
    """
    device, stream, _ = context
    began = time.perf_counter()
    context.check_may_slice()
    if passed is None:
        check_views(move)
    whole = layer_of(move, 0) if by_layer else move
    settle(whole._replace(count=0), choice, context, passed=_PASSED)  # refuses what none executes
    move, guarded = _read(move, context, passed)
    if passed is None:
        check_disjoint(guarded)
    if not guarded.count:
        none = (Transfer(),) * move.src.layers if by_layer else None
        return BlockTransfer.of_move(Transfer(), move, began, none)
    # Private indices: copies of ids that a helper makes are on no other stream.
    guarded = _part(guarded, Slice(None, 0, guarded.count, 0))
    if device.type != "cpu":
        stream = stream or own_stream(device)
        follow_current(stream, [guarded])

    here = Context(device, None, captured=False)  # of a helper, whose stream is the current one

    def issue(piece: Slice) -> Transfer:
        part = _part(guarded, piece)
        for view in (part.src, part.dst):
            view.check_memory()  # it may be released after the call, while a slice runs
        transfer = launch(settle(part, choice, here, passed=_PASSED), here)
        return awaited_asleep(transfer, device)  # the helper waits for it

    pieces = _cut(guarded, rate, by_layer)
    slices = Slices(pieces, issue, partial(_inside, guarded, choice, stream), rate)
    layers = None
    if by_layer:
        last = {piece.layer: nth for nth, piece in enumerate(pieces, 1)}
        layers = tuple(Transfer((slices.end_of(nth),)) for nth in last.values())
    end = slices.end_of(len(pieces), (move.src, move.dst))
    end.report_failure()
    transfer = BlockTransfer.of_move(Transfer((end,)), move, began, layers, slices)
    slices.start()
    return transfer


def _read(move: Move, context: Context, passed: Passed | None) -> tuple[Move, Move]:
    """Return a copy with private ids on the host, and the same without positions that are skipped.

    Raises `SlotError` for bad ids. Ids of a device are read, so they are checked in any case.
    """
    read = move._replace(
        src_index=move.src_index.apart().to_host(),
        dst_index=move.dst_index.apart().to_host(),
    )
    if passed is not None and move.ids_on_host:
        skips = passed.skips
    else:
        skips = check_ids(read, context, strict=False)
    return read, drop_bad_ids(read, gcd(*read.steps))[0] if skips else read


def _cut(move: Move, rate: float | None, by_layer: bool) -> list[Slice]:
    """Return the slices of a transfer, each of whole blocks."""
    src = move.src
    dst = move.dst
    src_step, dst_step = move.steps
    # Tokens between two places where both sides may be cut.
    whole = lcm(src_step or 1, dst_step or 1, src.form.block_size if src.opaque else 1)
    layers: list[int | None] = list(range(src.layers)) if by_layer else [None]
    each = token_bytes(src.form) / len(layers)
    most = float(SLICE)
    if {src.form.place, dst.form.place} == {"device", "pageable"}:
        most *= WINDOW  # each occupies its thread, and has to wake torch's
    if rate is not None:
        most = min(most, rate * 1e9 * BEAT)
    tokens = max(1, int(most / (whole * each))) * whole
    return [
        Slice(layer, first, size, round(size * each))
        for layer in layers
        for first in range(0, move.count, tokens)
        for size in [min(tokens, move.count - first)]
    ]


def _part(move: Move, piece: Slice) -> Move:
    """Return a slice of a copy, with only the ids of its positions."""
    whole = move if piece.layer is None else move.layer(piece.layer)
    return whole._replace(
        src_index=whole.src_index.part(piece.first, piece.tokens),
        dst_index=whole.dst_index.part(piece.first, piece.tokens),
        count=piece.tokens,
    )


@contextmanager
def _inside(move: Move, choice: Choice, stream: torch.Stream | None) -> Iterator[None]:
    """Make a stream and its device the current ones, and put the ids on the device."""
    device = choice.backend.device
    indices = (move.src_index, move.dst_index)
    half = choice.backend.half if isinstance(choice.backend, Strategy) else choice
    dtypes = half.can.index_dtypes
    with ignoring_captures(device), inside(stream):
        bring(indices, device, dtypes)
        for index in indices:
            if index.ids is not None:
                # Together, and kept by the index: a copy for each slice would wait for the last
                # one.
                index.ids_on(device, dtypes)
        yield
