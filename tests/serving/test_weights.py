# SPDX-License-Identifier: Apache-2.0
"""The checksums of the weights in a folder, and of a loaded model."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from portakv.serving.local import SAMPLE, checksum_if_here, checksum_of_tensors, checksum_of_weights


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


def test_a_model_in_one_file(tmp_path: Path) -> None:
    """As a ``.gguf`` file has it; a file of another kind has no weights."""
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(3 * SAMPLE))
    before = checksum_if_here(str(file))
    assert before == checksum_of_weights(tmp_path) != ""
    file.write_bytes(bytes(3 * SAMPLE - 1) + b"1")
    assert checksum_if_here(str(file)) not in (before, "")
    assert checksum_if_here("org/name") == checksum_if_here(__file__) == ""


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


def weights() -> dict[str, torch.Tensor]:
    """Tensors of several kinds, the same in each call."""
    numbers = torch.arange(1000.0, device="cpu")
    return {
        "matrix": numbers.view(20, 50).clone(),
        "half": numbers[:3].bfloat16(),
        "turned": numbers[:60].view(6, 10).clone().T,
        "none": numbers[:0],
        "scalar": numbers[7].clone(),
    }


def test_equal_tensors_are_equal() -> None:
    one = checksum_of_tensors(weights().items())
    assert one == checksum_of_tensors(weights().items())
    with torch.device("meta"), torch.inference_mode():
        assert one == checksum_of_tensors(weights().items())


@pytest.mark.parametrize("name", ["matrix", "half", "turned", "scalar"])
def test_another_tensor_is_told_apart(name: str) -> None:
    """By its values, its dtype, its shape and its name."""
    others: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x + 1,
        lambda x: x.double(),
        lambda x: x.reshape(1, -1),
        lambda x: x.to("meta"),
    ]
    results = [checksum_of_tensors(weights().items())]
    for change in others:
        made = weights()
        made[name] = change(made[name])
        results.append(checksum_of_tensors(made.items()))
    made = weights()
    made["another"] = made.pop(name)
    results.append(checksum_of_tensors(made.items()))
    assert len({*results}) == len(results)


def test_weights_that_cannot_be_read_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of other weights under the name would else be taken for theirs, unnoticed."""
    folder = written(tmp_path / "a", "model.safetensors", b"weights")
    assert checksum_if_here(str(tmp_path / "other")) == ""
    assert not caplog.messages

    def refuse(path: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    assert checksum_if_here(str(folder)) == ""
    (text,) = caplog.messages
    assert f"The weights in {folder} cannot be read (Permission denied)" in text
