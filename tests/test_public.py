# SPDX-License-Identifier: Apache-2.0
"""Which names are public: the rule, the names that docs/api.md lists, and the imports of pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import portakv
from portakv import ext

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.md"
#: Pages whose code users copy.
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```(?:python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: Packages of the clone that no release of PortaKV promises to keep.
CLONE = ("portakv_benchmarks", "portakv_conformance", "portakv_examples")


class Name(NamedTuple):
    """A name of a module; empty for the module itself."""

    module: str
    name: str = ""


def source_of(module: str) -> Path | None:
    """Return the file of a module, without an import: an integration needs its engine."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def names_in(module: str) -> set[str]:
    """Return the names that a module defines or imports at its top level."""
    file = source_of(module)
    if file is None:
        return set()
    names = set[str]()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(each.id for each in node.targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def found_in(modules: Sequence[str], text: str) -> Name | None:
    """Return the name that a row of a table means: of the first module that has it."""
    front, _, name = text.rpartition(".")
    for module in modules:
        inside = f"{module}.{front}" if front else module
        if front and module.rpartition(".")[2] == front:
            inside = module
        if name in names_in(inside):
            return Name(inside, name)
        if source_of(f"{inside}.{name}"):
            return Name(f"{inside}.{name}")
    return None


def rows_of(page: str) -> Iterator[tuple[list[str], str]]:
    """Yield the modules of each section with each name of its tables.

    Modules stand in the paragraphs that begin with From or Import. A second cell with a module
    counts before those.
    """
    for section in page.split("\n## ")[1:]:
        if section.startswith("Environment variables"):
            continue
        paragraphs = [
            each for each in section.split("\n\n") if each.startswith(("From ", "Import "))
        ]
        modules = re.findall(r"`(portakv[\w.]*)`", "\n".join(paragraphs))
        for row in re.findall(r"^\| (`.+)$", section, re.MULTILINE):
            cells = row.split(" | ")
            own = re.findall(r"^`(portakv[\w.]*)`$", cells[1])
            for name in re.findall(r"`([\w.]+)`", cells[0]):
                yield [*own, *modules], name


def public() -> set[Name]:
    """Return all public names, with the modules that users import them from."""
    page = API.read_text(encoding="utf-8")
    rows = {found for row in rows_of(page) if (found := found_in(*row)) is not None}
    names = {*rows}
    names.update(Name("portakv", name) for name in (*portakv.__all__, "ext"))
    names.update(Name("portakv.ext", name) for name in ext.__all__)
    # A table has rows such as `pinned.empty`: users import the module.
    names.update(Name(each.module) for each in [*names])
    return names


def imports_of(code: str) -> Iterator[Name]:
    """Yield what a text imports from PortaKV."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (Name(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (Name(alias.name) for alias in node.names)


def private_imports(code: str, names: set[Name]) -> list[Name]:
    """Return what a text imports from PortaKV that is not public."""
    found = list[Name]()
    for each in imports_of(code):
        package = each.module.partition(".")[0]
        if not package.startswith("portakv") or package in CLONE:
            continue
        as_module = Name(f"{each.module}.{each.name}")
        if each not in names and as_module not in names:
            found.append(each)
    return found


def test_pages_import_public_names_alone() -> None:
    names = public()
    codes = {page: CODE.findall(page.read_text(encoding="utf-8")) for page in PAGES}
    assert sum(map(len, codes.values())) > 40
    private = {
        str(page.relative_to(ROOT)): found
        for page, blocks in codes.items()
        if (found := private_imports("\n".join(blocks), names))
    }
    assert private == {}, "List these names in docs/api.md, or import public ones."


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from portakv import KVView", []),
        ("from portakv.host import pinned", []),
        ("from portakv.storage import BlockStore\nimport portakv.storage", []),
        ("import torch\nfrom portakv_examples.memory_tier import MemoryTier", []),
        ("from portakv.storage import slots", [Name("portakv.storage", "slots")]),
        ("from portakv.view.view import KVView", [Name("portakv.view.view", "KVView")]),
        ("import portakv.runtime.ticks", [Name("portakv.runtime.ticks")]),
    ],
)
def test_a_private_import_is_found(code: str, found: list[Name]) -> None:
    assert private_imports(code, public()) == found


def test_each_row_of_the_api_names_something_of_its_modules() -> None:
    page = API.read_text(encoding="utf-8")
    rows = [*rows_of(page)]
    assert len(rows) > 100
    assert [row for row in rows if found_in(*row) is None] == []


def test_the_api_lists_each_name_of_the_package() -> None:
    page = API.read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for _, name in rows_of(page)}
    errors = {name for name in portakv.__all__ if name in names_in("portakv.errors")}
    assert {*portakv.__all__} - listed - errors == {"__version__"}


def test_the_rule_is_the_same_wherever_it_stands() -> None:
    rule = ext.__doc__ or ""
    paragraph = " ".join(rule.split("\n\n")[1].split())
    assert paragraph.startswith("A name is public if ")
    for page in ("api.md", "extending.md"):
        text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        assert paragraph in text, page


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("portakv.copy", "count_copies"),
        ("portakv.migrate", "count_weights"),
        ("portakv.graph", "open_telemetry"),
        ("portakv.graph.alarms", "Alarms"),
        ("portakv.runtime.tracing", "under"),
        ("portakv.serving.kv_events", "events_of"),
        ("portakv.serving.watched", "answer"),
    ],
)
def test_the_names_of_operations_are_public(module: str, name: str) -> None:
    names = public()
    assert Name(module, name) in names or Name(f"{module}.{name}") in names
    code = f"from {module} import {name}"
    exec(compile(code, "docs/operations.md", "exec"), {})
