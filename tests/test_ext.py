# SPDX-License-Identifier: Apache-2.0
"""`portakv.ext`: its names are there and documented, and the examples for other packages suffice
with them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ready
from support.waits import LIMIT

import portakv
from portakv import ext

ROOT = Path(__file__).resolve().parent.parent
#: Examples of other packages: a backend, a tier, a transport.
EXAMPLES = ("vendor_backend/acme.py", "memory_tier.py", "plain_io.py", "channel_transport.py")
#: The modules that other packages may build on, with their names.
MAY_IMPORT = {"portakv": {*portakv.__all__, "ext"}, "portakv.ext": {*ext.__all__}}
#: A module's name as a text, such as what `importlib.import_module` takes.
DOTTED = r"portakv\w*(\.\w+)+"
#: Stands for the driver's package of the vendor.
DRIVER = ("portakv_conformance", "simdev")


def imports(text: str) -> Iterator[tuple[str, str]]:
    """Yield the modules and the names that a text imports, or reads as attributes of a module.

    Of an import by its name as a text, the text is the module.
    """
    nodes = [*ast.walk(ast.parse(text))]
    for node in nodes:
        yield from imported(node)
    modules = {own: module for node in nodes for own, module in named(node)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node.value)
            module = modules.get(name, name)
            if module in MAY_IMPORT:
                yield module, node.attr


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the modules and the names that a statement imports, or a text names."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield from ((module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Constant) and re.fullmatch(DOTTED, str(node.value)):
        yield str(node.value), ""


def named(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the names that a statement binds to modules, and these."""
    if isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        own = ((alias.asname or alias.name, alias.name) for alias in node.names)
        yield from ((name, f"{node.module}.{alias}") for name, alias in own)


def is_ours(module: str) -> bool:
    """Return whether a module is of PortaKV, one of its other packages, or named by dots alone."""
    return module.startswith(".") or module.partition(".")[0].startswith("portakv")


def outside(text: str) -> list[str]:
    """Return what a text imports from PortaKV, except the names that it may build on."""
    found = list[str]()
    for module, name in imports(text):
        allowed = MAY_IMPORT.get(module, set[str]())
        if not is_ours(module) or (module, name) == DRIVER:
            continue
        if module not in MAY_IMPORT or (name and name not in allowed):
            found.append(f"{module}:{name}")
    return found


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_imports_nothing_else(example: str) -> None:
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    assert any(module == "portakv.ext" for module, _ in imports(text))
    assert outside(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from portakv.graph import Graph", ["portakv.graph:Graph"]),
        ("from portakv.ext import Nothing, Tier", ["portakv.ext:Nothing"]),
        ("from portakv.ext import *", ["portakv.ext:*"]),
        ("from portakv import *", ["portakv:*"]),
        ("from portakv import storage", ["portakv:storage"]),
        ("import portakv.storage", ["portakv.storage:"]),
        ("import portakv.storage as s", ["portakv.storage:"]),
        ("import portakv\nportakv.storage.BlockForm", ["portakv:storage"]),
        ("import portakv as p\np.storage.BlockForm", ["portakv:storage"]),
        ("import portakv.ext as e\ne.Nothing", ["portakv.ext:Nothing"]),
        ("from portakv import ext\next.Nothing", ["portakv.ext:Nothing"]),
        ("import portakv.ext\nportakv.ext.Nothing", ["portakv.ext:Nothing"]),
        ("from importlib import import_module as i\ni('portakv.graph')", ["portakv.graph:"]),
        ("__import__('portakv.graph')", ["portakv.graph:"]),
        ("from portakv_conformance import judge", ["portakv_conformance:judge"]),
        ("import portakv_native", ["portakv_native:"]),
        ("from .graph import Graph", [".graph:Graph"]),
    ],
)
def test_another_import_is_found(text: str, found: list[str]) -> None:
    assert outside(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "import portakv\nportakv.copy_blocks",
        "from portakv import KVView, ext\next.Tier",
        "import portakv.ext\nportakv.ext.Tier",
        "import torch.nn as nn\nnn.Linear",
        "from portakv_conformance import simdev",
    ],
)
def test_names_to_build_on_are_not_found(text: str) -> None:
    assert outside(text) == []


@pytest.mark.parametrize("name", ext.__all__)
def test_each_name_is_there_and_documented(name: str) -> None:
    assert getattr(ext, name) is not None
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## What other packages may import")[2].partition("\n## ")[0]
    assert re.search(rf"`{name}`", section)


def test_the_page_lists_no_other_names() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## What other packages may import")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {*ext.__all__}


def test_a_backend_loads_neither_stores_nor_migration() -> None:
    """Its names are loaded with the module, and the others at their first use."""
    code = (
        "import sys; from portakv.ext import Backend, KVView, Launch; "
        "print(*(x for x in sys.modules if x.startswith(('portakv.storage', 'portakv.migrate'))))"
    )
    done = ready.run("-c", code, timeout=LIMIT)
    done.check_returncode()
    assert done.stdout.strip() == ""


def test_a_name_that_is_not_listed_is_missing() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AnotherTier'"):
        _ = ext.AnotherTier
