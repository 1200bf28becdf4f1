# SPDX-License-Identifier: Apache-2.0
"""Copies of which a side is packed.

Between two packed sides slots are rows of bytes, and any copy moves them. Between a raw side and a
packed side the rows are packed or unpacked on one device. If the other side is elsewhere, its
encoding is produced or read in staging memory of the device, and a plain copy crosses the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from portakv.copy.between import common_device
from portakv.copy.context import Context
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import bring_tables, follow_current
from portakv.copy.options import USUAL, CopyOptions
from portakv.copy.settle import check_ids, check_memory, drop_bad_ids
from portakv.errors import PackOverflow, PortaKVError, Unsupported
from portakv.layout.packing import PACK, Pack
from portakv.plan.move import Move
from portakv.registry.prepared import PreparedPack, prepared_pack
from portakv.registry.registry import STRATEGIES, choose
from portakv.runtime.devices import inside
from portakv.runtime.streams import side_stream
from portakv.runtime.transfer import (
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    event_pool,
    hold,
)
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView

#: Raw bytes of a slice that crosses the link, unless one block has more. Two slices are in staging
#: memory at a time.
SLICE = 64 << 20
#: Issue a copy under options.
Submit = Callable[[Move, CopyOptions], BlockTransfer]


def slots_of(move: Move) -> Move:
    """Return a copy between two packed sides as a copy of rows of bytes, one for each slot.

    Raises:
        Unsupported: other parameters or block sizes, or a part of a block.
    """
    src = move.src.form
    dst = move.dst.form
    if src.encoding != dst.encoding or src.block_size != dst.block_size:
        raise Unsupported(
            f"A copy from {_described(src)} to {_described(dst)}",
            "packed blocks are copied as they are; unpack them to a raw view and pack them again",
        )
    size = src.block_size
    indices = (move.src_index, move.dst_index)
    _check_whole(move, size)
    src_index, dst_index = (each.of_blocks(size) for each in indices)
    return Move(move.src.as_slots(), move.dst.as_slots(), src_index, dst_index, move.count // size)


def pack_or_unpack(
    move: Move, options: CopyOptions, began: float, submit: Submit
) -> BlockTransfer:
    """Issue a copy between a raw side and a packed side.

    ``submit`` issues the plain copy across a link.

    Raises:
        Unsupported: rows that the encoding does not take, a part of a block, or an option that no
            such copy keeps.
        PortaKVError: as `copy_rows`.
    """
    src = move.src
    dst = move.dst
    packed = src.form if src.form.encoding else dst.form
    _refuse_options(options)
    _check_whole(move, packed.block_size)
    if src.device == dst.device and src.form.place != "peer":
        choice = choose(src.device, options.backend)
        context = Context.of(choice.backend.device, options.stream)
        ready = prepared_pack(src.form, dst.form, *move.steps, choice)
        transfer = _issue(move, ready, context, options.strict)
    else:
        transfer = _Staged(move, options, submit).issue()
    return BlockTransfer(transfer, move, began)


def _refuse_options(options: CopyOptions) -> None:
    """Raise `Unsupported` for an option that a copy that packs or unpacks does not keep."""
    kept = {
        "by_layer": options.by_layer,
        "max_gbps": options.max_gbps is not None,
        "cancellable": options.cancellable,
        "detached": options.detached,
    }
    for name, wanted in kept.items():
        if wanted:
            raise Unsupported(
                f"A copy that packs or unpacks with {name}",
                f"{PACK!r} moves whole blocks in one piece; leave {name} out",
            )


def _check_whole(move: Move, size: int) -> None:
    """Raise `Unsupported` unless a copy moves whole blocks of ``size`` tokens."""
    for form in (move.src.form, move.dst.form):
        if form.paged and form.block_size != size:
            raise Unsupported(
                f"A copy between packed blocks of {size} tokens and blocks of {form.block_size}",
                "a packed block moves only whole; make the block sizes equal",
            )
    tokens = [move.count, move.src_index.offset, move.dst_index.offset]
    steps = [step for step in move.steps if step]
    if any(number % size for number in tokens) or any(step != size for step in steps):
        raise Unsupported(
            f"A copy of {move.count} tokens with a packed side, by ids of "
            f"{' and '.join(map(str, move.steps))} tokens",
            f"a packed block moves only whole; ask for whole blocks of {size} tokens by copy_blocks",
        )


def _described(form: Form) -> str:
    planes = {f"{x.values} values in {x.slot_bytes} B ({x.code_bits} bits)" for x in form.encoding}
    return f"blocks of {form.block_size} tokens packed by {PACK!r}, {', '.join(sorted(planes))}"


def _issue(move: Move, ready: PreparedPack, context: Context, strict: bool) -> Transfer:
    """Check a copy on one device and launch it; its transfer reports blocks that do not fit."""
    context.check_not_captured(f"{PACK!r} reports blocks that do not fit to the host")
    check_memory(move)
    skips = check_ids(move, context, strict)
    error: PortaKVError | None = None
    clean = move.src_index.is_clean(move.count, move.src.slots)
    clean = clean and move.dst_index.is_clean(move.count, move.dst.slots)
    can = ready.can
    guarded = skips or not clean
    if guarded and not (can.skips_negative and (clean or can.guards)):
        guarded = False
        move, error = drop_bad_ids(move, ready.plan.unit)
    if not move.count:
        return Transfer(() if error is None else (Completion(error=error),))
    return _launch(move, ready, context, guarded, error)


def _launch(
    move: Move,
    ready: PreparedPack,
    context: Context,
    guarded: bool,
    error: PortaKVError | None,
) -> Transfer:
    """Launch a copy that is checked; ``error`` is that of ids that were left out."""
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
        report = _Report.of(move, ready.plan.unit, overflow, ready.plan.packs)
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
        report=report,
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
                f"do not, blocks {shown} of the source; all others were packed. Copy these blocks "
                f"raw.",
                src,
                dst,
            )
        return PackOverflow(
            f"Expected packed blocks, got {len(src)} that did not fit into slots of {PACK!r} when "
            f"they were packed, blocks {shown} of the source; all others were unpacked. Copy these "
            f"blocks raw.",
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


class _Staged:
    """A copy that packs or unpacks on a device, of which one side is elsewhere.

    The staging memory holds slices of the far side's encoding. It is packed or unpacked on the
    caller's stream, and copied on a second stream, so that the two overlap.
    """

    def __init__(self, move: Move, options: CopyOptions, submit: Submit) -> None:
        src = move.src
        dst = move.dst
        self._options = options
        self._submit = submit
        both = src.device.type != "cpu" != dst.device.type
        self._device = dst.device if both else common_device(src, dst)
        # A slice leaves the device, unless the destination is there.
        self._leaves = dst.device != self._device
        self._far, self._near = (dst, src) if self._leaves else (src, dst)
        packed = src.form if src.form.encoding else dst.form
        self._unit = packed.block_size
        context = Context.of(self._device, options.stream)
        context.check_not_captured(f"{PACK!r} stages the rows of another place")
        forced = None if options.backend in STRATEGIES else options.backend
        self._choice = choose(self._device, forced)
        # The ids are used in slices: bad ones are left out first, which waits for the device once.
        check_memory(move)
        skips = check_ids(move, context, options.strict)
        clean = move.src_index.is_clean(move.count, src.slots)
        clean = clean and move.dst_index.is_clean(move.count, dst.slots)
        self._error: PortaKVError | None = None
        if skips or not clean:
            move, self._error = drop_bad_ids(move, self._unit)
        self._move = move

    def issue(self) -> Transfer:
        """Issue all slices; return their transfers as one."""
        stage, blocks = self._stage()
        self._prepared(stage)  # refuse now what cannot be executed
        stages = [stage]
        spans = list(self._spans(blocks))
        if len(spans) > 1:
            stages.append(self._stage()[0])
        made: list[Transfer] = []
        options = self._options
        device = self._device
        current = torch.accelerator.current_stream(device.index)
        work = options.stream or current
        follow_current(options.stream, [self._move])
        with inside(work):
            link = side_stream(work, "pack", "out" if self._leaves else "in")
            if len(spans) == 1:
                link = work
            issue = self._out if self._leaves else self._in
            issue(spans, stages, work, link, made)
            work.wait_stream(link)
        if self._error is not None:
            made.append(Transfer((Completion(error=self._error),)))
        joined = Transfer.join(made)
        carried = [one.carried for one in made[:2]]
        how = " and ".join(dict.fromkeys(each[0] for each in carried)) or joined.carried[0]
        why = "; ".join(f"{name}: {reason}" for name, reason in dict.fromkeys(carried))
        return Transfer(joined.completions, (joined, stages), (how, why))

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
            made.append(self._transform(Move(part.src, stage, part.src_index, Index(), count)))
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
                made.append(self._transform(Move(stage, part.dst, Index(), part.dst_index, count)))

    def _transform(self, move: Move) -> Transfer:
        """Pack or unpack a slice on the current stream."""
        ready = self._prepared(move.dst if self._leaves else move.src)
        context = Context(self._device, None, captured=False)
        return _launch(move, ready, context, guarded=False, error=None)

    def _prepared(self, stage: KVView) -> PreparedPack:
        """Return the prepared copy between the near side and staging memory."""
        near = self._near.form
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

    def _spans(self, blocks: int) -> Iterator[tuple[int, int]]:
        """Yield the first position and the tokens of each slice."""
        tokens = blocks * self._unit
        for first in range(0, self._move.count, tokens):
            yield first, min(tokens, self._move.count - first)

    def _stage(self) -> tuple[KVView, int]:
        """Return staging memory of the far side's encoding, and the blocks that it holds."""
        form = self._far.form
        raw = self._near.form if form.encoding else form
        blocks = max(1, min(SLICE // (self._unit * raw.token_bytes), self._move.count // self._unit))
        dims = [width // 2 for width in raw.widths]
        declared: dict[str, Any] = {"kv": form.kv, "block_size": self._unit, "dim": dims}
        shapes = [(self._unit, dim) for dim in dims]
        inner = "token dim"
        dtype = torch.bfloat16
        if form.encoding:
            declared["encoding"] = _parameters(form)
            shapes = [(width,) for width in form.widths]
            inner = "page"
            dtype = torch.uint8
        if len(set(dims)) == 1:
            size = (blocks, form.layers, form.kv, form.heads, *shapes[0])
            tensor = torch.empty(size, dtype=dtype, device=self._device)
            return KVView(tensor, f"block layer kv head {inner}", **declared), blocks
        tensors = [
            torch.empty(
                (blocks, form.layers, form.heads, *shape), dtype=dtype, device=self._device
            )
            for shape in shapes
        ]
        return KVView(tensors, f"kv | block layer head {inner}", **declared), blocks


def _parameters(form: Form) -> Pack:
    """Return the parameters that a packed form was made with."""
    first = form.encoding[0]
    made = first.parameters
    same = all(made.plane(plane.values) == plane for plane in form.encoding)
    return made if same else Pack(first.code_bits)  # slots of the usual size for each width
