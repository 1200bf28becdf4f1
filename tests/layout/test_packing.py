# SPDX-License-Identifier: Apache-2.0
"""The geometry of packed slots: sizes, places, and what the format refuses."""

from __future__ import annotations

from typing import Any

import pytest

from portakv import InvalidTerms, Pack, Unsupported
from portakv.layout.encodings import PackedPlane, sampled


@pytest.mark.parametrize(
    ("values", "bits", "slot", "escapes"),
    [
        (256, 4, 448, 32),
        (2048, 4, 3136, 32),
        (256, 3, 416, 32),
        (2048, 3, 2976, 128),
        (16384, 3, 23424, 832),
        (4096, 4, 6272, 96),
        (16384, 4, 25088, 448),
        (32768, 4, 50112, 896),
        (49152, 4, 75136, 1344),
    ],
)
def test_the_usual_slot(values: int, bits: int, slot: int, escapes: int) -> None:
    plane = Pack(bits).plane(values)
    assert (plane.slot_bytes, plane.most_escapes) == (slot, escapes)
    assert plane.escapes_at + plane.most_escapes == slot
    assert plane.parameters.plane(values) == plane
    # The counts of all segments but the first end inside the head.
    assert 18 + 2 * (plane.segments - 1) <= plane.head_bytes


def test_large_planes_have_a_sampled_table_and_a_long_head() -> None:
    small = Pack().plane(8128)
    large = Pack().plane(8192)
    assert (small.sample, small.head_bytes, small.segments) == (1, 32, 4)
    assert (large.sample, large.head_bytes, large.segments) == (8, 64, 4)
    # Every channel of a head of 128 values is seen.
    places = {(8 * q + sampled(q)) % 128 for q in range(8192 // 8)}
    assert places == set(range(128))


def test_a_slot_of_another_size() -> None:
    plane = Pack(slot_bytes=3200).plane(2048)
    assert plane == PackedPlane(2048, 4, 3200)
    assert plane.most_escapes == 96
    assert plane.ratio == 4096 / 3200


@pytest.mark.parametrize("values", [0, 192, 255, 257, 320 + 32, 49152 + 64, 1 << 20])
def test_planes_of_other_sizes_are_unsupported(values: int) -> None:
    with pytest.raises(Unsupported, match=f"planes of {values} values"):
        Pack().plane(values)


@pytest.mark.parametrize("values", ["256", None, 256.0])
def test_numbers_of_values_are_integers(values: Any) -> None:
    with pytest.raises(Unsupported, match=f"planes of {values} values"):
        Pack().plane(values)


@pytest.mark.parametrize("text", [None, 4, "pack/1:٤", "pack/2:4", "pack/1:4 "])
def test_other_texts_are_refused(text: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected encoding to be a text such as 'pack/1:4'"):
        Pack.of_text(text)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"code_bits": 5}, "code_bits"),
        ({"code_bits": True}, "code_bits"),
        ({"code_bits": None}, "code_bits"),
        ({"slot_bytes": 100}, "slot_bytes"),
        ({"slot_bytes": -32}, "slot_bytes"),
        ({"slot_bytes": 3200.0}, "slot_bytes"),
    ],
)
def test_wrong_parameters_are_named(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(InvalidTerms, match=f"Expected {name}"):
        Pack(**arguments)


def test_a_slot_without_space_for_escapes_is_refused() -> None:
    with pytest.raises(InvalidTerms, match="slot_bytes above 3104"):
        Pack(slot_bytes=3104).plane(2048)
