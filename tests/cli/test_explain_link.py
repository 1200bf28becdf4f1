# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --host`: on a machine without a device, by defaults or by a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.command_line import FOUNDING, run, run_json

from portakv.cli import main
from portakv.engines.costs import Point, Table, as_json

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="this machine has an accelerator"
)
ASKED = ("explain", "--host", "--blocks", "1000", "--run-bytes", "32768", "--direction", "d2h")


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of tables that holds nothing."""
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("either")
def test_the_command_of_the_guide() -> None:
    code, out, err = run(*ASKED)
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for text in (
        "31.25 MiB from the device to pinned host memory. Runs: 1000 on the device, 1000 on the",
        "There is no accelerator here; all engines are taken to serve one.",
        "descriptors carries it out: the default rule for runs of 32 KiB or more that gathering "
        "would not merge, as nothing was measured here.",
        "Terms: overlap='compute': the device is taken to run a model meanwhile.",
        "Times: not measured, so that the default rule picks engines: there is no accelerator to "
        "measure.",
    ):
        assert text in flat
    rows = [line.split()[:2] for line in out.splitlines()]
    for row in (
        ["staged", "accepted"], ["descriptors", "chosen"], ["direct", "rejected"],
        ["ring", "rejected"],
    ):  # fmt: skip
        assert rows.count(row) == 1


def test_as_json() -> None:
    found = run_json(*ASKED)
    assert list(found) == [
        "direction", "bytes", "runs", "host_runs", "host_memory", "engine", "why", "terms",
        "measured", "origin", "note", "engines",
    ]  # fmt: skip
    assert (found["direction"], found["bytes"]) == ("d2h", 32_768_000)
    assert (found["runs"], found["host_runs"], found["host_memory"]) == (1000, 1000, "pinned")
    assert found["terms"]["overlap"] == "compute"
    assert found["measured"] is False
    engines = {one["engine"]: one for one in found["engines"]}
    assert list(engines) == ["staged", "descriptors", "direct", "ring"]
    assert engines["direct"]["refused"].startswith("with overlap='compute'")
    assert engines["ring"]["refused"] == "it does not copy pinned memory"
    assert engines["staged"] == {
        "engine": "staged", "run_bytes": 32768, "runs": 1000,
        "seconds": None, "measured": False, "refused": "", "host_seconds": None,
        "answer": "accepted", "gbps": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "engine"),
    [
        (["--host-runs", "1"], "staged"),
        (["--host-runs", "1", "--direction", "h2d"], "staged"),
        (["--overlap", "idle", "--run-bytes", "4K"], "direct"),
        (["--max-thread-blocks", "2", "--run-bytes", "4K"], "direct"),
        (["--max-gbps", "30"], "direct"),
        (["--max-gbps", "5"], "direct"),
        (["--max-gbps", "5", "--blocks", "5"], "direct"),
        (["--blocks", "4000", "--host-runs", "60"], "staged"),
        (["--run-bytes", "1K"], "direct"),
        (["--run-bytes", "4K"], "staged"),
        (["--pageable"], "ring"),
        (["--blocks", "10"], "direct"),
        (["--run-bytes", "4M", "--blocks", "64"], "descriptors"),
    ],
)
def test_what_is_asked_decides(words: list[str], engine: str) -> None:
    assert run_json(*ASKED, *words)["engine"] == engine


def test_what_is_not_said_is_a_run_of_32_kib() -> None:
    found = run_json("explain", "--host")
    assert (found["runs"], found["bytes"], found["direction"]) == (1, 32768, "d2h")
    found = run_json("explain", "--host", "--payload", "100M", "--run-bytes", "1M")
    assert (found["runs"], found["bytes"]) == (100, 100 << 20)
    assert run_json("explain", "--host", "--payload", "100")["runs"] == 1


def test_terms_are_told() -> None:
    _, out, _ = run(*ASKED, "--max-gbps", "12.5", "--overlap", "idle", "--max-thread-blocks", "3")
    flat = " ".join(out.split())
    assert "overlap='idle': the device is taken to do nothing else; max_gbps=12.5" in flat
    assert "max_thread_blocks=3" in flat


def table_file(folder: Path, seconds: float) -> Path:
    table = Table(
        {"type": "cuda", "model": "Another Card"},
        {("staged", "d2h"): {32768: [Point(1000, seconds, 0)]},
         ("descriptors", "d2h"): {32768: [Point(1000, 1.0, 0)]}},
    )  # fmt: skip
    path = folder / "table.json"
    path.write_text(json.dumps(as_json(table)))
    return path


def test_a_table_of_another_machine(tmp_path: Path) -> None:
    path = table_file(tmp_path, 0.25)
    found = run_json(*ASKED, "--table", str(path))
    assert found["engine"] == "staged"
    assert found["origin"] == f"measured on Another Card ({path})"
    engines = {one["engine"]: one for one in found["engines"]}
    assert (engines["staged"]["seconds"], engines["staged"]["measured"]) == (0.25, True)
    assert engines["direct"]["measured"] is False
    assert run_json(*ASKED, "--table", str(table_file(tmp_path, 3.0)))["engine"] == "descriptors"


@pytest.mark.parametrize(
    ("content", "why"), [("{}", "its format is None"), ("x", "it is no JSON"), (None, "be read (")]
)
def test_a_file_that_is_no_table(content: str | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    code, out, err = run(*ASKED, "--table", str(path))
    assert (code, out) == (1, "")
    assert err.startswith(f"portakv: {path} was to be read as a table, but")
    assert why in err


def test_a_device_that_is_not_there() -> None:
    code, out, err = run(*ASKED, "--device", "nonsense")
    assert (code, out) == (1, "")
    assert "torch cannot use it here" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--host", *FOUNDING], "--host takes no layouts"),
        (["--host", "--blocks", "3", "--payload", "1M"], "--payload goes without --blocks"),
        (["--host", "--run-bytes", "0"], "expected bytes above 0"),
        (["--host", "--max-gbps", "0"], "above 0"),
        (["--host", "--max-gbps", "nan"], "above 0"),
        (["--host", "--max-thread-blocks", "0"], "expected a number above 0"),
        (["--host", "--direction", "up"], "invalid choice"),
        (["--host", "--overlap", "both"], "invalid choice"),
        ([], "SRC_LAYOUT, DST_LAYOUT"),
        (["epd"], "SRC_LAYOUT, DST_LAYOUT"),
        ([*FOUNDING, "--run-bytes", "1K"], "--run-bytes goes with --host"),
        ([*FOUNDING, "--max-gbps", "3"], "--max-gbps goes with --host"),
        ([*FOUNDING, "--pageable"], "--pageable goes with --host"),
        ([*FOUNDING, "--direction", "d2h"], "--direction goes with --host"),
    ],
)
def test_what_does_not_go_together_ends_with_2(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", *words])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert why in captured.err
