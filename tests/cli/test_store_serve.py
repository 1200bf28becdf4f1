# SPDX-License-Identifier: Apache-2.0
"""`portakv store serve`: a process that keeps the blocks of engines."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.command_line import run
from support.store_server_processes import Worker, nursery, prompt
from support.waits import LIMIT, until

from portakv.cli.store import add_options, events_of
from portakv.serving import Place

pytestmark = pytest.mark.xdist_group("keeper")
_SERVE = """
import os, sys
from portakv.cli import main
out = open(path, "w")
os.dup2(out.fileno(), 1)
sys.stdout = os.fdopen(1, "w")
tell("begun")
tell(main(["store", "serve", *words]))
"""
_RANK = """
from support.store_server_processes import *
rank = Rank(folder)
answer = rank.client.wait(LIMIT)
"""


class Server:
    """A process that runs the command."""

    def __init__(self, out: Path, *words: str) -> None:
        self._out = out
        self.pid, _ = nursery().born(_SERVE, path=str(out), words=words)

    def says(self, text: str) -> bool:
        return until(lambda: text in " ".join(self._out.read_text().split()), LIMIT)

    def answers(self) -> list[Any]:
        """Return the JSON values that it has printed."""
        decoder = json.JSONDecoder()
        text = self._out.read_text().strip()
        values = list[Any]()
        while text:
            value, end = decoder.raw_decode(text)
            values.append(value)
            text = text[end:].strip()
        return values

    def end(self, number: signal.Signals) -> Any:
        """Send a signal, and return the exit code of the command."""
        os.kill(self.pid, number)
        return nursery().hear(self.pid)


@pytest.mark.parametrize(
    "how", [["-c", "import sys, portakv_command as c; sys.exit(c.main())"], ["-m", "portakv"]]
)
def test_a_service_without_standard_streams_ends_in_order(how: list[str], tmp_path: Path) -> None:
    """No descriptor of its own has their numbers."""
    folder = tmp_path / "store"
    sizes = ["--host", "1M", "--staging", "1M", "--capacity", "64M"]
    words = [sys.executable, *how, "store", "serve", str(folder), *sizes]
    shell = 'exec "$@" <&- >&- 2>&-'
    with subprocess.Popen(["sh", "-c", shell, "sh", *words]) as service:
        try:
            served = folder / "keeper"
            assert until(lambda: served.exists() and served.read_text(), LIMIT)
            streams = [os.readlink(f"/proc/{service.pid}/fd/{number}") for number in range(3)]
            assert streams == [os.devnull] * 3
            service.terminate()
            assert service.wait(LIMIT) == 0
        finally:
            service.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """Another one stands by, and serves then. What ranks have saved is there."""
    folder = str(tmp_path / "store")
    words = folder, "--host", "1M", "--staging", "1M", "--capacity", "64M"
    first = Server(tmp_path / "first", *words)
    assert first.says(f"This process serves {folder} to the engines of this host")
    second = Server(tmp_path / "second", *words)
    assert second.says(f"Another process serves {folder}. This one stands by.")
    with Worker(nursery()) as rank:
        assert rank.do(_RANK, folder=folder)
        assert rank.do("answer = rank.saved(tokens)", tokens=prompt(1, 2)) == [True] * 2
        assert first.end(number) == 0
        assert second.says(f"This process serves {folder}")
        load = "answer = rank.client.wait(LIMIT) and rank.load(tokens)"
        assert until(lambda: rank.do(load) == [True] * 2, LIMIT)
    assert second.end(number) == 0
    assert Place.of_folder(folder).address() == ""


def test_json_says_whether_it_serves(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    server = Server(tmp_path / "out", folder, str(tmp_path / "other"), "--json")
    assert server.says("serves")
    assert server.end(signal.SIGTERM) == 0
    assert server.answers() == [{"folder": folder, "serves": True}]


def test_a_bucket_is_served(tmp_path: Path) -> None:
    bucket = f"file://{tmp_path / 'bucket'}"
    options = "--bucket-options", '{"workers": 2}', "--host", "0"
    words = str(tmp_path / "store"), "--bucket", bucket, *options
    server = Server(tmp_path / "out", *words)
    assert server.says("with 0 B of host memory")
    assert server.says(f"and the bucket {bucket}")
    assert server.end(signal.SIGTERM) == 0


def test_events_have_the_topic_of_the_command() -> None:
    """Routers that subscribe to another topic get none: the control."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = [
        "serve",
        "folder",
        "--events",
        "tcp://127.0.0.1:0",
        "--event-topic",
        "kv@a pod@a model",
    ]
    with ExitStack() as stack:
        publisher = events_of(parser.parse_args(words), stack)
        assert publisher is not None
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        routers = []
        for topic in ("kv@a pod", "kv@another"):
            routers.append(context.socket(zmq.SUB))
            routers[-1].connect(publisher.endpoint)
            routers[-1].setsockopt_string(zmq.SUBSCRIBE, topic)

        def arrives() -> bool:
            publisher.clear()
            return bool(routers[0].poll(50))

        assert until(arrives, LIMIT)
        received, *_ = routers[0].recv_multipart()
        assert received == b"kv@a pod@a model"
        assert not routers[1].poll(0)


def test_a_process_is_watched(tmp_path: Path) -> None:
    """By Prometheus and by routers, at the addresses that it was given."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
    words = str(tmp_path / "store"), "--host", "1M", "--staging", "1M", "--capacity", "64M"
    watched = "--metrics", f"127.0.0.1:{port}", "--events", endpoint
    server = Server(tmp_path / "out", *words, *watched)
    assert server.says("This process serves")

    def page() -> str:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/metrics", timeout=LIMIT
            ) as answer:
                return str(answer.read().decode())
        except OSError:  # it does not listen yet
            return ""

    assert until(lambda: "portakv_channel_peers" in page(), LIMIT)
    ran = run("store", "serve", str(tmp_path / "other"), "--events", endpoint)
    assert ran.code == 1
    assert "at which events can be published" in ran.err
    ran = run("store", "serve", str(tmp_path / "other"), "--metrics", f"127.0.0.1:{port}")
    assert ran.code == 1
    assert "at which Prometheus can be answered" in ran.err
    ran = run("store", "serve", str(tmp_path / "other"), "--metrics", "9464")
    assert ran.code == 1
    assert "HOST:PORT" in ran.err
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("options", ["{SECRET", "[1]", '{"secret_access_key": "SECRET"}'])
def test_wrong_options_of_a_bucket_are_refused(tmp_path: Path, options: str) -> None:
    words = "--bucket", "s3://bucket/kv", "--bucket-options", options
    ran = run("store", "serve", str(tmp_path / "store"), *words)
    assert ran.code == 1
    assert "Expected" in ran.err
    assert "SECRET" not in ran.err.replace("AWS_SECRET_ACCESS_KEY", "")


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("store", "show", str(tmp_path), str(tmp_path))
    with pytest.raises(SystemExit):
        run("store", "serve", str(tmp_path), "--host", "much")
    with pytest.raises(SystemExit):
        run("store", "serve", str(tmp_path), "--staging", "0")
    tmp_path.chmod(0o777)
    ran = run("store", "serve", str(tmp_path))
    assert ran.code == 1
    assert "which others may write" in ran.err
