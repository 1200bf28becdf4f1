# SPDX-License-Identifier: Apache-2.0
"""The marks of offers that are made before their rows are complete.

A mark is the number of layers, or of tokens, that are complete. The owner raises it; readers see it
after the work that the raising thread's stream had by then has ended, and read no row past it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import sleep
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

from portakv import arguments
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.streams import ignore_captures_elsewhere
from portakv.runtime.transfer import event_pool

_log = logging.getLogger(__name__)
#: The unit of a mark: whole layers, or tokens in all layers.
Unit: TypeAlias = Literal["layers", "tokens"]
SOON = 5e-5  # seconds between two looks at events, after one had ended
LATER = 5e-4  # the most seconds between two looks
PAST = "rows past the mark of an offer were requested; read its mark first."


class Progress:
    """The mark of an offer. The owner's lock guards all calls."""

    def __init__(self, unit: Unit, end: int) -> None:
        self.unit = unit
        self.end = end
        self.raised = 0  # the last raise; its stream may still work
        self.mark = 0  # for readers

    def raise_to(self, mark: object) -> int:
        """Record a raise; raise `InvalidTerms` for a mark that is lower, or past the end."""
        self.raised = arguments.whole("mark", mark, self.raised, self.end, f"of {self.unit}")
        return self.raised

    def covers(self, layers: int, tokens: int) -> bool:
        """Return True if so many layers are complete, up to so many tokens."""
        return (layers if self.unit == "layers" else tokens) <= self.mark


def mark_event(device: torch.device) -> torch.Event | None:
    """Return an event after the current stream's work; None on the host, where no work is left.

    Raises `Unsupported` while that stream is captured into a graph.
    """
    if device.type == "cpu":
        return None
    if capturing(device):
        raise refuse_capture(
            "Raising a mark", "its event has to be seen; raise it after the capture"
        )
    return event_pool(device).recorded(None)


def progress_of(unit: Unit | None, layers: int, tokens: int) -> Progress | None:
    """Return the mark of a new offer of so many layers and tokens; None if it has no unit.

    Raises `InvalidTerms` for another unit.
    """
    if unit is None:
        return None
    arguments.one_of("progress", unit, get_args(Unit))
    return Progress(unit, layers if unit == "layers" else tokens)


class _Raise(NamedTuple):
    """A raise whose stream still works."""

    progress: Progress
    event: torch.Event
    device: torch.device
    show: Callable[[], object]
    fail: Callable[[], object]


class Raises:
    """Shows marks after the work of their streams, in the order of each offer's raises.

    A worker looks at the events as long as there are any: the caller's thread must not wait for its
    stream, and no other thread of an owner may.
    """

    def __init__(self, change: threading.Condition) -> None:
        self._change = change  # the owner's lock
        self._pending = deque[_Raise]()
        self._graph = Graph()
        self._looking = False

    def after(
        self,
        progress: Progress,
        event: torch.Event,
        device: torch.device,
        show: Callable[[], object],
        fail: Callable[[], object],
    ) -> None:
        """Call ``show`` under the owner's lock, which the caller has, when an event has ended;
        ``fail`` if the device failed."""
        self._pending.append(_Raise(progress, event, device, show, fail))
        if not self._looking:
            task = Task(lambda *_: self._look(), 1, queue=self._graph.queue("marks"), name="marks")
            self._graph.submit([task], priority="urgent")
            self._looking = True

    @property
    def pending(self) -> int:
        """Return the number of raises whose streams still work."""
        return len(self._pending)

    def close(self) -> None:
        """Show no further mark."""
        with self._change:
            self._pending.clear()
        self._graph.close()

    # --- in the worker

    def _look(self) -> None:
        """Look at the events until none is left."""
        pause = SOON
        looked_at = set[torch.device]()
        while True:
            with self._change:
                pending = [*self._pending]
                if not pending:
                    self._looking = False
                    return
            for device in {one.device for one in pending} - looked_at:
                ignore_captures_elsewhere(device)
                looked_at.add(device)
            ended = self._show_ended(pending)
            pause = SOON if ended else min(2 * pause, LATER)
            sleep(pause)

    def _show_ended(self, pending: list[_Raise]) -> bool:
        """Show the marks whose events have ended; return True if there are any."""
        unended = set[Progress]()
        shown = False
        for one in pending:
            if one.progress in unended:
                continue
            end = one.show
            try:
                if not one.event.query():
                    unended.add(one.progress)
                    continue
                event_pool(one.device).release(one.event)
            except Exception:  # torch raises errors of many kinds
                _log.exception("The work before a mark failed on its device; the offer ends.")
                end = one.fail
            with self._change:
                if one in self._pending:  # else the owner is closed
                    self._pending.remove(one)
                    end()
            shown = True
        return shown
