# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel of ``native/ascend``, unchanged, functionally emulated on a CPU.

`AscendC` is a backend like any other, so that the suite's copies run on the emulation::

    portakv conform portakv_conformance.vendor.ascendc_emulated:AscendC --profile full

g++ builds the kernel with the emulation header when it is first used. The emulation checks what
hardware would refuse or hang on; a fault is a `TransferError`. It is no evidence of an Ascend
device, and nothing here says how fast one is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from functools import cache
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from portakv import CopyPlan, Index, KVView, TransferError, Unsupported
from portakv.backends import _kernel_cache
from portakv.backends.base import Backend, Capabilities, Decision, Launch
from portakv.loops import Loop
from portakv.plan import Nest, Side

#: What it always says of itself.
EMULATED = True
#: Further flags for g++, from the environment: a process under a sanitizer sets them.
FLAGS = "PORTAKV_ASCENDC_FLAGS"

MAX_UNITS, MAX_LOOPS = 4, 8  # array lengths in native/ascend/copy.h
_MOST_GAP = 2**32  # bytes between rows of one transfer
_HOST = ("pageable", "pinned")
_COPY = struct.Struct("<15q")
_MEMORY = struct.Struct("<3Q")
_SECONDS = 120


class Setting(NamedTuple):
    """What a launch may meet: cores, bytes of one unified buffer, and when copies take place."""

    cores: int
    ub_bytes: int
    when: int  # 0: at once; 1: as late as allowed; 2: either way


#: Small buffers cut even small copies into many tiles; 192 KiB is what an Ascend 910B is said to
#: have. Which setting a launch meets follows from what it moves, so that a case can be run again.
SETTINGS = (
    Setting(5, 1024, 1),
    Setting(48, 192 << 10, 2),
    Setting(3, 2080, 2),
    Setting(1, 192 << 10, 1),
    Setting(7, 4096, 0),
)


class AscendC(Backend):
    """The AscendC kernel on the host, emulated."""

    name = "ascendc-emulated"
    emulated = True  # for reports: no Ascend device is judged

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        why = None
        if device.type != "cpu":
            why = f"it emulates AscendC on the host, not on {device.type}"
        elif shutil.which("g++") is None:
            why = "it is built by g++, which is not installed (Debian: apt install g++)"
        return Decision(cls.name, why is None, why or "g++ builds the kernel; EMULATED on a CPU")

    def capabilities(self) -> Capabilities:
        return Capabilities(
            places=frozenset(product(_HOST, _HOST)), skips_negative=True, guards=True
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        return _EmulatedLaunch(plan)


class _EmulatedLaunch:
    def __init__(self, plan: CopyPlan) -> None:
        self._unit = plan.unit
        self._nests = [pack_nest(nest, plan) for nest in plan.nests]
        self._sides = [
            (_SideRequest(nest.src, plan.unit), _SideRequest(nest.dst, plan.unit))
            for nest in plan.nests
        ]
        self._run = library().portakv_emulated_rows

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
    ) -> None:
        units = count // self._unit
        word = 0 if status is None else status.data_ptr()
        # Everything that the kernel may touch; what it may not write is not writable here either.
        held = [*_spans(src, False), *_spans(dst, True)]
        for index in (src_index, dst_index):
            held += [] if index.ids is None else _tensor(index.ids)
        if word:
            held.append((word, 8, 1))
        for packed, (mine, theirs) in zip(self._nests, self._sides, strict=True):
            nest = ctypes.create_string_buffer(packed, len(packed))
            address = ctypes.addressof(nest)
            copy = _COPY.pack(
                address, *mine.pack(src, src_index), *theirs.pack(dst, dst_index), units, word
            )
            self._launch(copy, [*held, (address, len(packed), 0)], zlib.crc32(packed, units))

    def _launch(self, copy: bytes, held: list[tuple[int, int, int]], seed: int) -> None:
        memory = b"".join(_MEMORY.pack(*one) for one in held)
        setting = SETTINGS[seed % len(SETTINGS)]
        why = ctypes.create_string_buffer(512)
        failed = self._run(
            copy, setting.cores, setting.ub_bytes, memory, len(held), setting.when, seed, why,
            len(why),
        )  # fmt: skip
        if failed:
            raise TransferError(f"The emulated AscendC kernel failed: {why.value.decode()}.")


def pack_nest(nest: Nest, plan: CopyPlan) -> bytes:
    """A nest of a plan as ``portakv::Nest``.

    Raises:
        Unsupported: more loops or steps than it holds.
    """
    loops, rows, src_stride, dst_stride = _split_rows(nest)
    if len(loops) > MAX_LOOPS or max(len(s.units) for s in (nest.src, nest.dst)) > MAX_UNITS:
        raise Unsupported(
            f"A nest of {len(nest.loops)} loops",
            f"the AscendC kernel takes {MAX_LOOPS} loops and {MAX_UNITS} steps of a unit; use "
            f"backend 'reference'",
        )
    numbers = [*_side(nest.src, plan.src_step // plan.unit)]
    numbers += _side(nest.dst, plan.dst_step // plan.unit)
    numbers += [plan.unit, nest.run, rows, src_stride, dst_stride, len(loops)]
    for loop in loops:
        numbers += [loop.extent, loop.src_table, loop.src_stride, loop.dst_table, loop.dst_stride]
    numbers += [0] * (5 * (MAX_LOOPS - len(loops)))
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _split_rows(nest: Nest) -> tuple[tuple[Loop, ...], int, int, int]:
    """The loops above the rows, how many rows a transfer can take, and their strides."""
    if nest.loops:
        last = nest.loops[-1]
        gaps = (last.src_stride - nest.run, last.dst_stride - nest.run)
        # A transfer walks upwards and leaves gaps: neither tables, nor overlaps, nor steps back.
        if not last.tabled and all(0 <= gap < _MOST_GAP for gap in gaps):
            return nest.loops[:-1], last.extent, last.src_stride, last.dst_stride
    return nest.loops, 1, nest.run, nest.run


def _side(side: Side, per_id: int) -> list[int]:
    numbers = [side.table, side.offset, per_id, len(side.units)]
    for step in side.units:
        numbers += [step.extent, step.table, step.stride]
    return numbers + [0] * (3 * (MAX_UNITS - len(side.units)))


class _SideRequest:
    """Packs what a request fixes about one side, as ``portakv::Request``."""

    def __init__(self, side: Side, unit: int) -> None:
        self._unit = unit
        self._token = side.units[-1].stride // unit

    def pack(self, view: KVView, index: Index) -> tuple[int, int, int, int, int, int]:
        """table, base, ids, whether they are int64, first, limit."""
        tabled = len(view.origins) > 1
        table, base = (view.table.data_ptr(), 0) if tabled else (0, view.origins[0])
        first, rest = divmod(index.offset, self._unit)
        limit = view.slots // self._unit
        if index.ids is not None:
            return table, base, index.ids.data_ptr(), index.ids.itemsize == 8, first, limit
        # Without ids a flat side may start anywhere, also between two units.
        return table, base + rest * self._token, 0, 0, first, limit


def _spans(view: KVView, writable: bool) -> list[tuple[int, int, int]]:
    """What a view's tensors cover; those that touch are one run to a plan, and so one piece."""
    joined: list[list[int]] = []
    for first, past in view.spans:
        if joined and joined[-1][1] == first:
            joined[-1][1] = past
        else:
            joined.append([first, past])
    held = [(first, past - first, int(writable)) for first, past in joined]
    return held + (_tensor(view.table) if len(view.origins) > 1 else [])


def _tensor(tensor: torch.Tensor) -> list[tuple[int, int, int]]:
    return [(tensor.data_ptr(), tensor.nbytes, 0)]


@cache
def library() -> ctypes.CDLL:
    """The kernel with the emulation, loaded; built by g++ where no process did before.

    Raises:
        Unsupported: g++ failed.
    """
    folder = files("portakv_native.ascend")
    with as_file(folder) as sources:
        texts = [path.read_text() for path in sorted(sources.rglob("*.h"))]
        flags = ("-std=c++17", "-O1", *os.environ.get(FLAGS, "").split())
        told = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
        main = sources / "emulation" / "library.cpp"
        parts = ("ascendc", *texts, main.read_text(), *flags, told.stdout)
        return _loaded(_kernel_cache.cached(parts, lambda: _build(main, flags)))


def _build(main: Path, flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="portakv-ascendc-") as folder:
        target = Path(folder, "rows.so")
        command = ["g++", *flags, "-shared", "-fPIC", f"-I{main.parent}", str(main)]
        done = subprocess.run(
            [*command, "-o", str(target)], capture_output=True, text=True, timeout=_SECONDS,
            env={**os.environ, "LD_PRELOAD": ""},  # a sanitizer's runtime is not for g++ itself
        )  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no output"]
            raise Unsupported(
                "The AscendC kernel on a CPU", f"g++ failed to compile it ({lines[0].strip()})"
            )
        return target.read_bytes()


def _loaded(binary: bytes) -> ctypes.CDLL:
    # Without a name on disk: nobody can put another library in its place between check and load.
    handle = os.memfd_create("portakv_ascendc")
    with os.fdopen(handle, "wb") as file:
        file.write(binary)
        file.flush()
        loaded = ctypes.CDLL(f"/proc/self/fd/{handle}")
    run = loaded.portakv_emulated_rows
    number, address = ctypes.c_uint32, ctypes.c_char_p
    run.argtypes = [
        address, number, number, address, number, number, number, address, number,
    ]  # fmt: skip
    return loaded
