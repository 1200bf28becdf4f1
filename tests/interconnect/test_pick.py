# SPDX-License-Identifier: Apache-2.0
"""The rule that picks a strategy by its costs: figures in, a strategy and its reason out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.host_choice_cases import (
    H200,
    UNMEASURED,
)
from support.table_costs import looked_up

from portakv import Unsupported
from portakv.core.pick import ORDER
from portakv.interconnect.choose import (
    ALONE_RATE,
    CALL,
    ENGINE_RATE,
    EQUAL,
    EVEN,
    KERNEL_RATE,
    LONG,
    NARROW,
    ROW,
    SHORT,
    UNHIDDEN,
    WIDE,
    Pick,
    Shape,
    pick,
)
from portakv.interconnect.costs import DIRECTIONS, Point, Table
from portakv.interconnect.pageable import SIZES
from portakv.interconnect.staging import BUFFERS
from portakv.interconnect.strategy import SMALL, Terms

MIB = 1 << 20
OUT = {"pageable": "it does not copy pinned memory"}


def picked(*case: Any, **terms: Any) -> Pick:
    """Return the pick of a case of `explained`."""
    return explained(*case, **terms)[0]


def explained(
    payload: int,
    runs: int,
    host_runs: int,
    direction: str = "d2h",
    costs: object = UNMEASURED,
    out: dict[str, str] | None = None,
    **terms: object,
) -> tuple[Pick, Mapping[str, str]]:
    """Return the pick for scattered runs on the device and so many in host memory, and why others
    may not be picked."""
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
    small = SHORT
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
    # A detached transfer's stream must not wait for a kernel, unless it is very short.
    assert picked(SMALL[direction], 4096, 1, direction, detached=True).strategy == "zero_copy"
    assert picked(SHORT, 4096, 1, direction, detached=True).strategy == "staged"
    assert picked(SHORT, 8, 8, direction, detached=True).strategy == "batched_memcpy"
    assert picked(large, even + 1, even + 1, direction, detached=True).strategy == "staged"
    pageable = dict.fromkeys(ORDER[:3], "it does not copy pageable memory")
    assert picked(large, 64, 64, direction, out=pageable).strategy == "pageable"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pages_go_to_a_copy_engine_if_a_caller_waits_no_longer(direction: str) -> None:
    """A kernel of few thread blocks is slow alongside a model, and the call of a copy engine takes
    longer."""
    # Where both take as long: the calls differ by as much as the kernel is slower.
    slower = 1 / KERNEL_RATE[direction] - 1 / ENGINE_RATE
    even = (CALL["batched_memcpy"] - CALL["zero_copy"]) / slower
    for payload, runs, terms, strategy in (
        (12 * MIB, 6, {}, "batched_memcpy"),
        (12 * MIB, 12, {}, "batched_memcpy"),
        (12 * MIB, 13, {}, "zero_copy"),  # runs of less than 1 MiB
        (2 * MIB, 1, {}, "zero_copy"),
        (int(even) - 1, 1, {}, "zero_copy"),
        (int(even) + 1, 1, {}, "batched_memcpy"),
        (12 * MIB, 6, {"overlap": "idle"}, "zero_copy"),
        (12 * MIB, 6, {"max_thread_blocks": 2}, "batched_memcpy"),
    ):
        result = picked(payload, runs, runs, direction, **terms)
        assert result.strategy == strategy
        assert ("for runs of 1 MiB or more" in result.why) == (strategy == "batched_memcpy")
    pages = Shape(12 * MIB, 6, 6)
    shapes = dict.fromkeys(ORDER, pages)
    waits = frozenset({"batched_memcpy"})
    assert pick(shapes, direction, OUT, Terms(), UNMEASURED, waits)[0].strategy == "zero_copy"
    # Neighbours that happen to meet are not pages: other ids would have another strategy.
    shapes["zero_copy"] = Shape(12 * MIB, 192, 192)
    shapes["batched_memcpy"] = Shape(12 * MIB, 1, 1)
    assert pick(shapes, direction, OUT, Terms(), UNMEASURED)[0].strategy == "zero_copy"


@pytest.mark.parametrize("new_ids", [False, True])
def test_measured_seconds_of_a_kernel_are_those_of_an_idle_device(new_ids: bool) -> None:
    costs = table(
        {"batched_memcpy": 1.0e-4, "zero_copy": 0.6e-4}, batched_memcpy=2.4e-2, zero_copy=2.3e-2
    )

    def strategy_and_reason(runs: int, overlap: Any) -> Pick:
        shapes = dict.fromkeys(
            ("staged", "batched_memcpy", "zero_copy"), Shape(8 * MIB, runs, runs)
        )
        return pick(shapes, "d2h", OUT, Terms(overlap), costs, new_ids=new_ids)[0]

    pages = strategy_and_reason(4, "compute")
    assert pages.strategy == "batched_memcpy"
    factor = ALONE_RATE / KERNEL_RATE["d2h"]
    assert f"takes {factor:.1f} times as long alongside a model" in pages.why
    assert strategy_and_reason(4, "idle").strategy == "zero_copy"
    narrower = strategy_and_reason(16, "compute")
    assert narrower.strategy == "zero_copy"
    assert "alongside a model" not in narrower.why


def test_what_the_rule_wants_may_not_serve() -> None:
    out = {**OUT, "zero_copy": "no driver"}
    why = "the gentlest strategy that is left, as nothing was measured here"
    assert picked(MIB, 4096, 1, out=out) == ("staged", why)
    out["batched_memcpy"] = "no"
    assert picked(64 * MIB, 2, 2, out=out) == ("staged", "the only strategy that is left")


def test_a_computing_device_keeps_the_kernel_out() -> None:
    arguments = (32 * MIB, 131072, 800)
    result, refused = explained(*arguments)
    assert result.strategy == "staged"
    assert "overlap='compute'" in refused["zero_copy"]
    for terms in ({"overlap": "idle"}, {"max_gbps": 30.0}, {"max_thread_blocks": 2}):
        let_in, refused = explained(*arguments, **terms)
        assert let_in.strategy == "zero_copy"
        assert "zero_copy" not in refused
    result = picked(*arguments, costs=table(staged=2.0, batched_memcpy=3.0, zero_copy=1e-3))
    assert result.strategy == "staged"
    assert "zero_copy would take less, but the terms exclude it" in result.why


def test_terms_never_leave_a_copy_without_a_strategy_and_no_strategy_at_all_is_an_error() -> None:
    out = {name: f"{name} is broken" for name in ORDER if name != "zero_copy"}
    result = picked(64 * MIB, 64, 64, out=out)
    assert result.strategy == "zero_copy"
    assert "no other strategy takes the copy" in result.why
    with pytest.raises(Unsupported, match=r"(?s)none can:.*staged is broken.*pageable is"):
        picked(MIB, 1, 1, out={**out, "zero_copy": "no"})


def table(host: dict[str, float] | None = None, run: int = 4096, **seconds: float) -> Table:
    """Return the seconds of strategies for 1024 runs, a hundredth of that for one run, and those of
    the host, else 0."""
    host_seconds = host or {}
    points = {
        (strategy, "d2h"): {
            run: [
                Point(n, s * part, host_seconds.get(strategy, 0.0))
                for n, part in ((1, 0.01), (1024, 1))
            ]
        }
        for strategy, s in seconds.items()
    }
    return Table({}, points)


def test_what_was_measured_decides() -> None:
    arguments = (32 * MIB, 8192, 64)
    for fast, slow in (("staged", "batched_memcpy"), ("batched_memcpy", "staged")):
        result = picked(*arguments, costs=table(**dict[str, Any]({fast: 1e-5, slow: 2e-5})))
        assert (result.strategy, "as measured" in result.why) == (fast, True)
    # A strategy that is not in the table cannot be better.
    result = picked(*arguments, costs=table(staged=1.0), overlap="idle")
    assert result.strategy == "staged"
    # Nothing that was measured may go: the rule decides.
    result = picked(*arguments, costs=table(zero_copy=1e-9))
    assert result.strategy in ("staged", "batched_memcpy")
    assert "the default rule" in result.why


def test_the_hosts_part_counts_where_nothing_hides_it() -> None:
    """With overlap='idle', or if the call is longer than the transfer; a quarter of it shows."""
    arguments = (32 * MIB, 1024, 64)
    short = table({"staged": 0.8e-3}, 32768, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=short).strategy == "staged"
    idle = picked(*arguments, costs=short, overlap="idle")
    assert idle.strategy == "batched_memcpy"
    assert "with the host's part" in idle.why
    long = table({"staged": 1.2e-3}, 32768, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=long).strategy == "batched_memcpy"
    # A device accepts a limited number of copies beforehand: 512 MiB in 16,384 runs on an H100.
    times: dict[str, Any] = {"staged": 10.3e-3, "batched_memcpy": 9.8e-3}
    for host, strategy in ((8.5e-3, "staged"), (0.9 * LONG, "batched_memcpy")):
        many = table({"batched_memcpy": host, "staged": 1e-4}, **times)
        assert picked(512 * MIB, 16384, 64, costs=many).strategy == strategy
    little = table({"staged": 0.2e-3}, 32768, staged=1.0e-3, batched_memcpy=1.1e-3)
    assert picked(*arguments, costs=little, overlap="idle").strategy == "staged"


@pytest.mark.parametrize(("nbytes", "strategy"), [(SHORT, "zero_copy"), (2 * SHORT, "staged")])
def test_the_hosts_part_of_a_short_copy_counts_alongside_a_model(
    nbytes: int, strategy: str
) -> None:
    """The call by copy engines is shorter than the transfer in the table, and was longer on an idle
    H200: 600 us for 16 MiB in runs of 32 KiB, which the kernel brought in 412 us."""
    known = table(
        {"staged": 1.5e-4, "batched_memcpy": 1.5e-4, "zero_copy": 2e-5},
        staged=3.3e-4,
        batched_memcpy=3.4e-4,
        zero_copy=3.45e-4,
    )
    assert picked(nbytes, 512, 512, costs=known).strategy == strategy


def test_of_those_about_as_quick_the_one_that_keeps_the_host_least() -> None:
    arguments = (32 * MIB, 8192, 64)
    idle = dict[str, Any](overlap="idle")
    host = {"staged": 3e-4, "batched_memcpy": 2e-4, "zero_copy": 1e-4}
    near = 1 + 0.9 * EQUAL
    far = 1 + 1.1 * EQUAL
    known = table(host, staged=1.0, batched_memcpy=near, zero_copy=far)
    result = picked(*arguments, costs=known, **idle)
    assert result.strategy == "batched_memcpy"
    assert "within 2 % of the least time" in result.why
    assert "keeps the host least, as measured" in result.why
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


@pytest.mark.parametrize(
    ("pages", "new_ids", "strategy"),
    [
        (6, False, "batched_memcpy"),
        (6, True, "zero_copy"),
        (64, True, "batched_memcpy"),  # a call that issues slice after slice
    ],
)
def test_all_of_a_short_call_counts_on_an_idle_device(
    pages: int, new_ids: bool, strategy: str
) -> None:
    """12 MiB in pages of 2 MiB take a copy engine 13 % less time than the kernel, and its call
    keeps the host longer. With new ids the kernel was 160 us earlier on an H200."""
    by_engine = Point(pages, 40e-6 * pages, 80e-6)
    by_kernel = Point(pages, 46e-6 * pages, 55e-6)
    known = Table(
        {},
        {
            ("batched_memcpy", "h2d"): {2 * MIB: [by_engine]},
            ("zero_copy", "h2d"): {2 * MIB: [by_kernel]},
        },
    )
    page = Shape(2 * MIB * pages, pages, pages)
    shapes = dict.fromkeys(("staged", "batched_memcpy", "zero_copy"), page)
    result, _ = pick(shapes, "h2d", OUT, Terms("idle"), known, new_ids=new_ids)
    assert result.strategy == strategy


@pytest.mark.parametrize(("new_ids", "strategy"), [(False, "staged"), (True, "zero_copy")])
def test_new_ids_cost_the_host_twice(new_ids: bool, strategy: str) -> None:
    """As measured for 128 MiB: 0.3 ms faster on the device, 0.7 ms longer on the host."""
    known = table({"staged": 8e-4, "zero_copy": 1e-4}, 128 << 10, staged=2.48e-3, zero_copy=2.75e-3)
    shapes = dict.fromkeys(("staged", "zero_copy"), Shape(128 * MIB, 1024, 1024))
    result, _ = pick(shapes, "d2h", OUT, Terms("idle"), known, new_ids=new_ids)
    assert result.strategy == strategy
    # Alongside a model nothing of it counts, unless the call is longer than the copy.
    assert pick(shapes, "d2h", OUT, Terms(), known, new_ids=new_ids)[0].strategy == "staged"


@pytest.mark.parametrize("pieces", [100, 6400])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces_are_looked_up_and_each_row_costs_the_device(direction: str, pieces: int) -> None:
    """The core adds to the seconds of the pieces those of rows, unless rows cross by themselves."""
    run_bytes = 2048 * 6400 // pieces
    seconds = looked_up(H200, "batched_memcpy", direction, run_bytes, pieces)
    if pieces < 6400:
        seconds += 6400 * ROW[direction]
    of_rows = Shape(2048 * 6400, 6400, pieces)
    shapes = {"staged": Shape(2048 * 6400, 1, 1), "batched_memcpy": of_rows}
    engine = {
        size: [replace(point, host_seconds=0.0) for point in column]
        for size, column in H200.points["batched_memcpy", direction].items()
    }
    for other, strategy in ((0.97 * seconds, "staged"), (1.03 * seconds, "batched_memcpy")):
        points = {
            ("batched_memcpy", direction): engine,
            ("staged", direction): {4096: [Point(1 << 20, other, 0.0)]},
        }
        assert pick(shapes, direction, OUT, Terms(), Table({}, points))[0].strategy == strategy


def test_rows_count_beside_a_table_and_may_turn_the_pick() -> None:
    known = table(staged=1.1e-3, batched_memcpy=1e-3)
    of_1024 = Shape(4 * MIB, 1024, 1024)
    for shape, strategy in (
        (of_1024, "batched_memcpy"),
        (Shape(4 * MIB, 8 * 1024, 1024), "staged"),
    ):
        shapes = {"staged": of_1024, "batched_memcpy": shape}
        assert pick(shapes, "d2h", OUT, Terms("idle"), known)[0].strategy == strategy


def test_the_guide_has_the_figures_of_the_rule() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "copies.md").read_text()
    flat = " ".join(page.split())
    for text in (
        f"those within {EQUAL * 100:.0f} % of the fewest seconds",
        f"three pinned buffers of at most {SIZES.largest >> 20} MiB each",
        "{} MiB from the device, or {} MiB to it, it has".format(
            *(n >> 20 for n in SMALL.values())
        ),
    ):
        assert text in flat
    assert BUFFERS == 3
