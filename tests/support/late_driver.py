# SPDX-License-Identifier: Apache-2.0
"""CUDA's driver on a host without one: its functions note work, and it is done later, in any order
that streams and events allow."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from portakv.core.link import FUNCTIONS
from portakv.runtime import cuda
from support.cuda_on_cpu import HostDriver

WORD = ctypes.c_uint64
NUMBER = ctypes.c_uint
COLUMN = ctypes.POINTER(ctypes.c_int64)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuMemcpyAsync": (WORD, WORD, WORD, WORD),
    "cuMemcpy2DAsync_v2": (ctypes.POINTER(WORD * 16), WORD),
    "cuMemcpyBatchAsync_v2": (COLUMN, COLUMN, COLUMN, WORD, WORD, WORD, WORD, WORD),
    "cuStreamWaitValue32_v2": (WORD, WORD, NUMBER, NUMBER),
    "cuMemHostAlloc": (ctypes.POINTER(WORD), WORD, NUMBER),
    "cuThreadExchangeStreamCaptureMode": (WORD,),
    "cuEventCreate": (ctypes.POINTER(WORD), NUMBER),
    "cuEventDestroy_v2": (WORD,),
    "cuEventRecord": (WORD, WORD),
    "cuStreamWaitEvent": (WORD, WORD, NUMBER),
    "cuStreamQuery": (WORD,),
}


def moved(dst: int, src: int, nbytes: int, _: object = None) -> None:
    """Copy bytes, which the last argument may hold."""
    ctypes.memmove(dst, src, nbytes)


class Work(NamedTuple):
    """Work on a stream: what does it (None: a wait), and the number of the work that it waits for
    (-1: none)."""

    kind: str
    stream: int
    do: Callable[[], None] | None = None
    after: int = -1


class LateDriver(HostDriver):
    """A driver that notes work in ``queue``.

    ``refuse_at``: the number of the call that it refuses, of those that order work. ``busy``: no
    stream has done its work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Work] = []
        self.refuse_at = -1
        self.busy = False
        self._events: dict[int, int] = {}
        self._word = ctypes.c_uint32()
        self._calls = 0
        self._made = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *types)(getattr(self, f"_{name}"))
            for name, types in ARGUMENTS.items()
        }
        assert set(FUNCTIONS) - set(self._made) == {"cuMemcpyBatchAsync"}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_made", ()):
            return self._made[name]
        raise AttributeError(name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def refuse(self, error: int, what: str) -> NoReturn:
        raise cuda.refused(f"error {error}", what)

    def forget(self) -> None:
        """Forget all work and events."""
        self.queue.clear()
        self._events.clear()
        self._calls = 0

    def note(
        self, kind: str, stream: int, do: Callable[[], None] | None = None, after: int = -1
    ) -> int:
        """Note work on a stream; return the driver's answer."""
        self._calls += 1
        if self._calls - 1 == self.refuse_at:
            return 1
        self.queue.append(Work(kind, stream, do, after))
        return 0

    def _cuMemcpyAsync(self, dst: int, src: int, nbytes: int, stream: int) -> int:
        return self.note("copy", stream, partial(moved, dst, src, nbytes))

    def _cuMemcpy2DAsync_v2(self, asked: Any, stream: int) -> int:
        src = asked[0][:7]
        dst = asked[0][7:14]
        width, height = asked[0][14:]

        def do() -> None:
            for row in range(height):  # of the host's and the device's address one is 0
                ctypes.memmove(max(dst[3:6]) + row * dst[6], max(src[3:6]) + row * src[6], width)

        return self.note("rows", stream, do)

    def _cuMemcpyBatchAsync_v2(
        self, dst: Any, src: Any, nbytes: Any, number: int, *rest: int
    ) -> int:
        each = list(zip(dst[:number], src[:number], nbytes[:number], strict=True))

        def do() -> None:
            for copy in reversed(each):
                ctypes.memmove(*copy)

        return self.note("batch", rest[-1], do)

    def _cuStreamWaitValue32_v2(self, stream: int, *_: int) -> int:
        return self.note("rest", stream, lambda: None)

    def _cuMemHostAlloc(self, address: Any, *_: int) -> int:
        address[0] = ctypes.addressof(self._word)
        return 0

    def _cuThreadExchangeStreamCaptureMode(self, _: int) -> int:
        return 0

    def _cuEventCreate(self, event: Any, _: int) -> int:
        event[0] = 7
        return 0

    def _cuEventDestroy_v2(self, _: int) -> int:
        return 0

    def _cuEventRecord(self, event: int, stream: int) -> int:
        error = self.note("record", stream, lambda: None)
        if not error:
            self._events[event] = len(self.queue) - 1
        return error

    def _cuStreamWaitEvent(self, stream: int, event: int, _: int) -> int:
        return self.note("wait", stream, None, self._events.get(event, -1))

    def _cuStreamQuery(self, _: int) -> int:
        return 600 if self.busy else 0  # CUDA_ERROR_NOT_READY

    def number(self, stream: Any) -> int:
        """Return the handle of a stream."""
        return int(stream)

    def _launch(
        self,
        function: int,
        blocks: int,
        planes: int,
        _z: int,
        threads: int,
        *rest: Any,
    ) -> int:
        library, each = self._functions[function - 1]
        stream, parameters, _ = rest[-3:]
        # The driver takes the argument along with the launch.
        argument = ctypes.create_string_buffer(
            ctypes.string_at(parameters[0], library.argument_bytes()), library.argument_bytes()
        )

        def do() -> None:
            library.run_kernel(argument, each, blocks, planes, threads)

        return self.note("launch", stream or 0, do)


def perform(queue: Sequence[Work], eager: Sequence[int], without: int = -1) -> None:
    """Do noted work, that of the first streams of ``eager`` as early as it may be done.

    ``without``: the number of a wait that is left out.
    """
    left = {
        stream: [nth for nth, work in enumerate(queue) if work.stream == stream] for stream in eager
    }
    assert sum(map(len, left.values())) == len(queue)
    done: set[int] = set()
    while any(left.values()):
        for stream in eager:
            first = left[stream][0] if left[stream] else -1
            if first < 0:
                continue
            work = queue[first]
            if work.after < 0 or work.after in done or first == without:
                if work.do is not None:
                    work.do()
                done.add(left[stream].pop(0))
                break
        else:
            raise AssertionError("the streams wait for each other")
