# SPDX-License-Identifier: Apache-2.0
"""The pool that processes share by name, and what is left of it when one of them is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from support.guarded_memory import refused
from support.pool_processes import SIZE, Child, holder, unused_name

from portakv.errors import SlotError
from portakv.host import _shared_file, shared
from portakv.host.pinned import HostMemoryError
from portakv.host.shared import PoolExhausted, SharedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The shared pool .* was closed with:ResourceWarning"),
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
        pids: Any = pool._file.members["pid"]
        dead = np.flatnonzero(pids == 0)
        pids[dead] = 2**40  # no process
        pool._file.members["space"][dead] = _shared_file._space()
        with SharedPool(name):
            assert np.count_nonzero(pids) == 2
        monkeypatch.setattr(_shared_file.SharedFile, "_take_place", lambda *_: False)
        with pytest.raises(HostMemoryError, match="one process more than the 128"):
            SharedPool(name)


# When one of the processes dies


def test_blocks_of_a_killed_process_are_taken_back_when_needed(name: str) -> None:
    with SharedPool(name, SIZE, 4) as pool:
        child = holder(name, 3, 1)
        child.told()
        pool.acquire().release()
        mine = pool.acquire("mine")
        with pytest.raises(PoolExhausted, match=r"holder \(\d+\): 3"):
            pool.acquire()
        child.kill()
        rest = [pool.acquire() for _ in range(3)]
        assert len({mine.index, *(block.index for block in rest)}) == 4


def test_reclaim_names_the_dead_and_spares_the_living(name: str) -> None:
    with SharedPool(name, SIZE, 4) as pool:
        dead, living = holder(name, 1, 1), holder(name, 2, 2)
        dead.told()
        living.told()
        assert pool.reclaim() == []
        dead.kill()
        (told,) = pool.reclaim()
        assert f"holder ({dead.pid}): 1 blocks" in told
        assert pool.free == 2
        assert pool.reclaim() == []
        assert living.end() == 0


def test_a_process_killed_while_it_changes_the_tables(name: str) -> None:
    def work(pipe: Connection) -> None:
        pool = SharedPool(name)
        with pool._file.locks.exclusive():
            pool._file.assign(0)
            pipe.send("inside")
            pipe.recv()

    with SharedPool(name, SIZE, 2) as pool:
        child = Child(work)
        child.told()
        assert pool._file.locks.taken(0)
        child.kill()
        for _ in range(2):
            pool.acquire()


def test_a_process_killed_while_it_makes_the_file(name: str) -> None:
    path = _shared_file._path(name)
    path.write_bytes(bytes(5000))  # all but the word that is written last
    path.chmod(0o600)
    with SharedPool(name, SIZE, 2) as pool:
        pool.acquire().release()
        with pytest.raises(HostMemoryError, match="there is none"):
            SharedPool(name + "x")
    path.write_bytes(bytes(10))
    with pytest.raises(HostMemoryError, match="there is none"):
        SharedPool(name)


def test_one_that_lives_and_holds_the_tables_is_told_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shared_file, "_PATIENCE", 0.05)
    with SharedPool(name, SIZE, 1) as pool, SharedPool(name) as other:
        with other._file.locks.exclusive(), pytest.raises(HostMemoryError, match="may be stopped"):
            pool.acquire()
        pool.acquire().release()


def test_a_block_that_is_adopted_outlives_its_maker(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        child = holder(name, 1, 9)
        ((index, generation),) = child.told()
        block = pool.adopt(index, generation)
        child.kill()
        assert pool.reclaim() != []
        assert pool.free == 1
        assert bool((block.tensor == 9).all())
        block.release()
        with pytest.raises(HostMemoryError, match="nobody has it"):
            pool.adopt(index)
        with pool.acquire(), pytest.raises(HostMemoryError, match="somebody else by now"):
            pool.adopt(index, generation)


def test_left_behind_by_the_last_that_was_killed(name: str) -> None:
    def work(pipe: Connection) -> None:
        pool = SharedPool(name, SIZE, 2)
        pool.acquire()
        pipe.send("made")
        pipe.recv()

    child = Child(work)
    child.told()
    child.kill()
    with SharedPool(name, SIZE, 2) as pool:
        for _ in range(2):
            pool.acquire()


def test_a_forked_child_opens_it_again(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        block = pool.acquire()

        def work(pipe: Connection) -> None:
            for call in (pool.acquire, block.release, pool.reclaim):
                with pytest.raises(HostMemoryError, match="forked from it"):
                    call()
            pool.close()
            with SharedPool(name) as own:
                pipe.send(own.reclaim() + own.leaks())
                pipe.recv()

        child = Child(work)
        (leak,) = child.told()
        assert str(os.getpid()) in leak
        assert child.end() == 0
        assert pool.free == 1
        block.release()


def test_a_child_does_not_keep_its_parent_s_locks(name: str) -> None:
    """Killed, the opener is seen to be dead although a process forked from it lives on."""

    def work(pipe: Connection) -> None:
        pool = SharedPool(name)
        pool.acquire()
        grandchild = os.fork()
        if grandchild == 0:
            time.sleep(60)
            os._exit(0)
        pipe.send(grandchild)
        pipe.recv()

    with SharedPool(name, SIZE, 1) as pool:
        child = Child(work)
        grandchild = child.told()
        child.kill()
        try:
            pool.acquire().release()
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_the_dead_of_another_container_are_buried_later(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SharedPool(name, SIZE, 1) as pool:
        child = holder(name, 1, 1)
        child.told()
        monkeypatch.setattr(_shared_file, "_space", lambda: -1)
        monkeypatch.setattr(_shared_file, "_GRACE", 0.1)
        assert pool.reclaim() == []
        child.kill()
        assert pool.reclaim() == []  # its device may still write
        time.sleep(0.15)
        assert len(pool.reclaim()) == 1


def test_processes_never_share_a_block_even_when_some_are_killed(name: str) -> None:
    def work(pipe: Connection) -> None:
        pool = SharedPool(name)
        pipe.send("ready")
        number = os.getpid() % 251
        while not pipe.poll():
            with pool.acquire(wait=True, timeout=60) as block:
                block.tensor.fill_(number)
                if not bool((block.tensor == number).all()):
                    raise AssertionError("another process wrote into the block")

    with SharedPool(name, 64, 3) as pool:
        children = [Child(work) for _ in range(4)]
        for child in children:
            child.told()
        time.sleep(0.15)
        children[0].kill()
        time.sleep(0.05)
        children[1].kill()
        time.sleep(0.15)
        assert [child.end() for child in children[2:]] == [0, 0]
        pool.reclaim()
        assert pool.free == 3
        assert 2 <= pool.high_water <= 3


def test_a_process_whose_lock_is_gone_and_that_lives_on_is_spared(name: str) -> None:
    """The kernel closes a dying process's files in turn: its device may be the last."""

    def work(pipe: Connection) -> None:
        pool = SharedPool(name)
        pool.acquire()
        pool._file.locks.give(1 + pool._file.me)
        pipe.send("given")
        pipe.recv()

    with SharedPool(name, SIZE, 1) as pool:
        child = Child(work)
        child.told()
        assert pool.reclaim() == []
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody reaped
        assert len(pool.reclaim()) == 1
        os.waitpid(child.pid, 0)


def test_a_lock_that_is_held_tells_of_life_whatever_the_numbers_say(name: str) -> None:
    with SharedPool(name, SIZE, 1) as pool, SharedPool(name) as other:
        other._file.members["pid"][other._file.me] = 2**40  # no process
        with other.acquire():
            assert pool.reclaim() == []
