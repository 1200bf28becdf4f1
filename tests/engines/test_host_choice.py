# SPDX-License-Identifier: Apache-2.0
"""`host`, which prepares engines and picks one of them, and what happens when one is out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.host_choice_cases import (
    CPU,
    H200,
    ROWS,
    SIZE,
    Fake,
    apart,
    engines,
    plan_of,
    planes,
    refusals,
    view,
)

from portakv import Index, KVView, Unsupported
from portakv.engines import choose as chosen
from portakv.engines import choose as picking
from portakv.engines.choose import Host, HostLaunch, Pick
from portakv.engines.costs import Table
from portakv.engines.engine import Terms
from portakv.plan.move import Move


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with engines(monkeypatch):
        yield


def host(**terms: object) -> Host:
    return Host(CPU, terms=Terms(**terms), costs=H200)  # type: ignore[arg-type]


def ready(asked: Host, src: KVView, dst: KVView, **steps: int) -> HostLaunch:
    return asked.prepare(plan_of(src, dst, **steps))


def launched() -> list[str]:
    return [name for name, _ in Fake.launched]


def test_it_can_do_what_its_engines_can() -> None:
    can = host().capabilities()
    assert can.places == {
        ("device", "pinned"), ("pinned", "device"), ("device", "pageable"), ("pageable", "device"),
    }  # fmt: skip
    assert (can.index_on, can.guards, can.skips_negative, can.capturable) == (
        "any", False, False, False,
    )  # fmt: skip
    assert can.threads


def test_an_engine_that_does_not_serve_the_device_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with engines(monkeypatch, direct="Absent", ring="Absent", descriptors="no.such.module:At"):
        asked = host()
        assert list(asked.engines) == ["staged"]
        assert asked.out["direct"] == asked.out["ring"] == "its driver is not installed"
        assert "failed to load: ModuleNotFoundError" in asked.out["descriptors"]
        assert asked.capabilities().places == {("device", "pinned"), ("pinned", "device")}
        decision = asked.check(plan_of(view("device"), view("pageable")))
        assert not decision.accepted
        for reason in ("staged: it does not copy from device to pageable", "ring: its driver"):
            assert reason in decision.reason
        with pytest.raises(Unsupported, match="ring: its driver is not installed"):
            asked.prepare(plan_of(view("device"), view("pageable")))


def test_who_takes_a_plan() -> None:
    asked = host()
    assert asked.check(plan_of(view("device"), view("pinned"))).reason.endswith(
        "by staged or descriptors or direct"
    )
    assert asked.check(plan_of(view("pageable"), view("device"))).reason.endswith("by ring")
    assert not asked.check(plan_of(view("pageable"), view("pinned"))).accepted


def test_engines_are_prepared_when_they_are_needed() -> None:
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    assert Fake.prepared == ["staged"]  # one, so that the plan is known to be carried out
    for _ in range(3):
        launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)
    assert launched() == ["direct"] * 3  # 256 KiB
    launch(src, dst, apart(30), apart(30), 30 * SIZE, None, None)
    assert launched()[3:] == ["staged"]
    assert Fake.prepared == ["staged", "direct"]


def test_the_pick_depends_on_the_ids() -> None:
    """Blocks that lie in one piece on both sides need no gather; planes do."""
    blocks = ready(host(), view("device"), view("pinned"))
    both = view("device"), view("pinned")
    assert blocks.pick(Move(*both, apart(30), apart(30), 30 * SIZE)).engine == "descriptors"
    scattered = ready(host(), planes("device"), view("pinned"))
    sides = planes("device"), view("pinned")
    near = Index(range(5, 35), SIZE)
    found = scattered.pick(Move(*sides, near, near, 30 * SIZE))
    looked_up = {one.engine: one.runs for one in found.alternatives}
    # Blocks follow each other on the host; on the device the heads do, and no two rows of both.
    assert looked_up == {"staged": 1, "descriptors": 30 * ROWS, "direct": 30 * ROWS, "ring": 1}
    assert found.engine == "staged"
    found = scattered.pick(Move(*sides, near, apart(30), 30 * SIZE))
    looked_up = {one.engine: one.runs for one in found.alternatives}
    assert looked_up == {"staged": 30, "descriptors": 30 * ROWS, "direct": 30 * ROWS, "ring": 30}
    # The other way the host is the source.
    upward = ready(host(), view("pinned"), planes("device"))
    found = upward.pick(Move(*sides[::-1], near, apart(30), 30 * SIZE))
    assert {one.engine: one.runs for one in found.alternatives}["staged"] == 1


@pytest.mark.parametrize(
    ("below", "pieces"),
    [(None, 30 * ROWS), (1, 30 * ROWS), (256, 30 * ROWS), (257, 30 * ROWS // 16)],
)
def test_what_folds_counts_for_the_host_as_it_crosses(
    below: int | None, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under the crossing's `fold_below` are one piece where they lie at a pitch; by torch
    (None) each is a call. The device pays for each row beside its piece."""
    if below is not None:
        monkeypatch.setattr(chosen, "by_torch", lambda device: False)
        crossing = SimpleNamespace(fold_below=below)
        monkeypatch.setattr(chosen, "link_of", lambda device: crossing)
    src, dst = planes("device"), view("pinned")
    move = Move(src, dst, apart(30), apart(30), 30 * SIZE)
    found = ready(host(), src, dst).pick(move)
    (one,) = (each for each in found.alternatives if each.engine == "descriptors")
    asked = "descriptors", "d2h", 256 * 30 * ROWS // pieces, pieces
    assert (one.run_bytes, one.runs) == asked[2:]
    rows = 30 * ROWS * picking.ROW["d2h"] if pieces < 30 * ROWS else 0
    assert one.seconds == (H200.seconds(*asked) or 0) + rows
    assert one.host_seconds == H200.host_seconds(*asked)


def test_to_torch_each_row_is_a_call_however_many_lie_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 64 wide rows in a block a driver that has batches makes one 2-D copy; torch none."""
    views = []
    for place in ("device", "pinned"):
        tensor = torch.empty(8, 2, 64, 4, 64) if place == "device" else torch.empty(8, 64, 2, 4, 64)
        layout = f"block {'kv token' if place == 'device' else 'token kv'} head dim"
        made = KVView(tensor, layout)
        made.form = replace(made.form, place=place)
        views.append(made)

    def runs() -> int:
        launch = ready(host(), views[0], views[1], src_step=64, dst_step=64)
        blocks = Index([0, 2, 4, 6], 64)
        found = launch.pick(Move(views[0], views[1], blocks, blocks, 4 * 64))
        return {one.engine: one.runs for one in found.alternatives}["descriptors"]

    assert runs() == 4 * 2 * 64
    monkeypatch.setattr(chosen, "by_torch", lambda device: False)
    monkeypatch.setattr(chosen, "link_of", lambda device: SimpleNamespace(fold_below=1))
    assert runs() == 4 * 2


def test_pageable_memory_goes_by_the_ring() -> None:
    src, dst = view("pageable"), view("device")
    launch = ready(host(), src, dst)
    launch(src, dst, apart(3), apart(3), 3 * SIZE, None, None)
    assert launched() == ["ring"]
    why = refusals(launch.pick(Move(src, dst, apart(3), apart(3), 3 * SIZE)))
    assert why["staged"] == "it does not copy from pageable to device memory"


def test_nothing_is_nothing() -> None:
    src, dst = view("device"), view("pinned")
    launch = ready(host(), src, dst)
    assert launch(src, dst, apart(3), apart(3), 0, None, None) is None
    assert launched() == []


def test_ids_are_where_the_engine_reads_them() -> None:
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    mine, theirs = apart(2), apart(2, 1)
    launch(src, dst, mine, theirs, 2 * SIZE, None, None)
    (_, (_, _, first, second, *rest)) = Fake.launched[-1]
    assert [x.ids.dtype for x in (first, second)] == [torch.int32] * 2
    assert [x.ids.tolist() for x in (first, second)] == [[0, 2], [1, 3]]
    assert rest == [2 * SIZE, None, None]
    mine, theirs = apart(30), apart(30)
    launch(src, dst, mine, theirs, 30 * SIZE, None, None)
    name, (_, _, first, second, *_) = Fake.launched[-1]
    assert name == "staged"
    assert first is mine
    assert second is theirs


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        ("Late", "its kernel does not compile"),
        ("Breaking", "it failed to prepare: RuntimeError: the compiler crashed"),
    ],
)
def test_an_engine_that_cannot_be_prepared_is_out_with_its_reason(
    fake: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = planes("device"), view("pinned")
    with engines(monkeypatch, direct=fake):
        launch = ready(host(), src, dst)
        before = launch.pick(Move(src, dst, apart(2), apart(2), 2 * SIZE))
        assert before.engine == "direct"  # nobody has tried yet
        launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)
        assert launched() == ["staged"]
        after = launch.pick(Move(src, dst, apart(2), apart(2), 2 * SIZE))
        assert after.engine == "staged"
        assert why in refusals(after)["direct"]
        launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)
        assert Fake.prepared.count("late") == (fake == "Late")  # and is not tried again
        with pytest.raises(Unsupported, match=why):
            launch.launch_by("direct", Move(src, dst, apart(2), apart(2), 2 * SIZE), None)


def test_the_first_engine_that_can_be_prepared_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = view("device"), view("pinned")
    with engines(monkeypatch, staged="Late"):
        launch = ready(host(), *pair)
        assert Fake.prepared == ["late", "descriptors"]
        assert "does not compile" in launch.out["staged"]
    with (
        engines(monkeypatch, staged="Late", descriptors="Refusing", direct="Breaking"),
        pytest.raises(Unsupported, match=r"(?s)compile.*too narrow|too narrow.*compile"),
    ):
        ready(host(), *pair)


def test_engines_get_the_device_and_the_terms() -> None:
    asked = host(overlap="idle", max_thread_blocks=3)
    for engine in asked.engines.values():
        assert isinstance(engine, Fake)
        assert engine.device == CPU
        assert engine.terms == Terms("idle", 3)


def test_terms_of_the_host_count() -> None:
    src, dst = planes("device"), view("pinned")
    index = Index(range(0, 64, 2), SIZE)
    compute, idle = (ready(host(overlap=policy), src, dst) for policy in ("compute", "idle"))
    assert compute.pick(Move(src, dst, index, index, 32 * SIZE)).engine == "staged"
    assert idle.pick(Move(src, dst, index, index, 32 * SIZE)).engine == "direct"


def test_a_forced_engine_carries_out_what_another_would() -> None:
    src, dst = view("device"), view("pinned")
    launch = ready(host(), src, dst)
    for name in ("staged", "descriptors", "direct"):
        launch.launch_by(name, Move(src, dst, apart(30), apart(30), 30 * SIZE), None)
    assert launched() == ["staged", "descriptors", "direct"]
    with pytest.raises(Unsupported, match="it does not copy from device to pinned memory"):
        launch.launch_by("ring", Move(src, dst, apart(30), apart(30), 30 * SIZE), None)
    with pytest.raises(Unsupported, match="there is no such engine"):
        launch.launch_by("nonsense", Move(src, dst, apart(30), apart(30), 30 * SIZE), None)


def test_a_pick_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    index = apart(30)
    first = launch.pick(Move(src, dst, index, index, 30 * SIZE))
    monkeypatch.setattr(picking, "_alternative", None)
    assert launch.pick(Move(src, dst, index, index, 30 * SIZE)) is first
    # Another list of the same shape has the same answer.
    assert launch.pick(Move(src, dst, apart(30), apart(30), 30 * SIZE)) is first


def test_picking_with_kept_ids_is_cheap() -> None:
    """The best of many, since other work on the machine only ever adds to it."""
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    index, best = apart(30), 1.0
    for _ in range(2000):
        began = perf_counter()
        launch.pick(Move(src, dst, index, index, 30 * SIZE))
        best = min(best, perf_counter() - began)
    assert best < 10e-6


def test_a_pick_that_was_under_way_when_its_engine_went_out_does_not_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, dst = planes("device"), view("pinned")
    both = apart(2), apart(2)
    with engines(monkeypatch, direct="Late"):
        launch = ready(host(), src, dst)
        real = picking.pick

        def slow(*arguments: Any) -> Pick:
            found = real(*arguments)
            launch._prepared("direct")  # by another thread, say
            return found

        monkeypatch.setattr("portakv.engines.choose.pick", slow)
        assert launch.pick(Move(src, dst, *both, 2 * SIZE)).engine == "direct"
        launch(src, dst, *both, 2 * SIZE, None, None)
        assert launched() == ["staged"]


def test_costs_are_read_before_the_first_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def look(device: torch.device) -> Table:
        asked.append(device)
        return H200  # type: ignore[return-value]

    monkeypatch.setattr("portakv.engines.choose.costs_of", look)
    Host(CPU).prepare(plan_of(view("device"), view("pinned")))
    assert asked == [CPU]


def test_threads_prepare_an_engine_once() -> None:
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        for _ in range(20):
            launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Fake.prepared == ["staged", "direct"]
    assert launched() == ["direct"] * 160
