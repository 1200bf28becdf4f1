# SPDX-License-Identifier: Apache-2.0
"""What PortaKV reads of vLLM's configuration, caches and requests for the connector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.serving import Group
from portakv.serving.local import StoreTerms
from portakv.view import KVView

_log = logging.getLogger(__name__)
#: The kinds of KV groups that the connector serves.
SERVED = ("FullAttentionSpec", "MLAAttentionSpec")


class Settings(NamedTuple):
    """What the configuration of an engine says.

    Attributes:
        engine: the name of the engine, which its scheduler and its worker have in common.
        model: of the weights, and what else decides what a row is.
        block_size: the tokens of a stored block, which are those of the engine's blocks.
        store: where blocks are stored.
    """

    engine: str
    model: str
    block_size: int
    store: StoreTerms


def settings_of(config: Any, kv_cache_config: Any) -> Settings:
    """Return the settings of an engine.

    Raises:
        IntegrationError: parallelism, or kinds of layers, that the connector does not serve.
        InvalidTerms: wrong terms in ``kv_connector_extra_config``.
    """
    parallel = config.parallel_config
    workers = parallel.world_size * getattr(parallel, "data_parallel_size", 1)
    if workers != 1:
        raise IntegrationError(
            f"Expected one worker for PortaKVConnector, got {workers} by tensor, pipeline or data "
            f"parallelism. Run one, or choose the OffloadingConnector."
        )
    executor = getattr(parallel, "distributed_executor_backend", None)
    if executor not in (None, "uni"):
        raise IntegrationError(
            f"Expected the worker in the scheduler's process for PortaKVConnector, got the "
            f"executor {executor!r}. Leave --distributed-executor-backend out."
        )
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or kinds[0] not in SERVED:
        raise IntegrationError(
            f"Expected one group of layers with full attention for PortaKVConnector, got "
            f"{', '.join(kinds)}. Choose the OffloadingConnector for this model."
        )
    if getattr(groups[0].kv_cache_spec, "non_causal", False):
        raise IntegrationError(
            "Expected causal attention for PortaKVConnector, got layers whose rows depend on later "
            "tokens. Choose the OffloadingConnector for this model."
        )
    transfer = config.kv_transfer_config
    try:
        store = StoreTerms.of(transfer.kv_connector_extra_config)
    except InvalidTerms as error:
        raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
    model = config.model_config
    names = (
        model.model,
        model.revision,
        model.quantization,
        config.cache_config.cache_dtype,
        _checksum_of(model),
    )
    return Settings(
        transfer.engine_id,
        ":".join(str(name) for name in names),
        groups[0].kv_cache_spec.block_size,
        store,
    )


def _checksum_of(model: Any) -> str:
    """Return a checksum of a model's configuration, with what the user has overridden."""
    config = getattr(model, "hf_config", None)
    text = config.to_json_string(use_diff=False) if config is not None else ""
    return sha256(text.encode()).hexdigest()[:16]


def warn_of_policy(config: Any) -> None:
    """Log a warning if a block that cannot be loaded would end its request with an error."""
    policy = getattr(config.kv_transfer_config, "kv_load_failure_policy", "recompute")
    if policy != "recompute":
        _log.warning(
            "kv_load_failure_policy is %r: a stored block that is damaged, or was evicted "
            "meanwhile, ends its request with an error. Set it to 'recompute'.",
            policy,
        )


def groups_of(kv_cache_config: Any) -> list[Group]:
    """Return the groups of layers as a ledger takes them."""
    return [Group(group.kv_cache_spec.block_size) for group in kv_cache_config.kv_cache_groups]


def view_of(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> tuple[KVView, str]:
    """Return the view of all layers, whose blocks are pages that nothing looks into, and what
    decides where a row lies in a page: the shape of a block in the order of its memory.

    What lies in a page also depends on the attention's kernel; a page that is moved whole is right
    for each of them. Layers that share a tensor are one.

    Raises `IntegrationError` for caches without an axis of blocks.
    """
    blocks = kv_cache_config.num_blocks
    size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    tensors = [*{tensor.data_ptr(): tensor for tensor in kv_caches.values()}.values()]
    shapes = {(tuple(tensor.shape), tensor.stride()) for tensor in tensors}
    shape, strides = shapes.pop()
    outer = 1 if shape[0] == blocks else 2
    if shapes or shape[outer - 1] != blocks or (outer == 2 and shape[0] != 2):
        raise IntegrationError(
            f"Expected caches of one shape whose first or second axis is {blocks} blocks, got "
            f"{[*shape]} for the first layer. Choose the OffloadingConnector for this model."
        )
    # vLLM's tensors name the heads before the tokens, whatever their order in memory.
    inner = sorted(range(outer, len(shape)), key=lambda axis: -strides[axis])
    pages = [tensor.permute(*range(outer), *inner) for tensor in tensors]
    layout = "layer | block page" if outer == 1 else "layer | kv block page"
    order = f"axes {inner} of {[*shape[outer:]]} {tensors[0].dtype}"
    return KVView(pages, layout, block_size=size), order


def is_served(request: Any) -> bool:
    """Return whether the rows of a request depend on its tokens, salt and adapter alone.

    Others are computed by the engine: requests with embeddings in place of tokens, with images or
    sounds, and sessions whose later parts are added to them.
    """
    embeds = getattr(request, "prompt_embeds", None)
    resumable = getattr(request, "resumable", False)
    return embeds is None and not request.mm_features and not resumable


def salt_of(request: Any) -> bytes:
    """Return what keeps the blocks of a request apart from those of other tenants and adapters."""
    adapter = request.lora_request
    parts = [request.cache_salt or ""]
    if adapter is not None:
        parts += adapter.lora_name, getattr(adapter, "lora_path", "")
    if not any(parts):
        return b""
    return sha256(b"\0".join(part.encode() for part in parts)).digest()
