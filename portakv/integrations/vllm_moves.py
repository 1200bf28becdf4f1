# SPDX-License-Identifier: Apache-2.0
"""What a job of vLLM's offloading moves: pages of each group, judged before any of them moves.

No engine is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from portakv import Index, KVView, LayoutError, SlotError
from portakv.integrations.arguments import check_ids

_DEVICE = "layer | block (token dim)"
_HOST = "layer | block token dim"


class Part(NamedTuple):
    """Pages of one shape in a group, on both sides: one copy moves them all."""

    device: KVView  # a row is a page
    host: KVView  # a block is a chunk, its rows are pages


class Move(NamedTuple):
    """The blocks of one group in a job."""

    parts: Sequence[Part]
    blocks: Index
    places: Index  # pages in chunks
    pages: int


def parts_of(
    refs: Iterable[Any], pages: Sequence[torch.Tensor], host: Sequence[torch.Tensor]
) -> list[Part]:
    """The tensors of a group, those of equal shape and strides as one part. Padding stays. Raises
    `LayoutError` for a tensor that is not there, and for pages that are wider than it has."""
    alike: dict[Any, dict[int, None]] = {}
    for ref in refs:
        at = ref.tensor_idx
        width = ref.page_size_bytes
        widest = pages[at].shape[1] if 0 <= at < len(pages) else 0
        if not 0 < width <= widest:
            raise LayoutError(
                f"A group names pages of {width} bytes in tensor {at}; of {len(pages)} tensors it "
                f"has pages of {widest}. Hand over vLLM's canonical caches."
            )
        shape = pages[at].shape, pages[at].stride(), host[at].shape, host[at].stride(), width
        alike.setdefault(shape, {})[at] = None
    return [
        Part(
            KVView([pages[at][:, :width] for at in tensors], _DEVICE, block_size=1),
            KVView([host[at][:, :, :width] for at in tensors], _HOST),
        )
        for (*_, width), tensors in alike.items()
    ]


def sharing(groups: Iterable[Iterable[Any]]) -> set[tuple[int, ...]]:
    """The numbers of groups that lie in one tensor."""
    used = [{ref.tensor_idx for ref in refs} for refs in groups]
    found = {tuple(n for n, some in enumerate(used) if at in some) for at in set().union(*used)}
    return {numbers for numbers in found if len(numbers) > 1}


def moves_of(
    groups: Sequence[Sequence[Part]],
    together: Iterable[Sequence[int]],
    blocks_per_chunk: int,
    device: Any,
    host: Any,
    store: bool,
) -> list[Move]:
    """What a job moves, group by group; raises `SlotError` for what is known to be wrong.

    Args:
        groups: the parts of each group.
        together: the numbers of groups that lie in one tensor.
        blocks_per_chunk: blocks of the engine in a chunk.
        device: vLLM's `GPULoadStoreSpec`: blocks, one group behind the other.
        host: vLLM's `CPULoadStoreSpec`: their chunks.
        store: whether chunks are written; else blocks are.
    """
    sizes = list(device.group_sizes)
    firsts = list(device.block_indices)
    skips = [first % blocks_per_chunk for first in firsts]
    used = [
        -(-(skip + count) // blocks_per_chunk) if count else 0
        for skip, count in zip(skips, sizes, strict=True)
    ]
    given = len(device.block_ids), len(host.block_ids)
    if len(sizes) != len(groups) or given != (sum(sizes), sum(used)):
        raise SlotError(
            f"A job names {given[0]} blocks, {given[1]} chunks and groups of {sizes} blocks "
            f"from {firsts} on; expected {len(groups)} groups, with {sum(sizes)} blocks "
            f"in {sum(used)} chunks of {blocks_per_chunk}. Pass as many."
        )
    blocks = np.split(device.block_ids, np.cumsum(sizes)[:-1])
    chunks = np.split(host.block_ids, np.cumsum(used)[:-1])
    moves = []
    for parts, ids, places, skip, count in zip(groups, blocks, chunks, skips, sizes, strict=True):
        if not count or not parts:
            continue
        # Of one call: so they are sent to a device without waiting for it.
        there = Index.of(places, blocks_per_chunk).shifted(skip)
        move = Move(parts, Index.of(ids), there, count)
        check_ids(move.blocks, count, parts[0].device, not store)
        check_ids(move.places, count, parts[0].host, store)
        moves.append(move)
    targets = chunks if store else blocks
    for numbers in together:
        ids, times = np.unique(np.concatenate([targets[n] for n in numbers]), return_counts=True)
        if len(twice := ids[times > 1]):
            raise SlotError(
                f"A job names {twice[0]} in its destination for more than one of the groups "
                f"{numbers}, which lie in one tensor; expected one group for each "
                f"{'chunk' if store else 'block'}. Nothing was moved."
            )
    return moves
