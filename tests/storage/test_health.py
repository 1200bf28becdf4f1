# SPDX-License-Identifier: Apache-2.0
"""Folders that get no space, and folders that are lost below a store: nothing is silent."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import slot_cases as cases
from support.slot_cases import FORM, IMAGE, KEYS, entries, opened, put, sizes

from portakv.runtime import resources
from portakv.storage import Disk
from portakv.storage.tiers.folder import Space, cause_of, file_system_of, lock, no_space_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / FORM.name


def remove(folder: Path, _: Path) -> None:
    shutil.rmtree(folder)


def remove_all(folder: Path, _: Path) -> None:
    shutil.rmtree(folder.parent)


def remove_the_table(folder: Path, _: Path) -> None:
    (folder / "table").unlink()


def move(folder: Path, away: Path) -> None:
    folder.parent.rename(away)


def replace_by_a_new_folder(folder: Path, away: Path) -> None:
    folder.parent.rename(away)
    opened(folder).close()


def mount_over(folder: Path, _: Path) -> None:
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder.parent)]
    if subprocess.run(words, check=False).returncode:
        pytest.skip("needs to mount a filesystem")


LOSSES: list[tuple[Callable[[Path, Path], None], str]] = [
    (remove, "was removed"),
    (remove_all, "was removed"),
    (remove_the_table, "was removed"),
    (move, "was moved away"),
    (replace_by_a_new_folder, "has another file in its place"),
    (mount_over, "was moved away, or its file system was unmounted"),
]


@pytest.mark.parametrize(("lose", "why"), LOSSES, ids=[lose.__name__ for lose, _ in LOSSES])
def test_a_folder_that_is_lost_below_a_store(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[Path, Path], None],
    why: str,
) -> None:
    """Fault 21. Nothing is stored there, which is logged once; what was there can be read until the
    end. What lies in its place stays as it is."""
    folder = tmp_path / "kv" / FORM.name
    slots = opened(folder)
    try:
        assert put(slots, KEYS[0], 1)
        lose(folder, tmp_path / "away")
        before = {x: x.stat().st_mtime_ns for x in (tmp_path / "kv").rglob("*")}
        assert not put(slots, KEYS[1], 2)
        assert not put(slots, KEYS[2], 3)
        assert why in slots.health.lost
        (text,) = [record.getMessage() for record in caplog.records]
        assert slots.health.lost in text
        assert str(folder) in text
        assert [*entries(slots)] == [KEYS[0]]
        slots.close()
        assert {x: x.stat().st_mtime_ns for x in (tmp_path / "kv").rglob("*")} == before
    finally:
        if lose is mount_over:
            subprocess.run(["umount", "-l", folder.parent], check=False)


def test_a_folder_that_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a file system that is mounted again: blocks are stored, and the log says so."""
    folder = tmp_path / "kv" / FORM.name
    with closing(opened(folder)) as slots:
        assert put(slots, KEYS[0], 1)
        folder.parent.rename(tmp_path / "away")
        assert not put(slots, KEYS[1], 2)
        (tmp_path / "away").rename(folder.parent)
        caplog.clear()
        assert put(slots, KEYS[1], 2)
        assert slots.health.lost == ""
        assert "are in their place again" in caplog.text
    with closing(opened(folder)) as slots:
        assert {*slots.index} == {*KEYS[:2]}


def test_a_folder_that_may_not_be_looked_at_is_not_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **more)

    with closing(opened(folder)) as slots, monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        assert slots.look() == ""


def no_fallocate(fd: int, offset: int, nbytes: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_a_filesystem_without_fallocate(ext2: Path) -> None:
    """Slots are written with zeros, so that they have real space."""
    with closing(opened(ext2 / "x", 400)) as slots:
        assert slots.direct  # zeros are written although the file takes whole pages alone
        assert all(put(slots, key, 1) for key in KEYS[:90])
        assert slots.health.shortage is None
        (note,) = slots.health.notes
        assert "ext2" in note
        about = os.fstat(slots.fd)
        assert about.st_blocks * 512 >= about.st_size == slots.count * IMAGE
    with closing(opened(ext2 / "x", 400)) as slots:
        assert len(entries(slots)) == 90


def test_a_full_filesystem_without_fallocate(ext2: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has less space than the capacity: the last slots are missing, and blocks are evicted."""
    with closing(opened(ext2 / "x", 2000)) as slots:
        assert all(put(slots, key, 1) for key in (n.to_bytes(32, "big") for n in range(1, 1100)))
        assert slots.evicted > 0
        assert slots.health.missing == 2000 - slots.count
        (text,) = [record.getMessage() for record in caplog.records]
        assert "ext2 at" in text


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_an_allocation_that_the_system_does_not_have(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Nor does glibc's emulation work, which O_DIRECT refuses."""
    with monkeypatch.context() as patch, closing(opened(folder, 300)) as slots:
        patch.setattr(resources, "fallocate", failing(number))
        patch.setattr(os, "posix_fallocate", failing(errno.EINVAL))
        assert all(put(slots, key, 1) for key in KEYS[:90])
        assert len(slots.health.notes) == 1
        about = os.fstat(slots.fd)
        assert about.st_blocks * 512 >= about.st_size == slots.count * IMAGE
    with closing(opened(folder, 300)) as slots:
        assert len(entries(slots)) == 90


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("at", ["fallocate", "a write of zeros"])
def test_why_no_slot_is_added(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    at: str,
) -> None:
    """The log says it once, however many blocks come, and again after there was space."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with closing(opened(folder, 300)) as slots:
        with monkeypatch.context() as patch:
            if at == "fallocate":
                patch.setattr(resources, "fallocate", refuse)
            else:
                patch.setattr(resources, "fallocate", no_fallocate)
                patch.setattr(os, "pwrite", refuse)
            assert [slots.take(key) for key in KEYS[:20]] == [None] * 20
            assert sizes(folder) == [0, 0]
            assert no_space_in(folder).startswith(cause_of(OSError(number, os.strerror(number))))
        assert no_space_in(folder) == ""
        assert slots.health.shortage is not None
        assert slots.health.shortage.errno == number
        (text,) = [record.getMessage() for record in caplog.records]
        assert text == slots.health.shortage.sentence
        about = os.statvfs(folder)
        for fact in (
            f"{folder.parent} has 0 of the 300 slots",
            file_system_of(folder),
            f"{slots.health.shortage.free} bytes free",
        ):
            assert fact in text
        assert 0 < slots.health.shortage.free <= about.f_blocks * about.f_frsize
        assert slots.health.missing in (0, 300)
        assert put(slots, KEYS[0], 1)
        assert slots.health.shortage is None
        assert slots.health.missing == 0


def test_a_capacity_above_the_size_of_the_filesystem(
    small_device: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a smaller store, and says so once it has all of the filesystem."""
    with closing(opened(small_device / "x", 200)) as slots:
        assert slots.limit < slots.health.configured == 200
        assert all(put(slots, key, 1) for key in KEYS[:60])
        assert not caplog.records
        assert all(put(slots, bytes([n]) * 32, 1) for n in range(99))
        assert slots.health.missing == 200 - slots.count > 0
        (text,) = [record.getMessage() for record in caplog.records]
        assert f"has {slots.count} of the 200 slots of its capacity" in text
        assert f"tmpfs at {small_device}" in text
    assert "order cannot be written: the device has no space left" in caplog.text


def test_the_bound_of_the_capacity_is_no_shortage(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(opened(folder, 4)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:9])
        assert slots.evicted == 5
        assert (slots.health.shortage, slots.health.missing) == (None, 0)
    assert not caplog.records


def test_a_shortage_ends_when_space_is_freed(small_device: Path) -> None:
    """Also if no save has tried since then."""
    (small_device / "other").write_bytes(bytes(512 << 10))
    with closing(opened(small_device / "x", 90)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:80])
        assert slots.health.missing == 90 - slots.count > 0
        (small_device / "other").unlink()
        slots.health.measure()
        assert slots.health.missing == 0


@pytest.mark.parametrize("point", ["a place", "odd\\name"])
def test_the_file_system_of_a_folder_is_named(tmp_path: Path, point: str) -> None:
    place = tmp_path / point
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=False).returncode:
        pytest.skip("needs to mount a filesystem")
    try:
        assert file_system_of(place / "below") == f"tmpfs at {place}"
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_the_other_folders_serve_without_one_that_is_removed(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    tier = Disk(*folders, capacity=16 * IMAGE, io=cases.Faulty())
    graph: Any = cases.Tally()
    (store,) = tier.open(graph, SimpleNamespace(memory=()), [FORM])

    def save(keys: list[bytes]) -> list[bool]:
        rows = cases.images(len(keys), FORM)
        sums = [cases.fill(row, FORM, key, 1) for row, key in zip(rows, keys, strict=True)]
        queue = store.queue_for_write(rows.nbytes)
        return store.write(queue, keys, [*rows], [1] * len(keys), sums)

    with closing(store):
        assert save(KEYS[:4]) == [True] * 4
        shutil.rmtree(folders[0])
        assert save(KEYS[4:8]) == [True] * 4
        lost, whole = store.parts
        assert not {*KEYS[4:8]} & {*lost.index}
        assert {*KEYS[4:8]} <= {*whole.index}
        assert store.read(KEYS[:8], [*cases.images(8, FORM)]) == [True] * 8


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_device_that_fails_at_the_close_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slots = opened(folder)
    assert put(slots, KEYS[0], 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        slots.close()
    assert caplog.messages == [
        f"The last blocks in {folder} may be lost, as its files cannot be closed: "
        f"{os.strerror(errno.EIO)}."
    ]
    opened(folder).close()


@pytest.mark.parametrize("harm", ["damaged", "of another format", "not readable"])
def test_a_form_that_cannot_be_read_is_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: str,
) -> None:
    """Its blocks are not found, and give no space back. Other files of the folder are no news."""
    folder = tmp_path / FORM.name
    with closing(opened(folder, 8)) as slots:
        assert put(slots, KEYS[0], 1)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / ("0" * 32)).mkdir()  # of a wipe that was killed
    tier = Disk(tmp_path, capacity=1 << 20)
    other = replace(FORM, heads=(0, 1, 2))
    tier.forms(other)
    assert not caplog.messages
    if harm == "not readable":
        real = os.open

        def refuse(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
            if str(path) == str(folder / "form.json"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, flags, mode, **more)

        monkeypatch.setattr(os, "open", refuse)
    else:
        text = "{" if harm == "damaged" else '{"format": 99}'
        (folder / "form.json").write_text(text)
    assert tier.forms(other) == []
    (text,) = caplog.messages
    assert text.startswith(f"The blocks in {folder} are not found. ")
    caplog.clear()
    assert not Space(tmp_path, 1).yield_space(tmp_path / "own", 1)
    (text,) = caplog.messages
    assert text.startswith(f"The blocks in {folder} give no space back. ")


def test_a_lock_that_the_system_refuses_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No locks available"):
        lock(tmp_path / "file")
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777, 0o775, 0o777], ids=oct)
def test_a_folder_that_others_may_write_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(mode)
    graph: Any = cases.Tally()
    tier = Disk(folder, capacity=1e6, io=cases.Faulty())  # type: ignore[arg-type]
    (store,) = tier.open(graph, SimpleNamespace(memory=()), [FORM])
    with closing(store):
        notes = [each for each in store.notes if f"chmod go-w {folder}" in each]
    assert len(notes) == (mode in (0o775, 0o777))
    assert caplog.messages == notes
    assert tier.capacity == 1_000_000
