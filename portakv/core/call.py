# SPDX-License-Identifier: Apache-2.0
"""Make a whole copy by one call of the core, which reads tensors and ids.

The source is `native/core/call.cpp`. This module knows words and objects of torch;
`portakv.copy.inside` knows what they mean.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from portakv.core.library import pylibrary

# The codes of `core.h`.
OTHERWISE = -50
DRIVER = -1000
#: An end or a count: as many as there are.
TO_THE_END = -1
#: Bits of a result below its tokens: a status word may be written; ids of the host skip positions.
GUARDED = 2
SKIPS = 1


class _Watch(ctypes.Structure):
    """`portakv_watch` of `core.h`."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("addresses", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("storages", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("storage_count", ctypes.c_int64),
    )


class Watch:
    """Tensors and storages whose memory must stay as it is.

    Attributes:
        address: for calls of the core.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], storages: Sequence[torch.UntypedStorage]
    ) -> None:
        self._tensors = tuple(tensors)
        self._storages = tuple(storages)
        # Objects of Python by their addresses, which `id` returns; this object keeps them.
        objects = array("q", map(id, self._tensors)), array("q", map(id, self._storages))
        self._addresses = array("q", [each.data_ptr() for each in self._tensors])
        self._sizes = array("q", map(len, self._storages))
        of_tensors, of_storages, addresses, sizes = (
            each.buffer_info()[0] for each in (*objects, self._addresses, self._sizes)
        )
        counts = len(self._tensors), len(self._storages)
        self._words = _Watch(of_tensors, addresses, counts[0], of_storages, sizes, counts[1])
        self._objects = objects
        self.address = ctypes.addressof(self._words)

    @property
    def in_place(self) -> bool:
        """Return True if each tensor has its address."""
        return array("q", [each.data_ptr() for each in self._tensors]) == self._addresses

    @property
    def unchanged(self) -> bool:
        """Return True if each tensor has its address and each storage its size."""
        # The length of an untyped storage is its bytes. `len` costs less than `nbytes`.
        return self.in_place and array("q", map(len, self._storages)) == self._sizes

    def read_sizes(self) -> None:
        """Take the present sizes of the storages as theirs."""
        for number, storage in enumerate(self._storages):
            self._sizes[number] = len(storage)


class _View(ctypes.Structure):
    """`portakv_copy_view` of `core.h`."""

    _fields_ = (
        ("form", ctypes.c_void_p),
        ("dtypes", ctypes.c_void_p),
        ("addresses", ctypes.c_void_p),
        ("table", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("span_count", ctypes.c_int64),
        ("device_type", ctypes.c_int64),
        ("device_id", ctypes.c_int64),
        ("writable", ctypes.c_int64),
        ("table_on_device", ctypes.c_int64),
        ("watch", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
        ("entry_bytes", ctypes.c_int64),
    )


class OpenedView:
    """A view as the core reads it in each call.

    Args:
        form: the address of the form's words, which stay as long as this object.
        dtypes: for each kv the word of its dtype; none: bytes.
        kv: parts of the form.
        addresses: where the addresses of the view are, which stay as long as this object.
        table: where the device reads them; 0: it cannot.
        slots: tokens of the view.
        spans: sorted ranges [first byte, past the last byte) of its memory.
        device: DLPack's numbers of its device.
        writable: a copy may write it.
        table_on_device: the device alone knows the addresses.
        watch: its memory; None: raw addresses.
        entries: of the addresses, and all bytes at each of them; 0: unknown.
        kept: objects that have the form and the addresses.

    Attributes:
        address: for calls of the core.
        tabled: kernels may read the table.
    """

    __slots__ = ("_kept", "_words", "address", "tabled")

    def __init__(
        self,
        form: int,
        dtypes: Sequence[int],
        kv: int,
        addresses: int,
        table: int,
        slots: int,
        spans: Sequence[tuple[int, int]],
        device: tuple[int, int],
        writable: bool,
        table_on_device: bool,
        watch: Watch | None,
        entries: tuple[int, int],
        kept: object,
    ) -> None:
        self.tabled = table != 0
        words = array("q", dtypes or [0] * kv)
        ranges = array("q", [address for span in spans for address in span])
        self._kept = words, ranges, watch, kept
        self._words = _View(
            form,
            words.buffer_info()[0],
            addresses,
            table,
            slots,
            ranges.buffer_info()[0],
            len(spans),
            *device,
            writable,
            table_on_device,
            watch.address if watch else 0,
            *entries,
        )
        self.address = ctypes.addressof(self._words)


class Calls(NamedTuple):
    """The functions of the core, with the arguments that `portakv_copy_function` of ``core.h``
    lists.

    Each holds the interpreter but for the launch, and returns tokens and bits, or a code. They are
    functions of Python itself: ctypes would take longer to convert their arguments than the core
    takes to plan a copy.
    """

    copy_chunk: Callable[..., int]
    copy_views: Callable[..., int]
    read_copy: Callable[..., int]


@cache
def calls() -> Calls:
    """Return the functions."""
    function = pylibrary().portakv_copy_function
    function.argtypes = (ctypes.c_int64,)
    function.restype = ctypes.py_object
    return Calls(function(0), function(1), function(2))
