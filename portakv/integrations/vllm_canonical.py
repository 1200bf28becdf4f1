# SPDX-License-Identifier: Apache-2.0
"""Pages of vLLM's ``canonical_layout``: a chunk whose bytes name no tensor parallelism.

Each worker copies the fragments of its pages to and from the page of the whole model, as vLLM's
mappings say. The module imports no engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from portakv import KVView, LayoutError
from portakv.integrations import IntegrationError
from portakv.integrations.vllm_moves import CacheRef, Part

_DEVICE = "layer | block head (token dim)"
_HOST = "layer | block token head dim"


class CopyRun(Protocol):
    """vLLM's `CopyRun`: fragments of one size, at a stride on each side."""

    local_offset: int
    canonical_offset: int
    fragment_size: int
    num_fragments: int
    local_stride: int
    canonical_stride: int


class PageMapping(Protocol):
    """vLLM's `CanonicalPageMapping`."""

    canonical_page_size_bytes: int
    runs: Sequence[CopyRun]
    num_writers: int
    writer_index: int


class Region(Protocol):
    """vLLM's `SharedOffloadRegion`: host memory that all workers of an engine share."""

    def create_next_canonical_view(self, tensor_page_size: int) -> torch.Tensor: ...


class Run(NamedTuple):
    """Fragments of a page; the attributes are those of `CopyRun`."""

    local_offset: int
    canonical_offset: int
    fragment_size: int
    num_fragments: int = 1
    local_stride: int = 0
    canonical_stride: int = 0


class Mapping(NamedTuple):
    """Where the bytes of a worker's page lie in the page of the whole model.

    Attributes:
        nbytes: of the page of the whole model.
        runs: of the worker's page.
        writers: how many workers have these bytes.
        writer: the number of this worker among them. They take turns, by the number of the page.
    """

    nbytes: int
    runs: tuple[Run, ...]
    writers: int = 1
    writer: int = 0


class Share(NamedTuple):
    """The part of a worker in chunks of the whole model.

    Attributes:
        rank: of the worker.
        workers: how many there are.
        shared: engines with other numbers of workers find the chunks.
    """

    rank: int
    workers: int
    shared: bool

    def groups_of(
        self,
        groups: Sequence[Sequence[CacheRef]],
        pages: Sequence[torch.Tensor],
        blocks_per_chunk: int,
        region: Region,
    ) -> list[list[Part]]:
        """Return the parts of each group, with chunks in memory that all workers share.

        Args:
            groups: the tensors of each group.
            pages: of each tensor, int8 ``[blocks, page]``.
            blocks_per_chunk: blocks of the engine in a chunk.
            region: the memory.

        Raises `IntegrationError` and `LayoutError` as `mapping_of` and `canonical_parts_of` do.
        """
        mapped = [[(ref, mapping_of(ref, *self)) for ref in refs] for refs in groups]
        host = [
            region.create_next_canonical_view(width * blocks_per_chunk).unflatten(
                1, (blocks_per_chunk, -1)
            )
            for width in page_bytes(mapped, len(pages))
        ]
        return [canonical_parts_of(refs, pages, host) for refs in mapped]


def mapping_of(ref: CacheRef, rank: int, workers: int, shared: bool) -> Mapping:
    """Return the mapping of a tensor's pages; vLLM has none for packed and cross-layer pages.

    Such a page is stored whole: it is the page of the model if there is one worker. Else the pages
    of all workers lie side by side, and are found by engines with as many workers.

    Args:
        ref: vLLM's, of the tensor.
        rank, workers: of this worker, and how many there are.
        shared: engines with other numbers of workers find the chunks.

    Raises `IntegrationError` for pages of several workers without a mapping that are shared.
    """
    found: PageMapping | None = getattr(ref, "mapping", None)
    if found is not None:
        runs = tuple(
            Run(
                run.local_offset,
                run.canonical_offset,
                run.fragment_size,
                run.num_fragments,
                run.local_stride,
                run.canonical_stride,
            )
            for run in found.runs
        )
        size = found.canonical_page_size_bytes
        return Mapping(size, runs, found.num_writers, found.writer_index)
    width = ref.page_size_bytes
    if workers > 1 and shared:
        raise IntegrationError(
            f"Expected pages for canonical_layout that vLLM can map to the whole model, got packed "
            f"or cross-layer pages of {workers} workers. Leave canonical_layout out."
        )
    return Mapping(workers * width, (Run(0, rank * width, width),))


def page_bytes(groups: Iterable[Iterable[tuple[CacheRef, Mapping]]], tensors: int) -> list[int]:
    """Return the bytes of the whole model's page of each tensor.

    Raises `LayoutError` for a tensor that no group uses.
    """
    widest = [0] * tensors
    for refs in groups:
        for ref, mapping in refs:
            widest[ref.tensor_idx] = max(widest[ref.tensor_idx], mapping.nbytes)
    if 0 in widest:
        raise LayoutError(
            f"Expected each of {tensors} tensors in a group, got none for tensor "
            f"{widest.index(0)}. Pass vLLM's canonical caches."
        )
    return widest


def canonical_parts_of(
    refs: Iterable[tuple[CacheRef, Mapping]],
    pages: Sequence[torch.Tensor],
    host: Sequence[torch.Tensor],
) -> list[Part]:
    """Return the fragments of a group's pages; those of one shape in several tensors are one part.

    Args:
        refs: of the group, with their mappings.
        pages: of each tensor, int8 ``[blocks, page]``.
        host: of each tensor, int8 ``[chunks, blocks_per_chunk, page of the whole model]``.

    Raises `LayoutError` for fragments outside of a page.
    """
    alike: dict[tuple[Run, int, int, Hashable], dict[int, None]] = {}
    for ref, mapping in refs:
        at = ref.tensor_idx
        shape = (pages[at].shape, pages[at].stride(), host[at].shape, host[at].stride())
        for run in mapping.runs:
            _check(run, ref, mapping)
            key = (run, mapping.writers, mapping.writer, shape)
            alike.setdefault(key, {})[at] = None
    return [
        Part(
            KVView([_local(run, pages[at]) for at in tensors], _DEVICE, block_size=1),
            KVView([_whole(run, host[at]) for at in tensors], _HOST),
            writers,
            writer,
        )
        for (run, writers, writer, _), tensors in alike.items()
    ]


def _check(run: Run, ref: CacheRef, mapping: Mapping) -> None:
    """Raise `LayoutError` for fragments outside of a page."""
    last = run.num_fragments - 1
    past = run.local_offset + last * run.local_stride + run.fragment_size
    whole = run.canonical_offset + last * run.canonical_stride + run.fragment_size
    if past > ref.page_size_bytes or whole > mapping.nbytes:
        raise LayoutError(
            f"Expected fragments in pages of {ref.page_size_bytes} and {mapping.nbytes} bytes, got "
            f"{run}. Pass vLLM's canonical caches."
        )


def _local(run: Run, page: torch.Tensor) -> torch.Tensor:
    """Return the fragments of a worker's pages, int8 ``[blocks, fragments, bytes]``."""
    return torch.as_strided(
        page,
        (page.shape[0], run.num_fragments, run.fragment_size),
        (page.stride(0), run.local_stride, 1),
        page.storage_offset() + run.local_offset,
    )


def _whole(run: Run, page: torch.Tensor) -> torch.Tensor:
    """Return the fragments of the whole model's pages, int8 ``[chunks, pages, fragments,
    bytes]``."""
    return torch.as_strided(
        page,
        (*page.shape[:2], run.num_fragments, run.fragment_size),
        (*page.stride()[:2], run.canonical_stride, 1),
        page.storage_offset() + run.canonical_offset,
    )
