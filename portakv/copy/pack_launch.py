# SPDX-License-Identifier: Apache-2.0
"""Launch a copy that packs or unpacks on one device, and report the blocks that do not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from portakv.backends.base import Capabilities
from portakv.copy.context import Context
from portakv.copy.launch import bring_tables
from portakv.copy.launch import follow_current as follow_current
from portakv.copy.settle import check_ids, check_memory, drop_bad_ids
from portakv.errors import PackOverflow, PortaKVError
from portakv.layout.packing import PACK
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
    error: PortaKVError | None
    guarded: bool


def check_copy(
    move: Move, unit: int, context: Context, strict: bool, can: Capabilities | None = None
) -> Checked:
    """Check the memory and the ids of a copy in blocks of ``unit`` tokens.

    ``can``: the capabilities of the backend that reads the ids. None: bad ids are left out, which
    waits for ids on a device once.

    Raises as `settle`, and `Unsupported` inside graph capture.
    """
    context.check_not_captured(f"{PACK!r} reports blocks that do not fit to the host")
    check_memory(move)
    skips = check_ids(move, context, strict)
    clean = move.src_index.is_clean(move.count, move.src.slots)
    clean = clean and move.dst_index.is_clean(move.count, move.dst.slots)
    if clean and not skips:
        return Checked(move, None, False)
    if can is not None and can.skips_negative and (clean or can.guards):
        return Checked(move, None, True)
    moved, error = drop_bad_ids(move, unit)
    return Checked(moved, error, False)


def issue_pack(move: Move, ready: PreparedPack, context: Context, strict: bool) -> Transfer:
    """Check a copy on one device and launch it; its transfer reports blocks that do not fit."""
    checked = check_copy(move, ready.plan.unit, context, strict, ready.can)
    if checked.move.count:
        return launch_pack(checked, ready, context, checked.move)
    error = checked.error
    return Transfer(() if error is None else (Completion(error=error),))


def launch_pack(checked: Checked, ready: PreparedPack, context: Context, named: Move) -> Transfer:
    """Launch a copy that is checked, on the context's stream.

    ``named``: the copy whose blocks a report names. A side of the launched one may be staging
    memory.
    """
    move, error, guarded = checked
    device, stream, _ = context
    on_device = device.type != "cpu"
    placed = ready.place_both(move)
    if on_device:
        bring_tables(move, ready.tables, device)
        follow_current(stream, [placed])
    word: StatusWord | None = None
    if on_device and (guarded or (ready.can.guards and not move.ids_on_host)):
        word = acquire_word()
    with inside(device if stream is None else stream):
        blocks = move.count // ready.plan.unit
        overflow = torch.zeros(blocks, dtype=torch.int32, device=device)
        status = None if word is None else word.tensor
        pending = ready.launch(*placed, stream, status, overflow)
        report = _Report.of(named, ready.plan.unit, overflow, ready.plan.packs)
    pendings: list[Pending] = [] if pending is None else [pending]
    if not (on_device or pendings):
        error = error or report()
        completions = () if error is None else (Completion(error=error),)
        return Transfer(completions, None, ready.carried)
    pool = event_pool(device) if on_device else None
    completion = Completion(
        event=None if pool is None else pool.recorded(stream),
        pendings=pendings,
        words=() if word is None else [(word, 0)],
        error=error,
        late_error=report,
        retained=(move.src, move.dst, placed, overflow),
        pool=pool,
    )
    hold(completion)
    return Transfer((completion,), (move.src, move.dst, placed), ready.carried)


@dataclass(frozen=True, slots=True)
class _Report:
    """The words of a copy on the host, once it has ended, and the numbers of its blocks."""

    words: torch.Tensor
    src_blocks: torch.Tensor
    dst_blocks: torch.Tensor
    packs: bool

    @classmethod
    def of(cls, move: Move, unit: int, overflow: torch.Tensor, packs: bool) -> _Report:
        """Order the copies of the words, and of ids that only the device has, to the host."""
        count = move.count
        src, dst = (
            _to_host(index.units(count, unit, _home(index, overflow.device)))
            for index in (move.src_index, move.dst_index)
        )
        return cls(_to_host(overflow), src, dst, packs)

    def __call__(self) -> PackOverflow | None:
        """Return the error that names the blocks; None if all of them fit."""
        at = np.flatnonzero(self.words.numpy())
        if not at.size:
            return None
        src = tuple(self.src_blocks.numpy()[at].tolist())
        dst = tuple(self.dst_blocks.numpy()[at].tolist())
        shown = ", ".join(map(str, src[:8])) + (", ..." if len(src) > 8 else "")
        if self.packs:
            return PackOverflow(
                f"Expected blocks whose exponents fit into slots of {PACK!r}, got {len(src)} that "
                f"do not, blocks {shown} of the source. Copy these blocks raw. A copy by layer, "
                f"or of several slices, names those of the first part that has any.",
                src,
                dst,
            )
        return PackOverflow(
            f"Expected packed blocks, got {len(src)} that did not fit into slots of {PACK!r} when "
            f"they were packed, blocks {shown} of the source. Copy these blocks raw. A copy by "
            f"layer, or of several slices, names those of the first part that has any.",
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
