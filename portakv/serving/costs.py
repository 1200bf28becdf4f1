# SPDX-License-Identifier: Apache-2.0
"""What the hooks of an engine cost its steps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

#: The idle steps that a median is of.
LATEST = 512


class Costs:
    """The time that hooks take, by step.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._step = 0.0  # seconds of hooks since the last step
        self._steps = 0
        self._seconds = 0.0
        self._idle_steps = 0
        self._idle_seconds = 0.0
        self._latest = deque[float](maxlen=LATEST)  # idle steps

    def add(self, seconds: float) -> None:
        """Add the time of a call to the step that runs."""
        self._step += seconds

    def step(self, idle: bool) -> None:
        """End a step. ``idle``: there was nothing to load, save, stop or report in it."""
        self._steps += 1
        self._seconds += self._step
        if idle:
            self._idle_steps += 1
            self._idle_seconds += self._step
            self._latest.append(self._step)
        self._step = 0.0

    def median(self) -> float:
        """Return the median of the seconds of the latest idle steps; 0.0 if there were none."""
        return statistics.median(self._latest) if self._latest else 0.0

    def statistics(self) -> dict[str, float]:
        """Return counts of steps and the seconds of their hooks: of all, and of idle steps."""
        return {
            "steps": self._steps,
            "hook_seconds": self._seconds,
            "idle_steps": self._idle_steps,
            "idle_hook_seconds": self._idle_seconds,
        }


class HasCosts(Protocol):
    """An object whose hooks are measured."""

    costs: Costs


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=HasCosts)


def measured(
    hook: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Return a method that adds its time to the costs of its object."""

    @wraps(hook)
    def call(self: S, /, *args: P.args, **terms: P.kwargs) -> R:
        costs = self.costs
        began = costs.now()
        try:
            return hook(self, *args, **terms)
        finally:
            costs.add(costs.now() - began)

    return call
