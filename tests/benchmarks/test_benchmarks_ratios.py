# SPDX-License-Identifier: Apache-2.0
"""The ratios of encodings, on rows whose entropy is known."""

from __future__ import annotations

import pytest
import torch

from portakv_benchmarks.encodings.errors import examples
from portakv_benchmarks.encodings.ratios import entropy, ratios_of, table

BOUND = "bound: exponents, chunks of 64 KiB"


def test_the_entropy_of_known_symbols() -> None:
    lines = [[7, 7, 7, 7], [0, 255, 0, 255], [1, 2, 3, 4]]
    symbols = torch.tensor(lines, dtype=torch.uint8, device="cpu")
    assert entropy(symbols).tolist() == [0, 1, 2]


def test_rows_of_one_exponent_and_of_random_bits() -> None:
    one = torch.ones((64, 2, 128), dtype=torch.bfloat16, device="cpu")
    found = ratios_of(one)
    assert found[BOUND] == 2
    assert found["pack, 4 bits"] == pytest.approx(4096 / 3136)
    draw = torch.Generator(device="cpu").manual_seed(0)
    bits = torch.randint(-(1 << 15), 1 << 15, (512, 2, 128), generator=draw, device="cpu")
    found = ratios_of(bits.to(torch.int16).view(torch.bfloat16))
    assert found[BOUND] == pytest.approx(1, abs=0.01)
    assert found["pack, 4 bits"] == pytest.approx(4096 / (3136 + 4096))  # no plane fits


def test_no_lossless_method_is_below_its_bound() -> None:
    for rows in examples(256).values():
        found = ratios_of(rows)
        assert found["pack, 4 bits"] < found["pack, 3 bits"] < found[BOUND] < 2


def test_the_table_has_a_line_for_each_method() -> None:
    lines = table(examples(256))
    assert len(lines) == 2 + 7
    assert all(line.count("|") == 4 for line in lines)
