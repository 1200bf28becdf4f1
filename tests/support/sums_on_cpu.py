# SPDX-License-Identifier: Apache-2.0
"""The text of the checksum kernel, compiled by g++ and run on host tensors with its real tables."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from portakv.migrate.checksum import CUT, Cut, SumKernel
from portakv.runtime.cuda import CudaDriver
from support.cuda_on_cpu import compiled

CPU = torch.device("cpu")
#: A cut by which few words have many tiles.
SMALL = Cut(threads=8, rows=8, each=8)
_HEAD = f'#include "{Path(__file__).with_name("blocks_on_cpu.h")}"\n'


class HostDriver(CudaDriver):
    """A driver of the host: work is done when a launch returns.

    ``launches`` are the thread blocks of each launch. ``text`` replaces parts of the kernel's text.
    ``argument`` is the type of the kernel's argument.
    """

    argument = "portakv::sums::Sums"

    def __init__(self, **text: str) -> None:
        self.launches = list[int]()
        self._text = text

    def load(self, source: str, names: Iterable[str]) -> dict[str, Any]:
        for old, new in self._text.items():
            assert old in source
            source = source.replace(old, new)
        (name,) = names
        entry = f"""
extern "C" void run_kernel(const void* argument, unsigned blocks, unsigned threads) {{
    run_blocks<{self.argument}>({name}, argument, blocks, threads);
}}
"""
        library = compiled(_HEAD + source, entry)
        return {name: library}

    def number(self, stream: torch.Stream | None) -> int:
        assert stream is None, "the host has no streams"
        return 0

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def launch(
        self, function: Any, blocks: int, threads: int, parameter: bytes, *_: Any, **__: Any
    ) -> None:
        function.run_kernel(parameter, blocks, threads)
        self.launches.append(blocks)


class LastTiles(HostDriver):
    """A driver that runs only the last thread blocks of a launch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def launch(
        self, function: Any, blocks: int, threads: int, parameter: bytes, *_: Any, **__: Any
    ) -> None:
        shapes, parts, tiles = struct.unpack("<3q", parameter)
        last = struct.pack("<3q", shapes, parts, tiles + 8 * (blocks - self._count))
        function.run_kernel(last, self._count, threads)

    @staticmethod
    def lengths(shape: Sequence[int], cut: Cut) -> list[int]:
        """Return the extents of the last tile of a part of single words, whose axes are rows and,
        last, columns."""
        if len(shape) == 1:
            return [cut.threads * cut.each]
        return [*[1] * (len(shape) - 2), cut.each, cut.threads]


@contextmanager
def ended_memory(nbytes: int, at_end: bool) -> Iterator[torch.Tensor]:
    """Yield bytes with a page before and after them that no one may read.

    ``at_end``: the last byte is next to such a page, otherwise the first byte.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    inner = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    view = (ctypes.c_char * len(pages)).from_buffer(pages)
    address = ctypes.addressof(view)
    outer = (address, address + mmap.PAGESIZE + inner)

    def protect(protection: int) -> None:
        for page in outer:
            assert not libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, protection)

    protect(0)
    first = mmap.PAGESIZE + (inner - nbytes if at_end else 0)
    try:
        yield torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=first)
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)


def host_kernel(cut: Cut = CUT, **text: str) -> SumKernel:
    """Return the kernel for host tensors."""
    return SumKernel(CPU, HostDriver(**text), cut)
