# SPDX-License-Identifier: Apache-2.0
"""Issue one copy: check it, decide who executes it, place its ids, launch it, return its end.

`submit` chooses the schedule of a copy. This module has the schedules that the calling thread
issues: a whole copy, its layers one by one, and a detached copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import NamedTuple, TypeAlias

import torch

from portakv.backends.base import Capabilities
from portakv.copy.handle import BlockTransfer
from portakv.copy.options import CopyOptions
from portakv.errors import DeviceMismatch, SlotError, Unsupported
from portakv.interconnect.choose import across
from portakv.interconnect.peer import reached
from portakv.interconnect.strategy import Strategy, Terms
from portakv.plan.plan import CopyPlan, Move, check_disjoint
from portakv.registry.prepared import Picks, Prepared, bring_table, prepared
from portakv.registry.registry import Choice
from portakv.runtime import streams
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.streams import check_stream, side_stream
from portakv.runtime.transfer import (
    Completion,
    Pending,
    StatusWord,
    Transfer,
    acquire_word,
    bad_slot,
    hold,
    hold_memory,
)
from portakv.view.index import Index
from portakv.view.view import KVView, check_writable

_HOST = torch.device("cpu")  # a comparison takes an eighth of the time of a look at the type
UNCHECKED = "its ids have to be checked before they are used"  # inside graph capture

# --- Where and when -------------------------------------------------------------------------------


class Context(NamedTuple):
    """The surroundings of a copy.

    Attributes:
        device: it executes the copy.
        stream: where the work is ordered; None: the device's current stream.
        captured: the current stream of the device records a graph.
    """

    device: torch.device
    stream: torch.Stream | None
    captured: bool

    @classmethod
    def of(cls, device: torch.device, stream: torch.Stream | None) -> Context:
        """Return the surroundings of a call; raise `DeviceMismatch` for another device's stream."""
        if stream is not None:
            check_stream(stream, device)
        return cls(device, stream, device != _HOST and capturing(device))

    def check_may_slice(self) -> None:
        """Raise `Unsupported` inside graph capture, before ids of a copy in slices are read."""
        if self.captured:
            why = "the host issues them while the copy runs; leave out cancellable and max_gbps"
            raise refuse_capture("A copy in slices", why)

    def check_no_graph(self, why: str) -> None:
        """Raise as `check_not_captured`, also if the given stream records a graph."""
        captured = self.captured
        if self.stream is not None and not captured:
            with inside(self.stream):
                captured = capturing(self.device)
        self._replace(captured=captured).check_not_captured(why)

    def check_not_captured(self, why: str) -> None:
        """Raise `Unsupported` inside graph capture, before anything is enqueued."""
        if self.captured:
            todo = "capture a copy with a capturable backend and contiguous device ids of a dtype"
            raise refuse_capture("A copy", f"{why}; {todo} that it reads")


# --- Who executes it ------------------------------------------------------------------------------


def common_device(src: KVView, dst: KVView) -> torch.device:
    """Return the device that executes a copy: the accelerator if one side is on it."""
    if src.device == dst.device or dst.device.type == "cpu":
        return src.device
    if src.device.type == "cpu":
        return dst.device
    raise DeviceMismatch(
        f"Expected a copy on one device, between it and the host, or between two devices of one "
        f"type, got {src.device} as source and {dst.device} as destination. Go through a host "
        f"buffer."
    )


def executor_of(src: KVView, dst: KVView, choice: Choice, terms: Terms | None) -> Choice:
    """Return what executes a copy on a caller's terms.

    That is the chosen backend if it reaches both places, else a transfer strategy. A worker keeps
    the rate. A copy asks once: whatever it is cut into has the same executor.

    Raises:
        DeviceMismatch: a view lies on a device that has no part in the copy.
        Unsupported: nothing here keeps the terms.
    """
    own_device = choice.backend.device
    devices = {src.device, dst.device}
    if devices - {own_device, torch.device("cpu")} or own_device not in devices:
        raise DeviceMismatch(
            f"Expected a source and a destination on {own_device}, which runs the copy, or on the "
            f"host, got a source on {src.device} and a destination on {dst.device}. Make a "
            f"connector for their device."
        )
    if src.form.place == "peer":
        return reached(src, choice, terms or Terms())
    if isinstance(choice.backend, Strategy):
        return choice if terms is None else across(choice, terms)
    if src.device != dst.device and (src.form.place, dst.form.place) not in choice.can.places:
        return across(choice, terms)
    if terms is not None and terms.max_thread_blocks is not None:
        raise Unsupported(
            f"Expected no max_thread_blocks for a copy from {src.device} to {dst.device} by "
            f"{choice.name!r}, got max_thread_blocks={terms.max_thread_blocks}",
            "only kernels that read or write host memory keep the limit. Leave it out",
        )
    return choice


# --- Check and decide -----------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a copy, with what executes it.

    Attributes:
        ready: the backend, or the strategy that was picked for the part.
        carried: its name, and the reason for the choice.
        first: the position in the whole copy at which the part begins.
        move: the part.
        picks: what picked the strategy; None: nothing did.
    """

    ready: Prepared
    carried: tuple[str, str]
    first: int
    move: Move
    picks: Picks | None


class Passed(NamedTuple):
    """The checks of memory and ids that a copy passed. Each part of the copy passes them, too.

    Attributes:
        skips: ids on the host skip positions.
        error: the error of ids that were left out of the copy.
        context: the surroundings of a plain copy that is a part. None: its call determines them.
    """

    skips: bool
    error: SlotError | None = None
    context: Context | None = None


#: Issue a copy under options, with the checks that it passed as a part; None: check it.
Submit: TypeAlias = Callable[[Move, CopyOptions, Passed | None], BlockTransfer]


def context_of(passed: Passed | None, device: torch.device, stream: torch.Stream | None) -> Context:
    """Return the surroundings that a part of a copy was given, or else those of its call.

    Raises as `Context.of`.
    """
    known = None if passed is None else passed.context
    return Context.of(device, stream) if known is None else known


class Settled(NamedTuple):
    """A copy with all decisions about it.

    Attributes:
        move: the copy, without units that have bad ids.
        pieces: who executes which part; none if nothing is left to move.
        error: the error that the transfer raises for ids that were left out.
        guarded: ids are to be checked where they are read.
    """

    move: Move
    pieces: Sequence[Piece]
    error: SlotError | None
    guarded: bool


def settle(
    move: Move,
    choice: Choice,
    context: Context,
    *,
    passed: Passed | None = None,
    strict: bool = False,
) -> Settled:
    """Decide how a copy that its indices and views cover is made; move nothing.

    Args:
        choice: what executes it, as `executor_of` decides.
        passed: the checks that the copy passed just now, alone or as a part. None: check it.
        strict: check ids on a device before anything is moved, which waits for them.

    Raises as `copy_rows`.
    """
    if passed is None:
        check_views(move)
    ready = prepared(move.src.form, move.dst.form, *move.steps, None, choice)
    if move.count == 0:
        return Settled(move, (), None if passed is None else passed.error, False)

    known = Passed(check_ids(move, context, strict)) if passed is None else passed
    error = known.error
    guarded = known.skips or not move.is_clean
    pieces = _pieces(ready, move, choice, context)
    if guarded:
        cans = [each.ready.can for each in pieces]
        unit = max(each.ready.plan.unit for each in pieces)
        move, error, guarded = without_bad_ids(move, unit, known, context, cans)
        if not guarded:  # no id is bad now
            if move.count == 0:
                return Settled(move, (), error, False)
            ready = prepared(move.src.form, move.dst.form, *move.steps, None, choice)
            pieces = _pieces(ready, move, choice, context)

    if passed is None:
        check_disjoint(move)
    if context.captured:
        _check_capture(pieces, context)
    return Settled(move, pieces, error, guarded)


def _pieces(ready: Prepared, move: Move, choice: Choice, context: Context) -> list[Piece]:
    """Return the body of a copy in the largest units, and its head and tail by token; pick a
    strategy for each if its launch does so for each copy."""
    pieces = []
    for first, tokens, unit in ready.plan.split(move):
        used = ready
        if unit != ready.plan.unit:
            used = prepared(move.src.form, move.dst.form, *move.steps, unit, choice)
        part = move.part(first, tokens)
        carried = used.carried
        # Inside a capture nothing can be prepared.
        picks = None if context.captured else used.picks
        if picks is not None:
            used, carried = picks.picked_for(part)
        pieces.append(Piece(used, carried, first, part, picks))
    return pieces


def check_ids(move: Move, context: Context, strict: bool) -> bool:
    """Return True if ids on the host skip positions; with ``strict``, wait for ids on a device and
    check them in the same way.

    Raises:
        SlotError: a slot past the end, or a destination that occurs twice.
        Unsupported: inside graph capture, if it had to wait.
    """
    src_index = move.src_index
    dst_index = move.dst_index
    if strict and not (src_index.on_host and dst_index.on_host):
        context.check_not_captured(UNCHECKED)
        src_index = src_index.to_host()
        dst_index = dst_index.to_host()
    skips = src_index.check(move.count, move.src.slots, "source")
    return dst_index.check(move.count, move.dst.slots, "destination", distinct=True) or skips


class Checked(NamedTuple):
    """A copy whose ids were checked.

    Attributes:
        move: the copy, without units that have bad ids if the backends do not skip them.
        error: the error of ids that were left out.
        guarded: the backends skip or report bad ids.
    """

    move: Move
    error: SlotError | None
    guarded: bool


def without_bad_ids(
    move: Move, unit: int, passed: Passed, context: Context, cans: Sequence[Capabilities] = ()
) -> Checked:
    """Leave bad ids out of a checked copy in units of ``unit`` tokens.

    Waits at most once for ids on a device.

    Args:
        passed: its checks.
        cans: the capabilities of the backends that read the ids, which may skip bad ids themselves.
            None of them: they do not.

    Raises:
        Unsupported: inside graph capture, if it had to wait.
    """
    clean = move.is_clean
    if clean and not passed.skips:
        return Checked(move, passed.error, False)
    if cans and all(can.skips_negative and (clean or can.guards) for can in cans):
        return Checked(move, passed.error, True)
    context.check_not_captured(UNCHECKED)
    moved, error = drop_bad_ids(move, unit)
    return Checked(moved, passed.error or error, False)


def drop_bad_ids(move: Move, unit: int) -> tuple[Move, SlotError | None]:
    """Return a copy without the units that have a negative id or one past the end on either side,
    and the error that names the first id past the end.

    It waits once for the device if ids are there. If nothing is dropped, no later check is needed.
    """
    src, dst, src_index, dst_index, count = move

    # Units divide the offsets and the count, so that none is cut.
    unit = gcd(unit, src_index.offset, dst_index.offset, count)
    listed = src_index.ids if dst_index.ids is None else dst_index.ids
    device = src.device if listed is None else listed.device

    # An index without ids is a range, whose length was checked.
    good = []
    for index, view in ((src_index, src), (dst_index, dst)):
        if index.ids is not None:
            numbers = index.units(count, unit, device)
            good.append((numbers >= 0) & (numbers < view.slots // unit))
    usable = (good[0] & good[-1]).nonzero()[:, 0]
    if usable.numel() * unit == count:
        move.mark_clean()
        return move, None

    # Negative ids are padding: only an id past the end is an error.
    read = src_index.units(count, unit, device)
    written = dst_index.units(count, unit, device)
    bad = read >= src.slots // unit
    error = None
    at = (bad | (written >= dst.slots // unit)).nonzero()[:, 0]
    if at.numel():
        first = int(at[0])
        numbers, view = (read, src) if bool(bad[first]) else (written, dst)
        error = bad_slot(first * unit, int(numbers[first]) * unit, view.slots)

    indices = Index(read[usable], step=unit), Index(written[usable], step=unit)
    rest = Move(src, dst, *indices, usable.numel() * unit)
    rest.mark_clean()
    return rest, error


def without_left_out(
    move: Move, passed: Passed, done: Move, error: SlotError | None
) -> tuple[Move, Passed]:
    """Return a copy and its checks without the positions that one of its layers left out.

    All layers have the same bad ids, which are read once.

    Args:
        done: the layer, without its bad ids.
        error: the error of ids that were left out.
    """
    if done.count == move.count:
        return move, passed
    rest = Move(move.src, move.dst, done.src_index, done.dst_index, done.count)
    return rest, passed._replace(skips=False, error=error)


def _check_capture(pieces: Sequence[Piece], context: Context) -> None:
    for ready, _, _, move, _ in pieces:
        if not ready.can.capturable:
            context.check_not_captured(f"backend {ready.choice.name!r} cannot be captured")
        for index in (move.src_index, move.dst_index):
            if not index.has_ids_on(ready.ids_device, ready.can.index_dtypes):
                context.check_not_captured("its ids would have to be copied first")


def layer_of(move: Move, layer: int) -> Move:
    """Return one layer of a copy; raise as the whole copy if the sides have different numbers."""
    if move.src.layers != move.dst.layers:
        CopyPlan(move.src.form, move.dst.form, *move.steps)
    return move.layer(layer)


def check(move: Move, context: Context, strict: bool) -> Passed:
    """Check the memory and the ids of a copy whose parts are settled one by one.

    Raises as `settle`.
    """
    check_views(move)
    check_disjoint(move)
    return Passed(bool(move.count) and check_ids(move, context, strict))


def check_rows(move: Move, context: Context, strict: bool) -> Passed:
    """Check the destination and the ids of a copy between views whose memory exists and is not
    shared, which the caller knows.

    Raises as `settle`.
    """
    skips = bool(move.count) and check_ids(move, context, strict)
    check_writable(move.dst)
    return Passed(skips)


def check_views(move: Move) -> None:
    """Raise if memory was replaced, or cannot be written."""
    check_writable(move.dst)
    move.src.check_memory()
    move.dst.check_memory()


# --- Launch ---------------------------------------------------------------------------------------


def launch(settled: Settled, context: Context) -> Transfer:
    """Launch every piece after the current stream's work, or on the context's stream after that.

    Inside graph capture with a stream the capture forks there, and `Transfer.wait` joins it.
    """
    pieces = settled.pieces
    error = settled.error
    if not pieces:
        return Transfer(() if error is None else (Completion(error=error),))
    return _Launching(settled, context).transfer()


class _Launching:
    """The launch of the pieces of one copy.

    On the host most copies have ended when their launch returns, and no ids need a guard.
    """

    __slots__ = (
        "_context",
        "_host",
        "_pendings",
        "_placed",
        "_settled",
        "_words",
    )

    def __init__(self, settled: Settled, context: Context) -> None:
        self._settled = settled
        self._context = context
        self._placed: list[Move] = []  # the parts, with their ids where launches read them
        self._host: tuple[torch.Tensor, ...] = ()  # memory that nothing else retains
        self._words: list[tuple[StatusWord, int]] = []
        self._pendings: list[Pending] = []

    def transfer(self) -> Transfer:
        """Launch every piece, and return the end of the copy."""
        settled = self._settled
        carried: tuple[str, str] | None = None
        try:
            for piece in settled.pieces:
                executed = self._launch(piece)
                carried = carried or executed
        except BaseException:  # also an interrupt; what was launched may still run
            if self._host:
                self._hold(None)
            raise
        assert carried is not None
        move = settled.move
        retained = (move.src, move.dst, self._placed)
        device, stream, captured = self._context
        if captured:
            # The graph may write these words at every replay, so they are never given back.
            return streams.captured(device, stream, retained, self._words, carried)
        if device == _HOST and not (self._pendings or settled.error):
            return Transfer((), None, carried)
        return Transfer((self._hold(settled.error),), retained, carried)

    def _launch(self, piece: Piece) -> tuple[str, str]:
        """Launch one piece; return what executed it, which needs no memory of the device if the
        strategy that was picked got none."""
        try:
            self._enqueue(piece.ready, piece.first, piece.move)
        except torch.OutOfMemoryError:
            instead = None if piece.picks is None else piece.picks.instead_of(piece.carried)
            if instead is None:
                raise
            self._enqueue(instead[0], piece.first, piece.move)
            return instead[1]
        return piece.carried

    def _enqueue(self, ready: Prepared, first: int, move: Move) -> None:
        """Place the ids of a part, order its stream after the current one, and launch it.

        A backend that guards ids gets a status word if it has ids that the host has not checked.
        """
        device, stream, captured = self._context
        part = ready.place_both(move)
        self._placed.append(part)
        if captured:  # a graph's memory belongs to its owner, so no allocator records it
            streams.follow_current(stream)
        else:
            if True in ready.tables:
                bring_tables(move, ready.tables, device)
            if stream is not None:
                follow_current(stream, [part])
        word = None
        guarded = self._settled.guarded or (ready.can.guards and not move.ids_on_host)
        if guarded and device != _HOST:
            status = acquire_word()
            self._words.append((status, first))  # it counts from its own start
            word = status.tensor
        if captured or not ready.unowned:
            pending = ready.launch(*part, stream, word)
        else:
            self._host = *self._host, *memory_of_host(move.src, move.dst)
            pending = ready.bare(*part, stream, word)
        if pending is not None:
            self._pendings.append(pending)

    def _hold(self, error: SlotError | None) -> Completion:
        """Return the completion of all that was launched, which retains what the launches use.

        The allocator knows the ids' memory by the stream on which they were brought, which may be
        another one. Nothing else retains a peer's memory while this device reads it, nor memory of
        the host of an unowned launch.
        """
        device, stream, _ = self._context
        peer = self._settled.move.src.form.place == "peer"
        retained: object = (self._host, self._placed)
        if not (self._pendings or peer):  # the memory of the device may go before the end
            retained = (self._host, [part[2:4] for part in self._placed])  # both indices
        ends = self._pendings, self._words, error, retained
        completion = Completion.after(device, stream, *ends)
        # Either queue gives the event back if the handle is dropped. Only a word or other work
        # brings an error, which `LateErrors` look for among the copies in flight.
        memory = peer or self._host
        if memory:
            hold_memory(completion)
        if self._words or self._pendings or not memory:
            hold(completion)
        return completion


def memory_of_host(src: KVView, dst: KVView) -> tuple[torch.Tensor, ...]:
    """Return what retains the memory of the sides of a copy that are not on its device."""
    sides = [view for view in (src, dst) if view.form.place != "device"]
    return tuple([memory for view in sides for memory in view.retained])


def bring_tables(
    move: Move, tables: tuple[bool, bool], device: torch.device, captured: bool = False
) -> None:
    """Have the tables of addresses on the device that backends read there.

    ``tables``: for each side, whether its table is read. ``captured``: as for `bring_table`.
    """
    for view, read in zip((move.src, move.dst), tables, strict=True):
        if read and view.device == device:
            bring_table(view, device, captured=captured)


def follow_current(stream: torch.Stream | None, moves: Sequence[Move]) -> None:
    """Make ``stream`` wait for the current stream, and tell the allocator which memory of two views
    it uses. None: it is the current stream."""
    if stream is None:
        return
    src = moves[0].src
    dst = moves[0].dst
    tables = [table for view in (src, dst) if (table := view.table_on(stream.device)) is not None]
    indices = [index for move in moves for index in (move.src_index, move.dst_index)]
    ids = [index.ids for index in indices if index.ids is not None]
    views = (*src.used_on(stream), *dst.used_on(stream))
    streams.follow_current(stream, *views, *ids, *tables)


# --- Layer by layer, and detached -----------------------------------------------------------------

_calls = threading.local()  # of each thread: what is to be called


@contextmanager
def calling_for_layers(call: Callable[[int, Transfer], None]) -> Iterator[None]:
    """Have copies by layer that this thread issues call a function with the number and the end of
    each layer, once it is issued and before the next one is."""
    before = getattr(_calls, "call", None)
    _calls.call = call
    try:
        yield
    finally:
        _calls.call = before


def in_layers(
    move: Move,
    choice: Choice,
    context: Context,
    strict: bool,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue one layer after another; arguments and errors are those of `settle`."""
    if passed is None:
        passed = check(move, context, strict)
    call = getattr(_calls, "call", None)
    layers = []
    used = move
    for i in range(move.src.layers):
        settled = settle(layer_of(used, i), choice, context, passed=passed)
        used, passed = without_left_out(used, passed, settled.move, settled.error)
        layers.append(launch(settled, context))
        if call is not None:
            call(i, layers[-1])
    return BlockTransfer.of_move(Transfer.join(layers), move, began, tuple(layers))


def detached(
    move: Move,
    choice: Choice,
    context: Context,
    options: CopyOptions,
    began: float,
    passed: Passed | None = None,
) -> BlockTransfer:
    """Issue a copy that begins after the current stream, or after the given one, which does not
    wait for its end.

    Raises:
        Unsupported: while a graph is captured.
        PortaKVError: as `settle`, whose ``passed`` it takes.
    """
    side = beside(move, context)
    with inside(context.stream):
        aside = context._replace(stream=side)
        if options.by_layer:
            return in_layers(move, choice, aside, options.strict, began, passed)
        settled = settle(move, choice, aside, passed=passed, strict=options.strict)
        return BlockTransfer.of_move(launch(settled, aside), move, began)


def beside(move: Move, context: Context) -> torch.Stream:
    """Return the stream of a detached copy. The given stream follows the current one; the copy
    makes its stream follow the given one.

    Raises:
        Unsupported: while a graph is captured.
    """
    device = context.device
    with inside(context.stream):
        # The context knows the current stream; a given stream may record a graph as well.
        if context.captured or (context.stream is not None and capturing(device)):
            why = "a graph has no work that its stream does not wait for; leave out detached"
            raise refuse_capture("A detached copy", why)
        begins_after = torch.accelerator.current_stream(device.index)
    follow_current(context.stream, [move])
    return side_stream(begins_after, move.src.form.place, move.dst.form.place)
