# SPDX-License-Identifier: Apache-2.0
"""`portakv migrate --demo`, `portakv explain --peer` and the example of a role switch."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run, run_json

pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from portakv.cli.demo import migrate
from portakv.cli.demo.migrate import METHODS, offer_rows, owner_device, print_report, pull_rows
from portakv.cli.demo.store import started

CPU = torch.device("cpu")
SIMDEV = torch.device("privateuseone", 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one layer, for demos in this process."""
    monkeypatch.setattr(migrate, "LAYERS", 1)


@pytest.mark.full
def test_the_demo_moves_rows_between_two_processes_and_checks_every_byte() -> None:
    report = run_json("migrate", "--demo", "--device", "cpu")
    good = [one for one in report["pulls"] if not one["stale"]]
    stale = [one for one in report["pulls"] if one["stale"]]
    assert report["ok"]
    assert report["owner"]["process"] != report["reader"]["process"]
    assert {one["engine"] for one in good} == {"mapped", "distributed"}
    assert {tuple(one["from"]) for one in good} == {(0,), (0, 1), (1,)}
    assert [one["wrong_bytes"] for one in good] == [0] * 6
    assert [(one["way"], one["published"]) for one in stale] == [(name, False) for name in METHODS]
    assert all("does not hold" in one["why"] for one in stale)


@pytest.mark.usefixtures("small")
def test_the_demo_is_told_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo runs in one process, which is quicker."""
    with ExitStack() as keep:
        report = pull_rows(CPU, offer_rows(CPU, keep), keep)
    process: dict[str, Any] = {"process": 1, "device": "cpu"}
    print_report(report | {"owner": process, "reader": process})
    output = capsys.readouterr().out
    assert "0, 1" in output
    assert output.count("all bytes right") == 6
    assert output.count("not published") == 2
    assert "bytes: all right" in output


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("what", "other"), [("good", "stale"), ("stale", "good")])
def test_the_demo_fails_if_a_byte_is_wrong_or_what_is_stale_is_published(
    what: str, other: str
) -> None:
    with ExitStack() as keep:
        offers = offer_rows(CPU, keep)
        for method in METHODS:
            offers[method][what] = offers[method][other]
        report = pull_rows(CPU, offers, keep)
    assert not report["ok"]
    changed = [one for one in report["pulls"] if one["stale"] == (what == "stale")]
    assert {one["published"] for one in changed} == {what == "stale"}


@pytest.mark.simdev
def test_the_owner_is_on_another_device_or_on_the_host() -> None:
    assert owner_device(CPU) == CPU
    there = owner_device(SIMDEV)
    assert (there.type, there.index) == (SIMDEV.type, 1)
    assert owner_device(there) == SIMDEV


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_rows_of_the_host_come_to_a_device() -> None:
    with ExitStack() as keep:
        assert pull_rows(SIMDEV, offer_rows(CPU, keep), keep)["ok"]


def test_ctrl_c_ends_the_command_which_ends_its_processes() -> None:
    """A terminal sends it to all processes of a session, which would all report the interrupt."""
    with started("code") as process:
        assert os.getsid(process.pid) == process.pid
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_process_of_the_demo_that_ends_at_once_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = "import os, sys\nif 'reader' in sys.orig_argv: os._exit(3)\n"
    (tmp_path / "sitecustomize.py").write_text(early)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code, out, err = run("migrate", "--demo", "--device", "cpu")
    assert (code, out) == (1, "")
    assert re.search(r"Expected process \d+ of the demo to answer, got nothing\.", err)


@pytest.mark.parametrize("words", [("migrate", "--demo"), ("explain", "--peer")])
def test_the_extra_that_is_missing_is_named(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "portakv.migrate")
    monkeypatch.setitem(sys.modules, "msgspec", None)
    code, out, err = run(*words, "--device", "cpu")
    assert (code, out) == (1, "")
    assert "msgspec" in err
    assert "`pip install -e '.[migrate]'` in a clone" in err


def test_the_verb_is_asked_for_its_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("migrate")
    assert ended.value.code == 2


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


@pytest.mark.usefixtures("either")
def test_explain_names_the_transport_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_MOVER", "distributed")
    code, out, err = run("explain", "--peer", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "PORTAKV_MOVER=distributed forces that transport, if memory cannot be mapped." in out
    assert "a Unix socket on this host, TCP with CURVE" in out


@pytest.mark.usefixtures("either")
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


@pytest.mark.slow
def test_the_example_takes_weights_and_rows_over_from_a_living_process() -> None:
    pytest.importorskip("transformers")
    from portakv_examples import switch_role

    lines = list[str]()
    assert switch_role.main("cpu", lines.append)
    assert [line.split()[0] for line in lines] == [
        *("serving", "weights", "rows", "killed", "goes", "control")
    ]


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


@pytest.mark.simdev
@pytest.mark.usefixtures("small")
def test_rows_of_a_device_that_shares_nothing_come_through_the_host() -> None:
    """A device without a UUID has a name of some length, which is no reason to refuse it."""
    with ExitStack() as keep:
        report = pull_rows(SIMDEV, offer_rows(owner_device(SIMDEV), keep), keep)
    assert report["ok"]
    good = [one for one in report["pulls"] if not one["stale"]]
    assert {one["engine"] for one in good} == {"distributed"}
    assert "_share_simdev_" in good[0]["why"]
