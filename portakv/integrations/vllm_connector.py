# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector over a block store: host memory, and a disk that outlives the engine.

Chosen by ``--kv-transfer-config`` with ``"kv_connector": "PortaKVConnector"`` and
``"kv_connector_module_path": "portakv.integrations.vllm_connector"``. This file maps vLLM's hooks
to a `Ledger` in the scheduler and a `Hand` in the worker, and decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from portakv.integrations import check_release
from portakv.integrations.vllm_caches import (
    groups_of,
    is_served,
    salt_of,
    settings_of,
    view_of,
    warn_of_policy,
)
from portakv.serving import GroupCache, Hand, Ledger, Plan, Report
from portakv.serving.local import LocalIndex, opened_store

check_release("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class PlanMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """The plan of a step, from the scheduler to its workers."""

    plan: Plan


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """The report of a step, from the workers to the scheduler."""

    report: Report = field(default_factory=Report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        return ReportMetadata(self.report.merged(other.report))


class PortaKVConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Saves the blocks that an engine computes, and loads them for later requests.

    vLLM makes one for its scheduler and one for its worker. Both are in one process, so there is
    one worker (no tensor or pipeline parallelism).
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = settings_of(vllm_config, kv_cache_config)
        self._index = LocalIndex.of(self._settings.engine)
        if role == KVConnectorRole.SCHEDULER:
            warn_of_policy(vllm_config)
            groups = groups_of(kv_cache_config)
            self.ledger = Ledger(self._settings.block_size, groups, 1, self._index)
            self._computed = dict[str, int]()  # tokens before those that were offered
        else:
            self._report = Report()
            self._failed = set[int]()

    # --- in the scheduler

    def on_new_request(self, request: Any) -> None:
        if is_served(request):
            self.ledger.add(request.request_id, request.all_token_ids, salt_of(request))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens = self.ledger.leading(request.request_id, num_computed_tokens)
        self._computed[request.request_id] = num_computed_tokens
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        computed = self._computed.pop(request.request_id, 0)
        ids = blocks.get_block_ids()
        self.ledger.allocated(request.request_id, computed, num_external_tokens, ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PlanMetadata:
        many = scheduler_output.num_scheduled_tokens
        for name in scheduler_output.preempted_req_ids or ():
            self.ledger.preempted(name)
        for new in scheduler_output.scheduled_new_reqs:
            computed = new.num_computed_tokens
            past = computed + many[new.req_id]
            self.ledger.scheduled(new.req_id, computed, past, new.block_ids, replaced=True)
        old = scheduler_output.scheduled_cached_reqs
        for name, ids, computed in zip(
            old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True
        ):
            resumed = name in old.resumed_req_ids
            self.ledger.scheduled(name, computed, computed + many[name], ids or (), resumed)
        return PlanMetadata(self.ledger.plan())

    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            self.ledger.take(metadata.report)
        self.ledger.freed(connector_output.finished_sending or ())

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, None]:
        self._computed.pop(request.request_id, None)
        return self.ledger.finished(request.request_id), None

    def reset_cache(self) -> bool:
        return self.ledger.forget()

    def has_pending_block_frees(self) -> bool:
        return self.ledger.retains

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        view, order = view_of(kv_caches, self._kv_cache_config)
        settings = self._settings
        self._store = opened_store(view, settings.store, settings.model, settings.block_size, order)
        self._index.store = self._store
        self.hand = Hand([GroupCache(view, self._store)], settings.store.deadline)

    def handle_preemptions(self, kv_connector_metadata: PlanMetadata) -> None:
        self.hand.stop(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.hand.load(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request runs after the end of its load."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, *args: Any, **kwargs: Any) -> None:
        """Blocks are saved after the step."""

    def wait_for_save(self) -> None:
        self.hand.save(self._get_connector_metadata().plan)

    def get_finished(
        self, finished_req_ids: Iterable[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        self._report = self._report.merged(self.hand.report())
        ended = self.hand.ended()
        self._failed |= ended.failed[0]
        return ended.freed or None, ended.loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed = self._failed
        self._failed = set()
        return failed

    def build_connector_worker_meta(self) -> ReportMetadata | None:
        report = self._report
        self._report = Report()
        return None if report == Report() else ReportMetadata(report)

    def shutdown(self) -> None:
        self._index.store = None
        if store := getattr(self, "_store", None):
            store.close()
