# SPDX-License-Identifier: Apache-2.0
"""The configuration of PortaKV as SGLang's storage backend. No engine is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from portakv.errors import InvalidTerms
from portakv.integrations import MATRIX, IntegrationError
from portakv.integrations.interfaces import lacks
from portakv.serving.local import StoreTerms
from portakv.serving.weights import checksum_of_weights

#: The key of ``--hicache-storage-backend-extra-config`` that has the terms of the store.
EXTRA = "portakv"
#: Terms of `StoreTerms` that SGLang has no use for.
OTHERS = ("by_layer", "block_size", "encoding")
#: SGLang's names of pools: of keys and values, and of those whose pages each rank has for itself.
KV = "kv"
SHARDED = ("mamba", "draft", "draft_indexer", "draft_swa")
#: SGLang's settings that fix the bytes of a page, of those that are in effect.
MODEL = ("model_path", "revision", "quantization", "dtype", "json_model_override_args")
_STORAGE = "sglang.srt.mem_cache.hicache_storage"
#: What the storage backend uses of SGLang.
HOOKS = (
    f"{_STORAGE}:HiCacheStorage.register_mem_pool_host",
    f"{_STORAGE}:HiCacheStorage.register_mem_host_pool_v2",
    f"{_STORAGE}:HiCacheStorage.on_host_pools_registered",
    f"{_STORAGE}:HiCacheStorage.batch_get_v1",
    f"{_STORAGE}:HiCacheStorage.batch_set_v1",
    f"{_STORAGE}:HiCacheStorage.batch_exists_v2",
    f"{_STORAGE}:HiCacheStorage.batch_get_v2",
    f"{_STORAGE}:HiCacheStorage.batch_set_v2",
    f"{_STORAGE}:PoolHitPolicy",
    f"{_STORAGE}:PoolTransferResult",
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
