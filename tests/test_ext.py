# SPDX-License-Identifier: Apache-2.0
"""`portakv.ext`: its names are there and documented, and the examples for other packages suffice
with them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portakv import ext

ROOT = Path(__file__).resolve().parent.parent
#: Examples of other packages: a backend, a tier, a transport.
EXAMPLES = ("vendor_backend/acme.py", "memory_tier.py", "channel_transport.py")
MAY_IMPORT = {"portakv", "portakv.ext"}
#: Stands for the driver's package of the vendor.
DRIVER = "portakv_conformance"


def imports(text: str) -> Iterator[tuple[str, str]]:
    """Yield the modules and the names that a text imports from PortaKV."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def outside(text: str) -> list[str]:
    """Return what a text imports from PortaKV, except the names that it may build on."""
    ours = [(module, name) for module, name in imports(text) if module.startswith("portakv")]
    return [
        f"{module}:{name}"
        for module, name in ours
        if module not in MAY_IMPORT | {DRIVER}
        or (module == "portakv.ext" and name not in ext.__all__)
    ]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_imports_nothing_else(example: str) -> None:
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    assert any(module == "portakv.ext" for module, _ in imports(text))
    assert outside(text) == []


def test_another_import_would_be_found() -> None:
    text = "from portakv.graph import Graph\nfrom portakv.ext import Nothing, Tier\n"
    assert outside(text) == ["portakv.graph:Graph", "portakv.ext:Nothing"]


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
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == ""


def test_a_name_that_is_not_listed_is_missing() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AnotherTier'"):
        _ = ext.AnotherTier
