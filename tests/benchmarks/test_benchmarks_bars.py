# SPDX-License-Identifier: Apache-2.0
"""Bars on conditions, figures across rows, and the decision guide made from results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks_cases import copied

from portakv.registry.registry import Registry
from portakv_benchmarks import check, guide
from portakv_benchmarks.device import suite as derive
from portakv_benchmarks.shared.shapes import load

# --- bars -------------------------------------------------------------------------------------

ACCEPTED = 'accepted = { figure = 0.45, reason = "cold", tries = ["a", "b", "c"] }'


def judged(
    tmp_path: Path, figures: list[float], more: str = "", limit: str = "at_least = 0.5", **row: Any
) -> int:
    """The exit code of the check of rows with these figures against one bar."""
    bars, result = tmp_path / "bars.toml", tmp_path / "result.json"
    where = 'where = { shape = "s" }\nfigure = "ratio"'
    bars.write_text(f'[[bar]]\nname = "b"\n{where}\n{limit}\n{more}\n')
    rows = [{"shape": "s", "ratio": figure, "verified": True, **row} for figure in figures]
    result.write_text(json.dumps({"machine": {"device_type": "cpu"}, "rows": rows}))
    return check.main([str(result), "--bars", str(bars)])


@pytest.mark.parametrize(
    ("figures", "more", "code", "word"),
    [
        ([0.5, 0.9], "", 0, "1 met"),
        ([0.9, 0.49], "", 1, "1 missed"),  # the worst row decides
        ([], "", 1, "1 missed"),  # nothing was measured
        ([0.45], ACCEPTED, 0, "1 accepted"),
        ([0.44], ACCEPTED, 0, "1 accepted"),  # within the noise
        ([0.43], ACCEPTED, 1, "1 missed"),  # worse than what was accepted
        ([0.51], ACCEPTED, 0, "1 met"),
        ([0.1], 'device = "cuda"', 1, "0 met, 0 accepted, 0 missed"),  # no bar at all
    ],
)
def test_verdicts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figures: list[float],
    more: str,
    code: int,
    word: str,
) -> None:
    assert judged(tmp_path, figures, more) == code
    assert word in capsys.readouterr().out


@pytest.mark.parametrize(("figure", "code"), [(5.0, 0), (5.01, 1)])
def test_a_bar_from_above(tmp_path: Path, figure: float, code: int) -> None:
    assert judged(tmp_path, [1.0, figure], limit="at_most = 5.0") == code


def test_wrong_bytes_miss_every_bar(tmp_path: Path) -> None:
    assert judged(tmp_path, [0.9], verified=False) == 1


def test_a_broken_file_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(tmp_path / "absent.json")]) == 2
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert check.main([str(broken)]) == 2
    assert "cannot be judged" in capsys.readouterr().err
    assert check.main([str(guide.RESULTS / "h200.json"), str(broken)]) == 2


def test_several_files_are_judged_in_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(guide.RESULTS / name) for name in ("h200.json", "h200-host.json")]
    assert check.main(files) == 0
    shown = capsys.readouterr().out
    assert all(file in shown for file in files)
    assert shown.count(", 0 missed") == 2


@pytest.mark.parametrize(
    "more",
    [
        'accepted = { figure = 0.4, reason = "r", tries = ["a", "b"] }',
        'accepted = { figure = 0.4, reason = " ", tries = ["a", "b", "c"] }',
        "at_most = 1.0",
    ],
)
def test_bars_that_say_too_little_or_too_much(tmp_path: Path, more: str) -> None:
    assert judged(tmp_path, [0.9], more) == 2


@pytest.mark.parametrize("file", sorted(guide.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_recorded_result_misses_a_bar(file: Path) -> None:
    verdicts = check.judge(json.loads(file.read_text()), check.load_bars())
    assert verdicts
    missed = {v.bar.name for v in verdicts if v.word == "missed"}
    known = {v.bar.name for v in verdicts if v.bar.open}
    assert missed - known == set(), "recorded results miss a bar"
    assert known - missed == set(), "a bar is called open that is reached by now"


# --- figures across rows, and bars on conditions ----------------------------------------------


def test_rows_are_related_to_cuda_and_to_the_better_right_peer() -> None:
    rows = [
        copied("copy_", 8.0, op="copy_", index="none"),
        copied("cuda", 10.0), copied("triton", 12.0), copied("reference", 30.0, op="scatter"),
        copied("p slow", 20.0, peer="p"), copied("p fast", 9.0, peer="p", verified=False),
        copied("p good", 12.5, peer="p"),
    ]  # fmt: skip
    derive.relate(rows)
    cuda, triton, scatter = rows[1:4]
    assert (cuda["to_peer"], cuda["best_peer"]) == (0.8, "p good")
    assert "to_cuda" not in cuda
    assert triton["to_cuda"] == 1.2
    assert "to_cuda" not in scatter
    assert "to_peer" not in scatter
    assert "to_peer" not in rows[0]


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


def test_a_bar_with_an_unknown_condition_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bars.toml"
    bar = 'name = "b"\nwhere = { size = { about = 3 } }\nfigure = "ratio"\nat_least = 1.0'
    file.write_text(f"[[bar]]\n{bar}\n")
    with pytest.raises(ValueError, match="about"):
        check.load_bars(file)


def test_the_verdict_names_the_worst_row(capsys: pytest.CaptureFixture[str]) -> None:
    bar = check.Bar("b", {"backend": "cuda"}, "ratio", at_least=0.5)
    rows = [copied("cuda", 1.0, ratio=0.9), copied("cuda", 1.0, ratio=0.4, index="blocks")]
    (verdict,) = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, [bar])
    assert (verdict.word, verdict.figure, verdict.rows) == ("missed", 0.4, 2)
    assert verdict.row == "s apart cuda gather blocks"


def test_every_bar_of_a_cuda_device_asks_for_rows_that_the_full_preset_gives() -> None:
    """A bar whose conditions no shape fulfils would be missed for ever, or judge nothing."""
    rows = []
    for shape in load().values():
        for layers in ("apart", "together"):
            for op in ("gather", "scatter"):
                for backend in ("cuda", "triton", "compiled", "compiled graph", "reference"):
                    if backend.startswith("compiled") and not shape.compiled:
                        continue
                    for index in shape.index:
                        rows.append(copied(
                            backend, 1.0, shape=shape.name, op=op, layers=layers, index=index,
                            row_bytes=shape.row_bytes, payload_bytes=shape.payload, ratio=1.0,
                            slots_used=shape.slots_used, tokens=shape.tokens, to_peer=0.9,
                            to_cuda=1.0,
                        ))  # fmt: skip
    kinds = [{"kind": "overhead", "backend": b, "ids": i, "call_us": 1.0, "added_us": 1.0}
             for b in ("cuda", "triton") for i in ("kept Index", "device tensor")]  # fmt: skip
    kinds += [{"kind": "startup", "backend": "cuda", "cache": c, "seconds": 0.1}
              for c in ("cold", "warm")]  # fmt: skip
    rows += [{**row, "verified": True} for row in kinds]
    verdicts = check.judge({"machine": {"device_type": "cuda"}, "rows": rows}, check.load_bars())
    assert len(verdicts) > 25
    assert [v.bar.name for v in verdicts if v.word != "met"] == []


# --- the decision guide -----------------------------------------------------------------------


def test_the_guide_is_what_the_results_say() -> None:
    assert guide.PAGE.read_text() == guide.page(guide.RESULTS.glob("*.json")), (
        "docs/choosing.md is old: python -m benchmarks.guide"
    )


def of_backends() -> list[Path]:
    """The recorded results that compare backends; not those of copies to the host."""
    files = sorted(guide.RESULTS.glob("*.json"))
    return [file for file in files if json.loads(file.read_text()).get("suite") is None]


@pytest.mark.parametrize("file", of_backends(), ids=lambda path: path.stem)
def test_the_registry_asks_the_fastest_first(file: Path) -> None:
    """By the figures of each recorded device, of the backends that a caller gets unasked."""
    result = json.loads(file.read_text())
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
    machine = {"device_type": "cuda", "device": "Some GPU", "torch": "2.11", "python": "3.12",
               "date": "2026-11-20"}  # fmt: skip
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}))
    text = guide.page([file])
    assert "- `cuda`: 1.00 of `copy_` in the median of 3 rows, 1.00 at worst." in text
    assert "| `triton` | each layer an allocation | 1.20 | 1.30 | 3 |" in text
    assert (
        "- `triton` is more than 5% slower than `cuda`, of the sizes measured, at 40 MB, 100 MB."
        in text
    )
    assert "| rows of 256 B and more, from 32 MB | gather | 0.90 | 0.90 | 2 |" in text
    assert text.index("`cuda`: 1.00") < text.index("`triton`: ")
