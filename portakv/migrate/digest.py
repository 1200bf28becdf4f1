# SPDX-License-Identifier: Apache-2.0
"""Digests that tell both sides of a pull whether they hold the same: sums, modulo 2^64, of words
times keys of their places in the whole model. Parts add up, whatever layout and sharding hold them.

The key of a place is the product of one odd number for each axis, so that sums go axis by axis.
Words have at most half of the modulus' bits, so that their highest bits count like others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from math import gcd
from typing import Generic, TypeVar

import torch

from portakv.copy import copy_rows
from portakv.graph.graph import Queue, Task
from portakv.migrate.chunks import chunk, chunk_bytes, page_of, staging
from portakv.migrate.messages import Box
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

A = TypeVar("A")
MODULUS = 1 << 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Words that are mixed, and bytes of rows that are gathered, at once: what a core's cache holds, and
# on a device more than launches cost.
_HOST = (1 << 17, 2 << 20)
_DEVICE = (1 << 22, 32 << 20)
_AXIS = 1 << 48  # numbers of an axis' places, before those of the next one
# What splitmix64 adds and multiplies with, and how far it shifts before.
_STEP = 0x9E3779B97F4A7C15 - MODULUS
_MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))
_MOST = 64  # questions at once; the oldest answers that nobody fetched are forgotten


class _Mixer:
    """Sums words of one device up, in ``room`` for those that are mixed at once."""

    def __init__(self, device: torch.device) -> None:
        self.many, self.slice = _HOST if device.type == "cpu" else _DEVICE
        self.room = torch.empty(self.many, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int], torch.Tensor]("keys of digests", 16)

    def key(self, first: int, n: int) -> torch.Tensor:
        """The odd numbers of ``n`` places of an axis."""
        x = torch.arange(first, first + n, dtype=self.room.dtype, device=self.room.device)
        x *= _STEP
        for shift, factor in _MIXES:
            x ^= x >> shift
            x *= factor
        return x.bitwise_or_(1)

    def sum(self, words: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """The sum of words times their keys; ``places``: where each axis begins."""
        if words.numel() > self.many:
            axis = next(axis for axis, n in enumerate(words.shape) if n > 1)
            n = max(1, self.many * words.shape[axis] // words.numel())
            sums = list[torch.Tensor]()
            for i, part in enumerate(words.split(n, axis)):
                starts = [x + i * n if nth == axis else x for nth, x in enumerate(places)]
                sums.append(self.sum(part, starts))
            return torch.stack(sums).sum()
        for at in reversed([*zip(places, words.shape, strict=True)]):
            key = self.keys.get_or_make(at, partial(self.key, *at))
            words = torch.mul(words, key, out=self.room[: words.numel()].view(words.shape)).sum(-1)
        return words


def digest(view: KVView, index: Index, count: int, window: Box, first: int = 0) -> int:
    """The digest of ``count`` positions of an index, without those that it skips; of opaque pages,
    of whole ones. ``window``: what the view holds; ``first``: the token of the first position."""
    size = page_of(view)
    unit = gcd(4, *view.widths)
    mixer = _Mixer(view.device)
    total = 0
    most = max(1, mixer.slice // view.form.token_bytes) * size
    room = staging(chunk_bytes(view, min(count, most)), view.device)
    for at in range(0, count, most):
        n = min(most, count - at)
        part = index.part(at, n)
        (tensors, rows) = chunk(view, n, room)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        if part.ids is not None:
            tokens = torch.arange(0, n, size, dtype=torch.int64, device=view.device)
            skipped = part.ids.to(view.device)[(tokens + part.offset) // part.step] < 0
            for tensor in tensors if skipped.any() else ():
                tensor[:, skipped] = 0
        for kv, tensor in enumerate(tensors):
            words = tensor.view(_WORDS[unit])
            (layers, heads) = window
            inner = heads[0] * words.shape[2] // view.heads
            places = layers[0], _AXIS + (first + at) // size, (2 + kv) * _AXIS + inner
            total += int(mixer.sum(words, places))
    return total % MODULUS


def box_digests(boxes: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[int]:
    """The digests of parts of tensors, each with where it begins in its whole, by elements. Words
    are as wide as the ends of a part allow: digests of parts add up if theirs are of one width."""
    mixers = dict[torch.device, _Mixer]()
    sums = list[torch.Tensor]()
    with torch.inference_mode():
        for part, start in boxes:
            words, places = _words(part, (*start,))
            if words.device not in mixers:
                mixers[words.device] = _Mixer(words.device)
            places = [axis * _AXIS + x for axis, x in enumerate(places)]
            sums.append(mixers[words.device].sum(words, places))
        return [int(x) % MODULUS for x in sums]


def _words(part: torch.Tensor, start: tuple[int, ...]) -> tuple[torch.Tensor, Sequence[int]]:
    """A part as words, and where they begin in the whole."""
    part, start = (part, start) if start else (part[None], (0,))
    size = part.element_size()
    unit = gcd(4, size * start[-1], size * part.shape[-1])
    steps = *part.stride()[:-1], part.storage_offset()
    if size != unit and (part.stride(-1) != 1 or any(x * size % unit for x in steps)):
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(_WORDS[unit]), (*start[:-1], start[-1] * size // unit)


class Later(Generic[A]):
    """Answers of a worker to questions, such as for digests, that take longer than a channel may:
    whoever wants one asks again until it is made. Only one thread calls it."""

    def __init__(self, name: str, queue: Queue) -> None:
        self._queue = queue
        self._made = Bounded[Hashable, tuple[Task, list[A]]](name, _MOST)

    def answer(self, question: Hashable, make: Callable[[], A]) -> A | None:
        """None until it is made; then it is forgotten here. Raises what ``make`` did."""
        task, made = self._made.get(question, (None, list[A]()))
        if task and task.done():
            del self._made[question]
            if task.error:
                raise task.error
            return made[0]
        if not task and len(self._queue.graph.live) < _MOST:
            task = Task(lambda *_: made.append(make()), 1, queue=self._queue, name="answer")
            self._made[question] = task, made
            self._queue.graph.submit([task], priority="urgent")
        return None
