# SPDX-License-Identifier: Apache-2.0
"""A vendor's package: imported when it is asked for, and each reason why it cannot be used told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch


class Unusable(Exception):
    """Why a vendor's package cannot be used, as a sentence without its full stop."""


def imported(package: str, install: str) -> Any:
    """The module ``package``; ``install`` is what a user has to install for it, in words.

    Raises:
        Unusable: it is not installed, or its import failed in whatever way.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        what = package if error.name == package else f"{error.name}, which {package} needs,"
        raise Unusable(f"{what} is not installed; install {install}") from error
    except Exception as error:  # such as OSError where a library of the vendor's is missing
        why = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        raise Unusable(
            f"{package} is installed, but its import failed ({why}); install {install}, in the "
            f"release for torch {torch.__version__} and for this machine's driver"
        ) from error


def version_of(module: Any) -> str:
    """The version that a module says it has."""
    return str(getattr(module, "__version__", "of unknown version"))


def parameters(found: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters; empty where it does not tell them."""
    try:
        return tuple(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return ()


def written(name: str, names: Sequence[str]) -> str:
    """A signature for a reader: ``name(a, b)``."""
    return f"{name}({', '.join(names) or '...'})"
