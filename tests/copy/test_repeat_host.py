# SPDX-License-Identifier: Apache-2.0
"""Copies between two views on the host that are made again: the third is not settled, and moves and
refuses what the first did."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.command_line import registered
from support.slot_cases import ended_well, forked

from portakv import (
    Index,
    KVView,
    LateErrors,
    LayoutError,
    PortaKVError,
    SlotError,
    Unsupported,
    copy_blocks,
)
from portakv.backends.base import Launch, MoveLaunch, Pending
from portakv.backends.reference import Reference
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.bounded import caches

SHAPE = (5, 24, 4, 2, 16)  # of blocks of four tokens
PAGED = "layer block token head dim"


def repeats() -> int:
    """Return the number of copies that the views which are alive remember together."""
    gc.collect()
    return sum(len(each) for each in caches() if each.name == "repeats")


@pytest.mark.parametrize("listed", ["list", "Index"])
def test_the_third_copy_is_not_settled(listed: str, settled: list[int]) -> None:
    """Its ids are checked as before, and what it cannot do goes through `settle` again."""
    one, other = (torch.zeros(SHAPE, dtype=torch.int32) for _ in "ab")
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)

    def made(ids: list[int]) -> Any:
        return Index(ids, 4) if listed == "Index" else ids

    for read, written, again in [
        ([9, 2], [0, 5], True),
        ([5, 2], [7, 0], True),
        ([1, 2], [7, 8], False),
        ([4, 9, 1], [8, 9, 0], False),
        ([6, -1], [1, 4], True),  # the reference skips no id
        ([7, 3], [1, 23], False),
    ]:
        one.copy_(torch.randint(1, 1 << 30, SHAPE, dtype=torch.int32))
        other.fill_(-1)
        settled.clear()
        transfer = copy_blocks(src, dst, made(read), made(written))
        assert transfer.done()
        assert (bool(settled), transfer.carried[0]) == (again, "reference")
        assert transfer.statistics.blocks == sum(block >= 0 for block in read)
        expected = torch.full(SHAPE, -1, dtype=torch.int32)
        for a, b in zip(read, written, strict=True):
            if a >= 0:
                expected[:, b] = one[:, a]
        assert torch.equal(other, expected)
    settled.clear()
    for bad in ([1, 24], [24, 1]):
        with pytest.raises(SlotError, match="inside the view"):
            copy_blocks(src, dst, made(bad), made([1, 2]))
    with pytest.raises(SlotError, match="occurs 2 times"):
        copy_blocks(src, dst, made([1, 2]), made([3, 3]))
    assert settled == []
    copy_blocks(src, dst, made([1, 2]), made([3, 4]), count=5)
    assert settled == [5]  # the last block is moved in part
    other.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        copy_blocks(src, dst, made([1, 2]), made([3, 4]))


def test_rows_that_both_sides_may_share_are_compared_each_time(
    settled: list[int],
) -> None:
    one = torch.zeros(SHAPE, dtype=torch.int32)
    src = KVView(one, PAGED)
    dst = KVView(one, PAGED)
    for _ in range(3):
        copy_blocks(src, dst, [1, 2], [3, 4])
    assert len(settled) == 3
    with pytest.raises(SlotError, match="both source and destination"):
        copy_blocks(src, dst, [1, 2], [2, 4])


def test_a_view_that_is_dropped_leaves_no_memory_behind(settled: list[int]) -> None:
    before = repeats()
    one, other = (torch.zeros(SHAPE, dtype=torch.int32) for _ in "ab")
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    for _ in range(3):
        copy_blocks(src, dst, [1, 2], [3, 4])
    assert len(settled) == 2
    assert repeats() == before + 1
    gone = weakref.ref(dst.owners[0].untyped_storage())
    del dst, other
    gc.collect()
    assert gone() is None
    del src, one
    assert repeats() == before


class _Late:
    """Work that ends when it is waited for."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._ended = False

    def done(self) -> bool:
        return self._ended

    def wait(self) -> None:
        if not self._ended:
            self._work()
        self._ended = True


class _Later(MoveLaunch):
    """A launch that leaves the work of each copy after the second to a thread."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._calls = 0

    def enqueue(self, move: Move, stream: torch.Stream | None, status: Any) -> Pending | None:
        self._calls += 1
        if self._calls <= 2:
            return self._launch(*move, stream, status)
        return _Late(lambda: self._launch(*move, stream, status))


class Later(Reference):
    name = "later"

    def prepare(self, plan: CopyPlan) -> Launch:
        return _Later(super().prepare(plan))


def test_a_repeat_has_ended_with_its_call(settled: list[int]) -> None:
    one, other = (torch.zeros(SHAPE, dtype=torch.int32) for _ in "ab")
    src = KVView(one, PAGED)
    dst = KVView(other, PAGED)
    with registered(later=Later):
        settled.clear()
        for value in range(1, 5):
            one.fill_(value)
            transfer = copy_blocks(src, dst, [1], [2], backend="later")
            assert transfer.done()
            assert bool((other[:, 2] == value).all())
    assert len(settled) == 2


class Warm:
    """Two views, between which a copy was remembered."""

    def __init__(self) -> None:
        self.one, self.other = (torch.zeros(SHAPE, dtype=torch.int32) for _ in "ab")
        self.src = KVView(self.one, PAGED)
        self.dst = KVView(self.other, PAGED)
        for _ in range(3):
            self.copy()

    def copy(self, **options: Any) -> Any:
        return copy_blocks(self.src, self.dst, [1, 2], [3, 4], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"by_layer": True},
        {"check": "strict"},
        {"late": LateErrors()},
        {"cancellable": True},
        {"reinterpret": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_copy_on_other_terms_is_not_repeated(options: dict[str, Any], settled: list[int]) -> None:
    warm = Warm()
    warm.one.fill_(7)
    settled.clear()
    transfer = warm.copy(**options)
    transfer.synchronize()
    assert bool((warm.other[:, 3:5] == 7).all())
    if "by_layer" in options:
        assert len(transfer.layers) == SHAPE[0]
    if not {"by_layer", "cancellable"} & set(options):  # these settle their parts
        assert settled == [8]


def test_a_repeat_looks_at_what_may_change(
    settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = Warm()
    with pytest.raises(Unsupported):
        warm.copy(max_thread_blocks=4)
    with monkeypatch.context() as patched:
        patched.setenv("PORTAKV_BACKEND", "nothing")
        with pytest.raises(PortaKVError, match="nothing"):
            warm.copy()
    settled.clear()
    warm.copy()
    assert settled == []
    warm.one.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        warm.copy()


def test_a_forked_process_repeats_copies_of_its_own(settled: list[int]) -> None:
    warm = Warm()
    settled.clear()

    def copies() -> None:
        for _ in range(4):
            warm.copy()
        assert settled == [8]  # the parent's kind of copy is known, but its repeat is not used

    assert ended_well(forked(copies))
