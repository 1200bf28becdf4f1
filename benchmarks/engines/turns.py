# SPDX-License-Identifier: Apache-2.0
"""A connector of vLLM that holds several connectors, of which one has its turn.

So one engine serves the same prompts with each of them, one after the other: two engines differ by
more than their connectors do. Change the turn only while the engine has no request, and after saves
have ended.
"""

from __future__ import annotations

import copy
from abc import update_abstractmethods
from collections.abc import Callable
from typing import Any, TypeVar

from portakv.integrations import check_release
from portakv_benchmarks.engines.rows import OFF

check_release("vllm")

from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
    supports_hma,
)

C = TypeVar("C", bound=type)
#: Hooks of the connector that has its turn.
OF_ONE = (
    "bind_connector_metadata",
    "build_connector_meta",
    "build_connector_worker_meta",
    "clear_connector_metadata",
    "get_block_ids_with_load_errors",
    "get_finished",
    "get_num_new_matched_tokens",
    "handle_preemptions",
    "has_connector_metadata",
    "has_pending_block_frees",
    "on_new_request",
    "reset_cache",
    "save_kv_layer",
    "start_load_kv",
    "update_connector_output",
    "update_state_after_alloc",
    "wait_for_layer_load",
    "wait_for_save",
)
#: Hooks of all connectors, in the order of their names in the configuration.
OF_ALL = (
    "bind_gpu_block_pool",
    "bind_kv_cache_manager",
    "register_cross_layers_kv_cache",
    "register_kv_caches",
    "set_host_xfer_buffer_ops",
    "shutdown",
)


def _delegating(made: C) -> C:
    """Add the hooks of `OF_ONE` and `OF_ALL` that this release of vLLM has to a class."""
    for name in OF_ONE:
        if hasattr(KVConnectorBase_V1, name) or hasattr(SupportsHMA, name):
            setattr(made, name, _of_one(name))
    for name in OF_ALL:
        if hasattr(KVConnectorBase_V1, name):
            setattr(made, name, _of_all(name))
    update_abstractmethods(made)
    return made


def _of_one(name: str) -> Callable[..., Any]:
    def call(self: TurnsConnector, *args: Any, **terms: Any) -> Any:
        return getattr(self.children[TurnsConnector.turn], name)(*args, **terms)

    return call


def _of_all(name: str) -> Callable[..., None]:
    def call(self: TurnsConnector, *args: Any, **terms: Any) -> None:
        for child in self.children.values():
            getattr(child, name)(*args, **terms)

    return call


class Nothing(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A connector that loads and saves nothing."""

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def start_load_kv(self, forward_context: Any, **terms: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, *args: Any, **terms: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


@_delegating
class TurnsConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Connectors by their names, which ``kv_connector_extra_config["connectors"]`` configures.

    Attributes:
        turn: the name of the connector that all requests of this process meet, or `OFF`.
    """

    turn = OFF

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.children = {OFF: Nothing(vllm_config, role, kv_cache_config)}
        transfer = vllm_config.kv_transfer_config
        for name, terms in transfer.kv_connector_extra_config["connectors"].items():
            config = copy.copy(vllm_config)
            # A separate engine id, since each has a separate store.
            config.kv_transfer_config = KVTransferConfig(
                **terms, engine_id=f"{transfer.engine_id}-{name}"
            )
            made = KVConnectorFactory.get_connector_class(config.kv_transfer_config)
            self.children[name] = made(config, role, kv_cache_config)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, Any]:
        child = self.children[TurnsConnector.turn]
        if supports_hma(child):
            delayed, answer = child.request_finished_all_groups(request, block_ids)
        else:
            delayed, answer = child.request_finished(request, block_ids[0])
        return delayed, answer

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        others = [child for name, child in self.children.items() if name != OFF]
        return all(child.prefer_cross_layer_blocks for child in others)

    def get_kv_connector_stats(self) -> None:
        """Figures of several connectors would mix."""

    @classmethod
    def all_serve_hybrids(cls, terms: dict[str, Any]) -> bool:
        """Return whether each of the configured connectors serves several groups of layers."""
        classes = [
            KVConnectorFactory.get_connector_class(KVTransferConfig(**each))
            for each in terms.values()
        ]
        return all(map(supports_hma, classes))
