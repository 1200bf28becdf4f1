# SPDX-License-Identifier: Apache-2.0
"""Copies whose rows change in dense memory of one device.

A plain copy brings them there, operations of torch change them, and a plain copy takes them to the
destination.

So every layout, backend and transfer strategy works on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from portakv.copy.call import (
    Context,
    Passed,
    Submit,
    check,
    common_device,
    follow_current,
    note_clean,
)
from portakv.copy.dense_overflow import end_of_packed, is_packed, wait_for_end
from portakv.copy.options import CopyOptions
from portakv.copy.pack_launch import without_bad_ids
from portakv.plan.move import Move
from portakv.registry import STRATEGIES
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, Transfer


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


#: Issue a copy in slices; yield the plain copies of each.
Slices = Callable[[], Iterable[DenseSlice]]


class DenseCopy:
    """A copy through dense memory of one device.

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
        both = move.src.device.type != "cpu" != move.dst.device.type
        self.device = move.dst.device if both else common_device(move.src, move.dst)
        self._options = options
        self._submit = submit
        self._unit = unit
        self._what = what
        context = Context.of(self.device, options.stream)
        context.check_no_graph(f"{what} goes through temporary memory")
        # The ids are used in slices, so that bad ones are left out first.
        checked = without_bad_ids(move, unit, check(move, context, options.strict))
        self.move = checked.move
        self._error = checked.error
        # Plain copies are parts of this copy, on the stream that is current when they are issued.
        self._passed = Passed(False, context=context._replace(stream=None))

    def issue(self, slices: Slices, move: Move) -> Transfer:
        """Issue all slices of the copy, or of a layer; return their plain copies as one
        transfer."""
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
        reported = Transfer(() if self._error is None else (Completion(error=self._error),))
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
        note_clean(move)
        transfer = self._submit(move, plain, self._passed)
        if not transfer.ordered:  # no stream orders the use of the dense memory
            wait_for_end(transfer)
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
        end = end_of_packed(move, self._unit, copies, self.device, self._options.stream)
        return [end, *plain]
