# SPDX-License-Identifier: Apache-2.0
"""The figures of channels and weights for `portakv.graph.meter`, by the names of the metrics."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import TypeVar

from portakv.graph.trace import Figures as Figures
from portakv.graph.trace import Spent
from portakv.runtime import tracing
from portakv.runtime.tracing import Began
from portakv.tasks import runtime

T = TypeVar("T")


def histograms(name: str, spent: Mapping[str, Spent]) -> Figures:
    """Return the seconds of work by its result, for a histogram."""
    figures: Figures = {}
    for result, seconds in [*spent.items()]:
        for series, samples in seconds.samples(name, {"result": result}).items():
            figures.setdefault(series, []).extend(samples)
    return figures


class WeightCounts:
    """What pulls of weights have brought to this process."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._spent = {"done": Spent(), "failed": Spent()}

    async def pull(self, began: Began, work: Callable[[T], Awaitable[int]], request: T) -> int:
        """Return the bytes of a pull, which a coroutine makes, and count it."""
        start = perf_counter()
        nbytes = 0
        result = "failed"
        try:
            nbytes = await work(request)
            result = "done"
        finally:
            self._nbytes += nbytes
            self._spent[result].add(perf_counter() - start)
            error = sys.exc_info()[1]
            with runtime().released():
                tracing.end("portakv weights", began, {"pull.size": nbytes}, error)
        return nbytes

    def figures(self) -> Figures:
        """Return the bytes and the seconds."""
        with runtime().lock:
            return {
                "weight_bytes_total": [{"value": self._nbytes}],
                **histograms("weight_pull_seconds", self._spent),
            }


#: Those of this process.
WEIGHTS = WeightCounts()


def count_weights() -> WeightCounts:
    """Return what the pulls of weights of this process have brought, for `Collector` and
    `observe`."""
    return WEIGHTS
