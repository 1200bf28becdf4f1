# SPDX-License-Identifier: Apache-2.0
"""The benchmark of migration, in sizes that mean nothing; no test here judges a time."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import portakv_benchmarks.cli as bench
from portakv import Index, copy_rows
from portakv_benchmarks import check, guide
from portakv_benchmarks.migration import pulls
from portakv_benchmarks.migration.cases import ALL_CASES, CASES, SEVERAL, Cache
from portakv_benchmarks.migration.side import Far
from portakv_benchmarks.migration.suite import MIGRATION_PRESETS, MigrationBench
from portakv_benchmarks.shared.harness import Failed, Row, having

CPU = torch.device("cpu")
NBYTES = 1 << 19


def run(folder: Path, *words: str) -> tuple[int, Row]:
    """Return the exit code and the written result."""
    arguments = ["--device", "cpu", "--preset", "tiny", "--out", str(folder), *words]
    code = bench.main(["--migration", *arguments])
    (file,) = folder.glob("*-migration*.json")
    return code, json.loads(file.read_text())


def checked(folder: Path, *words: str) -> list[Row]:
    code, result = run(folder, *words)
    assert code == 0, result["left_out"]
    assert not [line for line in result["left_out"] if isinstance(line, Failed)]
    assert all(row["verified"] and row["across"] == "processes" for row in result["rows"])
    rows: list[Row] = result["rows"]
    return rows


@pytest.mark.slow
def test_pulls_are_measured_judged_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    rows = checked(tmp_path, "--only", "mapped,costs", "--bars")
    mapped = having(rows, kind="migrate_mapped")
    assert {row["shape"] for row in mapped} == {*CASES} - {"blocks of 64 KB"}
    assert {row["row_bytes"] for row in mapped} == {2048, 512, 256, 1152}
    # The baseline of the others has no baseline.
    assert all({"of_raw", "of_rows"} <= row.keys() for row in having(mapped, backend="mapped"))
    assert not [row for row in having(mapped, backend="raw copy") if "of_raw" in row]
    shown = capsys.readouterr().out
    assert "pulls of mapped memory" in shown
    assert "pull between" in shown
    (file,) = tmp_path.glob("*.json")
    assert "### Pulls from mapped memory" in guide.page([file])
    if find_spec("matplotlib") is not None:
        assert [x.stem.rpartition("-")[2] for x in tmp_path.glob("*.svg")] == ["pulls"]


@pytest.mark.slow
def test_every_part_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    rows = checked(tmp_path)
    kinds = {"mapped", "both", "cost", "wall", "ticket", "setup", "weights", "staged"}
    assert {row["kind"] for row in rows} == {f"migrate_{kind}" for kind in kinds}
    judged = check.judge(
        json.loads(next(tmp_path.glob("*.json")).read_text()), check.load_targets()
    )
    without = {verdict.bar.name for verdict in judged if not verdict.rows}
    assert without == {"Owner, and publish, of 1,000 allocations (ms)"}  # tiny makes fewer


@pytest.mark.gpu
@pytest.mark.slow
def test_every_part_measures_on_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    code = bench.main(["--migration", "--device", "cuda", "--preset", "tiny", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0, result["left_out"]
    assert all(row["verified"] for row in result["rows"])
    kinds = {row["kind"].removeprefix("migrate_") for row in result["rows"]}
    assert {"mapped", "both", "cost", "weights", "beside"} <= kinds


@pytest.mark.slow
def test_pulls_from_several_owners_are_measured_by_the_wall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    rows = having(checked(tmp_path, "--only", "wall"), kind="migrate_wall")
    methods = {"mapped", "mapped, by name", "raw copy"}
    for name, case in SEVERAL.items():
        several = having(rows, shape=name)
        assert {row["backend"] for row in several} == methods
        assert {row["owners"] for row in several} == {case.owners}
        assert all("of_raw" in row for row in several if row["backend"] != "raw copy")
    assert {row["owners"] for row in rows if row["shape"] not in SEVERAL} == {1}


@pytest.mark.parametrize("name", [*CASES, *SEVERAL])
def test_one_wrong_byte_is_seen_and_one_elsewhere(name: str) -> None:
    case = ALL_CASES[name]
    sources = [Cache(case, False, NBYTES, CPU, number) for number in range(case.owners)]
    target = Cache(case, True, NBYTES, CPU)
    for source in sources:
        source.fill(1)

    def copied() -> None:
        target.poison()
        for source in sources:
            first = max(source.heads[0], target.heads[0])
            past = min(source.heads[1], target.heads[1])
            src, dst = (
                one.shard.view.slice(heads=slice(first - one.heads[0], past - one.heads[0]))
                for one in (source, target)
            )
            ids = [Index(one.blocks(NBYTES), step=one.size) for one in (source, target)]
            copy_rows(src, dst, *ids, count=case.tokens(NBYTES))

    copied()
    assert target.has(sources, NBYTES)
    assert not target.has(sources, NBYTES)  # nothing is left of it
    copied()
    block, at = (int(one[-1]) for one in target.places(NBYTES))
    target.planes[-1][block, at, -1, -1] ^= 1
    assert not target.has(sources, NBYTES)
    copied()
    free = ({*range(target.planes[0].shape[0])} - {*target.ids.tolist()}).pop()
    target.planes[0][free, 0, 0, 0] ^= 1
    assert not target.has(sources, NBYTES)
    copied()
    sources[-1].fill(2)  # what was read before the contents changed
    assert not target.has(sources, NBYTES)


@pytest.mark.full
def test_a_process_that_fails_hangs_or_ends_is_told_and_replaced() -> None:
    bench_ = MigrationBench(CPU, MIGRATION_PRESETS["tiny"])
    far = bench_.far
    with pytest.raises(RuntimeError, match="no_such_thing"):
        far.do("no_such_thing")
    far.begin("nonsense")  # the caller never waited for the answer
    assert len(far.do("give", "NHD to HND", NBYTES)) > 100
    far.process.kill()
    far.process.wait()
    with pytest.raises((RuntimeError, OSError)):
        far.do("drop")
    assert bench_.far is not far
    bench_.far.begin("drop")  # it imports torch meanwhile
    with pytest.raises(RuntimeError, match=r"did not answer in 0\.1 s"):
        bench_.far.end(0.1)
    bench_.forget()


def test_what_cannot_be_measured_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.main(["--migration", "--device", "cpu", "--only", "nonsense"]) == 1
    assert "Expected --only to be one of mapped, both" in capsys.readouterr().err
    monkeypatch.setenv("PORTAKV_MOVER", "nixl")
    assert bench.main(["--migration", "--device", "cpu"]) == 1
    assert "Expected PORTAKV_MOVER to be unset, got 'nixl'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_whose_process_ends_leaves_the_others(tmp_path: Path) -> None:
    class Ends(Far):
        def do(self, name: str, *arguments: object, **named: object) -> object:
            if name == "offer":
                self.process.kill()
            return super().do(name, *arguments, **named)

    bench_ = MigrationBench(CPU, MIGRATION_PRESETS["tiny"])
    bench_.started = Ends  # type: ignore[method-assign]
    steps = [*pulls.cost_steps(bench_), *pulls.weight_steps(bench_)][:2]
    rows = bench.carry_out(steps, CPU, None, bench_.left_out)
    assert {row["kind"] for row in rows} == {"migrate_weights"}
    assert [isinstance(line, Failed) for line in bench_.left_out] == [True]
    bench_.forget()
