# SPDX-License-Identifier: Apache-2.0
"""The costs of an engine's hooks, by a clock that a test sets."""

from __future__ import annotations

import pytest

from portakv.serving import Costs, measured


class Hooks:
    """An object with hooks, of which each takes a second."""

    def __init__(self) -> None:
        self.time = 0.0
        self.costs = Costs("worker", lambda: self.time)

    @measured
    def works(self, more: float = 0) -> float:
        self.time = round(self.time + 1 + more, 6)
        return self.time

    @measured
    def fails(self) -> None:
        self.time += 1
        raise ValueError("for a test")


def test_hooks_are_counted_by_step() -> None:
    hooks = Hooks()
    assert hooks.works() == 1
    hooks.costs.step(idle=True)
    assert hooks.works(more=2) == 4
    with pytest.raises(ValueError, match="for a test"):
        hooks.fails()
    hooks.costs.step(idle=False)
    assert hooks.costs.statistics() == {
        "steps/worker": 2,
        "hook_seconds/worker/works": 4,
        "hook_seconds/worker/fails": 1,
        "idle_steps/worker": 1,
        "idle_hook_seconds/worker/works": 1,
    }


def test_idle_steps_are_counted_by_their_time() -> None:
    """Each bound has the steps of all smaller ones, as Prometheus's histograms have."""
    hooks = Hooks()
    for seconds in (4e-5, 2e-5, 2e-4, 1.1e-2):
        hooks.works(more=seconds - 1)
        hooks.costs.step(idle=True)
    hooks.works(more=1e-5 - 1)
    hooks.costs.step(idle=False)
    within = {
        name.rpartition("/")[2]: many
        for name, many in hooks.costs.statistics().items()
        if name.startswith("idle_steps_within/worker/")
    }
    three = dict.fromkeys(("0.0002", "0.0005", "0.001", "0.01"), 3)
    two = dict.fromkeys(("5e-05", "7.5e-05", "0.0001", "0.00015"), 2)
    assert within == {"2e-05": 1, "3e-05": 1, **two, **three}
