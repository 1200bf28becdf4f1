# SPDX-License-Identifier: Apache-2.0
"""The contract of an I/O engine, `portakv.storage.io.base.Engine`: files and memory.

Every check gets an open engine and an empty folder. Files are written and read back past the
engine, so that its own mistakes cannot hide each other.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from portakv.storage.io.base import LOST, Engine, Request
from portakv_conformance.contract.runner import expect, run_threads

Bytes = npt.NDArray[np.uint8]
PAGE = 4096
#: Bytes around each destination that no request addresses.
GUARD = 64
_GUARD_BYTE = 0xA5


class _File:
    """A file of random bytes, opened for reading and writing."""

    def __init__(self, folder: Path, name: str, nbytes: int, seed: int) -> None:
        self.path = folder / name
        self.before = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)
        self.path.write_bytes(self.before.tobytes())
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def content(self) -> Bytes:
        """Return the bytes of the file, read past the engine."""
        return np.fromfile(self.path, np.uint8)


@contextmanager
def _opened(folder: Path, *sizes: int) -> Iterator[list[_File]]:
    files = [_File(folder, f"file{n}", size, n) for n, size in enumerate(sizes)]
    try:
        yield files
    finally:
        for file in files:
            os.close(file.fd)


def _memory(nbytes: int) -> Bytes:
    """Return page-aligned memory, filled with the guard byte."""
    whole = np.full(nbytes + PAGE, _GUARD_BYTE, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + nbytes]


def _reads(fd: int, pieces: Sequence[tuple[int, int]], memory: Bytes) -> list[Request]:
    """Return requests that read pieces (offset, bytes) to memory, with guards between them."""
    requests = []
    at = GUARD
    for offset, nbytes in pieces:
        requests.append(Request(fd, offset, memory.ctypes.data + at, nbytes, False))
        at += nbytes + GUARD
    return requests


def _expect_pieces(file: _File, pieces: Sequence[tuple[int, int]], memory: Bytes) -> None:
    """Expect the pieces of a file in memory, and the guards between them as they were."""
    at = 0
    for offset, nbytes in pieces:
        guard = memory[at : at + GUARD]
        expect(bool((guard == _GUARD_BYTE).all()), f"bytes before offset {offset} changed")
        at += GUARD
        same = np.array_equal(memory[at : at + nbytes], file.before[offset : offset + nbytes])
        expect(same, f"the {nbytes} bytes at offset {offset} came wrong")
        at += nbytes
    expect(
        bool((memory[at : at + GUARD] == _GUARD_BYTE).all()), "bytes past the last piece changed"
    )


def _pieces(count: int, size: int, seed: int) -> list[tuple[int, int]]:
    """Return random pieces of a file, of 1 to 9,999 bytes, some of them in whole pages."""
    rng = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        nbytes = int(rng.integers(1, 10_000)) if number % 3 else PAGE * (1 + number % 4)
        start = int(rng.integers(0, size - nbytes))
        pieces.append((start // PAGE * PAGE if number % 3 == 0 else start, nbytes))
    return pieces


def check_reads_bring_the_bytes_of_the_file(engine: Engine, folder: Path) -> None:
    """`run` reads the bytes of each request, more requests than a queue holds, of many sizes.

    It returns the bytes moved by each request, in the order of the requests.
    """
    with _opened(folder, 1 << 20) as (file,):
        pieces = _pieces(700, 1 << 20, 1)
        memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
        results = engine.run(_reads(file.fd, pieces, memory))
        expect(results == [n for _, n in pieces], "a result is not the number of bytes")
        _expect_pieces(file, pieces, memory)


def check_writes_land_where_they_belong(engine: Engine, folder: Path) -> None:
    """`run` writes the bytes of each request, and no other byte of the file changes."""
    with _opened(folder, 1 << 20) as (file,):
        source = np.frombuffer(np.random.default_rng(2).bytes(1 << 19), np.uint8)
        memory = _memory(len(source))
        memory[:] = source
        wanted = file.before.copy()
        requests = []
        for number in range(200):
            nbytes = 1 + number * 13 % 2000
            offset = number * 5000
            start = number * 2048
            wanted[offset : offset + nbytes] = source[start : start + nbytes]
            requests.append(Request(file.fd, offset, memory.ctypes.data + start, nbytes, True))
        results = engine.run(requests)
        expect(results == [each.nbytes for each in requests], "a result is not the number of bytes")
        expect(np.array_equal(file.content(), wanted), "the file does not hold what was written")
        expect(np.array_equal(memory, source), "the memory that was written from changed")


def check_each_end_is_reported_once_in_the_calling_thread(engine: Engine, folder: Path) -> None:
    """`ended` gets the number and the result of each request once, in the thread that called
    `run`, before `run` returns."""
    with _opened(folder, 1 << 18) as (file,):
        pieces = _pieces(300, 1 << 18, 3)
        memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
        ends: list[tuple[int, int]] = []
        threads: set[int] = set()

        def ended(number: int, result: int) -> None:
            ends.append((number, result))
            threads.add(threading.get_ident())

        results = engine.run(_reads(file.fd, pieces, memory), ended)
        expect(sorted(ends) == list(enumerate(results)), "the reported ends are not the results")
        expect(threads == {threading.get_ident()}, "an end was reported in another thread")
        _expect_pieces(file, pieces, memory)


def check_bytes_are_there_when_their_end_is_reported(engine: Engine, folder: Path) -> None:
    """A request's bytes are in memory when its end is reported."""
    with _opened(folder, 1 << 18) as (file,):
        pieces = _pieces(200, 1 << 18, 4)
        memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
        requests = _reads(file.fd, pieces, memory)
        late: list[int] = []

        def ended(number: int, result: int) -> None:
            start = requests[number].address - memory.ctypes.data
            offset, nbytes = pieces[number]
            landed = memory[start : start + nbytes]
            if not np.array_equal(landed, file.before[offset : offset + nbytes]):
                late.append(number)

        engine.run(requests, ended)
        expect(not late, f"{len(late)} ends were reported before the bytes were there")


def check_a_fault_concerns_its_request_alone(engine: Engine, folder: Path) -> None:
    """A request that fails returns a negative errno; the others of the call are moved.

    The errno of a read past the end of the file says that the bytes will not come.
    """
    with _opened(folder, 1 << 16) as (file,):
        closed = os.dup(file.fd)
        os.close(closed)
        pieces = [(PAGE * n, 1000 + n) for n in range(9)]
        memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
        requests = _reads(file.fd, pieces, memory)
        spare = _memory(2 * PAGE)
        short = Request(file.fd, (1 << 16) - 10, spare.ctypes.data, 100, False)
        broken = Request(closed, 0, spare.ctypes.data + PAGE, 100, False)
        results = engine.run([*requests[:4], short, broken, *requests[4:]])
        good = results[:4] + results[6:]
        expect(good == [n for _, n in pieces], "a good request did not end with its bytes")
        expect(-results[4] in LOST, f"a read past the end of the file gave {results[4]}")
        expect(results[5] == -errno.EBADF, f"a read of a closed file gave {results[5]}")
        _expect_pieces(file, pieces, memory)


def check_an_error_of_the_caller_waits_for_the_end(engine: Engine, folder: Path) -> None:
    """`run` raises the error of `ended` after no request uses memory any more."""

    class Stop(Exception):
        pass

    with _opened(folder, 1 << 18) as (file,):
        pieces = _pieces(100, 1 << 18, 5)
        memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
        calls = []

        def ended(number: int, result: int) -> None:
            calls.append(number)
            raise Stop

        try:
            engine.run(_reads(file.fd, pieces, memory), ended)
        except Stop:
            memory[:] = 0x3C
        else:
            expect(False, "what the caller's function raised was lost")
        other = _memory(1 << 18)
        engine.run(_reads(file.fd, pieces[:20], other))
        expect(bool((memory == 0x3C).all()), "memory was written after `run` raised")


def check_threads_share_an_engine(engine: Engine, folder: Path) -> None:
    """Any number of threads may call `run` together."""
    with _opened(folder, 1 << 18) as (file,):

        def work(seed: int) -> None:
            pieces = _pieces(120, 1 << 18, seed)
            memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
            for _ in range(3):
                results = engine.run(_reads(file.fd, pieces, memory))
                expect(results == [n for _, n in pieces], "a result is wrong")
                _expect_pieces(file, pieces, memory)

        run_threads(work, range(6, 14))


def check_unaligned_requests_of_direct_files(engine: Engine, folder: Path) -> None:
    """A file that was opened with O_DIRECT takes requests of any alignment."""
    with _opened(folder, 1 << 16) as (file,):
        try:
            fd = os.open(file.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return  # this filesystem has no O_DIRECT
        try:
            pieces = [(0, PAGE), (1, 999), (PAGE + 7, 2 * PAGE), (8 * PAGE, 512)]
            memory = _memory(sum(n + GUARD for _, n in pieces) + GUARD)
            results = engine.run(_reads(fd, pieces, memory))
            expect(results == [n for _, n in pieces], f"results are {results}")
            _expect_pieces(file, pieces, memory)
        finally:
            os.close(fd)


def check_no_requests(engine: Engine, folder: Path) -> None:
    """`run` without requests returns an empty list and reports nothing."""
    ends: list[int] = []
    expect(engine.run([]) == [], "no requests had results")
    expect(engine.run([], lambda number, result: ends.append(number)) == [], "results")
    expect(not ends, "an end was reported")


def check_a_closed_engine_moves_nothing(engine: Engine, folder: Path) -> None:
    """After `close`, every request is cancelled and moves nothing; `close` may be called again."""
    with _opened(folder, 1 << 16) as (file,):
        pieces = [(0, 100), (PAGE, 200)]
        memory = _memory(4 * PAGE)
        engine.run(_reads(file.fd, pieces, memory))
        engine.close()
        engine.close()
        memory[:] = _GUARD_BYTE
        ends: list[tuple[int, int]] = []
        requests = _reads(file.fd, pieces, memory)
        results = engine.run(requests, lambda number, result: ends.append((number, result)))
        expect(results == [-errno.ECANCELED] * 2, f"results are {results}")
        expect(sorted(ends) == list(enumerate(results)), "the reported ends are not the results")
        expect(bool((memory == _GUARD_BYTE).all()), "bytes moved after `close`")


def check_the_engine_says_what_it_is(engine: Engine, folder: Path) -> None:
    """`name` is a text, and `notes` are sentences on what the engine does without."""
    expect(isinstance(engine.name, str) and bool(engine.name), f"its name is {engine.name!r}")
    notes = engine.notes
    texts = isinstance(notes, tuple) and all(isinstance(note, str) for note in notes)
    expect(texts, f"its notes are {notes!r}")
