# SPDX-License-Identifier: Apache-2.0
"""Mutants: seeded-bug backends, each small and realistic, that the suite has to catch.

Every mutant is a correct kernel (`host_rows`, on the simulated device `device_rows`) with one step
of it replaced; its docstring is its bug. A mutant that survives is a bug of the suite.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType

from portakv_conformance.mutants import (
    addressing,
    claims,
    indices,
    layouts,
    merging,
    ordering,
    paths,
    state,
    vectors,
)
from portakv_conformance.mutants.base import HostRows
from portakv_conformance.mutants.device_rows import DeviceRows

__all__ = ["CONTROLS", "MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """A seeded bug.

    Attributes:
        name: of the backend.
        target: ``module:Class``, what `portakv conform` is given.
        bug: what is wrong with it, a sentence.
        device: where it is judged, ``cpu`` or ``simdev``.
        profile: the least profile that has to catch it.
    """

    name: str
    target: str
    bug: str
    device: str
    profile: str


def _mutant(found: type[HostRows]) -> Mutant:
    bug = " ".join((inspect.getdoc(found) or "").split())
    target = f"{found.__module__}:{found.__name__}"
    return Mutant(found.name, target, bug, found.device_type, found.profile)


def _mutants_of(module: ModuleType) -> list[Mutant]:
    """The classes that a module defines, in their order; an underscore marks a base."""
    return [
        _mutant(found)
        for name, found in vars(module).items()
        if inspect.isclass(found) and found.__module__ == module.__name__ and name[0] != "_"
        if issubclass(found, HostRows)
    ]


_MODULES = (addressing, paths, vectors, indices, layouts, merging, state, claims, ordering)

#: Every mutant, those of one idea together.
MUTANTS: tuple[Mutant, ...] = tuple(one for module in _MODULES for one in _mutants_of(module))
#: The un-mutated bases: the suite has to pass them.
CONTROLS: tuple[Mutant, ...] = (_mutant(HostRows), _mutant(DeviceRows))
