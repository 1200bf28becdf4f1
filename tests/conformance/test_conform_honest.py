# SPDX-License-Identifier: Apache-2.0
"""A backend that claims little and keeps to it is conformant; the report shows its omissions."""

from __future__ import annotations

from typing import Any

import pytest
import support.conform_honest_backends as backends
import torch

from portakv_conformance.cases import Bench, test_claims
from portakv_conformance.draw.by_hand import BASE_LAYOUTS
from portakv_conformance.evidence.verify import check_report
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, across, find_base_layout
from portakv_conformance.judge.subject import Subject, subject
from portakv_conformance.record import RunRecord

pytestmark = pytest.mark.usefixtures("own_registry")

_HONEST = "support.conform_honest_backends"
_LIARS = {"RefusesFourLoops", "ClaimsFourLoops", "ListOfPlaces", "TrueAlignment"}
_NAMED = {
    name: result
    for name, result in vars(backends).items()
    if isinstance(result, type) and result.__module__ == _HONEST and not name.startswith("_")
}
_CLAIMS = [n for n, result in _NAMED.items() if hasattr(result, "less") and n not in _LIARS]
_TELLING = (
    "cases/test_claims.py",
    "cases/test_stateful.py",
    "cases/test_connector.py::test_batches",
    "cases/test_core.py::test_rows_move",
    "cases/test_parts.py::test_migration_within_one_cache",
)


def one(name: str) -> Subject:
    return subject(f"{_HONEST}:{name}")


def judge_of(tested: Subject) -> Judge:
    return Judge(tested, Facility(torch.device("cpu")), 7)


def judged(conform: Any, name: str, *options: str) -> RunRecord:
    """The report of a run of the suite on one of the backends."""
    target = name if ":" in name else f"{_HONEST}:{name}"
    done = conform(target, "--device", "cpu", "--json", *options)
    assert done.code in (0, 1), done.err
    return RunRecord.read(done.out)


def wrong(record: RunRecord) -> dict[str, str]:
    return {case.id: case.reason for case in record.cases if case.status in ("failed", "error")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Least", marks=pytest.mark.full),
        pytest.param("OnlyTuplesByPrepare", marks=pytest.mark.slow),
    ],
)
def test_a_narrow_claim_is_no_failure(name: str, conform: Any) -> None:
    record = judged(conform, name, "--only", *_TELLING)
    assert wrong(record) == {}
    homely = [case.status for case in record.cases if case.id.endswith("_within_one_cache[home]")]
    must = [case.status for case in record.cases if case.area in ("core", "stateful")]
    assert (homely, set(must)) == (["passed"], {"passed"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _NAMED if name not in _LIARS])
def test_an_honest_backend_is_conformant(name: str, conform: Any) -> None:
    record = judged(conform, name)
    assert wrong(record) == {}
    assert record.verdict == "conformant"
    assert check_report(record.document()) == []


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("name", ["RefusesFourLoops", "ClaimsFourLoops"])
def test_loops_that_are_claimed_may_not_be_declined(name: str, direction: str) -> None:
    bench = Bench(judge=judge_of(one(name)))
    with pytest.raises(AssertionError, match="claims by 'max_loops' that it takes 4 strided"):
        test_claims.test_max_loops(bench, 4, direction)
    test_claims.test_max_loops(bench, 3, direction)
    assert bench.judge.examples == 1


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("name", _CLAIMS)
def test_each_claim_is_tested_within_the_others(name: str, direction: str) -> None:
    result = one(name)
    paged = find_base_layout(result, BASE_LAYOUTS)
    most = result.can.max_loops
    for vector in (1, 2, 4, 8, 16):
        test_claims.test_alignment(Bench(paged=paged, judge=judge_of(result)), vector, direction)
    for loops in range(5):
        bench = Bench(paged=paged, judge=judge_of(result))
        test_claims.test_max_loops(bench, loops, direction)
        assert bench.judge.examples == (most is None or loops <= most)
    bench = Bench(paged=paged, judge=judge_of(result))
    test_claims.test_tables(bench, direction)
    assert bench.judge.examples == (6 if result.can.tables else 0)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (f"{_HONEST}:ListOfPlaces", "places is a list"),
        (f"{_HONEST}:TrueAlignment", "alignment is True"),
        ("support.conform_suite_backends:Nonsense", "index_on is 'nowhere'"),
    ],
)
def test_claims_of_another_type_make_no_sense(target: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        test_claims.test_claims_make_sense(subject(target))


@pytest.mark.full
def test_a_half_that_was_declined_is_not_passed(conform: Any) -> None:
    record = judged(conform, "PartOfScatters", "--only", "cases/test_corners.py::test_row_width")
    cases = {case.id: case for case in record.cases}
    assert {case.status for case in cases.values()} == {"passed", "not-claimed"}
    for case in cases.values():
        assert (case.status == "not-claimed") == (case.declined >= case.examples)
        assert bool(case.reason) == bool(case.declined)
    narrow = next(case for case in cases.values() if case.status == "not-claimed")
    assert (narrow.declined, narrow.examples) == (1, 1)
    assert narrow.reason == "It declines 1 of 2 copies: no scatter of such rows"


def test_layouts_are_found_within_what_is_claimed() -> None:
    positions = {
        "OnlyNHD": 0,
        "OnlyHND": 1,
        "OnlyTuples": 2,
        "OnlyTuplesByPrepare": 2,
        "NoTables": 4,
        "Loops2": 0,
        "Loops1": 5,
        "Least": 5,
    }
    assert {
        name: BASE_LAYOUTS.index(find_base_layout(one(name), BASE_LAYOUTS)) for name in positions
    } == positions
    for name, requested, taken in (("OnlyNHD", 1, 0), ("OnlyNHD", 2, 2), ("NoMigration", 1, 0)):
        assert across(one(name), BASE_LAYOUTS[0], BASE_LAYOUTS[requested]) == BASE_LAYOUTS[taken]


@pytest.mark.full
def test_a_backend_that_remembers_is_told_by_what_it_did(conform: Any) -> None:
    """Hypothesis repeats the calls, which then end in another way."""
    mutant = "portakv_conformance.mutants.state:StalePointerTable"
    record = judged(conform, mutant, "--only", "cases/test_stateful.py")
    (reason,) = wrong(record).values()
    assert "does not hold its bytes. The same calls end in another way when they are" in reason
    assert record.cases[0].example, "the copy that shows it alone was not kept"
