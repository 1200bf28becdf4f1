# SPDX-License-Identifier: Apache-2.0
"""A bucket with the requests of S3 that the remote tier makes, in memory, with faults.

For processes without a package for test servers, such as an engine's.
"""

from __future__ import annotations

import hashlib
import re
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FOREVER = 600.0  # seconds for which a silent bucket is silent
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
REFUSED = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
MISSING = b"<Error><Code>NoSuchKey</Code></Error>"


@dataclass
class Faults:
    """What a bucket does from now on.

    Attributes:
        refuses: each request gets 403.
        silent: no request gets an answer.
        silent_reads: no read of an object gets an answer; other requests do.
        cuts: bodies of reads end after half of their bytes.
        zeros: the second half of the bodies of reads is zeros.
        puts: takes the path of a put and whether it has a condition; returns the status and the
            body of an answer in place of the bucket's, or None.
    """

    refuses: bool = False
    silent: bool = False
    silent_reads: bool = False
    cuts: bool = False
    zeros: bool = False
    puts: Callable[[str, bool], tuple[int, bytes] | None] = lambda path, conditional: None


class SmallBucket(socketserver.ThreadingTCPServer):
    """Listens on a free port of this host, in threads of this process.

    Attributes:
        faults: replaced by a test.
        objects: by their paths.
        reads: of objects that came.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults = Faults()
        self.objects = dict[str, bytes]()
        self.reads = 0
        self._over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the bucket ``s3://small``."""
        return {
            "endpoint": f"http://127.0.0.1:{self.server_address[1]}",
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }

    def be_silent(self) -> None:
        """Wait in place of an answer."""
        self._over.wait(FOREVER)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away."""


@dataclass
class _Answer:
    status: HTTPStatus = HTTPStatus.OK
    body: bytes = b""
    fields: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    """Requests of one connection."""

    protocol_version = "HTTP/1.1"
    server: SmallBucket

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = urlsplit(self.path)
        path = unquote(parts.path).split("/", 2)[-1]
        lists = "list-type" in parse_qs(parts.query)
        faults = self.server.faults
        reads = self.command == "GET" and not lists
        self.server.reads += reads
        if faults.silent or (reads and faults.silent_reads):
            self.server.be_silent()
        if faults.refuses:
            self._send(_Answer(HTTPStatus.FORBIDDEN, REFUSED))
        elif self.command == "PUT":
            self._send(self._put(path, body))
        elif lists:
            self._send(self._list(parse_qs(parts.query).get("prefix", [""])[0]))
        else:
            self._send(self._get(path))

    def _put(self, path: str, body: bytes) -> _Answer:
        replaced = self.headers.get("if-match")
        creates = self.headers.get("if-none-match") == "*"
        answer = self.server.faults.puts(path, creates or replaced is not None)
        if answer is not None:
            return _Answer(HTTPStatus(answer[0]), answer[1])
        before = self.server.objects.get(path)
        if creates and before is not None:
            return _Answer(HTTPStatus.PRECONDITION_FAILED)
        if replaced is not None and (before is None or replaced != _tag(before)):
            return _Answer(HTTPStatus.PRECONDITION_FAILED)
        self.server.objects[path] = body
        return _Answer(fields={"ETag": _tag(body)})

    def _list(self, prefix: str) -> _Answer:
        """Return the folders below a prefix: the remote tier lists no other."""
        names = {path[len(prefix) :] for path in self.server.objects if path.startswith(prefix)}
        folders = sorted({prefix + name.split("/")[0] + "/" for name in names if "/" in name})
        found = "".join(f"<CommonPrefixes><Prefix>{x}</Prefix></CommonPrefixes>" for x in folders)
        text = f"<Prefix>{prefix}</Prefix><KeyCount>{len(folders)}</KeyCount>{found}"
        text = f"<ListBucketResult><Name>small</Name><IsTruncated>false</IsTruncated>{text}"
        return _Answer(body=f"{text}</ListBucketResult>".encode())

    def _get(self, path: str) -> _Answer:
        data = self.server.objects.get(path)
        if data is None:
            return _Answer(HTTPStatus.NOT_FOUND, MISSING)
        fields = {"ETag": _tag(data), "Last-Modified": formatdate(usegmt=True)}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        status = HTTPStatus.OK
        if span:
            first = int(span[1])
            last = min(int(span[2]), len(data) - 1)
            fields["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
            status = HTTPStatus.PARTIAL_CONTENT
        if self.server.faults.zeros:
            data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        return _Answer(status, data, fields)

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = answer.body
        if self.server.faults.cuts and self.command == "GET":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
