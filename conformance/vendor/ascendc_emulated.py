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
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import as_file, files
from itertools import product
from typing import Any, NamedTuple

import torch

from portakv import CopyPlan, TransferError, Unsupported
from portakv.backends.ascend_kernel import Arguments, Memory, StatusWords, reached
from portakv.backends.base import Backend, Capabilities, Decision, Launch, MoveLaunch
from portakv.plan.plan import Move
from portakv_conformance.vendor import cpp

#: What it always says of itself.
EMULATED = True
#: Further flags for g++, from the environment: a process under a sanitizer sets them.
FLAGS = "PORTAKV_ASCENDC_FLAGS"

_HOST = ("pageable", "pinned")
_MEMORY = struct.Struct("<4Q")
_CPU = torch.device("cpu")


class Setting(NamedTuple):
    """The setting of a launch: cores, bytes of one unified buffer, and when copies take place."""

    cores: int
    ub_bytes: int
    when: int  # 0: immediately; 1: as late as allowed; 2: either way


#: Small buffers cut even small copies into many tiles; 192 KiB is what an Ascend 910B is reported
#: to have. Which setting a launch meets follows from what it moves, so that a case can be run
#: again.
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


class _EmulatedLaunch(MoveLaunch):
    def __init__(self, plan: CopyPlan) -> None:
        self._unit = plan.unit
        self._arguments = Arguments(plan)
        nests = self._arguments.nests
        self._nests = [ctypes.create_string_buffer(nest, len(nest)) for nest in nests]
        self._run = library().portakv_emulated_rows

    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        words = StatusWords(0 if status is None else max(x.cores for x in SETTINGS), _CPU)
        nests = [ctypes.addressof(nest) for nest in self._nests]
        further = [
            Memory(at, len(nest), False) for at, nest in zip(nests, self._nests, strict=True)
        ]
        # What the kernel may not write is not writable here either.
        retained = reached(move, [*further, *words.memory])
        memory = [(first, size, writable, first) for first, size, writable in retained]
        copies = self._arguments.copies(nests, move, words.address)
        for nest, copy in zip(self._nests, copies, strict=True):
            seed = zlib.crc32(nest.raw, move.count // self._unit)
            run(self._run, copy, memory, SETTINGS[seed % len(SETTINGS)], seed)
        if status is not None and (first := int(words.first)):
            status[0] = first


def run(
    rows: Any,
    copy: bytes,
    memory: Sequence[tuple[int, int, bool, int]],
    setting: Setting,
    seed: int,
) -> None:
    """Run a launch by ``portakv_emulated_rows`` of a library, now; raises `TransferError` if the
    emulation found what hardware would refuse.

    Args:
        memory: what it may touch: address, bytes, whether it may be written, address of its bytes.
    """
    lent = b"".join(_MEMORY.pack(*one) for one in memory)
    why = ctypes.create_string_buffer(512)
    failed = rows(
        copy, setting.cores, setting.ub_bytes, lent, len(memory), setting.when, seed, why, len(why)
    )
    if failed:
        raise TransferError(f"The emulated AscendC kernel failed: {why.value.decode()}.")


@cache
def library() -> ctypes.CDLL:
    """Return the loaded kernel with the emulation; g++ builds it unless a process did before.

    Raises:
        Unsupported: g++ failed.
    """
    loaded = ctypes.CDLL(library_file())
    rows = loaded.portakv_emulated_rows
    number = ctypes.c_uint32
    text = ctypes.c_char_p
    rows.argtypes = [text, number, number, text, number, number, number, text, number]
    return loaded


@cache
def library_file() -> str:
    """Return the path from which this process can load that library."""
    with as_file(files("portakv_native.ascend")) as sources:
        texts = [path.read_text() for path in sorted(sources.rglob("*.h"))]
        main = sources / "emulation" / "library.cpp"
        flags = ("-std=c++17", "-O1", *os.environ.get(FLAGS, "").split(), "-shared", "-fPIC")
        command = ["g++", *flags, f"-I{main.parent}", str(main)]
        try:
            return cpp.in_memory("portakv_ascendc", cpp.built(command, [*texts, main.read_text()]))
        except cpp.CompilerError as error:
            why = f"g++ failed to compile it ({error})"
            raise Unsupported("The AscendC kernel on a CPU", why) from error
