# SPDX-License-Identifier: Apache-2.0
"""Mutants: seeded-bug backends, each small and realistic, that the suite has to catch.

Every mutant is a correct kernel (`HostRows`, on the simulated device `DeviceRows`) with one step
of it replaced; its docstring is its bug. A mutant that survives is a bug of the suite.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module

from portakv_conformance.mutants.base import DeviceRows, HostRows

__all__ = ["CONTROLS", "MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A seeded bug, ``bug`` as a sentence."""

    name: str  # of the backend
    target: str  # ``module:Class``, what `portakv conform` is given
    bug: str
    device: str  # where it is judged, ``cpu`` or ``simdev``
    profile: str  # the least that has to catch it


def _mutant(found: type[HostRows]) -> Mutant:
    bug = " ".join((inspect.getdoc(found) or "").split())
    target = f"{found.__module__}:{found.__name__}"
    return Mutant(found.name, target, bug, found.device_type, found.profile)


_IDEAS = ("addressing", "paths", "vectors", "indices", "layouts", "state", "claims", "ordering")
#: Every mutant, those of one idea together; an underscore marks a base.
MUTANTS: tuple[Mutant, ...] = tuple(
    _mutant(found)
    for idea in _IDEAS
    for module in [import_module(f"{__name__}.{idea}")]
    for name, found in vars(module).items()
    if name[0] != "_" and getattr(found, "__module__", "") == module.__name__
    if inspect.isclass(found) and issubclass(found, HostRows)
)
#: The un-mutated bases: the suite has to pass them.
CONTROLS: tuple[Mutant, ...] = (_mutant(HostRows), _mutant(DeviceRows))
