# SPDX-License-Identifier: Apache-2.0
"""The bars of the host benchmark: each judges rows that there are, and is missed by a worse one."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from support.benchmarks_cases import host_result as result
from support.benchmarks_cases import linked as row

from portakv_benchmarks import check
from portakv_benchmarks.cli import print_bars
from portakv_benchmarks.host.calls import IDS, ORDERS
from portakv_benchmarks.host.cases import BLOCK_FIRST, DIRECTIONS, SCENES, cases, scene
from portakv_benchmarks.host.suite import HOST_PRESETS, KB
from portakv_benchmarks.host.waiting import OTHERS

FULL = HOST_PRESETS["full"]


def full_result() -> list[dict[str, Any]]:
    """Rows as the full preset gives them, with figures that reach every bar."""
    rows: list[dict[str, Any]] = []
    for one in SCENES:
        found = product(cases([one], FULL.payloads_of(one)), DIRECTIONS, ("host", "host idle"))
        for case, op, way in found:
            rows.append(row(way, shape=case.name, op=op, payload_bytes=case.payload, ratio=1.0,
                            host_side=one.side, staging_mb=48.0, chosen_loss=0.0))  # fmt: skip
    for op in DIRECTIONS:
        rows += [row(f"direct {n}", kind="host_direct", op=op, thread_blocks=n, ratio=0.96)
                 for n in FULL.thread_blocks]  # fmt: skip
        rows.append(row("host", kind="host_pageable", op=op, to_ring=0.95))
        beside = product(("default", "own"), ("matmul", "attention"), ("host", "host detached"))
        rows += [row(way, kind="host_interference", op=op, loop=loop, stream=stream,
                     over_memcpy=1.0, link_ratio=0.95) for stream, loop, way in beside]  # fmt: skip
        rows += [row(way, kind="host_waiting", op=op, other_bytes=n, worst_us=700.0)
                 for way in ("host", "host detached", "descriptors") for n in OTHERS]  # fmt: skip
        rows += [row(engine, kind="host_call", op=op, host_us=90.0, us_per_run=0.9, ids=ids,
                     run_bytes=16 * size, host_side=scene(2 * KB, BLOCK_FIRST, order).side)
                 for engine in ("direct", "staged", "descriptors") for ids in IDS
                 for size in FULL.call_rows for order in ORDERS]  # fmt: skip
    rows.append(row("host", kind="host_duplex", op="both", ratio=0.96))
    rows += [row("SmallCopy", kind="host_small", integers=n, busy_to_idle=1.5, idle_to_pinned=0.9)
             for n in FULL.small]  # fmt: skip
    rows.append(row("pinned.allocate", kind="host_pinning", to_torch=0.5, excess_mb=0.1))
    return rows


def host_bars() -> list[check.Bar]:
    return [bar for bar in check.load_bars() if bar.of_host]


def test_every_host_bar_asks_for_rows_that_the_full_preset_gives() -> None:
    verdicts = check.judge(result(full_result()), check.load_bars())
    assert {verdict.bar.name for verdict in verdicts} == {bar.name for bar in host_bars()}
    assert {verdict.word for verdict in verdicts} == {"met"}


def test_what_is_only_reported_is_not_judged() -> None:
    rows = full_result()
    only = [one for one in rows if one["kind"] == "host_call"
            and (one["ids"] != "kept Index" or one["run_bytes"] != 4 * KB)]  # fmt: skip
    staged = [one for one in rows if one["kind"] == "host_call" and one["engine"] == "staged"
              and one["host_side"] == "block-first random"]  # fmt: skip
    for one in (*only, *staged):
        one |= {"host_us": 1e6, "us_per_run": 1e6}
    assert only
    assert staged
    assert {v.word for v in check.judge(result(rows), check.load_bars())} == {"met"}


def test_bars_on_what_was_not_measured_are_counted_and_not_missed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [one for one in full_result() if one["kind"] == "host_pinning"]
    print_bars(result(rows))
    shown = capsys.readouterr().out
    assert shown.count(" met ") == 2
    assert "missed" not in shown
    assert f"{len(host_bars()) - 2} bars are about rows that were not measured." in shown


@pytest.mark.parametrize("bar", host_bars(), ids=lambda bar: str(bar.name))
def test_every_host_bar_is_missed_by_one_worse_row(bar: check.Bar) -> None:
    rows = full_result()
    worst = bar.worst([one for one in rows if bar.picks(one)])
    limit = bar.at_least if bar.at_least is not None else bar.at_most
    assert limit is not None
    rows[rows.index(dict(worst))][bar.figure] = limit + (0.01 if bar.at_most is not None else -0.01)
    words = {v.bar.name: v.word for v in check.judge(result(rows), [bar])}
    assert words in ({bar.name: "missed"}, {bar.name: "accepted"})


def test_the_bars_of_one_suite_do_not_judge_the_other() -> None:
    copies = {"machine": {"device_type": "cuda"}, "rows": []}
    assert not any(v.bar.of_host for v in check.judge(copies, check.load_bars()))
    assert all(v.bar.of_host for v in check.judge(result([]), check.load_bars()))
