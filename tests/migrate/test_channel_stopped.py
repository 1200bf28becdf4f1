# SPDX-License-Identifier: Apache-2.0
"""A process that was stopped is not mistaken for a process with another secret."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.migrate_channels import SECRET, Ping, Pong
from support.stopping import go_on, stop
from support.waits import LIMIT, until

from portakv.errors import PeerError
from portakv.host import shared
from portakv.migrate import channel
from portakv.migrate.channel import Channel
from portakv.tasks import runtime

TCP = "tcp://127.0.0.1:0"
SERVER = """
import logging, sys
from portakv.migrate.channel import Channel
logging.basicConfig()
channel = Channel(sys.argv[1] or None, secret=bytes.fromhex(sys.argv[2]) or None)
print(channel.address, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("address", [TCP, ""], ids=["tcp", "unix"])
def test_no_side_blames_the_secret_of_a_process_that_was_stopped(address: str) -> None:
    """`test_strangers_get_no_answer` shows that a wrong secret is blamed."""
    secret = SECRET if address else b""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", SERVER, address, secret.hex()]
    with (
        subprocess.Popen(command, text=True, **pipes) as server,
        closing(Channel(secret=secret or None, timeout=20.0)) as asker,
    ):
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            there = server.stdout.readline().strip()
            stop(server.pid)
            with pytest.raises(PeerError, match="the process is stopped") as caught:
                asker.ask(there, Ping(), Pong)
            assert "secret" not in str(caught.value)
            go_on(server.pid)
            assert "If this process was stopped" in server.stderr.readline()
        finally:
            server.kill()


def test_a_request_behind_a_short_one_has_its_own_time() -> None:
    """Before a connection stands, the short request closes it, and the next one makes another."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", SERVER, "", ""]
    with (
        subprocess.Popen(command, text=True, **pipes) as server,
        closing(Channel(timeout=20.0)) as asker,
        ThreadPoolExecutor(2) as pool,
    ):
        assert server.stdout is not None
        try:
            there = server.stdout.readline().strip()
            stop(server.pid)
            short = pool.submit(asker.ask, there, Ping(), Pong, 0.5)
            assert until(lambda: short.running(), LIMIT)
            long = pool.submit(asker.ask, there, Ping(), Pong, 20.0)
            assert isinstance(short.exception(20), PeerError)
            go_on(server.pid)
            assert "was rejected" in str(long.exception(20))  # by the process that goes on
        finally:
            server.kill()


FORKS = """
import os, sys, time
sys.path[:0] = [sys.argv[1]]
from support.migrate_channels import Server
server = Server(None)
if not os.fork():
    time.sleep(600)  # it has the descriptors of its parent
    os._exit(0)
print(server.address, flush=True)
sys.stdin.read()
"""


def test_the_end_of_a_process_is_seen_though_a_fork_has_its_descriptors() -> None:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", FORKS, str(Path(__file__).parents[1])]
    with (
        subprocess.Popen(command, text=True, start_new_session=True, **pipes) as server,
        closing(Channel(timeout=20.0)) as asker,
    ):
        assert server.stdout is not None
        ends = list[str]()
        try:
            there = server.stdout.readline().strip()
            asker.ask(there, Ping(), Pong)
            asker.watch(there, lambda: ends.append("gone"))
            server.kill()
            assert until(lambda: bool(ends), 60)
            with pytest.raises(PeerError):
                asker.ask(there, Ping(), Pong)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_a_process_that_stops_is_gone_and_comes_back() -> None:
    """Its connection ends for both sides after a while, and the next request makes another."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", FORKS.replace("if not os.fork()", "if not 1")]
    with (
        subprocess.Popen([*command, str(Path(__file__).parents[1])], text=True, **pipes) as server,
        closing(Channel(timeout=20.0)) as asker,
    ):
        assert server.stdout is not None
        ends = list[str]()
        try:
            there = server.stdout.readline().strip()
            assert asker.ask(there, Ping(), Pong).count == 1
            asker.watch(there, lambda: ends.append("gone"))
            stop(server.pid)
            assert until(lambda: bool(ends), 60)
            go_on(server.pid)
            assert until(lambda: answers(asker, there), 60)
        finally:
            server.kill()


def answers(asker: Channel, there: str) -> bool:
    """Return whether a process answers a request."""
    try:
        return asker.ask(there, Ping(), Pong, 1.0).count > 1
    except PeerError:
        return False


CLOSES = FORKS.replace(
    "sys.stdin.read()", "sys.stdin.readline()\nserver.channel.close()\nsys.stdin.read()"
)


def test_a_channel_that_closes_ends_connections_though_a_fork_has_its_descriptors() -> None:
    """The process goes on, so its end reports nothing."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", CLOSES, str(Path(__file__).parents[1])]
    with (
        subprocess.Popen(command, text=True, start_new_session=True, **pipes) as server,
        closing(Channel(timeout=20.0)) as asker,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        ends = list[str]()
        try:
            there = server.stdout.readline().strip()
            asker.ask(there, Ping(), Pong)
            asker.watch(there, lambda: ends.append("gone"))
            server.stdin.write("\n")
            server.stdin.flush()
            assert until(lambda: bool(ends), 20)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


NAMED = r"""
import ctypes, sys
sys.path[:0] = [sys.argv[1]]
from support.migrate_channels import Server
server = Server(None)
ctypes.CDLL(None).prctl(15, b"odd \xff\xfe (x) Z", 0, 0, 0)  # PR_SET_NAME
print(server.address, flush=True)
sys.stdin.read()
"""


def test_the_end_of_a_process_whose_name_is_no_text_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("portakv.migrate.channel.HEARTBEAT", 20)
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", NAMED, str(Path(__file__).parents[1])]
    with (
        subprocess.Popen(command, text=True, **pipes) as server,
        closing(Channel(timeout=20.0)) as asker,
    ):
        assert server.stdout is not None
        ends = list[str]()
        try:
            there = server.stdout.readline().strip()
            asker.ask(there, Ping(), Pong)
            asker.watch(there, lambda: ends.append("gone"))
            assert shared.started(server.pid) is not None
            stop(server.pid)  # it keeps its sockets: only a look at it shows that
            assert until(lambda: bool(ends))
        finally:
            server.kill()


def test_a_process_that_shows_no_secret_keeps_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("portakv.migrate.channel.HEARTBEAT", 20)
    monkeypatch.setattr("portakv.migrate.channel.HANDSHAKE", 100)
    with (
        closing(Channel()) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
    ):
        silent.connect(server.address.removeprefix("ipc://"))
        assert silent.recv(64)  # the nonce
        silent.settimeout(LIMIT)
        assert silent.recv(64) == b""


CONNECTION: Any = vars(channel)["_Connection"]


class FailsOnce:
    """A socket whose second packet finds no memory."""

    def __init__(self, ended: socket.socket) -> None:
        self.sent = list[bytes]()
        self.tries = 0
        self.open = True
        self.shutdown = ended.shutdown
        self.getsockopt = ended.getsockopt
        self.setsockopt = ended.setsockopt
        self.setblocking = ended.setblocking

    def send(self, packet: bytes) -> None:
        self.tries += 1
        if self.tries == 2:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        self.sent.append(packet)

    def fileno(self) -> int:
        return 9 if self.open else -1

    def close(self) -> None:
        self.open = False


def test_an_answer_without_one_of_its_packets_does_not_count() -> None:
    """The connection ends: the last packet would say that the answer is whole."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        failing: Any = FailsOnce(here)
        connection = CONNECTION(failing)
        with pytest.raises(ConnectionError):  # which ends the connection
            runtime().run(connection.send_parts, bytes(2 * channel.PACKET + 1))
        assert len(failing.sent) == 1
