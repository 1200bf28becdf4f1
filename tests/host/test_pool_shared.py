# SPDX-License-Identifier: Apache-2.0
"""The pool that processes share by name, and what is left of it when one of them is killed."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import ready
from support.guarded_memory import refused
from support.pinned_runtime import absent
from support.pool_processes import SIZE, Child, Opener, holder, unused_name
from support.waits import LIMIT

from portakv.host import _pages, shared
from portakv.host.pinned import HostMemoryError
from portakv.host.pool import Block
from portakv.host.shared import PoolExhausted, SharedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Expected pinned host memory"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Blocks were in use:ResourceWarning"),
]

FOLDER = Path("/dev/shm")
name = pytest.fixture(unused_name)


def test_another_process_reads_what_was_written(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        child = holder(name, 1, 77)
        ((index, _),) = child.blocks
        assert bool((pool.bytes_of(index) == 77).all())
        with pool.acquire() as block:
            assert {index, block.index} == {0, 1}
            assert (pool.free, pool.high_water) == (0, 2)
        (leak,) = pool.leaks()
        assert leak.startswith(f"block {index}: holder ({child.pid}), for offload, ")
        assert child.end() == 0
        assert pool.free == 2
        assert pool.leaks() == []


def test_one_opening_waits_for_another_and_cannot_release_what_that_has(name: str) -> None:
    with SharedPool(name, SIZE, 1) as giver, SharedPool(name) as taker:
        assert (taker.block_bytes, taker.blocks, shared.names().count(name)) == (SIZE, 1, 1)
        threading.Timer(0.05, giver.acquire().release).start()
        handed_over = taker.acquire(wait=True, timeout=LIMIT)
        taken = giver.adopt(handed_over.index)
        with pytest.raises(HostMemoryError, match="adopted"):
            handed_over.release()
        assert taker.free == 0
        again = giver.adopt(taken.index)  # a second time by one that has it: one lease remains
        with pytest.raises(HostMemoryError, match="released twice"):
            taken.release()
        again.release()
        assert taker.free == 1


def test_closed_with_blocks_out(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        other = SharedPool(name)
        block = other.acquire("decode")
        with pytest.warns(ResourceWarning, match=r"closed. In use:\n  block 0.*for decode, "):
            other.close()
        assert (pool.free, block.in_use, name in shared.names()) == (2, False, True)
        for call in (other.acquire, other.reclaim, lambda: other.free, lambda: other.high_water):
            with pytest.raises(HostMemoryError, match="after it was closed"):
                call()


def test_a_pool_left_open_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that was never made say anything."""
    SharedPool(name, SIZE, 2)
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with pytest.raises(TypeError, match="block_byte"):
        SharedPool(name, block_byte=3)  # type: ignore[call-arg]
    absent(monkeypatch)
    with pytest.raises(HostMemoryError, match="fallback=True"):
        SharedPool(name, SIZE, 2, fallback=False)
    assert raised == []


EXIT = """
import sys, warnings
warnings.simplefilter("ignore")
from portakv.host.shared import SharedPool
name, kept = sys.argv[1], []
pools = [SharedPool(f"{name}{nth}", 64, 1) for nth in range(8)]
pools[3]._end = lambda: 1 / 0
for nth in range(8):
    try:
        SharedPool(name)
    except Exception as error:
        kept.append(error)
"""


def test_an_exit_leaves_every_pool_though_one_fails_and_others_never_opened(name: str) -> None:
    done = ready.run("-c", EXIT, name, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "AttributeError" not in done.stderr
    assert [each for each in shared.names() if each.startswith(name)] == [f"{name}3"]
    shared.remove(f"{name}3")


def test_kept_and_removed(name: str) -> None:
    with SharedPool(name, SIZE, 1, keep=True) as pool, pool.acquire() as block:
        block.tensor.fill_(8)
    with SharedPool(name) as pool:
        assert bool((pool.bytes_of(0) == 8).all())
        shared.remove(name)
        with SharedPool(name, SIZE, 2):
            pool.close()  # removes no other file, which has its name by now
            assert name in shared.names()
    for bad, words in ((name, "got none"), (3, "letters")):
        with pytest.raises(HostMemoryError, match=words):
            shared.remove(bad)  # type: ignore[arg-type]


def test_owners_that_are_numbers_and_work_that_goes_on(name: str) -> None:
    with SharedPool(name, 64, 1) as pool:
        block = pool.acquire(owner=7)  # type: ignore[arg-type]
        taken = []
        assert "for 7" in pool.leaks()[0]

        def meanwhile() -> None:  # as another thread may, while this one waits for the work
            assert pool.free == 0
            block.release()
            taken.append(pool.acquire())

        with refused(HostMemoryError, "released twice"):
            block.release(after=SimpleNamespace(synchronize=meanwhile))
        assert taken[0].in_use
        assert pool.free == 0


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"", 0o666, "others may write"),
        (b"x" * 100, 0o600, "another release"),
        ("a link", 0, "cannot be opened"),
    ],
)
def test_somebody_else_s_file(name: str, content: Any, mode: int, words: str) -> None:
    path = FOLDER / f"portakv-{name}"
    if content == "a link":
        path.symlink_to("/dev/null")
    else:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(HostMemoryError, match=words):
        SharedPool(name, SIZE, 2)
    path.unlink()


def test_there_is_room_for_128_and_for_one_in_the_place_of_the_dead(name: str) -> None:
    def fill(pool: SharedPool) -> list[Block]:
        others.extend(SharedPool(name) for _ in range(127))
        return [pool.acquire()]

    others: list[SharedPool] = []
    child = Opener(fill, name, SIZE, 1)
    with pytest.raises(HostMemoryError, match="at most 128 processes"):
        SharedPool(name)
    child.kill()
    with SharedPool(name) as pool:  # the last process left it
        assert pool.reclaim() == []
        others += [SharedPool(name) for _ in range(127)]
        others.clear()
        pool.acquire()


def test_tables_of_many_blocks_count_in_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 bytes for each block are more than a numpy type may have."""
    monkeypatch.setattr(_pages, "available", lambda: 1 << 31)
    with refused(HostMemoryError, f"{(1 << 31) * 128 + 12288} bytes for a shared pool"):
        SharedPool(name, 64, 1 << 31)


def test_a_block_that_a_predecessor_left_is_free(name: str) -> None:
    with SharedPool(name, SIZE, 2) as pool:
        pool._table["owner"][0] = pool._me + 2  # the next place's, which no process has
        with SharedPool(name) as next_one:
            assert next_one._me == pool._me + 1
            assert next_one.free == 2


def test_blocks_of_a_killed_process_are_taken_back_when_needed(name: str) -> None:
    with SharedPool(name, SIZE, 4) as pool:
        dead = holder(name, 2)
        living = holder(name, 1)
        assert pool.reclaim() == []
        own = pool.acquire("mine")
        with pytest.raises(PoolExhausted, match=r"holder \(\d+\): 2\n  holder \(\d+\): 1"):
            pool.acquire()
        dead.kill()
        rest = pool.acquire_many(2)
        assert len({own.index, *(block.index for block in rest)}) == 3
        assert pool.reclaim() == []
        assert living.end() == 0


def test_a_process_killed_while_it_changes_the_tables(name: str) -> None:
    def half(pool: SharedPool) -> None:
        pool._lock(0)
        pool._assign(0)

    with SharedPool(name, SIZE, 2) as pool:
        child = Opener(half, name)
        assert not pool._lock(0)
        child.kill()
        pool.acquire_many(2)
        holder(name, 0).kill()  # the last that lives removes the file


def test_a_process_killed_while_it_makes_the_file(name: str) -> None:
    path = FOLDER / f"portakv-{name}"
    path.write_bytes(bytes(5000))  # all but the word that is written last
    path.chmod(0o600)
    with SharedPool(name, SIZE, 2) as pool:
        pool.acquire().release()
        with pytest.raises(HostMemoryError, match="got none"):
            SharedPool(name + "x")
    path.write_bytes(bytes(10))
    with pytest.raises(HostMemoryError, match="got none"):
        SharedPool(name)


def test_one_that_holds_the_tables_is_told_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE", 0.05)
    with SharedPool(name, SIZE, 1) as pool, SharedPool(name) as other:
        with other._exclusive(), pytest.raises(HostMemoryError, match="may be stopped"):
            pool.acquire()
        pool.acquire().release()


def test_a_block_that_is_adopted_outlives_its_maker(name: str) -> None:
    with SharedPool(name, SIZE, 3) as pool:
        child = holder(name, 2, 9)
        (index, generation), _ = child.blocks
        block = pool.adopt(index, generation)
        child.kill()
        assert pool.reclaim() == [f"holder ({child.pid}): 1 blocks"]
        assert pool.free == 2
        assert bool((block.tensor == 9).all())
        block.release()
        with pytest.raises(HostMemoryError, match="free or changed hands"):
            pool.adopt(index)
        with pool.acquire(), pytest.raises(HostMemoryError, match="free or changed hands"):
            pool.adopt(index, generation)


def test_a_child_does_not_keep_its_parent_s_locks(name: str) -> None:
    """Killed, the opener is seen to be dead although a process forked from it lives on."""

    def work(pool: SharedPool) -> None:
        pool.acquire()
        if not os.fork():
            time.sleep(2)
            os._exit(0)

    with SharedPool(name, SIZE, 1) as pool:
        Opener(work, name).kill()
        pool.acquire().release()


def test_another_container_s_dead_go_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedPool(name, SIZE, 1) as pool:
        child = holder(name, 1)
        monkeypatch.setattr(shared, "process_space", lambda: -1)
        monkeypatch.setattr(shared, "GRACE", 0.1)
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
            with pool.acquire(wait=True, timeout=LIMIT) as block:
                block.tensor.fill_(number)
                if not bool((block.tensor == number).all()):
                    raise AssertionError("another process wrote into the block")

    with SharedPool(name, 64, 3) as pool:
        children = [Child(work) for _ in range(4)]
        for child in children:
            child.receive()
        for child in children[:2]:
            time.sleep(0.1)
            child.kill()
        time.sleep(0.1)
        assert [child.end() for child in children[2:]] == [0, 0]
        pool.reclaim()
        assert pool.free == 3
        assert 2 <= pool.high_water <= 3


def test_a_process_whose_lock_is_gone_and_that_lives_on_is_spared(name: str) -> None:
    """The kernel closes a dying process's files in turn: its device may be the last."""

    def work(pool: SharedPool) -> None:
        pool.acquire()
        pool._lock(1 + pool._me, fcntl.F_UNLCK)

    with SharedPool(name, SIZE, 1) as pool:
        child = Opener(work, name)
        assert pool.reclaim() == []
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which no process reaped
        assert len(pool.reclaim()) == 1
        os.waitpid(child.pid, 0)


def test_a_lock_that_is_held_tells_of_life_whatever_the_numbers_say(name: str) -> None:
    with SharedPool(name, SIZE, 1) as pool, SharedPool(name) as other:
        other._members["pid"][other._me] = 2**40  # no process
        with other.acquire():
            assert pool.reclaim() == []


def test_a_member_that_cannot_be_looked_at_keeps_its_blocks(name: str) -> None:
    """Without a free descriptor the system does not say whether the process lives."""
    with SharedPool(name, SIZE, 4) as pool:
        own = [pool.acquire() for _ in range(2)]
        holder(name, 2).kill()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
        try:
            with pytest.raises(HostMemoryError, match="too many open files"):
                shared.started(os.getpid())
            with pytest.raises(PoolExhausted):
                pool.acquire()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        own.append(pool.acquire())
        for block in own:
            block.release()
