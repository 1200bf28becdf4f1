# SPDX-License-Identifier: Apache-2.0
"""Modules of PortaKV that are imported with a stand-in of an engine, in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def imported_with(folder: Path, engine: str, modules: Sequence[str]) -> Iterator[list[ModuleType]]:
    """Import modules with the stand-in of an engine in a folder, and forget all of them at the end.

    ``modules``: those that import the engine's package, in any way.
    """
    before = _taken(engine, modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield [importlib.import_module(module) for module in modules]
    finally:
        sys.path.remove(str(folder))
        _taken(engine, modules)
        sys.modules.update(before)


def _taken(engine: str, modules: Sequence[str]) -> dict[str, ModuleType]:
    """Take modules and those of an engine from those that are imported, and return them."""
    names = [name for name in sys.modules if name in modules or name.split(".")[0] == engine]
    return {name: sys.modules.pop(name) for name in names}
