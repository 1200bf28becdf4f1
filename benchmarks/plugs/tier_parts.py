# SPDX-License-Identifier: Apache-2.0
"""Processor time of the parts of a load from files into an engine's memory, without a store.

    python -m portakv_benchmarks.plugs.tier_parts FOLDER [--turns 9]

Each method brings the same chunks of a file into memory of pages of 4 KiB, in turns, in one thread:
by a read past the page cache, as vLLM's `fs` does it, and by reads with a checksum. The least of
all turns counts, because other work on a machine only adds. It needs a disk with O_DIRECT.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from mmap import MADV_HUGEPAGE, mmap
from pathlib import Path
from typing import Any

import numpy as np

from portakv.core.xxh3 import checksum

CHUNKS = 64
CHUNK = 2 << 20
HEADER = 4096
IMAGE = HEADER + CHUNK
#: Bytes of a piece that stays in the cache of a core between two passes.
PIECE = 128 << 10
HUGE = 2 << 20
#: The method with which the others are compared.
READ = "read past the page cache into place"


class Parts:
    """A file of chunks, staging for them in large pages, and the memory of an engine."""

    def __init__(self, path: Path, chunks: int = CHUNKS) -> None:
        draw = np.random.default_rng(0)
        with path.open("wb") as file:
            for _ in range(chunks):
                file.write(draw.integers(0, 256, IMAGE, np.uint8).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.cached = os.open(path, os.O_RDONLY)
        self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.memory = np.frombuffer(mmap(-1, chunks * CHUNK), np.uint8).reshape(chunks, CHUNK)
        staging = mmap(-1, chunks * IMAGE + HUGE)
        staging.madvise(MADV_HUGEPAGE)
        whole = np.frombuffer(staging, np.uint8)
        first = -whole.ctypes.data % HUGE
        self.staging = whole[first : first + chunks * IMAGE].reshape(chunks, IMAGE)
        self.staging[:] = 1
        self.memory[:] = 1

    def close(self) -> None:
        """Close the file."""
        os.close(self.cached)
        os.close(self.direct)

    def methods(self) -> dict[str, Callable[[], None]]:
        """Return what brings the chunks, and single passes over them, by name."""
        return {
            READ: self.read,
            "the same, and a checksum": self.read_and_check,
            "read from the page cache into place": self.read_cached,
            "the same from the page cache, and a checksum": self.read_cached_and_check,
            "read into staging, a checksum, all copied then": self.stage,
            "read into staging, a checksum, copied immediately": self.stage_and_copy,
            "read into staging, checksum and copy by pieces": self.stage_by_pieces,
            "a checksum alone": self.check,
            "a copy from staging alone": self.copy,
        }

    def read(self) -> None:
        """Read into the engine's memory, as `fs` does; a header goes elsewhere."""
        header = self.staging[0, :HEADER]
        for number, chunk in enumerate(self.memory):
            self._fill(self.direct, [header, chunk], number * IMAGE, IMAGE)

    def read_and_check(self) -> None:
        """Verify chunks in the engine's memory."""
        header = self.staging[0, :HEADER]
        for number, chunk in enumerate(self.memory):
            self._fill(self.direct, [header, chunk], number * IMAGE, IMAGE)
            checksum(chunk)

    def read_cached(self) -> None:
        """Read chunks that the page cache has."""
        for number, chunk in enumerate(self.memory):
            self._fill(self.cached, [chunk], number * IMAGE + HEADER, CHUNK)

    def read_cached_and_check(self) -> None:
        """Verify chunks that the page cache has."""
        for number, chunk in enumerate(self.memory):
            self._fill(self.cached, [chunk], number * IMAGE + HEADER, CHUNK)
            checksum(chunk)

    def stage(self) -> None:
        """Read and verify in staging, and then copy, as PortaKV's store does."""
        for number, image in enumerate(self.staging):
            self._fill(self.direct, [image], number * IMAGE, IMAGE)
            checksum(image[HEADER:])
        self.copy()

    def stage_and_copy(self) -> None:
        """Copy each chunk as soon as it is verified."""
        for number, image in enumerate(self.staging):
            self._fill(self.direct, [image], number * IMAGE, IMAGE)
            checksum(image[HEADER:])
            self._move(number, 0, CHUNK)

    def stage_by_pieces(self) -> None:
        """Copy each piece while a core has it; each piece has a checksum."""
        for number, image in enumerate(self.staging):
            self._fill(self.direct, [image], number * IMAGE, IMAGE)
            for begin in range(0, CHUNK, PIECE):
                piece: Any = image[HEADER + begin : HEADER + begin + PIECE]
                checksum(piece)
                self._move(number, begin, PIECE)

    def check(self) -> None:
        """Verify chunks that no core has in its cache."""
        for chunk in self.memory:
            checksum(chunk)

    def copy(self) -> None:
        """Copy all chunks."""
        for number in range(len(self.memory)):
            self._move(number, 0, CHUNK)

    def _move(self, number: int, begin: int, nbytes: int) -> None:
        source = self.staging[number].ctypes.data + HEADER + begin
        ctypes.memmove(self.memory[number].ctypes.data + begin, source, nbytes)

    @staticmethod
    def _fill(fd: int, rows: list[Any], offset: int, nbytes: int) -> None:
        done = os.preadv(fd, rows, offset)
        if done != nbytes:
            raise OSError(f"Expected {nbytes} bytes, got {done}. Free the disk.")


def measured(folder: Path, turns: int) -> dict[str, float]:
    """Return milliseconds of processor time a MiB of each method, the least of so many turns."""
    path = folder / "chunks"
    parts = Parts(path)
    methods = parts.methods()
    least = dict.fromkeys(methods, float("inf"))
    try:
        for _ in range(turns):
            for name, method in methods.items():
                begin = time.process_time()
                method()
                took = time.process_time() - begin
                least[name] = min(least[name], 1e3 * took / (CHUNKS * CHUNK >> 20))
    finally:
        parts.close()
        path.unlink()
    return least


def main() -> None:
    """Measure as the command line says, and print a line for each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    least = measured(args.folder, args.turns)
    for name, value in least.items():
        print(f"{name:<50}{value:>8.3f} ms a MiB{value / least[READ]:>8.2f}")


if __name__ == "__main__":
    main()
