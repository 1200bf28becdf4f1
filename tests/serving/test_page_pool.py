# SPDX-License-Identifier: Apache-2.0
"""Pages of a pool, by calls that wait: right bytes or a miss, whatever happens to the store."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from support import ready
from support.held_bucket import HeldBucket, TermsWith
from support.page_faults import DAMAGE, FAILURES, FaultyDisk
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms
from portakv.serving import PageStore, StoreTerms
from portakv.serving.pages import MOST_RUNS, PagePool
from portakv.storage.tiers import disk as disk_store

PIECES = [512, 256, 64]
GAP = 32  # bytes between two pieces
STRIDE = sum(PIECES) + GAP * len(PIECES)
COUNT = 12
KEYS = [bytes([number]) * 32 for number in range(1, COUNT + 1)]
ROOM: dict[str, Any] = {"host": 0, "staging": 1 << 20, "capacity": 4 << 20}


class Memory:
    """Pages with gaps between their pieces."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.bytes: npt.NDArray[np.uint8] = draw.integers(0, 256, (COUNT, STRIDE), np.uint8)
        self.before = self.bytes.copy()
        self._starts = np.cumsum([0, *(size + GAP for size in PIECES[:-1])])

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        first = self.bytes.ctypes.data + np.arange(COUNT, dtype=np.int64)[:, None] * STRIDE
        result: npt.NDArray[np.int64] = first + self._starts
        return result

    def pages(self) -> list[bytes]:
        spans = [slice(at, at + n) for at, n in zip(self._starts, PIECES, strict=True)]
        return [b"".join(row[span].tobytes() for span in spans) for row in self.bytes]

    def gaps_are_untouched(self) -> bool:
        mask = np.ones(STRIDE, np.bool_)
        for at, size in zip(self._starts, PIECES, strict=True):
            mask[at : at + size] = False
        return bool((self.bytes[:, mask] == self.before[:, mask]).all())


def opened(terms: StoreTerms, *pools: PagePool) -> PageStore:
    store = PageStore(terms, "model", [*dict.fromkeys(pool.size for pool in pools)])
    for pool in pools:
        pool.open(store)
    return store


def terms_of(folder: Path, **more: Any) -> StoreTerms:
    return StoreTerms(folder=str(folder / "kv"), **ROOM | more)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(PIECES, b"pool")


@pytest.fixture
def store(tmp_path: Path, pool: PagePool) -> Iterator[PageStore]:
    with opened(terms_of(tmp_path), pool) as made:
        yield made


def right_or_missing(pool: PagePool, source: Memory) -> list[bool]:
    """Load all pages, and check those that came; return which have come."""
    target = Memory(99)
    landed: list[bool] = pool.load(KEYS, target.addresses).tolist()
    assert target.gaps_are_untouched()
    for number, there in enumerate(landed):
        right = source.pages() if there else Memory(99).pages()
        assert target.pages()[number] == right[number], f"page {number}, landed: {there}"
    return landed


def test_pieces_of_any_lengths(pool: PagePool, store: PageStore) -> None:
    source = Memory(1)
    assert pool.size == (832, 13)
    assert pool.lookup(KEYS) == 0
    assert pool.save(KEYS, source.addresses).all()
    assert pool.lookup(KEYS) == COUNT
    assert pool.holds([KEYS[3], b"other" * 8]).tolist() == [True, False]
    assert all(right_or_missing(pool, source))
    assert pool.load([], np.zeros((0, 3))).tolist() == []


def test_what_can_be_restored(pool: PagePool, store: PageStore) -> None:
    """Pages 0, 1, 3 and 4 are there: all pages, or the last two, of each number of leading ones."""
    there = [KEYS[number] for number in (0, 1, 3, 4)]
    assert pool.save(there, Memory(1).addresses[[0, 1, 3, 4]]).all()
    keys = KEYS[:6]
    assert pool.restorable(keys).tolist() == [True, True, False, False, False, False]
    assert pool.restorable(keys, 1).tolist() == [True, True, False, True, True, False]
    assert pool.restorable(keys, 2).tolist() == [True, True, False, False, True, False]
    assert pool.restorable(keys, 9).tolist() == [True, True, False, False, False, False]
    assert pool.restorable([], 2).tolist() == []


def test_pieces_that_lie_one_after_the_other(pool: PagePool, store: PageStore) -> None:
    """What one has in pieces another one reads as a whole."""
    source = Memory(1)
    assert pool.save(KEYS, source.addresses).all()
    whole = np.zeros((COUNT, sum(PIECES)), np.uint8)
    rows = whole.ctypes.data + np.arange(COUNT)[:, None] * whole.strides[0]
    assert pool.load(KEYS, rows).all()
    assert [row.tobytes() for row in whole] == source.pages()


def test_pools_with_equal_keys_are_apart(tmp_path: Path) -> None:
    one = PagePool(PIECES, b"one")
    other = PagePool(PIECES, b"other")
    with opened(terms_of(tmp_path), one, other):
        assert one.save(KEYS, Memory(1).addresses).all()
        assert other.lookup(KEYS) == 0
        assert other.save(KEYS, Memory(2).addresses).all()
        assert all(right_or_missing(one, Memory(1)))
        assert all(right_or_missing(other, Memory(2)))


def test_a_page_outlives_the_pages_that_follow_it(tmp_path: Path, pool: PagePool) -> None:
    """With space for half of them, the first half stays, which a lookup can use."""
    size = pool.size.form("model").image_bytes
    with opened(terms_of(tmp_path, capacity=COUNT // 2 * size), pool):
        half = COUNT // 2
        source = Memory(1)
        pool.save(KEYS[:half], source.addresses[:half])
        pool.save(KEYS[half:], source.addresses[half:], after=KEYS[half - 1])
        assert pool.lookup(KEYS) == half
        assert right_or_missing(pool, source) == [True] * half + [False] * half


def test_without_a_store_all_is_missing(pool: PagePool) -> None:
    source = Memory(1)
    assert pool.lookup(KEYS) == 0
    assert not pool.holds(KEYS).any()
    assert not pool.save(KEYS, source.addresses).any()
    assert not any(right_or_missing(pool, source))


@pytest.mark.parametrize("pieces", [[], [0], [64, -1], ["x"], None, [MOST_RUNS + 1, 1]])
def test_what_are_no_pieces(pieces: Any) -> None:
    with pytest.raises(InvalidTerms, match="pieces"):
        PagePool(pieces)


def test_what_are_no_addresses(pool: PagePool, store: PageStore) -> None:
    with pytest.raises(InvalidTerms, match="addresses"):
        pool.save(KEYS, np.zeros((COUNT, 2)))
    with pytest.raises(InvalidTerms, match="addresses"):
        pool.load(KEYS, np.zeros(COUNT))


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("guard", [True, False], ids=["checked", "not checked"])
def test_damaged_pages(
    damage: Callable[..., None],
    guard: bool,
    tmp_path: Path,
    pool: PagePool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is a miss, and is stored again. Without the check some pages are wrong."""
    source = Memory(1)
    with opened(terms_of(tmp_path), pool):
        assert pool.save(KEYS, source.addresses).all()
    damage(tmp_path / "kv", pool.size.nbytes)
    if not guard:
        if damage is DAMAGE["a cut file"]:
            pytest.skip("what a read does not return cannot be believed")
        monkeypatch.setattr(disk_store, "verifies", lambda _: False)
        monkeypatch.setattr(disk_store, "verify", lambda *_: True)
        monkeypatch.setattr(disk_store, "header", lambda *_: mock.ANY)
    with opened(terms_of(tmp_path), pool):
        if not guard:
            with pytest.raises(AssertionError, match="page"):
                right_or_missing(pool, source)
            return
        assert not all(right_or_missing(pool, source))
        pool.save(KEYS, source.addresses)
        assert all(right_or_missing(pool, source))


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("call", ["save", "load"])
def test_a_disk_that_fails(
    code: int, call: str, tmp_path: Path, pool: PagePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call returns, and its pages are missing; the store goes on after that."""
    disk = FaultyDisk(monkeypatch)
    source = Memory(1)
    if call == "load":
        with opened(terms_of(tmp_path), pool):
            assert pool.save(KEYS, source.addresses).all()
    with opened(terms_of(tmp_path, deadline=0.5), pool), disk.failing(code):
        if call == "save":
            assert not pool.save(KEYS, source.addresses).any()
            source.bytes[:] = 7  # the memory is the caller's again
        else:
            assert not any(right_or_missing(pool, source))
        disk.mend()
        source = Memory(1)
        assert until(lambda: pool.save(KEYS, source.addresses).all(), LIMIT)
        assert until(lambda: all(right_or_missing(pool, source)), LIMIT)


@pytest.mark.parametrize("call", ["save", "load", "lookup"])
def test_a_bucket_that_hangs(call: str, pool: PagePool) -> None:
    bucket = HeldBucket()
    room: dict[str, Any] = {"host": 0, "staging": 1 << 20}
    source = Memory(1)
    with opened(TermsWith.a_bucket(bucket, **room), pool):
        assert pool.save(KEYS, source.addresses).all()
    with opened(TermsWith.a_bucket(bucket, deadline=0.3, **room), pool):
        bucket.hold()
        try:
            if call == "load":
                assert not any(right_or_missing(pool, source))
            elif call == "save":
                assert not pool.save([key[::-1] + b"x" for key in KEYS], source.addresses).any()
            else:
                assert pool.lookup([b"other" * 8]) == 0
        finally:
            bucket.release()


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from serving.test_page_pool import KEYS, Memory, PIECES, opened, terms_of
from pathlib import Path
from portakv.serving.pages import PagePool

pool = PagePool(PIECES, b"pool")
opened(terms_of(Path({folder!r})), pool)
source = Memory(1)
pool.save(KEYS[:4], source.addresses[:4])
print("stored", flush=True)
while True:
    for number in range(4, len(KEYS)):
        pool.save([KEYS[number]], source.addresses[number : number + 1], after=KEYS[number - 1])
"""


def test_kill_9_in_the_middle_of_saves(tmp_path: Path, pool: PagePool) -> None:
    """Another process has the pages that were stored, and the others are right or missing."""
    tests = str(Path(__file__).parents[1])
    code = textwrap.dedent(KILLED).format(tests=tests, folder=str(tmp_path))
    with ready.Python("-c", code, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stored\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    with opened(terms_of(tmp_path), pool):
        assert right_or_missing(pool, Memory(1))[:4] == [True] * 4


def test_calls_of_several_threads(pool: PagePool, store: PageStore) -> None:
    """They save, look up and load the same pages together."""
    source = Memory(1)
    failed = list[BaseException]()

    def work() -> None:
        try:
            for _ in range(20):
                pool.save(KEYS, source.addresses)
                pool.lookup(KEYS)
                right_or_missing(pool, source)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(right_or_missing(pool, source))
