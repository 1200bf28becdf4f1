# SPDX-License-Identifier: Apache-2.0
"""Damage to the files of a tier, as a device, a person or another program may do it.

A damage is a function of a trial and of the places of its blocks. It raises `NotInjected` for a
tier whose files cannot be damaged in that way.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from portakv_conformance.faults import places
from portakv_conformance.faults.payload import payload
from portakv_conformance.faults.places import Place
from portakv_conformance.faults.subject import NotInjected
from portakv_conformance.faults.trial import KEYS, OTHER_MODEL, Trial

Places = Mapping[int, Place]
Damage = Callable[[Trial, Places], None]


def flipped(part: float) -> Damage:
    """Return the damage of one bit of one block, at a part of its length."""

    def damage(trial: Trial, found: Places) -> None:
        place = found[3]
        places.flip(place.path, place.offset + int(part * (place.nbytes - 1)))

    return damage


def flip_around(name: str) -> Damage:
    """Return the damage of one bit of the bytes before or after blocks."""

    def damage(trial: Trial, found: Places) -> None:
        count = 0
        for place in found.values():
            size = place.before if name == "before" else place.after
            start = place.offset - size if name == "before" else place.offset + place.nbytes
            content = places.read(place.path, start, size)
            used = [at for at, byte in enumerate(content) if byte]
            if used:
                places.flip(place.path, start + used[len(used) // 2])
                count += 1
        if not count:
            raise NotInjected(f"no bytes stand {name} a block in its file")

    return damage


def flip_others(trial: Trial, found: Places) -> None:
    for path in _others(trial, found):
        content = path.read_bytes()[: places.LARGEST]
        used = [at for at, byte in enumerate(content) if byte]
        if used:
            places.flip(path, used[len(used) // 2])


def _others(trial: Trial, found: Places) -> list[Path]:
    """Return the files without blocks; raise `NotInjected` if there are none."""
    paths = places.others_of(trial.folder, found)
    if not paths:
        raise NotInjected("each of its files has a block")
    return paths


def swapped(with_header: bool) -> Damage:
    def damage(trial: Trial, found: Places) -> None:
        if with_header and not found[2].before and found[2].path == found[5].path:
            raise NotInjected("no bytes stand before a block in its file")
        places.swap(found[2], found[5], with_header)

    return damage


def zeroed(nbytes: int | None) -> Damage:
    """Return the damage of zeros in a page of a block, or in the whole of it."""

    def damage(trial: Trial, found: Places) -> None:
        place = found[3]
        count = place.nbytes if nbytes is None else min(nbytes, place.nbytes)
        start = 0 if nbytes is None else place.nbytes // 2 // nbytes * nbytes
        places.write(place.path, place.offset + start, bytes(count))

    return damage


def torn(trial: Trial, found: Places) -> None:
    one = found[3]
    other = found[4]
    half = min(one.nbytes, other.nbytes) // 2
    places.write(one.path, one.offset + half, places.read(other.path, other.offset + half, half))


def sector(trial: Trial, found: Places) -> None:
    place = found[3]
    noise = random.Random(7).randbytes(512)
    places.write(place.path, place.offset + place.nbytes // 2 // 512 * 512, noise)


def cut(part: float | None) -> Damage:
    """Return the damage of a file that ends within a block, or is empty."""

    def damage(trial: Trial, found: Places) -> None:
        place = found[3]
        end = 0 if part is None else place.offset + int(part * place.nbytes)
        places.truncate(place.path, end)

    return damage


def lengthened(trial: Trial, found: Places) -> None:
    for path in {place.path for place in found.values()}:
        size = path.stat().st_size
        places.write(path, size, random.Random(8).randbytes(places.PAGE))


def copied_over(trial: Trial, found: Places) -> None:
    """Write one block, with the bytes before it, over another one."""
    one = found[2]
    other = found[5]
    before = min(one.before, other.before)
    data = places.read(one.path, one.offset - before, before + one.nbytes)
    places.write(other.path, other.offset - before, data)


def of_other_model(whole: bool) -> Damage:
    """Return the damage of blocks of the same keys that another model stored.

    The other model's blocks are stored into a folder of their own.
    """

    def damage(trial: Trial, found: Places) -> None:
        aside = Trial(trial.template, trial.nbytes, trial.deadline, new_folder(trial, "aside"))
        try:
            aside.start(model=OTHER_MODEL)
            # Both processes make the blocks of their own model.
            aside.put()
            aside.stop()
            blocks = {n: payload(n, trial.nbytes, OTHER_MODEL) for n in KEYS}
            theirs = places.find(aside.folder, blocks)
        finally:
            aside.end()
        if len(theirs) < len(blocks):
            raise NotInjected("the bytes of another model's blocks are in no file")
        for number, place in found.items():
            other = theirs[number]
            if not whole:
                data = places.read(other.path, other.offset, other.nbytes)
                places.write(place.path, place.offset, data)
            elif place.path.exists():
                shutil.copyfile(other.path, place.path)

    return damage


def new_folder(trial: Trial, name: str) -> Path:
    folder = trial.root / name
    folder.mkdir(mode=0o700)
    return folder


def removed(number: int | None) -> Damage:
    def damage(trial: Trial, found: Places) -> None:
        chosen = found.values() if number is None else [found[number]]
        places.remove({place.path for place in chosen})

    return damage


def folder_removed(trial: Trial, found: Places) -> None:
    shutil.rmtree(trial.folder)


def folder_emptied(trial: Trial, found: Places) -> None:
    shutil.rmtree(trial.folder)
    trial.folder.mkdir(mode=0o700)


def others_removed(trial: Trial, found: Places) -> None:
    places.remove(_others(trial, found))


def others_emptied(trial: Trial, found: Places) -> None:
    for path in _others(trial, found):
        places.truncate(path, 0)


def replaced(kind: str) -> Damage:
    """Return the damage of a block's file in whose place stands something else."""

    def damage(trial: Trial, found: Places) -> None:
        path = found[3].path
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(path)
        else:
            os.mkfifo(path)

    return damage


def times(seconds: int) -> Damage:
    def damage(trial: Trial, found: Places) -> None:
        for path in places.files_of(trial.folder):
            os.utime(path, (seconds, seconds))

    return damage


def left_over(trial: Trial, found: Places) -> None:
    """Leave files of a writer that was killed: halves of blocks under other names."""
    for place in found.values():
        half = place.path.read_bytes()[: place.path.stat().st_size // 2]
        for suffix in (".tmp", ".new", "~"):
            place.path.with_name(place.path.name + suffix).write_bytes(half)
