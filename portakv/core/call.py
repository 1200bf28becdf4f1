# SPDX-License-Identifier: Apache-2.0
"""Make a whole copy by one call of the core, which reads tensors and ids.

The source is `native/core/call.cpp`. This module knows words and objects of torch;
`portakv.copy.inside` knows what they mean.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from portakv.core.library import python_function
from portakv.core.view import address_in_torch, handle_at

# The codes of `core.h`.
OTHERWISE = -50
STREAM = -51
PREPARE = -110
DRIVER = -1000
#: An end or a count: as many as there are.
TO_THE_END = -1
#: An answer about an end: the work has ended, and its status word reports an error.
REPORTS = -1
#: Bits of a result: a status word may be written; ids of the host skip positions.
GUARDED = 2
SKIPS = 1
#: Above these bits is the answer of a pick, below the tokens.
ANSWER = 2
PICKED = (1 << 14) - 1
#: The bits below the tokens.
TOKENS = 16


class Watch:
    """Tensors and storages whose memory must stay as it is; `portakv_watch` of `core.h`."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._addresses = array("q", [each.data_ptr() for each in self._tensors])
        # The number of the first tensor of each storage. Torch makes an object for each tensor of a
        # storage, with one address of the storage.
        first = dict[int, int]()
        storages = [each.untyped_storage() for each in self._tensors]
        for number, storage in enumerate(storages):
            first.setdefault(storage._cdata, number)
        self._first = [*first.values()]
        self._storages = [storages[number] for number in self._first]
        self._sizes = array("q", map(len, self._storages))

    @cached_property
    def address(self) -> int:
        """Where the core reads the words of this object."""
        tensors = handles_of(self._tensors)
        storages = array("q", [tensors[number] for number in self._first])
        self._pointers = tensors, storages
        self._words = array("q", (*tensors.buffer_info(), *storages.buffer_info()))
        self._words.insert(1, self._addresses.buffer_info()[0])
        self._words.insert(4, self._sizes.buffer_info()[0])
        self._words.append(address_in_torch("aoti_torch_get_data_ptr"))
        self._words.append(address_in_torch("aoti_torch_get_storage_size"))
        return self._words.buffer_info()[0]

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


def handles_of(tensors: Sequence[torch.Tensor]) -> array[int]:
    """Return torch's handles of tensors, which stay as long as the tensors."""
    at = handle_at()
    assert at is not None  # else the core reads no tensors
    return array("q", [id(each) + at for each in tensors])


class Fault(ctypes.Structure):
    """`portakv_link_fault` of `core.h`."""

    _fields_ = (
        ("code", ctypes.c_int64),
        ("what", ctypes.c_int64),
        ("slice", ctypes.c_int64),
        ("values", ctypes.c_int64 * 2),
    )


class CopyEnd(ctypes.Structure):
    """`portakv_copy_end` of `core.h`."""

    _fields_ = (
        ("status", ctypes.c_uint64),
        ("event", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("word", ctypes.c_void_p),
        ("fault", Fault),
    )


class CurrentStream(ctypes.Structure):
    """`portakv_current` of `core.h`."""

    _fields_ = (
        ("device", ctypes.c_int64),
        ("current_device", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
        ("capturing", ctypes.c_void_p),
    )


class Executor(ctypes.Structure):
    """`portakv_executor` of `core.h`."""

    _fields_ = (
        ("kernels", ctypes.c_void_p),
        ("torch", ctypes.c_void_p),
        ("current", ctypes.c_void_p),
    )


class Crossings(ctypes.Structure):
    """`portakv_crossings` of `core.h`."""

    _fields_ = (
        ("by", Executor),
        ("plans", ctypes.c_void_p * 2),
        ("link", ctypes.c_void_p),
        ("aside", ctypes.c_int64),
        ("picked", ctypes.c_void_p),
        ("only", ctypes.c_int64),
        ("counted", ctypes.c_int64 * 4),
    )


class OpenedView:
    """A view as the core reads it in each call; `portakv_copy_view` of `core.h`.

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
        versions: the tensors whose versions a copy raises that writes the view.
        entries: of the addresses, and all bytes at each of them; 0: unknown.
        kept: objects that have the form and the addresses.

    Attributes:
        address: for calls of the core.
        tabled: kernels may read the table.
    """

    __slots__ = ("_kept", "_words", "address", "tabled", "versions")

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
        versions: tuple[torch.Tensor, ...],
        entries: tuple[int, int],
        kept: object,
    ) -> None:
        self.tabled = table != 0
        self.versions = versions
        words = array("q", dtypes or [0] * kv)
        ranges = array("q", [address for span in spans for address in span])
        raised = handles_of(versions)
        self._kept = words, ranges, watch, raised, kept
        at = words.buffer_info()[0], addresses, table
        covered = ranges.buffer_info()[0], len(spans)
        watched = watch.address if watch else 0
        flags = writable, table_on_device
        memory = watched, *entries, *raised.buffer_info()
        self._words = array("q", (form, *at, slots, *covered, *device, *flags, *memory))
        self.address = self._words.buffer_info()[0]


class _Words(ctypes.Structure):
    """`portakv_words` of `core.h`."""

    _fields_ = (("batches", ctypes.c_void_p), ("count", ctypes.c_int64))


class WordBatches:
    """Batches of a process's status words, of `SIZE` words each, which the core looks at before
    it copies.

    Attributes:
        address: for calls of the core.
    """

    SIZE = 64

    def __init__(self) -> None:
        self._batches = list[npt.NDArray[np.int64]]()
        self._words = _Words()
        self._pointers: list[array[int]] = []  # another thread's call may read former ones
        self.address = ctypes.addressof(self._words)

    def append(self, batch: npt.NDArray[np.int64]) -> None:
        """Add a batch, which stays."""
        self._batches.append(batch)
        pointers = array("q", [each.ctypes.data for each in self._batches])
        self._pointers.append(pointers)
        self._words.batches = pointers.buffer_info()[0]
        self._words.count = len(pointers)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return iter(self._batches)


class OpenedChunks(ctypes.Structure):
    """`portakv_chunk_copies` of `core.h`."""

    _fields_ = (
        ("by", Executor),
        ("caches", ctypes.c_void_p),
        ("layouts", ctypes.c_void_p * 5),
        ("words", ctypes.c_void_p),
    )


class Calls(NamedTuple):
    """The functions of the core, with the arguments that `portakv_python_function` of ``core.h``
    lists.

    Each holds the interpreter but for calls of the driver, and returns what ``core.h`` says, or a
    code. They are functions of Python itself: ctypes would take longer to convert their arguments
    than the core takes to plan a copy.
    """

    copy_chunk: Callable[..., int]
    copy_views: Callable[..., int]
    query_end: Callable[[int], int]
    check_views: Callable[..., tuple[int, int, int] | int]
    check_chunk: Callable[..., tuple[int, int, int, tuple[Any, ...]] | int]
    copy_across: Callable[..., int]


@cache
def calls() -> Calls:
    """Return the functions."""
    return Calls(*map(python_function, (0, 1, 2, 3, 4, 6)))
