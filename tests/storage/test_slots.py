# SPDX-License-Identifier: Apache-2.0
"""`Slots`: what its files hold after any end of the process, and what it does if they are wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import slot_cases as cases
from support.slot_cases import ENGINE, FORM, KEYS, entries, opened, pinned, put, sizes
from support.storage_cases import small_form
from support.waits import LIMIT

import portakv
from portakv.errors import StoreBusy, StoreError
from portakv.runtime import resources
from portakv.storage.image import Header
from portakv.storage.tiers.folder import SEGMENTS, Place, Slots, form_in, records_in

IMAGE = FORM.image_bytes


def test_an_early_block_waits_for_the_slot_of_a_late_one(tmp_path: Path) -> None:
    """It waits within a call, while the late one is being written; without a call it is refused."""
    own = {key: place for place, key in enumerate(KEYS[:3])}
    with closing(opened(tmp_path / "x", 1)) as slots:
        late = slots.take(KEYS[2], own)
        assert late is not None
        assert slots.take(KEYS[0]) is None
        assert slots.take(KEYS[0], {KEYS[0]: 0}, waits=False) is None
        with futures.ThreadPoolExecutor() as pool:
            early = pool.submit(slots.take, KEYS[1], own)
            with pytest.raises(futures.TimeoutError):
                early.result(0.1)
            assert slots.seal(late, KEYS[2], 1, (1,))
            assert early.result(LIMIT) == late
        assert [*slots.index] == []
        slots.give(late)
        last = slots.take(KEYS[2], own)
        assert last is not None
        with futures.ThreadPoolExecutor() as pool:
            early = pool.submit(slots.take, KEYS[1], own)
            with pytest.raises(futures.TimeoutError):
                early.result(0.1)
            slots.give(last)  # its write failed
            assert early.result(LIMIT) == last


def test_calls_that_wait_for_each_other_go_on(tmp_path: Path) -> None:
    """They name the same keys in other orders: each has a slot that the other one waits for."""
    with closing(opened(tmp_path / "x", 2)) as slots:
        first = slots.take(KEYS[0])
        second = slots.take(KEYS[1])
        assert first is not None
        assert second is not None
        with futures.ThreadPoolExecutor() as pool:
            one = pool.submit(slots.take, KEYS[2], {KEYS[0]: 0, KEYS[2]: 1, KEYS[1]: 2})
            other = pool.submit(slots.take, KEYS[3], {KEYS[1]: 0, KEYS[3]: 1, KEYS[0]: 2})
            assert one.result(LIMIT) is None
            assert other.result(LIMIT) is None
        slots.give(first)
        slots.give(second)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / FORM.name


@pytest.fixture
def six(folder: Path) -> tuple[Path, dict[bytes, Place]]:
    """Return a folder of eight slots with six blocks, and their entries."""
    with closing(opened(folder)) as slots:
        assert all(put(slots, key, 10 + i) for i, key in enumerate(KEYS[:6]))
        return folder, entries(slots)


@pytest.mark.parametrize("many", [1, 2, 30])  # with 30 a record takes 512 bytes
def test_what_was_entered_is_there_again(tmp_path: Path, many: int) -> None:
    form = FORM if many == 1 else small_form(many, 2, widths=(8192, 8192))
    assert len(form.segments) == many
    with closing(opened(tmp_path / "x", 4, form)) as slots:
        assert put(slots, KEYS[1], 7)
        assert put(slots, KEYS[0], 1 << 63)
        before = entries(slots)
        assert len(before[KEYS[0]][1].checksums) == len(form.segments)
    with closing(opened(tmp_path / "x", 4, form)) as slots:
        assert entries(slots) == before
        assert slots.by_use() == [KEYS[1], KEYS[0]]  # by generation
        assert slots.generation == 1 << 63
        about = os.stat(slots.folder / "slots")
        assert about.st_blocks * 512 >= about.st_size >= 2 * form.image_bytes


def test_files_are_their_owners_alone(six: tuple[Path, dict[bytes, Place]]) -> None:
    folder = six[0]
    assert folder.stat().st_mode & 0o777 == 0o700
    files = [*folder.iterdir(), folder.parent / "lock"]
    names = {"slots", "table", "form.json", "order", "lock"}
    assert {x.name: x.stat().st_mode & 0o777 for x in files} == dict.fromkeys(names, 0o600)


def test_form_json_tells_of_the_folder(folder: Path) -> None:
    """The form is the same everywhere; the facts of this folder are added, after a change, too."""
    for count in (4, 6):
        opened(folder, count).close()
        content = json.loads((folder / "form.json").read_text())
        about = content.pop("folder")
        assert content == json.loads(FORM.json())
        assert about == {
            "slots": count,
            "slot_bytes": IMAGE,
            "segments": 1,
            "alignment": 4096,
            "checksum": "xxh3-64",
            "written_by": f"portakv {portakv.__version__}",
        }
        assert form_in(folder) == FORM


def test_form_json_is_on_the_device_before_the_first_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss would else leave an empty one, which is refused (fault 8)."""
    synced = list[tuple[str, set[str]]]()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, {*os.listdir(folder)}))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    slots = opened(folder)
    files = {"slots", "form.json"}  # no table
    assert synced == [("form.json.new", {"slots", "form.json.new"}), (folder.name, files)]
    slots.close()
    assert [name for name, _ in synced[2:]] == ["order.new", folder.name]


def test_form_json_stays_as_it_is_if_it_says_the_same(folder: Path) -> None:
    """This holds for another release's file, too; whoever changes the rest signs it."""
    opened(folder).close()
    file = folder / "form.json"
    file.write_text(file.read_text().replace(portakv.__version__, "of former days"))
    before = file.stat()
    for slots in (8, None):
        opened(folder, slots).close()
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    opened(folder, 7).close()
    assert f"portakv {portakv.__version__}" in file.read_text()


@pytest.mark.parametrize("rescued", [True, False])
def test_one_bit_in_a_record(six: tuple[Path, dict[bytes, Place]], rescued: bool) -> None:
    """Fault 3. The record is made again from the image's header; without one the block is gone."""
    folder, before = six
    table = (folder / "table").read_bytes()
    slot = before[KEYS[2]][0]
    if not rescued:
        with open(folder / "slots", "r+b") as file:
            os.pwrite(file.fileno(), bytes(4096), slot * IMAGE)
    draw = np.random.default_rng(3)
    for bit in [0, 255, 256, 2047, *draw.integers(0, 2048, 20).tolist()]:
        wrong = bytearray(table)
        wrong[slot * 256 + bit // 8] ^= 1 << bit % 8
        (folder / "table").write_bytes(wrong)
        with closing(opened(folder)) as slots:
            assert entries(slots) == {k: e for k, e in before.items() if rescued or k != KEYS[2]}


def test_a_record_in_the_place_of_another(six: tuple[Path, dict[bytes, Place]]) -> None:
    """Fault 5. Its seal holds for its own slot alone."""
    folder, before = six
    table = (folder / "table").read_bytes()
    a, b = (before[key][0] * 256 for key in KEYS[:2])
    (folder / "table").write_bytes(table[:b] + table[a : a + 256] + table[b + 256 :])
    with closing(opened(folder)) as slots:
        assert entries(slots) == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda table: table.unlink(),
        lambda table: os.truncate(table, 4 * 256),
        lambda table: table.write_bytes(bytes(8 * 256)),
        lambda table: os.truncate(table, 7 * 256),
        lambda table: os.truncate(table, 5 * 256 + 99),
    ],
    ids=["missing", "cut in half", "zeros", "one record short", "torn"],
)
def test_a_table_that_is_lost(
    six: tuple[Path, dict[bytes, Place]], harm: Callable[[Path], object]
) -> None:
    """Fault 7. It is made again from the headers of the images."""
    folder, before = six
    harm(folder / "table")
    for _ in range(2):  # the second time from the table
        with closing(opened(folder)) as slots:
            assert entries(slots) == before
            assert put(slots, KEYS[7], 99)
            slots.unpin(pinned(slots, KEYS[7]), good=False)


def test_a_recovery_that_cannot_read_changes_nothing(six: tuple[Path, dict[bytes, Place]]) -> None:
    """Fault 7. The engine carries some requests out alone: the next start finds all."""
    folder, before = six
    (folder / "table").unlink()
    some = cases.Faulty(lambda ask: -errno.ECANCELED if ask.offset == 4 * IMAGE else None)
    with pytest.raises(StoreError, match="canceled"):
        Slots(folder, FORM, 8 * IMAGE, some)
    with closing(opened(folder)) as slots:
        assert entries(slots) == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 2')),
        lambda path: path.write_text('["folder"]'),
        lambda path: path.write_text(path.read_text().replace("org/model@1", "another")),
    ],
    ids=["missing", "empty", "no text", "a newer format", "a list", "another form"],
)
def test_a_folder_of_who_knows_what(
    six: tuple[Path, dict[bytes, Place]], harm: Callable[[Path], object]
) -> None:
    """Fault 8. It is refused, and nothing is written."""
    folder, _ = six
    harm(folder / "form.json")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    with pytest.raises(StoreError, match="wipe"):
        opened(folder)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before


@pytest.mark.parametrize("newer_first", [True, False])
def test_two_entries_for_one_key(folder: Path, newer_first: bool) -> None:
    """Fault 9. The newer generation counts, and the other one's slot is free."""
    with closing(opened(folder)) as slots:
        a = slots.take(KEYS[0])
        b = slots.take(KEYS[0])
        assert a is not None
        assert b is not None
        for slot, generation in [(a, 2), (b, 1)] if newer_first else [(a, 1), (b, 2)]:
            assert slots.seal(slot, KEYS[0], generation, (generation,))
    with closing(opened(folder)) as slots:
        assert entries(slots) == {KEYS[0]: (a if newer_first else b, Header(KEYS[0], 2, (2,)))}
        assert all(put(slots, key, 3) for key in KEYS[1:8])
        assert slots.evicted == 0


def test_two_processes_and_one_folder(folder: Path) -> None:
    """Fault 12. The second is refused by a sentence with the pid of the first, until its end."""
    done = os.pipe()

    def hold(tell: int) -> None:
        slots = opened(folder)
        os.write(tell, b"x")
        os.read(done[0], 1)
        assert slots.fd >= 0

    pid, readable = cases.telling(hold)
    assert os.read(readable, 1) == b"x"
    for _ in range(2):
        with pytest.raises(StoreBusy, match=f"process {pid} has open already"):
            opened(folder)
    os.write(done[1], b"x")
    assert cases.ended_well(pid)  # Fault 14, too: it had not closed its store
    opened(folder).close()


def test_a_forked_child_is_refused(folder: Path) -> None:
    """Fault 13. Its copies of the files are closed immediately, so it neither reads, nor writes,
    nor holds the lock after the parent has ended with the store."""
    slots = opened(folder)
    done = os.pipe()
    assert put(slots, KEYS[0], 1)

    def child(tell: int) -> None:
        assert slots.fd == -1
        assert slots.take(KEYS[1]) is None
        slots.close()
        with pytest.raises(StoreBusy):
            opened(folder)
        os.write(tell, b"x")
        os.read(done[0], 1)

    with slots.chains.lock:  # as another thread of the parent may
        pid, readable = cases.telling(child)
    assert put(slots, KEYS[2], 2)
    assert os.read(readable, 1) == b"x"
    slots.close()
    opened(folder).close()  # while the child lives
    os.write(done[1], b"x")
    assert cases.ended_well(pid)


def test_a_process_that_exits_without_close(folder: Path) -> None:
    """Fault 14. What it had entered is there."""
    assert cases.ended_well(
        cases.forked(lambda: [put(slots, key, 1) for slots in [opened(folder)] for key in KEYS[:3]])
    )
    with closing(opened(folder)) as slots:
        assert {*slots.index} == {*KEYS[:3]}


def test_opening_allocates_nothing(folder: Path) -> None:
    """However large the capacity, more than the device has, too: a save allocates."""
    with closing(opened(folder, 1 << 40)) as slots:
        assert sizes(folder) == [0, 0]
        assert slots.count == 0
        assert 0 < slots.limit <= 1 << 40
        assert put(slots, KEYS[0], 1)
        assert sizes(folder) == [slots.count * IMAGE, slots.count * 256]
        assert slots.count * IMAGE <= 1 << 20
    before = sizes(folder)
    opened(folder, 1 << 40).close()
    opened(folder, None).close()
    assert sizes(folder) == before


def test_a_device_without_room(small_device: Path) -> None:
    """Fault 17. As many slots as there is room for; then blocks are evicted."""
    with closing(opened(small_device / "x", 200)) as slots:
        assert all(put(slots, key, 1) for key in KEYS)
        assert slots.evicted == 0
        assert all(put(slots, bytes([n]) * 32, 1) for n in range(40))
        assert slots.evicted > 0
        count = slots.count
        assert 100 < count < 128
    with closing(opened(small_device / "x", 200)) as slots:
        assert slots.count == count
        assert len(entries(slots)) == count


def test_a_filesystem_without_a_limit(small_device: Path) -> None:
    """It says that it has no block, and none free."""
    if subprocess.run(["mount", "-o", "remount,size=0", small_device], check=False).returncode:
        pytest.skip("needs a filesystem without a limit")
    with closing(opened(small_device / "x", 200)) as slots:
        assert put(slots, KEYS[0], 1)


def test_a_quota_that_nobody_tells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 17. Space runs out while it is allocated: fewer slots are, and no space stays taken."""
    real = resources.fallocate

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        if offset + nbytes > 6 * IMAGE:
            os.ftruncate(fd, 6 * IMAGE)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, nbytes)

    with monkeypatch.context() as patch, closing(opened(folder)) as slots:
        patch.setattr(resources, "fallocate", allocate)
        assert all(put(slots, key, 1) for key in KEYS[:7])
        assert slots.evicted == 1
        assert sizes(folder) == [6 * IMAGE, 6 * 256]
    with closing(opened(folder)) as slots:
        assert put(slots, KEYS[8], 1)
        assert slots.evicted == 0
        assert sizes(folder) == [8 * IMAGE, 8 * 256]


def test_a_device_that_is_full(small_device: Path) -> None:
    """A store that has blocks keeps their space: it opens, and overwrites."""
    with closing(opened(small_device / "x", 64)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:64])
    free = os.statvfs(small_device).f_bavail * os.statvfs(small_device).f_frsize
    (small_device / "other").write_bytes(bytes(free))
    assert os.statvfs(small_device).f_bavail == 0
    with closing(opened(small_device / "x", 64)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:70])
        assert len(slots.index) == 64


def fill_device(device: Path) -> None:
    """Leave no free space on a device."""
    with (device / "other").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(device).f_bavail == 0


def test_a_new_form_on_a_device_that_is_full(small_device: Path) -> None:
    """The forms there give way, for form.json too."""
    other = replace(FORM, model="another")
    with closing(opened(small_device / FORM.name, 64)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:64])
    fill_device(small_device)
    with closing(opened(small_device / other.name, 64, other)) as slots:
        assert put(slots, KEYS[0], 1)
        assert len(entries(slots)) == 1
    with closing(opened(small_device / FORM.name, None)) as slots:
        assert 32 < len(entries(slots)) < 64


def test_a_new_form_without_any_room_leaves_nothing(small_device: Path) -> None:
    fill_device(small_device)
    with pytest.raises(StoreError, match="no space left"):
        opened(small_device / FORM.name)
    assert not (small_device / FORM.name).exists()
    (small_device / "other").unlink()
    opened(small_device / FORM.name).close()


@pytest.mark.parametrize("moved", [OSError(errno.ENOSPC, "no space"), 100])
def test_no_room_in_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moved: OSError | int
) -> None:
    """Fault 18. The block is dropped, its slot comes back, and what was there stays."""

    def pwrite(*_: object) -> int:
        if isinstance(moved, OSError):
            raise moved
        return moved

    slots = opened(folder, 2)
    assert put(slots, KEYS[0], 1)
    slot = slots.take(KEYS[1])
    assert slot is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        assert not slots.seal(slot, KEYS[1], 2, (1,))
        assert slots.take(KEYS[1]) is None
    assert slots.by_use() == [KEYS[0]]
    assert put(slots, KEYS[1], 2)
    assert slots.evicted == 0
    slots.close()


def test_a_read_only_filesystem(small_device: Path) -> None:
    """Fault 22. A sentence, whether a store is there or not."""
    opened(small_device / "x").close()
    subprocess.run(["mount", "-o", "remount,ro", small_device], check=True)
    for name in ("x", "y"):
        with pytest.raises(StoreError, match="read-only file system"):
            opened(small_device / name)


def test_o_direct_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 23. The same blocks go by the page cache, and a note says so."""
    real = fcntl.fcntl

    def refused(fd: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, flags)

    let_go: list[int] = []
    monkeypatch.setattr(fcntl, "fcntl", refused)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, *_: let_go.append(at))
    for number in range(2):
        with closing(opened(folder)) as slots:
            assert len(let_go) == number
            assert not slots.direct
            assert "refuses O_DIRECT (Invalid argument)" in slots.health.notes[0]
            assert put(slots, KEYS[0], 1)


@pytest.mark.parametrize("what", ["link", "file", "owner"])
def test_something_else_in_place_of_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Fault 27. A link, a file, another user's folder: refused, and nothing is made there."""
    place = folder.parent / "place"
    place.mkdir()
    if what == "link":
        folder.symlink_to(place)
    elif what == "file":
        folder.write_text("")
    else:
        place.rename(folder)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    why = {
        "link": "to be a directory, got a symbolic link",
        "file": "it is not a directory",
        "owner": "to belong to user 12345, got user",
    }
    with pytest.raises(StoreError, match=why[what]):
        opened(folder)
    assert what == "file" or list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["link", "file", "owner", "link of its lock"])
def test_something_else_in_place_of_the_tiers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Fault 27. A link to a folder of one's own is followed; the rest as for a form's folder."""
    tier = tmp_path / "tier"
    place = tmp_path / "place"
    place.mkdir()
    if what == "link":
        tier.symlink_to(place)
        opened(tier / FORM.name).close()
        assert {x.name for x in place.iterdir()} == {FORM.name, "lock"}
        return
    if what == "file":
        tier.write_text("")
    else:
        place.rename(tier)
    if what == "owner" and not os.geteuid():
        os.chown(tier, 12345, -1)
    elif what == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    elif what != "file":
        (tier / "lock").symlink_to(tmp_path / "victim")
    why = {
        "file": "it is not a directory",
        "owner": "to belong to user .*, got user",
        "link of its lock": "lock to be a regular file, got a symbolic link",
    }
    with pytest.raises(StoreError, match=why[what]):
        opened(tier / FORM.name)
    assert not (tmp_path / "victim").exists()
    assert what != "owner" or list(tier.iterdir()) == []


def test_a_link_in_place_of_a_file(folder: Path) -> None:
    """Fault 27."""
    opened(folder).close()
    (folder / "slots").rename(folder.parent / "slots")
    (folder / "slots").symlink_to(folder.parent / "slots")
    with pytest.raises(StoreError, match="got a symbolic link"):
        opened(folder)


NESTED = b"[" * 200_000


def spoil(path: Path, how: str) -> None:
    """Put something else in place of a file."""
    path.unlink(missing_ok=True)
    if how == "link":
        outside = path.parent.parent / "secret"
        outside.write_text("a secret of somebody")
        path.symlink_to(outside)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "directory":
        path.mkdir()
    elif how == "nested":
        path.write_bytes(NESTED)
    elif how == "binary":
        path.write_bytes(bytes(range(256)))
    elif how == "long":
        path.write_bytes(b" " * (64 << 20))


SPOILED = {
    "link": "to be a regular file, got a symbolic link",
    "pipe": "to be a regular file, got a pipe",
    "directory": "to be a regular file, got a directory",
    "nested": "got damaged text .* got text that is not JSON",
    "binary": "got damaged text .* got text that is not JSON",
    "long": "to have at most 1048576 bytes, got more",
}


@pytest.mark.parametrize("how", [*SPOILED])
def test_something_else_in_place_of_form_json(folder: Path, how: str) -> None:
    """It is refused in a sentence that names the file and shows nothing of what it holds."""
    opened(folder).close()
    file = folder / "form.json"
    spoil(file, how)
    with pytest.raises(StoreError, match=SPOILED[how]) as caught:
        opened(folder)
    assert str(file) in str(caught.value)
    assert "secret of" not in str(caught.value)
    assert "\\x" not in str(caught.value)
    assert "RecursionError" not in str(caught.value)


@pytest.mark.parametrize("how", ["link", "pipe", "directory"])
@pytest.mark.parametrize("name", ["slots", "table"])
def test_something_else_in_place_of_slots_or_table(folder: Path, name: str, how: str) -> None:
    opened(folder).close()
    spoil(folder / name, how)
    with pytest.raises(StoreError, match=SPOILED[how]) as caught:
        opened(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("how", [*SPOILED])
def test_an_order_that_is_wrong_stops_nothing(folder: Path, how: str) -> None:
    """The order of use is a hint."""
    with closing(opened(folder)) as slots:
        assert put(slots, KEYS[0], 1)
    spoil(folder / "order", how)
    for _ in range(2):
        with closing(opened(folder)) as slots:
            assert [*slots.index] == [KEYS[0]]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a file away")
@pytest.mark.parametrize("name", ["slots", "table", "form.json", "order"])
def test_a_file_of_another_user(folder: Path, name: str) -> None:
    with closing(opened(folder)) as slots:
        assert put(slots, KEYS[0], 1)
        assert put(slots, KEYS[1], 2)
        slots.touch([KEYS[0]])
    os.chown(folder / name, 12345, -1)
    if name == "order":
        with closing(opened(folder)) as slots:
            assert len(slots.index) == 2
        return
    with pytest.raises(StoreError, match=f"{name} to belong to user 0, got user 12345"):
        opened(folder)


def test_a_close_puts_both_files_on_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_there: list[str] = []
    name = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fdatasync", lambda fd: put_there.append(os.readlink(name(fd))))
    opened(folder).close()
    assert put_there[:2] == [str(folder / "slots"), str(folder / "table")]


def test_a_clock_that_is_set_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28. Order is by generation, and no clock matters."""
    now = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    with closing(opened(folder, 3)) as slots:
        assert all(put(slots, key, i) for i, key in enumerate(KEYS[:4]))
    with closing(opened(folder, 3)) as slots:
        assert slots.by_use() == KEYS[1:4]
        assert next(now) == 10**6


def test_a_block_that_is_read_is_not_evicted(folder: Path) -> None:
    """Fault 58."""
    with closing(opened(folder, 3)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:3])
        entry = pinned(slots, KEYS[0])
        assert all(put(slots, key, 2) for key in KEYS[3:9])
        assert slots.by_use() == [KEYS[0], *KEYS[7:9]]
        slots.unpin(entry)
        assert put(slots, KEYS[9], 3)
        assert KEYS[0] not in slots.index


def test_all_slots_are_pinned(folder: Path) -> None:
    """Fault 59. There is no slot for a block, until one is released."""
    with closing(opened(folder, 2)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:2])
        pinned_slots = [pinned(slots, key) for key in [*KEYS[:2], KEYS[0]]]
        assert slots.take(KEYS[2]) is None
        slots.unpin(pinned_slots[0])
        assert slots.take(KEYS[2]) is None
        slots.unpin(pinned_slots[2])
        assert slots.take(KEYS[2]) == pinned_slots[0][0]


def test_a_dropped_block_leaves_its_slot_when_the_last_reader_does(folder: Path) -> None:
    with closing(opened(folder, 2)) as slots:
        assert put(slots, KEYS[0], 1)
        first = pinned(slots, KEYS[0])
        second = pinned(slots, KEYS[0])
        slots.unpin(first, good=False)
        assert put(slots, KEYS[0], 2)  # anew, in the other slot
        assert slots.by_use() == [KEYS[0]]
        slots.unpin(second, good=False)  # late, and of what is gone
        assert slots.by_use() == [KEYS[0]]
        assert slots.take(KEYS[2]) == first[0]
        assert slots.evicted == 0


def test_capacity_changes(folder: Path) -> None:
    """Larger: extended. Smaller: what lies above is dropped, and the space given back."""
    with closing(opened(folder, 4)) as slots:
        assert all(put(slots, key, i) for i, key in enumerate(KEYS[:4]))
    with closing(opened(folder, 6)) as slots:
        assert slots.by_use() == KEYS[:4]
        assert all(put(slots, key, 9) for key in KEYS[4:6])
        assert slots.evicted == 0
    with closing(opened(folder, 3)) as slots:
        assert slots.by_use() == KEYS[:3]
        assert (folder / "slots").stat().st_size == 3 * IMAGE
    with closing(opened(folder, None)) as slots:
        assert slots.count == 3
        assert slots.by_use() == KEYS[:3]
    with pytest.raises(StoreError, match=f"a block takes {IMAGE}.*Increase the capacity"):
        Slots(folder, FORM, IMAGE - 1, ENGINE)
    os.truncate(folder / "slots", 0)
    with closing(opened(folder, None)) as slots:
        assert slots.by_use() == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_block_has_one_record(folder: Path, killed: bool) -> None:
    """Also if it is written twice, or a kill left two: one of a free slot would come back once the
    other one is gone."""
    with closing(opened(folder, 6)) as slots:
        assert all(put(slots, key, 1) for key in (KEYS[0], KEYS[1], KEYS[0]))
        slot = slots.index[KEYS[0]]
        if killed:
            assert slot != 0
            slots._put(0, KEYS[0], 0, (1,))
    with closing(opened(folder, 6)) as slots:
        assert slots.index[KEYS[0]] == slot
    records = records_in(folder, FORM, 6)
    assert np.flatnonzero(records[:, SEGMENTS]).tolist() == sorted(slots.index.values())


def test_a_prefix_outlives_its_suffix(folder: Path) -> None:
    with closing(opened(folder, 6)) as slots:
        assert all(put(slots, key, 1) for key in KEYS[:6])
        slots.touch([*KEYS[:3], KEYS[20]])
        assert slots.by_use() == [*KEYS[3:6], KEYS[2], KEYS[1], KEYS[0]]


def test_order_of_use_is_there_after_a_close_and_not_after_a_kill(folder: Path) -> None:
    with closing(opened(folder, 6)) as slots:
        assert all(put(slots, key, i) for i, key in enumerate(KEYS[:6]))
        slots.touch(KEYS[:3])
        slots.unpin(pinned(slots, KEYS[4]), good=False)
        used = slots.by_use()
    (folder / "order").write_bytes(
        (folder / "order").read_bytes().replace(b"]", b", 99, null, []]")
    )
    slots = opened(folder, 6)
    assert slots.by_use() == used == [KEYS[3], KEYS[5], KEYS[2], KEYS[1], KEYS[0]]
    slots.touch(KEYS[3:4])
    slots.close(sync=False)  # as a kill does
    with closing(opened(folder, 6)) as slots:
        assert slots.by_use() == [*KEYS[:4], KEYS[5]]  # by generation
    slots.close()
    opened(folder, 3).close()
    slots.close()  # once more, when the folder is another's: it is left alone
    with closing(opened(folder, 3)) as slots:
        assert slots.by_use() == KEYS[:3]


def test_killed_in_the_very_first_write(folder: Path) -> None:
    """Fault 10. The header landed and the payload did not, and no record was ever sealed: that is
    no lost table, and the image is not entered."""
    row = cases.images(1, FORM)[0]
    for number in range(2):
        slots = opened(folder, 4)
        assert slots.by_use() == []
        slot = slots.take(KEYS[number])
        assert slot is not None
        cases.fill(row, FORM, KEYS[number], 1)
        os.pwrite(slots.fd, row[:4096], slot * slots.form.image_bytes)
        slots.close(sync=False)  # as a kill does


def test_recovery_tells_how_far_it_is(six: tuple[Path, dict[bytes, Place]]) -> None:
    reports: list[tuple[str, int]] = []

    def track(items: Any, what: str) -> Any:
        reports.append((what, len(items)))
        return items

    opened(six[0].parent / "empty").close()
    opened(six[0].parent / "empty", track=track).close()
    assert reports == [("records", 0), ("headers", 0)]
    with closing(opened(six[0].parent / "empty")) as slots:
        slot = slots.take(KEYS[0])
        assert slot is not None
        slots.give(slot)
    reports.clear()
    opened(six[0].parent / "empty", track=track).close()
    assert reports == [("records", 1), ("headers", 0)]  # no table that was lost
    reports.clear()
    opened(six[0], track=track).close()
    (six[0] / "table").unlink()
    opened(six[0], track=track).close()
    assert reports == [("records", 6), ("headers", 0), ("records", 0), ("headers", 1)]


def test_slots_that_are_lost(six: tuple[Path, dict[bytes, Place]]) -> None:
    """Their records do not come back with the next start."""
    (six[0] / "slots").unlink()
    for _ in range(2):
        with closing(opened(six[0])) as slots:
            assert slots.by_use() == []


def test_a_store_that_was_wiped_while_another_waited(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of its file and the lock: no folder is had by a file without a name."""
    opened(folder).close()
    real = fcntl.flock

    def lock(fd: int, how: int) -> None:
        (folder.parent / "lock").unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(StoreBusy):
        opened(folder)


def test_a_broken_slot_is_not_used_again(folder: Path) -> None:
    with closing(opened(folder, 2)) as slots:
        slot = slots.take(KEYS[0])
        assert slot is not None
        slots.give(slot, broken=True)
        assert [put(slots, key, 1) for key in KEYS[:3]] == [True] * 3
        assert [slots.broken, slots.evicted, len(slots.index)] == [1, 2, 1]
