# SPDX-License-Identifier: Apache-2.0
"""The engine of plain calls, under a system that plays what a real one seldom does; what it does on
real files stands in test_engine.py."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support import ready
from support.io_calls import PlayedRing, PlayedThreads
from support.no_descriptors import limited
from support.storage_cases import aligned
from support.waits import until

from portakv.core import io as core_io
from portakv.storage.io import choose
from portakv.storage.io.base import Request
from portakv.storage.io.choose import Threads

PAGE = 4096


@pytest.mark.parametrize("write", [False, True])
def test_a_short_move_goes_on(write: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 29. Each move is cut to 1,001 bytes."""
    name = "pwritev" if write else "preadv"
    real: Callable[[int, Any, int], int] = getattr(os, name)
    monkeypatch.setattr(os, name, lambda fd, parts, at: real(fd, [parts[0][:1001]], at))
    space = aligned(8 * PAGE)
    file = tmp_path / "a"
    file.write_bytes(np.random.default_rng(0).bytes(space.nbytes))
    space[:] = 7 * write
    with file.open("r+b", buffering=0) as opened:
        at = space.ctypes.data
        requests = [
            Request(opened.fileno(), n * PAGE, at + n * PAGE, PAGE, write) for n in range(8)
        ]
        assert PlayedThreads().run(requests) == [PAGE] * 8
    assert file.read_bytes() == bytes(space)


@pytest.mark.parametrize(
    ("code", "flags"),
    [(errno.EIO, 0), (errno.EIO, os.O_DIRECT), (errno.ENOSPC, 0), (errno.EINVAL, 0)],
)
def test_a_request_that_fails_does_so_alone(
    code: int, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EINVAL that is not for alignment, too: the file was not opened with O_DIRECT. A request
    that the disk refuses is not sent to the page cache."""
    real = os.preadv
    space = aligned(3 * PAGE)

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
        requests = [
            Request(opened.fileno(), n * PAGE, at + n * PAGE, PAGE, False) for n in range(3)
        ]
        assert PlayedThreads().run(requests) == [PAGE, -code, PAGE]


def test_a_request_that_needs_a_descriptor_fails_alone_if_none_is_left(tmp_path: Path) -> None:
    """Fault 25. What O_DIRECT refuses goes by another descriptor of its file."""
    space = aligned(3 * PAGE)
    engine = PlayedThreads()
    (tmp_path / "a").write_bytes(b"x" * 3 * PAGE)
    try:
        fd = os.open(tmp_path / "a", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("its filesystem refuses O_DIRECT")
    with os.fdopen(fd, "rb", 0):
        at = space.ctypes.data
        good = Request(fd, 0, at, PAGE, False)
        requests = [good, Request(fd, 1, at + PAGE, PAGE, False), good]
        assert engine.run(requests) == [PAGE] * 3
        with limited():
            results = engine.run(requests)
        assert results == [PAGE, -errno.EMFILE, PAGE]
        assert engine.run(requests) == [PAGE] * 3


def test_what_is_not_begun_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 15. The engine closes inside of `run`; none may move once it has returned."""
    space = aligned(PAGE)
    engine = PlayedThreads()
    real = os.preadv
    moves: list[int] = []

    def move(fd: int, parts: Any, at: int) -> int:
        moves.append(at)
        time.sleep(0.001)  # so that some wait
        if len(moves) > 20:
            engine.close()
        return real(fd, parts, at)

    monkeypatch.setattr(os, "preadv", move)
    (tmp_path / "a").write_bytes(bytes(PAGE))
    with (tmp_path / "a").open("rb") as opened:
        requests = [Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)] * 5_000
        ends = list[tuple[int, int]]()
        results = engine.run(requests, lambda *end: ends.append(end))
        assert sorted(ends) == [*enumerate(results)]
        assert until(lambda: not movers(engine))
        counts = len(moves), results.count(PAGE), results.count(-errno.ECANCELED)
        assert counts[0] == counts[1] < 5_000
        assert counts[1] + counts[2] == 5_000
        monkeypatch.undo()
        assert engine.run(requests) == [-errno.ECANCELED] * 5_000


def movers(engine: Threads) -> int:
    """Return the number of threads of an engine."""
    return int(engine._files.state().movers)


def test_the_caller_goes_on_without_threads(tmp_path: Path) -> None:
    """Fault 26. The system gives no threads: nothing fails for that."""
    (tmp_path / "a").write_bytes(b"x" * PAGE)
    space = aligned(PAGE)
    engine = PlayedThreads(admit=-errno.EAGAIN)
    with (tmp_path / "a").open("rb") as opened:
        requests = [Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)] * 20
        ends = list[tuple[int, int]]()
        for report in (None, lambda *end: ends.append(end)):
            assert engine.run(requests, report) == [PAGE] * 20
    assert sorted(ends) == [(n, PAGE) for n in range(20)]
    assert bytes(space) == b"x" * PAGE
    assert movers(engine) == 0
    with pytest.raises(OSError, match="temporarily"):
        PlayedRing(admit=-errno.EAGAIN)


@pytest.mark.parametrize("depth", [1, 3, 8, 512])
def test_there_are_as_many_threads_as_the_depth_and_at_most_eight(
    depth: int, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(PAGE))
    space = aligned(PAGE)
    with (tmp_path / "a").open("rb") as opened, closing(Threads(depth=depth)) as engine:
        request = Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)
        assert engine.run([request] * 200) == [PAGE] * 200
        assert movers(engine) == min(depth, 8)


def test_threads_end_with_their_engine(tmp_path: Path) -> None:
    """No one has to close it."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    space = aligned(PAGE)
    with (tmp_path / "a").open("rb") as opened:
        engine = Threads()
        before = named()
        engine.run([Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)] * 20)
        assert named() > before
        del engine
        gc.collect()
        assert until(lambda: named() <= before)


def named() -> int:
    """Return the number of threads of engines in this process."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            count += (task / "comm").read_text().startswith("portakv io")
    return count


def test_no_end_of_the_interpreter_waits_for_a_read_that_hangs(tmp_path: Path) -> None:
    """Fault 64. The process decides how long it waits for the read."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    text = """if True:
        import os, sys, threading, time
        import numpy as np
        from portakv.storage.io.base import Request
        from support.io_calls import PlayedThreads
        begun, file, space = threading.Event(), open(sys.argv[1]), np.zeros(4096, np.uint8)
        os.preadv = lambda *_: begun.set() or time.sleep(86400)
        requests = [Request(file.fileno(), 0, space.ctypes.data, 4096, False)]
        threading.Thread(target=PlayedThreads().run, args=[requests], daemon=True).start()
        begun.wait()
        """
    ready.run("-c", text, tmp_path / "a").check_returncode()


def test_a_request_that_makes_no_sense_fails_alone(tmp_path: Path) -> None:
    space = aligned(PAGE)
    (tmp_path / "a").write_bytes(bytes(PAGE))
    with (tmp_path / "a").open("rb") as opened:
        good = Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)
        assert PlayedThreads().run([good, good._replace(nbytes=-1), good]) == [
            PAGE,
            -errno.ECANCELED,
            PAGE,
        ]


def test_an_interrupt_at_any_line_leaves_the_engine_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 34. Ctrl-C in the caller, inside of its calls as well: no read is under way after it,
    and no thread is lost to the next caller."""
    (tmp_path / "a").write_bytes(bytes(PAGE))
    space = aligned(PAGE)
    engine = PlayedThreads()
    real = os.preadv
    running = set[float]()
    files = {module.__file__ for module in (core_io, choose)}
    lines = itertools.count()
    line = 0
    interrupted = True

    def read(*each: Any) -> int:
        running.add(began := time.monotonic())
        time.sleep(0.0005)
        got = real(*each)
        running.discard(began)
        return got

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return at_line

    monkeypatch.setattr(os, "preadv", read)
    with (tmp_path / "a").open("rb") as opened:
        requests = [Request(opened.fileno(), 0, space.ctypes.data, PAGE, False)] * 10
        assert engine.run(requests) == [PAGE] * 10
        while interrupted:
            lines = itertools.count()
            line = line + 1
            before = sys.gettrace()
            interrupted = False
            sys.settrace(at_line)
            try:
                engine.run(requests, lambda *_: None)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(before)
            assert not running
        assert line > 20
