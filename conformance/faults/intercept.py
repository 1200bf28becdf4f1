# SPDX-License-Identifier: Apache-2.0
"""Answer the system calls of a tier's process: fail, hold, delay or falsify some of them.

An `Interceptor` runs in the process that judges. Calls on files outside of the tier's folder, and
calls while no rule is set, go on as they are.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path

from portakv.runtime.resources import fcntl
from portakv_conformance.faults.syscalls import BY_NUMBER, Call, borrow

PAGE = 4096
# Of linux/seccomp.h: the ioctls, the form of a notification and of an answer, the flag "go on".
_RECEIVE = 0xC0502100
_SEND = 0xC0182101
_NOTICE = "QIIiIQ6Q"
_NOTICE_BYTES = 80
_ANSWER = "QqiI"
_GO_ON = 1
_PATH = 4096
_HERE = -100
_NO_OFFSET = (1 << 64) - 1


class Falsified(Exception):
    """A call could not be carried out in the place of the tier's process."""


@dataclass(frozen=True)
class Answer:
    """What the tier's call returns.

    Attributes:
        value: the return value; None: the kernel carries the call out.
        error: an errno, or 0.
        after: seconds until the answer is sent; infinity holds the call until it is released.
    """

    value: int | None = None
    error: int = 0
    after: float = 0.0


GO_ON = Answer()
HOLD = Answer(after=float("inf"))


@dataclass
class Intercepted:
    """One call that the supervisor holds.

    Attributes:
        id: the kernel's number for the call.
        process: of the tier.
        call: which one.
        args: its six arguments.
        path: of its file.
    """

    id: int
    process: int
    call: Call
    args: tuple[int, ...]
    path: str

    def pieces(self) -> list[tuple[int, int]]:
        """Return the addresses and sizes of the buffers of a read or a write."""
        if self.call.data == "buffer":
            return [(self.args[1], self.args[2])]
        raw = read_memory(self.process, self.args[1], 16 * self.args[2])
        return [*struct.iter_unpack("QQ", raw)]

    @property
    def nbytes(self) -> int:
        """Return the bytes that a read or a write wants to move."""
        return sum(size for _, size in self.pieces())

    def half(self) -> int:
        """Return half of the bytes, in whole pages if there are two."""
        part = self.nbytes // 2
        return part // PAGE * PAGE if part >= PAGE else part

    def read(self, nbytes: int) -> bytes:
        """Read bytes of the file as the call would; return those that came."""
        fd = borrow(self.process, signed(self.args[0]))
        try:
            # Aligned, for files that were opened for direct I/O.
            memory = mmap(-1, max(nbytes, 1))
            with memoryview(memory) as view, view[:nbytes] as chosen:
                offset = self._offset()
                got = os.readv(fd, [chosen]) if offset is None else os.preadv(fd, [chosen], offset)
        finally:
            os.close(fd)
        return memory[:got]

    def deliver(self, data: bytes) -> None:
        """Write bytes into the buffers of the tier's call."""
        at = 0
        for address, size in self.pieces():
            part = data[at : at + size]
            write_memory(self.process, address, part)
            at += len(part)

    def write(self, nbytes: int, shift: int = 0) -> int:
        """Write the first bytes of the call to the file; return how many were written.

        Args:
            shift: bytes by which the place in the file is wrong.
        """
        memory = mmap(-1, max(nbytes, 1))
        at = 0
        for address, size in self.pieces():
            part = read_memory(self.process, address, min(size, nbytes - at))
            memory[at : at + len(part)] = part
            at += len(part)
        fd = borrow(self.process, signed(self.args[0]))
        try:
            offset = self._offset()
            if offset is None:
                offset = os.lseek(fd, 0, os.SEEK_CUR)
            with memoryview(memory) as view, view[:nbytes] as chosen:
                return os.pwritev(fd, [chosen], offset + shift) if nbytes else 0
        finally:
            os.close(fd)

    def advance(self, nbytes: int) -> None:
        """Move the position of a file that was read or written without an offset."""
        if self._offset() is None:
            fd = borrow(self.process, signed(self.args[0]))
            try:
                os.lseek(fd, nbytes, os.SEEK_CUR)
            finally:
                os.close(fd)

    def _offset(self) -> int | None:
        if self.call.offset is None or self.args[self.call.offset] == _NO_OFFSET:
            return None
        return self.args[self.call.offset]


#: Decides about a call.
Action = Callable[[Intercepted], Answer]


@dataclass
class Rule:
    """Which calls fail, and how.

    Attributes:
        kinds: of the calls.
        action: answers each of them.
        skip: calls that go on before the first one fails.
        times: calls that fail; None: all that follow.
        least: bytes that a read or a write moves at least.
        seen: calls of these kinds on files of the tier.
        hits: calls that were answered by the action.
    """

    kinds: tuple[str, ...]
    action: Action
    skip: int = 0
    times: int | None = None
    least: int = 0
    seen: int = 0
    hits: int = 0
    paths: list[str] = field(default_factory=list)

    def takes(self, call: Intercepted) -> bool:
        """Return whether the action answers a call, and count it."""
        if call.call.kind not in self.kinds:
            return False
        if self.least and (call.call.data is None or call.nbytes < self.least):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        self.paths.append(call.path)
        return True


class Interceptor:
    """Answers the calls of one process until it ends.

    Args:
        listener: of `syscalls.install_filter`, which the interceptor closes.
        process: of the tier.
        folder: calls on files elsewhere go on.
    """

    def __init__(self, listener: int, process: int, folder: Path) -> None:
        self.rule: Rule | None = None
        #: Why a call could not be falsified, if one could not.
        self.failure = ""
        self._listener = listener
        self._process = process
        self._folder = os.path.realpath(folder)
        self._lock = threading.Lock()
        self._held: dict[int, tuple[float, Answer]] = {}
        self._wake, self._woken = os.pipe()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="interceptor", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let all held calls go on, and set no rule."""
        self.rule = None
        with self._lock:
            for number, (_, answer) in self._held.items():
                self._held[number] = 0.0, answer
        os.write(self._woken, b"x")

    @property
    def held(self) -> int:
        """Return the number of calls that are held."""
        return len(self._held)

    def close(self) -> None:
        """End the thread, after the process has ended."""
        self._closed = True
        os.write(self._woken, b"x")
        self._thread.join(10)
        for fd in (self._listener, self._wake, self._woken):
            os.close(fd)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._closed:
            with self._lock:
                due = min((at for at, _ in self._held.values()), default=float("inf"))
            wait = min(max(due - time.monotonic(), 0.0), 1.0)
            for fd, event in poller.poll(1000 * wait):
                if fd == self._wake:
                    os.read(self._wake, 64)
                elif event & select.POLLIN:
                    self._receive()
                else:  # no thread of the process is left
                    poller.unregister(self._listener)
            self._send_due()

    def _receive(self) -> None:
        notice = bytearray(_NOTICE_BYTES)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, notice)
        except OSError:  # the call was interrupted, or the process has ended
            return
        number, thread, _, call, _, _, *args = struct.unpack_from(_NOTICE, notice)
        answer = GO_ON
        rule = self.rule
        if rule is not None and not self._closed:
            try:
                answer = self._decide(rule, number, thread, call, tuple(args))
            except ProcessLookupError:
                pass
            except (OSError, Falsified) as error:
                self.failure = f"a call could not be falsified: {error}"
        if answer.after:
            with self._lock:
                self._held[number] = time.monotonic() + answer.after, answer
        else:
            self._send(number, answer)

    def _decide(
        self, rule: Rule, number: int, thread: int, call: int, args: tuple[int, ...]
    ) -> Answer:
        known = BY_NUMBER[call]
        if known.kind not in rule.kinds:
            return GO_ON
        path = path_of(thread, known, args)
        inside = path == self._folder or path.startswith(f"{self._folder}/")
        caught = Intercepted(number, self._process, known, args, path)
        return rule.action(caught) if inside and rule.takes(caught) else GO_ON

    def _send_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [number for number, (at, _) in self._held.items() if at <= now]
            answers = [(number, self._held.pop(number)[1]) for number in due]
        for number, answer in answers:
            self._send(number, answer)

    def _send(self, number: int, answer: Answer) -> None:
        go_on = answer.value is None and not answer.error
        raw = struct.pack(_ANSWER, number, answer.value or 0, -answer.error, _GO_ON * go_on)
        with suppress(OSError):  # the call was interrupted, or the process has ended
            fcntl.ioctl(self._listener, _SEND, bytearray(raw))


def signed(value: int) -> int:
    """Return an argument of a call as a signed number of 32 bits."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


def read_memory(process: int, address: int, nbytes: int) -> bytes:
    """Return bytes of another process."""
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), nbytes, address)


def write_memory(process: int, address: int, data: bytes) -> None:
    """Write bytes into another process."""
    with open(f"/proc/{process}/mem", "r+b", buffering=0) as memory:
        if os.pwrite(memory.fileno(), data, address) != len(data):
            raise Falsified("the memory of the tier's process is not writable")


def path_of(thread: int, call: Call, args: tuple[int, ...]) -> str:
    """Return the path of the file of a call; empty for a descriptor that is closed."""
    if call.target == "fd":
        return _link(f"/proc/{thread}/fd/{signed(args[0])}")
    name = _text(thread, args[0] if call.target == "path" else args[1])
    folder = _HERE if call.target == "path" else signed(args[0])
    link = "cwd" if folder == _HERE else f"fd/{folder}"
    path = (
        os.path.join(_link(f"/proc/{thread}/{link}"), name)
        if name
        else _link(f"/proc/{thread}/{link}")
    )
    return os.path.normpath(path)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _text(process: int, address: int) -> str:
    """Return the text that ends with a zero byte at an address; read to the end of its page."""
    raw = b""
    while len(raw) < _PATH and b"\0" not in raw:
        start = address + len(raw)
        part = read_memory(process, start, PAGE - start % PAGE)
        if not part:
            break
        raw += part
    return os.fsdecode(raw.partition(b"\0")[0])


# --- actions --------------------------------------------------------------------------------------


def fails(name: str) -> Action:
    """Return the action that fails a call with an errno, by its name."""
    return lambda call: Answer(error=getattr(errno, name))


def hangs(call: Intercepted) -> Answer:
    """Hold a call until it is released."""
    return HOLD


def waits(pause: float) -> Action:
    """Return the action that lets a call go on after so many seconds."""
    return lambda call: Answer(after=pause)


def kills(call: Intercepted) -> Answer:
    """Kill the process in a call."""
    with suppress(ProcessLookupError):
        os.kill(call.process, signal.SIGKILL)
    return HOLD


def read_short(call: Intercepted) -> Answer:
    """Deliver half of the bytes that a read wants, as a file that ends there."""
    data = call.read(call.half())
    call.deliver(data)
    return Answer(len(data))


def read_flipped(call: Intercepted) -> Answer:
    """Deliver the bytes of a read, one bit of them wrong."""
    data = bytearray(call.read(call.nbytes))
    if data:
        data[len(data) // 2] ^= 1
    call.deliver(bytes(data))
    return Answer(len(data))


def read_zeros(call: Intercepted) -> Answer:
    """Deliver zeros in place of the bytes of a read."""
    count = len(call.read(call.nbytes))
    call.deliver(bytes(count))
    return Answer(count)


def write_short(call: Intercepted) -> Answer:
    """Write half of the bytes, and return that half is written."""
    done = call.write(call.half())
    call.advance(done)
    return Answer(done)


def write_torn(call: Intercepted) -> Answer:
    """Write half of the bytes, and return that all are written."""
    call.write(call.half())
    call.advance(call.nbytes)
    return Answer(call.nbytes)


def write_lost(call: Intercepted) -> Answer:
    """Write nothing, and return that all is written."""
    call.advance(call.nbytes)
    return Answer(call.nbytes)


def write_astray(call: Intercepted) -> Answer:
    """Write the bytes a page further, and return that they are written."""
    call.write(call.nbytes, PAGE)
    call.advance(call.nbytes)
    return Answer(call.nbytes)
