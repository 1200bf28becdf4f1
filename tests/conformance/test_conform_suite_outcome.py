# SPDX-License-Identifier: Apache-2.0
"""How a case ended, in one sentence: the oracle's alone, whatever is written around it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portakv_conformance.cases import test_addresses
from portakv_conformance.draw import saved
from portakv_conformance.draw.arrangement import side_of
from portakv_conformance.draw.by_hand import HOMES, Shape, Workshop, arranged
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, find_home, view_of
from portakv_conformance.judge.subject import subject
from portakv_conformance.run.outcome import sentence

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


def test_another_exception_keeps_its_type() -> None:
    assert sentence("KeyError: 'stream'\nFailing test case: f()") == "KeyError: 'stream'"


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


def test_a_home_is_found_though_a_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every case would end as an error of its surroundings."""
    found = subject("reference")

    def raising(plan: object) -> None:
        raise KeyError(plan)

    monkeypatch.setattr(found.backend, "check", raising)
    assert find_home(found, HOMES) == HOMES[0]


def test_an_example_tells_where_it_was_found_before_it_is_built() -> None:
    """Its device may not be known to torch yet."""
    shop = Workshop()
    case = shop.gather(Shape(), [3, 1])
    text = saved.dump(case, {"device": "simdev:1"}).replace('"cpu"', '"simdev:1"')
    assert saved.read_about(text) == {"device": "simdev:1"}
    moved, _ = saved.load(text, "cpu")
    assert moved.src.guards[0].whole.device == torch.device("cpu")
    for wrong in ("", "[]", "{}", '{"schema": "another"}', '{"schema": "portakv-example/1"}'):
        with pytest.raises(ValueError, match="no saved example"):
            saved.read_about(wrong)


def test_an_example_is_told_how_it_failed() -> None:
    judge = Judge(subject("reference"), Facility(torch.device("cpu")), 0)
    shop = Workshop()
    assert judge.launch(shop.gather(Shape(), [3, 1]))
    assert judge.direct
    assert judge.copy(shop.gather(Shape(), [3, 1]))
    assert not judge.direct


# -- tensors in no order ------------------------------------------------------------------------


def test_keys_and_values_are_scattered_each_in_their_own_way() -> None:
    """Whatever the allocator does, then, all tensors together are in no order for some seed."""
    layout = "layer kv | block token head dim"
    shape = Shape(layers=4)
    different = 0
    for seed in range(20):
        view = view_of(side_of(arranged(layout, shape, place="scattered", seed=seed)))
        keys, values = view.addresses.reshape(4, 2).T.tolist()
        different += _ranks(keys) != _ranks(values)
    assert different > 10


def _ranks(numbers: list[int]) -> list[int]:
    return [sorted(numbers).index(number) for number in numbers]


def test_a_search_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_addresses, "_TRIES", 3)
    monkeypatch.setattr(test_addresses, "_in_no_order", lambda case, direction: False)
    judge = Judge(subject("reference"), Facility(torch.device("cpu")), 0)
    shop = Workshop(seed=random.Random(0).randrange(99))
    with pytest.raises(pytest.fail.Exception, match="In 3 tries the allocator never"):
        test_addresses.test_tensors_in_no_order(judge, shop, "gather", HOMES[0])
