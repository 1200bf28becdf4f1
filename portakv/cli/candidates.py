# SPDX-License-Identifier: Apache-2.0
"""The registry's candidates for one device, and for one plan, with each one's answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from portakv.backends.base import Decision
from portakv.cli.console import Column, print_table
from portakv.errors import BackendUnavailable
from portakv.plan.plan import CopyPlan
from portakv.registry.registry import ENVIRONMENT, REGISTRY, Choice, choose, trace


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend and its answer; at most one is ``chosen``."""

    name: str
    accepted: bool
    chosen: bool
    reason: str

    @property
    def verdict(self) -> str:
        """The answer in one word."""
        if self.chosen:
            return "chosen"
        return "accepted" if self.accepted else "rejected"


def forced_backend() -> str | None:
    """What the environment forces, or None."""
    return os.environ.get(ENVIRONMENT) or None


def candidates_for(device: torch.device | str) -> list[Candidate]:
    """Every candidate's answer for a device. The chosen one has passed its self-check.

    Of the name of one that torch cannot use here too: each says what it lacks.
    """
    chosen = None
    with suppress(BackendUnavailable):  # which the answers explain
        chosen = choose(device).name
    decisions = [*trace(device)]
    forced = forced_backend()
    if forced is not None and forced not in REGISTRY.names():
        decisions.insert(0, REGISTRY.unknown(forced))
    # An entry point that was refused shares its name with a backend: accepted tells them apart.
    return [
        Candidate(d.name, d.accepted, d.accepted and d.name == chosen, d.reason) for d in decisions
    ]


def candidates_for_plan(plan: CopyPlan, taken: Choice) -> list[Candidate]:
    """Every candidate's answer for a plan that ``taken`` carries out."""
    device = taken.backend.device
    answers = {decision.name: decision for decision in taken.trace}
    found = []
    for candidate in candidates_for(device):
        known = answers.get(candidate.name)
        if not candidate.accepted:
            found.append(replace(candidate, chosen=False))
        elif candidate.name == taken.name:
            reason = f"{candidate.reason}; {taken.trace[-1].reason}"
            found.append(replace(candidate, chosen=True, reason=reason))
        elif known is not None:
            found.append(Candidate(known.name, False, False, known.reason))
        else:
            found.append(_passed_over(candidate, plan, taken))
    return found


def _passed_over(candidate: Candidate, plan: CopyPlan, taken: Choice) -> Candidate:
    """A candidate that was not asked about the plan, because another takes it."""
    backend, decision = REGISTRY.ask(candidate.name, taken.backend.device, check=False)
    if backend is not None:
        try:
            decision = backend.check(plan)
        except Exception as error:  # a third party's backend: explaining must go on
            why = f"its check failed: {type(error).__name__}: {error}"
            decision = Decision(candidate.name, False, why)
    if not decision.accepted:
        return Candidate(candidate.name, False, False, decision.reason)
    why = "was forced" if taken.forced else "is asked before it"
    reason = f"{candidate.reason}; takes the plan too, but {taken.name} {why}"
    return replace(candidate, chosen=False, reason=reason)


def print_candidates(
    candidates: Sequence[Candidate], title: str, verified: Mapping[str, str] | None = None
) -> None:
    """Print a table of candidates; ``verified``: how far each was, by name, as a column more."""
    columns = [Column("backend", whole=True), Column("answer", whole=True), Column("reason")]
    rows = [[c.name, c.verdict, c.reason] for c in candidates]
    if verified:
        columns.insert(2, Column("verified"))
        for row in rows:
            row.insert(2, verified.get(row[0], ""))
    print_table(columns, rows, title)


def as_json(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates as JSON: ``name, accepted, chosen, reason``."""
    return [asdict(candidate) for candidate in candidates]
