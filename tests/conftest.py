# SPDX-License-Identifier: Apache-2.0
"""Options, Hypothesis profiles and marker rules that hold for every test.

Property tests take their number of examples from the loaded profile, never from a number of
their own, so that `--fuzz` reaches them; one that wants more writes
`@settings(max_examples=4 * settings.default.max_examples)`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

OPT_IN = ("wheel", "bigmem", "slow", "sanitize")


def positive(text: str) -> int:
    """Read a whole number above zero from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} examples were asked for; ask for 1 or more")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=positive,
        metavar="N",
        help="draw N fresh random examples in each property test, instead of the fixed ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile before any test module is imported, so that decorators can read it."""
    if os.environ.get("PORTAKV_BACKEND"):
        raise pytest.UsageError(
            "PORTAKV_BACKEND forces a backend, which is not what tests judge; unset it."
        )
    # The machine's load, not the code, decides how long an example takes: no time is judged.
    checks = (HealthCheck.too_slow,)
    settings.register_profile(
        "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=checks
    )
    examples: int | None = config.getoption("--fuzz")
    if examples is None:
        settings.load_profile("fixed")
        return
    settings.register_profile(
        "fuzz",
        settings.get_profile("fixed"),
        derandomize=False,
        max_examples=examples,
        print_blob=True,
    )
    settings.load_profile("fuzz")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave opt-in tests out unless `-m` names their marker; skip `gpu` tests without a GPU."""
    asked = config.getoption("-m")
    left_out = {mark for mark in OPT_IN if not re.search(rf"\b{mark}\b", asked)}
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        (dropped if marks & left_out else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    if not torch.cuda.is_available():
        reason = "torch.cuda.is_available() is False: this test needs a CUDA device"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
