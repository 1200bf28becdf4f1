# SPDX-License-Identifier: Apache-2.0
"""Run coroutines in the caller's thread until they wait, and then in one loop of the process; let
only a few work at a time.

A coroutine is a sequence of steps: what it does between two waits is one step. One lock,
`Runtime.lock`, is held during each step and never during a wait. State that only steps change is
therefore guarded, whichever thread runs them. Code of others, which may have locks of its own, runs
while the lock is `Runtime.released`.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import select
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from heapq import heappop, heappush
from math import ceil
from socket import socket
from threading import get_ident
from time import monotonic, perf_counter
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast
from weakref import WeakSet

from portakv.errors import PortaKVError, TransferError, TransferTimeout
from portakv.runtime import resources
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.interrupts import (
    LOOK,
    abandoned,
    hand_over,
    interruptible,
    locked,
    uninterrupted,
)
from portakv.runtime.transfer import reported

# ------------------------------------------------------------------------------------------------
# Let only a few coroutines work at a time, in the order in which their work is due.

#: How soon work is due.
Priority: TypeAlias = Literal["urgent", "normal", "background"]
#: Seconds after its request at which work of each priority is due.
SLACK = {"urgent": 0.0, "normal": 0.05, "background": 2.0}


class Turn:
    """Work that waits for a place of a limit, or has one.

    Attributes:
        due: the time at which the work is due.
        number: orders work that is due at the same time.
        nbytes: counts for the rate.
        background: the work may wait for all work that is not of the background.
        alone: of background work, which keeps the interpreter rather than a device: no other such
            work runs at the same time, as more would only make urgent work wait.
        begun: the work has a place.
    """

    def __init__(self, due: float = 0.0, number: int = 0, nbytes: int = 0) -> None:
        self.due = due
        self.number = number
        self.nbytes = nbytes
        self.background = False
        self.alone = False
        self.begun = False
        self.place: Wait | None = None  # for one


class Rate:
    """The times at which work may begin, at most ``gbps`` 10^9 bytes of it a second; None: at any
    rate.

    Args:
        now: returns the time in seconds.

    Attributes:
        next: the time from which more work may begin.
    """

    def __init__(self, gbps: float | None, now: Callable[[], float] = monotonic) -> None:
        self._seconds_per_byte = 1e-9 / gbps if gbps else 0.0
        self._now = now
        self.next = 0.0

    def left(self) -> float:
        """Return the seconds until more work may begin; 0 if it may."""
        return max(0.0, self.next - self._now())

    def start(self, nbytes: int) -> None:
        """Note that work of so many bytes begins now, or as soon as it may."""
        now = self._now()
        needs = nbytes * self._seconds_per_byte
        # Late work may catch up by its own time: clocks oversleep. More would be a burst.
        self.next = needs + (max(self.next, now - needs) if self.next else now)


class Limit:
    """At most ``width`` coroutines work at a time. The one whose work is due first begins next.

    Work of equal priority begins in the order of its requests. A later request of a higher
    priority overtakes, but not work that has waited for the difference of their `SLACK`. All calls
    are made in steps of coroutines, or with the runtime's lock.

    Args:
        gbps: work begins at a rate of at most so many 10^9 bytes a second; None: at any rate.
    """

    def __init__(self, runtime: Runtime, width: int = 1, gbps: float | None = None) -> None:
        self.width = width
        self._runtime = runtime
        self._free = width
        self._background = 0  # turns of the background that have a place
        self._alone = 0  # those of them that run alone
        self._rate = Rate(gbps, runtime.time) if gbps else None
        self._delayed = False  # a coroutine waits until then
        self._number = 0
        # Turns that wait, by due time and number: of the background, those of it that run alone,
        # and others. So no kind holds up another one.
        self._heaps = [list[tuple[float, int, Turn]]() for _ in range(3)]

    async def acquire(
        self, nbytes: int = 0, priority: Priority = "normal", until: float | None = None
    ) -> bool:
        """Wait for a place and for the rate; return False if neither came before ``until``.

        After True the caller calls `release` at the end of its work of ``nbytes``.
        """
        due = self._runtime.time() + SLACK[priority]
        if until is not None:
            due = min(due, until)
        self._number += 1
        return await self.take(Turn(due, self._number, nbytes), Wait(until=until))

    async def work(self, call: Callable[..., T], *arguments: object) -> T:
        """Do work that blocks (see `Work`) once there is a place, and return its result."""
        await self.acquire()
        try:
            result: T = await Work(call, *arguments)
            return result
        finally:
            self.release()

    async def take(self, turn: Turn, wait: Wait) -> bool:
        """Wait for the place of a turn; return False if the wait ended before there was one.

        After True the caller calls `release` with the turn.
        """
        turn.place = wait
        self.push(turn)
        try:
            await wait
        except BaseException:  # cancelled, perhaps after the place was given
            if turn.begun:
                self.release(turn)
            raise
        finally:
            wait.woken = True  # else it would get a place
        return turn.begun

    def push(self, turn: Turn) -> None:
        """Let a turn wait, also one that waits and is due sooner from now on."""
        kind = 2
        if turn.background:
            kind = 1 if turn.alone else 0
        heappush(self._heaps[kind], (turn.due, turn.number, turn))
        self._begin()

    def release(self, turn: Turn | None = None) -> None:
        """Give the place of a turn to the one that is due first; None: that of `acquire`."""
        self._free += 1
        if turn is not None and turn.background:
            self._background -= 1
            self._alone -= turn.alone
        self._begin()

    def _begin(self) -> None:
        """Give places to the turns that are due first."""
        while self._free and (heap := self._first()):
            turn = heap[0][2]
            wait = turn.place
            if wait is None or wait.woken:  # it has given up, or this is its former entry
                heappop(heap)
                continue
            if self._rate is not None:
                if self._rate.left():
                    self._delay(self._rate.next)
                    return
                self._rate.start(turn.nbytes)
            heappop(heap)
            self._free -= 1
            if turn.background:
                self._background += 1
                self._alone += turn.alone
            turn.begun = True
            wait.wake()

    def _first(self) -> list[tuple[float, int, Turn]]:
        """Return the heap of the turn that is due first; an empty one if no turn may begin."""
        background, alone, first = self._heaps
        # One place is left for work that is not of the background.
        if self._background < max(1, self.width - 1):
            if background and (not first or background < first):
                first = background
            if alone and not self._alone and (not first or alone < first):
                first = alone
        return first

    def _delay(self, until: float) -> None:
        """Begin again at the time that the rate allows."""
        if not self._delayed:
            self._delayed = True
            self._runtime.start(self._begin_later(until))

    async def _begin_later(self, until: float) -> None:
        await Wait(until=until)
        self._delayed = False
        self._begin()


#: The most helpers that do the work of `blocking` at the same time.
BLOCKING = 4

#: The limits of the process, by runtime and name; a forked process has others.
_shared: Bounded[tuple[Runtime, str], Limit] = Bounded("limits of the process", 8)


def shared_limit(name: str, width: int) -> Limit:
    """Return the limit of this process that has a name, made at the first call."""
    here = runtime()
    return _shared.get_or_make((here, name), partial(Limit, here, width))


def blocking() -> Limit:
    """Return the limit of this process for work that may take over a millisecond, such as copies on
    the host, imports and maps of memory. Such work waits for no other work of the limit."""
    return shared_limit("blocking work", BLOCKING)


# ------------------------------------------------------------------------------------------------
# Run coroutines in the caller's thread until they wait, and then in one loop of the process.

T = TypeVar("T")
_log = logging.getLogger(__name__)

#: A coroutine that returns T.
Steps = Coroutine[Any, Any, T]

READ = select.POLLIN
WRITE = select.POLLOUT
#: The end of a connection, which the system reports without interest in any other event.
HANGUP = 0
#: Seconds for which a long step may hold the lock. Its parts run together until then, since a
#: thread that sleeps may wait 5 ms for the interpreter.
HOLD = 1e-3
#: Seconds of `Runtime.breathe`, in which a thread wakes that sleeps on the lock.
YIELD = 2e-4
#: Seconds for which the end of the interpreter waits for work that blocks.
EXIT = 10.0


class Wait:
    """A wait of a coroutine: ``await`` returns True, or False once the time is over.

    A call of `wake` ends it, but for a descriptor for which `Runtime.run` waits.

    Args:
        fd: a descriptor or a socket that ends the wait by ``events``, too. A socket that is closed
            before the wait begins, when another file may have its descriptor, ends it as well.
        events: `READ`, `WRITE` or `HANGUP`.
        until: the end of the wait, by `Runtime.time`; None: no limit.
        poll: returns True if the event has come, after at most so many milliseconds. For sockets
            of ZeroMQ, whose descriptors report also what concerns only ZeroMQ. A caller's thread
            waits in it; the loop calls it with 0, both without the lock. It may take the message.
        here: the thread that calls `wake` goes on with the coroutine, after its own step. Such a
            wait has neither a descriptor nor a limit, and needs no loop: an engine that keeps the
            interpreter would hold up each change to another thread.
    """

    __slots__ = ("events", "fd", "here", "poll", "resume", "timer", "until", "woken")

    def __init__(
        self,
        fd: int | socket | None = None,
        events: int = READ,
        until: float | None = None,
        poll: Callable[[int], bool] | None = None,
        here: bool = False,
    ) -> None:
        self.fd = fd
        self.events = events
        self.here = here
        self.until = until
        self.poll = poll
        self.woken = False
        # Set in the step that begins the wait, and in the loop.
        self.resume: Callable[[], object] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def __await__(self) -> Generator[Wait, None, bool]:
        if not self.woken:
            yield self
        return self.woken

    def is_closed(self) -> bool:
        """Return True if the socket was closed, which ends the wait; else take its descriptor."""
        if isinstance(self.fd, socket):
            self.fd = self.fd.fileno()
            self.woken = self.fd < 0
        return self.fd == -1

    def wake(self) -> None:
        """End the wait, if it has not ended. The caller has the runtime's lock."""
        if not self.woken:
            self.woken = True
            if self.resume is not None:
                self.resume()


class Work(Generic[T]):
    """Work of a coroutine that blocks, such as a large copy: ``await`` returns its result.

    The lock is released meanwhile. `Runtime.run` does the work in the caller's thread. For a
    coroutine of the loop a helper does it, and runs the next steps until the coroutine waits. If
    the system gives no thread, the thread of the last step does the work. A coroutine that is
    cancelled goes on after the end of the work.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., T], *arguments: object) -> None:
        self._call = partial(call, *arguments)

    def __await__(self) -> Generator[Work[T], T, T]:
        return (yield self)

    def done(self, steps: Steps[Any]) -> Callable[[], Any]:
        """Do the work, once, and return the call that goes on with its coroutine."""
        try:
            return partial(steps.send, self._call())
        except BaseException as error:  # the coroutine gets it
            return partial(steps.throw, error)
        finally:
            del self._call  # it refers to views


class Signal:
    """Tells coroutines and threads of changes. All calls but `block` are made in steps, or with the
    runtime's lock."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._waits = set[Wait]()

    def notify(self) -> None:
        """Wake all that wait."""
        waits = tuple(self._waits)
        self._waits.clear()
        for wait in waits:
            wait.wake()

    async def wait_for(self, condition: Callable[[], object], until: float | None = None) -> bool:
        """Wait until a condition holds; return False if it does not at ``until``."""
        woken = True
        while woken and not condition():
            wait = Wait(until=until)
            self._waits.add(wait)
            try:
                woken = await wait
            finally:
                self._waits.discard(wait)
        return woken or bool(condition())

    def block(self, condition: Callable[[], object], timeout: float | None = None) -> bool:
        """Have this thread wait for a condition; return False if it does not hold in time.

        Also the main thread waits here itself. By a helper it would wake later.
        """
        until = None if timeout is None else monotonic() + timeout
        woken = True
        while woken:
            end = locked()
            wait = Wait()
            wait.resume = end.release
            with self._runtime.lock:
                if condition():
                    return True
                self._waits.add(wait)
            woken = end.acquire(timeout=-1 if until is None else max(0.0, until - monotonic()))
            self._waits.discard(wait)
        with self._runtime.lock:
            return bool(condition())


def _report(call: Callable[[], object]) -> None:
    """Make a call at the end or at the event of other work, and log its error: that work and its
    thread go on."""
    try:
        call()
    except Exception:
        _log.exception("A call at the end of some work failed. Report it.")


class Step:
    """The context of a step: its thread has the lock.

    At the end of the outermost one the thread goes on with the coroutines that it has woken, one
    after the other and not one within the other.
    """

    __slots__ = ("_calls", "depth", "lock")

    def __init__(self) -> None:
        self.lock: Any = threading.RLock()
        self.depth = 0
        self._calls = deque[Callable[[], object]]()

    def follow(self, call: Callable[[], object]) -> None:
        """Make a call at the end of the step. The caller has the lock."""
        self._calls.append(call)

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1

    def go_on(self) -> None:
        """Go on with the coroutines that were woken, before the end of the present step."""
        while self._calls:
            self._calls.popleft()()

    def __exit__(self, *error: object) -> None:
        try:
            if self.depth == 1:
                self.go_on()
        finally:
            self.depth -= 1
            self.lock.release()


class End(Generic[T]):
    """The end of some work, which `settle` notes.

    ``await`` it in a coroutine of the runtime or in any other loop, which it wakes. It has no lock,
    since the main thread uses it, where an interrupt may come between any two bytecodes.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.ended = False
        self.value: Any = None
        self.error: BaseException | None = None
        # To be made at the end. An annotation: each call of an alias costs as much as a step.
        self._calls: deque[Callable[[], object]] = deque()

    def done(self) -> bool:
        """Return True once the work has ended, or once it cannot end in a forked process."""
        return self.ended or self._runtime.process.forked

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Note the end, and make the calls of `on_end`."""
        self.value = value
        self.error = error
        self.ended = True
        self._make_calls()

    def on_end(self, call: Callable[[], object]) -> None:
        """Make a quick call at the end, immediately if it has come."""
        self._calls.append(call)
        if self.ended:
            self._make_calls()

    def _make_calls(self) -> None:
        while self._calls:
            try:
                call = self._calls.popleft()
            except IndexError:  # another thread has just taken the last call
                return
            _report(call)

    def synchronize(self, timeout: float | None = None) -> T:
        """Return the result of the work, or raise its error.

        Raises `TransferTimeout` after ``timeout`` seconds, when the work goes on, and
        `TransferError` in a process that was forked before the end.
        """
        if not self.wait(timeout):
            raise TransferTimeout(f"The work did not end within {timeout} s, and goes on.")
        if not self.ended:
            raise TransferError(
                "The work runs in the process that this one was forked from. Wait for it there."
            )
        if self.error is None:
            value: T = self.value
            return value
        raise self.error

    def wait(self, timeout: float | None = None) -> bool:
        """Block until `done`, at most ``timeout`` seconds; return False if that did not come.

        Looks now and then, since a wake may come too early.
        """
        if self.ended:
            return True
        end = locked()
        self.on_end(end.release)
        until = None if timeout is None else self._runtime.time() + timeout
        while not self.ended and not self._runtime.process.forked:
            left = LOOK if until is None else until - self._runtime.time()
            if left <= 0:
                self.off_end(end.release)
                return False
            end.acquire(timeout=min(left, LOOK))
        return True

    def off_end(self, call: Callable[[], object]) -> None:
        """Make a call of `on_end` no longer: who waits often must leave nothing here."""
        with suppress(ValueError):  # another thread has just taken the call
            self._calls.remove(call)

    def __await__(self) -> Generator[Any, Any, T]:
        if not self.done():
            if self._runtime.lock._is_owned():  # in a step
                yield from self._in_step().__await__()
            else:
                yield from reported(self).__await__()
        return self.synchronize()

    async def _in_step(self) -> None:
        """Wait in a coroutine of the runtime until the work has ended."""
        wait = Wait()
        wake = partial(self._runtime.wake, wait)
        self.on_end(wake)
        try:
            await wait
        except BaseException:  # cancelled
            self.off_end(wake)
            raise


class Handle(End[T]):
    """A coroutine that was started, and its end.

    Args:
        locked: the coroutine has the runtime's lock during its steps.
    """

    def __init__(self, runtime: Runtime, steps: Steps[T], locked: bool = True) -> None:
        super().__init__(runtime)
        self._steps = steps
        self._locked = locked
        self._wait: Any = None  # the present wait
        self._cancelled = False

    def begin(self) -> None:
        """Make the first step here, or in the loop for the main thread without the lock."""
        runtime = self._runtime
        if runtime.lock._is_owned() or not interruptible() or runtime.runs_here:
            self.step(self._steps.send, None)
        else:
            runtime.call_soon(self.step, self._steps.send, None)

    def begin_to_work(self, error: type[PortaKVError]) -> None:
        """Have a helper do the work with which the coroutine begins, and go on with it.

        Any thread may call it, also the main thread: the first step makes only the `Work`. Raises
        ``error`` if the system gives no thread.
        """
        work = self._steps.send(None)
        self._runtime.note_work(self)
        if not hand_over(partial(_serve, self, work)):
            self.discard()
            raise error(f"Expected to start a helper, but {resources.NO_THREAD}.")

    def follow(self, wait: Wait) -> None:
        """Have the loop go on after the first wait of a coroutine.

        The caller has made the first step by ``send(None)``, without the lock: any thread may do
        that, also the main thread. The wait has a time, and nothing wakes it.
        """
        self._wait = wait
        self._runtime.call_soon(self._begin_to_wait, wait)

    def discard(self) -> None:
        """End a coroutine that has not begun, and never will, as cancelled."""
        self._steps.close()
        self.settle(None, asyncio.CancelledError())

    def abandon(self) -> None:
        """Cancel a coroutine whose `follow` was interrupted, wherever that was."""
        self._runtime.call_soon(self._abandon)

    def _abandon(self) -> None:
        if self.ended:
            return
        self._cancelled = True
        if self._wait is not None:
            self._cancel()
        else:  # the interrupt came before the wait was noted
            self.step(self._steps.throw, asyncio.CancelledError())

    def cancel(self) -> bool:
        """Have the coroutine's wait raise `CancelledError`; return False if it has ended."""
        if self.ended:
            return False
        self._cancelled = True
        self._runtime.call_soon(self._cancel)
        return True

    def _cancel(self) -> None:
        if self._cancelled and self._wait is not None and not isinstance(self._wait, Work):
            self._go_on(self._wait)

    def step(self, step: Callable[..., Any], *arguments: object) -> None:
        """Run the coroutine until its next wait, which the loop makes, or until a helper works."""
        work = self._advance(step, *arguments)
        if work is None:
            return
        self._runtime.note_work(self)
        woken = getattr(_helper, "woken", None)
        if woken is not None:
            woken.append((self, work))
        elif not hand_over(partial(_serve, self, work)):
            with self._runtime.released():
                _serve(self, work)

    def do(self, work: Work[Any], woken: Woken) -> Work[Any] | None:
        """Do work in a helper, go on with the coroutine, and return its next work.

        ``woken`` gets the coroutines that this wakes.
        """
        step = work.done(self._steps)
        if self._cancelled:
            self._cancelled = False
            step = partial(self._steps.throw, asyncio.CancelledError())
        _helper.woken = woken
        try:
            return self._advance(step)
        finally:
            _helper.woken = None

    def _advance(self, step: Callable[..., Any], *arguments: object) -> Work[Any] | None:
        """Run the coroutine until its next wait, or until the work that it returns."""
        runtime = self._runtime
        try:
            if self._locked:
                with runtime.step:
                    wait = step(*arguments)
                    self._wait = wait
                    if isinstance(wait, Work):
                        return wait
                    if isinstance(wait, Wait):
                        wait.resume = partial(self._go_on, wait)
                        if wait.here and not self._cancelled:
                            wait.resume = partial(runtime.step.follow, wait.resume)
                            return None
                        wait.resume = partial(runtime.call_soon, wait.resume)
            else:
                self._wait = wait = step(*arguments)
                if isinstance(wait, Work):
                    return wait
        except StopIteration as end:
            self.settle(end.value, None)
        except BaseException as error:  # whoever waits for the handle gets it
            self.settle(None, error)
        else:
            if runtime.runs_here:
                self._begin_to_wait(wait)
            else:
                runtime.call_soon(self._begin_to_wait, wait)
        return None

    def _begin_to_wait(self, wait: Any) -> None:
        """Have the loop end a wait by its event, or at its time."""
        if self._wait is not wait:
            return  # it has ended
        if self._cancelled:
            self._go_on(wait)
        elif not isinstance(wait, Wait):
            wait.add_done_callback(self._go_on)  # a future of asyncio
        elif wait.is_closed():
            self._go_on(wait)
        elif self._has_come(wait):  # the descriptor may not report it again
            wait.woken = True
            self._runtime.started().call_soon(self._go_on, wait)
        elif self._wait is wait and wait.until is not None:
            wait.timer = self._runtime.started().call_at(wait.until, self._go_on, wait)

    def _has_come(self, wait: Wait) -> bool:
        """Return True if the event of a wait has come; else have the loop see it.

        An error, of a bad descriptor or of the poll, ends the wait.
        """
        try:
            if wait.poll is not None and wait.poll(0):
                return True
            if isinstance(wait.fd, int):
                self._runtime.started().descriptors.watch(wait.fd, wait.events, self._see)
        except Exception as error:
            self._wait = None
            if wait.timer is not None:
                wait.timer.cancel()
            self.step(self._steps.throw, error)
        return False

    def _see(self) -> None:
        """Go on after the event of a descriptor, which is watched no longer."""
        wait = self._wait
        if wait.poll is not None and not self._has_come(wait):
            return
        if wait.timer is not None:
            wait.timer.cancel()
        wait.woken = True
        self._wait = None
        self.step(self._steps.send, None)

    def _go_on(self, wait: Any) -> None:
        """Go on after a wait, in the loop."""
        if self._wait is not wait:
            return  # something else has ended it
        self._wait = None
        if isinstance(wait, Wait):
            if wait.timer is not None:
                wait.timer.cancel()
            if isinstance(wait.fd, int):
                self._runtime.started().descriptors.unwatch(wait.fd, wait.events, self._see)
        if self._cancelled:
            self._cancelled = False
            self.step(self._steps.throw, asyncio.CancelledError())
        else:
            self.step(self._steps.send, None)


#: Coroutines that a helper's step has woken, and that have work done.
Woken: TypeAlias = "deque[tuple[Handle[Any], Work[Any]]]"
#: Its ``woken`` is that of the present step.
_helper = threading.local()


def _serve(handle: Handle[Any], work: Work[Any]) -> None:
    """Do the work of a coroutine in a helper, then its next work.

    After the last one this helper does the work of the coroutine that it has woken last, since a
    change of threads costs more than most work. That is the next work of the same queue. Other
    helpers do the work of the others, such as a write of rows that this helper has filled.
    """
    woken: Woken = deque()
    while True:
        following = handle.do(work, woken)
        if following is not None:
            work = following
        elif woken:
            handle, work = woken.pop()
        else:
            return
        while woken and hand_over(partial(_serve, *woken[0])):
            woken.popleft()


class Descriptors(selectors.EpollSelector):
    """The descriptors of a loop: those of `Wait`, and those that the loop itself watches.

    An event of a `Wait` goes on with its coroutine immediately. By the loop's own readers it would
    take two rounds of the loop, a future and a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.epoll.fromfd(os.dup(self.fileno()))  # the same queue of events
        # Events and their calls, by descriptor.
        self._calls = dict[int, list[tuple[int, Callable[[], object]]]]()
        self._masks = dict[int, int]()  # the events that are requested now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Make the calls whose events have come, and return the loop's own events."""
        ready = list[tuple[selectors.SelectorKey, int]]()
        for fd, events in self._poll.poll(timeout):
            if fd in self._masks:
                self._see(fd, events)
            elif key := self.get_map().get(fd):
                ready.append((key, key.events))
        return ready

    def _see(self, fd: int, events: int) -> None:
        calls = self._calls[fd]
        for each in tuple(calls):
            mask, call = each
            # A call before may have forgotten the descriptor, or ended another wait.
            if events & (mask | select.EPOLLHUP | select.EPOLLERR) and each in calls:
                calls.remove(each)
                _report(call)  # most coroutines wait for the same event again
        self._renew(fd)

    def watch(self, fd: int, events: int, call: Callable[[], object]) -> None:
        """Make a call once at an event of a descriptor. Runs in the loop."""
        self._calls.setdefault(fd, []).append((events or select.EPOLLRDHUP, call))
        self._renew(fd)

    def _renew(self, fd: int) -> None:
        """Request the events of a descriptor that are watched, and no others."""
        mask = 0
        for events, _ in self._calls.get(fd, ()):
            mask |= events
        before = self._masks.get(fd, 0)
        if mask == before:
            return
        if not mask:
            self._drop(fd)
            return
        if before:
            self._poll.modify(fd, mask)
        else:
            self._poll.register(fd, mask)
        self._masks[fd] = mask

    def _drop(self, fd: int) -> None:
        """Request no event of a descriptor."""
        self._calls.pop(fd, None)
        self._masks.pop(fd, None)
        with suppress(OSError):  # it is closed
            self._poll.unregister(fd)

    def unwatch(self, fd: int, events: int, call: Callable[[], object]) -> None:
        """Make the call of `watch` no longer."""
        with suppress(ValueError):  # it was forgotten
            self._calls.get(fd, []).remove((events or select.EPOLLRDHUP, call))
        self._renew(fd)

    def forget(self, fd: int) -> None:
        """End all waits for a descriptor that is closed next. Runs in the loop."""
        calls = self._calls.get(fd, [])
        self._drop(fd)
        while calls:
            _report(calls.pop()[1])

    def close(self) -> None:
        """Close the selector's descriptors."""
        self._poll.close()
        super().close()


class Loop(asyncio.SelectorEventLoop):
    """The loop of a runtime, whatever policy the process has set."""

    def __init__(self) -> None:
        self.descriptors = Descriptors()
        self.ident = 0  # of the thread that runs it
        super().__init__(self.descriptors)

    def run_forever(self) -> None:
        """Run until `stop`."""
        self.ident = get_ident()
        try:
            super().run_forever()
        finally:
            self.ident = 0


class Runtime:
    """One loop in one thread, which starts at the first wait that no caller's thread makes.

    Args:
        loop: a loop that the caller runs, as tests do; None: a new loop in a thread.

    Attributes:
        step: the context of each step of a coroutine.
        process: the process that made it. In a fork of it nothing runs.
    """

    def __init__(self, loop: Loop | None = None) -> None:
        self.step = Step()
        self.process = this_process()
        self._loop = loop
        #: Returns the time of the loop, in seconds.
        self.time: Callable[[], float] = monotonic if loop is None else loop.time
        self._working = set[Handle[Any]]()  # whose work helpers do
        #: Each has a method `shut`, which the end of the interpreter calls with the lock.
        self.shut_at_exit = WeakSet[Any]()

    @property
    def lock(self) -> Any:
        """Return the lock of steps. A thread that has it may take it again."""
        return self.step.lock

    @contextmanager
    def released(self) -> Iterator[None]:
        """Return a context in which this thread does not have the lock, if it had it: for code of
        others and for copies, which need no lock of a runtime."""
        step = self.step
        if not step.lock._is_owned():
            yield
            return
        # The methods by which a condition of Python releases its lock, however often it was taken.
        depth = step.depth
        step.depth = 0
        state = step.lock._release_save()
        try:
            yield
        finally:
            step.lock._acquire_restore(state)
            step.depth = depth

    @property
    def runs_here(self) -> bool:
        """Return True in the thread of the loop."""
        return self._loop is not None and self._loop.ident == get_ident()

    # --- coroutines

    def run(
        self,
        function: Callable[..., Steps[T]],
        *arguments: object,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Return the result of a coroutine, whose waits are the calling thread's own.

        No other thread has a part in them, so an answer of a few microseconds takes no longer. Such
        a coroutine waits for nothing but `Wait` and `Work`. A helper makes and runs it for the main
        thread; if that is interrupted, ``undo(result)`` reverts it. A thread that has the lock runs
        it itself.
        """
        run = partial(self._run, function, arguments)
        return run() if self.lock._is_owned() else uninterrupted(run, undo)

    def _run(self, function: Callable[..., Steps[T]], arguments: tuple[object, ...]) -> T:
        steps = function(*arguments)
        step: Callable[[], Any] = partial(steps.send, None)
        interrupted = False
        while True:
            woken = None
            try:
                with self.step:
                    wait = step()
                    if isinstance(wait, Wait) and wait.fd is None:
                        woken = locked()
                        wait.resume = woken.release
            except StopIteration as end:
                result: T = end.value
                return result

            if isinstance(wait, Work):
                step = wait.done(steps)
            else:
                self._wait_here(wait, woken)
                step = partial(steps.send, None)
            if abandoned() and not interrupted:
                interrupted = True  # once, so that the coroutine can wait while it ends
                step = partial(steps.throw, KeyboardInterrupt())

    def _wait_here(self, wait: Wait, woken: threading.Lock | None) -> None:
        """Make a wait in the caller's thread. ``woken``: released by `Wait.wake`; None: the wait
        has a descriptor."""
        left = -1.0 if wait.until is None else max(0.0, wait.until - self.time())
        if wait.fd is None:
            assert woken is not None
            woken.acquire(timeout=left)
        elif wait.poll is not None:
            wait.woken = wait.poll(max(-1, ceil(1e3 * left)))
        elif not wait.is_closed():
            poll = select.poll()
            poll.register(wait.fd, wait.events)
            if poll.poll(1e3 * left if left >= 0 else None):
                wait.woken = True

    def change(self, work: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Return ``work()``, run as a step where no interrupt reaches it.

        If the caller is interrupted, ``undo(result)`` reverts it (see `uninterrupted`). A thread
        that has the lock runs ``work`` itself. Coroutines go on that wait for what it ended.
        """

        def step() -> T:
            with self.step:
                return work()

        return step() if self.lock._is_owned() else uninterrupted(step, undo)

    def start(self, steps: Steps[T], locked: bool = True) -> Handle[T]:
        """Run a coroutine here until its first wait, then in the loop; return its end.

        The main thread, where an interrupt may cut a step in two, leaves all steps to the loop,
        unless it has the lock.

        Args:
            locked: False for a coroutine that changes no state which other threads change, and
                that nothing wakes but descriptors and the time: it runs without the lock.
        """
        handle = Handle(self, steps, locked)
        handle.begin()
        return handle

    async def breathe(self, since: float) -> float:
        """Let others take the lock if it was held for `HOLD` seconds since a time of
        `time.perf_counter`, so that a long step delays no urgent work; return the time since which
        it is held."""
        if perf_counter() < since + HOLD:
            return since
        await Wait(until=self.time() + YIELD)
        return perf_counter()

    async def together(self, some: Sequence[Steps[T]]) -> list[T]:
        """Run coroutines at the same time, and return their results: the last one here, so by the
        caller's thread if it waits, and the others in the loop."""
        if not some:
            return []
        *others, last = some
        handles = [self.start(each) for each in others]
        result = await last
        return [*[await handle for handle in handles], result]

    # --- the loop

    def started(self, error: type[PortaKVError] = TransferError) -> Loop:
        """Return the loop, which runs. Raises ``error`` if the system gives no thread, and
        `OSError` if it gives no descriptor."""
        if self._loop is None:
            with self.lock:
                if self._loop is None:
                    self._loop = self._new_loop(error)
        return self._loop

    def _new_loop(self, error: type[PortaKVError]) -> Loop:
        loop = Loop()
        thread = threading.Thread(target=loop.run_forever, name="portakv loop", daemon=True)
        try:
            resources.start_thread(thread, error)
        except PortaKVError:
            loop.close()
            raise
        return loop

    def call_soon(self, call: Callable[..., object], *arguments: object) -> None:
        """Make a quick call in the loop. Any thread may ask for it."""
        self.started().call_soon_threadsafe(call, *arguments)

    # --- work that blocks

    def note_work(self, handle: Handle[Any]) -> None:
        """Let the end of the interpreter wait for a coroutine that has work done."""
        if handle not in self._working:
            if not self._working:
                # Registered again: memory that the work uses must not go before its end.
                atexit.unregister(self._end_work)
                atexit.register(self._end_work)
            self._working.add(handle)
            handle.on_end(partial(self._working.discard, handle))

    def _end_work(self) -> None:
        """Cancel the coroutines that have work done, and wait for their ends."""
        if self.process.forked:
            return
        until = self.time() + EXIT
        with self.step:
            # A copy of the references by one call: other threads add some meanwhile.
            for each in [reference() for reference in tuple(cast(Any, self.shut_at_exit).data)]:
                if each is not None:
                    each.shut()
        for handle in tuple(self._working):
            # At the exit some Pythons give the loop no thread; what works looks at its mark.
            with suppress(PortaKVError, RuntimeError, OSError):
                handle.cancel()
        for handle in tuple(self._working):
            handle.wait(max(0.0, until - self.time()))

    # --- waits

    def wake(self, wait: Wait) -> None:
        """End a wait. Any thread but the main one may ask for it."""
        with self.step:
            wait.wake()


class TaskGroup:
    """Coroutines that a runtime runs together, and that end together.

    Args:
        failed: is called with the error of a coroutine that fails.
    """

    def __init__(self, runtime: Runtime, failed: Callable[[BaseException], object]) -> None:
        self.runtime = runtime
        self._failed = failed
        self._running = set[Handle[None]]()
        self.closed = False

    def __len__(self) -> int:
        return len(self._running)

    def start(self, steps: Steps[None], locked: bool = True) -> Handle[None]:
        """Start a coroutine, which `close` cancels; see `Runtime.start`."""
        handle = self.runtime.start(self._noted(steps), locked)
        self._running.add(handle)
        handle.on_end(partial(self._running.discard, handle))
        if self.closed:  # by another thread meanwhile
            handle.cancel()
        return handle

    async def _noted(self, steps: Steps[None]) -> None:
        try:
            await steps
        except Exception as error:  # the others go on
            with self.runtime.released():
                self._failed(error)

    def end(self) -> None:
        """Cancel all coroutines; wait at most `EXIT` seconds for their ends, except in the loop
        itself. Does nothing in a forked process."""
        if not self.runtime.process.forked:
            ended = self.runtime.start(self.close())
            ended.wait(0.0 if self.runtime.runs_here else EXIT)

    async def close(self) -> None:
        """Cancel all coroutines, and wait for their ends, also if the caller is interrupted."""
        self.closed = True
        for handle in tuple(self._running):
            handle.cancel()
        ended = set[Handle[None]]()
        while waiting := self._running - ended:  # one that ends may start another
            for handle in waiting:
                # What the coroutines use is given up after this, and only once.
                with suppress(asyncio.CancelledError, KeyboardInterrupt):
                    await handle
            ended |= {handle for handle in waiting if handle.done()}


_runtimes = list[Runtime]()  # the first one is that of this process


def runtime() -> Runtime:
    """Return the runtime of this process. It begins without a thread, so the first of several
    threads wins."""
    if not _runtimes:
        _runtimes.append(Runtime())
    return _runtimes[0]


def _forget() -> None:
    """Begin anew in a forked process, which has neither the thread nor the end of any step."""
    for each in _runtimes:
        each.step = Step()  # a thread of the parent may have the other one
    _runtimes.clear()


os.register_at_fork(after_in_child=_forget)
