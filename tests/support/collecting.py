# SPDX-License-Identifier: Apache-2.0
"""Collect less, and faster: no tests for a device that is not there, and no module compiled twice.

Without a CUDA device the tests marked ``gpu`` are left out, and a line at the end says how many. A
test that the command line names by its id is collected and skipped, with the reason.

Every worker of pytest-xdist collects every module. In a fresh clone a third of that time is the
compilation of test modules. Each worker begins at another place of each folder, so that a module is
compiled by the worker that comes first, and the others load the result.
Collection makes a million objects that all stay, so nothing looks for garbage among them meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any

import pytest

OPT_IN = ("wheel", "visitor", "bigmem", "slow", "full")
#: Seconds of a test that runs by request alone, or that draws more examples. The limit of others is
#: in pyproject.toml.
WIDE = 3600
NO_GPU = "torch.cuda.is_available() is False: this test needs a CUDA device"
_KEY = "portakv_tests_for_cuda"

_count = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_count] = 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect tests without the collector of garbage, which took a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class,
) -> Generator[None, Any, Any]:
    """Drop the tests of a CUDA device where torch finds none."""
    made = yield
    config = collector.config
    named = any("::" in argument for argument in config.args)
    # The process that hands tests to workers collects nothing, and does without torch.
    import torch

    if not isinstance(made, list) or named or torch.cuda.is_available():
        return made
    retained = []
    for item in made:
        marks = {mark.name for mark in item.iter_markers()}
        if "gpu" not in marks:
            retained.append(item)
        elif not marks.intersection(OPT_IN):
            config.stash[_count] += 1
    return retained


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Begin in each worker at another place of a directory, and go on to its first entries."""
    report = yield
    if isinstance(collector, pytest.Directory):
        entries = report.result
        first = int(len(entries) * _share_before(collector.config))
        entries[:] = [*entries[first:], *entries[:first]]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the modules the same order in every worker, and wide tests their time."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parts)
    for item in items if config.pluginmanager.has_plugin("timeout") else ():
        is_wide = config.getoption("fuzz") or any(map(item.get_closest_marker, OPT_IN))
        if is_wide and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(WIDE))


def _share_before(config: pytest.Config) -> float:
    """Return the part of a directory that workers with smaller numbers begin with."""
    worker: dict[str, Any] = getattr(config, "workerinput", {})
    number = int(worker.get("workerid", "gw0").removeprefix("gw"))
    count: int = worker.get("workercount", 1)
    return number % count / count


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report the number of tests left out to the main process, in a worker."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_KEY] = session.config.stash[_count]


@pytest.hookimpl(optionalhook=True)  # engines' environments have no pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Take the number from a worker; every worker leaves out the same tests."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_count] = max(node.config.stash[_count], output.get(_KEY, 0))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report the tests that were left out."""
    if count := config.stash[_count]:
        tests = "1 test" if count == 1 else f"{count:,} tests"
        terminalreporter.write_line(
            f"Left out {tests} for CUDA: torch finds no CUDA device. "
            "Run `pytest -m gpu` on a machine with one."
        )
