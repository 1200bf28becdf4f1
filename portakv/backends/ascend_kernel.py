# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel of ``native/ascend``: find and load it, pack its arguments, and launch it.

`PORTAKV_ASCENDC` names the library; else it is the library that ``run_in_cann.sh npu`` builds. A
library that emulates the kernel has the same interface, and serves only an emulated device.

The arguments are those of ``copy.h``: for each nest of a plan a ``Nest``, which is uploaded once,
and for each request a ``Copy``, which travels as scalars. All members are 64-bit integers; strides
and offsets are bytes.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from portakv.backends._sides import SideArguments
from portakv.backends._vendor_rows import GuardedRows
from portakv.backends.base import MoveLaunch
from portakv.errors import TransferError, Unsupported
from portakv.plan.plan import CopyPlan, Loop, Move, Nest
from portakv.runtime.devices import Unusable
from portakv.view.view import KVView

VARIABLE = "PORTAKV_ASCENDC"
#: The interface that this module launches, as ``portakv::kAbi`` counts it.
ABI = 2
_NATIVE = "portakv_native.ascend"
_PLACE = ("lib", "libportakv_ascend.so")
_BUILD = f"bash native/ascend/run_in_cann.sh npu builds it, and {VARIABLE} names it"
_AGAIN = "build it again, from native/ascend of this release"
_ELEMENT = 8  # bytes of an element of the indexing that replaces the kernel

# Lengths of arrays in copy.h.
MAX_UNITS = 4
MAX_LOOPS = 8
_NO_POSITION = 2**63 - 1  # above every position
_MOST_GAP = 2**32  # bytes between rows of one transfer
_COPY = struct.Struct("<15q")


class Memory(NamedTuple):
    """Memory that a launch may touch."""

    address: int
    nbytes: int
    writable: bool


_pointer = ctypes.c_void_p
_number = ctypes.c_uint32
# The functions that a library exports (copy.h), with their result and their arguments.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "portakv_ascend_abi": (_number, ()),
    "portakv_ascend_emulated": (_number, ()),
    "portakv_ascend_platform": (ctypes.c_int, (ctypes.POINTER(_number),) * 2),
    "portakv_ascend_rows": (ctypes.c_int, (ctypes.c_char_p, _number, _number, _pointer)),
    # A library that emulates the kernel exports this as well (emulation/library.cpp).
    "portakv_emulation_lend": (None, (ctypes.c_char_p, _number)),
}
_MEMORY = struct.Struct("<4Q")


@dataclass(frozen=True)
class Kernel:
    """A loaded library."""

    name: str  # of its file, for a reader
    path: str
    library: ctypes.CDLL  # its functions have their types
    blocks: int  # vector cores
    ub_bytes: int  # of one core's unified buffer
    emulated: bool  # it runs the kernel on a CPU

    def launch(self, copy: bytes, memory: Sequence[Memory], stream: int) -> None:
        """Launch a ``portakv::Copy`` on the stream with a raw handle, whose device is the current
        one.

        ``memory`` is the memory that it may touch; an emulation, without device memory, needs to
        know it.

        Raises:
            TransferError: the launch failed.
        """
        if self.emulated:
            lent = b"".join(_MEMORY.pack(*each, 0) for each in memory)
            self.library.portakv_emulation_lend(lent, len(memory))
        code = self.library.portakv_ascend_rows(copy, self.blocks, self.ub_bytes, stream)
        if code:
            raise TransferError(
                f"The launch of the AscendC kernel in {self.name} returned {code}; the copy was "
                f"not made, or in part. 1 means invalid arguments; other codes are CANN's."
            )


def find_kernel(emulated: bool) -> tuple[Kernel | None, str]:
    """Return the kernel for a device, or None if none was built; and the executor of plans, in
    words.

    Raises:
        Unusable: `PORTAKV_ASCENDC` names a library that cannot be used.
    """
    named = os.environ.get(VARIABLE)
    built = Path(str(files(_NATIVE)), *_PLACE)
    if not named and not built.is_file():
        return None, f"by its ops, since the AscendC kernel was not built ({_BUILD})"
    try:
        kernel = open_kernel(named or str(built), emulated)
    except Unusable as error:
        if not named:
            return None, f"by its ops, since of the AscendC kernel {error}"
        raise Unusable(
            f"{VARIABLE} names {named}, and {error}; without {VARIABLE} the ops of torch_npu "
            f"carry plans out"
        ) from error
    return kernel, f"by the AscendC kernel in {kernel.name}{', emulated' if emulated else ''}"


def open_kernel(path: str, emulated: bool) -> Kernel:
    """Return the library at a path, for an emulated or a real device.

    Raises `Unusable` with a clause if it cannot serve such a device.
    """
    if not Path(path).is_file():
        raise Unusable(f"there is no such file ({_BUILD})")
    kernel = _load(path)
    if kernel.emulated == emulated:
        return kernel
    why = f"emulates the kernel on a CPU, and this NPU is real; {_BUILD}"
    if emulated:
        why = (
            "is for an NPU, and this NPU is emulated; native/ascend/emulation/run.sh library "
            "builds one for it"
        )
    raise Unusable(f"{kernel.name} {why}")


def _load(path: str) -> Kernel:
    """Load a library and declare its functions; raise `Unusable` with a clause."""
    name = Path(path).resolve().name
    try:
        library = ctypes.CDLL(path)
    except OSError as error:  # names the missing library, such as libascendcl.so
        raise Unusable(
            f"{name} cannot be loaded ({error}); source CANN's set_env.sh, or {_AGAIN}"
        ) from error
    first, *others, lend = _FUNCTIONS
    _type(library, name, [first])
    abi = library.portakv_ascend_abi()
    if abi != ABI:
        raise Unusable(f"{name} has the interface {abi}, and {ABI} is launched here; {_AGAIN}")
    _type(library, name, others)
    emulated = bool(library.portakv_ascend_emulated())
    _type(library, name, [lend] if emulated else [])
    blocks = _number()
    ub_bytes = _number()
    code = library.portakv_ascend_platform(ctypes.byref(blocks), ctypes.byref(ub_bytes))
    if code:
        raise Unusable(
            f"{name} found no vector cores, or none with a unified buffer (code {code}); source "
            f"CANN's set_env.sh, and see that there is an NPU"
        )
    return Kernel(name, path, library, blocks.value, ub_bytes.value, emulated)


def _type(library: ctypes.CDLL, name: str, functions: Sequence[str]) -> None:
    for function in functions:
        try:
            entry = getattr(library, function)
        except AttributeError:
            raise Unusable(f"{name} has no function {function}; {_AGAIN}") from None
        result, arguments = _FUNCTIONS[function]
        entry.restype = result
        entry.argtypes = arguments


class KernelRows(MoveLaunch):
    """Execute a plan by the kernel, which skips and guards; by indexing if the kernel does not take
    it.

    The kernel is launched on the current device, wherever its memory is.
    """

    def __init__(self, kernel: Kernel, plan: CopyPlan, device: torch.device) -> None:
        self._kernel = kernel
        self.device = device
        self._rest = GuardedRows(plan, device, _ELEMENT) if refusal(plan) else None
        if self._rest is not None:
            return
        self._arguments = Arguments(plan)
        with torch.inference_mode(False):
            words = [bytearray(nest) for nest in self._arguments.nests]
            self._nests = [torch.frombuffer(x, dtype=torch.int64).to(device) for x in words]

    @torch.no_grad()
    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        if self._rest is not None:
            self._rest(move, status)
            return
        device = move.dst.device
        words = StatusWords(0 if status is None else self._kernel.blocks, device)
        nests = [nest.data_ptr() for nest in self._nests]
        copies = self._arguments.copies(nests, move, words.address)
        memory: list[Memory] = []
        if self._kernel.emulated:
            memory = reached(move, [*map(_read_only, self._nests), *words.memory])
        # Read the handle last: torch_npu queues ops on the host, and this read empties that queue
        # (NPUStream::stream in its csrc/core/npu/NPUStream.cpp).
        stream = torch.get_device_module(device).current_stream(device).npu_stream
        for copy in copies:
            self._kernel.launch(copy, memory, stream)
        if status is not None:
            status.copy_(words.first, non_blocking=True)


class StatusWords:
    """A status word for each of ``cores`` on a device.

    Cores race, so that each has a separate word. A vector core cannot write to the host's memory,
    so that the lowest position goes there afterwards.
    """

    def __init__(self, cores: int, device: torch.device) -> None:
        self._words = torch.full((cores,), _NO_POSITION, dtype=torch.int64, device=device)
        self.address = self._words.data_ptr() if cores else 0
        #: The words as memory that a launch writes, for an emulation.
        self.memory: list[Memory] = []
        if cores:
            self.memory.append(Memory(self.address, self._words.nbytes, True))

    @property
    def first(self) -> torch.Tensor:
        """The lowest position + 1, or 0: int64 ``[1]``, ordered on the current stream."""
        return (self._words.amin() % _NO_POSITION).view(1)


# --- the kernel's arguments -----------------------------------------------------------------------


class Arguments:
    """The arguments of the kernel for one plan: its ``nests``, each a ``portakv::Nest``, and
    copies.

    Raises:
        Unsupported: the plan exceeds the limits of the kernel.
    """

    def __init__(self, plan: CopyPlan) -> None:
        why = refusal(plan)
        if why is not None:
            raise Unsupported("A copy by the AscendC kernel", f"{why}; use backend 'reference'")
        self._unit = plan.unit
        nests = plan.nests
        names = ("src", "dst")
        self._sides = [[SideArguments(x, plan, name, x.loops) for name in names] for x in nests]
        self.nests = [_nest(*x, plan.unit) for x in zip(nests, self._sides, strict=True)]

    def copies(self, nests: Sequence[int], move: Move, status: int) -> list[bytes]:
        """Return a ``portakv::Copy`` for each nest.

        Args:
            nests: the addresses of the nests on the device.
            status: the address of the status word, or 0.
        """
        copies = []
        for at, (src_side, dst_side) in zip(nests, self._sides, strict=True):
            # A request begins with the base, and a `Copy` with the table.
            base, table, *src = src_side.request(move.src, move.src_index)
            to_base, to_table, *dst = dst_side.request(move.dst, move.dst_index)
            units = move.count // self._unit
            copies.append(_COPY.pack(at, table, base, *src, to_table, to_base, *dst, units, status))
        return copies


def refusal(plan: CopyPlan) -> str | None:
    """Return why the kernel does not take a plan, as a clause; None if it does."""
    for nest in plan.nests:
        loops = len(_split_rows(nest)[0])
        steps = max(len(nest.src.units), len(nest.dst.units))
        if loops > MAX_LOOPS or steps > MAX_UNITS:
            return (
                f"the AscendC kernel takes {MAX_LOOPS} loops above the rows and {MAX_UNITS} steps "
                f"of a unit, and the plan has {loops} and {steps}"
            )
    return None


def reached(move: Move, further: Sequence[Memory]) -> list[Memory]:
    """Return all memory that a launch may touch, for an emulation; ``further``: nests and status
    word."""
    read = [view.table for view in move[:2] if view.tabled]
    read += [index.ids for index in move[2:4] if index.ids is not None]
    return [*_spans(move.src, False), *_spans(move.dst, True), *map(_read_only, read), *further]


def _spans(view: KVView, writable: bool) -> list[Memory]:
    """Return the memory of a view's tensors; adjacent tensors are one run to a plan, and so one
    piece."""
    joined: list[Memory] = []
    for first, past in view.spans:
        if joined and joined[-1].address + joined[-1].nbytes == first:
            first = joined.pop().address
        joined.append(Memory(first, past - first, writable))
    return joined


def _read_only(tensor: torch.Tensor) -> Memory:
    return Memory(tensor.data_ptr(), tensor.nbytes, False)


def _nest(nest: Nest, sides: Sequence[SideArguments], unit: int) -> bytes:
    """Return a nest as ``portakv::Nest``; each request adds the addresses of its sides."""
    loops, rows, src_stride, dst_stride = _split_rows(nest)
    numbers: list[int] = []
    for side in sides:
        steps = side.side.units
        numbers += [0, 0, side.per_id, len(steps)]
        for step in steps:
            numbers += [step.extent, step.table, step.stride]
        numbers += [0] * (3 * (MAX_UNITS - len(steps)))
    numbers += [unit, nest.run, rows, src_stride, dst_stride, len(loops)]
    for loop in loops:
        numbers += [loop.extent, loop.src_table, loop.src_stride, loop.dst_table, loop.dst_stride]
    numbers += [0] * (5 * (MAX_LOOPS - len(loops)))
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _split_rows(nest: Nest) -> tuple[tuple[Loop, ...], int, int, int]:
    """Return the loops above the rows, the rows of one transfer, and their strides."""
    if nest.loops:
        last = nest.loops[-1]
        gaps = (last.src_stride - nest.run, last.dst_stride - nest.run)
        # A transfer walks upwards with gaps: no tables, no overlaps, no steps back.
        if not last.tabled and all(0 <= gap < _MOST_GAP for gap in gaps):
            return nest.loops[:-1], last.extent, last.src_stride, last.dst_stride
    return nest.loops, 1, nest.run, nest.run
