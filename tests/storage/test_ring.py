# SPDX-License-Identifier: Apache-2.0
"""The ring under a kernel that plays what a real one seldom does; every byte is moved for real."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.storage_cases import aligned

from portakv.storage.io import io_uring
from portakv.storage.io.base import Ended, Request
from portakv.storage.io.io_uring import OneRing, Ring

PAGE = 4096
COUNT = 8
SPACE = aligned(COUNT * PAGE)
REAL = io_uring.system_call
EINTR = -errno.EINTR
EAGAIN = -errno.EAGAIN
#: Answers one ``enter``, given its arguments; `REAL` carries it out.
Step = Callable[..., int]


@pytest.fixture
def one() -> OneRing:
    try:
        return OneRing([(SPACE.ctypes.data, SPACE.nbytes)], COUNT)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "a").write_bytes(np.random.default_rng(0).bytes(SPACE.nbytes))
    fd = os.open(tmp_path / "a", os.O_RDWR)
    yield fd
    os.close(fd)


def play(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> list[Step]:
    """Have each step answer one ``enter``, and the kernel those that follow; return the steps that
    are left."""
    left = list(steps)

    def system_call(number: int, *rest: int) -> int:
        played = number == io_uring.ENTER and left
        return left.pop(0)(number, *rest) if played else REAL(number, *rest)

    monkeypatch.setattr(io_uring, "system_call", system_call)
    return left


def ask(file: int, write: bool = False) -> list[Request]:
    """Return requests for page n of the file and page n of the memory, for each n."""
    at = SPACE.ctypes.data
    return [Request(file, n * PAGE, at + n * PAGE, PAGE, write) for n in range(COUNT)]


def right(file: int) -> bool:
    """Return whether the file and the memory hold the same."""
    return bytes(SPACE) == Path(f"/proc/self/fd/{file}").read_bytes()


def reporting(one: OneRing, index: int, result: int) -> Step:
    """Return a step in which the kernel carries out the requests, but reports this result of
    one."""

    def step(*numbers: int) -> int:
        done = REAL(*numbers)
        one.queues.cqes["result"][(one.queues.cqes["key"] & io_uring.WORD) == index] = result
        return done

    return step


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("index", range(COUNT))
def test_a_short_move_goes_on_at_every_place(
    one: OneRing, file: int, index: int, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 29. It is cut short at an odd byte."""

    def cut(*numbers: int) -> int:
        which = (one.queues.sqes["key"] & io_uring.WORD) == index
        one.queues.sqes["nbytes"][which] = np.minimum(one.queues.sqes["nbytes"][which], 1001)
        return REAL(*numbers)

    left = play(monkeypatch, cut)
    ends = list[tuple[int, int]]()
    SPACE[:] = 0 if not write else np.arange(SPACE.nbytes) % 251
    assert one.run(ask(file, write), lambda *end: ends.append(end)) == [PAGE] * COUNT
    assert sorted(ends) == [(n, PAGE) for n in range(COUNT)]
    assert right(file)
    assert not left
    assert not one.poisoned


def test_an_enter_that_is_interrupted_or_does_half_is_repeated(
    one: OneRing, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 31."""

    def some(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, min(put, 3), 0, *rest)

    codes = [EINTR, EAGAIN, -errno.EBUSY]
    steps: list[Step] = [lambda *_, code=code: code for code in codes]
    left = play(monkeypatch, *steps, some, steps[0], some, steps[1])
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert not left
    assert not one.poisoned


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("depth", [1, 3, COUNT - 1, COUNT + 1])
def test_no_more_requests_are_under_way_than_the_depth(
    file: int, depth: int, report: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel rounds a ring up to a power of two. No call returns before an end is there, which
    would occupy a core."""
    try:
        one = OneRing([(SPACE.ctypes.data, SPACE.nbytes)], depth)
    except OSError as error:
        pytest.skip(str(error))
    seen = list[int]()

    def counted(number: int, *rest: int) -> int:
        if number == io_uring.ENTER:
            seen.append(one.queues.in_flight())
            assert rest[2] >= min(1, seen[-1]), "it does not wait"
        return REAL(number, *rest)

    monkeypatch.setattr(io_uring, "system_call", counted)
    for write in (False, True):
        SPACE[:] = SPACE if write else 0
        assert one.run(ask(file, write), (lambda *_: None) if report else None) == [PAGE] * COUNT
        assert right(file)
    assert max(seen) == min(depth, COUNT)
    assert not one.poisoned


@pytest.mark.parametrize("code", [EINTR, EAGAIN])
def test_a_request_that_is_interrupted_is_made_again(
    one: OneRing, file: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 31. It fails alone if it goes on so."""
    left = play(monkeypatch, reporting(one, 2, code), reporting(one, 3, code))
    ends = list[tuple[int, int]]()
    SPACE[:] = 0
    assert one.run(ask(file), lambda *end: ends.append(end)) == [PAGE] * COUNT
    assert sorted(ends) == [(n, PAGE) for n in range(COUNT)]
    assert right(file)

    def refused(*_: object) -> int:
        raise OSError(-code, os.strerror(-code))

    monkeypatch.setattr(os, "preadv", refused)
    assert one.run(ask(file)) == [*[PAGE] * 3, code, *[PAGE] * (COUNT - 4)]
    assert not left
    assert not one.poisoned


@pytest.mark.parametrize("tell", [None, lambda *_: None], ids=["at the end", "each"])
@pytest.mark.parametrize("part", [0, 3, COUNT])
def test_an_interrupt_at_any_line_leaves_no_request_under_way(
    one: OneRing, file: int, part: int, tell: Ended | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 34. The kernel took all requests, or some, when Ctrl-C came."""

    def some(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, min(put, part), 0, *rest) if number == io_uring.ENTER else 0

    lines = itertools.count()
    line = 0

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != io_uring.__file__:
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return at_line

    interrupted = True
    while interrupted:
        lines = itertools.count()
        line = line + 1
        play(monkeypatch, some)
        before = sys.gettrace()
        interrupted = False
        sys.settrace(at_line)
        try:
            one.run(ask(file), tell)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        queues = one.queues
        words = queues.words
        assert words[queues.seen] == words[queues.put] == words[queues.taken]
    assert line > 40


@pytest.mark.parametrize("code", [-errno.EIO, -errno.ENOSPC])
def test_a_request_that_fails_does_so_alone(
    one: OneRing, file: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, reporting(one, 5, code))
    expected = [PAGE] * COUNT
    expected[5] = code
    assert one.run(ask(file)) == expected


@pytest.mark.parametrize("key", [0, 5, 1 << 40])
def test_an_end_of_another_batch_poisons_the_ring(one: OneRing, file: int, key: int) -> None:
    """Fault 32. It is counted for no request of this one, whatever number it bears."""
    one.queues.sqes[0] = np.zeros((), io_uring.SQE)  # a NOP
    one.queues.sqes["key"][0] = key
    one.queues.words[one.queues.put] = 1
    assert REAL(io_uring.ENTER, one.fd, 1, 0) == 1
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert one.poisoned


def test_an_end_that_is_told_twice_and_one_that_never_is(
    one: OneRing, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 32. No report proves that the other one's bytes came."""

    def confused(*numbers: int) -> int:
        done = REAL(*numbers)
        one.queues.cqes["key"][(one.queues.cqes["key"] & io_uring.WORD) == 3] -= 1
        return done

    play(monkeypatch, confused)
    assert one.run(ask(file)) == [*[PAGE] * 3, -errno.ECANCELED, *[PAGE] * 4]
    assert one.poisoned


def test_a_ring_that_fails_is_drained_and_replaced(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 32. What the kernel had taken has landed; the rest fails, and the next ask is right."""
    made = []

    def half(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, 3, 0, *rest)

    try:
        engine = Ring(depth=COUNT)
    except OSError as error:
        pytest.skip(str(error))
    play(monkeypatch, half, lambda *_: -errno.EBADFD)
    played = io_uring.system_call

    def counted(number: int, *rest: int) -> int:
        made.append(number == io_uring.SETUP)
        return played(number, *rest)

    monkeypatch.setattr(io_uring, "system_call", counted)
    SPACE[:] = 0
    ends = list[tuple[int, int]]()
    results = engine.run(ask(file), lambda *end: ends.append(end))
    assert results == [PAGE] * 3 + [-errno.EBADFD] * (COUNT - 3)
    assert sorted(ends) == [*enumerate(results)]
    assert not SPACE[3 * PAGE :].any()
    assert engine.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert sum(made) == 1


def test_an_older_kernel_has_a_ring_too(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses flags that it does not know, of Linux 6.1."""

    def older(number: int, *rest: int) -> int:
        flags = ctypes.c_uint32.from_address(rest[1] + 8).value if number == io_uring.SETUP else 0
        return -errno.EINVAL if flags & 0x2000 else REAL(number, *rest)

    monkeypatch.setattr(io_uring, "system_call", older)
    try:
        engine = Ring(depth=COUNT // 2)
    except OSError as error:
        pytest.skip(str(error))
    SPACE[:] = 0
    assert engine.run(ask(file)) == [PAGE] * COUNT
    assert right(file)


@pytest.mark.parametrize("what", ["its order of memory", "its features"])
def test_a_kernel_that_lacks_too_much_has_no_ring(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without DEFER_TASKRUN the ring needs x86-64; no descriptor is left open."""

    def older(number: int, *rest: int) -> int:
        parameters = (ctypes.c_uint32 * 30).from_address(rest[1])
        if what == "its order of memory" and parameters[2] & 0x2000:
            return -errno.EINVAL
        done = REAL(number, *rest)
        parameters[5] &= ~2 if what == "its features" else io_uring.WORD
        return done

    monkeypatch.setattr(io_uring, "system_call", older)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"too old|refused"):
        OneRing([], COUNT)
    assert os.listdir("/proc/self/fd") == before


def test_a_ring_goes_on_without_registered_buffers(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24. The limit of locked memory; it says so."""

    def limited(number: int, *rest: int) -> int:
        return -errno.ENOMEM if number == io_uring.REGISTER else REAL(number, *rest)

    monkeypatch.setattr(io_uring, "system_call", limited)
    try:
        engine = Ring([(SPACE.ctypes.data, SPACE.nbytes)])
    except OSError as error:
        pytest.skip(str(error))
    assert "ulimit -l" in engine.notes[0]
    SPACE[:] = 0
    assert engine.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert len(engine.notes) == 1
    monkeypatch.undo()
    engine = Ring([(SPACE.ctypes.data, SPACE.nbytes)])
    assert not engine.notes
    monkeypatch.setattr(io_uring, "system_call", limited)  # as for the second ring of a process
    thread = threading.Thread(target=engine.run, args=(ask(file),))
    thread.start()
    thread.join()
    assert "ulimit -l" in engine.notes[0]


@pytest.mark.parametrize(
    ("number", "blamed"),
    [
        (errno.ENOMEM, "ulimit -l, which allows"),
        (errno.EPERM, "kernel.io_uring_disabled, and the container's profile"),
        (errno.EMFILE, "`ulimit -n` allows"),
        (errno.ENOSYS, "the kernel has no io_uring"),
        (errno.EAGAIN, ""),
    ],
)
def test_a_refusal_names_its_own_cause(
    number: int, blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a ring, and of its buffers: each errno has another limit."""
    causes = {"ulimit -l", "ulimit -n", "io_uring_disabled", "has no io_uring"}
    others = {each for each in causes if each not in blamed.replace("`", "")}

    def limited(which: int, *rest: int) -> int:
        return -number if which == refused else REAL(which, *rest)

    monkeypatch.setattr(io_uring, "system_call", limited)
    refused = io_uring.SETUP
    with pytest.raises(OSError, match="the kernel rejects io_uring") as error:
        OneRing([], COUNT)
    refused = io_uring.REGISTER
    try:
        notes = OneRing([(SPACE.ctypes.data, SPACE.nbytes)], COUNT).notes
    except OSError as unavailable:
        pytest.skip(str(unavailable))
    for text in (str(error.value), notes[0]):
        assert blamed in text
        assert os.strerror(number) in text
        assert not any(each in text.replace("`", "") for each in others)


def test_buffers_are_registered_in_pieces(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that lies across two of them, or outside, goes without; a long one in moves."""
    monkeypatch.setattr(io_uring, "LARGEST", 2 * PAGE + 512)
    at = SPACE.ctypes.data
    try:
        small = OneRing([(at + 4 * PAGE, 3 * PAGE), (at, 3 * PAGE)], COUNT)
    except OSError as error:
        pytest.skip(str(error))
    SPACE[:] = 0
    assert small.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    opcodes = [io_uring.READ_FIXED, io_uring.READ_FIXED, io_uring.READ, io_uring.READ]
    assert small.queues.sqes["opcode"].tolist() == opcodes * 2
    SPACE[:] = 0
    assert small.run([ask(file)[0]._replace(nbytes=SPACE.nbytes)]) == [SPACE.nbytes]
    assert right(file)


def test_a_thread_without_a_ring_is_served(file: int) -> None:
    """Fault 25. The process has no descriptor left (EMFILE)."""
    try:
        engine = Ring(depth=COUNT)
    except OSError as error:
        pytest.skip(str(error))
    results: list[Any] = []
    spare = os.dup(file)
    os.close(spare)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    SPACE[:] = 0
    thread = threading.Thread(target=lambda: results.append(engine.run(ask(file))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limits[1]))
    try:
        thread.start()
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert results == [[PAGE] * COUNT]
    assert right(file)
    assert "Too many open files" in engine.notes[0]
    assert engine.run(ask(file)) == [PAGE] * COUNT
