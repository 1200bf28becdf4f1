# SPDX-License-Identifier: Apache-2.0
"""The grid of a calibration and the order of its points; `portakv calibrate` if there is nothing to
measure, and what it prints; a real link that is measured within its time."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from support.command_line import run
from support.host_choice_cases import FIGURES, host_seconds_of, seconds_of
from support.table_costs import looked_up

from portakv.cli import calibrate as verb
from portakv.cli import sides
from portakv.core.pick import ORDER
from portakv.host import pinned
from portakv.interconnect import calibration
from portakv.interconnect.calibration import (
    DELAYED,
    GRID,
    SECONDS,
    Grid,
    Timer,
    by_point,
    calibrate,
)
from portakv.interconnect.costs import DIRECTIONS, Point, Table, costs_of, store
from portakv.runtime import kernel_cache

CUDA = torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("folder")
no_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="this machine has an accelerator"
)


def test_the_grid_of_a_size() -> None:
    grid = Grid((256, 4096), (1000, 4096, 65536), most_runs=100, pageable=4096)
    assert grid.runs(256) == [3, 16, 100]  # 256 would be too many
    assert grid.runs(4096) == [1, 16]  # too large for the least payload
    assert grid.runs(4096, True) == grid.runs(1 << 20, True) == [1]
    assert grid.largest(False) == max(16 * (4096 + 256), 100 * (256 + 256))


def test_the_usual_grid_takes_less_than_its_time_by_figures_of_an_h200() -> None:
    """With a factor of 1.8 for what is not in them, as kernels that compile."""
    seconds = 0.0
    for strategy, direction, size in product(FIGURES, DIRECTIONS, GRID.run_bytes):
        for runs in GRID.runs(size, strategy == "pageable"):
            host = host_seconds_of(strategy, direction, size, runs)
            one = seconds_of(strategy, direction, size, runs) + host
            seconds += (GRID.times(size * runs) + 2) * (one + min(host, calibration.SEEN))
    assert 1.8 * seconds < SECONDS


@pytest.mark.parametrize("count", range(1, 12))
def test_the_ends_come_first_and_nothing_twice(count: int) -> None:
    values = list(range(0, 10 * count, 10))
    order = calibration.spread(values)
    assert sorted(order) == values
    assert order[:2] == [values[0], values[-1]][: len(order)]
    if count >= 5:
        assert order[2] == values[(count - 1) // 2]


# A real link


@cache
def made_here() -> tuple[Table, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernel_cache.ENVIRONMENT)
        began = perf_counter()
        table = calibrate(CUDA)
        return table, perf_counter() - began


def measured() -> tuple[Table, float]:
    """A table of all strategies, and the seconds that it took; kernels stay where they are kept."""
    table, took = made_here()
    every = {(name, direction) for name in ORDER for direction in DIRECTIONS}
    if table.points.keys() < every and not table.left_out and took >= SECONDS - 1:
        pytest.skip("other users of this machine took the time of some strategies")
    assert table.points.keys() == every
    return table, took


@pytest.mark.gpu
def test_every_strategy_is_measured_in_time_and_rates_are_those_of_a_link() -> None:
    table, took = measured()
    assert took < SECONDS + 2  # with what is prepared before the clock can be looked at
    assert (table.left_out, table.emulated) == ({}, False)
    assert table.device["model"]
    assert table.device["driver"]
    assert table.timer == DELAYED
    for (_, size, runs), strategies in by_point(table).items():
        for point in strategies.values():
            assert 0 < size * runs / point.seconds < 1e12
    for direction in DIRECTIONS:
        sizes = table.points["staged", direction]
        if 2 << 20 not in sizes:
            pytest.skip("other users of this machine took the time of the longest runs")
        longest = sizes[2 << 20][-1]
        assert longest.runs * (2 << 20) / longest.seconds > 1e8  # also beside other users


@pytest.mark.gpu
def test_what_the_host_does_first_is_hidden() -> None:
    source = torch.zeros(8 << 20, device=CUDA)
    target = pinned.empty((8 << 20,), torch.float32)
    timer = Timer(CUDA)

    def late() -> None:
        sleep(1e-3)
        target.copy_(source, non_blocking=True)  # 32 MiB: 0.6 ms on a fast link

    for _ in range(50):  # other users of the device may keep it busy for a millisecond
        seen = timer.time(late)
        hidden = timer.time(late, 1e-3)
        assert seen.host_seconds > 1e-3
        assert hidden.host_seconds > 1e-3
        if 1e-4 < hidden.seconds < seen.seconds - 0.8e-3:
            return
    pytest.fail(f"the host's millisecond shows alike in {seen} and {hidden}")


@pytest.mark.gpu
def test_the_table_is_kept_and_decides(folder: Path) -> None:
    path = store(measured()[0])
    assert list(folder.iterdir()) == [path]
    known = costs_of(CUDA)
    assert known.measured
    for direction in DIRECTIONS:
        for strategy in ORDER:
            assert looked_up(known, strategy, direction, 32 << 10, 1000)


# The command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        *(pytest.param(words, "this machine has no accelerator", marks=no_accelerator)
          for words in ([], ["--json"])),
        (["--device", "cpu"], "the CPU is the host"),
        (["--device", "nonsense"], "torch cannot use it here"),
        (["--device", "meta"], "does not list here"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(words: list[str], why: str, folder: Path) -> None:
    code, out, err = run("calibrate", *words)
    assert (code, out) == (1, "")
    assert err.startswith("portakv: ")
    assert why in err
    assert not folder.exists()


def test_the_table_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    fast = Point(64, 64 * 4096 / 50e9, 0.1)
    slow = Point(64, 64 * 4096 / 20e9, 0.2)
    measured = Table(
        {"model": "Some Card"},
        {
            ("staged", "d2h"): {4096: [fast]},
            ("zero_copy", "d2h"): {4096: [slow]},
            ("pageable", "d2h"): {4096: [Point(64, 1e-9, 0.0)]},
        },
        {"batched_memcpy": "it was not there"},
        took=3.21,
        whole=False,
        timer="a good clock",
    )
    device = torch.device("cpu")
    verb.show(measured, by_point(measured), Path("/somewhere/table.json"), device)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "d2h" in line]
    # Pageable memory is no rival of pinned memory.
    assert line.split()[:8] == ["d2h", "4096", "64", "256", "KiB", "50.00", "20.00", "262144.00"]
    assert line.split()[8:] == ["staged", "5.24", "us"]
    assert "Some Card, cpu" in out
    assert "batched_memcpy was not measured: it was not there" in out
    assert "The time was too short" in out
    assert "Times are of a good clock." in out
    assert "Measured in 3.2 s and stored in /somewhere/table.json" in out
    assert "emulated" not in out


# Bytes and times


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("32768", 32768), ("32K", 32768), ("32k", 32768), ("32KiB", 32768), ("17B", 17),
     ("64M", 64 << 20), ("64 MiB", 64 << 20), ("64mb", 64_000_000), ("2G", 2 << 30),
     *((text, None) for text in ("", "0", "K", "-3", "1.5M", "32X", "ten", "0K", "1 0"))],
)  # fmt: skip
def test_bytes_that_are_read(text: str, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(Exception, match="expected bytes above 0"):
            sides.read_bytes(text)
    else:
        assert sides.read_bytes(text) == nbytes


def test_bytes_and_times_that_are_written() -> None:
    written = [sides.in_bytes(n) for n in (1, 1023, 1024, 1536, 5 << 20, 3 << 40)]
    assert written == ["1 B", "1023 B", "1 KiB", "1.5 KiB", "5 MiB", "3 TiB"]
    times = [sides.in_time(s) for s in (1e-7, 8.52e-5, 4.712e-3, 1.2, 75.0)]
    assert times == ["0.1 us", "85.2 us", "4.71 ms", "1.2 s", "75 s"]
