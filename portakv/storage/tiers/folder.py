# SPDX-License-Identifier: Apache-2.0
"""One folder of a disk tier: its files, who has claimed it, and its slots.

Blocks of one form lie in the slots of one file. A sealed record of each block lies in another file.
The order of the writes leaves both consistent after a kill at any moment.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import re
import stat
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from portakv import __version__
from portakv.core.xxh3 import checksum
from portakv.errors import StoreBusy, StoreError
from portakv.runtime import resources
from portakv.runtime.interrupts import abandoned, uninterrupted
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.resources import fcntl
from portakv.storage.eviction import UNKNOWN, Chains, mark_of, marks_of
from portakv.storage.form import BlockForm
from portakv.storage.image import Header, header, predecessor
from portakv.storage.io.base import LOST, Engine, Request
from portakv.storage.io.choose import Threads
from portakv.storage.reasons import DAMAGED
from portakv.storage.work import Queue

# ------------------------------------------------------------------------------------------------
# Open the files of a disk tier, claim its folder, and report why a file cannot be used.

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
_OPEN_ADVICE = {
    errno.ENOSPC: "Free some space, or lower the capacity.",
    errno.EROFS: "Mount it writable, or give the store another folder.",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
}


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
    advice = _OPEN_ADVICE.get(error.errno or 0, "Correct it, or give the store another folder.")
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


#: The slots of this process, for the error of a folder that another store of it has.
claimants: WeakSet[Slots] = WeakSet()


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


# ------------------------------------------------------------------------------------------------
# Slots: one folder of a disk tier.

# ------------------------------------------------------------------------------------------------
# The table of a folder's slots: one sealed record for each slot.

#: Words of a record in u64: key (4), generation, mark of the predecessor, segments, a checksum of
#: each, zeros, and the seal, which is seeded with the slot: it holds for no other. Sealed zeros are
#: no block. In place of the mark older releases wrote the bytes of the payload, which nothing has
#: ever read: they stand for an unknown predecessor.
GENERATION = 4
FOLLOWS = 5
SEGMENTS = 6
SUMS = 7

Records = npt.NDArray[np.uint64]

#: Errors of a file system, or of a sandbox, without fallocate.
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)
_ZEROS = 1 << 20  # bytes that are written at a time


def records_in(folder: Path, form: BlockForm, count: int) -> Records:
    """Return the records of the first ``count`` slots of a folder's table, or fewer, as u64
    ``[slots, words]``; they may be damaged."""
    words = 32 if len(form.segments) <= 24 else 64
    with os.fdopen(open_file(folder / "table"), "rb") as file:
        numbers = np.fromfile(file, "<u8", count * words)
    return numbers[: len(numbers) // words * words].reshape(-1, words)


def extend(sizes: Mapping[int, int]) -> bool:
    """Make open files so large, in real space; or leave all as they were.

    Returns False if the file system cannot allocate space without writing it.
    """
    before = {fd: os.fstat(fd).st_size for fd in sizes}
    allocates = True
    try:
        for fd, nbytes in sizes.items():
            if nbytes > before[fd]:
                allocates &= _allocate(fd, before[fd], nbytes - before[fd])
    except OSError:
        for fd, nbytes in before.items():
            os.ftruncate(fd, nbytes)
        raise
    return allocates


def no_space_in(folder: Path) -> str:
    """Return why a new file in a folder gets no space, as half a sentence; empty if it does.

    Leaves no file behind.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            extend({file.fileno(): PAGE})
    except OSError as error:
        return f"{cause_of(error)} ({file_system_of(folder)})"
    return ""


def _allocate(fd: int, offset: int, nbytes: int) -> bool:
    """Extend a file by zeros in real space; return False if they had to be written."""
    try:
        resources.fallocate(fd, offset, nbytes)
        return True
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
    _write_zeros(fd, offset, nbytes)
    return False


def _write_zeros(fd: int, offset: int, nbytes: int) -> None:
    """Write zeros to a file, by another descriptor: that of the file may bypass the page cache."""
    plain = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        zeros = bytes(min(nbytes, _ZEROS))
        at = offset
        while at < offset + nbytes:
            at += os.pwrite(plain, zeros[: offset + nbytes - at], at)
        os.fdatasync(plain)  # some file systems find space only now
    finally:
        os.close(plain)


# ------------------------------------------------------------------------------------------------
# `Space` bounds the slots of all forms in a folder of a disk tier.

EXTENT = 64 << 20  # the most bytes by which a form grows or shrinks at a time
_NO_BOUND = (1 << 63) - 1
_warnings = RateLimitedLog(logging.getLogger(__name__))


class _File(NamedTuple):
    """The file of slots of a form."""

    used_at: int  # when a store last opened it to save, in ns
    folder: Path
    nbytes: int


class Space:
    """The bound ``capacity``, in bytes, of all slots in ``folder``, which the caller has claimed.

    A form that grows requests space. If the bound or the file system leaves none, other forms give
    slots back from the end of their files. Closed forms go first, the one that was not opened to
    save for the longest time at the front; then ``readers``, the forms that this store has open to
    read. Empty slots at the end of a file go before slots with blocks. All successors of an evicted
    block go with it, also those in ``others``, the claimed folders of the same tier.

    ``writers`` are the forms that this store saves. One of them takes slots of another one only if
    the next block to go has not been used for longer there (`take_over`).
    """

    def __init__(self, folder: Path, capacity: int = _NO_BOUND) -> None:
        self.folder = folder
        self.capacity = capacity
        self.readers: WeakSet[Slots] = WeakSet()
        self.writers: WeakSet[Slots] = WeakSet()
        self.others: Sequence[Path] = ()
        self._trimmed = set[Path]()  # closed forms without empty slots at the end

    def whole(self) -> int:
        """Return the bytes that all forms can have: the bound, or the file system's size."""
        about = os.statvfs(self.folder)
        size = about.f_blocks * about.f_frsize
        return min(self.capacity, size) if size else self.capacity

    def make_fit(self, own: Path) -> None:
        """Make forms other than ``own`` give way while all exceed the bound, as after a change of
        it."""
        while (excess := self._allocated() - self.capacity) > 0:
            if self.yield_space(own, excess):
                continue
            # The largest of several writers gives back an eighth, or less if that suffices.
            present = [writer for writer in [*self.writers] if writer.fd >= 0]
            if len(present) < 2:
                return
            largest = max(present, key=lambda writer: writer.nbytes)
            if not largest.yield_share(min(excess, largest.nbytes // 8)):
                return

    def take_over(self, own: Slots, nbytes: int) -> bool:
        """Make another form that this store saves give back slots of ``nbytes`` or more, if its
        next block to go here has not been used for longer than that of ``own`` in any folder.
        Return True if one did.

        Ages that differ by less than an eighth count as equal, so that forms that are used alike
        do not take slots from each other in turns.
        """
        others = [other for other in [*self.writers] if other is not own and other.fd >= 0]
        if not others:
            return False
        ages = {other: other.chains.age(other.folder) for other in others}
        oldest = max(others, key=ages.__getitem__)
        return 8 * ages[oldest] > 9 * own.chains.age() and oldest.yield_share(nbytes)

    def allowance(self, own: Path, least: int, most: int) -> int:
        """Return the bytes that the form ``own`` may allocate, at most ``most``.

        Other forms give slots back if these are less than ``least``.
        """
        while True:
            free = min(self.capacity - self._allocated(), self.free())
            if free >= least:
                return min(free, most)
            if not self.yield_space(own, least - free):
                return 0

    def free(self) -> int:
        """Return the bytes that the file system has free for this user."""
        about = os.statvfs(self.folder)
        # A file system of no blocks has no limit.
        return about.f_bavail * about.f_frsize if about.f_blocks else _NO_BOUND

    def yield_space(self, own: Path, nbytes: int) -> bool:
        """Make another form than ``own`` give back slots of ``nbytes`` or more; return True if one
        did."""
        readers = {slots.folder: slots for slots in [*self.readers] if slots.fd >= 0}
        others = [file for file in self._files() if file.folder != own and file.nbytes]
        closed = [file for file in others if file.folder not in readers]
        for file in closed:
            if file.folder not in self._trimmed:
                self._trimmed.add(file.folder)
                if _cut_closed(file.folder, 0, self.others):
                    return True
        for file in closed:
            if _cut_closed(file.folder, _share(file.nbytes, nbytes), self.others):
                return True
        return any(
            readers[file.folder].cut(_share(file.nbytes, nbytes))
            for file in others
            if file.folder in readers
        )

    def _allocated(self) -> int:
        """Return the bytes of the slots of all forms."""
        return sum(file.nbytes for file in self._files())

    def _files(self) -> list[_File]:
        """Return the files of slots of all forms, the least recently used first."""
        files = list[_File]()
        for name in os.listdir(self.folder):
            place = self.folder / name
            # Not a folder of a form, of another user as lost+found, or removed meanwhile. Another
            # error is of the device: the save that needs space reports it.
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                about = os.lstat(place / "slots")
                files.append(_File(about.st_mtime_ns, place, about.st_size))
        return sorted(files)


def _share(allocated: int, nbytes: int) -> int:
    """Return the bytes that a form gives back of those it has, when ``nbytes`` are missing.

    These are more than ``nbytes``, so that not every new block makes another form give slots back.
    """
    return max(nbytes, min(EXTENT, allocated // 8))


def _cut_closed(folder: Path, nbytes: int, others: Sequence[Path]) -> bool:
    """Have a form that no store has open give slots back, as `Slots.cut` does.

    All successors of the removed blocks go with them, also in the same form of ``others``. Returns
    True if slots went. A folder that cannot be read loses none, which is logged: its blocks take
    space that no store uses.
    """
    with ExitStack() as undo:
        try:
            form = form_in(folder)
            if form.name != folder.name:
                return False
            about = os.stat(folder / "slots")
            chains = Chains[bytes]()
            slots = undo.enter_context(closing(Slots(folder, form, None, Threads(), chains=chains)))
            siblings = [slots]
            for other in others:
                # It has no such form, or a damaged one. Its blocks stay without predecessors, as
                # after a kill, and go in their turn.
                with suppress(OSError, StoreError):
                    if form_in(other / form.name) == form:
                        same = Slots(other / form.name, form, None, Threads(), chains=chains)
                        siblings.append(undo.enter_context(closing(same)))
            slots.siblings = siblings
            gone = slots.cut(nbytes)
            os.utime(slots.fd, ns=(about.st_atime_ns, about.st_mtime_ns))  # no store has used it
            return gone
        except (FileNotFoundError, StoreBusy):  # it was removed meanwhile, or opened
            return False
        except (OSError, StoreError) as error:
            why = error if isinstance(error, StoreError) else unusable(folder, error)
            text = "The blocks in %s give no space back. %s"
            _warnings.warning(f"kept {folder}", text, folder, why, lines=1)
            return False


# ------------------------------------------------------------------------------------------------
# `Health` says whether a folder of slots gets space, and whether its files are in their places.

_WRITTEN = 4 << 20  # the most bytes of new slots that are written while others wait for the lock
_ADVICE = {
    errno.ENOSPC: "Free space there, or lower the capacity.",
    errno.EDQUOT: "Raise the quota, or lower the capacity.",
    errno.EFBIG: "Raise the limit, or lower the capacity.",
}


class Shortage(NamedTuple):
    """Why a folder has fewer slots than its capacity allows.

    Attributes:
        errno: the error of the file system when slots were added last.
        free: the bytes that were free in it then.
        missing: the slots that the folder lacked then.
        slot_bytes: the bytes of a slot.
        why: the folder, its slots and the file system, without a period.
    """

    errno: int
    free: int
    missing: int
    slot_bytes: int
    why: str

    @property
    def sentence(self) -> str:
        """Return why, and what to do."""
        return f"{self.why}. {_ADVICE.get(self.errno, 'Use a folder of another file system.')}"


class Health:
    """What keeps a folder of slots from storing blocks. Each change is logged once.

    Attributes:
        configured: the slots of the capacity, for which the file system may be too small.
        growth: the most bytes of slots that are added at a time.
        lost: why a later start would not find the files of the blocks, at the last `look`; empty if
            it would.
        shortage: why the file system gave no more slots at the last attempt; None if it did, or if
            none are missing.
        table_fault: why the last record could not be written; empty if it was.
        free_bytes: of the file system, by `measure`; None if that is not known.
        notes: sentences for `explain` that stay true.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self._folder = folder
        self._space = space
        self.configured = 0
        self.growth = EXTENT
        self.lost = ""
        self.shortage: Shortage | None = None
        self.table_fault = ""
        self.free_bytes: int | None = None
        self.notes = list[str]()

    def look(self, files: Mapping[str, int]) -> str:
        """Return why a later start would not find open files, by their names; empty if it would.

        Files may be removed, moved, or hidden by another file system while the store has them open.
        Their blocks can be loaded until the store is closed; new ones would be lost.
        """
        if min(files.values()) < 0:
            return ""
        lost = ""
        for name, fd in files.items():
            try:
                why = astray(self._folder / name, fd)
            except OSError:  # the store was closed meanwhile
                return ""
            if why:
                lost = f"{self._folder / name} {why}"
        if bool(lost) != bool(self.lost):
            text = "The files of %s are in their place again, and blocks are stored there."
            if lost:
                text = "%s, while a store has it open. Nothing is stored there any more, and the "
                text += "stored blocks end with this process. Restore the folder, or restart."
            topic = f"{'lost' if lost else 'back'} {self._folder}"
            _warnings.warning(topic, text, lost or self._folder, lines=1)
        self.lost = lost
        return lost

    def measure(self) -> None:
        """Note how many bytes are free in the file system."""
        try:
            self.free_bytes = self._space.free()
        except OSError:  # the folder is gone, which `look` reports
            self.free_bytes = None

    def fall_short(self, error: OSError | None, count: int, slot_bytes: int) -> None:
        """Note that the file system gives no slots after the first ``count`` ones.

        ``error``: of the file system; None: it has no space.
        """
        if error is None:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        before = self.shortage
        if before is not None and before.errno == error.errno:
            return  # blocks that are dropped for one reason are counted together
        folder = self._folder.parent
        free = self._space.free()
        self.free_bytes = free
        why = (
            f"{folder} has {count} of the {self.configured} slots of its capacity, as its file "
            f"system ({file_system_of(folder)}, {free} bytes free) gives no more: {cause_of(error)}"
        )
        missing = self.configured - count
        self.shortage = Shortage(error.errno or 0, free, missing, slot_bytes, why)
        _warnings.warning(f"full {folder}", "%s", self.shortage.sentence, lines=1)

    @property
    def missing(self) -> int:
        """Return how many slots of the capacity the file system had no space for at the last
        attempt; 0 if it had some, or has some now by `measure`."""
        shortage = self.shortage
        if shortage is None:
            return 0
        free = self.free_bytes
        freed = free is not None and free >= shortage.free + shortage.slot_bytes
        return 0 if freed and shortage.errno == errno.ENOSPC else shortage.missing

    def note_written(self) -> None:
        """Note that the file system allocates no space in advance: fewer slots come at a time."""
        if self.growth == _WRITTEN:
            return
        self.growth = _WRITTEN
        folder = self._folder.parent
        self.notes.append(
            f"{folder} lies on {file_system_of(folder)}, which allocates no space in advance: each "
            f"new slot is written twice."
        )

    def note_record(self, error: OSError | None) -> None:
        """Note that a record could not be written, or that it was."""
        self.table_fault = ""
        if error is not None:
            table = self._folder / "table"
            self.table_fault = f"{table} cannot be written: {cause_of(error)}"
            _warnings.warning(f"table {table}", "%s", self.table_fault, lines=1)

    def close(self, descriptors: Sequence[int], sync: bool) -> None:
        """Close files, with ``sync`` after all is on the device; log why it may not be."""
        for act in (os.fdatasync, os.close) if sync else (os.close,):
            for fd in descriptors:
                try:
                    act(fd)
                except OSError as error:  # the other files are closed, too
                    text = "The last blocks in %s may be lost, as its files cannot be closed: %s."
                    topic = f"close {self._folder}"
                    _warnings.warning(topic, text, self._folder, cause_of(error), lines=1)

    def reasons(self) -> set[str]:
        """Return why no block is stored for now; all of it is logged."""
        short = set[str]() if self.shortage is None else {self.shortage.why}
        return short | {each for each in (self.lost, self.table_fault) if each}

    def sentences(self) -> list[str]:
        """Return sentences for `explain`, as it is after `look` and `measure`."""
        if self.lost:
            return [*self.notes, f"{self.lost}: nothing is stored there any more."]
        if self.missing and self.shortage is not None:
            return [*self.notes, self.shortage.sentence]
        return [*self.notes]


BATCH = 256  # headers that are read together
_LEAST_GROWTH = 1 << 20  # bytes of the first slots
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LIMITS = (*_FULL, errno.EFBIG)
_LOOKS = 16  # blocks
Track = Callable[[Sequence[int], str], Iterable[int]]


class Place(NamedTuple):
    """The slot of a block, and the expected header of the image there."""

    slot: int
    header: Header


#: Seconds in which a write of several ends, or blocks wait for none of them any more.
PATIENCE = 2.0


@dataclass
class Write:
    """A block that is being written, and the mark that it follows; ``late``: no block waits for it
    any more."""

    key: bytes = b""
    follows: int = UNKNOWN
    late: bool = False


class Slots:
    """The blocks of ``form`` in ``folder``, whose parent is claimed.

    The slots have at most ``capacity`` bytes. None: as large as the files are; then nothing is
    created or claimed. Opening allocates nothing: `take` allocates slots when none is free.
    ``track`` shows the progress of a recovery: it passes the items of a sequence with a name on.
    ``chains`` has the blocks of all folders of the form and chooses the blocks to evict; by default
    of this folder alone. ``space`` bounds all forms of the parent; by default only the file system
    does.

    Raises `StoreBusy` if another store has the folder, or I/O of a killed store; else `StoreError`.

    Attributes:
        index: slots by key, to be read only; count: allocated slots; limit: the most slots.
        broken: faulty slots; evicted: evicted blocks; generation: the highest one found.
        fd: the file of the blocks; direct: True if it bypasses the page cache.
        claim: the descriptor that claims the parent. Descriptors are negative if they are closed.
        health: whether the folder gets space, and is in its place.
        queue: in whose turns the folder is read and written; a disk sets it.
    """

    queue: Queue
    # The open files, negative before and after: `__del__` reads them.
    fd = -1
    claim = -1
    _table = -1

    def __init__(
        self,
        folder: Path,
        form: BlockForm,
        capacity: int | None,
        engine: Engine,
        track: Track = lambda items, _: items,
        chains: Chains[bytes] | None = None,
        space: Space | None = None,
    ) -> None:
        self.folder = folder
        self.form = form
        self.direct = True
        self.generation = 0
        self.chains = Chains[bytes]() if chains is None else chains
        self._space = Space(folder.parent) if space is None else space
        self.health = Health(folder, self._space)
        self._fits = False  # whether the other forms leave the room that the bound promises
        self.index = dict[bytes, int]()
        self.broken = 0
        self.evicted = 0
        self._free = deque[int]()  # slots without a block
        self._pins = Counter[int]()  # the number of pins of each pinned slot
        self._writes = dict[int, Write]()  # the blocks that are being written, by slot
        self.siblings: Sequence[Slots] = ()  # of all folders of the form, once they are open
        claimants.add(self)
        try:
            self._recover(engine, track, self._open(capacity))
            free = {*range(self.count)}.difference(self.index.values())
            self._free.extend(sorted(free))
            if chains is None:
                self.fit()
        except BaseException as error:  # also an interrupt: nothing stays open or locked
            self.close(sync=False)
            if not isinstance(error, OSError):
                raise
            raise unusable(folder, error) from error
        self._mark_table()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all slots."""
        return self.count * self.form.image_bytes

    def _open(self, space: int | None) -> int:
        """Open and lock the files; return how many records there were."""
        size = self.form.image_bytes
        table = self.folder / "table"
        if space is not None:
            self.claim = self._claimed()
            make_folder(self.folder)
        check_folder(self.folder)
        present = own_form_in(self.folder, self.form)
        self.fd = lock(self.folder / "slots")
        if self.fd < 0:
            raise StoreBusy(
                f"Expected the store's folder {self.folder} without I/O in flight, got some of a "
                f"process that was killed. Try again soon."
            )
        nbytes = os.fstat(self.fd).st_size
        known = nbytes // size
        self.limit = known
        self.health.configured = known
        if space is not None:
            self.health.configured = space // size
            self.limit = min(space, self._space.whole()) // size
            if not self.limit:
                raise StoreError(
                    f"Expected room for a block in {self.folder}, got {space} bytes; a block takes "
                    f"{size}. Increase the capacity."
                )
            # Of forms that no store opens to save, the oldest gives space back first.
            os.utime(self.fd)
        self.count = known
        if space is not None or present is None:
            more_space = partial(self._space.yield_space, self.folder, PAGE)
            write_form(self.folder, self.form, self.limit, present is None, more_space)

        self._table = open_file(table, OPEN)
        old = records_in(self.folder, self.form, known)
        os.ftruncate(self._table, old.nbytes)  # records of slots that do not exist any more
        if nbytes > known * size:  # a call that changes nothing would change the time of last use
            os.ftruncate(self.fd, known * size)
        # For all slots that there may be: growth moves no record that is being written, and the
        # system gives memory to those alone that are used.
        most = max(known, self.limit)
        self._records: Records = np.zeros((most, old.shape[1]), "<u8")
        self._records[: len(old)] = old
        self._try_direct()
        return len(old)

    def _claimed(self) -> int:
        """Return a descriptor that claims the parent, also for the other forms of this store."""
        claims = [other.claim for other in [*self._space.writers] if other.claim >= 0]
        return os.dup(claims[0]) if claims else claim(self.folder.parent)

    def _try_direct(self) -> None:
        """Have the I/O go past the page cache, if the device takes images at multiples of a page.

        A file without slots does not show that.
        """
        try:
            set_flags(self.fd, os.O_DIRECT)
            os.preadv(self.fd, [mmap.mmap(-1, PAGE)], PAGE)
        except OSError as error:
            set_flags(self.fd, 0)
            self.direct = False
            self.health.notes.append(
                f"{self.folder} refuses O_DIRECT ({error.strerror}): it is buffered."
            )

    def _recover(self, engine: Engine, track: Track, records: int) -> None:
        """Register the blocks of sealed records; check the header of a slot with a bad record."""
        words = self._records[: self.count]
        size = self.form.image_bytes
        used = np.flatnonzero(words.any(1)).tolist()
        seals = words[:, -1].tolist()
        good = {i for i in track(used, "records") if checksum(words[i, :-1], i) == seals[i]}
        # A table of zeros is new, or was lost.
        torn = [*{*used}.difference(good), *range(records if used else 0, self.count)]
        pages = np.frombuffer(mmap.mmap(-1, BATCH * PAGE), np.uint8).reshape(BATCH, PAGE)
        recovered = list[tuple[int, Header, int]]()
        for first in track(range(0, len(torn), BATCH), "headers"):
            if abandoned():  # no caller waits for this store any more
                raise KeyboardInterrupt
            part = list(zip(torn[first : first + BATCH], pages, strict=False))
            asks = [Request(self.fd, i * size, p.ctypes.data, PAGE, False) for i, p in part]
            for (slot, page), moved in zip(part, engine.run(asks), strict=True):
                if moved < 0 and -moved not in LOST:  # the stored block may be good
                    raise OSError(-moved, os.strerror(-moved))
                head = header(page, self.form) if moved == PAGE else "it cannot be read"
                words[slot] = 0
                if not isinstance(head, str):
                    recovered.append((slot, head, predecessor(page)))
        for slot, head, follows in recovered:  # not before: a table with a record was not lost
            self._put(slot, *head, follows)
        self._enter_blocks()

    def _enter_blocks(self) -> None:
        """Register the blocks of all records, in the order of use that `close` left, or else older
        ones first.

        Of several blocks of one save the last comes first.
        """
        words = self._records[: self.count]
        slots = np.flatnonzero(words[:, SEGMENTS])
        slots = slots[np.lexsort((-slots, words[slots, GENERATION]))]
        self.generation = int(words[slots, GENERATION].max(initial=0))
        text = words[slots, :GENERATION].tobytes()
        keys = [text[at : at + 32] for at in range(0, len(text), 32)]
        newest = dict(zip(keys, slots.tolist(), strict=True))  # one of two records of one key
        with self.chains.lock:  # a block that an earlier folder has stays in that folder alone
            entered = {slot: key for key, slot in newest.items() if key not in self.chains}
        for slot in {*slots.tolist()}.difference(entered):
            self._put(slot)

        in_order = dict.fromkeys(slot for slot in slots.tolist() if slot in entered)
        order = self.folder / "order"
        # The order is a hint: nothing that is wrong with it stops a start. It is not there after a
        # kill.
        with suppress(OSError, StoreError, ValueError, TypeError, RecursionError):
            for slot in json.loads(read_file(order, 16 * len(entered) + MOST_FORM)):
                if isinstance(slot, int) and slot in entered:
                    del in_order[slot]
                    in_order[slot] = None  # after all others
        with suppress(OSError):  # it is not there, or the folder is read only
            order.unlink()

        self.index = {entered[slot]: slot for slot in in_order}
        follows = words[[*in_order], FOLLOWS]
        follows[follows == self.form.payload_bytes] = UNKNOWN
        with self.chains.lock:
            self.chains.fill([*self.index], marks_of(self.index), follows.tolist(), self.folder)

    def by_use(self) -> list[bytes]:
        """Return all keys, the least recently used first, after those of unknown predecessors."""
        with self.chains.lock:
            return self.chains.by_use(self.folder)

    def touch(self, keys: Sequence[bytes], follows: Sequence[int] = ()) -> None:
        """Record the use of a prefix, its last block first.

        ``follows``: the predecessor of each block, for blocks whose predecessor is not known yet.
        """
        with self.chains.lock:
            self.chains.touch(*[key for key in reversed(keys) if key in self.index])
            for key, mark in zip(keys, follows, strict=False):
                slot = self.index.get(key)
                if slot is not None and self.chains.learn(key, mark):
                    self._records[slot, FOLLOWS] = mark
                    self._write_record(slot)

    def pin(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Return where blocks lie, which stay there until `unpin`; None for one that is gone."""
        places: list[Place | None] = [None] * len(keys)
        with self.chains.lock:
            stored = [
                (i, slot) for i, key in enumerate(keys) if (slot := self.index.get(key, -1)) >= 0
            ]
            past = GENERATION + 3 + len(self.form.segments)
            records = self._records[[slot for _, slot in stored], GENERATION:past].tolist()
            for (i, slot), (generation, _, many, *sums) in zip(stored, records, strict=True):
                self._pins[slot] += 1
                self.chains.pin(keys[i])
                places[i] = Place(slot, Header(keys[i], generation, tuple(sums[:many])))
        return places

    def unpin(self, place: Place, good: bool = True, why: str = DAMAGED) -> None:
        """Release a pin.

        Forgets a block that is not ``good``, and why; a slot becomes free with its last pin.
        """
        slot = place.slot
        key = place.header.key
        with self.chains.lock:
            if not good:
                if self.index.get(key) == slot:
                    del self.index[key]
                    self.chains.remove(key, why)
                self._put(slot)
            self._pins[slot] -= 1
            if self._pins[slot]:
                return
            del self._pins[slot]
            if self.index.get(key) == slot:
                self.chains.unpin(key)
            else:
                self._free.append(slot)

    def take(
        self,
        key: bytes,
        own: Mapping[bytes, int] | None = None,
        follows: int = UNKNOWN,
        evict: bool = True,
        waits: bool = True,
    ) -> int | None:
        """Return a slot with an empty record for a block that follows a mark.

        The predecessor stays until the slot is sealed or given back. Returns None if no slot is
        free, can be allocated or may be evicted, if the table cannot be written, or if the files
        are not in their places any more. No slot may be evicted without ``evict``, or if all blocks
        have pins or successors.

        Blocks of ``own``, the call, go after all others: the last one first, and none for a later
        one. So this ``waits`` for writes of later blocks, in all folders, until none ends for
        `PATIENCE` seconds. One folder also waits for writes of other calls. The caller then has no
        other slot, as writes that wait for each other would not end.
        """
        if self.look():
            return None
        with self.chains.lock:
            if self.fd < 0:
                return None
            if not self._fits:
                self._space.make_fit(self.folder)
                self._fits = True
            looks = not evict or self._looks_for_space()
            if not self._free and looks:
                self._grow()
            own = own or {}
            while evict and not self._free:
                has_to = self._waits(key, own)
                if self._free_a_slot(key, own, looks, has_to) or not (has_to and waits):
                    break
                self._wait()
            if not self._free:
                return None
            slot: int = self._free.popleft()
            self._writes[slot] = Write(key, follows)
            self.chains.expect(follows)
        if not self._put(slot):
            self.give(slot)
            return None
        return slot

    def look(self) -> str:
        """Return why a later start would not find the files of the blocks; empty if it would."""
        return self.health.look({"slots": self.fd, "table": self._table})

    def fit(self, siblings: Sequence[Slots] = ()) -> None:
        """Give back the slots above the limit, as after a change of the limit.

        ``siblings``: the slots of all folders of the form, whose blocks may follow each other.
        """
        self.siblings = siblings
        try:
            with self.chains.lock:
                self._cut(self.limit)
        except OSError as error:
            raise unusable(self.folder, error) from error

    def cut(self, nbytes: int) -> bool:
        """Give back the empty slots at the end of the file, or else slots of so many bytes or more.

        The blocks there go, and their successors with them. Slots below one that is pinned or being
        written stay. Returns True if slots went.
        """
        with self.chains.lock:
            return self.fd >= 0 and self._yield(nbytes)

    def yield_share(self, nbytes: int) -> bool:
        """Give slots back as `cut` does, so many bytes or an eighth, under the lock."""
        return self._yield(_share(self.nbytes, nbytes))

    def _yield(self, nbytes: int) -> bool:
        before = self.count
        self._cut(self._past_free())
        if self.count == before:
            self._cut(before - -(-nbytes // self.form.image_bytes))
        return self.count < before

    def _cut(self, keep: int) -> None:
        """Give back the slots from ``keep`` on that lie above all slots in use.

        A slot is in use if it is pinned, is being written, or leads to a block that is being
        written. All successors of the evicted blocks go with them, in all folders.
        """
        keep = max([0, keep, *(slot + 1 for slot in (*self._pins, *self._writes))])
        if keep >= self.count:
            return
        folders = [x for x in self.siblings or [self] if x.fd >= 0]
        writes = [write for x in folders for write in x._writes.values()]
        for key in (key for write in writes for key in self.chains.leading(write.follows)):
            keep = max(keep, self.index.get(key, -1) + 1)
        if keep >= self.count:
            return
        gone = [key for key, slot in self.index.items() if slot >= keep]
        # A kill meanwhile leaves no block without its predecessor.
        for key in self.chains.with_successors(gone):
            for slots in folders:
                slot = slots.index.get(key)
                if slot is not None:
                    slots._forget(key)
                    slots._put(slot)
        os.ftruncate(self.fd, keep * self.form.image_bytes)
        os.ftruncate(self._table, keep * self._records[0].nbytes)
        self._free = deque(slot for slot in self._free if slot < keep)
        self._records[keep : self.count] = 0
        self.count = keep

    def _grow(self) -> None:
        """Allocate as many bytes of slots as there are, up to an extent; or fewer, or none.

        A kill in it leaves empty slots without records.
        """
        size = self.form.image_bytes
        width = self._records.shape[1] * 8
        step = min(max(self.count * size, _LEAST_GROWTH), self.health.growth)
        more = min(max(step // size, 1), self.limit - self.count)
        if not more and self.limit < self.health.configured:  # a file system of fewer bytes
            self.health.fall_short(None, self.count, size)
        while more > 0:
            more = self._space.allowance(self.folder, size, more * size) // size
            if not more:
                # The bound of all forms is no shortage, even if the file system is full as well.
                self.health.shortage = None
                if self._space.free() < size:
                    self.health.fall_short(None, self.count, size)
                return
            past = self.count + more
            try:
                if not extend({self.fd: past * size, self._table: past * width}):
                    self.health.note_written()
            except OSError as error:
                more = self._fewer(more, error)
                continue
            self._add(past)
            return

    def _add(self, past: int) -> None:
        """Use the new slots before a number, which have space."""
        first = self.count
        self.count = past
        self.health.shortage = None
        self._free.extend(range(first, past))
        self._mark_table()
        if not first and self.direct:
            self._try_direct()

    def _fewer(self, more: int, error: OSError) -> int:
        """Return how many slots to try after so many got no space; 0 if none will."""
        size = self.form.image_bytes
        if error.errno in _LIMITS and more > 1:
            return more // 2
        record = self._records[0].nbytes
        if error.errno in _FULL and self._space.yield_space(self.folder, size + record):
            return more
        self.health.fall_short(error, self.count, size)
        return 0

    def _mark_table(self) -> None:
        """Seal the record of a free slot: from now on a table of zeros means a lost table."""
        if self._free:
            self._put(self._free[0])

    def _looks_for_space(self) -> bool:
        """Return True if a block may look for space before it evicts another one.

        Forms that share a full folder look at each `_LOOKS`th block: a look takes 0.1 ms.
        """
        return len(self._space.writers) < 2 or self.evicted % _LOOKS == 0

    def _free_a_slot(self, key: bytes, own: Mapping[bytes, int], looked: bool, waits: bool) -> bool:
        """Evict a block, or take slots of another form; return True if a slot is free. ``looked``:
        growth has found no space."""
        if looked and self._take_over():
            return True
        if self._evict(key, own, waits):
            return True
        if not looked:
            self._grow()
        return bool(self._free) or (not looked and self._take_over())

    def _take_over(self) -> bool:
        """Take slots of another form with an older block; return True if a slot is free."""
        if self.count < self.limit and self._space.take_over(self, self.form.image_bytes):
            self._grow()
        return bool(self._free)

    def _evict(self, key: bytes, own: Mapping[bytes, int], waits: bool) -> bool:
        """Evict a block; return True if one went. No block of the call goes if that ``waits``."""
        if waits and self.chains.next(self.folder) in own:
            return False
        victim = self.chains.next_for(key, own, self.folder)
        if victim is None:
            return False
        self._forget(victim)
        self.evicted += 1
        return True

    def _waits(self, key: bytes, own: Mapping[bytes, int]) -> bool:
        """Return True if a block waits for a write, since no block of another call goes next."""
        victim = self.chains.next()
        if victim is not None and victim not in own:
            return False
        alone = len(self.siblings) < 2  # else another folder may have a slot
        return any(x._writes_after(key, own, alone) for x in self.siblings or [self])

    def _writes_after(self, key: bytes, call: Mapping[bytes, int], others: bool) -> bool:
        """Return True if blocks are being written, and are not late, that come after a block in its
        call; with ``others``, also if these belong to other calls."""
        past = len(call)
        place = call.get(key, past)
        other = past if others else -1
        writes = self._writes.values()
        return any(call.get(x.key, other) > place for x in writes if not x.late)

    def _wait(self) -> None:
        """Wait for the end of a write, under the lock. If none ends in time, all writes of the
        folders are late: else each of the next blocks would wait as long."""
        if not self.chains.written.wait(PATIENCE):
            for slots in self.siblings or [self]:
                for write in slots._writes.values():
                    write.late = True

    def _past_free(self) -> int:
        """Return the number of the slot after the last slot that is not free."""
        free = {*self._free}
        past = self.count
        while past - 1 in free:
            past -= 1
        return past

    def _end_write(self, slot: int) -> None:
        """Note that a slot is not being written any more."""
        write = self._writes.pop(slot, Write())
        self.chains.unexpect(write.follows)
        self.chains.written.notify_all()

    def seal(self, slot: int, key: bytes, generation: int, checksums: Sequence[int]) -> bool:
        """Register a block whose image was written; return False if its record cannot be
        written."""
        if not self.direct:
            size = self.form.image_bytes
            os.posix_fadvise(self.fd, slot * size, size, os.POSIX_FADV_DONTNEED)
        follows = self._writes.get(slot, Write()).follows
        if not self._put(slot, key, generation, checksums, follows):
            self.give(slot)
            return False
        with self.chains.lock:
            self._end_write(slot)
            # Only one of two records of a block stays, or a later start could register the other
            # one.
            before = self.index.get(key)
            elsewhere = before is None and key in self.chains  # in another folder
            newer = before is not None and int(self._records[before, GENERATION]) > generation
            if elsewhere or newer:
                self._put(slot)
                self._free.append(slot)
                return True
            self._forget(key)
            if before is not None:
                self._put(before)
            self.index[key] = slot
            self.chains.add(key, mark_of(key), follows, self.folder)
        return True

    def give(self, slot: int, broken: bool = False) -> None:
        """Give a taken slot back; a faulty slot is not used again."""
        with self.chains.lock:
            self._end_write(slot)
            self.broken += broken
            if not broken:
                self._free.append(slot)

    def close(self, sync: bool = True) -> None:
        """Make all blocks and the order of last use durable, and release the folder."""
        files = [fd for fd in (self.fd, self._table, self.claim) if fd >= 0]
        lost = sync and self.look()  # then another store may have the folder that is there now
        self.fd = self._table = self.claim = -1
        if sync and files and not lost:
            order = json.dumps([self.index[key] for key in self.by_use()])
            replace_if_possible(self.folder / "order", order)
        self.health.close(files, sync)

    def drop(self) -> None:
        """Close the files in a forked process, which must not keep the parent's locks."""
        self.chains.renew()
        self.close(sync=False)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Release the folder of a store whose `close` was interrupted.

        At the interpreter's end the needed functions are gone, and the kernel releases the folder.
        """
        if not ending():
            self.close(sync=False)

    def _put(
        self,
        slot: int,
        key: bytes = b"",
        generation: int = 0,
        sums: Sequence[int] = (),
        follows: int = UNKNOWN,
    ) -> bool:
        """Write the record of a block, or of none; False if it cannot be."""
        record = self._records[slot]
        record[:] = 0
        if key:
            record[:GENERATION] = np.frombuffer(key, "<u8")
            record[GENERATION] = generation
            record[FOLLOWS] = self.form.payload_bytes if follows == UNKNOWN else follows
            record[SEGMENTS] = len(sums)
            record[SUMS : SUMS + len(sums)] = np.array(sums, "<u8")
        return self._write_record(slot)

    def _write_record(self, slot: int) -> bool:
        """Write the record of a slot; log why, and return False, if it cannot be.

        A block whose record stays although it is gone is found again at a start, and verified when
        it is read.
        """
        record = self._records[slot]
        record[-1] = checksum(record[:-1], slot)
        try:
            written = os.pwrite(self._table, record.data, slot * record.nbytes)
            if written != record.nbytes:
                raise OSError(errno.EIO, "the write was cut short")
        except OSError as error:
            self.health.note_record(error)
            return False
        self.health.note_record(None)
        return True

    def _forget(self, key: bytes) -> None:
        """Take a block from the index; its slot is free unless a reader has it."""
        slot = self.index.pop(key, None)
        if slot is None:
            return
        self.chains.remove(key)
        if slot not in self._pins:
            self._free.append(slot)
