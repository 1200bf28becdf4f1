# SPDX-License-Identifier: Apache-2.0
"""How several workers divide one case list: each case is run by whoever takes it first."""

from __future__ import annotations

import hashlib
from pathlib import Path


class Share:
    """The cases that were taken, an empty file each: a worker that dies leaves no lock behind.

    Args:
        folder: an existing folder that all who share look at.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, id: str) -> bool:
        """Take a case; False where another has it."""
        try:
            self._file(id).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def taken(self, id: str) -> bool:
        """Whether somebody has a case."""
        return self._file(id).exists()

    def give_back(self, id: str) -> None:
        """Whoever had a case will not run it."""
        self._file(id).unlink(missing_ok=True)

    def _file(self, id: str) -> Path:
        return self._folder / hashlib.sha256(id.encode()).hexdigest()[:32]
