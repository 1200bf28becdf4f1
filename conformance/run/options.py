# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin that is always there: it adds the options and marks of the suite only.

The suite itself (``plugin``) is loaded only if ``--portakv-backend`` names what to judge; without
it this package collects nothing. Imports neither torch nor PortaKV.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
#: Every mark of a case, with what it says; the plugin registers them.
MARKS = {
    "area": "area(name): what part of the suite a case belongs to",
    "profile": "profile(name): the least profile that runs a case; core by default",
    "claim": "claim(field): the field of Capabilities that a case judges",
    "tags": "tags(layout=, dtype=, operation=): the cell of the report's matrix",
    "bigmem": "bigmem: takes gigabytes of the judged device's memory",
    "needs": "needs(what): accelerator, host, two devices, graphs or memory",
}
PROFILES = ("core", "full")
ENVIRONMENT = "PORTAKV_BACKEND"


@cache
def _real(path: Path) -> Path:
    """Return a path without symbolic links: pytest keeps the links that it is pointed to."""
    return path.resolve()


def whole_number(least: int) -> Callable[[str], int]:
    """Return a reader of arguments that are whole numbers of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return read


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; their names all begin with ``--portakv-``."""
    add = parser.getgroup("portakv", "PortaKV conformance suite").addoption
    number = whole_number
    add("--portakv-backend", metavar="NAME", help="what to judge: a name, or pkg.mod:Class")
    add("--portakv-device", metavar="D", default="cpu", help="where: cpu, cuda:1, simdev:mlu, ...")
    add("--portakv-profile", choices=PROFILES, default="core", help="which cases (default: core)")
    add("--portakv-fuzz", type=number(1), metavar="N", help="draw N examples in each drawn case")
    add("--portakv-seed", type=number(0), metavar="S", help="seed of the drawn cases (default: 0)")
    add("--portakv-events", metavar="FILE", help="append what happens as JSON lines")
    add("--portakv-only", metavar="FILE", help="run only the cases whose ids stand in FILE")
    add("--portakv-share", metavar="DIR", help="leave out cases that others took by files in DIR")
    add("--portakv-examples", metavar="DIR", help="save failing examples there, shrunken, as JSON")
    add("--portakv-emulated", action="store_true", help="the simulated device carries D's name")
    add("--portakv-listed", metavar="KIND", help="collect the cases of a kind that is not here")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks, and load the suite if a backend was named."""
    for line in MARKS.values():
        config.addinivalue_line("markers", line)
    if config.getoption("--portakv-backend") is None:
        return
    if os.environ.get(ENVIRONMENT):
        raise pytest.UsageError(
            f"Expected {ENVIRONMENT} to be unset, got {os.environ[ENVIRONMENT]!r}, which forces "
            f"every copy through one backend. Unset it."
        )
    config.pluginmanager.import_plugin("portakv_conformance.run.plugin")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore the cases if there is no backend to judge."""
    if config.getoption("--portakv-backend") is None and PACKAGE in _real(collection_path).parents:
        return True
    return None


def is_case(item: pytest.Item) -> bool:
    """Return True if a collected test is one of the suite's."""
    return PACKAGE in _real(item.path).parents


def case_id(item: pytest.Item) -> str:
    """Return the id of a case: the file relative to this package, and pytest's name of the test."""
    file = _real(item.path).relative_to(PACKAGE).as_posix()
    return f"{file}::{item.nodeid.partition('::')[2]}"


def mark_of(item: pytest.Item, name: str, default: str = "core") -> str:
    """Return the first argument of the nearest mark of that name."""
    mark = item.get_closest_marker(name)
    return default if mark is None else str(mark.args[0])


def about(item: pytest.Item) -> dict[str, Any]:
    """Return the fields of `CaseRecord` that are marks of a case.

    Of its tags the nearest one of each name counts.
    """
    tags: dict[str, str] = {}
    for mark in item.iter_markers("tags"):
        tags = {**mark.kwargs, **tags}
    named = {"area": mark_of(item, "area"), "profile": mark_of(item, "profile")}
    return {**named, "claim": mark_of(item, "claim", ""), "tags": tags}
