# SPDX-License-Identifier: Apache-2.0
"""Run threads and loops one at a time, in an order that a seed gives, by a clock of its own.

`Schedule.run` runs a scenario and all threads that it starts. A thread runs until it waits for a
lock, a descriptor or the time, and now and then it is preempted at a function call. The seed then
chooses the next thread among those that can go on. If none can, the clock jumps to the next end of
a wait. So one seed is one order, a pause takes no time, and a deadlock is an error. Only the order
of sets of objects, which depends on their addresses, may make two runs of a seed differ.

The threads belong to simulated processes. Each process has a separate `Runtime` and separate
connections. `Schedule.kill` ends a process between any two steps of it.

Nothing in the project knows of it: `simulated` replaces locks, threads, clocks and polls of Python.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import gc
import logging
import math
import os
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from random import Random
from threading import get_ident
from traceback import clear_frames
from types import FrameType, FunctionType
from typing import Any, TypeVar

from portakv.graph import alarms
from portakv.host.shared import process_here, process_space
from portakv.host.shared import started as _host_started
from portakv.migrate import shared_memory
from portakv.runtime import interrupts
from portakv.tasks import Runtime, runtime
from portakv.tasks.runtime import Loop
from support.seeded_loop import ShuffledLoop
from support.waits import LIMIT

T = TypeVar("T")

_allocate_lock = _thread.allocate_lock
_lock_of_python = threading.Lock
_rlock_of_python = threading.RLock
_thread_of_python = threading.current_thread
_epoll = select.epoll
_poll = select.poll
_Socket = socket.socket
_open = os.open
_close = os.close
_fdopen = os.fdopen
_eventfd = os.eventfd
_monotonic = time.monotonic
_pause = time.sleep
_raise_in: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = [ctypes.c_ulong, ctypes.py_object]

#: Seconds by which a look at the clock moves it, so that a loop of looks ends.
TICK = 1e-6
#: The time at which a schedule has hung, and the numbers of turns of one that does not end, and of
#: its calls of functions if these are counted.
END = 10_000.0
MOST = 20_000
MOST_CALLS = 1_000_000
#: Seconds of the machine's clock after which a thread that keeps its turn never gives it back.
TURN = 5.0
#: The number of the first process, of which the system has none.
FIRST = 1 << 23
#: Chances of a preemption at a call of a function. A schedule draws one of them.
PREEMPTIONS = (0.0, 3e-3, 0.03)
#: The share of preemptions after which a thread goes on late, and the seconds.
STALL = 0.05
STALLS = (1e-3, 0.02, 0.3)
#: Preempted are calls of functions in this folder.
FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(interrupts.__file__)))
#: The file whose calls depend on what the machine has mapped: they would change the order.
OF_MACHINE = "shared_memory.py"


class Ended(BaseException):
    """Ends a thread of a process that was killed, or of a schedule that is over."""


class Stuck(AssertionError):
    """All threads wait for each other."""


class Process:
    """A simulated process: its runtime, and the descriptors that its end closes."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.dead = False
        self.runtime = Runtime()
        self.sockets = list[_Socket]()
        self.files = set[int]()

    def kill(self) -> None:
        """Close the connections and the files, as the system does.

        No other process gets their numbers, which addresses contain.
        """
        self.dead = True
        nothing = _open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for one in self.sockets:
            if one.fileno() >= 0:
                os.dup2(nothing, one.fileno(), inheritable=False)
        for file in self.files:
            os.dup2(nothing, file, inheritable=False)
        _close(nothing)

    def end(self) -> None:
        """Give back the numbers of a process that was killed."""
        for one in self.sockets:
            one.close()
        for file in self.files:
            _close(file)


class Thread:
    """A thread of a schedule, with the part of `threading.Thread` that the project uses."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name or "thread"
        self.daemon = daemon
        self.ident: int | None = None
        self.process: Process = running().process
        self.over = False
        self.turn = _allocate_lock()
        self.turn.acquire()
        self.until = math.inf
        self.is_ready: Callable[[], object] = bool  # a thread that has not begun is made ready
        self._call = partial(target or bool, *args, **(kwargs or {}))

    def start(self) -> None:
        """Begin the thread at its first turn; none, if what is left of a schedule wants one."""
        if not is_scheduled():
            return
        self.is_ready = _always
        current().threads.append(self)
        _thread.start_new_thread(self.serve, ())
        current().preempt()

    def goes_on(self) -> bool:
        """Return True if the wait of the thread has ended; also by an error, which it meets."""
        try:
            return bool(self.is_ready())
        except Exception:
            return True

    def is_alive(self) -> bool:
        """Return True until the thread has ended."""
        return self.ident is not None and not self.over

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread."""
        current().wait(lambda: self.over, timeout)

    def serve(self) -> None:
        schedule = current()
        self.turn.acquire()
        self.ident = get_ident()
        schedule.by_ident[self.ident] = self
        try:
            if not self.process.dead and not schedule.over:
                if schedule.preemption:
                    sys.settrace(schedule.look)
                self._call()
        except Ended:
            pass
        except BaseException as error:
            schedule.fail(error)
        finally:
            sys.settrace(None)
            self._call = partial(bool)  # the frame of this function outlives the schedule
            self.is_ready = _always
            self.over = True
            schedule.leave(self)


def _always() -> bool:
    return True


class Lock:
    """A lock of threads of a schedule. No other thread waits for it: that raises `Ended`."""

    def __init__(self) -> None:
        self._held = False
        self._holder: Thread | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as `threading.Lock.acquire` does."""
        if self._held and blocking and timeout:
            if not is_scheduled() or current().over:
                raise Ended
            current().wait(self._is_free, None if timeout < 0 else timeout)
        if not self._is_free():
            return False
        self._held = True
        self._holder = running() if is_scheduled() else None
        return True

    def _is_free(self) -> bool:
        """Return True if no process that lives has the lock: all have the locks of modules."""
        return not self._held or (self._holder is not None and self._holder.process.dead)

    def release(self) -> None:
        """Release the lock."""
        assert self._held or not is_scheduled(), "a lock that is free was released"
        self._held = False
        self._holder = None

    def locked(self) -> bool:
        """Return True while the lock is held."""
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class RLock:
    """A lock that its owner may take again, with the methods that a condition uses."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: int | None = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as `threading.RLock.acquire` does."""
        if self._owner != get_ident():
            if not self._lock.acquire(blocking, timeout):
                return False
            self._owner = get_ident()
            self._count = 0
        self._count += 1
        return True

    def release(self) -> None:
        """Release the lock once."""
        self._count -= 1
        if not self._count:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return self._owner == get_ident()

    def _release_save(self) -> int:
        count = self._count
        self._count = 1
        self.release()
        return count

    def _acquire_restore(self, count: int) -> None:
        self.acquire()
        self._count = count


class Poll:
    """A `select.poll` or `select.epoll` by which only its own thread waits."""

    def __init__(self, real: Any, unit: float) -> None:
        self._real = real
        self._unit = unit
        self.register = real.register
        self.unregister = real.unregister
        self.modify = real.modify

    def poll(self, timeout: float | None = None, most: int = -1) -> list[tuple[int, int]]:
        """Return the events, or none once the time is over."""
        seconds = None if timeout is None or timeout < 0 else timeout * self._unit
        if is_scheduled() and seconds != 0:
            current().wait(partial(self._real.poll, 0), seconds)
        events: list[tuple[int, int]] = self._real.poll(0)
        if events and is_scheduled():
            current().random.shuffle(events)
        return events

    def close(self) -> None:
        """Close the descriptor."""
        self._real.close()

    def fileno(self) -> int:
        """Return the descriptor."""
        number: int = self._real.fileno()
        return number


class Epoll(Poll):
    """A `select.epoll`."""

    def __init__(self, real: Any = None) -> None:
        super().__init__(real or _epoll(), 1.0)

    @classmethod
    def fromfd(cls, fd: int) -> Epoll:
        """Return the `select.epoll` of a descriptor."""
        return cls(_epoll.fromfd(fd))


class Socket(_Socket):
    """A socket that is closed with its process."""

    def __init__(self, *terms: Any, **named: Any) -> None:
        super().__init__(*terms, **named)
        if is_scheduled():
            running().process.sockets.append(self)


class ScheduledLoop(ShuffledLoop):
    """A loop of a process of the schedule."""

    _ssock: Socket
    _csock: Socket

    def __init__(self) -> None:
        super().__init__(current().random)
        current().loops.append(self)
        for one in (self._ssock, self._csock):  # only this process has them
            running().process.sockets.remove(one)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """End the schedule by the error of a callback."""
        error = context.get("exception") or AssertionError(context["message"])
        if isinstance(error, Ended):
            raise error
        current().fail(error)


class _Files(dict[str, bool]):
    """By a file of code: calls of its functions are places for a preemption."""

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(FOLDER) and not file.endswith(OF_MACHINE)
        return self[file]


_PREEMPTS = _Files()


class Schedule:
    """The threads of a scenario, of which one runs at a time.

    Attributes:
        now: the time, in seconds.
        random: gives the order. A scenario draws its faults from it.
        preemption: the chance of a preemption at each call of a function.
    """

    def __init__(self, seed: int, preemption: float | None = None) -> None:
        self.now = 1000.0
        self.random = Random(seed)
        self.preemption = self.random.choice(PREEMPTIONS) if preemption is None else preemption
        self.before_preemption = self._drawn_calls() if self.preemption else math.inf
        self.threads = list[Thread]()
        self.by_ident = dict[int, Thread]()
        self.loops = list[Loop]()
        self.processes = list[Process]()
        self.error: BaseException | None = None
        self.over = False
        self.chooses = False  # meanwhile conditions of threads are no place for a preemption
        self.switches = 0
        self.calls = 0
        self.chosen: Thread | None = None  # has its turn
        self._all_over = _allocate_lock()
        self._all_over.acquire()
        self.first: Process | None = None

    # --- the scenario

    def run(self, scenario: Callable[[Schedule], object]) -> None:
        """Run a scenario to its end, in a thread of the process "test"; raise the first error."""
        global _current
        _current = self
        files = _open_files()
        try:
            self.first = self.process("test")
            main = Thread(target=self._main, args=(scenario,))
            main.is_ready = _always
            self.threads.append(main)
            self.chosen = main
            _thread.start_new_thread(main.serve, ())
            main.turn.release()
            self._await_end()
        finally:
            for loop in self.loops:
                with suppress(RuntimeError):
                    loop.close()
            self._collect()
            _current = None
        if self.error is not None:
            raise self.error
        if not any(process.dead for process in self.processes):
            # Errors in the log may still hold memory.
            left = {file for file in _open_files() - files if "memfd" not in file[1]}
            assert not left, f"descriptors were left open: {left}"

    def _await_end(self) -> None:
        """Wait until all threads have ended. End one that loops, and neither waits nor ends."""
        before = -1
        until = _monotonic() + LIMIT
        while not self._all_over.acquire(timeout=TURN):
            thread = self.chosen
            if thread is not None and thread.ident is not None and before == self.switches:
                self.fail(Stuck(f"{thread.name} loops for {TURN:g} s, and waits for nothing."))
                _raise_in(thread.ident, Ended)
            before = self.switches
            assert _monotonic() < until, "a thread blocks outside of the schedule"

    def _collect(self) -> None:
        """End the coroutines of processes that were killed: they meet closed files there."""
        hook = sys.unraisablehook
        sys.unraisablehook = bool  # closed files are met there
        logging.disable()
        self.by_ident.clear()
        self.threads.clear()
        self.loops.clear()
        if self.error is not None:
            clear_frames(self.error.__traceback__)
        for process in self.processes:
            del process.runtime
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that have not begun
            gc.collect()
        for process in self.processes:
            if process.dead or self.error is not None:
                process.end()
        logging.disable(logging.NOTSET)
        sys.unraisablehook = hook

    def _main(self, scenario: Callable[[Schedule], object]) -> None:
        try:
            scenario(self)
        except BaseException as error:
            self.fail(error)
        self.over = True  # all other threads end, each at its wait

    def process(self, name: str) -> Process:
        """Return a new process."""
        made = Process(name, FIRST + len(self.processes))
        self.processes.append(made)
        return made

    def call(self, process: Process, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function that a thread of a process calls."""
        results = list[T]()
        errors = list[BaseException]()

        def act() -> None:
            try:
                results.append(function(*arguments))
            except Exception as error:
                errors.append(error)

        self.begin(process, act).join()
        if errors:
            raise errors[0]
        return results[0]

    def begin(self, process: Process, function: Callable[..., object], *arguments: Any) -> Thread:
        """Begin to call a function in a new thread of a process."""
        thread = Thread(target=function, args=arguments)
        thread.process = process
        thread.start()
        return thread

    def kill(self, process: Process) -> None:
        """End a process: no thread of it takes a further step, and the system closes its files."""
        process.kill()

    def cut(self, process: Process) -> None:
        """End all connections of a process, which goes on."""
        for one in process.sockets:
            with suppress(OSError):  # it is closed, or no connection
                one.getpeername()
                one.shutdown(socket.SHUT_RDWR)

    def sleep(self, seconds: float) -> None:
        """Let time pass for this thread."""
        self.wait(bool, seconds)

    def time(self) -> float:
        """Return the time, which goes on by `TICK`."""
        self.now += TICK
        return self.now

    # --- turns

    def wait(self, is_ready: Callable[[], object], seconds: float | None = None) -> None:
        """Give the turn to other threads until a condition holds, at most for some seconds."""
        thread = running()
        thread.is_ready = is_ready
        thread.until = math.inf if seconds is None else self.now + max(0.0, seconds)
        following = self._chosen()
        if following is not thread:
            following.turn.release()
            thread.turn.acquire()
        thread.until = math.inf
        if self.over or thread.process.dead:
            raise Ended

    def preempt(self) -> None:
        """Let another thread go on, if the seed chooses one."""
        self.wait(_always)

    def look(self, frame: FrameType, event: str, argument: object) -> None:
        """Preempt the thread at some calls of functions of the project. End one that loops.

        Each call of each function comes here, so the next preemption is drawn as a number of calls.
        """
        self.calls += 1
        if self.calls > MOST_CALLS and not self.over and not self.chooses:
            self.fail(Stuck(f"{running().name} does not end after {MOST_CALLS} calls."))
            raise Ended
        self.before_preemption -= _PREEMPTS[frame.f_code.co_filename]
        if self.before_preemption >= 0.0 or self.over or self.chooses:
            return
        self.before_preemption = self._drawn_calls()
        if self.random.random() < STALL:
            self.sleep(self.random.choice(STALLS))
        else:
            self.preempt()

    def _drawn_calls(self) -> float:
        """Return the calls before a preemption, each of which has the same chance of one."""
        return math.floor(math.log(1.0 - self.random.random()) / math.log1p(-self.preemption))

    def leave(self, thread: Thread) -> None:
        """Give the turn to another thread at the end of this one."""
        self.threads.remove(thread)
        self.by_ident.pop(get_ident(), None)
        if self.threads:
            self._chosen().turn.release()
        else:
            self._all_over.release()

    def _chosen(self) -> Thread:
        """Return the thread that runs next."""
        self.chooses = True
        try:
            self.chosen = self._choice()
            return self.chosen
        finally:
            self.chooses = False

    def _choice(self) -> Thread:
        self.switches += 1
        living = [one for one in self.threads if not one.process.dead]
        if not self.over:
            ready = [one for one in living if one.goes_on()]
            if ready and self.switches < MOST:
                return self.random.choice(ready)
            until = min([one.until for one in living], default=math.inf)
            if until < END and self.switches < MOST:
                self.now = max(self.now, until)
                return self.random.choice([one for one in living if one.until <= self.now])
            names = ", ".join(one.name for one in living)
            self.fail(Stuck(f"These threads wait for each other, or do not end: {names}."))
        return self.threads[0]  # each ends at its wait

    def fail(self, error: BaseException) -> None:
        """Note the first error of a thread, which ends the schedule."""
        if not self.over:
            self.error = error
        self.over = True


def _open_files() -> set[tuple[str, str]]:
    """Return the numbers of the open files, each with what it is."""
    files = set[tuple[str, str]]()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return files


def _report_unless_ended(unraisable: Any) -> None:
    if not isinstance(unraisable.exc_value, Ended):
        sys.__unraisablehook__(unraisable)


class LoggedErrors(logging.Handler):
    """Ends a schedule by an exception that the project logs.

    Records live longer than a schedule. With their errors, which are taken out here, they would
    hold objects of processes that were killed. Such an object closes its descriptor late, when the
    number is that of another file.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not is_scheduled():
            return
        error = None if record.exc_info is None else record.exc_info[1]
        if record.exc_info is not None:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.msg = record.getMessage()
        record.args = record.exc_info = None
        if isinstance(error, Exception) and not running().process.dead:
            current().fail(error)


_current: Schedule | None = None


def current() -> Schedule:
    """Return the schedule that runs."""
    assert _current is not None
    return _current


def running() -> Thread:
    """Return the thread that has its turn."""
    schedule = current()
    thread = schedule.by_ident.get(get_ident())
    if thread is None:  # the first one is about to be made
        first = Thread.__new__(Thread)
        assert schedule.first is not None
        first.process = schedule.first
        return first
    return thread


def is_scheduled() -> bool:
    """Return True in a thread of the schedule that runs."""
    return _current is not None and get_ident() in _current.by_ident


# ------------------------------------------------------------------------------------------------
# What `simulated` puts in the place of Python's and the project's functions.


def _time() -> float:
    return _current.time() if is_scheduled() else _monotonic()  # type: ignore[union-attr]


def _sleep(seconds: float) -> None:
    if is_scheduled():
        current().sleep(seconds)
    else:
        _pause(seconds)


def _new_lock() -> Any:
    """Return a lock; threads of other libraries wait by Python's own."""
    return Lock() if is_scheduled() else _allocate_lock()


def _new_poll() -> Poll:
    return Poll(_poll(), 1e-3)


def _current_thread() -> Any:
    return running() if is_scheduled() else _thread_of_python()


def _hand_over(call: Callable[[], object]) -> bool:
    """Have a thread of this process make a call."""
    Thread(target=call, name=interrupts.NAME).start()
    return True


def _runtime() -> Runtime:
    own: Runtime = running().process.runtime
    return own


def _started(number: int) -> int | None:
    """Return the start of a process: 1 of each process of the schedule that lives."""
    if number < FIRST or _current is None:
        return _host_started(number)
    return None if _current.processes[number - FIRST].dead else 1


def _process_here() -> tuple[int, int, int]:
    return process_space(), running().process.number, 1


def _open_file(*terms: Any, **named: Any) -> int:
    file = _open(*terms, **named)
    if is_scheduled():
        running().process.files.add(file)
    return file


def _adopt(file: int, *terms: Any, **named: Any) -> Any:
    """Open a file of Python, which closes the descriptor."""
    if is_scheduled():
        running().process.files.discard(file)
    return _fdopen(file, *terms, **named)


def _new_event(*terms: Any) -> int:
    file = _eventfd(*terms)
    if is_scheduled():
        running().process.files.add(file)
    return file


def _close_file(file: int) -> None:
    if is_scheduled() and running().process.dead:
        return  # it is closed, and is given back later
    for process in [] if _current is None else _current.processes:
        process.files.discard(file)
    _close(file)


def _no_watch(source: object) -> None:
    """Watch nothing for warnings: one thread does that for all processes of a schedule."""


def _no_exit(call: Callable[..., object], *arguments: object, **named: object) -> object:
    return call


def _no_longer(call: Callable[..., object]) -> None:
    """Unregister nothing, since nothing is registered."""


@contextmanager
def simulated() -> Iterator[None]:
    """Let threads, locks, clocks and polls be those of schedules."""
    pairs: list[tuple[Any, Any]] = [
        (threading.Thread, Thread),
        (_thread_of_python, _current_thread),
        (_allocate_lock, _new_lock),
        (_lock_of_python, Lock),
        (_rlock_of_python, RLock),
        (_monotonic, _time),
        (_pause, _sleep),
        (_epoll, Epoll),
        (_poll, _new_poll),
        (socket.socket, Socket),
        (os.open, _open_file),
        (_fdopen, _adopt),
        (_eventfd, _new_event),
        (os.close, _close_file),
        (atexit.register, _no_exit),
        (atexit.unregister, _no_longer),
        (interrupts.hand_over, _hand_over),
        (alarms.watch, _no_watch),
        (runtime, _runtime),
        (_host_started, _started),
        (process_here, _process_here),
        (Loop, ScheduledLoop),
    ]
    _replace({id(before): after for before, after in pairs})
    # Memory is the test's own, whichever process of the schedule shares it.
    vars(shared_memory)["process_here"] = process_here
    # What tests before have left is collected, and all that is alive is read. Then it is frozen:
    # each schedule collects what it leaves, and not among all objects of a process of tests.
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.unfreeze()
    locks = _replace_locks()
    gc.freeze()
    hook = sys.unraisablehook
    sys.unraisablehook = _report_unless_ended
    # One thread runs at a time. A turn that goes to a thread of another core costs twice as much.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    errors = LoggedErrors()
    logging.getLogger("portakv").addHandler(errors)
    gc.disable()  # else it would run what ends objects in any thread
    try:
        yield
    finally:
        sys.unraisablehook = hook
        os.sched_setaffinity(0, cores)
        gc.enable()
        if not frozen:
            gc.unfreeze()
        logging.getLogger("portakv").removeHandler(errors)
        _replace({id(after): before for before, after in pairs})
        for module, name, lock in locks:
            setattr(module, name, lock)


#: Modules of Python whose names are replaced. All modules of the project are, too.
_OF_PYTHON = {"threading", "time", "select", "socket", "os", "atexit", "asyncio.base_events"}


def _replace(replaced: dict[int, Any]) -> None:
    """Replace objects, which are known by `id`, in modules, in their classes and functions."""
    for module in [*sys.modules.values()]:
        name = module.__name__
        if name in _OF_PYTHON or name.startswith("portakv"):
            _replace_in(vars(module), replaced)
        if name.startswith("portakv"):
            for value in [*vars(module).values()]:
                if isinstance(value, type) and value.__module__ == name:
                    _replace_in_class(value, replaced)
                elif getattr(value, "__module__", "") == name:
                    _replace_in_function(value, replaced)


def _replace_in(names: dict[str, Any], replaced: dict[int, Any]) -> None:
    for name, value in [*names.items()]:
        if id(value) in replaced:
            names[name] = replaced[id(value)]


def _replace_in_class(kind: type, replaced: dict[int, Any]) -> None:
    for name, value in [*vars(kind).items()]:
        if isinstance(value, staticmethod) and id(value.__func__) in replaced:
            setattr(kind, name, staticmethod(replaced[id(value.__func__)]))
        else:
            _replace_in_function(value, replaced)


def _replace_in_function(function: object, replaced: dict[int, Any]) -> None:
    """Replace defaults of a function, and those of the fields of a dataclass."""
    if not isinstance(function, FunctionType):
        return
    defaults = function.__defaults__ or ()
    if any(id(value) in replaced for value in defaults):
        function.__defaults__ = tuple(replaced.get(id(value), value) for value in defaults)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name.startswith("_dflt_") and id(cell.cell_contents) in replaced:
            cell.cell_contents = replaced[id(cell.cell_contents)]


def _replace_locks() -> list[tuple[Any, str, Any]]:
    """Replace the locks that modules and objects have already; return them with their places."""
    lock = type(_allocate_lock())
    rlock = type(_rlock_of_python())
    objects = gc.get_objects()
    own = {kind for kind in {*map(type, objects)} if str(kind.__module__).startswith("portakv")}
    holders = [one for one in objects if type(one) in own]
    modules = [one for one in sys.modules.values() if one.__name__.startswith("portakv")]
    holders += modules
    for module in modules:
        kinds = [one for one in vars(module).values() if isinstance(one, type)]
        # Before Python 3.12 a property that is cached has one lock for all objects.
        holders += [x for one in kinds for x in vars(one).values() if type(x) is cached_property]
    replaced = list[tuple[Any, str, Any]]()
    for holder in holders:
        for name, value in [*getattr(holder, "__dict__", {}).items()]:
            if isinstance(value, (lock, rlock)):
                replaced.append((holder, name, value))
                setattr(holder, name, Lock() if isinstance(value, lock) else RLock())
    return replaced


def judge(scenario: Callable[[Schedule], object], seeds: Iterable[int]) -> None:
    """Run a scenario in the schedule of each seed; the error of one has a note of its seed."""
    with simulated():
        for number, seed in enumerate(seeds):
            # The first one is not preempted while it imports what it needs.
            preemption = None if number else 0.0
            try:
                Schedule(seed, preemption).run(scenario)
            except Exception as error:
                raise AssertionError(f"The schedule of seed {seed} failed: {error}") from error
