# SPDX-License-Identifier: Apache-2.0
"""The suite separates right backends from wrong ones, says what is wrong, and keeps failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portakv import BackendUnavailable, CopyPlan, Index, KVView, Unsupported
from portakv.backends.base import Decision
from portakv_conformance.cases import Bench, test_connector
from portakv_conformance.draw import saved
from portakv_conformance.draw.arrangement import Case, side_of
from portakv_conformance.draw.by_hand import BASE_LAYOUTS, Shape, Workshop, arranged, lifted
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import (
    Judge,
    arguments_of,
    find_base_layout,
    largest_unit,
    view_of,
)
from portakv_conformance.judge.pattern import poison_bytes
from portakv_conformance.judge.subject import subject
from portakv_conformance.run.outcome import sentence

pytestmark = pytest.mark.usefixtures("own_registry")

SHAPE = Shape()
BACKENDS = "support.conform_suite_backends"


def judge_of(name: str) -> Judge:
    result = subject(f"{BACKENDS}:{name}")
    return Judge(result, Facility(result.device), 7)


def gather(seed: int = 7, **how: Any) -> Case:
    shop = Workshop(seed=seed)
    case: Case = shop.gather(SHAPE, shop.shuffled(SHAPE.slots, 9), **how)
    return case


# -- who is judged ------------------------------------------------------------------------------


def test_a_class_is_registered_under_its_own_name() -> None:
    result = subject(f"{BACKENDS}:Right", "cpu")
    assert (result.name, result.target) == ("suite-right", f"{BACKENDS}:Right")
    assert result.backend is subject("suite-right").backend is subject(f"{BACKENDS}:Right").backend
    assert result.trace[-1].accepted
    # A name that is another's is not taken.
    result = subject(f"{BACKENDS}:Namesake")
    assert result.name == f"{BACKENDS}:Namesake"
    assert type(result.backend).__name__ == "Namesake"
    assert subject("reference").target == "portakv.backends.reference:Reference"


@pytest.mark.parametrize(("requested", "error", "why"), [
    ("nonsense", BackendUnavailable, "'nonsense' to serve cpu, but no such backend"),
    ("nonsense", BackendUnavailable, "or pass pkg.mod:Class"),
    ("mlu", BackendUnavailable, "'mlu' .* not on cpu. .* that it serves with --device"),
    (f"{BACKENDS}:Absent", BackendUnavailable, "its driver is from another century"),
    (f"{BACKENDS}:Nothing", BackendUnavailable, "to load, but it does not: AttributeError"),
    ("no_such_package:Backend", BackendUnavailable,
     "to load, but it does not: ModuleNotFoundError.* Pass pkg.mod:Class of an installed package"),
    ("portakv.backends.base:Backend", BackendUnavailable,
     "implements probe, capabilities and prepare"),
    ("json:dumps", BackendUnavailable, "to name a backend, got .* Pass a class of"),
    ("reference, zpu", BackendUnavailable, "got 'zpu': torch knows no zpu"),
    ("reference, npu", BackendUnavailable, "'npu': torch knows no npu.* torch_npu is not inst"),
    ("a b:C", ValueError, "Expected"),
    (":", ValueError, "Expected"),
    ("reference, z/pu", ValueError, "Expected a device such as .*, got 'z/pu'"),
    ("reference, cpu:x", ValueError, "Expected a device such as .*, got 'cpu:x'"),
])  # fmt: skip
def test_what_is_not_there_is_told_and_why(
    requested: str, error: type[Exception], why: str
) -> None:
    name, _, device = requested.partition(", ")
    with pytest.raises(error, match=why):
        subject(name, device or "cpu")


def test_a_backend_that_does_not_say_what_it_claims_has_a_flaw() -> None:
    result = subject(f"{BACKENDS}:Secretive").flaw
    assert result.startswith("capabilities() raised OSError: the licence server is asleep;")
    assert result.endswith("no case can be judged.")


# -- how copies are judged ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Right", "Waiting", "Talking"])
@pytest.mark.parametrize("end", ["synchronize", "done", "wait"])
def test_right_backends_pass(name: str, end: str) -> None:
    judge = judge_of(name)
    assert (judge.launch(gather()), judge.direct) == (True, True)
    assert (judge.copy(gather(), end=end), judge.direct) == (True, False)
    assert judge.examples == 2


@pytest.mark.parametrize(
    ("name", "why"), [("OffByOne", "expected 0x"), ("Raising", "raised KeyError")]
)
def test_wrong_backends_fail_with_a_sentence(name: str, why: str) -> None:
    judge = judge_of(name)
    with pytest.raises(AssertionError, match=why):
        judge.copy(gather())
    assert (judge.failing is None, judge.examples) == (False, 0)


def test_a_launch_that_refuses_has_no_reason_that_counts() -> None:
    judge = judge_of("WholeChunks")
    assert judge.copy(gather())
    shop = Workshop(seed=7)
    case = Case(shop.cache(SHAPE, [4, 2]), shop.chunk(SHAPE, 5, source=False), 2)
    with pytest.raises(AssertionError, match="check and prepare take this plan"):
        judge.copy(case)
    assert judge.declined == []


@pytest.mark.parametrize("move", ["from_gpu", "to_gpu"])
def test_a_connector_whose_backend_refuses_parts_of_chunks_fails(move: str) -> None:
    bench = Bench(judge=judge_of("WholeChunks"))
    store = test_connector.Store(bench, bench.connector(), move)
    with pytest.raises(AssertionError, match="it moves whole ones"):
        test_connector.test_a_range_of_the_slot_mapping(store, 3, 11)


def test_a_refusal_that_check_foretells_is_no_failure_and_no_example() -> None:
    case = gather(dtype=torch.uint8, shift=1)
    foretold = ["it needs 16 B alignment and the plan allows 1 B"]
    judge = judge_of("Modest")
    assert not judge.copy(case)
    assert (judge.declined, judge.examples) == (foretold, 0)
    judge.refused(case)
    with pytest.raises(AssertionError, match="must raise Unsupported; the copy returned"):
        judge_of("Lax").refused(case)
    judge = judge_of("Modest")
    refusal = Unsupported("This plan", "of a launch")
    judge.may_decline(refusal, *arguments_of(case))
    assert judge.declined == foretold
    with pytest.raises(AssertionError, match="of a launch"):
        judge_of("Right").may_decline(refusal, *arguments_of(case))


def test_what_the_simulated_device_fills_memory_with_is_told() -> None:
    judge = judge_of("Right")
    case = gather()
    expected = case.expected()

    def reported(byte: int) -> str:
        case.dst.guards[0].payload().fill_(byte)
        return str(judge.compare(expected, case.dst.tensors))

    plain = reported(0xDB)
    assert "holds 0xdb, which is of unknown origin" in plain
    judge.subject = replace(judge.subject, emulated=True)
    more = "0xdb is what the simulated device fills memory with that was never written, or was"
    assert reported(0xDB).startswith(f"{plain} {more} freed:")
    assert "simulated" not in reported(0xDA)


@pytest.mark.parametrize("check", [lambda plan: Decision("none", False, "none"), {}.__getitem__])
def test_the_home_of_what_takes_none(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    modest = subject(f"{BACKENDS}:Modest")
    monkeypatch.setattr(modest.backend, "check", check)
    assert find_base_layout(modest, BASE_LAYOUTS) == BASE_LAYOUTS[0]  # CORE then says why


# -- failing examples as files ------------------------------------------------------------------


@settings(max_examples=60)
@given(all_cases())
def test_a_saved_case_is_the_same_case(case: Case) -> None:
    again, about = saved.load(saved.dump(case, {"seed": 3}))
    assert repr(again) == repr(case)
    assert about == {"seed": 3}
    assert (again.src.tensors is again.dst.tensors) == (case.src.tensors is case.dst.tensors)
    assert (again.expected().slots == case.expected().slots).all()
    for side, other in ((again.src, case.src), (again.dst, case.dst)):
        for one, two in zip(side.guards, other.guards, strict=True):
            assert torch.equal(one.whole, two.whole)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "portakv-example/9"}', '{"schema": "portakv-example/1"}']
)
def test_a_file_that_is_no_example(text: str) -> None:
    for read in (saved.load, saved.read_about):
        with pytest.raises(ValueError, match="Expected a saved example"):
            read(text)


def test_a_case_without_its_ids_or_made_by_hand_is_no_example() -> None:
    case = gather()
    with pytest.raises(ValueError, match="Expected a saved example"):
        saved.load(saved.dump(case).replace('"values"', '"other"'))
    case.src.arrangement = None
    with pytest.raises(ValueError, match="Expected a side that an arrangement describes"):
        saved.dump(case)


def test_shapes_lie_as_they_say() -> None:
    side = Workshop().cache(SHAPE, [0], memory="kv block head token dim", source=False)
    first = side.tensors[0]
    guard = side.guards[0]
    assert first.stride() == (6 * 2 * 4 * 16, 2 * 4 * 16, 16, 4 * 16, 1)
    assert first.storage_offset() * 2 == guard.start
    assert guard.payload()[:8].tolist() == poison_bytes(0, 1000, 8, guard.start).tolist()
    pool = Workshop().cache(SHAPE, [0], memory="block layer kv token head dim", pads={1: 8})
    first, second = pool.tensors
    assert len(pool.guards) == 1
    assert second.data_ptr() - first.data_ptr() == 2 * 4 * 2 * 16 * 2


def test_a_lifted_side_is_the_same_side_elsewhere() -> None:
    side = Workshop().cache(SHAPE, [0], dtype=torch.uint8)
    moved = lifted(side, 3)
    for one, two in zip(moved.tensors, side.tensors, strict=True):
        assert one.untyped_storage().data_ptr() % 16 == 3
        assert one.storage_offset() == two.storage_offset()
        assert one.stride() == two.stride()
        assert torch.equal(one, two)
    for guard in moved.guards:
        assert guard.broken() is None
        guard.payload().fill_(0)
    assert not moved.tensors[0].any()
    assert side.tensors[0].any()


def test_a_block_that_is_split_is_launched_in_a_unit_that_fits_its_parts() -> None:
    """3 tokens divide a block of 6, but no part of it: ``token%2`` holds 2."""
    split = KVView(torch.empty(2, 2, 3, 8), "token%2 block token/2 dim", block_size=6)
    flat = KVView(torch.empty(4, 8), "token dim")
    ids = Index([0], step=6)
    assert largest_unit(split, flat, ids, Index(), 3) == 1
    assert largest_unit(split, flat, ids, Index(), 6) == CopyPlan(split.form, flat.form, 6, 0).unit


@pytest.mark.full
def test_what_fails_beside_other_work_alone_is_no_example(tmp_path: Path, conform: Any) -> None:
    """A saved example that passes when it is replayed would only mislead."""
    mutant = "portakv_conformance.mutants.ordering:NoWaitOnProducer"
    words = ["--only", "test_ordering", "--device", "simdev", "--profile", "core", "-x"]
    done = conform(mutant, *words, "--report", str(tmp_path))
    assert done.code == 1, done.err
    assert "FAILED cases/test_ordering.py" in done.out
    assert "conform replay" not in done.out
    assert not list(tmp_path.glob("example-*.json"))


def test_an_example_tells_where_it_was_found_before_it_is_built() -> None:
    """Its device may not be known to torch yet."""
    text = saved.dump(gather(), {"device": "simdev:1"}).replace('"cpu"', '"simdev:1"')
    assert saved.read_about(text) == {"device": "simdev:1"}
    moved, _ = saved.load(text, "cpu")
    assert moved.src.guards[0].whole.device == torch.device("cpu")


# -- how a case ended, in one sentence -----------------------------------------------------------

ORACLE = "Destination layer 0 key slot 3 holds 0x07; expected 0x09."


@pytest.mark.parametrize(
    "more",
    [
        "",
        " The case was Case(src=Side('layer').",
        "\nFalsifying example: test_any_copy(\n    data=data(...),\n)",
        "\nFailing test case: test_any_copy(\n    data=data(...),\n)",
        " The case was Case().\nFailing test case:\nstate = Engine()",
        "\nFailing explicit example: test_any_copy()",
        "\nFalsifying explicit example: test_any_copy()",
        "\nassert 7 == 9",
    ],
)
def test_the_sentence_is_the_oracle_s(more: str) -> None:
    for before in ("", "AssertionError: "):
        assert sentence(f"{before}{ORACLE}{more}") == ORACLE
    assert sentence(f"KeyError: 'stream'{more}").startswith("KeyError: 'stream'")


def test_what_the_installed_hypothesis_writes_is_known() -> None:
    """Its notes are part of the message that pytest reports."""

    @settings(max_examples=5, database=None)
    @given(st.integers())
    def fails(number: int) -> None:
        raise AssertionError(f"{ORACLE} The case was {number}.")

    with pytest.raises(AssertionError) as caught:
        fails()
    notes = getattr(caught.value, "__notes__", [])
    for message in (caught.value, ORACLE):
        assert sentence("\n".join([f"AssertionError: {message}", *notes])) == ORACLE


# -- tensors in no order ------------------------------------------------------------------------


def test_keys_and_values_are_scattered_each_in_their_own_way() -> None:
    """Whatever the allocator does, then, all tensors together are in no order for some seed."""
    how: Any = ("layer kv | block token head dim", Shape(layers=4))
    different = 0
    for seed in range(20):
        view = view_of(side_of(arranged(*how, place="scattered", seed=seed)))
        keys, values = view.addresses.reshape(4, 2).T.tolist()
        different += np.argsort(keys).tolist() != np.argsort(values).tolist()
    assert different > 10
