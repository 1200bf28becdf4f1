# SPDX-License-Identifier: Apache-2.0
"""Run tests: Hypothesis profiles, rules of markers, and the `device` fixture of every test.

`conftest.py` loads this plugin in each process that runs tests.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import re
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from portakv.interconnect import link
from portakv.runtime import cuda
from portakv_conformance import simdev
from support import patch_points, simulated
from support.collecting import NO_GPU, OPT_IN
from support.watching import Watch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANY_MODULES = 100
#: Examples of a property test in each run; .ci/full draws more.
EXAMPLES = 25
FULL_CASES = Path(__file__).resolve().parents[1] / "full_cases.toml"

_frozen = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile before any test module is imported, so that decorators can read it."""
    patch_points.guard()
    config.pluginmanager.register(Watch())
    # It reads the constants of every module, and keeps them below the current folder otherwise: a
    # process in another folder would read all modules again.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(config.rootpath / ".hypothesis"))
    # Warnings of faults that last come whenever the loop looks, also into another test's log.
    logging.getLogger("portakv.graph.alarms").setLevel(logging.ERROR)
    with suppress(ImportError):
        # Its monitor, a thread, would wait by locks that a schedule simulates.
        bars: Any = importlib.import_module("tqdm").tqdm
        bars.monitor_interval = 0
    if name := os.environ.get("SIMDEV_NAME"):
        simdev.load(name)  # a child of own_process: its modules may look at the device
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A worker has one core: threads of several workers would wait for each other, seconds long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # The machine's load, not the code, decides how long an example takes: no time is judged.
    checks = (HealthCheck.too_slow,)
    settings.register_profile(
        "fixed",
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    settings.load_profile("fixed")
    if (examples := config.getoption("--fuzz")) is not None:
        fixed = settings.get_profile("fixed")
        settings.register_profile(
            "fuzz", fixed, derandomize=False, max_examples=examples, print_blob=True
        )
        settings.load_profile("fuzz")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, also in a process that was started in the background and ignores it.

    No callback of a collection of garbage, such as Hypothesis's, runs meanwhile: Python ignores an
    interrupt that is raised in one.
    """
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    gc.callbacks[:] = callbacks


_SIMDEV = "privateuseone"  # torch's own name for the simulated device
#: What a test with the fixture `accelerator` runs on, each with the marker of its device.
ACCELERATORS = [
    pytest.param(torch.device(_SIMDEV, 0), id="simdev", marks=pytest.mark.simdev),
    pytest.param(torch.device("cuda", 0), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(torch.device("cpu"), id="cpu"), *ACCELERATORS])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the host, the simulated device, and a CUDA device if there is one."""
    yield request.param
    _check_simdev(request.param)


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the devices with streams: the simulated device, and a CUDA device if there is one."""
    yield request.param
    _check_simdev(request.param)


def _check_simdev(used: torch.device) -> None:
    """Check that no work of the test on the simulated device touched freed memory."""
    if used.type == torch.device(_SIMDEV).type:
        for index in range(2):
            torch.accelerator.synchronize(torch.device(_SIMDEV, index))
        assert not simdev.take_faults()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the collected tests out of every later collection of garbage: tests cause many.

    What the collection of tests left is frozen as well: 20 MB are cheaper than to look for them
    among a million objects.
    """
    _freeze(session.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Keep out of them what tests leave for good, such as modules and torch's compiled programs."""
    modules = len(sys.modules) > item.config.stash[_frozen] + MANY_MODULES
    if modules or (nextitem is not None and nextitem.path != item.path):
        gc.collect()
        _freeze(item.config)


def _freeze(config: pytest.Config) -> None:
    _let_loggers_propagate()
    gc.freeze()
    config.stash[_frozen] = len(sys.modules)


def _let_loggers_propagate() -> None:
    """Have the records of all loggers reach the root, where pytest captures them.

    pytest adds its handlers to each logger that does not propagate as well, and removes them, six
    times for each test. torch has forty of them.
    """
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Load the simulated device before the first test that needs it."""
    own = item.get_closest_marker("own_process")
    simulates = item.get_closest_marker("simdev") is not None
    if not simulates and (own is None or not own.args[0]):
        return
    if simdev.available() is not None:
        return  # it is marked to be skipped
    if why := simulated.built():
        pytest.skip(f"The simulated device was not compiled. {why}")
    if simulates:
        simdev.load(os.environ.get("SIMDEV_NAME", "simdev"))


@pytest.fixture(scope="session", autouse=True)
def collect_dead_graphs() -> None:
    """Let a capture begin by the collection of garbage.

    Otherwise a graph of an earlier test may be destroyed in the middle of a capture, which ends it.
    """
    if torch.cuda.is_available():
        torch.compiler.config.force_cudagraph_gc = True


@pytest.fixture(autouse=True)
def forget_answers() -> Iterator[None]:
    """Forget the answers about the build of torch, which a test may have patched."""
    yield
    cuda.why_not.cache_clear()
    link.why_not.cache_clear()


@functools.cache
def full_cases() -> dict[str, frozenset[str]]:
    """Return the tables and the single cases that `FULL_CASES` lists."""
    listed = tomllib.loads(FULL_CASES.read_text(encoding="utf-8"))
    return {kind: frozenset(names) for kind, names in listed.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases that are listed, and all but a sixth of those of a table that is."""
    listed = full_cases()
    is_table = item.nodeid.partition("[")[0] in listed["tables"]
    left_out = is_table and zlib.crc32(item.nodeid.encode()) % 6
    if (left_out or item.nodeid in listed["cases"]) and not item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.full)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave opt-in tests out unless `-m` names their marker; skip tests of devices that are absent.

    Tests of the simulated device come last: once loaded it stays torch's accelerator in a process,
    and each worker runs its tests in this order.
    """
    expression = config.getoption("-m")
    left_out = {mark for mark in OPT_IN if not re.search(rf"\b{mark}\b", expression)}
    selected: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        (dropped if marks & left_out else selected).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = selected
    items.sort(key=lambda item: item.get_closest_marker("simdev") is not None)
    if worker := getattr(config, "workerinput", None):
        from support.scheduling import tell_groups

        tell_groups(items, worker)
    absent = {
        "gpu": None if torch.cuda.is_available() else NO_GPU,
        "simdev": simdev.available(),
        "own_process": simdev.available(),
    }
    for item in items:
        for mark, reason in absent.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
