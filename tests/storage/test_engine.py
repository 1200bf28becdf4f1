# SPDX-License-Identifier: Apache-2.0
"""Both I/O engines of the disk tier on real files, and the choice between them."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.io_calls import ENTER, SETUP, PlayedRing, PlayedThreads, system_call
from support.no_descriptors import limited
from support.storage_cases import aligned
from support.threads import run_threads
from support.waits import LIMIT, until

from portakv.core.io import WRONG, Check
from portakv.core.xxh3 import checksum
from portakv.errors import InvalidTerms, StoreError
from portakv.storage.io.base import Engine, Request
from portakv.storage.io.choose import BUILT_IN, Ring, Threads, choose, verifies

PAGE = 4096
SPACE = aligned(8 << 20)
AT = SPACE.ctypes.data


@pytest.fixture(params=["ring", "registered", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield from opened(request.param, Threads, Ring)


@pytest.fixture(params=["ring", "registered", "threads"])
def played(request: pytest.FixtureRequest) -> Iterator[PlayedRing | PlayedThreads]:
    """Yield an engine whose plain calls are those of `os`, and whose kernel a test may play."""
    yield from opened(request.param, PlayedThreads, PlayedRing)


def opened(name: str, threads: Any, ring: Any) -> Iterator[Any]:
    """Yield an engine; skip the test if there is no io_uring."""
    try:
        memory = [(AT, len(SPACE))] if name == "registered" else []
        made = threads() if name == "threads" else ring(memory, 16)
    except OSError as error:
        pytest.skip(str(error))
    assert not made.notes
    yield made
    made.close()


@pytest.fixture(params=["direct", "buffered", "tmpfs"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Yield an open file of 4 MiB; on a disk with and without O_DIRECT, and in memory."""
    folder = "/dev/shm" if request.param == "tmpfs" else tmp_path
    path = Path(folder) / f"portakv-{os.getpid()}"
    path.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    try:
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if request.param == "direct" else 0))
    except OSError:
        pytest.skip("its filesystem refuses O_DIRECT")
    yield fd
    os.close(fd)
    path.unlink()


def content(fd: int) -> np.ndarray[Any, Any]:
    """Return the content of a file, read past the engine."""
    return np.fromfile(f"/proc/self/fd/{fd}", np.uint8)


def reads(fd: int, pieces: Sequence[tuple[int, int]]) -> list[Request]:
    """Return requests for pieces (offset, bytes), to memory at the same offset."""
    return [Request(fd, at, AT + at, nbytes, False) for at, nbytes in pieces]


def rings() -> int:
    """Return the number of rings of this process."""
    gc.collect()  # a test sees the queues by other descriptors of a ring
    queues = [os.path.join("/proc/self/fd", each) for each in os.listdir("/proc/self/fd")]
    return sum("io_uring" in os.readlink(each) for each in queues if os.path.islink(each))


def test_bytes_are_read_and_written_right(engine: Engine, file: int) -> None:
    """More requests than a ring has entries, of many sizes."""
    rng = np.random.default_rng(1)
    before = content(file)
    cuts = [0, *sorted((rng.choice(1023, 99, replace=False) + 1).tolist()), 1024]
    pieces = [(a * PAGE, (b - a) * PAGE) for a, b in pairwise(cuts)]
    SPACE[:] = 0
    assert engine.run(reads(file, pieces[::-1])) == [nbytes for _, nbytes in pieces[::-1]]
    assert np.array_equal(SPACE[: 4 << 20], before)
    SPACE[:] = ~SPACE
    writes = [each._replace(write=True) for each in reads(file, pieces)]
    assert engine.run(writes) == [nbytes for _, nbytes in pieces]
    assert np.array_equal(content(file), ~before)
    assert engine.run([]) == []
    assert engine.run(reads(file, [(0, 0)])) == [0]


@pytest.mark.parametrize(("offset", "address", "nbytes"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_an_unaligned_request_is_carried(
    engine: Engine, file: int, offset: int, address: int, nbytes: int
) -> None:
    """Fault 33. O_DIRECT refuses it; it goes by the page cache, and no other byte changes."""
    before = content(file)
    start = 2 * PAGE + offset
    size = 3 * PAGE + nbytes
    engine.run([])
    open_before = len(os.listdir("/proc/self/fd"))
    SPACE[:] = 7
    one = Request(file, start, AT + PAGE + address, size, False)
    aside = reads(file, [(1 << 20, PAGE)])
    assert engine.run([*aside, one, *aside]) == [PAGE, size, PAGE]
    place = slice(PAGE + address, PAGE + address + size)
    assert np.array_equal(SPACE[place], before[start : start + size])
    assert SPACE[place.start - 1] == SPACE[place.stop] == 7
    SPACE[place] = before[start : start + size] = ~SPACE[place]
    assert engine.run([one._replace(write=True)]) == [size]
    assert np.array_equal(content(file), before)
    assert engine.run(reads(file, [(3 * PAGE, PAGE)])) == [PAGE]  # and no old bytes come back
    assert np.array_equal(SPACE[3 * PAGE : 4 * PAGE], before[3 * PAGE : 4 * PAGE])
    assert len(os.listdir("/proc/self/fd")) <= open_before


@pytest.mark.parametrize("length", [0, 1, 5 * PAGE, 5 * PAGE + 100])
def test_the_end_of_a_file_is_an_error(engine: Engine, file: int, length: int) -> None:
    """Fault 30. Whether it lies before, at, or inside a request."""
    os.ftruncate(file, length)
    pieces = [(0, PAGE), (0, 8 * PAGE), (8 * PAGE, PAGE), (length // PAGE * PAGE, PAGE)]
    first = PAGE if length >= PAGE else -errno.ENODATA
    assert engine.run(reads(file, pieces)) == [first, *[-errno.ENODATA] * 3]


def test_what_the_kernel_refuses_fails_its_request_alone(
    engine: Engine, file: int, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(PAGE))
    read_only = os.open(tmp_path / "a", os.O_RDONLY)
    good = Request(file, PAGE, AT, PAGE, False)
    bad = [
        good._replace(fd=999),
        Request(read_only, 0, AT, PAGE, True),
        good._replace(address=PAGE),
    ]
    results = engine.run([good, bad[0], good, bad[1], good, bad[2], good])
    assert results[::2] == [PAGE] * 4
    assert results[1::2] == [-errno.EBADF, -errno.EBADF, -errno.EFAULT]
    os.close(read_only)


def test_each_end_is_told_once(engine: Engine, file: int) -> None:
    """Each end is reported in the caller's thread, after its bytes are there, with the result of
    `run`. There are more requests than a ring has entries; some are not aligned, lie after the end
    or fail."""
    before = content(file)
    reports = list[tuple[int, int]]()
    requests = reads(file, [(at, PAGE) for at in range(0, 60 * PAGE, PAGE)])
    requests[7] = requests[7]._replace(offset=requests[7].offset + 1)
    requests[20] = requests[20]._replace(offset=len(before))
    requests[40] = requests[40]._replace(fd=999)

    def ended(number: int, result: int) -> None:
        assert threading.current_thread() is caller
        reports.append((number, result))
        at = requests[number].offset
        if result > 0:
            assert bytes(SPACE[number * PAGE :][:PAGE]) == bytes(before[at : at + PAGE])

    SPACE[:] = 0
    caller = threading.current_thread()
    results = engine.run(requests, ended)
    assert sorted(reports) == [*enumerate(results)]
    assert [results.pop(40), results.pop(20)] == [-errno.EBADF, -errno.ENODATA]
    assert results == [PAGE] * 58
    engine.close()
    reports.clear()
    assert engine.run(requests, ended) == [-errno.ECANCELED] * 60
    assert sorted(reports) == [(n, -errno.ECANCELED) for n in range(60)]


@pytest.mark.parametrize("raises", [False, True])
def test_an_end_is_told_while_others_are_under_way(
    played: Engine, file: int, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 34. What is raised there is raised once the others have left the memory."""
    readable, writable = os.pipe()
    real = os.preadv
    reports = list[int]()
    begun = threading.Event()

    def read(fd: int, buffers: Any, at: int) -> int:  # of `threads`
        if fd == readable:
            begun.set()  # else it may be cancelled
            return os.readv(fd, buffers)
        begun.wait(LIMIT)
        return real(fd, buffers, at)

    def ended(number: int, _: int) -> None:
        reports.append(number)
        if number == 1:
            later.start()
            if raises:
                raise RuntimeError("of the caller")

    later = threading.Timer(0.05, os.write, (writable, b"x" * 10))
    monkeypatch.setattr(os, "preadv", read)
    SPACE[:] = 0
    requests = [Request(readable, 0, AT, 10, False), *reads(file, [(PAGE, PAGE)])]
    if raises:
        with pytest.raises(RuntimeError, match="of the caller"):
            played.run(requests, ended)
    else:
        assert played.run(requests, ended) == [10, PAGE]
    assert bytes(SPACE[:11]) == b"x" * 10 + b"\0"
    assert reports == [1, 0][: 1 if raises else 2]
    assert played.run(requests[1:]) == [PAGE]
    for each in (readable, writable):
        os.close(each)


def test_threads_may_ask_at_once(engine: Engine, file: int) -> None:
    before = content(file)
    others = rings()

    def work(number: int) -> None:
        part = slice(number << 20, (number + 1) << 20)
        for _ in range(4):
            SPACE[part] = 0
            pieces = [(at, 1 << 15) for at in range(part.start, part.stop, 1 << 15)]
            assert engine.run(reads(file, pieces)) == [1 << 15] * 32
            assert np.array_equal(SPACE[part], before[part])

    run_threads(work, range(4))
    assert rings() <= others


def test_a_closed_engine_carries_nothing_out(engine: Engine, file: int) -> None:
    ask = partial(engine.run, reads(file, [(0, PAGE)] * 2))
    assert ask() == [PAGE] * 2
    assert bool(rings()) == (engine.name == "ring")
    engine.close()
    assert ask() == [-errno.ECANCELED] * 2
    assert not rings()


def test_a_request_under_way_outlives_close(
    played: PlayedRing | PlayedThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 15. It ends before its `run` does, and its ring goes then."""
    readable, writable = os.pipe()
    submitted = threading.Event()

    def read(fd: int, buffers: Any, _: int) -> int:  # of `threads`
        submitted.set()
        return os.readv(fd, buffers)

    def call(number: int, *rest: int) -> int:
        if number == ENTER and played.kernel.queues.in_flight() > 1:
            submitted.set()
        return system_call(number, *rest)

    def work() -> None:
        results.extend(played.run([Request(readable, 0, AT, 10, False)]))

    results = list[int]()
    monkeypatch.setattr(os, "preadv", read)
    played.kernel.call = call
    thread = threading.Thread(target=work)
    thread.start()
    assert submitted.wait(LIMIT)
    played.close()
    assert played.run([Request(readable, 0, AT, 10, False)]) == [-errno.ECANCELED]
    thread.join(0.05)
    assert thread.is_alive()
    os.write(writable, b"x" * 10)
    thread.join(LIMIT)
    assert results == [10]
    played.kernel.forget()
    until(lambda: rings() == 0)
    for each in (readable, writable):
        os.close(each)


def test_reads_are_verified(engine: Engine, file: int) -> None:
    """Long ones and short ones; of pieces whose bytes a request brought."""
    assert verifies(engine)
    before = content(file)
    rng = np.random.default_rng(5)
    sizes = [*(rng.integers(1, 36, 40) * PAGE).tolist(), PAGE]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    requests = reads(file, list(zip(starts, sizes, strict=True)))
    checks = []
    for request in requests:
        pieces = np.array([[0, 100], [512, request.nbytes - 512], [7, 0]], np.int64)
        at = [request.offset + start for start, _ in pieces.tolist()]
        lengths = pieces[:, 1].tolist()
        sums = [
            checksum(bytes(before[start : start + size]), -5)
            for start, size in zip(at, lengths, strict=True)
        ]
        expected = np.array(sums, np.uint64).tobytes()
        checks.append(Check(request.address, pieces.tobytes(), -5, expected))
    SPACE[:] = 0
    assert engine.run_checked(requests, checks) == sizes
    for number in (0, 11, 40):
        wrong = bytearray(checks[number].expected)
        wrong[9] ^= 1
        checks[number] = checks[number]._replace(expected=bytes(wrong))
    requests[3] = requests[3]._replace(fd=999)
    results = engine.run_checked(requests, checks)
    for number in (0, 11, 40):
        sizes[number] = WRONG
    sizes[3] = -errno.EBADF
    assert results == sizes


def test_a_forked_child_is_refused(engine: Engine, file: int) -> None:
    """And holds no ring of its parent."""
    ask = partial(engine.run, reads(file, [(0, PAGE)]))
    submitted = threading.Event()
    go = threading.Event()

    def work() -> None:
        ask()
        submitted.set()
        go.wait()

    thread = threading.Thread(target=work)
    thread.start()
    submitted.wait()
    if not (child := os.fork()):
        try:
            ask()
        except StoreError as error:
            os._exit(40 + rings() if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40
    assert ask() == [PAGE]
    go.set()
    thread.join()


def test_an_interrupted_caller_waits_for_the_memory(
    played: PlayedRing | PlayedThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 34. The memory may go once `run` has left it, and not before the kernel has; Ctrl-C
    again and again changes nothing."""
    readable, writable = os.pipe()
    left = [KeyboardInterrupt] * 3
    begun = threading.Event()

    def read(fd: int, buffers: Any, _: int) -> int:  # of `threads`
        begun.set()
        return os.readv(fd, buffers)

    def call(number: int, *rest: int) -> int:
        queues = played.kernel.queues
        if number == ENTER and queues.in_flight() > 1:
            begun.set()
        return system_call(number, *rest)

    def interrupt(_: int, frame: Any) -> None:
        if not begun.is_set():
            return
        while frame and frame.f_code is not Threads.run.__code__:
            frame = frame.f_back
        if frame and left:  # inside of `run`, which ends only after the last of them
            raise left.pop()
        if frame:
            os.write(writable, b"x" * 10)
            signal.setitimer(signal.ITIMER_REAL, 0)

    monkeypatch.setattr(os, "preadv", read)
    played.kernel.call = call
    SPACE[:] = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)
    with pytest.raises(KeyboardInterrupt):
        played.run([Request(readable, 0, AT, 10, False)])
    assert not left
    assert bytes(SPACE[:11]) == b"x" * 10 + b"\0"
    signal.signal(signal.SIGALRM, before)
    for each in (readable, writable):
        os.close(each)


@pytest.mark.parametrize(
    ("code", "why"), [(errno.EPERM, "container"), (errno.ENOSYS, "not implemented")]
)
def test_threads_serve_if_io_uring_is_refused(
    code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24. The reason is kept; an engine that was forced is an error."""

    def refusing(memory: Any, depth: int) -> PlayedRing:
        return PlayedRing(
            memory, depth, lambda number, *_: -code if number == SETUP else system_call(number, *_)
        )

    monkeypatch.setitem(BUILT_IN, "ring", refusing)
    monkeypatch.delenv("PORTAKV_IO", raising=False)
    engine, decisions = choose()
    assert (engine.name, [each.accepted for each in decisions]) == ("threads", [False, True])
    assert why in decisions[0].reason
    with pytest.raises(StoreError, match=r"(?s)'ring', which is forced.*(io=None|Unset)"):
        choose(name="ring")
    monkeypatch.setenv("PORTAKV_IO", "ring")
    with pytest.raises(StoreError, match=r"(?s)'ring', which is forced.*(io=None|Unset)"):
        choose(name="threads")


def test_without_descriptors_threads_serve(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 25. A ring is a descriptor; an engine that was forced is an error."""
    monkeypatch.delenv("PORTAKV_IO", raising=False)
    with limited():
        engine, decisions = choose()
        with pytest.raises(StoreError, match=r"'ring'.*which is forced.*Too many open files"):
            choose(name="ring")
    assert (engine.name, "Too many" in decisions[0].reason) == ("threads", True)


def test_an_engine_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_IO", raising=False)
    engine, decisions = choose(name="threads")
    assert (engine.name, [each.name for each in decisions]) == ("threads", ["threads"])
    with pytest.raises(InvalidTerms, match=r"'ring' or 'threads'.*got 'aio'"):
        choose(name="aio")
    monkeypatch.setenv("PORTAKV_IO", "threads")
    assert choose(name="ring")[0].name == "threads"
    monkeypatch.setenv("PORTAKV_IO", "uring")
    with pytest.raises(InvalidTerms, match="uring"):
        choose()
