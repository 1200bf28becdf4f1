# SPDX-License-Identifier: Apache-2.0
"""Jobs of vLLM's offloading that end in order, and how long their copies took on the device. No
engine is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from portakv import BlockTransfer


class Job(NamedTuple):
    """A job that was submitted, with timing events of the device before and behind its copies;
    without them the host's clock counts."""

    transfer: BlockTransfer
    begin: torch.Event | None
    end: torch.Event | None

    def done(self) -> bool:
        """Return whether the copies have ended and their time is known; never blocks.

        The device completes ``end`` after the event of the transfer, so that one is not enough.
        """
        return self.transfer.done() and (self.end is None or self.end.query())

    def synchronize(self) -> None:
        """Block the host until the copies have ended and their time is known."""
        self.transfer.synchronize()
        if self.end is not None:
            self.end.synchronize()

    def seconds(self) -> float | None:
        """Return how long the copies of a job that has ended took: on a device without the time for
        which they waited for the model."""
        if self.begin is None or self.end is None:
            return self.transfer.statistics.seconds
        return float(self.begin.elapsed_time(self.end)) / 1000


class Lane:
    """Jobs that end in the order in which they were submitted, on a stream of their own.

    ``paced``: their copies have a limit of their rate. A thread issues these later, so no event
    that is recorded now lies behind them.
    """

    def __init__(self, device: torch.device, paced: bool = False) -> None:
        self.device = device
        self.paced = paced
        self.stream = None if device.type == "cpu" else torch.Stream(device)
        self.jobs: dict[int, Job] = {}

    def submit(self, number: int, copy: Callable[[], BlockTransfer]) -> None:
        """Begin a job, whose copies ``copy`` issues on the stream, behind the current stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device.index))
        begin = self._event()
        transfer = copy()
        self.jobs[number] = Job(transfer, begin, self._event())

    def finished(self) -> Iterator[tuple[int, Job]]:
        """Take out the oldest jobs that have ended."""
        for number, job in list(self.jobs.items()):
            if not job.done():
                return
            yield number, self.jobs.pop(number)

    def _event(self) -> torch.Event | None:
        """Return a timing event that the stream records now; None where none can be had."""
        if self.stream is None or self.paced:
            return None
        try:
            event = torch.Event(self.device, enable_timing=True)
            event.record(self.stream)
        except RuntimeError:  # of a device without timing events
            return None
        return event
