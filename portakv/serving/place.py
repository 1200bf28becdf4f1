# SPDX-License-Identifier: Apache-2.0
"""`Place`: where the processes of a host find the keeper that serves them."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from weakref import WeakSet

from portakv.errors import StoreError
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.files import cause_of, check_folder, lock, make_folder, read_file, unusable

#: The file in a folder of a disk tier. The process that has it locked serves the folder.
NAME = "keeper"
#: Memory in which the processes of a host share files, and the folder of this user there.
_MEMORY = Path("/dev/shm")
_warnings = RateLimitedLog(logging.getLogger(__name__))
_ADDRESS = re.compile(r"ipc:///proc/[0-9]{1,10}/fd/[0-9]{1,10}\n")


class Place:
    """A file with the address of a keeper, which only this user may write.

    The process that serves has the file locked. The kernel drops the lock with the process, so
    that another one may serve.

    Args:
        file: in a private folder.
        temporary: remove the file after use.
    """

    def __init__(self, file: Path, temporary: bool = False) -> None:
        self._file = file
        self._temporary = temporary
        self._lock = -1  # the descriptor of the file while this process serves

    def __repr__(self) -> str:
        return f"Place({str(self._file)!r})"

    @classmethod
    def of_folder(cls, folder: str | Path) -> Place:
        """Return the place of the keeper of a folder of a disk tier."""
        return cls(Path(folder) / NAME)

    @classmethod
    def of_engine(cls, engine: str) -> Place:
        """Return the place of the keeper of an engine without a folder, in memory of this host."""
        name = sha256(engine.encode(errors="replace")).hexdigest()[:32]
        return cls(_MEMORY / f".portakv-{os.geteuid()}" / name, temporary=True)

    @property
    def name(self) -> str:
        """Return the folder, for messages."""
        return str(self._file.parent)

    @property
    def claimed(self) -> bool:
        """Return whether this process serves."""
        return self._lock >= 0

    def address(self) -> str:
        """Return the address of the channel of the keeper, as far as is known; empty without one.

        The keeper may have ended since then. Raises `StoreError` for a file of another user. The
        log says why a file that is there cannot be read.
        """
        try:
            text = read_file(self._file, 256).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            text = "The address of the keeper in %s cannot be read: %s."
            _warnings.warning(f"{self._file}", text, self._file, cause_of(error), lines=1)
            return ""
        return text.strip() if _ADDRESS.fullmatch(text) else ""

    def claim(self) -> bool:
        """Lock the file; return whether this process serves now. Another one may serve.

        Raises `StoreError` for a folder or a file that cannot be used, or that others may write.
        """
        if self.claimed:
            return True
        folder = self._file.parent
        try:
            make_folder(folder)
            check_folder(folder)
            if folder.stat().st_mode & 0o022:
                raise StoreError(
                    f"Expected a folder that only this user may write, got {folder}, which others "
                    f"may write. Run chmod go-w on it, or pass another."
                )
            self._lock = lock(self._file)
        except OSError as error:
            raise unusable(folder, error) from None
        if self.claimed:
            _watch_forks()
            _claimed.add(self)
            os.ftruncate(self._lock, 0)  # the address of a keeper that has ended
        return self.claimed

    def publish(self, address: str) -> None:
        """Write the address of this process's channel.

        Raises `StoreError` if the device is full. This process does not serve then.
        """
        try:
            os.pwrite(self._lock, f"{address}\n".encode(), 0)
        except OSError as error:
            self.drop()  # another one may serve, or this one later
            raise unusable(self._file, error) from None

    def release(self) -> None:
        """Serve no longer."""
        if self.claimed:
            # An address that stays is that of a channel that is closed, so no client joins there.
            with suppress(OSError):
                os.ftruncate(self._lock, 0)
                if self._temporary:
                    self._file.unlink(missing_ok=True)
            self.drop()

    def drop(self) -> None:
        """Close the file, in a forked process too, which must not keep the lock."""
        descriptor = self._lock
        self._lock = -1
        if descriptor >= 0:
            os.close(descriptor)


_claimed: WeakSet[Place] = WeakSet()


@cache
def _watch_forks() -> None:
    """Close the files in a forked child: it would keep the lock of its parent."""

    def drop_all() -> None:
        for place in [*_claimed]:
            place.drop()

    os.register_at_fork(after_in_child=drop_all)
