# SPDX-License-Identifier: Apache-2.0
"""A driver on the host whose copies end when a test says so, with events after them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from portakv.backends.row_kernels import RowKernels
from portakv.runtime.cuda import EventFunctions
from portakv.runtime.ends import Ends
from support.cuda_on_cpu import CudaOnCpu
from support.late_driver import WORD, LateDriver

NOT_READY = 600


class EndingDriver(LateDriver):
    """Works at once, or, once ``late`` is set, when `work` is called.

    Attributes:
        created: the number of events.
        answers: what the next questions about an event return in place of the answer.
        followed: the streams that wait for events, with the events.
        adopted: how often a thread was given a context.
    """

    def __init__(self) -> None:
        super().__init__()
        functions: dict[str, Any] = {
            "cuEventCreate": (self._create, ctypes.POINTER(WORD), ctypes.c_uint),
            "cuEventQuery": (self._query, WORD),
            "cuEventSynchronize": (self._synchronize, WORD),
            "cuStreamWaitEvent": (self._follow, WORD, WORD, ctypes.c_uint),
        }
        for name, (function, *types) in functions.items():
            self._made[name] = ctypes.CFUNCTYPE(ctypes.c_int, *types)(function)
        self.late = False
        self.created = 0
        self.answers = list[int]()
        self.followed = list[tuple[int, int]]()
        self.adopted = 0
        self._recorded = dict[int, int]()
        self._done = 0

    @property
    def events(self) -> EventFunctions:
        library: Any = self
        names = [f"cuEvent{name}" for name in ("Create", "Record", "Query", "Synchronize")]
        return EventFunctions.of(library, *names, "cuStreamWaitEvent")

    def number(self, stream: Any) -> int:
        return 0

    def current(self) -> AbstractContextManager[object]:
        self.adopted += 1
        return nullcontext()

    def describe(self, error: int) -> str:
        return f"error {error}"

    def note(
        self, kind: str, stream: int, do: Callable[[], None] | None = None, after: int = -1
    ) -> int:
        error = super().note(kind, stream, do, after)
        if not self.late:
            self.work()
        return error

    def work(self, parts: int | None = None) -> None:
        """Do so many parts of the work that was noted; None: all."""
        past = len(self.queue) if parts is None else self._done + parts
        for each in self.queue[self._done : past]:
            if each.do is not None:
                each.do()
        self._done = past

    def _create(self, event: Any, _: int) -> int:
        self.created += 1
        event[0] = self.created
        return 0

    def _cuEventRecord(self, event: int, stream: int) -> int:
        error = self.note("record", stream)
        if not error:
            self._recorded[event] = len(self.queue)
        return error

    def _query(self, event: int) -> int:
        if self.answers:
            return self.answers.pop(0)
        return 0 if self._recorded[event] <= self._done else NOT_READY

    def _synchronize(self, event: int) -> int:
        self.work(max(0, self._recorded[event] - self._done))
        return 0

    def _follow(self, stream: int, event: int, _: int) -> int:
        self.followed.append((stream, event))
        return 0


class EndingOnCpu(CudaOnCpu):
    """The CUDA kernel on the host, whose copies have ends."""

    name = "ending-on-cpu"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        assert isinstance(self._driver, EndingDriver)
        self.ending = self._driver
        kernels = RowKernels(self.ending, device, self.name)
        kernels.ends = Ends(self.ending, device)
        self.row_kernels = kernels
        self._table = kernels.table


EndingOnCpu.driver = EndingDriver
