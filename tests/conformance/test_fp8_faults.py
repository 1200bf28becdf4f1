# SPDX-License-Identifier: Apache-2.0
"""The cases of `fp8` catch every fault of its conversion; without a fault they pass, and the
backend is declined nothing. The oracle against slots by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.encoding_faults import failing_case

from portakv.copy import encodings, fp8
from portakv.layout.encodings import E4M3_NAN, Fp8Plane
from portakv_conformance.cases import Bench
from portakv_conformance.cases import test_fp8 as cases
from portakv_conformance.judge.fp8 import Fp8Shape, fp8_slot, fp8_values

Convert = Callable[[torch.Tensor, torch.Tensor, Fp8Plane], None]
CASES: dict[str, Callable[[Bench], None]] = {
    "rows, encoded": lambda bench: cases.test_rows_of_a_type(bench, True, "bfloat16"),
    "rows, decoded": lambda bench: cases.test_rows_of_a_type(bench, False, "float16"),
    "edges, encoded": lambda bench: cases.test_tokens_at_the_edges(bench, True, "float32"),
    "edges, decoded": lambda bench: cases.test_tokens_at_the_edges(bench, False, "float16"),
}


def _scale_of_the_plane(rows: torch.Tensor, slots: torch.Tensor, plane: Fp8Plane) -> None:
    """All tokens of a plane share the scale of the largest value."""
    one = Fp8Plane(1, plane.values)
    made = torch.empty((len(slots), one.slot_bytes), dtype=torch.uint8, device=slots.device)
    fp8.encode_rows(rows.reshape(len(rows), 1, -1), made, one)
    slots.zero_()
    slots[:, : plane.values] = made[:, : plane.values]
    scale = made[:, plane.values : plane.values + 2]
    slots[:, plane.values : plane.scales_past] = scale.repeat(1, plane.tokens)


def _neighbours_scale(slots: torch.Tensor, rows: torch.Tensor, plane: Fp8Plane) -> None:
    """The scale of the token before is read."""
    moved = slots.clone()
    area = moved[:, plane.values : plane.scales_past].view(-1, plane.tokens, 2)
    area.copy_(area.roll(1, 1))
    fp8.decode_rows(moved, rows, plane)


def _infinities_stay_finite(rows: torch.Tensor, slots: torch.Tensor, plane: Fp8Plane) -> None:
    """An infinity becomes the largest number of its type."""
    bounded = rows.clone().clamp_(torch.finfo(rows.dtype).min, torch.finfo(rows.dtype).max)
    fp8.encode_rows(bounded, slots, plane)


def _sign_of_zero_lost(rows: torch.Tensor, slots: torch.Tensor, plane: Fp8Plane) -> None:
    """The sign is that of a comparison with zero."""
    fp8.encode_rows(torch.where(rows == 0, 0.0, rows.float()).to(rows.dtype), slots, plane)


def _padding_left(rows: torch.Tensor, slots: torch.Tensor, plane: Fp8Plane) -> None:
    """The bytes after the scales are not written."""
    old = slots[:, plane.scales_past :].clone()
    fp8.encode_rows(rows, slots, plane)
    slots[:, plane.scales_past :] = old


def _overflow_is_infinite(slots: torch.Tensor, rows: torch.Tensor, plane: Fp8Plane) -> None:
    """A value past the range of the rows' type becomes an infinity."""
    wide = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    fp8.decode_rows(slots, wide, plane)
    rows.copy_(wide)


def _truncated(magnitudes: torch.Tensor) -> torch.Tensor:
    """Values are cut off to the number of e4m3 below."""
    bits = magnitudes.view(torch.int32) >> 20
    return torch.where(magnitudes < 2.0**-6, (magnitudes * 512).to(torch.int32), bits - 960)


def _ties_away(magnitudes: torch.Tensor) -> torch.Tensor:
    """Of two equally near numbers the larger one is taken."""
    bits = magnitudes.view(torch.int32) + (1 << 19) >> 20
    small = (magnitudes * 512 + 0.5).to(torch.int32)
    return torch.where(magnitudes < 2.0**-6, small, bits - 960)


def _flushed(magnitudes: torch.Tensor) -> torch.Tensor:
    """Numbers of e4m3 below the normal ones become zero."""
    return torch.where(magnitudes < 2.0**-6, 0, NEAREST(magnitudes))


def _scale_rounded_down(largest: torch.Tensor) -> torch.Tensor:
    """The scale is rounded down, so that the largest value is past 448 and cut to it."""
    return ((largest / 448).clamp_(min=2.0**-117).view(torch.int32) & ~0xFFFF).view(torch.float32)


def _scale_to_one_byte(largest: torch.Tensor) -> torch.Tensor:
    """The scale is a power of two."""
    bits = SCALES_OF(largest).view(torch.int32)
    return (bits + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)


NEAREST = fp8.nearest
SCALES_OF = fp8.scales_of
#: Where each fault takes the place of the right function.
FAULTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (encodings, "encode_rows", _scale_of_the_plane),
    (encodings, "decode_rows", _neighbours_scale),
    (encodings, "encode_rows", _infinities_stay_finite),
    (encodings, "encode_rows", _sign_of_zero_lost),
    (encodings, "encode_rows", _padding_left),
    (encodings, "decode_rows", _overflow_is_infinite),
    (fp8, "nearest", _truncated),
    (fp8, "nearest", _ties_away),
    (fp8, "nearest", _flushed),
    (fp8, "scales_of", _scale_rounded_down),
    (fp8, "scales_of", _scale_to_one_byte),
]


def test_without_a_fault_all_cases_pass() -> None:
    assert failing_case(CASES) == ""


@pytest.mark.parametrize(("module", "name", "fault"), FAULTS, ids=[f[2].__name__ for f in FAULTS])
def test_every_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fault: Callable[..., Any]
) -> None:
    monkeypatch.setattr(module, name, fault)
    assert failing_case(CASES)


def test_a_slot_by_hand() -> None:
    """Two tokens of five values: 448 has the scale 1, 896 the scale 2."""
    shape = Fp8Shape(2, 5)
    assert shape.slot_bytes == 16
    numbers = np.array([448, -1, 0.001, -0.0, np.inf, 896, 2, 3.3, np.nan, 0], dtype=np.float32)
    slot = fp8_slot(numbers.view(np.uint32), shape, torch.float32)
    # 1 is 0 0111 000; 0.001 is nearest to the smallest number, 2 ** -9; 3.3 / 2 to 1.625.
    assert slot[:5].tolist() == [0x7E, 0xB8, 1, 0x80, E4M3_NAN]
    assert slot[5:10].tolist() == [0x7E, 0x38, 0x3D, E4M3_NAN, 0]
    assert slot[10:].tolist() == [0x80, 0x3F, 0x00, 0x40, 0, 0]
    back = fp8_values(slot, shape, torch.float32).view(np.float32)
    assert back[:4].tolist() == [448, -1, 2**-9, 0]
    assert np.signbit(back[3])
    assert np.isnan(back[[4, 8]]).all()
    assert back[[5, 6, 7, 9]].tolist() == [896, 2, 3.25, 0]
    halves = fp8_values(slot, shape, torch.bfloat16)
    assert halves[4] == 0x7FC0
    assert halves[5] == 0x4460  # 896
