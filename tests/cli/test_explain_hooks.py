# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --hooks`: costs that a server's metrics have, and servers that have none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.command_line import run, run_json

#: Two engines of one server, as a client of Prometheus writes them.
METRICS = """\
# HELP vllm:portakv_steps_total Steps of the engine.
# TYPE vllm:portakv_steps_total counter
vllm:portakv_steps_total{engine="0",model_name="a \\"b\\"",side="scheduler"} 300.0
vllm:portakv_steps_total{engine="1",model_name="a",side="scheduler"} 100.0
vllm:portakv_steps_total{engine="0",model_name="a",side="worker"} 400.0
vllm:portakv_steps_created{engine="0",model_name="a",side="worker"} 1.7e+09
vllm:portakv_idle_steps_total{engine="0",model_name="a",side="scheduler"} 200.0
vllm:portakv_idle_steps_total{engine="0",model_name="a",side="worker"} IDLE
vllm:portakv_idle_steps_within_total{engine="0",seconds="5e-05",side="scheduler"} 50.0
vllm:portakv_idle_steps_within_total{engine="0",seconds="7.5e-05",side="scheduler"} 150.0
vllm:portakv_idle_steps_within_total{engine="1",seconds="7.5e-05",side="scheduler"} 0.0
vllm:portakv_idle_steps_within_total{engine="0",seconds="0.01",side="worker"} 20.0
vllm:portakv_hook_seconds_total{engine="0",hook="build_connector_meta",side="scheduler"} 0.03
vllm:portakv_hook_seconds_total{engine="1",hook="build_connector_meta",side="scheduler"} 0.01
vllm:portakv_hook_seconds_total{engine="0",hook="start_load_kv",side="worker"} 4e-03
vllm:portakv_idle_hook_seconds_total{engine="0",hook="build_connector_meta",side="scheduler"} 8e-03
vllm:portakv_idle_hook_seconds_total{engine="0",hook="start_load_kv",side="worker"} 1e-03
vllm:portakv_hook_seconds_total{engine="0",hook="never",side="other"} 1
vllm:num_requests_running{engine="0"} 3
"""


class Server(ThreadingHTTPServer):
    """A server whose metrics a test sets."""

    text = METRICS.replace("IDLE", "100.0")
    paths: list[str]


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's metrics."""

    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(self.server.text.encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.paths = []
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_what_hooks_cost(server: Server) -> None:
    """Of the scheduler, and of a worker: means over the engines of the server."""
    report = run_json("explain", "--hooks", address(server))
    assert server.paths == ["/metrics"]
    assert report["url"] == f"{address(server)}/metrics"
    assert report["limit"] == 2e-4
    assert report["steps"] == {
        "scheduler": {"steps": 400, "idle_steps": 200},
        "worker": {"steps": 400, "idle_steps": 100},
    }
    assert report["hooks"] == [
        {"hook": "build_connector_meta", "side": "scheduler", "idle": 4e-5, "mean": 1e-4},
        {"hook": "start_load_kv", "side": "worker", "idle": 1e-5, "mean": 1e-5},
    ]
    assert report["idle"] == pytest.approx(5e-5)
    code, out, err = run("explain", "--hooks", f"{address(server)}/metrics")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["build_connector_meta", "scheduler", "40", "us", "100", "us"] in rows
    assert ["all", "50", "us", "110", "us"] in rows
    text = " ".join(out.split())
    assert "A step without work costs 50 us, within the limit of 200 us." in text
    assert "so a busy machine has longer ones." in text


def test_a_cost_above_the_limit_is_named(server: Server) -> None:
    server.text = server.text.replace("8e-03", "8e-02")
    assert (
        "costs 410 us, more than the limit of 200 us."
        in run("explain", "--hooks", address(server)).out
    )


def test_an_engine_that_was_never_idle(server: Server) -> None:
    server.text = "".join(x for x in server.text.splitlines(True) if "portakv_idle" not in x)
    assert run_json("explain", "--hooks", address(server))["idle"] is None
    out = run("explain", "--hooks", address(server)).out
    assert "The engine has had no step without work for the connector." in out


def test_an_engine_without_the_connector(server: Server) -> None:
    server.text = "vllm:num_requests_running 3\n"
    code, out, err = run("explain", "--hooks", address(server))
    assert (code, out) == (1, "")
    assert "got metrics without its counters" in err


def test_addresses_that_do_not_answer(server: Server) -> None:
    code, _, err = run("explain", "--hooks", f"{address(server)}/other")
    assert code == 1
    assert "404" in err
    for wrong in ("localhost:8000", "file:///etc/passwd", "http://", "", "http://[::1"):
        code, _, err = run("explain", "--hooks", wrong)
        assert code != 0
        assert "such as http://localhost:8000" in err
