# SPDX-License-Identifier: Apache-2.0
"""The mutants of `support.mutants`: what changes, and which tests judge it."""

from __future__ import annotations

import pytest
from support import mutants, mutants_core
from support.mutants import Change, Entered, Mutant

TEXT = '''"""A docstring."""

LIMIT = 8


@marked(3)
def outer(x: int) -> tuple[int, int]:
    """Another docstring."""
    # é
    if x in (True,) and x < LIMIT:
        x.y = 1
        call(x, x.y)
    return x, f"{x + 1}"
'''


def test_each_change_is_made_in_its_place() -> None:
    changes = mutants.changes_of(TEXT)
    changed = {
        (change.kind, mutants.applied(change, TEXT).splitlines()[change.line - 1].strip())
        for change in changes
    }
    assert changed == {
        ("constant", "LIMIT = (9)"),
        ("constant", "LIMIT = (7)"),
        ("condition", "if (not (x in (True,) and x < LIMIT)):"),
        ("and, or", "if (x in (True,) or x < LIMIT):"),
        ("comparison", "if (x not in (True,)) and x < LIMIT:"),
        ("constant", "if x in ((False),) and x < LIMIT:"),
        ("comparison", "if x in (True,) and (x <= LIMIT):"),
        ("statement", "pass"),
        ("constant", "x.y = (2)"),
        ("constant", "x.y = (0)"),
        ("arguments", "(call(x.y, x))"),
        ("return", "return None"),
        ("return", "return (f'{x + 1}', x)"),
    }
    assert {change.function for change in changes} == {0, 6}  # the decorator begins a function


def test_a_draw_is_repeatable_and_has_as_many_of_each_package() -> None:
    drawn = mutants.draw(["plan", "copy"], 6, 1)
    assert drawn == mutants.draw(["plan", "copy"], 6, 1)
    assert drawn != mutants.draw(["plan", "copy"], 6, 2)
    assert sorted(mutant.package for mutant in drawn) == ["copy"] * 3 + ["plan"] * 3


@pytest.mark.parametrize("function", [6, 0])
def test_tests_that_enter_the_function_judge_a_mutant(function: int) -> None:
    """Those of the package come first, the fastest first, for a limited time."""
    inside = frozenset({"portakv/plan/a.py:6"})
    half = mutants.MOST / 2
    entered = [
        Entered("tests/copy/test_b.py::b", 0.1, inside),
        Entered("tests/plan/test_a.py::half", half, inside),
        Entered("tests/plan/test_a.py::fast", 1.0, inside),
        Entered("tests/plan/test_a.py::other", 0.1, frozenset({"portakv/plan/b.py:6"})),
        Entered("tests/copy/test_b.py::half", half, inside),
    ]
    mutant = Mutant("plan", "portakv/plan/a.py", Change("constant", 7, function, 0, 1, "(2)"))
    assert [each.test for each in mutants.tests_for(mutant, entered)] == [
        "tests/plan/test_a.py::fast",
        "tests/plan/test_a.py::half",
        "tests/copy/test_b.py::b",
    ]


def test_a_function_that_no_test_enters_has_no_judge() -> None:
    entered = [Entered("tests/plan/test_a.py::a", 1.0, frozenset({"portakv/plan/a.py:6"}))]
    mutant = Mutant("plan", "portakv/plan/a.py", Change("constant", 9, 8, 0, 1, "(2)"))
    assert mutants.tests_for(mutant, entered) == []


def test_the_report_has_the_score_and_the_survivors() -> None:
    rows = [
        {"package": "plan", "state": "killed", "place": "a:1"},
        {
            "package": "plan",
            "state": "survived",
            "place": "a:2",
            "kind": "constant",
            "before": "1",
            "after": "(2)",
        },
    ]
    lines = mutants.report(rows)
    assert lines[1].split() == ["plan", "2", "1", "0", "1", "0", "50", "%"]
    assert lines[-1] == "a:2  constant: 1  ->  (2)"


CORE = """// a < b
#include "a.h"  // a + 1
int64_t least(const std::vector<int> &a, int *b) {
  if (a.size() > 2 && b) {
    total += a[0] * 3;
    note("a < b");
  }
  return true;
}
"""


def test_each_change_of_the_core_is_made_in_its_place() -> None:
    """Comments, texts, directives, templates and pointers do not change."""
    changes = mutants_core.changes_of(CORE)
    changed = {
        (change.kind, mutants_core.applied(change, CORE).splitlines()[change.line - 1].strip())
        for change in changes
    }
    assert changed == {
        ("comparison", "if (a.size() >= 2 && b) {"),
        ("and, or", "if (a.size() > 2 || b) {"),
        ("constant", "if (a.size() > 3 && b) {"),
        ("constant", "if (a.size() > 1 && b) {"),
        ("condition", "if (!(a.size() > 2 && b)) {"),
        ("assignment", "total -= a[0] * 3;"),
        ("arithmetic", "total += a[0] / 3;"),
        ("constant", "total += a[1] * 3;"),
        ("constant", "total += a[0] * 4;"),
        ("constant", "total += a[0] * 2;"),
        ("statement", ";"),
        ("constant", "return false;"),
    }
    drawn = [*mutants_core.draw("a.cpp", CORE, 1)]
    assert drawn == [*mutants_core.draw("a.cpp", CORE, 1)]
    assert len({(change.line, change.kind) for change in drawn}) == len(drawn)


def test_the_score_of_the_core_names_what_survives() -> None:
    result = {"file": "plan.cpp", "kind": "constant", "before": "1", "after": "2"}
    results = [
        {**result, "mutant": f"plan.cpp:{line}", "state": state}
        for line, state in enumerate(("killed", "hung", "survived", "killed"))
    ]
    lines = mutants_core.report(results)
    assert lines[1].split() == ["plan.cpp", "4", "2", "1", "1", "75", "%"]
    assert lines[-1] == "plan.cpp:2  constant: 1  ->  2"
    assert mutants_core.tests_of("rows.cpp")[0] == "tests/core/test_rows.py"
    assert {*mutants_core.tests_of("ids.cpp")} >= {*mutants_core.ALL}


def test_the_tests_of_each_file_of_the_core_exist() -> None:
    named = {*mutants_core.ALL}.union(*mutants_core.TESTS.values())
    assert not [name for name in named if not (mutants.ROOT / name).exists()]
    assert not [name for name in mutants_core.TESTS if not (mutants_core.SOURCES / name).exists()]
