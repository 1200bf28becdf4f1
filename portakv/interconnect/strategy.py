# SPDX-License-Identifier: Apache-2.0
"""The base of transfer strategies: a device, the backend that serves it, and the caller's terms."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, Literal, TypeAlias, get_args

import torch

from portakv.arguments import flag, one_of, rate, whole
from portakv.backends.base import Backend, Capabilities, Decision, MoveLaunch, Pending
from portakv.backends.row_kernels import FIRST_WORK, RowKernels
from portakv.core.call import DRIVER, OTHERWISE, PREPARE, CopyEnd, Crossings, Executor, calls
from portakv.core.link import EDGES, STAGE
from portakv.core.pick import ORDER
from portakv.host import pinned
from portakv.interconnect.link import CudaLink, TorchLink, Uncrossed, link_of
from portakv.plan.plan import CopyPlan
from portakv.plan.plan import Move as Move
from portakv.registry.registry import Choice, choose
from portakv.runtime import streams
from portakv.runtime.devices import capturing
from portakv.view.index import Index
from portakv.view.view import KVView

#: Both directions between a device and pinned memory, and between a device and pageable memory.
PINNED = frozenset({("device", "pinned"), ("pinned", "device")})
PAGEABLE = frozenset({("device", "pageable"), ("pageable", "device")})

#: Other work of the device during a transfer: `compute`, a model runs and must not be slowed down;
#: `idle`, nothing runs.
Overlap: TypeAlias = Literal["compute", "idle"]
OVERLAPS: tuple[str, ...] = get_args(Overlap)
#: The most bytes that a kernel may move across the link at full speed while the device computes, by
#: direction. Measured on an H200: `zero_copy` beats `staged` up to 2 MiB down and 12 MiB up. There
#: it costs a model no more than a copy engine does.
SMALL = {"d2h": 2 << 20, "h2d": 12 << 20}


@dataclass(frozen=True, slots=True)
class Terms:
    """Limit what a transfer may use.

    Attributes:
        overlap: ``compute``: the device runs a model as well, so only copy engines and short
            kernels may be used. ``idle``: the fastest strategy, whatever it uses.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory, or
            reads a peer's. None: the strategy's own limit.
        max_gbps: the most 10^9 bytes in a second; None: the link's own limit.
        detached: no stream that the caller knows waits for the end, so the next transfer need not
            wait for this transfer.

    Raises:
        InvalidTerms: a value that a term cannot have.
    """

    overlap: Overlap = "compute"
    max_thread_blocks: int | None = None
    max_gbps: float | None = None
    detached: bool = False

    def __post_init__(self) -> None:
        one_of("overlap", self.overlap, OVERLAPS)
        if self.max_thread_blocks is not None:
            whole("max_thread_blocks", self.max_thread_blocks, 1)
        unlimited = isinstance(self.max_gbps, float) and self.max_gbps == inf
        if self.max_gbps is not None and not unlimited:
            rate("max_gbps", self.max_gbps)
        flag("detached", self.detached)

    @property
    def without_rate(self) -> Terms:
        """Return the terms that strategies and launches differ by. The worker that issues the
        pieces keeps the rate."""
        return self if self.max_gbps is None else replace(self, max_gbps=inf)


class Strategy(Backend):
    """A backend between a device and host memory, under a caller's terms.

    ``half`` executes the device's half of a copy. None: the backend that the registry chooses.

    Attributes:
        reads: the sides whose ids and addresses the strategy needs on the host: the ``host``'s
            rows, ``both`` sides, or ``none``. It waits for those that only the device has.
        places: what it copies between.
    """

    reads: str = "none"
    places: frozenset[tuple[str, str]] = PINNED

    def __init__(
        self, device: torch.device, half: Choice | None = None, terms: Terms | None = None
    ) -> None:
        super().__init__(device)
        self._half = half
        self.terms = terms or Terms()

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        serves = device.type != "cpu"
        which = "this" if serves else "a"
        return Decision(cls.name, serves, f"it copies between {which} device and the host")

    def capabilities(self) -> Capabilities:
        return Capabilities(self.places, index_on="any")

    def refuses(self, host: KVView) -> str:
        """Return why it cannot use the host's memory of a copy whose plan it takes, as a phrase.
        Empty: it can."""
        return ""

    @property
    def half(self) -> Choice:
        """Return the backend that executes the device's half. The first call chooses it."""
        self._half = self._half or choose(self.device)
        return self._half


#: Submit a copy by the core, and return the core's result. The arguments are what submits it, given
#: the address of the words of buffers or 0, and the address of the copy's `portakv_copy_end`.
Cross: TypeAlias = Callable[[Callable[[int], int], int], int]


def cross_plainly(submit: Callable[[int], int], end: int) -> int:
    """Submit a copy that needs no buffers."""
    return submit(0)


class StrategyLaunch(MoveLaunch):
    """A launch across the link.

    Attributes:
        downward: from the device to the host.
        strategy: of all its copies; empty: each copy has a pick.
        counted: the tokens of a unit, and after how many units the pitch of the source, of the
            destination and of the host's rows changes; 0: never, or nothing depends on it.
        picked_at: the address of the words of `PickedCopies`; 0: there are no picks.
    """

    device: torch.device
    tables = False, False  # it sends the tables that its kernels read
    strategy = ""
    picked_at = 0

    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        self.device = device
        self.downward = plan.src.place == "device"
        self.counted = plan.unit, 0, 0, 0

    def row_kernels(self) -> RowKernels | None:
        """Return kernels of the device, whose ends the core's copies have; None: there are none."""
        return None

    @cached_property
    def whole(self) -> WholeCopies | None:
        """The copies that the core makes by one call each; None: it makes none."""
        kernels = self.row_kernels()
        return None if kernels is None else WholeCopies(self, kernels, link_of(self.device))

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        """Write what the core needs for copies by a strategy, and return what submits one; None:
        the core does not make them."""
        return None

    def terms(self, host: KVView, new: bool, look: bool = False) -> tuple[int, int, int]:
        """Return what the pick of a copy depends on: costs, strategies that are out, flags.

        Args:
            host: the view of the host.
            new: ids are a caller's for one call.
            look: ask the driver whether kernels reach the host's memory.
        """
        return 0, 0, new

    def picked(self, answer: int) -> tuple[str, str] | None:
        """Return the strategy of a copy that the core made, and why, by the answer of its pick;
        None: there was no pick."""
        return None


class UnownedLaunch(StrategyLaunch):
    """A launch of work that no allocator knows of, by `submit`. It retains the host's memory until
    the work has ended. A transfer retains a peer's memory."""

    def __init__(self, plan: CopyPlan, device: torch.device) -> None:
        super().__init__(plan, device)
        self.from_peer = plan.src.place == "peer"

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        host = move.dst if self.downward else move.src
        captured = capturing(self.device)
        try:
            self.submit(move, stream, status)
        finally:  # also after an error, when some of the work may be on its way
            # A graph's memory belongs to its owner.
            if host.retained and not (captured or self.from_peer):
                streams.completion(self.device, stream, *host.retained)

    def bare(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        """Launch for a caller that retains the host's memory; see `Prepared`."""
        if count:
            self.submit(Move(src, dst, src_index, dst_index, count), stream, status)

    def submit(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        """Order the copy on a stream, as `enqueue`, and retain nothing."""
        raise NotImplementedError


class WholeCopies:
    """The copies by one launch that the core makes by one call each.

    Args:
        launch: of a strategy, or one that picks a strategy for each copy.
        kernels: see `StrategyLaunch.row_kernels`.
        link: of the device.

    Attributes:
        words: what the core reads of the copies.
    """

    def __init__(
        self, launch: StrategyLaunch, kernels: RowKernels, link: CudaLink | TorchLink
    ) -> None:
        self.kernels = kernels
        self.launch = launch
        by = kernels.executor
        self.words = words = Crossings(Executor(None, by.torch, by.current))
        words.counted[:] = launch.counted
        words.picked = launch.picked_at
        if launch.strategy:
            words.only = ORDER.index(launch.strategy)
        self._link: CudaLink | None = None
        if isinstance(link, CudaLink):
            self._link = link
            words.link = link.core.address
        self._address = addressof(words)
        self._call = calls().copy_across

    def copy(
        self, rows: KVView, host: KVView, sides: tuple[Any, ...], end: int, stream: Any
    ) -> int:
        """Make a copy, and return the core's result.

        Args:
            rows, host: the views of the device and of the host.
            sides: the arguments of the core from the source's view to the terms of the pick.
            end: the address of the copy's `portakv_copy_end`.
            stream: the handle of the copy's stream; None: the core asks for it.

        Raises:
            TransferError: the link's driver refused a call; what was submitted stays ordered.
        """
        uncrossed = Uncrossed() if pinned.boundaries() else None
        edges = 0 if uncrossed is None else uncrossed.address
        result = self._call(self._address, *sides, edges, 0, end, stream)
        if result >= 0:
            return result

        def submit(staging: int = 0) -> int:
            edges = 0 if uncrossed is None else uncrossed.address
            return self._call(self._address, *sides, edges, staging, end, stream)

        number = PREPARE - result
        if 0 <= number < len(ORDER):
            strategy = ORDER[number]
            if strategy == "zero_copy":
                sides = *sides[:-3], *self.launch.terms(host, bool(sides[-1] & 1), look=True)
            if self._link is not None:  # no graph is captured
                self.words.aside = self._link.aside
            cross = self.launch.described(self.words, strategy)
            if cross is None:
                return OTHERWISE
            # Without several allocations there are no edges besides those of registrations.
            if strategy == "staged" and host.entries > 1:
                uncrossed = Uncrossed(host)
            result = cross(submit, end)
        if result == EDGES:
            uncrossed = Uncrossed(rows, host)
            result = submit()
        if self._link is not None and end and result <= DRIVER and result != FIRST_WORK:
            fault = CopyEnd.from_address(end).fault
            if fault.what not in (0, STAGE):  # else a launch was refused
                self._link.refuse(fault)
        return result


def read_on(stream: torch.Stream | None, index: Index) -> Index:
    """Return the index, with its ids retained until the work that ``stream`` waits for has ended.
    The ids may be a cached copy that was made on another stream."""
    if stream is not None and index.ids is not None and index.ids.device == stream.device:
        index.ids.record_stream(stream)
    return index


def known_to_host(view: KVView, index: Index) -> bool:
    """Return whether the host knows the addresses and the ids of one side."""
    return view.known and (index.ids is None or index.known_ids() is not None)


def finish(pending: Pending | None) -> None:
    """Wait for work that is not ordered on its stream."""
    if pending is not None:
        pending.wait()
