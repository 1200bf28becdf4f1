# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack on a device while one side is elsewhere: slices in staging memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from portakv.copy.context import Context
from portakv.copy.detached import beside
from portakv.copy.launch import follow_current
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.pack_launch import (
    OverflowReport,
    Packed,
    check_copy,
    nothing_packed,
    overflow_words,
)
from portakv.interconnect.link import link_of
from portakv.interconnect.pack_slices import pack_slices, pack_stages
from portakv.interconnect.slices import Sizes, Slice
from portakv.interconnect.staged import Passage
from portakv.interconnect.staging import staging
from portakv.interconnect.strategy import finish
from portakv.plan.move import Move
from portakv.registry import STRATEGIES, PreparedPack, choose
from portakv.runtime import streams
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, Transfer, event_pool, hold
from portakv.view.index import Index
from portakv.view.view import KVView

#: Raw bytes of the largest slice that crosses the link, unless one block has more. While a
#: persistent matmul runs, four such slices hide its gaps, and four of 16 MiB do not (H200).
SLICE = 64 << 20
#: Raw bytes of the first slice while nothing crosses, and the most of a copy in one slice.
SMALLEST = 16 << 20
WHOLE = 32 << 20
#: Issue a plain copy under options.
Submit = Callable[[Move, CopyOptions], Transfer]
_BY_LINK = "staged", "dense rows cross in few large copies"


class StagedPack:
    """A copy that packs or unpacks on a device, of which one side is elsewhere.

    The staging memory holds slices of the far side's encoding. Slices are packed or unpacked on one
    stream and cross on another, so that the two overlap. Everything but the two launches of a slice
    is made once for the copy.

    Args:
        move: the copy.
        options: the caller's options.
        submit: issues the plain copy of a slice, unless the slice crosses by the link itself.
        device: packs or unpacks.

    Raises as `copy_packed` does.
    """

    def __init__(
        self, move: Move, options: CopyOptions, submit: Submit, device: torch.device
    ) -> None:
        self._options = options
        self._submit = submit
        self._device = device
        # A slice leaves the device, unless the destination is there.
        self._leaves = move.dst.device != device
        packed = move.src if move.src.form.encoding else move.dst
        self._unit = packed.form.block_size
        self._context = Context.of(device, options.stream)
        # The ids are used in slices, so that bad ones are left out first.
        self._checked = check_copy(move, self._unit, self._context, options.strict)
        self._move = move = self._checked.move
        self._far = move.dst if self._leaves else move.src
        forced = None if options.backend in STRATEGIES else options.backend
        self._stages = pack_stages(move, self._leaves, choose(device, forced))

    def issue(self) -> Packed:
        """Issue all slices; return the end of the copy."""
        options = self._options
        move = self._move
        if not move.count:
            return nothing_packed(self._checked.error)
        with inside(options.stream):
            current = torch.accelerator.current_stream(self._device.index)
        work = current
        if options.detached:
            work = beside(move, self._context)
            with inside(current):
                follow_current(work, [move])
        else:
            follow_current(options.stream, [move])
        with inside(current):
            words = overflow_words(move, self._unit, self._device)
            crossed = self._pass(work, current, words)
        with inside(work):
            report = OverflowReport.of(move, self._unit, words, not move.src.form.encoding)
        pool = event_pool(self._device)
        completion = Completion(
            event=pool.recorded(work), late_error=report, retained=(move, words), pool=pool
        )
        hold(completion)
        completions = [completion]
        if self._checked.error is not None:
            completions.append(Completion(error=self._checked.error))
        return Packed(Transfer(completions, move, self._carried(crossed)), report, work)

    def _pass(
        self, work: torch.Stream, current: torch.Stream, words: torch.Tensor
    ) -> list[tuple[str, str]]:
        """Issue all slices after ``current``, before the end of ``work``; return what makes them
        cross."""
        move = self._move
        far = self._far
        near, near_index, far_index = move.dst, move.dst_index, move.src_index
        if self._leaves:
            near, near_index, far_index = move.src, move.src_index, move.dst_index
        direct = self._by_link
        cross: _ByLink | _ByCopies
        if direct:
            far_index = far_index.to_host()
            cross = _ByLink(far, self._leaves, self._device)
        else:
            cross = _ByCopies(far, far_index, self._leaves, self._submit, self._options)
        buffers = staging(self._device, work, self._options.detached, packs=True)
        sizes = Sizes(min(WHOLE, SLICE), min(SMALLEST, SLICE), SLICE)
        if not buffers.link.query():  # nothing waits for the first slice
            sizes = sizes._replace(smallest=SLICE)
        slices = pack_slices(self._stages, (near, far), far_index, move.count, sizes, direct)
        unit = self._unit

        def transform(nth: int, ready: PreparedPack, part: Move, stream: torch.Stream) -> None:
            first = slices[nth].cut.start // unit
            own = words[first : first + part.count // unit]
            finish(ready.launch(*part, stream, None, own))

        passage = Passage(self._leaves, buffers, work, slices, transform, cross)
        try:
            with buffers.lock, passage.begun(near_index, current):
                for nth in range(len(slices)):
                    passage.move(nth)
        finally:
            # Also if something failed while slices were in progress.
            streams.completion(self._device, work, *far.retained, words)
        return cross.carried

    @property
    def _by_link(self) -> bool:
        """Return True if slices cross without a strategy that chooses for each of them."""
        options = self._options
        named = options.backend in STRATEGIES or options.max_thread_blocks is not None
        return self._far.form.place == "pinned" and not named

    def _carried(self, crossed: list[tuple[str, str]]) -> tuple[str, str]:
        """Return what executed the copy, in order, and the reasons."""
        both = [self._stages.carried, *crossed]
        if not self._leaves:
            both.reverse()
        how = " and ".join(dict.fromkeys(name for name, _ in both))
        return how, "; ".join(f"{name}: {reason}" for name, reason in both)


class _ByLink:
    """Slices cross between staging memory and pinned memory in pieces that they cache."""

    def __init__(self, far: KVView, leaves: bool, device: torch.device) -> None:
        self.carried = [_BY_LINK]
        self._far = far
        self._leaves = leaves
        self._link = link_of(device)

    def __call__(
        self, each: Slice[PreparedPack], dense: KVView, _: int, stream: torch.Stream
    ) -> None:
        """Copy a slice on a stream."""
        far = self._far
        src, dst = (dense, far) if self._leaves else (far, dense)
        self._link.copy(each.pieces(dense, far, self._link.fold_below), src, dst, stream)


class _ByCopies:
    """Slices cross by plain copies, for which the usual rules choose a strategy."""

    def __init__(
        self, far: KVView, far_index: Index, leaves: bool, submit: Submit, options: CopyOptions
    ) -> None:
        self.carried = list[tuple[str, str]]()
        # A slot is a row: a block is one token then.
        self._tokens = far.form.block_size if far.form.encoding else 1
        self._far = far.as_slots() if far.form.encoding else far
        self._index = far_index.of_blocks(self._tokens) if far.form.encoding else far_index
        self._leaves = leaves
        self._submit = submit
        self._options = replace(
            USUAL,
            backend=options.backend if options.backend in STRATEGIES else None,
            overlap=options.overlap,
            max_thread_blocks=options.max_thread_blocks,
        )

    def __call__(
        self, each: Slice[PreparedPack], dense: KVView, _: int, stream: torch.Stream
    ) -> None:
        """Copy a slice on a stream."""
        cut = each.cut
        far_index = self._index.shifted(cut.start // self._tokens)
        count = cut.count // self._tokens
        if dense.form.encoding:
            dense = dense.as_slots()
        move = Move(self._far, dense, far_index, Index(), count)
        if self._leaves:
            move = Move(dense, self._far, Index(), far_index, count)
        if self._options.stream is not stream:
            self._options = replace(self._options, stream=stream)
        transfer = self._submit(move, self._options)
        if not transfer.ordered:  # no stream orders the use of its memory
            transfer.synchronize()
        if transfer.carried not in self.carried:
            self.carried.append(transfer.carried)
