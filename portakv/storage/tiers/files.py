# SPDX-License-Identifier: Apache-2.0
"""Open the files of a disk tier, claim its folder, and report why a file cannot be used."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from portakv import __version__
from portakv.errors import StoreBusy, StoreError
from portakv.runtime import resources
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.linux import fcntl
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.storage.form import BlockForm

_warnings = RateLimitedLog(logging.getLogger(__name__))
#: Flags of files that a store writes.
OPEN = os.O_RDWR | os.O_CREAT
MOST_FORM = 1 << 20  # bytes of form.json
PAGE = 4096  # bytes of a header, and the alignment of images
#: Flags that every file of a store is opened with: links are not followed, and a pipe never blocks.
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}
#: What lies in place of a file, by the error of its opening.
_REFUSED = {
    errno.ELOOP: "a symbolic link",
    errno.EISDIR: "a directory",
    errno.ENXIO: "a socket or a device",
}
_CAUSES = {
    errno.ENOENT: "it does not exist",
    errno.EROFS: "it lies on a read-only file system",
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.ENOSPC: "the device has no space left",
    errno.EDQUOT: "the quota of this user is used up",
    errno.EFBIG: "files may not be larger there (ulimit -f, or the file system)",
    errno.EISDIR: "it is a directory",
    errno.EEXIST: "it is not a directory",
    errno.ENOTDIR: "it is not a directory, or lies below a file",
    errno.ELOOP: "it is a symbolic link",
}
_PERMISSIONS = "Correct its permissions, or give the store another folder."
_ADVICE = {
    errno.ENOSPC: "Free some space, or lower the capacity.",
    errno.EROFS: "Mount it writable, or give the store another folder.",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
}


@dataclass
class Descriptors:
    """The descriptors of the files of a form; negative: not open."""

    slots: int = -1  # the very file of the I/O
    table: int = -1
    claim: int = -1  # of the parent

    def opened(self) -> list[int]:
        """Return the open descriptors."""
        return [fd for fd in (self.slots, self.table, self.claim) if fd >= 0]


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of this user and return its descriptor. A file that is made is private.

    Raises `OSError` as `os.open`, and `StoreError` for a link, a pipe, a directory, a device, or a
    file of another user.
    """
    try:
        fd = os.open(path, flags | _SAFE, 0o600)
    except OSError as error:
        kind = _REFUSED.get(error.errno or 0)
        if kind is None:
            raise
        raise wrong_kind(path, kind) from error
    about = os.fstat(fd)
    mode = stat.S_IFMT(about.st_mode)
    if mode == stat.S_IFREG and about.st_uid == os.geteuid():
        return fd
    os.close(fd)
    if mode != stat.S_IFREG:
        raise wrong_kind(path, _KINDS.get(mode, "something else"))
    raise wrong_owner(path, about.st_uid)


def read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a file of this user.

    Raises the errors of `open_file`, and `StoreError` for a file of more than ``most`` bytes.
    """
    with os.fdopen(open_file(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise StoreError(
            f"Expected {path} to have at most {most} bytes, got more. It is damaged: restore "
            f"it, or remove its folder by `portakv store wipe`."
        )
    return data


def replace_file(file: Path, text: str) -> None:
    """Write a small file, whole or not at all, whenever the power fails."""
    new = file.with_name(f"{file.name}.new")
    with open(open_file(new, OPEN | os.O_TRUNC), "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)
    place = os.open(file.parent, os.O_DIRECTORY)
    # Some network file systems refuse it. The file is in its place; what a loss of power could then
    # undo is the name, and a folder without its form.json is refused by a sentence.
    with suppress(OSError):
        os.fsync(place)
    os.close(place)


def replace_if_possible(file: Path, text: str) -> None:
    """Write a small file as `replace_file`, or log why the system refuses it."""
    try:
        replace_file(file, text)
    except OSError as error:
        why = cause_of(error)
        _warnings.warning(f"small {file}", "%s cannot be written: %s.", file, why, lines=1)
    except StoreError as error:  # something else is in place of the file
        _warnings.warning(f"small {file}", "%s", error, lines=1)


def wrong_kind(path: Path, kind: str) -> StoreError:
    """Return the error for something else in place of a file."""
    return StoreError(
        f"Expected {path} to be a regular file, got {kind}. Remove it, or give the store another "
        f"folder."
    )


def wrong_owner(path: Path, uid: int) -> StoreError:
    """Return the error for a file or folder of another user."""
    return StoreError(
        f"Expected {path} to belong to user {os.geteuid()}, got user {uid}. Correct its owner, or "
        f"give the store another folder."
    )


def make_folder(folder: Path) -> None:
    """Make a private folder with its parents, unless it exists.

    Raises `OSError` as `os.makedirs`, and `StoreError` where no folder can be created, as in /proc.
    """
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
    except FileNotFoundError as error:
        raise StoreError(
            f"Expected to create {error.filename or folder}, but the file system there creates no "
            f"folders. Give the store another folder."
        ) from error


def check_folder(folder: Path) -> None:
    """Raise `StoreError` for a link, and for another user's folder."""
    about = os.lstat(folder)
    if stat.S_ISLNK(about.st_mode):
        raise StoreError(
            f"Expected {folder} to be a directory, got a symbolic link. Remove it, or give the "
            f"store another folder."
        )
    if about.st_uid != os.geteuid():
        raise wrong_owner(folder, about.st_uid)


def cause_of(error: OSError) -> str:
    """Return why the system refused a file, as half a sentence."""
    number = error.errno or 0
    detail = error.strerror or str(error)
    cause = _CAUSES.get(number, detail)
    if detail not in (cause, os.strerror(number)):
        cause += f" ({detail})"
    return cause


def file_system_of(folder: Path) -> str:
    """Return the type and the mount point of the file system of a folder, for messages."""
    place = os.path.realpath(folder)
    best = ""
    kind = "unknown"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields, _, more = line.partition(" - ")
                point = re.sub(r"\\([0-7]{3})", lambda x: chr(int(x[1], 8)), fields.split()[4])
                within = place == point or place.startswith(f"{point.rstrip('/')}/")
                if within and len(point) >= len(best):  # the last mount over a place hides others
                    best = point
                    kind = more.split()[0]
    except OSError:  # no /proc: the message does without
        pass
    return f"{kind} at {best or '/'}"


def unusable(folder: Path, error: OSError) -> StoreError:
    """Return the error for a folder of which the system refuses a file."""
    place = error.filename or folder
    if error.errno in resources.NONE_FREE:
        return StoreError(f"Expected to use {place}, but {resources.reason(error)}.")
    advice = _ADVICE.get(error.errno or 0, "Correct it, or give the store another folder.")
    return StoreError(f"Expected to use {place}, but {cause_of(error)}. {advice}")


def astray(path: Path, fd: int) -> str:
    """Return why a path does not lead to an open file any more; empty if it does.

    Empty also if the system does not say, as without permission: that is no sign of a loss.
    """
    opened = os.fstat(fd)
    if not opened.st_nlink:
        return "was removed"
    try:
        there = os.lstat(path)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
        return "was moved away, or its file system was unmounted" if gone else ""
    if os.path.samestat(there, opened):
        return ""
    return "has another file in its place, or a file system was mounted over it"


def set_flags(fd: int, flags: int) -> None:
    """Set the flags of an open file, such as ``O_DIRECT``. Raise `OSError` if it refuses them."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def lock(file: Path) -> int:
    """Lock a file and return its descriptor; -1 if another process has the lock, or removed the
    file."""
    fd = open_file(file, OPEN)
    locked = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.fstat(fd).st_nlink > 0
    except BlockingIOError:  # another process has the lock
        pass
    finally:
        if not locked:  # also after an error, such as of a file system without locks
            os.close(fd)
    return fd if locked else -1


def form_in(folder: Path) -> BlockForm:
    """Return the form of a folder's form.json. Raises `StoreError`, or `OSError` as `open_file`."""
    file = folder / "form.json"
    text = read_file(file, MOST_FORM).decode(errors="replace")
    try:
        return BlockForm.from_json(text)
    except StoreError as error:
        raise StoreError(
            f"Expected the form of a cache in {file}, got damaged text or that of another release. "
            f"{error}"
        ) from error


def forms_in(folder: Path) -> Iterator[BlockForm]:
    """Yield the forms that lie in a folder of a tier and can be read. The others are logged: their
    blocks are not found, and take space."""
    for name in sorted(glob("*", root_dir=folder)):
        if not re.fullmatch("[0-9a-f]{32}", name):  # not a folder of a form
            continue
        why = ""
        try:
            form = form_in(folder / name)
            if form.name == name:
                yield form
        except FileNotFoundError:  # an opening that was killed, or a wipe
            continue
        except StoreError as error:
            why = str(error)
        except OSError as error:
            why = str(unusable(folder / name, error))
        if why:
            text = "The blocks in %s are not found. %s"
            _warnings.warning(f"form {folder / name}", text, folder / name, why, lines=1)


def own_form_in(folder: Path, form: BlockForm) -> BlockForm | None:
    """Return the form of form.json, None for a new folder. Raise `StoreError` for another form."""
    file = folder / "form.json"
    do = "Restore it, or remove the blocks by `portakv store wipe`."
    try:
        present = form_in(folder)
    except FileNotFoundError:
        if not os.path.lexists(folder / "table"):
            return None
        raise StoreError(
            f"Expected {file} with the form of the blocks there, got no such file. {do}"
        ) from None
    if present != form:
        raise StoreError(f"Expected {file} to hold {form}, got {present}. {do}")
    return present


def write_form(
    folder: Path, form: BlockForm, slots: int, new: bool, more_space: Callable[[], bool]
) -> None:
    """Write form.json, unless it says the same, except for the release that wrote it.

    Args:
        slots: the most slots of the folder.
        new: the folder has no form.json. If it cannot be written, nothing stays that looks like a
            form.
        more_space: makes other forms give way while the device is full; returns False if none does.
    """
    about: dict[str, Any] = {
        "slots": slots,
        "slot_bytes": form.image_bytes,
        "alignment": PAGE,
        "segments": len(form.segments),
        "checksum": "xxh3-64",
    }
    content = {**json.loads(form.json()), "folder": about}
    same = json.dumps(content)[:-2]
    file = folder / "form.json"
    if not new and read_file(file, MOST_FORM).startswith(same.encode()):
        return
    about["written_by"] = f"portakv {__version__}"
    if new:
        _make_form(file, json.dumps(content), more_space)
    else:
        replace_if_possible(file, json.dumps(content))


def _make_form(file: Path, text: str, more_space: Callable[[], bool]) -> None:
    """Write the first form.json of a folder, as `write_form` says."""
    try:
        while True:
            try:
                return replace_file(file, text)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not more_space():
                    raise
    except BaseException:  # also an interrupt: no half of a folder stays
        file.with_name(f"{file.name}.new").unlink(missing_ok=True)
        slots = file.with_name("slots")
        with suppress(OSError):  # the folder contains files of other programs
            if not slots.stat().st_size:
                slots.unlink()
            file.parent.rmdir()
        raise


class Claimant(Protocol):
    """Slots of a form, whose folder lies in the folder of the tier."""

    folder: Path

    @property
    def claim(self) -> int:
        """Return the descriptor that claims the folder of the tier; negative if none does."""

    def drop(self) -> None:
        """Close the files in a forked process, which must not keep the parent's locks."""


#: The slots of this process, for the error of a folder that another store of it has.
claimants: WeakSet[Claimant] = WeakSet()


def _drop_all() -> None:
    for claimant in [*claimants]:
        claimant.drop()


os.register_at_fork(after_in_child=_drop_all)


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
    # The device is full: only the message for another store then lacks the number.
    with suppress(OSError):
        os.ftruncate(fd, os.pwrite(fd, str(os.getpid()).encode(), 0))
    return fd


def open_to_others(folder: Path) -> str:
    """Return a sentence for a folder in which other users may remove and move files; else an empty
    text.

    They cannot put blocks there, since every file has to belong to this user. In a folder with the
    sticky bit, such as /tmp, they cannot do either.
    """
    try:
        mode = os.stat(folder).st_mode
    except OSError:  # the opening of its files reports it
        return ""
    if not mode & 0o022 or mode & stat.S_ISVTX:
        return ""
    return f"Other users may remove the blocks in {folder}. Run chmod go-w {folder}."


def holder(folder: Path) -> str:
    """Return a name for the process that claimed a folder last."""
    try:
        text = read_file(folder / "lock", 20).decode()
    except (OSError, StoreError, UnicodeDecodeError):
        text = ""
    return f"process {text if text.isdigit() else '?'}"
