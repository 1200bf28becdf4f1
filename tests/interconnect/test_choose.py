# SPDX-License-Identifier: Apache-2.0
"""`host`, which prepares strategies and picks one of them: when one is out, and the rule by which
one is picked, by what each costs and what the terms allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.foreign_cases import blind
from support.host_choice_cases import (
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
    refusals,
    strategies,
    view,
)
from support.threads import run_threads

from portakv import CopyPlan, Index, KVView, Unsupported
from portakv.backends.base import Capabilities
from portakv.interconnect import choose as chosen
from portakv.interconnect import pieces as pieces_of
from portakv.interconnect.choose import Host, HostLaunch
from portakv.interconnect.costs import DIRECTIONS, Point, Table
from portakv.interconnect.link import FOLD_BELOW
from portakv.interconnect.pageable import SIZES
from portakv.interconnect.pick import (
    EQUAL,
    EVEN,
    NARROW,
    ORDER,
    PART,
    ROW,
    UNHIDDEN,
    WIDE,
    Pick,
    pick,
)
from portakv.interconnect.pieces import LEAST_HEIGHT, TALL, Shape
from portakv.interconnect.staging import BUFFERS
from portakv.interconnect.strategy import PAGEABLE, PINNED, SMALL, Terms
from portakv.plan.plan import Move


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chosen, "costs_of", lambda device: H200)
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


def runs_of(result: Pick) -> dict[str, int]:
    return {one.strategy: one.runs for one in result.alternatives}


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
    result = scattered.pick(moved(*sides, near))
    # Blocks follow each other on the host; on the device the heads do, and no two rows of both.
    each = 30 * ROWS
    assert runs_of(result) == {
        "staged": 1,
        "batched_memcpy": each,
        "zero_copy": each,
        "pageable": 1,
    }
    assert result.strategy == "staged"
    result = scattered.pick(moved(*sides, near, apart(30)))
    assert runs_of(result) == {
        "staged": 30,
        "batched_memcpy": each,
        "zero_copy": each,
        "pageable": 30,
    }
    # The other way the host is the source.
    upward, move = ready(30, *sides[::-1])
    assert runs_of(upward.pick(move._replace(src_index=near)))["staged"] == 1


def test_each_shape_of_a_copy_has_a_pick_of_its_own() -> None:
    launch, move = ready(30, view("device"))
    sides = move[:2]
    near = Index(range(5, 35), SIZE)
    far = apart(30)
    shapes = [runs_of(launch.pick(moved(*sides, *x))) for x in ((near, near), (far, near), (far,))]
    assert [(x["batched_memcpy"], x["staged"]) for x in shapes] == [(1, 1), (30, 1), (30, 30)]
    few = launch.pick(moved(*sides, Index([5, 6], SIZE)))  # in one piece as well
    assert few.strategy == "zero_copy"


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
    """
    if below is not None:
        monkeypatch.setattr(chosen, "by_torch", lambda device: False)
        monkeypatch.setattr(chosen, "link_of", lambda device: SimpleNamespace(fold_below=below))
    monkeypatch.setattr(pieces_of, "TALL", tall)
    pieces = 30 * ROWS // 16 if folds else 30 * ROWS
    launch, move = ready(30)
    result = launch.pick(move)
    (one,) = (each for each in result.alternatives if each.strategy == "batched_memcpy")
    arguments = "batched_memcpy", "d2h", 256 * 30 * ROWS // pieces, pieces
    assert (one.run_bytes, one.runs) == arguments[2:]
    rows = 30 * ROWS * ROW["d2h"] if pieces < 30 * ROWS else 0
    assert one.seconds == (H200.seconds(*arguments) or 0) + rows
    assert one.host_seconds == H200.host_seconds(*arguments)


def test_pageable_memory_goes_through_pinned_memory() -> None:
    launch, move = ready(3, view("pageable"), view("device"))
    assert launch(*move._replace(count=0), None, None) is None
    assert launched() == []  # nothing is nothing
    launch(*move, None, None)
    assert launched() == ["pageable"]
    assert (
        refusals(launch.pick(move))["staged"] == "it does not copy from pageable to device memory"
    )


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
        claims = launch.claims(unknown)
        assert (claims.guards, claims.skips_negative) == (expected == "zero_copy",) * 2
        # Staging needs the ids of the host's rows alone.
        assert launch.pick(move._replace(src_index=ids, dst_index=host_ids)).strategy == known
        # But it cannot guard the device's, which are read back for it unless they are trusted.
        for trusted in (True, False):
            there = OnDevice([2 * n for n in range(30)], SIZE, trusted=trusted)
            there.on_host = False
            result = launch.pick(move._replace(src_index=there, dst_index=host_ids)).strategy
            assert result == (known if trusted else expected)
    assert "does not wait" in launch.pick(unknown).why
    monkeypatch.setattr(chosen, "capturing", lambda device: True)
    assert not launch.claims(unknown).guards, "inside a capture nothing is prepared"
    # Nor can the host cut a copy between addresses that it does not know.
    blind(move.dst)
    assert launch.pick(move).strategy == "zero_copy"


def test_ids_that_are_read_back_once_a_strategy_was_asked_keep_one_that_guards_them() -> None:
    """Another thread that uses the same index reads them back between `claims` and the launch."""
    launch, move = ready(30)
    launch.strategies["staged"].reads = "host"
    launch.strategies["batched_memcpy"].reads = "both"
    ids = OnDevice([2 * n for n in range(30)], SIZE)
    assert launch.claims(move._replace(src_index=ids, dst_index=ids)).guards
    launch(*move, None, None)
    launch(*move, None, torch.zeros(1, dtype=torch.int64))
    assert launched() == ["staged", "zero_copy"]


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
    monkeypatch.setattr(chosen, "costs_of", lambda device: UNMEASURED)
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
        result = launch.pick(moved(src, dst, ids))
        assert result.strategy == expected
    assert {one.strategy: one.run_bytes for one in result.alternatives}["staged"] >= POOLS[layout]


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
        after = launch.pick(move)
        assert after.strategy == "staged"
        assert why in refusals(after)["zero_copy"]
        launch(*move, None, None)
        assert Fake.prepared.count("late") == (fake == "Late")  # and is not tried again
        with pytest.raises(Unsupported, match=why):
            launch.launch_by("zero_copy", move, None)


def test_a_strategy_that_cannot_use_the_host_s_memory_is_out_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with strategies(monkeypatch, zero_copy="Unreaching"):
        launch, move = ready(2)
        result = launch.pick(move)
        assert (result.strategy, refusals(result)["zero_copy"]) == (
            "staged",
            "it does not reach it",
        )
        launch(*move, None, None)
        assert launched() == ["staged"]
        move.dst.derived["reached"] = True  # other memory, of the same form
        assert launch.pick(move).strategy == "zero_copy"


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


def test_costs_are_read_and_a_pick_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    with monkeypatch.context() as patch:
        patch.setattr(chosen, "costs_of", devices.append)
        launch, move = ready(30)
    assert devices == [CPU]
    first = launch.pick(move)
    assert launch.pick(move) is first
    # Another list of the same shape has the same answer.
    assert launch.pick(moved(*move[:2], apart(30))) is first


def test_a_pick_under_way_when_its_strategy_goes_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = pick
    with strategies(monkeypatch, zero_copy="Late"):
        launch, move = ready(2)

        def slow(*arguments: Any) -> Pick:
            result = real(*arguments)
            launch.prepared("zero_copy")  # by another thread, say
            return result

        monkeypatch.setattr(chosen, "pick", slow)
        assert launch.pick(move).strategy == "zero_copy"
        launch(*move, None, None)
        assert launched() == ["staged"]


def test_threads_prepare_a_strategy_once() -> None:
    launch, move = ready(2)
    run_threads(lambda _: [launch(*move, None, None) for _ in range(20)], range(8))
    assert Fake.prepared == ["staged", "zero_copy"]
    assert launched() == ["zero_copy"] * 160


# The rule

MIB = 1 << 20
OUT = {"pageable": "it does not copy pinned memory"}


def picked(
    payload: int,
    runs: int,
    host_runs: int,
    direction: str = "d2h",
    costs: object = UNMEASURED,
    out: dict[str, str] | None = None,
    **terms: object,
) -> Pick:
    """Return the pick for scattered runs on the device and so many in host memory."""
    apart = Shape(payload, runs, runs)
    dense = Shape(payload, host_runs, host_runs)
    shapes = {"staged": dense, "batched_memcpy": apart, "zero_copy": apart, "pageable": dense}
    out = OUT if out is None else out
    return pick(shapes, direction, out, Terms(**terms), costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_default_rule_picks_what_the_measurements_behind_it_say(direction: str) -> None:
    """Gathering pays if it makes runs longer; if it does not, and for long runs, the copy engine
    goes by itself; a kernel moves little, or what may be slow."""
    large = 64 * MIB
    small = SMALL[direction]
    wide, even, narrow = (large // each for each in (WIDE, EVEN, NARROW))
    for payload, runs, host_runs, strategy in (
        (large, 2048, 1, "staged"),  # scattered to a dense chunk
        (large, 262144, 1, "staged"),  # rows of 256 bytes
        (large, 32, 32, "batched_memcpy"),  # 2 MiB each, both sides
        (large, wide, 1, "batched_memcpy"),
        (large, wide + 1, 1, "staged"),
        (large, even, even, "batched_memcpy"),
        (large, even, 100, "staged"),
        (large, even + 1, even + 1, "zero_copy"),  # short runs on both sides
        (small, 4096, 1, "zero_copy"),
        (small + 1, 4096, 1, "staged"),
    ):
        assert picked(payload, runs, host_runs, direction).strategy == strategy
    assert picked(large, 4096, narrow + 1, direction, overlap="idle").strategy == "zero_copy"
    above = UNHIDDEN[direction] + large
    narrow = above // NARROW
    assert picked(above, 4096, narrow, direction, overlap="idle").strategy == "staged"
    assert picked(above, 4096, narrow + 1, direction, overlap="idle").strategy == "zero_copy"
    assert picked(UNHIDDEN[direction], 1, 1, direction, overlap="idle").strategy == "zero_copy"
    for terms in ({"overlap": "idle"}, {"max_thread_blocks": 3}):  # no copy engine, run by run
        assert picked(large, even, even, direction, **terms).strategy == "zero_copy"
    # A detached transfer's stream must not wait for a kernel.
    assert picked(large, even + 1, even + 1, direction, detached=True).strategy == "staged"
    pageable = dict.fromkeys(ORDER[:3], "it does not copy pageable memory")
    assert picked(large, 64, 64, direction, out=pageable).strategy == "pageable"


def test_what_the_rule_wants_may_not_serve() -> None:
    out = {**OUT, "zero_copy": "no driver"}
    why = "the gentlest strategy that is left, as nothing was measured here"
    assert picked(MIB, 4096, 1, out=out)[:2] == ("staged", why)
    out["batched_memcpy"] = "no"
    assert picked(64 * MIB, 2, 2, out=out)[:2] == ("staged", "the only strategy that is left")


def test_a_computing_device_keeps_the_kernel_out() -> None:
    arguments = (16 * MIB, 65536, 400)
    result = picked(*arguments)
    assert result.strategy == "staged"
    assert "overlap='compute'" in refusals(result)["zero_copy"]
    for terms in ({"overlap": "idle"}, {"max_gbps": 30.0}, {"max_thread_blocks": 2}):
        let_in = picked(*arguments, **terms)
        assert let_in.strategy == "zero_copy"
        assert refusals(let_in)["zero_copy"] == ""
    # The seconds that it would have taken are listed all the same.
    result = picked(*arguments, costs=table(staged=2.0, batched_memcpy=3.0, zero_copy=1e-3))
    assert result.strategy == "staged"
    assert "zero_copy would take less, but the terms exclude it" in result.why
    seconds = {one.strategy: one.seconds for one in result.alternatives}
    assert (seconds["zero_copy"] or 9) < (seconds["staged"] or 0)


def test_terms_never_leave_a_copy_without_a_strategy_and_no_strategy_at_all_is_an_error() -> None:
    out = {name: f"{name} is broken" for name in ORDER if name != "zero_copy"}
    result = picked(64 * MIB, 64, 64, out=out)
    assert result.strategy == "zero_copy"
    assert "no other strategy takes the copy" in result.why
    with pytest.raises(Unsupported, match=r"(?s)none can:.*staged is broken.*pageable is"):
        picked(MIB, 1, 1, out={**out, "zero_copy": "no"})


def table(host: dict[str, float] | None = None, **seconds: float) -> Table:
    """Return the seconds of strategies for 4 MiB in 1024 runs, a hundredth of that for one run,
    and those of the host, else 0."""
    host_seconds = host or {}
    points = {
        (strategy, "d2h"): {
            4096: [
                Point(n, s * part, host_seconds.get(strategy, 0.0))
                for n, part in ((1, 0.01), (1024, 1))
            ]
        }
        for strategy, s in seconds.items()
    }
    return Table({}, points)


def test_what_was_measured_decides() -> None:
    arguments = (4 * MIB, 1024, 64)
    for fast, slow in (("staged", "batched_memcpy"), ("batched_memcpy", "staged")):
        result = picked(*arguments, costs=table(**dict[str, Any]({fast: 1e-5, slow: 2e-5})))
        assert (result.strategy, "as measured" in result.why) == (fast, True)
    # A strategy that is not in the table cannot be better.
    result = picked(*arguments, costs=table(staged=1.0), overlap="idle")
    assert result.strategy == "staged"
    assert [one.strategy for one in result.alternatives if one.seconds is not None] == ["staged"]
    # Nothing that was measured may go: the rule decides.
    result = picked(*arguments, costs=table(zero_copy=1e-9))
    assert result.strategy in ("staged", "batched_memcpy")
    assert "the default rule" in result.why


def test_the_hosts_part_counts_where_nothing_hides_it() -> None:
    """With overlap='idle', or if the call is longer than the transfer; a quarter of it shows."""
    arguments = (4 * MIB, 1024, 64)
    short = table({"staged": 0.8e-3}, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=short).strategy == "staged"
    idle = picked(*arguments, costs=short, overlap="idle")
    assert idle.strategy == "batched_memcpy"
    assert "with the host's part" in idle.why
    long = table({"staged": 1.2e-3}, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=long).strategy == "batched_memcpy"
    little = table({"staged": 0.2e-3}, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=little, overlap="idle").strategy == "staged"


def test_of_those_about_as_quick_the_one_that_keeps_the_host_least() -> None:
    arguments = (4 * MIB, 1024, 64)
    idle = dict[str, Any](overlap="idle")
    host = {"staged": 3e-4, "batched_memcpy": 2e-4, "zero_copy": 1e-4}
    near = 1 + 0.9 * EQUAL
    far = 1 + 1.1 * EQUAL
    known = table(host, staged=1.0, batched_memcpy=near, zero_copy=far)
    result = picked(*arguments, costs=known, **idle)
    assert result.strategy == "batched_memcpy"
    assert "within 2 % of the least time" in result.why
    assert "keeps the host least, as measured" in result.why
    assert {one.strategy: one.host_seconds for one in result.alternatives}["zero_copy"] == 1e-4
    # The host's cost of a slower strategy does not count.
    result = picked(
        *arguments, costs=table(host, staged=1.0, batched_memcpy=far, zero_copy=far), **idle
    )
    assert result.strategy == "staged"
    assert result.why.startswith("the least time of the strategies")
    # Nor is what the terms keep out, however quick.
    quick = table(host, staged=1.0, batched_memcpy=near, zero_copy=0.5)
    assert picked(*arguments, costs=quick).strategy == "batched_memcpy"
    # Where the host is kept as long, the gentlest.
    equal = table(dict.fromkeys(ORDER, 1e-4), staged=near, batched_memcpy=1.0, zero_copy=1.0)
    assert picked(*arguments, costs=equal, **idle).strategy == "staged"
    # A strategy that was not measured is no rival, though the host would hardly notice it.
    assert picked(*arguments, costs=table(host, staged=1.0), **idle).strategy == "staged"


ROWS_OF_2_KIB = Shape(2048 * 6400, 6400, 100)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces_are_looked_up_and_each_row_costs_the_device(direction: str) -> None:
    result = pick(dict.fromkeys(ORDER, ROWS_OF_2_KIB), direction, OUT, Terms(), H200)
    for one in result.alternatives:
        arguments = one.strategy, direction, 64 * 2048, 100
        assert (one.runs, one.run_bytes) == (100, 64 * 2048)
        assert one.seconds == H200.seconds(*arguments) + 6400 * ROW[direction]
        assert one.host_seconds == H200.host_seconds(*arguments)
    # Rows that cross by themselves are pieces of 2 KiB, and nothing is added.
    apart = Shape(2048 * 6400, 6400, 6400)
    for one in pick(dict.fromkeys(ORDER, apart), direction, OUT, Terms(), H200).alternatives:
        assert (one.runs, one.run_bytes) == (6400, 2048)
        assert one.seconds == H200.seconds(one.strategy, direction, 2048, 6400)


def test_rows_count_beside_a_table_and_may_turn_the_pick() -> None:
    known = table(staged=1.1e-3, batched_memcpy=1e-3)
    idle = Terms("idle")
    of_1024 = Shape(4 * MIB, 1024, 1024), Shape(4 * MIB, 8 * 1024, 1024)

    def seconds(shape: Shape) -> tuple[str, float]:
        shapes = {"staged": of_1024[0], "batched_memcpy": shape}
        result = pick(shapes, "d2h", OUT, idle, known)
        return result.strategy, result.alternatives[1].seconds or 0

    assert seconds(of_1024[0]) == ("batched_memcpy", 1e-3)
    assert seconds(of_1024[1]) == ("staged", 1e-3 + 8 * 1024 * ROW["d2h"])


def test_the_guide_tells_the_rule() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "host.md").read_text()
    flat = " ".join(page.split())
    to_host, to_device = (f"{ROW[direction] * 1e9:.0f} ns" for direction in DIRECTIONS)
    for text in (
        f"those within {EQUAL * 100:.0f} % of the fewest seconds",
        f"of {LEAST_HEIGHT} or more that are narrower than {FOLD_BELOW >> 10} KiB, of {TALL} or "
        "more that are not",
        f"wide ones where {TALL} or more lie together",
        f"device {to_host} more to the host, and {to_device} to the device",
        f"runs of less than {NARROW >> 10} KiB",
        f"{PART:.0%} of the host's time counts as well",
        f"{UNHIDDEN['d2h'] >> 20} MiB from the device or {UNHIDDEN['h2d'] >> 20} MiB to it",
        f"runs of {WIDE >> 10} KiB or more",
        f"runs of {EVEN >> 10} KiB or more that a gather would not merge",
        f"three pinned buffers of at most {SIZES.largest >> 20} MiB each",
        "{} MiB from the device or {} MiB to it".format(*(n >> 20 for n in SMALL.values())),
    ):
        assert text in flat
    assert BUFFERS == 3
