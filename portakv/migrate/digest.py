# SPDX-License-Identifier: Apache-2.0
"""Digests that tell both sides of a pull whether they hold the same: sums, modulo 2^64, of words
times keys of their places in the whole model. Parts add up, whatever layout and sharding hold them.

The key of a place is the product of one odd number for each axis, so that a sum is taken axis by
axis. Words have at most half of the modulus' bits: what differs in their highest bits alone is seen
as well, but for one case in 2^32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd

import torch

from portakv.copy import copy_rows
from portakv.migrate.chunks import chunk, chunk_bytes, page_of, staging
from portakv.migrate.shards import Window
from portakv.runtime.bounded import Bounded
from portakv.view import Index, KVView

MODULUS = 1 << 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Words that are mixed at once, and bytes of rows that are gathered at once: on the host they stay
# in a core's cache, on a device they outweigh their launches.
_HOST, _DEVICE = (1 << 17, 2 << 20), (1 << 22, 32 << 20)
# splitmix64's, to make keys of places.
_STEP = 0x9E3779B97F4A7C15 - MODULUS
_MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS))
_AXIS = 1 << 48  # places of one axis end before those of the next one begin


class _Mixer:
    """Sums of words of one device, with room for those that are mixed at once."""

    def __init__(self, device: torch.device) -> None:
        self.many, self.slice = _HOST if device.type == "cpu" else _DEVICE
        self.room = torch.empty(self.many, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int, int], torch.Tensor]("keys of digests", 8)

    def key(self, axis: int, start: int, n: int) -> torch.Tensor:
        """The odd numbers of ``n`` places of an axis."""

        def make() -> torch.Tensor:
            first, kind = axis * _AXIS + start, self.room
            x = torch.arange(first, first + n, dtype=kind.dtype, device=kind.device)
            x *= _STEP
            for shift, factor in _MIXES:
                x ^= x >> shift
                x *= factor
            return x.bitwise_or_(1)

        return self.keys.get_or_make((axis, start, n), make)

    def rows(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """The sum of each ``words[i]``, times the keys of all axes but the first."""
        if words.numel() > self.many:
            axis = next(axis for axis, n in enumerate(words.shape) if n > 1)
            n = max(1, self.many * words.shape[axis] // words.numel())
            parts = words.split(n, axis)
            if axis == 0:
                return torch.cat([self.rows(x, starts) for x in parts])
            before, start, after = starts[:axis], starts[axis], starts[axis + 1 :]
            sums = [self.rows(x, (*before, start + i * n, *after)) for i, x in enumerate(parts)]
            return torch.stack(sums).sum(0)
        for axis in range(words.dim() - 1, 0, -1):
            key = self.key(axis, starts[axis], words.shape[axis])
            room = self.room[: words.numel()].view(words.shape)
            words = torch.mul(words, key, out=room).sum(-1)
        return words


def digest(view: KVView, index: Index, count: int, window: Window, first: int = 0) -> int:
    """The digest of ``count`` positions of an index, without those that it skips; of opaque pages,
    of whole ones. ``window``: what the view holds; ``first``: the token of the first position."""
    size, unit, mixer, total = page_of(view), gcd(4, *view.widths), _Mixer(view.device), 0
    most = max(1, mixer.slice // view.form.token_bytes) * size
    room = staging(chunk_bytes(view, min(count, most)), view.device)
    for at in range(0, count, most):
        n, front = min(most, count - at), 0
        part, (tensors, rows) = index.part(at, n), chunk(view, n, room)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        key = mixer.key(0, (first + at) // size, n // size)
        if part.ids is not None:
            tokens = torch.arange(0, n, size, dtype=torch.int64, device=view.device)
            ids = part.ids.to(view.device)[(tokens + part.offset) // part.step]
            key = key * (ids >= 0)
        for tensor in tensors:
            words = tensor.view(_WORDS[unit]).unflatten(2, (view.heads, -1)).transpose(0, 1)
            starts = 0, window.layers[0], window.heads[0], front
            total += int((mixer.rows(words, starts) * key).sum())
            front += words.shape[3]
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
            key = mixer.key(0, starts[0], words.shape[0])
            totals.append((mixer.rows(words, starts) * key).sum())
        return [int(total) % MODULUS for total in totals]


def _words(part: torch.Tensor, start: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A part as words of two axes or more, and where they begin in the whole."""
    while part.dim() < 2:
        part, start = part[None], (0, *start)
    size = part.element_size()
    unit = gcd(4, size * start[-1], size * part.shape[-1])
    steps = *part.stride()[:-1], part.storage_offset()
    if size != unit and (part.stride(-1) != 1 or any(x * size % unit for x in steps)):
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(_WORDS[unit]), (*start[:-1], start[-1] * size // unit)
