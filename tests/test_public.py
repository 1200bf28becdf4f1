# SPDX-License-Identifier: Apache-2.0
"""Which names are public: the rule, the names that docs/api.md lists, and the imports of pages.

public_names.json has all public names, so that a change of the list shows in review. After a wanted
change write it anew: `python tests/test_public.py`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import portakv
from portakv import ext
from portakv.cli import make_parser
from portakv.graph.meter import METRICS, PREFIX
from portakv.integrations import INTEGRATIONS
from portakv.integrations.lmcache import check
from portakv.integrations.sglang.pools import OTHERS as SGLANG_OTHERS
from portakv.integrations.vllm import moves
from portakv.integrations.vllm.caches import TERM as HAND_OVER
from portakv.integrations.vllm.check import IDENTITY, TIER_OTHERS
from portakv.serving.handover import HandoverTerms
from portakv.serving.local import term_names
from portakv.storage import form, image
from portakv.storage.io import choose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.xdist_group("names")  # one process reads the files
ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.md"
#: Pages whose code users copy.
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
#: All public names, by kind.
LISTED = Path(__file__).with_name("public_names.json")
#: Modules that a configuration or an engine's command line names.
DOORS = (
    "portakv.integrations.kvcacheio",
    "portakv.integrations.lmcache",
    "portakv.integrations.lmcache_l2",
    "portakv.integrations.sglang",
    "portakv.integrations.sglang_hicache",
    "portakv.integrations.transformers",
    "portakv.integrations.transformers_store",
    "portakv.integrations.vllm",
    "portakv.integrations.vllm_connector",
    "portakv.integrations.vllm_tier",
)
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


@cache
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
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NAMES":
            names.update(ast.literal_eval(node.value))  # which `__getattr__` loads
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


@cache
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
        ("from portakv.storage.tiers import folder", [Name("portakv.storage.tiers", "folder")]),
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


def commands(parser: argparse.ArgumentParser, words: str) -> Iterator[str]:
    """Yield a command with its arguments, and those of its verbs."""
    actions = [each for each in parser._actions if each.dest != "help"]
    verbs = [each for each in actions if isinstance(each, argparse._SubParsersAction)]
    options = [option for each in actions for option in each.option_strings]
    places = [
        each.dest.upper() for each in actions if each not in verbs and not each.option_strings
    ]
    yield " ".join([words, *places, *sorted(options)])
    for each in verbs:
        for verb, inner in each.choices.items():
            yield from commands(inner, f"{words} {verb}")


def without_docstring(module: Any) -> list[str]:
    """Return the classes, functions, methods and properties of a module's names that have no
    docstring, neither their own nor that of what they replace, and no line in their class's."""
    wanting = list[str]()
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        listed = [(name, value)]
        if inspect.isclass(value) and value.__module__.startswith("portakv"):
            lines = re.findall(r"^ +([\w, ]+):", inspect.getdoc(value) or "", re.MULTILINE)
            told = {*re.findall(r"\w+", " ".join(lines))}
            members = [each for each in vars(value) if not (each[0] == "_" or each in told)]
            found = [(each, inspect.getattr_static(value, each)) for each in members]
            shown = property, cached_property, classmethod, staticmethod
            listed += [
                (f"{name}.{each}", getattr(value, each))
                for each, one in found
                if inspect.isfunction(one) or isinstance(one, shown)
            ]
        wanting += [each for each, one in listed if not inspect.getdoc(one)]
    return wanting


@pytest.mark.parametrize("module", [portakv, ext])
def test_what_is_public_has_a_docstring(module: Any) -> None:
    assert not without_docstring(module)


def test_a_missing_docstring_is_found() -> None:
    def bare() -> None: ...

    assert without_docstring(SimpleNamespace(__all__=["bare"], bare=bare)) == ["bare"]


def public_names() -> dict[str, list[str]]:
    """Return all public names, sorted, by kind."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    entry_points = [
        f"{group}: {name} = {target}"
        for group, entries in project["entry-points"].items()
        for name, target in entries.items()
    ]
    keys = {
        "vllm connector": [*term_names(), HAND_OVER],
        f"vllm connector {HAND_OVER}": [each.name for each in fields(HandoverTerms)],
        "vllm offloading worker portakv": moves.TERMS,
        "vllm tier": [*term_names(TIER_OTHERS), IDENTITY],
        "sglang portakv": term_names(SGLANG_OTHERS),
        "lmcache adapter_params": check.TERMS,
    }
    variables = re.findall(r"^\| `(PORTAKV_\w+)", API.read_text(encoding="utf-8"), re.MULTILINE)
    kinds = {
        "portakv": portakv.__all__,
        "portakv.ext": ext.__all__,
        "docs/api.md": {f"{each.module} {each.name}".rstrip() for each in public()},
        "commands": commands(make_parser(), "portakv"),
        "environment variables": variables,
        "configuration keys": {f"{door}: {key}" for door, own in keys.items() for key in own},
        "entry points": [
            *entry_points,
            *(f"{script} = {target}" for script, target in project["scripts"].items()),
        ],
        "modules of doors": DOORS,
        "I/O engines": choose.BUILT_IN,
        "folder formats": [f"form {form.FORMAT}", f"image {image.MAGIC.hex()}"],
        "lines that choose an integration": [each.line for each in INTEGRATIONS.values()],
        "metrics": [
            f"{PREFIX}{each.name} {each.kind} {each.otel} {' '.join(each.labels)}".rstrip()
            for each in METRICS.values()
        ],
    }
    return {kind: sorted(names) for kind, names in kinds.items()}


def test_the_public_names_are_those_of_the_list() -> None:
    listed = json.loads(LISTED.read_text(encoding="utf-8"))
    assert public_names() == listed, "Write the list anew: `python tests/test_public.py`."


@pytest.mark.parametrize("module", DOORS)
def test_the_modules_of_doors_are_there(module: str) -> None:
    """Each gives the objects of its engine's folder, and defines no class of its own."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    assert not [each for each in body if isinstance(each, ast.ClassDef)]


if __name__ == "__main__":
    LISTED.write_text(json.dumps(public_names(), indent=1) + "\n", encoding="utf-8")
