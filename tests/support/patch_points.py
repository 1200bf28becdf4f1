# SPDX-License-Identifier: Apache-2.0
"""Refuse patches of the project that `tests/patch_points.toml` does not list."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The module of the simulated device takes the place of `torch.cuda`, so tests may patch all of it.
SIMULATED_DEVICE = "portakv_conformance.simdev.device_module."
LIST = Path(__file__).resolve().parents[1] / "patch_points.toml"


def listed() -> set[str]:
    """Return the dotted names of all patch points."""
    reasons = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return {
        f"{owner}.{name}"
        for owners in reasons.values()
        for owner, names in owners.items()
        for name in names.split()
    }


def guard() -> None:
    """Make `monkeypatch.setattr` fail for every name of the project that is not a patch point."""
    allowed = listed()
    real = pytest.MonkeyPatch.setattr

    def checked(self: pytest.MonkeyPatch, target: Any, *arguments: Any, **options: Any) -> None:
        __tracebackhide__ = True
        name = target if isinstance(target, str) else f"{_dotted(target)}.{arguments[0]}"
        own = name.startswith("portakv") and not name.startswith(SIMULATED_DEVICE)
        if own and name not in allowed:
            pytest.fail(
                f"Expected a patch point that tests/patch_points.toml lists, got {name}. Use an "
                "argument, an environment variable or a fixture, or list it with its reason."
            )
        real(self, target, *arguments, **options)

    pytest.MonkeyPatch.setattr = checked  # type: ignore[method-assign]


def _dotted(target: Any) -> str:
    """Return the name of a module or a class, or that of an object's class."""
    if isinstance(target, ModuleType):
        return target.__name__
    kind = target if isinstance(target, type) else type(target)
    return f"{kind.__module__}.{kind.__qualname__}"
