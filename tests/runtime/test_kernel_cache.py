# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk: kept, rebuilt, raced for, and never an error."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from portakv.runtime import cuda, kernel_cache
from portakv.runtime.kernel_cache import cached, directory, holds, refusal

KEY = ("source", "flags", "sm_90", "13.0")
BINARY = bytes(range(256)) * 16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that is not there yet."""
    result = tmp_path / "a" / "cache"
    monkeypatch.setenv(kernel_cache.ENVIRONMENT, str(result))
    return result


def builds(times: int) -> None:
    """Check how often two requests build the binary."""
    build = Mock(return_value=BINARY)
    assert [cached(KEY, build) for _ in range(2)] == [BINARY] * 2
    assert build.call_count == times


def entry(folder: Path) -> Path:
    """The only entry of the cache."""
    (result,) = folder.iterdir()
    return result


def test_a_kernel_is_built_once_and_kept_privately(folder: Path) -> None:
    assert not holds(KEY)
    builds(1)
    assert holds(KEY)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry(folder).stat().st_mode & 0o777 == 0o600


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert directory() == tmp_path / "a" / "cache"
    monkeypatch.delenv(kernel_cache.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert directory() == tmp_path / "xdg" / "portakv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert directory() == tmp_path / "home" / ".cache" / "portakv"


@pytest.mark.parametrize("part", range(len(KEY)))
def test_each_part_of_the_key_counts(part: int) -> None:
    builds(1)
    other = (*KEY[:part], KEY[part] + "x", *KEY[part + 1 :])
    assert cached(other, lambda: b"another") == b"another"
    builds(0)
    run_together = (KEY[0] + KEY[1], "", *KEY[2:])
    assert cached(run_together, lambda: b"a third") == b"a third"


def test_what_decides_a_binary_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "architectures", lambda: [80, 90])
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: "13.0")
    made = Mock(side_effect=lambda source, target: f"{source} {target}".encode())
    monkeypatch.setattr(cuda, "compile_text", made)
    for _ in range(2):
        assert cuda.compile_kernel("text", 90) == b"text sm_90"
        assert cuda.compile_kernel("text", 80) == b"text sm_80"
        assert cuda.compile_kernel("text", 86) == b"text compute_80"
        assert cuda.compile_kernel("other", 90) == b"other sm_90"
    assert made.call_count == 4
    for name, other in (("FLAGS", ("-std=c++20",)), ("nvrtc_version", lambda: "13.1")):
        assert cuda.compiled_before("text", 90)
        with monkeypatch.context() as changed:
            changed.setattr(cuda, name, other)
            assert not cuda.compiled_before("text", 90)


# Damage


#: What an entry holds once it was damaged, by its name and content.
DAMAGED: dict[str, Callable[[str, bytes], bytes]] = {
    "cut": lambda _, content: content[:-1],
    "empty": lambda *_: b"",
    "flipped": lambda _, content: content[:700] + bytes([content[700] ^ 1]) + content[701:],
    "checksum alone": lambda _, content: content[:32],
    "checksum of nothing": lambda name, _: hashlib.sha256(name.encode()).digest(),
}


@pytest.mark.parametrize("how", [*DAMAGED, "another entry", "pipe", "a folder"])
def test_a_corrupt_entry_is_rebuilt(how: str, folder: Path) -> None:
    builds(1)
    path = entry(folder)
    if how in ("pipe", "a folder"):
        path.unlink()
        (os.mkfifo if how == "pipe" else os.mkdir)(path)  # a pipe keeps its reader waiting for ever
    elif how == "another entry":
        cached(("another", *KEY), lambda: b"another")
        (other,) = {*folder.iterdir()} - {path}
        other.replace(path)
    else:
        path.write_bytes(DAMAGED[how](path.name, path.read_bytes()))
    assert not holds(KEY)
    builds(2 if how == "a folder" else 1)  # which nothing takes the place of
    assert entry(folder) == path, "no temporary file stays"


# Directories that cannot be used


@pytest.mark.parametrize("spoilt", ["below a file", "a file itself", "no room", "read-only"])
def test_a_folder_that_cannot_be_used_is_no_error(
    spoilt: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoilt == "below a file":
        folder.parent.write_bytes(b"")
    else:
        folder.parent.mkdir()
    if spoilt == "a file itself":
        folder.write_bytes(b"")
    elif spoilt == "no room":
        folder.symlink_to("/dev/null/nothing")
    elif spoilt == "read-only":  # what such a file system says, also to root
        folder.mkdir(mode=0o700)
        for name in ("mkstemp", "TemporaryFile"):
            refuse = Mock(side_effect=OSError(30, "Read-only file system"))
            monkeypatch.setattr(tempfile, name, refuse)
    builds(2)
    why = refusal()
    assert why is not None
    assert str(folder) in why
    assert spoilt != "read-only" or why == f"{folder} cannot be written (Read-only file system)"


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    builds(2)
    assert list(folder.iterdir()) == []


def test_what_the_compiler_raises_passes_through(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="NVRTC refused"):
        cached(KEY, Mock(side_effect=RuntimeError("NVRTC refused the kernel")))
    assert not folder.exists()


# Directories that are not trusted


@pytest.mark.parametrize("writable", ["by its group", "by all", "by its owner"])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(
    writable: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(KEY, lambda: b"what somebody else put there")
    assert refusal() is None
    if writable == "by its owner":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.chmod(0o770 if writable == "by its group" else 0o1777)
    builds(2)
    assert cached(("other", *KEY), lambda: BINARY) == BINARY
    assert len(list(folder.iterdir())) == 1
    assert refusal() == f"{folder} belongs to another user, or other users may write to it"


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


def test_four_processes_race(folder: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(kernel_cache.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    ended = [racer.communicate("go\n") for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, ended
    assert len(list(folder.iterdir())) == 40
    for turn in range(40):
        assert holds(("a key", str(turn)))


def test_a_kernel_that_cannot_be_kept_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, for which `refusal` does not look."""
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(os, "replace", full)
    builds(2)
    (text,) = caplog.messages
    assert f"A kernel is not kept in {folder} (No space left on device)" in text
