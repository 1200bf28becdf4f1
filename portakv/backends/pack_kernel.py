# SPDX-License-Identifier: Apache-2.0
"""Pack and unpack rows by kernels: their source text for a plan, and their launch on any device.

Values that a model fixes become template parameters of ``native/cuda/pack.cuh``. The core packs the
values that a request changes, and launches (`native/core/pack.h`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch

from portakv.backends.base import Capabilities, Decision, PackLaunch
from portakv.backends.rows_kernel import extents, kernel_text, options_of, side_text
from portakv.backends.rows_launch import KernelsLaunch, RowsBackend
from portakv.core.pack import Packs, PackShape, shape_of
from portakv.core.plan import Refused
from portakv.core.rows import LOOPS
from portakv.layout.packing import PACK
from portakv.plan.packing import Move, PackPlan
from portakv.runtime.cuda import KernelDriver
from portakv.view.index import Index
from portakv.view.view import KVView

#: The names of the entries in a kernel's text: one packs, the other unpacks.
PACKS = "portakv_pack"
UNPACKS = "portakv_unpack"
#: Bytes of a vector of 8 values, the only access to raw rows.
VECTOR = 16
#: Planes of a thread block, if a warp takes a plane.
_PLANES = 4
#: Threads of a multiprocessor for which it has 64 registers each.
_THREADS = 1024
#: Directions (True: packs) and thread blocks for which the compiler plans registers by itself.
_BY_COMPILER = frozenset({(False, 128), (False, 160), (False, 576), (True, 160)})


def refusal(plan: PackPlan, nest: int) -> str | None:
    """Return why the kernels do not take a nest, as a sentence; None if they do."""
    planes = plan.nests[nest]
    if planes.raw_vector < VECTOR or planes.packed_vector < VECTOR:
        width = min(planes.raw_vector, planes.packed_vector)
        return f"it needs {VECTOR} B alignment and the plan allows {width} B"
    if any(step.table for step in (*planes.tokens, *planes.dim)):
        return "the tokens of a block lie in separate allocations"
    try:
        _shape(plan, nest)
    except Refused as refused:
        if refused.code != LOOPS:
            raise
        outer, inner = refused.values[:2]
        return f"it takes 4 loops over planes and 6 inside, and the plan has {outer} and {inner}"
    return None


def _shape(plan: PackPlan, nest: int) -> PackShape:
    """Return what a plan fixes about the kernel of a nest; raise `Refused`."""
    return shape_of(plan.words, nest, options_of(plan))


class PackKernel:
    """One nest of a plan: its instance of the kernel, and the cut of its launches.

    Args:
        nest: the number of the nest, for which `refusal` returns None.

    Attributes:
        shape: what the plan fixes.
        threads: of a thread block.
        together: planes of a thread block.
    """

    def __init__(self, plan: PackPlan, nest: int = 0) -> None:
        self.shape = _shape(plan, nest)
        self._plane = plan.nests[nest].plane
        self._packs = plan.packs
        warps = self._plane.segments
        self.together = _PLANES if warps == 1 else 1
        self.threads = 32 * warps * self.together

    @property
    def name(self) -> str:
        """The name of the entry."""
        return PACKS if self._packs else UNPACKS

    @property
    def names(self) -> Mapping[int, str]:
        """The names of its entries, as `RowsKernel` has them."""
        return {1: self.name}

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        plane = self._plane
        shape = self.shape
        raw, slots = ("Src", "Dst") if self._packs else ("Dst", "Src")
        function = "pack_planes" if self._packs else "unpack_planes"
        threads = self.threads
        # 0: the compiler plans its registers for no number of thread blocks.
        by_compiler = (self._packs, threads) in _BY_COMPILER
        blocks = 0 if by_compiler else max(1, round(_THREADS / threads))
        return "\n".join(
            [
                kernel_text("cuda/pack.cuh"),
                "using namespace portakv;",
                f"typedef {extents(shape.outer)} Outer;",
                f"typedef {side_text(shape.src)} Src;",
                f"typedef {side_text(shape.dst)} Dst;",
                f"typedef pack::Format<{plane.code_bits}, {plane.values}, {plane.slot_bytes}> F;",
                f"typedef pack::Raw<{raw}, {shape.run // VECTOR}, {extents(shape.inner)}> R;",
                "typedef pack::PackOf<Src, Dst> Argument;",
                f'extern "C" __global__ void PORTAKV_BOUNDS({threads}, {blocks}) {self.name}('
                f"const PORTAKV_CONSTANT Argument argument) {{",
                f"    pack::{function}<F, R, {slots}, Outer, {self.together}>(argument);",
                "}\n",
            ]
        )

    @property
    def cut(self) -> tuple[int, int]:
        """The words by which the core cuts launches; `portakv_pack_open` has their order."""
        return self.threads, self.together


class PackingRowsBackend(RowsBackend):
    """A backend that also packs and unpacks rows of its own device, by the kernels of this file."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), encodings=frozenset({PACK}))

    def check_pack(self, plan: PackPlan) -> Decision:
        decision = super().check_pack(plan)
        whys = (refusal(plan, nest) for nest in range(len(plan.nests)))
        why = next((why for why in whys if why is not None), None)
        if plan.src.place == "peer":
            why = "it packs rows of its own device only"
        if decision.accepted and why is not None:
            return Decision(self.name, False, why)
        return decision

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        kernels = [PackKernel(plan, nest) for nest in range(len(plan.nests))]
        functions = [entries[1] for entries in self._kernels.functions(kernels)]
        return KernelPackLaunch(plan, kernels, functions, self._driver, self.device)


class KernelPackLaunch(KernelsLaunch):
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`.

    Words for blocks that do not fit may also be on the device.

    Args:
        kernels: one for each nest.
        functions: the entry of each kernel, loaded.
        driver, home: as for `KernelsLaunch`.
    """

    overflow_on_host = True

    def __init__(
        self,
        plan: PackPlan,
        kernels: Sequence[PackKernel],
        functions: Sequence[object],
        driver: KernelDriver,
        home: torch.device,
    ) -> None:
        super().__init__(plan, kernels, driver, home)
        cuts = chain.from_iterable(kernel.cut for kernel in kernels)
        handles = [driver.address(function) for function in functions]
        self._packs = Packs(plan.words, options_of(plan), cuts, handles, driver.entry)

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
        driver = self._driver

        def run(handle: int) -> int:
            word = 0 if status is None else driver.word(status.data_ptr())
            words = overflow.data_ptr()
            if overflow.is_cpu:
                words = driver.word(words)
            sides = self.sides(Move(src, dst, src_index, dst_index, count))
            return self._packs.run(*sides, count, word, words, handle)

        error = driver.order(stream, run)
        if error:
            self.refuse(error, src.slots, dst.slots, count)
