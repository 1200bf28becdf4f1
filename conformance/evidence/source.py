# SPDX-License-Identifier: Apache-2.0
"""A hash of a backend's source: what a result holds for, and expires with.

Of a third party's backend every file of its package counts. Of a backend of PortaKV, or of one of
``portakv_conformance.vendor``, its own file counts, with what that imports of either (never the
interface in ``base``), of the drivers and compilers in ``portakv.runtime`` and of
``portakv_native``, and the files that those name and that lie beside them: a new comment elsewhere
in the library must not make every result stale. What emulates a device is hashed by the same rules,
so that a rung ends with its emulation too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path

#: A hash as it is written, as a regular expression.
SHA256 = "[0-9a-f]{64}"
_OURS = "portakv.backends"
_VENDOR = "portakv_conformance.vendor"
_NATIVE = "portakv_native"
# Drivers and compilers: what else lies in `portakv.runtime` serves every backend alike.
_RUNTIME = "portakv.runtime"
_DRIVERS = ("cuda", "devices", "hip", "kernel_cache", "nvrtc")  # fmt: skip
_COUNTED = (f"{_OURS}.", f"{_VENDOR}.", f"{_NATIVE}.")
_SUFFIXES = frozenset((".py", ".pyi", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".toml"))


class SourceError(Exception):
    """The source of a backend cannot be found; the text says what was looked for."""


def source_sha256(target: str) -> str:
    """The hash of the source of ``module:Class``: of each file's name and bytes, in name order.

    Raises:
        SourceError: the module has no source file here.
    """
    found = source_files(target.partition(":")[0])
    hashed = hashlib.sha256()
    for name in sorted(found):
        inside = hashlib.sha256(found[name].read_bytes()).hexdigest()
        hashed.update(f"{name} {inside}\n".encode())
    return hashed.hexdigest()


def source_files(module: str) -> dict[str, Path]:
    """The files that count for a backend's module, by a name that is the same on any machine."""
    path = _file_of(module)
    if module.startswith((f"{_OURS}.", f"{_VENDOR}.")):
        return _ours(module, path, {})
    if module.partition(".")[0].startswith("portakv") or "." not in module:
        if path.name != "__init__.py":
            return {path.name: path}
        folder = path.parent
    else:
        folder = _file_of(module.partition(".")[0]).parent
    return {file.relative_to(folder).as_posix(): file for file in _files_in(folder)}


def _ours(module: str, path: Path, found: dict[str, Path]) -> dict[str, Path]:
    """The file of a module of ``portakv.backends`` and those that it builds on, added to found."""
    found[f"{module}.py"] = path
    for file in _beside(path):
        found[f"{module.rpartition('.')[0]}/{file.name}"] = file
    for name in _named_in(path, module):
        if name.startswith(f"{_NATIVE}."):
            folder = _file_of(name).parent
            found |= {f"{name}/{f.relative_to(folder).as_posix()}": f for f in _files_in(folder)}
        elif name != f"{_OURS}.base" and f"{name}.py" not in found:
            try:
                inner = _file_of(name)
            except SourceError:
                continue  # the name of a function, which its module's file has
            _ours(name, inner, found)
    return found


def _named_in(path: Path, module: str) -> set[str]:
    """Modules of the backends, and native folders, that a file imports or names in a text."""
    package = module.rpartition(".")[0]
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package if node.level == 1 else "" if node.level == 0 else None
            if base is None:
                continue
            origin = ".".join(part for part in (base, node.module or "") if part)
            named |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named |= _named_by(node.value)
    drivers = {f"{_RUNTIME}.{driver}" for driver in _DRIVERS}
    return {name for name in named if name.startswith(_COUNTED) or name in drivers}


def _named_by(text: str) -> set[str]:
    """The module that a text names: by its name, or by a file of it (``cuda/rows.cuh``)."""
    folder, _, file = text.rpartition("/")
    if folder.isidentifier() and Path(file).suffix in _SUFFIXES:
        native = _file_of(_NATIVE).parent
        return {f"{_NATIVE}.{folder}"} if (native / folder / file).is_file() else set()
    return {text} if text.replace(".", "").isidentifier() else set()


def _beside(path: Path) -> list[Path]:
    """The files that are no Python, lie beside a module and are named in it: ``hip_fake.cpp``."""
    texts = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return [
        file
        for file in sorted(path.parent.iterdir())
        if file.name in texts and file.suffix in _SUFFIXES - {".py"} and file.is_file()
    ]


def _files_in(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in _SUFFIXES and "__pycache__" not in file.parts and file.is_file()
    ]


def _file_of(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise SourceError(f"module {module!r} cannot be found ({error})") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise SourceError(f"module {module!r} has no source file here")
    return Path(spec.origin)
