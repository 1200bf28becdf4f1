# SPDX-License-Identifier: Apache-2.0
"""Mutants: seeded-bug backends that the suite has to catch. Each is a correct kernel (`HostRows`,
on the simulated device `DeviceRows`) with one step replaced; its docstring is its bug."""

from __future__ import annotations

import inspect
from importlib import import_module

from portakv_conformance.mutants.base import DeviceRows, HostRows
from portakv_conformance.mutants.base_pack import PackRows

__all__ = ["CONTROLS", "MUTANTS", "Mutant"]

Mutant = type[HostRows]

_IDEAS = (
    "addressing",
    "paths",
    "vectors",
    "indices",
    "layouts",
    "state",
    "claims",
    "ordering",
    "packing",
)
#: Every mutant, those of one idea together; an underscore marks a base.
MUTANTS: tuple[Mutant, ...] = tuple(
    value
    for idea in _IDEAS
    for module in [import_module(f"{__name__}.{idea}")]
    for name, value in vars(module).items()
    if name[0] != "_" and getattr(value, "__module__", "") == module.__name__
    if inspect.isclass(value) and issubclass(value, HostRows)
)
#: The un-mutated bases: the suite has to pass them.
CONTROLS: tuple[Mutant, ...] = (HostRows, DeviceRows, PackRows)
