# SPDX-License-Identifier: Apache-2.0
"""The committed report of the schema job bears out what is claimed, and the job says what failed.

The job itself needs the network and a minute or two:
``python -m portakv_conformance.vendor.ascend_schema --report out``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portakv.backends.ascend import CALLS
from portakv_conformance.evidence import support_matrix
from portakv_conformance.evidence.source import source_sha256
from portakv_conformance.report.results import read
from portakv_conformance.vendor import ascend_ops, ascend_schema, cann_stub, standins

RESULTS = Path(__file__).resolve().parents[2] / "conformance" / "results"
REPORT = RESULTS / "ascend-npu-emulated-r2.json"
AGAIN = (
    f"the schema job's report is out of date: run `{ascend_schema.COMMAND} --report out` and keep "
    f"both results by .ci/keep_result.py out/{ascend_schema.REPORT} out/conformance.json"
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(REPORT.read_text("utf-8"))
    return content


def test_the_report_carries_its_rungs(report: dict[str, Any]) -> None:
    assert ascend_schema.right(report)
    assert report["emulated"] is True
    assert "No NPU was involved" in report["says"]
    assert report["torch_npu"] == ascend_schema.TORCH_NPU
    assert report["torch"].partition("+")[0] == ascend_schema.TORCH
    assert report["wheel"]["file"].startswith(f"torch_npu-{ascend_schema.TORCH_NPU}-")
    assert len(report["wheel"]["sha256"]) == 64


def test_the_report_is_about_what_is_pinned_and_called_now(report: dict[str, Any]) -> None:
    pinned = ascend_ops.pinned_schemas("vendor") | ascend_ops.pinned_schemas("torch")
    assert {row["op"]: row["pinned"] for row in report["schemas"]} == pinned, AGAIN
    for row in report["schemas"]:
        assert row["same"] == (row["found"] == row["pinned"] and row["kernel"])
    moves = {f"npu::{name}" for name in CALLS} - {"npu::get_npu_format"}
    assert moves < set(report["ops_called"])
    assert all(report["ops_called"][name] for name in moves)


def test_the_suite_s_report_stands_and_is_about_the_backend_as_it_is(
    report: dict[str, Any],
) -> None:
    suite = report["conformance"]
    file = RESULTS / suite["file"]
    if suite["source_sha256"] != source_sha256("portakv.backends.ascend:Ascend"):
        pytest.skip(f"R2 is expired, as the README's table says: {AGAIN}")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == suite["sha256"]
    record = read(file)  # raises if it was edited
    assert (record.verdict, record.rung, record.backend["name"]) == ("conformant", "R3", "ascend")
    assert record.environment["emulated"] is True
    assert record.environment["torch-npu"] == report["torch_npu"]
    assert not record.waivers
    assert record.backend["source_sha256"] == suite["source_sha256"]


SPOILED: dict[str, Callable[[dict[str, Any]], None]] = {
    "schemas": lambda report: report["schemas"][2].update(same=False),
    "refusals": lambda report: report["refusals"][-1].update(right=False),
    "kernel": lambda report: report.update(kernel={"right": False}),
    "conformance": lambda report: report["conformance"].update(verdict="failed"),
    "empty": lambda report: report.update(schemas=[], refusals=[]),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_report_with_one_error_carries_nothing(report: dict[str, Any], spoiled: str) -> None:
    changed = copy.deepcopy(report)
    SPOILED[spoiled](changed)
    assert not ascend_schema.right(changed)


def test_another_wheel_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script refuses a wheel whose hash is not the pinned one before it installs the wheel."""
    known = support_matrix.read().vendor
    (name,) = (name for name in known if name.endswith(".whl"))
    wheel = tmp_path / "venv" / "wheels" / name
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"another")
    digest = hashlib.sha256(b"another").hexdigest()
    assert ascend_schema.check_wheel(wheel, {}) == digest
    assert ascend_schema.check_wheel(wheel, {name: digest}) == digest
    commands: list[str] = []
    monkeypatch.setattr(ascend_schema, "run", lambda command: commands.append(" ".join(command)))
    words = ["--venv", str(tmp_path / "venv"), "--report", str(tmp_path / "out")]
    assert ascend_schema.main(words) == 1
    error = capsys.readouterr().err
    assert f"{name} has the sha256 {digest}, and the vendor's wheel of that name has" in error
    assert known[name] in error
    assert not any(name in command for command in commands)


def test_no_wheel_no_compiler_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cann_stub.StubError, match="Expected the libraries of torch_npu in"):
        cann_stub.build(tmp_path, tmp_path / "cann")
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "_C.so").write_bytes(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cann_stub.StubError, match="needs nm, which is not here; install gcc"):
        cann_stub.build(tmp_path, tmp_path / "cann")


@pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("nm")), reason="gcc and nm are not installed"
)
def test_what_the_stub_does_not_know_raises(tmp_path: Path) -> None:
    """A library that needs a function of CANN which the stub lacks gets one that fails loudly."""
    inner = tmp_path / "torch_npu"
    inner.mkdir()
    source = tmp_path / "c.c"
    source.write_text("int aclrtNew(void), aclInit(void); int f(void) { return aclrtNew(); }")
    cann_stub.run("gcc", "-shared", "-fPIC", "-o", str(inner / "_C.so"), str(source))
    assert cann_stub.build(tmp_path, tmp_path / "cann") == ["aclrtNew"]
    code = "import ctypes, sys; x = ctypes.CDLL(sys.argv[1]); print(x.aclInit(), x.aclrtNew())"
    library = str(tmp_path / "cann" / "lib" / "libhccl.so")
    output = cann_stub.run(sys.executable, "-c", code, library)
    assert output == "0 200001\n"


def test_an_environment_that_cannot_be_made_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'no network' >&2; exit 4\n")
    python.chmod(0o755)
    words = ["--venv", str(tmp_path / "venv"), "--report", str(tmp_path / "out")]
    assert ascend_schema.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("ascend_schema: ")
    assert error.endswith("ended with 4: no network\n")
    assert os.listdir(tmp_path / "out") == []


def test_an_emulation_is_entered_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(standins.EMULATION, raising=False)
    assert not standins.enter("npu")
    monkeypatch.setenv(standins.EMULATION, "portakv_conformance.vendor.ascend_device:enter")
    with pytest.raises(ValueError, match=r"Expected the name 'npu' .* got 'mlu'"):
        standins.enter("mlu")
