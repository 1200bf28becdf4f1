# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel of ``native/ascend``: found where it was built, loaded, and launched.

`PORTAKV_ASCENDC` names the library; else it is looked for where ``run_in_cann.sh npu`` leaves it. A
library that emulates the kernel has the same interface (``copy.h``) and says so: it is taken for an
emulated device and for no other.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from portakv.backends._ascendc_arguments import Arguments, Memory, reached, refusal
from portakv.backends._guarding import GuardedRows
from portakv.errors import TransferError
from portakv.plan.plan import CopyPlan
from portakv.runtime._vendor_package import Unusable

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

    _Side = tuple[KVView, Index]

#: Names the library.
VARIABLE = "PORTAKV_ASCENDC"
#: What this file launches, as ``portakv::kAbi`` counts it.
ABI = 1
_NATIVE = "portakv_native.ascend"
_PLACE = ("lib", "libportakv_ascend.so")
_BUILD = f"bash native/ascend/run_in_cann.sh npu builds it, and {VARIABLE} names it"
_AGAIN = "build it again, from native/ascend of this release"
_ELEMENT = 8  # of a row that is indexed where the kernel does not take the plan

_pointer, _number = ctypes.c_void_p, ctypes.c_uint32
# What a library exports (copy.h), with the arguments of each and what it returns.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "portakv_ascend_abi": (_number, ()),
    "portakv_ascend_emulated": (_number, ()),
    "portakv_ascend_platform": (ctypes.c_int, (ctypes.POINTER(_number),) * 2),
    "portakv_ascend_rows": (ctypes.c_int, (ctypes.c_char_p, _number, _number, _pointer)),
}
# And what one that emulates exports beside it (emulation/library.cpp).
_LEND: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "portakv_emulation_lend": (None, (ctypes.c_char_p, _number))
}
_MEMORY = struct.Struct("<4Q")


@dataclass(frozen=True)
class Kernel:
    """A loaded library.

    Attributes:
        name: its file's, for a reader; path: of that file.
        library: with its functions typed.
        blocks, ub_bytes: vector cores, and bytes of one core's unified buffer.
        emulated: it runs the kernel on a CPU.
    """

    name: str
    path: str
    library: Any
    blocks: int
    ub_bytes: int
    emulated: bool

    def launch(self, copy: bytes, memory: Sequence[Memory], stream: int) -> None:
        """Launch one nest on a stream, whose device is the current one.

        Args:
            copy: a ``portakv::Copy``.
            memory: what it may touch. Only an emulation wants to know: it has no device memory.
            stream: its raw handle.

        Raises:
            TransferError: the launch was refused.
        """
        if self.emulated:
            lent = b"".join(_MEMORY.pack(*one, 0) for one in memory)
            self.library.portakv_emulation_lend(lent, len(memory))
        code = self.library.portakv_ascend_rows(copy, self.blocks, self.ub_bytes, stream)
        if code:
            raise TransferError(
                f"The launch of the AscendC kernel in {self.name} returned {code}; the copy was "
                f"not made, or in part. 1 says that its arguments cannot be right; other codes are "
                f"CANN's."
            )


def find_kernel(emulated: bool) -> tuple[Kernel | None, str]:
    """The kernel for a device, or None where none was built; and who carries plans out, in words.

    Raises:
        Unusable: `PORTAKV_ASCENDC` names one that cannot be used.
    """
    named = os.environ.get(VARIABLE)
    if named:
        try:
            kernel = open_kernel(named, emulated)
        except Unusable as error:
            raise Unusable(
                f"{VARIABLE} names {named}, and {error}; without {VARIABLE} the ops of torch_npu "
                f"carry plans out"
            ) from error
        return kernel, _told(kernel)
    built = Path(str(files(_NATIVE)), *_PLACE)
    if not built.is_file():
        return None, f"by its ops, since the AscendC kernel was not built ({_BUILD})"
    try:
        kernel = open_kernel(str(built), emulated)
    except Unusable as error:
        return None, f"by its ops, since of the AscendC kernel {error}"
    return kernel, _told(kernel)


def told(plan: CopyPlan) -> str:
    """What carries a plan out where there is a kernel."""
    why = refusal(plan)
    return "the AscendC kernel" if why is None else f"index ops, after a wait, since {why}"


def _told(kernel: Kernel) -> str:
    return f"by the AscendC kernel in {kernel.name}{', emulated' if kernel.emulated else ''}"


def open_kernel(path: str, emulated: bool) -> Kernel:
    """The library at a path, for a device that is emulated or is not.

    Raises:
        Unusable: it is not there, cannot be loaded, is no build of this release, or is one for
            the other kind of device; a clause.
    """
    if not Path(path).is_file():
        raise Unusable(f"there is no such file ({_BUILD})")
    kernel = _loaded(path)
    if kernel.emulated and not emulated:
        raise Unusable(
            f"{kernel.name} emulates the kernel on a CPU, and this NPU is real; {_BUILD}"
        )
    if emulated and not kernel.emulated:
        raise Unusable(
            f"{kernel.name} is for an NPU, and this one is emulated; "
            f"native/ascend/emulation/run.sh library builds one for it"
        )
    return kernel


@cache
def _loaded(path: str) -> Kernel:
    """A library, loaded once in a process; who asks judges whether it is emulated.

    Raises:
        Unusable: a clause.
    """
    name = Path(path).resolve().name
    try:
        library = ctypes.CDLL(path)
    except OSError as error:  # which names the library that is missing, such as libascendcl.so
        raise Unusable(
            f"{name} cannot be loaded ({error}); source CANN's set_env.sh, or {_AGAIN}"
        ) from error
    _type(library, name, {"portakv_ascend_abi": _FUNCTIONS["portakv_ascend_abi"]})
    abi = library.portakv_ascend_abi()
    if abi != ABI:
        raise Unusable(f"{name} has the interface {abi}, and {ABI} is launched here; {_AGAIN}")
    _type(library, name, _FUNCTIONS)
    emulated = bool(library.portakv_ascend_emulated())
    _type(library, name, _LEND if emulated else {})
    blocks, ub_bytes = _number(), _number()
    code = library.portakv_ascend_platform(ctypes.byref(blocks), ctypes.byref(ub_bytes))
    if code:
        raise Unusable(
            f"{name} found no vector cores, or none with a unified buffer (code {code}); source "
            f"CANN's set_env.sh, and see that there is an NPU"
        )
    return Kernel(name, path, library, blocks.value, ub_bytes.value, emulated)


def _type(library: Any, name: str, functions: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
    for function, (returned, arguments) in functions.items():
        try:
            found = getattr(library, function)
        except AttributeError:
            raise Unusable(f"{name} has no function {function}; {_AGAIN}") from None
        found.restype, found.argtypes = returned, arguments


class KernelRows:
    """A plan by the kernel, which skips and guards; by indexing where the kernel does not take it.

    Calls order their work on the current stream of ``device``, which is the current device.
    """

    def __init__(self, kernel: Kernel, plan: CopyPlan, device: torch.device) -> None:
        self._kernel, self._device = kernel, device
        self._rest = GuardedRows(plan, device, _ELEMENT) if refusal(plan) else None
        if self._rest is not None:
            return
        self._arguments = Arguments(plan)
        with torch.inference_mode(False):
            self._nests = [
                torch.frombuffer(bytearray(nest), dtype=torch.int64).to(device)
                for nest in self._arguments.nests
            ]
        self._addresses = [nest.data_ptr() for nest in self._nests]

    @torch.no_grad()
    def __call__(self, src: _Side, dst: _Side, count: int, status: torch.Tensor | None) -> None:
        if self._rest is not None:
            self._rest(src, dst, count, status)
            return
        for view in (src[0], dst[0]):
            view.check_memory()
        # A vector core cannot write to the host's memory: the word is copied there afterwards.
        told = status is not None
        word = torch.zeros(1, dtype=torch.int64, device=self._device) if told else None
        address = 0 if word is None else word.data_ptr()
        copies = list(self._arguments.copies(self._addresses, src, dst, count, address))
        memory = self._reached(src, dst, address) if self._kernel.emulated else ()
        # Asked last: torch_npu queues ops on the host, and empties that queue when it is asked for
        # the handle (NPUStream::stream in its csrc/core/npu/NPUStream.cpp).
        stream = torch.get_device_module(self._device).current_stream(self._device).npu_stream
        for copy in copies:
            self._kernel.launch(copy, memory, stream)
        if status is not None and word is not None:
            status.copy_(word, non_blocking=True)

    def _reached(self, src: _Side, dst: _Side, status: int) -> list[Memory]:
        further = [(nest.data_ptr(), nest.nbytes, False) for nest in self._nests]
        return reached(src, dst, [*further, (status, 8, True)] if status else further)
