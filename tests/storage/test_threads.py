# SPDX-License-Identifier: Apache-2.0
"""The engine of plain calls, under a system that plays what a real one seldom does; what it does on
real files stands in test_engine.py."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.storage_cases import aligned

from portakv.storage.engine import Request
from portakv.storage.threads import Threads

PAGE = 4096


@pytest.mark.parametrize("write", [False, True])
def test_a_short_move_goes_on(write: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 29. Each move is cut to 1,001 bytes."""
    name = "pwritev" if write else "preadv"
    real: Callable[[int, Any, int], int] = getattr(os, name)
    monkeypatch.setattr(os, name, lambda fd, parts, at: real(fd, [parts[0][:1001]], at))
    space, file = aligned(8 * PAGE), tmp_path / "a"
    file.write_bytes(np.random.default_rng(0).bytes(space.nbytes))
    space[:] = 7 * write
    with file.open("r+b", buffering=0) as opened:
        at = space.ctypes.data
        asked = [Request(opened.fileno(), n * PAGE, at + n * PAGE, PAGE, write) for n in range(8)]
        assert Threads().run(asked) == [PAGE] * 8
    assert file.read_bytes() == bytes(space)


@pytest.mark.parametrize(
    ("code", "flags"),
    [(errno.EIO, 0), (errno.EIO, os.O_DIRECT), (errno.ENOSPC, 0), (errno.EINVAL, 0)],
)
def test_a_request_that_fails_does_so_alone(
    code: int, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EINVAL that is not for alignment, too: the file was not opened with O_DIRECT. What the
    disk refuses is not asked of the page cache."""
    real, space = os.preadv, aligned(3 * PAGE)

    def failing(fd: int, parts: Any, at: int) -> int:
        if at == PAGE and fd == opened.fileno():
            raise OSError(code, os.strerror(code))
        return real(fd, parts, at)

    monkeypatch.setattr(os, "preadv", failing)
    (tmp_path / "a").write_bytes(b"x" * 3 * PAGE)
    try:
        fd = os.open(tmp_path / "a", os.O_RDONLY | flags)
    except OSError:
        pytest.skip("its filesystem refuses O_DIRECT")
    with os.fdopen(fd, "rb", 0) as opened:
        at = space.ctypes.data
        asked = [Request(opened.fileno(), n * PAGE, at + n * PAGE, PAGE, False) for n in range(3)]
        assert Threads().run(asked) == [PAGE, -code, PAGE]


def test_a_request_that_needs_a_descriptor_fails_alone_if_none_is_left(tmp_path: Path) -> None:
    """Fault 25. What O_DIRECT refuses goes by another descriptor of its file."""
    space, engine = aligned(3 * PAGE), Threads()
    (tmp_path / "a").write_bytes(b"x" * 3 * PAGE)
    try:
        fd = os.open(tmp_path / "a", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("its filesystem refuses O_DIRECT")
    with os.fdopen(fd, "rb", 0):
        at = space.ctypes.data
        good = Request(fd, 0, at, PAGE, False)
        asked = [good, Request(fd, 1, at + PAGE, PAGE, False), good]
        assert engine.run(asked) == [PAGE] * 3
        spare = os.dup(fd)
        os.close(spare)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
        try:
            found = engine.run(asked)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert found == [PAGE, -errno.EMFILE, PAGE]
        assert engine.run(asked) == [PAGE] * 3


@pytest.mark.parametrize("way", ["closed", "no thread"])
def test_what_is_not_begun_is_cancelled(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 15. While `run` still hands requests out the engine closes, or no thread is to be had;
    none may move once it has returned."""
    space, engine, real = aligned(PAGE), Threads(), os.preadv
    moves: list[int] = []

    def move(fd: int, parts: Any, at: int) -> int:
        moves.append(at)
        time.sleep(0.001)  # so that some wait
        if way == "closed" and len(moves) > 20:
            engine.close()
        return real(fd, parts, at)

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "preadv", move)
    if way == "no thread":
        monkeypatch.setattr(threading.Thread, "start", start)
    (tmp_path / "a").write_bytes(bytes(PAGE))
    with (tmp_path / "a").open("rb") as opened:
        asked = [Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)] * 5_000
        before = set(threading.enumerate())
        ends = list[tuple[int, int]]()
        results = engine.run(asked, lambda *end: ends.append(end))
        assert sorted(ends) == [*enumerate(results)]
        for thread in set(threading.enumerate()) - before:
            thread.join(5 if way == "closed" else 0)
        counts = len(moves), results.count(PAGE), results.count(-errno.ECANCELED)
        assert counts[0] == counts[1] < 5_000
        assert counts[1] + counts[2] == 5_000
        monkeypatch.undo()
        assert engine.run(asked) == [-errno.ECANCELED if way == "closed" else PAGE] * 5_000


def test_a_request_that_makes_no_sense_fails_alone(tmp_path: Path) -> None:
    space = aligned(PAGE)
    (tmp_path / "a").write_bytes(bytes(PAGE))
    with (tmp_path / "a").open("rb") as opened:
        good = Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)
        assert Threads().run([good, good._replace(nbytes=-1), good]) == [PAGE, -errno.EIO, PAGE]
