# SPDX-License-Identifier: Apache-2.0
"""Test pools of pinned blocks; `test_pool_model.py` tests the order of calls."""

from __future__ import annotations

import re
import threading
import time
import warnings
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.guarded_memory import refused
from support.pinned_runtime import claimed
from support.pool_processes import Child
from support.threads import run_threads
from support.waits import LIMIT

from portakv.errors import InvalidTerms, PoolExhausted
from portakv.host import _registration, pinned
from portakv.host.pinned import HostMemoryError, PinnedMemory
from portakv.host.pool import PinnedPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:Expected pinned host memory"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Blocks were in use:ResourceWarning"),
    pytest.mark.usefixtures("either"),
]
SIZE = 1000


def test_blocks_lie_apart_have_their_size_and_are_counted(either: Any) -> None:
    with PinnedPool(SIZE, 5, alignment=256) as pool:
        assert (pool.free, pool.blocks, pool.high_water) == (5, 5, 0)
        pool.acquire().release()
        assert pool.acquire_many(0) == []
        blocks = pool.acquire_many(4)
        assert (pool.free, pool.high_water) == (1, 4)
        for count, words in ((2, "1 of 5"), (6, "at most 5")):
            with refused(PoolExhausted, words):
                pool.acquire_many(count)
        for number, block in enumerate(blocks):
            assert block.nbytes == block.tensor.numel() == SIZE
            assert block.address % 256 == 0
            block.tensor.fill_(number)
        for number, block in enumerate(blocks):
            assert bool((block.tensor == number).all())
            block.release()
        pool.acquire().release()
        assert (pool.free, pool.high_water) == (5, 4)
        assert pool.pinned == (either is not None)


def test_waiting_ends_by_time_or_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portakv.host.pool.GROW_AGAIN", 9)  # a release notifies
    with PinnedPool(SIZE, 1) as pool:
        block = pool.acquire()
        short: Any
        for short in (0.05, Fraction(1, 20)):
            with pytest.raises(PoolExhausted, match=r"within 0.05 s"):
                pool.acquire(wait=True, timeout=short)
        for timeout in (None, LIMIT, float("inf"), 1e300):
            threading.Timer(0.02, block.release).start()
            block = pool.acquire(wait=True, timeout=timeout)
            assert block.index == 0
        block.release()


def test_released_twice_or_elsewhere() -> None:
    with PinnedPool(SIZE, 2) as pool, PinnedPool(SIZE, 2) as other:
        block = pool.acquire()
        strange_block = other.acquire()
        never = SimpleNamespace(synchronize=lambda: pytest.fail("it waited first"), done=bool)
        for place, strange in ((other, block), (pool, strange_block)):
            with refused(HostMemoryError, "another pool"):
                place.release(strange, never)
        strange_block.release()
        block.release()
        for count in (0, 2):  # the same block is somebody else's then
            again = [pool.acquire() for _ in range(count)]
            with pytest.raises(HostMemoryError, match="released twice"):
                block.release(never)
        with pytest.raises(HostMemoryError, match="after its release"):
            _ = block.tensor
        assert pool.free == 0
        for one in again:
            one.release()


def test_a_closed_pool(either: Any) -> None:
    before = claimed()
    pool = PinnedPool(SIZE, 1)
    block = pool.acquire()
    tensor = block.tensor
    with pytest.warns(ResourceWarning, match="closed"):
        pool.close()
    pool.close()
    block.release()
    assert not block.in_use
    with pytest.raises(HostMemoryError, match="closed"):
        pool.acquire()
    tensor.fill_(1)  # what is out holds its memory
    assert int(tensor.sum()) == SIZE
    del tensor
    assert claimed() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PinnedPool(SIZE, 1).close()


def test_blocks_of_any_size_lie_apart_and_are_counted() -> None:
    with PinnedPool(SIZE, 8, alignment=256) as pool:  # 1,024 bytes from one to the next
        assert (pool.bytes_free, pool.bytes_used, pool.largest_free) == (8192, 0, 7 * 1024 + SIZE)
        sizes = (1, SIZE, SIZE + 1, 1024 + SIZE, 1024 + SIZE + 1)
        blocks = [pool.acquire(f"block of {size}", nbytes=size) for size in sizes[:4]]
        assert (pool.bytes_used, pool.free, pool.largest_free) == (6 * 1024, 2, 1024 + SIZE)
        with pytest.raises(PoolExhausted, match=r"1 free .*2025 bytes.*2048 of 8192 bytes, 2024 "):
            pool.acquire(nbytes=sizes[4])
        for number, (block, size) in enumerate(zip(blocks, sizes, strict=False)):
            assert block.nbytes == block.tensor.numel() == size
            assert block.address % 256 == 0
            block.tensor.fill_(number)
        for number, block in enumerate(blocks):
            assert bool((block.tensor == number).all())
        assert [leak.owner for leak in pool.leaks()] == [f"block of {size}" for size in sizes[:4]]

        blocks.pop(1).release()
        blocks.pop(1).release()  # three units together, of 1 and 2, and two others at the end
        assert (pool.free, pool.largest_free) == (5, 2 * 1024 + SIZE)
        ended: list[bool] = []
        blocks.pop().release(after=SimpleNamespace(done=lambda: bool(ended)))
        assert pool.largest_free == 2 * 1024 + SIZE, "work still uses the units between"
        ended.append(True)
        assert pool.largest_free == 6 * 1024 + SIZE
        with pool.acquire(nbytes=pool.largest_free):
            assert (pool.free, pool.largest_free) == (0, 0)
        blocks.pop().release()
        assert (pool.bytes_free, pool.largest_free, pool.high_water) == (8192, 7 * 1024 + SIZE, 8)


def test_a_pool_grows_for_blocks_of_any_size_in_pieces() -> None:
    with PinnedPool(SIZE, 2, limit=10, grow=2) as pool:
        large = pool.acquire("a", nbytes=5000)
        assert pool.blocks == 7, "no free block lies in two pieces"
        with refused(PoolExhausted, "at most 4 blocks of 2000 bytes", "a request for 5"):
            pool.acquire_many(5, nbytes=2000, wait=True)  # not: a wait without an end
        for size in (6000, 1 << 60):
            limits = "at most 10240 bytes", "2048 free now, 2024 of them together"
            with refused(PoolExhausted, *limits, f"a request for {size}."):
                pool.acquire(nbytes=size, wait=True)
        others = pool.acquire_many(2, nbytes=2000)
        assert (pool.blocks, pool.free) == (9, 0)
        for block in (large, *others):
            block.release()
        assert (pool.free, pool.largest_free) == (9, 4 * 1024 + SIZE)


def test_a_pool_grows_for_several_blocks_near_the_largest_size() -> None:
    """Pieces of five pages would hold one block of four pages each, and waste a page."""
    page = _registration.PAGE
    with PinnedPool(page, 1, limit=9, grow=1, largest=5 * page) as pool:
        blocks = pool.acquire_many(2, nbytes=4 * page)
        assert pool.blocks == 9
        for number, block in enumerate(blocks):
            block.tensor.fill_(number)
        assert [block.tensor.unique().tolist() for block in blocks] == [[0], [1]]
        assert pool.free == 1
    with PinnedPool(page, 1, limit=8, grow=1, largest=5 * page) as pool:
        with pytest.raises(PoolExhausted, match="at most 1 blocks"):
            pool.acquire_many(2, nbytes=4 * page, wait=True, timeout=5.0)
        with pytest.raises(PoolExhausted, match=f"blocks of at most {5 * page} bytes"):
            pool.acquire(nbytes=6 * page, wait=True, timeout=LIMIT)
        pool.acquire(nbytes=5 * page).release()


def test_no_larger_block_lies_in_two_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4 * _registration.PAGE
    with PinnedPool(_registration.PAGE, 12, largest=most) as pool:
        assert pool.largest_free == most
        for block in pool.acquire_many(6, nbytes=2 * _registration.PAGE):
            inside = [boundary - block.address for boundary in pinned.boundaries()]
            assert not any(0 < distance < block.nbytes for distance in inside)


def waits_for(pool: Any, count: int) -> None:
    """Return once so many callers wait."""
    until = time.monotonic() + 30
    while pool.waiting < count:
        assert time.monotonic() < until
        time.sleep(0.001)


class ServesAnyone(PinnedPool):
    """A pool that serves a later caller before one that waits for more: the negative control."""

    def _is_first(self, _: object) -> bool:
        return True


@pytest.mark.parametrize("kind", [PinnedPool, ServesAnyone])
def test_small_blocks_do_not_delay_a_large_one(kind: type[PinnedPool]) -> None:
    order = list[str]()
    with kind(SIZE, 4) as pool:
        used = pool.acquire_many(3)

        def work(name: str, nbytes: int) -> None:
            with pool.acquire(name, nbytes=nbytes, wait=True, timeout=LIMIT):
                order.append(name)

        threads = [threading.Thread(target=work, args=("large", 4 * SIZE))]
        threads.append(threading.Thread(target=work, args=("small", SIZE)))
        threads[0].start()
        waits_for(pool, 1)
        threads[1].start()
        if kind is ServesAnyone:
            threads[1].join()
        else:
            waits_for(pool, 2)
            with pytest.raises(PoolExhausted, match="others have waited for longer"):
                pool.acquire(wait=True, timeout=0)
            pool.acquire("does not wait").release()
        for block in used:
            block.release()
        for thread in threads:
            thread.join()
    assert order == (["small", "large"] if kind is ServesAnyone else ["large", "small"])


def test_a_caller_that_is_interrupted_leaves_its_place() -> None:
    with PinnedPool(SIZE, 1) as pool:
        block = pool.acquire()

        def interrupted() -> bool:
            raise KeyboardInterrupt

        block.release(after=SimpleNamespace(done=lambda: bool(pool.waiting) and interrupted()))
        with pytest.raises(KeyboardInterrupt):
            pool.acquire(wait=True, timeout=LIMIT)
        assert pool.waiting == 0


def test_threads_never_share_a_block() -> None:
    with PinnedPool(64, 2) as pool:

        def work(number: int) -> None:
            for _ in range(150):
                with pool.acquire(wait=True, timeout=LIMIT) as block:
                    block.tensor.fill_(number)
                    assert bool((block.tensor == number).all()), "it found another's bytes"

        run_threads(work, range(4))
        assert pool.free == 2
        assert pool.high_water <= 2


def test_a_forked_child_is_told_to_make_its_own() -> None:
    with PinnedPool(SIZE, 2) as pool:
        block = pool.acquire()
        block.tensor.fill_(3)

        def work(_: object) -> None:
            for call in (pool.acquire, block.release):
                with pytest.raises(HostMemoryError, match="forked from it"):
                    call()
            pool.close()
            with PinnedPool(SIZE, 1) as own, own.acquire() as block_of_child:
                block_of_child.tensor.fill_(4)

        assert Child(work).end() == 0
        assert int(block.tensor.max()) == 3
        block.release()
        assert pool.free == 2


#: Arguments that make no pool, and words of the sentence.
LOCAL: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((0, 1), {}, "power of two"), ((1, 0), {}, "power of two"), ((1.5, 1), {}, "1.5"),
    (("x", 1), {}, "power of two.*'x'"), ((1, 1), {"alignment": 3}, "aligned to 3"),
    ((64, 1), {"alignment": []}, r"aligned to \[\]"), ((1, 1), {"grow": -1}, "grow .*got -1"),
    ((64, 1), {"alignment": np.zeros(3)}, "aligned to array"),
    ((1, 2), {"limit": 1}, "limit .*2 or more, got 1"),
    ((1, 2), {"limit": 2.5}, "limit to be a whole number.*got 2.5"),
    ((1, 2), {"limit": "many"}, "limit .*2 or more, got 'many'"),
    ((1, 2), {"limit": 4, "grow": 0}, "grow .*1 or more, got 0"),
    ((1, 2), {"limit": 4, "grow": 1.5}, "grow .*1 or more, got 1.5"),
    ((64, 1), {"timeout": "x"}, "huge_pages.*got timeout"), ((64, 1), {"unit": 3}, "unit"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "words"), LOCAL, ids=str)
def test_what_makes_no_pool(arguments: Any, options: dict[str, Any], words: str) -> None:
    with refused(HostMemoryError) as caught:
        PinnedPool(*arguments, **options)
    assert re.search(words, str(caught.value))


def test_arguments_that_mean_nothing() -> None:
    wrong: Any
    pool: Any
    with PinnedPool(SIZE, 1) as pool:
        for wrong in ("1", float("nan"), object(), -1, True):
            with refused(InvalidTerms, "Expected timeout to be", "seconds"):
                pool.acquire(wait=True, timeout=wrong)
        with refused(InvalidTerms, "Expected wait to be True or False"):
            pool.acquire(wait=1)
        for wrong in (-1, True, "x", 1.5, None, []):
            with refused(HostMemoryError, "count", "0 or more", f"got {wrong!r}"):
                pool.acquire_many(wrong)
        for wrong in (0, -1, True, "x", 1.5, []):
            with refused(HostMemoryError, "nbytes", "1 or more", f"got {wrong!r}"):
                pool.acquire(nbytes=wrong)
        for wrong in (3, "x", [], torch.zeros(2), torch.Event, SimpleNamespace(done=3)):
            with pool.acquire() as block, refused(HostMemoryError, "reports its end", "Pass a"):
                block.release(after=wrong)
        with refused(HostMemoryError, "str", "release a Block"):
            pool.release("x")
        assert pool.free == 1


def test_it_grows_up_to_its_limit_and_then_names_the_owners_of_blocks() -> None:
    with PinnedPool(SIZE, 2, limit=10, grow=3) as pool:
        blocks = [pool.acquire("prefill")]
        for count, size in ((1, 2), (1, 5), (5, 8), (2, 10)):
            blocks += pool.acquire_many(count, "decode")
            assert pool.blocks == size
        with pytest.raises(PoolExhausted, match=r"0 of 10\. ") as caught:
            pool.acquire()
        first, *others, last = str(caught.value).splitlines()[1:]
        assert first.startswith("  block 0: prefill in thread MainThread, for ")
        assert ["decode" in line for line in others] == [True] * 7
        assert last == "  and 2 more"
        for number, block in enumerate(blocks):
            block.tensor.fill_(number)
        assert [int(block.tensor[-1]) for block in blocks] == list(range(10))


def test_no_block_lies_in_two_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of a size whose multiples end with no page before the largest registration does."""
    most = 4 * _registration.PAGE
    monkeypatch.setattr(_registration, "LARGEST", most)
    with PinnedPool(most // 4 + 1, 4, limit=11, alignment=1, largest=most) as pool:
        for block in pool.acquire_many(11):
            inside = [boundary - block.address for boundary in pinned.boundaries()]
            assert not any(0 < distance < block.nbytes for distance in inside)


class Scarce:
    """Replace `pinned.allocate`: no memory for more than ``most`` blocks at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most = most
        self.requests = [0]
        self._allocate = pinned.allocate
        monkeypatch.setattr(pinned, "allocate", self)

    def __call__(self, nbytes: int, **options: Any) -> PinnedMemory:
        memory = self._allocate(nbytes, **options)  # as pages that are mapped, and then not there
        self.requests.append(nbytes)
        if nbytes > 1024 * self.most:
            raise HostMemoryError("of the test")
        return memory


def test_it_grows_by_what_is_missing_or_tells_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with PinnedPool(SIZE, 2, limit=64, grow=32) as pool:
        scarce = Scarce(monkeypatch, 3)
        block, *_ = pool.acquire_many(5)
        assert (pool.blocks, scarce.requests) == (5, [0, 31 * 1024 + SIZE, 2 * 1024 + SIZE])
        scarce.most = 0
        ranges = claimed()
        with pytest.raises(PoolExhausted, match="it has 5 and there was no memory") as refused:
            pool.acquire()
        assert str(refused.value.__cause__) == "of the test"
        assert claimed() == ranges, "the error holds the memory that was taken"
        block.release(after=SimpleNamespace(done=bool))  # which never ends, and is queried often
        before = len(scarce.requests)
        with pytest.raises(PoolExhausted, match=r"within 0\.15 s") as refused:
            pool.acquire(wait=True, timeout=0.15)
        assert isinstance(refused.value.__cause__, HostMemoryError)
        assert 2 <= len(scarce.requests) - before <= 6, "it asks again, and not without pause"


def test_leaks_say_who_where_and_what_was_dropped() -> None:
    with PinnedPool(SIZE, 3, stacks=True) as pool:
        retained = pool.acquire("kept")
        pool.acquire("lost")
        first, second = pool.leaks()
        assert (first.owner, first.dropped) == ("kept", False)
        assert (second.owner, second.dropped) == ("lost", True)
        assert "test_leaks_say_who" in first.stack
        assert "dropped without release" in str(second)
        retained.release()
        with pytest.warns(ResourceWarning, match="lost in thread MainThread"):
            pool.close()
        pool.close()
