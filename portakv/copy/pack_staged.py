# SPDX-License-Identifier: Apache-2.0
"""Copies that pack or unpack on a device while one side is elsewhere: slices in staging memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from portakv.copy.context import Context
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.pack_launch import Checked, check_copy, follow_current, launch_pack
from portakv.copy.pack_stage import stage_of
from portakv.copy.packed_slots import slots_of
from portakv.plan.move import Move
from portakv.registry import STRATEGIES, PreparedPack, choose, prepared_pack
from portakv.runtime.devices import inside
from portakv.runtime.streams import side_stream
from portakv.runtime.transfer import Completion, Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

#: Raw bytes of a slice that crosses the link, unless one block has more. Two slices are in staging
#: memory at a time.
SLICE = 64 << 20
#: Issue a plain copy under options.
Submit = Callable[[Move, CopyOptions], Transfer]


class StagedPack:
    """A copy that packs or unpacks on a device, of which one side is elsewhere.

    The staging memory holds slices of the far side's encoding. It is packed or unpacked on the
    caller's stream, and copied on a second stream, so that the two overlap.

    Args:
        move: the copy.
        options: the caller's options.
        submit: issues the plain copy of a slice.
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
        forced = None if options.backend in STRATEGIES else options.backend
        self._choice = choose(device, forced)
        context = Context.of(device, options.stream)
        # The ids are used in slices, so that bad ones are left out first.
        self._checked = check_copy(move, self._unit, context, options.strict)
        self._move = self._checked.move

    def issue(self) -> Transfer:
        """Issue all slices; return their transfers as one."""
        options = self._options
        work = options.stream or torch.accelerator.current_stream(self._device.index)
        follow_current(options.stream, [self._move])
        made: list[Transfer] = []
        # Staging memory belongs to the stream that packs or unpacks.
        with inside(work):
            spans, stages = self._stages()
            self._prepared(stages[0])  # refuse now what cannot be executed
            link = work
            if len(spans) > 1:
                link = side_stream(work, "pack", "out" if self._leaves else "in")
            issue = self._out if self._leaves else self._in
            issue(spans, stages, work, link, made)
            work.wait_stream(link)
        error = self._checked.error
        if error is not None:
            made.append(Transfer((Completion(error=error),)))
        joined = Transfer.join(made)
        carried = dict.fromkeys(one.carried for one in made[:2])
        how = " and ".join(dict.fromkeys(name for name, _ in carried)) or joined.carried[0]
        why = "; ".join(f"{name}: {reason}" for name, reason in carried)
        return Transfer(joined.completions, (joined, stages), (how, why))

    def _stages(self) -> tuple[list[tuple[int, int]], list[KVView]]:
        """Return the first position and the tokens of each slice, and staging memory for two."""
        move = self._move
        far = move.dst if self._leaves else move.src
        near = move.src if self._leaves else move.dst
        raw = near if far.form.encoding else far
        unit = self._unit
        blocks = max(1, min(SLICE // (unit * raw.form.token_bytes), move.count // unit))
        tokens = blocks * unit
        spans = [(at, min(tokens, move.count - at)) for at in range(0, move.count, tokens)]
        stages = [
            stage_of(far.form, raw.form, unit, blocks, self._device)
            for _ in range(2 if len(spans) > 1 else 1)
        ]
        return spans, stages

    def _out(
        self,
        spans: list[tuple[int, int]],
        stages: list[KVView],
        work: torch.Stream,
        link: torch.Stream,
        made: list[Transfer],
    ) -> None:
        """Pack or unpack each slice into staging memory, then copy it away."""
        crossed: list[Transfer] = []
        for nth, (first, count) in enumerate(spans):
            stage = stages[nth % len(stages)]
            part = self._move.part(first, count)
            if nth >= len(stages):  # its last copy has left the memory
                crossed[nth - len(stages)].wait(work)
            staged = Move(part.src, stage, part.src_index, Index(), count)
            made.append(self._transform(staged, part))
            crossed.append(self._cross(Move(stage, part.dst, Index(), part.dst_index, count), link))
            made.append(crossed[-1])

    def _in(
        self,
        spans: list[tuple[int, int]],
        stages: list[KVView],
        work: torch.Stream,
        link: torch.Stream,
        made: list[Transfer],
    ) -> None:
        """Copy each slice into staging memory, then pack or unpack it.

        The copy of a slice is issued before the slice before it is unpacked: it follows the work
        that is then on the stream, which has freed its memory.
        """
        crossed: list[Transfer] = []
        for nth in range(len(spans) + 1):
            if nth < len(spans):
                first, count = spans[nth]
                part = self._move.part(first, count)
                stage = stages[nth % len(stages)]
                crossed.append(
                    self._cross(Move(part.src, stage, part.src_index, Index(), count), link)
                )
                made.append(crossed[-1])
            if nth:
                first, count = spans[nth - 1]
                part = self._move.part(first, count)
                stage = stages[(nth - 1) % len(stages)]
                crossed[nth - 1].wait(work)
                staged = Move(stage, part.dst, Index(), part.dst_index, count)
                made.append(self._transform(staged, part))

    def _transform(self, move: Move, part: Move) -> Transfer:
        """Pack or unpack a slice of a part of the copy on the current stream."""
        ready = self._prepared(move.dst if self._leaves else move.src)
        context = Context(self._device, None, captured=False)
        return launch_pack(Checked(move, None, False), ready, context, part)

    def _prepared(self, stage: KVView) -> PreparedPack:
        """Return the prepared copy between the near side and staging memory."""
        near = (self._move.src if self._leaves else self._move.dst).form
        src_step, dst_step = self._move.steps
        if self._leaves:
            return prepared_pack(near, stage.form, src_step, 0, self._choice)
        return prepared_pack(stage.form, near, 0, dst_step, self._choice)

    def _cross(self, move: Move, link: torch.Stream) -> Transfer:
        """Copy a slice between staging memory and the far side, as it is."""
        options = self._options
        backend = options.backend if options.backend in STRATEGIES else None
        plain = replace(
            USUAL,
            backend=backend,
            stream=link,
            overlap=options.overlap,
            max_thread_blocks=options.max_thread_blocks,
        )
        if move.src.form.encoding:
            move = slots_of(move)
        transfer = self._submit(move, plain)
        if not transfer.ordered:  # no stream orders the use of its memory
            transfer.synchronize()
        return transfer
