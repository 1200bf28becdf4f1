# SPDX-License-Identifier: Apache-2.0
"""Tests that need a process of their own: collected here, run in a child, reported under their ids.

torch gives one name to a device that is not its own, for good: the simulated device is ``simdev``
in this process, so tests of it as ``npu`` or ``mlu`` run in another. A module says so with
``pytestmark = own_process("npu")``; one child runs all tests of a group when the first is due.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support import ready, simulated

ROOT = Path(__file__).resolve().parents[2]
_GROUP = "PORTAKV_TESTS_GROUP"  # names the group that a child runs
_REPORTS = "PORTAKV_TESTS_REPORTS"  # the file where a child writes what became of its tests

_results = pytest.StashKey[dict[str, dict[str, list[Any]]]]()


def own_process(device: str, group: str = "", **environment: str) -> list[pytest.MarkDecorator]:
    """Return marks for tests that run in a child, where the simulated device has this name (empty:
    there is none), with variables of the environment. Tests of one group share a child."""
    group = group or device
    marked = pytest.mark.own_process(device, group, **environment)
    return [marked, pytest.mark.xdist_group(group)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = {}
    # The environments of engines lack pytest-xdist, which declares it.
    config.addinivalue_line("markers", "xdist_group(name): run in one worker")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report the child's results of a test, in place of running it here."""
    marked = item.get_closest_marker("own_process")
    if marked is None or os.environ.get(_GROUP):
        return None
    device, group = marked.args
    if device and (simdev_is_missing() or simulated.built()):
        return None  # its setup skips it
    known = item.config.stash[_results]
    if group not in known:
        known[group] = _run(item.session, device, group, dict(marked.kwargs))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in known[group].get(item.nodeid) or [_lost(item, known[group])]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What ran here before, in the same module, left its fixtures for this test.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Leave the report for the parent, in a child."""
    if path := os.environ.get(_REPORTS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(report._to_json()) + "\n")


def simdev_is_missing() -> bool:
    """Return True if there is no compiler for the simulated device."""
    from portakv_conformance.simdev import build  # imports torch

    return build.missing() is not None


def in_child() -> bool:
    """Return True in a process that runs a group for another one."""
    return _GROUP in os.environ


def _run(
    session: pytest.Session, device: str, group: str, more: dict[str, str]
) -> dict[str, list[Any]]:
    """Run a group's tests of this session in a child: reports by test, and its output under ""."""
    marks = ((item.nodeid, item.get_closest_marker("own_process")) for item in session.items)
    chosen = [id for id, mark in marks if mark and mark.args[1] == group]
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder, "reports")
        ids = Path(folder, "ids")
        reports.touch()
        ids.write_text("\n".join(chosen), encoding="utf-8")
        command = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        command += ["-m", session.config.getoption("-m"), f"@{ids}"]
        own = {"SIMDEV_NAME": device, _GROUP: group, _REPORTS: str(reports)}
        environment = {**os.environ, **own, **more}
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = ready.run(*command, env=environment, cwd=ROOT)
        reported: dict[str, list[Any]] = {"": [done.stdout[-6000:] + done.stderr[-2000:]]}
        for line in reports.read_text(encoding="utf-8").splitlines():
            report = pytest.TestReport._from_json(json.loads(line))
            reported.setdefault(report.nodeid, []).append(report)
    return reported


def _lost(item: pytest.Item, reported: dict[str, list[Any]]) -> pytest.TestReport:
    """Return a failure for a test without a report of the child: it crashed, or did not collect
    it."""
    output = reported[""][0]
    words = f"Its process ended without a word on {item.nodeid}. Its output:\n{output}"
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", words, "call"
    )
