# SPDX-License-Identifier: Apache-2.0
"""The moves of a job of vLLM's offloading: pages of each group, checked before any page moves.

The module imports no engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from portakv import Index, KVView, LayoutError, SlotError
from portakv.integrations.arguments import check_ids

_DEVICE = "layer | block (token dim)"
_HOST = "layer | block token dim"


class CacheRef(Protocol):
    """vLLM's `CanonicalKVCacheRef`: the pages of a group in one tensor."""

    tensor_idx: int
    page_size_bytes: int


class ChunkSpec(Protocol):
    """vLLM's `CPULoadStoreSpec`: the chunks of a job, group after group."""

    block_ids: npt.NDArray[np.int64]


class BlockSpec(ChunkSpec, Protocol):
    """vLLM's `GPULoadStoreSpec`: the blocks of a job, group after group.

    Attributes:
        group_sizes: the number of blocks of each group.
        block_indices: the number of each group's first block in its request.
    """

    group_sizes: Sequence[int]
    block_indices: Sequence[int]


class Part(NamedTuple):
    """Pages of one shape in a group, on both sides. One copy moves them all.

    Attributes:
        device: a view whose rows are pages.
        host: a view whose blocks are chunks and whose rows are pages.
        writers: how many workers have the same bytes, and write them to chunks in turns.
        writer: the number of this worker among them.
    """

    device: KVView
    host: KVView
    writers: int = 1
    writer: int = 0


class Move(NamedTuple):
    """The blocks of one group in a job.

    Attributes:
        parts: the memory of the group.
        blocks: the blocks of the caches.
        places: the pages in the chunks.
        pages: the number of pages.
    """

    parts: Sequence[Part]
    blocks: Index
    places: Index
    pages: int

    @property
    def nbytes(self) -> int:
        """Return the bytes that it copies."""
        return self.pages * sum([part.device.form.token_bytes for part in self.parts])


class _Group(NamedTuple):
    """The ids of one group in a job.

    Attributes:
        blocks: the blocks of the caches.
        chunks: the chunks that hold them.
        skip: pages of the first chunk before the first block.
    """

    blocks: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]
    skip: int


def parts_of(
    refs: Iterable[CacheRef], pages: Sequence[torch.Tensor], host: Sequence[torch.Tensor]
) -> list[Part]:
    """Return the tensors of a group; tensors of equal shape and strides are one part.

    The parts leave padding out.

    Raises:
        LayoutError: a tensor is missing, or has narrower pages than the group names.
    """
    alike: dict[tuple[int, Hashable], dict[int, None]] = {}
    for ref in refs:
        at = ref.tensor_idx
        width = ref.page_size_bytes
        widest = pages[at].shape[1] if 0 <= at < len(pages) else 0
        if not 0 < width <= widest:
            raise LayoutError(
                f"Expected a group in one of {len(pages)} tensors, with pages of up to {widest} "
                f"bytes, got pages of {width} bytes in tensor {at}. Pass vLLM's canonical caches."
            )
        shape = (pages[at].shape, pages[at].stride(), host[at].shape, host[at].stride())
        alike.setdefault((width, shape), {})[at] = None
    return [
        Part(
            KVView([pages[at][:, :width] for at in tensors], _DEVICE, block_size=1),
            KVView([host[at][:, :, :width] for at in tensors], _HOST),
        )
        for (width, _), tensors in alike.items()
    ]


def sharing(groups: Iterable[Iterable[CacheRef]]) -> set[tuple[int, ...]]:
    """Return the sets of groups that use one tensor, by their numbers."""
    tensors_of = [{ref.tensor_idx for ref in refs} for refs in groups]
    shared = set()
    for tensor in set().union(*tensors_of):
        users = tuple(number for number, used in enumerate(tensors_of) if tensor in used)
        if len(users) > 1:
            shared.add(users)
    return shared


def moves_of(
    groups: Sequence[Sequence[Part]],
    together: Iterable[Sequence[int]],
    blocks_per_chunk: int,
    device: BlockSpec,
    host: ChunkSpec,
    store: bool,
) -> list[Move]:
    """Return the moves of a job, group by group.

    Args:
        groups: the parts of each group.
        together: the sets of groups that use one tensor, by their numbers.
        blocks_per_chunk: blocks of the engine in a chunk.
        device: the blocks of the job.
        host: the chunks of the job.
        store: the job writes chunks; else it writes blocks.

    Raises:
        SlotError: the lists do not fit each other, an id is out of range, or a destination is
            written twice.
    """
    ids_of = _ids_of_groups(len(groups), blocks_per_chunk, device, host)
    moves = []
    for parts, ids in zip(groups, ids_of, strict=True):
        count = len(ids.blocks)
        if not count or not parts:
            continue
        # Indices of one call go to a device without a wait.
        blocks = Index.of(ids.blocks)
        places = Index.of(ids.chunks, blocks_per_chunk).shifted(ids.skip)
        check_ids(blocks, count, parts[0].device, not store)
        check_ids(places, count, parts[0].host, store)
        whole = [part for part in parts if not (store and part.writers > 1)]
        if whole:
            moves.append(Move(whole, blocks, places, count))
        for part in parts:
            if store and part.writers > 1:
                moves += _own_turn(part, ids, blocks_per_chunk)
    _check_shared(together, ids_of, store)
    return moves


def _own_turn(part: Part, ids: _Group, blocks_per_chunk: int) -> list[Move]:
    """Return the move of those pages of a part that this worker writes; none if there are none."""
    within = np.arange(blocks_per_chunk)
    pages = (ids.chunks[:, None] * blocks_per_chunk + within).reshape(-1)
    pages = pages[ids.skip : ids.skip + len(ids.blocks)]
    mine = pages % part.writers == part.writer
    count = int(mine.sum())
    if not count:
        return []
    return [Move([part], Index.of(ids.blocks[mine]), Index.of(pages[mine]), count)]


def _ids_of_groups(
    groups: int, blocks_per_chunk: int, device: BlockSpec, host: ChunkSpec
) -> list[_Group]:
    """Return the ids of each group of a job."""
    ids_of = []
    block = chunk = 0
    for count, first in zip(device.group_sizes, device.block_indices, strict=True):
        skip = first % blocks_per_chunk
        used = -(-(skip + count) // blocks_per_chunk) if count else 0
        blocks_of = device.block_ids[block : block + count]
        ids_of.append(_Group(blocks_of, host.block_ids[chunk : chunk + used], skip))
        block += count
        chunk += used
    blocks = len(device.block_ids)
    chunks = len(host.block_ids)
    if len(ids_of) != groups or blocks != block or chunks != chunk:
        raise SlotError(
            f"Expected {groups} groups, with {block} blocks in {chunk} chunks of "
            f"{blocks_per_chunk}, got {blocks} blocks, {chunks} chunks and groups of "
            f"{list(device.group_sizes)} blocks with first blocks {list(device.block_indices)}. "
            f"Pass as many."
        )
    return ids_of


def _check_shared(together: Iterable[Sequence[int]], ids_of: Sequence[_Group], store: bool) -> None:
    """Raise `SlotError` if groups that use one tensor write one place twice."""
    for numbers in together:
        targets = [ids.chunks if store else ids.blocks for ids in ids_of]
        ids, times = np.unique(np.concatenate([targets[n] for n in numbers]), return_counts=True)
        twice = ids[times > 1]
        if len(twice):
            raise SlotError(
                f"A job names {twice[0]} in its destination for more than one of the groups "
                f"{numbers}, which use one tensor; expected one group for each "
                f"{'chunk' if store else 'block'}. Nothing was moved. Correct the ids."
            )
