# SPDX-License-Identifier: Apache-2.0
"""Files about faults can be read and replayed, and `portakv witness show` prints them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.witness_cases import BLOCKS, DIM, HEADS, LAYERS, TOKENS, Engine, key

from portakv.cli import main
from portakv.errors import InvalidTerms
from portakv.witness import Fault
from portakv.witness.report import new_file, read_report
from portakv.witness.witness import REPORTS, REPORTS_OF_KIND


def fault_in(folder: Path, **terms: Any) -> Fault:
    """Return a fault with a file: V's head 2 of layer 1 has another number at token 5."""
    engine = Engine(reports=folder, about={"vllm": "0.26"}, **terms)
    engine.store(range(4), range(4))
    engine.load(20, 3)
    engine.cache[1][1, 20, 5, 2, 0] += 1
    (fault,) = engine.witness.restored([20], [key(3)]).faults
    return fault


def test_a_file_has_the_fault_the_sums_and_the_rows(tmp_path: Path) -> None:
    fault = fault_in(tmp_path / "reports")
    assert fault.report is not None
    assert fault.report.name == f"changed-bytes-{key(3).hex()[:16]}-block20.zip"
    with zipfile.ZipFile(fault.report) as file:
        text = json.loads(file.read("fault.json"))
        rows = [np.load(file.open(f"rows{kv}.npy")) for kv in range(2)]
        unequal = np.load(file.open("expected.npy")) != np.load(file.open("actual.npy"))
    assert text["fault"]["sentence"] == fault.sentence
    assert text["versions"]["vllm"] == "0.26"
    assert text["layout"] == "layer | kv block token head dim"
    assert unequal.sum() == 2
    assert rows[1].shape == (LAYERS, TOKENS, HEADS * DIM * 4)
    assert read_report(fault.report).replay() == "same"


def test_show_prints_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = fault_in(tmp_path)
    assert main(["witness", "show", str(fault.report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == fault.sentence
    assert "versions  portakv" in "\n".join(lines)
    assert "replay    the rows in this file have the actual sums" in lines
    assert lines[-1].split()[:4] == ["1", "1", "2", "5"]
    assert main(["witness", "show", "--json", str(fault.report)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["fault"]["kind"], shown["replay"]) == ("changed bytes", "same")


def changed(path: Path, kv: int, place: int) -> None:
    """Change a byte of the rows in a file about a fault."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    data = bytearray(entries[f"rows{kv}.npy"])
    data[-place] ^= 1
    entries[f"rows{kv}.npy"] = bytes(data)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def test_rows_that_changed_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = fault_in(tmp_path)
    assert fault.report is not None
    changed(fault.report, 0, 9)
    assert main(["witness", "show", str(fault.report)]) == 1
    assert "the rows changed after the comparison" in capsys.readouterr().out


def test_a_load_that_ends_late_is_reported(tmp_path: Path) -> None:
    """The rows were right when the file was written, and not when they were compared."""
    engine = Engine(reports=tmp_path)
    engine.store([0], [0])
    result = engine.witness.restored([20], [key(0)])
    engine.load(20, 0)
    (fault,) = result.faults
    assert fault.report is not None
    assert read_report(fault.report).replay() == "late"
    assert fault_in(tmp_path / "control").report is not None


@pytest.mark.parametrize("layers", [1, 0])
def test_the_rows_in_a_file_are_bounded(tmp_path: Path, layers: int) -> None:
    """Layers that differ come first; a layer that is too large is left out."""
    fault = fault_in(tmp_path, report_bytes=2 * TOKENS * HEADS * DIM * 4 if layers else 9)
    assert fault.report is not None
    read = read_report(fault.report)
    assert [*read.layers] == [1][:layers]
    assert read.replay() == ("same" if layers else "none")


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    engine = Engine(reports=tmp_path)
    numbers = range(REPORTS_OF_KIND + 3)
    engine.store(numbers, numbers)
    for n in numbers:
        engine.load(20 + n, n)
        engine.cache[n % LAYERS][0, 20 + n, 1, 1, 0] += 1
    blocks = [20 + n for n in numbers]
    faults = engine.witness.restored(blocks, [key(n) for n in numbers]).faults
    assert len(faults) == len(numbers) < BLOCKS
    assert sum(fault.report is not None for fault in faults) == REPORTS_OF_KIND < REPORTS
    assert len([*tmp_path.iterdir()]) == engine.witness.figures()[""].reports == REPORTS_OF_KIND


def test_ranks_that_report_at_the_same_time_have_a_file_each(tmp_path: Path) -> None:
    """Two ranks find the same fault in the same block, and neither has written its file."""
    names = [new_file(tmp_path, stem).name for stem in ("zeros", "zeros", "zeros", "unlike")]
    assert names == ["zeros.zip", "zeros-2.zip", "zeros-3.zip", "unlike.zip"]
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_a_folder_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    fault = fault_in(tmp_path / "file")
    assert fault.report is None
    assert "A file about a fault cannot be written" in caplog.text


def test_show_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table"
    engine = Engine(file=path)
    engine.store(range(4), range(4))
    engine.witness.close()
    assert main(["witness", "show", str(path)]) == 0
    assert capsys.readouterr().out.startswith("(one group): 4 of ")
    data = bytearray(path.read_bytes())
    data[data.index(key(2))] ^= 1
    path.write_bytes(data)
    assert main(["witness", "show", "--json", str(path)]) == 1
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert (group["fingerprints"], group["torn"]) == (3, 1)


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    with pytest.raises(InvalidTerms, match="a file about a fault"):
        read_report(path)
    for name in ("file", "nothing"):
        with pytest.raises(SystemExit) as ended:
            main(["witness", "show", str(tmp_path / name)])
        assert ended.value.code == 2
    assert "Expected a file about a fault" in capsys.readouterr().err


@pytest.mark.gpu
def test_rows_of_a_device_are_replayed_on_the_host(tmp_path: Path) -> None:
    fault = fault_in(tmp_path, device="cuda")
    assert fault.report is not None
    assert read_report(fault.report).replay() == "same"
    assert read_report(fault.report).rows[0].device == torch.device("cpu")
