# SPDX-License-Identifier: Apache-2.0
"""The row kernel's source text and arguments for a plan, for every compiler and driver.

Values that a model fixes become template parameters of ``native/cuda/rows.cuh``. Values that a
request changes become the argument ``Copy``, packed here as that file declares it.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from importlib.resources import files
from itertools import chain
from math import prod
from posixpath import normpath
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch

from portakv.backends.base import PEERS, Backend, Capabilities, Launch, MoveLaunch, places_on
from portakv.errors import Unsupported
from portakv.plan.loops import Loop
from portakv.plan.packing import PackNest, PackPlan
from portakv.plan.plan import CopyPlan, Move, Nest, Side
from portakv.runtime.bounded import Bounded
from portakv.runtime.cuda import ArgumentLists
from portakv.runtime.devices import capturing, refuse_capture
from portakv.view.index import Index
from portakv.view.view import KVView

# ------------------------------------------------------------------------------------------------
# The parts of a nest that every kernel receives.

#: The values that a request adds to one side; see `SideArguments.request`.
Request: TypeAlias = tuple[int, int, int, int, int, int]


def split_loops(loops: tuple[Loop, ...]) -> tuple[list[Loop], list[Loop]]:
    """Split loops into those over planes, which blocks walk along y, and those inside a unit of a
    plane."""
    outer = [x for x in loops if x.tabled or x.over_planes]
    return outer, [x for x in loops if x not in outer]


class SideArguments:
    """The values that a plan fixes for one side of a nest, and its requests, for any kernel.

    Attributes:
        per_id: units that one id covers; 0 without ids.
        walks: for each of ``outer`` its entries of the table and its bytes.
        strides: of the loops ``inner``.
        kind: the source of addresses: ``NONE``, one address; ``UNITS``, the view's table.
        countable: the most units of a view that the kernel counts.
    """

    countable = 2**63 - 1

    def __init__(
        self,
        nest: Nest,
        plan: CopyPlan,
        name: str,
        outer: Sequence[Loop],
        inner: Sequence[Loop] = (),
    ) -> None:
        self.side: Side = getattr(nest, name)
        self.unit = plan.unit
        self.per_id = getattr(plan, f"{name}_step") // plan.unit
        self.walks = [(getattr(x, f"{name}_table"), getattr(x, f"{name}_stride")) for x in outer]
        self.strides = [getattr(x, f"{name}_stride") for x in inner]
        looks_up = self.side.tabled or any(table for table, _ in self.walks)
        self.kind = "UNITS" if looks_up else "NONE"

    def request(self, view: KVView, index: Index) -> Request:
        """Return the values of a request.

        They are the base (an address, or the bytes after a table's address), the address of the
        table or 0, the address of the ids or 0, True if the ids are int64, the unit at position 0,
        and the number of units in the view.
        """
        side = self.side
        unit = self.unit
        limit = view.slots // self.unit
        if limit > self.countable:
            raise Unsupported(
                f"A view of {view.slots} tokens in units of {unit}",
                f"the kernel counts {self.countable} units; use backend 'reference'",
            )
        table = 0
        base = side.offset
        if self.kind == "UNITS":
            table = view.table.data_ptr() + 8 * side.table
        elif self.kind == "NONE":
            base += view.origins[side.table]
        first, rest = divmod(index.offset, unit)
        ids = index.ids  # contiguous and on the device: the library places them
        if ids is None:
            # A flat side may start anywhere, also between two units.
            return base + rest * (side.units[-1].stride // unit), table, 0, 0, first, limit
        return base, table, ids.data_ptr(), ids.dtype is torch.int64, first, limit


#: Threads of a block, unless a device needs another number.
THREADS = 128
#: Names of the entries in a kernel's text, by the vectors that one thread moves.
NAMES = {1: "portakv_rows", 2: "portakv_rows_2"}
# Array lengths in `Side`.
MAX_UNITS = 3
MAX_OUTER = 4
MAX_INNER = 6
MAX_PLANES = 65535  # blocks along y
# Addresses that travel in the arguments: with both sides below the classic limit of 4 KiB.
MAX_ENTRIES = 192
# `Copy` up to its sides: two requests; units, start, unit, ahead; status.
REQUEST = struct.Struct("<12q4Iq")
SPAN = struct.Struct("<2I")
SPAN_AT = 12 * 8
_SIDE_BYTES = 16 * MAX_UNITS + 16 * MAX_OUTER + 8 * MAX_INNER
TABLES_AT = REQUEST.size + 2 * _SIDE_BYTES
# Vectors of one launch are counted in 32 bits; a larger copy is split.
MAX_VECTORS = 2**31
MAX_NUMBERS = 2**32  # of units in a view: the kernel counts them in 32 bits
SECTOR = 32  # bytes of device memory that are written together


#: Packs a repeated launch; see `RowsKernel.packer`.
Packer: TypeAlias = Callable[[bytearray, int, int, int, int, int, int], None]


class Tuning(NamedTuple):
    """The cut of a launch of some size; measured on H200s (benchmarks/notes/copies.md)."""

    payload: int  # the least bytes that the tuning is for
    each: int  # vectors that one thread moves
    ahead: int  # bytes to prefetch ahead in copy order


TUNING = (
    Tuning(3 << 29, 2, 1 << 20),
    Tuning(256 << 20, 1, 2 << 20),
    Tuning(64 << 20, 1, 1 << 20),
    Tuning(32 << 20, 1, 512 << 10),
    Tuning(4 << 20, 2, 128 << 10),
    Tuning(0, 1, 0),
)


#: Rows of a peer, at any size. A prefetch into L2 transfers them over the link a second time:
#: 6 GB/s with it, 375 without, between two H200.
PEER_TUNING = (Tuning(0, 1, 0),)


_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)
_texts: Bounded[str, str] = Bounded("kernel texts", 8)


def kernel_text(name: str = "cuda/rows.cuh") -> str:
    """Return a file of ``native``, as the wheel contains it, with its includes of ``native``
    expanded.

    Compilers at run time have no folder to look in.
    """
    return _texts.get_or_make(name, lambda: _read(name))


def _read(name: str) -> str:
    folder, _, file = name.rpartition("/")
    text = files("portakv_native").joinpath(folder).joinpath(file).read_text()
    return _INCLUDE.sub(lambda include: kernel_text(normpath(f"{folder}/{include[1]}")), text)


class RowsKernel:
    """One nest of a plan: its instance of the kernel, and the packing of its arguments.

    Args:
        threads: of a block.
        tunings: the cuts of launches, by their size; None: `TUNING`. A peer's rows always use
            `PEER_TUNING`.

    Attributes:
        row: vectors of one unit in one plane.
        planes: blocks along y.
        most_units: the most units of one launch.

    Raises:
        Unsupported: more loops than the kernel's arguments hold.
    """

    #: The file of ``native`` that its text begins with, and the names of its entries.
    file = "cuda/rows.cuh"
    names: Mapping[int, str] = NAMES

    def __init__(
        self,
        nest: Nest,
        plan: CopyPlan,
        threads: int = THREADS,
        tunings: tuple[Tuning, ...] | None = None,
    ) -> None:
        peer = PEER_TUNING if plan.src.place == "peer" else None
        self.threads = threads
        self._tunings = peer or tunings or TUNING
        self.unit = plan.unit
        self.vector = nest.vector
        outer, inner = split_loops(nest.loops)
        self.row = prod(x.extent for x in inner) * (nest.run // nest.vector)
        self.planes = prod(x.extent for x in outer)
        if (
            len(outer) > MAX_OUTER
            or len(inner) > MAX_INNER
            or max(len(nest.src.units), len(nest.dst.units)) > MAX_UNITS
            or self.planes > MAX_PLANES
            or self.row >= MAX_VECTORS
        ):
            raise Unsupported(
                f"A nest of {len(nest.loops)} loops over {self.planes} planes",
                f"the kernel takes {MAX_OUTER} loops over planes, {MAX_INNER} inside a unit and "
                f"{MAX_PLANES} planes; use backend 'reference'",
            )
        self.src, self.dst = (SideWords(nest, plan, x, outer, inner) for x in ("src", "dst"))
        self._nest = nest
        self._dst_table_at = TABLES_AT + 8 * max(1, self.src.entries)
        self._unit_bytes = self.row * self.planes * self.vector
        self.most_units = max(1, (MAX_VECTORS - 1) // self.lanes)

    @cached_property
    def lanes(self) -> int:
        """The places of threads for the vectors of one unit in one plane.

        ``native/cuda/rows.cuh`` says why some units have more of them than vectors: rows at ids of
        the destination that end inside a sector, if a quarter more suffices.
        """
        if self.inner or not self.dst.ids or self.run % SECTOR == 0:
            return self.row
        each = SECTOR // self.vector
        lanes = -(-(self.row + each - 1) // each) * each
        return lanes if 4 * lanes <= 5 * self.row else self.row

    @property
    def run(self) -> int:
        """The bytes of a contiguous run."""
        return self._nest.run

    @property
    def outer(self) -> list[int]:
        """The extents of the loops over planes."""
        return [loop.extent for loop in split_loops(self._nest.loops)[0]]

    @property
    def inner(self) -> list[int]:
        """The extents of the loops inside a unit of a plane."""
        return [loop.extent for loop in split_loops(self._nest.loops)[1]]

    @property
    def fixed(self) -> bytes:
        """The argument with all values that do not change."""
        tables = max(1, self.src.entries) + max(1, self.dst.entries)
        return bytes(REQUEST.size) + self.src.fixed + self.dst.fixed + bytes(8 * tables)

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        return "\n".join(
            [
                kernel_text(self.file),
                "using namespace portakv;",
                f"typedef {extents(self.inner)} Inner;",
                f"typedef {extents(self.outer)} Outer;",
                f"typedef {self.src.shape} Src;",
                f"typedef {self.dst.shape} Dst;",
                "typedef CopyOf<Src, Dst> Argument;",
                *(self.entry(each, name) for each, name in self.names.items()),
            ]
        )

    def entry(self, each: int, name: str) -> str:
        """Return the definition of one entry, which follows the types of its shape."""
        run = self.run // self.vector
        call = f"copy_rows<{self.vector}, {run}, {self.lanes}, {each}, Inner, Outer, Src, Dst>"
        argument = "const PORTAKV_CONSTANT Argument copy"
        return f'extern "C" __global__ void {name}({argument}) {{ {call}(copy); }}\n'

    def tuned(self, units: int) -> tuple[int, int]:
        """Return (vectors that one thread moves, vectors to prefetch ahead) for so many units."""
        payload = units * self._unit_bytes
        for tuning in self._tunings:
            if payload >= tuning.payload:
                return tuning.each, tuning.ahead // self.vector
        raise AssertionError("the last tuning is for any payload")

    @property
    def small(self) -> int:
        """The units below which a thread moves one vector and prefetches nothing."""
        others = [x.payload for x in self._tunings if (x.each, x.ahead) != (1, 0)]
        return -(-min(others, default=0) // self._unit_bytes)

    def grid(self, units: int, each: int) -> tuple[int, int]:
        """Return the blocks along x and y of a launch of so many units."""
        return -(-units * self.lanes // (self.threads * each)), self.planes

    def pack(self, buffer: bytearray, move: Move, status: int, ahead: int) -> None:
        """Pack a request's addresses and counts into the argument; `pack_span` completes it."""
        src, dst = self.requests(move)
        REQUEST.pack_into(buffer, 0, *src, *dst, 0, 0, self.unit, ahead, status)
        if self.src.entries:
            table = self.src.table(move.src)
            buffer[TABLES_AT : TABLES_AT + len(table)] = table
        if self.dst.entries:
            table = self.dst.table(move.dst)
            buffer[self._dst_table_at : self._dst_table_at + len(table)] = table

    def requests(self, move: Move) -> tuple[Request, Request]:
        """Return the values that a request adds to each side; see `SideArguments.request`."""
        src = self.src.request(move.src, move.src_index)
        dst = self.dst.request(move.dst, move.dst_index)
        return src, dst

    def packer(self, move: Move) -> Packer | None:
        """Return a function that packs as `pack` and `pack_span` do, for one repeated launch.

        It takes the buffer, the addresses of the source and of the destination as `base.Again` has
        them, the first unit, the units, the vectors to prefetch ahead, and the status word. Returns
        None if a side without ids is not one tensor.
        """
        sides = (self.src, move.src_index), (self.dst, move.dst_index)
        if any(y.ids is None and (x.kind != "NONE" or x.side.table) for x, y in sides):
            return None
        (pack_src, pack_dst) = map(_settled, self.requests(move), sides)
        pack = REQUEST.pack_into
        unit = self.unit
        return lambda buffer, src, dst, first, units, ahead, status: pack(
            buffer, 0, *pack_src(src, first), *pack_dst(dst, first), units, 0, unit, ahead, status
        )

    def spans(self, units: int) -> list[tuple[int, int]]:
        """Return (first unit, units) of each launch."""
        most = self.most_units
        if 0 < units <= most:
            return [(0, units)]
        return [(start, min(most, units - start)) for start in range(0, units, most)]

    def pack_span(self, buffer: bytearray, start: int, units: int) -> None:
        """Pack the units that this launch moves."""
        SPAN.pack_into(buffer, SPAN_AT, units, start)


def _settled(request: Request, side: tuple[SideArguments, Index]) -> Callable[[int, int], Request]:
    """Return a function that makes a side's request from an address and the first unit."""
    base, table, _, wide, _, limit = request
    if side[1].ids is not None:
        return lambda ids, first: (base, table, ids, wide, first, limit)
    offset = side[0].side.offset
    return lambda address, first: (address + offset, 0, 0, 0, 0, 0)


def extents(numbers: list[int]) -> str:
    return f"Extents<{', '.join(map(str, numbers))}>"


class SideWords(SideArguments):
    """A side of the rows kernel.

    Attributes:
        kind: as in `SideArguments`, or ``PLANES``: a table of ``entries`` that travels with the
            arguments.
        ids: True if it has ids.
        fixed: the values that a plan fixes, as the kernel's text declares them.
    """

    def __init__(
        self,
        nest: Nest | PackNest,
        plan: CopyPlan | PackPlan,
        name: str,
        outer: Sequence[Loop],
        inner: Sequence[Loop],
    ) -> None:
        # A side reads of them only what packed nests and plans have as well.
        super().__init__(cast("Nest", nest), cast("CopyPlan", plan), name, outer, inner)
        self.ids = self.per_id > 0
        self.entries = 0
        self.countable = MAX_NUMBERS
        loops = zip(outer, self.walks, strict=True)
        entries = 1 + sum((x.extent - 1) * table for x, (table, _) in loops)
        if getattr(plan, name).table_on_device:
            self.kind = "UNITS"  # also for one address, which the host does not know
        elif self.kind == "UNITS" and not self.side.tabled and entries <= MAX_ENTRIES:
            self.kind = "PLANES"
            self.entries = entries
        walks = [(x.table, x.stride) for x in self.side.units]
        walks += [(0, 0)] * (MAX_UNITS - len(walks)) + self.walks
        walks += [(0, 0)] * (MAX_OUTER - len(self.walks))
        numbers = [*chain(*walks), *self.strides, *[0] * (MAX_INNER - len(self.strides))]
        self.fixed = struct.pack(f"<{len(numbers)}q", *numbers)

    @property
    def shape(self) -> str:
        """The type of the side in the kernel's text."""
        bounded = extents([x.extent for x in self.side.units[1:]])
        ids = str(self.ids).lower()
        return f"SideShape<{ids}, {self.per_id or 1}, {self.kind}, {self.entries}, {bounded}>"

    def table(self, view: KVView) -> bytes:
        """Return the entries that travel in the arguments."""
        packed: bytes | None = view.derived.get(self)
        if packed is None:
            entries = view.origins[self.side.table :][: self.entries]
            packed = view.derived[self] = struct.pack(f"<{self.entries}q", *entries)
        return packed


# ------------------------------------------------------------------------------------------------
# Load and launch the row kernel on any device, through its driver.


class RowsDriver(Protocol):
    """The driver of one device; `runtime.cuda.CudaDriver` documents each function."""

    @property
    def success(self) -> object: ...
    @property
    def launch(self) -> Callable[..., object]: ...
    def load(self, source: str, names: Iterable[str]) -> dict[str, object]: ...
    def handle(self, stream: torch.Stream | None) -> object: ...
    def current(self) -> AbstractContextManager[object]: ...
    def check(self, result: Any, what: str) -> None: ...
    def word(self, address: int) -> int: ...


class KernelText(Protocol):
    """The text of a kernel and the names of its entries, such as a `RowsKernel` has."""

    @property
    def source(self) -> str: ...
    @property
    def names(self) -> Mapping[int, str]: ...


class LoadedKernels:
    """The kernels of one device: each text is compiled, or read from disk, at most once."""

    def __init__(self, driver: RowsDriver, capturing: Callable[[], bool]) -> None:
        self._driver = driver
        self._capturing = capturing
        self._loaded: Bounded[str, dict[str, object]] = Bounded("loaded kernels", 1024)
        self._lock = threading.Lock()

    def functions(self, kernels: Sequence[KernelText]) -> list[dict[int, object]]:
        """Return the entries of each kernel, by the vectors that one thread moves.

        Raises:
            Unsupported: a kernel is not loaded, and a graph is being captured.
        """
        with self._lock:
            loaded = [self._loaded.get_or_make(x.source, partial(self._load, x)) for x in kernels]
        return [
            {each: functions[name] for each, name in kernel.names.items()}
            for kernel, functions in zip(kernels, loaded, strict=True)
        ]

    def _load(self, kernel: KernelText) -> dict[str, object]:
        if self._capturing():
            raise refuse_capture()
        return self._driver.load(kernel.source, kernel.names.values())


class RowsBackend(Backend):
    """A backend that launches the rows kernel through a device's driver."""

    #: Threads of a block, and the cuts of launches; None: the cuts of NVIDIA's devices.
    threads = THREADS
    tunings: tuple[Tuning, ...] | None = None

    def __init__(self, device: torch.device, driver: RowsDriver) -> None:
        super().__init__(device)
        self._driver = driver
        self._kernels = LoadedKernels(driver, lambda: capturing(device))

    def capabilities(self) -> Capabilities:
        places = places_on(self.device) | PEERS
        return Capabilities(places, skips_negative=True, guards=True, capturable=True)

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = [RowsKernel(nest, plan, self.threads, self.tunings) for nest in plan.nests]
        return RowsLaunch(kernels, self._kernels.functions(kernels), self._driver)


class RowsLaunch(MoveLaunch):
    """The launch of a plan by its kernels; see `base.Launch`.

    Args:
        kernels: one for each nest.
        functions: the entries of each kernel, as `LoadedKernels` returns them.
        driver: of the device that the kernels are loaded on.
    """

    def __init__(
        self,
        kernels: Sequence[RowsKernel],
        functions: Sequence[dict[int, object]],
        driver: RowsDriver,
    ) -> None:
        self._parts = list(zip(kernels, functions, strict=True))
        self._unit = kernels[0].unit
        self._driver = driver
        kinds = zip(*((kernel.src.kind, kernel.dst.kind) for kernel in kernels), strict=True)
        self.tables = tuple("UNITS" in side for side in kinds)
        self._handle = driver.handle
        self._launch = driver.launch
        self._success = driver.success
        self._arguments = ArgumentLists([kernel.fixed for kernel in kernels], driver.current)

    def again(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index
    ) -> RowsAgain | None:
        """See `base.Repeatable`."""
        parts = []
        fixed = []
        move = Move(src, dst, src_index, dst_index, 0)
        for kernel, functions in self._parts:
            packer = kernel.packer(move)
            if packer is None:
                return None
            filled = bytearray(kernel.fixed)
            kernel.pack(filled, move, 0, 0)
            fixed.append(bytes(filled))
            parts.append((packer, functions, kernel))
        return RowsAgain(parts, fixed, self._driver)

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        """Order a copy on a stream of the driver's; see `MoveLaunch`."""
        handle = self._handle(stream)
        if handle is None:
            with self._driver.current():
                self.enqueue(move, stream, status)
            return
        units = move.count // self._unit
        arguments = self._arguments
        word = 0 if status is None else self._driver.word(status.data_ptr())
        for at, (kernel, functions) in enumerate(self._parts):
            buffer = arguments.buffers[at]
            threads = kernel.threads
            each, ahead = kernel.tuned(units)
            kernel.pack(buffer, move, word, ahead)
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                blocks, planes = kernel.grid(span, each)
                result = self._launch(
                    functions[each],
                    blocks,
                    planes,
                    1,
                    threads,
                    1,
                    1,
                    0,
                    handle,
                    arguments.addresses[at],
                    0,
                )
                if result != self._success:
                    self._driver.check(result, "The launch")


class RowsAgain:
    """A repeated launch; see `base.Again`.

    Its call is one straight function: every frame costs time in a registered call.
    """

    def __init__(
        self,
        parts: list[tuple[Packer, dict[int, object], RowsKernel]],
        fixed: list[bytes],
        driver: RowsDriver,
    ) -> None:
        self._unit = unit = parts[0][2].unit
        self.most = min(kernel.most_units for *_, kernel in parts) * unit
        self._parts = [
            (pack, functions, k.grid, k.threads, k.small, k.tuned) for pack, functions, k in parts
        ]
        self._driver = driver
        self._arguments = ArgumentLists(fixed, driver.current)
        self._handle = driver.handle
        self._launch = driver.launch
        self._word = driver.word
        self._success = driver.success

    def __call__(self, src: int, dst: int, first: int, count: int, status: int) -> None:
        handle = self._handle(None)
        if handle is None:
            with self._driver.current():
                self(src, dst, first, count, status)
            return
        arguments = self._arguments
        word = self._word(status) if status else 0
        units = count // self._unit
        first //= self._unit
        for part, buffer, address in zip(
            self._parts, arguments.buffers, arguments.addresses, strict=True
        ):
            pack, functions, grid, threads, small, tuned = part
            each, ahead = (1, 0) if units < small else tuned(units)
            pack(buffer, src, dst, first, units, ahead, word)
            result = self._launch(
                functions[each], *grid(units, each), 1, threads, 1, 1, 0, handle, address, 0
            )
            if result != self._success:
                self._driver.check(result, "The launch")
