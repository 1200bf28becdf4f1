# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --peer`."""

from __future__ import annotations

import sys

import pytest
import torch
from support.command_line import run, run_json

pytest.importorskip("msgspec")
pytest.importorskip("zmq")


CPU = torch.device("cpu")
SIMDEV = torch.device("privateuseone", 0)


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "portakv.migrate")
    monkeypatch.setitem(sys.modules, "msgspec", None)
    code, out, err = run("explain", "--peer", "--device", "cpu")
    assert (code, out) == (1, "")
    assert "msgspec" in err
    assert "`pip install -e '.[migrate]'` in a clone" in err


def test_explain_tells_how_peers_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTAKV_MOVER", raising=False)
    report = run_json("explain", "--peer", "--device", "cpu")
    accepted = {
        one["name"]: one["accepted"] for part in ("mapped", "movers") for one in report[part]
    }
    assert accepted["host memory"]
    assert accepted["distributed"]
    assert {"nixl", "mooncake"} < set(accepted)
    assert all(one["reason"] for one in report["movers"])
    assert (report["forced"], report["links"]) == (None, [])
    assert report["channel"]["curve"]
    assert set(report["channel"]["versions"]) == {"msgspec", "pyzmq", "libzmq"}


@pytest.mark.parametrize("more", ["--host", "vllm-nhd"])
def test_explain_of_peers_takes_no_layouts(more: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run("explain", "--peer", more)
    assert ended.value.code == 2


def test_explain_names_the_transport_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_MOVER", "distributed")
    code, out, err = run("explain", "--peer", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "PORTAKV_MOVER=distributed forces that transport, if memory cannot be mapped." in out
    assert "a Unix socket on this host, TCP with CURVE" in out


def test_explain_tells_that_a_forced_transport_does_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORTAKV_MOVER", "mooncake")
    monkeypatch.setitem(sys.modules, "mooncake", None)
    assert "does not serve here: a pull is then rejected" in run("explain", "--peer")[1]
    monkeypatch.setenv("PORTAKV_MOVER", "carrier pigeon")
    code, out, err = run("explain", "--peer")
    assert (code, out) == (1, "")
    assert "Expected PORTAKV_MOVER to be 'distributed'" in err


@pytest.mark.simdev
def test_explain_says_why_a_device_shares_nothing() -> None:
    report = run_json("explain", "--peer", "--device", "privateuseone")
    host, memory, events = report["mapped"]
    assert [one["accepted"] for one in report["mapped"]] == [True, False, False]
    assert host["name"] == "host memory"
    assert "_share_simdev_" in memory["reason"]
    assert "the owner's host waits instead" in events["reason"]
    assert not any(one["accepted"] for one in report["links"])
    accepted = {(one["name"], one["slots"]): one["accepted"] for one in report["movers"]}
    assert accepted["distributed", "cpu"]
    assert not accepted["distributed", report["device"]]
