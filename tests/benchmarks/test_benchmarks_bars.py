# SPDX-License-Identifier: Apache-2.0
"""Performance targets on conditions and on rows of full presets; the decision guide of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks_cases import copied

from portakv.cli.sides import load_shapes
from portakv.registry.registry import Registry
from portakv_benchmarks import check, choosing, guide
from portakv_benchmarks.host.cases import SCENES
from portakv_benchmarks.host.suite import HOST_PRESETS, KB
from portakv_benchmarks.shared.harness import having
from portakv_benchmarks.shared.recorded import read

FULL = HOST_PRESETS["full"]
ACCEPTED = 'accepted = { figure = 0.45, reason = "cold", tries = ["a", "b", "c"] }'


def judged(
    tmp_path: Path,
    figures: list[float],
    more: str = "",
    limit: str = "at_least = 0.5",
    where: str = 'shape = "s"',
    **row: Any,
) -> int:
    """Return the exit code of the check of rows with these figures against one target."""
    targets = tmp_path / "bars.toml"
    result = tmp_path / "result.json"
    about = f'name = "b"\nwhere = {{ {where} }}\nfigure = "ratio"'
    targets.write_text(f"[[bar]]\n{about}\n{limit}\n{more}\n")
    rows = [{"shape": "s", "ratio": figure, "verified": True, **row} for figure in figures]
    result.write_text(json.dumps({"machine": {"device_type": "cpu"}, "rows": rows}))
    return check.main([str(result), "--bars", str(targets)])


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
        ([0.9], {"where": "ratio = { about = 3 }"}, 2, "got ['about']"),
    ],
)
def test_verdicts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figures: list[float],
    more: dict[str, Any],
    code: int,
    word: str,
) -> None:
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


def newest_verdicts(result: dict[str, Any]) -> list[check.Verdict]:
    """Return verdicts on a whole result, with those on newer results of parts in their place, and
    on parts that the whole result lacks."""
    targets = check.load_targets()
    verdicts = {verdict.bar.name: verdict for verdict in check.judge(result, targets)}
    files = (guide.RESULTS / "parts").glob("*.json")
    # The others are counts of faults.
    parts = [read(file) for file in files if '"rows"' in file.read_text()]
    for part in sorted(parts, key=lambda part: str(part["machine"]["date"])):
        alike = all(
            part["machine"][key] == result["machine"][key] for key in ("device", "device_type")
        )
        newer = part["machine"]["date"] > result["machine"]["date"]
        if alike and part.get("suite") == result.get("suite"):
            judged_here = {v.bar.name: v for v in check.judge(part, targets) if v.rows}
            for name, verdict in judged_here.items():
                before = verdicts.get(name)
                if newer or before is None or not before.rows:
                    verdicts[name] = verdict
    return [*verdicts.values()]


@pytest.mark.parametrize("file", sorted(guide.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_recorded_result_misses_a_bar(file: Path) -> None:
    verdicts = newest_verdicts(read(file))
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


def test_a_bar_of_a_part_that_was_not_requested_is_not_judged() -> None:
    bar = check.Bar("b", {"backend": "cuda", "part": "inside"}, "ratio", at_least=0.5)
    result = {"machine": {"device_type": "cuda"}, "rows": []}
    assert check.judge({**result, "asked": {"parts": ["link"]}}, [bar]) == []
    (verdict,) = check.judge({**result, "asked": {"parts": ["link", "inside"]}}, [bar])
    assert verdict.word == "missed"


def test_a_bar_of_several_parts_is_judged_if_one_was_requested() -> None:
    where = {"backend": "cuda", "part": {"any_of": ["inside", "link"]}}
    bar = check.Bar("b", where, "ratio", at_least=0.5)
    result: dict[str, Any] = {
        "machine": {"device_type": "cuda"},
        "rows": [{"backend": "cuda", "part": "link", "ratio": 0.4, "verified": True}],
    }
    assert check.judge({**result, "asked": {"parts": ["pages"]}}, [bar]) == []
    (verdict,) = check.judge({**result, "asked": {"parts": ["link"]}}, [bar])
    assert verdict.word == "missed"


def recorded(name: str = "h200-host") -> dict[str, Any]:
    return read(guide.RESULTS / f"{name}.json")


def test_full_presets_measure_what_the_recorded_results_hold() -> None:
    """All targets find rows in these, see above; so they do in later measurements."""
    copies = having(recorded("h200")["rows"], kind="copy", backend="cuda")
    indices = {name: shape.index for name, shape in load_shapes().items()}
    assert all(row["index"] in indices[row["shape"]] for row in copies)
    sides = {one.side for one in SCENES}
    payloads = {*FULL.payloads, FULL.largest}
    for row in having(recorded()["rows"], kind="host_copy"):
        assert row["run_bytes"] in FULL.runs
        assert row["host_side"] in sides
        assert row["payload_bytes"] in payloads


@pytest.mark.parametrize("result", [recorded("h200"), recorded()], ids=["device", "host"])
def test_every_bar_is_missed_by_one_worse_row(result: dict[str, Any]) -> None:
    judged = check.judge(result, check.load_targets())
    assert len(judged) > 25
    assert len({verdict.bar.suite for verdict in judged}) == 1  # of the other suite none
    for bar in (verdict.bar for verdict in judged):
        worst = bar.worst([row for row in result["rows"] if bar.picks(row)])
        limit = bar.at_least if bar.at_least is not None else bar.at_most
        assert limit is not None
        beyond = limit if bar.accepted is None else bar.accepted["figure"]
        worse = {**worst, bar.figure: beyond * (0.95 if bar.at_most is None else 1.05)}
        rows = [worse if row is worst else row for row in result["rows"]]
        (verdict,) = check.judge({**result, "rows": rows}, [bar])
        assert (verdict.word, verdict.figure) == ("missed", worse[bar.figure]), bar.name


def test_what_is_only_reported_is_not_judged() -> None:
    result = recorded()
    before = [(v.bar.name, v.word, v.figure) for v in check.judge(result, check.load_targets())]
    calls = having(result["rows"], kind="host_call")
    only = [row for row in calls if row["ids"] != "kept Index" or row["run_bytes"] != 4 * KB]
    staged = having(calls, engine="staged", host_side="block-first random")
    assert only
    assert staged
    for row in (*only, *staged):
        row |= {"host_us": 1e6, "us_per_run": 1e6}
    after = [(v.bar.name, v.word, v.figure) for v in check.judge(result, check.load_targets())]
    assert before == after


def test_the_guide_is_what_the_results_say() -> None:
    assert guide.PAGE.read_text() == guide.recorded_page(), (
        "benchmarks/results/TABLES.md is old: python -m benchmarks.choosing"
    )


def test_the_page_and_the_pictures_of_a_choice_show_the_recorded_results(
    tmp_path: Path,
) -> None:
    assert choosing.stale() == [], "python -m benchmarks.choosing"
    drawn = choosing.IMAGES / "choosing-pulls.svg"
    changed = drawn.read_text(encoding="utf-8").replace("SHA-256 ", "SHA-256 0")
    (tmp_path / drawn.name).write_text(changed, encoding="utf-8")
    assert choosing.stale_pictures(tmp_path) == [
        f"choosing-{name}.svg" for name in choosing.PICTURES
    ]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:No artists with labels")  # of the picture without rows
@pytest.mark.parametrize("picture", choosing.PICTURES)
def test_a_picture_of_a_choice_is_drawn_from_the_recorded_results(
    picture: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    from portakv_benchmarks import choosing_plots

    name = choosing.PICTURES[picture]
    rows = recorded(name)["rows"]
    drawn = choosing_plots.write(tmp_path, picture, rows, "a device", choosing.source_of(name))
    text = drawn.read_text(encoding="utf-8")
    assert drawn.name not in choosing.stale_pictures(tmp_path)
    assert text.count("<path") > 20
    empty = choosing_plots.write(tmp_path, picture, [], "a device", "")
    assert text.count("<path") > empty.read_text(encoding="utf-8").count("<path")


@pytest.mark.parametrize("name", ["cpu-2core", "h200"])
def test_the_registry_asks_the_fastest_first(name: str) -> None:
    """The order follows the figures of each recorded device, of backends that need no request."""
    result = recorded(name)
    copies = [row for row in result["rows"] if row["kind"] == "copy" and not row.get("peer")]
    known = Registry().names()
    fastest = [name for name in guide.preference(copies) if name in known]
    assert fastest
    if result["machine"]["device_type"] != "cpu":
        assert fastest == [name for name in known if name in fastest]
