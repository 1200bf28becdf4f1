# SPDX-License-Identifier: Apache-2.0
"""The emulated AscendC kernel on the simulated device that carries the name ``npu``.

An emulation of the kernel (``native/ascend/emulation``) has no streams and no device memory. Here
its launches become jobs of the simulated device: they run late, in the order of their stream, on
bytes that the host cannot touch. All before that is as on an NPU: the library is found, loaded,
queried and launched by `portakv.backends.ascend_kernel`::

    portakv conform portakv_conformance.vendor.ascendc_npu:AscendKernel --device simdev:npu

judges `ascend` with its kernel, and so does ``portakv conform ascend --device simdev:npu`` if
``PORTAKV_ASCENDC`` names a library that ``native/ascend/emulation/run.sh library`` has built.
"""

from __future__ import annotations

import ctypes
import struct
import traceback
import zlib
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from portakv import TransferError
from portakv.backends.ascend import Ascend
from portakv.backends.ascend_kernel import Kernel, open_kernel
from portakv_conformance.vendor import ascendc_emulated
from portakv_conformance.vendor.ascendc_emulated import Setting

#: What it always says of itself.
EMULATED = True
_STREAM_OF_ANOTHER_CONTEXT = 107003  # as CANN, for a stream of another device than the current one
_NO_DEVICE_MEMORY = 507053  # for memory that a core does not reach
_INTERNAL_ERROR = 507899  # for what the emulation did not expect; printed on stderr

_SERVE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_void_p,
)
_ROWS = (
    "rows(int library, int[] copy, int cores, int ub_bytes, int[] firsts, "
    "Tensor(a!)[] written, Tensor[] read) -> ()"
)
_libraries: list[ctypes.CDLL] = []
_retained: list[object] = []


class AscendKernel(Ascend):
    """`ascend` with the emulated kernel, built by g++ if it is not yet."""

    name = "ascend-kernel"

    @staticmethod
    def find_kernel(emulated: bool) -> tuple[Kernel | None, str]:
        path = ascendc_emulated.library_file()
        install(path)
        return open_kernel(path, emulated), "by the AscendC kernel, emulated on a CPU"


class _Stream(torch.Stream):
    """A stream as torch_npu's are: with a raw handle."""

    @property
    def npu_stream(self) -> int:
        return self.stream_id << 8 | self.device_index + 1


def install(path: str | None) -> None:
    """Let the simulated device run the launches of the library at a path; nothing if that does
    not emulate the kernel."""
    with suppress(OSError, AttributeError):
        if path:
            _install(path)


@cache
def _install(path: str) -> None:
    library = ctypes.CDLL(path)
    serve: Any = library.portakv_emulation_serve
    if not _retained:
        module = torch.get_device_module("npu")
        module.current_stream = _current_stream
        ops = torch.library.Library("portakv_ascendc", "DEF")
        ops.define(_ROWS)
        ops.impl("rows", _rows, "CPU")
        ops.impl("rows", lambda *arguments: None, "Meta")  # so that no launch waits for its job
        _retained.append(ops)  # its op goes with it
    callback = _SERVE(partial(_serve, len(_libraries)))
    serve(callback)
    _libraries.append(library)
    _retained.append(callback)


def run_at_once(path: str) -> list[int]:
    """Let the library at a path run its launches when they are made: for torch_npu over a stub of
    CANN, whose device memory is the host's. The handles of the streams come into the list."""
    library = ctypes.CDLL(path)
    handles = []
    rows = ascendc_emulated.library().portakv_emulated_rows

    def serve(copy: int, cores: int, ub_bytes: int, memory: int, count: int, handle: int) -> int:
        handles.append(handle)
        retained = list(struct.iter_unpack("<4Q", ctypes.string_at(memory, 4 * 8 * count)))
        setting = Setting(cores, ub_bytes, 1)
        try:
            ascendc_emulated.run(rows, ctypes.string_at(copy, 15 * 8), retained, setting, 0)
        except TransferError:
            traceback.print_exc()
            return _INTERNAL_ERROR
        return 0

    callback = _SERVE(serve)
    library.portakv_emulation_serve(callback)
    _retained.append(callback)
    return handles


def _current_stream(device: Any = None) -> torch.Stream:
    result = torch.accelerator.current_stream(device)
    names = ("stream_id", "device_index", "device_type")
    return _Stream(**{name: getattr(result, name) for name in names})


def _serve(
    library: int, copy: int, cores: int, ub_bytes: int, memory: int, count: int, handle: int
) -> int:
    """Launch on the stream with a handle; 0, or an error of CANN."""
    device = (handle & 0xFF) - 1
    stream_id = handle >> 8
    if device != torch.accelerator.current_device_index():
        return _STREAM_OF_ANOTHER_CONTEXT
    numbers = list(struct.unpack("<15q", ctypes.string_at(copy, 15 * 8)))
    lent = struct.iter_unpack("<4Q", ctypes.string_at(memory, 4 * 8 * count))
    retained = sorted((one[:3] for one in lent if one[1]), key=lambda one: not one[2])
    try:
        tensors = [_tensor(first, size, device) for first, size, _ in retained]
        written = sum(1 for _, _, writable in retained if writable)
        kind = torch.accelerator.current_stream().device_type
        stream = torch.Stream(stream_id=stream_id, device_index=device, device_type=kind)
        with torch.get_device_module("npu").stream(stream):
            torch.ops.portakv_ascendc.rows(
                library,
                numbers,
                cores,
                ub_bytes,
                [first for first, _, _ in retained],
                tensors[:written],
                tensors[written:],
            )
    except _HostMemory:
        return _NO_DEVICE_MEMORY
    except Exception:  # the caller is C++, which would drop it without a word
        traceback.print_exc()
        return _INTERNAL_ERROR
    return 0


class _HostMemory(Exception):
    """Memory of the host, which a vector core does not reach."""


def _tensor(first: int, size: int, device: int) -> torch.Tensor:
    """Bytes of a device."""
    storage = torch._C._construct_storage_from_data_pointer
    on_host = torch.empty(0, dtype=torch.uint8, device="cpu")
    if on_host.set_(storage(first, on_host.device, size)).is_pinned():
        raise _HostMemory
    there = torch.empty(0, dtype=torch.uint8, device=torch.device("npu", device))
    return there.set_(storage(first, there.device, size), 0, (size,), (1,))


def _rows(
    library: int,
    copy: list[int],
    cores: int,
    ub_bytes: int,
    firsts: list[int],
    written: list[torch.Tensor],
    read: list[torch.Tensor],
) -> None:
    """The job: the kernel, on the bytes of tensors that begin at addresses of the device."""
    retained = [*((one, True) for one in written), *((one, False) for one in read)]
    memory = [
        (first, one.numel(), writable, one.data_ptr())
        for first, (one, writable) in zip(firsts, retained, strict=True)
    ]
    packed = struct.pack("<15q", *copy)
    seed = zlib.crc32(packed)
    rows = _libraries[library].portakv_emulated_rows
    ascendc_emulated.run(rows, packed, memory, Setting(cores, ub_bytes, seed % 3), seed)
