# SPDX-License-Identifier: Apache-2.0
"""Which weights a folder has: the rows of one model are not those of another."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

#: The endings of files with weights.
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Bytes of a sample of a file, and how many are read: 32 files take some milliseconds.
SAMPLE = 4096
SAMPLES = 32


def checksum_of_weights(folder: str | os.PathLike[str]) -> str:
    """Return a checksum in hex of the weights in a folder; empty if it has none.

    It depends on the names and sizes of the files of weights, and on samples of their bytes, so
    that two copies of a model are equal, on any host, and a model that was trained further is
    another one. Weights that differ in a few places only may have the same checksum.

    Raises `OSError` if a file cannot be read.
    """
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in ENDINGS)
    if not files:
        return ""
    checksum = blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            checksum.update(f"{path.name}:{size};".encode())
            for number in range(SAMPLES):
                file.seek((size - SAMPLE) * number // (SAMPLES - 1) if size > SAMPLE else 0)
                checksum.update(file.read(SAMPLE))
                if size <= SAMPLE:
                    break
    return checksum.hexdigest()
