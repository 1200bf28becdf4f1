# SPDX-License-Identifier: Apache-2.0
"""Channels execute requests once, report ended peers, reject strangers and keep secrets."""

from __future__ import annotations

import ast
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from support import ready, waits
from support.migrate_channels import SECRET, Ping, Pong, Server, keys, server_and_asker
from support.waits import until

import portakv.migrate
from portakv.errors import InvalidTerms, PeerError, SlotError, TransferTimeout
from portakv.migrate import messages
from portakv.migrate.channel import ANSWER, BACK, HEAD, KEPT, LIMIT, Channel, Peer, answer_of
from portakv.migrate.messages import VERSION, Message

TCP = "tcp://127.0.0.1:0"


class Unknown(Message, frozen=True):
    """A message that no channel serves."""

    data: bytes = b""


@pytest.fixture(params=[None, TCP], ids=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Server, Channel]]:
    with server_and_asker(request.param) as both:
        yield both


@pytest.fixture
def by_tcp() -> Iterator[tuple[Server, Channel]]:
    with server_and_asker(TCP) as both:
        yield both


def asking(secret: bytes | None = None) -> closing[Channel]:
    """A channel that a with block closes."""
    return closing(Channel(secret=secret, timeout=3.0))


class Raw:
    """A plain DEALER of ZeroMQ, with the requested keys."""

    def __init__(self, server: Server, how: str = "right") -> None:
        public, private = keys(SECRET)
        self.context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 2000
        self.socket.sndtimeo = 2000
        if how != "no curve":
            self.socket.curve_serverkey = public
            local = zmq.curve_keypair() if how == "other key" else (public, private)
            self.socket.curve_publickey, self.socket.curve_secretkey = local
        self.socket.connect(server.address)

    def request(self, body: bytes, number: int = 1, version: int = VERSION) -> bytes:
        self.socket.send(HEAD.pack(version, b"r" * 16, 1, number) + body)
        return self.socket.recv() if number else b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(0)


def test_many_threads_ask_at_once(pair: tuple[Server, Channel]) -> None:
    server, asker = pair
    wrong = list[Any]()

    def work(name: int) -> None:
        for n in range(100):
            data = b"%d %d" % (name, n)
            if asker.ask(server.address, Ping(data), Pong).data != data:
                wrong.append(data)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    assert sorted(server.pings) == sorted(b"%d %d" % (a, b) for a in range(4) for b in range(100))


def test_threads_that_serve_at_once_are_all_answered(
    pair: tuple[Server, Channel], request: pytest.FixtureRequest
) -> None:
    server, asker = pair
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    kinds = [type(f"Ping{n}", (Ping,), {}) for n in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for n in range(0, 200, 4):
            list(pool.map(lambda kind: server.channel.serve(kind, server.answer), kinds[n : n + 4]))
            for kind in kinds[n : n + 4]:
                asker.ask(server.address, kind(), Pong)


def test_a_refusal_is_the_sentence_of_the_error_there(pair: tuple[Server, Channel]) -> None:
    server, asker = pair

    def refuse(_: Peer, ping: Ping) -> Pong:
        raise (
            SlotError("Slot 9 is past the end")
            if ping.data
            else ZeroDivisionError("never reported")
        )

    server.channel.serve(Ping, refuse)
    with pytest.raises(PeerError, match="was rejected: Slot 9 is past the end"):
        asker.ask(server.address, Ping(b"9"), Pong)
    with pytest.raises(PeerError, match="it failed there by ZeroDivisionError"):
        asker.ask(server.address, Ping(), Pong)
    assert server.counts == {"refused": 1, "failed": 1}


def test_an_answer_of_another_kind_is_an_error(pair: tuple[Server, Channel]) -> None:
    server, asker = pair
    with pytest.raises(PeerError, match="an answer that is not valid"):
        asker.ask(server.address, Ping(), Unknown)


def test_an_answer_too_large_is_a_refusal(pair: tuple[Server, Channel]) -> None:
    server, asker = pair
    server.channel.serve(Ping, lambda *_: Pong(bytes(LIMIT)))
    assert len(asker.ask(server.address, Ping(), Pong).data) == LIMIT  # answers may be larger
    server.channel.serve(Ping, lambda *_: Pong(bytes(ANSWER)))
    with pytest.raises(PeerError, match="its answer has 1048"):
        asker.ask(server.address, Ping(), Pong)
    with pytest.raises(PeerError, match="a message has at most 65536"):
        asker.ask(server.address, Ping(bytes(LIMIT)), Pong)
    fits = Ping(bytes(LIMIT - len(msgspec.msgpack.encode(Ping(bytes(60000)))) + 60000))
    server.channel.serve(Ping, lambda _, ping: Pong(b"", len(ping.data)))
    assert asker.ask(server.address, fits, Pong).count == len(fits.data)


def test_a_peer_that_closes_is_gone_at_once_on_both_sides(pair: tuple[Server, Channel]) -> None:
    server, asker = pair
    asker.ask(server.address, Ping(), Pong)
    (peer,) = server.peers
    ends = list[str]()
    peer.on_gone(lambda: ends.append("peer"))
    forget = peer.on_gone(lambda: ends.append("forgotten"))
    forget()
    other = Channel(secret=SECRET if server.address.startswith("tcp") else None)
    other.ask(server.address, Ping(), Pong)
    other.watch(server.address, lambda: ends.append("watch"))
    asker.close()
    assert until(lambda: ends == ["peer"], waits.LIMIT)
    assert peer.gone
    peer.on_gone(lambda: ends.append("late"))
    server.channel.close()
    assert until(lambda: ends == ["peer", "late", "watch"], waits.LIMIT)
    with pytest.raises(PeerError, match=r"no channel listens|no handshake|Expected an address"):
        other.ask(server.address, Ping(), Pong, 2.0)
    assert other.statistics()["links"] == 0
    other.close()


def test_a_server_that_starts_again_at_its_address_is_reached() -> None:
    """Fault 6, as far as it is the channel's: another process has the same address."""
    first = Server()
    with asking(SECRET) as asker:
        asker.ask(first.address, Ping(), Pong)
        first.channel.close()
        second = Server(first.address)
        assert until(lambda: asker.statistics()["links"] == 0 or asker.counts["lost"], waits.LIMIT)
        for _ in range(2):
            try:
                assert asker.ask(first.address, Ping(), Pong).count == 1
                break
            except PeerError:  # reported once, if the request came between the two
                continue
        second.channel.close()


def test_a_server_that_is_slow_carries_a_request_out_once(by_tcp: tuple[Server, Channel]) -> None:
    """Fault 10, with no connection broken: nothing is repeated, and a late answer is dropped."""
    server, asker = by_tcp
    gate = threading.Event()
    requests = list[bytes]()

    def slow(_: Peer, ping: Ping) -> Pong:
        requests.append(ping.data)
        gate.wait(3)
        return Pong(ping.data)

    server.channel.serve(Ping, slow)
    with pytest.raises(TransferTimeout, match="no answer in time; the connection stands"):
        asker.ask(server.address, Ping(b"a"), Pong, 0.6)
    gate.set()
    assert asker.ask(server.address, Ping(b"b"), Pong).data == b"b"
    assert (requests, server.counts["repeated"]) == ([b"a", b"b"], 0)


@pytest.mark.parametrize("how", ["wrong secret", "no curve", "other key", "scan", "silent"])
def test_strangers_get_no_answer(
    how: str, by_tcp: tuple[Server, Channel], caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 13. No answer, and a count, which the log reports by cause; other peers are served."""
    server, asker = by_tcp
    host, _, port = server.address.removeprefix("tcp://").rpartition(":")
    with caplog.at_level(logging.WARNING):
        if how == "wrong secret":
            with asking(b"another secret of sixteen bytes") as stranger:
                with pytest.raises(PeerError, match="the secret differs"):
                    stranger.ask(server.address, Ping(), Pong)
                assert stranger.statistics()["links"] == 0
        elif how in ("scan", "silent"):
            with socket.create_connection((host, int(port))) as scan:
                if how == "silent":
                    scan.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
                    with suppress(ConnectionResetError):
                        assert b"Pong" not in scan.recv(4096)
        else:
            with Raw(server, how) as raw:
                raw.socket.rcvtimeo = 300
                with pytest.raises(zmq.Again):
                    raw.request(msgspec.msgpack.encode(Ping()))
        assert until(lambda: server.counts["strangers"] >= 1, waits.LIMIT)
        # The count comes before the line of the log.
        if how == "no curve":  # ZeroMQ reports the cause, or not
            line = "unknown|another secret"
        elif how in ("wrong secret", "other key"):
            line = "connections with another secret"
        else:
            line = "no message from unknown"
        assert until(lambda: re.search(line, caplog.text), waits.LIMIT)
    assert server.pings == []
    assert server.channel.statistics()["peers"] == 0
    assert asker.ask(server.address, Ping(), Pong).count == 1


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode({"type": "Ping", "data": b"", "more": 1}),
        msgspec.msgpack.encode({"type": "Ping", "data": "text"}),
        msgspec.msgpack.encode({"type": "Unknown"}),
        msgspec.msgpack.encode(Unknown()),
        b"\x91" * 60000,
        b"\x81\xa4more" + b"\x91" * 60000,
        b"\x82\xa4type\xa4Ping\xa4data\xa1\xff",
        b"",
    ],
    ids=["field", "type", "tag", "not served", "nested", "nested in a field", "text", "empty"],
)
def test_what_has_another_schema_is_refused(body: bytes, by_tcp: tuple[Server, Channel]) -> None:
    """Fault 14. In constant words, and others are served."""
    server, asker = by_tcp
    with Raw(server) as raw:
        back = raw.request(body)
        assert BACK.unpack_from(back) == (VERSION, True, 1)
        assert back[BACK.size :] == b"the message is not known there"
        assert server.counts["schema"] == 1
        assert asker.ask(server.address, Ping(), Pong).count == 1


def test_a_message_over_64_kib_ends_its_connection(by_tcp: tuple[Server, Channel]) -> None:
    """Fault 14. One that is far larger ends it, one that is a little larger is counted."""
    server, asker = by_tcp
    with Raw(server) as raw:
        raw.request(msgspec.msgpack.encode(Ping()))
        raw.socket.send(HEAD.pack(VERSION, b"r" * 16, 1, 2) + bytes(LIMIT + 1))
        assert until(lambda: server.counts["size"] == 1)
        assert server.counts["gone"] == 0
        raw.socket.send(bytes(1 << 20))
        assert until(lambda: server.counts["gone"] == 1)
        assert asker.ask(server.address, Ping(), Pong).count == 2


def test_floods_hold_up_nobody(by_tcp: tuple[Server, Channel]) -> None:
    """Fault 14. Somebody who sends what he can, and never reads, is one of several."""
    server, asker = by_tcp
    stop = threading.Event()
    with Raw(server) as raw:

        def flood() -> None:
            n = 1
            while not stop.is_set():
                n += 1
                raw.socket.send(
                    HEAD.pack(VERSION, b"r" * 16, 1, n) + msgspec.msgpack.encode(Ping(b"flood"))
                )

        thread = threading.Thread(target=flood)
        thread.start()
        assert until(lambda: len(server.pings) > 1000)
        for _ in range(50):
            asker.ask(server.address, Ping(), Pong, 2.0)
        stop.set()
        thread.join()
    assert until(lambda: server.counts["gone"] == 1)


def test_a_message_under_another_channels_name_is_refused() -> None:
    """The connection serves another channel already; the error does not say that it is full."""
    with server_and_asker() as (server, asker):
        asker.ask(server.address, Ping(), Pong)
        asker.id = bytes(reversed(asker.id))
        with pytest.raises(PeerError, match="the connection is another channel's"):
            asker.ask(server.address, Ping(), Pong)


def test_errors_say_what_was_asked_and_not_the_name_of_its_message() -> None:
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type)]
    requests = [kind for kind in kinds if issubclass(kind, messages.Message)]
    names = {kind.__name__ for kind in requests}
    assert {"Hello", "Close", "Confirm"} & names
    for kind in requests:
        assert not names & {*kind.purpose.split()}
    with asking() as asker, pytest.raises(PeerError) as error:
        asker.ask("ipc:///nowhere", Ping(), Pong)
    assert "Ping" not in str(error.value)


def test_another_release_is_refused_by_a_sentence(by_tcp: tuple[Server, Channel]) -> None:
    """Fault 34. Whatever the other version sends after its first byte."""
    server, _ = by_tcp
    with Raw(server) as raw:
        back = raw.request(b"whatever", version=VERSION + 1)
        assert b"release of version %d, not %d" % (VERSION, VERSION + 1) in back
        assert (server.pings, server.counts["version"]) == ([], 1)


def mutated(seed: int) -> bytes:
    """A request in which bytes were changed, left out, doubled or appended; every other one has a
    head that is right."""
    draw = random.Random(seed)
    data = bytearray(msgspec.msgpack.encode(Ping(b"mutated")))
    head = HEAD.pack(VERSION, b"r" * 16, 1 + seed % 2, seed + 1)
    data[:0] = b"" if seed % 2 else head
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randrange(1, 40)]
        else:
            data += draw.randbytes(draw.randrange(1, 200))
    return head + bytes(data) if seed % 2 else bytes(data)


@pytest.mark.parametrize(
    "count", [pytest.param(2000), pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_mutated_messages_do_nothing_and_others_are_served(
    count: int, by_tcp: tuple[Server, Channel]
) -> None:
    server, asker = by_tcp
    ended = list[BaseException]()
    with Raw(server) as raw:

        def send() -> None:
            try:
                for n in range(count):
                    raw.socket.send(mutated(n))
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=send)
        served = 0
        thread.start()
        while thread.is_alive() or served < 20:
            assert asker.ask(server.address, Ping(b"well"), Pong).data == b"well"
            served += 1
        thread.join()
        assert ended == []
        assert until(lambda: server.counts["schema"] > count // 10)  # of those on their way, too
        requests = (b"mutated", b"well")  # a change may hit the head alone, or the data
        assert sum(data not in requests for data in server.pings) < count // 4
        assert server.counts["failed"] == 0


def test_a_forked_child_refuses_and_the_parent_goes_on(pair: tuple[Server, Channel]) -> None:
    """Fault 31, of a fork: the child ends in order, and takes nothing with it."""
    server, asker = pair
    asker.ask(server.address, Ping(), Pong)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            asker.ask(server.address, Ping(), Pong)
        except PeerError as error:
            os.write(writing, str(error).encode())
        asker.close()
        server.channel.close()
        os._exit(0)
    os.close(writing)  # so that the end of the child ends the pipe
    assert b"got one that belongs to the process that this one was forked from" in os.read(
        reading, 4096
    )
    os.close(reading)
    assert os.waitpid(child, 0)[1] == 0
    assert asker.ask(server.address, Ping(), Pong).count == 2


CHILD = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
from support.migrate_channels import Ping, Pong, Server
servers = [Server(None), Server()]
print(*(server.address for server in servers), flush=True)
"""


def test_a_process_that_is_killed_is_gone_at_once() -> None:
    """Faults 4 and 7, as far as they are the channel's; no file is left."""
    pipe = subprocess.PIPE
    script = CHILD + "sys.stdin.read()"
    with ready.Python("-c", script, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        by_unix, by_tcp = child.stdout.readline().decode().split()
        with asking() as one, asking(SECRET) as other:
            ends = list[str]()
            for asker, address in ((one, by_unix), (other, by_tcp)):
                asker.ask(address, Ping(), Pong)
                asker.watch(address, partial(ends.append, address))
            child.send_signal(signal.SIGKILL)
            assert until(lambda: len(ends) == 2, waits.LIMIT)
            for asker, address in ((one, by_unix), (other, by_tcp)):
                with pytest.raises(PeerError):
                    asker.ask(address, Ping(), Pong)
            assert not os.path.exists(by_unix.removeprefix("ipc://"))


def test_the_interpreters_end_closes(tmp_path: Path) -> None:
    """Fault 31, of an exit with an open connection that was not closed. The folder for
    temporary files is too long for a socket's path."""
    (folder := tmp_path / ("long" * 30)).mkdir()
    text = CHILD + "from portakv.migrate.channel import Channel\n"
    text += "print(Channel().ask(servers[0].address, Ping(), Pong).count)\n"
    script = [sys.executable, "-W", "error::ResourceWarning", "-c", text]
    where = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(script, capture_output=True, timeout=waits.LIMIT, env=where)
    assert (done.returncode, done.stdout.split()[-1], done.stderr) == (0, b"1", b"")


@contextmanager
def raw_server() -> Iterator[zmq.Socket[bytes]]:
    """A ROUTER of ZeroMQ's own, with the keys of the secret."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = keys(SECRET)
        yield router


def test_garbage_for_an_answer_is_an_error_and_the_next_one_is_taken() -> None:
    """The peer has the secret, and is another release or no channel at all."""
    right = msgspec.msgpack.encode(Pong(b"right", 7))
    garbage = [
        b"",
        b"\1",
        b"\2",
        b"\1\0",
        BACK.pack(VERSION, True, 5)[:-1],
        BACK.pack(VERSION, False, 6),
        BACK.pack(VERSION, False, 7) + b"\xff",
        BACK.pack(VERSION, True, 8) + b"\xff",
        BACK.pack(VERSION, False, 9) + right,
    ]
    with raw_server() as router, asking(SECRET) as asker:
        address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"

        def answer() -> None:
            for each in garbage:
                router.send_multipart([router.recv_multipart()[0], each])

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in garbage[:-1]:
            with pytest.raises((PeerError, TransferTimeout)):
                asker.ask(address, Ping(), Pong, 0.1)
        assert asker.ask(address, Ping(), Pong) == Pong(b"right", 7)
        thread.join()


def test_a_channel_asks_more_than_a_few_hundred() -> None:
    """ZeroMQ has 1,023 sockets by default, and a link takes three."""
    with raw_server() as router, asking(SECRET) as asker:
        for _ in range(400):
            port = router.bind_to_random_port("tcp://127.0.0.1")
            asker.watch(f"tcp://127.0.0.1:{port}", lambda: None)
        assert asker.statistics()["links"] == 400


def test_strangers_who_take_all_descriptors_do_not_hold_up_those_who_are_served() -> None:
    """Fault 13. Each has one for the time of a handshake; what waits meanwhile is not served."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))\n"
    script = CHILD + limits + "sys.stdin.read()"
    pipe = subprocess.PIPE
    child = ready.Python("-c", script, stdin=pipe, stdout=pipe)
    with child, asking(SECRET) as asker:
        assert child.stdout is not None
        address = child.stdout.readline().decode().split()[1]
        asker.ask(address, Ping(), Pong)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        strangers = [socket.create_connection((host, int(port))) for _ in range(90)]
        for _ in range(20):
            asker.ask(address, Ping(), Pong, 1.0)
        for each in strangers:
            each.close()
        child.kill()


def test_a_secret_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not by repr, in the log, by an error, or by a traceback that shows the values of names."""
    library = Path(portakv.__file__).resolve().parent
    texts = list[str]()

    def shows(call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        except (PeerError, InvalidTerms) as error:
            for frame in traceback.TracebackException.from_exception(
                error, capture_locals=True
            ).stack:
                # The frames of a caller are its own, whatever the folder of the clone is called.
                if Path(frame.filename).resolve().is_relative_to(library):
                    texts.append(f"{frame.name}: {frame.locals}")
            texts.append(str(error))

    with caplog.at_level(logging.DEBUG):
        server = Server(secret=SECRETS[0])
        texts += [repr(server.channel), str(server.channel.statistics())]
        with asking(SECRET) as other:
            shows(other.ask, server.address, Ping(), Pong)
            for secret, address in zip(
                SECRETS, ("tcp://203.0.113.9:0", "tcp://*:1", None), strict=True
            ):
                shows(lambda: Channel(address, secret=secret))  # noqa: B023
        server.channel.close()
    assert len(texts) > 10
    shown = "\n".join([*texts, caplog.text])
    for each in (SECRET, *SECRETS):
        for one in (each, *keys(each)):
            assert one.decode() not in shown


SECRETS = (b"a secret that no one may read", b"another that no one may read", b"too short")


def test_nothing_looks_at_the_wall_clock() -> None:
    """Fault 35. Leases and timeouts are of the monotonic clock, in every module."""
    wrong = list[str]()
    for path in Path(portakv.migrate.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                allowed = {"monotonic", "monotonic_ns", "perf_counter", "sleep", "timedelta"}
                names = {alias.name for alias in node.names} - allowed
                wrong += [f"{path.name}: {name}" for name in names]
            clocks = ("time.time", "time.time_ns", "datetime.datetime")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in clocks:
                wrong.append(f"{path.name}: {ast.unparse(node)}")
    assert wrong == []


def test_several_are_asked_at_once_each_with_its_own_answer() -> None:
    """Also one of them twice, and one that is not there; no order of askers holds others up."""
    servers = [Server(None) for _ in range(3)]
    to = [x.address for x in (*servers, servers[0])]
    with closing(Channel()) as asker:
        requests = [(address, Ping(bytes([n]))) for n, address in enumerate([*to, "ipc:///no"])]
        threads = [
            threading.Thread(target=asker.ask_all, args=(requests[::step], Pong))
            for step in (1, -1)
        ]
        for _ in range(20):
            *results, gone = asker.ask_all(requests, Pong)
            assert [getattr(x, "data", None) for x in results] == [b"\0", b"\1", b"\2", b"\3"]
            assert isinstance(gone, PeerError)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        servers[1].channel.close()
        results = asker.ask_all(requests[:3], Pong)
        assert [type(x) for x in results] == [Pong, PeerError, Pong]
    for server in servers:
        server.channel.close()


def test_a_question_that_fails_in_its_own_way_holds_up_no_other(
    pair: tuple[Server, Channel],
) -> None:
    """It is one of several, after another was sent; also while a caller retains the error."""
    server, asker = pair
    wrong: Any = Ping(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError) as raised:
        asker.ask_all([(server.address, Ping()), (server.address, wrong)], Pong)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asker.ask, server.address, Ping(b"well"), Pong, 1.0).result().data
    assert raised.value


def test_a_message_of_several_frames_ends_its_connection(by_tcp: tuple[Server, Channel]) -> None:
    server, asker = by_tcp
    with Raw(server) as raw:
        raw.request(msgspec.msgpack.encode(Ping()))
        assert until(lambda: server.channel.statistics()["peers"] == 1, waits.LIMIT)
        head = HEAD.pack(VERSION, b"r" * 16, 1, 2)
        raw.socket.send_multipart([head + bytes(1000)] * 20)
        assert until(lambda: server.counts["gone"] == 1, waits.LIMIT)
        assert server.counts["size"] == 1
    assert asker.ask(server.address, Ping(b"on"), Pong).data == b"on"


def test_kept_answers_are_bounded_in_bytes(by_tcp: tuple[Server, Channel]) -> None:
    """One connection has one link, and all links together keep what the bound says."""
    server, _ = by_tcp
    answer = bytes(ANSWER - 1000)
    server.channel.serve(Ping, lambda *_: Pong(answer))
    body = msgspec.msgpack.encode(Ping())
    with Raw(server) as raw:
        raw.request(body)
        for link in range(2, 10):
            raw.socket.send(HEAD.pack(VERSION, b"r" * 16, link, 1) + body)
            raw.socket.recv()
        assert server.channel.statistics()["kept_bytes"] < 2 * ANSWER
    for n in range(40):
        with Raw(server) as raw:
            raw.socket.send(HEAD.pack(VERSION, b"%16d" % n, 1, 1) + body)
            raw.socket.recv()
    assert 0 < server.channel.statistics()["kept_bytes"] <= KEPT


def test_a_question_ends_when_nothing_waits_for_it(by_tcp: tuple[Server, Channel]) -> None:
    server, asker = by_tcp
    release = threading.Event()
    stop = threading.Event()
    answer: Any = lambda *_: release.wait(waits.LIMIT) and Pong()  # noqa: E731
    server.channel.serve(Ping, answer)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(TransferTimeout, match="was cancelled"):
        asker.ask(server.address, Ping(), Pong, 8.0, stop.is_set)
    release.set()


def test_a_secret_that_is_no_text_of_utf8_is_not_shown() -> None:
    """Random bytes in a variable are such a secret; the codec's error would show it."""
    secret = "hunter2-hunter2-hunter2-\udcff"
    with pytest.raises(InvalidTerms, match=r"secret that UTF-8 can hold.*Pass bytes") as error:
        Channel(secret=secret)
    chain = [error.value, error.value.__cause__, error.value.__context__]
    assert not any("hunter2" in repr(each) for each in chain)


def test_what_a_peer_says_is_shown_on_one_line(pair: tuple[Server, Channel]) -> None:
    """Whatever its answer has; one of another version is named as that."""
    server, asker = pair

    def refuse(*_: object) -> None:
        raise SlotError("\x1b[2Jgone\nforged" + "x" * 10_000)

    server.channel.serve(Ping, refuse)
    with pytest.raises(PeerError) as error:
        asker.ask(server.address, Ping(), Pong)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 5000
    with pytest.raises(PeerError, match=f"version {VERSION} got an answer of version 9"):
        answer_of(bytes([9]) + b"?" * 20, server.address, Ping(), Pong)
