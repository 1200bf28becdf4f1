# SPDX-License-Identifier: Apache-2.0
"""What launching a compiled kernel takes whatever its driver: arguments that threads do not share,
a stream's handle, and what to raise where nothing can be launched or prepared."""

from __future__ import annotations

import ctypes
import threading

import torch

from portakv.errors import Unsupported


class Arguments(threading.local):
    """One buffer for each kernel and thread, so that a launch can be called from several at once.

    Attributes:
        buffers: what `RowsKernel.pack` writes into.
        addresses: of the list of arguments (there is one), as a driver's launch takes it.
    """

    def __init__(self, fixed: list[bytes]) -> None:
        self.buffers = [bytearray(one) for one in fixed]
        self._owned = [(ctypes.c_char * len(one)).from_buffer(one) for one in self.buffers]
        self._lists = [(ctypes.c_void_p * 1)(ctypes.addressof(one)) for one in self._owned]
        self.addresses = [ctypes.addressof(one) for one in self._lists]


def forked(driver: str) -> Unsupported:
    """For a launch in another process than the one that prepared it."""
    return Unsupported(
        "Launching in a forked process", f"{driver} does not survive fork; start it by spawn"
    )


def captured() -> Unsupported:
    """For preparing, inside graph capture, what is not there yet."""
    return Unsupported(
        "Preparing a copy inside graph capture",
        "its kernel has to be compiled and loaded first; make the same call once before the "
        "capture",
    )


def raw_stream(stream: torch.Stream) -> int:
    """The driver's handle of a torch stream, on devices that torch calls ``cuda``."""
    own = getattr(stream, "cuda_stream", None)
    if own is not None:
        return int(own)
    same = torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
    return int(same.cuda_stream)
