# SPDX-License-Identifier: Apache-2.0
"""The benchmark of block stores, in sizes that mean nothing; no test here judges a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import stat
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import portakv_benchmarks.cli as bench
from portakv_benchmarks import check, guide
from portakv_benchmarks.shared.files import FIO, Slab
from portakv_benchmarks.shared.harness import Failed, Row, having
from portakv_benchmarks.shared.shapes import in_bytes
from portakv_benchmarks.shared.trials import Method, Sample, Trials
from portakv_benchmarks.storage.stores import alongside
from portakv_benchmarks.storage.suite import STORAGE_PRESETS, StorageBench
from portakv_benchmarks.storage.tiers import compare_processor_time

#: A program that moves nothing and says what fio would, half of it for sizes of 1 MB and more.
FAKE = """
import json, os, sys
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
if "--version" in words:
    sys.exit(print("fio-3.33"))
n, op = os.path.getsize(words["--filename"]), words["--rw"][4:]
moved = n if int(words["--bs"]) < 1 << 20 else n // 2
figures = {"io_bytes": moved, "bw_bytes": 10**9}
job = {"error": 0, "usr_cpu": 1, "sys_cpu": 1, "job_runtime": 9, op: figures}
print(json.dumps({"jobs": [job]}))
"""


@pytest.fixture
def fio(tmp_path: Path) -> str:
    """A program in fio's place."""
    made = tmp_path / "fio"
    program = tmp_path / "fio.py"
    program.write_text(FAKE)
    # By a shell: a line that names Python after "#!" may hold no space.
    made.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {program} "$@"\n')
    made.chmod(stat.S_IRWXU)
    return str(made)


def run(folder: Path, *words: str) -> tuple[int, Row]:
    """Return the exit code and the written result."""
    arguments = ["--dir", str(folder / "disk"), "--out", str(folder), *words]
    (folder / "disk").mkdir()
    code = bench.main(["--storage", "--device", "cpu", "--preset", "tiny", *arguments])
    assert [*(folder / "disk").iterdir()] == []  # it is left as it was
    (file,) = folder.glob("*-storage*.json")
    return code, json.loads(file.read_text())


@pytest.mark.full
def test_every_part_measures_judges_and_draws(
    tmp_path: Path, fio: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORTAKV_BACKEND", raising=False)
    monkeypatch.delenv("PORTAKV_IO", raising=False)
    code, result = run(tmp_path, "--fio", fio, "--sizes", "256K,1M", "--gib", "0.008", "--bars")
    shown = capsys.readouterr().out
    rows = result["rows"]
    assert code == 0, shown
    kinds = {"engine", "tier", "cost", "beside", "remote", "layered", "hits", "urgent", "served"}
    assert {row["kind"] for row in rows} == {f"storage_{kind}" for kind in kinds}
    assert all(row["verified"] for row in rows)
    assert all(row["of_fio"] > 0 for row in having(rows, slot_bytes=1 << 18, chosen=True))
    # A trial that fio did not move whole does not count.
    assert not [row for row in having(rows, slot_bytes=1 << 20) if "of_fio" in row]
    refused = [line for line in result["left_out"] if "fio moved" in line]
    assert len(refused) == 2 * len(FIO)
    known = ("lmcache: ", "engine, ")  # not installed; what an engine does without
    assert [x for x in result["left_out"] if x not in refused and not x.startswith(known)] == []
    judged = check.judge(result, check.load_targets())
    without = {v.bar.name for v in judged if not v.rows}
    # What a tiny run does not measure.
    few = ("1 MiB and more", "16 MiB and more", "one block of 2 MiB", "LMCache", "250,000", "99th")
    assert all(any(word in name for word in few) for name in without), without
    assert "reading and writing random slots" in shown
    assert "### A disk's tier" in guide.page(tmp_path.glob("*-storage.json"))
    if find_spec("matplotlib") is not None:
        drawn = {path.stem.rpartition("-")[2] for path in tmp_path.glob("*.svg")}
        assert drawn == {"rates", "tier", "urgent"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "1Q"], "Expected a size such as 256K, 1M or 1G, got '1Q'"),
        (["--dir", "/nonexistent"], "/nonexistent"),
        (["--only", "nonsense"], "Expected --only to be one of engine, tier"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--storage", "--device", "cpu", "--dir", str(tmp_path), *words]
    assert bench.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_sizes_in_words() -> None:
    assert [in_bytes(one) for one in ("256K", "4m", " 1G")] == [1 << 18, 4 << 20, 1 << 30]


def test_quantiles_of_urgent_loads_are_over_those_of_all_rounds(tmp_path: Path) -> None:
    """A round alone has its worst load as the 99th of 100."""
    sizes = replace(STORAGE_PRESETS["tiny"], rounds=4, loads=3)
    bench = StorageBench(torch.device("cpu"), sizes, tmp_path, {"fio": None, "lmcache": None})
    row, stored = alongside(bench)
    assert row["loads_alone"] == 4 * 3
    assert row["loads"] >= 4
    assert row["gb_per_s"] > 0
    assert row["verified"]
    assert stored["rate_ratio"] > 0


def test_ways_are_tried_in_turns_and_compared_by_round() -> None:
    tried: list[str] = []

    def method(name: str, seconds: list[float], **more: Any) -> Method:
        times = iter([9.0, *seconds, 9.0])
        return Method(name, lambda: Sample(next(times), 1e-3), lambda: tried.append(name), **more)

    def fails() -> Sample:
        raise OSError(22, "refused")

    left_out: list[str] = []
    methods = [
        method("ours", [1.0, 2.0, 3.0]),
        method("fio a", [2.0, 2.0, 3.0], peer="fio"),
        method("fio b", [9.0, 9.0, 1.0], peer="fio"),
        method("wrong", [1.0] * 3, right=lambda: False),
        Method("fails", fails),
    ]
    rows = Trials(3, 0.0, left_out).rows({"kind": "k"}, 1 << 20, methods, {"of_fio": "fio"})
    assert [row["backend"] for row in rows] == ["ours", "fio a", "fio b", "wrong"]
    assert [row["verified"] for row in rows] == [True, True, True, False]
    assert rows[0]["of_fio"] == 1.0  # of 2.0, 1.0, 1.0, compared with the one of the better median
    assert (rows[0]["p50_us"], rows[0]["cpu_us_per_mib"]) == (2e6, 1000.0)
    assert "of_fio" not in rows[1]
    assert [("refused" in x, isinstance(x, Failed)) for x in left_out] == [(True, True)]
    assert [tried.count(name) for name in ("ours", "fio a", "fio b", "wrong")] == [5, 5, 5, 4]


def test_processor_time_is_compared_with_the_engine_and_lmcache_of_the_same_operation() -> None:
    measured = {
        ("load", "tier"): 90.0,
        ("load", "engine"): 6.0,
        ("load", "lmcache"): 180.0,
        ("first store", "tier"): 300.0,
        ("first store", "lmcache"): 200.0,
        ("full store", "tier"): 50.0,
    }
    rows: list[Row] = [
        {"op": op, "backend": backend, "cpu_us_per_mib": us}
        for (op, backend), us in measured.items()
    ]
    compare_processor_time(rows)
    load, engine, _, first, _, full = rows
    assert (load["cpu_over_engine_us"], load["cpu_of_lmcache"]) == (84.0, 0.5)
    assert engine.keys() == {"op", "backend", "cpu_us_per_mib"}
    assert first["cpu_of_lmcache"] == 1.5
    assert "cpu_over_engine_us" not in first
    assert full.keys() == {"op", "backend", "cpu_us_per_mib"}  # nothing was measured alongside


@pytest.mark.parametrize("refused", [False, True])
def test_a_file_that_is_read_from_memory_is_told(
    tmp_path: Path, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that takes no O_DIRECT has its page cache measured, and the results say so.
    Control: with O_DIRECT, the file is open past the page cache, and no line is left out."""
    real = os.open

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if refused and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **named)

    left_out = list[str]()
    monkeypatch.setattr(os, "open", opened)
    try:
        slab = Slab(Trials(1, 0.0, left_out), tmp_path, 4096, 4)
    except OSError:
        pytest.skip("this file system takes no O_DIRECT")
    direct = bool(fcntl.fcntl(slab.fd, fcntl.F_GETFL) & os.O_DIRECT)
    os.close(slab.fd)
    if not refused and not direct:
        pytest.skip("this file system takes no O_DIRECT")
    assert direct is not refused
    reason = f"{tmp_path} refuses O_DIRECT: the page cache is measured"
    assert left_out == ([reason] if refused else [])
