# SPDX-License-Identifier: Apache-2.0
"""Concurrent work of several threads, for tests of the state that they share."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from sys import _current_frames
from types import CodeType, FrameType
from typing import Any

from portakv.runtime.interrupts import NAME, hand_over
from support.waits import LIMIT


def run_threads(work: Callable[[Any], object], names: Sequence[Any]) -> None:
    """Run ``work`` for each name in a thread, switching often; the first exception counts."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(work, names))
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def interrupting(call: Any) -> Iterator[None]:
    """Raise one `KeyboardInterrupt` in the main thread, by Ctrl-C, while it runs a function or
    method of the library that waits."""
    code: CodeType = call.__code__
    main = threading.main_thread().ident or 0
    came = threading.Event()
    over = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not came.is_set():
            came.set()
            raise KeyboardInterrupt

    def send() -> None:
        while not came.is_set() and not over.wait(0.02):
            frame = _current_frames().get(main)
            while frame is not None and frame.f_code is not code:
                frame = frame.f_back
            if frame is not None:  # again and again: one just before a wait begins ends no wait
                signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def on_helpers(call: Callable[[], object]) -> None:
    """Make a call in each helper of the library that there is."""
    many = sum(thread.name == NAME for thread in threading.enumerate())
    together = threading.Barrier(many + 1)

    def once() -> None:
        call()
        together.wait(LIMIT)

    for _ in range(many):  # none of them is idle before the last one has made the call
        assert hand_over(once)
    together.wait(LIMIT)
