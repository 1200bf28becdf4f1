# SPDX-License-Identifier: Apache-2.0
"""Options of every test run, and the plugins that run tests or hand them out.

The process that hands tests to workers of pytest-xdist imports neither torch nor Hypothesis, so
that the workers begin earlier.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import pytest
from support import simulated

pytest_plugins = ["support.own_process"]


def positive(text: str) -> int:
    """Read a whole number above zero from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"Expected 1 or more examples, got {text!r}.")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    description = "draw N fresh random examples in each property test, instead of the fixed ones"
    parser.addoption("--fuzz", type=positive, metavar="N", help=description)


def pytest_configure(config: pytest.Config) -> None:
    """Load the plugin that runs tests, where tests run, before any test module is imported."""
    if os.environ.get("PORTAKV_BACKEND"):
        raise pytest.UsageError(
            "PORTAKV_BACKEND forces a backend, which is not what tests judge; unset it."
        )
    # Inductor would compile for 20 s to learn whether the compiler knows this CPU's vectors.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    simulated.begin(config)
    config.pluginmanager.import_plugin("support.collecting")
    if not hands_out_tests(config):
        config.pluginmanager.import_plugin("support.running")


def hands_out_tests(config: pytest.Config) -> bool:
    """Tell whether this process leaves the tests to workers of pytest-xdist."""
    is_worker = hasattr(config, "workerinput")
    distributes = config.getoption("dist", "no") != "no"
    return distributes and not is_worker and not config.getoption("collectonly")


@pytest.hookimpl(optionalhook=True)  # engines' environments have no pytest-xdist
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where to leave the groups of its tests."""
    from support.scheduling import groups_file

    node.workerinput["groups"] = str(groups_file())
    node.config.add_cleanup(lambda: groups_file().unlink(missing_ok=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Hand tests to the workers by groups and short runs."""
    from support.scheduling import Runs

    return Runs(config, log) if config.getoption("dist") == "loadgroup" else None
