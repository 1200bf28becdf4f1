# SPDX-License-Identifier: Apache-2.0
"""The cases of `rope` catch every fault of a rotation; without a fault they pass, and the backend
is declined nothing. The oracle against rotations by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.encoding_faults import failing_case

from portakv.copy import rotation
from portakv.layout.encodings import Rope
from portakv_conformance.cases import Bench
from portakv_conformance.cases import test_rope as cases
from portakv_conformance.judge.rope import Turn, wrong_keys

TURN = cases.TURNS
CASES: dict[str, Callable[[Bench], None]] = {
    "halves": lambda bench: cases.test_keys_of_a_type(bench, "bfloat16", "halves"),
    "neighbours": lambda bench: cases.test_keys_of_a_type(
        bench, "bfloat16", "neighbours in a part"
    ),
    "a part": lambda bench: cases.test_keys_of_a_type(bench, "bfloat16", "a part of a head"),
    "far": lambda bench: cases.test_far_positions(bench, "float32"),
    "edges": lambda bench: cases.test_keys_at_the_edges(bench, "bfloat16"),
}
Keys = torch.Tensor
RIGHT = rotation.rotate_keys
TURNS = Rope.turns


def _backwards(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """Keys are rotated the other way."""
    RIGHT(keys, cosines, -sines, style)


def _other_pairs(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """The pairs are those of the other style."""
    RIGHT(keys, cosines, sines, "gptj" if style == "neox" else "neox")


def _pairs_of_the_whole_head(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """The second value of a pair is half a head after the first, also in a head that is rotated in
    part."""
    ones = torch.ones(keys.shape[-1] // 2 - len(cosines), device=keys.device)
    RIGHT(keys, torch.cat([cosines, ones]), torch.cat([sines, 0 * ones]), style)


def _one_after_the_other(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """The second value of a pair is computed from the new first one."""
    pairs = len(cosines)
    first = keys[..., :pairs] if style == "neox" else keys[..., : 2 * pairs : 2]
    second = keys[..., pairs : 2 * pairs] if style == "neox" else keys[..., 1 : 2 * pairs : 2]
    first.copy_(first.float() * cosines - second.float() * sines)
    second.copy_(second.float() * cosines + first.float() * sines)


def _in_the_type(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """Cosines and sines are rounded to the type of the keys."""
    RIGHT(keys, cosines.to(keys.dtype).float(), sines.to(keys.dtype).float(), style)


def _cut_off(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """Results are cut off to bf16, and not rounded."""
    if keys.dtype is not torch.bfloat16:
        RIGHT(keys, cosines, sines, style)
        return
    wide = keys.float()
    RIGHT(wide, cosines, sines, style)
    keys.copy_((wide.view(torch.int32) & ~0xFFFF).view(torch.float32))


def _last_pair_left(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """The last pair of a head keeps its values."""
    kept = keys.clone()
    RIGHT(keys, cosines, sines, style)
    pairs = len(cosines)
    last = [pairs - 1, 2 * pairs - 1] if style == "neox" else [2 * pairs - 2, 2 * pairs - 1]
    keys[..., last] = kept[..., last]


def _first_token_left(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """The first token of a slice keeps its keys."""
    RIGHT(keys[:, :, 1:], cosines, sines, style)


def _nan_becomes_zero(keys: Keys, cosines: Keys, sines: Keys, style: str) -> None:
    """A key that is not a number becomes zero."""
    RIGHT(keys, cosines, sines, style)
    keys.nan_to_num_(0.0, float("inf"), float("-inf"))


def _one_position_more(self: Rope, dim: int) -> tuple[list[float], list[float]]:
    """The shift is one position too far."""
    shift = self.shift + 1
    rotary = self.rotary(dim)
    return TURNS(Rope(shift, style=self.style, rotary_dim=rotary, inv_freq=self.inv_freq), dim)


def _angles_in_float32(self: Rope, dim: int) -> tuple[list[float], list[float]]:
    """Angles are computed in float32, so that those of far positions are wrong."""
    angles = np.float32(self.shift) * np.array(self.inv_freq, dtype=np.float32)
    return np.cos(angles).tolist(), np.sin(angles).tolist()


FAULTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (rotation, "rotate_keys", _backwards),
    (rotation, "rotate_keys", _other_pairs),
    (rotation, "rotate_keys", _pairs_of_the_whole_head),
    (rotation, "rotate_keys", _one_after_the_other),
    (rotation, "rotate_keys", _in_the_type),
    (rotation, "rotate_keys", _cut_off),
    (rotation, "rotate_keys", _last_pair_left),
    (rotation, "rotate_keys", _first_token_left),
    (rotation, "rotate_keys", _nan_becomes_zero),
    (Rope, "turns", _one_position_more),
    (Rope, "turns", _angles_in_float32),
]


def test_without_a_fault_all_cases_pass() -> None:
    assert failing_case(CASES) == ""


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_every_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, fault)
    assert failing_case(CASES)


def bits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).view(np.uint32)


def test_a_quarter_turn_by_hand() -> None:
    """A quarter of a turn takes (3, 4) to (-4, 3), and leaves the value after the pair."""
    turn = Turn(1, (np.pi / 2,))
    source = bits(3, 4, 5)
    assert not wrong_keys(bits(-4, 3, 5), source, turn, torch.float32).any()
    # One unit in the last place of a product is allowed; a thousandth is not.
    assert not wrong_keys(bits(-4.0000005, 3, 5), source, turn, torch.float32).any()
    assert wrong_keys(bits(-4.004, 3, 5), source, turn, torch.float32).tolist() == [True, 0, 0]
    assert wrong_keys(bits(-4, 3, 5.0000005), source, turn, torch.float32).tolist() == [0, 0, True]
    other = Turn(1, (np.pi / 2, 0.0), neighbours=True)
    assert not wrong_keys(bits(-4, 3, 7, 8), bits(3, 4, 7, 8), other, torch.float32).any()
    assert wrong_keys(bits(-4, 4, 3, 8), bits(3, 4, 7, 8), other, torch.float32).any()


def test_infinities_by_hand() -> None:
    """An infinity stays one where it is not multiplied by zero; NaN may have any payload."""
    turn = Turn(1, (1.0,))
    source = bits(np.inf, 1)
    assert not wrong_keys(bits(np.inf, np.inf), source, turn, torch.float32).any()
    assert wrong_keys(bits(np.inf, 3e38), source, turn, torch.float32).tolist() == [False, True]
    source = bits(np.nan, 1)
    quiet = np.array([0x7FC00000, 0xFFC00001], dtype=np.uint32)
    assert not wrong_keys(quiet, source, turn, torch.float32).any()
    assert wrong_keys(bits(1, np.nan), source, turn, torch.float32).tolist() == [True, False]
