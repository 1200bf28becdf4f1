# SPDX-License-Identifier: Apache-2.0
"""The host pools of SGLang's HiCache as pages: their pieces, and what fixes the bytes of a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import kind_of
from portakv.errors import InvalidTerms
from portakv.integrations import MATRIX, IntegrationError
from portakv.integrations.interfaces import lacks, names_in
from portakv.serving.local import StoreTerms, checksum_of_weights
from portakv.serving.pages import PagePool
from portakv.storage.work import Mask

# ------------------------------------------------------------------------------------------------
# The configuration of PortaKV as SGLang's storage backend. No engine is imported.

#: The key of ``--hicache-storage-backend-extra-config`` that has the terms of the store.
EXTRA = "portakv"
#: Terms of `StoreTerms` that SGLang has no use for.
OTHERS = ("by_layer", "block_size", "encoding")
#: SGLang's names of pools: of keys and values, and of those whose pages each rank has for itself.
KV = "kv"
SHARDED = ("mamba", "draft", "draft_indexer", "draft_swa")
#: SGLang's settings that fix the bytes of a page, of those that are in effect.
MODEL = ("model_path", "revision", "quantization", "dtype", "json_model_override_args")
#: What the storage backend uses of SGLang.
HOOKS = (
    *names_in(
        "sglang.srt.mem_cache.hicache_storage",
        "HiCacheStorage.register_mem_pool_host",
        "HiCacheStorage.register_mem_host_pool_v2",
        "HiCacheStorage.on_host_pools_registered",
        "HiCacheStorage.batch_get_v1",
        "HiCacheStorage.batch_set_v1",
        "HiCacheStorage.batch_exists_v2",
        "HiCacheStorage.batch_get_v2",
        "HiCacheStorage.batch_set_v2",
        "PoolHitPolicy",
        "PoolTransferResult",
    ),
    "sglang.srt.mem_cache.storage.backend_factory:StorageBackendFactory._create_dynamic_backend",
)


@dataclass(frozen=True)
class Settings:
    """What one process of SGLang is configured to do.

    Attributes:
        store: the terms of its store; the folder is the one of this process.
        model: the name of the model, and what else decides what a row is.
        in_place: SGLang passes indices of its host pool (``interface_v1``), no copies of pages.
        shared: every tensor-parallel rank has the same pages of keys and values (MLA).
        whole: the parts of the model that the process has, without tensor parallelism.
        rank: the process among the tensor-parallel ranks.
    """

    store: StoreTerms
    model: str
    in_place: bool
    shared: bool
    whole: str
    rank: str

    def ranks_of(self, pool: str) -> str:
        """Return the processes whose pages of a pool are those of this one."""
        if self.shared and pool not in SHARDED:
            return self.whole
        return f"{self.whole} {self.rank}"


def check_hooks() -> None:
    """Raise `IntegrationError` for a release of SGLang without the interface."""
    absent = lacks(HOOKS)
    if absent:
        raise IntegrationError(
            f"Expected a release of SGLang with {absent[0].replace(':', '.')}, got one without it. "
            f"Install {MATRIX['sglang']}, or leave the storage backend out."
        )


def terms_of(extra: Mapping[str, Any] | None) -> StoreTerms:
    """Return the terms of the store in an extra configuration.

    Raises `InvalidTerms` for terms that are missing or wrong, and `IntegrationError` for terms that
    SGLang has no use for.
    """
    terms = (extra or {}).get(EXTRA)
    if not isinstance(terms, Mapping):
        raise InvalidTerms(
            f"Expected {EXTRA!r} in --hicache-storage-backend-extra-config to be an object with "
            f"terms, such as a folder, got {terms!r}. Add it."
        )
    for name in OTHERS:
        if terms.get(name):
            raise IntegrationError(
                f"Expected terms without {name}, which SGLang has no use for, got "
                f"{name}={terms[name]!r}. Leave it out."
            )
    used = {name: value for name, value in terms.items() if name not in OTHERS}
    try:
        made = StoreTerms.of(used, without=OTHERS)
    except InvalidTerms as error:
        raise InvalidTerms(f"{EXTRA} in the extra configuration: {error}") from None
    if made.shared and (made.bucket is not None or not made.folders):
        raise IntegrationError(
            "Expected shared with a folder and without a bucket, which processes share anyway, got "
            "others. Correct them."
        )
    return made


def settings_of(config: Any) -> Settings:
    """Return the settings of a process from SGLang's ``HiCacheStorageConfig``.

    Raises `InvalidTerms` and `IntegrationError` as `terms_of`, and `IntegrationError` for ranks
    that are not served.
    """
    extra = config.extra_config or {}
    store = terms_of(extra)
    if config.should_split_heads:
        raise IntegrationError(
            "Expected pages of whole ranks, got tp_lcm_size, which divides them. Leave it out: "
            "each tensor-parallel size has separate pages."
        )
    alone = store.bucket is None and not store.shared
    if config.is_mla_model and config.tp_size > 1 and alone:
        raise IntegrationError(
            f"Expected shared, or a bucket, for a model whose {config.tp_size} tensor-parallel "
            f"ranks have the same pages, got neither: SGLang lets rank 0 alone write them, and the "
            f"other ranks do not see its store. Set shared to true in {EXTRA!r}."
        )
    whole = (
        f"pp{config.pp_rank}of{config.pp_size} cp{config.attn_cp_rank}of{config.attn_cp_size} "
        f"dcp{config.dcp_rank}of{config.dcp_size}"
    )
    rank = f"tp{config.tp_rank}of{config.tp_size}"
    process = f"{whole} {rank} dp{config.dp_rank}".replace(" ", "-")
    if store.folders:
        # Ranks of one stage share a store: their pages have equal sizes.
        own = whole.replace(" ", "-") if store.shared else process
        store = replace(store, folder=[str(Path(each) / own) for each in store.folders])
    in_place = bool(extra.get("interface_v1", 0))
    return Settings(store, _model(config), in_place, config.is_mla_model, whole, rank)


def _model(config: Any) -> str:
    """Return what tells the weights and their configuration apart."""
    names = [str(config.model_name)]
    context = sys.modules.get("sglang.srt.runtime_context")
    if context is not None:
        try:
            model = context.get_model()
            names += [f"{each}={getattr(model, each, '')}" for each in MODEL]
            names.append(checksum_of_weights(str(model.model_path)))
        except ValueError:  # no server has started in this process
            pass
    return ":".join(names)


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


#: A host pool of SGLang: its pages have addresses, or its methods copy them.
HostPool: TypeAlias = Any


class PoolPages:
    """The pages of one host pool.

    Pages of pools that report addresses are read and written in place. Those of other pools are
    copied by the pool's own methods.

    Args:
        pool: a host pool of SGLang.
        name: of the pool.
        ranks: the processes whose pages these are.
        copied: SGLang copies the pages itself, and the copies are stored. They may have other bytes
            than the pages in place.

    Raises `IntegrationError` for a pool that has no pages, or whose pages SGLang does not copy.

    Attributes:
        pool: the host pool.
        pages: in a store, by keys.
        identity: what fixes the bytes of a page.
    """

    def __init__(self, pool: HostPool, name: str, ranks: str, copied: bool = False) -> None:
        self.pool = pool
        if getattr(pool, "shard_size", 1) > 1:
            raise IntegrationError(
                f"Expected a host pool whose pages a rank has whole, got {name!r}, whose pages are "
                f"divided among {getattr(pool, 'shard_size', 1)} ranks. Turn that off."
            )
        in_place = _pieces_in_place(pool)
        facts = [f"{each}={getattr(pool, each)}" for each in ATTRIBUTES if hasattr(pool, each)]
        kind = "in place" if in_place else "copies"
        self.identity = f"{name} {type(pool).__name__} {kind} {ranks} {' '.join(facts)}"
        if copied:
            self.identity += " of SGLang's copies"
            in_place = None
        self._in_place = in_place is not None
        self._pieces = in_place or _pieces_of_copies(pool, name)
        try:
            self.pages = PagePool(self._pieces, self.identity.encode())
        except InvalidTerms:  # pieces with no common length
            self._in_place = False
            self._pieces = _pieces_of_copies(pool, name)
            self.pages = PagePool(self._pieces, self.identity.encode() + b" as copies")

    def save(self, keys: Sequence[bytes], indices: torch.Tensor, after: bytes | None) -> Mask:
        """Store the pages at the indices of their tokens; return which of them are stored."""
        if self._in_place:
            return self.pages.save(keys, self._addresses(keys, indices), after)
        size = (len(keys), self.pages.size.nbytes)
        made = torch.empty(size, dtype=torch.uint8, device="cpu").unbind()
        for row, index in zip(made, self._firsts(keys, indices), strict=True):
            page = self.pool.get_data_page(index, flat=True)
            row.copy_(page.contiguous().view(torch.uint8).flatten())
        return self.pages.save(keys, _addresses_of(made), after)

    def load(self, keys: Sequence[bytes], indices: torch.Tensor) -> Mask:
        """Load pages into the places at the indices of their tokens; return which have come."""
        if self._in_place:
            return self.pages.load(keys, self._addresses(keys, indices))
        firsts = self._firsts(keys, indices)
        made = [self.pool.get_dummy_flat_data_page() for _ in keys]
        landed = self.pages.load(keys, _addresses_of(made))
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


def _addresses_of(pages: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    """Return the addresses of pages, int64 ``[pages, 1]``."""
    return np.array([each.data_ptr() for each in pages], np.int64)[:, None]
