# SPDX-License-Identifier: Apache-2.0
"""The stored table of costs: look-up between measurements, and files that are wrong."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.table_costs import host_looked_up, looked_up
from support.threads import run_threads

from portakv.interconnect import costs
from portakv.interconnect.costs import FORMAT, Point, Table, costs_of, identity, read, store
from portakv.runtime import cuda

pytestmark = pytest.mark.usefixtures("folder")
CPU = torch.device("cpu")


def affine(size: int, runs: int) -> float:
    """Return the cost of a copy engine: a fixed time, a time for each run and for each byte."""
    return 2e-5 + 8e-7 * runs + size * runs / 55e9


def host_cost(runs: int) -> float:
    """Return the time that a call keeps the host: no byte has a price."""
    return 4e-5 + 4.5e-7 * runs


SIZES = (256, 4096, 65536, 1 << 20)


def made(**device: str) -> Table:
    columns = {
        size: [Point(n, affine(size, n), host_cost(n)) for n in (1, 16, 256, 4096)]
        for size in SIZES
    }
    return Table(
        {**identity(CPU), **device},
        {("staged", "d2h"): columns, ("zero_copy", "d2h"): columns},
        {"pageable": "it was slow"},
        took=1.5,
        timer="a good clock",
    )


# look-up


@pytest.mark.parametrize("size", [256, 512, 1152, 4096, 32768, 65536, 500_000, 1 << 20])
@pytest.mark.parametrize("runs", [1, 3, 16, 100, 1000, 4096, 20_000])
def test_between_measurements_what_is_affine_is_exact(size: int, runs: int) -> None:
    known = made()
    few = size * runs < max(SIZES)
    for actual, wanted in (
        (looked_up(known, "staged", "d2h", size, runs), affine(size, runs)),
        (host_looked_up(known, "staged", "d2h", size, runs), host_cost(runs)),
    ):
        # Before its first point a column is level, and after its last it goes straight on.
        assert actual is not None
        assert few or actual == pytest.approx(wanted, rel=1e-6)
        assert runs < 16 or not few or actual == pytest.approx(wanted, rel=0.5)


def test_outside_the_sizes_that_were_measured() -> None:
    known = made()
    # Narrower runs cost each what the narrowest do; longer ones are as good as several.
    assert looked_up(known, "staged", "d2h", 16, 256) == pytest.approx(affine(256, 256))
    whole = 64 << 20
    assert looked_up(known, "staged", "d2h", whole, 1) == pytest.approx(affine(1 << 20, 64))
    assert looked_up(known, "staged", "d2h", 1 << 20, 0) == affine(1 << 20, 1)
    assert looked_up(known, "staged", "d2h", 0, 1) == affine(256, 1)


def test_seconds_do_not_fall_with_the_number_of_runs() -> None:
    noisy = [Point(1, 5e-5, 0), Point(16, 4e-5, 0), Point(256, 9e-5, 0), Point(1024, 8e-5, 0)]
    single = [Point(64, 1e-4, 0)]
    known = Table({}, {("a", "d2h"): {4096: noisy}, ("b", "d2h"): {4096: single}})
    for strategy in "ab":
        actual = [looked_up(known, strategy, "d2h", 4096, 2**n) for n in range(24)]
        if strategy == "b":
            assert actual == sorted(actual)
        # Far after the last point it costs more: bytes are never free.
        assert actual[23] > 50 * actual[10]
        assert all(actual)


# the file


def test_a_table_comes_back_as_it_was(folder: Path) -> None:
    before = made()
    path = store(before)
    assert path.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    after = read(path)
    assert costs.as_json(after) == costs.as_json(before)
    for size in (300, 4096):
        arguments = "staged", "d2h", size, 77
        assert looked_up(after, *arguments) == looked_up(before, *arguments)
        assert host_looked_up(after, *arguments) == host_looked_up(before, *arguments)
    assert (after.left_out, after.timer) == ({"pageable": "it was slow"}, "a good clock")
    assert str(path) in after.origin
    assert [entry.name for entry in folder.iterdir()] == [path.name]  # nothing half-written
    content = json.loads(path.read_text())
    content["engines"]["staged"]["d2h"].reverse()  # rows may stand in any order
    path.write_text(json.dumps(content))
    assert read(path).points == after.points
    assert list(read(path).points["staged", "d2h"]) == list(SIZES)


def test_it_is_read_once_and_used_from_then_on() -> None:
    before = costs_of(CPU)
    assert not before.measured
    assert "`portakv calibrate` measures one" in before.origin
    assert costs_of(CPU) is before
    store(made())
    after = costs_of(CPU)
    assert after.measured
    assert after.origin.startswith("measured on")
    assert looked_up(after, "staged", "d2h", 4096, 1) == pytest.approx(affine(4096, 1))
    costs.path_for(identity(CPU)).unlink()
    assert costs_of(CPU) is after


def test_tables_of_other_devices_drivers_and_releases_lie_beside_it(folder: Path) -> None:
    fields = identity(CPU)
    assert fields["torch"] == torch.__version__
    paths = {costs.path_for(fields | {name: "another"}) for name in fields}
    paths.add(costs.path_for(fields))
    assert len(paths) == len(fields) + 1
    store(made(model="another model"))
    assert not costs_of(CPU).measured


def spoil(content: Any, **changes: Any) -> str:
    return json.dumps({**content, **changes})


def rows_of(content: Any, rows: list[list[Any]]) -> str:
    return spoil(content, engines={"staged": {"d2h": rows}})


DAMAGED: dict[str, tuple[Callable[[Any], str], str]] = {
    "empty": (lambda c: "", "not JSON"),
    "cut off": (lambda c: json.dumps(c)[:-40], "not JSON"),
    "not text": (lambda c: "\udcff\udcfe", "not JSON"),
    "deep": (lambda c: "[" * 100_000, "not JSON"),
    "a list": (lambda c: "[1, 2]", "its format is None"),
    "an older format": (lambda c: spoil(c, format=0), "its format is 0"),
    "a newer format": (lambda c: spoil(c, format=FORMAT + 1), f"its format is {FORMAT + 1}"),
    "without strategies": (lambda c: json.dumps({"format": FORMAT}), "damaged (KeyError"),
    "strategies that are none": (lambda c: spoil(c, engines=[3]), "damaged (AttributeError"),
    "a direction": (lambda c: spoil(c, engines={"staged": {"up": []}}), "direction 'up'"),
    "a short row": (lambda c: rows_of(c, [[4096, 1, 1.0]]), "damaged (ValueError"),
    "no bytes": (lambda c: rows_of(c, [[0, 1, 1.0, 1.0]]), "0 is not a number"),
    "too many bytes": (lambda c: rows_of(c, [[10**400, 1, 1.0, 1.0]]), "is not a number"),
    "half a run": (lambda c: rows_of(c, [[4096, 0.5, 1.0, 1.0]]), "0.5 is not a number"),
    "a negative time": (lambda c: rows_of(c, [[4096, 1, -1.0, 1.0]]), "-1.0 is not a time"),
    "no time at all": (lambda c: rows_of(c, [[4096, 1, 0, 1.0]]), "is not a time"),
    "no number": (lambda c: rows_of(c, [[4096, 1, float("nan"), 1.0]]), "nan is not a time"),
    "infinity": (lambda c: rows_of(c, [[4096, 1, float("inf"), 1.0]]), "inf is not a time"),
    "a word": (lambda c: rows_of(c, [[4096, 1, "fast", 1.0]]), "'fast' is not a time"),
    "a truth": (lambda c: rows_of(c, [[4096, True, 1.0, 1.0]]), "True is not a number"),
    "a point twice": (lambda c: rows_of(c, [[4096, 1, 1.0, 1.0]] * 2), "occurs twice"),
    "a device that is none": (lambda c: spoil(c, device=7), "damaged (AttributeError"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_damaged_is_ignored_and_says_so(kind: str) -> None:
    path = store(made())
    damage, why = DAMAGED[kind]
    path.write_bytes(damage(json.loads(path.read_text())).encode(errors="surrogateescape"))
    costs.forget()
    with pytest.raises(costs.TableError) as refused:
        read(path)
    assert why in str(refused.value)
    result = costs_of(CPU)
    assert not result.measured
    assert f"{path} was ignored, since" in result.origin
    assert why in result.origin
    # Measuring again mends it.
    store(made())
    assert costs_of(CPU).measured


def test_a_file_of_another_device_under_this_ones_name_is_ignored() -> None:
    path = store(made())
    path.write_text(json.dumps(costs.as_json(made(model="another model"))))
    costs.forget()
    assert not costs_of(CPU).measured
    assert f"it was measured on {made(model='another model').device}" in costs_of(CPU).origin


def test_a_folder_in_its_place_is_ignored() -> None:
    path = costs.path_for(identity(CPU))
    path.mkdir(parents=True)
    assert "cannot be read" in costs_of(CPU).origin
    with pytest.raises(OSError, match="directory"):
        store(made())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_reader_sees_a_whole_table_while_others_write(folder: Path) -> None:
    path = store(made())

    def work(writes: bool) -> None:
        for _ in range(50):
            if writes:
                store(made())
            else:
                assert read(path).points

    run_threads(work, [True, True, False])
    assert [entry.name for entry in folder.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("version_text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n", "580.65.06"),
        ("NVRM version: Open Kernel Module for x86_64  570.86.15  Release", "570.86.15"),
        ("6.12.12\n", "6.12.12"),
        ("nothing that one knows", "13000"),
        (None, "13000"),
        (None, ""),
    ],
)
def test_the_driver_of_a_table(
    version_text: str | None, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version() -> int:
        if not driver:
            raise ImportError("no cuda.bindings")
        return 13000

    file = tmp_path / "version"
    if version_text is not None:
        file.write_text(version_text)
    monkeypatch.setattr(costs, "DRIVER_FILES", (file, file))
    monkeypatch.setattr(cuda, "driver_version", version)
    assert costs.installed_driver() == driver
