# SPDX-License-Identifier: Apache-2.0
"""Hash a backend's source. A result is valid for this hash, and expires when it changes.

For a third party's backend every file of its package counts. For a backend of PortaKV, or of
``portakv_conformance.vendor``, these files count:

- its own file, and the files that it imports from these two packages (never ``base``);
- the drivers and compilers that it imports from ``portakv.runtime``, and from ``portakv_native``;
- the launches of kernels that it imports from ``portakv.core``, with their sources in ``native``;
- the files next to these that they name.

So a new comment elsewhere in the library does not expire every result. The same rules hash an
emulation, so a support level expires with its emulation too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from contextlib import suppress
from pathlib import Path

#: A regular expression for a written hash.
SHA256 = "[0-9a-f]{64}"
_OURS = "portakv.backends"
_VENDOR = "portakv_conformance.vendor"
_NATIVE = "portakv_native"
# Drivers and compilers. The other modules of `portakv.runtime` serve every backend alike.
_RUNTIME = "portakv.runtime"
_DRIVERS = ("cuda", "devices", "hip", "kernel_cache")
#: What packs and launches kernels. The rest of the core serves every backend alike.
_LAUNCHES = "portakv.core.rows"
_COUNTED = (f"{_OURS}.", f"{_VENDOR}.", f"{_NATIVE}.")
_SUFFIXES = frozenset((".py", ".pyi", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".toml"))


class SourceError(Exception):
    """Report that a backend's source is missing; the text names the module."""


def source_sha256(target: str) -> str:
    """Return the hash of the source of ``module:Class``: each file's name and bytes, by name.

    `SourceError`: the module has no source file here.
    """
    hashed = hashlib.sha256()
    for name, file in sorted(source_files(target.partition(":")[0]).items()):
        inside = hashlib.sha256(file.read_bytes()).hexdigest()
        hashed.update(f"{name} {inside}\n".encode())
    return hashed.hexdigest()


def source_files(module: str) -> dict[str, Path]:
    """Return the files that count for a backend's module, by names that no machine changes."""
    path = _file_of(module)
    top = module.partition(".")[0]
    if module.startswith((f"{_OURS}.", f"{_VENDOR}.")):
        return _ours(module, path, {})
    if not top.startswith("portakv") and "." in module:
        path = _file_of(top)
    elif path.name != "__init__.py":
        return {path.name: path}
    return _files_in(path.parent)


def _ours(module: str, path: Path, files: dict[str, Path]) -> dict[str, Path]:
    """Add the file of a module of ``portakv.backends``, and those that it uses, to ``files``."""
    files[f"{module}.py"] = path
    package = module.rpartition(".")[0]
    imported, texts = named_in(path, package)

    # Files in other languages, such as `hip_fake.cpp`.
    for file in path.parent.iterdir():
        if file.name in texts and file.suffix in _SUFFIXES - {".py"} and file.is_file():
            files[f"{package}/{file.name}"] = file

    drivers = {f"{_RUNTIME}.{driver}" for driver in _DRIVERS}
    for name in imported.union(*map(_named_by, texts)):
        if name.startswith(f"{_NATIVE}."):
            native = _files_in(_file_of(name).parent)
            files |= {f"{name}/{inner}": file for inner, file in native.items()}
        elif name == _LAUNCHES:
            core = _file_of(_NATIVE).parent / "core"
            files[f"{name}.py"] = _file_of(name)
            files |= {f"{_NATIVE}.core/{x}": core / x for x in ("rows.cpp", "rows.h")}
        elif not (name.startswith(_COUNTED) or name in drivers):
            continue
        elif name != f"{_OURS}.base" and f"{name}.py" not in files:
            with suppress(SourceError):  # the name of a function, not of a module
                _ours(name, _file_of(name), files)
    return files


def named_in(path: Path, package: str) -> tuple[set[str], set[str]]:
    """Return the modules and names that a file imports, and its text constants."""
    imported: set[str] = set()
    texts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level < 2:
            parts = (package * node.level, node.module or "")
            origin = ".".join(part for part in parts if part)
            imported |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return imported, texts


def _named_by(text: str) -> set[str]:
    """Return the module that a text names, by its name or by its file (``cuda/rows.cuh``)."""
    folder, _, file = text.rpartition("/")
    if folder.isidentifier() and Path(file).suffix in _SUFFIXES:
        native = _file_of(_NATIVE).parent
        return {f"{_NATIVE}.{folder}"} if (native / folder / file).is_file() else set()
    return {text} if text.replace(".", "").isidentifier() else set()


def _files_in(folder: Path) -> dict[str, Path]:
    return {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix in _SUFFIXES and "__pycache__" not in file.parts and file.is_file()
    }


def _file_of(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise SourceError(f"module {module!r} cannot be found ({error})") from error
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise SourceError(f"module {module!r} has no source file here")
    return Path(spec.origin)
