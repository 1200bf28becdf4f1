# SPDX-License-Identifier: Apache-2.0
"""`zero_copy`: a kernel that reads or writes pinned host memory directly, with few thread blocks;
or reads a peer's rows.

It needs no staging and no copy engine, and one launch executes a copy of any layout. It takes a
share of the device's time for as long as the link needs. It is for an idle device, small payloads,
a limited rate, and host memory in short runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch

from portakv.backends.base import PEERS, Capabilities, Decision, Launch
from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_kernel import RowsKernel, Tuning
from portakv.backends.rows_launch import LoadedKernels, RowsLaunch
from portakv.core.call import Crossings
from portakv.errors import Unsupported
from portakv.interconnect.strategy import (
    PINNED,
    SMALL,
    Cross,
    Move,
    Strategy,
    Terms,
    UnownedLaunch,
    cross_plainly,
)
from portakv.plan.plan import CopyPlan
from portakv.registry.prepared import bring_table
from portakv.runtime import cuda
from portakv.runtime.devices import capturing, refuse_fork
from portakv.view.form import PLACES
from portakv.view.view import KVView

NAME = "portakv_direct"
#: Thread blocks of one launch unless the caller's terms limit them. On an H200 a plain kernel of
#: this kind reached with eight blocks what any number reached: 0.95 of memcpy to the host and 0.93
#: from it. Four blocks reached 0.94 and 0.92, one 0.62 and 0.49.
BLOCKS = 8
#: The same for more than `SMALL` bytes while the device computes, by direction. With one block more
#: the kernel's writes hold up a model's own memory (H200: 46 % slower; with three 6 %, at 0.8 of
#: memcpy). Four blocks that read cost 5 % and reach 0.73, eight 11 - 20 % and 0.87.
COMPUTING = {"d2h": 3, "h2d": 4}
#: The same for a peer's rows, whose link is seven times as wide, by the other work of the device.
#: Of 1 GiB between two H200, 8 blocks reached 0.93 of a raw copy, 12 and more 0.95. While a matmul
#: of 8192^3 ran, 4 blocks reached 0.27, 8 0.53, 12 0.71 and 16 0.80, and slowed it by 11, 14, 15
#: and 17 %. A copy of one plane reaches less with as many blocks, since it locates each vector
#: separately.
PEER_BLOCKS = {"compute": 14, "idle": 64}
IDLE = Terms(overlap="idle")
#: Vectors of one launch, counted in 32 bits with space for one turn past the end. A larger copy is
#: split.
MAX_VECTORS = 2**30


class Cut(NamedTuple):
    """The division of a copy among threads."""

    threads: int = 1024  # of a block
    each: int = 2  # the least vectors that a thread loads before its first store
    planes: int = 1  # the most planes that it takes them from, at one position in each


#: Eight blocks load a quarter of a megabyte before their stores: more than the link holds. With
#: eight vectors in each of 512 threads registers spilled: 0.75 - 0.85 of a memcpy instead of 0.92 -
#: 0.95.
CUT = Cut()
#: For a peer's rows. Locating each vector separately, eight blocks reached 153 GB/s between two
#: H200; locating one position in eight planes they reached 367.
PEER_CUT = Cut(each=4, planes=8)


def _limits_of(direction: str, peer: bool, terms: Terms) -> tuple[int, int, int]:
    """Return the limits on thread blocks under a caller's terms; ``peer``: for a peer's rows.

    They are the bytes of a small launch, and the most thread blocks of small and of larger ones.
    """
    small = BLOCKS
    large = COMPUTING[direction] if terms.overlap == "compute" else BLOCKS
    if peer:
        small = large = PEER_BLOCKS[terms.overlap]
    if terms.max_thread_blocks:
        small = large = terms.max_thread_blocks
    return SMALL[direction], small, large


class ZeroCopyKernel(RowsKernel):
    """One nest of a plan between a device and pinned memory, or a peer's memory.

    The ``terms`` limit the thread blocks.

    Raises:
        Unsupported: as `RowsKernel` does; or a unit has more vectors than the kernel counts.
    """

    file = "host/direct.cuh"
    names: Mapping[int, str] = MappingProxyType({1: NAME})

    def __init__(self, plan: CopyPlan, nest: int = 0, terms: Terms = IDLE) -> None:
        reads_host = plan.src.place != "device"
        # A plan follows the destination's order; the link wants neighbours on the host's side.
        self.by_source = reads_host
        peer = plan.src.place == "peer"
        cut = PEER_CUT if peer else CUT
        super().__init__(plan, nest, cut.threads, (Tuning(0, 1, 0),))
        shape = self.shape
        whole = shape.row * shape.planes
        if whole >= MAX_VECTORS:
            raise Unsupported(
                f"A unit of {plan.unit} tokens in {whole} vectors of {shape.vector} B",
                f"the kernel counts {MAX_VECTORS}; use backend 'staged'",
            )
        self.most_units = (MAX_VECTORS - 1) // whole
        self._together = min(cut.planes, shape.planes)
        self._strips = max(1, cut.each // self._together)
        # A block takes several planes together, and passes through single planes.
        self._length = shape.row
        self._groups = -(-shape.planes // self._together)
        if self._together == 1:
            self._length = whole
            self._groups = 1
        self._limits = _limits_of("h2d" if reads_host else "d2h", peer, terms)

    def entry(self, each: int, name: str) -> str:
        """Return the definition of one entry, as `RowsKernel.entry` does."""
        sizes = self.shape.vector, self.shape.run, self._strips, self._together
        of = f"{', '.join(map(str, sizes))}, Inner, Outer, Src, Dst"
        entry = f"void PORTAKV_AT_MOST({self.threads}) {name}(const PORTAKV_CONSTANT Argument copy)"
        return f'extern "C" __global__ {entry} {{ copy_direct<{of}>(copy); }}\n'

    @property
    def cut(self) -> list[int]:
        """The words by which the core cuts launches: at most as many blocks as have work."""
        width = self.threads * self._strips
        staying = 1, *self._limits, width, self._length, self._groups
        tunings = [number for tuning in self.tunings for number in tuning]
        return [self.threads, self.most_units, *staying, len(self.tunings), *tunings]


_WIDEST = 16  # bytes of a vector that fills the link
_REACHED = "zero_copy: reached by"  # with the device, the key of a view's cached answer


class ZeroCopy(Strategy):
    """The kernel of ``native/host/direct.cuh`` on NVIDIA devices."""

    name = "zero_copy"

    @cached_property
    def _driver(self) -> cuda.CudaDriver:
        return cuda.CudaDriver(self.device)

    @cached_property
    def _kernels(self) -> LoadedKernels:
        return LoadedKernels(self._driver, lambda: capturing(self.device))

    @cached_property
    def kernels(self) -> dict[str, RowKernels]:
        """The kernels by the place that they read: their launches are cut otherwise for each."""
        return {place: RowKernels(self._driver, self.device, self.name) for place in PLACES}

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type == "cpu":
            return super().probe(device)
        why = cuda.why_not(device) or cuda.device_too_old(device)
        if why is not None:
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, "its kernel reaches pinned memory over the link")

    def capabilities(self) -> Capabilities:
        places = PINNED | PEERS
        return Capabilities(places, skips_negative=True, guards=True, capturable=True)

    def check(self, plan: CopyPlan) -> Decision:
        """Check as every backend does. For narrow vectors the reason says that they cost
        bandwidth."""
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

    def reaches(self, host: KVView) -> bool:
        """Return True if the driver has said so before."""
        return (_REACHED, self.device) in host.derived

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = [ZeroCopyKernel(plan, nest, self.terms) for nest in range(plan.words[1])]
        table = self.kernels[plan.src.place].table
        self._kernels.add_to(table, kernels)
        rows = RowsLaunch(plan, kernels, table, self._driver, self.device)
        return _ZeroCopyLaunch(plan, self.device, rows, self.kernels[plan.src.place])


class _ZeroCopyLaunch(UnownedLaunch):
    """A launch of the kernel."""

    strategy = ZeroCopy.name
    carries_ids = True  # as its `RowsLaunch`

    def __init__(
        self, plan: CopyPlan, device: torch.device, rows: RowsLaunch, kernels: RowKernels
    ) -> None:
        super().__init__(plan, device)
        self._rows = rows
        self._kernels = kernels

    def row_kernels(self) -> RowKernels:
        return self._kernels

    def described(self, words: Crossings, strategy: str) -> Cross | None:
        words.by.kernels = self._kernels.table.address
        return cross_plainly

    def submit(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        if self._kernels.process.forked:
            raise refuse_fork("CUDA")
        host = move.dst if self.downward else move.src
        if not self.from_peer and (why := unreached(host, self.device)):
            raise Unsupported(f"A direct copy of pinned memory at {host.origins[0]:#x}", why)
        tables = self._rows.tables
        if True in tables:
            captured = capturing(self.device)
            for view, read in zip((move.src, move.dst), tables, strict=True):
                if read:  # each thread would read a table in host memory over the link
                    bring_table(view, self.device, stream, captured)
        self._rows.enqueue(move, stream, status)


def unreached(view: KVView, device: torch.device) -> str:
    """Return why kernels on a device do not reach pinned or peer memory by its addresses, as a
    phrase. Empty: they do.

    Memory that is registered but not mapped is not reached: kernels would fault. The driver is
    queried for one address, until it is reached.
    """
    if (_REACHED, device) in view.derived or not view.entries or view.form.table_on_device:
        return ""  # a caller's table on the device has addresses of the device
    address = device_address(view.origins[0], device)
    if address == view.origins[0]:
        view.derived[_REACHED, device] = True
        return ""
    if view.form.place == "peer":  # some allocators map memory for the owning device alone
        return f"{device} does not reach memory at {view.origins[0]:#x} of {view.memory_device}"
    if address:
        return f"{device} reaches it only at {address:#x}; use backend 'staged'"
    return f"{device} does not reach it; pin it with mapped=True, or use backend 'staged'"


def device_address(address: int, device: torch.device) -> int:
    """Return the address of host memory for kernels on a device; 0: none."""
    driver = cuda.bindings()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
    with torch.cuda.device(device):
        cuda.adopt(device)
        error, address_there = driver.cuPointerGetAttribute(attribute, address)
    return 0 if int(error) else int(address_there)
