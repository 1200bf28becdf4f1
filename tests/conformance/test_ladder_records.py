# SPDX-License-Identifier: Apache-2.0
"""Records of jobs: they name the backend by its own name, say what they are about, and hold no
place of the machine that made them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from portakv_conformance.evidence.evidence import (
    Job,
    name_of,
    read,
    recorded,
    rung_of,
    without_places,
)
from portakv_conformance.evidence.ladder import RESULTS, Ladder, Rung, broken_rules
from portakv_conformance.evidence.source import SourceError
from portakv_conformance.vendor.standins import SIMULATION

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "portakv.backends.reference:Reference"
EMULATION = "portakv_conformance.vendor.ascendc_emulated:AscendC"


def test_a_record_names_the_backend_as_a_report_does(tmp_path: Path) -> None:
    """By the class's own name: a module's last word may be another."""
    job = Job("semantics emulated", EMULATION, "cpu, emulated", "g++", "", "", [SIMULATION])
    made = recorded(job, ["true"])
    (tmp_path / "job.json").write_text(json.dumps(made))
    assert made["name"] == read(tmp_path / "job.json").backend == "ascendc-emulated"
    for file in sorted((ROOT / RESULTS).glob("*-r[1-5].json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert kept["name"] == name_of(kept["backend"]), file.name
    for target in ("portakv.backends.hip:Nobody", "portakv.backends.hip:Launch"):
        with pytest.raises(SourceError, match="says no name"):
            name_of(target)


def test_a_row_says_what_a_job_tells_of_itself(tmp_path: Path) -> None:
    line = "on cpu: profile full, seed 0: 1721 passed in 9.1 s"
    command = [sys.executable, "-c", f"print({line!r})"]
    job = Job("semantics emulated", REFERENCE, "cpu, emulated", "", "passed",
              r"profile\s+\w+,\s+seed\s+\d+:\s+\d[^.]*?(?=\s+in\s)", [SIMULATION])  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(recorded(job, command)))
    told_of_it = rung_of(read(tmp_path / "job.json"), "job.json").told
    assert told_of_it == "semantics emulated, profile full, seed 0: 1721 passed"
    assert not recorded(replace(job, tells=r"\d+ failed"), command)["right"]
    forged = json.loads((tmp_path / "job.json").read_text()) | {"told": "profile full: 9999 passed"}
    (tmp_path / "job.json").write_text(json.dumps(forged))
    with pytest.raises(ValueError, match="'profile full: 9999 passed' was not printed"):
        read(tmp_path / "job.json")


def test_the_recipe_of_the_page_is_about_the_real_kernel() -> None:
    """What the vendor's toolchain builds is not credited to an emulation."""
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    recipe = text.partition('--what "built by the vendor\'s toolchain"')[2].partition("```")[0]
    target = recipe.partition("--backend ")[2].split()[0]
    device = recipe.partition('--device "')[2].partition('"')[0]
    built = Rung(
        backend="ascend", target=target, device=device, rung="R5", emulated=True,
        evidence=f"{RESULTS}a.json", told="built", command="bash it.sh", date="2026-11-20",
        versions="1", source_sha256="a" * 64,
    )  # fmt: skip
    assert target == "portakv.backends.ascend:Ascend"
    assert list(broken_rules(Ladder((built,)))) == []


# -- places of the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("rootdir: /somewhere/x\ncachedir: .c\nconfigfile: a.toml\n1 passed\n", "1 passed\n"),
        ("Python 3.11.7 -- /somewhere/bin/python", "Python 3.11.7 -- python"),
        ("in '/somewhere/else/a.py':3, see", "in 'a.py':3, see"),
        ("-I/somewhere/include/x -L/somewhere/l", "-Ix -Ll"),
        ("tests/a.py::t[1] PASSED", "tests/a.py::t[1] PASSED"),
        (
            "https://a.b/c/d and/or 3 / 4, ../a/b, ~/a/b",
            "https://a.b/c/d and/or 3 / 4, ../a/b, ~/a/b",
        ),
        ("/a/b/:/c/d", ":d"),
    ],
)
def test_places_are_left_out(printed: str, kept: str) -> None:
    assert without_places(printed) == kept


def test_a_record_holds_no_place_of_the_machine() -> None:
    job = Job("cross-compiled, not executed", REFERENCE, "x", targets=["80"],
              says=r"^1 passed", kernels=r"::(?P<kernel>\w+\[(?P<target>\d+)\])",
              compiler=r"^version \d.*")  # fmt: skip
    made = recorded(
        job, ["printf", "1 passed\nrootdir: /somewhere/x\nversion 3 in /somewhere/c/bin\n::t[80]"]
    )
    assert made["right"]
    assert made["printed"] == ["1 passed", "version 3 in bin", "::t[80]"]
    assert made["compiler"] == "version 3 in bin"


@pytest.mark.parametrize("file", sorted((ROOT / RESULTS).glob("*")), ids=lambda file: file.name)
def test_no_result_holds_a_place_of_the_machine(file: Path) -> None:
    """Nothing in a committed file says where on which machine it was made."""
    roots = "bin|build|data|home|mnt|opt|private|root|srv|tmp|usr|var|work|workspace|Users"
    text = file.read_text(encoding="utf-8")
    assert re.findall(rf"(?<![\w./~])/(?:{roots})\b[^\s\"]*", text) == []
    assert not re.search(r"\brootdir\b", text)
