# SPDX-License-Identifier: Apache-2.0
"""Keep torch's calls of a worker thread off the threads of OpenMP.

Each thread that calls torch has a separate team of OpenMP threads. After each call the team spins
for a while, on the cores of the model that computes meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's calls of this thread run in this thread alone; other threads change nothing.

    Does nothing if torch was built without OpenMP. Not for the main thread, where an interrupt
    might leave the number of the caller at one.
    """
    library = _library()
    if library is None:
        yield
        return
    before = torch.get_num_threads()  # torch sets the number of a new thread in its first call
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


@cache
def _library() -> ctypes.PyDLL | None:
    """Return torch's library, by which the OpenMP functions are found that torch calls."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.omp_set_num_threads(library.omp_get_max_threads())
    except (OSError, AttributeError):  # another system, or another library for threads
        return None
    return library
