# SPDX-License-Identifier: Apache-2.0
"""The suite tells right backends from wrong ones, says what is wrong, and keeps what failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portakv import AdaptiveConnector, BackendUnavailable, CopyPlan, Index, KVView, Unsupported
from portakv.backends.base import Decision
from portakv_conformance.cases import Bench, test_addresses, test_connector
from portakv_conformance.draw import saved
from portakv_conformance.draw.arrangement import Case, side_of
from portakv_conformance.draw.by_hand import HOMES, Shape, Workshop, arranged, lifted
from portakv_conformance.draw.strategies import all_cases
from portakv_conformance.judge.claims import check_refused
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, asked_of, find_home, largest_unit, view_of
from portakv_conformance.judge.oracle import compare
from portakv_conformance.judge.pattern import poison_bytes
from portakv_conformance.judge.subject import subject
from portakv_conformance.run.outcome import sentence

pytestmark = pytest.mark.usefixtures("own_registry")

SHAPE = Shape()
BACKENDS = "support.conform_suite_backends"


def judge_of(name: str) -> Judge:
    found = subject(f"{BACKENDS}:{name}")
    return Judge(found, Facility(found.device), 7)


def gather(seed: int = 7, **how: Any) -> Case:
    shop = Workshop(seed=seed)
    case: Case = shop.gather(SHAPE, shop.shuffled(SHAPE.slots, 9), **how)
    return case


# -- who is judged ------------------------------------------------------------------------------


def test_a_class_is_registered_under_its_own_name() -> None:
    found = subject(f"{BACKENDS}:Right", "cpu")
    assert (found.name, found.target) == ("suite-right", f"{BACKENDS}:Right")
    assert found.backend is subject("suite-right").backend
    assert subject(f"{BACKENDS}:Right").backend is found.backend
    assert found.trace[-1].accepted


def test_a_name_that_is_another_s_is_not_taken() -> None:
    found = subject(f"{BACKENDS}:Namesake")
    assert found.name == f"{BACKENDS}:Namesake"
    assert type(found.backend).__name__ == "Namesake"
    assert subject("reference").target == "portakv.backends.reference:Reference"


@pytest.mark.parametrize(
    ("name", "device", "why"),
    [
        ("nonsense", "", "no such backend"),
        (f"{BACKENDS}:Absent", "", "its driver is from another century"),
        (f"{BACKENDS}:Nothing", "", "does not load: AttributeError"),
        ("no_such_package:Backend", "", "does not load: ModuleNotFoundError"),
        (f"{BACKENDS}:Unfinished", "", "implements probe, capabilities and prepare"),
        ("json:dumps", "", "expected a class of"),
        ("reference", "zpu", "'zpu' was asked for, but torch knows no zpu"),
        ("reference", "npu", "'npu' .* torch knows no npu.* torch_npu is not installed"),
    ],
)
def test_what_is_not_there_is_told_with_the_reason(name: str, device: str, why: str) -> None:
    with pytest.raises(BackendUnavailable, match=why):
        subject(name, device or "cpu")


@pytest.mark.parametrize(
    ("name", "device"),
    [("a b:C", "cpu"), (":", "cpu"), ("reference", "z/pu"), ("reference", "cpu:x")],
)
def test_what_is_malformed_is_a_value_error(name: str, device: str) -> None:
    with pytest.raises(ValueError, match=r"was asked"):
        subject(name, device)


def test_a_backend_that_does_not_say_what_it_claims_has_a_flaw() -> None:
    found = subject(f"{BACKENDS}:Secretive").flaw
    assert found.startswith("capabilities() raised OSError: the licence server is asleep;")
    assert found.endswith("no case can be judged.")


# -- how copies are judged ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Right", "Waiting", "Talking"])
@pytest.mark.parametrize("end", ["synchronize", "done", "wait"])
def test_right_backends_pass(name: str, end: str) -> None:
    judge = judge_of(name)
    assert judge.launch(gather())
    assert judge.direct
    assert judge.copy(gather(), end=end)
    assert not judge.direct
    assert judge.examples == 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("OffByOne", "expected 0x"),
        ("Raising", "raised KeyError"),
    ],
)
def test_wrong_backends_fail_with_a_sentence(name: str, why: str) -> None:
    judge = judge_of(name)
    with pytest.raises(AssertionError, match=why):
        judge.copy(gather())
    assert judge.failing is not None
    assert judge.examples == 0


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
    home = Bench(judge=judge_of("WholeChunks"))
    connector = AdaptiveConnector(
        "cpu", backend=home.subject.name, kv_layout=home.paged, chunk_layout=home.dense
    )
    store = test_connector.Store(home, connector)
    with pytest.raises(AssertionError, match="it moves whole ones"):
        test_connector.test_a_range_of_the_slot_mapping(store, move, 3, 11)


def test_a_refusal_that_check_foretells_may_be() -> None:
    judge, case = judge_of("Modest"), gather(dtype=torch.uint8, shift=1)
    refusal = Unsupported("This plan", "of a launch")
    judge.may_decline(refusal, *asked_of(case))
    assert judge.declined == ["it needs 16 B alignment and the plan allows 1 B"]
    judge = judge_of("Right")
    with pytest.raises(AssertionError, match="of a launch"):
        judge.may_decline(refusal, *asked_of(case))


def test_what_the_simulated_device_fills_memory_with_is_told() -> None:
    judge, case = judge_of("Right"), gather()
    expected = case.expected()
    case.dst.guards[0].payload().fill_(0xDB)
    plain = judge.compare(expected, case.dst.tensors)
    assert plain is not None
    assert "holds 0xdb, which is of unknown origin" in plain
    judge.subject = replace(judge.subject, emulated=True)
    assert judge.compare(expected, case.dst.tensors) == (
        f"{plain} 0xdb is what the simulated device fills memory with that was never written, or "
        f"was freed: the copy came before its producer, or after the end of memory that it still "
        f"needed."
    )
    case.dst.guards[0].payload().fill_(0xDA)
    other = judge.compare(expected, case.dst.tensors)
    assert other is not None
    assert "simulated" not in other


def test_a_backend_that_declines_is_no_failure_and_no_example() -> None:
    judge = judge_of("Modest")
    assert not judge.copy(gather(dtype=torch.uint8, shift=1))
    assert judge.declined == ["it needs 16 B alignment and the plan allows 1 B"]
    assert judge.examples == 0
    check_refused(judge, gather(dtype=torch.uint8, shift=1))
    with pytest.raises(AssertionError, match="must raise Unsupported; the copy returned"):
        check_refused(judge_of("Lax"), gather(dtype=torch.uint8, shift=1))


def test_a_home_is_a_layout_that_the_backend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    modest = subject(f"{BACKENDS}:Modest")
    checks: list[Any] = [lambda plan: Decision("none", False, "it takes none"), {}.__getitem__]
    for check in checks:
        monkeypatch.setattr(modest.backend, "check", check)
        assert find_home(modest, HOMES) == HOMES[0]  # CORE then says why


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


def test_a_failing_example_is_judged_again_on_whom_one_likes(tmp_path: Path) -> None:
    judge = judge_of("OffByOne")
    with pytest.raises(AssertionError):
        judge.copy(gather())
    assert judge.failing is not None
    file = tmp_path / "deep" / "example.json"
    saved.save(judge.failing, file, {"device": "cpu"})
    told = saved.replay(file, judge.subject)
    assert told is not None
    assert "which is source layer 0 key slot" in told
    assert saved.replay(file, subject("reference")) is None


@pytest.mark.parametrize("read", [saved.load, saved.read_about])
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "portakv-example/9"}', '{"schema": "portakv-example/1"}']
)
def test_a_file_that_is_no_example(text: str, read: Callable[[str], object]) -> None:
    without_ids = json.loads(saved.dump(gather()))
    del without_ids["src"]["ids"]["values"]
    with pytest.raises(ValueError, match="no saved example"):
        read(text)
    with pytest.raises(ValueError, match="no saved example"):
        saved.load(json.dumps(without_ids))


def test_a_case_made_by_hand_cannot_be_saved() -> None:
    case = gather()
    case.src.arrangement = None
    with pytest.raises(ValueError, match="not built from an arrangement"):
        saved.dump(case)


def test_shapes_lie_as_they_say() -> None:
    side = Workshop().cache(SHAPE, [0], memory="kv block head token dim", source=False)
    first = side.tensors[0]
    assert first.stride() == (6 * 2 * 4 * 16, 2 * 4 * 16, 16, 4 * 16, 1)
    assert first.storage_offset() * 2 == side.guards[0].start
    poison = poison_bytes(0, 1000, 8, side.guards[0].start)
    assert side.guards[0].payload()[:8].tolist() == poison.tolist()


def test_a_lifted_side_is_the_same_side_elsewhere() -> None:
    side = Workshop().cache(SHAPE, [0], dtype=torch.uint8)
    moved = lifted(side, 3)
    for one, two in zip(moved.tensors, side.tensors, strict=True):
        assert one.untyped_storage().data_ptr() % 16 == 3
        assert one.storage_offset() == two.storage_offset()
        assert one.stride() == two.stride()
        assert torch.equal(one, two)
    for guard, old in zip(moved.guards, side.guards, strict=True):
        assert guard.broken() is None
        guard.payload().fill_(0)
        assert not torch.equal(guard.whole, old.whole)
    assert not moved.tensors[0].any()


def test_a_pool_of_all_layers_is_one_storage() -> None:
    side = Workshop().cache(SHAPE, [0], memory="block layer kv token head dim", pads={1: 8})
    assert len(side.guards) == 1
    first, second = side.tensors
    assert second.data_ptr() - first.data_ptr() == 2 * 4 * 2 * 16 * 2
    case = Workshop().gather(SHAPE, [1, 2], memory="block layer kv token head dim")
    assert compare(case.expected(), case.dst.tensors) is not None  # nothing was copied yet


def test_a_block_that_is_split_is_launched_in_a_unit_that_fits_its_parts() -> None:
    """3 tokens divide a block of 6, but no part of it: ``token%2`` holds 2."""
    split = KVView(torch.empty(2, 2, 3, 8), "token%2 block token/2 dim", block_size=6)
    flat = KVView(torch.empty(4, 8), "token dim")
    ids = Index([0], step=6)
    assert largest_unit(split, flat, ids, Index(), 3) == 1
    assert largest_unit(split, flat, ids, Index(), 6) == CopyPlan(split.form, flat.form, 6, 0).unit


def test_what_fails_only_beside_other_work_is_not_kept_as_an_example(
    tmp_path: Path, conform: Any
) -> None:
    """A saved example that passes when it is replayed would only mislead."""
    told = ["--only", "test_ordering", "--device", "simdev", "--profile", "core", "-x"]
    mutant = "portakv_conformance.mutants.ordering:NoWaitOnProducer"
    done = conform(mutant, *told, "--report", str(tmp_path))
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
    "message",
    [
        ORACLE,
        f"AssertionError: {ORACLE}",
        f"AssertionError: {ORACLE} The case was Case(src=Side('layer').",
        f"AssertionError: {ORACLE}\nFalsifying example: test_any_copy(\n    data=data(...),\n)",
        f"AssertionError: {ORACLE}\nFailing test case: test_any_copy(\n    data=data(...),\n)",
        f"AssertionError: {ORACLE} The case was Case().\nFailing test case:\nstate = Engine()",
        f"AssertionError: {ORACLE}\nFailing explicit example: test_any_copy()",
        f"AssertionError: {ORACLE}\nFalsifying explicit example: test_any_copy()",
        f"AssertionError: {ORACLE}\nassert 7 == 9",
    ],
)
def test_the_sentence_is_the_oracle_s(message: str) -> None:
    assert sentence(message) == ORACLE
    other = message.replace(ORACLE, "KeyError: 'stream'").removeprefix("AssertionError: ")
    assert sentence(other).startswith("KeyError: 'stream'")


def test_what_the_installed_hypothesis_writes_is_known() -> None:
    """Its notes are part of the message that pytest reports."""

    @settings(max_examples=5, database=None)
    @given(st.integers())
    def fails(number: int) -> None:
        raise AssertionError(f"{ORACLE} The case was {number}.")

    with pytest.raises(AssertionError) as caught:
        fails()
    notes = getattr(caught.value, "__notes__", [])
    assert sentence("\n".join([f"AssertionError: {caught.value}", *notes])) == ORACLE
    assert sentence("\n".join([f"AssertionError: {ORACLE}", *notes])) == ORACLE


# -- tensors in no order ------------------------------------------------------------------------


def test_keys_and_values_are_scattered_each_in_their_own_way() -> None:
    """Whatever the allocator does, then, all tensors together are in no order for some seed."""
    layout = "layer kv | block token head dim"
    shape = Shape(layers=4)
    different = 0
    for seed in range(20):
        view = view_of(side_of(arranged(layout, shape, place="scattered", seed=seed)))
        keys, values = view.addresses.reshape(4, 2).T.tolist()
        different += np.argsort(keys).tolist() != np.argsort(values).tolist()
    assert different > 10


def test_a_search_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_addresses, "_TRIES", 3)
    monkeypatch.setattr(test_addresses, "_in_no_order", lambda case, direction: False)
    with pytest.raises(pytest.fail.Exception, match="In 3 tries the allocator never"):
        test_addresses.test_tensors_in_no_order(Bench(judge=judge_of("Right")), "gather", HOMES[0])
