# SPDX-License-Identifier: Apache-2.0
"""`host`, which prepares engines and picks one of them, and what happens when one is out."""

from __future__ import annotations

from collections.abc import Iterator
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
from support.threads import run_threads

from portakv import Index, KVView, Unsupported
from portakv.backends.base import Capabilities
from portakv.engines import choose as chosen
from portakv.engines import pieces as pieces_of
from portakv.engines.choose import Host, HostLaunch, Pick
from portakv.engines.engine import PAGEABLE, PINNED, Terms
from portakv.engines.pieces import TALL
from portakv.plan.plan import Move


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chosen, "costs_of", lambda device: H200)
    with engines(monkeypatch):
        yield


def host(**terms: object) -> Host:
    return Host(CPU, terms=Terms(**terms))  # type: ignore[arg-type]


def ready(asked: Host, src: KVView, dst: KVView, step: int = SIZE) -> HostLaunch:
    return asked.prepare(plan_of(src, dst, step, step))


def moved(src: KVView, dst: KVView, mine: Index, theirs: Index | None = None) -> Move:
    """All blocks of the indices, which are alike unless there are two."""
    ids = mine.ids
    assert ids is not None
    return Move(src, dst, mine, theirs or mine, ids.numel() * mine.step)


def runs_of(found: Pick) -> dict[str, int]:
    """What each engine's cost was looked up by."""
    return {one.engine: one.runs for one in found.alternatives}


def launched() -> list[str]:
    return [name for name, _ in Fake.launched]


def test_it_can_do_what_its_engines_can() -> None:
    assert host().capabilities() == Capabilities(places=PINNED | PAGEABLE, index_on="any")


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
        launch(*moved(src, dst, apart(2)), None, None)
    assert launched() == ["direct"] * 3  # 256 KiB
    launch(*moved(src, dst, apart(30)), None, None)
    assert launched()[3:] == ["staged"]
    assert Fake.prepared == ["staged", "direct"]


def test_the_pick_depends_on_the_ids() -> None:
    """Blocks that lie in one piece on both sides need no gather; planes do."""
    both = view("device"), view("pinned")
    assert ready(host(), *both).pick(moved(*both, apart(30))).engine == "descriptors"
    sides = planes("device"), view("pinned")
    scattered, near = ready(host(), *sides), Index(range(5, 35), SIZE)
    found = scattered.pick(moved(*sides, near))
    # Blocks follow each other on the host; on the device the heads do, and no two rows of both.
    each = 30 * ROWS
    assert runs_of(found) == {"staged": 1, "descriptors": each, "direct": each, "ring": 1}
    assert found.engine == "staged"
    found = scattered.pick(moved(*sides, near, apart(30)))
    assert runs_of(found) == {"staged": 30, "descriptors": each, "direct": each, "ring": 30}
    # The other way the host is the source.
    upward = ready(host(), *sides[::-1])
    assert runs_of(upward.pick(moved(*sides[::-1], near, apart(30))))["staged"] == 1


@pytest.mark.parametrize(
    ("below", "tall", "folds"),
    [(None, TALL, False), (None, 16, False), (1, TALL, False), (1, 16, True), (256, TALL, False),
     (257, TALL, True)],
)  # fmt: skip
def test_what_folds_counts_for_the_host_as_it_crosses(
    below: int | None, tall: int, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under the link's `fold_below` at a pitch are one piece, and so are many wider ones (16
    lie together); by torch (None) each is a call. The device pays for each row beside its piece."""
    if below is not None:
        monkeypatch.setattr(chosen, "by_torch", lambda device: False)
        monkeypatch.setattr(chosen, "link_of", lambda device: SimpleNamespace(fold_below=below))
    monkeypatch.setattr(pieces_of, "TALL", tall)
    pieces = 30 * ROWS // 16 if folds else 30 * ROWS
    sides = planes("device"), view("pinned")
    found = ready(host(), *sides).pick(moved(*sides, apart(30)))
    (one,) = (each for each in found.alternatives if each.engine == "descriptors")
    asked = "descriptors", "d2h", 256 * 30 * ROWS // pieces, pieces
    assert (one.run_bytes, one.runs) == asked[2:]
    rows = 30 * ROWS * chosen.ROW["d2h"] if pieces < 30 * ROWS else 0
    assert one.seconds == (H200.seconds(*asked) or 0) + rows
    assert one.host_seconds == H200.host_seconds(*asked)


def test_pageable_memory_goes_by_the_ring() -> None:
    sides = view("pageable"), view("device")
    launch, move = ready(host(), *sides), moved(*sides, apart(3))
    assert launch(*move._replace(count=0), None, None) is None
    assert launched() == []  # nothing is nothing
    launch(*move, None, None)
    assert launched() == ["ring"]
    assert (
        refusals(launch.pick(move))["staged"] == "it does not copy from pageable to device memory"
    )


def test_ids_are_where_the_engine_reads_them() -> None:
    sides = planes("device"), view("pinned")
    launch = ready(host(), *sides)
    launch(*moved(*sides, apart(2), apart(2, 1)), None, None)
    (_, (_, _, first, second, *rest)) = Fake.launched[-1]
    assert [x.ids.dtype for x in (first, second)] == [torch.int32] * 2
    assert [x.ids.tolist() for x in (first, second)] == [[0, 2], [1, 3]]
    assert rest == [2 * SIZE, None, None]
    mine, theirs = apart(30), apart(30)
    launch(*moved(*sides, mine, theirs), None, None)
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
    sides = planes("device"), view("pinned")
    move = moved(*sides, apart(2))
    with engines(monkeypatch, direct=fake):
        launch = ready(host(), *sides)
        assert launch.pick(move).engine == "direct"  # nobody has tried yet
        launch(*move, None, None)
        assert launched() == ["staged"]
        after = launch.pick(move)
        assert after.engine == "staged"
        assert why in refusals(after)["direct"]
        launch(*move, None, None)
        assert Fake.prepared.count("late") == (fake == "Late")  # and is not tried again
        with pytest.raises(Unsupported, match=why):
            launch.launch_by("direct", move, None)


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


def test_engines_get_the_device_and_the_terms_of_the_host() -> None:
    asked = host(overlap="idle", max_thread_blocks=3)
    for engine in asked.engines.values():
        assert isinstance(engine, Fake)
        assert engine.device == CPU
        assert engine.terms == Terms("idle", 3)
    sides = planes("device"), view("pinned")
    move = moved(*sides, apart(32))
    compute, idle = (ready(host(overlap=policy), *sides) for policy in ("compute", "idle"))
    assert compute.pick(move).engine == "staged"
    assert idle.pick(move).engine == "direct"


def test_a_forced_engine_carries_out_what_another_would() -> None:
    sides = view("device"), view("pinned")
    launch, move = ready(host(), *sides), moved(*sides, apart(30))
    for name in ("staged", "descriptors", "direct"):
        launch.launch_by(name, move, None)
    assert launched() == ["staged", "descriptors", "direct"]
    for name, why in (("ring", "it does not copy from device to pinned memory"),
                      ("nonsense", "there is no such engine")):  # fmt: skip
        with pytest.raises(Unsupported, match=why):
            launch.launch_by(name, move, None)


def test_a_pick_is_made_once_and_then_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of many, since other work on the machine only ever adds to it."""
    sides = planes("device"), view("pinned")
    launch, move = ready(host(), *sides), moved(*sides, apart(30))
    first = launch.pick(move)
    monkeypatch.setattr(chosen, "_alternative", None)
    assert launch.pick(move) is first
    # Another list of the same shape has the same answer.
    assert launch.pick(moved(*sides, apart(30))) is first
    best = 1.0
    for _ in range(2000):
        began = perf_counter()
        launch.pick(move)
        best = min(best, perf_counter() - began)
    assert best < 10e-6


def test_a_pick_that_was_under_way_when_its_engine_went_out_does_not_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = planes("device"), view("pinned")
    move, real = moved(*sides, apart(2)), chosen.pick
    with engines(monkeypatch, direct="Late"):
        launch = ready(host(), *sides)

        def slow(*arguments: Any) -> Pick:
            found = real(*arguments)
            launch._prepared("direct")  # by another thread, say
            return found

        monkeypatch.setattr(chosen, "pick", slow)
        assert launch.pick(move).engine == "direct"
        launch(*move, None, None)
        assert launched() == ["staged"]


def test_costs_are_read_before_the_first_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(chosen, "costs_of", asked.append)
    Host(CPU).prepare(plan_of(view("device"), view("pinned")))
    assert asked == [CPU]


def test_threads_prepare_an_engine_once() -> None:
    sides = planes("device"), view("pinned")
    launch, move = ready(host(), *sides), moved(*sides, apart(2))
    run_threads(lambda _: [launch(*move, None, None) for _ in range(20)], range(8))
    assert Fake.prepared == ["staged", "direct"]
    assert launched() == ["direct"] * 160
