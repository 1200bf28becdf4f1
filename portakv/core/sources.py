# SPDX-License-Identifier: Apache-2.0
"""Hash the core's sources: for the loader, which finds a stale library, and for the build.

The build loads this file by its path, before PortaKV is installed, so it imports nothing of
PortaKV.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h")


def sources_of(folder: Path) -> list[Path]:
    """Return the sources in ``folder`` and below it, in the order of their paths."""
    found = [path for path in folder.rglob("*") if path.suffix in SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def hash_of(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of the sources, in hexadecimal digits."""
    total = hashlib.sha256()
    for path in sources_of(folder):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()
