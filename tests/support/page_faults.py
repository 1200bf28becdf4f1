# SPDX-License-Identifier: Apache-2.0
"""Faults of the folder and of the disk that pages are stored on."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HEADER = 4096  # bytes of an image before its page
HELD = 60.0  # seconds; no call is held as long


def images(folder: Path, nbytes: int) -> list[tuple[Path, int]]:
    """Return the file and the place of each image of a page of so many bytes."""
    size = HEADER + -(-nbytes // HEADER) * HEADER
    made = []
    for path in sorted(folder.rglob("slots")):
        made += [(path, at) for at in range(0, path.stat().st_size, size)]
    assert made
    return made


def flip(folder: Path, nbytes: int, seed: int = 0) -> None:
    """Flip a bit in each page of a folder."""
    draw = random.Random(seed)
    for path, at in images(folder, nbytes):
        with path.open("r+b") as file:
            place = at + HEADER + draw.randrange(nbytes)
            file.seek(place)
            byte = file.read(1)
            if byte:
                file.seek(place)
                file.write(bytes([byte[0] ^ 1 << draw.randrange(8)]))


def swap(folder: Path, nbytes: int, seed: int = 0) -> None:
    """Put each image of a folder into the slot of another one."""
    places = images(folder, nbytes)
    size = HEADER + -(-nbytes // HEADER) * HEADER
    contents = []
    for path, at in places:
        with path.open("rb") as file:
            file.seek(at)
            contents.append(file.read(size))
    for number, (path, at) in enumerate(places):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(contents[number - 1])


def cut(folder: Path, nbytes: int, seed: int = 0) -> None:
    """Cut each file of a folder in the middle of its fourth page."""
    for path in {path for path, _ in images(folder, nbytes)}:
        os.truncate(path, images(folder, nbytes)[3][1] + HEADER + nbytes // 2)


#: What happens to stored pages, by its name.
DAMAGE: dict[str, Callable[..., None]] = {
    "a flipped bit": flip,
    "swapped blocks": swap,
    "a cut file": cut,
}


class FaultyDisk:
    """A disk whose requests fail or hang; `PORTAKV_IO` must be ``threads``.

    Attributes:
        code: of the error of each request; 0: none. -1: requests wait for `release`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = 0
        self._free = threading.Event()
        self._inner = os.pwritev, os.preadv
        monkeypatch.setenv("PORTAKV_IO", "support.io_calls:PlayedThreads")
        monkeypatch.setattr(os, "pwritev", self._write)
        monkeypatch.setattr(os, "preadv", self._read)

    def _write(self, *terms: Any) -> int:
        self._fail()
        return self._inner[0](*terms)

    def _read(self, *terms: Any) -> int:
        self._fail()
        return self._inner[1](*terms)

    def _fail(self) -> None:
        if self.code > 0:
            raise OSError(self.code, os.strerror(self.code))
        if self.code < 0:
            assert self._free.wait(HELD), "a request was held for too long"

    @contextmanager
    def failing(self, code: int) -> Iterator[None]:
        """Let requests fail, or with -1 hang until the end of the context."""
        self.code = code
        self._free.clear()
        try:
            yield
        finally:
            self.mend()

    def mend(self) -> None:
        """Let requests succeed, also those that hang."""
        self.code = 0
        self._free.set()


#: The faults of requests, by their names.
FAILURES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "a hang": -1}
