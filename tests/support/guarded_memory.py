# SPDX-License-Identifier: Apache-2.0
"""Tensors between canaries, snapshots of whole storages, and what a refusal must look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from portakv import PortaKVError
from portakv_conformance.judge.pattern import guarded

_numbers = count()


def filled(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float16,
    *,
    poison: bool = False,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return a contiguous tensor in a separate storage, between canaries, each byte naming its
    place."""
    size = torch.Size(shape)
    nbytes = size.numel() * dtype.itemsize
    memory = guarded(nbytes, storage=next(_numbers), poison=poison, device=device)
    tensor: torch.Tensor = memory.payload().view(dtype).view(size)
    return tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor's elements, on the host: NaN patterns compare by their bits."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return True if two tensors hold the same bytes in the same shape."""
    return left.shape == right.shape and torch.equal(bits(left), bits(right))


def tensors_in(level: Any) -> list[torch.Tensor]:
    """Yield every tensor in nested containers."""
    if isinstance(level, torch.Tensor):
        return [level]
    items = level.values() if isinstance(level, Mapping) else level
    return [tensor for item in items for tensor in tensors_in(item)]


def storages(*levels: Any) -> dict[int, torch.Tensor]:
    """Return a copy of each whole storage, canaries and padding included, by its address."""
    result = {}
    for tensor in tensors_in(levels):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            result[storage.data_ptr()] = whole.cpu().clone()
    return result


@contextmanager
def untouched(*levels: Any) -> Iterator[None]:
    """Check that no byte of any storage changes inside, be it a row, padding or a canary."""
    before = storages(*levels)
    yield
    after = storages(*levels)
    assert before.keys() == after.keys(), "a storage was moved"
    for address, content in before.items():
        changed = (content != after[address]).nonzero()[:, 0]
        assert not changed.numel(), f"{changed.numel()} bytes changed, first {int(changed[0])}"


@contextmanager
def refused(error: type[PortaKVError], *names: str, watch: Any = ()) -> Iterator[Any]:
    """Expect exactly ``error`` as a sentence that has all ``names``, with nothing written to the
    storages of ``watch``; yields the value of pytest.raises."""
    with untouched(watch), pytest.raises(PortaKVError) as caught:
        yield caught
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    check_sentence(message, *names)


def check_sentence(message: str, *names: str) -> None:
    """Check that a message is a sentence: a beginning, a full stop, several words, and the
    requested, actual and expected values."""
    assert re.match(r"[A-Z0-9`'\[(]|[a-z_]+[=\[. ]", message), message
    assert message.rstrip().rstrip(")").endswith((".", "!")) or "\n" in message, message
    assert len(message.split()) >= 8, message
    missing = [name for name in names if name not in message]
    assert not missing, f"{missing} not in: {message}"
