# SPDX-License-Identifier: Apache-2.0
"""The geometry of slots of `fp8`, its text, and what the encodings have in common."""

from __future__ import annotations

from typing import Any

import pytest

from portakv import Fp8, InvalidTerms, Pack, Unsupported
from portakv.layout import encodings
from portakv.layout.encodings import as_encoding, encoding_of_text, is_lossy, parameters_of


@pytest.mark.parametrize(
    ("tokens", "dim", "scales", "slot"),
    [(16, 128, 2048, 2080), (16, 32, 512, 544), (1, 3, 3, 16), (64, 576, 36864, 36992)],
)
def test_a_slot(tokens: int, dim: int, scales: int, slot: int) -> None:
    plane = Fp8().plane(tokens, dim)
    assert (plane.values, plane.slot_bytes) == (scales, slot)
    assert 0 <= plane.slot_bytes - plane.scales_past < 16
    assert parameters_of([plane]) == Fp8()
    assert parameters_of([Pack(3).plane(256)]) == Pack(3)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8), (True, 8), (8, 2.0)])
def test_planes_without_values_are_unsupported(size: tuple[Any, Any]) -> None:
    with pytest.raises(Unsupported, match="'fp8' for planes with"):
        Fp8().plane(*size)


def test_texts_are_read() -> None:
    assert Fp8().text == "fp8/1"
    for made in (Fp8(), Pack(), Pack(3, 1024)):
        assert encoding_of_text(made.text) == made
        assert is_lossy(made.text) == isinstance(made, Fp8)
    for text in ("fp8", "fp8/2", "fp8/1:4", "fp9/1", ""):
        with pytest.raises(InvalidTerms, match=r"encoding to be a text|'fp8/1'"):
            encoding_of_text(text)


def test_encodings_by_name() -> None:
    assert as_encoding("fp8") == Fp8()
    assert as_encoding("pack") == Pack()
    assert as_encoding(None) is None
    with pytest.raises(InvalidTerms, match="encoding to be 'pack', 'fp8'"):
        as_encoding("e5m2")


def test_what_packs_only_names_fp8() -> None:
    with pytest.raises(Unsupported, match="Rows in the encoding 'fp8'"):
        encodings.pack_parameters_of([Fp8().plane(4, 8)])  # type: ignore[list-item]
