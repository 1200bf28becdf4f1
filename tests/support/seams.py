# SPDX-License-Identifier: Apache-2.0
"""What tests may replace in the project: the seams that docs/design.md lists, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TORCHS = "portakv_conformance.simdev.device_module."  # the simulated device's, as `torch.cuda` is
DESIGN = Path(__file__).resolve().parents[2] / "docs" / "design.md"


def listed() -> set[str]:
    """The dotted names of all seams."""
    section = DESIGN.read_text(encoding="utf-8").partition("\n## Seams\n")[2].partition("\n## ")[0]
    rows = re.findall(r"`(portakv[\w.]*)`: ([\w ]+)", section)
    return {f"{owner}.{name}" for owner, names in rows for name in names.split()}


def guard() -> None:
    """From now on a test fails that replaces anything else of the project by `monkeypatch`."""
    allowed = listed()
    real = pytest.MonkeyPatch.setattr

    def checked(self: pytest.MonkeyPatch, target: Any, *given: Any, **options: Any) -> None:
        __tracebackhide__ = True
        name = target if isinstance(target, str) else f"{_dotted(target)}.{given[0]}"
        if name.startswith("portakv") and not name.startswith(TORCHS) and name not in allowed:
            pytest.fail(
                f"{name} was to be replaced; expected a seam that docs/design.md lists. Use an "
                f"argument, an environment variable or a fixture, or list it with its reason."
            )
        real(self, target, *given, **options)

    pytest.MonkeyPatch.setattr = checked  # type: ignore[method-assign]


def _dotted(target: Any) -> str:
    """The name of a module or a class, or that of an object's class."""
    if isinstance(target, ModuleType):
        return target.__name__
    kind = target if isinstance(target, type) else type(target)
    return f"{kind.__module__}.{kind.__qualname__}"
