# SPDX-License-Identifier: Apache-2.0
"""The pool that processes share by name."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import numpy as np
import pytest
from support.guarded_memory import refused
from support.pool_processes import SIZE, holder, unused_name

from portakv.errors import SlotError
from portakv.host import _shared_file, _shared_members, shared
from portakv.host.pinned import HostMemoryError
from portakv.host.shared import PoolExhausted, SharedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


name = pytest.fixture(unused_name)


def test_the_same_bytes_under_one_name(name: str) -> None:
    with SharedPool(name, SIZE, 3, label="a") as first, SharedPool(name) as second:
        assert (second.block_bytes, second.blocks) == (SIZE, 3)
        block = first.acquire()
        assert block.address % 64 == 0
        assert block.nbytes == SIZE
        block.tensor.fill_(5)
        assert bool((second.bytes_of(block.index) == 5).all())
        assert second.free == 2
        others = [second.acquire() for _ in range(2)]
        assert {block.index, *(other.index for other in others)} == {0, 1, 2}
        for one in (block, *others):
            one.release()
        assert first.high_water == 3
        assert shared.names().count(name) == 1


def test_another_process_reads_what_was_written(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        child = holder(name, 1, 77)
        ((index, _),) = child.told()
        assert bool((pool.bytes_of(index) == 77).all())
        assert pool.free == 1
        assert "holder" in pool.leaks()[0]
        assert "for offload" in pool.leaks()[0]
        assert child.end() == 0
        assert pool.free == 2
        assert pool.leaks() == []


def test_who_gave_a_block_away_cannot_release_it(name: str) -> None:
    with SharedPool(name, SIZE, 1) as giver, SharedPool(name) as taker:
        given = giver.acquire()
        taken = taker.adopt(given.index)
        with pytest.raises(HostMemoryError, match="adopted"):
            given.release()
        assert giver.free == 0
        taken.release()
        assert giver.free == 1


def test_waiting_for_another_process(name: str) -> None:
    with SharedPool(name, SIZE, 1) as pool, SharedPool(name) as other:
        block = other.acquire()
        with pytest.raises(PoolExhausted, match=r"within 0.05 s"):
            pool.acquire(wait=True, timeout=0.05)
        timer = threading.Timer(0.05, block.release)
        timer.start()
        pool.acquire(wait=True, timeout=30).release()
        timer.join()


def test_released_twice_or_elsewhere(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool, SharedPool(name) as other:
        block = pool.acquire()
        with pytest.raises(HostMemoryError, match="another pool"):
            other.release(block)
        block.release()
        with pool.acquire(), pytest.raises(HostMemoryError, match="released twice"):
            block.release()


def test_release_waits_for_the_work(name: str) -> None:
    class Work:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

    work = Work()
    with SharedPool(name, SIZE, 1) as pool:
        pool.acquire().release(after=work)
    assert work.waited == 1


def test_closed_with_blocks_out(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        other = SharedPool(name)
        block = other.acquire()
        tensor = block.tensor
        with pytest.warns(ResourceWarning, match="closed with blocks 0 out"):
            other.close()
        other.close()
        assert pool.free == 2
        tensor.fill_(1)  # still its memory
        for call in (other.acquire, other.reclaim, lambda: other.free, lambda: other.high_water):
            with pytest.raises(HostMemoryError, match="after it was closed"):
                call()


def test_a_pool_that_nobody_closed_leaves_nothing(name: str) -> None:
    pool = SharedPool(name, SIZE, 2)
    del pool
    assert name not in shared.names()
    pool = SharedPool(name, SIZE, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.close()
        pool.close()


def test_kept_and_removed(name: str) -> None:
    with SharedPool(name, SIZE, 1, keep=True) as pool, pool.acquire() as block:
        block.tensor.fill_(8)
    with SharedPool(name, keep=True) as pool:
        assert bool((pool.bytes_of(0) == 8).all())
    shared.remove(name)
    with pytest.raises(HostMemoryError, match="there is none"):
        shared.remove(name)


def test_another_size_or_name(name: str) -> None:
    with SharedPool(name, SIZE, 2):
        for size, count in ((SIZE + 1, 2), (SIZE, 3)):
            with pytest.raises(HostMemoryError, match="ask for the same"):
                SharedPool(name, size, count)
        with pytest.raises(HostMemoryError, match="say both"):
            SharedPool(name, SIZE)
    for bad in ("", "a/b", "a b", "x" * 201):
        with pytest.raises(HostMemoryError, match="was named"):
            SharedPool(bad, SIZE, 2)
    with pytest.raises(HostMemoryError, match="power of two"):
        SharedPool(name, SIZE, 0)
    wrong: Any
    for wrong in (lambda: SharedPool(3), lambda: shared.remove(3)):  # type: ignore[arg-type]
        with refused(HostMemoryError, "3", "letters"):
            wrong()
    with pytest.raises(HostMemoryError, match="has room for"):
        SharedPool(name, 1 << 40, 100)  # and leaves nothing


def test_arguments_that_mean_nothing(name: str) -> None:
    wrong: Any
    with SharedPool(name, 64, 1) as pool:
        with refused(HostMemoryError, "str", "release a Block"):
            pool.release("x")  # type: ignore[arg-type]
        for wrong in ("x", 1.5, -1, 1):
            for call in (pool.bytes_of, pool.adopt):
                with refused(SlotError, repr(wrong), "0 .. 0"):
                    call(wrong)
        with pool.acquire(owner=7) as taken:  # type: ignore[arg-type]
            assert "for 7" in pool.leaks()[0]
            assert taken.index == 0


def test_somebody_else_s_file(name: str) -> None:
    path = _shared_file._path(name)
    path.touch()
    path.chmod(0o666)
    with pytest.raises(HostMemoryError, match="others may write"):
        SharedPool(name, SIZE, 2)
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(HostMemoryError, match="cannot be opened"):
        SharedPool(name, SIZE, 2)
    path.unlink()
    path.write_bytes(b"x" * 100)
    path.chmod(0o600)
    with pytest.raises(HostMemoryError, match="another release"):
        SharedPool(name, SIZE, 2)
    path.unlink()


def test_one_process_more_than_there_is_room_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SharedPool(name, SIZE, 1) as pool:
        pids: Any = pool._file.members._table["pid"]
        dead = np.flatnonzero(pids == 0)
        pids[dead] = 2**40  # no process
        pool._file.members._table["space"][dead] = _shared_members._space()
        with SharedPool(name):
            assert len(pool._file.members.attached()) == 2
        monkeypatch.setattr(_shared_members.Members, "join", lambda *_: False)
        with pytest.raises(HostMemoryError, match="one process more than the 128"):
            SharedPool(name)
