# SPDX-License-Identifier: Apache-2.0
"""The ring under a kernel that plays what a real one seldom does; every byte is moved for real."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.io_calls import (
    ENTER,
    READ,
    READ_FIXED,
    REGISTER,
    SETUP,
    WORD,
    PlayedRing,
    system_call,
)
from support.no_descriptors import limited
from support.storage_cases import aligned

from portakv.core import io as core_io
from portakv.storage.io import choose
from portakv.storage.io.base import Ended, Request

PAGE = 4096
COUNT = 8
SPACE = aligned(COUNT * PAGE)
REAL = system_call
EINTR = -errno.EINTR
EAGAIN = -errno.EAGAIN
#: Answers one ``enter``, given its arguments; `REAL` carries it out.
Step = Callable[..., int]


@pytest.fixture
def one() -> Iterator[PlayedRing]:
    made = opened([(SPACE.ctypes.data, SPACE.nbytes)])
    yield made
    made.close()


def opened(
    memory: list[tuple[int, int]], depth: int = COUNT, call: Callable[..., int] = REAL
) -> PlayedRing:
    """Return an engine of a kernel that a test plays; skip the test if there is no io_uring."""
    try:
        return PlayedRing(memory, depth, call)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "a").write_bytes(np.random.default_rng(0).bytes(SPACE.nbytes))
    fd = os.open(tmp_path / "a", os.O_RDWR)
    yield fd
    os.close(fd)


def play(one: PlayedRing, *steps: Step) -> list[Step]:
    """Have each step answer one ``enter`` that has requests under way, and the kernel the others;
    return the steps that are left. An idle thread may come to its ``enter`` late, and then has no
    more than the read that wakes it."""
    left = list(steps)

    def call(number: int, *rest: int) -> int:
        played = number == ENTER and left and one.kernel.queues.in_flight() > 1
        return left.pop(0)(number, *rest) if played else REAL(number, *rest)

    one.kernel.call = call
    return left


def ask(file: int, write: bool = False) -> list[Request]:
    """Return requests for page n of the file and page n of the memory, for each n."""
    at = SPACE.ctypes.data
    return [Request(file, n * PAGE, at + n * PAGE, PAGE, write) for n in range(COUNT)]


def right(file: int) -> bool:
    """Return whether the file and the memory hold the same."""
    return bytes(SPACE) == Path(f"/proc/self/fd/{file}").read_bytes()


def ends_of(one: PlayedRing, index: int) -> Any:
    """Return which ends that the kernel reported are those of a request of the first batch."""
    queues = one.kernel.queues
    return queues.numbers(queues.cqes) == index


def reporting(one: PlayedRing, index: int, result: int) -> Step:
    """Return a step in which the kernel carries out the requests, but reports this result of
    one."""

    def step(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        done = REAL(number, fd, put, COUNT, *rest)
        one.kernel.queues.cqes["result"][ends_of(one, index)] = result
        return done

    return step


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("index", range(COUNT))
def test_a_short_move_goes_on_at_every_place(
    one: PlayedRing, file: int, index: int, write: bool
) -> None:
    """Fault 29. It is cut short at an odd byte."""

    def cut(*numbers: int) -> int:
        queues = one.kernel.queues
        which = queues.numbers(queues.sqes) == index
        queues.sqes["nbytes"][which] = np.minimum(queues.sqes["nbytes"][which], 1001)
        return REAL(*numbers)

    left = play(one, cut)
    ends = list[tuple[int, int]]()
    SPACE[:] = 0 if not write else np.arange(SPACE.nbytes) % 251
    assert one.run(ask(file, write), lambda *end: ends.append(end)) == [PAGE] * COUNT
    assert sorted(ends) == [(n, PAGE) for n in range(COUNT)]
    assert right(file)
    assert not left
    assert one.kernel.rings == 1


def test_an_enter_that_is_interrupted_or_does_half_is_repeated(one: PlayedRing, file: int) -> None:
    """Fault 31."""

    def some(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, min(put, 3), 0, *rest)

    codes = [EINTR, EAGAIN, -errno.EBUSY]
    steps: list[Step] = [lambda *_, code=code: code for code in codes]
    left = play(one, *steps, some, steps[0], some, steps[1])
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert not left
    assert one.kernel.rings == 1


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("depth", [1, 3, COUNT - 1, COUNT + 1])
def test_no_more_requests_are_under_way_than_the_depth(file: int, depth: int, report: bool) -> None:
    """The kernel rounds a ring up to a power of two. No call returns before an end is there, which
    would occupy a core."""
    one = opened([(SPACE.ctypes.data, SPACE.nbytes)], depth)
    seen = list[int]()

    def counted(number: int, *rest: int) -> int:
        if number == ENTER:
            seen.append(one.kernel.queues.in_flight() - 1)  # without the read that wakes the thread
            assert rest[2] >= 1, "it does not wait"
        return REAL(number, *rest)

    one.kernel.call = counted
    for write in (False, True):
        SPACE[:] = SPACE if write else 0
        assert one.run(ask(file, write), (lambda *_: None) if report else None) == [PAGE] * COUNT
        assert right(file)
    assert max(seen) == min(depth, COUNT)
    assert one.kernel.rings == 1
    one.close()


@pytest.mark.parametrize("code", [EINTR, EAGAIN])
def test_a_request_that_is_interrupted_is_made_again(
    one: PlayedRing, file: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 31. It fails alone if it goes on so."""
    left = play(one, reporting(one, 2, code))
    ends = list[tuple[int, int]]()
    SPACE[:] = 0
    assert one.run(ask(file), lambda *end: ends.append(end)) == [PAGE] * COUNT
    assert sorted(ends) == [(n, PAGE) for n in range(COUNT)]
    assert right(file)
    assert not left


def test_a_request_that_stays_refused_fails_alone(
    one: PlayedRing, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EAGAIN, "")

    play(one, reporting(one, 3, EAGAIN))
    monkeypatch.setattr(os, "preadv", refused)
    assert one.run(ask(file)) == [*[PAGE] * 3, EAGAIN, *[PAGE] * (COUNT - 4)]
    assert one.kernel.rings == 1


@pytest.mark.parametrize("tell", [None, lambda *_: None], ids=["at the end", "each"])
@pytest.mark.parametrize("part", [0, 3, COUNT])
def test_an_interrupt_at_any_line_leaves_no_request_under_way(
    one: PlayedRing, file: int, part: int, tell: Ended | None
) -> None:
    """Fault 34. The kernel took all requests, or some, when Ctrl-C came."""

    def some(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, min(put, part), 0, *rest)

    lines = itertools.count()
    line = 0
    files = {module.__file__ for module in (core_io, choose, choose)}

    def at_line(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return at_line

    interrupted = True
    while interrupted:
        lines = itertools.count()
        line = line + 1
        play(one, some)
        before = sys.gettrace()
        interrupted = False
        sys.settrace(at_line)
        try:
            one.run(ask(file), tell)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        queues = one.kernel.queues
        assert queues.in_flight() <= 1  # the read that wakes the thread
    assert line > 20


@pytest.mark.parametrize("code", [-errno.EIO, -errno.ENOSPC])
def test_a_request_that_fails_does_so_alone(one: PlayedRing, file: int, code: int) -> None:
    play(one, reporting(one, 5, code))
    expected = [PAGE] * COUNT
    expected[5] = code
    assert one.run(ask(file)) == expected


@pytest.mark.parametrize("key", [2, 1 << 40, (1 << 32) + 2, WORD])
def test_an_end_of_no_request_poisons_the_ring(one: PlayedRing, file: int, key: int) -> None:
    """Fault 32. It is reported in place of another one's, which never ends: no report proves that
    its bytes came. The ring is replaced."""

    def confused(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        done = REAL(number, fd, put, COUNT, *rest)
        while not (ends_of(one, 2).any() and ends_of(one, 3).any()):  # the wait was cut short
            REAL(number, fd, 0, COUNT, *rest)
        cqes = one.kernel.queues.cqes
        which = ends_of(one, 3)
        cqes["key"][which] = cqes["key"][ends_of(one, 2)][-1] if key == 2 else key
        return done

    play(one, confused)
    assert one.run(ask(file)) == [*[PAGE] * 3, -errno.ECANCELED, *[PAGE] * 4]
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert one.kernel.rings == 2


def test_a_ring_that_fails_is_drained_and_replaced(file: int) -> None:
    """Fault 32. What the kernel had taken has landed; the rest fails, and the next ask is right."""
    one = opened([])

    def half(number: int, fd: int, put: int, least: int, *rest: int) -> int:
        return REAL(number, fd, 3, 0, *rest)

    play(one, half, lambda *_: -errno.EBADFD)
    SPACE[:] = 0
    ends = list[tuple[int, int]]()
    results = one.run(ask(file), lambda *end: ends.append(end))
    assert results == [PAGE] * 3 + [-errno.EBADFD] * (COUNT - 3)
    assert sorted(ends) == [*enumerate(results)]
    assert not SPACE[3 * PAGE :].any()
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert one.kernel.rings == 2
    one.close()


def test_an_older_kernel_has_a_ring_too(file: int) -> None:
    """It refuses flags that it does not know, of Linux 6.1."""

    def older(number: int, *rest: int) -> int:
        flags = ctypes.c_uint32.from_address(rest[1] + 8).value if number == SETUP else 0
        return -errno.EINVAL if flags & 0x2000 else REAL(number, *rest)

    one = opened([], COUNT // 2, older)
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    one.close()


def test_a_kernel_that_lacks_too_much_has_no_ring() -> None:
    """No descriptor is left open."""

    def older(number: int, *rest: int) -> int:
        done = REAL(number, *rest)
        (ctypes.c_uint32 * 30).from_address(rest[1])[5] &= ~3  # its features
        return done

    opened([]).close()
    before = {*os.listdir("/proc/self/fd")}
    with pytest.raises(OSError, match="too old"):
        PlayedRing([], COUNT, older)
    assert {*os.listdir("/proc/self/fd")} <= before  # what other tests have left may be collected


def test_a_ring_goes_on_without_registered_buffers(file: int) -> None:
    """Fault 24. The limit of locked memory; it says so."""

    def limited(number: int, *rest: int) -> int:
        return -errno.ENOMEM if number == REGISTER else REAL(number, *rest)

    one = opened([(SPACE.ctypes.data, SPACE.nbytes)], COUNT, limited)
    assert "ulimit -l" in one.notes[0]
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    assert len(one.notes) == 1
    one.close()
    one = opened([(SPACE.ctypes.data, SPACE.nbytes)])
    assert not one.notes
    one.close()


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
def test_a_refusal_names_its_own_cause(number: int, blamed: str) -> None:
    """Of a ring, and of its buffers: each errno has another limit."""
    causes = {"ulimit -l", "ulimit -n", "io_uring_disabled", "has no io_uring"}
    others = {each for each in causes if each not in blamed.replace("`", "")}

    def limited(which: int, *rest: int) -> int:
        return -number if which == refused else REAL(which, *rest)

    refused = SETUP
    with pytest.raises(OSError, match="the kernel rejects io_uring") as error:
        PlayedRing([], COUNT, limited)
    refused = REGISTER
    one = opened([(SPACE.ctypes.data, SPACE.nbytes)], COUNT, limited)
    notes = one.notes
    one.close()
    for text in (str(error.value), notes[0]):
        assert blamed in text
        assert os.strerror(number) in text
        assert not any(each in text.replace("`", "") for each in others)


def test_a_request_outside_of_one_registered_buffer_goes_without(file: int) -> None:
    """Those across two of them, or past their ends. Buffers may come in any order."""
    at = SPACE.ctypes.data
    one = opened([(at + 4 * PAGE, 3 * PAGE - 512), (at, 3 * PAGE + 512)])
    SPACE[:] = 0
    assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    sqes = one.kernel.queues.sqes
    sqes = sqes[(sqes["address"] >= at) & (sqes["address"] < at + SPACE.nbytes)]
    opcodes = sqes["opcode"][np.argsort(sqes["address"])].tolist()
    assert opcodes == [*[READ_FIXED] * 3, READ, *[READ_FIXED] * 2, READ, READ]
    one.close()


def test_without_another_ring_requests_are_served(file: int) -> None:
    """Fault 25. A ring failed, and the process has no descriptor left (EMFILE)."""
    one = opened([])
    play(one, lambda *_: -errno.EBADFD)
    failing = REAL
    with limited():
        assert one.run(ask(file)) == [-errno.EBADFD] * COUNT
        one.kernel.call = lambda number, *rest: (
            -errno.EMFILE if number == SETUP else failing(number, *rest)
        )
        SPACE[:] = 0
        assert one.run(ask(file)) == [PAGE] * COUNT
    assert right(file)
    one.close()
