# SPDX-License-Identifier: Apache-2.0
"""The build of the compiled core, for tests: its module, its command, and trees to run it in."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "native" / "core"
SCRIPT = Path("build_backend/compile_core.py")
#: A declaration of `core.h`, up to the function's name.
DECLARED = re.compile(r"^PORTAKV_API [^;(]*?(\w+)\(", re.MULTILINE)


def loaded() -> Any:
    """Return the module `compile_core`, which no installation puts on the path."""
    spec = importlib.util.spec_from_file_location("compile_core", ROOT / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_of_the_build(folder: Path) -> Path:
    """Return a tree with what a build of the core reads."""
    shutil.copytree(ROOT / "build_backend", folder / "build_backend")
    shutil.copytree(SOURCES, folder / "native" / "core")
    (folder / "src/portakv/core").mkdir(parents=True)
    shutil.copy(ROOT / "portakv/core/sources.py", folder / "src/portakv/core")
    return folder


def declared() -> set[str]:
    """Return the names of the functions that `core.h` and the headers of subjects declare."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.h")]
    return {name for text in texts for name in DECLARED.findall(text)}
