# SPDX-License-Identifier: Apache-2.0
"""Launch the kernels of `pack_kernel` through a device's driver."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from portakv.backends.pack_kernel import PackKernel
from portakv.backends.rows_launch import RowsDriver
from portakv.plan.move import Move
from portakv.runtime.cuda import ArgumentLists
from portakv.view.index import Index
from portakv.view.view import KVView


class KernelPackLaunch:
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`.

    Args:
        kernels: one for each nest.
        functions: the entry of each kernel, loaded.
        driver: of the device that the kernels are loaded on.
    """

    def __init__(
        self, kernels: Sequence[PackKernel], functions: Sequence[object], driver: RowsDriver
    ) -> None:
        self._parts = list(zip(kernels, functions, strict=True))
        self._unit = kernels[0].unit
        self._driver = driver
        kinds = zip(*((kernel.src.kind, kernel.dst.kind) for kernel in kernels), strict=True)
        self.tables = tuple("UNITS" in side for side in kinds)
        self._arguments = ArgumentLists([kernel.fixed for kernel in kernels], driver.current)

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
        overflow: torch.Tensor,
    ) -> None:
        """Order a copy on a stream; see `base.PackLaunch`."""
        if not count:
            return
        move = Move(src, dst, src_index, dst_index, count)
        handle = self._driver.handle(stream)
        if handle is None:
            with self._driver.current():
                self._enqueue(move, self._driver.handle(stream), status, overflow)
            return
        self._enqueue(move, handle, status, overflow)

    def _enqueue(
        self, move: Move, handle: object, status: torch.Tensor | None, overflow: torch.Tensor
    ) -> None:
        driver = self._driver
        units = move.count // self._unit
        word = 0 if status is None else driver.word(status.data_ptr())
        arguments = self._arguments
        for at, (kernel, function) in enumerate(self._parts):
            buffer = arguments.buffers[at]
            address = arguments.addresses[at]
            kernel.pack(buffer, move, word, overflow.data_ptr())
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                blocks = kernel.grid(span)
                threads = kernel.threads
                result = driver.launch(function, blocks, 1, 1, threads, 1, 1, 0, handle, address, 0)
                if result != driver.success:
                    driver.check(result, "The launch")
