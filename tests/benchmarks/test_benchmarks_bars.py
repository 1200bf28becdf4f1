# SPDX-License-Identifier: Apache-2.0
"""Bars on conditions and on the rows that full presets give, and the decision guide of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks_cases import MACHINE, copied, host_result, linked

from portakv.registry.registry import Registry
from portakv_benchmarks import check, guide
from portakv_benchmarks.host.calls import IDS, ORDERS
from portakv_benchmarks.host.cases import BLOCK_FIRST, DIRECTIONS, SCENES, cases, scene
from portakv_benchmarks.host.interference import OTHERS
from portakv_benchmarks.host.suite import HOST_PRESETS, KB, MB
from portakv_benchmarks.shared.shapes import load

# --- bars -------------------------------------------------------------------------------------

FULL = HOST_PRESETS["full"]
ACCEPTED = 'accepted = { figure = 0.45, reason = "cold", tries = ["a", "b", "c"] }'


def judged(
    tmp_path: Path, figures: list[float], more: str = "", limit: str = "at_least = 0.5",
    where: str = 'shape = "s"', **row: Any,
) -> int:  # fmt: skip
    """The exit code of the check of rows with these figures against one bar."""
    bars, result = tmp_path / "bars.toml", tmp_path / "result.json"
    about = f'name = "b"\nwhere = {{ {where} }}\nfigure = "ratio"'
    bars.write_text(f"[[bar]]\n{about}\n{limit}\n{more}\n")
    rows = [{"shape": "s", "ratio": figure, "verified": True, **row} for figure in figures]
    result.write_text(json.dumps({"machine": {"device_type": "cpu"}, "rows": rows}))
    return check.main([str(result), "--bars", str(bars)])


@pytest.mark.parametrize(
    ("figures", "more", "code", "word"),
    [
        ([0.5, 0.9], {}, 0, "1 met"),
        ([0.9, 0.49], {}, 1, "1 missed"),  # the worst row decides
        ([], {}, 1, "1 missed"),  # nothing was measured
        ([0.9], {"verified": False}, 1, "1 missed"),
        ([0.45], {"more": ACCEPTED}, 0, "1 accepted"),
        ([0.44], {"more": ACCEPTED}, 0, "1 accepted"),  # within the noise
        ([0.43], {"more": ACCEPTED}, 1, "1 missed"),  # worse than what was accepted
        ([0.51], {"more": ACCEPTED}, 0, "1 met"),
        ([0.1], {"more": 'device = "cuda"'}, 1, "0 met, 0 accepted, 0 missed"),  # no bar at all
        ([1.0, 5.0], {"limit": "at_most = 5.0"}, 0, "1 met"),
        ([1.0, 5.01], {"limit": "at_most = 5.0"}, 1, "1 missed"),
        ([0.46], {"limit": "at_most = 0.4", "more": ACCEPTED}, 0, "1 accepted"),
        ([0.47], {"limit": "at_most = 0.4", "more": ACCEPTED}, 1, "1 missed"),
        ([0.9], {"more": ACCEPTED.replace(', "c"', "")}, 2, ""),
        ([0.9], {"more": ACCEPTED.replace("cold", " ")}, 2, ""),
        ([0.9], {"more": "at_most = 1.0"}, 2, ""),
        ([0.9], {"limit": ""}, 2, ""),
        ([0.9], {"where": "ratio = { about = 3 }"}, 2, "asks for ['about']; known are"),
    ],
)
def test_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: list[float],
    more: dict[str, Any], code: int, word: str,
) -> None:  # fmt: skip
    assert judged(tmp_path, figures, **more) == code
    shown = capsys.readouterr()
    assert word in (shown.err if code == 2 else shown.out)


def test_several_files_are_judged_and_a_broken_one_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(guide.RESULTS / name) for name in ("h200.json", "h200-host.json")]
    assert check.main(files) == 0
    shown = capsys.readouterr().out
    assert all(file in shown for file in files)
    assert shown.count(", 0 missed") == 2
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for words in ([str(tmp_path / "absent.json")], [str(broken)], [files[0], str(broken)]):
        assert check.main(words) == 2
        assert "cannot be judged" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(guide.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_recorded_result_misses_a_bar(file: Path) -> None:
    verdicts = check.judge(json.loads(file.read_text()), check.load_bars())
    assert verdicts
    missed = {v.bar.name for v in verdicts if v.word == "missed"}
    known = {v.bar.name for v in verdicts if v.bar.open}
    assert missed - known == set(), "recorded results miss a bar"
    assert known - missed == set(), "a bar is called open that is reached by now"


@pytest.mark.parametrize(
    ("where", "picked"),
    [
        ({"bytes": {"at_least": 32, "below": 128}}, [32, 100]),
        ({"bytes": {"multiple_of": 32}}, [32, 128]),
        ({"bytes": {"no_multiple_of": 32}}, [31, 100]),
        ({"bytes": {"any_of": [31, 99]}}, [31]),
        ({"bytes": {"none_of": [31, 128]}}, [32, 100]),
        ({"bytes": 100}, [100]),
        ({"absent": 100}, []),
    ],
)
def test_bars_pick_rows_on_conditions(where: Mapping[str, Any], picked: list[int]) -> None:
    bar = check.Bar("b", where, "ratio", at_least=0.5)
    rows = [{"bytes": size, "ratio": 0.9} for size in (31, 32, 100, 128)]
    assert [row["bytes"] for row in rows if bar.picks(row)] == picked
    assert not bar.picks({"bytes": 100})  # a row without the figure


def test_the_verdict_names_the_worst_row(capsys: pytest.CaptureFixture[str]) -> None:
    bar = check.Bar("b", {"backend": "cuda"}, "ratio", at_least=0.5)
    rows = [copied("cuda", 1.0, ratio=0.9), copied("cuda", 1.0, ratio=0.4, index="blocks")]
    (verdict,) = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, [bar])
    assert (verdict.word, verdict.figure, verdict.rows) == ("missed", 0.4, 2)
    assert verdict.row == "s apart cuda gather blocks"


def test_every_bar_of_a_cuda_device_asks_for_rows_that_the_full_preset_gives() -> None:
    """A bar whose conditions no shape fulfils would be missed for ever, or judge nothing."""
    rows = []
    backends = ("cuda", "triton", "compiled", "compiled graph", "reference")
    for shape in load().values():
        ways = [b for b in backends if shape.compiled or not b.startswith("compiled")]
        for backend, layers, op, index in product(
            ways, ("apart", "together"), ("gather", "scatter"), shape.index
        ):
            rows.append(copied(
                backend, 1.0, shape=shape.name, op=op, layers=layers, index=index,
                row_bytes=shape.row_bytes, payload_bytes=shape.payload, ratio=1.0,
                slots_used=shape.slots_used, tokens=shape.tokens, to_peer=0.9, to_cuda=1.0,
            ))  # fmt: skip
    kinds = [{"kind": "overhead", "backend": b, "ids": i, "call_us": 1.0, "added_us": 1.0}
             for b in ("cuda", "triton") for i in ("kept Index", "device tensor")]  # fmt: skip
    kinds += [{"kind": "startup", "backend": "cuda", "cache": c, "seconds": 0.1}
              for c in ("cold", "warm")]  # fmt: skip
    rows += [{**row, "verified": True} for row in kinds]
    verdicts = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, check.load_bars())
    assert len(verdicts) > 25
    assert [v.bar.name for v in verdicts if v.word != "met"] == []


# --- bars of the host benchmark ---------------------------------------------------------------


def full_result() -> list[dict[str, Any]]:
    """Rows as the full preset gives them, with figures that reach every bar."""
    rows: list[dict[str, Any]] = []
    for one in SCENES:
        found = product(cases([one], FULL.payloads_of(one)), DIRECTIONS, ("host", "host idle"))
        for case, op, way in found:
            rows.append(linked(way, shape=case.name, op=op, payload_bytes=case.payload, ratio=1.0,
                            host_side=one.side, staging_mb=48.0, chosen_loss=0.0))  # fmt: skip
    for op in DIRECTIONS:
        rows += [linked(f"direct {n}", kind="host_direct", op=op, thread_blocks=n, ratio=0.96)
                 for n in FULL.thread_blocks]  # fmt: skip
        rows.append(linked("host", kind="host_pageable", op=op, to_ring=0.95))
        beside = product(("default", "own"), ("matmul", "attention"), ("host", "host detached"))
        rows += [linked(way, kind="host_interference", op=op, loop=loop, stream=stream,
                     over_memcpy=1.0, link_ratio=0.95) for stream, loop, way in beside]  # fmt: skip
        rows += [linked(way, kind="host_waiting", op=op, other_bytes=n, worst_us=700.0)
                 for way in ("host", "host detached", "descriptors") for n in OTHERS]  # fmt: skip
        rows += [linked(engine, kind="host_call", op=op, host_us=90.0, us_per_run=0.9, ids=ids,
                     run_bytes=16 * size, host_side=scene(2 * KB, BLOCK_FIRST, order).side)
                 for engine in ("direct", "staged", "descriptors") for ids in IDS
                 for size in FULL.call_rows for order in ORDERS]  # fmt: skip
    rows.append(linked("host", kind="host_duplex", op="both", ratio=0.96))
    figures = {"busy_to_idle": 1.5, "idle_to_pinned": 0.9}
    rows += [linked("SmallCopy", kind="host_small", integers=n, **figures) for n in FULL.small]
    rows.append(linked("pinned.allocate", kind="host_pinning", to_torch=0.5, excess_mb=0.1))
    return rows


def host_bars() -> list[check.Bar]:
    return [bar for bar in check.load_bars() if bar.of_host]


def test_every_host_bar_asks_for_rows_that_the_full_preset_gives() -> None:
    verdicts = check.judge(host_result(full_result()), check.load_bars())
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
    assert {v.word for v in check.judge(host_result(rows), check.load_bars())} == {"met"}


@pytest.mark.parametrize("bar", host_bars(), ids=lambda bar: str(bar.name))
def test_every_host_bar_is_missed_by_one_worse_row(bar: check.Bar) -> None:
    rows = full_result()
    worst = bar.worst([one for one in rows if bar.picks(one)])
    limit = bar.at_least if bar.at_least is not None else bar.at_most
    assert limit is not None
    rows[rows.index(dict(worst))][bar.figure] = limit + (0.01 if bar.at_most is not None else -0.01)
    words = {v.bar.name: v.word for v in check.judge(host_result(rows), [bar])}
    assert words in ({bar.name: "missed"}, {bar.name: "accepted"})


def test_the_bars_of_one_suite_do_not_judge_the_other() -> None:
    copies = {"machine": {"device_type": "cuda"}, "rows": []}
    assert not any(v.bar.of_host for v in check.judge(copies, check.load_bars()))
    assert all(v.bar.of_host for v in check.judge(host_result([]), check.load_bars()))


# --- the decision guide -----------------------------------------------------------------------


def test_the_guide_is_what_the_results_say() -> None:
    assert guide.PAGE.read_text() == guide.page(guide.RESULTS.glob("*.json")), (
        "docs/choosing.md is old: python -m benchmarks.guide"
    )


@pytest.mark.parametrize("name", ["cpu-2core", "h200"])
def test_the_registry_asks_the_fastest_first(name: str) -> None:
    """By the figures of each recorded device, of the backends that a caller gets unasked."""
    result = json.loads((guide.RESULTS / f"{name}.json").read_text())
    copies = [row for row in result["rows"] if row["kind"] == "copy" and not row.get("peer")]
    known = Registry().names()
    fastest = [name for name in guide.preference(copies) if name in known]
    assert fastest
    if result["machine"]["device_type"] != "cpu":
        assert fastest == [name for name in known if name in fastest]


def test_the_guide_follows_the_figures(tmp_path: Path) -> None:
    def row(backend: str, size: int, time: float, **more: Any) -> dict[str, Any]:
        return copied(
            backend, time, shape="llama3-8b-x", payload_bytes=size * 1_000_000, row_bytes=2048,
            slots_used=0.25, cache="layer | kv block token head dim", host_us=9.0,
            ratio=round(10 / time, 2), **more,
        )  # fmt: skip

    rows = [row("cuda", size, 10.0, to_peer=0.9) for size in (1, 40, 100)]
    rows += [row("triton", size, time, to_cuda=time / 10)
             for size, time in ((1, 10.1), (40, 12.0), (100, 13.0))]  # fmt: skip
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    text = guide.page([file])
    assert "- `cuda`: 1.00 of `copy_` in the median of 3 rows, 1.00 at worst." in text
    assert "| `triton` | each layer an allocation | 1.20 | 1.30 | 3 |" in text
    assert (
        "- `triton` is more than 5% slower than `cuda`, of the sizes measured, at 40 MB, 100 MB."
        in text
    )
    assert "| rows of 256 B and more, from 32 MB | gather | 0.90 | 0.90 | 2 |" in text
    assert text.index("`cuda`: 1.00") < text.index("`triton`: ")


def test_the_guide_has_a_section_of_its_own_for_host_memory(tmp_path: Path) -> None:
    sizes = {"payload_bytes": 256 * MB, "run_bytes": 2 * KB}
    rows = [linked("staged", 10.0, **sizes), linked("host", 10.0, ratio=0.987, **sizes)]
    (tmp_path / "some-host.json").write_text(json.dumps(host_result(rows)))
    text = guide.page(tmp_path.glob("*.json"))
    assert "## Host memory, Some GPU" in text
    assert "## Some GPU" not in text
    assert "| 256 MB | 0.987 | 0.987 |" in text
    assert "| 2 KB | from 128 MB | `staged` 1 |" in text
