# SPDX-License-Identifier: Apache-2.0
"""Results of tiers of engines: their rows are judged by the targets of their part."""

from __future__ import annotations

import pytest

from portakv_benchmarks import check
from portakv_benchmarks.plugs import lmcache_l2, sglang_storage
from portakv_benchmarks.plugs.sglang_storage import Cost
from portakv_benchmarks.plugs.tier_result import result_of


def sglang_rows(rate: float) -> list[dict[str, object]]:
    costs = {
        ("portakv", "cold load"): [Cost(rate, 0.4), Cost(rate, 0.4), Cost(rate, 0.4)],
        ("file", "cold load"): [Cost(100.0, 0.8), Cost(200.0, 0.8), Cost(400.0, 1.6)],
    }
    return sglang_storage.rows_of(costs)


@pytest.mark.parametrize(("rate", "word"), [(200.0, "met"), (150.0, "missed")])
def test_rows_of_sglang_are_judged(rate: float, word: str) -> None:
    rows = sglang_rows(rate)
    assert rows[0]["rate_of_own"] == rate / 200  # the median of three rounds
    result = result_of("r", sglang_storage.PART, rows, {"sglang": "0"}, rounds=3)
    verdicts = check.judge(result, check.load_targets())
    words = {verdict.bar.figure: verdict.word for verdict in verdicts}
    assert words == {"rate_of_own": word, "processor_of_own": "met"}


@pytest.mark.parametrize(("seconds", "word"), [(1.0, "met"), (3.0, "missed")])
def test_rows_of_lmcache_are_judged(seconds: float, word: str) -> None:
    ours = [lmcache_l2.Cost(seconds, 1.0)] * 3
    theirs = [lmcache_l2.Cost(2.0, 2.0)] * 3
    costs = {
        (op, name): each
        for op in ("load", "load again", "lookup")
        for name, each in ((lmcache_l2.OURS, ours), (lmcache_l2.HOST, ours), ("fs", theirs))
    }
    rows = [*lmcache_l2.rows_of(costs, 1 << 20, 1)]
    result = result_of("r", lmcache_l2.PART, rows, {"lmcache": "0"}, rounds=3)
    verdicts = check.judge(result, check.load_targets())
    times = {"time_of_portakv", "time_of_portakv_host"}
    judged = [each for each in verdicts if each.rows and not each.bar.accepted]
    words = [verdict.word for verdict in judged if verdict.bar.figure in times]
    assert words == [word, word]
    assert result["asked"] == {"parts": ["l2"], "rounds": 3}
