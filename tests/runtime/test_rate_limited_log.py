# SPDX-License-Identifier: Apache-2.0
"""Warnings that are limited by topic and time."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from portakv.runtime.rate_limited_log import LINES, SECONDS, RateLimitedLog

LOGGER = logging.getLogger("portakv.tests")


def test_a_topic_has_a_few_lines_a_minute_and_then_says_how_many_were_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = RateLimitedLog(LOGGER, lambda: now)
    for n in range(LINES + 7):
        log.warning("damaged", "block %d", n)
    assert caplog.messages == [f"block {n}" for n in range(LINES)]

    log.warning("another", "100 %s", "%", lines=1)
    log.warning("another", "100 %s", "%", lines=1)
    assert caplog.messages[LINES:] == ["100 %"]

    caplog.clear()
    now = SECONDS
    for n in range(2):
        log.warning("damaged", "block %d", n)
    left_out = "block 0 (7 more like this one were not logged)"
    assert caplog.messages == [left_out, "block 1"]


def test_threads_that_warn_together_lose_no_count(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = RateLimitedLog(LOGGER, lambda: now)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.warning("one", "%d", n), range(1000)))
    assert len(caplog.messages) == LINES
    now = SECONDS
    log.warning("one", "last")
    assert f"({1000 - LINES} more" in caplog.messages[-1]
