# SPDX-License-Identifier: Apache-2.0
"""`CopyOptions`: options made once do what the keywords do, and nothing takes both."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch

from portakv import CopyOptions, InvalidTerms, KVView, LateErrors, copy_blocks, copy_rows, copy_runs
from portakv.copy.options import USUAL, options_from
from portakv.copy.rows import options_of

NAMES = [each.name for each in fields(CopyOptions) if each.init]
LAYOUT = "block token dim"


def view(numbers: torch.Tensor | None = None) -> KVView:
    """Return a view of four blocks of two tokens."""
    return KVView(torch.zeros(4, 2, 8) if numbers is None else numbers, LAYOUT)


@pytest.mark.parametrize("copy", [copy_rows, copy_blocks])
def test_a_copy_takes_every_option_as_a_keyword_with_its_default(copy: Any) -> None:
    parameters = signature(copy).parameters
    assert [name for name in parameters if name in NAMES] == NAMES
    assert {name: parameters[name].default for name in NAMES} == {
        name: getattr(USUAL, name) for name in NAMES
    }


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"by_layer": True},
        {"cancellable": True},
        {"max_gbps": 100.0},
        {"detached": True},
        {"check": "strict"},
        {"overlap": "idle"},
        {"late": LateErrors()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_and_keywords_copy_alike(options: dict[str, Any]) -> None:
    rows = torch.arange(64.0).reshape(4, 2, 8)
    once = CopyOptions(**options)
    for _ in range(2):  # options are reused
        by_options = view()
        by_keywords = view()
        first = copy_blocks(view(rows), by_options, [3, 0], [1, 2], options=once)
        second = copy_blocks(view(rows), by_keywords, [3, 0], [1, 2], **options)
        first.synchronize()
        second.synchronize()
        assert torch.equal(by_options.tensors, by_keywords.tensors)
        assert torch.equal(by_options.tensors[1], rows[3])
        assert first.statistics.slices == second.statistics.slices
    assert once == CopyOptions(**options)


def test_runs_take_options() -> None:
    src = torch.arange(32, dtype=torch.uint8)
    dst = torch.zeros(32, dtype=torch.uint8)
    ends = [src.data_ptr()], [dst.data_ptr()]
    places: dict[str, Any] = {"src_device": "cpu", "dst_device": "cpu"}
    copied = copy_runs(*ends, 32, **places, options=CopyOptions(cancellable=True))
    copied.synchronize()
    assert torch.equal(src, dst)
    with pytest.raises(InvalidTerms, match="got options and overlap"):
        copy_runs(*ends, 32, **places, options=USUAL, overlap="idle")


def test_a_usual_value_is_one_by_its_text() -> None:
    usual = "".join(["com", "pute"])  # another object
    assert options_of(USUAL, *_keywords(overlap=usual)) is USUAL
    assert options_from(USUAL, {"overlap": usual, "check": "".join(["usu", "al"])}) is USUAL
    with pytest.raises(InvalidTerms, match="by_layer to be True or False"):
        options_from(None, {"by_layer": 0})


def _keywords(**set_: object) -> list[object]:
    """Return all keywords in the order of `CopyOptions`, at their usual values if not set."""
    return [set_.get(each.name, each.default) for each in fields(CopyOptions) if each.init]


def test_options_and_keywords_together_are_refused() -> None:
    with pytest.raises(InvalidTerms, match="got options and by_layer, check"):
        copy_rows(view(), view(), options=USUAL, by_layer=True, check="strict")


@pytest.mark.parametrize("options", [{"by_layer": True}, "idle", CopyOptions])
def test_something_else_than_options_is_refused(options: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected options to be a CopyOptions"):
        copy_rows(view(), view(), options=options)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("backend", "stream")])
@pytest.mark.parametrize("value", [7j, "none such", [], torch.ones(2)], ids=repr)
def test_a_wrong_value_is_refused_when_options_are_made(name: str, value: Any) -> None:
    with pytest.raises(InvalidTerms, match=f"Expected {name} to be"):
        CopyOptions(**{name: value})
    with pytest.raises(InvalidTerms, match=f"Expected {name} to be"):
        copy_rows(view(), view(), **{name: value})


def test_a_number_is_not_a_flag() -> None:
    """0 equals False, so only the identity of a value says that it is the default."""
    with pytest.raises(InvalidTerms, match="Expected by_layer to be True or False, got 0"):
        copy_rows(view(), view(), by_layer=0)  # type: ignore[arg-type]
    with pytest.raises(InvalidTerms, match="True or False, got a bool of numpy"):
        CopyOptions(by_layer=np.False_)  # type: ignore[arg-type]
    of_numpy_1 = type("bool_", (), {"__module__": "numpy"})()
    with pytest.raises(InvalidTerms, match="True or False, got a bool of numpy"):
        CopyOptions(by_layer=of_numpy_1)


def test_the_usual_options_are_shared_and_frozen() -> None:
    usual = [getattr(USUAL, name) for name in NAMES]
    assert options_of(None, *usual) is USUAL
    assert options_from(None, {}) is USUAL
    with pytest.raises(FrozenInstanceError):
        USUAL.by_layer = True  # type: ignore[misc]
    assert USUAL.terms is None
    assert hash(CopyOptions(overlap="idle")) == hash(CopyOptions(overlap="idle"))
