# SPDX-License-Identifier: Apache-2.0
"""Copies whose rows change in dense memory of one device.

A plain copy brings them there, operations of torch change them, and a plain copy takes them to the
destination.

So every layout, backend and transfer strategy works on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from portakv.copy.between import common_device
from portakv.copy.context import Context
from portakv.copy.handle import BlockTransfer
from portakv.copy.launch import follow_current
from portakv.copy.options import CopyOptions
from portakv.copy.pack_launch import without_bad_ids
from portakv.copy.settle import check
from portakv.plan.move import Move
from portakv.registry import STRATEGIES
from portakv.runtime.devices import inside
from portakv.runtime.transfer import Completion, Transfer

#: Issue a plain copy under options.
Submit = Callable[[Move, CopyOptions], BlockTransfer]
#: Issue a copy in slices; yield the two plain copies of each.
Slices = Callable[[Move], Iterable[tuple[Transfer, Transfer]]]


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
        self._what = what
        context = Context.of(self.device, options.stream)
        context.check_not_captured(f"{what} goes through temporary memory")
        # The ids are used in slices, so that bad ones are left out first.
        checked = without_bad_ids(move, unit, check(move, context, options.strict).skips)
        self.move = checked.move
        self._error = checked.error

    def issue(self, slices: Slices) -> Transfer:
        """Issue all slices; return their plain copies as one transfer."""
        stream = self._options.stream
        made: list[Transfer] = []
        if self.move.count:
            follow_current(stream, [self.move])
            # Dense memory belongs to the stream that changes it.
            with inside(self.device if stream is None else stream):
                for fetched, left in slices(self.move):
                    made += fetched, left
        reported = Transfer(() if self._error is None else (Completion(error=self._error),))
        joined = Transfer.join([*made, reported])
        carried = dict.fromkeys(one.carried for one in made[:2])
        how = " and ".join(dict.fromkeys(name for name, _ in carried)) or joined.carried[0]
        reasons = [f"{name}: {reason}" for name, reason in carried]
        reasons.append(f"{self._what} by operations of torch on {self.device}")
        return Transfer(joined.completions, (joined,), (how, "; ".join(reasons)))

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
        transfer = self._submit(move, plain)
        if not transfer.ordered:  # no stream orders the use of the dense memory
            transfer.synchronize()
        return transfer
