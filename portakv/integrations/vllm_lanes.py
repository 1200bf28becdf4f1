# SPDX-License-Identifier: Apache-2.0
"""Jobs of vLLM's offloading, which end in order, and the time that their copies took on the device.

The module imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from portakv import BlockTransfer, CopyOptions, InvalidTerms, KVView, PortaKVError
from portakv.runtime.devices import inside

#: The terms of `copy_rows` that the key ``"portakv"`` of the configuration may hold.
TERMS = ("backend", "max_gbps", "max_thread_blocks", "overlap")


def worker_terms(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the terms of copies in the ``kv_connector_extra_config`` of the offloading worker.

    Raises `InvalidTerms` for other terms, and for values that a term cannot have.
    """
    terms = extra.get("portakv", {})
    if not isinstance(terms, Mapping) or not set(terms) <= set(TERMS):
        raise InvalidTerms(
            f"kv_connector_extra_config has portakv={terms!r}; expected a mapping with some of "
            f"{', '.join(TERMS)}. Correct it, or leave it out."
        )
    CopyOptions(**terms)
    return dict(terms)


class Job(NamedTuple):
    """A submitted job, with timing events of the device before and after its copies.

    Without timing events the host's clock counts.
    """

    transfer: BlockTransfer
    begin: torch.Event | None
    end: torch.Event | None
    nbytes: int = 0

    def done(self) -> bool:
        """Return whether the copies have ended and their time is known; never blocks.

        The device completes ``end`` after the event of the transfer, so both are checked.
        """
        return self.transfer.done() and (self.end is None or self.end.query())

    def synchronize(self) -> None:
        """Block the host until the copies have ended and their time is known."""
        self.transfer.synchronize()
        if self.end is not None:
            self.end.synchronize()

    def seconds(self) -> float | None:
        """Return the time that the copies of an ended job took.

        On a device it excludes the time for which they waited for the model.
        """
        if self.begin is None or self.end is None:
            return self.transfer.statistics.seconds
        return float(self.begin.elapsed_time(self.end)) / 1000


class Lane:
    """Jobs on a separate stream, which end in the order of their submission.

    Args:
        device: the device of the stream; the host has none.
        paced: the copies have a limited rate. A thread issues such copies later, so an event that
            is recorded now would not come after them.
    """

    def __init__(self, device: torch.device, paced: bool = False) -> None:
        self.device = device
        self.paced = paced
        self.stream = None if device.type == "cpu" else torch.Stream(device)
        self.jobs: dict[int, Job] = {}

    def submit(self, number: int, copy: Callable[[], BlockTransfer], nbytes: int = 0) -> None:
        """Begin a job of so many bytes, whose copies ``copy`` issues on the current stream.

        That is the lane's then; see `current`.
        """
        with self.current():
            begin = self._event()
            transfer = copy()
            self.jobs[number] = Job(transfer, begin, self._event(), nbytes)

    def current(self) -> AbstractContextManager[object]:
        """Make the lane's stream current, after the work of the one that was current."""
        if self.stream is not None:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device.index))
        return inside(self.stream)

    def use(self, view: KVView) -> None:
        """Report to the allocator that copies of the lane use the memory of a view.

        It does not hand out that memory while such a copy is in flight, also without references.
        """
        if self.stream is not None:
            for tensor in view.used_on(self.stream):
                if tensor.device == self.device:
                    tensor.record_stream(self.stream)

    def ended(self) -> Iterator[int]:
        """Yield the numbers of the oldest jobs that have ended.

        Raises the error of a job that failed, and removes that job.
        """
        for number, job in list(self.jobs.items()):
            try:
                if not job.done():
                    return
            except PortaKVError:
                del self.jobs[number]
                raise
            yield number

    def _event(self) -> torch.Event | None:
        """Return a timing event that the stream records now, or None if there can be none."""
        if self.stream is None or self.paced:
            return None
        try:
            event = torch.Event(self.device, enable_timing=True)
            event.record(self.stream)
        except RuntimeError:  # the device has no timing events
            return None
        return event
