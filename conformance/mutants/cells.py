# SPDX-License-Identifier: Apache-2.0
"""Host memory as a kernel sees it: by absolute address, one vector at a time, inside buffers only.

An access outside the buffers of a view raises, as a device reports an illegal address; so a mutant
that runs wild is seen every time, and harms nobody else's memory.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv import KVView

Int64 = npt.NDArray[np.int64]

_FIRST = 16  # a multiple of every vector; numpy takes address 0 for "no memory given"
_SPACE = 2**56  # bytes, past every address that a process can have
_ELEMENTS = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "|V16"}


def narrow(numbers: Int64) -> Int64:
    """Numbers as they come back from 32 bits."""
    return numbers.astype(np.int32).astype(np.int64)


class IllegalAddress(RuntimeError):
    """An access outside the buffers of a view."""


@cache
def _space(width: int) -> npt.NDArray[Any]:
    """The whole address space for numpy, as vectors of one width."""
    shape = ((_SPACE - _FIRST) // width,)
    told = {"data": (_FIRST, False), "shape": shape, "typestr": _ELEMENTS[width], "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=told))


def _cells(addresses: Int64, nbytes: int, width: int) -> Int64:
    """Numbers of the vectors in ``nbytes`` from each address on, int64 ``[runs, vectors]``.

    As on hardware without byte lanes the low bits of an address that is not aligned are lost.
    """
    first = (addresses - _FIRST) // width
    return np.asarray(first[:, None] + np.arange(nbytes // width, dtype=np.int64))


def load(view: KVView, addresses: Int64, nbytes: int, width: int) -> npt.NDArray[Any]:
    """The runs of ``nbytes`` at addresses of a view, vectors of ``width`` ``[runs, vectors]``."""
    check_inside(view, addresses, nbytes)
    return np.asarray(_space(width)[_cells(addresses, nbytes, width)])


def store(view: KVView, addresses: Int64, values: npt.NDArray[Any]) -> None:
    """Put vectors ``[runs, vectors]`` at addresses of a view."""
    width, nbytes = values.dtype.itemsize, values.shape[1] * values.dtype.itemsize
    check_inside(view, addresses, nbytes)
    _space(width)[_cells(addresses, nbytes, width)] = values


def check_inside(view: KVView, addresses: Int64, nbytes: int) -> None:
    """Raise `IllegalAddress` where a run leaves the storages of a view's tensors."""
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in view.owners}
    bases = np.array(sorted(storages), dtype=np.int64)
    ends = np.array([base + storages[base] for base in bases.tolist()], dtype=np.int64)
    at = np.searchsorted(bases, addresses, side="right") - 1
    outside = (at < 0) | (addresses + nbytes > ends[at])
    if outside.any():
        first = int(addresses[outside][0])
        raise IllegalAddress(
            f"{int(outside.sum())} runs of {nbytes} bytes, the first at {first:#x}, leave the "
            f"buffers of {view.layout.text!r}; nothing was moved. Mend the addresses."
        )
