# SPDX-License-Identifier: Apache-2.0
"""The places of files, and the imports that the modules of each package may have.

The order of the packages is import-linter's contract (pyproject.toml); here are the limits that it
cannot say.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple, TypeGuard

import pytest
from support import patch_points
from support.house import modules
from support.running import full_cases

pytestmark = pytest.mark.xdist_group("tree")  # one process reads the files
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "portakv"
TREE = {
    "portakv": "cli storage migrate connector graph copy interconnect registry backends plan host "
    "view tasks runtime layout core",
    "portakv/backends": "base reference compiled triton cuda hip ascend mlu",
    "portakv/integrations": "lmcache vllm sglang transformers kvcacheio",
    "portakv/migrate": "transports",
    "portakv/host": "pinned pool shared memcpy small",
    "native": "core cuda host ascend",
    "native/ascend": "emulation",
    "conformance": "judge draw run evidence report cases mutants simdev vendor results",
    "benchmarks": "device host migration plugs shared storage bars.toml results",
    ".": "examples docs tests build_backend pyproject.toml constraints.txt README.md .ci/run "
    ".ci/full",
}
#: A private name of another object than a test's own or torch's, and how many; none may be added.
PRIVATE = re.compile(
    r"\b(?!self\b|cls\b|torch\b|_C\b|os\b|utils\._python_dispatch\b)"
    r"\w+\._(?!_|replace\b|asdict\b)\w+"
)
PRIVATE_READS = 152
CODE = ["portakv", "conformance", "benchmarks", "examples", "tests"]
#: Keeps a table of data in columns; how many there are, and none may be added for anything else.
SKIP = "# fmt: " + "skip"
SKIPS = 103
#: Functions that remember by device, of which a process has a few; `Bounded` would be slower there.
BY_DEVICE = {
    "link_of",
    "inline_copy",
    "why_not",
    "bounce_buffers",
    "capture_question",
    "event_pool",
}
#: Layouts of strings: their package and `runtime` import nothing of each other.
UNNAMED = {"_parse"}
#: The streams' handles without an owner, by device and priority: none may be released.
HANDLES = "free_handles: defaultdict["
#: Calls that make a cache without a limit, or a mapping that nothing empties.
REMEMBER = {"cache", "lru_cache", "dict", "defaultdict", "WeakKeyDictionary", "OrderedDict"}


def own(module: Path) -> str:
    """Return the package that a module belongs to, for example `portakv.interconnect`."""
    return ".".join(module.relative_to(ROOT).parts[:-1][:2])


class Facts(NamedTuple):
    """What the tests ask about a file, which is parsed once.

    Attributes:
        packed: the lines of statements that are not plain.
        imports: the modules of the library that it imports, by their dotted names.
        remembering: the lines of caches that are no `Bounded`.
    """

    packed: list[int]
    imports: list[str]
    remembering: list[int]


@cache
def facts(module: Path) -> Facts:
    """Return the facts of a file."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)]
    return Facts(
        packed=[
            node.lineno
            for node in nodes
            if isinstance(node, ast.Assign | ast.BinOp)
            and (is_packed(node) or is_text_times_condition(node))
        ],
        imports=[name for node in nodes for name in imported(node)],
        remembering=[*remembering(tree.body, nodes)],
    )


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the library that a statement imports, by their dotted names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("portakv."))
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from imported_from(node)


def imported_from(node: ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of the library that a statement ``from ... import ...`` names."""
    base = node.module or ""
    if base != "portakv" and not base.startswith("portakv."):
        return
    for alias in node.names:
        path = ROOT.joinpath(*base.split("."), alias.name)
        is_module = path.with_suffix(".py").exists() or path.is_dir()
        yield f"{base}.{alias.name}" if is_module else base


@pytest.mark.parametrize("folder", TREE)
def test_the_names_of_the_design_are_there(folder: str) -> None:
    for name in TREE[folder].split():
        candidates = [ROOT / folder / name, ROOT / folder / f"{name}.py"]
        assert any(path.exists() for path in candidates), name


@pytest.mark.parametrize("folder", CODE)
def test_the_code_is_plain(folder: str) -> None:
    """No statement packs several assignments, and no condition multiplies a text."""
    wrong = [
        f"{module.relative_to(ROOT)}:{line}"
        for module in modules(ROOT / folder)
        for line in facts(module).packed
    ]
    assert wrong == [], "write one assignment a line, and `if` round a text"


def is_packed(node: ast.AST) -> TypeGuard[ast.Assign]:
    """Tell whether a statement assigns a tuple of values to a tuple of targets."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def is_text_times_condition(node: ast.AST) -> TypeGuard[ast.BinOp]:
    """Tell whether an expression multiplies a text of words by a number that is 0 or 1."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    for text, factor in ((node.left, node.right), (node.right, node.left)):
        words = isinstance(text, ast.JoinedStr) or (
            isinstance(text, ast.Constant)
            and isinstance(text.value, str)
            and any(map(str.isalpha, text.value))
        )
        if words and not isinstance(factor, ast.Constant):
            return True
    return False


def test_only_tables_of_data_skip_the_formatter() -> None:
    texts = [path.read_text(encoding="utf-8") for x in CODE for path in modules(ROOT / x)]
    assert sum(text.count(SKIP) for text in texts) <= SKIPS


def test_a_patch_point_is_a_public_name_that_a_test_replaces() -> None:
    """`support.patch_points` refuses to replace anything else."""
    tests = "".join(path.read_text(encoding="utf-8") for path in modules(ROOT / "tests"))
    replaced = {*re.findall(r'[".](\w+)"[,:)]', tests)}
    for point in patch_points.listed():
        name = point.rpartition(".")[2]
        assert not re.match("_[^_]", name), point
        assert name in replaced, point


def test_each_case_that_is_listed_for_the_full_run_is_there() -> None:
    """A name of `tests/full_cases.toml` that no test has would leave nothing out."""
    tests = {place_of(name) for names in full_cases().values() for name in names}
    gone = [
        f"{path}::{function}"
        for path, function in sorted(tests)
        if not (ROOT / path).exists() or f"def {function}(" not in (ROOT / path).read_text("utf-8")
    ]
    assert gone == [], "take them from the list, or write their new names"


def place_of(name: str) -> tuple[str, str]:
    """Return the file and the function of a test with parameters."""
    path, _, test = name.partition("[")[0].partition("::")
    return path, test.rpartition("::")[2]


def test_tests_read_no_more_private_names() -> None:
    texts = [path.read_text(encoding="utf-8") for path in modules(ROOT / "tests")]
    assert sum(len(PRIVATE.findall(text)) for text in texts) <= PRIVATE_READS


@pytest.mark.parametrize("folder", ["portakv", "conformance", "benchmarks", "examples", ".ci"])
def test_no_package_imports_a_private_module_of_another(folder: str) -> None:
    wrong = [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules(ROOT / folder)
        for name in facts(module).imports
        if any(part.startswith("_") and part != "__init__" for part in name.split("."))
        and ".".join(name.split(".")[:2]) != own(module)
    ]
    assert wrong == []


def test_no_module_imports_one_that_imports_it() -> None:
    """Nor by way of others, nor inside a function."""
    names = {".".join(x.relative_to(ROOT).with_suffix("").parts): x for x in modules(LIBRARY)}
    TopologicalSorter({name: {*facts(x).imports} & {*names} for name, x in names.items()}).prepare()


def test_only_bounded_remembers() -> None:
    """No module has its own cache or empty mapping: `runtime.bounded` has a limit."""
    wrong = [
        f"{module.relative_to(ROOT)}:{line}"
        for module in modules(LIBRARY)
        if module != LIBRARY / "runtime" / "bounded.py"
        for line in facts(module).remembering
    ]
    assert wrong == []


@pytest.mark.parametrize("mark", ["cache", "lru_cache", "lru_cache(8)", "functools.lru_cache(8)"])
def test_a_cache_without_a_name_is_found(mark: str) -> None:
    named = "def known(): ...\n@cache\ndef single(): ...\n"
    tree = ast.parse(f"{named}@{mark}\ndef by_key(key): ...\n")
    assert [*remembering(tree.body, tree.body)] == [5]


def remembering(body: list[ast.stmt], nodes: Iterable[ast.AST]) -> Iterator[int]:
    """Yield the lines of a module's own empty mappings, and of caches that are no `Bounded`.

    Args:
        body: the statements of the module itself.
        nodes: all its nodes.
    """
    for node in body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.Dict) and not value.keys
        if isinstance(value, ast.Call) and called(value) in REMEMBER:
            empty = called(value) == "defaultdict" or not value.args  # its factory fills nothing
        if empty and HANDLES not in ast.unparse(node):
            yield node.lineno
    yield from unlimited_caches(nodes)


def unlimited_caches(nodes: Iterable[ast.AST]) -> Iterator[int]:
    """Yield the lines of functions with a cache that has no limit, or no name."""
    for inner in nodes:
        if isinstance(inner, ast.FunctionDef) and inner.args.args:
            names = {called(mark) for mark in inner.decorator_list}
            if names & {"cache", "lru_cache"} and inner.name not in BY_DEVICE | UNNAMED:
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
    known = {"core", "plan", "view", "errors", "backends", "runtime", "selection"}
    # The geometry of packed slots is integers, and no layout.
    names = set(facts(module).imports) - {"portakv.layout.packing"}
    assert {name.split(".")[1] for name in names} <= known
