# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model's weights, the parts of them that ranks have, and channels between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch

from portakv.errors import TransferError
from portakv.migrate.channel import Channel
from portakv.tasks import Work
from portakv.weights import pull as weight_copy
from portakv.weights.messages import END, AskWeights, SendSlice
from portakv.weights.plan import copy_pairs

Array: TypeAlias = npt.NDArray[Any]


def whole_of(shape: Sequence[int]) -> Array:
    """Return a tensor whose elements are all different."""
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.int32).reshape(shape)


def rank_of(part: Array, axis: int, rank: int, size: int, unit: int) -> Array:
    """Return a rank's share of one part: whole units, shared if there are fewer than ranks."""
    units = part.shape[axis] // unit
    first = units * rank // size
    past = max(first + 1, units * (rank + 1) // size)
    return part.take(range(first * unit, past * unit), axis)


def local_of(
    whole: Array, axis: int, parts: Sequence[int], rank: int, size: int, unit: int
) -> Array:
    """Return a rank's part of a fused tensor: its share of each part, one after the other."""
    cut = np.split(whole, np.cumsum(parts)[:-1], axis)
    return np.concatenate([rank_of(part, axis, rank, size, unit) for part in cut], axis)


def shared(array: Array) -> torch.Tensor:
    """The same elements, in memory that others may map."""
    tensor = torch.from_numpy(array.copy())
    tensor.share_memory_()
    return tensor


class Between(Channel):
    """A channel that does something before it asks for checksums."""

    def __init__(self, channel: Channel, before: Callable[[], object]) -> None:
        self.channel = channel
        self.id = channel.id
        self.watch = channel.watch  # type: ignore[method-assign]
        self.before = before
        self.requested = set[AskWeights]()
        self.timeout = channel.timeout

    def ask(self, address: str, requested: Any, kind: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        sums = isinstance(requested, AskWeights) and (
            bool(requested.boxes) or (0 < requested.first < END and not requested.begin)
        )
        if sums and not self.requested:
            self.before()
        self.requested |= {requested} if sums else set()
        return self.channel.ask(address, requested, kind, *arguments, **named)

    async def answer(self, *request: Any) -> Any:
        return await Work(self.ask, *request)


class AtSlice(Channel):
    """A channel that does something once, before it requests the slice of a number."""

    def __init__(self, channel: Channel, number: int, before: Callable[[], object]) -> None:
        self.channel = channel
        self.id = channel.id
        self.address = channel.address
        self.timeout = channel.timeout
        self.watch = channel.watch  # type: ignore[method-assign]
        self.tell = channel.tell  # type: ignore[method-assign]
        self.number = number
        self.before = before
        self.slices = list[SendSlice]()

    def ask(self, address: str, requested: Any, kind: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        self._note(requested)
        return self.channel.ask(address, requested, kind, *arguments, **named)

    def _note(self, requested: Any) -> None:
        if isinstance(requested, SendSlice) and requested not in self.slices:
            self.slices.append(requested)
            if len(self.slices) == self.number:
                self.before()

    async def answer(self, *request: Any) -> Any:
        return await Work(self.ask, *request)


Channels = Callable[[], Channel]


def make_channels() -> Iterator[Callable[[], Channel]]:
    """Makes channels of this host, which end with the test."""
    made = list[Channel]()

    def make() -> Channel:
        made.append(Channel())
        return made[-1]

    yield make
    for channel in made:
        channel.close()


def find_wrong_copies(
    monkeypatch: pytest.MonkeyPatch,
    pull: Callable[[], object],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Let each tensor have a wrong bit after a copy, which a pull finds; then pull without one.

    ``tensors``: the reader's, by the names that the error has.
    """
    wrong = list[torch.Tensor]()

    def copy(pairs: Any) -> None:
        copy_pairs(pairs)
        for tensor in wrong:
            tensor[3, 1] ^= 1 << 30

    monkeypatch.setattr(weight_copy, "copy_pairs", copy)
    for name, tensor in tensors.items():
        wrong[:] = [tensor]
        with pytest.raises(TransferError, match=f"others of {name}\\. Do not use any"):
            pull()
    wrong.clear()
    pull()
