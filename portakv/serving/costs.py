# SPDX-License-Identifier: Apache-2.0
"""What the hooks of an engine cost its steps."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import accumulate
from typing import Concatenate, ParamSpec, Protocol, TypeVar

#: Seconds that the hooks of both sides may take together in a step without work.
LIMIT = 2e-4
#: The upper ends of the seconds by which idle steps are counted, for an estimate of their median.
BOUNDS = (5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 7.5e-5, 1e-4, 1.5e-4, 2e-4, 5e-4, 1e-3, 1e-2)


class Costs:
    """The time that hooks take, by step and by hook.

    Args:
        side: whose hooks they are, the scheduler's or a worker's.
        now: returns the time in seconds.

    Attributes:
        spent: the seconds of each hook in the step that runs.
    """

    def __init__(self, side: str = "", now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._side = side
        self.spent = defaultdict[str, float](float)
        self._steps = 0
        self._busy_seconds = defaultdict[str, float](float)  # in steps with work
        self._idle_steps = 0
        self._idle_seconds = defaultdict[str, float](float)
        self._within = [0] * (len(BOUNDS) + 1)  # idle steps by `BOUNDS`, and longer ones

    def step(self, idle: bool) -> None:
        """End a step. ``idle``: there was nothing to load, save, stop or report in it."""
        self._steps += 1
        _add(self._idle_seconds if idle else self._busy_seconds, self.spent)
        if idle:
            self._idle_steps += 1
            self._within[bisect_left(BOUNDS, sum(self.spent.values()))] += 1
        self.spent.clear()

    def statistics(self) -> dict[str, float]:
        """Return counts of steps and the seconds of each hook: in all steps, and in idle ones.

        A name has the side after a slash, and then the hook, or the most seconds of the steps.
        """
        side = self._side
        counts = {f"steps/{side}": self._steps, f"idle_steps/{side}": self._idle_steps}
        total = self._busy_seconds.copy()
        _add(total, self._idle_seconds)
        seconds = {f"hook_seconds/{side}/{hook}": x for hook, x in total.items()}
        within = dict[str, int]()
        for bound, many in zip(BOUNDS, accumulate(self._within), strict=False):
            if many:
                within[f"idle_steps_within/{side}/{bound:g}"] = many
        idle = {f"idle_hook_seconds/{side}/{hook}": x for hook, x in self._idle_seconds.items()}
        return {**counts, **within, **seconds, **idle}


def _add(totals: defaultdict[str, float], step: Mapping[str, float]) -> None:
    """Add the seconds of a step to those of all steps."""
    for hook, seconds in step.items():
        totals[hook] += seconds


class HasCosts(Protocol):
    """An object whose hooks are measured."""

    costs: Costs


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=HasCosts)


def measured(
    hook: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Return a method that adds its time to the costs of its object, under its name."""
    name = hook.__name__

    @wraps(hook)
    def call(self: S, /, *args: P.args, **terms: P.kwargs) -> R:
        costs = self.costs
        now = costs.now
        began = now()
        try:
            return hook(self, *args, **terms)
        finally:
            costs.spent[name] += now() - began

    return call
