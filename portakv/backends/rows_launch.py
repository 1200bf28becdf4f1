# SPDX-License-Identifier: Apache-2.0
"""Load and launch the kernels of `rows_kernel` on any device, through its driver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import NoReturn, Protocol

import torch

from portakv.backends.base import (
    PEERS,
    Backend,
    Capabilities,
    Launch,
    MoveLaunch,
    places_on,
)
from portakv.backends.row_kernels import RowKernels
from portakv.backends.rows_kernel import (
    LOOKUPS,
    THREADS,
    RowsKernel,
    Tuning,
    kernels_of,
    options_of,
)
from portakv.core.pack import PackShape
from portakv.core.rows import ON_HOST, UNITS, Kernels, RowsShape, SideShape, pack_side
from portakv.errors import Unsupported
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.bounded import making
from portakv.runtime.cuda import KernelDriver
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.kernel_cache import LOADED
from portakv.view.index import Index
from portakv.view.view import KVView

#: Units of a view or a copy, which the kernels count in 32 bits.
COUNTED = 2**32


class KernelText(Protocol):
    """The text of a kernel, the names of its entries and its shape, such as a `RowsKernel` has."""

    @property
    def shape(self) -> RowsShape | PackShape: ...
    @property
    def source(self) -> str: ...
    @property
    def names(self) -> Mapping[int, str]: ...


class LoadedKernels:
    """The kernels of one device: each text is compiled, or read from disk, at most once."""

    def __init__(self, driver: KernelDriver, capturing: Callable[[], bool]) -> None:
        self._driver = driver
        self._capturing = capturing

    def functions(self, kernels: Sequence[KernelText]) -> list[dict[int, object]]:
        """Return the entries of each kernel, by the vectors that one thread moves.

        Raises:
            Unsupported: a kernel is not loaded, and a graph is being captured.
        """
        with making():
            loaded = [LOADED.get_or_make((self, x.source), partial(self._load, x)) for x in kernels]
        return [
            {each: functions[name] for each, name in kernel.names.items()}
            for kernel, functions in zip(kernels, loaded, strict=True)
        ]

    def add_to(self, table: Kernels, kernels: Sequence[RowsKernel]) -> None:
        """Load row kernels and add them to a table of the core; raise as `functions`."""
        for kernel, entries in zip(kernels, self.functions(kernels), strict=True):
            handles = [
                self._driver.address(entries[each]) if each in entries else 0 for each in (1, 2)
            ]
            table.add(kernel.words, kernel.cut, handles)

    def _load(self, kernel: KernelText) -> dict[str, object]:
        if self._capturing():
            raise refuse_capture()
        return self._driver.load(kernel.source, kernel.names.values())


class RowsBackend(Backend):
    """A backend that launches the rows kernel through a device's driver."""

    #: Threads of a block, and the cuts of launches; None: the cuts of NVIDIA's devices.
    threads = THREADS
    tunings: tuple[Tuning, ...] | None = None

    def __init__(self, device: torch.device, driver: KernelDriver) -> None:
        super().__init__(device)
        self._driver = driver
        self._kernels = LoadedKernels(driver, lambda: capturing(device))

    def capabilities(self) -> Capabilities:
        places = places_on(self.device) | PEERS
        return Capabilities(places, skips_negative=True, guards=True, capturable=True)

    @cached_property
    def row_kernels(self) -> RowKernels:  # type: ignore[override]
        """See `Backend`."""
        return RowKernels(self._driver, self.device, self.name)

    @cached_property
    def _peer_kernels(self) -> Kernels:
        """The kernels that read a peer's rows: their launches are cut otherwise."""
        return Kernels(self._driver.entry)

    def prepare(self, plan: CopyPlan) -> Launch:
        kernels = kernels_of(plan, self.threads, self.tunings)
        table = self._peer_kernels if plan.src.place == "peer" else self.row_kernels.table
        self._kernels.add_to(table, kernels)
        return RowsLaunch(plan, kernels, table, self._driver, self.device)


class KernelsLaunch:
    """What the launches of all kernels have: both sides as the core takes them, and its errors.

    Args:
        plan: of the copy.
        kernels: those of the plan, one for each nest.
        driver: of the device that the kernels are loaded on.
        home: that device, where they read tables of addresses.

    Attributes:
        tables: for each side, whether a kernel reads the table of addresses.
    """

    def __init__(
        self,
        plan: CopyPlan | PackPlan,
        kernels: Sequence[KernelText],
        driver: KernelDriver,
        home: torch.device,
    ) -> None:
        self._driver = driver
        self._home = home
        self._unit = plan.unit
        shapes = [kernel.shape for kernel in kernels]
        self.tables = _looks_up(x.src for x in shapes), _looks_up(x.dst for x in shapes)

    def sides(self, move: Move) -> tuple[bytes, bytes]:
        """Return both sides of a copy as the core takes them."""
        src_table, dst_table = self.tables
        return (
            self.side(move.src, move.src_index, src_table),
            self.side(move.dst, move.dst_index, dst_table),
        )

    def side(self, view: KVView, index: Index, by_table: bool) -> bytes:
        """Return one side of a copy as the core takes it; ``by_table``: kernels read its table."""
        table = 0
        if by_table:
            held = view.table_on(self._home)
            table = (view.table if held is None else held).data_ptr()
        ids = index.ids  # contiguous, and on the device unless they travel: the library places them
        at = 0
        wide = 0
        if ids is not None:
            at = ids.data_ptr()
            wide = int(ids.dtype is torch.int64)
            if ids.is_cpu and self._home.type != "cpu":
                wide += ON_HOST
        addresses = view.addresses_at if view.known else 0
        return pack_side(addresses, table, at, wide, index.offset, view.slots)

    def refuse(self, error: int, src: int, dst: int, count: int) -> NoReturn:
        """Raise the error of a launch that the core or the driver refused, of a copy of ``count``
        tokens between views of so many tokens.

        Raises:
            Unsupported: a view has more units than the kernel counts.
            TransferError: the driver's error.
        """
        if error == UNITS:
            views = [slots for slots in (src, dst) if slots // self._unit > COUNTED]
            what = f"A view of {views[0]} tokens" if views else f"A copy of {count} tokens"
            raise Unsupported(
                f"{what} in units of {self._unit}",
                f"the kernel counts {COUNTED} units; use backend 'reference'",
            )
        self._driver.refuse(error, "The launch")


def _looks_up(sides: Iterable[SideShape]) -> bool:
    return any(LOOKUPS[side.lookup] == "UNITS" for side in sides)


class RowsLaunch(KernelsLaunch, MoveLaunch):
    """The launch of a plan by its kernels; see `base.Launch`.

    Args:
        kernels: one for each nest.
        table: has these kernels.
        driver, home: as for `KernelsLaunch`.
    """

    #: Few ids of the host travel with the launch; see `Prepared`.
    carries_ids = True

    def __init__(
        self,
        plan: CopyPlan,
        kernels: Sequence[RowsKernel],
        table: Kernels,
        driver: KernelDriver,
        home: torch.device,
    ) -> None:
        super().__init__(plan, kernels, driver, home)
        self._table = table
        self._plan = plan.words
        self._options = options_of(plan, kernels[0].by_source)
        #: For the core: the addresses of the kernels, of the words of the plan and of the options.
        self.words = (
            table.address,
            self._plan.buffer_info()[0],
            self._options.buffer_info()[0],
        )

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        """Order a copy on a stream of the driver's; see `MoveLaunch`."""

        def run(handle: int) -> int:
            word = 0 if status is None else self._driver.word(status.data_ptr())
            copy = self._plan, self._options, *self.sides(move), move.count, word
            return self._table.run(*copy, handle)

        error = self._driver.order(stream, run)
        if error:
            self.refuse(error, move.src.slots, move.dst.slots, move.count)
