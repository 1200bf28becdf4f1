# SPDX-License-Identifier: Apache-2.0
"""The rule by which an engine is picked: what each costs, and what the terms allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.host_choice_cases import H200, UNMEASURED, refusals

from portakv import Unsupported
from portakv.engines.choose import EQUAL, EVEN, NARROW, ORDER, ROW, SMALL, WIDE, Pick, pick
from portakv.engines.costs import DIRECTIONS, Point, Table
from portakv.engines.engine import Terms
from portakv.engines.link import FOLD_BELOW
from portakv.engines.pageable import SIZES
from portakv.engines.pieces import LEAST_HEIGHT, TALL, Shape
from portakv.engines.staging import BUFFERS

MIB = 1 << 20
OUT = {"ring": "it does not copy pinned memory"}


def chosen(
    payload: int, runs: int, host_runs: int, direction: str = "d2h", costs: object = UNMEASURED,
    out: dict[str, str] | None = None, **terms: object,
) -> Pick:  # fmt: skip
    """The pick for scattered runs on the device and so many in host memory."""
    apart, dense = Shape(payload, runs, runs), Shape(payload, host_runs, host_runs)
    shapes = {"staged": dense, "descriptors": apart, "direct": apart, "ring": dense}
    out = OUT if out is None else out
    return pick(shapes, direction, out, Terms(**terms), costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_default_rule_picks_what_the_measurements_behind_it_say(direction: str) -> None:
    """Gathering pays if it makes runs longer; if it does not, and for long runs, the copy engine
    goes by itself; a kernel moves little, or what may be slow."""
    assert chosen(64 * MIB, 2048, 1, direction).engine == "staged"  # scattered to a dense chunk
    assert chosen(64 * MIB, 262144, 1, direction).engine == "staged"  # rows of 256 bytes
    assert chosen(64 * MIB, 32, 32, direction).engine == "descriptors"  # 2 MiB each, both sides
    assert chosen(64 * MIB, 64 * MIB // WIDE, 1, direction).engine == "descriptors"
    assert chosen(64 * MIB, 64 * MIB // WIDE + 1, 1, direction).engine == "staged"
    assert chosen(64 * MIB, 64 * MIB // EVEN, 64 * MIB // EVEN, direction).engine == "descriptors"
    assert chosen(64 * MIB, 64 * MIB // EVEN, 100, direction).engine == "staged"
    assert chosen(64 * MIB, 64 * MIB // EVEN + 1, 1 << 14, direction).engine == "staged"
    assert chosen(SMALL[direction], 4096, 1, direction).engine == "direct"
    assert chosen(SMALL[direction] + 1, 4096, 1, direction).engine == "staged"
    idle = 64 * MIB // NARROW
    assert chosen(64 * MIB, 4096, idle + 1, direction, overlap="idle").engine == "direct"
    assert chosen(64 * MIB, 4096, idle, direction, overlap="idle").engine == "staged"
    pageable = dict.fromkeys(ORDER[:3], "it does not copy pageable memory")
    assert chosen(64 * MIB, 64, 64, direction, out=pageable).engine == "ring"


def test_what_the_rule_wants_may_not_serve() -> None:
    no_kernel = {**OUT, "direct": "no driver"}
    found = chosen(MIB, 4096, 1, out=no_kernel)
    assert found.engine == "staged"
    assert "nothing was measured here" in found.why
    found = chosen(64 * MIB, 2, 2, out={**no_kernel, "descriptors": "no"})
    assert (found.engine, found.why) == ("staged", "the only engine that is left")


def test_a_computing_device_keeps_the_kernel_out() -> None:
    asked = (16 * MIB, 65536, 65536)
    found = chosen(*asked)
    assert found.engine == "staged"
    assert "overlap='compute'" in refusals(found)["direct"]
    for terms in ({"overlap": "idle"}, {"max_gbps": 30.0}, {"max_thread_blocks": 2}):
        let_in = chosen(*asked, **terms)
        assert let_in.engine == "direct"
        assert refusals(let_in)["direct"] == ""
    # What it would have taken is told all the same.
    found = chosen(*asked, costs=table(staged=2.0, descriptors=3.0, direct=1.0))
    assert found.engine == "staged"
    assert "direct would take less, but the terms keep it out" in found.why
    seconds = {one.engine: one.seconds for one in found.alternatives}
    assert (seconds["direct"] or 9) < (seconds["staged"] or 0)


def test_one_choice_for_every_rate() -> None:
    """The worker keeps the rate; an engine is not another one for it."""
    found = {rate: chosen(64 * MIB, 64, 64, max_gbps=rate) for rate in (0.5, 10.0, 80.0)}
    assert len(set(found.values())) == 1
    assert Terms(max_gbps=10.0).of_engine == Terms(max_gbps=80.0).of_engine != Terms().of_engine


def test_terms_never_leave_a_copy_without_an_engine_and_no_engine_at_all_is_an_error() -> None:
    out = {name: f"{name} is broken" for name in ORDER if name != "direct"}
    found = chosen(64 * MIB, 64, 64, out=out)
    assert found.engine == "direct"
    assert "no other engine takes the copy" in found.why
    with pytest.raises(Unsupported, match=r"(?s)no engine takes it.*staged is broken.*ring is"):
        chosen(MIB, 1, 1, out={**out, "direct": "no"})


def table(host: dict[str, float] | None = None, **seconds: float) -> Table:
    """What engines take for 4 MiB in 1024 runs, a hundredth of it for one; and of the host."""
    kept = host or {}
    points = {
        (engine, "d2h"): {
            4096: [Point(n, s * part, kept.get(engine, 1.0)) for n, part in ((1, 0.01), (1024, 1))]
        }
        for engine, s in seconds.items()
    }
    return Table({}, points)


def test_what_was_measured_decides() -> None:
    asked = (4 * MIB, 1024, 1024)
    for fast in ("staged", "descriptors"):
        slow = "staged" if fast == "descriptors" else "descriptors"
        found = chosen(*asked, costs=table(**dict[str, Any]({fast: 1e-5, slow: 2e-5})))
        assert found.engine == fast
        assert "as measured" in found.why
    # Of an engine that the table does not know nobody can say that it is better.
    found = chosen(*asked, costs=table(staged=1.0), overlap="idle")
    assert found.engine == "staged"
    known = {one.engine: one.measured for one in found.alternatives}
    assert known == {"staged": True, "descriptors": False, "direct": False, "ring": False}
    # Nothing that was measured may go: the rule decides.
    found = chosen(*asked, costs=table(direct=1e-9))
    assert found.engine in ("staged", "descriptors")
    assert "the default rule" in found.why


def test_of_those_about_as_quick_the_one_that_keeps_the_host_least() -> None:
    asked, idle = (4 * MIB, 1024, 1024), dict[str, Any](overlap="idle")
    host = {"staged": 3e-4, "descriptors": 2e-4, "direct": 1e-4}
    near, far = 1 + 0.9 * EQUAL, 1 + 1.1 * EQUAL
    known = table(host, staged=1.0, descriptors=near, direct=far)
    found = chosen(*asked, costs=known, **idle)
    assert found.engine == "descriptors"
    assert "within 2 % of the least time" in found.why
    assert "keeps the host least, as measured" in found.why
    assert {one.engine: one.host_seconds for one in found.alternatives}["direct"] == 1e-4
    # What is not as quick is not asked what it costs the host.
    found = chosen(*asked, costs=table(host, staged=1.0, descriptors=far, direct=far), **idle)
    assert found.engine == "staged"
    assert found.why.startswith("the least time of those")
    # Nor is what the terms keep out, however quick.
    quick = table(host, staged=1.0, descriptors=near, direct=0.5)
    assert chosen(*asked, costs=quick).engine == "descriptors"
    # Where the host is kept as long, the gentlest.
    equal = table(dict.fromkeys(ORDER, 1e-4), staged=near, descriptors=1.0, direct=1.0)
    assert chosen(*asked, costs=equal, **idle).engine == "staged"
    # An engine that nobody measured is no rival, though the host would hardly notice it.
    assert chosen(*asked, costs=table(host, staged=1.0), **idle).engine == "staged"


ROWS_OF_2_KIB = Shape(2048 * 6400, 6400, 100)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces_are_looked_up_and_each_row_costs_the_device(direction: str) -> None:
    found = pick(dict.fromkeys(ORDER, ROWS_OF_2_KIB), direction, OUT, Terms(), H200)
    for one in found.alternatives:
        asked = one.engine, direction, 64 * 2048, 100
        assert (one.runs, one.run_bytes) == (100, 64 * 2048)
        assert one.seconds == H200.seconds(*asked) + 6400 * ROW[direction]
        assert one.host_seconds == H200.host_seconds(*asked)
    # Rows that cross by themselves are pieces of 2 KiB, and nothing is added.
    apart = Shape(2048 * 6400, 6400, 6400)
    for one in pick(dict.fromkeys(ORDER, apart), direction, OUT, Terms(), H200).alternatives:
        assert (one.runs, one.run_bytes) == (6400, 2048)
        assert one.seconds == H200.seconds(one.engine, direction, 2048, 6400)


def test_rows_count_beside_a_table_and_may_turn_the_pick() -> None:
    """What was measured was measured without rows."""
    known, idle = table(staged=1.1e-3, descriptors=1e-3), Terms("idle")
    of_1024 = Shape(4 * MIB, 1024, 1024), Shape(4 * MIB, 8 * 1024, 1024)

    def seconds(shape: Shape) -> tuple[str, float]:
        shapes = {"staged": of_1024[0], "descriptors": shape}
        found = pick(shapes, "d2h", OUT, idle, known)
        return found.engine, found.alternatives[1].seconds or 0

    assert seconds(of_1024[0]) == ("descriptors", 1e-3)
    assert seconds(of_1024[1]) == ("staged", 1e-3 + 8 * 1024 * ROW["d2h"])


def test_the_guide_tells_the_rule() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "host.md").read_text()
    flat = " ".join(page.split())
    assert f"those within {EQUAL * 100:.0f} % of the least seconds" in flat
    assert (
        f"of {LEAST_HEIGHT} or more that are narrower than {FOLD_BELOW >> 10} KiB, of {TALL} or "
        f"more that are not"
    ) in flat
    assert f"wide ones where {TALL} or more lie together" in flat
    to_host, to_device = (f"{ROW[direction] * 1e9:.0f} ns" for direction in DIRECTIONS)
    assert f"device {to_host} beside that to the host, and {to_device} to the device" in flat
    assert f"runs of less than {NARROW >> 10} KiB" in flat
    assert f"runs of {WIDE >> 10} KiB or more" in flat
    assert f"runs of {EVEN >> 10} KiB or more that gathering would not merge" in flat
    assert f"three pinned slots of at most {SIZES.largest >> 20} MiB each" in flat
    assert BUFFERS == 3
    assert f"{SMALL['d2h'] >> 20} MiB from the device and {SMALL['h2d'] >> 20} MiB to it" in page
