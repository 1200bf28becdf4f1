# SPDX-License-Identifier: Apache-2.0
"""Small values that the driver takes along with the command to copy them.

CUDA documents that a copy of up to 64 KB from pageable host memory is asynchronous, and that the
memory was read when the call returns. That such a copy waits for no copy engine is measured alone:
on an H200, where 65,536 bytes did not wait, and 80,000 did (docs/host.md, "Small copies").
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch

from portakv.errors import Unsupported
from portakv.host._small_ways import AtOnce
from portakv.host._values import Room, Values
from portakv.runtime import _libcuda
from portakv.runtime import cuda as _cuda_driver

#: Bytes that the driver takes along.
MOST = 65536

_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES


@cache
def why_not(device: torch.device) -> str | None:
    """What keeps values from going inline to a device, as a phrase; None where they can."""
    why = _cuda_driver.no_cuda(device)
    if why is not None:
        return why
    try:
        _copy_function()
        return _read_later(device)
    except (OSError, AttributeError) as error:
        return f"the CUDA driver's library cannot be used ({error})"


class Inline(AtOnce):
    """With the command: the values are gone from the host when the call returns.

    Args:
        device: where the values go.
        dtype: of the values.
        most: how many they may be.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, most: int) -> None:
        super().__init__(dtype, most, _Pages, device)
        self._device, self._itemsize = device, dtype.itemsize
        self._caller = _cuda_driver.Caller(device)
        self._copy = _copy_function()

    def cross(self, mine: Any, to: int, count: int, stream: torch.Stream | None) -> None:
        """See `AtOnce.cross`."""
        handle = self._caller.handle(stream)
        if handle is None:
            with torch.cuda.device(self._device):
                self.cross(mine, to, count, stream)
            return
        error = self._copy(to, mine.address, count * self._itemsize, handle)
        if error:
            name = _libcuda.error_name(error, _libcuda.library())
            raise _cuda_driver.refused(name, f"A copy of {count} values")

    def refill(self, values: Values) -> None:
        raise Unsupported(
            "Refilling a small copy that goes inline",
            "it cannot be captured; make it with way='mapped', or send instead of refill",
        )


class _Pages:
    """Pageable memory for the values of one thread.

    Theirs may be pinned, and would be read later than the call returns. So would these pages if
    somebody registered them with his own: they are whole ones, off the heap.
    """

    def __init__(self, dtype: torch.dtype, most: int, device: torch.device) -> None:
        _cuda_driver.adopt(device)  # a new thread has no context yet
        nbytes = most * dtype.itemsize
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.room = Room(memoryview(pages)[:nbytes], dtype)  # which keeps the pages
        self.whole = self.room.whole


@cache
def _copy_function() -> Any:
    word = ctypes.c_uint64  # CUdeviceptr, and the addresses of the host and of a stream
    arguments = word, word, ctypes.c_size_t, word
    return _libcuda.function(_libcuda.library(), "cuMemcpyHtoDAsync_v2", *arguments)


def _read_later(device: torch.device) -> str | None:
    """That a device may read pageable memory where it lies, and so perhaps after the call, as a
    phrase; None: it does not. What such a device does was not looked at."""
    library, number = _libcuda.library(), ctypes.POINTER(ctypes.c_int)
    find = _libcuda.function(library, "cuDeviceGet", number, ctypes.c_int)
    ask = _libcuda.function(library, "cuDeviceGetAttribute", number, ctypes.c_int, ctypes.c_int)
    _cuda_driver.adopt(device)  # the driver answers once it has been initialised
    found, reads = ctypes.c_int(), ctypes.c_int()
    error = find(ctypes.byref(found), device.index) or ask(
        ctypes.byref(reads), _HOST_PAGE_TABLES, found
    )
    if error:
        name = _libcuda.error_name(error, library)
        return f"the driver does not tell how {device} reads pageable memory ({name})"
    if reads.value:
        return f"{device} reads pageable memory by the host's page tables, perhaps after the call"
    return None
