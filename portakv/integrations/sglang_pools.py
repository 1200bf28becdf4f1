# SPDX-License-Identifier: Apache-2.0
"""The host pools of SGLang's HiCache as pages: their pieces, and what fixes the bytes of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import kind_of
from portakv.errors import InvalidTerms
from portakv.graph import Mask
from portakv.integrations import IntegrationError
from portakv.serving.page_pool import PagePool

#: Attributes of host pools that fix the bytes of a page.
ATTRIBUTES = (
    "layout",
    "dtype",
    "page_size",
    "start_layer",
    "end_layer",
    "layer_num",
    "target_layer_num",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "indexer_dtype",
    "temporal_dtype",
    "conv_dtype",
)
#: How a pool says that it has no pages, or none with addresses.
_HAS_NONE = (AttributeError, NotImplementedError, ValueError)


class HostPool(Protocol):
    """What PortaKV reads of a host pool."""

    page_size: int

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the addresses and the bytes of the pieces of pages."""

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """Return a copy of a page, or a view of it."""

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return memory for a page."""

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write a page."""


class PoolPages:
    """The pages of one host pool.

    Pages of pools that report addresses are read and written in place. Those of other pools are
    copied by the pool's own methods.

    Args:
        pool: a host pool of SGLang.
        name: of the pool.
        ranks: the processes whose pages these are.

    Raises `IntegrationError` for a pool that has no pages.

    Attributes:
        pool: the host pool.
        pages: in a store, by keys.
        identity: what fixes the bytes of a page.
    """

    def __init__(self, pool: HostPool, name: str, ranks: str) -> None:
        self.pool = pool
        if getattr(pool, "shard_size", 1) > 1:
            raise IntegrationError(
                f"Expected a host pool whose pages a rank has whole, got {name!r}, whose pages are "
                f"divided among {getattr(pool, 'shard_size', 1)} ranks. Turn that off."
            )
        in_place = _pieces_in_place(pool)
        self._pieces = in_place or _pieces_of_copies(pool, name)
        self._in_place = in_place is not None
        facts = [f"{each}={getattr(pool, each)}" for each in ATTRIBUTES if hasattr(pool, each)]
        kind = "in place" if self._in_place else "copies"
        self.identity = f"{name} {type(pool).__name__} {kind} {ranks} {' '.join(facts)}"
        try:
            self.pages = PagePool(self._pieces, self.identity.encode())
        except InvalidTerms:  # pieces with no common length
            self._in_place = False
            self._pieces = _pieces_of_copies(pool, name)
            self.pages = PagePool(self._pieces, self.identity.encode() + b" as copies")

    def copies(self) -> PagePool:
        """Return the pages as SGLang copies them, which may have other bytes than those in place.

        Raises `IntegrationError` for a pool that SGLang does not copy.
        """
        sizes = _pieces_of_copies(self.pool, "kv")
        return PagePool(sizes, self.identity.encode() + b" of SGLang's copies")

    @property
    def nbytes(self) -> int:
        """Return the bytes of a page."""
        return self.pages.size.nbytes

    def save(self, keys: Sequence[bytes], indices: torch.Tensor, after: bytes | None) -> Mask:
        """Store the pages at the indices of their tokens; return which of them are stored."""
        if self._in_place:
            return self.pages.save(keys, self._addresses(keys, indices), after)
        made = torch.empty((len(keys), self.nbytes), dtype=torch.uint8, device="cpu")
        for row, index in zip(made, self._firsts(keys, indices), strict=True):
            page = self.pool.get_data_page(index, flat=True)
            row.copy_(page.contiguous().view(torch.uint8).flatten())
        return self.pages.save(keys, _rows(made), after)

    def load(self, keys: Sequence[bytes], indices: torch.Tensor) -> Mask:
        """Load pages into the places at the indices of their tokens; return which have come."""
        if self._in_place:
            return self.pages.load(keys, self._addresses(keys, indices))
        firsts = self._firsts(keys, indices)
        made = [self.pool.get_dummy_flat_data_page() for _ in keys]
        places = np.array([[each.data_ptr()] for each in made], np.int64).reshape(-1, 1)
        landed = self.pages.load(keys, places)
        for page, index, there in zip(made, firsts, landed, strict=True):
            if there:
                self.pool.set_from_flat_data_page(index, page)
        return landed

    def _firsts(self, keys: Sequence[bytes], indices: torch.Tensor) -> list[int]:
        """Return the index of the first token of each page."""
        size = self.pool.page_size
        if indices is None or indices.numel() != len(keys) * size:
            got = "none" if indices is None else str(indices.numel())
            raise InvalidTerms(
                f"Expected host_indices of {size} tokens for each of {len(keys)} keys, got {got}. "
                f"Pass those of whole pages."
            )
        firsts: list[int] = indices[::size].tolist()
        return firsts

    def _addresses(self, keys: Sequence[bytes], indices: torch.Tensor) -> npt.NDArray[Any]:
        """Return the addresses of the pieces of pages, int64 ``[keys, pieces]``."""
        self._firsts(keys, indices)
        addresses, sizes = self.pool.get_page_buffer_meta(indices)
        if [*sizes] != self._pieces * len(keys):
            raise InvalidTerms(
                f"Expected pages of pieces of {self._pieces} bytes, got {sizes[:8]}. The pool has "
                f"changed; attach the storage backend again."
            )
        return np.array(addresses, np.int64).reshape(len(keys), len(self._pieces))


def _pieces_in_place(pool: HostPool) -> list[int] | None:
    """Return the bytes of the pieces of a page; None if the pool reports no addresses."""
    try:
        first = torch.arange(pool.page_size, dtype=torch.int64, device="cpu")
        _, sizes = pool.get_page_buffer_meta(first)
    except _HAS_NONE:
        return None
    return [int(size) for size in sizes] or None


def _pieces_of_copies(pool: HostPool, name: str) -> list[int]:
    """Return the bytes of a copy of a page, in a list."""
    try:
        page = pool.get_dummy_flat_data_page()
    except _HAS_NONE as error:
        raise IntegrationError(
            f"Expected a host pool with pages, got {name!r}, {kind_of(pool)}: {error}. "
            f"Start without a storage backend."
        ) from None
    return [page.numel() * page.element_size()]


def _rows(memory: torch.Tensor) -> npt.NDArray[Any]:
    """Return the addresses of rows, int64 ``[rows, 1]``."""
    first = memory.data_ptr()
    return first + np.arange(len(memory), dtype=np.int64)[:, None] * memory.stride(0)
