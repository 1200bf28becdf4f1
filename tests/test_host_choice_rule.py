# SPDX-License-Identifier: Apache-2.0
"""The rule by which an engine is picked: what each costs, and what the terms allow."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_choice_cases import ASSUMED, refusals

from portakv import Unsupported
from portakv.host.engines.assumed import COSTS, DIRECTIONS, Assumed
from portakv.host.engines.picking import APART, ORDER, SMALL, WIDE, Pick, pick
from portakv.host.engines.shapes import Shape
from portakv.host.engines.table import Point, Table
from portakv.host.engines.terms import Terms

MIB = 1 << 20
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
