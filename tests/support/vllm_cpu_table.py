# SPDX-License-Identifier: Apache-2.0
"""The cases of a real engine, printed as a table after the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pytest

#: Names of a test's recorded properties.
CASE = "case"
CONTROL = "negative control"


#: Takes the name of a case, and whether it is a negative control.
Named: TypeAlias = Callable[..., None]


class Case(NamedTuple):
    """A case of the table. ``control``: it must fail without a guard, which its name says."""

    name: str
    control: bool


class Table:
    """A plugin of pytest that prints each case with its outcome, and each negative control."""

    def __init__(self) -> None:
        self._rows = list[tuple[Case, str, float]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the end of a test that has recorded a case."""
        recorded = dict(report.user_properties)
        if report.when != "call" or CASE not in recorded:
            return
        case = Case(str(recorded[CASE]), bool(recorded[CONTROL]))
        self._rows.append((case, report.outcome, report.duration))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        if not self._rows:
            return
        terminalreporter.section("cases of the real engine")
        terminalreporter.write_line(f"{'case':<74} {'seconds':>7}  result")
        for case, outcome, seconds in self._rows:
            name = f"  without: {case.name}" if case.control else case.name
            right = "wrong, as expected" if case.control else "right"
            result = right if outcome == "passed" else outcome.upper()
            terminalreporter.write_line(f"{name:<74} {seconds:7.1f}  {result}")


def case_of(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Named:
    """Return a function that names the case of a test; the table comes with the first test.

    A fixture of a test.
    """
    config = request.config
    if not config.pluginmanager.has_plugin("engine cases"):
        config.pluginmanager.register(Table(), "engine cases")

    def name(case: str, control: bool = False) -> None:
        record_property(CASE, case)
        record_property(CONTROL, control)

    return name
