# SPDX-License-Identifier: Apache-2.0
"""`host`, which prepares strategies and picks one for each copy: when one is out, and why."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign_cases import blind
from support.host_choice_cases import (
    BLOCKS,
    CPU,
    H200,
    ROWS,
    SIZE,
    UNMEASURED,
    Fake,
    apart,
    plan_of,
    planes,
    put,
    strategies,
    view,
)
from support.threads import run_threads

from portakv import CopyPlan, Index, KVView, Unsupported
from portakv.backends.base import Capabilities, Decision
from portakv.core.pick import BITS, ORDER, pick_copy
from portakv.interconnect import choose
from portakv.interconnect import choose as picking
from portakv.interconnect import link as pieces_of
from portakv.interconnect.choose import EVEN, ROW, Host, HostLaunch
from portakv.interconnect.costs import DIRECTIONS, Point, Table
from portakv.interconnect.link import TALL
from portakv.interconnect.strategy import PAGEABLE, PINNED, Terms
from portakv.interconnect.zero_copy import ZeroCopy
from portakv.plan.plan import Move


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies of a few MiB count as long."""
    monkeypatch.setattr(picking, "SHORT", 0)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choose, "costs_of", lambda device: H200)
    with strategies(monkeypatch):
        yield


def host(**terms: object) -> Host:
    return Host(CPU, terms=Terms(**terms))  # type: ignore[arg-type]


def moved(src: KVView, dst: KVView, src_index: Index, dst_index: Index | None = None) -> Move:
    """Return a move of all blocks of the indices, which are alike unless there are two."""
    ids = src_index.ids
    assert ids is not None
    return Move(src, dst, src_index, dst_index or src_index, ids.numel() * src_index.step)


def ready(
    blocks: int, src: KVView | None = None, dst: KVView | None = None, **terms: object
) -> tuple[HostLaunch, Move]:
    """Return a launch, by default from planes on the device to pinned blocks, and the move of so
    many blocks without neighbours."""
    sides = src or planes("device"), dst or view("pinned")
    return host(**terms).prepare(plan_of(*sides)), moved(*sides, apart(blocks))


def launched() -> list[str]:
    return [name for name, _ in Fake.launched]


def test_a_strategy_that_does_not_serve_the_device_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with strategies(
        monkeypatch, zero_copy="Absent", pageable="Absent", batched_memcpy="no.such.module:At"
    ):
        backend = host()
        assert list(backend.strategies) == ["staged"]
        assert backend.out["zero_copy"] == backend.out["pageable"] == "its driver is not installed"
        assert "failed to load: ModuleNotFoundError" in backend.out["batched_memcpy"]
        assert backend.capabilities().places == {("device", "pinned"), ("pinned", "device")}
        decision = backend.check(plan_of(view("device"), view("pageable")))
        assert not decision.accepted
        for reason in ("staged: it does not copy from device to pageable", "pageable: its driver"):
            assert reason in decision.reason
        with pytest.raises(Unsupported, match="pageable: rejected, its driver is not installed"):
            backend.prepare(plan_of(view("device"), view("pageable")))


class Direct(ZeroCopy):
    """The kernel that reaches host memory, on a host that cannot load it."""

    kernels: Any = {"device": "kernels"}  # noqa: RUF012

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, True, "it says so")

    def refuses(self, host: KVView) -> str:
        return ""

    def prepare(self, plan: CopyPlan) -> Any:
        return lambda *_: None


def test_the_core_picks_as_the_launch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with strategies(monkeypatch, zero_copy=f"{__name__}:Direct"):
        launch, move = ready(2)
        costs, out, flags = launch.terms(move.dst, new=True)
        assert flags == 3  # the driver is asked if the kernel is picked
        answer = pick_copy()(launch.picked_at, costs, 1, 1, move.count, out, 0, True)
        assert launch.picked(answer) == launch.pick(move)
        assert launch.terms(move.dst, True, look=True) == (costs, out, 1)
        monkeypatch.setattr(Direct, "refuses", lambda *_: "it does not reach it")
        assert launch.terms(move.dst, True, look=True) == (costs, out | BITS["zero_copy"], 1)


def test_it_can_do_what_its_strategies_can() -> None:
    backend = host()
    assert backend.capabilities() == Capabilities(places=PINNED | PAGEABLE, index_on="any")
    for src, dst, reason in (
        ("device", "pinned", "takes the plan, by staged or batched_memcpy or zero_copy"),
        ("pageable", "device", "takes the plan, by pageable"),
        ("pageable", "pinned", "no strategy takes it"),
    ):
        decision = backend.check(plan_of(view(src), view(dst)))
        assert decision.reason.startswith(reason)
        assert decision.accepted == (src == "device" or dst == "device")


def test_engines_are_prepared_when_they_are_needed() -> None:
    launch, move = ready(2)
    assert Fake.prepared == ["staged"]  # one, so that the plan is known to be carried out
    for _ in range(3):
        launch(*move, None, None)
    assert launched() == ["zero_copy"] * 3  # 256 KiB
    launch(*moved(*move[:2], apart(30)), None, None)
    assert launched()[3:] == ["staged"]
    assert Fake.prepared == ["staged", "zero_copy"]


def test_the_pick_depends_on_the_ids() -> None:
    """Blocks that lie in one piece on both sides need no gather; planes do."""
    launch, move = ready(30, view("device"))
    assert launch.pick(move).strategy == "batched_memcpy"
    scattered, move = ready(30)
    sides = move[:2]
    near = Index(range(5, 35), SIZE)
    # Blocks follow each other on the host; on the device the heads do, and no two rows of both.
    assert scattered.pick(moved(*sides, near)).strategy == "staged"


@pytest.mark.parametrize("upward", [False, True])
def test_each_shape_of_a_copy_has_a_pick_of_its_own(
    upward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staging costs half as much again as a copy engine for each of its runs. Its runs are those of
    the host, and a copy engine's those of both sides together."""
    sides = (view("pinned"), view("device")) if upward else (view("device"), view("pinned"))
    few = ready(30, *sides)[0].pick(moved(*sides, Index([5, 6], SIZE)))  # in one piece as well
    assert few.strategy == "zero_copy"
    columns: Any = {
        (strategy, way): {8 << 20: [Point(1, price, 0), Point(100, 100 * price, 0)]}
        for strategy, price in (("staged", 1.5e-6), ("batched_memcpy", 1e-6))
        for way in DIRECTIONS
    }
    table = Table({}, columns)
    monkeypatch.setattr(choose, "costs_of", lambda _: table)
    with strategies(monkeypatch, zero_copy="Absent"):
        launch, _ = ready(30, *sides)
    near = Index(range(5, 35), SIZE)
    far = apart(30)
    for of_device, of_host, strategy in (
        (near, near, "batched_memcpy"),
        (far, near, "staged"),
        (near, far, "batched_memcpy"),
        (far, far, "batched_memcpy"),
    ):
        ids = (of_host, of_device) if upward else (of_device, of_host)
        assert launch.pick(moved(*sides, *ids)).strategy == strategy


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_pages_have_one_strategy_for_any_ids(
    downward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "costs_of", lambda device: UNMEASURED)
    monkeypatch.setattr(picking, "SHORT", 16 << 20)
    device = view("device")
    pinned = view("pinned")
    sides = (device, pinned) if downward else (pinned, device)
    ids = torch.randperm(BLOCKS)[:60].tolist()  # 7.5 MiB
    scattered = moved(*sides, Index(ids, SIZE), Index(ids[::-1], SIZE))
    near = moved(*sides, Index(range(60), SIZE))
    for page, strategy in ((128 << 10, "batched_memcpy"), (1 << 20, "zero_copy")):
        monkeypatch.setattr(picking, "PAGE", page)
        launch, _ = ready(60, *sides)
        for each in (scattered, near):
            result = launch.pick(each, quick=True)
            assert result.strategy == strategy
            assert launch.pick(each).strategy == strategy
    assert "for copies of up to 16 MiB" in result.why


@pytest.mark.parametrize(
    ("below", "tall", "folds"),
    [(None, TALL, False), (None, 16, False), (1, TALL, False), (1, 16, True), (256, TALL, False),
     (257, TALL, True)],
)  # fmt: skip
def test_what_folds_counts_for_the_host_as_it_crosses(
    below: int | None, tall: int, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under the link's `fold_below` at a pitch are one piece, and so are many wider ones (16
    lie together); by torch (None) each is a call. The device pays for each row and for its piece.
    So a copy engine is picked if it takes less than what staging takes in either direction.
    """
    if below is not None:
        monkeypatch.setattr(choose, "by_torch", lambda device: False)
        monkeypatch.setattr(choose, "link_of", lambda device: SimpleNamespace(fold_below=below))
    monkeypatch.setattr(pieces_of, "TALL", tall)
    runs = 30 * ROWS
    pieces = runs // 16 if folds else runs
    by_engine = 1e-6 * pieces + (runs * ROW["d2h"] if folds else 0)
    each = [Point(1, 1e-6, 0), Point(runs, 1e-6 * runs, 0)]
    launch, move = ready(30)
    for staged, strategy in ((by_engine / 1.1, "staged"), (by_engine * 1.1, "batched_memcpy")):
        columns: Any = {
            ("batched_memcpy", "d2h"): {256: each, 256 * 16: each},
            ("staged", "d2h"): {256: [Point(1 << 40, staged, 0)]},
        }
        table = Table({}, columns)
        monkeypatch.setattr(choose, "costs_of", lambda _, table=table: table)
        assert launch.pick(move).strategy == strategy


def test_pageable_memory_goes_through_pinned_memory() -> None:
    launch, move = ready(3, view("pageable"), view("device"))
    assert launch(*move._replace(count=0), None, None) is None
    assert launched() == []  # nothing is nothing
    launch(*move, None, None)
    assert launched() == ["pageable"]
    assert launch.out["staged"] == "it does not copy from pageable to device memory"


def test_ids_are_where_the_strategy_reads_them() -> None:
    launch, move = ready(2)
    launch(*move._replace(dst_index=apart(2, 1)), None, None)
    (_, (_, _, first, second, *rest)) = Fake.launched[-1]
    assert [x.ids.dtype for x in (first, second)] == [torch.int32] * 2
    assert [x.ids.tolist() for x in (first, second)] == [[0, 2], [1, 3]]
    assert rest == [2 * SIZE, None, None]
    far = moved(*move[:2], apart(30), apart(30))
    launch(*far, None, None)
    assert Fake.launched[-1] == ("staged", (*far, None, None))


class OnDevice(Index):
    """Ids that only a device has, as the host sees them."""

    __slots__ = ()

    def known_ids(self) -> None:
        return None


def test_a_strategy_that_would_wait_for_ids_is_left_out_if_the_terms_leave_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same ids, known and unknown to the host: of far blocks, which would be staged."""
    host_ids = apart(30)
    ids = OnDevice([2 * n for n in range(30)], SIZE)
    for terms, expected in (
        ({"detached": True}, "staged"),
        ({}, "zero_copy"),
        ({"overlap": "idle"}, "zero_copy"),
    ):
        launch, move = ready(30, **terms)
        for name, reads in (("staged", "host"), ("batched_memcpy", "both")):
            launch.strategies[name].reads = reads
        known = launch.pick(move).strategy
        unknown = move._replace(src_index=ids, dst_index=ids)
        assert launch.pick(unknown).strategy == expected, (
            "no kernel holds a detached copy's stream up"
        )
        can = launch.picked_for(unknown)[0].can
        assert (can.guards, can.skips_negative) == (expected == "zero_copy",) * 2
        # Staging needs the ids of the host's rows alone.
        assert launch.pick(move._replace(src_index=ids, dst_index=host_ids)).strategy == known
        # But it cannot guard the device's, which are read back for it unless they are trusted.
        for trusted in (True, False):
            there = OnDevice([2 * n for n in range(30)], SIZE, trusted=trusted)
            there.on_host = False
            result = launch.pick(move._replace(src_index=there, dst_index=host_ids)).strategy
            assert result == (known if trusted else expected)
    assert "does not wait" in launch.pick(unknown).why
    # Nor can the host cut a copy between addresses that it does not know.
    blind(move.dst)
    assert launch.pick(move).strategy == "zero_copy"


def test_ids_that_only_a_device_has_get_a_strategy_that_guards_them() -> None:
    """A copy keeps what was picked, also if another thread reads the ids back before its launch."""
    launch, move = ready(30)
    launch.strategies["staged"].reads = "host"
    launch.strategies["batched_memcpy"].reads = "both"
    ids = OnDevice([2 * n for n in range(30)], SIZE)
    assert launch.picked_for(move._replace(src_index=ids, dst_index=ids))[0].can.guards
    assert not launch.picked_for(move)[0].can.guards


#: How strategies keep a pool of 4 layers on the host, and the bytes of a page's run there.
POOLS = {
    "kv | layer (block token) head dim": 32 << 10,
    "kv | (block token) layer head dim": 128 << 10,
    "kv | block layer token head dim": 128 << 10,
    "kv | block head token layer dim": 128 << 10,
}


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("downward", [True, False])
def test_pools_of_strategies(layout: str, downward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages hold 16 tokens of 2 KiB in each layer. By ids of tokens that only the device has, only
    a kernel starts immediately; by pages that the host knows, runs of 32 KiB go to copy engines."""
    monkeypatch.setattr(choose, "costs_of", lambda device: UNMEASURED)
    sizes = {"layer": 4, "block": 128, "token": SIZE, "head": 8, "dim": 128}
    dims = layout.partition(" | ")[2]
    shape = [
        128 * SIZE if name == "slots" else sizes[name]
        for name in dims.replace("(block token)", "slots").split()
    ]
    size = SIZE if "(" in dims else None
    far = [torch.empty(shape, dtype=torch.float16) for _ in range(2)]
    pool = put(KVView(far, layout, block_size=size), "pinned")
    rows = [[torch.empty(128 * SIZE, 8, 128, dtype=torch.float16) for _ in range(4)] for _ in "kv"]
    caches = put(KVView(rows, "kv layer | (block token) head dim", block_size=SIZE), "device")
    src, dst = (caches, pool) if downward else (pool, caches)
    pages = apart(64)
    tokens = torch.arange(128 * SIZE).view(128, SIZE)[::2].flatten()
    for ids, expected in (
        (OnDevice(tokens), "zero_copy"),
        (OnDevice(tokens[:16]), "zero_copy"),
        (pages, "batched_memcpy" if POOLS[layout] == EVEN else "staged"),
    ):
        launch = host().prepare(CopyPlan(src.form, dst.form, ids.step, ids.step))
        for name, reads in (("staged", "host"), ("batched_memcpy", "both")):
            launch.strategies[name].reads = reads
        assert launch.pick(moved(src, dst, ids)).strategy == expected


def test_none_takes_over_ids_that_direct_alone_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, move = ready(2)
    assert launch.pick(move).strategy == "zero_copy"

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(launch, "launch_by", full)
    with pytest.raises(torch.OutOfMemoryError):
        launch(*move, None, None)
    assert launched() == []


def test_a_strategy_that_another_thread_takes_out_while_one_is_picked() -> None:
    class Reads(str):
        __slots__ = ()

        def __hash__(self) -> int:
            launch.strategies.pop("batched_memcpy", None)
            return hash(str(self))

    launch, move = ready(2)
    launch.strategies["staged"].reads = Reads("host")
    ids = OnDevice([0, 2], SIZE)
    assert launch.pick(move._replace(src_index=ids, dst_index=ids)).strategy == "zero_copy"


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        ("Late", "its kernel does not compile"),
        ("Breaking", "it failed to prepare: RuntimeError: the compiler crashed"),
    ],
)
def test_a_strategy_that_cannot_be_prepared_is_out_with_its_reason(
    fake: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with strategies(monkeypatch, zero_copy=fake):
        launch, move = ready(2)
        assert launch.pick(move).strategy == "zero_copy"  # no call has prepared it yet
        launch(*move, None, None)
        assert launched() == ["staged"]
        assert launch.pick(move).strategy == "staged"
        assert why in launch.out["zero_copy"]
        launch(*move, None, None)
        assert Fake.prepared.count("late") == (fake == "Late")  # and is not tried again
        with pytest.raises(Unsupported, match=why):
            launch.launch_by("zero_copy", move, None)


def test_a_strategy_that_cannot_use_the_host_s_memory_is_out_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with strategies(monkeypatch, zero_copy="Unreaching"):
        launch, move = ready(2)
        assert launch.pick(move).strategy == "staged"
        launch(*move, None, None)
        assert launched() == ["staged"]
        move.dst.derived["reached"] = True  # other memory, of the same form
        assert launch.pick(move).strategy == "zero_copy"
    with strategies(
        monkeypatch, staged="Refusing", batched_memcpy="Refusing", zero_copy="Unreaching"
    ):
        launch, move = ready(2)
        with pytest.raises(Unsupported, match="it does not reach it"):
            launch.pick(move)


def test_the_first_strategy_that_can_be_prepared_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with strategies(monkeypatch, staged="Late"):
        launch, _ = ready(2)
        assert Fake.prepared == ["late", "batched_memcpy"]
        assert "does not compile" in launch.out["staged"]
    with (
        strategies(monkeypatch, staged="Late", batched_memcpy="Refusing", zero_copy="Breaking"),
        pytest.raises(Unsupported, match=r"(?s)compile.*too narrow|too narrow.*compile"),
    ):
        ready(2)


def test_engines_get_the_device_and_the_terms_of_the_host() -> None:
    by_name: dict[str, Any] = host(overlap="idle", max_thread_blocks=3).strategies
    received = {(strategy.device, strategy.terms) for strategy in by_name.values()}
    assert received == {(CPU, Terms("idle", 3))}
    for policy, picks in (("compute", "staged"), ("idle", "zero_copy")):
        launch, move = ready(32, overlap=policy)
        assert launch.pick(move).strategy == picks


def test_a_forced_strategy_carries_out_what_another_would() -> None:
    launch, move = ready(30, view("device"))
    for name in ORDER[:3]:
        launch.launch_by(name, move, None)
    assert launched() == list(ORDER[:3])
    for name, why in (
        ("pageable", "it does not copy from device to pinned memory"),
        ("nonsense", "no strategy has that name"),
    ):
        with pytest.raises(Unsupported, match=why):
            launch.launch_by(name, move, None)


def test_costs_are_read_before_the_first_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    with monkeypatch.context() as patch:
        patch.setattr(choose, "costs_of", devices.append)
        ready(30)
    assert devices == [CPU]


def test_a_pick_follows_the_costs_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is stored later counts for launches that were prepared before."""
    launch, move = ready(30)
    assert "as measured" in launch.pick(move).why
    monkeypatch.setattr(choose, "costs_of", lambda device: UNMEASURED)
    assert "nothing was measured" in launch.pick(move).why


def test_threads_share_the_strategy_that_one_of_them_prepared() -> None:
    launch, move = ready(2)
    kept = list[object]()

    def work(_: int) -> None:
        for _ in range(20):
            launch(*move, None, None)
        kept.append(launch.prepared("zero_copy"))

    run_threads(work, range(8))
    assert all(each is kept[0] is not None for each in kept)
    assert Fake.prepared[0] == "staged"
    assert {*Fake.prepared[1:]} == {"zero_copy"}
    assert launched() == ["zero_copy"] * 160


@settings(max_examples=60)
@given(st.data())
def test_a_quick_pick_is_the_pick(data: st.DataObject) -> None:
    """Without a count of the runs, by any terms and costs, for scattered and neighbouring ids."""
    blocks = data.draw(st.integers(1, 30))
    terms = {
        "overlap": data.draw(st.sampled_from(["compute", "idle"])),
        "detached": data.draw(st.booleans()),
    }
    src, dst = (data.draw(st.sampled_from([view, planes]))(x) for x in ("device", "pinned"))
    launch, _ = ready(30, src, dst, **terms)

    def ids() -> Index:
        drawn = data.draw(st.permutations(range(BLOCKS)))[:blocks]
        return Index(data.draw(st.sampled_from([drawn, sorted(drawn), [*range(blocks)]])), SIZE)

    costs = data.draw(st.sampled_from([H200, UNMEASURED]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "costs_of", lambda device: costs)
        for copy in (moved(src, dst, ids(), ids()) for _ in range(3)):
            assert launch.pick(copy, quick=True).strategy == launch.pick(copy).strategy


def test_a_copy_for_the_kernel_counts_no_runs() -> None:
    launch, move = ready(8, view("device"), view("pinned"), overlap="idle")

    def count(*_: object) -> int:
        raise AssertionError("the runs were counted")

    launch._both.groups = count  # type: ignore[method-assign, assignment]
    assert launch.pick(move, quick=True).strategy == "zero_copy"
    with pytest.raises(AssertionError, match="counted"):
        launch.pick(move)
