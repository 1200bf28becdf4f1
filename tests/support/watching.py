# SPDX-License-Identifier: Apache-2.0
"""Watch the time of each test by one thread of a process.

pytest and pytest-timeout start two threads for each test and wait for both, which takes as long as
a short test on a busy machine. This thread looks every second. It ends the process of a test that
has had its time, as pytest-timeout does. Earlier it asks faulthandler for the stacks of all
threads, which come even if the test holds the interpreter.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from time import monotonic, sleep  # not those that a test or a schedule replaces
from typing import Any, NamedTuple

import pytest

#: Seconds of a test after which the stacks of its threads are printed.
STACKS = 300


class Watched(NamedTuple):
    """A test that runs, and when its time is over."""

    item: pytest.Item
    settings: Any
    until: float


class Watch:
    """A plugin that takes the place of pytest-timeout's timers."""

    def __init__(self) -> None:
        self._stderr = os.dup(2)  # where no output is captured yet
        self._process = 0  # that has the thread
        self._test: Watched | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """Watch a test from now on."""
        if settings.method != "thread":
            return None
        self._test = Watched(item, settings, monotonic() + settings.timeout)
        if self._process != os.getpid():
            self._process = os.getpid()
            threading.Thread(target=self._look, name="watches tests", daemon=True).start()
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """Let a test be that has ended."""
        self._test = None

    def pytest_unconfigure(self) -> None:
        """Print no stacks any more."""
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        import pytest_timeout

        before: Watched | None = None
        while True:
            sleep(1.0)
            test = self._test
            if test is None:
                faulthandler.cancel_dump_traceback_later()
            elif test is not before:
                faulthandler.dump_traceback_later(STACKS, file=self._stderr)
            elif monotonic() > test.until:
                pytest_timeout.timeout_timer(test.item, test.settings)
            before = test
