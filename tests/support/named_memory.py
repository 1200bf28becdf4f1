# SPDX-License-Identifier: Apache-2.0
"""Host memory that other processes can open by a name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def named_memory(name: str, nbytes: int) -> Iterator[torch.Tensor]:
    """Make a file of shared memory, uint8 ``[nbytes]``, which goes at the end of the context."""
    path = Path(f"/dev/shm/{name}")
    with open(path, "w+b") as file:
        os.ftruncate(file.fileno(), nbytes)
        try:
            yield torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
        finally:
            path.unlink()
