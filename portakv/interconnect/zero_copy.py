# SPDX-License-Identifier: Apache-2.0
"""`zero_copy`: a kernel that reads or writes pinned host memory by itself, with few thread blocks;
or reads a peer's rows.

It needs no staging and no copy engine, and one launch carries a copy of any layout out. What it
takes is a share of the device's time for as long as the link needs: it is for an idle device, for
small payloads, for a limited rate, and for host memory in short runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch

from portakv.backends.base import PEERS, Capabilities, Decision, Launch
from portakv.backends.rows_kernel import Request, RowsKernel, Tuning
from portakv.backends.rows_launch import LoadedKernels, RowsAgain, RowsLaunch
from portakv.errors import Unsupported
from portakv.interconnect.strategy import PINNED, SMALL, Move, Strategy, StrategyLaunch, Terms
from portakv.plan.plan import CopyPlan, Nest
from portakv.registry.prepared import bring_table
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import streams
from portakv.runtime.devices import capturing, refuse_fork, this_process
from portakv.view.index import Index
from portakv.view.view import KVView

NAME = "portakv_direct"
#: Thread blocks of one launch unless the caller's terms say otherwise. Of a plain kernel of this
#: kind eight reached on an H200 what any number did, 0.95 of memcpy to the host and 0.93 from it;
#: four 0.94 and 0.92, and one 0.62 and 0.49.
BLOCKS = 8
#: The same for more than `SMALL` bytes while the device computes, by direction: one more, and what
#: the kernel writes holds up a model's own memory (H200: 46 % slower, with three 6 %, with 0.8 of
#: memcpy; of four that read 5 % and 0.73, of eight 11 - 20 % and 0.87).
BESIDE = {"d2h": 3, "h2d": 4}
#: The same of a peer's rows, whose link is seven times as wide, by what else the device does. Of
#: 1 GiB between two H200 8 blocks reached 0.93 of a raw copy, 12 and more 0.95; beside a matmul of
#: 8192^3 4 blocks reached 0.27, 8 0.53, 12 0.71 and 16 0.80, and slowed it by 11, 14, 15 and 17 %.
#: A copy of one plane has less from as many, since it finds each vector by itself.
PEER_BLOCKS = {"compute": 14, "idle": 64}
IDLE = Terms(overlap="idle")
_HOST = torch.device("cpu")
#: Vectors of one launch, counted in 32 bits with room for one turn past the end; a larger copy is
#: split.
MAX_VECTORS = 2**30


class Cut(NamedTuple):
    """How a copy is cut among threads."""

    threads: int = 1024  # of a block
    each: int = 2  # vectors that a thread has under way before its first store, at least
    planes: int = 1  # from how many planes it takes them at most, at one place in each


#: A quarter of a megabyte under way in eight blocks: more than what the link holds. With eight
#: vectors in each of 512 threads registers spilled: 0.75 - 0.85 of a memcpy, 0.92 - 0.95 as it is.
CUT = Cut()
#: Of a peer's rows. Finding each vector by itself, eight blocks reached 153 GB/s between two H200,
#: finding one place in eight planes 367.
PEER_CUT = Cut(each=4, planes=8)


class BlockLimits(NamedTuple):
    """The most thread blocks of launches up to ``small_bytes``, and of larger launches."""

    small_bytes: int
    small: int
    large: int


def _limits_of(direction: str, peer: bool, terms: Terms) -> BlockLimits:
    """Return the limits on thread blocks under a caller's terms; ``peer``: for a peer's rows."""
    small = BLOCKS
    large = BESIDE[direction] if terms.overlap == "compute" else BLOCKS
    if peer:
        small = large = PEER_BLOCKS[terms.overlap]
    if terms.max_thread_blocks:
        small = large = terms.max_thread_blocks
    return BlockLimits(SMALL[direction], small, large)


class ZeroCopyKernel(RowsKernel):
    """One nest of a plan between a device and pinned memory, or a peer's, whose tables of the other
    side's addresses lie on ``device``, in as many thread blocks as the ``terms`` allow.

    Raises:
        Unsupported: as `RowsKernel` does; a unit of more vectors than are counted.
    """

    file = "host/direct.cuh"
    names: Mapping[int, str] = MappingProxyType({1: NAME})

    def __init__(
        self, nest: Nest, plan: CopyPlan, device: torch.device = _HOST, terms: Terms = IDLE
    ) -> None:
        self._reads_host = plan.src.place != "device"
        if self._reads_host:
            # A plan walks as the destination lies; the link wants neighbours on the host's side.
            loops = sorted(nest.loops, key=lambda x: (not x.tabled, -abs(x.src_stride)))
            nest = replace(nest, loops=tuple(loops))
        peer = plan.src.place == "peer"
        self.cut = cut = PEER_CUT if peer else CUT
        super().__init__(nest, plan, cut.threads, (Tuning(0, 1, 0),))
        self._whole = self.row * self.planes
        if self._whole >= MAX_VECTORS:
            raise Unsupported(
                f"A unit of {plan.unit} tokens in {self._whole} vectors of {self.vector} B",
                f"the kernel counts {MAX_VECTORS}; use backend 'staged'",
            )
        self.most_units = (MAX_VECTORS - 1) // self._whole
        self._device = device
        direction = "h2d" if self._reads_host else "d2h"
        self._together = min(cut.planes, self.planes)
        self._strips = max(1, cut.each // self._together)
        # Of planes that are taken together a block has its own; single ones it passes through.
        self._length = self.row
        self._groups = -(-self.planes // self._together)
        if self._together == 1:
            self._length = self._whole
            self._groups = 1
        self._limits = _limits_of(direction, peer, terms)
        side = self.src if self._reads_host else self.dst
        #: The host side's addresses, too, are read from device memory.
        self.wants_table = side.kind == "UNITS"
        self._first = 8 * side.side.table

    def entry(self, each: int, name: str) -> str:
        """See `RowsKernel.entry`."""
        sizes = self.vector, self.run // self.vector, self._strips, self._together
        of = f"{', '.join(map(str, sizes))}, Inner, Outer, Src, Dst"
        entry = f"void PORTAKV_AT_MOST({self.threads}) {name}(const PORTAKV_CONSTANT Argument copy)"
        return f'extern "C" __global__ {entry} {{ copy_direct<{of}>(copy); }}\n'

    def grid(self, units: int, each: int) -> tuple[int, int]:
        """Thread blocks of a launch: no more than have something to do."""
        limits = self._limits
        large = units * self._whole * self.vector > limits.small_bytes
        most = limits.large if large else limits.small
        width = self.threads * self._strips
        return min(most, -(-units * self._length // width) * self._groups), 1

    def requests(self, move: Move) -> tuple[Request, Request]:
        """See `RowsKernel.requests`; of the host's addresses those on the device."""
        mine, theirs = super().requests(move)
        if not self.wants_table:
            return mine, theirs
        sent = (move.src if self._reads_host else move.dst).table_on(self._device)
        assert sent is not None  # the launch had it sent
        table = sent.data_ptr() + self._first
        if self._reads_host:
            return (mine[0], table, *mine[2:]), theirs
        return mine, (theirs[0], table, *theirs[2:])


_WIDEST = 16  # bytes of a vector that fills the link
_REACHED = "direct: reached by"  # kept in a view, with the device


class ZeroCopy(Strategy):
    """The kernel of ``native/host/direct.cuh`` on NVIDIA devices."""

    name = "zero_copy"

    @cached_property
    def _driver(self) -> _cuda_driver.CudaDriver:
        return _cuda_driver.CudaDriver(self.device)

    @cached_property
    def _kernels(self) -> LoadedKernels:
        return LoadedKernels(self._driver, lambda: capturing(self.device))

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type == "cpu":
            return super().probe(device)
        why = _cuda_driver.why_not(device) or _cuda_driver.device_too_old(device)
        if why is not None:
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, "its kernel reaches pinned memory over the link")

    def capabilities(self) -> Capabilities:
        places = PINNED | PEERS
        return Capabilities(places, skips_negative=True, guards=True, capturable=True)

    def check(self, plan: CopyPlan) -> Decision:
        """As every backend; of vectors that are narrow the reason says that they cost bandwidth."""
        decision = super().check(plan)
        if decision.accepted and plan.src.place == "peer":
            most = self.terms.max_thread_blocks or PEER_BLOCKS[self.terms.overlap]
            return Decision(
                self.name, True, f"reads the peer's rows by {most} thread blocks at most"
            )
        if decision.accepted and plan.vector < _WIDEST:
            why = f"takes the plan, in vectors of {plan.vector} B: only {_WIDEST} B fill the link"
            return Decision(self.name, True, why)
        return decision

    def refuses(self, host: KVView) -> str:
        return unreached(host, self.device)

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = [ZeroCopyKernel(nest, plan, self.device, self.terms) for nest in plan.nests]
        rows = RowsLaunch(kernels, self._kernels.functions(kernels), self._driver)
        return _ZeroCopyLaunch(plan, self.device, rows)


class _ZeroCopyLaunch(StrategyLaunch):
    """A launch of the kernel, with what it needs of the host's memory."""

    def __init__(self, plan: CopyPlan, device: torch.device, rows: RowsLaunch) -> None:
        super().__init__(plan, device)
        self._rows = rows
        self._process = this_process()
        self._pinned = plan.src.place != "peer"  # else the transfer holds a peer's memory

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        if self._process.forked:
            raise refuse_fork("CUDA")
        host = move.dst if self.downward else move.src
        if self._pinned:
            check_reach(host, self.device)
        for view, read in zip(move[:2], self._rows.tables, strict=True):
            if read:  # of the host's own, in host memory, each thread would read over the link
                bring_table(view, self.device, stream)
        try:
            self._rows.enqueue(move, stream, status)
        finally:
            # No allocator knows of these kernels, so the host's memory is held until they ended. A
            # graph's memory is its owner's.
            if self._pinned and host.held and not capturing(self.device):
                streams.completion(self.device, stream, *host.held)

    def again(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index
    ) -> RowsAgain | None:
        """See `base.Repeatable`; None if host memory is to be held until the kernel ended."""
        held = (dst if self.downward else src).held
        return None if self._pinned and held else self._rows.again(src, dst, src_index, dst_index)


def check_reach(view: KVView, device: torch.device) -> None:
    """Raise `Unsupported` if kernels on a device do not reach a view of pinned memory."""
    if why := unreached(view, device):
        raise Unsupported(f"A direct copy of pinned memory at {view.origins[0]:#x}", why)


def unreached(view: KVView, device: torch.device) -> str:
    """Why kernels on a device do not reach a view of pinned memory or a peer's by its addresses, as
    a phrase, as if it was registered but not mapped: they would fault. Empty if they do. One
    address is asked for, until it is reached."""
    if (_REACHED, device) in view.derived or not view.entries or view.form.table_on_device:
        return ""  # what a caller has on the device are addresses of the device
    found = device_address(view.origins[0], device)
    if found == view.origins[0]:
        view.derived[_REACHED, device] = True
        return ""
    if view.form.place == "peer":  # some allocators map memory for its own device alone
        return f"{device} does not reach memory at {view.origins[0]:#x} of {view.home}"
    if found:
        return f"{device} reaches it at {found:#x} alone; use backend 'staged'"
    return f"{device} does not reach it; pin it with mapped=True, or use backend 'staged'"


def device_address(address: int, device: torch.device) -> int:
    """Where kernels on a device find host memory; 0: nowhere."""
    driver = _cuda_driver.bindings()
    asked = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
    with torch.cuda.device(device):
        _cuda_driver.adopt(device)
        error, found = driver.cuPointerGetAttribute(asked, address)
    return 0 if int(error) else int(found)
