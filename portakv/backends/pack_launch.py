# SPDX-License-Identifier: Apache-2.0
"""Load and launch the kernels of `pack_kernel` on any device, through its driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from portakv.backends.base import Capabilities, Decision, PackLaunch
from portakv.backends.pack_kernel import PackKernel, refusal
from portakv.backends.row_kernels import RowsDriver
from portakv.backends.rows_launch import RowsBackend
from portakv.layout.packing import PACK
from portakv.plan.move import Move
from portakv.plan.packing import PackPlan
from portakv.runtime.cuda import ArgumentLists
from portakv.view.index import Index
from portakv.view.view import KVView


class PackingRowsBackend(RowsBackend):
    """A backend that also packs and unpacks rows of its own device, by the kernels of
    `pack_kernel`."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), encodings=frozenset({PACK}))

    def check_pack(self, plan: PackPlan) -> Decision:
        decision = super().check_pack(plan)
        whys = (refusal(nest) for nest in plan.nests)
        why = next((why for why in whys if why is not None), None)
        if plan.src.place == "peer":
            why = "it packs rows of its own device only"
        if decision.accepted and why is not None:
            return Decision(self.name, False, why)
        return decision

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        kernels = [PackKernel(nest, plan) for nest in plan.nests]
        functions = [entries[1] for entries in self._kernels.functions(kernels)]
        return KernelPackLaunch(kernels, functions, self._driver)


class KernelPackLaunch:
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`.

    Words for blocks that do not fit may also be on the device.

    Args:
        kernels: one for each nest.
        functions: the entry of each kernel, loaded.
        driver: of the device that the kernels are loaded on.
    """

    overflow_on_host = True

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
        words = overflow.data_ptr()
        if overflow.is_cpu:
            words = driver.word(words)
        arguments = self._arguments
        for at, (kernel, function) in enumerate(self._parts):
            buffer = arguments.buffers[at]
            address = arguments.addresses[at]
            kernel.pack(buffer, move, word, words)
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                blocks = kernel.grid(span)
                threads = kernel.threads
                result = driver.launch(function, blocks, 1, 1, threads, 1, 1, 0, handle, address, 0)
                if result != driver.success:
                    driver.check(result, "The launch")
