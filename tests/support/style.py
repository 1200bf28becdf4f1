# SPDX-License-Identifier: Apache-2.0
"""Measure how plainly the code is written.

`test_tree.py` compares each finding with `style_exceptions.toml`. As a command this module prints a
table of every package, which limits nothing:

    python tests/support/style.py

With `--words PATH...` it lists the private words there, by file and line. With `--shrink` it lowers
and deletes the exceptions that the code no longer needs. It adds none.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = ROOT / "tests/style_exceptions.toml"
FOLDERS = ("portakv", "conformance", "benchmarks", "examples", "tests")
#: Files other than Python modules in which `--words` looks for private words.
SUFFIXES = (".md", ".toml", ".sh", ".h", ".cpp", ".html")

#: The largest measure that each rule allows without an exception.
LIMITS = {
    "packed assignments": 0,
    "text times a condition": 0,
    "lines of a function": 60,
    "cognitive complexity": 15,
    "parameters": 8,
    "attributes": 12,
    "lines of a file": 700,
    "imports of the library": 12,
    "skipped formatting": 0,
}

_SKIP = "# fmt: " + "skip"
#: A docstring that begins with one of these words names no action.
QUESTIONS = re.compile(
    r"(What|Whether|How|As|Of|Where|Which|Who|Whose|Why|When|If|For|From|By|In|On|At|To)\b"
)

#: Private words: standard English has another word for each, which `docs/decisions.md` lists.
WORDS = re.compile(
    r"(?<![a-z])(told|tells|said|heard|asked|behind|beside|nobody|of its own|let go|at once|mine"
    r"|theirs|movers?|shelf|shelves|spots?|legs?|flights|landings?|rungs?|ladders?|earned|bars"
    r"|greets?|welcome|seams?|plugs?|fleeting|lasting)(?![a-z])",
    re.IGNORECASE,
)
#: Words that name nothing when a variable is called so; in a sentence they are plain.
NAMES = re.compile(r"(?<![a-z])(found|given|held|kept|ways?|rooms?|homes?|house|walls?)(?![a-z])")
#: Names that stay: public ones, fields of records on disk, and the words of other projects.
STAYING = re.compile(
    # Environment variables, files, commands and deprecated names.
    r"PORTAKV_MOVER|PLUGS_ENVIRONMENTS|\.ci/(plugs|full plugs)|^plugs\)|or plugs \[|plugs_run"
    r"|--(plugs|bars|tells)|bars\.toml|[-/.]plugs\b|plugs/"
    r"|home_of_ids|\bTells\b|[\"`]movers?[\"`]|mover(:|=)"
    # Fields and kinds of recorded results.
    r"|blocks_asked|[\"'](asked|told|said|rung|plugs?|ladder|beside|Welcome)[\"']|\.rung\b|\brung[:=]"
    r"|plug_\w+|\w+_beside|zero_copy beside|``?(told|Welcome)``?"
    # Names of tests and of their cases; a decorator of hypothesis.
    r"|\btest_\w+(\[[^]]*\])?|(behind|beside)-padding|padding-beside|@given|import (\w+, )*given"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: Tuples, since a union that is written in a call is made again by each of a million calls.
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEEPER = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Match)
_FUNCTIONS_OF_ANY_KIND = (*_FUNCTIONS, ast.Lambda)
_WITH_ELSE = (ast.If, ast.For, ast.While)
_CHOICES = (ast.BoolOp, ast.IfExp)
#: Calls that make a method or a descriptor.
_DESCRIPTORS = {"cached_property", "classmethod", "partialmethod", "property", "staticmethod"}
#: Methods that set attributes when an object is made.
_STARTS = ("__init__", "__post_init__")
#: A constant of a class, or a name that Python itself reads.
_CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__\w+__")
#: Nodes without anything below them that counts.
_LEAVES = (ast.Name, ast.Constant, ast.expr_context, ast.operator, ast.Pass)


@dataclass(frozen=True)
class Finding:
    """One measure above its limit: the rule, `path:qualified.name`, and the measure."""

    rule: str
    where: str
    measure: int


def modules(folder: Path) -> list[Path]:
    """Return the Python files below a folder."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names of the library's modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("portakv."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from _imported_from(node)


def _imported_from(node: ast.ImportFrom) -> Iterator[str]:
    base = node.module or ""
    if base != "portakv" and not base.startswith("portakv."):
        return
    for alias in node.names:
        path = ROOT.joinpath(*base.split("."), alias.name)
        is_module = path.with_suffix(".py").exists() or path.is_dir()
        yield f"{base}.{alias.name}" if is_module else base


def is_packed(node: ast.AST) -> bool:
    """Tell whether a statement assigns a tuple of values to a tuple of targets."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def is_text_times_condition(node: ast.AST) -> bool:
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


def complexity(function: Function) -> int:
    """Return the cognitive complexity of a function.

    Each branch, loop and handler counts 1 and the depth it is nested at; `else`, `elif` and each
    chain of `and` or `or` count 1. See G. Ann Campbell, "Cognitive Complexity", 2017.
    """
    return sum(_complexity_of(statement, 0) for statement in function.body)


def _complexity_of(node: ast.AST, depth: int) -> int:
    own = 0
    inner = depth
    if isinstance(node, _LEAVES):
        return 0
    if isinstance(node, _DEEPER):
        own = 1 + depth
        inner = depth + 1
    elif isinstance(node, _FUNCTIONS_OF_ANY_KIND):
        inner = depth + 1
    elif isinstance(node, _CHOICES):
        own = 1
    elif isinstance(node, ast.ClassDef):
        return 0
    total = own
    for name, value in ast.iter_fields(node):
        children = [child for child in _listed(value) if isinstance(child, ast.AST)]
        if name == "orelse" and isinstance(node, _WITH_ELSE) and children:
            total += 1
            if len(children) == 1 and isinstance(children[0], ast.If):
                total += _complexity_of(children[0], depth) - 1 - depth
                continue
        total += sum(_complexity_of(child, inner) for child in children)
    return total


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class sets when an object is made, its fields and defaults."""
    return _set_at_start(node) | _fields(node) | _defaults(node)


def _set_at_start(node: ast.ClassDef) -> set[str]:
    starts = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name in _STARTS]
    return {
        inner.attr
        for start in starts
        for inner in ast.walk(start)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
        if isinstance(inner.value, ast.Name) and inner.value.id == "self"
    }


def _fields(node: ast.ClassDef) -> set[str]:
    """Return the fields of a dataclass or a `NamedTuple`, without those that it inherits."""
    if not _has_fields(node):
        return set()
    return {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if _named_last(each.annotation) not in ("ClassVar", "KW_ONLY")
    }


def _defaults(node: ast.ClassDef) -> set[str]:
    """Return the names that a dataclass assigns without an annotation: attributes with a default.

    Methods, descriptors and constants are not among them.
    """
    if not _has_fields(node):
        return set()
    methods = {each.name for each in node.body if isinstance(each, _FUNCTIONS)} | _DESCRIPTORS
    return {
        target.id
        for each in node.body
        if isinstance(each, ast.Assign) and _named_last(each.value) not in methods
        for target in each.targets
        if isinstance(target, ast.Name) and not _CONSTANT.fullmatch(target.id)
    }


def _has_fields(node: ast.ClassDef) -> bool:
    """Return True for a dataclass or a `NamedTuple`."""
    named = {_named_last(each) for each in (*node.decorator_list, *node.bases)}
    return bool(named & {"dataclass", "NamedTuple"})


def _named_last(node: ast.expr) -> str:
    """Return the last part of a dotted name, of what is called or of what has an index."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def parameters(function: Function) -> int:
    """Return the number of parameters, without `self`, `cls` and those that only a name passes."""
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    return len([name for name in names if name not in ("self", "cls")])


def _named(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield every node below a node, except for leaves, with the name of what it stands in."""
    left = [(prefix, node)]
    while left:
        around, above = left.pop()
        for child in ast.iter_child_nodes(above):
            if isinstance(child, _LEAVES):
                continue
            name = around
            if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                name = f"{around}.{child.name}".lstrip(".")
            yield name, child
            left.append((name, child))


def measures(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the rule, the qualified name and the measure of everything in a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    yield "lines of a file", "", len(text.splitlines())
    if path.name != "__init__.py" and path.is_relative_to(ROOT / "portakv"):
        yield "imports of the library", "", len(set(imported(tree)))
    counted: Counter[tuple[str, str]] = Counter()
    for name, node in _named(tree):
        if isinstance(node, _FUNCTIONS):
            yield "lines of a function", name, (node.end_lineno or 0) - node.lineno + 1
            yield "cognitive complexity", name, complexity(node)
            yield "parameters", name, parameters(node)
        elif isinstance(node, ast.ClassDef):
            yield "attributes", name, len(attributes(node))
        elif is_packed(node):
            counted["packed assignments", name] += 1
        elif is_text_times_condition(node):
            counted["text times a condition", name] += 1
    counted["skipped formatting", ""] = text.count(_SKIP)
    for (rule, name), measure in counted.items():
        yield rule, name, measure


def findings(folders: Iterable[str] = FOLDERS) -> list[Finding]:
    """Return what is above its limit in the given folders."""
    found = []
    for folder in folders:
        for path in modules(ROOT / folder):
            where = path.relative_to(ROOT).as_posix()
            for rule, name, measure in measures(path):
                if measure > LIMITS[rule]:
                    found.append(Finding(rule, f"{where}:{name}".rstrip(":"), measure))
    return found


@dataclass
class Size:
    """The figures of one package."""

    lines: int = 0
    comments: int = 0
    packed: int = 0
    any: int = 0
    docstrings: int = 0
    questions: int = 0
    longest: int = 0

    def add(self, path: Path) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        self.lines += len(text.splitlines())
        for token in tokenize.generate_tokens(StringIO(text).readline):
            self.comments += token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
        for node in ast.walk(ast.parse(text)):
            self.packed += is_packed(node)
            self.any += isinstance(node, ast.Name) and node.id == "Any"
            if isinstance(node, Function):
                self.longest = max(self.longest, (node.end_lineno or 0) - node.lineno + 1)
            if isinstance(node, Function | ast.ClassDef | ast.Module):
                docstring = ast.get_docstring(node)
                self.docstrings += bool(docstring)
                self.questions += bool(docstring and QUESTIONS.match(docstring))

    def share(self, count: int) -> float:
        """Return a count for each 1,000 lines."""
        return 1000 * count / max(self.lines, 1)


def sizes() -> dict[str, Size]:
    """Return the figures of each package of the library and of each other folder."""
    packages: dict[str, Size] = {}
    for folder in FOLDERS:
        for path in modules(ROOT / folder):
            parts = path.relative_to(ROOT).parts
            name = "/".join(parts[:2]) if folder == "portakv" and len(parts) > 2 else folder
            packages.setdefault(name, Size()).add(path)
    return packages


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the word of each private word in a text file."""
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        for match in WORDS.finditer(STAYING.sub("", line)):
            yield number, match[0]
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in STAYING.sub("", token.line):
                for match in NAMES.finditer(token.string):
                    yield token.start[0], match[0]


def texts(folder: Path) -> list[Path]:
    """Return the files below a folder that have words: no results, and all files of `.ci`."""
    others = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (path.suffix in SUFFIXES or (path.parent.name == ".ci" and not path.suffix))
        and not {"results", "__pycache__"} & set(path.parts)
    ]
    return [*modules(folder), *others]


def list_words(names: list[str]) -> None:
    """Print each private word below the named files and folders, and their number."""
    total = 0
    for name in names:
        top = ROOT / name
        files = [top] if top.is_file() else texts(top)
        for path in files:
            for number, word in words(path):
                total += 1
                print(f"{path.relative_to(ROOT)}:{number}: {word}")
    print(f"{total} words")


def shrink() -> None:
    """Lower each exception to what the code needs, and delete those that nothing needs."""
    measured = {(each.rule, each.where): each.measure for each in findings()}
    rule = ""
    kept = []
    for line in EXCEPTIONS.read_text(encoding="utf-8").splitlines():
        section = re.fullmatch(r'\["(.+)"\]', line)
        entry = re.fullmatch(r'"(.+)" = \[(\d+), (".*")\]', line)
        if section:
            rule = section[1]
        if entry:
            needed = measured.get((rule, entry[1]), 0)
            if not needed:
                continue
            line = f'"{entry[1]}" = [{min(needed, int(entry[2]))}, {entry[3]}]'
        kept.append(line)
    EXCEPTIONS.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table of the packages."""
    if sys.argv[1:] == ["--shrink"]:
        shrink()
        return
    if sys.argv[1:2] == ["--words"]:
        list_words(sys.argv[2:])
        return
    heads = ("package", "lines", "packed", "Any", "comments", "questions", "longest function")
    rows = [heads]
    for name, size in sizes().items():
        rows.append(
            (
                name,
                f"{size.lines:,}",
                f"{size.share(size.packed):.1f}",
                f"{size.share(size.any):.1f}",
                f"{size.share(size.comments) / 10:.1f} %",
                f"{100 * size.questions / max(size.docstrings, 1):.1f} %",
                str(size.longest),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    print(
        "packed, Any: for each 1,000 lines. comments: share of lines. questions: docstrings that "
        "begin with a question word or a preposition."
    )


if __name__ == "__main__":
    main()
