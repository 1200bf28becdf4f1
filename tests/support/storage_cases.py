# SPDX-License-Identifier: Apache-2.0
"""Small forms, images and caches for the tests of block stores."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch

from portakv.storage import image
from portakv.storage.form import BlockForm
from support.core_cases import noise


def small_form(layers: int = 4, heads: int = 2, block_size: int = 4, **other: Any) -> BlockForm:
    """A form in the canonical layout; ``other`` replaces any field of it."""
    fields: dict[str, Any] = {
        "model": "org/model@1",
        "dtype": "float16",
        "kv": 2,
        "widths": (32, 32),
        "block_size": block_size,
        "layers": (0, layers, layers),
        "heads": (0, heads, heads),
        "layout": "block layer head kv token dim",
    }
    return BlockForm(**{**fields, **other})


def key_of(number: int) -> bytes:
    """A key of 32 bytes that tells its number."""
    return number.to_bytes(4, "little") * 8


def sealed(form: BlockForm, keys: list[bytes], generation: int = 1, seed: int = 0) -> torch.Tensor:
    """Images of random rows, uint8 ``[keys, image bytes]``."""
    rows = noise(len(keys), form.image_bytes, dtype=torch.uint8, seed=seed)
    for row, key in zip(rows.numpy(), keys, strict=True):
        image.seal(row, form, key, generation)
    return rows


def payloads(rows: torch.Tensor, form: BlockForm) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The payloads of images, uint8 ``[images, payload bytes]``."""
    return rows.numpy()[:, image.HEADER : image.HEADER + form.payload_bytes]


def aligned(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zeroed bytes that begin with a page."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
