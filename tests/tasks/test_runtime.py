# SPDX-License-Identifier: Apache-2.0
"""A coroutine begins in its caller's thread, goes on in the loop, and ends in one handle."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from support.interrupts import in_other_thread
from support.seeded_loop import WatchedLoop, run_seeded
from support.slot_cases import ended_well, forked
from support.waits import LIMIT, until

from portakv.errors import TransferError, TransferTimeout
from portakv.runtime import interrupts
from portakv.tasks import End, Handle, Limit, Runtime, Signal, TaskGroup, Wait, Work, runtime
from portakv.tasks.runtime import HANGUP, READ, WRITE


async def where(*waits: Wait) -> list[str]:
    """Return the names of the threads that run the steps between some waits."""
    names = [threading.current_thread().name]
    for wait in waits:
        await wait
        names.append(threading.current_thread().name)
    return names


def soon() -> Wait:
    return Wait(until=runtime().time() + 0.01)


def test_a_coroutine_that_waits_for_nothing_stays_in_its_callers_thread() -> None:
    def start() -> tuple[str, Handle[list[str]]]:
        return threading.current_thread().name, runtime().start(where())

    name, handle = in_other_thread(start)
    assert handle.done()
    assert handle.synchronize() == [name]


def test_the_rest_of_a_coroutine_runs_in_the_loop() -> None:
    names = in_other_thread(lambda: runtime().start(where(soon(), soon())).synchronize(LIMIT))
    assert names[0] != "portakv loop"
    assert names[1:] == ["portakv loop"] * 2


def test_the_main_thread_runs_no_step() -> None:
    """An interrupt would cut it in two."""
    assert runtime().start(where(soon())).synchronize(LIMIT) == ["portakv loop"] * 2


def test_run_waits_in_the_callers_thread() -> None:
    names = in_other_thread(lambda: runtime().run(where, soon(), soon()))
    assert len({*names}) == 1
    assert names[0] != "portakv loop"


def test_a_socket_that_is_closed_before_the_wait_begins_ends_it() -> None:
    """Another file may have its descriptor then."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held = threading.Event()
    runtime().call_soon(held.wait, LIMIT)

    async def see() -> tuple[bool, int]:
        woken = await Wait(here, READ, runtime().time() + LIMIT)
        return woken, here.fileno()

    with there:
        handle = in_other_thread(lambda: runtime().start(see()))
        here.close()
        held.set()
        assert handle.synchronize(LIMIT) == (True, -1)


def test_a_wake_ends_a_wait_for_a_descriptor() -> None:
    """The next wait for it ends by its event."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wait = Wait(here.fileno())

    async def see() -> list[bool]:
        return [await wait, await Wait(here.fileno(), READ, runtime().time() + LIMIT)]

    with here, there:
        handle = runtime().start(see())
        in_other_thread(lambda: runtime().wake(wait))
        there.send(b"x")
        assert handle.synchronize(LIMIT) == [True, True]


def test_a_signal_wakes_threads_and_coroutines() -> None:
    signal = Signal(runtime())
    values = list[int]()
    handle = runtime().start(signal.wait_for(lambda: len(values) > 1))
    assert not signal.block(lambda: values, 0.01)
    assert not runtime().run(signal.wait_for, lambda: values, runtime().time() + 0.01)

    def change() -> None:
        for value in range(2):
            time.sleep(0.01)
            with runtime().lock:
                values.append(value)
                signal.notify()

    thread = threading.Thread(target=change)
    thread.start()
    assert signal.block(lambda: values, LIMIT)
    assert handle.synchronize(LIMIT)
    thread.join()
    assert signal.block(lambda: values, 0.0)


def test_who_wakes_a_coroutine_may_go_on_with_it() -> None:
    own = Runtime()
    wait = Wait(here=True)
    handle = in_other_thread(lambda: own.start(where(wait)))
    in_other_thread(lambda: own.wake(wait))
    begun, went_on = handle.synchronize(LIMIT)
    assert "portakv loop" not in (begun, went_on)
    held = in_other_thread(lambda: own.start(where(Wait(here=True))))
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        held.synchronize(LIMIT)


@pytest.mark.parametrize("way", ["run", "start"])
def test_descriptors_end_waits(way: str) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def see() -> list[bool]:
        late = await Wait(here.fileno(), READ, runtime().time() + 0.01)
        room = await Wait(here.fileno(), WRITE)
        there.send(b"x")
        data = await Wait(here.fileno(), READ, runtime().time() + LIMIT)
        quiet = await Wait(here.fileno(), HANGUP, runtime().time() + 0.01)
        there.close()
        return [late, room, data, quiet, await Wait(here.fileno(), HANGUP)]

    def act() -> list[bool]:
        return runtime().run(see) if way == "run" else runtime().start(see()).synchronize(LIMIT)

    with here, there:
        assert in_other_thread(act) == [False, True, True, False, True]


def test_two_waits_for_one_descriptor_end_by_their_own_events() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def wait(events: int) -> bool:
        return await Wait(here.fileno(), events, runtime().time() + LIMIT)

    with here, there:
        end = runtime().start(wait(HANGUP))
        data = runtime().start(wait(READ))
        there.send(b"x")
        assert data.synchronize(LIMIT)
        assert not end.done()
        there.close()
        assert end.synchronize(LIMIT)


@pytest.mark.parametrize("closed", [False, True])
def test_all_waits_for_one_event_of_a_descriptor_end(closed: bool) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def wait(until: float = LIMIT) -> bool:
        return await Wait(here.fileno(), READ, runtime().time() + until)

    with here, there:
        handles = [runtime().start(wait()) for _ in range(3)]
        assert not runtime().start(wait(0.01)).synchronize(LIMIT)
        handles.pop().cancel()
        assert not [handle for handle in handles if handle.done()]
        if closed:
            loop = runtime().started()
            loop.call_soon_threadsafe(loop.descriptors.forget, here.fileno())
        else:
            there.send(b"x")
        assert [handle.synchronize(LIMIT) for handle in handles] == [True, True]


def test_a_bad_descriptor_is_an_error_of_the_coroutine() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        runtime().start(where(Wait(10**6))).synchronize(LIMIT)
    assert runtime().start(where(soon())).synchronize(LIMIT), "the loop has ended"


def test_an_error_and_a_timeout_are_the_waiters() -> None:
    async def fail() -> None:
        await soon()
        raise KeyError("x")

    with pytest.raises(KeyError):
        runtime().start(fail()).synchronize(LIMIT)
    handle = runtime().start(where(Wait()))
    with pytest.raises(TransferTimeout):
        handle.synchronize(0.01)
    assert handle.cancel()
    with pytest.raises(asyncio.CancelledError):
        handle.synchronize(LIMIT)
    assert not handle.cancel()


@pytest.mark.parametrize("seconds", [0.0, 1e-4])
def test_a_wait_that_is_over_leaves_nothing_with_the_end(seconds: float) -> None:
    """Who looks at work for long waits thousands of times."""
    end: End[None] = End(runtime())
    calls = list[str]()
    end.on_end(lambda: calls.append("ended"))
    for _ in range(10):
        assert not end.wait(seconds)
    assert len(vars(end)["_calls"]) == 1
    end.settle(None, None)
    assert calls == ["ended"]
    assert end.wait(seconds)


def test_a_cancelled_coroutine_may_wait_again_and_end_well() -> None:
    async def tidy() -> str:
        try:
            await Wait()
        except asyncio.CancelledError:
            await soon()
        return "tidy"

    handle = runtime().start(tidy())
    handle.cancel()
    assert handle.synchronize(LIMIT) == "tidy"


def test_a_coroutine_awaits_handles_and_futures_of_asyncio() -> None:
    async def outer() -> list[str]:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.01, future.set_result, "future")
        return [await future, *await runtime().start(where(soon()))]

    async def started_in_the_loop() -> list[str]:
        await soon()
        return await outer()

    names = runtime().start(started_in_the_loop()).synchronize(LIMIT)
    assert names == ["future", "portakv loop", "portakv loop"]


@pytest.mark.parametrize("policy", ["asyncio", "uvloop"])
def test_a_foreign_loop_that_runs_is_left_alone_and_woken(policy: str) -> None:
    """Its thread runs the first step, and a handle wakes it."""
    new = pytest.importorskip(policy).new_event_loop

    def act() -> tuple[list[str], str]:
        async def engine() -> tuple[list[str], str]:
            foreign = asyncio.get_running_loop()
            names = await runtime().start(where(soon()))
            assert asyncio.get_running_loop() is foreign
            return names, threading.current_thread().name

        loop = new()
        try:
            result: tuple[list[str], str] = loop.run_until_complete(engine())
            return result
        finally:
            loop.close()

    names, name = in_other_thread(act)
    assert names == [name, "portakv loop"]


@pytest.mark.parametrize("gives_up", [False, True])
def test_a_foreign_loop_that_was_closed_ends_no_loop(
    gives_up: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its wait leaves nothing with the end."""
    wait = Wait()
    handle = runtime().start(where(wait))

    async def engine() -> list[str] | None:
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(_result(handle), 0.01 if gives_up else LIMIT)
        return None

    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(asyncio.run, engine())
        assert until(lambda: gives_up or vars(handle)["_calls"], LIMIT)
        if gives_up:
            assert waiting.result(LIMIT) is None
            assert not vars(handle)["_calls"]
        in_other_thread(lambda: runtime().wake(wait))
        handle.synchronize(LIMIT)
        assert gives_up or waiting.result(LIMIT) == handle.value
    assert runtime().start(where(soon())).synchronize(LIMIT)
    assert not caplog.records


async def _result(handle: End[Any]) -> Any:
    return await handle


def test_the_end_of_work_wakes_no_loop_that_was_closed_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    end: End[None] = End(runtime())
    tasks = list[asyncio.Future[None]]()

    async def engine() -> None:
        tasks.append(asyncio.ensure_future(_result(end)))
        await asyncio.sleep(0.0)

    loop = asyncio.new_event_loop()
    in_other_thread(lambda: loop.run_until_complete(engine()))
    assert vars(end)["_calls"]
    loop.close()
    end.settle(None, None)
    assert not caplog.records


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_at_the_end_that_fails_is_logged_and_others_are_made(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        handle = runtime().start(where(Wait(here.fileno())))
        handle.on_end(lambda: 1 // (not fails))
        awaiting = runtime().start(_result(handle))
        there.send(b"x")
        assert awaiting.synchronize(LIMIT) == handle.synchronize(LIMIT)
    assert runtime().start(where(soon())).synchronize(LIMIT), "the loop has ended"
    assert [record.exc_info is not None for record in caplog.records] == [True] * fails


@pytest.mark.parametrize("before", [True, False])
def test_a_poll_that_fails_is_an_error_of_its_coroutine(before: bool) -> None:
    """It fails when the wait begins, or at an event."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    polls = list[int]()

    def poll(milliseconds: int) -> bool:
        polls.append(milliseconds)
        if before or len(polls) > 1:
            raise OSError("the socket is closed")
        return False

    with here, there:
        handle = runtime().start(where(Wait(here.fileno(), poll=poll)))
        assert until(lambda: polls, LIMIT)
        there.send(b"x")
        with pytest.raises(OSError, match="is closed"):
            handle.synchronize(LIMIT)
    assert runtime().start(where(soon())).synchronize(LIMIT), "the loop has ended"


async def working(*calls: Any) -> list[str]:
    """Return the names of the threads of the steps after some work, each after the work's own."""
    names = list[str]()
    for call in calls:
        names += [await Work(call), threading.current_thread().name]
    return names


def in_step() -> bool:
    """Return True if this thread has the runtime's lock."""
    owned: bool = runtime().lock._is_owned()
    return owned


def thread() -> str:
    """Return the name of this thread, which has not the lock."""
    assert not in_step()
    return threading.current_thread().name


def test_a_callers_thread_does_its_work_itself() -> None:
    names = in_other_thread(lambda: runtime().run(working, thread, thread))
    assert len({*names}) == 1
    assert names[0] not in ("portakv loop", interrupts.NAME)


def test_a_helper_does_the_work_of_a_coroutine_of_the_loop() -> None:
    """It goes on there until the coroutine waits."""

    async def steps() -> list[str]:
        names = await working(thread, thread)
        await soon()
        return [*names, threading.current_thread().name, *await working(thread)]

    names = runtime().start(steps()).synchronize(LIMIT)
    assert names == [interrupts.NAME] * 4 + ["portakv loop"] + [interrupts.NAME] * 2


@pytest.mark.parametrize("way", ["run", "start"])
def test_an_error_of_work_is_its_coroutines(way: str) -> None:
    async def steps() -> str:
        with pytest.raises(ZeroDivisionError):
            await Work(lambda: 1 // 0)
        result: str = await Work(str, "goes on")
        return result

    if way == "run":
        assert runtime().run(steps) == "goes on"
    else:
        assert runtime().start(steps()).synchronize(LIMIT) == "goes on"


def test_a_coroutine_that_is_cancelled_ends_after_its_work() -> None:
    begun = threading.Event()
    go_on = threading.Event()
    ended = list[str]()

    def work() -> None:
        begun.set()
        assert go_on.wait(LIMIT)
        ended.append("work")

    async def steps() -> None:
        try:
            await Work(work)
        finally:
            ended.append("steps")
            await Work(ended.append, "its own end")

    handle = runtime().start(steps())
    assert begun.wait(LIMIT)
    assert handle.cancel()
    time.sleep(0.01)
    assert not ended
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        handle.synchronize(LIMIT)
    assert ended == ["work", "steps", "its own end"]


def test_work_without_a_thread_is_done_in_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime().started()
    go_on = threading.Event()
    begun = list[str]()

    def wait() -> None:
        begun.append(thread())
        assert go_on.wait(LIMIT)

    most = 1 + sum(each.name == interrupts.NAME for each in threading.enumerate())
    running = [runtime().start(working(wait)) for _ in range(most)]
    assert until(lambda: len(begun) == len(running), LIMIT)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        names = runtime().start(working(thread)).synchronize(LIMIT)
    assert names == ["portakv loop"] * 2
    go_on.set()
    for handle in running:
        handle.synchronize(LIMIT)


def test_work_that_blocks_delays_no_other_coroutine() -> None:
    go_on = threading.Event()
    handle = runtime().start(working(go_on.wait))
    assert runtime().start(where(soon(), soon())).synchronize(LIMIT)
    assert not handle.done()
    go_on.set()
    handle.wait(LIMIT)
    assert handle.done()


AT_EXIT = """
import atexit, asyncio, time
from portakv.tasks import Wait, Work, runtime
async def steps():
    try:
        await Work(time.sleep, 0.3)
    except asyncio.CancelledError:
        await Work(print, "cancelled after its work")
handle = runtime().start(steps())
time.sleep(0.1)
"""


def test_the_end_of_the_interpreter_waits_for_work() -> None:
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert ended.stdout == "cancelled after its work\n", ended.stderr


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_coroutine_may_wait_while_it_ends() -> None:
    """The interrupt is raised once, at the wait that it finds."""
    ended = list[str]()
    ident = threading.main_thread().ident or 0

    async def steps() -> None:
        signal.pthread_kill(ident, signal.SIGINT)
        try:
            while True:
                await Work(time.sleep, 1e-3)
        finally:
            await soon()
            await Work(ended.append, "well")

    with pytest.raises(KeyboardInterrupt):
        runtime().run(steps)
    assert until(lambda: ended == ["well"], LIMIT)


def test_steps_exclude_each_other_and_waits_do_not() -> None:
    state = [0, 0]

    async def count(lets_go: bool) -> None:
        for _ in range(20):
            before = state[lets_go]
            if lets_go:  # the negative control
                with runtime().released():
                    time.sleep(1e-4)
            else:
                time.sleep(1e-4)
            state[lets_go] = before + 1
            await Wait(until=runtime().time())

    with ThreadPoolExecutor(4) as pool:
        for lets_go in (False, True):
            each = [pool.submit(lambda: runtime().run(count, lets_go)) for _ in range(4)]  # noqa: B023
            for one in each:
                one.result(LIMIT)
    assert state[False] == 80
    assert state[True] < 80


def test_a_group_ends_its_coroutines_and_reports_errors() -> None:
    errors = list[BaseException]()
    ended = list[str]()
    group = TaskGroup(runtime(), errors.append)

    async def stay() -> None:
        try:
            await Wait()
        finally:
            ended.append("stay")

    async def fail() -> None:
        raise KeyError("x")

    group.start(stay())
    group.start(fail())
    assert until(lambda: len(group) == 1, LIMIT)
    assert [type(error) for error in errors] == [KeyError]
    runtime().run(group.close)
    assert ended == ["stay"]
    assert len(group) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_cuts_no_close_of_a_group() -> None:
    """What comes after the close finds all coroutines ended."""
    ended = list[str]()
    began = threading.Event()
    ident = threading.main_thread().ident or 0
    group = TaskGroup(runtime(), lambda _: None)

    async def stay() -> None:
        began.set()
        try:
            await Wait()
        finally:
            signal.pthread_kill(ident, signal.SIGINT)
            await Wait(until=runtime().time() + 0.5)
            ended.append("stay")

    async def close() -> None:
        await group.close()
        ended.append("closed")

    group.start(stay())
    assert began.wait(LIMIT)
    with pytest.raises(KeyboardInterrupt):
        runtime().run(close)
    assert until(lambda: ended == ["stay", "closed"], LIMIT)


def test_a_forked_process_has_its_own_runtime() -> None:
    before = runtime()
    before.start(where(soon())).synchronize(LIMIT)
    with ThreadPoolExecutor(1) as other:
        other.submit(before.lock.acquire).result()  # a thread that the child does not have
        child = os.fork()
        if child:
            other.submit(before.lock.release).result()
    if not child:
        assert before.lock.acquire(timeout=LIMIT)
        own = runtime() is not before and before.process.forked
        works = own and runtime().start(where(soon())).synchronize(LIMIT)
        os._exit(0 if works else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert runtime() is before
    assert not before.process.forked


@pytest.mark.parametrize("ended", [False, True])
def test_a_forked_process_learns_only_of_work_that_has_ended(ended: bool) -> None:
    handle = runtime().start(where(Wait()))
    if ended:
        handle.cancel()
        assert handle.wait(LIMIT)

    def learn() -> bool:
        assert handle.wait(LIMIT)
        assert handle.done()
        said = "" if ended else "forked from"
        for wait in (handle.synchronize, lambda: asyncio.run(_result(handle))):
            with pytest.raises(asyncio.CancelledError if ended else TransferError, match=said):
                wait()
        return True

    assert ended_well(forked(learn))
    handle.cancel()


@pytest.fixture
def watched() -> Iterator[tuple[Runtime, WatchedLoop]]:
    loop = WatchedLoop()
    yield Runtime(loop), loop
    loop.end()


@pytest.mark.parametrize("slow", [False, True])
def test_the_watchdog_finds_a_step_that_keeps_the_loop_busy(
    watched: tuple[Runtime, WatchedLoop], slow: bool
) -> None:
    of_test, loop = watched

    async def steps() -> None:
        for _ in range(3):
            await Wait(until=of_test.time() + 1e-3)
            if slow:
                end = time.thread_time() + 5e-3
                while time.thread_time() < end:
                    pass
            else:
                time.sleep(5e-3)  # without the processor

    of_test.start(steps()).synchronize(LIMIT)
    of_test.start(where(Wait(until=of_test.time()))).synchronize(LIMIT)
    assert bool(loop.slow) == slow


class Buffer:
    """Lends a place to one coroutine. With a fault it looks and takes in two steps."""

    def __init__(self, runtime: Runtime, fault: bool) -> None:
        self.runtime = runtime
        self.fault = fault
        self.free = True
        self.users = 0
        self.most = 0

    async def use(self) -> None:
        while not self.free:
            await Wait(until=self.runtime.time() + 1.0)
        if self.fault:
            await Wait(until=self.runtime.time())
        self.free = False
        self.users += 1
        self.most = max(self.most, self.users)
        await Wait(until=self.runtime.time() + 1.0)
        self.users -= 1
        self.free = True


def most_users(seed: int, fault: bool) -> int:
    """Return how many coroutines had the place together."""
    made = list[Buffer]()

    def steps(of_test: Runtime) -> Any:
        async def all_use() -> None:
            made.append(Buffer(of_test, fault))
            for each in [of_test.start(made[0].use()) for _ in range(4)]:
                await each

        return all_use()

    began = time.monotonic()
    assert run_seeded(seed, steps) >= 1.0, "the fake clock"
    assert time.monotonic() - began < LIMIT
    return made[0].most


def test_a_seed_orders_ready_coroutines() -> None:
    def order(seed: int) -> str:
        letters = list[str]()

        def steps(of_test: Runtime) -> Any:
            async def write(letter: str) -> None:
                for _ in range(3):
                    await Wait(until=of_test.time())
                    letters.append(letter)

            async def both() -> None:
                for each in [of_test.start(write(letter)) for letter in "ab"]:
                    await each

            return both()

        run_seeded(seed, steps)
        return "".join(letters)

    orders = [order(seed) for seed in range(20)]
    assert orders == [order(seed) for seed in range(20)]
    assert len({*orders}) > 4


def test_a_seeded_order_finds_a_fault() -> None:
    assert {most_users(seed, fault=False) for seed in range(50)} == {1}
    assert max(most_users(seed, fault=True) for seed in range(50)) > 1


def test_select_is_the_loops_own() -> None:
    """The loop still watches descriptors for libraries that use asyncio."""
    here, there = socket.socketpair()
    seen = threading.Event()

    async def add() -> None:
        loop = asyncio.get_running_loop()

        def see() -> None:
            loop.remove_reader(here)
            seen.set()

        loop.add_reader(here, see)

    async def in_loop() -> None:
        await soon()
        await add()

    with here, there:
        runtime().start(in_loop()).synchronize(LIMIT)
        there.send(b"x")
        assert seen.wait(LIMIT)
    assert select.POLLIN == READ


class Mailbox:
    """A socket of ZeroMQ's kind: its descriptor reports also what is no message.

    Attributes:
        polls: the milliseconds of each poll, and the threads that have polled.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.messages = list[str]()
        self.polls = list[tuple[int, str]]()

    def poll(self, milliseconds: int) -> bool:
        self.polls.append((milliseconds, threading.current_thread().name))
        if not self.messages and milliseconds:
            select.select([self.fd], [], [], milliseconds / 1e3 if milliseconds > 0 else None)
            self.clear()
        elif not self.messages:
            self.clear()
        return bool(self.messages)

    def clear(self) -> None:
        if select.select([self.fd], [], [], 0)[0]:
            os.eventfd_read(self.fd)

    def put(self, *messages: str) -> None:
        """Add messages, or report something else."""
        self.messages += messages
        os.eventfd_write(self.fd, 1)


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    made = Mailbox()
    yield made
    os.close(made.fd)


async def take(mailbox: Mailbox, count: int, until: float | None = None) -> list[str]:
    """Return messages of a mailbox, or those that come in time."""
    taken = list[str]()
    while len(taken) < count and await Wait(mailbox.fd, READ, until, mailbox.poll):
        taken.append(mailbox.messages.pop(0))
    return taken


def test_the_loop_takes_messages_of_a_descriptor_that_reports_other_things(
    mailbox: Mailbox,
) -> None:
    handle = runtime().start(take(mailbox, 3))
    assert until(lambda: bool(mailbox.polls))
    mailbox.put()
    assert until(lambda: len(mailbox.polls) >= 2)
    assert not handle.done()
    mailbox.put("a", "b")  # one report for two messages
    mailbox.put("c")
    assert handle.synchronize(LIMIT) == ["a", "b", "c"]
    assert {*mailbox.polls} == {(0, "portakv loop")}


def test_a_message_that_came_before_the_wait_is_taken(mailbox: Mailbox) -> None:
    mailbox.put("a")
    mailbox.clear()  # its report was for an earlier wait
    assert runtime().start(take(mailbox, 1)).synchronize(LIMIT) == ["a"]


def test_a_caller_polls_in_its_own_thread(mailbox: Mailbox) -> None:
    threading.Timer(0.05, mailbox.put, ["a"]).start()
    assert in_other_thread(lambda: runtime().run(take, mailbox, 1)) == ["a"]
    assert [milliseconds for milliseconds, _ in mailbox.polls] == [-1]
    assert mailbox.polls[0][1] != "portakv loop"


def test_a_wait_for_messages_ends_at_its_time(mailbox: Mailbox) -> None:
    soon = runtime().time() + 0.05
    assert in_other_thread(lambda: runtime().run(take, mailbox, 1, soon)) == []
    assert runtime().start(take(mailbox, 1, soon + 0.05)).synchronize(LIMIT) == []


@pytest.mark.parametrize("seed", range(20))
def test_two_cancels_at_a_time_are_one(seed: int) -> None:
    """A later one cancels the wait in which the coroutine tidies up."""
    caught = list[float]()

    async def tidies(runtime: Runtime, times: int) -> str:
        for _ in range(times):
            try:
                await Wait()
            except asyncio.CancelledError:
                caught.append(runtime.time())
        await Wait(until=runtime.time() + 1.0)
        return "tidy"

    async def steps(runtime: Runtime) -> None:
        handle = runtime.start(tidies(runtime, 2))
        assert handle.cancel()
        assert handle.cancel()
        await Wait(until=runtime.time() + 1.0)
        assert caught == [0.0]
        assert handle.cancel()
        assert await handle == "tidy"
        assert caught == [0.0, 1.0]
        assert not handle.cancel()

    run_seeded(seed, steps)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_waits_for_coroutines_that_delay_its_end(seed: int) -> None:
    """Also for one that is started while the group closes, which is cancelled at once."""
    ended = list[str]()

    async def delays(runtime: Runtime, name: str, seconds: float) -> None:
        try:
            await Wait()
        finally:
            await Wait(until=runtime.time() + seconds)
            ended.append(name)

    async def steps(runtime: Runtime) -> None:
        group = TaskGroup(runtime, lambda _: None)
        group.start(delays(runtime, "first", 1.0))
        group.start(delays(runtime, "second", 3.0))
        closing = runtime.start(group.close())
        await Wait(until=runtime.time() + 0.5)
        assert not closing.done()
        late = group.start(delays(runtime, "late", 0.25))
        await closing
        assert ended == ["late", "first", "second"]
        assert runtime.time() == 3.0
        assert late.done()
        assert len(group) == 0

    run_seeded(seed, steps)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_waits_for_a_coroutine_that_its_last_one_starts(seed: int) -> None:
    """As a listener does that accepts a connection while it is closed."""
    ended = list[str]()

    async def late(runtime: Runtime) -> None:
        try:
            await Wait()
        finally:
            await Wait(until=runtime.time() + 1.0)
            ended.append("late")

    async def accepts(runtime: Runtime, group: TaskGroup) -> None:
        try:
            await Wait()
        finally:
            group.start(late(runtime))

    async def steps(runtime: Runtime) -> None:
        group = TaskGroup(runtime, lambda _: None)
        group.start(accepts(runtime, group))
        await group.close()
        assert ended == ["late"]

    run_seeded(seed, steps)


# --- calls that block


def test_calls_that_block_run_in_a_few_threads_and_not_in_the_loop() -> None:
    now = 0
    most = 0
    lock = threading.Lock()

    def call(number: int) -> tuple[int, str]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return number, threading.current_thread().name

    limit = Limit(runtime(), 4)
    handles = [runtime().start(limit.work(call, number)) for number in range(12)]
    results = [handle.synchronize(LIMIT) for handle in handles]
    assert [number for number, _ in results] == [*range(12)]
    assert "portakv loop" not in [name for _, name in results]
    assert most == 4


def test_a_cancelled_coroutine_waits_for_its_call_and_drops_one_that_has_not_begun() -> None:
    go = threading.Event()
    made = list[int]()

    def call(number: int) -> None:
        made.append(number)
        assert go.wait(LIMIT)

    limit = Limit(runtime(), 4)
    handles = [runtime().start(limit.work(call, number)) for number in range(5)]
    assert until(lambda: len(made) == 4)
    for handle in handles:
        assert handle.cancel()
    assert until(handles[-1].done)
    time.sleep(0.05)
    assert not any(handle.done() for handle in handles[:-1])
    go.set()
    for handle in handles:
        with pytest.raises(asyncio.CancelledError):
            handle.synchronize(LIMIT)
    assert sorted(made) == [*range(4)]


def test_a_helper_does_the_last_work_that_its_step_wakes() -> None:
    """Other helpers do the rest. Coroutines that are woken go on after the step, one by one."""
    own = Runtime()
    order = list[str]()
    threads = dict[str, str]()
    waits = [Wait(here=True) for _ in range(2)]

    def call(name: str) -> None:
        threads[name] = str(threading.get_ident())

    async def woken(name: str, wait: Wait) -> None:
        await wait
        order.append(name)
        await Work(call, name)

    async def first() -> None:
        await Work(call, "first")
        for wait in waits:
            wait.wake()
        order.append("first")

    def begin() -> list[Handle[None]]:
        handles = [own.start(woken(str(n), wait)) for n, wait in enumerate(waits)]
        return [*handles, own.start(first())]

    for handle in in_other_thread(begin):
        handle.synchronize(LIMIT)
    assert order == ["first", "0", "1"]
    assert threads["1"] == threads["first"]


# --- coroutines that begin in the main thread


def test_a_coroutine_may_begin_in_the_main_thread_and_without_the_lock() -> None:
    free = list[bool]()

    def is_free() -> bool:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(try_lock).result(LIMIT)

    def try_lock() -> bool:
        acquired: bool = runtime().lock.acquire(timeout=0.2)
        if acquired:
            runtime().lock.release()
        return acquired

    async def steps() -> list[str]:
        free.append(is_free())
        names = await where(soon())
        free.append(is_free())
        return names

    made = steps()
    handle = Handle(runtime(), made)
    handle.follow(made.send(None))
    assert handle.synchronize(LIMIT) == [threading.current_thread().name, "portakv loop"]
    assert free == [True, False]


@pytest.mark.parametrize("when", ["before", "after", "followed"])
def test_a_coroutine_whose_call_was_interrupted_is_abandoned(when: str) -> None:
    """``after``: the interrupt has come between the first step and the note of its wait."""
    ended = list[BaseException | None]()

    async def steps() -> None:
        try:
            await Wait(until=runtime().time() + LIMIT)
        except asyncio.CancelledError as error:
            ended.append(error)
            raise

    made = steps()
    handle = Handle(runtime(), made)
    wait = None if when == "before" else made.send(None)
    if wait is not None and when == "followed":
        handle.follow(wait)
    handle.abandon()
    assert until(handle.done)
    assert isinstance(handle.error, asyncio.CancelledError)
    assert len(ended) == (when != "before")
