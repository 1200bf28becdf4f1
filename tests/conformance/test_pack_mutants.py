# SPDX-License-Identifier: Apache-2.0
"""The cases of the encoding catch every backend that packs wrongly; their base has no bug, and is
declined nothing. The oracle of slots against values that were packed by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.encoding_faults import failing_case

from portakv_conformance.cases import Bench
from portakv_conformance.cases import test_encodings as cases
from portakv_conformance.judge.slots import SlotShape, packed_slot, unpacked_values, usual_slot
from portakv_conformance.mutants import MUTANTS, Mutant
from portakv_conformance.mutants.base_pack import PackRows

MINE = [mutant for mutant in MUTANTS if issubclass(mutant, PackRows)]
#: Cases in the order of their cost.
CASES: dict[str, Callable[[Bench], None]] = {
    "edges, packed": lambda bench: cases.test_planes_at_the_edges(bench, True, 256, 4),
    "edges, unpacked": lambda bench: cases.test_planes_at_the_edges(bench, False, 256, 4),
    "one block": lambda bench: cases.test_one_block_that_does_not_fit(bench, True),
    "planes": lambda bench: cases.test_planes_of_a_block(bench, True, 4, 16),
    "large edges": lambda bench: cases.test_planes_at_the_edges(bench, True, 8192, 4),
}


def caught_by(backend: Mutant) -> str:
    """Return the first case that a backend fails; empty if it passes them all."""
    return failing_case(CASES, backend.target())


@pytest.mark.usefixtures("own_registry")
def test_the_base_has_no_bug() -> None:
    assert caught_by(PackRows) == ""


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("mutant", MINE, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant: Mutant) -> None:
    assert caught_by(mutant)


def _unpacked(slot: np.ndarray, shape: SlotShape) -> list[int]:
    values = unpacked_values(slot, shape)
    assert values is not None
    result: list[int] = values.tolist()
    return result


def test_a_slot_by_hand() -> None:
    """256 values: exponent 127 for all but three, which occur once; 15 exponents have codes."""
    shape = usual_slot(256, 4)
    assert shape == SlotShape(256, 4, 448)
    values = np.full(256, 127 << 7, dtype=np.uint16)
    values[0] = 0x8000 | 126 << 7 | 5
    values[3] = 128 << 7 | 0x7F
    slot, over = packed_slot(values, shape)
    assert not over
    assert slot[:4].tolist() == [0x85, 0, 0, 0x7F]
    assert slot[256:259].tolist() == [0x02, 0x10, 0]  # codes 2, 0, 0, 1
    assert slot[384:388].tolist() == [127, 128, 126, 0]
    assert not slot[388:].any()

    # Seventeen exponents more: those that count least and are smallest become escapes.
    values[10:27] = np.arange(1, 18) << 7
    slot, over = packed_slot(values, shape)
    assert not over
    assert slot[384:399].tolist() == [127, 128, 126, *range(17, 5, -1)]
    assert slot[399:402].tolist() == [0, 5, 0]
    assert slot[416:422].tolist() == [1, 2, 3, 4, 5, 0]
    assert _unpacked(slot, shape) == values.tolist()

    # 3 bits: eight codes lie in three bytes, the lowest bits first.
    small = usual_slot(256, 3)
    slot, over = packed_slot(values, small)
    assert not over
    assert slot[256:259].tolist() == [2, 2, 0]  # codes 2, 0, 0, 1, 0 ...
    assert _unpacked(slot, small) == values.tolist()


def test_a_flag_by_hand() -> None:
    shape = usual_slot(256, 4)
    values = (np.arange(256) % 200 << 7).astype(np.uint16)
    slot, over = packed_slot(values, shape)
    assert over
    assert np.flatnonzero(slot).tolist() == [399]
    assert unpacked_values(slot, shape) is None
