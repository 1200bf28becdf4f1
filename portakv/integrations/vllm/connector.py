# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector over a block store: host memory, a disk that outlives the engine, a bucket.

Engines hand requests over to each other by it too: one computes prompts, another goes on.

Chosen by ``--kv-transfer-config`` with ``"kv_connector": "PortaKVConnector"`` and
``"kv_connector_module_path": "portakv.integrations.vllm_connector"``. This file maps vLLM's hooks
to a `SchedulerSide` in the scheduler and a `WorkerSide` in the worker, and decides nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from portakv.errors import TransferError
from portakv.graph import open_telemetry
from portakv.integrations import check_release, log_through
from portakv.integrations.vllm.caches import (
    TOLD,
    WHOLE,
    PoolHolder,
    extra_of,
    ids_of,
    is_served,
    is_wanted,
    kernels_of,
    layer_numbers,
    leave_last_token,
    needs_all_tokens,
    never_fails,
    parameters_for,
    remote_rows_of,
    salt_of,
    settings_of,
    share_caches,
    states_in,
    view_across_layers,
    warn_of_policy,
)
from portakv.integrations.vllm.ranks import JoinedIndex, WorkerStore, index_of, read_views
from portakv.serving import Costs, GroupCache, Plan, Report, SchedulerSide, WorkerSide, measured
from portakv.serving.handover import Endpoint, Identity
from portakv.serving.local import GRAPH, GroupView, LocalIndex
from portakv.serving.plan import NO_PLAN
from portakv.serving.scheduler import NO_STATES

check_release("vllm")

from vllm.distributed import get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402

from portakv.integrations.vllm.metrics import (  # noqa: E402
    SUPPORTED,
    Figures,
    PortaKVPromMetrics,
    PortaKVStats,
    figures_of,
    parent_of,
    stats_of,
)
from portakv.integrations.vllm.ranks import are_wanted, events_of  # noqa: E402


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


@dataclass
class EndpointMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where a worker offers rows, from the workers to the scheduler."""

    endpoint: Endpoint


class PortaKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Saves the blocks that an engine computes, and loads them for later requests; offers the rows
    of prompts to other engines, and pulls theirs.

    vLLM makes one for its scheduler and one for each worker. One worker in the scheduler's process
    has the store itself, unless it is to be shared; else a server has it.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_through(logging.getLogger("vllm"))
        tells = TOLD in getattr(SchedulerOutput, "__dataclass_fields__", ())
        self._settings = settings = settings_of(vllm_config, kv_cache_config, tells)
        self._never_fails = never_fails(KVConnectorBase_V1, settings)
        self._told = any(group.states == "told" for group in settings.groups)
        self.costs = Costs(role.name.lower())
        self.figures = Figures()
        if settings.spans:
            open_telemetry.trace()
        if role == KVConnectorRole.SCHEDULER:
            warn_of_policy(vllm_config)
            self.index = index = index_of(settings)
            keep = index.keep if isinstance(index, LocalIndex) and self._never_fails else None
            self._pool = PoolHolder()
            self.scheduler_side = SchedulerSide(
                settings.block_size,
                settings.groups,
                settings.workers.size,
                index if settings.stores else None,
                holder=self._pool,
                keep=keep,
            )
            self._computed = dict[str, int]()  # tokens before those that were offered
            self._tells = are_wanted(vllm_config)
            if self._tells:
                self.scheduler_side.describe_blocks()
                self.index.record()
        else:
            self.store = WorkerStore(settings, vllm_config)
            self._report: Report | None = None  # what `get_finished` has seen in this step
            self._failed = set[int]()
            self._incomplete = set[str]()

    # --- for the engine and its log

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(extra_config.get("by_layer")) and extra_config["by_layer"] != GRAPH

    @property
    def requires_kv_delivery(self) -> bool:
        # A preempted request that ended with its output in flight would have no rows to offer.
        handing = self._settings.handing
        return handing is not None and handing.offers

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        return self._settings.has_whole_blocks

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return PortaKVStats(data=data or {}) if SUPPORTED else None

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        if not SUPPORTED:
            return None
        return PortaKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @measured
    def get_kv_connector_stats(self) -> Any:
        return stats_of(self.figures.take(self._counters))

    def _counters(self) -> dict[str, float]:
        """Return all that is counted for Prometheus in this process.

        A store in the engine's process is the worker's, so that its scheduler counts none twice.
        """
        counters = self.statistics()
        store: Any = self.store if self.role == KVConnectorRole.WORKER else self.index
        if isinstance(store, WorkerStore | JoinedIndex):
            counters |= figures_of(store.statistics())
        return counters

    def statistics(self) -> dict[str, float]:
        """Return the counters of this side, and what its hooks cost."""
        own = self.costs.statistics()
        if self.role == KVConnectorRole.WORKER:
            return own
        counts = self.scheduler_side.statistics()
        return {**counts, **self.index.bytes_of(counts), **own}

    # --- in the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool.pool = gpu_block_pool

    @measured
    def on_new_request(self, request: Any) -> None:
        if is_served(request):
            handing = self._settings.handing
            left = int(self._settings.fails_by_request)
            if handing is not None and handing.offers and left and not needs_all_tokens(request):
                leave_last_token(request)
            extra = extra_of(request, self._settings.block_size)
            tokens = request.all_token_ids
            remote = None
            if handing is not None and handing.pulls:
                remote = remote_rows_of(request, self._identity_of, left)
            terms = salt_of(request), extra, request, remote
            self.scheduler_side.add(request.request_id, tokens, *terms)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], EndpointMetadata]
    ) -> None:
        handing = self._settings.handing
        if handing is not None:
            endpoints = [metadata[worker].endpoint for worker in sorted(metadata)]
            self.scheduler_side.open_offers(endpoints, handing.terms.lease)

    def _identity_of(self, request: Any, tokens: int) -> Identity:
        """Return what the rows of the first tokens of a request's prompt depend on."""
        extra = extra_of(request, WHOLE).values()
        some = request.prompt_token_ids[:tokens]
        return Identity.of(self._settings.model, some, salt_of(request), extra)

    @measured
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        name = request.request_id
        self._computed[name] = num_computed_tokens
        if needs_all_tokens(request):
            return 0, False
        tokens = self.scheduler_side.leading(name, num_computed_tokens)
        waits = self.scheduler_side.awaits(name) or not self._settings.store.by_layer
        return tokens, bool(tokens) and waits

    @measured
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        computed = self._computed.pop(request.request_id, None)
        if computed is None:  # its load has ended, and it was looked up before that
            computed = 0
        else:
            found = computed + num_external_tokens
            self.scheduler_side.note_computed(len(request.all_token_ids) - found)
        ids = ids_of(blocks.get_block_ids())
        with parent_of(request) if self._settings.spans else nullcontext():
            self.scheduler_side.allocated(request.request_id, computed, num_external_tokens, ids)

    @measured
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PlanMetadata:
        many = scheduler_output.num_scheduled_tokens
        for name in scheduler_output.preempted_req_ids or ():
            self.scheduler_side.preempted(name)
        for new in scheduler_output.scheduled_new_reqs:
            computed = new.num_computed_tokens
            past = computed + many[new.req_id]
            ids = ids_of(new.block_ids)
            states = states_in(scheduler_output, new.req_id) if self._told else NO_STATES
            self.scheduler_side.scheduled(new.req_id, computed, past, ids, True, states)
        old = scheduler_output.scheduled_cached_reqs
        for name, blocks, computed in zip(
            old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True
        ):
            resumed = name in old.resumed_req_ids
            ids = ids_of(blocks)
            past = computed + many[name]
            states = states_in(scheduler_output, name) if self._told else NO_STATES
            self.scheduler_side.scheduled(name, computed, past, ids, resumed, states)
        plan = self.scheduler_side.plan(idle=not many and self._settings.shows_idle)
        self.costs.step(idle=plan is NO_PLAN and not scheduler_output.scheduled_new_reqs)
        return PlanMetadata(plan)

    @measured
    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            self.scheduler_side.take(metadata.report)
        self.scheduler_side.freed(connector_output.finished_sending or ())

    @measured
    def request_finished(
        self, request: Any, block_ids: Sequence[Any]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._computed.pop(request.request_id, None)
        params = self._offer(request, block_ids)
        return self.scheduler_side.finished(request.request_id), params

    def _offer(self, request: Any, block_ids: Sequence[Any]) -> dict[str, Any] | None:
        """Offer the rows of a prompt if another engine is to go on; return what it needs."""
        handing = self._settings.handing
        if handing is None or not handing.offers or not is_wanted(request):
            return None
        if self._settings.fails_by_request and request.num_output_tokens > 1:
            return None  # min_tokens had the engine go on: states and windows are later ones
        tokens = len(request.prompt_token_ids)
        rows = self.scheduler_side.offer(request.request_id, tokens, ids_of(block_ids))
        if rows is None:
            return None
        settings = self._settings
        identity = self._identity_of(request, tokens)
        return parameters_for(request, rows, identity, settings.engine, settings.workers.size)

    request_finished_all_groups = request_finished

    def reset_cache(self) -> bool:
        return self.scheduler_side.forget()

    @measured
    def take_events(self) -> Iterable[Any]:
        if not self._tells:
            return ()
        changes = self.index.take_events()
        if not changes:
            return ()
        return events_of(changes, self.scheduler_side.described, self._settings.block_size)

    @measured
    def has_pending_block_frees(self) -> bool:
        return self.scheduler_side.retains

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._layers = layers = layer_numbers(kv_caches, self._kv_cache_config)
        handing = self._settings.handing
        if handing is not None and handing.offers:
            share_caches(kv_caches.values())
        kernels = kernels_of(self._vllm_config)
        views = read_views(self._settings, kv_caches, self._kv_cache_config, kernels)
        rank = self._rank()
        self.store.hand_over(kv_caches, self._kv_cache_config, rank, layers)
        self._open(views, layers)

    def register_cross_layers_kv_cache(self, kv_cache: torch.Tensor, attn_backend: Any) -> None:
        kernels = kernels_of(self._vllm_config)
        self._open([view_across_layers(kv_cache, self._kv_cache_config, kernels)])

    def _open(self, views: list[GroupView], layers: dict[str, int] | None = None) -> None:
        """Open the store of the engine's blocks."""
        terms = self._settings.store
        parts = self.store.open(views, self._rank(), layers)
        both = zip(views, parts, strict=True)
        caches = [GroupCache(each.view, part, each.group) for each, part in both]
        by_layer = bool(terms.by_layer)
        handover = self.store.handover
        words = self.store.words
        deadline = None if self._never_fails else terms.deadline  # rows are in host memory
        self.worker_side = WorkerSide(caches, deadline, by_layer, handover, words)

    def _rank(self) -> int:
        """Return the number of this worker in tensor parallelism."""
        return get_tensor_model_parallel_rank() if self._settings.workers.size > 1 else 0

    def get_handshake_metadata(self) -> EndpointMetadata | None:
        handover = self.store.handover
        endpoint = None if handover is None else handover.endpoint
        return None if endpoint is None else EndpointMetadata(endpoint)

    def has_connector_metadata(self) -> bool:
        """Return whether the layers of a step call their hooks: also to capture their waits."""
        words = self.store.words
        is_captured = words is not None and words.is_captured
        return bool(super().has_connector_metadata()) or is_captured

    @measured
    def handle_preemptions(self, kv_connector_metadata: PlanMetadata) -> None:
        self.worker_side.stop(kv_connector_metadata.plan)

    @measured
    def start_load_kv(self, /, forward_context: Any, **kwargs: Any) -> None:
        self.worker_side.load(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._settings.store.by_layer:
            self.worker_side.layer(self._layers[layer_name])

    def save_kv_layer(self, layer_name: str, kv_layer: Any, *args: Any, **kwargs: Any) -> None:
        """Blocks are saved after the step."""

    @measured
    def wait_for_save(self) -> None:
        self.worker_side.save(self._get_connector_metadata().plan)

    @measured
    def get_finished(
        self, finished_req_ids: Iterable[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        if self.worker_side.quiet:
            return None, None
        made = self.worker_side.report()
        self._report = made if self._report is None else self._report.merged(made)
        ended = self.worker_side.ended()
        if self._settings.fails_by_request:
            self._incomplete |= ended.incomplete
            if self._incomplete and self._never_fails:
                raise TransferError(
                    f"Expected the rows of {len(self._incomplete)} requests from host memory, got "
                    f"a copy that failed, which this release of vLLM cannot be told. See the "
                    f"warning before, and start the engine again."
                )
        else:
            self._failed |= ended.failed[0]
        return ended.freed or None, ended.loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if self._incomplete:
            results.failed_recving |= self._incomplete
            self._incomplete = set()
        return results

    @measured
    def get_block_ids_with_load_errors(self) -> set[int]:
        failed = self._failed
        self._failed = set()
        return failed

    @measured
    def build_connector_worker_meta(self) -> ReportMetadata | None:
        report = self._report
        self._report = None
        empty = report is None or report.is_empty
        self.costs.step(idle=empty and not self.worker_side.busy)
        return None if report is None or empty else ReportMetadata(report)

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self.store.close()
        elif isinstance(self.index, JoinedIndex):
            self.index.close()
