# SPDX-License-Identifier: Apache-2.0
"""Load and launch the kernels of `rows_kernel` on any device, through its driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch

from portakv.backends.base import PEERS, Backend, Capabilities, Launch, MoveLaunch, places_on
from portakv.backends.rows_kernel import THREADS, Packer, RowsKernel, Tuning
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.bounded import Bounded
from portakv.runtime.cuda import ArgumentLists
from portakv.runtime.devices import capturing, refuse_capture
from portakv.view.index import Index
from portakv.view.view import KVView


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
