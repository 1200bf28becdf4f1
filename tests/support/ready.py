# SPDX-License-Identifier: Apache-2.0
"""Python processes that begin with torch imported, which takes a new one more than a second.

Each process of tests starts one that imports torch and NumPy, and nothing of PortaKV. It forks the
others, which run what a new Python would: with their own words, environment, folder and streams, a
new `__main__`, and an exit. Tests of Python's options, and of variables that Python, its loader or
torch read when they begin, start a new Python instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

Word = str | os.PathLike[str]

_LONGEST = 600  # seconds that `run` waits unless it gets a limit
_LARGEST = 100_000  # bytes of a request
_TESTS = Path(__file__).resolve().parents[1]
_BEGIN = (
    "import sys; sys.path.insert(0, {tests!r}); from support import ready; ready.fork({channel})"
)


class Python:
    """A process that runs ``-c CODE``, ``-m MODULE`` or a script, with the rest of a Popen's
    interface that tests use. Streams are pipes if they are ``subprocess.PIPE``."""

    def __init__(
        self,
        *words: Word,
        env: Mapping[str, str] | None = None,
        cwd: Word | None = None,
        stdin: int | IO[bytes] = 0,
        stdout: int | IO[bytes] = 1,
        stderr: int | IO[bytes] = 2,
    ) -> None:
        self.args = [os.fspath(word) for word in words]
        self.returncode: int | None = None
        request = {
            "words": self.args,
            "environment": dict(os.environ if env is None else env),
            "folder": os.fspath(cwd or os.getcwd()),
        }
        self.stdin, read = _pipe(stdin, writes=True)
        self.stdout, write = _pipe(stdout, writes=False)
        self.stderr, report = _pipe(stderr, writes=False)
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        passed = [read.number, write.number, report.number, status.fileno()]
        with status:
            _ask(json.dumps(request).encode(), passed)
        for end in (read, write, report):
            if end.close:
                os.close(end.number)
        self.pid = int(self._status.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, which is negative for a signal. Raises
        subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.recv(32))
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Python:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pipes, and wait."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    *words: Word,
    env: Mapping[str, str] | None = None,
    cwd: Word | None = None,
    stdin: int | IO[bytes] | None = None,
    timeout: float = _LONGEST,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end; its exit code and output. It has no input, unless it gets some.
    Raises subprocess.TimeoutExpired, after the process was killed."""
    with (
        open(os.devnull, "rb") as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        streams: dict[str, Any] = {"stdin": stdin or nothing, "stdout": out, "stderr": err}
        process = Python(*words, env=env, cwd=cwd, **streams)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess(process.args, code, *texts)


def begin() -> None:
    """Start the process that forks the others, for tests that count descriptors afterwards."""
    _forker(os.getpid())


class _End(NamedTuple):
    """A descriptor for the child, and whether it is closed here afterwards."""

    number: int
    close: bool


def _pipe(stream: int | IO[bytes], writes: bool) -> tuple[IO[bytes] | None, _End]:
    """Return this process's end of a new pipe, and the child's; or None and the given stream."""
    if not isinstance(stream, int):
        return None, _End(stream.fileno(), False)
    if stream != subprocess.PIPE:
        return None, _End(stream, False)
    reader, writer = os.pipe()
    if writes:
        return os.fdopen(writer, "wb"), _End(reader, True)
    return os.fdopen(reader, "rb"), _End(writer, True)


def _ask(request: bytes, passed: list[int]) -> None:
    assert len(request) <= _LARGEST
    socket.send_fds(_forker(os.getpid()), [request], passed)


@functools.cache
def _forker(_: int) -> socket.socket:
    """Start the process that forks for the process with this pid, and return the way to it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = _BEGIN.format(tests=str(_TESTS), channel=there.fileno())
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[there.fileno()]
        )

    def end() -> None:
        here.close()
        process.wait()

    atexit.register(end)
    return here


def fork(channel: int) -> None:
    """Fork processes until that of the tests has ended. Each runs its words here."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    sys.path.remove(str(_TESTS))
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = sys.path[1 + len(inherited) :]  # after "", which is that of `-c`
    source = str(_TESTS.parent / "src")
    if source in inherited:  # then it is not added a second time for the installed package
        installed.append(source)
    gc.collect()
    gc.freeze()
    request = _next_request(socket.socket(fileno=channel))
    if request is not None:
        _run(request, installed)


def _next_request(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return it in the child, and None at the end in the parent."""
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    statuses: dict[int, socket.socket] = {}
    while True:
        ready = select.select([channel, ended], [], [])[0]
        if ended in ready:
            ended.recv(4096)
            _report(statuses)
        if channel not in ready:
            continue
        message, passed, _, _ = socket.recv_fds(channel, _LARGEST, 4)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            break
        for descriptor in passed[:3]:
            os.close(descriptor)
        statuses[pid] = socket.socket(fileno=passed[3])
        statuses[pid].send(b"%d" % pid)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in (channel, ended, wake, *statuses.values()):
        each.close()
    for number, descriptor in enumerate(passed[:3]):
        os.dup2(descriptor, number)
    for descriptor in passed:
        os.close(descriptor)
    _open_streams()
    request: dict[str, Any] = json.loads(message)
    return request


def _open_streams() -> None:
    """Open Python's streams anew: these know whether their file is a pipe."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        mode = "w" if number else "r"
        by_line = name == "stderr" or os.isatty(number)
        stream = open(  # noqa: SIM115  -- it lives as long as the process
            number,
            mode,
            buffering=1 if by_line else -1,
            encoding=before.encoding,
            errors=before.errors,
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _report(statuses: dict[int, socket.socket]) -> None:
    """Tell the exit codes of the children that have ended."""
    for pid in list(statuses):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with statuses.pop(pid) as requester, suppress(BrokenPipeError):
                requester.send(b"%d" % os.waitstatus_to_exitcode(status))


def _run(request: dict[str, Any], installed: list[str]) -> None:
    """Do what Python does with these words, in this environment and folder."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *added, *installed]
    first, *words = request["words"]
    if first == "-c":
        sys.argv = ["-c", *words[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")
