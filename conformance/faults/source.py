# SPDX-License-Identifier: Apache-2.0
"""Hash the source of a tier. A report of its faults expires when that changes.

Of a tier of PortaKV these files count: its own module, and those that it imports, in turn, from
the packages that decide what a store delivers (`COUNTED`). What carries bytes has support levels of
its own. Of another package's tier the file of its module counts; its versions are in the report.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import portakv
from portakv_conformance.evidence.source import named_in

#: The packages whose modules count.
COUNTED = ("portakv.storage", "portakv.serving", "portakv.integrations", "portakv.graph")
#: The modules of PortaKV's tiers that have a name.
NAMED = {"disk": "portakv.storage.tiers.disk", "remote": "portakv.storage.tiers.remote"}


def module_of(target: str) -> str:
    """Return the module of a tier; empty for a name of another package's tier."""
    module, _, name = target.partition(":")
    return module if name else NAMED.get(target, "")


def tier_sha256(target: str) -> str:
    """Return the hash of the source of a tier: each file's name and bytes, by name; empty if its
    module is not installed here, or has no source file."""
    module = module_of(target)
    files = counted(module) if module.startswith("portakv.") else _single(module)
    if not files:
        return ""
    hashed = hashlib.sha256()
    for name, file in sorted(files.items()):
        inside = hashlib.sha256(file.read_bytes()).hexdigest()
        hashed.update(f"{name} {inside}\n".encode())
    return hashed.hexdigest()


def counted(module: str) -> dict[str, Path]:
    """Return the files of a module of PortaKV and of those that it imports in turn, by name.

    A block store has all that a tier needs above it, so it counts as well.
    """
    files = dict[str, Path]()
    left = [module, "portakv.storage.store"]
    while left:
        name = left.pop()
        if name in files:
            continue
        path = _file_of(name)
        if path is None:  # the name of a function or a class
            continue
        files[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        left += _imported(path, package, path.stat().st_mtime_ns)
    return files


@cache
def _imported(path: Path, package: str, changed: int) -> list[str]:
    """Return the modules and names of counted packages that a file imports. ``changed``: when."""
    imported, _ = named_in(path, package)
    begins = tuple(f"{each}." for each in COUNTED)
    return [each for each in imported if f"{each}.".startswith(begins)]


def _single(module: str) -> dict[str, Path]:
    path = _file_of(module) if module else None
    return {} if path is None else {module: path}


def _file_of(module: str) -> Path | None:
    """Return the source file of a module, whose own code does not run; None if it has none."""
    first, *rest = module.split(".")
    if first == "portakv":
        path = Path(portakv.__file__).parent.joinpath(*rest)
        return next(
            (x for x in (path.with_suffix(".py"), path / "__init__.py") if x.is_file()), None
        )
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # the package above it is imported, and may raise anything
        return None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    return Path(spec.origin)
