# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk: kept, rebuilt, raced for, and never an error."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime import nvrtc as _nvrtc
from portakv.runtime.kernel_cache import cached, directory, holds, refusal

KEY = ("source", "flags", "sm_90", "13.0")
BINARY = bytes(range(256)) * 16


class Build:
    """A compiler that counts."""

    def __init__(self, binary: bytes = BINARY) -> None:
        self.binary, self.times = binary, 0

    def __call__(self) -> bytes:
        self.times += 1
        return self.binary


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet."""
    found = tmp_path / "a" / "cache"
    monkeypatch.setenv(_kernel_cache.ENVIRONMENT, str(found))
    return found


def builds(times: int) -> None:
    """Asked twice, the binary is built so many times."""
    build = Build()
    assert [cached(KEY, build) for _ in range(2)] == [BINARY] * 2
    assert build.times == times


def entry(folder: Path) -> Path:
    """The only entry of the cache."""
    (found,) = folder.iterdir()
    return found


def test_a_kernel_is_built_once_and_kept_privately(folder: Path) -> None:
    assert not holds(KEY)
    builds(1)
    assert holds(KEY)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry(folder).stat().st_mode & 0o777 == 0o600


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert directory() == tmp_path / "a" / "cache"
    monkeypatch.delenv(_kernel_cache.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert directory() == tmp_path / "xdg" / "portakv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert directory() == tmp_path / "home" / ".cache" / "portakv"


@pytest.mark.parametrize("part", range(len(KEY)))
def test_each_part_of_the_key_counts(part: int) -> None:
    cached(KEY, Build())
    other = (*KEY[:part], KEY[part] + "x", *KEY[part + 1 :])
    assert cached(other, Build(b"another")) == b"another"
    assert cached(KEY, Build(b"never asked for")) == BINARY
    run_together = (KEY[0] + KEY[1], "", *KEY[2:])
    assert cached(run_together, Build(b"a third")) == b"a third"


def test_what_decides_a_binary_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc, "architectures", lambda: [80, 90])
    monkeypatch.setattr(_nvrtc, "nvrtc_version", lambda: "13.0")
    made: list[str] = []

    def compile_for(source: str, target: str) -> bytes:
        made.append(target)
        return f"{source} {target}".encode()

    monkeypatch.setattr(_nvrtc, "_compile", compile_for)
    for _ in range(2):
        assert _nvrtc.compile_kernel("text", 90) == b"text sm_90"
        assert _nvrtc.compile_kernel("text", 80) == b"text sm_80"
        assert _nvrtc.compile_kernel("text", 86) == b"text compute_80"
        assert _nvrtc.compile_kernel("other", 90) == b"other sm_90"
    assert len(made) == 4
    monkeypatch.setattr(_nvrtc, "FLAGS", ("-std=c++20",))
    assert not _nvrtc.compiled_before("text", 90)
    monkeypatch.undo()
    monkeypatch.setattr(_nvrtc, "architectures", lambda: [80, 90])
    monkeypatch.setattr(_nvrtc, "nvrtc_version", lambda: "13.1")
    assert not _nvrtc.compiled_before("text", 90)


# Damage


def damaged(how: str, name: str, content: bytes) -> bytes:
    """What an entry of that name holds once it was damaged."""
    return {
        "cut": content[:-1],
        "empty": b"",
        "flipped": content[:700] + bytes([content[700] ^ 1]) + content[701:],
        "checksum alone": content[:32],
        "checksum of nothing": hashlib.sha256(name.encode()).digest(),
    }[how]


@pytest.mark.parametrize(
    "how",
    ["cut", "empty", "flipped", "checksum alone", "checksum of nothing", "another entry", "pipe"],
)
def test_a_corrupt_entry_is_rebuilt(how: str, folder: Path) -> None:
    cached(KEY, Build())
    path = entry(folder)
    if how == "pipe":  # to read from it would wait for ever
        path.unlink()
        os.mkfifo(path)
    elif how == "another entry":
        cached(("another", *KEY), Build(b"another"))
        (other,) = {*folder.iterdir()} - {path}
        other.replace(path)
    else:
        path.write_bytes(damaged(how, path.name, path.read_bytes()))
    assert not holds(KEY)
    builds(1)


def test_a_folder_full_of_junk(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    for number in range(50):
        (folder / f"{number:064x}").write_bytes(os.urandom(number))
    (folder / "tmpabandoned").write_bytes(b"half an en")
    (folder / "a folder").mkdir()
    assert cached(KEY, Build()) == BINARY
    assert holds(KEY)


def test_a_folder_in_place_of_an_entry_is_no_error(folder: Path) -> None:
    cached(KEY, Build())
    path = entry(folder)
    path.unlink()
    path.mkdir()
    builds(2)
    assert [found.name for found in folder.iterdir()] == [path.name], "no temporary file stays"


# Directories that cannot be used


@pytest.mark.parametrize("spoilt", ["below a file", "a file itself", "no room"])
def test_a_folder_that_cannot_be_made_is_no_error(spoilt: str, folder: Path) -> None:
    if spoilt == "below a file":
        folder.parent.write_bytes(b"")
    else:
        folder.parent.mkdir()
    if spoilt == "a file itself":
        folder.write_bytes(b"")
    elif spoilt == "no room":
        folder.symlink_to("/dev/null/nothing")
    builds(2)
    why = refusal()
    assert why is not None
    assert str(folder) in why


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a read-only file system says, also to root."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    builds(2)
    assert refusal() == f"{folder} cannot be written (Read-only file system)"


def test_a_disk_that_fills_up_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cached(KEY, Build()) == BINARY
    assert list(folder.iterdir()) == []


def test_what_the_compiler_raises_passes_through(folder: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("NVRTC refused the kernel")

    with pytest.raises(RuntimeError, match="NVRTC refused"):
        cached(KEY, fail)
    assert not folder.exists()


# Directories that are not trusted


@pytest.mark.parametrize("writable", ["by its group", "by all", "by its owner"])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(
    writable: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(KEY, Build(b"what somebody else put there"))
    assert refusal() is None
    if writable == "by its owner":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.chmod(0o770 if writable == "by its group" else 0o1777)
    builds(2)
    assert cached(("other", *KEY), Build()) == BINARY
    assert len(list(folder.iterdir())) == 1
    assert refusal() == f"{folder} belongs to somebody else, or others may write to it"


# Races

# By its path: eight imports of torch would take longer than the race.
_RACER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("_kernel_cache", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cached = module.cached

print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    binary = bytes([turn]) * 50_000
    found = cached(("a key", str(turn)), lambda: time.sleep(0.001) or binary)
    assert found == binary, "a torn entry"
"""


def test_eight_processes_race(folder: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(_kernel_cache.__file__)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(8)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    ended = [racer.communicate("go\n") for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 8, ended
    assert len(list(folder.iterdir())) == 40
    for turn in range(40):
        assert holds(("a key", str(turn)))
