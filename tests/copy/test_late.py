# SPDX-License-Identifier: Apache-2.0
"""Errors that are found after a call has returned, for callers that keep no handles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.guarded_memory import check_sentence

from portakv import (
    InvalidTerms,
    KVView,
    LateErrors,
    LayoutError,
    SlotError,
    Transfer,
    copy_blocks,
    copy_rows,
)
from portakv.runtime.transfer import CAPTURED, Completion, acquire_word, hold


def sides(device: torch.device) -> tuple[KVView, KVView]:
    return tuple(KVView(torch.zeros(4, 2, 1, device=device), "block token dim") for _ in range(2))  # type: ignore[return-value]


def dropped(late: LateErrors, device: torch.device, bad: int = 9, **terms: Any) -> None:
    """A copy with a bad id, of which nothing is kept."""
    src, dst = sides(device)
    copy_rows(src, dst, torch.tensor([1, bad]).to(device), None, late=late, **terms)
    torch.accelerator.synchronize()


@pytest.mark.parametrize("terms", [{}, {"by_layer": True}, {"detached": True}], ids=str)
def test_the_next_copy_tells(accelerator: torch.device, terms: Any) -> None:
    late = LateErrors()
    other = LateErrors()
    dropped(late, accelerator, **terms)
    src, dst = sides(accelerator)
    copy_rows(src, dst, late=other).synchronize()
    with pytest.raises(SlotError, match="past the end") as caught:
        copy_blocks(src, dst, [0], [1], late=late)
    check_sentence(str(caught.value))
    copy_rows(src, dst, late=late).synchronize()


def test_it_can_be_asked_at_any_time(accelerator: torch.device) -> None:
    late = LateErrors()
    late.check()
    dropped(late, accelerator)
    with pytest.raises(SlotError):
        late.check(accelerator)
    late.check()


def test_what_keeps_no_errors(device: torch.device) -> None:
    src, dst = sides(device)
    with pytest.raises(InvalidTerms) as refused:
        copy_rows(src, dst, late="later")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="to be a view, got"):
        copy_rows([], dst, late=LateErrors())  # type: ignore[arg-type]
    check_sentence(str(refused.value), "Expected late to be", "got 'later'")


def test_what_a_handle_told_is_not_told_again(accelerator: torch.device) -> None:
    late = LateErrors()
    src, dst = sides(accelerator)
    transfer = copy_rows(src, dst, torch.tensor([1, 9]).to(accelerator), None, late=late)
    with pytest.raises(SlotError):
        transfer.synchronize()
    late.check()


def test_without_it_nothing_is_raised_for_others(accelerator: torch.device) -> None:
    src, dst = sides(accelerator)
    copy_rows(src, dst, torch.tensor([1, 9]).to(accelerator), None)
    LateErrors().check()


class Flying:
    """Work under way."""

    landed = False

    def done(self) -> bool:
        return self.landed

    def wait(self) -> None:
        raise AssertionError("nothing waits for it")


def test_what_a_launch_reports_in_its_word(accelerator: torch.device) -> None:
    late = LateErrors()
    word = acquire_word()
    flying = Flying()
    completion = Completion(words=((word, 10),), pendings=(flying,))
    hold(completion)
    late.keep(Transfer((completion,)))
    late.check()
    word.value[0] = 6
    with pytest.raises(SlotError, match="Position 15 "):
        late.check()
    late.check()
    flying.landed = True
    assert completion.ended()  # and gives its word back


def test_captured_transfers_are_not_kept_without_bound() -> None:
    late = LateErrors()
    for _ in range(CAPTURED + 10):
        captured = Completion()
        captured.standing = True
        late.keep(Transfer((captured,)))
    assert len(late._captured) == CAPTURED
