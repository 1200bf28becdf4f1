# SPDX-License-Identifier: Apache-2.0
"""The choice among engines: what each costs, what the terms allow, and what happens when one is
out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from host_choice_cases import CPU, SIZE, Fake, apart, engines, plan_of, planes, view

from portakv import Index, KVView, Unsupported
from portakv.host.engines import picking
from portakv.host.engines.assumed import COSTS, DIRECTIONS, Assumed
from portakv.host.engines.chosen import Host, HostLaunch
from portakv.host.engines.picking import APART, ORDER, SMALL, WIDE, Pick, pick
from portakv.host.engines.shapes import Shape
from portakv.host.engines.table import Point, Table
from portakv.host.engines.terms import Terms

MIB = 1 << 20
ASSUMED = Assumed("of a test")
OUT = {"ring": "it does not copy pinned memory"}


def chosen(
    payload: int, runs: int, host_runs: int, direction: str = "d2h", costs: object = ASSUMED,
    out: dict[str, str] | None = None, **terms: object,
) -> Pick:  # fmt: skip
    """The pick for scattered runs on the device and so many in host memory."""
    apart, dense = Shape(payload, runs, runs), Shape(payload, host_runs, host_runs)
    shapes = {"staged": dense, "descriptors": apart, "direct": apart, "ring": dense}
    out = OUT if out is None else out
    return pick(shapes, direction, out, Terms(**terms), costs)  # type: ignore[arg-type]


def refusals(picked: Pick) -> dict[str, str]:
    return {one.engine: one.refused for one in picked.alternatives}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_assumed_picks_what_the_measurements_behind_it_say(direction: str) -> None:
    """Gathering pays where it makes runs longer; where it does not, the copy engine goes by
    itself; a kernel only moves little, or what may be slow."""
    assert chosen(64 * MIB, 2048, 1, direction).engine == "staged"  # scattered to a dense chunk
    assert chosen(64 * MIB, 262144, 1, direction).engine == "staged"  # rows of 256 bytes
    assert chosen(64 * MIB, 32, 32, direction).engine == "descriptors"  # 2 MiB each, both sides
    assert chosen(64 * MIB, 2048, 2048, direction).engine == "descriptors"
    assert chosen(SMALL[direction], 4096, 1, direction).engine == "direct"
    assert chosen(SMALL[direction] + 1, 4096, 1, direction).engine == "staged"
    assert chosen(16 * MIB, 65536, 65536, direction, overlap="idle").engine == "direct"
    pageable = dict.fromkeys(ORDER[:3], "it does not copy pageable memory")
    assert chosen(64 * MIB, 64, 64, direction, out=pageable).engine == "ring"


def test_assumed_costs_are_those_of_the_measurements() -> None:
    """Batched copies of 32 KiB reach 23 - 24 GB/s, of 128 KiB 41; a gather before a memcpy 0.97
    of it at 33 MB and 0.987 at 168."""
    rates = {}
    for size, runs in ((32 << 10, 10000), (128 << 10, 4000)):
        rates[size] = size * runs / (ASSUMED.seconds("descriptors", "d2h", size, runs) or 0) / 1e9
    assert 23 < rates[32 << 10] < 24
    assert 40 < rates[128 << 10] < 42
    for nbytes, share in ((33_600_000, 0.94), (168_000_000, 0.975)):
        rate = nbytes / (ASSUMED.seconds("staged", "h2d", nbytes, 1) or 0)
        assert share < rate / 55.3e9 < share + 0.04
    assert {engine for engine, _ in COSTS} == set(ORDER)
    assert {direction for _, direction in COSTS} == set(DIRECTIONS)
    assert ASSUMED.seconds("nonsense", "d2h", 1, 1) is None


def test_a_computing_device_keeps_the_kernel_out() -> None:
    asked = (16 * MIB, 65536, 65536)
    found = chosen(*asked)
    assert found.engine != "direct"
    assert "overlap='compute'" in refusals(found)["direct"]
    assert "direct would take less, but the terms keep it out" in found.why
    # What it would have taken is told all the same.
    seconds = {one.engine: one.seconds for one in found.alternatives}
    assert (seconds["direct"] or 9) < (seconds[found.engine] or 0)
    for terms in ({"overlap": "idle"}, {"max_gbps": 30.0}, {"max_thread_blocks": 2}):
        let_in = chosen(*asked, **terms)
        assert let_in.engine == "direct"
        assert refusals(let_in)["direct"] == ""


def test_a_rate_makes_engines_equal_and_the_gentlest_wins() -> None:
    found = chosen(64 * MIB, 64, 1, max_gbps=10.0)
    assert found.engine == "staged"
    seconds = {one.seconds for one in found.alternatives if one.engine != "ring"}
    assert seconds == {64 * MIB / 10e9}
    assert "at most 10 GB/s" in found.why


def test_terms_never_leave_a_copy_without_an_engine() -> None:
    out = {"staged": "no", "descriptors": "no", "ring": "no"}
    found = chosen(64 * MIB, 64, 64, out=out)
    assert found.engine == "direct"
    assert "no other engine takes the copy" in found.why


def test_no_engine_at_all_is_an_error_with_each_reason() -> None:
    out = {name: f"{name} is broken" for name in ORDER}
    with pytest.raises(Unsupported, match=r"(?s)no engine takes it.*staged is broken.*ring is"):
        chosen(MIB, 1, 1, out=out)


def table(*engines: str, **seconds: float) -> Table:
    points = {
        (engine, "d2h"): {4096: [Point(1, s, s), Point(1024, 100 * s, s)]}
        for engine, s in seconds.items()
    }
    return Table({}, points)


def test_what_was_measured_decides() -> None:
    asked = (4 * MIB, 1024, 1024)
    for fast in ("staged", "descriptors"):
        slow = "staged" if fast == "descriptors" else "descriptors"
        found = chosen(*asked, costs=table(**{fast: 1e-5, slow: 2e-5}))
        assert found.engine == fast
        assert "as measured" in found.why
    # An engine that the table does not know may only be assumed to be better.
    found = chosen(*asked, costs=table(staged=1.0), overlap="idle")
    assert found.engine == "staged"
    known = {one.engine: one.measured for one in found.alternatives}
    assert known == {"staged": True, "descriptors": False, "direct": False, "ring": False}
    # Nothing that was measured may go: what is assumed is better than nothing.
    found = chosen(*asked, costs=table(direct=1e-9))
    assert found.engine in ("staged", "descriptors")
    assert "as assumed" in found.why


def test_rows_at_a_pitch_count_as_one_piece_if_they_are_wide() -> None:
    for row, runs, looked_up in ((WIDE, 640, 20), (WIDE // 2, 640, 640)):
        shape = Shape(row * 640, runs, 20)
        found = pick(dict.fromkeys(ORDER, shape), "d2h", OUT, Terms(), ASSUMED)
        assert {one.runs for one in found.alternatives} == {looked_up}
        assert {one.run_bytes for one in found.alternatives} == {row * 640 // looked_up}


# Host


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with engines(monkeypatch):
        yield


def host(**terms: object) -> Host:
    return Host(CPU, terms=Terms(**terms), costs=ASSUMED)  # type: ignore[arg-type]


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
    assert blocks.pick(*both, apart(30), apart(30), 30 * SIZE).engine == "descriptors"
    scattered = ready(host(), planes("device"), view("pinned"))
    sides = planes("device"), view("pinned")
    near = Index(range(5, 35), SIZE)
    found = scattered.pick(*sides, near, near, 30 * SIZE)
    looked_up = {one.engine: one.runs for one in found.alternatives}
    # Blocks follow each other on the host; on the device their planes do, at one pitch there: 8
    # pieces, but on the way to the host each row of them costs what a run does.
    assert looked_up == {"staged": 1, "descriptors": 30 * 8, "direct": 30 * 8, "ring": 1}
    assert found.engine == "staged"
    found = scattered.pick(*sides, near, apart(30), 30 * SIZE)
    looked_up = {one.engine: one.runs for one in found.alternatives}
    assert looked_up == {"staged": 30, "descriptors": 30 * 8, "direct": 30 * 8, "ring": 30}
    # The other way the host is the source.
    upward = ready(host(), view("pinned"), planes("device"))
    found = upward.pick(*sides[::-1], near, apart(30), 30 * SIZE)
    assert {one.engine: one.runs for one in found.alternatives}["staged"] == 1


def test_pageable_memory_goes_by_the_ring() -> None:
    src, dst = view("pageable"), view("device")
    launch = ready(host(), src, dst)
    launch(src, dst, apart(3), apart(3), 3 * SIZE, None, None)
    assert launched() == ["ring"]
    why = refusals(launch.pick(src, dst, apart(3), apart(3), 3 * SIZE))
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
        before = launch.pick(src, dst, apart(2), apart(2), 2 * SIZE)
        assert before.engine == "direct"  # nobody has tried yet
        launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)
        assert launched() == ["staged"]
        after = launch.pick(src, dst, apart(2), apart(2), 2 * SIZE)
        assert after.engine == "staged"
        assert why in refusals(after)["direct"]
        launch(src, dst, apart(2), apart(2), 2 * SIZE, None, None)
        assert Fake.prepared.count("late") == (fake == "Late")  # and is not tried again
        with pytest.raises(Unsupported, match=why):
            launch.carry("direct", src, dst, apart(2), apart(2), 2 * SIZE, None)


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
    src, dst = view("device"), view("pinned")
    index = Index(range(0, 64, 2), SIZE)
    compute, idle = (ready(host(overlap=policy), src, dst) for policy in ("compute", "idle"))
    assert compute.pick(src, dst, index, index, 32 * SIZE).engine == "descriptors"
    assert idle.pick(src, dst, index, index, 32 * SIZE).engine == "direct"


def test_a_forced_engine_carries_out_what_another_would() -> None:
    src, dst = view("device"), view("pinned")
    launch = ready(host(), src, dst)
    for name in ("staged", "descriptors", "direct"):
        launch.carry(name, src, dst, apart(30), apart(30), 30 * SIZE, None)
    assert launched() == ["staged", "descriptors", "direct"]
    with pytest.raises(Unsupported, match="it does not copy from device to pinned memory"):
        launch.carry("ring", src, dst, apart(30), apart(30), 30 * SIZE, None)
    with pytest.raises(Unsupported, match="there is no such engine"):
        launch.carry("nonsense", src, dst, apart(30), apart(30), 30 * SIZE, None)


def test_a_pick_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    index = apart(30)
    first = launch.pick(src, dst, index, index, 30 * SIZE)
    monkeypatch.setattr(picking, "_alternative", None)
    assert launch.pick(src, dst, index, index, 30 * SIZE) is first
    # Another list of the same shape has the same answer.
    assert launch.pick(src, dst, apart(30), apart(30), 30 * SIZE) is first


def test_picking_with_kept_ids_is_cheap() -> None:
    """The best of many, since other work on the machine only ever adds to it."""
    src, dst = planes("device"), view("pinned")
    launch = ready(host(), src, dst)
    index, best = apart(30), 1.0
    for _ in range(2000):
        began = perf_counter()
        launch.pick(src, dst, index, index, 30 * SIZE)
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

        monkeypatch.setattr("portakv.host.engines.chosen.pick", slow)
        assert launch.pick(src, dst, *both, 2 * SIZE).engine == "direct"
        launch(src, dst, *both, 2 * SIZE, None, None)
        assert launched() == ["staged"]


def test_costs_are_read_before_the_first_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def look(device: torch.device) -> Assumed:
        asked.append(device)
        return ASSUMED

    monkeypatch.setattr("portakv.host.engines.chosen.costs_of", look)
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


def test_the_guide_tells_what_is_assumed() -> None:
    page = (Path(__file__).parent.parent / "docs" / "host.md").read_text()
    for engine in ORDER:
        down, up = (COSTS[engine, direction] for direction in DIRECTIONS)
        assert (down.fixed, down.per_run) == (up.fixed, up.per_run)
        each = f"{down.per_run * 1e6:.1f} us" if down.per_run else ""
        cells = [f"`{engine}`", f"{down.fixed * 1e6:.0f} us", each,
                 f"{down.rate / 1e9:.1f} / {up.rate / 1e9:.1f}"]  # fmt: skip
        assert "| " + " | ".join(cells).replace("|  |", "| |") + " |" in page
    assert f"{SMALL['d2h'] >> 20} MiB from the device and {SMALL['h2d'] >> 20} MiB to it" in page


def test_a_kernel_reads_what_lies_plane_behind_plane() -> None:
    """Where a plane of the host's lies scattered, `direct` is slower, and small loads go by it only
    as far as small stores do."""
    nbytes = SMALL["h2d"]
    shapes = {"staged": Shape(nbytes, 1, 1), "direct": Shape(nbytes, 4096, 4096)}
    took = []
    for scattered in (False, True):
        found = pick(shapes, "h2d", {}, Terms(), Assumed("a test"), scattered)
        seconds = {one.engine: one.seconds for one in found.alternatives}
        assert found.engine == ("staged" if scattered else "direct")
        assert bool(refusals(found)["direct"]) == scattered
        took.append(seconds["direct"] or 0.0)
    assert took[1] == pytest.approx(took[0] / APART)


@pytest.mark.parametrize("rows", [WIDE // 8, WIDE])
def test_narrow_rows_of_a_folded_copy_count_one_by_one(rows: int) -> None:
    shapes = {"staged": Shape(64 * 64 * rows, 64 * 64, 64)}
    (found,) = pick(shapes, "h2d", {}, Terms(), Assumed("a test")).alternatives
    assert found.runs == (64 if rows == WIDE else 64 * 64)
