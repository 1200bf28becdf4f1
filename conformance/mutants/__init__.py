# SPDX-License-Identifier: Apache-2.0
"""Mutants: seeded-bug backends, each small and realistic, that the suite has to catch.

Every mutant is a correct kernel (`HostRows`, on the simulated device `DeviceRows`) with one step
of it replaced; its docstring is its bug. A mutant that survives is a bug of the suite.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from portakv_conformance.mutants import (
    addressing,
    claims,
    indices,
    layouts,
    ordering,
    paths,
    state,
    vectors,
)
from portakv_conformance.mutants.base import DeviceRows, HostRows

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


#: Every mutant, those of one idea together; an underscore marks a base.
MUTANTS: tuple[Mutant, ...] = tuple(
    _mutant(found)
    for module in (addressing, paths, vectors, indices, layouts, state, claims, ordering)
    for name, found in vars(module).items()
    if name[0] != "_" and getattr(found, "__module__", "") == module.__name__
    if inspect.isclass(found) and issubclass(found, HostRows)
)
#: The un-mutated bases: the suite has to pass them.
CONTROLS: tuple[Mutant, ...] = (_mutant(HostRows), _mutant(DeviceRows))
