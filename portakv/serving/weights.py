# SPDX-License-Identifier: Apache-2.0
"""Which weights a folder or a model has: the rows of one model are not those of another."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import torch

from portakv.runtime.rate_limited_log import RateLimitedLog

_warnings = RateLimitedLog(logging.getLogger(__name__))
#: The endings of files with weights.
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Bytes of a sample of a file, and how many are read: 32 files take some milliseconds.
SAMPLE = 4096
SAMPLES = 32
#: Elements of a tensor that are read. A model of 300 tensors takes some milliseconds.
ELEMENTS = 16


def checksum_of_weights(folder: str | os.PathLike[str]) -> str:
    """Return a checksum in hex of the weights in a folder, or in one file; empty if there are none.

    It depends on the names and sizes of the files of weights, and on samples of their bytes, so
    that two copies of a model are equal, on any host, and a model that was trained further is
    another one. Weights that differ in a few places only may have the same checksum.

    Raises `OSError` if a file cannot be read.
    """
    place = Path(folder)
    present = [place] if place.is_file() else []
    if place.is_dir():  # `Path.glob` lists nothing of a folder that it may not read
        present = [place / name for name in os.listdir(place)]
    files = sorted(path for path in present if path.suffix in ENDINGS)
    if not files:
        return ""
    checksum = blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            checksum.update(f"{path.name}:{size};".encode())
            for number in range(SAMPLES):
                file.seek((size - SAMPLE) * number // (SAMPLES - 1) if size > SAMPLE else 0)
                checksum.update(file.read(SAMPLE))
                if size <= SAMPLE:
                    break
    return checksum.hexdigest()


def checksum_if_here(model: str) -> str:
    """Return `checksum_of_weights` of a model's folder or file; empty if its name is neither.

    Empty also if the weights cannot be read here, which is logged.
    """
    try:
        return checksum_of_weights(model)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        text = "The weights in %s cannot be read (%s): blocks of other weights of that name would "
        text += "be taken for theirs. Correct its permissions, or remove blocks when it changes."
        _warnings.warning(f"weights {model}", text, model, error.strerror, lines=1)
        return ""


@torch.no_grad()
def checksum_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a checksum in hex of the weights of a loaded model.

    It depends on the names, shapes and dtypes of the tensors, and on samples of their elements, on
    any device: a model that was trained further, or that has an adapter, is another one. Tensors
    without memory (``meta``) count by their names and shapes only.
    """
    checksum = blake2b(digest_size=8)
    for name, tensor in tensors:
        checksum.update(f"{name}:{[*tensor.shape]}:{tensor.dtype};".encode())
        if tensor.is_meta or not tensor.numel():
            continue
        count = min(ELEMENTS, tensor.numel())
        last = tensor.numel() - 1
        chosen = [last * number // max(1, count - 1) for number in range(count)]
        ids = torch.tensor(chosen, dtype=torch.int64, device=tensor.device)
        elements = tensor.detach().reshape(-1)[ids].cpu().contiguous()
        checksum.update(elements.view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()
