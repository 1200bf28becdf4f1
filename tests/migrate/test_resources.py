# SPDX-License-Identifier: Apache-2.0
"""Processes without a free descriptor or thread: none dies, and errors name the limit."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support import ready
from support.migrate_channels import Ping, Pong
from support.waits import LIMIT, until

from portakv.errors import PeerError
from portakv.migrate import channel
from portakv.migrate.channel import Channel
from portakv.runtime import resources

_HEAD = f"""
import logging, os, sys, threading
sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
from support import no_descriptors as none
from support.migrate_channels import Ping, Pong, SECRET, Server
from portakv.errors import PortaKVError
from portakv.migrate import channel as channel_unix
from portakv.migrate.channel import Channel
"""


def ran(script: str, *words: str) -> tuple[int, str]:
    """Run a script; return its exit code and what it has printed."""
    command = [sys.executable, "-c", _HEAD + script, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout + done.stderr


class Full:
    """A process that serves `Ping`, and takes and releases its descriptors as it is told."""

    def __init__(self, script: str) -> None:
        pipe = subprocess.PIPE
        self.process = ready.Python("-c", _HEAD + script, stdin=pipe, stdout=pipe, stderr=pipe)
        self.address = self.line()

    def line(self) -> str:
        """Return the next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def go_on(self) -> None:
        """Have it take the next step."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()


_FULL = """
logging.basicConfig()
server = Server(None)
none.limit()
print(server.address, flush=True)
sys.stdin.readline()
with none.left(0):
    print("full", flush=True)
    sys.stdin.readline()
print("free", flush=True)
sys.stdin.readline()
"""


def test_a_full_process_refuses_a_connection_and_lives() -> None:
    """The peer learns the limit; it connects when descriptors are free again."""
    full = Full(_FULL)
    with full.process, closing(Channel(timeout=20.0)) as first, closing(Channel()) as second:
        assert first.ask(full.address, Ping(b"a"), Pong).data == b"a"
        full.go_on()
        assert full.line() == "full"
        with pytest.raises(PeerError, match="the process there has too many open files: `ulimit"):
            second.ask(full.address, Ping(), Pong)
        assert first.ask(full.address, Ping(b"b"), Pong).data == b"b"
        full.go_on()
        assert full.line() == "free"
        assert second.ask(full.address, Ping(b"c"), Pong).data == b"c"
        full.go_on()
        assert full.process.wait() == 0


_ZEROMQ = """
import zmq
none.limit()
router = zmq.Context().socket(zmq.ROUTER)
router.bind("ipc://" + sys.argv[1])
with none.left(0):
    print(sys.argv[1], flush=True)
    sys.stdin.readline()
"""


def test_a_full_process_dies_where_zeromq_accepts(tmp_path: Path) -> None:
    """The same without the guard: a listener of ZeroMQ at a Unix socket."""
    import socket

    pipe = subprocess.PIPE
    path = str(tmp_path / "s")
    with ready.Python("-c", _HEAD + _ZEROMQ, path, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline().decode().strip() == path
        with socket.socket(socket.AF_UNIX) as reader:
            assert until(lambda: reader.connect_ex(path) == 0 or child.poll() is not None, LIMIT)
            assert until(lambda: child.poll() is not None, LIMIT)
        assert child.returncode == -signal.SIGABRT
        assert b"Too many open files" in child.stderr.read()


_ATTACKED = """
server = Server(None)
none.limit(200)
with none.taken_at_random(7):
    print(server.address, flush=True)
    sys.stdin.readline()
print("free", flush=True)
sys.stdin.readline()
"""


def test_descriptors_that_go_at_any_moment_end_no_process() -> None:
    """Each of 200 connections is served, or refused by a sentence that names the limit."""
    full = Full(_ATTACKED)
    served = 0
    with full.process:
        refused = list[str]()
        for _ in range(200):
            with closing(Channel(timeout=20.0)) as reader:
                try:
                    served += reader.ask(full.address, Ping(b"x"), Pong).data == b"x"
                except PeerError as error:
                    refused.append(str(error))
        assert 0 < served < 200
        assert all("too many open files" in each for each in refused)
        full.go_on()
        assert full.line() == "free"
        with closing(Channel(timeout=20.0)) as reader:
            assert reader.ask(full.address, Ping(b"y"), Pong).data == b"y"
        full.go_on()
        assert full.process.wait() == 0


_FEW = """
from portakv.migrate import Owner, Reader, Shard
from portakv.serving.server.client import StoreClient
from portakv.serving.server.server import StoreServer
from portakv.serving.kv_events import EventPublisher
from portakv.serving.local import StoreTerms
from portakv.serving.server.link import Place
from portakv import KVView
from portakv.storage import BlockForm, BlockStore, Disk
import gc, tempfile, time, torch
folder = tempfile.mkdtemp()
SIZE = 64 << 20
view = KVView([torch.zeros(8, 2, 4, 2, 8)], "layer | block kv token head dim")
form = BlockForm.of(view, "model")
terms = StoreTerms.of({"folder": (folder,), "host": 1 << 20, "capacity": 64 << 20})
others = Server(None)
owner = Owner(Channel(), Shard(view), model="model")

def pull():
    channel = Channel(timeout=20.0)
    reader = Reader(channel, Shard(view), model="model")
    try:
        ticket = owner.offer([0, 1], tokens=8).ticket
        reader.pull(ticket, [2, 3]).synchronize(20)
    finally:
        reader.close()
        channel.close()

def ask():
    channel = Channel()
    try:
        channel.ask(others.address, Ping(), Pong)
    finally:
        channel.close()

made = {
    "unix": lambda: Channel().close(),
    "tcp": lambda: Channel("tcp://127.0.0.1:0", secret=SECRET).close(),
    "ask": ask,
    "pull": pull,
    "events": lambda: EventPublisher("tcp://127.0.0.1:0").close(),
    "server": lambda: StoreServer(terms).close(),
    "rank": lambda: StoreClient(Place.of_folder(folder), [form], "engine").close(),
    "disk": lambda: BlockStore(form, staging=1 << 20, tiers=[Disk(folder, capacity=SIZE)]).close(),
}[sys.argv[1]]
made()  # what the process opens once
most = none.limit(240)
for spare in (*range(12), 18, 30, 50, 230):
    with none.left(spare):
        before = none.count(most)
        try:
            made()
            print("made", spare)
        except PortaKVError as error:
            assert "too many open files: `ulimit -n` allows" in str(error), str(error)
            print("refused", spare)
        for _ in range(1000):
            gc.collect()
            if none.count(most) <= before:
                break
            time.sleep(0.01)
        else:
            sys.exit(f"{none.count(most) - before} descriptors are left")
made()
"""


QUICK = "unix", "disk"
WIDE = "tcp", "ask", "pull", "events", "server", "rank"


@pytest.mark.parametrize("what", [*QUICK, *(pytest.param(x, marks=pytest.mark.full) for x in WIDE)])
def test_few_descriptors_are_an_error_or_enough(what: str) -> None:
    """With none, a few or 230 free ones; nothing leaks, and it works again."""
    code, text = ran(_FEW, what)
    assert code == 0, text
    assert "refused 0" in text
    assert "made 230" in text


_SOFT = """
import re
import resource
most = none.limit(200)
resource.setrlimit(resource.RLIMIT_NOFILE, (most - 180, most))
Channel().close()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))
"""


def test_few_free_descriptors_raise_the_soft_limit() -> None:
    code, text = ran(_SOFT)
    assert (code, text) == (0, "True\n")


def test_enough_free_descriptors_leave_the_soft_limit() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert resources.free(resources.FEW) == resources.FEW
    Channel().close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


_NO_THREAD = """
def refuse(thread):
    raise RuntimeError("can't start new thread")

def make(*addresses):
    before = none.count(most)
    threading.Thread.start = refuse
    for address in addresses:
        try:
            Channel(address, secret=SECRET)
        except PortaKVError as error:
            assert "no thread can be started, see `ulimit -u`" in str(error), str(error)
        else:
            sys.exit("no error")
    threading.Thread.start = start
    assert none.count(most) == before

most = none.limit()
start = threading.Thread.start
make(None, "tcp://127.0.0.1:0")  # the first channel starts the loop of the process
Channel().close()
make("tcp://127.0.0.1:0")  # a later one at a Unix socket starts no thread
"""


def test_no_thread_is_an_error() -> None:
    code, text = ran(_NO_THREAD)
    assert code == 0, text


_MOUNTED = """
import tempfile
from portakv.serving.server.server import StoreServer
from portakv.serving.local import StoreTerms
try:
    server = Server(None)
    sizes = {"host": 1 << 20, "capacity": 64 << 20}
    with StoreServer(StoreTerms.of({"folder": (sys.argv[1],), **sizes})):
        print(Channel().ask(server.address, Ping(b"served"), Pong).data)
except PortaKVError as error:
    print(error)
"""
_READ_ONLY = "mount -t tmpfs -o ro none"
_TINY = "mount -t tmpfs -o size=4k,nr_inodes=1 none"


def mounted(commands: str, folder: Path) -> list[str]:
    """Return what a process prints whose folders are mounted so, in a namespace of its own."""
    shell = f'{commands} && exec "$0" "$@"'
    names = ["unshare", "-m", "sh", "-c"]
    try:
        allowed = subprocess.run([*names, commands], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this user may not mount anything in a namespace of its own")
    words = [*names, shell, sys.executable, "-c", _HEAD + _MOUNTED, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mount", [_READ_ONLY, _TINY])
def test_a_channel_and_a_store_need_no_shared_memory_folder(mount: str, tmp_path: Path) -> None:
    assert mounted(f"{mount} /dev/shm", tmp_path) == ["b'served'"]


def test_no_folder_for_a_socket_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an address or a port."""
    monkeypatch.setattr(channel, "FOLDERS", ("/proc", "/sys"))
    with pytest.raises(PeerError) as refused:
        Channel()
    for folder in channel.FOLDERS:
        assert re.search(rf"{folder} \([\w ]+; \d+ bytes and", str(refused.value))
    assert "port" not in str(refused.value)
