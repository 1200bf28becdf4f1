# SPDX-License-Identifier: Apache-2.0
"""The checksum of the weights in a folder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from portakv.serving.weights import SAMPLE, checksum_of_weights


def written(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_copies_of_a_model_are_equal(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(5 * SAMPLE + 7)
    one, two = (written(tmp_path / name, "model.safetensors", content) for name in "ab")
    written(two, "README.md", b"another text")
    assert checksum_of_weights(one) == checksum_of_weights(two) != ""


@pytest.mark.parametrize("size", [1, SAMPLE, SAMPLE + 1, 1000 * SAMPLE])
@pytest.mark.parametrize("place", [0, -1])
def test_other_weights_are_told_apart(tmp_path: Path, size: int, place: int) -> None:
    content = bytearray(random.Random(1).randbytes(size))
    folder = written(tmp_path / "a", "model.safetensors", bytes(content))
    before = checksum_of_weights(folder)
    content[place] ^= 1
    written(folder, "model.safetensors", bytes(content))
    assert checksum_of_weights(folder) != before


def test_names_and_sizes_count(tmp_path: Path) -> None:
    zeros = bytes(9 * SAMPLE)
    found = {
        checksum_of_weights(written(tmp_path / str(number), name, zeros[:size]))
        for number, (name, size) in enumerate(
            [("a.safetensors", 9 * SAMPLE), ("b.safetensors", 9 * SAMPLE), ("a.bin", 8 * SAMPLE)]
        )
    }
    assert len(found) == 3


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    assert checksum_of_weights(written(tmp_path / "a", "config.json", b"{}")) == ""
    assert checksum_of_weights(tmp_path / "none") == ""
