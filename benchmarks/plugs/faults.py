# SPDX-License-Identifier: Apache-2.0
"""Faults of a folder, of its disk and of a process, for the stores of any engine.

A `Store` has objects of equal size. Each fault begins with new objects. `damaged` stores them,
lets a fault happen, loads them, and counts which came right, which did not come, and which came
with wrong bytes. The disk's faults need `preload`, and I/O by system calls of the C library.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

#: The kinds of faults: of files, of a disk's calls by their number in the library, of a process.
FILES = ("flipped bits", "swapped objects", "cut files")
CALLS = {"EIO": 1, "ENOSPC": 2, "hang": 3}
KILL = "kill"
KINDS = (*FILES, *CALLS, KILL)
#: Of so many calls one is hit.
EVERY = 5
#: Seconds for which a hang lasts, and of the deadline of loads that have one.
HANG = 1.5
DEADLINE = 1.0
#: Milliseconds at most until a process that stores is killed.
KILLED = 250
LIMIT = 60.0
_VARIABLES = ("FAULTY_STATE", "FAULTY_FOLDER")


class Store(Protocol):
    """The store of an engine over a folder, with objects that it can make anew."""

    files: str  # the pattern of the files that have objects
    image: int  # bytes of an object in a file

    def renew(self, seed: int) -> None:
        """Take other keys and other bytes."""

    def save(self) -> None:
        """Store the objects, as far as the disk takes them; wait for the end."""

    def begin_load(self) -> None:
        """Begin to load the objects into memory that has other bytes."""

    def ended(self) -> bool:
        """Return whether the load has ended."""

    def landed(self) -> list[bool]:
        """Return which objects were loaded, once the load has ended."""

    def right(self) -> list[bool]:
        """Return which objects' memory has their bytes."""

    def answers(self) -> Mapping[str, int]:
        """Return how a model answered with what was loaded; nothing if the store has no model."""

    def touched(self) -> bool:
        """Return whether the memory has changed since the last call."""

    def close(self) -> None:
        """Close the store."""


def add_options(parser: argparse.ArgumentParser, stores: Sequence[str]) -> None:
    """Add the options that choose faults."""
    parser.add_argument("--faults", type=int, default=0, help="of each kind, in place of speed")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--stores", nargs="+", choices=stores, default=stores)


def show(results: Mapping[str, object], file: Path | None) -> None:
    """Print results as JSON, and write them to a file if there is one."""
    text = json.dumps(results, indent=1)
    print(text)
    if file is not None:
        file.write_text(f"{text}\n")


def preload(folder: Path, module: str) -> None:
    """Run this program again with calls that can fail, unless it runs so."""
    if "LD_PRELOAD" in os.environ:
        return
    made = Path(tempfile.mkdtemp())
    library = made / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    (made / "state").write_bytes(bytes(16))
    values = dict(zip(_VARIABLES, (str(made / "state"), str(folder.resolve())), strict=True))
    environment = {**os.environ, **values, "LD_PRELOAD": str(library), "PORTAKV_IO": "threads"}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


class Disk:
    """The disk of the folder that `preload` was called with."""

    def __init__(self) -> None:
        with Path(os.environ[_VARIABLES[0]]).open("r+b") as file:
            self._state = np.frombuffer(mmap(file.fileno(), 16), np.int32)

    def fail(self, kind: str) -> None:
        """Let calls fail from now on."""
        self._state[1:] = EVERY, 0, 0
        self._state[0] = CALLS[kind]

    def mend(self) -> int:
        """Let calls succeed; return how many were hit."""
        self._state[0] = 0
        return int(self._state[3])


def damaged(
    make: Callable[[str, Path], Store],
    names: Sequence[str],
    folder: Path,
    count: int,
    kinds: Sequence[str] = KINDS,
    imports: Sequence[str] = (),
) -> dict[str, dict[str, int]]:
    """Return how objects came after so many faults of each kind, by store and kind.

    ``make`` is a function of a module, which other processes import. ``imports`` are modules that
    it uses: one process imports them for all that are killed.
    """
    results: dict[str, dict[str, int]] = {}
    for name in names:
        draw = random.Random(0)
        store = make(name, folder / name)
        disk = Disk()
        for kind in [each for each in kinds if each != KILL]:
            counts = Counter[str]()
            for turn in range(count):
                store.renew(draw.getrandbits(60))
                counts += _one(store, folder / name, kind, turn, draw, disk)
            results[f"{name}, {kind}"] = dict(counts)
            print(name, kind, dict(counts), flush=True)
        store.close()
        if KILL not in kinds:
            continue
        killed = _kills(make, name, folder / f"{name}-killed", count, imports)
        results[f"{name}, {KILL}"] = dict(killed)
        print(name, KILL, dict(killed), flush=True)
    return results


def _one(
    store: Store, folder: Path, kind: str, turn: int, draw: random.Random, disk: Disk
) -> Counter[str]:
    """Return how objects came after one fault."""
    if kind == "ENOSPC":
        disk.fail(kind)
    store.save()
    hits = disk.mend()
    if kind in FILES:
        files = [path for path in folder.rglob(store.files) if path.stat().st_size]
        {FILES[0]: _flip, FILES[1]: _swap, FILES[2]: _cut}[kind](files, store.image, draw)
        hits = 1
    elif kind != "ENOSPC":
        disk.fail(kind)
    store.begin_load()
    counts = Counter[str]()
    if kind == "hang":
        until = time.monotonic() + HANG
        while time.monotonic() < until and not store.ended():
            time.sleep(0.005)
        over = store.ended()
        counts["ended before the disk answered"] += over
        store.touched()
        hits = disk.mend()
        time.sleep(0.02)
        counts["memory written after the end"] += over and store.touched()
    _wait(store)
    hits = max(hits, disk.mend())
    counts["faults"] += hits > 0
    return counts + counted(store)


def counted(store: Store) -> Counter[str]:
    """Return how objects of a load came that has ended, and how a model answered."""
    counts = Counter[str]()
    for there, right in zip(store.landed(), store.right(), strict=True):
        counts[("right" if right else "wrong") if there else "missed"] += 1
    return counts + Counter(store.answers())


def _wait(store: Store) -> None:
    until = time.monotonic() + LIMIT
    while not store.ended():
        if time.monotonic() > until:
            raise TimeoutError("a load has not ended")
        time.sleep(0.001)


# --- files


def _images(files: list[Path], image: int) -> list[tuple[Path, int]]:
    return [(path, at) for path in files for at in range(path.stat().st_size // image)]


def _flip(files: list[Path], image: int, draw: random.Random) -> None:
    """Flip a bit in each of four objects."""
    for path, at in draw.sample(_images(files, image), 4):
        with path.open("r+b") as file:
            place = (at + 1) * image - 1 - draw.randrange(image // 2)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _swap(files: list[Path], image: int, draw: random.Random) -> None:
    """Swap two objects, with whatever says what they are."""
    pair = draw.sample(_images(files, image), 2)
    data = []
    for path, at in pair:
        with path.open("rb") as file:
            file.seek(at * image)
            data.append(file.read(image))
    for (path, at), other in zip(pair, reversed(data), strict=True):
        with path.open("r+b") as file:
            file.seek(at * image)
            file.write(other)


def _cut(files: list[Path], image: int, draw: random.Random) -> None:
    """Cut a file in the middle of an object."""
    path = draw.choice(files)
    os.truncate(path, draw.randrange(1, path.stat().st_size))


# --- processes


def _kills(
    make: Callable[[str, Path], Store],
    name: str,
    folder: Path,
    count: int,
    imports: Sequence[str],
) -> Counter[str]:
    """Return how objects came that a process stored which was killed meanwhile."""
    processes = multiprocessing.get_context("forkserver")
    # A module that runs as a program has another name there.
    spec = sys.modules[make.__module__].__spec__
    own = make.__module__ if spec is None else spec.name
    processes.set_forkserver_preload([own, *imports])
    draw = random.Random(1)
    counts = Counter[str]()
    for turn in range(count):
        here, there = processes.Pipe()
        storing = processes.Process(target=_store, args=(make, name, folder, turn, there))
        storing.start()
        there.close()
        here.recv()
        time.sleep(draw.randrange(KILLED) / 1e3)
        os.kill(storing.pid or 0, signal.SIGKILL)
        storing.join()
        here, there = processes.Pipe()
        loading = processes.Process(target=_load, args=(make, name, folder, turn, there))
        loading.start()
        there.close()
        counts += here.recv()
        loading.join()
    return counts


def _store(make: Callable[[str, Path], Store], name: str, folder: Path, seed: int, to: Any) -> None:
    store = make(name, folder)
    store.renew(seed + (1 << 30))
    store.save()  # other objects, so that the kill meets a store that is open
    store.renew(seed)
    to.send(None)
    store.save()
    time.sleep(LIMIT)


def _load(make: Callable[[str, Path], Store], name: str, folder: Path, seed: int, to: Any) -> None:
    store = make(name, folder)
    store.renew(seed)
    store.begin_load()
    _wait(store)
    to.send(counted(store) + Counter(faults=1))
    with suppress(Exception):
        store.close()
    os._exit(0)  # engines' threads may not end
