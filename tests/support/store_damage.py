# SPDX-License-Identifier: Apache-2.0
"""Damage to the files of a disk tier, as a device or another program may do it."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from portakv.storage.tiers.folder import form_in

#: Bytes of a header, which an image begins with.
HEADER = 4096


def slot_files(folder: Path) -> list[Path]:
    """Return the files of slots in a folder of a disk tier."""
    paths = sorted(folder.rglob("slots"))
    assert paths
    return paths


def flip_bits(folder: Path, draw: random.Random, count: int = 40, headers: bool = True) -> None:
    """Flip bits of each file of slots. ``headers``: also in those of images."""
    for path in slot_files(folder):
        image = form_in(path.parent).image_bytes
        with path.open("r+b") as file:
            size = path.stat().st_size
            for _ in range(count):
                at = draw.randrange(HEADER, size)
                if not headers and at % image < HEADER:
                    continue
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def swap_images(folder: Path, draw: random.Random, image: int) -> None:
    """Swap two images of so many bytes in each file of slots."""
    for path in slot_files(folder):
        with path.open("r+b") as file:
            many = path.stat().st_size // image
            one, other = (at * image for at in draw.sample(range(many), 2))
            first = _read(file, one, image)
            second = _read(file, other, image)
            for at, data in ((one, second), (other, first)):
                file.seek(at)
                file.write(data)


def cut_files(folder: Path, keep: int) -> None:
    """Cut each file of slots after so many bytes."""
    for path in slot_files(folder):
        os.truncate(path, keep)


@contextmanager
def damaged_images_believed() -> Iterator[None]:
    """Let disk tiers take each payload for whole inside: the negative control of damage."""
    disk_store: Any = importlib.import_module("portakv.storage.tiers.disk")
    verify = disk_store.verify
    verifies = disk_store.verifies
    disk_store.verifies = lambda _: False
    disk_store.verify = lambda *_: True
    try:
        yield
    finally:
        disk_store.verify = verify
        disk_store.verifies = verifies


@contextmanager
def damaged_objects_believed() -> Iterator[None]:
    """Let remote tiers take each payload for whole inside: the negative control of damage."""
    remote_store: Any = importlib.import_module("portakv.storage.tiers.remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_store, "verify", lambda *_: True)
        yield


@contextmanager
def any_images_believed() -> Iterator[None]:
    """Let disk tiers believe headers too, so that an image serves for another one: the negative
    control of images that are swapped."""
    disk_store: Any = importlib.import_module("portakv.storage.tiers.disk")
    store = disk_store.DiskStore
    is_right = store.is_right
    verifies = disk_store.verifies
    store.is_right = lambda *_: True
    disk_store.verifies = lambda _: False
    try:
        yield
    finally:
        store.is_right = is_right
        disk_store.verifies = verifies


@contextmanager
def rows_in_use_taken() -> Iterator[None]:
    """Let saves take rows of staging that other saves still write: the negative control of staging
    that is full."""
    rows: Any = importlib.import_module("portakv.storage.memory").Rows
    take = rows.take

    def take_any(self: Any, count: int, want: Any) -> Any:
        items = take(self, count, want)
        if items is None and want.store and len(self._lent) >= count:
            items = [*self._lent][:count]
        return items

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "take", take_any)
        patch.setattr(rows, "lacks", lambda *_: False)
        yield


def _read(file: Any, at: int, count: int) -> bytes:
    file.seek(at)
    data: bytes = file.read(count)
    return data
