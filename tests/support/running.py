# SPDX-License-Identifier: Apache-2.0
"""Run tests: Hypothesis profiles, rules of markers, and the `device` fixture of every test.

`conftest.py` loads this plugin in each process that runs tests.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from portakv.interconnect import link
from portakv.runtime import cuda
from portakv_conformance import simdev
from support import patch_points
from support.collecting import NO_GPU, OPT_IN

MANY_MODULES = 100
#: Examples of a property test in each run; .ci/full draws more.
EXAMPLES = 60

_frozen = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile before any test module is imported, so that decorators can read it."""
    patch_points.guard()
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
    """Keep the collected tests out of every later collection of garbage: tests cause many."""
    _freeze(session.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Keep out of them what tests leave for good, such as modules and torch's compiled programs."""
    modules = len(sys.modules) > item.config.stash[_frozen] + MANY_MODULES
    if modules or (nextitem is not None and nextitem.path != item.path):
        _freeze(item.config)


def _freeze(config: pytest.Config) -> None:
    gc.collect()
    gc.freeze()
    config.stash[_frozen] = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Load the simulated device before the first test that needs it."""
    if item.get_closest_marker("simdev"):
        simdev.load(os.environ.get("SIMDEV_NAME", "simdev"))


@pytest.fixture(autouse=True)
def forget_answers() -> Iterator[None]:
    """Forget the answers about the build of torch, which a test may have patched."""
    yield
    cuda.why_not.cache_clear()
    link.why_not.cache_clear()


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
