# SPDX-License-Identifier: Apache-2.0
"""What a collected case is called, and what its marks say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portakv_conformance.run.options import PACKAGE, real

if TYPE_CHECKING:
    import pytest


def is_case(item: pytest.Item) -> bool:
    """Whether a collected test is one of the suite's."""
    return PACKAGE in real(item.path).parents


def case_id(item: pytest.Item) -> str:
    """The id of a case: the file relative to this package, and what pytest calls the test."""
    file = real(item.path).relative_to(PACKAGE).as_posix()
    return f"{file}::{item.nodeid.partition('::')[2]}"


def mark_of(item: pytest.Item, name: str, default: str = "core") -> str:
    """The first argument of the nearest mark of that name."""
    mark = item.get_closest_marker(name)
    return default if mark is None else str(mark.args[0])


def tags_of(item: pytest.Item) -> dict[str, str]:
    """The tags of a case, the nearest of each name."""
    tags: dict[str, str] = {}
    for mark in item.iter_markers("tags"):
        tags = {**mark.kwargs, **tags}
    return tags
