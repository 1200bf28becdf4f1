# SPDX-License-Identifier: Apache-2.0
"""Where things lie, how long a vendor's file is, and what a backend may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ROOT / "portakv" / "backends"
# A backend knows plans and the arguments of a launch.
KNOWN = {"plan", "errors", "index", "view", "form", "loops", "backends"}
TREE = {
    "portakv": "connector layout presets view plan index registry transfer errors cli",
    "portakv/backends": "base reference compiled triton cuda hip ascend mlu",
    "portakv/host": "pinned memcpy small",
    "native": "cuda ascend",
    "native/ascend": "emulation",
    "conformance": "oracle strategies cases runner report simdev vendor mutants results",
    "benchmarks": "shapes.toml harness peers plots results",
    ".": "examples docs tests pyproject.toml constraints.txt README.md .ci",
}


@pytest.mark.parametrize("folder", TREE)
def test_the_names_of_the_design_are_there(folder: str) -> None:
    for name in TREE[folder].split():
        found = [ROOT / folder / name, ROOT / folder / f"{name}.py"]
        assert any(path.exists() for path in found), name


@pytest.mark.parametrize("vendor", ["ascend", "mlu", "hip"])
def test_a_vendor_s_backend_is_one_file_under_250_lines(vendor: str) -> None:
    text = (BACKENDS / f"{vendor}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert vendor.capitalize() in {node.name for node in classes}


@pytest.mark.parametrize("file", sorted(BACKENDS.glob("*.py")), ids=lambda file: file.name)
def test_a_backend_knows_plans_and_launches_alone(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert set(imported(ast.parse(text))) <= KNOWN


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of PortaKV that a file of ``portakv.backends`` imports, by their first name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "portakv":
                    yield rest.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("portakv").lstrip(".")
            ours = node.level == 2 or (node.module or "").partition(".")[0] == "portakv"
            if ours and module:
                yield module.partition(".")[0]
            elif ours:
                yield from (alias.name for alias in node.names)
