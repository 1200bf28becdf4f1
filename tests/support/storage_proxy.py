# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of an object store, which cuts, stalls, slows and flips for the tests of the
remote tier, and records the requests."""

from __future__ import annotations

import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Fault:
    """The fault of the next ``times`` requests whose first line matches ``match``."""

    match: str
    times: int = 1
    cut: int | None = None  #: after so many bytes of the answer's body; -1: before its head
    reset: bool = False  #: cut by RST instead of FIN
    stall: float = 0.0  #: seconds before the last byte that is sent
    silent: float = 0.0  #: seconds before the answer's head
    rate: float = 0.0  #: bytes a second, of the answer's body
    step: int = 1 << 16  #: bytes that go at a time then
    slow_upload: float = 0.0  #: bytes a second, of the request's body
    flip: int | None = None  #: the byte of the answer's body whose lowest bit is turned
    answer: bytes = b""  #: status and body, in place of the store's
    whole: bool = False  #: the request's Range is left out
    before: Callable[[], object] | None = None  #: called before the request goes to the store


class Proxy(socketserver.ThreadingTCPServer):
    """Listens on a free port of this host, and forwards to the store at ``host``, ``port``.

    Attributes:
        faults: played in their order; the first that matches and has times left is taken.
        requests: the first line of each request and its Range, as they came.
        sent: bytes of answers' bodies that went out.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.store = (host, port)
        self.faults = list[Fault]()
        self.requests = list[str]()
        self.sent = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """Return the address at which it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def play(self, *faults: Fault) -> None:
        """Play these faults from now on, and forget earlier requests."""
        with self.lock:
            self.faults = list(faults)
            self.requests = []
            self.sent = 0

    def fault_of(self, line: str, wanted: str) -> Fault:
        """Return the fault of a request; one that changes nothing if there is none."""
        with self.lock:
            self.requests.append(f"{line} {wanted}".strip())
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return Fault("")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away: some tests do this."""


class _Request(socketserver.StreamRequestHandler):
    """One request of one connection."""

    server: Proxy

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        if not head:
            return
        line, *fields = head.decode().splitlines()
        named = {k.lower(): v.strip() for k, _, v in (one.partition(":") for one in fields)}
        fault = self.server.fault_of(line, named.get("range", ""))
        body = self._body(int(named.get("content-length", 0)), fault.slow_upload)
        if fault.before:
            fault.before()
        left = {"connection", "expect", *(["range"] if fault.whole else [])}
        retained = [one for one in fields if one.partition(":")[0].lower() not in left]
        status, _, text = fault.answer.partition(b"\n")
        answer = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)
        if not status:
            request = "\r\n".join([line, *retained, "Connection: close", "\r\n"]).encode() + body
            with socket.create_connection(self.server.store) as store:
                store.sendall(request)
                answer = b"".join(iter(lambda: store.recv(1 << 20), b""))
        self._answer(fault, answer)

    def _body(self, nbytes: int, rate: float) -> bytes:
        pieces = []
        while nbytes:
            pieces.append(self.rfile.read(min(nbytes, 1 << 16 if rate else nbytes)))
            nbytes -= len(pieces[-1])
            if rate:
                time.sleep(len(pieces[-1]) / rate)
        return b"".join(pieces)

    def _answer(self, fault: Fault, answer: bytes) -> None:
        head, _, rest = answer.partition(b"\r\n\r\n")
        body = bytearray(rest)
        if fault.flip is not None:
            body[fault.flip] ^= 1
        if fault.cut is not None:
            body = body[: max(0, fault.cut)]
        last = len(body) - 1 if fault.stall else len(body)
        time.sleep(fault.silent)
        if fault.cut != -1:
            self.wfile.write(head + b"\r\nConnection: close\r\n\r\n")
            step = fault.step if fault.rate else 1 << 20
            for at in range(0, last, step):
                self.server.sent += min(last, at + step) - at
                self.wfile.write(body[at : min(last, at + step)])
                if fault.rate:
                    time.sleep(step / fault.rate)
            time.sleep(fault.stall)
            self.server.sent += len(body) - last
            self.wfile.write(body[last:])
        if fault.reset:
            time.sleep(0.02)  # what was sent before an RST must have been read
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
