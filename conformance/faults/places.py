# SPDX-License-Identifier: Apache-2.0
"""Find the bytes of blocks in the files of a tier, and damage files.

Nothing is known of a tier's format. A block is found by its own bytes, which are random, so a tier
that compresses, encrypts or cuts its blocks into small pieces has no places.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

#: Bytes of a block that identify it.
PROBE = 64
PAGE = 4096
#: Larger files are not read.
LARGEST = 256 << 20


@dataclass(frozen=True)
class Place:
    """Where a block lies.

    Attributes:
        path: of the file.
        offset: of the block's first byte.
        nbytes: how many of its bytes follow there, in order.
        before: bytes before the first one that belong to no block, at most a page.
        after: bytes behind the last one that belong to no block, at most a page.
    """

    path: Path
    offset: int
    nbytes: int
    before: int = 0
    after: int = 0


def files_of(folder: Path) -> list[Path]:
    """Return the regular files of a folder, in order of their names."""
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if path.is_file() and not path.is_symlink():
                found.append(path)
    return sorted(found)


def find(folder: Path, blocks: Mapping[int, bytes]) -> dict[int, Place]:
    """Return where blocks lie, by their numbers; those that are not found are left out."""
    places: dict[int, Place] = {}
    for path in files_of(folder):
        if path.stat().st_size > LARGEST:
            continue
        content = path.read_bytes()
        here: dict[int, Place] = {}
        for number, block in blocks.items():
            at = content.find(block[:PROBE])
            if at >= 0 and number not in places:
                here[number] = Place(path, at, _common(content, at, block))
        places.update(_with_gaps(here, len(content)))
    return places


def _common(content: bytes, at: int, block: bytes) -> int:
    """Return how many bytes of a block are in a file from an offset on."""
    low = PROBE
    high = min(len(block), len(content) - at)
    if content[at : at + high] == block[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if content[at : at + middle] == block[:middle]:
            low = middle
        else:
            high = middle
    return low


def _with_gaps(places: Mapping[int, Place], size: int) -> dict[int, Place]:
    """Return places with the bytes around them that belong to no block."""
    made: dict[int, Place] = {}
    order = sorted(places, key=lambda number: places[number].offset)
    for rank, number in enumerate(order):
        place = places[number]
        end = place.offset + place.nbytes
        last = 0
        if rank:
            earlier = places[order[rank - 1]]
            last = earlier.offset + earlier.nbytes
        following = places[order[rank + 1]].offset if rank + 1 < len(order) else size
        before = min(PAGE, place.offset - last)
        # What lies between two blocks stands before the second one.
        after = min(PAGE, following - end) if rank + 1 == len(order) else 0
        made[number] = Place(place.path, place.offset, place.nbytes, before, after)
    return made


def others_of(folder: Path, places: Mapping[int, Place]) -> list[Path]:
    """Return the files that have bytes, and none of a block."""
    with_blocks = {place.path for place in places.values()}
    return [path for path in files_of(folder) if path not in with_blocks and path.stat().st_size]


def read(path: Path, offset: int, nbytes: int) -> bytes:
    """Return bytes of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def write(path: Path, offset: int, data: bytes) -> None:
    """Write bytes into a file, and make them durable."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flip(path: Path, offset: int) -> None:
    """Flip a bit of a byte."""
    byte = read(path, offset, 1)
    write(path, offset, bytes([byte[0] ^ 0x10]))


def swap(one: Place, other: Place, with_header: bool) -> None:
    """Swap two blocks, or two blocks with the bytes before them."""
    before = min(one.before, other.before) if with_header else 0
    size = min(one.nbytes, other.nbytes) + before
    first = read(one.path, one.offset - before, size)
    second = read(other.path, other.offset - before, size)
    write(one.path, one.offset - before, second)
    write(other.path, other.offset - before, first)


def truncate(path: Path, nbytes: int) -> None:
    """Cut or lengthen a file, and make that durable."""
    with path.open("r+b") as file:
        file.truncate(nbytes)
        os.fsync(file.fileno())


def remove(paths: Iterable[Path]) -> None:
    """Remove files that are there."""
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def copied(folder: Path, to: Path) -> list[tuple[Path, Path]]:
    """Copy the files of a folder; return each file with its copy."""
    made = []
    for number, path in enumerate(files_of(folder)):
        copy = to / str(number)
        copyfile(path, copy)
        made.append((path, copy))
    return made


def put_back(copies: Sequence[tuple[Path, Path]]) -> None:
    """Write copies over the files that they were made of, in place."""
    for path, copy in copies:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = copy.read_bytes()
        if not path.exists():
            path.touch(mode=0o600)
        truncate(path, len(data))
        write(path, 0, data)
