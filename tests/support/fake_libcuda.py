# SPDX-License-Identifier: Apache-2.0
"""The stand-in for the CUDA driver's library, compiled when a test first asks for it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.waits import LIMIT

SOURCE = Path(__file__).with_name("fake_libcuda.c")


class Call(NamedTuple):
    """A call: ``p`` (plain), ``h`` (host to device), ``r`` (rows), ``b`` (batch), ``w`` (wait for
    a word), ``e`` (record an event) or ``a`` (await one); its copies, rows or words, or the event;
    and its stream."""

    kind: str
    copies: int
    stream: int


class Sent(NamedTuple):
    """A copy from the host to the device."""

    dst: int
    src: int
    nbytes: int
    stream: int


class _Call(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("count", ctypes.c_uint64), ("stream", ctypes.c_uint64)]


class _Sent(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in Sent._fields]


class FakeLibrary:
    """The library, compiled in a folder, with what it noted; ``batch`` is the version of CUDA whose
    batched copy it has, None if it has none."""

    def __init__(self, folder: Path, batch: int | None) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler here to make the stand-in for the CUDA driver")
        path = folder / f"libfake_cuda_{batch}.so"
        if not path.exists():
            subprocess.run(
                [
                    compiler,
                    "-O1",
                    "-Wall",
                    "-Werror",
                    "-shared",
                    "-fPIC",
                    f"-DBATCH={batch or 0}",
                    str(SOURCE),
                    "-o",
                    str(path),
                ],
                check=True,
                timeout=LIMIT,
            )
        self.batches = batch is not None
        self.library: Any = ctypes.CDLL(str(path))
        self.forget()
        self.set_device()

    def forget(self, refuse_at: int = -1) -> None:
        """Forget the calls so far; the one of that number will be refused."""
        self.library.fake_forget(refuse_at)

    def set_device(
        self, *, full: bool = False, another_captures: bool = False, no_waits: bool = False
    ) -> None:
        """Let no memory be pinned, another thread capture a graph, or the device have no wait for
        a word."""
        self.library.fake_device(full, another_captures, no_waits)

    @property
    def calls(self) -> list[Call]:
        """Return the calls in order."""
        noted = (_Call * 4096)()
        made = self.library.fake_calls(noted)
        return [Call(c.kind.decode(), c.count, c.stream) for c in noted[:made]]

    @property
    def copies(self) -> list[Call]:
        """Return the calls that copy or rest, in order."""
        return [call for call in self.calls if call.kind not in "ea"]

    @property
    def sent(self) -> list[Sent]:
        """Return the copies from the host to the device, in order."""
        noted = (_Sent * 4096)()
        made = self.library.fake_sent(noted)
        return [Sent(c.dst, c.src, c.nbytes, c.stream) for c in noted[:made]]

    def read_by_page_tables(self, device: int = -1, *, untold: bool = False) -> None:
        """Let the device of that number read pageable memory by the host's page tables; or let
        the driver not tell which does."""
        self.library.fake_page_tables(device, untold)

    def give(self, address: int, device: int) -> None:
        """Let an address, and no other, belong to the device of that number."""
        self.library.fake_owner(ctypes.c_uint64(address), device)
