# SPDX-License-Identifier: Apache-2.0
"""What PortaKV reads of vLLM's configuration, caches and requests for the connector."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    if parallel.world_size != 1:
        raise IntegrationError(
            f"Expected one worker for PortaKVConnector, got {parallel.world_size} by tensor or "
            f"pipeline parallelism. Run one, or choose the OffloadingConnector."
        )
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or kinds[0] not in SERVED:
        raise IntegrationError(
            f"Expected one group of layers with full attention for PortaKVConnector, got "
            f"{', '.join(kinds)}. Choose the OffloadingConnector for this model."
        )
    transfer = config.kv_transfer_config
    try:
        store = StoreTerms.of(transfer.kv_connector_extra_config)
    except InvalidTerms as error:
        raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
    model = config.model_config
    names = (model.model, model.revision, model.quantization, config.cache_config.cache_dtype)
    return Settings(
        transfer.engine_id,
        ":".join(str(name) for name in names),
        groups[0].kv_cache_spec.block_size,
        store,
    )


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


def view_of(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> KVView:
    """Return the view of all layers, whose blocks are pages that nothing looks into.

    What lies in a page depends on the attention's kernel; a page that is moved whole is right for
    each of them. Layers that share a tensor are one.

    Raises `IntegrationError` for caches without an axis of blocks.
    """
    blocks = kv_cache_config.num_blocks
    size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    tensors = [*{tensor.data_ptr(): tensor for tensor in kv_caches.values()}.values()]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    shape = shapes.pop()
    if not shapes and shape[0] == blocks:
        return KVView(tensors, "layer | block page", block_size=size)
    if not shapes and len(shape) > 1 and shape[0] == 2 and shape[1] == blocks:
        return KVView(tensors, "layer | kv block page", block_size=size)
    raise IntegrationError(
        f"Expected caches of one shape whose first or second axis is {blocks} blocks, got "
        f"{[*shape]} for the first layer. Choose the OffloadingConnector for this model."
    )


def salt_of(request: Any) -> bytes:
    """Return what keeps the blocks of a request apart from those of other tenants and adapters."""
    parts: Sequence[str] = (
        request.cache_salt or "",
        request.lora_request.lora_name if request.lora_request else "",
    )
    if not any(parts):
        return b""
    return sha256(b"\0".join(part.encode() for part in parts)).digest()


def extras_of(request: Any, block_size: int) -> dict[int, bytes]:
    """Return what blocks depend on besides their tokens: the images and sounds that they contain.

    A feature counts for each block that it reaches into, with its place in it.
    """
    extra = dict[int, bytes]()
    for feature in request.mm_features or ():
        begin = feature.mm_position.offset
        past = begin + feature.mm_position.length
        for number in range(begin // block_size, -(-past // block_size)):
            place = begin - number * block_size
            extra[number] = extra.get(number, b"") + f"{feature.identifier}@{place};".encode()
    return extra
