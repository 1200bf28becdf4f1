# SPDX-License-Identifier: Apache-2.0
"""The emulation of AscendC: its checks bite, its bugs are caught, its texts are honest; and what
the kernel refuses on it. Every byte that the kernel moves: test_every_backend.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda_cases import COPIES, gathered
from support.each_backend import Carrier
from support.guarded_memory import refused

from portakv import TransferError, Unsupported
from portakv.backends import _ascend_kernel
from portakv.plan.plan import Move
from portakv_conformance.evidence.evidence import read
from portakv_conformance.evidence.source import source_sha256
from portakv_conformance.vendor import ascendc_emulated
from portakv_conformance.vendor.ascendc_emulated import SETTINGS, AscendC, Setting

CPU = torch.device("cpu")
ASCEND = Path(__file__).resolve().parents[2] / "native" / "ascend"
EMULATION = ASCEND / "emulation"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: the kernel cannot be compiled"
)


def run(
    *words: str, script: Path = EMULATION / "run.sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", script, *words], capture_output=True, text=True, env=around)


def test_the_kernel_matrix_and_the_misuse_of_the_api() -> None:
    done = run("matrix", "misuse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"functionally emulated on a CPU: [1-9]\d+ passed, 0 failed", done.stdout)
    assert re.search(r"misuse of the API: 1\d\d runs .* 0 not as expected", done.stdout)
    assert "not run on an Ascend device" in done.stdout
    assert done.stdout.splitlines()[-1] == "all right"


def test_a_check_that_does_not_bite_fails_the_script(tmp_path: Path) -> None:
    """Without the end of a UB buffer three kernels go unnoticed."""
    emulation = shutil.copytree(ASCEND, tmp_path / "ascend") / "emulation"
    text = (emulation / "machine.h").read_text()
    check = "if (offset > one.bytes || bytes > one.bytes - offset)"
    assert check in text
    (emulation / "machine.h").write_text(text.replace(check, "if (false)"))
    done = run("misuse", script=emulation / "run.sh")
    assert done.returncode == 1
    assert "NOT CAUGHT: a copy past the end of a UB buffer" in done.stdout
    assert "all right" not in done.stdout


@pytest.mark.slow
def test_everything_that_the_script_runs() -> None:
    done = run()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "all right"


FAULTS = [
    (header, found.start())
    for header in ("machine.h", "kernel_operator.h", "copies.h")
    for found in re.finditer(r"(?<![\w:])fault\((?=\s*\")", (EMULATION / header).read_text())
]


def test_every_check_of_the_emulation_is_found() -> None:
    assert len(FAULTS) >= 30


@pytest.mark.slow
@pytest.mark.parametrize(("header", "site"), FAULTS)
def test_each_check_of_the_emulation_bites(header: str, site: int, tmp_path: Path) -> None:
    """Without any one of its faults, the kernels that misuse the API are no longer all caught."""
    folder = shutil.copytree(EMULATION, tmp_path / "emulation")
    text = (folder / header).read_text()
    (folder / header).write_text(text[:site] + "ignored(" + text[site + len("fault(") :])
    command = ["g++", "-std=c++17", "-O0", "-w", "-Dignored(...)=((void)0)", f"-I{folder}"]
    files = [str(folder / "misuse.cpp"), "-o", str(folder / "misuse")]
    built = subprocess.run([*command, *files], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # It may also crash or hang, as hardware might: that is no pass either.
    done = subprocess.run(["timeout", "20", str(folder / "misuse")], capture_output=True)
    assert done.returncode != 0, text[site : site + 80]


def test_the_script_refuses_words_that_it_does_not_know() -> None:
    done = run("everything")
    assert done.returncode == 2
    assert "everything" in done.stdout


@pytest.mark.parametrize("word", ["suite", "npu"])
def test_without_the_package_the_script_says_what_to_install(word: str, tmp_path: Path) -> None:
    bare = tmp_path / "python"  # one that sees no installed package
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python in (bare, tmp_path / "none"):
        done = run(word, PYTHON=str(python))
        assert done.returncode == 1
        said = done.stdout.partition("===")[2].splitlines()[1]
        assert said == (
            f"The suite needs PortaKV with its extra 'conformance', and {python} has not got both; "
            f"run pip install '.[conformance]' in the repository, or name another Python by PYTHON."
        )
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_sanitized_run_leaves_a_record_for_the_ladder(tmp_path: Path) -> None:
    record = tmp_path / "ascendc-sanitized.json"
    done = run("sanitized", RECORD=str(record))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    said = read(record)
    assert (said.rung, said.emulated) == ("R3", True)
    assert said.target == "portakv_conformance.vendor.ascendc_emulated:AscendC"
    assert said.source_sha256 == source_sha256(said.target)
    assert said.device.endswith(", emulated, under ASan and UBSan")
    assert said.backend == "ascendc-emulated"
    assert said.told.startswith("semantics emulated, profile core, seed 0: ")
    assert said.told.endswith(" passed")
    assert said.command == "bash native/ascend/emulation/run.sh sanitized"


def test_a_record_of_anything_else_is_refused(tmp_path: Path) -> None:
    done = run("matrix", RECORD=str(tmp_path / "record.json"))
    assert done.returncode == 2
    assert "RECORD is for 'run.sh sanitized'" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_cann_the_script_for_cann_says_what_is_missing(tmp_path: Path) -> None:
    places = {"HOME": str(tmp_path), "OUT": str(tmp_path), "ASCEND_HOME_PATH": ""}
    for word, status, told in (("cpu", 3, "ASCEND_HOME_PATH"), ("gpu", 2, "'gpu'")):
        done = run(word, script=ASCEND / "run_in_cann.sh", **places)
        assert done.returncode == status
        assert told in done.stdout


# Texts

BUILT = (".pyc", ".so")
TEXTS = sorted(path for path in ASCEND.rglob("*") if path.is_file() and path.suffix not in BUILT)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ASCEND)))
def test_texts_are_honest(path: Path) -> None:
    text = path.read_text()
    assert "SPDX-License-Identifier: Apache-2.0" in "\n".join(text.splitlines()[:2])
    assert not re.search(r"(tested|verified|validated|runs) on (an )?(Ascend|NPU|910)", text, re.I)
    assert len(text.splitlines()) < 400


def test_the_kernel_has_no_launch_syntax_and_nothing_of_the_emulation() -> None:
    kernel = (ASCEND / "rows.h").read_text() + (ASCEND / "copy.h").read_text()
    assert "<<<" not in kernel
    assert "PORTAKV_EMULATION" not in kernel
    assert "ASCENDC_CPU_DEBUG" not in kernel
    holders = [path.name for path in TEXTS if "<<<" in path.read_text()]
    assert holders == ["launch.cpp"]


# The kernel on it

#: A table, several nests, loops beside the rows, a tail that is cut, and rows of odd widths.
CUT = ("memory objects, scattered", "two nests", "NZ blocks", "several units of an id",
       "gather of 656 B rows", "scatter to 3 B rows")  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CUT)
def test_every_byte_lands(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cores, their buffers, and when copies take place."""
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    Carrier(AscendC, CPU).tells(COPIES[name](), None)


def test_the_arguments_are_as_large_as_the_kernel_says() -> None:
    library, case = ascendc_emulated.library(), COPIES["gather"]()
    arguments = _ascend_kernel.Arguments(case.plan())
    assert [len(nest) for nest in arguments.nests] == [library.portakv_emulated_nest_bytes()]
    sides = case.src.view(), case.dst.view(), case.src.index(), case.dst.index()
    (copied,) = arguments.copies([1], Move(*sides, case.count), 0)
    assert len(copied) == library.portakv_emulated_copy_bytes()


def test_memory_that_was_not_given_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination said to be shorter than it is: the first byte past its end is told."""
    monkeypatch.setattr(
        _ascend_kernel, "_spans",
        lambda view, writable: [(first, past - first - 1, 1) for first, past in view.spans],
    )  # fmt: skip
    copied = gathered(64)
    with refused(TransferError, "emulated AscendC kernel", "lies in no allocation"):
        Carrier(AscendC, CPU).launches(copied)


@pytest.mark.parametrize(
    ("setting", "told"),
    [(Setting(0, 4096, 0), "no core"), (Setting(1, 512, 0), "ask the platform")],
)
def test_launches_that_cannot_be_right(
    setting: Setting, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ascendc_emulated, "SETTINGS", (setting,))
    copied = gathered(64)
    with refused(TransferError, told, watch=copied.dst.tensors):
        Carrier(AscendC, CPU).launches(copied)


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ascendc_emulated.FLAGS, "-Dportakv=1")
    with refused(Unsupported, "g++ failed", "error"):
        ascendc_emulated.library_file.__wrapped__()
