# SPDX-License-Identifier: Apache-2.0
"""Mutants that remember what they should not, and that say that they are done too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from portakv import Index, KVView
from portakv.backends.base import Pending
from portakv.plan.plan import CopyPlan, Side
from portakv_conformance.mutants.base import Call, HostRows, Int64, Pair, Runs, store

_LATE = 0.02  # seconds that work in the background takes


class _Remembering(HostRows):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._first: dict[CopyPlan, Call] = {}

    def carry(self, call: Call) -> Pending | None:
        return super().carry(self.recalled(self._first.setdefault(call.plan, call), call))

    def recalled(self, first: Call, call: Call) -> Call:
        """The call, mixed up with the first one."""
        raise NotImplementedError


class StalePointerTable(_Remembering):
    """The addresses of a cache are kept for its form, so one that was reallocated is not seen."""

    def recalled(self, first: Call, call: Call) -> Call:
        same = call.src.form.block_size and call.src.slots == first.src.slots
        return replace(call, src=first.src) if same else call


class StaleDestination(_Remembering):
    """The addresses of a destination are kept for its form: the second chunk goes to the first."""

    def recalled(self, first: Call, call: Call) -> Call:
        return replace(call, dst=first.dst) if call.dst.slots == first.dst.slots else call


class _TableKept(HostRows):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tables: dict[object, Int64] = {}

    def table(self, view: KVView) -> Int64:
        found = super().table(view)
        return self._tables.setdefault((view.form, len(found), self.key(found)), found)

    def key(self, table: Int64) -> int:
        """What a table is known by."""
        raise NotImplementedError


class TableOfTheFirstTensor(_TableKept):
    """The table of a cache is kept under its first tensor's address."""

    def key(self, table: Int64) -> int:
        return int(table[0])


class TableOfTheLastTensor(_TableKept):
    """The table of a cache is kept under its last tensor's address."""

    def key(self, table: Int64) -> int:
        return int(table[-1])


class TableOfTheSameTensors(_TableKept):
    """The table of a cache is kept under the sum of its addresses, whatever their order."""

    def key(self, table: Int64) -> int:
        return int(table.sum())


class IndicesOfTheFirstCall(_Remembering):
    """A second call with as many ids as the first uses the ids of the first."""

    def recalled(self, first: Call, call: Call) -> Call:
        src = _recalled(first.src_index, call.src_index)
        return replace(call, src_index=src, dst_index=_recalled(first.dst_index, call.dst_index))


def _recalled(first: Index, index: Index) -> Index:
    return first if (first.length, first.offset) == (index.length, index.offset) else index


class CountOfTheFirstCall(_Remembering):
    """The grid of the first call is used again: of a longer list the end is not moved."""

    def recalled(self, first: Call, call: Call) -> Call:
        return replace(call, count=min(call.count, first.count))


class DevicesByDefault(HostRows):
    """What it makes lies on torch's default device, which need not be the one that it works on."""

    def ids(self, ids: torch.Tensor) -> Int64:
        return super().ids(ids[torch.arange(ids.numel())])


class OffsetsInTheDefaultDtype(HostRows):
    """Offsets pass through torch's default dtype, which is exact enough while that is float32."""

    def place(self, side: Side, numbers: Int64) -> Pair:
        entry, byte = super().place(side, numbers)
        if byte.size and abs(byte).max() < 1 << 24:
            byte = torch.tensor([float(n) for n in byte], device="cpu").long().numpy()
        return entry, byte


class OnlyTheFirstCall(_Remembering):
    """A launch that is called with the same arguments again is taken for done."""

    def recalled(self, first: Call, call: Call) -> Call:
        same = first is not call and (first.src, first.dst) == (call.src, call.dst)
        return replace(call, count=0) if same else call


class Work(threading.Thread):
    """A job in the background."""

    def done(self) -> bool:
        return not self.is_alive()

    def wait(self) -> None:
        self.join()


def late(job: Callable[..., object], *given: Any) -> Work:
    """Begin a job in the background that ends late."""

    def run() -> None:
        time.sleep(_LATE)
        job(*given)

    work = Work(target=run, daemon=True)
    work.start()
    return work


class ReadsHostIdsLater(HostRows):
    """Ids on the host are read in the background, when the caller may have filled its list anew."""

    def carry(self, call: Call) -> Pending | None:
        return self.handle(late(super().carry, call))

    def handle(self, work: Work) -> Pending | None:
        """What the launch returns."""
        return work


class ReturnsBeforeFinishing(ReadsHostIdsLater):
    """Rows are moved in the background and None is returned, as if they were there."""

    def handle(self, work: Work) -> None:
        return None


class DoneTooEarly(ReadsHostIdsLater):
    """A handle that waits rightly and says from the start that it is done."""

    def handle(self, work: Work) -> Pending:
        work.done = lambda: True  # type: ignore[method-assign]
        return work


class WaitsForNothing(ReadsHostIdsLater):
    """A handle that knows rightly whether it is done, and does not wait for it."""

    def handle(self, work: Work) -> Pending:
        work.wait = lambda: None  # type: ignore[method-assign]
        return work


class TempFreedEarly(HostRows):
    """Rows pass through a staging buffer that the next call fills while the first is on its way."""

    def carry(self, call: Call) -> Pending:
        found = self.pieces(call)
        self._staging: list[Any] = [self.load(runs, call) for runs in found]
        return late(self._store_all, found, call)

    def _store_all(self, found: list[Runs], call: Call) -> None:
        for runs, values in zip(found, self._staging, strict=False):
            if values.dtype.itemsize == runs.vector and values.nbytes == len(values) * runs.nbytes:
                n = min(len(values), len(runs.dst))
                store(call.dst, runs.dst[:n], values[:n])
