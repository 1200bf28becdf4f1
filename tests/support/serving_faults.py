# SPDX-License-Identifier: Apache-2.0
"""Scheduler sides with a bug, which walks and real engines must find."""

from __future__ import annotations

from collections.abc import Mapping

from portakv.serving import SchedulerSide
from portakv.serving.plan import Blocks
from portakv.serving.scheduler import NO_STATES


class GivenBackAtOnce(SchedulerSide):
    """A scheduler side that lets the engine free blocks which are still read."""

    def finished(self, request: str) -> bool:
        super().finished(request)
        self._next.retained.clear()
        self._requests.pop(request, None)
        return False


class NotStopped(SchedulerSide):
    """A scheduler side that does not stop the saves of a request whose blocks are taken."""

    def preempted(self, request: str) -> None:
        super().preempted(request)
        self._next.stop.clear()


class NotHeld(SchedulerSide):
    """A scheduler side that does not hold the blocks of a window while they are read."""

    def scheduled(
        self,
        request: str,
        computed: int,
        until: int,
        blocks: Blocks = (),
        replaced: bool = False,
        states: Mapping[int, Mapping[int, int]] = NO_STATES,
    ) -> None:
        self._holder = None
        super().scheduled(request, computed, until, blocks, replaced, states)


class Careless(GivenBackAtOnce, NotStopped):
    """A scheduler side with both bugs."""


class LentAndGivenBack(SchedulerSide):
    """A scheduler side that lets the engine free blocks which other engines may read."""

    def finished(self, request: str) -> bool:
        state = self._requests.get(request)
        lent = state is not None and state.offered and not state.reading
        retained = super().finished(request)
        if lent:
            self._next.retained.remove(request)
            del self._requests[request]
        return retained and not lent
