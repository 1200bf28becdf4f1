# SPDX-License-Identifier: Apache-2.0
"""`ascend` with the emulated AscendC kernel on the simulated npu, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portakv_conformance.record import RunRecord
from portakv_conformance.report import support
from portakv_conformance.simdev import build

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "native" / "ascend" / "emulation" / "run.sh"
why_not = build.missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=why_not or "")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment}, cwd=HERE,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("kernel") / "libportakv_ascend.so"
    done = run("bash", str(SCRIPT), "library", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return str(path)


def test_the_command_of_docs_hardware_judges_the_kernel(library: str, tmp_path: Path) -> None:
    """Here on the simulated device; the report says by what copies went."""
    words = ["-m", "portakv", "conform", "ascend", "--device", "simdev:npu", "--profile", "core"]
    chosen = ["--only", "cases/test_core.py::test_rows_move[gather-int32-1]"]
    chosen += ["--report", str(tmp_path)]
    done = run(sys.executable, *words, *chosen, PORTAKV_ASCENDC=library)
    told = done.stdout + done.stderr
    assert re.search(r"\b\d+ passed in ", told), told
    assert "failed" not in told
    report = (tmp_path / "conformance.json").read_text()
    assert "copies go by the AscendC kernel in libportakv_ascend.so, emulated" in report
    said = json.loads(report)["environment"]
    assert said["carried out by"] == "the AscendC kernel"
    digest = hashlib.sha256(Path(library).read_bytes()).hexdigest()
    assert said["library"] == {"libportakv_ascend.so": digest}
    assert support.device(RunRecord.read(report)) == "npu, emulated, by the AscendC kernel"
    done = run(sys.executable, *words, *chosen, PORTAKV_ASCENDC="")
    report = (tmp_path / "conformance.json").read_text()
    said = json.loads(report)["environment"]
    assert said["carried out by"] == "the ops of torch_npu"
    assert "library" not in said
    assert support.device(RunRecord.read(report)) == "npu, emulated"
    # And where it cannot be used, nothing else is judged in its place.
    done = run(sys.executable, *words, *chosen, PORTAKV_ASCENDC=library + ".not")
    assert done.returncode == 3
    assert "there is no such file" in done.stdout + done.stderr
