# SPDX-License-Identifier: Apache-2.0
"""A private cache on disk for compiled kernels.

Entries carry their own checksum and are rebuilt when corrupt. Writing is atomic, so that any number
of processes may race. A missing, unwritable or foreign directory is no error: kernels are then
compiled in each process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ENVIRONMENT = "PORTAKV_CACHE_DIR"


def directory() -> Path:
    """Where compiled kernels are kept: ``PORTAKV_CACHE_DIR``, else the user's cache folder."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "portakv"


def cached(parts: tuple[str, ...], build: Callable[[], bytes]) -> bytes:
    """The binary for a key, from disk or built and kept; errors of ``build`` pass through.
    ``parts``: all that decides the binary: source, flags, architecture, compiler version."""
    path = _path(parts)
    kept = _read(path)
    if kept is not None:
        return kept
    binary = build()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(path.parent):
            write_at_once(path, _digest(path.name, binary) + binary)
    return binary


def holds(parts: tuple[str, ...]) -> bool:
    """True if the binary for a key is on disk, whole."""
    return _read(_path(parts)) is not None


def refusal() -> str | None:
    """Why nothing can be kept in the directory, which is made if need be; None if it can."""
    folder = directory()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(folder):
            return f"{folder} belongs to another user, or other users may write to it"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


def _path(parts: tuple[str, ...]) -> Path:
    return directory() / hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        if not _private(path.parent) or not path.is_file():
            return None
        content = path.read_bytes()
    except OSError:
        return None
    digest = content[:32]
    binary = content[32:]
    return binary if binary and _digest(path.name, binary) == digest else None


def _digest(name: str, binary: bytes) -> bytes:
    # It covers the name: a whole entry under another key's name is corrupt as well.
    return hashlib.sha256(name.encode() + binary).digest()


def write_at_once(path: Path, content: bytes) -> None:
    """Write a file at once or not at all, whatever others write; raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _private(folder: Path) -> bool:
    """True if no other user can put a kernel into the folder."""
    status = folder.stat()
    mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return mine and not stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
