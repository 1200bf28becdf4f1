# SPDX-License-Identifier: Apache-2.0
"""Cases named by their ids, or by a beginning."""

from __future__ import annotations

import pytest

from portakv_conformance.run.request import chosen, counted

IDS = [
    "cases/test_core.py::test_one_row[gather-1]",
    "cases/test_core.py::test_one_row[scatter-1]",
    "cases/test_core.py::test_one_row_more",
    "cases/test_corners.py::test_row_width[3]",
]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        (IDS[1], IDS[1:2]),
        ("test_core.py::test_one_row[scatter-1]", IDS[1:2]),
        ("cases/test_core.py::test_one_row", IDS[:2]),
        ("test_core::test_one_row", IDS[:2]),
        ("test_core.py", IDS[:3]),
        ("test_corners", IDS[3:]),
    ],
)
def test_a_beginning_names_all_that_begin_so(word: str, found: list[str]) -> None:
    assert chosen(IDS, [word]) == (found, [])


def test_the_order_is_the_list_s_and_nothing_comes_twice() -> None:
    assert chosen(IDS, [IDS[3], "test_core", IDS[0]]) == (IDS, [])


@pytest.mark.parametrize("word", ["", "core", "test_cor", "test_core::test_one", "test_core[1]"])
def test_what_names_nothing_is_told(word: str) -> None:
    assert chosen(IDS, [word, IDS[0]]) == (IDS[:1], [word])


def test_one_case_is_one() -> None:
    assert (counted(1), counted(1234)) == ("1 case was", "1,234 cases were")
