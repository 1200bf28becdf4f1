# SPDX-License-Identifier: Apache-2.0
"""Claim the folder of a disk tier for one store."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from portakv.errors import StoreBusy, StoreError
from portakv.runtime.interrupts import uninterrupted
from portakv.storage.files import lock, make_folder, read_file, wrong_owner


class Claimant(Protocol):
    """Slots of a form, whose folder lies in the folder of the tier."""

    folder: Path

    @property
    def claim(self) -> int:
        """Return the descriptor that claims the folder of the tier; negative if none does."""


#: The slots of this process, for the error of a folder that another store of it has.
claimants: WeakSet[Claimant] = WeakSet()


def claim(folder: Path) -> int:
    """Claim a folder of a disk tier for one store, until this descriptor is closed.

    A queue is followed. Raises `StoreBusy` if another store has the folder. No interrupt may leave
    the lock without its descriptor, so a helper thread runs `_claim` for the main thread.
    """
    return uninterrupted(partial(_claim, folder), undo=os.close)


def _claim(folder: Path) -> int:
    """Make the folder, lock it, and write the number of this process into the lock."""
    make_folder(folder)
    owner = folder.stat().st_uid
    if owner not in (0, os.geteuid()):  # root could do anything anyway
        raise wrong_owner(folder, owner)
    fd = lock(folder / "lock")
    if fd < 0:
        claimed = [x.folder.parent for x in [*claimants] if x.claim >= 0]
        own = folder.resolve() in {each.resolve() for each in claimed}
        raise StoreBusy(
            f"Expected the store's folder {folder} to be free, got a folder that "
            f"{'this process' if own else holder(folder)} has open already. Close that store, or "
            f"pass another folder."
        )
    with suppress(OSError):  # the device is full
        os.ftruncate(fd, os.pwrite(fd, str(os.getpid()).encode(), 0))
    return fd


def holder(folder: Path) -> str:
    """Return a name for the process that claimed a folder last."""
    try:
        text = read_file(folder / "lock", 20).decode()
    except (OSError, StoreError, UnicodeDecodeError):
        text = ""
    return f"process {text if text.isdigit() else '?'}"
