# SPDX-License-Identifier: Apache-2.0
"""Every known pitfall is mapped to tests that exist, and the page of the documentation says so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "conformance" / "pitfalls.toml"
TABLE: dict[str, Any] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
PITFALLS: list[dict[str, Any]] = TABLE["pitfall"]
#: How many are known in each area; a pitfall may be split in two, none may be lost.
KNOWN = {
    "addressing": 22, "indices": 14, "ordering": 10, "host memory": 7, "copy engine": 11,
    "honesty": 3,
}  # fmt: skip
NAMED = sorted({test for pitfall in PITFALLS for test in pitfall.get("tests", ())})


@cache
def functions(path: Path) -> frozenset[str]:
    """The tests that a file defines: ``test_y``, or ``TestX::test_y`` in a class."""
    owners: list[tuple[str, Any]] = [("", ast.parse(path.read_text(encoding="utf-8")))]
    owners += [(f"{n.name}::", n) for n in owners[0][1].body if isinstance(n, ast.ClassDef)]
    return frozenset(
        owner + node.name
        for owner, tree in owners
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    )


@pytest.mark.parametrize("test", NAMED)
def test_a_named_test_exists(test: str) -> None:
    assert test.startswith(("cases/test_", "tests/"))
    file, _, function = test.partition("::")
    path = (ROOT / "conformance" if file.startswith("cases/") else ROOT) / file
    assert path.is_file(), f"{test} is named in {SOURCE.name}, but there is no {path}."
    assert function in functions(path), f"{test} is named in {SOURCE.name} and does not exist."


def test_each_pitfall_has_tests_or_says_what_is_not_built() -> None:
    for pitfall in PITFALLS:
        what = pitfall["what"]
        assert set(pitfall) <= {"area", "what", "tests", "later"}, what
        assert pitfall.get("tests") or pitfall.get("later"), f"Nothing tests: {what}"
        assert len(set(pitfall.get("tests", ()))) == len(pitfall.get("tests", ())), what
        for sentence in (what, pitfall.get("later", "A sentence.")):
            assert re.fullmatch(r"[A-Z][^|\n]+\.", sentence), sentence
    assert len({pitfall["what"] for pitfall in PITFALLS}) == len(PITFALLS)
    assert set(TABLE) == {"pitfall"}


def test_no_pitfall_was_lost() -> None:
    found = Counter(pitfall["area"] for pitfall in PITFALLS)
    assert set(found) == set(KNOWN)
    for area, least in KNOWN.items():
        assert found[area] >= least, f"{area}: {found[area]} of {least} known pitfalls are left."
    # Only engines and movers that do not exist can be left for later.
    late = {pitfall["area"] for pitfall in PITFALLS if "later" in pitfall}
    assert late <= {"host memory", "copy engine", "honesty"}


def test_the_page_is_what_the_table_says() -> None:
    done = subprocess.run(
        [sys.executable, ".ci/pitfalls_table.py", "--check"], cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    for pitfall in PITFALLS:
        assert pitfall["what"] in page


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    for name in ("conformance/pitfalls.toml", ".ci/pitfalls_table.py", "docs/pitfalls.md"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    source = tmp_path / "conformance" / "pitfalls.toml"
    source.write_text(source.read_text(encoding="utf-8").replace("list is empty", "list is void"))
    command = [sys.executable, str(tmp_path / ".ci" / "pitfalls_table.py")]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert stale.returncode == 1
    assert "python .ci/pitfalls_table.py" in stale.stderr
    subprocess.run(command, check=True)
    assert subprocess.run([*command, "--check"], check=False).returncode == 0
    assert "list is void" in (tmp_path / "docs" / "pitfalls.md").read_text(encoding="utf-8")
