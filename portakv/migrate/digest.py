# SPDX-License-Identifier: Apache-2.0
"""Digests that tell both sides of a pull whether they hold the same: sums, modulo 2^64, of words
mixed with their places in the whole model. Parts add up, whatever layout and sharding hold them."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

from portakv.copy import copy_rows
from portakv.migrate.chunks import chunk, page_of
from portakv.migrate.shards import Window
from portakv.view import Index, KVView

MODULUS = 1 << 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICE = 32 << 20  # bytes of rows that are gathered at once
_MANY = 1 << 20  # words that are mixed at once; each takes 8 bytes, several times
# What splitmix64 multiplies with, and how far it shifts before.
_PLACE = 0x9E3779B97F4A7C15 - MODULUS
_MIXES = ((30, 0xBF58476D1CE4E5B9 - MODULUS), (27, 0x94D049BB133111EB - MODULUS), (31, 1))


def digest(view: KVView, index: Index, count: int, window: Window, first: int = 0) -> int:
    """The digest of ``count`` positions of an index, without those that it skips; of opaque pages,
    of whole ones. ``window``: what the view holds; ``first``: the token of the first position."""
    size, unit = page_of(view), gcd(8, *view.widths)
    (layer, _, layers), (head, _, heads) = window.layers, window.heads
    extents = 1, layers, heads, sum(view.widths) // unit
    most, total = max(1, _SLICE // view.form.token_bytes) * size, 0
    for at in range(0, count, most):
        n, front = min(most, count - at), 0
        part, (tensors, rows) = index.part(at, n), chunk(view, n)
        copy_rows(view.as_bytes(), rows, part, count=n).wait()
        tokens = torch.arange(0, n, size, dtype=torch.int64, device=view.device)
        if part.ids is not None:
            ids = part.ids.to(view.device)[(tokens + part.offset) // part.step]
            tokens = tokens[ids >= 0]
        for tensor in tensors:
            words = tensor.view(_WORDS[unit]).unflatten(2, (view.heads, -1)).transpose(0, 1)
            along = _along(words[0], (layer, head, front))
            total += _summed(words[tokens // size], [tokens + first + at, *along], extents)
            front += words.shape[3]
    return total % MODULUS


def box_digest(box: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> int:
    """The digest of a tensor that begins at ``start`` of one of ``shape``, by elements."""
    if box.is_complex():
        return box_digest(torch.view_as_real(box), (*start, 0), (*shape, 2))
    words = box.detach().view(_WORDS[box.element_size()])
    words = words if box.dim() else words[None]
    return _summed(words, _along(words, start or (0,)), shape or (1,)) % MODULUS


def _along(words: torch.Tensor, starts: Sequence[int]) -> list[torch.Tensor]:
    """The places of words on each of their axes, from ``starts`` on."""
    ends = zip(starts, words.shape, strict=True)
    return [torch.arange(a, a + n, dtype=torch.int64, device=words.device) for a, n in ends]


def _summed(words: torch.Tensor, along: list[torch.Tensor], extents: Sequence[int]) -> int:
    """The sum of words, each mixed with its place: ``along`` each axis, of such ``extents``."""
    axis = max(range(words.dim()), key=words.size)
    many = max(1, _MANY * words.size(axis) // max(1, words.numel()))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part, places in zip(words.split(many, axis), along[axis].split(many), strict=True):
        key = total.new_zeros(())
        for nth, extent in enumerate(extents):
            key = key[..., None] * extent + (places if nth == axis else along[nth])
        mixed = part.long() ^ key * _PLACE
        for shift, factor in _MIXES:
            mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor
        total += mixed.sum()
    return int(total)
