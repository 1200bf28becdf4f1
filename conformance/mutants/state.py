# SPDX-License-Identifier: Apache-2.0
"""Mutants that remember what they should not, and that say that they are done too early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from portakv import Index, KVView
from portakv.backends.base import Pending
from portakv.plan.plan import Side
from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.mutants.base import Call, HostRows, Int64, Pair, Runs, store

_LATE = 0.02  # seconds that work in the background takes


class _Remembering(HostRows):
    def carry(self, call: Call) -> Pending | None:
        return super().carry(self.recalled(self.state.setdefault(call.plan, call), call))

    def recalled(self, first: Call, call: Call) -> Call:
        """Return the call, mixed up with the first one."""
        raise NotImplementedError


@_Remembering.mutate("recalled")
def StalePointerTable(right: HostRows, first: Call, call: Call) -> Call:
    """The addresses of a cache are kept for its form, so one that was reallocated is not seen."""
    same = call.src.form.block_size and call.src.slots == first.src.slots
    return replace(call, src=first.src) if same else call


@_Remembering.mutate("recalled")
def StaleDestination(right: HostRows, first: Call, call: Call) -> Call:
    """The addresses of a destination are kept for its form: the second chunk goes to the first."""
    return replace(call, dst=first.dst) if call.dst.slots == first.dst.slots else call


def _first_of(right: HostRows, view: KVView, address: np.int64) -> Int64:
    retained: dict[object, Int64] = right.state
    return retained.setdefault((view.form, len(view.addresses), address), view.addresses)


@HostRows.mutate("table")
def TableOfTheFirstTensor(right: HostRows, view: KVView) -> Int64:
    """The table of a cache is kept under its first tensor's address."""
    return _first_of(right, view, view.addresses[0])


@HostRows.mutate("table")
def TableOfTheLastTensor(right: HostRows, view: KVView) -> Int64:
    """The table of a cache is kept under its last tensor's address."""
    return _first_of(right, view, view.addresses[-1])


@HostRows.mutate("table")
def TableOfTheSameTensors(right: HostRows, view: KVView) -> Int64:
    """The table of a cache is kept under the sum of its addresses, whatever their order."""
    return _first_of(right, view, view.addresses.sum())


@_Remembering.mutate("recalled")
def IndicesOfTheFirstCall(right: HostRows, first: Call, call: Call) -> Call:
    """A second call with as many ids as the first uses the ids of the first."""
    src = _recalled(first.src_index, call.src_index)
    return replace(call, src_index=src, dst_index=_recalled(first.dst_index, call.dst_index))


def _recalled(first: Index, index: Index) -> Index:
    return first if (first.length, first.offset) == (index.length, index.offset) else index


@_Remembering.mutate("recalled")
def CountOfTheFirstCall(right: HostRows, first: Call, call: Call) -> Call:
    """The grid of the first call is used again: of a longer list the end is not moved."""
    return replace(call, count=min(call.count, first.count))


@HostRows.mutate("ids")
def DevicesByDefault(right: HostRows, ids: torch.Tensor) -> Int64:
    """New tensors lie on torch's default device, which may differ from the device of the copy."""
    return right.ids(ids[torch.arange(ids.numel())])


@HostRows.mutate("place")
def OffsetsInTheDefaultDtype(right: HostRows, side: Side, numbers: Int64) -> Pair:
    """Offsets pass through torch's default dtype, which is exact enough while that is float32."""
    entry, byte = right.place(side, numbers)
    if byte.size and abs(byte).max() < 1 << 24:
        byte = torch.tensor([float(n) for n in byte], device="cpu").long().numpy()
    return entry, byte


@HostRows.mutate("carry")
def LeavesItsDefaultDtype(right: HostRows, call: Call) -> Pending | None:
    """It sets torch's default dtype to the one that it works in, and leaves it so."""
    torch.set_default_dtype(torch.float32)
    return right.carry(call)


@HostRows.mutate("carry")
def LeavesItsNumberOfThreads(right: HostRows, call: Call) -> Pending | None:
    """It sets torch's number of threads to the one that it works with, and leaves it so."""
    torch.set_num_threads(1)
    return right.carry(call)


@HostRows.mutate("carry")
def LeavesGradOff(right: HostRows, call: Call) -> Pending | None:
    """It turns autograd off for its work, and leaves it off."""
    torch.set_grad_enabled(False)
    return right.carry(call)


@_Remembering.mutate("recalled")
def OnlyTheFirstCall(right: HostRows, first: Call, call: Call) -> Call:
    """A launch that is called with the same arguments again is taken for done."""
    same = first is not call and (first.src, first.dst) == (call.src, call.dst)
    return replace(call, count=0) if same else call


class Work(threading.Timer):
    """A job in the background that begins late."""

    def done(self) -> bool:
        return not self.is_alive()

    def wait(self) -> None:
        self.join()


def late(job: Callable[..., object], *arguments: object) -> Work:
    """Begin a job in the background that ends late."""
    work = Work(_LATE, job, arguments)
    work.daemon = True
    work.start()
    return work


class ReadsHostIdsLater(HostRows):
    """Ids on the host are read in the background, when the caller may have filled its list anew."""

    def carry(self, call: Call) -> Pending | None:
        return self.handle(late(super().carry, call))

    def handle(self, work: Work) -> Pending | None:
        """Return the result of the launch."""
        return work


@ReadsHostIdsLater.mutate("handle")
def ReturnsBeforeFinishing(right: HostRows, work: Work) -> None:
    """Rows are moved in the background and None is returned, as if they were there."""
    return


@ReadsHostIdsLater.mutate("handle")
def DoneTooEarly(right: HostRows, work: Work) -> Pending:
    """A handle that waits rightly and says from the start that it is done."""
    work.done = lambda: True  # type: ignore[method-assign]
    return work


@ReadsHostIdsLater.mutate("handle")
def WaitsForNothing(right: HostRows, work: Work) -> Pending:
    """A handle that knows rightly whether it is done, and does not wait for it."""
    work.wait = lambda: None  # type: ignore[method-assign]
    return work


@HostRows.mutate("carry")
def TempFreedEarly(right: HostRows, call: Call) -> Pending:
    """Rows pass through a staging buffer that the next call fills while the first is on its way."""
    pieces = right.pieces(call)
    right.state["staging"] = [right.load(runs, call) for runs in pieces]
    return late(_store_all, pieces, right.state, call)


def _store_all(runs_of_nests: list[Runs], state: Keywords, call: Call) -> None:
    for runs, values in zip(runs_of_nests, state["staging"], strict=False):
        if values.dtype.itemsize == runs.vector and values.nbytes == len(values) * runs.nbytes:
            n = min(len(values), len(runs.dst))
            store(call.dst, runs.dst[:n], values[:n])
