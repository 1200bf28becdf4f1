# SPDX-License-Identifier: Apache-2.0
"""What is left of a shared pool when one of its processes is killed."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from support.pool_processes import SIZE, Child, holder, unused_name

from portakv.errors import SlotError
from portakv.host import _shared_file, _shared_members
from portakv.host._shared_members import FileLocks
from portakv.host.pinned import HostMemoryError
from portakv.host.shared import PoolExhausted, SharedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


name = pytest.fixture(unused_name)


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
        for block in (mine, *rest):
            block.release()


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
        blocks = [pool.acquire() for _ in range(2)]
        for block in blocks:
            block.release()


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
    monkeypatch.setattr(_shared_members, "_PATIENCE", 0.05)
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
        with pytest.raises(SlotError, match=r"0 \.\. 1"):
            pool.adopt(2)
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
        blocks = [pool.acquire() for _ in range(2)]
        for block in blocks:
            block.release()


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
        monkeypatch.setattr(_shared_members, "_space", lambda: -1)
        monkeypatch.setattr(_shared_members, "_GRACE", 0.1)
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
        time.sleep(0.3)
        children[0].kill()
        time.sleep(0.1)
        children[1].kill()
        time.sleep(0.3)
        assert [child.end() for child in children[2:]] == [0, 0]
        pool.reclaim()
        assert pool.free == 3
        assert 2 <= pool.high_water <= 3


def test_locks_are_the_kernel_s(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    first = FileLocks(os.open(path, os.O_RDWR))
    second = FileLocks(os.open(path, os.O_RDWR))
    assert first.take(3)
    assert not second.take(3)
    assert second.taken(3)
    assert not second.taken(2)
    first.close()
    first.close()
    assert second.take(3)
    second.close()


def test_a_process_whose_lock_is_gone_and_that_lives_on_is_spared(name: str) -> None:
    """The kernel closes a dying process's files in turn: its device may be the last."""

    def work(pipe: Connection) -> None:
        pool = SharedPool(name)
        pool.acquire()
        pool._file.locks.give(1 + pool._file.members.me)
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
        table: Any = other._file.members._table
        table["pid"][other._file.members.me] = 2**40  # no process
        with other.acquire():
            assert pool.reclaim() == []
