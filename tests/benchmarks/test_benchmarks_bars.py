# SPDX-License-Identifier: Apache-2.0
"""Bars on conditions, figures across rows, and the decision guide made from results."""

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
from portakv_benchmarks.host.suite import KB, MB
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
    ],
)
def test_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: list[float],
    more: dict[str, Any], code: int, word: str,
) -> None:  # fmt: skip
    assert judged(tmp_path, figures, **more) == code
    assert word in capsys.readouterr().out


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
