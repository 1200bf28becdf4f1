# SPDX-License-Identifier: Apache-2.0
"""The kernels that this process has loaded, and a private cache on disk for compiled ones.

Each entry on disk has a checksum and is rebuilt when corrupt. Writing is atomic, so that any number
of processes may race. A missing, unwritable or foreign directory is not an error: each process then
compiles its kernels, and logs why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog

ENVIRONMENT = "PORTAKV_CACHE_DIR"
_warnings = RateLimitedLog(logging.getLogger(__name__))

#: Loaded kernels and compiled programs, by the backend that made them and by what decides them.
#: Plans share them.
LOADED: Bounded[tuple[object, object], Any] = Bounded("loaded kernels", 2048)


def directory() -> Path:
    """Return the cache directory: ``PORTAKV_CACHE_DIR``, else the user's cache folder."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "portakv"


def cached(parts: tuple[str, ...], build: Callable[[], bytes]) -> bytes:
    """Return the binary for a key, from disk or built and cached; errors of ``build`` pass through.

    Args:
        parts: everything that decides the binary: source, flags, architecture, compiler version.
    """
    path = _path(parts)
    entry = _read(path)
    if entry is not None:
        return entry
    binary = build()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _private(path.parent):  # `refusal` says why it is not
            write_atomically(path, _checksum(path.name, binary) + binary)
    except OSError as error:
        text = "A kernel is not kept in %s (%s), so each process compiles it. Set %s to a folder "
        text += "that can be written."
        topic = f"kept {path.parent}"
        _warnings.warning(topic, text, path.parent, error.strerror, ENVIRONMENT, lines=1)
    return binary


def holds(parts: tuple[str, ...]) -> bool:
    """Return True if the complete binary for a key is on disk."""
    return _read(_path(parts)) is not None


def refusal() -> str | None:
    """Return why the directory cannot cache kernels; None if it can. Creates it if need be."""
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
    except OSError:  # mostly there is no folder yet; the kernel is built, and its write reports
        return None
    checksum = content[:32]
    binary = content[32:]
    return binary if binary and _checksum(path.name, binary) == checksum else None


def _checksum(name: str, binary: bytes) -> bytes:
    # The checksum covers the name: an entry under the name of another key is corrupt as well.
    return hashlib.sha256(name.encode() + binary).digest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, whatever other processes write; raise `OSError` on failure."""
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
    """Return True if no other user can put a kernel into the folder."""
    status = folder.stat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return owned and not stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
