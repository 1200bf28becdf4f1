# SPDX-License-Identifier: Apache-2.0
"""Digests that tell both sides of a pull whether they hold the same: sums, modulo 2^64, of words
times keys of their places in the whole model. Parts add up, whatever layout and sharding hold them.

The key of a place is the product of one odd number for each axis, so that sums go axis by axis.
Words have at most half of the modulus' bits, so that their highest bits count like others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd

import torch

from portakv.copy import copy_rows
from portakv.migrate.chunks import chunk, chunk_bytes, page_of, staging
from portakv.migrate.messages import Box
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

MODULUS = 1 << 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Words that are mixed, and bytes of rows that are gathered, at once: what a core's cache holds, and
# on a device more than launches cost.
_HOST, _DEVICE = (1 << 17, 2 << 20), (1 << 22, 32 << 20)
_AXIS = 1 << 48  # numbers of an axis' places, before those of the next one
# What splitmix64 adds and multiplies with, and how far it shifts before.
_STEP = 0x9E3779B97F4A7C15 - MODULUS
_MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))


class _Mixer:
    """Sums words of one device up, in ``room`` for those that are mixed at once."""

    def __init__(self, device: torch.device) -> None:
        self.many, self.slice = _HOST if device.type == "cpu" else _DEVICE
        self.room = torch.empty(self.many, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int, int], torch.Tensor]("keys of digests", 8)

    def key(self, axis: int, start: int, n: int) -> torch.Tensor:
        """The odd numbers of ``n`` places of an axis."""

        def make() -> torch.Tensor:
            first, like = axis * _AXIS + start, self.room
            x = torch.arange(first, first + n, dtype=like.dtype, device=like.device)
            x *= _STEP
            for shift, factor in _MIXES:
                x ^= x >> shift
                x *= factor
            return x.bitwise_or_(1)

        return self.keys.get_or_make((axis, start, n), make)

    def rows(self, words: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The sum of each of ``words``, times their keys; ``places``: which axis each of the others
        is, and where it begins."""
        each = words[:1].numel()
        if each > self.many:
            nth = next(i for i, n in enumerate(words.shape) if i and n > 1)
            n, (axis, start) = max(1, self.many * words.shape[nth] // each), places[nth - 1]
            parts = enumerate(words.split(n, nth))
            ends = places[: nth - 1], places[nth:]
            found = [self.rows(x, (*ends[0], (axis, start + i * n), *ends[1])) for i, x in parts]
            return torch.stack(found).sum(0)
        keys = [self.key(*at, n) for at, n in zip(places, words.shape[1:], strict=True)]
        sums = list[torch.Tensor]()
        for part in words.split(max(1, self.many // max(1, each))):
            for key in reversed(keys):
                part = torch.mul(part, key, out=self.room[: part.numel()].view(part.shape)).sum(-1)
            sums.append(part)
        return torch.cat(sums)


def digest(view: KVView, index: Index, count: int, window: Box, first: int = 0) -> int:
    """The digest of ``count`` positions of an index, without those that it skips; of opaque pages,
    of whole ones. ``window``: what the view holds; ``first``: the token of the first position."""
    size, unit, mixer, total = page_of(view), gcd(4, *view.widths), _Mixer(view.device), 0
    most = max(1, mixer.slice // view.form.token_bytes) * size
    room = staging(chunk_bytes(view, min(count, most)), view.device)
    for at in range(0, count, most):
        n = min(most, count - at)
        part, (tensors, rows) = index.part(at, n), chunk(view, n, room)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        key = mixer.key(0, (first + at) // size, n // size)
        if part.ids is not None:
            tokens = torch.arange(0, n, size, dtype=torch.int64, device=view.device)
            key = key * (part.ids.to(view.device)[(tokens + part.offset) // part.step] >= 0)
        for kv, tensor in enumerate(tensors):
            words, head = tensor.view(_WORDS[unit]).transpose(0, 1), window[1][0]
            places = (1, window[0][0]), (2 + kv, head * words.shape[2] // view.heads)
            total += int((mixer.rows(words, places) * key).sum())
    return total % MODULUS


def box_digests(boxes: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[int]:
    """The digests of parts of tensors, each with where it begins in its whole, by elements. Words
    are as wide as the ends of a part allow: digests of parts add up if theirs are of one width."""
    mixers, totals = dict[torch.device, _Mixer](), list[torch.Tensor]()
    with torch.inference_mode():
        for part, start in boxes:
            words, starts = _words(part, (*start,))
            if words.device not in mixers:
                mixers[words.device] = _Mixer(words.device)
            mixer = mixers[words.device]
            key = mixer.key(0, starts[0], len(words))
            totals.append((mixer.rows(words, [*enumerate(starts)][1:]) * key).sum())
        return [int(total) % MODULUS for total in totals]


def _words(part: torch.Tensor, start: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A part as words of at least two axes, and where they begin in the whole."""
    while part.dim() < 2:
        part, start = part[None], (0, *start)
    size = part.element_size()
    unit = gcd(4, size * start[-1], size * part.shape[-1])
    steps = *part.stride()[:-1], part.storage_offset()
    if size != unit and (part.stride(-1) != 1 or any(x * size % unit for x in steps)):
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(_WORDS[unit]), (*start[:-1], start[-1] * size // unit)
