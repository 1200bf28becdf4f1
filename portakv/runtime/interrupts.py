# SPDX-License-Identifier: Apache-2.0
"""Run work that an interrupt must not cut in two.

Python raises `KeyboardInterrupt`, and an exception of any other signal handler, between two
bytecodes of the main thread, and in no other thread. Work that changes shared state therefore never
runs in the main thread: a helper thread runs it, and the main thread waits for the result.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from itertools import count
from typing import Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

#: The name of helpers, which outlive the objects whose work they run.
NAME = "uninterrupted work of portakv"
#: Seconds for which an interrupted caller waits until its work is undone.
GRACE = 1.0
#: Seconds after which a caller notices an interrupt that came just before it began to wait.
LOOK = 0.2


class Work(Generic[T]):
    """Work that a helper runs for a caller, and the result of the work."""

    def __init__(self, work: Callable[[], T], undo: Callable[[T], object] | None) -> None:
        self.work: Callable[[], T] | None = work
        self.undo = undo
        self.result: T | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.ended = False
        # The thread that gets 0 runs the work, or undoes it.
        self._begun = count()
        self._undoing = count()
        # Locked until the work has ended, and until abandoned work is undone.
        self.end = locked()
        self.undone = locked()

    def run(self) -> None:
        """Run the work, unless its caller was interrupted before."""
        work = self.work
        if work is None or next(self._begun):
            return
        _helper.work = self
        try:
            self.result = work()
        except BaseException as error:  # the caller raises it
            self.error = error
        _helper.work = None
        self.work = None  # releases views, and everything else that the work refers to
        self.ended = True
        self.end.release()
        if self.abandoned:
            self.take_back()

    def take_back(self) -> None:
        """Undo abandoned work if it has ended; prevent its start if it has not begun."""
        never = not next(self._begun)
        if never:
            self.work = None  # a helper that an interrupt lost would retain what it refers to
        if not (never or self.ended) or next(self._undoing):
            return
        try:
            if not never and self.error is None and self.undo is not None:
                self.undo(cast(T, self.result))
        finally:
            self.result = None
            self.undone.release()

    def abandon(self) -> None:
        """Have a helper undo the work, and wait at most `GRACE` seconds for that."""
        self.abandoned = True
        hand_over(self.take_back)
        self.undone.acquire(timeout=GRACE)


class Condition(threading.Condition):
    """A condition that no interrupt of a ``with`` statement leaves locked.

    Python's own has methods in Python, and an interrupt may come at the first line of ``__exit__``,
    before the lock is released: 4 of 10 did, of a loop that does nothing else (Python 3.10 - 3.13).
    Here ``with`` finds the methods of the lock, which are not in Python. An `ExitStack` takes no
    such condition.
    """

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)


def uninterrupted(work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """Return ``work()``, which no interrupt cuts in two.

    If the caller is interrupted, a helper finishes the work and calls ``undo(result)``. The caller
    raises the interrupt after at most `GRACE` seconds. Long work checks `abandoned` now and then.
    Outside the main thread the caller runs the work itself.
    """
    if not interruptible():
        return work()
    task = Work(work, undo)
    try:
        if not hand_over(task.run):
            return work()
        while not task.end.acquire(timeout=LOOK):
            pass
        error = task.error
        if error is None:
            return cast(T, task.result)
    except BaseException:  # an interrupt of the caller
        task.abandon()
        raise
    try:
        raise error
    finally:
        del error, task  # the traceback of the error holds this frame


def shielded(work: Callable[P, T]) -> Callable[P, T]:
    """Return a function or a method, each call of which no interrupt cuts in two; see
    `uninterrupted`."""

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return uninterrupted(partial(work, *args, **kwargs))

    return run


def alongside(work: Callable[[], T]) -> Callable[[], T]:
    """Begin work in a helper, and return the call that waits for its result, for one use.

    A caller that needs no result does not make the call. If the system creates no thread, the work
    is done before the return.
    """
    task = Work(work, None)
    if not hand_over(task.run):
        task.run()
    return partial(_result_of, task)


def _result_of(task: Work[T]) -> T:
    """Wait for the end of a helper's work, and return its result or raise its error."""
    try:
        while not task.end.acquire(timeout=LOOK):
            pass
    except BaseException:  # an interrupt of the caller
        task.abandon()
        raise
    if task.error is not None:
        raise task.error
    return cast(T, task.result)


def interruptible() -> bool:
    """Return True in the thread that signals interrupt."""
    return threading.get_ident() == threading.main_thread().ident


def abandoned() -> bool:
    """Return True in a helper whose caller was interrupted, so that its result is not needed."""
    work = getattr(_helper, "work", None)
    return work is not None and work.abandoned


def locked() -> threading.Lock:
    """Return a lock that is acquired: a thread acquires it to wait, another one releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Thread:
    """A helper, which makes one call after the other.

    Attributes:
        call: the next call.
        wake: released once there is one.
    """

    def __init__(self) -> None:
        self.call: Callable[[], object] | None = None
        self.wake = locked()

    def serve(self) -> None:
        """Make calls."""
        while True:
            self.wake.acquire()
            call = self.call
            if call is not None:
                call()
            self.call = call = None  # an idle helper retains nothing
            _idle.append(self)


def hand_over(call: Callable[[], object]) -> bool:
    """Have a helper make a call; return False if the system creates no thread.

    It is the helper that became idle last: the others may have been idle for long, and take longer
    to wake. An interrupt in this call may leave one helper idle for ever.
    """
    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Thread()
        try:
            threading.Thread(target=helper.serve, name=NAME, daemon=True).start()
        except RuntimeError:  # also while the interpreter ends
            return False
    helper.call = call
    helper.wake.release()
    return True


def _forget_helpers() -> None:
    """Begin without helpers: a forked process has none of the parent's threads."""
    global _idle
    _idle = deque()


#: The helpers that wait for a call.
_idle: deque[_Thread] = deque()
_helper = threading.local()
os.register_at_fork(after_in_child=_forget_helpers)
