# SPDX-License-Identifier: Apache-2.0
"""Where things lie, and what the modules of each package may know.

The order of the packages is import-linter's contract (pyproject.toml); here are the limits that it
cannot say.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support import seams

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "portakv"
TREE = {
    "portakv": "cli storage migrate connector graph copy engines registry backends plan host view "
    "runtime layout",
    "portakv/backends": "base reference compiled triton cuda hip ascend mlu",
    "portakv/integrations": "lmcache vllm sglang transformers kvcacheio",
    "portakv/migrate": "movers",
    "portakv/host": "pinned pool shared memcpy small",
    "native": "cuda host ascend",
    "native/ascend": "emulation",
    "conformance": "judge draw run evidence report cases mutants simdev vendor results",
    "benchmarks": "device host migration plugs shared storage shapes.toml bars.toml results",
    ".": "examples docs tests pyproject.toml constraints.txt README.md .ci/run .ci/full",
}
PLUGS = "portakv/integrations"
#: Folders of the plugs into engines, of block stores and of migration: they have own numbers.
STORAGE = ("portakv/storage", "portakv/graph")
MIGRATE = ("portakv/migrate", "benchmarks/migration", "tests/migrate")
APART = (
    *(PLUGS, "benchmarks/plugs", "tests/integrations"),
    *(*STORAGE, "benchmarks/storage", "tests/storage", "tests/graph"),
    *MIGRATE,
)
#: Lines that hold a signature or a table closer than the formatter would; none may be added.
PACKED = {
    "portakv": 101,
    PLUGS: 36,
    "conformance": 112,
    "benchmarks": 60,
    "benchmarks/plugs": 5,
    "tests": 287,
    "tests/integrations": 35,
}
#: A private name of another object than a test's own or torch's, and how many; none may be added.
PRIVATE = re.compile(
    r"\b(?!self\b|cls\b|torch\b|_C\b|os\b|utils\._python_dispatch\b)"
    r"\w+\._(?!_|replace\b|asdict\b)\w+"
)
#: In the tests of plugs they are also the engines', which have no public ones.
PRIVATE_READS = {"tests": 63, "tests/integrations": 35}
IMPORTS = 12  # modules of the library that one module may import
#: Functions that remember by device, of which a process has a few; `Bounded` would be slower there.
BY_DEVICE = {"link_of", "why_not", "bounce_buffers", "capture_question", "event_pool"}
#: The streams' handles without an owner, by device and priority: none may be let go of.
HANDLES = "free_handles: defaultdict["
#: Calls that make a cache without a limit, or a mapping that nothing empties.
REMEMBER = {"cache", "lru_cache", "dict", "defaultdict", "WeakKeyDictionary", "OrderedDict"}


def modules(folder: Path) -> list[Path]:
    """The Python files below a folder."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def counted(folder: str) -> list[Path]:
    """The modules below a folder, without those of the plugs if they have a folder in it."""
    apart = [ROOT / each for each in APART if each != folder]
    return [x for x in modules(ROOT / folder) if not any(map(x.is_relative_to, apart))]


def own(module: Path) -> str:
    """The package that a module belongs to: ``portakv.engines``, ``conformance.vendor``, ..."""
    return ".".join(module.relative_to(ROOT).parts[:-1][:2])


def imported(module: Path) -> Iterator[str]:
    """The modules of the library that a file imports, by their dotted names."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("portakv."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            base = node.module or ""
            if base != "portakv" and not base.startswith("portakv."):
                continue
            for alias in node.names:
                path = ROOT.joinpath(*base.split("."), alias.name)
                if path.with_suffix(".py").exists() or path.is_dir():
                    yield f"{base}.{alias.name}"
                else:
                    yield base


@pytest.mark.parametrize("folder", TREE)
def test_the_names_of_the_design_are_there(folder: str) -> None:
    for name in TREE[folder].split():
        found = [ROOT / folder / name, ROOT / folder / f"{name}.py"]
        assert any(path.exists() for path in found), name


@pytest.mark.parametrize("folder", PACKED)
def test_no_more_lines_are_packed(folder: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in counted(folder)]
    assert sum(text.count("# fmt: " + "skip") for text in texts) <= PACKED[folder]


def test_a_seam_is_a_public_name_that_a_test_replaces() -> None:
    """`support.seams` refuses to replace anything else."""
    tests = "".join(path.read_text(encoding="utf-8") for path in modules(ROOT / "tests"))
    for seam in seams.listed():
        name = seam.rpartition(".")[2]
        assert not re.match("_[^_]", name), seam
        assert re.search(rf'[".]{name}"[,:)]', tests), seam


@pytest.mark.parametrize("folder", PRIVATE_READS)
def test_tests_read_no_more_private_names(folder: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in counted(folder)]
    assert sum(len(PRIVATE.findall(text)) for text in texts) <= PRIVATE_READS[folder]


@pytest.mark.parametrize(("pattern", "most"), [(f"{PLUGS}/*.py", 300), ("docs/plugs/*.md", 80)])
def test_a_plug_and_its_page_are_short(pattern: str, most: int) -> None:
    """What a plug lacks goes into the library, and what it is for fits on a screen or two."""
    lines = {str(x): len(x.read_text(encoding="utf-8").splitlines()) for x in ROOT.glob(pattern)}
    assert {name: n for name, n in lines.items() if n > most} == {}


@pytest.mark.parametrize("folder", ["portakv", "conformance", "benchmarks", "examples", ".ci"])
def test_no_package_imports_a_private_module_of_another(folder: str) -> None:
    wrong = [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules(ROOT / folder)
        for name in imported(module)
        if any(part.startswith("_") and part != "__init__" for part in name.split("."))
        and ".".join(name.split(".")[:2]) != own(module)
    ]
    assert wrong == []


def test_no_module_imports_more_than_a_few_of_the_library() -> None:
    many = {}
    for module in modules(LIBRARY):
        found = set(imported(module))
        if module.name != "__init__.py" and len(found) > IMPORTS:
            many[str(module.relative_to(ROOT))] = len(found)
    assert many == {}


def test_no_module_imports_one_that_imports_it() -> None:
    """Nor by way of others, nor inside a function."""
    names = {".".join(x.relative_to(ROOT).with_suffix("").parts): x for x in modules(LIBRARY)}
    TopologicalSorter({name: {*imported(x)} & {*names} for name, x in names.items()}).prepare()


def test_only_bounded_remembers() -> None:
    """No module holds a cache or an empty mapping of its own: `runtime.bounded` has a limit."""
    wrong = [
        f"{module.relative_to(ROOT)}:{line}"
        for module in modules(LIBRARY)
        if module != LIBRARY / "runtime" / "bounded.py"
        for line in remembering(ast.parse(module.read_text(encoding="utf-8")))
    ]
    assert wrong == []


def remembering(tree: ast.Module) -> Iterator[int]:
    """The lines of a module's own empty mappings, and of caches without a limit."""
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.Dict) and not value.keys
        if isinstance(value, ast.Call) and called(value) in REMEMBER:
            empty = called(value) == "defaultdict" or not value.args  # its factory fills nothing
        if empty and HANDLES not in ast.unparse(node):
            yield node.lineno
    for inner in ast.walk(tree):
        if isinstance(inner, ast.FunctionDef) and inner.args.args:
            names = {called(mark) for mark in inner.decorator_list}
            if names & {"cache"} and inner.name not in BY_DEVICE:
                yield inner.lineno


def called(node: ast.expr) -> str:
    """The last name of a call or a decorator: ``cache`` of ``functools.cache``."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("vendor", ["ascend", "mlu", "hip"])
def test_a_vendor_s_backend_is_one_class_in_its_file(vendor: str) -> None:
    text = (LIBRARY / "backends" / f"{vendor}.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert vendor.capitalize() in {node.name for node in classes}


@pytest.mark.parametrize(
    "module", modules(LIBRARY / "backends"), ids=lambda module: str(module.name)
)
def test_a_backend_knows_plans_and_launches_alone(module: Path) -> None:
    known = {"plan", "view", "errors", "backends", "runtime"}
    assert {name.split(".")[1] for name in imported(module)} <= known
