# SPDX-License-Identifier: Apache-2.0
"""`PortaKVWitness`: a vLLM connector that wraps another one, and compares the rows that it loads.

Chosen by ``--kv-transfer-config`` with ``"kv_connector": "PortaKVWitness"`` and
``"kv_connector_module_path": "portakv.integrations.vllm.witness"``; ``kv_connector_extra_config``
names the wrapped connector, see `WitnessTerms`. Every hook of vLLM reaches the wrapped connector,
also a hook that a later release adds. The scheduler's side notes which blocks a step fills and
loads, and the worker's side has a `Witness` of the engine's caches.
"""

from __future__ import annotations

import copy
import logging
import types
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from portakv.integrations import IntegrationError, check_release, installed, log_through
from portakv.integrations.vllm.caches import (
    BY_TOKEN,
    TOLD,
    ids_of,
    kernels_of,
    states_in,
    view_across_layers,
    views_of,
    worker_numbers,
)
from portakv.integrations.vllm.notes import (
    BlockNotes,
    Filled,
    Load,
    StepNotes,
    WitnessTerms,
    check_parallel,
    check_policy,
    rank_files,
    served_groups,
)
from portakv.serving import Group
from portakv.serving.local import GroupView, numbers_of
from portakv.serving.scheduler import NO_STATES
from portakv.witness import Comparison, Witness

check_release("vllm")

from vllm.config.kv_transfer import KVTransferConfig  # noqa: E402
from vllm.distributed import get_tensor_model_parallel_rank  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402

from portakv.integrations.vllm.metrics import (  # noqa: E402
    SUPPORTED,
    WITNESS,
    Figures,
    KVConnectorPromMetrics,
    KVConnectorStats,
    PortaKVPromMetrics,
    PortaKVStats,
)

_log = logging.getLogger(__name__)


@dataclass
class WitnessMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the wrapped connector and the witness tell the workers about a step."""

    wrapped: Any
    notes: StepNotes = field(default_factory=StepNotes)


def wrapped_transfers(transfers: Any) -> tuple[WitnessTerms, Any]:
    """Return the witness's terms, and vLLM's ``kv_transfer_config`` as the wrapped connector gets
    it.

    Raises `InvalidTerms` for wrong terms.
    """
    terms = WitnessTerms.of(transfers.kv_connector_extra_config or {})
    inner = copy.copy(transfers)
    inner.kv_connector = terms.connector
    inner.kv_connector_module_path = terms.connector_module_path
    inner.kv_connector_extra_config = terms.connector_extra_config
    return terms, inner


def wrapped_config(config: Any) -> tuple[WitnessTerms, Any]:
    """Return the witness's terms, and vLLM's configuration as the wrapped connector gets it.

    Raises `InvalidTerms` for wrong terms.
    """
    made = copy.copy(config)
    terms, made.kv_transfer_config = wrapped_transfers(config.kv_transfer_config)
    return terms, made


def wrapped_class(config: Any) -> Any:
    """Return the class of the wrapped connector. ``config``: as it gets it."""
    return KVConnectorFactory.get_connector_class(config.kv_transfer_config)


def has_hybrids(config: Any) -> bool:
    """Return whether the wrapped connector serves several groups of layers.

    ``config``: as the connector gets it. A connector of several serves what all of them do.
    """
    transfers = config.kv_transfer_config
    supports = getattr(KVConnectorFactory, "supports_hma_config", None)
    if supports is not None:
        return bool(supports(transfers))
    return issubclass(wrapped_class(config), SupportsHMA)


def _passed(name: str, member: Any) -> Any:
    """Return a hook that calls the wrapped connector's hook of that name."""
    if isinstance(member, property):
        return property(lambda self: getattr(self.wrapped, name), doc=member.__doc__)

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.wrapped, name)(*args, **kwargs)

    hook.__name__ = name
    hook.__doc__ = member.__doc__
    return hook


def _passes_all() -> Any:
    """Return a class of connectors that pass all hooks of the installed vLLM on.

    Class methods are left out: they are called without a wrapped connector.
    """
    passed = dict[str, Any]()
    for base in (KVConnectorBase_V1, SupportsHMA):
        for name in dir(base):
            member = next((vars(each)[name] for each in base.__mro__ if name in vars(each)), None)
            is_hook = isinstance(member, types.FunctionType | property)
            if is_hook and not name.startswith("_") and name != "role":
                passed[name] = _passed(name, member)
    bases = (KVConnectorBase_V1, SupportsHMA)
    return types.new_class("PassingConnector", bases, exec_body=lambda space: space.update(passed))


class PortaKVWitness(_passes_all()):  # type: ignore[misc]
    """Passes every hook to the wrapped connector, and compares the blocks that it loads.

    A block that differs is logged, reported as failed so that the engine computes it, or ends the
    step with an error. vLLM makes one for its scheduler and one for each worker.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_through(logging.getLogger("vllm"))
        self.terms, inner = wrapped_config(vllm_config)
        policy = getattr(vllm_config.kv_transfer_config, "kv_load_failure_policy", "recompute")
        check_policy(self.terms, policy)
        groups = len(kv_cache_config.kv_cache_groups)
        self._serves_hybrids = has_hybrids(inner)
        if not self._serves_hybrids and groups > 1:
            raise IntegrationError(
                f"Expected one group of layers for {self.terms.connector}, which serves no hybrid "
                f"models, got {groups}. Start vLLM with --disable-hybrid-kv-cache-manager."
            )
        if not self._serves_hybrids:
            inner = _without_hybrids(inner)
        self.wrapped = wrapped_class(inner)(inner, role, kv_cache_config)
        # A step calls a dozen hooks that are only passed on: they are the wrapped connector's own.
        self.__dict__.update({name: getattr(self.wrapped, name) for name in _only_passed()})

        self._checks = self.terms.check != "off"
        if self._checks:
            check_parallel(vllm_config.parallel_config)
        self._fails_by_request = groups > 1
        if self._checks and self.terms.action == "recompute" and self._fails_by_request:
            _check_failures_by_request()
        scheduler = vllm_config.scheduler_config
        # vLLM retains the token of a step with a wrong load, or of the one planned after it.
        self.retains_tokens = (
            self._checks
            and self.terms.action == "recompute"
            and (
                bool(getattr(scheduler, "async_scheduling", False))
                or bool(getattr(vllm_config, "use_v2_model_runner", False))
            )
        )
        self._told_left_out = False
        tells = TOLD in getattr(SchedulerOutput, "__dataclass_fields__", ())
        self._groups, unserved = served_groups(kv_cache_config, tells)
        self._told = any(group is not None and group.states == "told" for group in self._groups)
        if role == KVConnectorRole.SCHEDULER:
            self.notes = BlockNotes(self._groups)
            for sentence in unserved if self._checks else ():
                _log.warning("%s", sentence)
        self.figures = Figures(metrics=WITNESS)
        self.witness: Witness | None = None  # of a worker that has registered its caches
        self._parts = dict[int, list[str]]()  # by the number of a group, its views
        self._waiting = dict[str, Load]()  # loads whose end the wrapped connector reports
        self._filled = dict[int, Filled]()  # by the number of a group, what this step fills
        self._in_step = list[Load]()  # loads that end in this step
        # Steps whose blocks may be computed from wrong rows, this one included: vLLM has planned
        # those already that follow a step with a failed load.
        self._spoilt = 0
        self._ahead = max(2, getattr(vllm_config.parallel_config, "pipeline_parallel_size", 1))
        self._errors = set[int]()  # failed blocks that vLLM has yet to hear of

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped connector has besides the hooks of vLLM's class."""
        wrapped = self.__dict__.get("wrapped")
        if wrapped is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(wrapped, name)

    # --- of the class: vLLM calls them before it makes a connector

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        terms = WitnessTerms.of(extra_config)
        transfers = KVTransferConfig(
            kv_connector=terms.connector,
            kv_connector_module_path=terms.connector_module_path,
            kv_connector_extra_config=terms.connector_extra_config,
            kv_role="kv_both",
        )
        wrapped = KVConnectorFactory.get_connector_class(transfers)
        requires = getattr(wrapped, "requires_piecewise_for_cudagraph", None)
        return requires is not None and bool(requires(terms.connector_extra_config))

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        _, inner = wrapped_transfers(kv_transfer_config)
        supports = KVConnectorFactory.get_connector_class(inner).supports_sleep_mode
        return bool(supports(inner))

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        _, inner = wrapped_config(vllm_config)
        layout: str | None = wrapped_class(inner).get_required_kvcache_layout(inner)
        return layout

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return WitnessStats.read(data or {}) if SUPPORTED else None

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        if not SUPPORTED:
            return None
        _, inner = wrapped_config(vllm_config)
        more = (metric_types, labelnames, per_engine_labelvalues)
        wrapped = wrapped_class(inner).build_prom_metrics(inner, *more)
        return WitnessPromMetrics(vllm_config, *more, wrapped)

    def get_kv_connector_stats(self) -> Any:
        stats = self.wrapped.get_kv_connector_stats()
        if not SUPPORTED:
            return stats
        grown = self.figures.take(self.statistics)
        if stats is None and not grown:
            return None
        wrapped = type(self.wrapped)
        return WitnessStats(grown, stats, f"{wrapped.__module__}:{wrapped.__qualname__}")

    def statistics(self) -> dict[str, float]:
        """Return what the witness of this worker has counted, or the scheduler.

        Faults have their kind after a slash.
        """
        if self.role == KVConnectorRole.SCHEDULER:
            return {"witness_left_out": self.notes.left_out}
        counts = Counter[str]()
        if self.witness is None:
            return {}
        for group in self.witness.figures().values():
            counts["witness_fingerprints"] += group.fingerprinted
            counts["witness_compared"] += group.compared
            counts["witness_unknown"] += group.unknown
            counts["witness_older"] += group.older
            counts["witness_dropped"] += group.dropped
            for kind, many in group.faults.items():
                counts[f"witness_faults/{kind}"] += many
        return dict(counts)

    # --- in the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._bind_pool(kv_cache_manager.block_pool)
        self.wrapped.bind_kv_cache_manager(kv_cache_manager)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._bind_pool(gpu_block_pool)
        self.wrapped.bind_gpu_block_pool(gpu_block_pool)

    def _bind_pool(self, pool: Any) -> None:
        """Note the tokens of a hash, which may be fewer than those of a block."""
        self.notes.hash_size = getattr(pool, "hash_block_size", None) or self.notes.hash_size

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens, waits = self.wrapped.get_num_new_matched_tokens(request, num_computed_tokens)
        may_load = self.notes.offered(request, num_computed_tokens, waits)
        if tokens and self.retains_tokens and not waits:
            may_load = False
            self.notes.leave_out(request.request_id)
            if not self._told_left_out:
                _log.warning(
                    "Nothing is loaded: loads of %s end within a step, and vLLM would retain the "
                    "token that this step computes from wrong rows. Start vLLM with "
                    "--no-async-scheduling and VLLM_USE_V2_MODEL_RUNNER=0.",
                    self.terms.connector,
                )
            self._told_left_out = True
        if tokens and not may_load:
            return 0, False
        return tokens, waits

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.wrapped.update_state_after_alloc(request, blocks, num_external_tokens)
        if self._checks and num_external_tokens:
            # Releases differ: some tell which groups a load restores.
            loaded = getattr(self.wrapped, "get_loaded_kv_cache_group_ids", None)
            groups = None if loaded is None else loaded(request)
            ids = ids_of(blocks.get_block_ids())
            self.notes.allocated(request, ids, num_external_tokens, groups)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> WitnessMetadata:
        if self._checks:
            self._note_step(scheduler_output)
        wrapped = self.wrapped.build_connector_meta(scheduler_output)
        return WitnessMetadata(wrapped, self.notes.take())

    def _note_step(self, step: Any) -> None:
        """Note the blocks that a step fills."""
        many = step.num_scheduled_tokens
        for new in step.scheduled_new_reqs:
            self._note_request(step, new.req_id, new.num_computed_tokens, many, new.block_ids, True)
        old = step.scheduled_cached_reqs
        for name, blocks, computed in zip(
            old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True
        ):
            resumed = name in old.resumed_req_ids
            idle = not resumed and blocks is None
            if idle and self.notes.is_within_blocks(name, computed, many[name]):
                continue
            self._note_request(step, name, computed, many, blocks, resumed)

    def _note_request(
        self, step: Any, name: str, computed: int, many: Mapping[str, int], blocks: Any, anew: bool
    ) -> None:
        """Note the blocks of a request that a step fills."""
        states = states_in(step, name) if self._told else NO_STATES
        self.notes.scheduled(name, computed, many[name], ids_of(blocks), anew, states)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._checks and self.terms.action == "recompute":
            failed = getattr(connector_output, "failed_recving", None) or ()
            self.notes.failed(connector_output.invalid_block_ids or (), failed)
        self.wrapped.update_connector_output(connector_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.notes.ended(request.request_id)
        ended: tuple[bool, dict[str, Any] | None]
        ended = self.wrapped.request_finished(request, block_ids)
        return ended

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Pass the end of a request on, as the wrapped connector hears of it without a witness."""
        if not self._serves_hybrids:
            return self.request_finished(request, block_ids[0])
        self.notes.ended(request.request_id)
        ended: tuple[bool, dict[str, Any] | None]
        ended = self.wrapped.request_finished_all_groups(request, block_ids)
        return ended

    def reset_cache(self) -> bool | None:
        self.notes.renew()
        answer: bool | None = self.wrapped.reset_cache()
        return answer

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.wrapped.register_kv_caches(kv_caches)
        if self._checks:
            kernels = kernels_of(self._vllm_config)
            self._watch(_views(kv_caches, self._kv_cache_config, self._groups, kernels))

    def register_cross_layers_kv_cache(self, kv_cache: torch.Tensor, attn_backend: Any) -> None:
        self.wrapped.register_cross_layers_kv_cache(kv_cache, attn_backend)
        if self._checks:
            self._watch([view_across_layers(kv_cache, self._kv_cache_config)])

    def _watch(self, views: list[GroupView]) -> None:
        """Begin to take fingerprints of the caches' blocks."""
        if not views:
            raise IntegrationError(
                "Expected caches with a group of layers that can be compared, got none. Start vLLM "
                "without the witness."
            )
        named = dict[str, Any]()
        numbers = numbers_of(each.group for each in views)
        for number in range(len(self._groups)):
            parts = [each.view for each, of in zip(views, numbers, strict=True) if of == number]
            name = f"group {number}"
            names = [f"{name}, part {part}" for part in range(len(parts))]
            self._parts[number] = names if len(parts) > 1 else [name] * len(parts)
            named |= zip(self._parts[number], parts, strict=True)
        terms = self.terms
        parallel = self._vllm_config.parallel_config
        ranks = getattr(parallel, "tensor_parallel_size", 1)
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        workers = parallel.world_size * getattr(parallel, "data_parallel_size", 1)
        _, worker = worker_numbers(parallel)
        stages = getattr(parallel, "pipeline_parallel_size", 1)
        files = rank_files(terms.file, worker, rank, ranks, workers, stages)
        self.witness = Witness(
            named,
            check=terms.check,
            rate=terms.rate,
            action=terms.action,
            nbytes=int(terms.nbytes),
            file=files.file,
            others=files.others,
            rank=rank,
            ranks=ranks,
            shardings=files.shardings,
            older=terms.older,  # type: ignore[arg-type]
            reports=terms.report,
            about={"engine": " ".join(installed("vllm") or ()), "connector": terms.connector},
        )
        _log.info(
            "The witness compares what %s loads: check %r, action %r, bytes of a fingerprint %s.",
            terms.connector,
            terms.check,
            terms.action,
            self.witness.block_bytes,
        )

    def handle_preemptions(self, kv_connector_metadata: WitnessMetadata) -> None:
        self.wrapped.handle_preemptions(kv_connector_metadata.wrapped)

    def bind_connector_metadata(self, connector_metadata: WitnessMetadata) -> None:
        self.wrapped.bind_connector_metadata(connector_metadata.wrapped)
        self._filled = connector_metadata.notes.filled
        self._spoilt = max(0, self._spoilt - 1)
        self._in_step = []
        for load in connector_metadata.notes.loads:
            if load.waits:
                self._waiting[load.request] = load
            else:
                self._in_step.append(load)

    def clear_connector_metadata(self) -> None:
        """End a step: the target's and the drafts' layers have written all rows."""
        self.wrapped.clear_connector_metadata()
        filled = self._filled
        self._filled = {}
        if self.witness is None:
            return
        if not self._spoilt:
            for number, (blocks, keys, first, loaded) in sorted(filled.items()):
                for part in self._parts[number]:
                    self.witness.stored(blocks, keys, part, first=first, loaded=loaded)
        self.witness.settle()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, received = self.wrapped.get_finished(finished_req_ids)
        self._compare(finished_req_ids, received or ())
        return sent, received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = self.wrapped.get_transfer_results(finished_req_ids)
        lost = results.failed_recving
        received = results.finished_recving
        failed = self._compare(finished_req_ids, received or (), lost)
        if failed and self._fails_by_request:
            results.failed_recving = {*lost, *failed}
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        errors = self._errors
        errors |= self.wrapped.get_block_ids_with_load_errors()
        self._errors = set()
        return errors

    def shutdown(self) -> None:
        try:
            if self.witness is not None:
                self.witness.close()
        finally:
            self.wrapped.shutdown()

    def _compare(
        self, ended: Iterable[str], received: Iterable[str], lost: Collection[str] = ()
    ) -> set[str]:
        """Compare the loads that have ended in this step; return the requests with wrong blocks
        that the engine is to compute again.

        Args:
            ended: requests that have ended; their loads may be incomplete.
            received: requests whose loads have ended.
            lost: those of them whose loads have failed, as the wrapped connector reports.
        """
        if self.witness is None:
            return set()
        for name in ended:
            self._waiting.pop(name, None)
        loads = self._in_step
        self._in_step = []
        loads += [load for name in received if (load := self._waiting.pop(name, None)) is not None]
        if not loads and not self._waiting:
            return set()

        # What the wrapped connector itself reports as failed is not compared, but the engine uses
        # the blocks before.
        errors = self.wrapped.get_block_ids_with_load_errors()
        self._errors |= errors
        for name in lost:
            self._waiting.pop(name, None)
        if any(not x.waits and (x.request in lost or x.brings(errors)) for x in loads):
            self._spoilt = self._ahead
        loads = [load for load in loads if load.request not in lost]
        if errors:
            loads = [load.before(errors) for load in loads]
            self._waiting = {name: load.before(errors) for name, load in self._waiting.items()}
        if not loads:
            return set()
        return self._wrong(loads)

    def _wrong(self, loads: list[Load]) -> set[str]:
        """Compare loads; return the requests with wrong blocks, and note the blocks."""
        assert self.witness is not None
        comparisons = list[tuple[int, Comparison]]()
        for number in sorted({number for load in loads for number in load.keys}):
            once = dict[int, bytes]()
            for load in loads:
                once |= load.keys.get(number, {})
            for part in self._parts[number]:
                compared = self.witness.restored([*once], [*once.values()], part)
                comparisons.append((number, compared))
        if self.terms.action == "log":
            return set()

        wrong = set[str]()
        for number, compared in comparisons:
            failed = compared.failed  # raises with the action "raise"
            wrong |= {x.request for x in loads if failed & x.keys.get(number, {}).keys()}
            if not self._fails_by_request:
                self._errors |= failed
        waits = {load.request for load in loads if load.waits}
        if not wrong <= waits:
            self._spoilt = self._ahead
        if self._fails_by_request and not wrong <= waits:
            raise IntegrationError(
                f"Expected loads that vLLM can repeat for action 'recompute', got wrong rows in a "
                f"load of {self.terms.connector} that ends within its step, for a model with "
                f"several groups of layers. Restart vLLM without this connector."
            )
        return wrong


def _only_passed() -> list[str]:
    """Return the hooks, without properties, that the witness adds nothing to."""
    (passing, *_) = PortaKVWitness.__bases__
    own = vars(PortaKVWitness)
    hooks = vars(passing).items()
    return [x for x, hook in hooks if isinstance(hook, types.FunctionType) and x not in own]


def _without_hybrids(config: Any) -> Any:
    """Return a configuration as a connector gets it that serves no hybrid models."""
    made = copy.copy(config)
    made.scheduler_config = copy.copy(config.scheduler_config)
    made.scheduler_config.disable_hybrid_kv_cache_manager = True
    return made


def _check_failures_by_request() -> None:
    """Raise `IntegrationError` if vLLM cannot compute again what a load of a hybrid lacks."""
    if not hasattr(KVConnectorBase_V1, "get_transfer_results"):
        raise IntegrationError(
            "Expected a release of vLLM with the hook get_transfer_results of connectors for "
            "action 'recompute' with several groups of layers, got one without it. Pass action "
            "'log' or 'raise', or install a later release."
        )


def _views(
    kv_caches: Mapping[str, Any],
    kv_cache_config: Any,
    groups: list[Group | None],
    kernels: Mapping[str, str],
) -> list[GroupView]:
    """Return views of the groups' caches: by head if the kernels' layout is known, else of pages.

    A group without a view is named in the log.
    """
    views = list[GroupView]()
    for number, (group, layers) in enumerate(
        zip(groups, kv_cache_config.kv_cache_groups, strict=True)
    ):
        if group is None:
            continue
        alone = SimpleNamespace(num_blocks=kv_cache_config.num_blocks, kv_cache_groups=[layers])
        try:
            made = views_of(kv_caches, alone, kernels, BY_TOKEN)
        except IntegrationError:
            try:
                made = views_of(kv_caches, alone)
            except IntegrationError as error:
                _log.warning("Blocks of group %d are not compared: %s", number, error)
                continue
        views += [each._replace(group=number) for each in made]
    return views


class WitnessStats(KVConnectorStats):  # type: ignore[misc]
    """The figures of the witness, and those of the wrapped connector.

    Args:
        own: by name what the witness's counters have grown by.
        wrapped: vLLM's object for the figures of the wrapped connector; None: it has none.
        of: the class of the wrapped connector, such as "module:Class".
    """

    def __init__(self, own: Mapping[str, float], wrapped: Any = None, of: str = "") -> None:
        self.own = PortaKVStats(data=dict(own))
        self.wrapped = wrapped
        self.of = of

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> WitnessStats:
        """Return the figures that another process has sent as plain values."""
        of = data.get("of", "")
        wrapped = None
        if of:
            module, _, name = of.partition(":")
            wrapped_class = getattr(import_module(module), name)
            wrapped = wrapped_class.build_kv_connector_stats(data=data["wrapped"])
        return cls(data.get("witness", {}), wrapped, of)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        data: dict[str, Any] = {"witness": self.own.data}
        if self.wrapped is not None:
            to_dict = getattr(self.wrapped, "to_dict", None)
            data["wrapped"] = self.wrapped.data if to_dict is None else to_dict()
            data["of"] = self.of
        return data

    @property
    def data(self) -> dict[str, Any]:
        """Return the figures as plain values, which former releases of vLLM send."""
        return self.to_dict()

    def reset(self) -> None:
        """Forget all."""
        self.own.reset()
        if self.wrapped is not None:
            self.wrapped.reset()

    def aggregate(self, other: Any) -> WitnessStats:
        """Add the figures of another process, or of a later time."""
        self.own = self.own.aggregate(other.own)
        if self.wrapped is None:
            self.wrapped = other.wrapped
            self.of = other.of
        elif other.wrapped is not None:
            self.wrapped = self.wrapped.aggregate(other.wrapped)
        return self

    def reduce(self) -> dict[str, Any]:
        """Return the figures of vLLM's log."""
        has_more = self.wrapped is not None and not self.wrapped.is_empty()
        return {**(self.wrapped.reduce() if has_more else {}), **self.own.reduce()}

    def is_empty(self) -> bool:
        """Return whether nothing has grown."""
        return self.own.is_empty() and (self.wrapped is None or bool(self.wrapped.is_empty()))


class WitnessPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counts for Prometheus what the witness and the wrapped connector report."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
        wrapped: Any,
    ) -> None:
        more = (metric_types, labelnames, per_engine_labelvalues)
        super().__init__(vllm_config, *more)
        self._own = PortaKVPromMetrics(vllm_config, *more, metrics=WITNESS)
        self._wrapped = wrapped

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        """Count what an engine reports."""
        self._own.observe(transfer_stats_data.get("witness", {}), engine_idx)
        if self._wrapped is not None and "wrapped" in transfer_stats_data:
            self._wrapped.observe(transfer_stats_data["wrapped"], engine_idx)
