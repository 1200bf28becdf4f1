# SPDX-License-Identifier: Apache-2.0
"""Checksums by which both sides of a pull compare their bytes.

A checksum is a sum, modulo 2^64, of words. Each word is multiplied by the key of its position in
the whole model. Checksums of parts therefore add up to the checksum of the whole, for any layout
and any sharding.

The key of a position is the product of one odd number for each axis, so the sum is computed axis by
axis. A word has at most half of the bits of the modulus, so its highest bits change the sum too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from math import gcd
from typing import Generic, NamedTuple, TypeVar

import torch

from portakv.copy import copy_rows
from portakv.graph.graph import Queue
from portakv.graph.task import Task
from portakv.migrate.messages import Box
from portakv.migrate.staging import chunk, chunk_bytes, page_of, staging
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

A = TypeVar("A")
MODULUS = 1 << 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Distance between the numbers of the positions of two axes.
_AXIS = 1 << 48
# The step, the shifts and the factors of splitmix64.
_STEP = 0x9E3779B97F4A7C15 - MODULUS
_MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))
# Requests that are retained together. The oldest result that no one fetched is dropped.
_MAX_REQUESTS = 64


class _Batch(NamedTuple):
    """The size of one step of the computation."""

    words: int  # words that are multiplied together
    nbytes: int  # bytes of rows that are gathered together


# On a host, a batch fits the cache of a core, and torch uses one thread, as for all operations of
# less than 2^15 elements: several threads of several processes waited longer than they summed. On a
# device, a batch takes longer than its launches.
_HOST = _Batch((1 << 15) - 1, 2 << 20)
_DEVICE = _Batch(1 << 23, 32 << 20)


class _Mixer:
    """Sums words of one device, in a private buffer for the words that are multiplied together."""

    def __init__(self, device: torch.device) -> None:
        self.batch = _HOST if device.type == "cpu" else _DEVICE
        self.buffer = torch.empty(self.batch.words, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int], torch.Tensor]("keys of checksums", 16)

    def key(self, first: int, n: int) -> torch.Tensor:
        """Return the odd numbers of ``n`` positions of an axis."""
        x = torch.arange(first, first + n, dtype=self.buffer.dtype, device=self.buffer.device)
        x *= _STEP
        for shift, factor in _MIXES:
            x ^= x >> shift
            x *= factor
        return x.bitwise_or_(1)

    def sum(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Return the sum of words times their keys, without a wait for a device.

        ``starts``: the first position of each axis. Words with one more axis, the first, are
        several parts; the result has a sum of each.
        """
        if words.numel() > self.batch.words:
            return self._sum_in_parts(words, starts)

        # Axes before those of the starts are several parts of one shape.
        axes = words.shape[words.ndim - len(starts) :]
        for first, n in reversed([*zip(starts, axes, strict=True)]):
            key = self.keys.get_or_make((first, n), partial(self.key, first, n))
            product = self.buffer[: words.numel()].view(words.shape)
            words = torch.mul(words, key, out=product).sum(-1)
        return words

    def _sum_in_parts(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Split the words along their first axis that is longer than 1, and add up the parts."""
        axis = next(axis for axis, n in enumerate(words.shape) if n > 1)
        n = max(1, self.batch.words * words.shape[axis] // words.numel())
        sums = list[torch.Tensor]()
        for number, part in enumerate(words.split(n, axis)):
            part_starts = [*starts]
            part_starts[axis] += number * n
            sums.append(self.sum(part, part_starts))
        return torch.stack(sums).sum()


def checksum(view: KVView, index: Index, count: int, window: Box, first: int = 0) -> int:
    """Return the checksum of ``count`` positions of an index; skipped positions do not count.

    Opaque pages count whole.

    Args:
        window: the layers and heads of the model that the view contains.
        first: the token of the first position.
    """
    (layers, heads) = window
    size = page_of(view)
    unit = gcd(4, *view.widths)
    mixer = _Mixer(view.device)
    total = 0

    batch = max(1, mixer.batch.nbytes // view.form.token_bytes) * size
    buffer = staging(chunk_bytes(view, min(count, batch)), view.device)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        part = index.part(start, n)
        (tensors, rows) = chunk(view, n, buffer)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        _zero_skipped(tensors, part, n, size, view.device)

        for kv, tensor in enumerate(tensors):
            words = tensor.view(_WORDS[unit])
            inner = heads[0] * words.shape[2] // view.heads
            starts = layers[0], _AXIS + (first + start) // size, (2 + kv) * _AXIS + inner
            total += int(mixer.sum(words, starts))
    return total % MODULUS


def _zero_skipped(
    tensors: Iterable[torch.Tensor], part: Index, n: int, size: int, device: torch.device
) -> None:
    """Zero the gathered rows of skipped positions: the copy left their former bytes there."""
    if part.ids is None:
        return
    tokens = torch.arange(0, n, size, dtype=torch.int64, device=device)
    skipped = part.ids.to(device)[(tokens + part.offset) // part.step] < 0
    if skipped.any():
        for tensor in tensors:
            tensor[:, skipped] = 0


def box_checksums(boxes: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[int]:
    """Return the checksums of parts of tensors.

    Each part comes with its first element's position in the whole tensor. Words are as wide as the
    ends of a part allow. Checksums of parts add up if their words have one width.
    """
    sums = BoxSums()
    parts = [Part(number, part, (*start,)) for number, (part, start) in enumerate(boxes)]
    sums.add(parts)
    return sums.results(len(parts))


class Part(NamedTuple):
    """A part of a tensor, whose checksum is added to the sum of a number."""

    number: int
    tensor: torch.Tensor
    start: tuple[int, ...]  # of its first element in the whole tensor
    unit: int = 4  # the most bytes of a word: sums of a larger part's pieces have one width


class _Alike(NamedTuple):
    """Parts whose checksums are computed together."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    starts: tuple[int, ...]


class BoxSums:
    """Adds up checksums of parts of tensors by numbers, on the devices of the parts.

    Only `results` waits for a device, once for each. Small parts of one shape are summed together.
    """

    def __init__(self) -> None:
        self._mixers = dict[torch.device, _Mixer]()
        self._numbers = defaultdict[torch.device, list[int]](list)
        self._sums = defaultdict[torch.device, list[torch.Tensor]](list)

    def add(self, parts: Iterable[Part]) -> None:
        """Compute the checksums of parts on the current stream of their device."""
        alike = defaultdict[_Alike, list[tuple[int, torch.Tensor]]](list)
        with torch.inference_mode():
            for part in parts:
                words, start = _words(part.tensor, part.start, part.unit)
                starts = tuple(axis * _AXIS + x for axis, x in enumerate(start))
                alike[_Alike(words.device, words.dtype, words.shape, starts)].append(
                    (part.number, words)
                )
            for kind, group in alike.items():
                if kind.device not in self._mixers:
                    self._mixers[kind.device] = _Mixer(kind.device)
                mixer = self._mixers[kind.device]
                most = max(1, mixer.batch.words // max(1, kind.shape.numel()))
                for first in range(0, len(group), most):
                    some = group[first : first + most]
                    self._numbers[kind.device] += [number for number, _ in some]
                    if len(some) == 1:
                        sums = mixer.sum(some[0][1], kind.starts).view(1)
                    else:
                        sums = mixer.sum(torch.stack([words for _, words in some]), kind.starts)
                    self._sums[kind.device].append(sums)

    def results(self, count: int) -> list[int]:
        """Return the checksums of the numbers below ``count``."""
        totals = [0] * count
        for device, sums in self._sums.items():
            with torch.inference_mode():
                values = torch.cat(sums).tolist()
            for number, value in zip(self._numbers[device], values, strict=True):
                totals[number] += value
        return [total % MODULUS for total in totals]


def unit_of(itemsize: int, start: Sequence[int], extents: Sequence[int]) -> int:
    """Return the bytes of the widest words that a part of a tensor allows."""
    if not start:
        return gcd(4, itemsize)
    return gcd(4, itemsize * start[-1], itemsize * extents[-1])


def _words(
    part: torch.Tensor, start: tuple[int, ...], most: int
) -> tuple[torch.Tensor, Sequence[int]]:
    """Return a part as words of at most so many bytes, and the position of its first word in the
    whole."""
    if not start:
        part = part[None]
        start = (0,)
    size = part.element_size()
    unit = gcd(most, unit_of(size, start, part.shape))

    # A view as wider words needs a contiguous last axis and aligned steps.
    if size != unit:
        *steps, last = part.stride()
        if last != 1 or any(x * size % unit for x in (*steps, part.storage_offset())):
            part = part.clone(memory_format=torch.contiguous_format)
    return part.view(_WORDS[unit]), (*start[:-1], start[-1] * size // unit)


class Later(Generic[A]):
    """Results of a worker for requests that take longer than a channel may, such as checksums.

    A peer repeats its request until the result exists. Only one thread calls this class.
    """

    def __init__(self, name: str, queue: Queue) -> None:
        self._queue = queue
        self._results = Bounded[Hashable, tuple[Task, list[A]]](name, _MAX_REQUESTS)

    def answer(self, question: Hashable, make: Callable[[], A]) -> A | None:
        """Return the result of ``make`` and drop it here, or None if it does not exist yet.

        Raises the error of ``make``.
        """
        task, answers = self._results.get(question, (None, list[A]()))
        if task is not None and task.done():
            del self._results[question]
            if task.error:
                raise task.error
            return answers[0]

        if task is None and len(self._queue.graph.live) < _MAX_REQUESTS:
            task = Task(lambda *_: answers.append(make()), 1, queue=self._queue, name="answer")
            self._results[question] = task, answers
            self._queue.graph.submit([task], priority="urgent")
        return None
