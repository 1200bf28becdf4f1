# SPDX-License-Identifier: Apache-2.0
"""Launch a copy that packs or unpacks on one device, and report the blocks that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.backends.base import Capabilities
from portakv.copy.call import Context, beside, bring_tables, drop_bad_ids, follow_current
from portakv.copy.call import Passed as Passed
from portakv.errors import PackOverflow, SlotError
from portakv.layout.encodings import PACK
from portakv.plan.move import Move
from portakv.registry.prepared import PreparedPack
from portakv.runtime.devices import inside
from portakv.runtime.transfer import (
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    event_pool,
    hold,
)
from portakv.view.index import Index


class Checked(NamedTuple):
    """A copy whose ids were checked.

    Attributes:
        move: the copy, without blocks that have bad ids if the backend does not skip them.
        error: the error of ids that were left out.
        guarded: the backend skips or reports bad ids.
    """

    move: Move
    error: SlotError | None
    guarded: bool


def without_bad_ids(
    move: Move, unit: int, passed: Passed, can: Capabilities | None = None
) -> Checked:
    """Leave bad ids out of a checked copy in blocks of ``unit`` tokens.

    ``passed``: its checks. ``can``: the capabilities of the backend that reads the ids, which may
    skip bad ids itself. None: it does not. Waits at most once for ids on a device.
    """
    clean = move.src_index.is_clean(move.count, move.src.slots)
    clean = clean and move.dst_index.is_clean(move.count, move.dst.slots)
    if clean and not passed.skips:
        return Checked(move, passed.error, False)
    if can is not None and can.skips_negative and (clean or can.guards):
        return Checked(move, passed.error, True)
    moved, error = drop_bad_ids(move, unit)
    return Checked(moved, passed.error or error, False)


class Packed(NamedTuple):
    """A copy that packs or unpacks and was issued.

    Attributes:
        checked: the copy without bad ids.
        transfer: its end.
        report: returns its blocks that do not fit; None if nothing was launched.
        stream: the stream of its end; None: the current stream.
    """

    checked: Checked
    transfer: Transfer
    report: OverflowReport | None
    stream: torch.Stream | None


def issue_pack(
    move: Move, ready: PreparedPack, context: Context, passed: Passed, detached: bool = False
) -> Packed:
    """Launch a checked copy on one device, on the context's stream, or ``detached`` after that
    stream's work. ``passed``: its checks."""
    checked = without_bad_ids(move, ready.plan.unit, passed, ready.can)
    if not checked.move.count:
        return nothing_packed(checked)
    if not detached or context.device.type == "cpu":
        return _launch(checked, ready, context)
    side = beside(checked.move, context)
    with inside(context.stream):
        return _launch(checked, ready, context._replace(stream=side))


def _launch(checked: Checked, ready: PreparedPack, context: Context) -> Packed:
    """Launch a copy that is checked, on the context's stream."""
    move = checked.move
    guarded = checked.guarded
    device, stream, captured = context
    on_device = device.type != "cpu"
    placed = ready.place_both(move)
    if on_device:
        bring_tables(move, ready.tables, device, captured)
        follow_current(stream, [placed])
    word: StatusWord | None = None
    if on_device and (guarded or (ready.can.guards and not move.ids_on_host)):
        word = acquire_word()
    with inside(device if stream is None else stream):
        overflow = overflow_words(move, ready.plan.unit, device)
        try:
            return _enqueue(checked, ready, context, placed, word, overflow)
        except BaseException:  # also an interrupt; kernels that run may write the words
            if on_device:
                pool = event_pool(device)
                hold(Completion(pool.recorded(stream), retained=(placed, overflow), pool=pool))
            raise


def _enqueue(
    checked: Checked,
    ready: PreparedPack,
    context: Context,
    placed: Move,
    word: StatusWord | None,
    overflow: torch.Tensor,
) -> Packed:
    """Launch a copy whose ids are placed, on the current stream, and return its end."""
    move = checked.move
    device, stream, _ = context
    on_device = device.type != "cpu"
    status = None if word is None else word.tensor
    pending = ready.enqueue(placed, stream, status, overflow)
    report = OverflowReport.of(move, ready.plan.unit, overflow, device, ready.plan.packs)
    pendings: list[Pending] = [] if pending is None else [pending]
    if not (on_device or pendings):
        error = checked.error or report()
        completions = () if error is None else (Completion(error=error),)
        return Packed(checked, Transfer(completions, None, ready.carried), report, stream)
    pool = event_pool(device) if on_device else None
    completion = Completion(
        event=None if pool is None else pool.recorded(stream),
        pendings=pendings,
        words=() if word is None else [(word, 0)],
        error=checked.error,
        late_error=report,
        retained=(move.src, move.dst, placed, overflow),
        pool=pool,
    )
    hold(completion)
    retained = (move.src, move.dst, placed)
    return Packed(checked, Transfer((completion,), retained, ready.carried), report, stream)


def nothing_packed(checked: Checked) -> Packed:
    """Return a copy of which nothing is left, because of bad ids or because it is empty."""
    error = checked.error
    completions = () if error is None else (Completion(error=error),)
    return Packed(checked, Transfer(completions), None, None)


def overflow_words(move: Move, unit: int, device: torch.device) -> torch.Tensor:
    """Return a cleared word for each block of a copy, int32 ``[blocks]``, on the host, where a
    device can write it.

    The completion of the copy has to retain it.
    """
    words = torch.zeros(move.count // unit, dtype=torch.int32, device="cpu")
    return words if device.type == "cpu" else words.pin_memory()


def join_layers(layers: Sequence[Packed], device: torch.device) -> Transfer:
    """Return the transfer of all layers of a copy, in order on one stream. Its error names the
    blocks of all layers that do not fit."""
    joined = Transfer.join([layer.transfer for layer in layers])
    reports = [layer.report for layer in layers if layer.report is not None]
    if not reports:
        return joined
    report = OverflowReport.of_layers(reports)
    # Each layer has its own error, so this completion comes first.
    completion = Completion(error=report()) if device.type == "cpu" else None
    if completion is None:
        pool = event_pool(device)
        completion = Completion(pool.recorded(layers[-1].stream), late_error=report, pool=pool)
        hold(completion)
    return Transfer((completion, *joined.completions), joined, joined.carried)


@dataclass(frozen=True, slots=True)
class OverflowReport:
    """The words of a copy on the host, once it has ended, and the numbers of its blocks.

    A copy by layer has words for each layer.
    """

    words: tuple[torch.Tensor, ...]
    src_blocks: torch.Tensor
    dst_blocks: torch.Tensor
    packs: bool

    @classmethod
    def of(
        cls, move: Move, unit: int, words: torch.Tensor, device: torch.device, packs: bool
    ) -> OverflowReport:
        """Return a report of words; order the copies of ids that only the device has to the
        host."""
        return replace(cls.of_blocks(move, unit, device, packs), words=(words,))

    @classmethod
    def of_blocks(cls, move: Move, unit: int, device: torch.device, packs: bool) -> OverflowReport:
        """Return a report without words, for `error_of`; order the copies of ids that only the
        device has to the host."""
        count = move.count
        src, dst = (
            _to_host(index.units(count, unit, _home(index, device)))
            for index in (move.src_index, move.dst_index)
        )
        return cls((), src, dst, packs)

    @classmethod
    def of_layers(cls, layers: Sequence[OverflowReport]) -> OverflowReport:
        """Return the report of all layers of a copy, which have equal blocks."""
        words = tuple(each for layer in layers for each in layer.words)
        return replace(layers[0], words=words)

    def __call__(self) -> PackOverflow | None:
        """Return the error that names the blocks; None if all of them fit."""
        return self.error_of(np.logical_or.reduce([each.numpy() != 0 for each in self.words]))

    def error_of(self, bad: npt.NDArray[np.bool_]) -> PackOverflow | None:
        """Return the error that names the blocks of a mask; None if it has none."""
        at = np.flatnonzero(bad)
        if not at.size:
            return None
        src = tuple(self.src_blocks.numpy()[at].tolist())
        dst = tuple(self.dst_blocks.numpy()[at].tolist())
        shown = ", ".join(map(str, src[:8])) + (", ..." if len(src) > 8 else "")
        if self.packs:
            return PackOverflow(
                f"Expected blocks whose exponents fit into slots of {PACK!r}, got {len(src)} that "
                f"do not, blocks {shown} of the source. Copy these blocks raw.",
                src,
                dst,
            )
        return PackOverflow(
            f"Expected packed blocks, got {len(src)} that did not fit into slots of {PACK!r} when "
            f"they were packed, blocks {shown} of the source. Copy these blocks raw.",
            src,
            dst,
        )


def _home(index: Index, device: torch.device) -> torch.device:
    """Return where the numbers of an index's blocks are made without waiting for a device."""
    return torch.device("cpu") if index.on_host else device


def _to_host(numbers: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host, filled when the work on the current stream has ended."""
    if numbers.is_cpu:
        return numbers
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu").pin_memory()
    return host.copy_(numbers, non_blocking=True)
