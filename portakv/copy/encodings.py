# SPDX-License-Identifier: Apache-2.0
"""Copies of which a side is encoded.

Between two sides of one encoding, slots are rows of bytes, which any copy moves (`slots_of`). A
backend packs and unpacks on one device (`copy_packed`); if the other side is elsewhere, slices in
staging memory cross the link. No backend carries out `fp8`: operations of torch convert slices of
blocks in dense memory (`copy_fp8`, `DenseCopy`). A rotation of keys goes through dense memory, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import first_few
from portakv.copy.call import (
    Checked,
    Context,
    Passed,
    Submit,
    beside,
    bring_tables,
    check,
    common_device,
    context_of,
    follow_current,
    without_bad_ids,
    without_left_out,
)
from portakv.copy.fp8 import decode_rows, encode_rows
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import USUAL, CopyOptions
from portakv.core.link import Cut
from portakv.errors import PackOverflow, PortaKVError, Unsupported
from portakv.interconnect.slices import Cross, PackStages, Sizes, issue_slices, pack_stages
from portakv.layout.encodings import FP8, PACK
from portakv.plan.packing import Move, PackPlan, check_sides
from portakv.registry import STRATEGIES, choose
from portakv.registry.prepared import Prepared, prepared
from portakv.runtime.devices import inside
from portakv.runtime.transfer import (
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    hold,
)
from portakv.view.form import Form
from portakv.view.index import Index
from portakv.view.view import KVView, dense_blocks

#: Raw bytes of the largest slice that crosses the link packed, unless one block has more. While a
#: persistent matmul runs, four such slices hide its gaps, and four of 16 MiB do not (H200).
PACK_SLICE = 64 << 20
#: Raw bytes of the first slice while nothing crosses, and the most of a copy in one slice.
SMALLEST = 16 << 20
WHOLE = 32 << 20
#: The values of a slice in `fp8`, unless one block has more. The memory of a slice is at most 32
#: bytes for each: the rows and slots, and temporary tensors.
FP8_SLICE = 8 << 20


def copy_encoded(
    move: Move,
    options: CopyOptions,
    began: float,
    submit: Submit,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of which a side is encoded; raise as `copy_packed` and `copy_fp8`.

    ``submit`` issues plain copies. ``passed``: the checks that the copy passed just now, as a part.
    None: check it.
    """
    src = move.src.form.encoding
    dst = move.dst.form.encoding
    if src and dst:
        return submit(slots_of(move), replace(options, reinterpret=False, late=None), passed)
    if (src or dst)[0].encoding == FP8:
        return copy_fp8(move, options, began, submit)
    return copy_packed(move, options, began, submit, passed)


# --- Whole blocks, and slots as rows of bytes -----------------------------------------------------


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
    check_whole(move, size)
    indices = (move.src_index, move.dst_index)
    src_index, dst_index = (each.of_blocks(size) for each in indices)
    rows = Move(move.src.as_slots(), move.dst.as_slots(), src_index, dst_index, move.count // size)

    # Ids on a device that passed a check are not read again.
    if move.is_clean:
        rows.mark_clean()
    return rows


def check_whole(move: Move, size: int) -> None:
    """Raise `Unsupported` unless a copy moves whole blocks of ``size`` tokens."""
    for form in (move.src.form, move.dst.form):
        if form.paged and form.block_size != size:
            raise Unsupported(
                f"A copy between packed blocks of {size} tokens and blocks of {form.block_size}",
                "a packed block moves only whole; make the block sizes equal",
            )
    offsets = move.src_index.offset % size or move.dst_index.offset % size
    if move.count % size or offsets or not {*move.steps} <= {0, size}:
        raise Unsupported(
            f"A copy of {move.count} tokens with a packed side, by ids of "
            f"{' and '.join(map(str, move.steps))} tokens",
            f"a packed block moves only whole; ask for whole blocks of {size} tokens by "
            "copy_blocks",
        )


def _described(form: Form) -> str:
    planes = sorted({str(plane) for plane in form.encoding})
    name = form.encoding[0].encoding
    return f"blocks of {form.block_size} tokens packed by {name!r}, {', '.join(planes)}"


# --- Pack and unpack ------------------------------------------------------------------------------


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


def copy_packed(
    move: Move,
    options: CopyOptions,
    began: float,
    submit: Submit,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy of which one side is packed and the other side is raw.

    The arguments are those of `copy_encoded`.

    Raises:
        Unsupported: rows that the encoding does not take, a part of a block, or an option that no
            such copy keeps.
        PortaKVError: as `copy_rows`.
    """
    _refuse(options, ("max_gbps", "cancellable"), "A copy that packs or unpacks", repr(PACK))
    packed = move.src.form if move.src.form.encoding else move.dst.form
    check_whole(move, packed.block_size)
    if options.by_layer:
        PackPlan(move.src.form, move.dst.form, *move.steps)  # a layer of each side may not tell
    context = context_of(passed, _home_of(move), options.stream)
    context.check_no_graph(f"{PACK!r} reports blocks that do not fit to the host")
    if passed is None:
        passed = check(move, context, options.strict)
    if not options.by_layer:
        whole = _transform(move, options, submit, context, passed)
        return BlockTransfer.of_move(whole.transfer, move, began)
    layers: list[Packed] = []
    used = move
    for at in range(move.src.layers):
        layer = _transform(used.layer(at), options, submit, context, passed)
        used, passed = without_left_out(used, passed, layer.checked.move, layer.checked.error)
        layers.append(layer)
    ends = tuple(layer.transfer for layer in layers)
    joined = Transfer.join(ends)
    reports = [layer.report for layer in layers if layer.report is not None]
    if reports:
        # One error names the blocks of all layers that do not fit. Layers have equal blocks.
        words = tuple(each for report in reports for each in report.words)
        report = replace(reports[0], words=words)
        # Each layer has its own error, so this completion comes first.
        end = _end_with(report, context.device, layers[-1].stream)
        joined = Transfer((*end, *joined.completions), joined, joined.carried)
    return BlockTransfer.of_move(joined, move, began, ends)


def _refuse(options: CopyOptions, names: Sequence[str], what: str, subject: str) -> None:
    """Raise `Unsupported` for options that a copy with an encoding does not keep."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise Unsupported(
                f"{what} with {name}",
                f"{subject} moves whole blocks in one piece; leave {name} out",
            )


def _home_of(move: Move) -> torch.device:
    """Return the device that changes the rows: that of both sides, the accelerator of one side, or
    the destination's of two."""
    if move.src.device.type != "cpu" != move.dst.device.type:
        return move.dst.device
    return common_device(move.src, move.dst)


def _transform(
    move: Move,
    options: CopyOptions,
    submit: Submit,
    context: Context,
    passed: Passed,
) -> Packed:
    """Pack or unpack on the device of both sides, or on the one that is an accelerator.

    ``passed``: the checks of the copy.
    """
    src = move.src
    dst = move.dst
    if src.device != dst.device or src.form.place == "peer":
        if options.detached and src.device.type != "cpu" != dst.device.type:
            raise Unsupported(
                "A detached copy that packs or unpacks between two devices",
                "a stream of the source's device waits for it; leave detached out",
            )
        return _issue_staged(move, options, submit, context, passed)

    choice = choose(src.device, options.backend)
    ready = prepared(src.form, dst.form, *move.steps, None, choice, PackPlan)
    checked = without_bad_ids(move, ready.plan.unit, passed, context, [ready.can])
    if not checked.move.count:
        return _nothing_packed(checked)
    if not options.detached or context.device.type == "cpu":
        return _launch(checked, ready, context)
    side = beside(checked.move, context)
    with inside(context.stream):
        return _launch(checked, ready, context._replace(stream=side))


def _launch(checked: Checked, ready: Prepared, context: Context) -> Packed:
    """Launch a checked copy on one device, on the context's stream."""
    move = checked.move
    device, stream, captured = context
    on_device = device.type != "cpu"
    placed = ready.place_both(move)
    if on_device:
        bring_tables(move, ready.tables, device, captured)
        follow_current(stream, [placed])
    word: StatusWord | None = None
    if on_device and (checked.guarded or (ready.can.guards and not move.ids_on_host)):
        word = acquire_word()
    with inside(device if stream is None else stream):
        overflow = overflow_words(move, ready.plan.unit, device)
        try:
            status = None if word is None else word.tensor
            pending = ready.pack(placed, stream, status, overflow)
            packs = not move.src.form.encoding
            report = OverflowReport.of(move, ready.plan.unit, device, packs, overflow)
        except BaseException:  # also an interrupt; kernels that run may write the words
            if on_device:
                hold(Completion.after(device, stream, retained=(placed, overflow)))
            raise

    pendings: list[Pending] = [] if pending is None else [pending]
    if not (on_device or pendings):
        ends = _ends_with(checked.error or report())
        return Packed(checked, Transfer(ends, None, ready.carried), report, stream)
    completion = Completion.after(
        device,
        stream,
        pendings=pendings,
        words=() if word is None else [(word, 0)],
        error=checked.error,
        retained=(move.src, move.dst, placed, overflow),
    )
    completion.late_error = report
    hold(completion)
    rows = (move.src, move.dst, placed)
    return Packed(checked, Transfer((completion,), rows, ready.carried), report, stream)


def _nothing_packed(checked: Checked) -> Packed:
    """Return a copy of which nothing is left, because of bad ids or because it is empty."""
    return Packed(checked, Transfer(_ends_with(checked.error)), None, None)


def _ends_with(error: PortaKVError | None) -> tuple[Completion, ...]:
    """Return the end of a copy that has an error now; none without an error."""
    return () if error is None else (Completion(error=error),)


def _end_with(
    report: Callable[[], PortaKVError | None], device: torch.device, stream: torch.Stream | None
) -> tuple[Completion, ...]:
    """Return the end of the work on a stream with the error that a report returns after it."""
    if device.type == "cpu":
        return _ends_with(report())
    completion = Completion.after(device, stream)
    completion.late_error = report
    hold(completion)
    return (completion,)


# --- Blocks that do not fit -----------------------------------------------------------------------


def overflow_words(move: Move, unit: int, device: torch.device) -> torch.Tensor:
    """Return a cleared word for each block of a copy, int32 ``[blocks]``, on the host, where a
    device can write it.

    The completion of the copy has to retain it.
    """
    words = torch.zeros(move.count // unit, dtype=torch.int32, device="cpu")
    return words if device.type == "cpu" else words.pin_memory()


@dataclass(frozen=True, slots=True)
class OverflowReport:
    """The numbers of a copy's blocks on the host, and its words once it has ended.

    A copy by layer has words for each layer.
    """

    src_blocks: torch.Tensor
    dst_blocks: torch.Tensor
    packs: bool
    words: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, move: Move, unit: int, device: torch.device, packs: bool, *words: torch.Tensor
    ) -> OverflowReport:
        """Return the report of a copy in blocks of ``unit`` tokens.

        Numbers that only the device has are sent to the host, ordered on the current stream.
        """
        numbers = []
        for index in (move.src_index, move.dst_index):
            # Numbers are made without waiting for a device.
            home = torch.device("cpu") if index.on_host else device
            numbers.append(to_host(index.units(move.count, unit, home)))
        src, dst = numbers
        return cls(src, dst, packs, words)

    def __call__(self) -> PackOverflow | None:
        """Return the error that names the blocks of words; None if all of them fit."""
        return self.error_of(np.logical_or.reduce([each.numpy() != 0 for each in self.words]))

    def error_of(self, bad: npt.NDArray[np.bool_]) -> PackOverflow | None:
        """Return the error that names the blocks of a mask; None if it has none."""
        at = np.flatnonzero(bad)
        if not at.size:
            return None
        src = tuple(self.src_blocks.numpy()[at].tolist())
        dst = tuple(self.dst_blocks.numpy()[at].tolist())
        shown = first_few(src)
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


def to_host(numbers: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host, filled when the work on the current stream has ended."""
    if numbers.is_cpu:
        return numbers
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu").pin_memory()
    return host.copy_(numbers, non_blocking=True)


# --- Pack and unpack in slices that cross a link --------------------------------------------------


def _issue_staged(
    move: Move, options: CopyOptions, submit: Submit, context: Context, passed: Passed
) -> Packed:
    """Issue a checked copy that packs or unpacks on the context's device, of which one side is
    elsewhere.

    ``passed``: its checks. ``submit`` issues the plain copy of a slice, unless the slice crosses by
    the link itself.

    Raises as `copy_packed` does.
    """
    device = context.device
    leaves = move.dst.device != device
    packed = move.src if move.src.form.encoding else move.dst
    # A named strategy says only how rows cross.
    named = options.backend in STRATEGIES
    choice = choose(device, None if named else options.backend)
    stages = pack_stages(move, leaves, choice)  # refuses what cannot be executed
    # The ids are used in slices, so that bad ones are left out first.
    checked = without_bad_ids(move, packed.form.block_size, passed, context)
    move = checked.move
    if not move.count:
        return _nothing_packed(checked)

    far = move.dst if leaves else move.src
    cross: _ByCopies | None = None
    crossed_by = [("staged", "dense rows cross in few large copies")]
    if far.form.place != "pinned" or named or options.max_thread_blocks is not None:
        far_index = move.dst_index if leaves else move.src_index
        cross = _ByCopies(far, far_index, leaves, submit, options, device)
        crossed_by = cross.carried
    return _issue_slices(checked, stages, cross, crossed_by, context, options.detached)


def _issue_slices(
    checked: Checked,
    stages: PackStages,
    cross: Cross | None,
    crossed_by: list[tuple[str, str]],
    context: Context,
    detached: bool,
) -> Packed:
    """Issue all slices; return the end of the copy.

    ``crossed_by``: what executed the copies across the link and why, once they are issued.
    """
    move = checked.move
    device = context.device
    unit = stages.plan.unit
    with inside(context.stream):
        current = torch.accelerator.current_stream(device.index)
    work = current
    if detached:
        work = beside(move, context)
        with inside(current):
            follow_current(work, [move])
    else:
        follow_current(context.stream, [move])
    with inside(current):
        words = overflow_words(move, unit, device)
        sizes = Sizes(min(WHOLE, PACK_SLICE), min(SMALLEST, PACK_SLICE), PACK_SLICE)
        issue_slices(move, stages, cross, sizes, (current, work), words)
    with inside(work):
        report = OverflowReport.of(move, unit, device, not move.src.form.encoding, words)
    completion = Completion.after(device, work, retained=(move, words))
    completion.late_error = report
    hold(completion)
    ends = (completion, *_ends_with(checked.error))
    both = [stages.carried, *crossed_by]
    if not stages.downward:
        both.reverse()
    how = " and ".join(dict.fromkeys(name for name, _ in both))
    why = "; ".join(f"{name}: {reason}" for name, reason in both)
    return Packed(checked, Transfer(ends, move, (how, why)), report, work)


class _ByCopies:
    """Slices of a checked copy cross by plain copies, for which the usual rules choose a strategy.

    Args:
        far: the side that is elsewhere, with its index, which has no bad ids.
        leaves: slices leave the device.
        submit: issues a copy.
        options: of the whole copy.
        device: it packs or unpacks.

    Attributes:
        carried: what executed the copies and why, as `Transfer.carried`.
    """

    def __init__(
        self,
        far: KVView,
        far_index: Index,
        leaves: bool,
        submit: Submit,
        options: CopyOptions,
        device: torch.device,
    ) -> None:
        self.carried = list[tuple[str, str]]()
        self._tokens = 1
        self._far = far
        self._index = far_index
        if far.form.encoding:  # a slot is a row, and a block is one token
            self._tokens = far.form.block_size
            self._far = far.as_slots()
            self._index = far_index.of_blocks(self._tokens)
        self._leaves = leaves
        self._submit = submit
        self._device = device
        self._options = replace(
            USUAL,
            backend=options.backend if options.backend in STRATEGIES else None,
            overlap=options.overlap,
            max_thread_blocks=options.max_thread_blocks,
        )

    def __call__(self, cut: Cut, dense: KVView, nth: int, stream: torch.Stream) -> None:
        """Copy a slice on a stream."""
        far_index = self._index.shifted(cut.start // self._tokens)
        count = cut.count // self._tokens
        if dense.form.encoding:
            dense = dense.as_slots()
        move = Move(self._far, dense, far_index, Index(), count)
        if self._leaves:
            move = Move(dense, self._far, Index(), far_index, count)
        if self._options.stream is not stream:
            self._options = replace(self._options, stream=stream)
        move.mark_clean()
        passed = Passed(False, context=Context(self._device, stream, captured=False))
        transfer = self._submit(move, self._options, passed)
        if not transfer.ordered:  # no stream orders the use of its memory
            transfer.synchronize()
        if transfer.carried not in self.carried:
            self.carried.append(transfer.carried)


# --- Rows that change in dense memory -------------------------------------------------------------


class DenseSlice(NamedTuple):
    """The plain copies of a slice.

    Attributes:
        first: the position at which the slice starts.
        fetched: brings its rows to dense memory.
        left: take them to the destination; several or none if blocks are left out.
    """

    first: int
    fetched: Transfer
    left: Sequence[Transfer]


class DenseCopy:
    """A copy whose rows change in dense memory of one device.

    A plain copy brings rows there, operations of torch change them, and a plain copy takes them to
    the destination. So every layout, backend and transfer strategy works on both sides.

    Args:
        move: the copy.
        options: the caller's options.
        submit: issues plain copies.
        unit: tokens that no bad id cuts, such as those of a block.
        what: the change of the rows, as a phrase for errors and reports.

    Attributes:
        device: it changes the rows: that of both sides, or the accelerator of one side.
        move: the copy without blocks of bad ids.

    Raises:
        Unsupported: inside graph capture.
        PortaKVError: as `copy_rows`, for the memory and the ids of the copy.
    """

    def __init__(
        self, move: Move, options: CopyOptions, submit: Submit, unit: int, what: str
    ) -> None:
        self.device = _home_of(move)
        self._options = options
        self._submit = submit
        self._unit = unit
        self._what = what
        context = Context.of(self.device, options.stream)
        context.check_no_graph(f"{what} goes through temporary memory")
        # The ids are used in slices, so that bad ones are left out first.
        checked = without_bad_ids(move, unit, check(move, context, options.strict), context)
        self.move = checked.move
        self._error = checked.error
        # Plain copies are parts of this copy, on the stream that is current when they are issued.
        self._passed = Passed(False, context=context._replace(stream=None))

    def issue(self, slices: Callable[[], Iterable[DenseSlice]], move: Move) -> Transfer:
        """Issue all slices of the copy, or of a layer; return their plain copies as one transfer.

        ``slices`` issues the copy in slices, and yields the plain copies of each.
        """
        stream = self._options.stream
        listed: list[DenseSlice] = []
        ends: list[Transfer] = []
        if move.count:
            follow_current(stream, [move])
            # Dense memory belongs to the stream that changes it.
            with inside(self.device if stream is None else stream):
                listed = [*slices()]
                ends = self._ends(listed, move)
        made = [copy for each in listed for copy in (each.fetched, *each.left)]
        reported = Transfer(_ends_with(self._error))
        joined = Transfer.join([*made, reported])
        completions = [end for each in [*ends, reported] for end in each.completions]
        carried = dict.fromkeys(one.carried for one in made[:2])
        how = " and ".join(dict.fromkeys(name for name, _ in carried)) or joined.carried[0]
        reasons = [f"{name}: {reason}" for name, reason in carried]
        reasons.append(f"{self._what} by operations of torch on {self.device}")
        return Transfer(completions, (joined,), (how, "; ".join(reasons)))

    def copy(self, move: Move) -> Transfer:
        """Copy rows or slots to or from dense memory, on the current stream."""
        options = self._options
        crosses = move.src.device != move.dst.device
        across = self.move.src.device != self.move.dst.device
        named = options.backend is not None
        if across:  # one of the two copies crosses the link, and takes the name of a strategy
            named = named and crosses == (options.backend in STRATEGIES)
        plain = CopyOptions(
            backend=options.backend if named else None,
            overlap=options.overlap if crosses else "compute",
            max_thread_blocks=options.max_thread_blocks if crosses else None,
        )
        move.mark_clean()
        transfer = self._submit(move, plain, self._passed)
        if not transfer.ordered:  # no stream orders the use of the dense memory
            _wait_for_end(transfer)
        return transfer

    def _ends(self, slices: Sequence[DenseSlice], move: Move) -> list[Transfer]:
        """Return the transfers that end with the slices, on the current stream.

        A plain copy that packs or unpacks numbers blocks by their places in dense memory. One
        error for all slices, with the caller's numbers, stands for the errors of such copies.
        """
        fetched = [each.fetched for each in slices]
        left = [copy for each in slices for copy in each.left]
        unpacks = is_packed(move.src.form)
        packs = is_packed(move.dst.form)
        if not (unpacks or packs):
            return [*fetched, *left]

        plain = left if unpacks else fetched
        packed = fetched if unpacks else left
        first_blocks = [each.first // self._unit for each in slices]
        copies = [*zip(first_blocks, packed, strict=True)]
        numbers = OverflowReport.of(move, self._unit, self.device, packs)
        report = partial(_error_of_slices, numbers, move.count // self._unit, copies)
        # Its event is recorded last, so that all slices have ended when the report is read.
        return [Transfer(_end_with(report, self.device, self._options.stream)), *plain]


def is_packed(form: Form) -> bool:
    """Return True if slots of a form may hold a flag in place of rows."""
    return bool(form.encoding) and form.encoding[0].encoding == PACK


def unfit_blocks(fetched: Transfer) -> list[int]:
    """Wait for a copy that unpacks to dense memory; return the places there of blocks that did not
    fit when they were packed."""
    _wait_for_end(fetched)
    errors = [end.error for end in fetched.completions]
    return [at for error in errors if isinstance(error, PackOverflow) for at in error.dst_blocks]


def _wait_for_end(transfer: Transfer) -> None:
    """Wait for a transfer. Its errors are left to the handle of the whole copy."""
    for completion in transfer.completions:
        completion.synchronize()


def _error_of_slices(
    numbers: OverflowReport, blocks: int, copies: Sequence[tuple[int, Transfer]]
) -> PortaKVError | None:
    """Return the error that names the blocks of all slices that do not fit; None if all do.

    Args:
        numbers: has the caller's numbers of all ``blocks``.
        copies: for each slice its first block, and its copy that packs or unpacks, which has ended.
    """
    bad = np.zeros(blocks, np.bool_)
    for first, copy in copies:
        _wait_for_end(copy)  # this reads its words
        for completion in copy.completions:
            error = completion.error
            if isinstance(error, PackOverflow):
                places = error.src_blocks if numbers.packs else error.dst_blocks
                bad[[first + place for place in places]] = True
            elif error is not None:
                return error
    return numbers.error_of(bad)


# --- fp8 ------------------------------------------------------------------------------------------


def copy_fp8(move: Move, options: CopyOptions, began: float, submit: Submit) -> BlockTransfer:
    """Issue a copy of which one side is in `fp8` and the other side is raw.

    ``submit`` issues plain copies.

    Raises:
        Unsupported: rows that the encoding does not take, a part of a block, an option that no such
            copy keeps, or inside graph capture.
        PortaKVError: as `copy_rows`.
    """
    refused = ("max_gbps", "cancellable", "detached")
    _refuse(options, refused, f"A copy to or from {FP8!r}", "it")
    src = move.src.form
    dst = move.dst.form
    raw, encoded = (dst, src) if src.encoding else (src, dst)
    check_whole(move, encoded.block_size)
    check_sides(raw, encoded, "decode" if src.encoding else "encode")
    # All layers are checked before the first is written.
    dense = DenseCopy(move, options, submit, encoded.block_size, repr(FP8))
    if not options.by_layer:
        return BlockTransfer.of_move(_converted(dense, dense.move), move, began)
    layers = [_converted(dense, dense.move.layer(at)) for at in range(move.src.layers)]
    return BlockTransfer.of_move(Transfer.join(layers), move, began, tuple(layers))


def _converted(dense: DenseCopy, move: Move) -> Transfer:
    """Issue a checked copy, or a layer of it, that encodes or decodes on one device."""
    encodes = not move.src.form.encoding
    encoded = move.dst.form if encodes else move.src.form
    unit = encoded.block_size
    convert = encode_rows if encodes else decode_rows

    def slices() -> Iterator[DenseSlice]:
        values = sum(plane.values for plane in encoded.encoding)
        most = FP8_SLICE // (encoded.layers * encoded.heads * values)
        blocks = max(1, min(most, move.count // unit))
        forms = move.src.form, move.dst.form
        near, far = (dense_blocks(form, unit, blocks, dense.device) for form in forms)
        for first in range(0, move.count, blocks * unit):
            part = move.part(first, min(blocks * unit, move.count - first))
            fetched = dense.copy(Move(part.src, near, part.src_index, Index(), part.count))
            chosen = slice(0, part.count // unit)
            pairs = zip(encoded.encoding, near.tensors, far.tensors, strict=True)
            for plane, source, target in pairs:
                convert(source[chosen].flatten(0, 2), target[chosen].flatten(0, 2), plane)
            left = dense.copy(Move(far, part.dst, Index(), part.dst_index, part.count))
            yield DenseSlice(first, fetched, [left])

    return dense.issue(slices, move)
